"""Outliers: maps of ID images, moved by a step between two latents of a diffusion model.

    python synthesize.py runs/cifar100/ce.pt --dataset cifar100 --data-root DIR --out outliers.pt

1. Per class, the training features farthest from their class by k-nearest-neighbour distance, and
   around them the Gaussian draws farther still: boundary outliers (the paper's section 3.2).
2. A latent is the code of a feature map, between `lower` and `upper`. A diffusion model, trained
   here in a minute, learns the latents of ID images given their unit features. Where there are
   fewer than 2,000 images, a Gaussian with a mean linear in the feature takes its place.
3. For each boundary outlier it draws two from the same noise: the latent, given the outlier, and
   the inlier, given the nearest training feature. Their difference, the step, added to the map of
   an ID image, is an outlier map. What the model adds to both draws cancels in the step.
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import evaluate
import models

CODE = 256    # numbers per latent, at most
BATCH = 256   # images per step of the diffusion model's training
SMALL = 2000  # images; fewer are too few for a diffusion model


# --- The whole stage: a trained network and its training images -> outliers.pt.

def synthesize(net, data, per_class, diffusion_steps, generator, features=None):
    """A trained network and its ImageSet -> the tensors of outliers.pt, on the network's device.

    latent[i] is drawn under boundary[i], inlier[i] from the same noise under the training feature
    nearest to boundary[i]. The diffusion model takes diffusion_steps, at most 20 passes over the
    images, since more memorise them. features [N, D]: those of another network, as released, in
    place of the network's own.
    """
    images, labels = data.splits["train"]
    print(f"synthesize: maps and features of {len(images)} images", flush=True)
    codec = fit_codec(some_maps(net, images))
    latents, units = zip(*((encode(maps, codec), F.normalize(batch, dim=1))
                           for maps, batch in models.feature_batches(net, images)))
    latents = torch.cat(latents)  # [N, L]
    units = torch.cat(units) if features is None else F.normalize(features, dim=1)  # [N, D]
    models.check_different(units)
    boundary, classes = boundary_outliers(units, labels.to(units.device), per_class, generator)
    nearest = nearest_features(boundary, units)  # [M, D]
    if len(images) < SMALL:
        model, draw = linear_gaussian(latents, units), draw_gaussian
    else:
        steps = min(diffusion_steps, 20 * len(images) // BATCH)
        model, draw = train_diffusion(latents, units, steps, generator), draw_latents
    noise = torch.randn(len(boundary), latents.shape[1], generator=generator,
                        device=generator.device)
    latent, inlier = (draw(model, conds, noise) for conds in (boundary, nearest))
    print(f"synthesize: {len(latent)} latents of {latent.shape[1]} numbers", flush=True)
    return {"boundary": boundary, "boundary_labels": classes, "latent": latent, "inlier": inlier,
            **codec, "network": network_of(net), "size": torch.tensor(net.size)}


def network_of(net):
    """The digest of a network's weights as uint8 [32]: outliers.pt holds tensors alone."""
    return torch.frombuffer(bytearray.fromhex(models.digest(net)), dtype=torch.uint8)


def read_outliers(path, net):
    """A file outliers.pt -> its tensors, where net is. Mistake: of another network or size."""
    outliers = models.load_tensors(path, "an outliers.pt of this program")
    try:
        shape = len(outliers["latent"]), len(outliers["basis"])
        fits = (outliers["latent"].shape == outliers["inlier"].shape == shape and shape[0]
                and outliers["scale"].dim() == 0
                and outliers["network"].equal(network_of(net)) and outliers["size"] == net.size)
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise models.Mistake(f"{path} was not made from the start of this run: name the "
                             "outliers.pt that belongs to --ce")
    return {name: value.to(net.fc.weight.device) for name, value in outliers.items()}


# --- Boundary outliers.

@torch.no_grad()
def boundary_outliers(features, labels, per_class=100, generator=None, k_fraction=0.6, images=50,
                      draws=1500, keep=2, sigma=0.07):
    """Outliers about the boundary of every class -> (float32 [C * per_class, D] unit, labels).

    features float32 [N, D] of any length, labels int64 [N]. Per class, the `images` with the
    farthest k-th neighbour (k = k_fraction of the class) are its boundary. Around each in turn,
    until there are per_class, the `keep` farthest of `draws` samples of N(0, s^2 I), renormalised,
    are kept. NPOS: 2303.02966.

    s = sigma sqrt(768 / D), so that the cosine of a sample to its boundary point, about
    1 / sqrt(1 + s^2 D), is at every D what it is at D = 768, the width of the released teacher.
    ValueError if a class has one image, which has no neighbour, or a feature is not finite.
    """
    if not features.isfinite().all():
        raise models.Mistake("boundary_outliers: a feature is not finite")
    features = F.normalize(features.float(), dim=1)
    generator = generator or torch.Generator(features.device).manual_seed(0)
    s = sigma * math.sqrt(768 / features.shape[1])
    classes, outliers = labels.unique(), []
    for label in models.progress("classes with boundary outliers", classes.tolist()):
        bank = features[labels == label]  # [n, D]
        if len(bank) < 2:
            raise models.Mistake(f"class {label} has a single image, without a neighbour: add one")
        k = max(1, min(len(bank) - 1, round(k_fraction * len(bank))))
        far = kth_distance(bank, bank, k + 1)  # k + 1: an image is its own nearest neighbour
        points = bank[far.argsort(descending=True, stable=True)[:images]]  # [P, D]
        kept = []
        while sum(map(len, kept)) < per_class:
            point = points[len(kept) % len(points)]
            noise = torch.randn(draws, bank.shape[1], generator=generator, device=generator.device)
            sample = F.normalize(point + s * noise.to(bank.device), dim=1)  # [draws, D]
            kept.append(sample[kth_distance(sample, bank, k).topk(min(keep, draws))[1]])
        outliers.append(torch.cat(kept)[:per_class])
    return torch.cat(outliers), classes.repeat_interleave(per_class)


def kth_distance(queries, bank, k):
    """Unit vectors queries [Q, D] -> their distance to the k-th nearest in bank [N, D]: [Q]."""
    chunks = queries.split(max(1, 50_000_000 // len(bank)))  # about 600 MB each, however large N
    cosine = torch.cat([(chunk @ bank.T).topk(k, dim=1, sorted=False)[0].amin(1)
                        for chunk in chunks])  # [Q]
    return (2 - 2 * cosine).clamp_min(0).sqrt()


def nearest_features(queries, features):
    """Unit vectors queries [Q, D] -> for each the nearest of the unit features [N, D]: [Q, D]."""
    chunks = models.progress("chunks of nearest features", queries.split(500))
    return features[torch.cat([(chunk @ features.T).argmax(1) for chunk in chunks])]


# --- Latents: codes of maps, by principal components.

def some_maps(net, images):
    """Up to 2,000 of the images, uint8 [N, 3, S, S] -> their maps. Mistake: they are all alike."""
    chosen = torch.linspace(0, len(images) - 1, min(2000, len(images))).long()  # lists are sorted
    images = images[chosen.to(images.device)]
    if images.eq(images[0]).all():
        raise models.Mistake("the training images are all alike: there is nothing to learn")
    return torch.cat([maps for maps, _ in models.feature_batches(net, images)])


@torch.no_grad()
def fit_codec(maps):
    """Maps [N, C, H, W] -> codec {mean [P], basis [L, P] orthonormal, scale []}, P = C H W.

    L = CODE principal components, or fewer: those whose variance is only rounding are left out.
    """
    x = maps.float().flatten(1)  # [N, P]
    mean, energy = x.mean(0), x.square().sum().item()
    x = x - mean
    values, vectors = torch.linalg.eigh((x @ x.T).cpu())  # ascending
    least = max(1e-6 * values[-1].item(), 1e-10 * energy)
    size = min(CODE, len(x) - 1, int((values > least).sum()))
    if not size:
        raise models.Mistake("the maps of the training images are all alike: there is nothing to "
                             "learn")
    values, vectors = values[len(x) - size:], vectors[:, len(x) - size:]
    basis = F.normalize(vectors.T.to(x) @ x, dim=1)  # [L, P]
    return {"mean": mean, "basis": basis, "scale": (values.mean() / len(x)).sqrt().to(x)}


def encode(maps, codec):
    """Maps [B, C, H, W] -> codes float32 [B, L], of about unit mean square."""
    return (maps.float().flatten(1) - codec["mean"]) @ codec["basis"].T / codec["scale"]


# --- Outlier maps: what joins the batch.

def outlier_maps(maps, outliers, n, generator, noise=False, share=(0, 1)):
    """Maps of ID images [B, C, H, W], tensors of outliers.pt -> outlier maps [n, C, H, W].

    Each is host + factor * step, cut off below at the least number of all hosts, but no higher than
    at 0. A host map, a latent and a factor from 0 to 2 are drawn; the step leads from the latent's
    inlier to the latent. noise, a control: normal numbers of the hosts' standard deviation in place
    of the scaled step. share: (rank, number of processes); all draw alike, each keeps its own n.
    """
    rank, world = share
    draws = torch.rand(world * n, 3, generator=generator, device=maps.device)[rank::world]  # [n, 3]
    chosen, host, strength = draws.T
    hosts = maps.detach()[(host * len(maps)).long()].float()  # [n, C, H, W]
    if noise:
        normal = torch.randn((world * n, *maps.shape[1:]), generator=generator, device=maps.device)
        step = hosts.std() * normal[rank::world]
    else:
        index = (chosen * len(outliers["latent"])).long()
        codes = outliers["latent"][index] - outliers["inlier"][index]  # [n, L]
        codes = 2 * strength[:, None] * outliers["scale"] * codes
        step = (codes @ outliers["basis"]).unflatten(1, maps.shape[1:])
    return torch.maximum(hosts + step, hosts.amin().clamp_max(0))


# --- Latent diffusion: v-prediction (arXiv 2202.00512), cosine schedule.

class Denoiser(nn.Module):
    """Noised latents [B, L], time [B] in 0..1, condition [B, D] -> predicted velocity [B, L].

    The velocity that is exact for a Gaussian with the latents' means and variances, plus a residual
    MLP; time and condition shift and scale its four blocks.
    """

    def __init__(self, mean, variance, cond_dim, width=512):
        super().__init__()
        self.register_buffer("mean", mean)  # [L]
        self.register_buffer("variance", variance)  # [L]
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(100), 32)))
        self.embed = nn.Sequential(nn.Linear(cond_dim + 64, width), nn.SiLU())
        self.enter = nn.Linear(len(mean), width)
        self.shifts = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(4))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(4))
        self.leave = nn.Linear(width, len(mean))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, z, time, cond):
        angle = time[:, None] * self.frequencies  # [B, 32]
        e = self.embed(torch.cat([cond, angle.sin(), angle.cos()], dim=1))  # [B, W]
        h = self.enter(z)  # [B, W]
        for shift, block in zip(self.shifts, self.blocks):
            gain, bias = shift(e).chunk(2, dim=1)
            h = h + block(F.layer_norm(h, h.shape[1:]) * (1 + gain) + bias)
        alpha, sigma = signal_and_noise(time)
        # E[alpha noise - sigma x | z] for x ~ N(mean, variance) and z = alpha x + sigma noise
        gaussian = alpha * sigma * (1 - self.variance) * z - sigma * self.mean
        gaussian = gaussian / (alpha ** 2 * self.variance + sigma ** 2)
        return gaussian + self.leave(F.layer_norm(h, h.shape[1:])).float()


def signal_and_noise(time):
    """Cosine schedule: time [B] in 0..1 -> (alpha, sigma) [B, 1] each, alpha^2 + sigma^2 = 1."""
    angle = time[:, None] * math.pi / 2
    return angle.cos(), angle.sin()


def train_diffusion(latents, conds, steps, generator, width=512):
    """Latents [N, L], their conditions [N, D] -> a Denoiser, by `steps` of the velocity loss."""
    random = {"generator": generator, "device": latents.device}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        net = Denoiser(latents.mean(0), latents.var(0).clamp_min(1e-6), conds.shape[1], width)
        net = net.to(latents.device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0)

    def factor(step):  # of the rate: 100 steps of warm-up, a cosine
        return min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in models.progress("steps of the diffusion model", range(steps)):
        index = torch.randint(len(latents), (BATCH,), **random)
        time, noise = torch.rand(BATCH, **random), torch.randn((BATCH, latents.shape[1]), **random)
        z, (alpha, sigma) = latents[index], signal_and_noise(time)
        with models.autocast(latents.device):
            velocity = net(alpha * z + sigma * noise, time, conds[index])
        loss = F.mse_loss(velocity, alpha * noise - sigma * z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"synthesize: diffusion model, {steps} steps, loss {loss.item():.3f}", flush=True)
    return net.eval()


@torch.no_grad()
def draw_latents(net, conds, noise, steps=20):
    """Conditions [B, D], noise [B, L] -> latents float32 [B, L], along the predicted velocity.

    The velocity is dz / d angle of z = cos(angle) x + sin(angle) noise, integrated from pi / 2 to 0
    by the second-order Adams-Bashforth rule. DDIM (arXiv 2010.02502), of first order, loses 7 % of
    the latents' length in 20 steps.
    """
    device, drawn = noise.device, []
    for cond, z in zip(conds.split(1024), noise.split(1024), strict=True):
        before = None
        for time in torch.linspace(1, 0, steps + 1, device=device)[:-1]:
            with models.autocast(device):
                v = net(z, time.expand(len(cond)), cond)
            slope = v if before is None else 1.5 * v - 0.5 * before
            z, before = z - math.pi / 2 / steps * slope, v
        drawn.append(z)
    return torch.cat(drawn)


def linear_gaussian(latents, conds):
    """Latents [N, L], conditions [N, D] -> (offset [L], linear [D, L], std [L]) of a Gaussian.

    The model of a small set, in closed form: N(offset + cond @ linear, std^2), by ridge regression;
    of four penalties the one with the least error of each row by the others. In a step the noise
    cancels: it is (outlier - nearest feature) @ linear.
    """
    centre, mean = conds.mean(0), latents.mean(0)
    x, y = (conds - centre).cpu().double(), (latents - mean).cpu().double()
    gram, eye = x @ x.T, torch.eye(len(x), dtype=torch.float64)  # [N, N]
    best = None
    for penalty in (1, 3, 10, 30):
        inverse = torch.linalg.inv(gram + penalty * gram.diag().mean() * eye)
        left = inverse @ y / inverse.diag()[:, None]  # y less its prediction without its own row
        if best is None or left.square().sum() < best[0].square().sum():
            best = left, x.T @ (inverse @ y)  # [D, L]
    left, linear = (part.float().to(latents.device) for part in best)
    return mean - centre @ linear, linear, left.square().mean(0).sqrt()


def draw_gaussian(model, conds, noise):
    """The model of linear_gaussian, conditions [B, D], noise [B, L] -> latents [B, L]."""
    offset, linear, std = model
    return offset + conds @ linear + std * noise


# --- The outliers of a peer.

@torch.no_grad()
def gaussian_outliers(features, labels, per_class, generator):
    """The virtual outliers of VOS (arXiv 2202.01197) -> float32 [C * per_class, D].

    features [N, D], labels [N] on the CPU. Each class is a Gaussian about its mean, all of one
    covariance; of 10,000 draws the per_class of lowest density stay. VOS itself refits in training.
    """
    classes = labels.unique()
    features = features.double()  # in float32 the Cholesky root can fail
    means = torch.stack([features[labels == label].mean(0) for label in classes])  # [C, D]
    centred = features - means[torch.searchsorted(classes, labels)]
    covariance = centred.T @ centred / len(features)
    covariance.diagonal().add_(1e-4)  # as released
    root = torch.linalg.cholesky(covariance)  # [D, D]
    outliers = []
    for mean in means:
        z = torch.randn(10000, len(root), generator=generator)
        z = z[z.square().sum(1).topk(per_class)[1]]  # lowest density: longest
        outliers.append((mean + z.double() @ root.T).float())
    return torch.cat(outliers)


# --- Command line.

def main():
    parser = evaluate.common_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="FILE", type=evaluate.path, help="weights of the network")
    add("--out", metavar="FILE", type=evaluate.path, default="outliers.pt",
        help="file for the outliers (%(default)s)")
    add("--per-class", type=evaluate.positive, default=50, help="boundary outliers of a class (50)")
    add("--diffusion-steps", type=evaluate.positive, default=1000, help="of training")
    add("--seed", type=evaluate.seed, default=0)
    args = parser.parse_args()
    if Path(args.out).exists():
        raise models.Mistake(f"{args.out} is there already: remove it, or name another --out")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # a mistake ends it before the work
    size = evaluate.size_of(args.checkpoint, args.size)
    data = evaluate.load_set(args.dataset, args.data_root, size, ["train"])
    net, _ = evaluate.open_network(args.checkpoint, data, args.device)
    g = models.generator(args.seed, "synthesize", args.device)
    outliers = synthesize(net, data, args.per_class, args.diffusion_steps, g)
    evaluate.write(args.out, {name: tensor.cpu() for name, tensor in outliers.items()})
    print(f"written: {args.out}")


if __name__ == "__main__":
    evaluate.guarded(main)
