"""OAL (Outlier Aware Learning), from the images to the results. Paper: arXiv 2406.16525.

    python train.py                                                # embedded images, no download
    python train.py --dataset cifar100 --data-root DIR             # resnet18, 3 x 100 epochs: a GPU
    python train.py --dataset cifar100 --data-root DIR --arch resnet_small      # a laptop
    python train.py --dataset FOLDER --ood FOLDER        # your photographs, FOLDER/train/CLASS/...
    torchrun --nproc_per_node=N train.py --dataset cifar100 --data-root DIR

The order of the method is the order of `main`; the sum of the losses is in `OAL.forward`. A weight
of 0 leaves its term out: `--w-kd 0`. Of a pretrained network (photographs) the last layer alone is
trained.
"""
import copy
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import evaluate
import losses
import models
import synthesize
from models import Mistake

# OpenOOD v1.5's recipe for CIFAR. The rate is for a batch of 128; start and teacher scale it.
SGD = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
# Weights of the student's losses beside cross-entropy.
WEIGHTS = dict(w_kd=4.0, w_maps=16.0, w_micl=1.0)
# Per arch: epochs of the three stages; the student's rate; batch; padding of the random crop;
# boundary outliers per class; steps of the diffusion model, at most.
TIERS = {
    "resnet18": dict(ce_epochs=100, teacher_epochs=100, oal_epochs=100, oal_lr=0.005, batch=128,
                     crop=4, per_class=500, diffusion_steps=4000),
    "resnet_small": dict(ce_epochs=8, teacher_epochs=16, oal_epochs=3, oal_lr=0.02, batch=128,
                         crop=1, per_class=50, diffusion_steps=1000),
    "resnet_tiny": dict(ce_epochs=9, teacher_epochs=7, oal_epochs=8, oal_lr=0.01, batch=64,
                        crop=1, per_class=50, diffusion_steps=1000),
    # Pretrained: chosen on classes of CIFAR-100 (results/README.md). Its start is a probe: the last
    # layer alone learns, from random resized crops. So does its student: features are frozen, there
    # are no maps to distil, and what is distilled are the logits of the start.
    "efficientnet_lite0": dict(ce_epochs=2, oal_epochs=2, oal_lr=0.003, batch=32, crop=None,
                               per_class=50, diffusion_steps=1000, w_kd=0.5, w_maps=0.0)}
# Each stage has at least MIN_STEPS steps, unless --epochs is given. A checkpoint is saved after
# whole epochs, every CHECKPOINT_STEPS steps or more.
MIN_STEPS, CHECKPOINT_STEPS = 200, 20
# A near-copy: the nearest training image is closer than this share of the median distance.
NEAR_COPY = 0.4


class Run(NamedTuple):
    """What a run is, where it writes, how long it took."""
    options: dict  # what decides the weights, beside the images
    digest: str    # the classes; digests of the training images and of the files that were given
    out: Path
    seconds: dict  # by stage


def main():
    args, options = parse_args()
    device = join_processes(args.device)
    data = load_images(options, args.data_root, args.ood, device)
    start, teacher, outliers = load_files(options, data, device)
    run = begin_run(options, args.out, args.resume, data, start, teacher, outliers)
    facts = is_first() and evaluate.describe("train.py", data, options["size"], args.device)
    pretrained = options["arch"] == models.PRETRAINED

    # 1. The start: a cross-entropy network. If ce.pt exists, this run is being resumed.
    if not options["ce"] and not (run.out / "ce.pt").exists():
        train("ce", CrossEntropy(start), data, run)
    keep("ce", start, data, run)
    if pretrained and is_first():
        warn_of_near_copies(start, data)

    # 2. The teacher: a second cycle of the same recipe, on from the start. A pretrained start is
    # the teacher itself.
    if distils(options) and not teacher:
        teacher = copy.deepcopy(start)
        if not pretrained:
            if not (run.out / "teacher.pt").exists():
                train("teacher", CrossEntropy(teacher), data, run)
            keep("teacher", teacher, data, run, grew_from=models.digest(start))

    # 3. Outliers, from the start's maps and features. Noise needs none.
    if options["w_micl"] and options["outliers"] != "noise":
        if is_first() and not (run.out / "outliers.pt").exists():
            save_outliers(outliers, start, data, run)
        barrier()
        outliers = synthesize.read_outliers(run.out / "outliers.pt", start)

    # 4. The student, which starts as the start.
    student = copy.deepcopy(start)
    if not (run.out / "student.pt").exists():
        if options["peer"] == "vos":
            objective = VOS(student, data, options)
        else:
            objective = OAL(student, teacher, outliers, data, options)
        train("oal", objective, data, run)
    keep("student", student, data, run, grew_from=models.digest(start))

    # 5. Start and student on the benchmark, in the first process; the others are done.
    first = is_first()
    if dist.is_initialized():
        dist.destroy_process_group()
    if first:
        facts |= {"arch": options["arch"], "seed": options["seed"], "options": options,
                  "seconds": run.seconds}
        files = {"ce": run.out / "ce.pt", "oal": run.out / "student.pt"}
        evaluate.report(files, data, args.device, run.out, facts)


# --- Objectives.
# objective(x, y, g) -> (loss, its terms {name: scalar}), for images x uint8 [B, 3, S, S], labels y
# int64 [B] and a generator g. Its submodules are trained, among them `net`.


class CrossEntropy(nn.Module):
    """The objective of the start and of the teacher."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y, g):
        with models.autocast(x.device):
            ce = F.cross_entropy(self.net(self.net.prepare(x)), y)
        return ce, {"ce": ce}


class OAL(nn.Module):
    """Cross-entropy + w_kd KD(logits) + w_maps KD(maps) + w_micl MICL(outlier maps).

    --contrast oe has Outlier Exposure's loss in MICL's place.
    """

    def __init__(self, net, teacher, outliers, data, options):
        super().__init__()
        self.net, self.outliers = net, outliers
        self.w_kd, self.w_maps, self.w_micl = (options[name] for name in WEIGHTS)
        self.noise = options["outliers"] == "noise"
        # Functions, so that the teacher is no submodule. A pretrained one has the same features,
        # which are frozen: its last layer is enough.
        self.teacher = self.teacher_head = self.critic = None
        if teacher and options["arch"] == models.PRETRAINED:
            self.teacher_head = teacher.requires_grad_(False).classify
        elif teacher:
            self.teacher = models.frozen(teacher)
        if self.w_micl and options["contrast"] == "micl":
            images, _ = data.splits["train"]
            images = images[::max(1, len(images) // 5000)]  # lists are sorted by class
            self.critic = losses.MICL.start(*models.predict(net, images))

    def forward(self, x, y, g):
        n = len(y)
        with models.autocast(x.device):
            maps = self.net.lower(self.net.prepare(x))                # [B, C, H, W]
            if self.w_micl:
                # Outliers join the batch, a quarter as many as images: in a pass of their own the
                # network would learn to tell them by their batch-norm statistics.
                added = synthesize.outlier_maps(maps, self.outliers, max(1, n // 4), g, self.noise,
                                                share())
                maps = torch.cat([maps, added.to(maps)])              # [B + M, C, H, W]
                maps = maps.contiguous(memory_format=torch.channels_last)
            features, later_maps = self.net.upper(maps, return_maps=True)  # [B + M, D]
            logits = self.net.classify(features)                      # [B + M, K]
            if self.teacher_head:
                teacher_logits = self.teacher_head(features[:n])
            elif self.teacher:
                teacher_logits, teacher_maps = self.teacher(x)        # it prepares x itself
        ce = F.cross_entropy(logits[:n], y)
        kd = maps_kd = micl = torch.zeros_like(ce)
        if self.w_kd:
            kd = losses.distill(logits[:n], teacher_logits)
        if self.w_maps:
            maps_kd = losses.distill_maps([stage[:n] for stage in (maps, *later_maps)],
                                          teacher_maps)
        if self.critic:
            is_id = torch.arange(len(logits), device=x.device) < n
            micl = self.critic(logits, features, is_id)
        elif self.w_micl:
            micl = losses.outlier_exposure(logits[n:])
        loss = ce + self.w_kd * kd + self.w_maps * maps_kd + self.w_micl * micl
        return loss, {"ce": ce, "kd": kd, "maps": maps_kd, "micl": micl}


class VOS(nn.Module):
    """A peer: cross-entropy + 0.1 VOS against Gaussian outliers in the start's features."""

    def __init__(self, net, data, options):
        super().__init__()
        self.net = net
        self.vos = losses.VOS(net.fc.out_features)
        images, labels = data.splits["train"]
        _, features = models.predict(net, images)
        g = models.generator(options["seed"], "synthesize")
        outliers = synthesize.gaussian_outliers(features, labels.cpu(), options["per_class"], g)
        self.outliers = outliers.to(images.device)  # [M, D]

    def forward(self, x, y, g):
        with models.autocast(x.device):
            logits = self.net(self.net.prepare(x))
        rank, world = share()
        chosen = torch.randint(len(self.outliers), (world * len(y),), generator=g, device=x.device)
        outlier_logits = self.net.classify(self.outliers[chosen[rank::world]])
        ce, vos = F.cross_entropy(logits, y), self.vos(logits, outlier_logits)
        return ce + 0.1 * vos, {"ce": ce, "vos": vos}


def distils(options):
    return bool(options["w_kd"] or options["w_maps"])


# --- The loop.

def train(stage, objective, data, run, optimizer=None):
    """Trains the objective's submodules in place; stage: 'ce', 'teacher' or 'oal'.

    By SGD, unless another optimiser of theirs is given; the rate falls to 0 along a cosine, step by
    step. A resumed run goes on from checkpoint.pt.
    """
    options, net, (images, labels) = run.options, objective.net, data.splits["train"]
    models.to_device(objective, images.device).train()
    if options["arch"] == models.PRETRAINED:  # the last layer learns; batch norm stays as it is
        net.requires_grad_(False).eval()
        net.fc.requires_grad_()
    batch = min(options["batch"], len(images))
    rank, world = share()
    per_epoch = (len(images) - 2 * world) // batch + 1  # no batch of 1 image
    epochs = options["epochs"] or max(options[f"{stage}_epochs"], math.ceil(MIN_STEPS / per_epoch))
    steps, first = epochs * per_epoch, 0
    period = per_epoch * math.ceil(CHECKPOINT_STEPS / per_epoch)
    if not optimizer:
        rate = options["oal_lr"] if stage == "oal" else SGD["lr"] * batch / 128
        groups = [{"params": [p for p in part.parameters() if p.requires_grad],
                   "weight_decay": 0 if isinstance(part, losses.MICL) else SGD["weight_decay"]}
                  for part in objective.children()]
        optimizer = torch.optim.SGD(groups, **{**SGD, "lr": rate})
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    g = models.generator(options["seed"], stage, images.device)
    path = run.out / "checkpoint.pt"
    saved = models.load_tensors(path, "a checkpoint of this program") if path.exists() else {}
    if saved.get("stage") == stage:
        for name, part in (("objective", objective), ("optimizer", optimizer),
                           ("schedule", schedule)):
            part.load_state_dict(saved[name])
        g.set_state(saved["generator"])
        first = saved["step"]
    engine = parallel(objective, images.device)

    begun, count, total = time.perf_counter(), 0, 0.0
    for step in range(first, steps):
        number = step % per_epoch  # of the batch in its epoch
        if number == 0:
            order = torch.randperm(len(images), generator=g, device=images.device)
        index = order[number * batch:(number + 1) * batch]
        index = index[:len(index) // world * world]  # equal shares, so that all draw alike
        x = augment(images[index], options["crop"], g)
        loss, terms = engine(x[rank::world], labels[index][rank::world], g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        # Every ten seconds the means of the losses; at the end of a period a checkpoint, too.
        values = [torch.as_tensor(value, device=x.device) for value in (*terms.values(), loss)]
        total, count = total + torch.stack(values).detach(), count + 1
        ends = (step + 1) % period == 0 or step + 1 == steps
        if not ends and time.perf_counter() - begun < 10:
            continue
        means = dict(zip([*terms, "sum"], (total / count).tolist()))  # waits for the device
        shown = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
        if not all(map(math.isfinite, means.values())):
            raise Mistake(f"the loss is not finite by {stage} step {step + 1}: {shown}; lower a "
                          "weight, or add images to a small training set")
        elapsed = time.perf_counter() - begun
        run.seconds[stage] += elapsed
        if is_first():
            print(f"{stage}: epoch {step // per_epoch + 1}/{epochs}, step {number + 1}/{per_epoch}"
                  f", {shown}, {batch * count / elapsed:.0f} images/s, "
                  f"{(steps - step - 1) * elapsed / count:.0f} s left", flush=True)
            if ends:
                save_checkpoint(run, stage, step=step + 1, generator=g.get_state(),
                                objective=objective.state_dict(), optimizer=optimizer.state_dict(),
                                schedule=schedule.state_dict())
        begun, count, total = time.perf_counter(), 0, 0.0


# --- Augmentation, on the device.

def augment(images, pad, g):
    """uint8 [B, 3, S, S] -> the same shape: random crop after zero-padding, random flip.

    pad None: random boxes, see resized_crop.
    """
    if pad is None:
        return resized_crop(images, g)
    b, size, device = len(images), images.shape[-1], images.device
    top, left, flip = (torch.randint(high, (b, 1), generator=g, device=device)
                       for high in (2 * pad + 1, 2 * pad + 1, 2))
    span = torch.arange(size, device=device)
    rows, cols = top + span, left + torch.where(flip == 1, size - 1 - span, span)  # [B, S] each
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)  # [B, S + 2 pad, S + 2 pad, 3]
    image = torch.arange(b, device=device)[:, None, None]
    return padded[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def resized_crop(images, g):
    """uint8 [B, 3, S, S] -> the same shape: random boxes, enlarged, and random flips.

    A box has a quarter to all of the area, and sides of 3:4 to 4:3.
    """
    area, ratio, x, y, flip = torch.rand(5, len(images), generator=g, device=images.device)
    area, ratio = 0.25 + 0.75 * area, (4 / 3) ** (2 * ratio - 1)
    width, height = ((area * r).sqrt().clamp_max(1) for r in (ratio, 1 / ratio))  # of 1, the side
    zero, sign = torch.zeros_like(width), 1 - 2 * (flip < 0.5).float()
    across = torch.stack([sign * width, zero, (2 * x - 1) * (1 - width)], dim=1)  # [B, 3]
    down = torch.stack([zero, height, (2 * y - 1) * (1 - height)], dim=1)
    grid = F.affine_grid(torch.stack([across, down], 1), images.shape, align_corners=False)
    grid = grid.clamp(1 / images.shape[-1] - 1, 1 - 1 / images.shape[-1])  # centres of pixels
    out = F.grid_sample(images.float(), grid, align_corners=False)
    return out.round().to(torch.uint8)


# --- Inputs and files.

def load_images(options, data_root, ood, device):
    """The ImageSet, its training images on the device."""
    if not is_first():
        barrier()  # the first process downloads and decodes, the others read what it has left
    # All sets for the first process, which measures; for the others what they train on.
    wanted, ood = (None, ood) if is_first() else (["train"], ())
    data = evaluate.load_set(options["dataset"], data_root, options["size"], wanted, ood)
    if is_first():
        barrier()
    images, labels = data.splits["train"]
    if labels.bincount(minlength=len(data.classes)).min() < 2 or len(images) < 2 * share()[1]:
        raise Mistake(f"the training set of {data.name} is too small: each class and each process "
                      "needs 2 images")
    if is_first() and data.missing():
        print(f"missing, and left out of the means: {', '.join(data.missing())}", flush=True)
    data.splits["train"] = images.to(device), labels.to(device)
    return data


def load_files(options, data, device):
    """-> (start, teacher, outliers), of the given files, checked before any training.

    The start has fresh or ImageNet weights if it is still to be trained; the others may be None.
    """
    classes, teacher, outliers = len(data.classes), None, None
    if options["ce"]:
        start, _ = evaluate.open_network(options["ce"], data, device)
        if start.arch != options["arch"]:
            raise Mistake(f"{options['ce']} is a {start.arch}: add --arch {start.arch}")
    elif options["arch"] == models.PRETRAINED:
        start = models.build_pretrained(classes, options["size"])
    else:
        with torch.random.fork_rng(devices=[]):  # fresh weights depend on the seed alone
            torch.manual_seed(models.generator(options["seed"], "weights").initial_seed())
            start = models.build(options["arch"], classes, options["size"])
        start.set_scale(data.mean, data.std)
    models.to_device(start, device)
    if options["teacher"] and distils(options):
        teacher, detector = evaluate.open_network(options["teacher"], data, device)
        if detector.get("grew_from") != models.digest(start):
            raise Mistake(f"{options['teacher']} has not grown from {options['ce']}: name the "
                          "teacher.pt of its run; released/released.py takes other teachers")
    if options["outliers"] not in ("diffusion", "noise"):
        outliers = synthesize.read_outliers(options["outliers"], start)
    return start, teacher, outliers


def begin_run(options, out, resume, data, start, teacher, outliers):
    """The folder --out, empty or to be resumed by the same options on the same images -> a Run."""
    digest = [*data.classes, f"{evaluate.digest_of(*data.splits['train']):08x}",
              *(models.digest(net)[:8] for net in (options["ce"] and start, teacher) if net)]
    if outliers:
        digest.append(f"{evaluate.digest_of(outliers['latent'], outliers['inlier']):08x}")
    seconds = dict.fromkeys(("ce", "teacher", "synthesize", "oal"), 0.0)
    run = Run(options, " ".join(digest), out, seconds)
    if resume and (out / "checkpoint.pt").exists():
        saved = models.load_tensors(out / "checkpoint.pt", "a checkpoint of this program")
        if not {"options", "digest", "seconds", "stage"} <= saved.keys():
            raise Mistake(f"{out}/checkpoint.pt is not a checkpoint of this program: name another "
                          "--out")
        before = {**options, **saved["options"]}
        # The digest says whether the content of these is the same.
        paths = ("dataset", "ce", "teacher", *(["outliers"] if outliers else []))
        differ = [name for name in options if name not in paths and before[name] != options[name]]
        if saved["digest"] != run.digest:
            differ.append("classes, training images or files")
        if differ:
            raise Mistake(f"{out} holds a run of other {', '.join(differ)}: resume by the same "
                          "command")
        return run._replace(seconds=saved["seconds"])
    files = sorted(file.name for kind in ("*.pt", "results.json") for file in out.glob(kind))
    if files:
        raise Mistake(f"{out} holds another run's {', '.join(files)}: name another --out, or go on "
                      "from a checkpoint.pt with --resume")
    barrier()  # until every process has looked
    if is_first():
        save_checkpoint(run, "begun")
    barrier()
    return run


def save_checkpoint(run, stage, **state):
    evaluate.write(run.out / "checkpoint.pt", {"options": run.options, "digest": run.digest,
                                               "seconds": run.seconds, "stage": stage, **state})


def keep(name, net, data, run, grew_from=""):
    """Writes NAME.pt and NAME.detector.pt, unless they are there; gives net the weights of NAME.pt.

    grew_from: the digest of the network that it started as. Mistake: the files are another run's.
    """
    path = run.out / f"{name}.pt"
    if path.exists():
        known, detector = evaluate.open_network(path, data)
        if known.arch != net.arch or detector.get("grew_from", grew_from) != grew_from:
            raise Mistake(f"{path} is another run's: remove it, or put back that of this run")
        net.load_state_dict(known.state_dict())
    if is_first() and not (path.exists() and os.path.exists(evaluate.beside(path))):
        print(f"{name}.pt and its detector", flush=True)
        content = evaluate.describe_detector(net, data, grew_from)
        evaluate.write(evaluate.beside(path), content)
        evaluate.write(path, on_cpu(net.state_dict()))
    barrier()
    net.load_state_dict(models.read_state(path))


def warn_of_near_copies(net, data):
    """Says how many validation images have a near-copy in train/, if it is more than a quarter."""
    (images, _), (val, _) = data.splits["train"], data.splits["val"]
    (_, features), (_, queries) = models.predict(net, images), models.predict(net, val)
    nearest, median = (-evaluate.nearness(queries, features, k) for k in (1, len(features) // 2))
    near = (nearest < NEAR_COPY * median).sum().item()
    if near > len(val) / 4:  # a share c of copies makes 5 % into 5 % / (1 - c)
        print(f"{near} of {len(val)} validation images have a near-copy among the training images "
              "(bursts, frames, augmented pictures?): more new images will be flagged than the "
              "threshold says; put other photographs into val/", flush=True)


def save_outliers(outliers, start, data, run):
    """Writes outliers.pt: those that were given, or others, made here."""
    begun, options = time.perf_counter(), run.options
    g = models.generator(options["seed"], "synthesize", start.fc.weight.device)
    outliers = outliers or synthesize.synthesize(start, data, options["per_class"],
                                                 options["diffusion_steps"], g)
    run.seconds["synthesize"] = time.perf_counter() - begun
    save_checkpoint(run, "synthesize")
    evaluate.write(run.out / "outliers.pt", on_cpu(outliers))


def on_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


# --- Processes: torchrun starts several, each for its share of every batch.

def join_processes(device):
    """Joins the processes of torchrun, if it is at work -> the device of this one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return torch.device(device)
    if device.startswith("cuda"):
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise Mistake(f"there are {torch.cuda.device_count()} GPUs here: start no more "
                          "processes, by --nproc_per_node")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Hours, for the first process to download and draw while the others wait.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                            timeout=timedelta(hours=4))
    return torch.device(device)


def share():
    """(rank, number of processes): rows [rank::number] of a batch are this process's."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    return share()[0] == 0


def barrier():
    """Until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def parallel(objective, device):
    """The objective, under torchrun as a module whose gradients are means over the processes."""
    if not dist.is_initialized():
        return objective
    if device.type == "cuda":
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    return DistributedDataParallel(objective)


# --- Command line.

def parse_args():
    """-> the arguments; options: what decides the weights, beside the images."""
    parser = evaluate.common_parser(__doc__)
    add = parser.add_argument
    add("--ood", nargs="+", action="extend", default=[], type=evaluate.path, metavar="FOLDER",
        help="folders of your own OOD images")
    add("--out", type=evaluate.path, help="folder for everything that is written (runs/DATASET)")
    add("--seed", type=evaluate.seed, default=0)
    add("--arch", choices=models.ARCHS, help="resnet_tiny for shapes, resnet18 for CIFAR, "
        "efficientnet_lite0, with ImageNet weights, for a FOLDER")
    add("--epochs", type=evaluate.positive, help="of each stage (the arch's own)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--ce", type=evaluate.path, metavar="FILE", help="start from this network")
    add("--teacher", type=evaluate.path, metavar="FILE", help="distil from this one, of --ce's run")
    add("--outliers", default="diffusion", type=evaluate.path, metavar="{diffusion,noise,FILE}",
        help="noise in place of steps; or the outliers.pt of --ce's run")
    add("--contrast", choices=["micl", "oe"], default="micl",
        help="oe: the loss of Outlier Exposure in place of MICL")
    add("--peer", choices=["vos"], help="train the student by this method instead")
    for name in WEIGHTS:
        add(f"--{name.replace('_', '-')}", type=float, help="weight of the term; 0 leaves it out")
    args = parser.parse_args()
    given = {name: value for name in WEIGHTS if (value := getattr(args, name)) is not None}
    if not all(0 <= value < math.inf for value in given.values()):
        raise Mistake("--w-kd, --w-maps and --w-micl are finite numbers from 0 on")

    content = evaluate.read_detector(args.ce) if args.ce else {}
    default = {"shapes": "resnet_tiny", "cifar10": "resnet18", "cifar100": "resnet18"}
    arch = args.arch or content.get("arch") or default.get(args.dataset, models.PRETRAINED)
    pretrained = arch == models.PRETRAINED
    size = args.size or (160 if pretrained else 32)
    size = evaluate.size_of(args.ce, args.size) if args.ce else size
    if pretrained and not args.ce and size < 96:
        raise Mistake(f"--size {size} is too small for {arch}: take a multiple of 32 from 96 on")
    if pretrained and (args.teacher or args.w_maps):
        raise Mistake(f"of {arch} the last layer alone is trained, from the start's own logits: "
                      "leave out --teacher and --w-maps")
    from_files = args.outliers not in ("diffusion", "noise")
    if (args.teacher or from_files) and not args.ce:
        raise Mistake("--teacher FILE and --outliers FILE are of a start: name it by --ce FILE")
    if args.peer and (given or args.teacher or from_files or args.contrast != "micl"
                      or args.outliers == "noise"):
        raise Mistake("--peer is not OAL: leave out --teacher, --w-*, --contrast and --outliers")
    options = {name: getattr(args, name) for name in
               "dataset seed epochs ce teacher peer contrast outliers".split()}
    options |= {"arch": arch, "size": size, **WEIGHTS, **TIERS[arch]}
    options |= {"w_micl": 0.5} if args.contrast == "oe" else {}
    options |= dict.fromkeys(WEIGHTS, 0.0) if args.peer else given
    # A checkpoint holds the state of one kind of device and of one number of processes.
    options["device"] = args.device.split(":")[0]
    options["processes"] = os.environ.get("WORLD_SIZE", "1")
    args.out = Path(args.out or f"runs/{os.path.basename(os.path.abspath(args.dataset))}")
    return args, options


if __name__ == "__main__":
    evaluate.guarded(main)
