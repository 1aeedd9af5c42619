"""Outliers: boundary features, and latents that a diffusion model draws under them.

    python synthesize.py runs/cifar100/ce.pt --dataset cifar100 --data-root DIR --out outliers.pt

1. `boundary_outliers`: per class, the training features farthest from their class by k-nearest-
   neighbour distance, and around them the Gaussian draws farther still (the paper's section 3.2).
2. A latent diffusion model, trained here in about a minute, learns the latents of ID images given
   their unit features, then draws latents under the boundary outliers. A latent is the code of a
   stage-2 feature map; decoded, it enters the network between `lower` and `upper`.

With `--generator sd` and a GPU the latents are Stable Diffusion's, as in the paper.
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
from models import fail

# --- Boundary outliers. ---------------------------------------------------------------------------


def unit_features(net, data):
    """Training images -> features [N, D] of unit length, on the network's device."""
    images, _ = data.splits["train"]
    return torch.cat([F.normalize(features, dim=1)
                      for _, features in models.feature_batches(net, images, data.mean, data.std)])


def kth_distance(queries, bank, k):
    """Distance of unit vectors queries [Q, D] to their k-th nearest in bank [N, D], k from 1: [Q]."""
    kth = (queries @ bank.T).topk(k, dim=1, sorted=False)[0].amin(1)          # cosines [Q]
    return (2 - 2 * kth).clamp_min(0).sqrt()


@torch.no_grad()
def boundary_outliers(features, labels, per_class=100, generator=None, k_fraction=0.6, boundary=50,
                      draws=1500, keep=2, sigma=0.07):
    """Outliers about the boundary of every class -> (float32 [C * per_class, D] unit, labels int64).

    features float32 [N, D] of any length, labels int64 [N]. Per class, the distance to the k-th
    nearest image ranks the images (k = k_fraction of the class: 300 of 500 as released); the
    `boundary` farthest are the boundary. Around each in turn `draws` samples of N(0, s^2 I) are
    renormalised, and the `keep` farthest stay, until the class has per_class. NPOS: 2303.02966.

    The cosine of a sample to its boundary point is about 1 / sqrt(1 + s^2 D). So that it does not
    depend on D, s = sigma sqrt(768 / D): the released teacher has D = 768 and sigma = 0.07.
    ValueError if a class has one image, which has no neighbour, or a feature is not finite.
    """
    if not torch.isfinite(features).all():
        raise ValueError("boundary_outliers: a feature is not finite")
    features = F.normalize(features.float(), dim=1)
    generator = generator or torch.Generator(features.device).manual_seed(0)
    s = sigma * math.sqrt(768 / features.shape[1])
    classes, outliers = labels.unique(), []
    for label in models.progress("classes with boundary outliers", classes.tolist()):
        bank = features[labels == label]                                      # [n, D]
        if len(bank) < 2:
            raise ValueError(f"boundary_outliers: class {label} has a single image")
        k = max(1, min(len(bank) - 1, round(k_fraction * len(bank))))
        own = kth_distance(bank, bank, k + 1)  # k + 1: an image is its own nearest neighbour
        points = bank[own.argsort(descending=True, stable=True)[:boundary]]   # [P, D]
        kept = []
        while sum(map(len, kept)) < per_class:
            point = points[len(kept) % len(points)]
            noise = torch.randn(draws, bank.shape[1], generator=generator, device=generator.device)
            sample = F.normalize(point + s * noise.to(bank.device), dim=1)    # [draws, D]
            kept.append(sample[kth_distance(sample, bank, k).topk(min(keep, draws))[1]])
        outliers.append(torch.cat(kept)[:per_class])
    return torch.cat(outliers), classes.repeat_interleave(per_class)


@torch.no_grad()
def gaussian_outliers(features, labels, per_class, generator, draws=10000):
    """The virtual outliers of VOS (arXiv 2202.01197), a peer -> float32 [C * per_class, D].

    features [N, D], labels [N] on the CPU. Each class is a Gaussian about its mean, with the
    covariance that all classes share; of `draws` samples the per_class of lowest density stay. VOS
    refits its Gaussians as it trains; here they are those of the start.
    """
    classes = labels.unique()
    features = features.double()  # in float32 the Cholesky root can fail
    means = torch.stack([features[labels == label].mean(0) for label in classes])         # [C, D]
    centred = features - means[torch.searchsorted(classes, labels)]
    covariance = centred.T @ centred / len(features)
    ridge = 1e-4 * torch.eye(len(covariance)).double()                                    # as released
    root = torch.linalg.cholesky(covariance + ridge)                                      # [D, D]
    outliers = []
    for mean in means:
        z = torch.randn(draws, len(root), generator=generator)
        z = z[z.square().sum(1).topk(per_class)[1]]                       # lowest density: longest
        outliers.append((mean + z.double() @ root.T).float())
    return torch.cat(outliers)


# --- Latents: codes of stage-2 maps, by their principal components over the training set. The code
# is linear: a synthesised code can replace the coded part of a real map and keep the rest of it.

CODE = 256   # numbers per latent
BATCH = 256  # latents per step of the diffusion model's training


@torch.no_grad()
def fit_codec(maps):
    """Maps [N, C, H, W] -> codec {mean [P], basis [L, P] orthonormal, scale []}, P = C H W.

    L = 256 principal components, or fewer: none of negligible variance. Exact, by the Gram matrix.
    """
    x = maps.float().flatten(1)                                                           # [N, P]
    mean, energy = x.mean(0), x.square().sum().item()
    x = x - mean
    values, vectors = torch.linalg.eigh((x @ x.T).cpu())                                  # ascending
    least = max(1e-6 * values[-1].item(), 1e-10 * energy)                                 # rounding
    size = min(CODE, len(x) - 1, int((values > least).sum()))
    values, vectors = values[len(x) - size:], vectors[:, len(x) - size:]
    basis = F.normalize(vectors.T.to(x) @ x, dim=1)                                       # [L, P]
    return {"mean": mean, "basis": basis, "scale": (values.mean() / len(x)).sqrt().to(x)}


def codec_of(net, data):
    """-> (2,000 of the training images, their maps, the codec fitted to these)."""
    images, _ = data.splits["train"]
    spread = torch.linspace(0, len(images) - 1, min(2000, len(images))).long()  # lists are sorted
    some = images[spread.to(images.device)]
    maps = torch.cat([maps for maps, _ in models.feature_batches(net, some, data.mean, data.std)])
    codec = fit_codec(maps)
    alike = some.eq(some[0]).all()  # equal maps may differ by rounding, in bf16 by a thousandth
    if alike or not len(codec["basis"]):
        fail(f"the training images of {data.name} are all alike: there is nothing to learn")
    return some, maps, codec


def encode(maps, codec):
    """Maps [B, C, H, W] -> codes float32 [B, L], of about unit mean square."""
    return (maps.float().flatten(1) - codec["mean"]) @ codec["basis"].T / codec["scale"]


def decode(codes, codec, shape):
    """Codes [B, L] -> maps [B, C, H, W], shape = (C, H, W)."""
    return (codes * codec["scale"] @ codec["basis"] + codec["mean"]).unflatten(1, shape)


# --- Latent diffusion: v-prediction (arXiv 2202.00512), cosine schedule, classifier-free guidance
# (arXiv 2207.12598).


class Denoiser(nn.Module):
    """Noised latents [B, L], time [B] in 0..1, condition [B, D] -> predicted velocity [B, L].

    The velocity of a Gaussian with the latents' means and variances, in closed form, plus a
    residual MLP whose blocks time and condition shift and scale. `null` is the condition 'none'.
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
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
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


def train_diffusion(latents, conds, steps, generator, width=512, drop=0.1):
    """Latents [N, L] with their conditions [N, D] -> a Denoiser, by `steps` of the velocity loss.

    The condition is dropped with probability `drop`: one network knows p(z|c) and p(z).
    """
    device = latents.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        variance = latents.var(0).clamp_min(1e-6)
        net = Denoiser(latents.mean(0), variance, conds.shape[1], width).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # 100 steps of warm-up, then a cosine
        optimizer, lambda t: min(1, (t + 1) / 100) * 0.5 * (1 + math.cos(math.pi * t / steps)))
    rand = lambda draw, *shape: draw(*shape, generator=generator, device=device)
    for _ in models.progress("steps of the diffusion model", range(steps)):
        index = torch.randint(len(latents), (BATCH,), generator=generator, device=device)
        z, cond = latents[index], conds[index]
        time, noise = rand(torch.rand, BATCH), rand(torch.randn, *z.shape)
        dropped = rand(torch.rand, BATCH, 1) < drop
        alpha, sigma = signal_and_noise(time)
        with models.autocast(device):
            velocity = net(alpha * z + sigma * noise, time, torch.where(dropped, net.null, cond))
        loss = F.mse_loss(velocity, alpha * noise - sigma * z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"synthesize: diffusion model, {steps} steps, loss {loss.item():.3f}", flush=True)
    return net.eval()


@torch.no_grad()
def draw_latents(net, conds, generator, guidance=1.0, steps=20):
    """Conditions [B, D] -> latents float32 [B, L]: from noise along the predicted velocity.

    z = cos(angle) x + sin(angle) noise, so that the velocity is dz / d angle. From pi / 2 to 0 by the
    Adams-Bashforth rule of second order; its first order is DDIM's (arXiv 2010.02502), which with 20
    steps loses 7 % of the latents' length. velocity = v(none) + guidance (v(cond) - v(none)): above 1
    latents become longer than real ones.
    """
    device, drawn = net.null.device, []
    for cond in models.progress("batches of latents", conds.to(device).split(1024)):
        z = torch.randn(len(cond), len(net.mean), generator=generator, device=device)
        before = None
        for time in torch.linspace(1, 0, steps + 1, device=device)[:-1]:
            time = time.expand(len(cond))
            with models.autocast(device):
                v = net(z, time, cond)
                if guidance != 1:
                    none = net(z, time, net.null.expand_as(cond))
                    v = none + guidance * (v - none)
            slope = v if before is None else 1.5 * v - 0.5 * before
            z, before = z - math.pi / 2 / steps * slope, v
        drawn.append(z)
    return torch.cat(drawn)


def transplant(codes, hosts, codec, detail=1.0):
    """Codes [B, L] of outliers -> maps [B, C, H, W]: each host's map with its coded part replaced.

    hosts [B, C, H, W] are maps of ID images. What the code leaves out stays the host's, times
    `detail`, a number or [B, 1, 1, 1]: smoother below 1, rougher above.
    """
    with torch.autocast(hosts.device.type, enabled=False):
        rest = hosts - decode(encode(hosts, codec), codec, hosts.shape[1:])
        return decode(codes, codec, hosts.shape[1:]) + detail * rest


def outlier_maps(maps, outliers, draws, noise=None):
    """Maps of ID images [B, C, H, W], tensors of outliers.pt, draws [M, 4] in 0..1 -> M outlier maps.

    draws choose a latent, a host among the images, and 0 to 2 times the contrast of the latent and
    of the host's detail. With a generator `noise`, the row to beat: the host plus Gaussian noise as
    strong as the maps, no latent.
    """
    latents, (chosen, host, contrast, detail) = outliers["latent"], draws.T
    hosts = maps.detach()[(host * len(maps)).long()].float()
    if noise:
        return hosts + hosts.std() * torch.randn(hosts.shape, generator=noise, device=hosts.device)
    codes = 2 * contrast[:, None] * latents[(chosen * len(latents)).long()]
    return transplant(codes, hosts, outliers, 2 * detail[:, None, None, None])


# --- Optional: Stable Diffusion v1 in place of the diffusion model above, by diffusers, as released
# (HengGao12/OAL, outlier_generation/; Dream-OOD, arXiv 2309.13415): a boundary outlier is the last
# word of its prompt. It stands for the whole name of the class, so that all prompts have one length;
# the release shortens names to one word ('maple' for maple_tree) and puts the outlier there.

SD_PROMPT = "A high-quality image of the thing"


def load_sd(name, device):
    """A folder or a name on the Hugging Face hub -> its StableDiffusionPipeline, with PLMS."""
    try:
        import transformers  # noqa: F401
        from diffusers import PNDMScheduler, StableDiffusionPipeline
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        pipe = StableDiffusionPipeline.from_pretrained(
            name, safety_checker=None, requires_safety_checker=False, dtype=dtype,
            low_cpu_mem_usage=False)
    except ImportError:
        fail("--generator sd needs packages that are not installed: pip install diffusers transformers")
    except Exception as problem:  # no network, no such name, a folder of something else
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        fail(f"--sd-model {name} cannot be loaded ({reason}): name a folder, or a name on the hub")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def class_words(pipe, names):
    """C names -> words [C, E]: the mean of a name's token embeddings, as long as they are on average."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()              # [V, E]
    ids = [pipe.tokenizer(name.replace("_", " "), add_special_tokens=False).input_ids for name in names]
    unknown = pipe.tokenizer.unk_token_id  # CLIP's knows every byte, unless its files are missing
    for name, one in zip(names, ids):
        if not one or unknown in one:
            fail(f"the tokenizer of --sd-model does not know the name {name}: is its folder "
                 "tokenizer/ complete?")
    tokens = [table[one] for one in ids]
    return torch.stack([F.normalize(one.mean(0), dim=0) * one.norm(dim=1).mean() for one in tokens])


def align(features, labels, words, generator, steps=1000, temperature=0.1):
    """Unit features [N, D], labels [N], words [C, E] -> a linear map [D, E] from feature to word.

    By cross-entropy of the cosines to all words: Dream-OOD's alignment, which the release skips.
    """
    device, width = features.device, features.shape[1]
    weight = torch.randn(width, words.shape[1], generator=generator, device=device) / math.sqrt(width)
    weight, words = weight.requires_grad_(), F.normalize(words.to(device), dim=1)
    optimizer = torch.optim.Adam([weight], 1e-3)
    for _ in range(steps):
        index = torch.randint(len(features), (BATCH,), generator=generator, device=device)
        cosine = F.normalize(features[index] @ weight, dim=1) @ words.T                   # [B, C]
        loss = F.cross_entropy(cosine / temperature, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"synthesize: features mapped to words, cross-entropy {loss.item():.3f}", flush=True)
    return weight.detach()


@torch.no_grad()
def prompt_states(pipe, words):
    """Words [B, E] -> the text encoder's states [B, 77, E] of SD_PROMPT with each for its last word."""
    ids = pipe.tokenizer(SD_PROMPT, padding="max_length", return_tensors="pt").input_ids  # [1, 77]
    place = torch.tensor(len(pipe.tokenizer(SD_PROMPT).input_ids) - 2, device=pipe.device)

    def put(module, args, embedded):
        return embedded.index_copy(1, place, words[:, None].to(embedded))
    with pipe.text_encoder.get_input_embeddings().register_forward_hook(put):
        return pipe.text_encoder(ids.to(pipe.device).expand(len(words), -1))[0]


@torch.no_grad()
def sd_latents(pipe, words, seed, batch=4):
    """Words [M, E] -> latents [M, 4, 64, 64] (of v1), scaled, float32, on the CPU.

    50 steps of PLMS, guidance 7.5. Latent i starts from its own noise, of seed + i, so that the
    batch does not change it.
    """
    shape = pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size
    drawn = []
    for start in range(0, len(words), batch):
        rows = range(start, min(start + batch, len(words)))
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
                             for i in rows])
        latents = pipe(prompt_embeds=prompt_states(pipe, words[rows.start:rows.stop]),
                       latents=noise.to(pipe.device, pipe.dtype), num_inference_steps=50,
                       guidance_scale=7.5, output_type="latent").images.float().cpu()
        if not latents.isfinite().all():
            fail(f"Stable Diffusion in {str(pipe.dtype)[6:]} drew a latent that is not finite: some "
                 "GPUs do so in float16; take another by --device, or cpu")
        drawn.append(latents)
        print(f"synthesize: {rows.stop} of {len(words)} latents of Stable Diffusion", flush=True)
    return torch.cat(drawn)


@torch.no_grad()
def vae_encode(pipe, images, batch=4):
    """Images uint8 [N, 3, S, S], enlarged -> latents [N, 4, 64, 64] (of v1) as sd_latents'."""
    side, found = pipe.unet.config.sample_size * pipe.vae_scale_factor, []
    for some in models.progress("batches of images encoded", images.split(batch)):
        scaled = some.to(pipe.device, pipe.dtype) / 127.5 - 1
        enlarged = F.interpolate(scaled, size=side, mode="bilinear")
        found.append(pipe.vae.encode(enlarged).latent_dist.mean.float().cpu())
    return torch.cat(found) * pipe.vae.config.scaling_factor


@torch.no_grad()
def vae_decode(pipe, latents, batch=4):
    """Latents [N, 4, 64, 64] as sd_latents' -> images float32 [N, 3, 512, 512] (of v1), about 0..1."""
    scaled = (latents / pipe.vae.config.scaling_factor).to(pipe.device, pipe.dtype)
    return torch.cat([pipe.vae.decode(some).sample.float().cpu() for some in scaled.split(batch)]) / 2 + 0.5


def ridge_regression(x, y, strength=1.0):
    """x [N, P], y [N, Q] -> weight [P, Q], offset [Q] of y ~ x @ weight + offset.

    The penalty is `strength` times the mean eigenvalue of the centred x's Gram matrix.
    """
    x_mean, y_mean = x.double().mean(0), y.double().mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x                                                                        # [P, P]
    penalty = strength * gram.diag().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram + penalty, x.T @ y)
    return weight.float(), (y_mean - x_mean @ weight).float()


def synthesize_sd(pipe, net, data, per_class, n, generator, batch=4, teacher=None):
    """`synthesize` by Stable Diffusion -> (the tensors of outliers.pt on the CPU, raw latents).

    n latents, each under a random boundary outlier. latent [n, L] are their codes, by a map fitted
    to ID images; released [n, 64] (of v1) is what the released trainer makes of them: the mean over
    channels, then over rows.
    """
    features, labels = unit_features(teacher or net, data), data.splits["train"][1]
    labels = labels.to(features.device)
    words = class_words(pipe, data.classes).to(features.device)
    if features.shape[1] != words.shape[1]:
        features = features @ align(features, labels, words, generator)
    boundary, classes = boundary_outliers(features, labels, per_class, generator)
    chosen = torch.randint(len(boundary), (n,), generator=generator, device=boundary.device)
    outlier_words = boundary[chosen] * words.norm(dim=1)[classes[chosen], None]           # [n, E]
    raw = sd_latents(pipe, outlier_words, generator.initial_seed(), batch)
    # The map from latents to codes: ID images have both. A latent is averaged to the map's size.
    some, maps, codec = codec_of(net, data)
    codec = {name: tensor.cpu() for name, tensor in codec.items()}
    pool = lambda z: F.adaptive_avg_pool2d(z, maps.shape[2:]).flatten(1)                  # [N, 4 H W]
    weight, offset = ridge_regression(pool(vae_encode(pipe, some, batch)), encode(maps.cpu(), codec))
    return {"boundary": boundary.cpu(), "boundary_labels": classes.cpu(),
            "latent": pool(raw) @ weight + offset, "latent_labels": classes[chosen].cpu(),
            "released": raw.mean(1).mean(1), **codec}, raw


# --- The whole stage: a trained network and its training images -> outliers.pt. -------------------


def synthesize(net, data, per_class, diffusion_steps, generator, teacher=None):
    """A trained network and its ImageSet -> the tensors of outliers.pt.

    boundary [N, D], latent [N, L], their labels [N], sorted by class; the codec. Latent i was drawn
    under boundary[i]. The diffusion model takes diffusion_steps, or 20 passes over the images if
    fewer: beyond, it learns them by heart. With a teacher the features are the teacher's.
    """
    images, labels = data.splits["train"]
    _, _, codec = codec_of(net, data)
    pairs = [(encode(maps, codec), F.normalize(features, dim=1))
             for maps, features in models.feature_batches(net, images, data.mean, data.std)]
    latents, features = (torch.cat(parts) for parts in zip(*pairs))                   # [N, L], [N, D]
    if teacher is not None:
        features = unit_features(teacher, data)
    boundary, classes = boundary_outliers(features, labels.to(features.device), per_class, generator)
    print(f"synthesize: {len(boundary)} boundary outliers", flush=True)
    steps = min(diffusion_steps, 20 * len(images) // BATCH)
    denoiser = train_diffusion(latents, features, max(1, steps), generator)
    latent = draw_latents(denoiser, boundary, generator)
    print(f"synthesize: {len(latent)} latents of {latent.shape[1]} numbers", flush=True)
    return {"boundary": boundary, "boundary_labels": classes, "latent": latent,
            "latent_labels": classes, **codec}


def read_outliers(path, net, size):
    """A file outliers.pt -> its tensors; ends the program unless they fit the network."""
    shape = net.eval().lower(torch.zeros(1, 3, size, size, device=net.fc.weight.device)).numel()
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: value.float() if value.is_floating_point() else value
                 for name, value in found.items()}
        sets = [found["boundary"], found["latent"], found.get("released", found["latent"])]
        fits = (all(one.dim() == 2 and one.numel() and one.is_floating_point() for one in sets)
                and found["basis"].shape == (found["latent"].shape[1], shape)
                and found["mean"].shape == (shape,) and found["scale"].dim() == 0
                and all(value.isfinite().all() for value in found.values()))
    except Exception:  # no such file, another format, other keys
        fits = False
    if not fits:
        fail(f"{path} does not hold outliers made from a network of this shape: name another file")
    return found


def nearest_images(outliers, features, data, rows=8, neighbours=9):
    """Per class one boundary outlier as the training images nearest to it -> images of a picture.

    A row begins with the image nearest to the class's mean feature. Images float32 [R, 3, 2S, 2S].
    """
    images, labels = (part.cpu() for part in data.splits["train"])
    grid = []
    for label in outliers["boundary_labels"].unique()[:rows]:
        mean = features[labels == label].mean(0)
        outlier = outliers["boundary"][outliers["boundary_labels"] == label][0]
        nearest = (features @ outlier).topk(min(neighbours, len(images)))[1]
        grid += [images[(features @ mean).argmax()], *images[nearest]]
    return F.interpolate(torch.stack(grid).float() / 255, scale_factor=2)


def main():
    parser = evaluate.common_parser(__doc__)
    parser.add_argument("checkpoint", help="weights of the network whose feature space is searched")
    parser.add_argument("--teacher", metavar="FILE", help="find the boundary in the features of this "
                        "network instead, as train.py does in those of a ViT")
    parser.add_argument("--out", default="outliers.pt", help="file for the outliers")
    parser.add_argument("--show", metavar="FILE.png", help="also draw the training images nearest to "
                        "boundary outliers, or the images of sd")
    parser.add_argument("--per-class", type=evaluate.POSITIVE, default=50, help="outliers per class")
    parser.add_argument("--diffusion-steps", type=evaluate.POSITIVE, default=1000)
    parser.add_argument("--generator", choices=("diffusion", "sd"), default="diffusion",
                        help="of the latents: trained here, or Stable Diffusion v1")
    parser.add_argument("--sd-model", metavar="FOLDER_OR_NAME", default="CompVis/stable-diffusion-v1-4",
                        help="its folder, or its name on the Hugging Face hub (%(default)s)")
    parser.add_argument("--sd-latents", type=evaluate.POSITIVE, default=300, help="its latents (300)")
    parser.add_argument("--sd-batch", type=evaluate.POSITIVE, default=4, help="of these at once (4)")
    parser.add_argument("--seed", type=evaluate.SEED, default=0)
    args = parser.parse_args()
    evaluate.check_common(args)
    if Path(args.out).exists():
        fail(f"{args.out} is there already: remove it, or name another file with --out")
    if args.show and Path(args.show).suffix.lower() != ".png":
        fail(f"--show {args.show}: the file must end in .png")
    pipe = load_sd(args.sd_model, args.device) if args.generator == "sd" else None
    data = evaluate.load_set(args.dataset, args.data_root, args.size, ["train"])
    net, teacher = (path and models.to_device(
        models.load_network(path, len(data.classes), size=args.size), args.device)
        for path in (args.checkpoint, args.teacher))
    if isinstance(net, models.ViT):
        fail(f"{args.checkpoint} is a ViT, which has no feature maps: name a ResNet, and this by "
             "--teacher")
    if data.splits["train"][1].bincount().eq(1).any():
        fail(f"a class of {data.name} has a single image, which has no nearest neighbour: add one")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # where that fails, before the work
    g = torch.Generator(args.device).manual_seed(10 * args.seed + 2)  # train.py's
    if pipe:
        outliers, raw = synthesize_sd(pipe, net, data, args.per_class, args.sd_latents, g,
                                      args.sd_batch, teacher)
    else:
        outliers = synthesize(net, data, args.per_class, args.diffusion_steps, g, teacher)
    outliers = {name: tensor.cpu() for name, tensor in outliers.items()}
    evaluate.write(args.out, outliers)
    print(f"written: {args.out}")
    if args.show:
        features = unit_features(teacher or net, data).cpu()
        images = vae_decode(pipe, raw[:16]) if pipe else nearest_images(outliers, features, data)
        columns, picture = 8 if pipe else 10, io.BytesIO()
        save_image(images, picture, "png", nrow=columns)
        evaluate.write(args.show, picture.getvalue())
        print(f"written: {args.show}")


if __name__ == "__main__":
    evaluate.run(main)
