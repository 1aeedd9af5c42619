"""OAL (Outlier Aware Learning), from the images to the table of results. Paper: arXiv 2406.16525.

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
import json
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
from models import fail

# OpenOOD v1.5's recipe for CIFAR. The rate is for a batch of 128; start and teacher scale it.
SGD = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
# Per arch: epochs of the three stages; the student's rate; batch; padding of the random crop;
# boundary outliers per class; steps of the diffusion model, at most.
TIERS = {
    "resnet18": dict(ce_epochs=100, teacher_epochs=100, oal_epochs=100, oal_lr=0.005, batch=128,
                     crop=4, per_class=500, diffusion_steps=4000),
    "resnet_small": dict(ce_epochs=8, teacher_epochs=16, oal_epochs=3, oal_lr=0.02, batch=128,
                         crop=1, per_class=50, diffusion_steps=1000),
    "resnet_tiny": dict(ce_epochs=9, teacher_epochs=7, oal_epochs=8, oal_lr=0.01, batch=64,
                        crop=1, per_class=50, diffusion_steps=1000)}
# A pretrained network (chosen on classes of CIFAR-100, results/README.md). Its start is a probe:
# the last layer alone learns, from random resized crops. So does its student: features are frozen,
# there are no maps to distil, and what is distilled are the logits of the start.
PROBE = dict(ce_epochs=2, teacher_epochs=2, oal_epochs=2, oal_lr=0.003, batch=32, crop=None,
             per_class=50, diffusion_steps=1000, w_kd=0.5, w_maps=0.0)
# Each stage has at least MIN_STEPS steps, unless --epochs is given. After fewer than 2 MIN_STEPS
# batch-norm's statistics are computed anew, unless the best epoch is kept. A checkpoint is saved
# after whole epochs, every CHECKPOINT_STEPS steps or more.
MIN_STEPS, CHECKPOINT_STEPS = 200, 20
# Weights of the student's losses beside cross-entropy. 'released': those of the paper's code.
RECIPES = {"oal": dict(w_kd=4.0, w_maps=16.0, w_boundary=0.0, w_micl=1.0),
           "released": dict(w_kd=4.0, w_maps=8.0, w_boundary=0.1, w_micl=0.2,
                            oal_lr=0.005, oal_epochs=100)}
# A teacher with ImageNet weights is fine-tuned by Adam, as released for CIFAR-100.
FINE_TUNING = dict(lr=1e-4, epochs=50)
# SGD settings of the projection of a teacher's features, of the CLUBs, of MICL's a and tau.
PARTS = {"projection": dict(lr=0.01), "boundary_club": dict(lr=1e-4),
         "latent_club": dict(lr=1e-4), "critic": dict(weight_decay=0.0)}


class Run(NamedTuple):
    """What a run is, where it writes, what it has used."""
    options: dict   # what decides the weights, beside the images
    digest: int     # of the training images and labels
    out: Path       # None: nothing is printed or written, as in the benchmark
    seconds: dict   # used so far, by stage
    code: str = ""  # digest of the five files when the run began, or was resumed


def main():
    args = parse_args()
    options, device = args.options, join_processes(args.device)
    data, given, outliers = load_inputs(args, device)
    start, teacher = given["ce"].net, given["teacher"] and given["teacher"].net
    if args.benchmark:
        return benchmark(args.out, options, data, start, teacher)
    run = begin_run(options, args.out, args.resume, data)

    # 1. The start: a cross-entropy network. If ce.pt exists, this run is being resumed.
    if not (run.out / "ce.pt").exists():
        if not args.ce:
            train("ce", CrossEntropy(start), data, run)
        how = given["ce"].made if args.ce else made("ce", run)
        once(save_network, "ce", start, data, run, made=how)
    load_weights(start, run.out / "ce.pt")
    own = evaluate.digest(start)

    # 2. The teacher: a second cycle of the same recipe, on from the start; or a network with
    # ImageNet weights, fine-tuned; or a file. A pretrained start is the teacher itself.
    kin = not args.teacher or own in (given["teacher"].start, given["teacher"].digest)
    if args.pretrained and not args.teacher:
        teacher = copy.deepcopy(start)
    elif teacher is not None and (not args.teacher or is_name(args.teacher)):
        if not (run.out / "teacher.pt").exists():
            if not args.teacher:
                load_weights(teacher, run.out / "ce.pt")
            train("teacher", CrossEntropy(teacher), data, run)
            once(save_network, "teacher", teacher, data, run, made=made("teacher", run),
                 start=own if kin else "")
        load_weights(teacher, run.out / "teacher.pt")

    # 3. Outliers, from the start's maps and features. A teacher that has not grown from the start
    # gives the features in its place.
    searched = start if kin or teacher is None else teacher
    if needs_outliers(options):
        if not (run.out / "outliers.pt").exists():
            once(save_outliers, start, searched, outliers, data, run)
        outliers = synthesize.read_outliers(run.out / "outliers.pt", start)
        check_outliers(outliers, own, args)

    # 4. The student, which starts as the start.
    student = copy.deepcopy(start)
    if not (run.out / "student.pt").exists():
        objective = student_objective(student, teacher, kin, outliers, data, options)
        train("oal", objective, data, run)
        once(save_network, "student", student, data, run, outliers, start=own,
             made=made("oal", run))
    load_weights(student, run.out / "student.pt")

    # 5. Start and student on the benchmark, in the first process; the others are done.
    first = is_first()
    if dist.is_initialized():
        dist.destroy_process_group()
    if first:
        foreign = foreign_files(args, run, given, kin, outliers, searched)
        report(args, run, data, label(args, foreign))


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

    kin: the teacher has grown from the start. If not, its features are projected and distilled, as
    released, in place of its maps. --contrast oe has Outlier Exposure's loss in MICL's place.
    """

    def __init__(self, net, teacher, kin, outliers, data, options):
        super().__init__()
        self.net, self.outliers = net, outliers
        self.w = {name: options[f"w_{name}"] for name in ("kd", "maps", "micl")}
        self.noise = options["outliers"] == "noise"
        self.teacher = teacher and models.frozen(teacher)
        self.projection = self.critic = self.teacher_head = None
        if teacher and options["pretrained"] and kin:  # the same features, which are frozen
            self.teacher_head = teacher.classify
        if self.w["maps"] and not kin:
            self.projection = models.projection(teacher.fc.in_features, net.fc.in_features)
        if self.w["micl"] and options["contrast"] == "micl":
            images, _ = data.splits["train"]
            some = images[::max(1, len(images) // 5000)]  # lists are sorted by class
            self.critic = losses.MICL.start(*models.predict(net, some))

    def forward(self, x, y, g):
        n = len(y)
        with models.autocast(x.device):
            maps = self.net.lower(self.net.prepare(x))                # [B, 2W, S/R, S/R]
            if self.w["micl"]:
                # Outliers join the batch, a quarter as many as images: in a pass of their own the
                # network would learn to tell them by their batch-norm statistics.
                added = draw_outliers(maps, self.outliers, max(1, n // 4), self.noise, g)
                maps = torch.cat([maps, added.to(maps)])              # [B + M, 2W, S/R, S/R]
                maps = maps.contiguous(memory_format=torch.channels_last)
            features, later = self.net.upper(maps, return_maps=True)  # [B + M, D]
            logits = self.net.classify(features)                      # [B + M, K]
            if self.teacher_head:
                teacher_logits = self.teacher_head(features[:n])
            elif self.teacher:
                teacher_logits, teacher_features, teacher_maps = self.teacher(x)
        ce = F.cross_entropy(logits[:n], y)
        kd = maps_kd = micl = torch.zeros_like(ce)
        if self.teacher and self.w["kd"]:
            kd = losses.distill(logits[:n], teacher_logits)
        if self.projection:
            maps_kd = losses.distill(features[:n], self.projection(teacher_features))
        elif self.teacher and self.w["maps"]:
            maps_kd = losses.distill_maps([stage[:n] for stage in (maps, *later)], teacher_maps)
        if self.critic:
            is_id = torch.arange(len(logits), device=x.device) < n
            micl = self.critic(logits, features, is_id)
        elif self.w["micl"]:
            micl = losses.outlier_exposure(logits[n:])
        loss = ce + self.w["kd"] * kd + self.w["maps"] * maps_kd + self.w["micl"] * micl
        return loss, {"ce": ce, "kd": kd, "maps": maps_kd, "micl": micl}


class Released(nn.Module):
    """The losses of the paper's code (HengGao12/OAL, openood/trainers/oal_trainer.py), in float32.

    Outliers are drawn without regard to the images, so that both CLUBs have expectation zero
    (results/README.md, 'Audit'). One optimiser lowers them over q and the network together. The
    second CLUB has a deeper mean net (openood/losses/deep_mi_loss.py).
    """

    def __init__(self, net, teacher, outliers, options):
        super().__init__()
        self.net, self.outliers = net, outliers
        self.w = {name: options[f"w_{name}"] for name in ("kd", "maps", "boundary", "micl")}
        self.teacher = teacher and models.frozen(teacher)
        self.projection = self.boundary_club = self.latent_club = None
        dim = net.fc.in_features
        if self.w["maps"]:
            self.projection = models.projection(teacher.fc.in_features, dim)
        if self.w["boundary"]:
            self.boundary_club = losses.CLUB(outliers["boundary"].shape[1], dim, 512)
        if self.w["micl"]:
            self.released = outliers.get("released", outliers["latent"])
            self.latent_club = losses.CLUB(self.released.shape[1], dim, 512, deeper=(32, 16))

    def forward(self, x, y, g):
        logits, features = self.net(self.net.prepare(x), return_feature=True)
        ce = F.cross_entropy(logits, y)
        kd = maps_kd = boundary = latent = torch.zeros_like(ce)
        if self.teacher:
            teacher_logits, teacher_features, _ = self.teacher(x)
        if self.teacher and self.w["kd"]:
            kd = losses.distill(logits, teacher_logits)
        if self.projection:
            maps_kd = losses.distill(features, self.projection(teacher_features))
        if self.boundary_club:
            drawn = random_rows(self.outliers["boundary"], len(y), g)  # [B, O]
            boundary = self.boundary_club(drawn, features)
        if self.latent_club:
            latent = self.latent_club(random_rows(self.released, len(y), g), features)
        loss = (ce + self.w["kd"] * kd + self.w["maps"] * maps_kd
                + self.w["boundary"] * boundary + self.w["micl"] * latent)
        return loss, {"ce": ce, "kd": kd, "maps": maps_kd, "boundary": boundary, "micl": latent}


class VOS(nn.Module):
    """A peer: cross-entropy + 0.1 VOS against Gaussian outliers in the start's features."""

    def __init__(self, net, data, options):
        super().__init__()
        self.net = net
        self.vos = losses.VOS(net.fc.out_features)
        images, labels = data.splits["train"]
        _, features = models.predict(net, images)
        outliers = synthesize.gaussian_outliers(features, labels.cpu(), options["per_class"],
                                                models.generator(options["seed"], "synthesize"))
        self.outliers = outliers.to(images.device)  # [M, D]

    def forward(self, x, y, g):
        with models.autocast(x.device):
            logits = self.net(self.net.prepare(x))
        chosen = torch.randint(len(self.outliers), (processes() * len(y),), generator=g,
                               device=x.device)
        outlier_logits = self.net.classify(self.outliers[own_rows(chosen)])
        ce, vos = F.cross_entropy(logits, y), self.vos(logits, outlier_logits)
        return ce + 0.1 * vos, {"ce": ce, "vos": vos}


def student_objective(student, teacher, kin, outliers, data, options):
    """The objective of the recipe or peer; kin: the teacher has grown from the start.

    Fresh weights of its parts depend on the seed alone.
    """
    teacher = teacher if distils(options) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(models.generator(options["seed"], "heads").initial_seed())
        if options["peer"]:
            return VOS(student, data, options)
        if options["recipe"] == "released":
            return Released(student, teacher, outliers, options)
        return OAL(student, teacher, kin, outliers, data, options)


def distils(options):
    return bool(options["w_kd"] or options["w_maps"])


def needs_outliers(options):
    """Noise needs none."""
    return bool(options["w_micl"] and options["outliers"] != "noise" or options["w_boundary"])


def draw_outliers(maps, outliers, n, noise, g):
    """Maps of ID images [B, C, H, W] -> n outlier maps of this process; noise: the control."""
    draws, normal = torch.rand(processes() * n, 3, generator=g, device=maps.device), None
    if noise:
        normal = torch.randn((len(draws), *maps.shape[1:]), generator=g, device=maps.device)
        normal = own_rows(normal)
    return synthesize.outlier_maps(maps, outliers, own_rows(draws), normal)


@torch.no_grad()
def outlier_outputs(net, data, outliers, options):
    """Outliers of the validation images, in test mode -> (logits [M, C], features [M, D]).

    As many as images, or 500.
    """
    images, _ = data.splits["val"]
    found, g = [], models.generator(options["seed"], "critic", net.fc.weight.device)
    for maps, _ in models.feature_batches(net, images):
        n = math.ceil(len(maps) * max(len(images), 500) / len(images))
        added = draw_outliers(maps, outliers, n, options["outliers"] == "noise", g)
        with models.autocast(maps.device):
            found.append(net.upper(added.to(maps)))
    features = torch.cat(found)
    return net.classify(features).cpu(), features.cpu()


def random_rows(outliers, n, g):
    """n random rows of outliers [M, D] -> [n, D]; none repeats before all have been used."""
    wanted = processes() * n
    orders = [torch.randperm(len(outliers), generator=g, device=outliers.device)
              for _ in range(math.ceil(wanted / len(outliers)))]
    return outliers[own_rows(torch.cat(orders)[:wanted])]


# --- The loop.

def train(stage, objective, data, run):
    """Trains the objective's submodules in place, for the stage of that name.

    By SGD; the rate falls to 0 along a cosine, step by step. A teacher of ImageNet learns by Adam.
    It, and every stage of the released recipe, keeps the checkpoint with the best validation
    accuracy. A resumed run goes on from checkpoint.pt.
    """
    options, net, (images, labels) = run.options, objective.net, data.splits["train"]
    fine_tuned = stage == "teacher" and is_name(options["teacher"])
    probe = options["pretrained"] and stage != "teacher"
    net.requires_grad_()
    models.to_device(objective, images.device).train()
    if probe:  # the last layer alone learns; batch norm stays as ImageNet has left it
        net.requires_grad_(False).eval()
        net.fc.requires_grad_()
    batch = min(options["batch"], len(images))
    per_epoch = (len(images) - 2 * processes()) // batch + 1  # no batch of 1 image
    epochs = options["epochs"] or max(options[f"{stage}_epochs"], math.ceil(MIN_STEPS / per_epoch))
    steps, step, best = epochs * per_epoch, 0, {"accuracy": -1.0}
    period = per_epoch * math.ceil(CHECKPOINT_STEPS / per_epoch)
    rate = options["oal_lr"] if stage == "oal" else SGD["lr"] * batch / 128
    if fine_tuned:
        optimizer = torch.optim.Adam(net.parameters(), FINE_TUNING["lr"])
    else:
        groups = [{"params": [p for p in part.parameters() if p.requires_grad],
                   **PARTS.get(name, {})} for name, part in objective.named_children()]
        optimizer = torch.optim.SGD(groups, **{**SGD, "lr": rate})
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    g = models.generator(options["seed"], stage, images.device)
    state = dict(objective=objective, optimizer=optimizer, schedule=schedule)
    saved = load_checkpoint(run.out) if run.out else {}
    if saved.get("stage") == stage:
        with models.refusal(f"{run.out / 'checkpoint.pt'} is of another version of this program: "
                            "name another --out"):
            for name, part in state.items():
                part.load_state_dict(saved[name])
            g.set_state(saved["generator"])
            step, best = saved["step"], saved["best"]
    engine = parallel(objective, images.device)

    # pending: losses not read yet. To read one is to wait for the device.
    begun, pending = time.perf_counter(), []
    while step < steps:
        number = step % per_epoch  # of the batch in its epoch
        if number == 0:
            order = torch.randperm(len(images), generator=g, device=images.device)
        index = order[number * batch:(number + 1) * batch]
        x = images[index]
        x = resized_crop(x, g) if options["pretrained"] else augment(x, options["crop"], g)
        x, y = own_rows(x), own_rows(labels[index])
        if fine_tuned:  # its dropout draws from torch's own numbers
            seed = torch.randint(2 ** 62, (), generator=g, device=images.device)
            torch.manual_seed(int(seed))
        loss, terms = engine(x, y, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1

        pending.append(torch.stack([term.detach() for term in (*terms.values(), loss)]))
        period_ends = step % period == 0 or step == steps
        slow = time.perf_counter() - begun > 8
        if not period_ends and not slow:
            continue
        values, elapsed = torch.stack(pending).cpu(), time.perf_counter() - begun  # [steps, terms]
        finite, names = values.isfinite().all(1), [*terms, "sum"]
        if not finite.all():
            first = int(finite.int().argmin())
            shown = ", ".join(f"{name} {value}" for name, value in zip(names, values[first]))
            at = step - len(values) + first + 1
            fail(f"the loss is not finite at {stage} step {at}: {shown}; lower a --w-* weight, or "
                 "add images to a small training set")
        run.seconds[stage] += elapsed
        if run.out and is_first():
            epoch, per_step = (step - 1) // per_epoch + 1, elapsed / len(pending)
            shown = "  ".join(f"{name} {mean:.3f}" for name, mean in zip(names, values.mean(0)))
            print(f"{stage}: epoch {epoch}/{epochs}, step {number + 1}/{per_epoch}, {shown}, "
                  f"{batch / per_step:.0f} images/s, {(steps - step) * per_step:.0f} s left",
                  flush=True)
        if period_ends and run.out:
            if options["recipe"] == "released" or fine_tuned:
                best = better(best, net, data)
            parts = {name: part.state_dict() for name, part in state.items()}
            if is_first():
                save_checkpoint(run, {"stage": stage, "step": step, "best": best,
                                      "generator": g.get_state(), **parts})
        begun, pending = time.perf_counter(), []
    if "net" in best:
        net.load_state_dict(best["net"])
    elif run.out and steps < 2 * MIN_STEPS and not probe:
        models.renew_statistics(net, images)


def augment(images, pad, g):
    """uint8 [B, 3, S, S] -> the same shape: random crop after zero-padding, random flip."""
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


def better(best, net, data):
    """`best`, or the network as it is now if its validation accuracy is as high or higher."""
    images, labels = data.splits["val"]
    logits, _ = models.predict(net, images)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    if accuracy < best["accuracy"]:
        return best
    return {"accuracy": accuracy, "net": copy.deepcopy(net.state_dict())}


# --- Processes: torchrun starts several, each for its share of every batch.

def join_processes(device):
    """Joins the processes of torchrun, if it is at work -> the device of this one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return torch.device(device)
    if device.startswith("cuda:"):
        fail(f"--device {device} is one GPU for all processes: take --device cuda")
    try:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        # Hours, for the first process to download and draw while the others wait.
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                timeout=timedelta(hours=4))
    except (ValueError, KeyError, RuntimeError) as problem:  # torch's own: RuntimeError
        fail(f"the processes cannot be started ({str(problem).splitlines()[0]}): start them by "
             "torchrun, one for a GPU")
    return torch.device(device)


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier():
    """Until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def own_rows(rows):
    """This process's rows of [B, ...], as many as every other's."""
    if not dist.is_initialized():
        return rows
    return rows[dist.get_rank()::processes()][:len(rows) // processes()]


def parallel(objective, device):
    """The objective, under torchrun as a module whose gradients are means over the processes."""
    if not dist.is_initialized():
        return objective
    if device.type == "cuda":
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    return DistributedDataParallel(objective)


# --- Inputs and files.

def load_inputs(args, device):
    """What a run begins with -> (data, {"ce", "teacher"}, outliers), checked before any training.

    The training images are on the device. ce and teacher: Detectors of --ce and --teacher FILE, or
    of fresh or ImageNet weights, still to be trained. teacher: None if there is neither --teacher
    nor distillation, or if the start is to be it. outliers: those of --outliers FILE, or None.
    """
    options = args.options
    if not is_first():
        barrier()  # the first process downloads and decodes, the others read what it has left
    # All sets for the first process, which measures; for the others what they train on.
    wanted, ood = (None, args.ood) if is_first() else (("train", "val"), ())
    data = evaluate.load_set(args.dataset, args.data_root, options["size"], wanted, ood)
    images, labels = data.splits["train"]
    classes = len(data.classes)
    if labels.bincount(minlength=classes).min() < 2:
        fail(f"the training set of {data.name} is too small: each class needs 2 images")
    most = 1 if args.benchmark else min(options["batch"], len(images)) // 4
    if processes() > most:
        fail(f"{processes()} processes are too many: --benchmark takes 1, this run {most} at most")

    def fresh(name=None):  # ImageNet's weights of that name, or those of the seed
        if name:
            size = max(96, options["size"])  # smaller images are enlarged for a teacher
            net = models.build_pretrained(name, classes, size, args.data_root)
        else:
            with torch.random.fork_rng(devices=[]):  # fresh weights depend on the seed alone
                torch.manual_seed(models.generator(options["seed"], "weights").initial_seed())
                net = models.build(options["arch"], classes, options["size"])
            net = models.set_scale(net, data.mean, data.std)
        return evaluate.Detector(models.to_device(net, device), {})
    teacher = outliers = None
    start = evaluate.load_detector(args.ce, device, data) if args.ce else fresh(args.pretrained)
    if args.teacher:
        teacher = (fresh(args.teacher) if is_name(args.teacher) else
                   evaluate.load_detector(args.teacher, device, data))
    elif distils(options) and not args.pretrained:
        teacher = fresh()
    if args.outliers not in ("diffusion", "noise"):
        outliers = synthesize.read_outliers(args.outliers, start.net)
        if args.ce:
            check_outliers(outliers, evaluate.digest(start.net), args)
    if is_first():
        if data.missing():
            print(f"missing, and left out of the means: {', '.join(data.missing())}", flush=True)
        n = len(data.splits["val"][1])
        print(f"thresholds are of {n} validation images: {evaluate.worth(n)}", flush=True)
        barrier()
    data.splits["train"] = images.to(device), labels.to(device)
    return data, {"ce": start, "teacher": teacher}, outliers


def is_name(teacher):
    """Whether --teacher names a network of ImageNet, and no file."""
    return teacher in (*models.PRETRAINED, *models.torchvision_names())


def check_outliers(outliers, own, args):
    """Ends the program if outliers say that they are of another network than the start."""
    digest = synthesize.as_bytes(own)
    if not outliers.get("network", digest).cpu().equal(digest):
        path = args.out / "outliers.pt" if args.outliers == "diffusion" else args.outliers
        fail(f"{path} was not made from {args.ce or 'the start of this run'}: name the "
             "outliers.pt of its run")


def foreign_files(args, run, given, kin, outliers, searched):
    """The options that give a file which this row's own recipe would not have made."""
    found, options = [], run.options
    if args.ce and given["ce"].made != made("ce", run):
        found.append(f"--ce {Path(args.ce).name}")
    if args.teacher and not is_name(args.teacher) and (
            not kin or given["teacher"].made != made("teacher", run)):
        found.append(f"--teacher {Path(args.teacher).name}")
    if needs_outliers(options) and args.outliers != "diffusion":
        seed = models.generator(options["seed"], "synthesize").initial_seed()
        settings = synthesize.settings_of(searched, options["per_class"],
                                          options["diffusion_steps"], seed)
        if not settings.equal(outliers.get("settings", 0 * settings).cpu()):
            found.append(f"--outliers {Path(args.outliers).name}")
    return found


def made(stage, run):
    """A text: what decides the weights of a stage, beside the network that it starts from."""
    options = run.options
    epochs = options["epochs"] or options[f"{stage}_epochs"]
    how = {"ce": options["pretrained"], "teacher": options["teacher"] if is_name(
        options["teacher"]) else None, "oal": options["recipe"]}[stage]
    best = ", of which the best" * (options["recipe"] == "released")
    return (f"{stage}, {options['arch']}, {how}, {epochs} epochs{best}, seed {options['seed']}, "
            f"images {run.digest:08x}")


def begin_run(options, out, resume, data):
    """The folder --out, empty or to be resumed by the same options on the same images -> a Run."""
    run = Run(options, evaluate.digest_of(*data.splits["train"]), out,
              {"ce": 0.0, "teacher": 0.0, "synthesize": 0.0, "oal": 0.0}, evaluate.code_digest())
    if resume and (out / "checkpoint.pt").exists():
        saved = load_checkpoint(out)
        old = saved["options"]
        differ = [name for name in {**old, **options} if old.get(name, "") != options.get(name, "")]
        if saved["digest"] != run.digest:
            differ.append("training images")
        if differ:
            fail(f"{out} holds a run of other {', '.join(differ)}: resume by the same command")
        return run._replace(seconds=saved["seconds"])
    held = sorted(file.name for kind in ("*.pt", "results.json") for file in out.glob(kind))
    if held:
        fail(f"{out} holds another run's {', '.join(held)}: name another --out, or go on from a "
             "checkpoint.pt with --resume")
    once(save_checkpoint, run, {"stage": "begun"})
    if not (out / "checkpoint.pt").exists():
        fail(f"{out} is not the folder of the first process: --out must lie on a disk that all "
             "nodes share")
    return run


def once(save, *given, **named):
    """Saves what all processes read next: the first one does it, the others wait."""
    barrier()  # until every process has looked for the file
    if is_first():
        save(*given, **named)
    barrier()


def save_checkpoint(run, state):
    evaluate.write(run.out / "checkpoint.pt", {"options": run.options, "digest": run.digest,
                                               "seconds": run.seconds, **state})


def load_checkpoint(out):
    """What save_checkpoint wrote; ends the program where checkpoint.pt is something else."""
    path = out / "checkpoint.pt"
    with models.refusal(f"{path} is not a checkpoint of this program: remove it, or name another "
                        "--out"):
        saved = models.load_tensors(path)
        if not ({"options", "digest", "seconds", "stage"} <= saved.keys()
                and all(isinstance(saved[name], dict) for name in ("options", "seconds"))):
            raise ValueError("other entries")
    return saved


def save_network(name, net, data, run, outliers=None, **texts):
    """Writes NAME.detector.pt and NAME.pt of a trained network; texts: how it was made.

    The detector of a teacher with a size of its own is made from this run's images, resized.
    """
    print(f"{name}.pt and its detector", flush=True)
    options, added = run.options, None
    if name == "student" and options["recipe"] == "oal" and options["w_micl"]:
        added = outlier_outputs(net, data, outliers, options)
    score = "micl_knn" if options["pretrained"] and name != "teacher" else "micl"
    detector = evaluate.describe_detector(net, data, score, added, **texts)
    evaluate.write(run.out / f"{name}.detector.pt", detector)
    evaluate.write(run.out / f"{name}.pt", on_cpu(net.state_dict()))


def load_weights(net, path):
    """The same weights in every process, whether trained in this run or an earlier one."""
    with models.refusal(f"{path} is not a network of this run: name another --out"):
        net.load_state_dict(models.load_tensors(path))


def save_outliers(start, searched, outliers, data, run):
    """Writes outliers.pt: those that were given, or others, made here."""
    begun, options = time.perf_counter(), run.options
    outliers = outliers or synthesize.synthesize(
        start, data, options["per_class"], options["diffusion_steps"],
        models.generator(options["seed"], "synthesize", start.fc.weight.device), searched)
    run.seconds["synthesize"] = time.perf_counter() - begun
    save_checkpoint(run, {"stage": "synthesize"})
    evaluate.write(run.out / "outliers.pt", on_cpu(outliers))


def on_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def report(args, run, data, row):
    """Measures start and student, writes results.json, prints the tables."""
    begun, measured = time.perf_counter(), {}
    for name, file in (("ce", "ce.pt"), ("oal", "student.pt")):
        print(f"evaluate: {file}", flush=True)
        measured[name], _ = evaluate.measure_file(run.out / file, data, list(evaluate.SCORES),
                                                  args.device)
    seconds = {**run.seconds, "evaluate": time.perf_counter() - begun}
    seconds["total"] = sum(seconds.values())
    results = {**evaluate.describe("train.py", data, run.options["size"], args.device, run.code),
               "arch": run.options["arch"], "seed": run.options["seed"], "label": row,
               "options": run.options, "seconds": seconds, "models": measured}
    evaluate.write(run.out / "results.json", json.dumps(results, indent=1))
    print("\n".join(evaluate.tables([results])))
    print(f"written: {run.out / 'results.json'}")


# --- Speed.

def benchmark(out, options, data, net, teacher):
    """Images per second of each kind of step -> prints and writes benchmark.json.

    Each is the best of three after a warm-up. A ratio is the time of our step over the sum of its
    bare parts, measured beside it: 1.0 is a step without overhead.
    """
    images, labels = data.splits["train"]
    device, batch = images.device, min(options["batch"], len(images))
    steps = min(10, len(images) // batch)
    data.splits["train"] = images[:steps * batch], labels[:steps * batch]
    teacher = teacher or copy.deepcopy(net)
    maps, _ = next(models.feature_batches(net, images[:steps * batch]))
    codec = synthesize.fit_codec(maps)
    outliers = {"boundary": torch.randn(200, net.fc.in_features, device=device),
                "latent": torch.randn(200, len(codec["basis"]), device=device),
                "inlier": torch.randn(200, len(codec["basis"]), device=device), **codec}
    run = Run({**options, "epochs": 1}, 0, None, {"ce": 0.0, "oal": 0.0})
    ce = CrossEntropy(net)
    oal = student_objective(net, teacher, not options["teacher"], outliers, data, options)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    x, y, added = net.prepare(images[:batch]), labels[:batch], maps[:batch // 4]

    def bare(loss, backward=True, step=True):
        net.train()
        for _ in range(steps):
            optimizer.zero_grad()
            with models.autocast(device), torch.set_grad_enabled(backward):
                value = loss()
            if backward:
                value.backward()
            if step:
                optimizer.step()

    parts = {
        "bare": lambda: bare(lambda: F.cross_entropy(net(x), y)),
        "teacher_forward": lambda: bare(lambda: teacher(teacher.prepare(images[:batch])),
                                        backward=False, step=False),
        "outliers": lambda: bare(lambda: net.classify(net.upper(added)).mean(), step=False),
        "ce_step": lambda: train("ce", ce, data, run),
        "oal_step": lambda: train("oal", oal, data, run),
        "test_pass": lambda: models.predict(net, images[:steps * batch])}
    seconds = {name: [] for name in parts}
    for _ in range(4):
        for name, part in parts.items():
            begun = time.perf_counter()
            part()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds[name].append(time.perf_counter() - begun)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    outlier_pass = best.pop("outliers")
    bare_oal = best["bare"] + best["teacher_forward"] * distils(options)
    if options["recipe"] == "oal" and options["w_micl"]:
        bare_oal += outlier_pass
    result = {"images_per_second": {name: steps * batch / time for name, time in best.items()},
              "ratio": {"ce": best["ce_step"] / best["bare"], "oal": best["oal_step"] / bare_oal}}
    evaluate.write(out / "benchmark.json", json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


# --- Command line.

def parse_args():
    """-> the arguments, not changed any more; args.options hold what decides the weights."""
    parser = evaluate.common_parser(__doc__)
    add, file = parser.add_argument, {"type": evaluate.some_path}
    add("--ood", nargs="+", action="extend", default=[], type=evaluate.folder, metavar="FOLDER",
        help="folders of your own OOD images")
    add("--out", **file, help="folder for everything that is written (runs/DATASET)")
    add("--seed", type=evaluate.SEED, default=0)
    add("--arch", choices=models.ARCHS,
        help="a network trained from nothing (resnet_tiny on shapes, resnet18 on CIFAR)")
    add("--pretrained", choices=models.PRETRAINED,
        help="a network with ImageNet weights (efficientnet_lite0 on a FOLDER)")
    add("--epochs", type=evaluate.POSITIVE, help="of each stage (the arch's own)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--benchmark", action="store_true", help="measure speed and stop")
    add("--ce", **file, metavar="FILE", help="start from this network")
    add("--teacher", **file, metavar="{NAME,FILE}", help="distil from this network: a FILE of "
        "ours, or torchvision's NAME, with ImageNet weights, fine-tuned here")
    add("--recipe", choices=RECIPES, default="oal", help="released: that of the paper's code")
    add("--peer", choices=["vos"], help="train the student by this method instead")
    add("--contrast", choices=["micl", "oe"], default="micl",
        help="oe: the loss of Outlier Exposure in place of MICL")
    add("--outliers", default="diffusion", **file, metavar="{diffusion,noise,FILE}",
        help="noise in place of drawn steps; or an outliers.pt of the same --ce")
    for name in RECIPES["oal"]:
        add(f"--{name.replace('_', '-')}", type=evaluate.FINITE,
            help="weight of the term; 0 leaves it out")
    args = parser.parse_args()
    evaluate.check_common(args, alone=False)
    weights = {name: getattr(args, name) for name in RECIPES["oal"]}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    other = (weights or args.benchmark or args.teacher or args.recipe != "oal"
             or args.outliers != "diffusion" or args.contrast != "micl")
    if args.peer and other:
        fail("--peer is not OAL: leave out --recipe, --teacher, --w-*, --contrast, --outliers and "
             "--benchmark")
    if args.recipe == "oal" and args.w_boundary:
        fail("--w-boundary is for --recipe released: add that, or leave it out")
    if args.recipe == "released" and (args.outliers == "noise" or args.contrast != "micl"):
        fail("--outliers noise and --contrast are for the default recipe: leave out --recipe "
             "released")
    choose_network(args)
    if args.teacher and not is_name(args.teacher) and not Path(args.teacher).is_file():
        fail(f"no teacher {args.teacher}: name a file of weights, or a classifier of torchvision")
    if args.outliers not in ("diffusion", "noise") and not Path(args.outliers).is_file():
        fail(f"no outliers {args.outliers}: name an outliers.pt")
    if args.pretrained and (args.recipe == "released" or args.w_maps):
        fail(f"of {args.pretrained} the last layer alone is trained: leave out --recipe released "
             "and --w-maps, or name another network by --arch")
    if args.pretrained and args.benchmark:
        fail("--benchmark is for networks trained from nothing: name one by --arch")
    own = {**TIERS.get(args.arch, {}), **RECIPES[args.recipe], **(PROBE if args.pretrained else {})}
    if is_name(args.teacher):
        own["teacher_epochs"] = FINE_TUNING["epochs"]
    if args.contrast == "oe":
        own["w_micl"] = 0.5
    if args.peer:
        own |= dict.fromkeys(RECIPES["oal"], 0.0)
    given = {name: getattr(args, name) for name in "dataset size seed arch pretrained epochs ce "
             "teacher recipe peer contrast outliers".split()}
    # A checkpoint holds the state of one kind of device and of one number of processes.
    machine = {"device": args.device.split(":")[0], "processes": os.environ.get("WORLD_SIZE", "1")}
    args.options = {**given, **own, **weights, **machine}
    named = {"recipe": args.recipe != "oal", "peer": args.peer, "contrast": args.contrast != "micl",
             "epochs": args.epochs, "pretrained": args.pretrained in models.ARCHS,
             "teacher": is_name(args.teacher), "outliers": args.outliers == "noise"}
    args.words = [f"--{name} {given[name]}" for name, is_named in named.items() if is_named]
    args.words += [f"--{name.replace('_', '-')} {weight:g}" for name, weight in weights.items()
                   if weight != own[name]]
    args.out = Path(args.out or f"runs/{os.path.basename(os.path.abspath(args.dataset))}")
    return args


def choose_network(args):
    """Fills in --arch, --pretrained and --size: those of --ce, the given ones, or the defaults."""
    if args.arch and args.pretrained:
        fail("--arch is trained from nothing, --pretrained is not: leave out one")
    if args.ce:
        content = evaluate.read_detector(args.ce)
        arch = content["arch"] if content else models.kind_of(models.read_state(Path(args.ce)))
        is_ours = arch in models.ARCHS and not (content and content["score"] == "micl_knn")
        pretrained = None if is_ours else arch
        if arch not in models.ARCHS and arch not in models.PRETRAINED:
            fail(f"{args.ce} is a checkpoint of {arch}: a start is one of "
                 f"{', '.join({**models.ARCHS, **models.PRETRAINED})}")
        if args.arch not in (None, arch) or args.pretrained not in (None, pretrained):
            fail(f"{args.ce} is a checkpoint of {arch}: leave out --arch and --pretrained")
        args.arch, args.pretrained = arch, pretrained
        args.size = evaluate.size_of(args.ce, args.size)
    elif not args.arch and not args.pretrained:
        if args.dataset in evaluate.NAMED:
            args.arch = "resnet_tiny" if args.dataset == "shapes" else "resnet18"
        else:
            args.pretrained = "efficientnet_lite0"
    args.arch = args.arch or args.pretrained
    args.size = args.size or (models.PRETRAINED[args.arch][2] if args.pretrained else 32)
    if args.pretrained and args.size < 96:
        fail(f"--size {args.size} is too small for {args.arch}: take a multiple of 32 from 96 to "
             "320")


def label(args, foreign):
    """A row's name in tables: its options that are not defaults, without the seed, and given files
    of another recipe.
    """
    words = [*args.words, *foreign]
    return f"`{' '.join(words)}`" if words else "OAL"


if __name__ == "__main__":
    evaluate.guarded(main)
