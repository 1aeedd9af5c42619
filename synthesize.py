"""Outliers from the training set alone: boundary outliers in feature space, and latents that a diffusion model draws.

    python synthesize.py runs/cifar100/ce.pt --dataset cifar100 --data-root DIR --out outliers.pt

1. `boundary_outliers`: per class, the training features that are farthest from their class by k-nearest-neighbour
   distance, and around them the Gaussian draws farther still (the paper's section 3.2; NPOS, arXiv 2303.02966).
2. A latent diffusion model, trained here in about a minute, learns ID latents given their image's unit feature, and
   then draws latents under the boundary outliers as conditions. A latent is the code of a stage-2 feature map; decoded,
   it enters the network between `lower` and `upper`, and never becomes an image.

`gaussian_outliers` are those of VOS, a peer.
"""
import io
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.utils import save_image

import evaluate
import models


# ---------------------------------------------------------------------------------------------------------------------
# Boundary outliers.


def kth_distance(queries, bank, k):
    """Distance from unit vectors queries [Q, D] to their k-th nearest in bank [N, D], 1 = the nearest: [Q]."""
    kth = (queries @ bank.T).topk(k, dim=1, sorted=False)[0].amin(1)          # cosines [Q]
    return (2 - 2 * kth).clamp_min(0).sqrt()


@torch.no_grad()
def boundary_outliers(features, labels, per_class=100, generator=None, k_fraction=0.6, boundary=50, draws=1500, keep=2,
                      sigma=0.07):
    """Boundary outliers of every class -> (outliers float32 [C * per_class, D] of unit length, labels int64).

    features float32 [N, D] of any length, labels int64 [N]. Per class: the k-th nearest-neighbour distance (k =
    k_fraction of its images: 300 of 500 in the released code) ranks the images; the `boundary` farthest are the
    boundary. Around these in turn, the farthest first, `draws` samples of N(0, s^2 I), renormalised, of which the
    `keep` farthest by the same distance stay, until the class has per_class: with few, the nearer boundary points get
    none. Only one boundary point's draws are held at a time.

    What matters of the noise is its length s sqrt(D): the cosine to the boundary point is about 1 / sqrt(1 + s^2 D)
    whatever D is. So s = sigma sqrt(768 / D): `sigma` means what it means in the release, whose teacher has 768.
    A class of a single image has no neighbour to be ranked by: ValueError, as for a NaN.
    """
    if not torch.isfinite(features).all():
        raise ValueError("boundary_outliers: a feature is not finite")
    generator = generator or torch.Generator().manual_seed(0)
    features = F.normalize(features.float(), dim=1)
    s = sigma * math.sqrt(768 / features.shape[1])
    classes, outliers = labels.unique(), []
    for label in classes.tolist():
        bank = features[labels == label]                                      # [n, D]
        if len(bank) < 2:
            raise ValueError(f"boundary_outliers: class {label} has a single image, which has no nearest neighbour")
        k = max(1, min(len(bank) - 1, round(k_fraction * len(bank))))
        # k + 1: among its own class an image is its own nearest neighbour.
        points = bank[kth_distance(bank, bank, k + 1).argsort(descending=True, stable=True)[:boundary]]       # [P, D]
        kept = []
        while sum(map(len, kept)) < per_class:
            point = points[len(kept) % len(points)]
            noise = torch.randn(draws, bank.shape[1], generator=generator).to(features.device)
            sample = F.normalize(point + s * noise, dim=1)                    # [draws, D]
            kept.append(sample[kth_distance(sample, bank, k).topk(min(keep, draws))[1]])
        outliers.append(torch.cat(kept)[:per_class])
    return torch.cat(outliers), classes.repeat_interleave(per_class)


@torch.no_grad()
def gaussian_outliers(features, labels, per_class, generator, draws=10000):
    """The virtual outliers of VOS (arXiv 2202.01197), a peer -> outliers float32 [C * per_class, D].

    features [N, D], labels [N] on the CPU; the result is sorted by class. Each class is a Gaussian about its mean, with
    the covariance of all classes in common; of `draws` samples of it the per_class of lowest density stay. VOS refits
    its Gaussians as it trains; here they are those of the network that it starts from.
    """
    classes = labels.unique()
    features = features.cpu().double()  # in float32 the Cholesky root can fail
    means = torch.stack([features[labels == label].mean(0) for label in classes])         # [C, D]
    centred = features - means[torch.searchsorted(classes, labels)]
    covariance = centred.T @ centred / len(features)
    root = torch.linalg.cholesky(covariance + 1e-4 * torch.eye(len(covariance)).double())  # [D, D], 1e-4 as released
    outliers = []
    for mean in means:
        z = torch.randn(draws, len(root), generator=generator)
        z = z[z.square().sum(1).topk(per_class)[1]]                                       # lowest density: longest z
        outliers.append((mean + z.double() @ root.T).float())
    return torch.cat(outliers)


# ---------------------------------------------------------------------------------------------------------------------
# Latents: the code of a stage-2 feature map. The code is linear (the map's 256 principal components over the training
# set: its layout), so it needs no training, and a synthesised code can replace the coded part of a real map and keep
# its detail, as it is or scaled. Stable Diffusion's seam is here: its VAE's latent in place of `encode`, and any map
# from that latent to `decode`.

CODE = 256   # numbers per latent
BATCH = 256  # latents per step of the diffusion model's training


@torch.no_grad()
def fit_codec(maps):
    """Stage-2 maps [N, C, H, W] -> codec, dict of plain tensors: mean [P], basis [L, P] orthonormal, scale []; P = CHW.

    L = 256, or N - 1 where that is less. Principal components by the Gram matrix of the maps: exact, N x N.
    """
    x = maps.float().flatten(1)                                                           # [N, P]
    mean = x.mean(0)
    x = x - mean
    values, vectors = torch.linalg.eigh((x @ x.T).cpu())                                  # ascending
    size = min(CODE, len(x) - 1)
    basis = F.normalize(vectors[:, -size:].T.to(x) @ x, dim=1)                            # [L, P]
    return {"mean": mean, "basis": basis, "scale": (values[-size:].mean() / len(x)).sqrt().to(x)}


def encode(maps, codec):
    """Maps [B, C, H, W] -> codes float32 [B, L], of about unit mean square."""
    return (maps.float().flatten(1) - codec["mean"]) @ codec["basis"].T / codec["scale"]


def decode(codes, codec, shape):
    """Codes [B, L] -> maps [B, C, H, W], shape = (C, H, W): the inverse of `encode` but for what it leaves out."""
    return (codes * codec["scale"] @ codec["basis"] + codec["mean"]).unflatten(1, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Latent diffusion: v-prediction (Salimans & Ho, arXiv 2202.00512), cosine schedule, classifier-free guidance (Ho &
# Salimans, arXiv 2207.12598), DDIM sampling (Song et al., arXiv 2010.02502).


class Denoiser(nn.Module):
    """Noised latents [B, L], time [B] in 0..1, condition [B, D] -> predicted velocity [B, L].

    The velocity of a Gaussian with the latents' own means and variances is known in closed form; a residual MLP, whose
    blocks time and condition shift and scale, adds what is not Gaussian and what the condition tells. `null` is the
    condition 'none'.
    """

    def __init__(self, mean, variance, cond_dim, width=512, blocks=4):
        super().__init__()
        self.register_buffer("mean", mean)                                                # [L]
        self.register_buffer("variance", variance)                                        # [L]
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(100), 32)))
        self.null = nn.Parameter(torch.zeros(cond_dim))
        self.embed = nn.Sequential(nn.Linear(cond_dim + 64, width), nn.SiLU())
        self.enter = nn.Linear(len(mean), width)
        self.shifts = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
                                    for _ in range(blocks))
        self.leave = nn.Linear(width, len(mean))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, z, time, cond):
        angle = time[:, None] * self.frequencies                                          # [B, 32]
        e = self.embed(torch.cat([cond, angle.sin(), angle.cos()], dim=1))                # [B, W]
        h = self.enter(z)
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


def train_diffusion(latents, conds, steps, generator, device="cpu", batch_size=BATCH, lr=1e-3, drop=0.1):
    """Latents [N, L] with their conditions [N, D] -> a Denoiser fitted by `steps` steps of the velocity loss.

    The condition is dropped with probability `drop`, so that one network knows p(z|c) and p(z).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2 ** 31, (), generator=generator)))
        net = Denoiser(latents.mean(0), latents.var(0).clamp_min(1e-6), conds.shape[1]).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        z, cond = latents[index].to(device), conds[index].to(device)
        time, dropped, noise = (torch.rand(batch_size, generator=generator).to(device),
                                (torch.rand(batch_size, 1, generator=generator) < drop).to(device),
                                torch.randn(z.shape, generator=generator).to(device))
        alpha, sigma = signal_and_noise(time)
        with models.autocast(device):  # per step: a context around the loop would keep its copies of the first weights
            velocity = net(alpha * z + sigma * noise, time, torch.where(dropped, net.null, cond))
        loss = F.mse_loss(velocity, alpha * noise - sigma * z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"synthesize: diffusion step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
    return net.eval()


@torch.inference_mode()
def ddim(net, conds, latent_dim, generator, guidance=2.0, steps=50):
    """Conditions [B, D] -> latents float32 [B, L] on the CPU, by `steps` deterministic DDIM steps from Gaussian noise.

    guidance g: velocity = v(none) + g (v(cond) - v(none)); 1 is plain conditional sampling.
    """
    device = net.null.device
    drawn = []
    for cond in conds.split(1024):
        cond = cond.to(device)
        z = torch.randn(len(cond), latent_dim, generator=generator).to(device)
        times = torch.linspace(1, 0, steps + 1, device=device)
        for now, then in zip(times[:-1], times[1:]):
            time = now.expand(len(cond))
            with models.autocast(device):
                v = net(z, time, cond)
                none = net(z, time, net.null.expand_as(cond)) if guidance != 1 else v
            v = none + guidance * (v - none)
            alpha, sigma = signal_and_noise(time)
            clean, noise = alpha * z - sigma * v, sigma * z + alpha * v
            alpha, sigma = signal_and_noise(then.expand(len(cond)))
            z = alpha * clean + sigma * noise
        drawn.append(z.cpu())
    return torch.cat(drawn)


def transplant(codes, hosts, codec, detail=1.0):
    """Codes [B, L] of outliers -> stage-2 maps [B, C, H, W]: each host's map with its coded part replaced.

    hosts [B, C, H, W] are maps of ID images. What the code leaves out stays the host's: at `detail` 1 an outlier cannot
    be told by detail that the codec never draws. Another, a number or [B, 1, 1, 1], makes it smoother or rougher.
    """
    with torch.autocast(hosts.device.type, enabled=False):
        left_out = hosts - decode(encode(hosts, codec), codec, hosts.shape[1:])
        return decode(codes, codec, hosts.shape[1:]) + detail * left_out


def outlier_maps(maps, outliers, n, generator, kind="diffusion"):
    """Stage-2 maps of ID images [B, C, H, W] and the tensors of outliers.pt -> n stage-2 maps of outliers.

    Each is a random latent in a random image's detail, both scaled by 0 to 2 at random: outliers of every contrast and
    sharpness, from flat to glaring, from smooth to rough. kind 'noise' is the row to beat: Gaussian noise as strong as
    the maps in place of the latents.
    """
    latents, device = outliers["latent"], maps.device
    chosen = torch.randint(len(latents), (n,), generator=generator).to(device)
    hosts = torch.randint(2 ** 31, (n,), generator=generator).to(device) % len(maps)
    hosts = maps[hosts].detach().float()
    if kind == "noise":
        return hosts + hosts.std() * torch.randn(hosts.shape, generator=generator).to(device)
    contrast, detail = (2 * torch.rand(n, 1, generator=generator).to(device) for _ in range(2))
    return transplant(contrast * latents[chosen], hosts, outliers, detail[:, :, None, None])


# ---------------------------------------------------------------------------------------------------------------------
# The whole stage: a trained network and its training images -> outliers.pt.


def synthesize(net, images, labels, dataset, per_class, diffusion_steps, generator, device):
    """A trained network and its training set -> the tensors of outliers.pt, on the CPU.

    boundary [N, D] and latent [N, L] with boundary_labels and latent_labels [N], sorted by class, per_class of each;
    mean, basis and scale are the codec of the latents. Latent i was drawn under the condition boundary[i]. The
    diffusion model takes diffusion_steps, or 20 passes over the images if fewer: beyond, it learns them by heart.
    """
    diffusion_steps = min(diffusion_steps, 20 * len(images) // BATCH)
    spread = torch.linspace(0, len(images) - 1, min(2000, len(images))).long()  # the lists are sorted by class
    some = images[spread.to(images.device)]
    codec = fit_codec(torch.cat([maps for maps, _ in evaluate.stage2(net, some, dataset, device)]))
    pairs = [(encode(maps, codec), F.normalize(features, dim=1))
             for maps, features in evaluate.stage2(net, images, dataset, device)]
    latents, features = (torch.cat(parts) for parts in zip(*pairs))                       # [N, L], [N, D]
    boundary, classes = boundary_outliers(features, labels.to(device), per_class, generator)
    print(f"synthesize: {len(boundary)} boundary outliers", flush=True)

    denoiser = train_diffusion(latents, features, diffusion_steps, generator, device)
    latent = ddim(denoiser, boundary, latents.shape[1], generator)
    print(f"synthesize: {len(latent)} latents of {latent.shape[1]} numbers", flush=True)
    outliers = {"boundary": boundary, "boundary_labels": classes, "latent": latent, "latent_labels": classes, **codec}
    return {name: tensor.cpu() for name, tensor in outliers.items()}


def show(path, outliers, features, images, labels, rows=8, neighbours=9):
    """Draws a picture: per row one class's boundary outlier as the training images nearest to it in feature space.

    The first column is the image nearest to the class's mean feature, for comparison.
    """
    features = F.normalize(features, dim=1)
    grid = []
    for label in outliers["boundary_labels"].unique()[:rows]:
        mean = features[labels == label].mean(0)
        outlier = outliers["boundary"][outliers["boundary_labels"] == label][0]
        grid += [images[(features @ mean).argmax()], *images[(features @ outlier).topk(neighbours)[1]]]
    picture = io.BytesIO()
    save_image(F.interpolate(torch.stack(grid).float() / 255, scale_factor=2), picture, "png", nrow=neighbours + 1)
    evaluate.write(path, picture.getvalue())


def main():
    parser = evaluate.common_parser(__doc__)
    parser.add_argument("checkpoint", help="weights of the network whose feature space is searched")
    parser.add_argument("--out", default="outliers.pt", help="file for the outliers")
    parser.add_argument("--show", metavar="FILE.png", help="also draw the training images nearest to boundary outliers")
    parser.add_argument("--per-class", type=evaluate.POSITIVE, default=50, help="outliers of each kind per class")
    parser.add_argument("--diffusion-steps", type=evaluate.POSITIVE, default=1000)
    parser.add_argument("--seed", type=evaluate.SEED, default=0)
    args = parser.parse_args()
    evaluate.check_common(args)
    if Path(args.out).exists():
        evaluate.fail(f"{args.out} is there already: remove it, or name another file with --out")
    if args.show and Path(args.show).suffix.lower() != ".png":
        evaluate.fail(f"--show {args.show}: the file must end in .png")
    net = evaluate.load_network(args.checkpoint, evaluate.id_set(args)["classes"])
    images, labels = evaluate.load(args.dataset, "train", args.data_root)
    if labels.bincount().eq(1).any():
        evaluate.fail(f"a class of {args.dataset} has a single image, which has no nearest neighbour: add one")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # where that fails, before minutes of work
    g = torch.Generator().manual_seed(10 * args.seed + 2)  # train.py's: same options, same outliers
    outliers = synthesize(net, images, labels, args.dataset, args.per_class, args.diffusion_steps, g, args.device)
    evaluate.write(args.out, outliers)
    print(f"written: {args.out}")
    if args.show:
        show(args.show, outliers, evaluate.outputs(net, images, args.dataset, args.device)[1], images, labels)
        print(f"written: {args.show}")


if __name__ == "__main__":
    evaluate.run(main)
