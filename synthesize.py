"""Outliers from the training set alone: boundary outliers in feature space, and latents that a diffusion model draws.

    python synthesize.py runs/cifar100/ce.pt --dataset cifar100 --data-root DIR --out outliers.pt

1. `boundary_outliers`: per class, the training features that are farthest from their class by k-nearest-neighbour
   distance, and around them the Gaussian draws farther still (the paper's section 3.2; NPOS, arXiv 2303.02966).
2. A latent diffusion model, trained here in about a minute, learns ID latents given their image's unit feature, and
   then draws latents under the boundary outliers as conditions. A latent is the code of a stage-2 feature map; decoded,
   it enters the network between `lower` and `upper`, and never becomes an image.

Or, with `--generator sd` and a GPU, the latents of Stable Diffusion, as in the paper: `synthesize_sd`.
`gaussian_outliers` are those of VOS, a peer.
"""
import contextlib
import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.utils import save_image

import evaluate
import models


# --- Boundary outliers. ----------------------------------------------------------------------------------------------


def unit_features(net, images, dataset, device):
    """Images uint8 [N, 3, S, S] -> features [N, D] of unit length, on the device."""
    return torch.cat([F.normalize(features, dim=1) for _, features in evaluate.stage2(net, images, dataset, device)])


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


# --- Latents: the code of a stage-2 feature map. The code is linear (the map's 256 principal components over the
# training set: its layout), so it needs no training, and a synthesised code can replace the coded part of a real map
# and keep its detail, as it is or scaled. Latents of Stable Diffusion enter here too: `ridge` carries them over.

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


def codec_of(net, images, dataset, device):
    """-> (2,000 of the images uint8 [N, 3, S, S], their stage-2 maps on the device, the codec fitted to these)."""
    spread = torch.linspace(0, len(images) - 1, min(2000, len(images))).long()  # the lists are sorted by class
    some = images[spread.to(images.device)]
    maps = torch.cat([maps for maps, _ in evaluate.stage2(net, some, dataset, device)])
    codec = fit_codec(maps)
    if not codec["scale"] > 0:
        evaluate.fail(f"the training images of {dataset} are all alike: there is nothing to learn")
    return some, maps, codec


def encode(maps, codec):
    """Maps [B, C, H, W] -> codes float32 [B, L], of about unit mean square."""
    return (maps.float().flatten(1) - codec["mean"]) @ codec["basis"].T / codec["scale"]


def decode(codes, codec, shape):
    """Codes [B, L] -> maps [B, C, H, W], shape = (C, H, W): the inverse of `encode` but for what it leaves out."""
    return (codes * codec["scale"] @ codec["basis"] + codec["mean"]).unflatten(1, shape)


# --- Latent diffusion: v-prediction (Salimans & Ho, arXiv 2202.00512), cosine schedule, classifier-free guidance (Ho &
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


# --- Optional: Stable Diffusion v1 for the diffusion model above, by diffusers; as released (HengGao12/OAL,
# outlier_generation/; Dream-OOD, arXiv 2309.13415): a boundary outlier is the last word of its prompt.

# The outlier stands for the class's whole name, however many tokens that has, so that all prompts are of one length.
# The release shortens the names of CIFAR-100 to one word each ('maple' for maple_tree) and puts the outlier there.
SD_PROMPT = "A high-quality image of the thing"
SD_BATCH = 4  # images at once, fewer where memory runs out


def load_sd(name, device):
    """A folder or a name on the Hugging Face hub -> the StableDiffusionPipeline there, with PLMS; in fp16 on CUDA."""
    try:
        import transformers  # noqa: F401
        from diffusers import PNDMScheduler, StableDiffusionPipeline
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        pipe = StableDiffusionPipeline.from_pretrained(name, safety_checker=None, requires_safety_checker=False,
                                                       dtype=dtype, low_cpu_mem_usage=False)
    except ImportError:
        evaluate.fail("--generator sd needs packages that are not installed: pip install diffusers transformers")
    except Exception as problem:  # no network, no such name, a folder of something else: a dozen types
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        evaluate.fail(f"--sd-model {name} cannot be loaded ({reason}): name a folder, or a name on the hub")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def class_words(pipe, names):
    """C names -> words float32 [C, E]: the mean of a name's token embeddings, made as long as they are on average."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()              # [V, E]
    tokens = [table[pipe.tokenizer(name.replace("_", " "), add_special_tokens=False).input_ids] for name in names]
    return torch.stack([F.normalize(one.mean(0), dim=0) * one.norm(dim=1).mean() for one in tokens])


def align(features, labels, words, generator, steps=1000, temperature=0.1):
    """Unit features [N, D], labels [N], words [C, E] -> a linear map [D, E] that turns features to their class's word.

    Cross-entropy of the cosines to all words over the temperature: Dream-OOD's alignment. The release skips it.
    """
    start = torch.randn(features.shape[1], words.shape[1], generator=generator) / math.sqrt(features.shape[1])
    weight, words = start.to(features).requires_grad_(), F.normalize(words, dim=1)
    optimizer = torch.optim.Adam([weight], 1e-3)
    for _ in range(steps):
        index = torch.randint(len(features), (BATCH,), generator=generator).to(features.device)
        cosine = F.normalize(features[index] @ weight, dim=1) @ words.T                   # [B, C]
        loss = F.cross_entropy(cosine / temperature, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"synthesize: features mapped to words, cross-entropy {loss.item():.3f}", flush=True)
    return weight.detach()


@torch.inference_mode()
def prompt_states(pipe, words):
    """Words [B, E] -> the text encoder's states [B, 77, E] of SD_PROMPT with each for its last word."""
    ids = pipe.tokenizer(SD_PROMPT, padding="max_length", return_tensors="pt").input_ids.to(pipe.device)   # [1, 77]
    place = torch.tensor(len(pipe.tokenizer(SD_PROMPT).input_ids) - 2, device=pipe.device)                 # end: - 1
    put = lambda module, args, embedded: embedded.index_copy(1, place, words[:, None].to(embedded))
    with pipe.text_encoder.get_input_embeddings().register_forward_hook(put):
        return pipe.text_encoder(ids.expand(len(words), -1))[0]


def sd_latents(pipe, words, seed, partial, options):
    """Words [M, E] -> latents [M, 4, 64, 64] (of v1), scaled, float32, on the CPU; 50 steps of PLMS, guidance 7.5.

    Latent i starts from its own noise, of seed + i, so that an interrupted call goes on to the same result from the
    batches that the file `partial` keeps.
    """
    shape = pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size
    done, batch = torch.empty(0, *shape), SD_BATCH
    if partial.exists():
        with contextlib.suppress(Exception):  # cut short, or another program's
            saved = torch.load(partial, weights_only=True)
            if saved["options"] == options and torch.allclose(saved["words"], words, 1e-3, 1e-3 * words.std().item()):
                done = saved["latents"]
        if not len(done):
            evaluate.fail(f"{partial} holds latents of other options or another network: remove it, or repeat those")
    while len(done) < len(words):
        rows = range(len(words))[len(done):len(done) + batch]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in rows])
        try:
            drawn = pipe(prompt_embeds=prompt_states(pipe, words[rows.start:rows.stop]), num_inference_steps=50,
                         latents=noise.to(pipe.device, pipe.dtype), guidance_scale=7.5, output_type="latent").images
        except torch.OutOfMemoryError:
            batch = batch // 2 or evaluate.fail(f"{pipe.device} has no memory for one image: take another by --device")
            continue
        done = torch.cat([done, drawn.float().cpu()])
        evaluate.write(partial, {"options": options, "words": words, "latents": done})
        print(f"synthesize: {len(done)} of {len(words)} latents of Stable Diffusion", flush=True)
    return done


@torch.inference_mode()
def vae_encode(pipe, images):
    """Images uint8 [N, 3, S, S], enlarged to the pipeline's size -> latents [N, 4, 64, 64] (of v1) as sd_latents'."""
    side, found = pipe.unet.config.sample_size * pipe.vae_scale_factor, []
    for batch in images.split(SD_BATCH):
        enlarged = F.interpolate(batch.to(pipe.device, pipe.dtype) / 127.5 - 1, size=side, mode="bilinear")
        found.append(pipe.vae.encode(enlarged).latent_dist.mean.float().cpu())
    return torch.cat(found) * pipe.vae.config.scaling_factor


@torch.inference_mode()
def vae_decode(pipe, latents):
    """Latents [N, 4, 64, 64] as sd_latents' -> images float32 [N, 3, 512, 512] (of v1) from 0 to 1 or little beyond."""
    batches = (latents / pipe.vae.config.scaling_factor).to(pipe.device, pipe.dtype).split(SD_BATCH)
    return torch.cat([pipe.vae.decode(batch).sample.float().cpu() for batch in batches]) / 2 + 0.5


def ridge(x, y, strength=1.0):
    """x [N, P], y [N, Q] -> weight [P, Q], offset [Q] of y ~ x @ weight + offset, by ridge regression.

    The penalty is `strength` times the mean eigenvalue of the centred x's Gram matrix.
    """
    x_mean, y_mean = x.double().mean(0), y.double().mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x                                                                        # [P, P]
    weight = torch.linalg.solve(gram + strength * gram.diag().mean() * torch.eye(len(gram)), x.T @ y)
    return weight.float(), (y_mean - x_mean @ weight).float()


def synthesize_sd(pipe, net, images, labels, args, generator, teacher=None):
    """`synthesize` by Stable Diffusion -> the tensors of outliers.pt, on the CPU; draws a picture for args.show.

    args.sd_latents latents M, each under a random one of the boundary outliers [C * per_class, E], so of a random
    class. latent [M, L] are their codes, by a map fitted to ID images; released [M, 64] (of v1) are they themselves as
    the released trainer reduces them: mean over channels, then over rows.
    """
    features = unit_features(teacher or net, images, args.dataset, args.device)
    labels, words = labels.to(args.device), class_words(pipe, evaluate.ID_SETS[args.dataset]["names"])
    if features.shape[1] != words.shape[1]:
        features = features @ align(features, labels, words, generator)
    boundary, classes = boundary_outliers(features, labels, args.per_class, generator)
    chosen = torch.randint(len(boundary), (args.sd_latents,), generator=generator).to(args.device)
    outlier_words = (boundary[chosen] * words.norm(dim=1)[classes[chosen], None]).cpu()   # [M, E]
    seed = torch.randint(2 ** 31, (), generator=generator).item()
    options = {name: str(value) for name, value in vars(args).items() if name != "show"}
    raw = sd_latents(pipe, outlier_words, seed, Path(f"{args.out}.partial"), options)
    if args.show:
        save_picture(args.show, vae_decode(pipe, raw[:16]), 8)
    # The map from latents to codes, by ID images, which have both; a latent is averaged to the size of the coded map.
    some, maps, codec = codec_of(net, images, args.dataset, args.device)
    codec = {name: tensor.cpu() for name, tensor in codec.items()}
    pool = lambda z: F.adaptive_avg_pool2d(z, maps.shape[2:]).flatten(1)                  # [N, 4 H W]
    weight, offset = ridge(pool(vae_encode(pipe, some)), encode(maps.cpu(), codec))
    return {"boundary": boundary.cpu(), "boundary_labels": classes.cpu(), "latent": pool(raw) @ weight + offset,
            "latent_labels": classes[chosen].cpu(), "released": raw.mean(1).mean(1), **codec}


# --- The whole stage: a trained network and its training images -> outliers.pt. --------------------------------------


def synthesize(net, images, labels, dataset, per_class, diffusion_steps, generator, device, teacher=None):
    """A trained network and its training set -> the tensors of outliers.pt, on the CPU.

    boundary [N, D] and latent [N, L] with boundary_labels and latent_labels [N], sorted by class, per_class of each;
    mean, basis and scale are the codec of the latents. Latent i was drawn under the condition boundary[i]. The
    diffusion model takes diffusion_steps, or 20 passes over the images if fewer: beyond, it learns them by heart. With
    a teacher the features are its own, as in the released code.
    """
    diffusion_steps = min(diffusion_steps, 20 * len(images) // BATCH)
    _, _, codec = codec_of(net, images, dataset, device)
    pairs = [(encode(maps, codec), F.normalize(features, dim=1))
             for maps, features in evaluate.stage2(net, images, dataset, device)]
    latents, features = (torch.cat(parts) for parts in zip(*pairs))                       # [N, L], [N, D]
    if teacher:
        features = unit_features(teacher, images, dataset, device)
    boundary, classes = boundary_outliers(features, labels.to(device), per_class, generator)
    print(f"synthesize: {len(boundary)} boundary outliers", flush=True)

    denoiser = train_diffusion(latents, features, diffusion_steps, generator, device)
    latent = ddim(denoiser, boundary, latents.shape[1], generator)
    print(f"synthesize: {len(latent)} latents of {latent.shape[1]} numbers", flush=True)
    outliers = {"boundary": boundary, "boundary_labels": classes, "latent": latent, "latent_labels": classes, **codec}
    return {name: tensor.cpu() for name, tensor in outliers.items()}


def given_outliers(args, net):
    """The files of train.py's --outliers, --boundary-file and --latent-file -> tensors of outliers.pt, {} without any.

    The last two are the authors', reduced as their trainer does it: boundary outliers [C, n, D] -> [C n, D];
    latents [N, 64, 64] or [100, 3, 64, 64], the mean over channels taken when they were made -> mean over rows [N, 64].
    """
    def read(file, load, fits, what):
        with contextlib.suppress(Exception):  # no such file, another format, other keys
            content = load(file)
            if fits(content):
                return content
        evaluate.fail(f"{file} does not hold {what}: name another file")

    load = lambda file: torch.load(file, map_location="cpu", weights_only=True)
    finite = lambda *parts: all(part.is_floating_point() and part.numel() and part.isfinite().all() for part in parts)
    found = {}
    if args.outliers not in ("diffusion", "noise"):
        map_size = net.eval().lower(torch.zeros(1, 3, args.size, args.size)).numel()
        found = read(args.outliers, load, lambda o: finite(o["boundary"], o["latent"], o["basis"], o["scale"])
                     and o["basis"].shape == (o["latent"].shape[1], map_size) and o["mean"].shape == (map_size,)
                     and o["boundary"].dim() == o["latent"].dim() == o.get("released", o["latent"]).dim() == 2,
                     "outliers made from a network of this shape")
        found = {name: part.float() if part.is_floating_point() else part for name, part in found.items()}
    if args.boundary_file:
        boundary = read(args.boundary_file, lambda file: torch.from_numpy(np.load(file).astype(np.float32)),
                        lambda o: o.dim() == 3 and len(o) == net.fc.out_features and finite(o.flatten(0, 1)),
                        "boundary outliers [C, n, D] of these classes")
        found |= {"boundary": boundary.flatten(0, 1),
                  "boundary_labels": torch.arange(len(boundary)).repeat_interleave(boundary.shape[1])}
    if args.latent_file:
        latent = read(args.latent_file, load, lambda o: o.shape[1:] in ((64, 64), (3, 64, 64)) and finite(o),
                      "latents [N, 64, 64] or [100, 3, 64, 64]").float().flatten(0, -3).mean(1)
        found |= {"released": latent, "latent": latent, "latent_labels": torch.full((len(latent),), -1)}
    return found


def show(path, outliers, features, images, labels, rows=8, neighbours=9):
    """Draws a picture: per row one class's boundary outlier as the training images nearest to it in feature space.

    The first column is the image nearest to the class's mean feature, for comparison.
    """
    grid = []
    for label in outliers["boundary_labels"].unique()[:rows]:
        mean = features[labels == label].mean(0)
        outlier = outliers["boundary"][outliers["boundary_labels"] == label][0]
        nearest = (features @ outlier).topk(min(neighbours, len(images)))[1]
        grid += [images[(features @ mean).argmax()], *images[nearest]]
    save_picture(path, F.interpolate(torch.stack(grid).float() / 255, scale_factor=2), neighbours + 1)


def save_picture(path, images, columns):
    """Writes images float32 [N, 3, H, W] from 0 to 1 as one PNG, so many columns of them."""
    picture = io.BytesIO()
    save_image(images, picture, "png", nrow=columns)
    evaluate.write(path, picture.getvalue())


def main():
    parser = evaluate.common_parser(__doc__)
    parser.add_argument("checkpoint", help="weights of the network whose feature space is searched")
    parser.add_argument("--teacher", metavar="FILE", help="find the boundary in the features of this network instead, "
                        "as train.py does in those of a ViT")
    parser.add_argument("--out", default="outliers.pt", help="file for the outliers")
    parser.add_argument("--show", metavar="FILE.png",
                        help="also draw the training images nearest to boundary outliers, or the images of sd")
    parser.add_argument("--per-class", type=evaluate.POSITIVE, default=50, help="outliers of each kind per class")
    parser.add_argument("--diffusion-steps", type=evaluate.POSITIVE, default=1000)
    parser.add_argument("--generator", choices=("diffusion", "sd"), default="diffusion",
                        help="of the latents: the diffusion model trained here, or Stable Diffusion v1")
    parser.add_argument("--sd-model", metavar="FOLDER_OR_NAME", default="CompVis/stable-diffusion-v1-4",
                        help="its folder, or its name on the Hugging Face hub (%(default)s)")
    parser.add_argument("--sd-latents", type=evaluate.POSITIVE, default=300, help="its latents, of all classes (300)")
    parser.add_argument("--seed", type=evaluate.SEED, default=0)
    args = parser.parse_args()
    evaluate.check_common(args)
    if Path(args.out).exists():
        evaluate.fail(f"{args.out} is there already: remove it, or name another file with --out")
    if args.show and Path(args.show).suffix.lower() != ".png":
        evaluate.fail(f"--show {args.show}: the file must end in .png")
    classes = evaluate.id_set(args)["classes"]
    net, teacher = (path and evaluate.load_network(path, classes, size=args.size)
                    for path in (args.checkpoint, args.teacher))
    if isinstance(net, models.ViT):
        evaluate.fail(f"{args.checkpoint} is a ViT, which has no feature maps: name a ResNet, and this by --teacher")
    pipe = load_sd(args.sd_model, args.device) if args.generator == "sd" else None
    images, labels = evaluate.load(args.dataset, "train", args.data_root, args.size)
    if labels.bincount().eq(1).any():
        evaluate.fail(f"a class of {args.dataset} has a single image, which has no nearest neighbour: add one")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # where that fails, before minutes of work
    g = torch.Generator().manual_seed(10 * args.seed + 2)  # train.py's: same options, same outliers
    if pipe:
        outliers = synthesize_sd(pipe, net, images, labels, args, g, teacher)
    else:
        outliers = synthesize(net, images, labels, args.dataset, args.per_class, args.diffusion_steps, g, args.device,
                              teacher)
    evaluate.write(args.out, outliers)
    Path(f"{args.out}.partial").unlink(missing_ok=True)
    print(f"written: {args.out}")
    if args.show and not pipe:
        features = unit_features(teacher or net, images, args.dataset, args.device).cpu()
        show(args.show, outliers, features, images, labels)
        print(f"written: {args.show}")


if __name__ == "__main__":
    evaluate.run(main)
