"""Outliers: maps of ID images, moved by a step between two latents of a diffusion model.

    python synthesize.py runs/cifar100/ce.pt --dataset cifar100 --data-root DIR --out outliers.pt

1. Per class, the training features farthest from their class by k-nearest-neighbour distance, and
   around them the Gaussian draws farther still: boundary outliers (the paper's section 3.2).
2. A latent is the code of a feature map, between `lower` and `upper`. A diffusion model, trained
   here in a minute, learns the latents of ID images given their unit features.
3. For each boundary outlier it draws two from the same noise: the latent, given the outlier, and
   the inlier, given the nearest training feature. Their difference, the step, added to the map of
   an ID image, is an outlier map. What the model adds to both draws cancels in the step.
"""
import copy
import hashlib
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import evaluate
import models
from models import fail


# --- Boundary outliers.

def unit_features(net, data):
    """Training images -> features [N, D] of unit length, on the network's device.

    Mistake: they are all equal.
    """
    images, _ = data.splits["train"]
    features = torch.cat([F.normalize(features, dim=1) for _, features
                          in models.feature_batches(net, images)])
    models.check_different(features)
    return features


def kth_distance(queries, bank, k):
    """Unit vectors queries [Q, D] -> their distance to the k-th nearest in bank [N, D]: [Q]."""
    chunks = queries.split(max(1, 50_000_000 // len(bank)))  # about 600 MB each, however large N
    cosine = torch.cat([(some @ bank.T).topk(k, dim=1, sorted=False)[0].amin(1)
                        for some in chunks])  # [Q]
    return (2 - 2 * cosine).clamp_min(0).sqrt()


def nearest_features(queries, features):
    """Unit vectors queries [Q, D] -> for each the nearest of the unit features [N, D]: [Q, D]."""
    chunks = models.progress("chunks of nearest features", queries.split(500))
    return features[torch.cat([(some @ features.T).argmax(1) for some in chunks])]


@torch.no_grad()
def boundary_outliers(features, labels, per_class=100, generator=None, k_fraction=0.6, images=50,
                      draws=1500, keep=2, sigma=0.07):
    """Outliers about the boundary of every class -> (float32 [C * per_class, D] unit, labels).

    features float32 [N, D] of any length, labels int64 [N]. Per class, the `images` with the
    farthest k-th neighbour (k = k_fraction of the class) are its boundary. Around each in turn
    the `keep` farthest of `draws` samples of N(0, s^2 I), renormalised, are kept. NPOS: 2303.02966.

    s = sigma sqrt(768 / D), so that the cosine of a sample to its boundary point, about
    1 / sqrt(1 + s^2 D), is at every D what it is at D = 768, the width of the released teacher.
    ValueError if a class has one image, which has no neighbour, or a feature is not finite.
    """
    if not features.isfinite().all():
        raise ValueError("boundary_outliers: a feature is not finite")
    features = F.normalize(features.float(), dim=1)
    generator = generator or torch.Generator(features.device).manual_seed(0)
    s = sigma * math.sqrt(768 / features.shape[1])
    classes, outliers = labels.unique(), []
    for label in models.progress("classes with boundary outliers", classes.tolist()):
        bank = features[labels == label]  # [n, D]
        if len(bank) < 2:
            raise ValueError(f"boundary_outliers: class {label} has a single image")
        k = max(1, min(len(bank) - 1, round(k_fraction * len(bank))))
        own = kth_distance(bank, bank, k + 1)  # k + 1: an image is its own nearest neighbour
        points = bank[own.argsort(descending=True, stable=True)[:images]]  # [P, D]
        kept = []
        while sum(map(len, kept)) < per_class:
            point = points[len(kept) % len(points)]
            noise = torch.randn(draws, bank.shape[1], generator=generator, device=generator.device)
            sample = F.normalize(point + s * noise.to(bank.device), dim=1)  # [draws, D]
            kept.append(sample[kth_distance(sample, bank, k).topk(min(keep, draws))[1]])
        outliers.append(torch.cat(kept)[:per_class])
    return torch.cat(outliers), classes.repeat_interleave(per_class)


@torch.no_grad()
def gaussian_outliers(features, labels, per_class, generator):
    """The virtual outliers of VOS (arXiv 2202.01197), a peer -> float32 [C * per_class, D].

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


# --- Latents: codes of maps.

CODE = 256   # numbers per latent, at most
BATCH = 256  # images per step of training
SMALL = 2000  # images; with fewer a tenth is held out to say how many steps are enough


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
    values, vectors = values[len(x) - size:], vectors[:, len(x) - size:]
    basis = F.normalize(vectors.T.to(x) @ x, dim=1)  # [L, P]
    return {"mean": mean, "basis": basis, "scale": (values.mean() / len(x)).sqrt().to(x)}


def codec_of(net, data):
    """-> (up to 2,000 of the training images, their maps, the codec fitted to these)."""
    images, _ = data.splits["train"]
    chosen = torch.linspace(0, len(images) - 1, min(2000, len(images))).long()  # lists are sorted
    some = images[chosen.to(images.device)]
    maps = torch.cat([maps for maps, _ in models.feature_batches(net, some)])
    codec = fit_codec(maps)
    alike = some.eq(some[0]).all()  # equal maps may differ by rounding, in bf16 by a thousandth
    if alike or not len(codec["basis"]):
        fail(f"the training images of {data.name} are all alike: there is nothing to learn")
    return some, maps, codec


def as_bytes(digest):
    """64 hexadecimal digits -> uint8 [32]: outliers.pt holds tensors alone."""
    return torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)


def settings_of(net, per_class, diffusion_steps, seed):
    """What decides outliers beside the network: uint8 [32]; net: that whose features are used."""
    text = f"{evaluate.digest(net)} {per_class} {diffusion_steps} {seed}"
    return as_bytes(hashlib.sha256(text.encode()).hexdigest())


def encode(maps, codec):
    """Maps [B, C, H, W] -> codes float32 [B, L], of about unit mean square."""
    return (maps.float().flatten(1) - codec["mean"]) @ codec["basis"].T / codec["scale"]


def outlier_maps(maps, outliers, draws, noise=None):
    """Maps of ID images [B, C, H, W], tensors of outliers.pt -> outlier maps [M, C, H, W].

    draws [M, 3] in 0..1: which latent, which host map, and half the factor of the step from the
    latent's inlier to the latent. An outlier is host + factor * step, and nowhere less than the
    hosts are. noise [M, C, H, W], a control: standard normal numbers that, scaled to the standard
    deviation of the hosts, take the place of the scaled step; outliers are not used.
    """
    chosen, host, strength = draws.T
    hosts = maps.detach()[(host * len(maps)).long()].float()  # [M, C, H, W]
    if noise is not None:
        step = hosts.std() * noise
    else:
        index = (chosen * len(outliers["latent"])).long()
        codes = outliers["latent"][index] - outliers["inlier"][index]  # [M, L]
        codes = 2 * strength[:, None] * outliers["scale"] * codes
        step = (codes @ outliers["basis"]).unflatten(1, maps.shape[1:])
    return torch.maximum(hosts + step, hosts.amin().clamp_max(0))  # a ResNet's maps end in a ReLU


# --- Latent diffusion: v-prediction (arXiv 2202.00512), cosine schedule.

class Denoiser(nn.Module):
    """Noised latents [B, L], time [B] in 0..1, condition [B, D] -> predicted velocity [B, L].

    The velocity that is exact for a Gaussian with the latents' means and variances, plus a residual
    MLP; time and condition shift and scale its four blocks. linear [D, L], if given, moves the mean
    with the condition.
    """

    def __init__(self, mean, variance, cond_dim, width=512, linear=None):
        super().__init__()
        self.register_buffer("mean", mean)  # [L]
        self.register_buffer("variance", variance)  # [L]
        self.register_buffer("linear", linear)
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
        mean = self.mean if self.linear is None else self.mean + (cond @ self.linear).float()
        # E[alpha noise - sigma x | z] for x ~ N(mean, variance) and z = alpha x + sigma noise
        gaussian = alpha * sigma * (1 - self.variance) * z - sigma * mean
        gaussian = gaussian / (alpha ** 2 * self.variance + sigma ** 2)
        return gaussian + self.leave(F.layer_norm(h, h.shape[1:])).float()


def signal_and_noise(time):
    """Cosine schedule: time [B] in 0..1 -> (alpha, sigma) [B, 1] each, alpha^2 + sigma^2 = 1."""
    angle = time[:, None] * math.pi / 2
    return angle.cos(), angle.sin()


def linear_part(latents, conds):
    """Latents [N, L], conditions [N, D] -> (offset [L], linear [D, L], variance [L] that is left).

    Ridge regression; of four penalties the one with the least error of each row by the others.
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
    return mean - centre @ linear, linear, left.square().mean(0)


def train_diffusion(latents, conds, steps, generator, width=512):
    """Latents [N, L], their conditions [N, D] -> a Denoiser, by `steps` of the velocity loss.

    Few latents, under SMALL, say little: there the mean is linear in the condition, a tenth is held
    out, and the Denoiser is that of the step with the lowest loss on it, which may be step 0.
    Training stops 100 steps after that: more would memorise the other images.
    """
    random, small = {"generator": generator, "device": latents.device}, len(latents) < SMALL
    own = torch.arange(len(latents), device=latents.device)  # the rows to train on
    mean, linear, variance = latents.mean(0), None, latents.var(0)
    if small:
        order, n = torch.randperm(len(latents), **random), math.ceil(len(latents) / 10)
        held, own = order.split([n, len(order) - n])
        held = held.repeat(math.ceil(1000 / len(held)))  # each under many times and noises
        mean, linear, variance = linear_part(latents[own], conds[own])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        net = Denoiser(mean, variance.clamp_min(1e-6), conds.shape[1], width, linear)
        net = net.to(latents.device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0)

    def factor(step):  # of the rate: 100 steps of warm-up, a cosine
        return min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))

    def draw(n):  # -> times [n], noise [n, L]
        return torch.rand(n, **random), torch.randn((n, latents.shape[1]), **random)

    def velocity_loss(index, time, noise):
        z, (alpha, sigma) = latents[index], signal_and_noise(time)
        with models.autocast(latents.device):
            velocity = net(alpha * z + sigma * noise, time, conds[index])
        return F.mse_loss(velocity, alpha * noise - sigma * z)

    def held_out(step):  # -> (loss on the held-out tenth, under one noise, step, weights)
        with torch.no_grad():
            value = velocity_loss(held, *drawn).item()
        return value, step, copy.deepcopy(net.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    if small:
        drawn = draw(len(held))
        best = held_out(0)
    for step in models.progress("steps of the diffusion model", range(1, steps + 1)):
        index = own[torch.randint(len(own), (BATCH,), **random)]
        loss = velocity_loss(index, *draw(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if small and (step % 20 == 0 or step == steps):
            best = min(best, held_out(step), key=lambda state: state[0])
            if step >= best[1] + 100:
                break
    value, says = loss.item(), ""
    if small:
        value, step, state = best
        net.load_state_dict(state)
        says = " on a held-out tenth"
    print(f"synthesize: diffusion model, {step} steps, loss {value:.3f}{says}", flush=True)
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


# --- Optional, as released: Stable Diffusion v1 by diffusers (Dream-OOD, arXiv 2309.13415).
# A boundary outlier replaces the last word of the prompt and stands for the whole name of the
# class, so that all prompts have one length; the release shortens names ('maple' for maple_tree).

SD_PROMPT = "A high-quality image of the thing"


def load_sd(name, device):
    """A folder or a name on the Hugging Face hub -> its StableDiffusionPipeline, with PLMS."""
    # Refused: no package, no network, no such name, a folder of something else.
    with models.refusal(f"--sd-model {name} cannot be loaded: name a folder, or a name on the "
                        "Hugging Face hub, and pip install diffusers transformers"):
        from diffusers import PNDMScheduler, StableDiffusionPipeline
        pipe = StableDiffusionPipeline.from_pretrained(
            name, safety_checker=None, requires_safety_checker=False, low_cpu_mem_usage=False)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.float16 if torch.device(device).type == "cuda" else torch.float32)


def class_words(pipe, names):
    """C names -> words [C, E]: the mean of a name's token embeddings, of their mean length."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()  # [V, E]
    words = []
    for name in names:
        ids = pipe.tokenizer(name.replace("_", " "), add_special_tokens=False).input_ids
        if not ids or pipe.tokenizer.unk_token_id in ids:  # CLIP's own knows every byte
            fail(f"the tokenizer of --sd-model does not know {name}: is tokenizer/ complete?")
        tokens = table[ids]  # [T, E]
        words.append(F.normalize(tokens.mean(0), dim=0) * tokens.norm(dim=1).mean())
    return torch.stack(words)


def align(features, labels, words, generator, steps=1000):
    """Unit features [N, D], labels [N], words [C, E] -> a linear map [D, E] from feature to word.

    By cross-entropy of the cosines to all words, as in Dream-OOD; the release skips it.
    """
    random = {"generator": generator, "device": features.device}
    weight = torch.randn(features.shape[1], words.shape[1], **random)
    weight = (weight / math.sqrt(len(weight))).requires_grad_()
    words = F.normalize(words, dim=1)
    optimizer = torch.optim.Adam([weight], 1e-3)
    for _ in range(steps):
        index = torch.randint(len(features), (BATCH,), **random)
        cosine = F.normalize(features[index] @ weight, dim=1) @ words.T  # [B, C]
        loss = F.cross_entropy(cosine / 0.1, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"synthesize: features mapped to words, cross-entropy {loss.item():.3f}", flush=True)
    return weight.detach()


def outlier_words(pipe, data, features, per_class, n, generator):
    """Unit features of training images [N, D] -> (tensors of outliers.pt, two words [n, E]).

    The words are n of the boundary outliers, and the features nearest to these, both as long as the
    word of the outlier's class.
    """
    labels = data.splits["train"][1].to(features.device)
    words = class_words(pipe, data.classes).to(features.device)  # [C, E]
    if features.shape[1] != words.shape[1]:
        features = F.normalize(features @ align(features, labels, words, generator), dim=1)
    boundary, classes = boundary_outliers(features, labels, per_class, generator)
    chosen = torch.randint(len(boundary), (n,), generator=generator, device=boundary.device)
    outliers = {"boundary": boundary, "boundary_labels": classes, "latent_labels": classes[chosen]}
    length, drawn = words.norm(dim=1)[classes[chosen], None], boundary[chosen]
    return outliers, (length * drawn, length * nearest_features(drawn, features))


@torch.no_grad()
def prompt_states(pipe, words):
    """Words [B, E] -> the text encoder's states [B, 77, E] of SD_PROMPT, with each as last word."""
    ids = pipe.tokenizer(SD_PROMPT, padding="max_length", return_tensors="pt").input_ids  # [1, 77]
    last = torch.tensor(len(pipe.tokenizer(SD_PROMPT).input_ids) - 2, device=pipe.device)

    def put(module, args, embedded):
        return embedded.index_copy(1, last, words[:, None].to(embedded))
    with pipe.text_encoder.get_input_embeddings().register_forward_hook(put):
        return pipe.text_encoder(ids.to(pipe.device).expand(len(words), -1))[0]


@torch.no_grad()
def sd_latents(pipe, words, seed, batch=4):
    """Words [M, E] -> latents [M, 4, 64, 64] (of v1), scaled, float32, on the CPU.

    50 steps of PLMS, guidance 7.5. Latent i starts from noise of seed + i, whatever the batch.
    """
    side, drawn = pipe.unet.config.sample_size, []
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(words))]
    noise = torch.stack([torch.randn(4, side, side, generator=g) for g in generators])
    batches = list(zip(words.split(batch), noise.to(pipe.device, pipe.dtype).split(batch)))
    for some, z in models.progress("batches of latents of Stable Diffusion", batches):
        latents = pipe(prompt_embeds=prompt_states(pipe, some), latents=z, guidance_scale=7.5,
                       num_inference_steps=50, output_type="latent").images
        if not latents.isfinite().all():
            fail("a latent is not finite: some GPUs overflow in float16: take --device cpu")
        drawn.append(latents.float().cpu())
    return torch.cat(drawn)


@torch.no_grad()
def vae_encode(pipe, images, batch=4):
    """Images uint8 [N, 3, S, S], enlarged -> latents [N, 4, 64, 64] as sd_latents'."""
    side, found = pipe.unet.config.sample_size * pipe.vae_scale_factor, []
    for some in models.progress("batches of images encoded", images.split(batch)):
        scaled = some.to(pipe.device, pipe.dtype) / 127.5 - 1
        enlarged = F.interpolate(scaled, size=side, mode="bilinear")
        found.append(pipe.vae.encode(enlarged).latent_dist.mean.float().cpu())
    return torch.cat(found) * pipe.vae.config.scaling_factor


def ridge_regression(x, y):
    """x [N, P], y [N, Q] -> weight [P, Q], offset [Q] of y ~ x @ weight + offset.

    The penalty is the mean eigenvalue of the centred x's Gram matrix.
    """
    x_mean, y_mean = x.double().mean(0), y.double().mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x  # [P, P]
    weight = torch.linalg.solve(gram + gram.diag().mean() * torch.eye(len(gram)), x.T @ y)
    return weight.float(), (y_mean - x_mean @ weight).float()


def sd_codes(pipe, net, data, words, seed, batch=4):
    """Two words [n, E] of outlier_words -> tensors of outliers.pt.

    latent and inlier [n, L] are codes, by a linear map from raw latents at the maps' size, fitted
    to ID images; released [n, 64] is what the released trainer makes of raw latents.
    """
    raw, raw_inlier = (sd_latents(pipe, some, seed, batch) for some in words)  # of the same noise
    some, maps, codec = codec_of(net, data)
    codes, size = encode(maps, codec).cpu(), maps.shape[2:]
    own = F.adaptive_avg_pool2d(vae_encode(pipe, some, batch), size).flatten(1)  # [N, 4 H W]
    weight, offset = ridge_regression(own, codes)
    latent, inlier = (F.adaptive_avg_pool2d(one, size).flatten(1) @ weight + offset
                      for one in (raw, raw_inlier))
    return {"latent": latent, "inlier": inlier, "released": raw.mean(1).mean(1),
            "network": as_bytes(evaluate.digest(net)), **codec}


# --- The whole stage: a trained network and its training images -> outliers.pt.

def synthesize(net, data, per_class, diffusion_steps, generator, teacher=None):
    """A trained network and its ImageSet -> the tensors of outliers.pt.

    latent[i] is drawn under boundary[i], inlier[i] from the same noise under the training feature
    nearest to boundary[i]. The diffusion model takes diffusion_steps, at most 20 passes over the
    images, since more memorise them; of a small set see train_diffusion. A teacher's features take
    the place of the network's.
    """
    images, labels = data.splits["train"]
    print(f"synthesize: maps and features of {len(images)} images", flush=True)
    _, _, codec = codec_of(net, data)
    latents = torch.cat([encode(maps, codec) for maps, _ in
                         models.feature_batches(net, images)])  # [N, L]
    features = unit_features(teacher or net, data)  # [N, D]
    labels = labels.to(features.device)
    boundary, classes = boundary_outliers(features, labels, per_class, generator)
    passes = diffusion_steps if len(images) < SMALL else 20 * len(images) // BATCH
    steps = min(diffusion_steps, passes)
    denoiser = train_diffusion(latents, features, steps, generator)
    shape = len(boundary), latents.shape[1]
    noise = torch.randn(shape, generator=generator, device=generator.device)
    latent, inlier = (draw_latents(denoiser, conds, noise)
                      for conds in (boundary, nearest_features(boundary, features)))
    print(f"synthesize: {len(latent)} latents of {latent.shape[1]} numbers", flush=True)
    return {"boundary": boundary, "boundary_labels": classes, "latent": latent, "inlier": inlier,
            "latent_labels": classes, "network": as_bytes(evaluate.digest(net)), "settings":
            settings_of(teacher or net, per_class, diffusion_steps, generator.initial_seed()),
            **codec}


def read_outliers(path, net):
    """A file outliers.pt -> its tensors on the device of net; ends the program unless they fit."""
    device = net.fc.weight.device
    with torch.no_grad():
        image = torch.zeros(1, 3, net.size, net.size, dtype=torch.uint8, device=device)
        shape = net.eval().lower(net.prepare(image)).numel()
    with models.refusal(f"{path} does not hold outliers made from a network of this shape: name "
                        "another file"):
        found = models.load_tensors(path)
        found = {name: value.float() if value.is_floating_point() else value
                 for name, value in found.items()}
        sets = [found["boundary"], found["latent"], found["inlier"],
                found.get("released", found["latent"])]
        if not (all(one.dim() == 2 and one.numel() and one.is_floating_point() for one in sets)
                and found["latent"].shape == found["inlier"].shape
                and found["basis"].shape == (found["latent"].shape[1], shape)
                and found["mean"].shape == (shape,) and found["scale"].dim() == 0
                and all(len(found[f"{name}_labels"]) == len(found[name])
                        for name in ("boundary", "latent") if f"{name}_labels" in found)
                and all(value.isfinite().all() for value in found.values())):
            raise ValueError("an entry does not fit")
    return {name: value.to(device) for name, value in found.items()}


def main():
    parser = evaluate.common_parser(__doc__)
    add, file = parser.add_argument, {"type": evaluate.some_path, "metavar": "FILE"}
    add("checkpoint", **file, help="weights of the network whose feature space is searched")
    add("--teacher", **file, help="another network for the features")
    add("--out", **file, default="outliers.pt", help="file for the outliers")
    add("--generator", choices=("diffusion", "sd"), default="diffusion",
        help="of the latents: trained here, or Stable Diffusion v1")
    add("--sd-model", metavar="FOLDER_OR_NAME", default="CompVis/stable-diffusion-v1-4",
        help="of the Hugging Face hub")
    for name, default, what in (
            ("--per-class", 50, "boundary outliers of a class"),
            ("--diffusion-steps", 1000, "of training"),
            ("--sd-latents", 300, "latents of sd, and as many inliers"),
            ("--sd-batch", 4, "of these at once")):
        add(name, type=evaluate.POSITIVE, default=default, help=f"{what} (%(default)s)")
    add("--seed", type=evaluate.SEED, default=0)
    args = parser.parse_args()
    evaluate.check_common(args)
    if Path(args.out).exists():
        fail(f"{args.out} is there already: remove it, or name another file with --out")
    size = evaluate.size_of(args.checkpoint, args.size)
    pipe = load_sd(args.sd_model, args.device) if args.generator == "sd" else None
    data = evaluate.load_set(args.dataset, args.data_root, size, ["train"])
    if data.splits["train"][1].bincount().eq(1).any():
        fail(f"a class of {data.name} has a single image, which has no neighbour: add one")
    net, teacher = (path and evaluate.load_detector(path, args.device, data).net
                    for path in (args.checkpoint, args.teacher))
    if isinstance(net, models.Torchvision):
        fail(f"{args.checkpoint} has no maps: name it by --teacher, and a network of this project")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # where that fails, before the work
    g = models.generator(args.seed, "synthesize", args.device)
    if pipe:
        features = unit_features(teacher or net, data)
        outliers, words = outlier_words(pipe, data, features, args.per_class, args.sd_latents, g)
        outliers |= sd_codes(pipe, net, data, words, g.initial_seed(), args.sd_batch)
    else:
        outliers = synthesize(net, data, args.per_class, args.diffusion_steps, g, teacher)
    evaluate.write(args.out, {name: tensor.cpu() for name, tensor in outliers.items()})
    print(f"written: {args.out}")


if __name__ == "__main__":
    evaluate.guarded(main)
