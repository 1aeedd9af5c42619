"""OAL as its authors released it (HengGao12/OAL, commit 16487e8), in one file. arXiv 2406.16525.

    python released/released.py [--dataset cifar100 --data-root DIR --teacher vit_b_16
                                 --generator sd --size 224 --out runs/r]

Start, teacher, outliers, student; of each network the epoch with the best validation accuracy. The
rest is train.py's and synthesize.py's. Not as released: rates fall to 0, not to 1e-8; start and
teacher are trained in bf16 where that is faster; the teacher knows ImageNet-1k, not 21k, or is a
second cycle of the start; boundary outliers are synthesize.py's, of unit length, and in the start's
features if the teacher has grown from it; one stands for all tokens of a class's name in a prompt.
"""
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import losses
import models
import synthesize
import train
from models import Mistake

# Weights of the distilled logits and features and of the two CLUBs, beside cross-entropy.
WEIGHTS = dict(w_kd=4.0, w_maps=8.0, w_boundary=0.1, w_micl=0.2)
RATES = dict(net=0.005, projection=0.01, boundary_club=1e-4, latent_club=1e-4)
EPOCHS, FINE_TUNING = 100, dict(lr=1e-4, epochs=50)
PROMPT = "A high-quality image of the thing"  # an outlier takes the place of the last word
NAMES = torchvision.models.list_models(module=torchvision.models)  # of classifiers


def main():
    args, options = parse_args()
    device, out = torch.device(args.device), args.out
    data = train.load_images(options, args.data_root, args.ood, device)
    start, _, outliers = train.load_files({**options, "teacher": None}, data, device)
    teacher, grew_from_start = load_teacher(args.teacher, start, data)
    pipe = load_sd(args.sd_model, device, teacher or start) if args.generator == "sd" else None
    run = train.begin_run(options, out, args.resume, data, start, teacher, outliers)
    facts = evaluate.describe("released/released.py", data, options["size"], args.device)

    # 1. The start. A file that exists was written before the run was resumed.
    if not args.ce and not (out / "ce.pt").exists():
        train_best("ce", train.CrossEntropy(start), data, run)
    train.keep("ce", start, data, run)

    # 2. The teacher: a second cycle, or a network of ImageNet, fine-tuned, or that of a file.
    if not args.teacher:
        teacher = copy.deepcopy(start)
        if not (out / "teacher.pt").exists():
            train_best("teacher", train.CrossEntropy(teacher), data, run)
        train.keep("teacher", teacher, data, run, grew_from=models.digest(start))
    elif args.teacher in NAMES:
        if not (out / "teacher.pt").exists():
            adam = torch.optim.Adam(teacher.parameters(), FINE_TUNING["lr"])
            train_best("teacher", train.CrossEntropy(teacher), data, run, adam)
            evaluate.write(out / "teacher.pt", train.on_cpu(teacher.state_dict()))
        teacher.load_state_dict(models.read_state(out / "teacher.pt"))

    # 3. Outliers, about the boundary of the teacher's features.
    if not (out / "outliers.pt").exists():
        begun, searched = time.perf_counter(), None if grew_from_start else teacher
        outliers = outliers or draw_outliers(start, searched, pipe, args.sd_batch, data, options)
        run.seconds["synthesize"] = time.perf_counter() - begun
        train.save_checkpoint(run, "synthesize")
        evaluate.write(out / "outliers.pt", train.on_cpu(outliers))
    outliers = synthesize.read_outliers(out / "outliers.pt", start)

    # 4. The student, which starts as the start.
    student = copy.deepcopy(start)
    if not (out / "student.pt").exists():
        objective = Released(student, teacher, outliers, options)
        sgd = torch.optim.SGD([{"params": getattr(objective, part).parameters(), "lr": rate}
                               for part, rate in RATES.items()], **train.SGD)
        train_best("oal", objective, data, run, sgd)
    train.keep("student", student, data, run, grew_from=models.digest(start))

    # 5. Start and student on the benchmark. The released score is the energy, ebo.
    facts |= dict(arch=args.arch, seed=args.seed, options=options, seconds=run.seconds)
    evaluate.report({"ce": out / "ce.pt", "oal": out / "student.pt"}, data, args.device, out, facts)


def parse_args():
    """-> the arguments; options: what decides the weights, beside the images."""
    parser = evaluate.common_parser(__doc__)
    add, count, path = parser.add_argument, evaluate.positive, evaluate.path
    add("--ood", nargs="+", action="extend", default=[], type=path, metavar="FOLDER")
    add("--out", type=Path, default="runs/released", help="folder for all files (%(default)s)")
    add("--seed", type=evaluate.seed, default=0)
    add("--arch", choices=models.RESNETS, help="resnet_tiny for shapes, else resnet18")
    add("--epochs", type=count, help="of each stage (100; of a teacher by name 50)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--ce", type=path, metavar="FILE", help="start from this network")
    add("--teacher", type=path, metavar="{NAME,FILE}", help="torchvision's, fine-tuned; or a file")
    add("--outliers", type=path, default="diffusion", metavar="FILE", help="those of --ce's run")
    add("--generator", choices=["diffusion", "sd"], default="diffusion", help="of latents")
    add("--sd-model", metavar="FOLDER_OR_NAME", default="CompVis/stable-diffusion-v1-4")
    add("--sd-latents", type=count, default=300, help="their number (%(default)s)")
    add("--sd-batch", type=count, default=4, help="of these at once (%(default)s)")
    args = parser.parse_args()
    args.arch = args.arch or ("resnet_tiny" if args.dataset == "shapes" else "resnet18")
    args.size = evaluate.size_of(args.ce, args.size) if args.ce else args.size or 32
    keys = "dataset size arch seed epochs ce teacher outliers generator sd_model sd_latents".split()
    tuned = FINE_TUNING["epochs"] if args.teacher in NAMES else EPOCHS
    options = {**{name: getattr(args, name) for name in keys}, **train.TIERS[args.arch], **WEIGHTS,
               "ce_epochs": EPOCHS, "teacher_epochs": tuned, "oal_epochs": EPOCHS,
               "oal_lr": RATES["net"], "device": args.device.split(":")[0]}
    return args, options


# --- The losses.

class CLUB(nn.Module):
    """Contrastive log-ratio upper bound of the mutual information I(X; Y) (arXiv 2006.12013).

    q(y|x) = N(mean(x), diag(var(x))), with the log-variance in [-1, 1] as in its authors' code. It
    is a bound if pairs (x_i, y_i) are drawn jointly and q is fitted to them by likelihood. For
    independent pairs, as in the release, value and gradient have expectation zero.
    """

    def __init__(self, x_dim, y_dim, hidden, deeper=()):
        super().__init__()
        widths = [x_dim, *deeper, hidden // 2, y_dim]
        parts = [part for pair in zip(widths, widths[1:]) for part in (nn.Linear(*pair), nn.ReLU())]
        self.mean = nn.Sequential(*parts[:-1])
        self.log_var = nn.Sequential(nn.Linear(x_dim, hidden // 2), nn.ReLU(),
                                     nn.Linear(hidden // 2, y_dim), nn.Tanh())

    def forward(self, x, y):
        """x [B, X], y [B, Y] -> mean_i log q(y_i|x_i) - mean_ij log q(y_j|x_i) in nats."""
        mean, log_var = self.mean(x), self.log_var(x)  # [B, Y] each
        assert y.shape == mean.shape, "CLUB takes pairs, [B, X] and [B, Y]"
        paired = (y - mean) ** 2
        # mean_j (y_j - mean_i)^2 without a [B, B, Y] tensor, by the mean and variance of the y.
        centre = y.mean(0)
        all_pairs = (centre - mean) ** 2 + ((y - centre) ** 2).mean(0)
        return ((all_pairs - paired) / 2 * (-log_var).exp()).sum(1).mean()


class Released(nn.Module):
    """The sum of openood/trainers/oal_trainer.py, in float32: an objective of train.train.

    Outliers are drawn without regard to the images, so that both CLUBs have expectation zero
    (results/README.md, 'Audit'). One optimiser lowers them over q and network; q is never fitted.
    """

    def __init__(self, net, teacher, outliers, options):
        super().__init__()
        self.net, self.boundary = net, outliers["boundary"]          # [N, Db]
        self.latents = outliers.get("released", outliers["latent"])  # [M, 64] of SD, or [M, L]
        teacher.eval().requires_grad_(False)
        # A function, so that the teacher is no submodule: it is neither trained nor saved.
        self.teach = torch.no_grad()(lambda x: teacher(teacher.prepare(x), return_feature=True))
        dim, width = net.fc.in_features, teacher.fc.in_features
        with torch.random.fork_rng(devices=[]):  # fresh weights depend on the seed alone
            torch.manual_seed(models.generator(options["seed"], "heads").initial_seed())
            self.projection = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, dim), nn.ReLU(),
                                            nn.BatchNorm1d(dim))
            self.boundary_club = CLUB(self.boundary.shape[1], dim, 512)
            self.latent_club = CLUB(self.latents.shape[1], dim, 512, deeper=(32, 16))

    def forward(self, x, y, g):
        logits, features = self.net(self.net.prepare(x), return_feature=True)  # [B, C], [B, D]
        teacher_logits, teacher_features = self.teach(x)                       # [B, C], [B, Dt]
        ce = F.cross_entropy(logits, y)
        kd = losses.distill(logits, teacher_logits)
        maps = losses.distill(features, self.projection(teacher_features))  # of their softmaxes
        boundary = self.boundary_club(random_rows(self.boundary, len(y), g), features)
        micl = self.latent_club(random_rows(self.latents, len(y), g), features)
        w_kd, w_maps, w_boundary, w_micl = WEIGHTS.values()
        loss = ce + w_kd * kd + w_maps * maps + w_boundary * boundary + w_micl * micl
        return loss, {"ce": ce, "kd": kd, "maps": maps, "boundary": boundary, "micl": micl}


def random_rows(rows, n, g):
    """n random rows of [M, D] -> [n, D]; none repeats before all have been used."""
    orders = [torch.randperm(len(rows), generator=g, device=rows.device)
              for _ in range(0, n, len(rows))]
    return rows[torch.cat(orders)[:n]]


# --- Training, of which the best epoch stays, and teachers.

class BestEpoch(nn.Module):
    """An objective, of whose net the weights with the best validation accuracy are kept.

    An epoch ends when N images have passed, or N - 1: train.train leaves out a last batch of one.
    Of equal epochs the last is the best. The state is part of the checkpoint.
    """

    def __init__(self, objective, data):
        super().__init__()
        self.objective, self.splits = objective, data.splits
        self.state = {"seen": 0, "hits": -1, "weights": {}}

    net = property(lambda self: self.objective.net)

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x, y, g):
        if self.state["seen"] >= len(self.splits["train"][1]) - 1:
            self.end_epoch()
        self.state["seen"] += len(y)
        if isinstance(self.net, Torchvision):  # its dropout draws from torch's own numbers
            torch.manual_seed(int(torch.randint(2 ** 62, (), generator=g, device=x.device)))
        return self.objective(x, y, g)

    def end_epoch(self):
        images, labels = self.splits["val"]
        hits = (models.predict(self.net, images)[0].argmax(1) == labels).sum().item()
        if hits >= self.state["hits"]:
            self.state |= {"hits": hits, "weights": copy.deepcopy(self.net.state_dict())}
        self.state["seen"] = 0


def train_best(stage, objective, data, run, optimizer=None):
    """train.train, which leaves objective.net with the weights of its best epoch."""
    best = BestEpoch(objective, data)
    train.train(stage, best, data, run, optimizer)
    best.end_epoch()
    objective.net.load_state_dict(best.state["weights"])


class Torchvision(models.Classifier):
    """A classifier of torchvision by its name; features [B, D]: what its last linear layer takes.

    That layer becomes `fc`, of zeros. Images get the size, mean and std of its ImageNet weights.
    The name is a buffer: a file of weights says whose they are.
    """

    def __init__(self, name, num_classes, weights=None):
        best = torchvision.models.get_model_weights(name).DEFAULT
        images = best.transforms()
        super().__init__(images.crop_size[0], images.mean, images.std)
        try:
            self.body = torchvision.models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as problem:  # no network; another file of this name
            raise Mistake(f"no ImageNet weights of {name} ({problem}): put the file of {best.url} "
                          f"into {torch.hub.get_dir()}/checkpoints")
        linear = [key for key, part in self.body.named_modules() if isinstance(part, nn.Linear)]
        if not linear or hasattr(self.body, "aux_logits"):
            raise Mistake(f"{name} does not end in one linear layer: name another network")
        self.fc = nn.Linear(self.body.get_submodule(linear[-1]).in_features, num_classes)
        self.body.set_submodule(linear[-1], nn.Identity())
        for part in self.fc.parameters():
            nn.init.zeros_(part)
        self.register_buffer("name", torch.tensor(list(name.encode()), dtype=torch.uint8))

    def prepare(self, images):  # uint8 [B, 3, H, H] -> float32 [B, 3, S, S], enlarged
        images = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True)
        return super().prepare(images)

    def lower(self, x):
        return x  # [B, 3, S, S]: it is not cut in two

    def upper(self, x):
        return self.body(x).float()  # [B, D]


def load_teacher(teacher, start, data):
    """--teacher NAME, FILE or None -> (network, or None: still to grow; whether from the start)."""
    device, classes = start.fc.weight.device, len(data.classes)
    if not teacher:
        return None, True
    if teacher in NAMES:
        return models.to_device(Torchvision(teacher, classes, "DEFAULT"), device), False
    if not Path(teacher).is_file():
        raise Mistake(f"no teacher {teacher}: name a file, or a classifier of torchvision")
    state = models.read_state(teacher)
    if "name" not in state:  # a network of this project
        evaluate.size_of(teacher, start.size)  # Mistake: its images have another size
        net, detector = evaluate.open_network(teacher, data, device)
        return net, detector.get("grew_from") == models.digest(start)
    if len(state["fc.bias"]) != classes:
        raise Mistake(f"{teacher} is not for {classes} classes: name its own --dataset")
    net = Torchvision(bytes(state["name"].tolist()).decode(), classes)
    net.load_state_dict(state)
    return models.to_device(net, device), False


# --- Outliers, and the latents of Stable Diffusion v1.

def draw_outliers(start, teacher, pipe, batch, data, options):
    """-> the tensors of outliers.pt; teacher: the network to search, None: the start.

    By Stable Diffusion also `released` [M, 64]: the mean of its latents over channels, then rows.
    Each is drawn under a random boundary outlier, as long as a token of its class's name.
    """
    (images, _), n = data.splits["train"], options["sd_latents"]
    g = models.generator(options["seed"], "synthesize", images.device)
    features = teacher and models.predict(teacher, images)[1].to(images.device)  # [N, D]
    outliers = synthesize.synthesize(start, data, options["per_class"], options["diffusion_steps"],
                                     g, features)
    if pipe:
        boundary, labels = outliers["boundary"], outliers["boundary_labels"]
        chosen = torch.randint(len(boundary), (n,), generator=g, device=g.device)
        words = boundary[chosen] * token_norms(pipe, data.classes)[labels[chosen], None]  # [M, E]
        latents = sd_latents(pipe, words, g.initial_seed(), batch)
        outliers["released"] = latents.mean(1).mean(1)
    return outliers


def load_sd(name, device, net):
    """A folder or a name of the hub -> a pipeline whose words are as wide as net's features."""
    try:
        from diffusers import StableDiffusionPipeline
        pipe = StableDiffusionPipeline.from_pretrained(name, safety_checker=None)
    except Exception as problem:  # no package, no network, another folder: of a dozen types
        raise Mistake(f"--sd-model {name} cannot be loaded ({str(problem):.200}): name a folder, or"
                      " a name on the Hugging Face hub, and pip install diffusers transformers")
    if (width := pipe.text_encoder.config.hidden_size) != net.fc.in_features:
        raise Mistake(f"--generator sd takes features of {width} numbers, not {net.fc.in_features}:"
                      " add a --teacher that has them; vit_b_16 has 768")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.float16 if device.type == "cuda" else torch.float32)


@torch.no_grad()
def token_norms(pipe, names):
    """C names of classes -> the mean norm [C] of the embeddings of each name's tokens."""
    norms = pipe.text_encoder.get_input_embeddings().weight.float().norm(dim=1)  # [V]
    ids = pipe.tokenizer([name.replace("_", " ") for name in names], add_special_tokens=False)
    return torch.stack([norms[tokens].mean() for tokens in ids.input_ids])


@torch.no_grad()
def sd_latents(pipe, words, seed, batch):
    """Words [M, E], each the last of PROMPT -> scaled latents [M, 4, 64, 64] on the CPU.

    50 steps (of PLMS in v1.4), guidance 7.5. Latent i starts from noise of seed + i.
    """
    prompt = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").to(pipe.device)
    last = prompt.attention_mask.sum(1) - 2  # [1], the end of the text comes after it
    side, encoder, drawn = pipe.unet.config.sample_size, pipe.text_encoder, []
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(words))]
    noise = torch.stack([torch.randn(4, side, side, generator=g) for g in generators])
    batches = list(zip(words.split(batch), noise.to(pipe.device, pipe.dtype).split(batch)))
    for chunk, z in models.progress("batches of latents of Stable Diffusion", batches):
        def put(module, given, embedded):  # [B, 77, E]
            return embedded.index_copy(1, last, chunk[:, None].to(embedded))
        with encoder.get_input_embeddings().register_forward_hook(put):
            states = encoder(prompt.input_ids.expand(len(chunk), -1))[0]  # [B, 77, E]
        latents = pipe(prompt_embeds=states, latents=z, guidance_scale=7.5, num_inference_steps=50,
                       output_type="latent").images
        drawn.append(latents.float().cpu())
    return torch.cat(drawn)


if __name__ == "__main__":
    evaluate.guarded(main)
