"""OAL (Outlier Aware Learning), from the images to the table of results. Paper: Gao et al., arXiv 2406.16525.

    python train.py                                                        # embedded images, no download, minutes
    python train.py --dataset cifar100 --data-root DIR                     # resnet18, 3 x 100 epochs: a GPU
    python train.py --dataset cifar100 --data-root DIR --arch resnet_small # 8 + 16 + 3 epochs: a laptop
    python train.py --dataset FOLDER --ood FOLDER                          # your images, train/CLASS/... (README)
    torchrun --nproc_per_node=N train.py --dataset cifar100 --data-root DIR

In the order in which things happen: a cross-entropy network (the baseline, the student's start); its teacher, trained
on from there; outliers synthesised from the network's features (synthesize.py); the student, trained on ID images and
outliers (losses.py); network and student measured side by side (evaluate.py). An ablation is a weight of 0: `--w-kd 0`
trains without logit distillation. Without both distillations there is no teacher.
"""
import argparse
import json
import math
import os
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import evaluate
import losses
import models
import synthesize

# OpenOOD v1.5's recipe for CIFAR; its rate is for a batch of 128 and is scaled with the batch.
CE = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
# A recipe is an objective: cross-entropy plus these terms with these weights (losses.py). 'oal' is ours, 'released' has
# the losses of the paper's code. An arch brings the size of a run: epochs of each stage; the student's learning rate;
# the batch; padding of the random crop; outliers per class; steps of the diffusion model, at most.
RECIPES = {"oal": dict(w_kd=4.0, w_feat=16.0, w_latent=1.0),
           "released": dict(w_kd=4.0, w_feat=8.0, w_boundary=0.1, w_latent=0.2)}
PEERS = {"vos": {"ce": 1.0, "vos": 0.1}, "logitnorm": {"logitnorm": 1.0}}
TIERS = {"resnet18": dict(epochs=dict(ce=100, teacher=100, oal=100), oal_lr=0.005, batch=128, crop=4, per_class=500,
                          diffusion_steps=4000),
         "resnet_small": dict(epochs=dict(ce=8, teacher=16, oal=3), oal_lr=0.02, batch=128, crop=1, per_class=50,
                              diffusion_steps=1000),
         "resnet_tiny": dict(epochs=dict(ce=9, teacher=7, oal=8), oal_lr=0.01, batch=64, crop=1, per_class=50,
                             diffusion_steps=1000)}
# What the optimiser does otherwise for what is trained beside the student: as released, and MICL's a and tau.
HEADS = {"projection": dict(lr=0.01), "boundary": dict(lr=1e-4), "latent": dict(lr=1e-4),
         "critic": dict(weight_decay=0.0)}


def generator(seed, stage):
    """A stage's only source of randomness: its draws are the same whether or not earlier stages were run here."""
    return torch.Generator().manual_seed(10 * seed
                                         + ("weights", "ce", "synthesize", "oal", "teacher", "heads").index(stage))


def build(arch, num_classes, seed):
    """A network whose fresh weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return models.build(arch, num_classes)


def augment(images, pad, g):
    """uint8 [B, 3, S, S] -> the same shape: random crop after zero-padding by `pad`, random horizontal flip."""
    b, size, device = len(images), images.shape[-1], images.device
    top, left, flip = (torch.randint(high, (b, 1), generator=g).to(device) for high in (2 * pad + 1, 2 * pad + 1, 2))
    span = torch.arange(size, device=device)
    rows, cols = top + span, left + torch.where(flip == 1, size - 1 - span, span)                     # [B, S] each
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)                              # [B, S + 2 pad, S + 2 pad, 3]
    cut = padded[torch.arange(b, device=device)[:, None, None], rows[:, :, None], cols[:, None, :]]   # [B, S, S, 3]
    return cut.permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# What a stage trains by: terms(x, y), a function of a batch, uint8 [B, 3, S, S] augmented and int64 [B] ->
# {term: scalar}, and the heads that are trained beside the network.


def ce_terms(net, args):
    """Cross-entropy alone: the start and the teacher."""
    def terms(x, y):
        with models.autocast(args.device):
            return {"ce": F.cross_entropy(net(evaluate.normalize(x, args.dataset)), y)}
    return {}, terms


def oal_terms(student, teacher, outliers, images, labels, args, g):
    """OAL's objective: cross-entropy + 4 KD(logits) + 16 KD(maps) + 1 MICL by default -> (heads, terms).

    Without a teacher no distillation, without outliers no MICL. teacher, outliers: None, or a frozen network and the
    tensors of outliers.pt on the device.
    """
    heads, n_outliers = {}, args.batch // 4
    if outliers:  # about 5,000 images of all classes, by which the lists are sorted
        some = images[::max(1, len(images) // 5000)]
        heads["critic"] = losses.MICL.start(*evaluate.outputs(student, some, args.dataset, args.device))
    same_shape = teacher and teacher.conv1.weight.shape == student.conv1.weight.shape
    if teacher and not same_shape:
        heads["projection"] = models.projection(teacher.fc.in_features, student.fc.in_features)

    def terms(x, y):
        n = len(x)
        with models.autocast(args.device):
            x = evaluate.normalize(x, args.dataset)
            maps = student.lower(x)                                                       # [B, C, S/2, S/2]
            if outliers:
                # Latents join the batch half-way, so that they share its batch-norm statistics: in a pass of their own
                # they teach the network to recognise the statistics. Under torchrun a process takes its share of them.
                latents = synthesize.outlier_maps(maps, outliers, n_outliers, g, args.outliers)[args.rank::args.world]
                maps = torch.cat([maps, latents.to(maps)]).contiguous(memory_format=torch.channels_last)
            features, later = student.upper(maps, return_maps=True)                       # [B + M, D], two stages' maps
            logits = student.classify(features)                                           # [B + M, K]
            if teacher:
                with torch.no_grad():
                    teacher_maps = teacher.lower(x)
                    teacher_features, teacher_later = teacher.upper(teacher_maps, return_maps=True)
                    teacher_logits = teacher.classify(teacher_features)

        found = {"ce": F.cross_entropy(logits[:n], y)}
        if teacher:
            found["kd"] = losses.distill(logits[:n], teacher_logits)
            if same_shape:
                found["feat"] = losses.distill_maps([stage[:n] for stage in (maps, *later)],
                                                    [teacher_maps, *teacher_later])
            else:
                found["feat"] = losses.distill(features[:n], heads["projection"](teacher_features))
        if outliers:
            is_id = torch.arange(len(features), device=features.device) < n
            found["latent"] = heads["critic"](logits, features, is_id)
        return found

    return heads, terms


def released_terms(student, teacher, outliers, images, labels, args, g):
    """The losses of the paper's code (HengGao12/OAL, openood/trainers/oal_trainer.py) -> (heads, terms).

    Outliers are drawn without regard to the images, and both CLUBs share the network's optimiser, which moves q down
    the bound.
    """
    heads, dim = {}, student.fc.in_features
    if teacher:
        heads["projection"] = models.projection(teacher.fc.in_features, dim)
    for kind in [kind for kind in ("boundary", "latent") if getattr(args, f"w_{kind}")]:
        heads[kind] = losses.CLUB(outliers[kind].shape[1], dim, 512)

    def terms(x, y):
        x = evaluate.normalize(x, args.dataset)
        with models.autocast(args.device):
            logits, features = student(x, return_feature=True)                            # [B, K], [B, D]
            if teacher:
                with torch.no_grad():
                    teacher_logits, teacher_features = teacher(x, return_feature=True)
        found = {"ce": F.cross_entropy(logits, y)}
        if teacher:
            found["kd"] = losses.distill(logits, teacher_logits)
            found["feat"] = losses.distill(features, heads["projection"](teacher_features))
        for kind in [kind for kind in ("boundary", "latent") if kind in heads]:
            found[kind] = losses.micl_released(heads[kind], draw(outliers[kind], len(y), args, g), features)
        return found

    return heads, terms


def peer_terms(student, teacher, outliers, images, labels, args, g):
    """Two peers: LogitNorm alone, or cross-entropy and VOS's loss against Gaussian outliers in the start's features."""
    heads = {}
    if args.peer == "vos":
        heads["vos"] = losses.VOS(student.fc.out_features)
        features = evaluate.outputs(student, images, args.dataset, args.device)[1]        # of the start
        gaussian = synthesize.gaussian_outliers(features, labels.cpu(), args.per_class,
                                                generator(args.seed, "synthesize")).to(args.device)

    def terms(x, y):
        with models.autocast(args.device):
            logits = student(evaluate.normalize(x, args.dataset))
        if args.peer == "logitnorm":
            return {"logitnorm": losses.logit_norm(logits, y)}
        outlier_logits = student.classify(draw(gaussian, len(y), args, g))
        return {"ce": F.cross_entropy(logits, y), "vos": heads["vos"](logits, outlier_logits)}

    return heads, terms


def draw(outliers, n, args, g):
    """n random rows of outliers [M, D]. A process takes its share of a whole batch's draws: so all stay in step."""
    return outliers[torch.randint(len(outliers), (args.batch,), generator=g)[args.rank::args.world][:n]]


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


def train(stage, net, heads, terms, weights, images, labels, args, g, keep=True):
    """Trains `net` and its heads in place for one stage, 'ce', 'teacher' or 'oal'; adds the time taken to args.seconds.

    images uint8 [N, 3, S, S] and labels int64 [N] on args.device. The loss is the sum over weights {term: weight} of
    what terms(x, y) returns. g: the stage's generator, which terms may share. With `keep`, saves checkpoint.pt after
    each epoch and starts from it where it holds this stage.
    """
    rank, world = args.rank, args.world
    epochs, rate = args.epochs[stage], args.oal_lr if stage == "oal" else CE["lr"] * args.batch / 128
    net.to(args.device, memory_format=torch.channels_last).train()
    net.source = f"the network of stage {stage} in {args.out}"  # no longer that of the file it started from
    heads = torch.nn.ModuleDict(heads).to(args.device).train()
    groups = [{"params": list(net.parameters())}, *({"params": list(head.parameters()), **HEADS.get(name, {})}
                                                     for name, head in heads.items())]
    optimizer = torch.optim.SGD(groups, **{**CE, "lr": rate})
    trained = [p for group in groups for p in group["params"]]
    base_rates = [group["lr"] for group in optimizer.param_groups]

    steps, first_epoch = epochs * ((len(images) - 2 * world) // args.batch + 1), 0
    state = dict(net=net, heads=heads, optimizer=optimizer)
    saved = load_checkpoint(args) if keep else None
    if saved and saved["stage"] == stage:
        for name, part in state.items():
            part.load_state_dict(saved[name])
        g.set_state(saved["generator"])
        first_epoch = saved["epoch"]

    for epoch in range(first_epoch, epochs):
        begun = said = time.perf_counter()
        unread = []                                     # the terms of the last steps: reading them waits for the device
        batches = torch.randperm(len(images), generator=g).split(args.batch)
        if len(batches[-1]) < 2 * world:  # too few for batch-norm in every process
            batches = batches[:-1]
        for i, index in enumerate(batches):
            step = epoch * len(batches) + i
            for group, rate in zip(optimizer.param_groups, base_rates):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            index = index.to(args.device)
            x, y = augment(images[index], args.crop, g)[rank::world], labels[index][rank::world]
            every = terms(x, y)
            found = {name: every[name] for name in weights}  # a weight of 0 leaves its term out
            loss = sum(weights[name] * value for name, value in found.items())
            optimizer.zero_grad()
            loss.backward()
            if world > 1:
                average_gradients(trained, world)
            optimizer.step()

            unread.append(torch.stack([value.detach() for value in (*found.values(), loss)]))
            if len(unread) == 50 or i + 1 == len(batches):
                values = torch.stack(unread)                                                          # [<= 50, terms]
                check_finite(stage, step + 1 - len(values), [*found, "sum"], values)
                unread, now = [], time.perf_counter()
                if rank == 0 and (now - said > 20 or i + 1 == len(batches)):
                    said, speed = now, (i + 1) * args.batch / (now - begun)
                    left = ((epochs - epoch) * len(batches) - i - 1) * args.batch / speed
                    shown = "  ".join(f"{name} {value:.3f}" for name, value in zip(found, values.mean(0).tolist()))
                    print(f"{stage}: epoch {epoch + 1}/{epochs}, step {i + 1}/{len(batches)}, {shown}, "
                          f"{speed:.0f} images/s, {left:.0f} s left", flush=True)
        args.seconds[stage] += time.perf_counter() - begun
        if keep:
            save({"stage": stage, "epoch": epoch + 1, "seconds": args.seconds, "options": args.options,
                  "generator": g.get_state(), **{name: part.state_dict() for name, part in state.items()}},
                 args, "checkpoint.pt")


def average_gradients(parameters, world):
    """Under torchrun: every process holds a slice of the batch, and all step by the mean of their gradients."""
    for p in parameters:
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= world


def check_finite(stage, first_step, names, values):
    """Ends the run if a value [steps, terms and their weighted sum] is not finite, naming the first such step."""
    bad = (~torch.isfinite(values)).any(1).nonzero()
    if len(bad):
        row = values[bad[0, 0]].tolist()
        evaluate.fail(f"the loss is not finite at {stage} step {first_step + bad[0, 0].item()}: "
                      f"{', '.join(f'{name} {value}' for name, value in zip(names, row))}; lower a --w-* weight, or "
                      "try another --seed")


def load_checkpoint(args):
    """checkpoint.pt of the run in args.out, or None."""
    path = args.out / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return saved if saved["options"] else None
    except Exception:
        evaluate.fail(f"{path} is not a checkpoint of this program: remove it, or name another folder with --out")


def save(state, args, name):
    """Writes a file of args.out whole or not at all, by the first process alone; the others wait until it is there."""
    if args.world > 1:
        dist.barrier()  # none is still looking whether the file is there
    if args.rank == 0:
        evaluate.write(args.out / name, state)
    if args.world > 1:
        dist.barrier()


def save_network(net, args, name):
    """Writes a network's plain state_dict."""
    save({key: value.cpu() for key, value in net.state_dict().items()}, args, name)


def load_weights(net, args, name):
    """Reads what save_network wrote: the same network in every process, whether trained here or in an earlier run."""
    net.source = args.out / name
    net.load_state_dict(torch.load(net.source, map_location="cpu", weights_only=True))
    return net.to(args.device, memory_format=torch.channels_last).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The program.


def weights_of(args):
    """The student's objective: {term: weight}, without the terms whose weight is 0."""
    if args.peer:
        return PEERS[args.peer]
    weights = {name.removeprefix("w_"): getattr(args, name) for name in RECIPES[args.recipe]}
    return {"ce": 1.0, **{name: weight for name, weight in weights.items() if weight}}


def make_student(student, teacher, outliers, images, labels, args):
    """-> (heads, terms, generator) of the stage 'oal'; fresh heads depend on the seed alone."""
    g = generator(args.seed, "oal")
    make = peer_terms if args.peer else {"oal": oal_terms, "released": released_terms}[args.recipe]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(args.seed, "heads").initial_seed())
        return *make(student, teacher, outliers, images, labels, args, g), g


def benchmark(args, images, labels, teacher):
    """Images per second of the bare network, of each kind of step and of the test pass -> the dict of benchmark.json.

    Each is timed in this one run, three times in turn after a warm-up, and the best counts. A ratio is the time of our
    step over the sum of its bare parts, measured beside it: 1.0 is a step with no overhead.
    """
    n, classes = min(10, len(images) // args.batch) * args.batch, evaluate.ID_SETS[args.dataset]["classes"]
    weights = weights_of(args)
    args = argparse.Namespace(**{**vars(args), "epochs": dict(ce=1, teacher=1, oal=1)})
    images, labels = images[:n].to(args.device), labels[:n].to(args.device)
    net, teacher = (one.to(args.device, memory_format=torch.channels_last).eval()
                    for one in (build(args.arch, classes, args.seed), teacher or build(args.arch, classes, args.seed)))
    codec = synthesize.fit_codec(next(evaluate.stage2(net, images, args.dataset, args.device))[0])
    outliers = {"boundary": torch.randn(classes * 2, net.fc.in_features, device=args.device),
                "latent": torch.randn(classes * 2, len(codec["basis"]), device=args.device), **codec}
    taught, through = weights.keys() & {"kd", "feat"}, args.recipe == "oal" and "latent" in weights
    heads, terms, g = make_student(net, teacher if taught else None, outliers if weights.keys() & {"boundary", "latent"}
                                   else None, images, labels, args)
    optimizer = torch.optim.SGD(net.parameters(), **CE)
    x = evaluate.normalize(images[:args.batch], args.dataset)
    maps = net.lower(x[:args.batch // 4]).detach()

    def bare(forward, step=True):
        for _ in range(n // args.batch):
            with models.autocast(args.device):
                loss = forward()
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
            if step:
                optimizer.step()

    parts = {"bare": lambda: bare(lambda: F.cross_entropy(net.train()(x), labels[:args.batch])),
             "outliers": lambda: bare(lambda: net.classify(net.upper(maps)).mean(), step=False),  # half of a network
             "teacher_forward": lambda: torch.no_grad()(bare)(lambda: teacher(x), step=False),
             "ce_step": lambda: train("ce", net, *ce_terms(net, args), {"ce": 1.0}, images, labels, args, g,
                                      keep=False),
             "oal_step": lambda: train("oal", net, heads, terms, weights, images, labels, args, g, keep=False),
             "test_pass": lambda: evaluate.outputs(net, images, args.dataset, args.device)}
    seconds = {name: [] for name in parts}
    for _ in range(4):
        for name, part in parts.items():
            begun = time.perf_counter()
            part()
            if torch.device(args.device).type != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    oal_parts = best["bare"] + best["teacher_forward"] * bool(taught) + best["outliers"] * through
    return {"images_per_second": {name: n / best[name] for name in best if name != "outliers"},
            "ratio": {"ce": best["ce_step"] / best["bare"], "oal": best["oal_step"] / oal_parts}}


def parse_args():
    parser = evaluate.common_parser(__doc__)
    parser.add_argument("--ood", nargs="+", default=[], metavar="FOLDER", help="folders of your own OOD images")
    parser.add_argument("--out", help="folder for everything that is written (runs/DATASET)")
    parser.add_argument("--seed", type=evaluate.SEED, default=0)
    parser.add_argument("--arch", choices=models.ARCHS, help="resnet_tiny on shapes, else resnet18")
    parser.add_argument("--epochs", type=evaluate.POSITIVE,
                        help="of each training stage, the teacher's too; default: the arch's own")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--benchmark", action="store_true", help="measure speed and stop")
    parser.add_argument("--ce", metavar="FILE", help="start from this cross-entropy network and skip its training")
    parser.add_argument("--teacher", metavar="FILE", help="distil from this network and train no teacher; one of the "
                        "student's arch must have grown from --ce, since maps are matched unit by unit")
    parser.add_argument("--recipe", choices=RECIPES, default="oal",
                        help="the student's objective; released: the paper's code")
    parser.add_argument("--peer", choices=PEERS, help="train the student by this method in place of OAL")
    parser.add_argument("--outliers", choices=("diffusion", "noise"), default="diffusion",
                        help="noise: Gaussian noise in place of synthesised latents, to compare")
    for name in RECIPES["released"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=evaluate.FINITE,
                            help="weight of the term; 0 leaves it out")
    args = parser.parse_args()
    args.arch = args.arch or ("resnet_tiny" if args.dataset == "shapes" else "resnet18")
    args.epochs = dict(ce=args.epochs, teacher=args.epochs, oal=args.epochs) if args.epochs else None
    given = [name for name in RECIPES["released"] if getattr(args, name) is not None]
    if args.peer and (given or args.benchmark or args.recipe != "oal" or args.outliers != "diffusion"):
        evaluate.fail("--peer is another objective than OAL's: leave out --recipe, --w-*, --outliers and --benchmark")
    if args.recipe == "oal" and "w_boundary" in given:
        evaluate.fail("--w-boundary is a weight of --recipe released: add that, or leave it out")
    if args.recipe == "released" and args.outliers == "noise":
        evaluate.fail("--outliers noise is not for --recipe released, which never sends outliers through the network")
    for name, value in {**TIERS[args.arch], **({} if args.peer else RECIPES[args.recipe])}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    evaluate.check_common(args)
    args.options = {name: value for name, value in vars(args).items()  # those that decide what a student becomes
                    if name not in ("data_root", "ood", "out", "device", "resume", "benchmark")
                    and not (name == "size" and args.dataset in evaluate.NAMED)}
    args.seconds = {"ce": 0.0, "teacher": 0.0, "synthesize": 0.0, "oal": 0.0}
    args.out = Path(args.out or f"runs/{os.path.basename(os.path.abspath(args.dataset))}")
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.world > (1 if args.benchmark else args.batch // 4):
        evaluate.fail(f"{args.world} processes are too many: --benchmark takes 1, a batch of {args.batch} at most "
                      f"{args.batch // 4}")
    return args


def main():
    args = parse_args()
    if args.world > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        # Hours, not the default ten minutes, for the first process to download, decode and draw while the others wait.
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", timeout=timedelta(hours=4))
    saved = load_checkpoint(args)
    if saved and args.resume and saved["options"] != args.options:
        other = [name for name in {**saved["options"], **args.options}
                 if saved["options"].get(name, "absent") != args.options.get(name, "absent")]
        evaluate.fail(f"{args.out} holds a run with other options ({', '.join(other)}): resume with the same command")
    held = [name for name in ("ce.pt", "teacher.pt", "outliers.pt", "student.critic.pt", "student.pt",
                              "results.json") if (args.out / name).exists()]
    if not args.benchmark and (saved and not args.resume or held and not saved):
        evaluate.fail(f"{args.out} holds another run's {', '.join(held) or 'checkpoint.pt'}: name another folder with "
                      "--out" + (", or go on with --resume" if saved else ""))

    # Images, and everything else that a user can get wrong, before the first second of training.
    classes = evaluate.id_set(args)["classes"]
    ce = evaluate.load_network(args.ce, classes, args.arch) if args.ce else build(args.arch, classes, args.seed)
    teacher = evaluate.load_network(args.teacher, classes) if args.teacher else None
    if args.rank:
        dist.barrier()  # the first process downloads and decodes, the others read what it has left
    images, labels = (tensor.to(args.device) for tensor in evaluate.load(args.dataset, "train", args.data_root))
    if labels.bincount(minlength=classes).min() < 2:
        evaluate.fail(f"the training set of {args.dataset} in {args.data_root} is too small: it needs 2 images of each "
                      "class")
    args.batch = min(args.batch, len(images))
    for net in ([ce] if args.ce else []) + ([teacher] if args.teacher else []):
        evaluate.outputs(net, images[:100], args.dataset, args.device)  # that they are finite
    sets, missing = evaluate.load_benchmark(args.dataset, args.data_root, args.ood)
    if args.rank == 0:
        if missing:
            print(f"missing, and left out of the means: {', '.join(missing)}", flush=True)
        if args.world > 1:
            dist.barrier()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.benchmark:
        result = benchmark(args, images, labels, teacher)
        print(json.dumps(result, indent=1))
        (args.out / "benchmark.json").write_text(json.dumps(result, indent=1))
        return
    if saved:
        args.seconds = saved["seconds"]
    else:  # claims the folder
        save({"stage": "start", "seconds": args.seconds, "options": args.options}, args, "checkpoint.pt")

    # 1. The cross-entropy network: the baseline, the student's start.
    if not (args.out / "ce.pt").exists():  # else: a resumed run
        if not args.ce:
            train("ce", ce, *ce_terms(ce, args), {"ce": 1.0}, images, labels, args, generator(args.seed, "ce"))
        save_network(ce, args, "ce.pt")
    load_weights(ce, args, "ce.pt")

    # 2. The teacher: what a second cycle of the same recipe, on the same images, makes of that network.
    weights = weights_of(args)
    if not weights.keys() & {"kd", "feat"}:
        teacher = None
    elif teacher:
        teacher.to(args.device, memory_format=torch.channels_last)
    else:
        teacher = load_weights(models.build(args.arch, classes), args, "ce.pt")
        if not (args.out / "teacher.pt").exists():
            train("teacher", teacher, *ce_terms(teacher, args), {"ce": 1.0}, images, labels, args,
                  generator(args.seed, "teacher"))
            save_network(teacher, args, "teacher.pt")
        load_weights(teacher, args, "teacher.pt")

    # 3. Outliers, from the cross-entropy network's features.
    outliers = None
    if weights.keys() & {"boundary", "latent"}:
        if not (args.out / "outliers.pt").exists():
            begun = time.perf_counter()
            found = synthesize.synthesize(ce, images, labels, args.dataset, args.per_class, args.diffusion_steps,
                                          generator(args.seed, "synthesize"), args.device)
            args.seconds["synthesize"] = time.perf_counter() - begun
            save({"stage": "synthesize", "seconds": args.seconds, "options": args.options}, args, "checkpoint.pt")
            save(found, args, "outliers.pt")
        outliers = torch.load(args.out / "outliers.pt", map_location=args.device, weights_only=True)

    # 4. The student, which starts as the cross-entropy network.
    student = models.build(args.arch, classes)
    if not (args.out / "student.pt").exists():
        load_weights(student, args, "ce.pt")
        heads, terms, g = make_student(student, teacher, outliers, images, labels, args)
        train("oal", student, heads, terms, weights, images, labels, args, g)
        if "critic" in heads:  # its mean as it will be measured: of all training images, in test mode
            mean = evaluate.outputs(student, images, args.dataset, args.device)[1].mean(0)
            a, tau = (value.detach().cpu() for value in (heads["critic"].log_a.exp(), heads["critic"].tau))
            save({"mean": mean, "a": a, "tau": tau}, args, "student.critic.pt")
        save_network(student, args, "student.pt")
    load_weights(student, args, "student.pt")

    # 5. Both networks, side by side, in the first process.
    if args.world > 1:
        dist.destroy_process_group()
    if args.rank:
        return
    begun = time.perf_counter()
    found = {}
    for name, net in (("ce", ce), ("oal", student)):
        ref = evaluate.reference(net, args.dataset, images, args.device)
        found[name], _ = evaluate.evaluate(net, sets, args.dataset, args.device, list(evaluate.SCORES), ref)
    seconds = {**args.seconds, "evaluate": time.perf_counter() - begun}
    seconds["total"] = sum(seconds.values())
    results = {**evaluate.describe(args.dataset), "arch": args.arch, "seed": args.seed,
               "command": shlex.join(["train.py", *sys.argv[1:]]), "device": args.device, "options": args.options,
               "versions": evaluate.VERSIONS, "seconds": seconds, "missing": missing, "models": found}
    evaluate.write(args.out / "results.json", json.dumps(results, indent=1))
    print("\n".join([*evaluate.headline(results), "", *evaluate.tables([results], evaluate.SCORES)]))
    print(f"written: {args.out / 'results.json'}")


if __name__ == "__main__":
    evaluate.run(main)
