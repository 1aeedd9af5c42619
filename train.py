"""OAL (Outlier Aware Learning), from the images to the table of results. Paper: Gao et al., arXiv 2406.16525.

    python train.py                                                        # embedded images, no download, minutes
    python train.py --dataset cifar100 --data-root DIR                     # resnet18, 3 x 100 epochs: a GPU
    python train.py --dataset cifar100 --data-root DIR --arch resnet_small # 8 + 16 + 3 epochs: a laptop
    python train.py --dataset FOLDER --ood FOLDER                          # your images, train/CLASS/... (README)
    torchrun --nproc_per_node=N train.py --dataset cifar100 --data-root DIR

In the order in which things happen: a cross-entropy network (the baseline, the student's start); its teacher, trained
on from there; outliers synthesised from the network's features (synthesize.py); the student, trained on ID images and
outliers (losses.py); network and student measured side by side (evaluate.py). An ablation is a weight of 0: `--w-kd 0`
trains without logit distillation. Without both distillations no teacher is trained, but for a ViT, the released code's,
in whose features the boundary is found.
"""
import contextlib
import io
import json
import math
import os
import signal
import sys
import time
import zlib
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
# What an arch brings: epochs of the three stages; the student's learning rate; the batch; padding of the random crop;
# outliers per class; steps of the diffusion model, at most.
TIERS = {"resnet18": dict(ce_epochs=100, teacher_epochs=100, oal_epochs=100, oal_lr=0.005, batch=128, crop=4,
                          per_class=500, diffusion_steps=4000),
         "resnet_small": dict(ce_epochs=8, teacher_epochs=16, oal_epochs=3, oal_lr=0.02, batch=128, crop=1,
                              per_class=50, diffusion_steps=1000),
         "resnet_tiny": dict(ce_epochs=9, teacher_epochs=7, oal_epochs=8, oal_lr=0.01, batch=64, crop=1,
                             per_class=50, diffusion_steps=1000)}
# The student's objective: cross-entropy plus these terms (losses.py) with these weights. 'oal' is ours; 'released' has
# the losses of the paper's code, and its student's epochs and rate in place of the arch's.
RECIPES = {"oal": dict(w_kd=4.0, w_feat=16.0, w_latent=1.0),
           "released": dict(w_kd=4.0, w_feat=8.0, w_boundary=0.1, w_latent=0.2, oal_lr=0.005, oal_epochs=100)}
FINE_TUNING = dict(teacher_epochs=50, teacher_lr=1e-6, teacher_head_lr=1e-4)  # as released, of --teacher vit_b_16
WEIGHTS = ("w_kd", "w_feat", "w_boundary", "w_latent")
PEERS = {"vos": {"ce": 1.0, "vos": 0.1}, "logitnorm": {"logitnorm": 1.0}}
# What the optimiser does otherwise for what is trained beside the student: as released, and MICL's a and tau.
HEADS = {"projection": dict(lr=0.01), "boundary": dict(lr=1e-4), "latent": dict(lr=1e-4),
         "critic": dict(weight_decay=0.0)}


def main():
    args = parse_args()
    start_processes(args)
    if args.benchmark:
        result = json.dumps(benchmark(args, *load_inputs(args)[:4]), indent=1)
        print(result)
        evaluate.write(args.out / "benchmark.json", result)
        return
    saved = claim(args)
    try:
        inputs = load_inputs(args)
    except BaseException:
        if args.rank == 0 and not saved:  # nothing was done: the folder is free again
            (args.out / "checkpoint.pt").unlink()
            with contextlib.suppress(OSError):  # it holds something else
                args.out.rmdir()
        raise
    stages(args, saved, *inputs)


def stages(args, saved, ce, teacher, images, labels, sets, missing, given):
    """The method, from the images to results.json. saved: what checkpoint.pt holds of an earlier attempt, or {};
    the others are load_inputs'."""
    if saved.get("images") not in (None, args.digest):
        evaluate.fail(f"{args.out} holds a run with other training images: bring them back, or name another --out")
    args.seconds = saved.get("seconds", args.seconds)

    # 1. The cross-entropy network: the baseline, the student's start. A file that is there is a resumed run's.
    if not (args.out / "ce.pt").exists():
        if not args.ce:
            train("ce", ce, *ce_terms(ce, args), images, labels, args, generator(args.seed, "ce"), args.val)
        save(ce.state_dict(), args, "ce.pt")
    load_weights(ce, args, "ce.pt")

    # 2. The teacher: what a second cycle of the same recipe, on the same images, makes of that network; or a ViT, in
    # whose features the boundary is found too.
    distils, needed = args.weights.keys() & {"kd", "feat"}, args.weights.keys() & {"boundary", "latent"}
    vit = teacher if isinstance(teacher, models.ViT) and needed else None
    if not distils and not vit:
        teacher = None
    elif not args.teacher or args.teacher == "vit_b_16":
        teacher = teacher or load_weights(models.build(args.arch, ce.fc.out_features, args.size), args, "ce.pt")
        if not (args.out / "teacher.pt").exists():
            train("teacher", teacher, *ce_terms(teacher, args), images, labels, args, generator(args.seed, "teacher"))
            save(teacher.state_dict(), args, "teacher.pt")
        load_weights(teacher, args, "teacher.pt")

    # 3. Outliers, from the cross-entropy network's features or the ViT's.
    outliers = None
    if needed:
        if not (args.out / "outliers.pt").exists():
            begun = time.perf_counter()
            made = {} if needed <= given.keys() else synthesize.synthesize(
                ce, images, labels, args.dataset, args.per_class, args.diffusion_steps,
                generator(args.seed, "synthesize"), args.device, vit)
            args.seconds["synthesize"] = time.perf_counter() - begun
            save_checkpoint({"stage": "synthesize"}, args)
            save({**made, **given}, args, "outliers.pt")
        outliers = torch.load(args.out / "outliers.pt", map_location=args.device, weights_only=True)

    # 4. The student, which starts as the cross-entropy network.
    student = models.build(args.arch, ce.fc.out_features, args.size)
    if not (args.out / "student.pt").exists():
        load_weights(student, args, "ce.pt")
        heads, terms, g = make_student(student, teacher if distils else None, outliers, images, labels, args)
        train("oal", student, heads, terms, args.weights, images, labels, args, g, args.val)
        if "critic" in heads:  # its mean as it will be measured: of all training images, in test mode
            mean = evaluate.outputs(student, images, args.dataset, args.device)[1].mean(0)
            save({"mean": mean, "a": heads["critic"].log_a.exp().detach(), "tau": heads["critic"].tau.detach()}, args,
                 "student.critic.pt")
        save(student.state_dict(), args, "student.pt")
    load_weights(student, args, "student.pt")

    # 5. Both networks, side by side, in the first process.
    if args.world > 1:
        dist.destroy_process_group()
    if args.rank:
        return
    begun, found = time.perf_counter(), {}
    for name, net in (("ce", ce), ("oal", student)):
        ref = evaluate.reference(net, args.dataset, images, args.device)
        found[name], _ = evaluate.evaluate(net, sets, args.dataset, args.device, list(evaluate.SCORES), ref)
    seconds = {**args.seconds, "evaluate": time.perf_counter() - begun}
    seconds["total"] = sum(seconds.values())
    results = {**evaluate.describe("train.py", args), "arch": args.arch, "seed": args.seed, "options": args.options,
               "teacher": teacher and f"{type(teacher).__name__} of {teacher.fc.in_features} features",
               "seconds": seconds, "missing": missing, "models": found}
    evaluate.write(args.out / "results.json", json.dumps(results, indent=1))
    print("\n".join([*evaluate.headline(results), "", *evaluate.tables([results])]))
    print(f"written: {args.out / 'results.json'}")


# --- What a run begins with. -----------------------------------------------------------------------------------------


def parse_args():
    parser = evaluate.common_parser(__doc__)
    parser.add_argument("--ood", nargs="+", default=[], metavar="FOLDER", help="folders of your own OOD images")
    parser.add_argument("--out", help="folder for everything that is written (runs/DATASET)")
    parser.add_argument("--seed", type=evaluate.SEED, default=0)
    parser.add_argument("--arch", choices=models.ARCHS, help="resnet_tiny on shapes, else resnet18")
    parser.add_argument("--epochs", type=evaluate.POSITIVE, help="of each of the three stages (the arch's own)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--benchmark", action="store_true", help="measure speed and stop")
    parser.add_argument("--ce", metavar="FILE", help="start from this cross-entropy network and skip its training")
    parser.add_argument("--teacher", metavar="{vit_b_16,FILE}", help="distil from this network and train no teacher; "
                        "one of the student's arch must have grown from --ce, since maps are matched unit by unit; "
                        "vit_b_16: torchvision's ViT-B/16, fine-tuned here; in a ViT's features the boundary is found")
    parser.add_argument("--recipe", choices=RECIPES, default="oal", help="released: that of the paper's code")
    parser.add_argument("--peer", choices=PEERS, help="train the student by this method in place of OAL")
    parser.add_argument("--outliers", default="diffusion", metavar="{diffusion,noise,FILE}", help="noise: Gaussian "
                        "noise in place of latents, to compare; FILE: an outliers.pt that was made from the same --ce")
    parser.add_argument("--boundary-file", metavar="FILE.npy", help="boundary outliers [C, n, D] as released")
    parser.add_argument("--latent-file", metavar="FILE.pt", help="latents [N, 64, 64] or [100, 3, 64, 64] as released")
    for name in WEIGHTS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=evaluate.FINITE,
                            help="weight of the term; 0 leaves it out")
    args = parser.parse_args()
    evaluate.check_common(args)
    args.arch = args.arch or ("resnet_tiny" if args.dataset == "shapes" else "resnet18")
    args.ce_epochs = args.teacher_epochs = args.oal_epochs = args.epochs
    given = [name for name in WEIGHTS if getattr(args, name) is not None]
    if args.peer and (given or args.benchmark or args.recipe != "oal" or args.outliers != "diffusion"):
        evaluate.fail("--peer is another objective than OAL's: leave out --recipe, --w-*, --outliers and --benchmark")
    if args.recipe == "oal" and ("w_boundary" in given or args.boundary_file or args.latent_file):
        evaluate.fail("--w-boundary, --boundary-file and --latent-file are for --recipe released: add that, or leave "
                      "them out")
    if args.recipe == "released" and args.outliers == "noise":
        evaluate.fail("--outliers noise is not for --recipe released, which never sends outliers through the network")
    brought = {**TIERS[args.arch], **(FINE_TUNING if args.teacher == "vit_b_16" else {}),
               **({} if args.peer else RECIPES[args.recipe])}
    for name, value in brought.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.options = {name: value for name, value in vars(args).items()  # those that decide what a student becomes
                    if name not in ("data_root", "ood", "out", "device", "resume", "benchmark", "epochs")}
    args.weights = PEERS[args.peer] if args.peer else {  # {term: weight}; a weight of 0 leaves its term out
        "ce": 1.0, **{name.removeprefix("w_"): args.options[name] for name in WEIGHTS if args.options[name]}}
    args.seconds = {"ce": 0.0, "teacher": 0.0, "synthesize": 0.0, "oal": 0.0}
    args.out = Path(args.out or f"runs/{os.path.basename(os.path.abspath(args.dataset))}")
    return args


def start_processes(args):
    """Sets args.rank and args.world, and under torchrun joins the other processes."""
    try:
        args.rank, args.world = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        if not 0 <= args.rank < args.world:
            raise ValueError(f"RANK {args.rank} of WORLD_SIZE {args.world}")
        if args.world > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # evaluate.run's handler waits as long as torch.distributed
            if args.device == "cuda":
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            # Hours, not the default ten minutes, for the first process to download and draw while the others wait.
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", timeout=timedelta(hours=4))
    except (ValueError, KeyError, RuntimeError) as problem:  # RuntimeError: torch.cuda's and torch.distributed's
        evaluate.fail(f"the processes cannot be started ({str(problem).splitlines()[0]}): start them by torchrun, one "
                      "for a GPU")


def claim(args):
    """Takes the folder args.out for this run alone -> what its checkpoint.pt holds, {} for a new run.

    checkpoint.pt is created here, which only one of several runs begun at once can do; a killed run leaves it for
    --resume, by which runs of the same options alone can share a folder: they replace its files by the same.
    """
    path = args.out / "checkpoint.pt"
    held = sorted(path.name for kind in ("*.pt", "results.json") for path in args.out.glob(kind))
    if args.resume and path.exists():
        saved = load_checkpoint(path)
        before = saved["options"]
        other = [name for name in {**before, **args.options} if before.get(name, "-") != args.options.get(name, "-")]
        if other:
            evaluate.fail(f"{args.out} holds a run with other options ({', '.join(other)}): resume by the same command")
        return saved
    wait(args)  # until every process has looked
    if not held and args.rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save({"stage": "claim", "options": args.options, "images": None, "seconds": args.seconds}, content)
        try:
            with open(path, "xb") as file:
                file.write(content.getvalue())
        except FileExistsError:  # of a run that began at the same moment
            held = ["checkpoint.pt"]
        except OSError as problem:  # a full disk: nothing half-written stays
            path.unlink()
            raise OSError(problem.errno, problem.strerror, str(path))
    if held:
        evaluate.fail(f"{args.out} holds another run's {', '.join(held)}: name another folder with --out"
                      + (", or go on with --resume" if "checkpoint.pt" in held else ""))
    return {}


def load_inputs(args):
    """What a run begins with, and all that a user can get wrong, before the first second of training -> cross-entropy
    network, teacher or None, images uint8 [N, 3, S, S] and labels int64 [N] on args.device, test sets, names of the
    missing, outliers of files. Sets args.batch, args.digest and args.val, the images by which an epoch is chosen.
    """
    if args.rank:
        wait(args)  # the first process downloads and decodes, the others read what it has left
    classes = evaluate.id_set(args)["classes"]
    ce = (evaluate.load_network(args.ce, classes, args.arch, args.size) if args.ce else
          build(args.arch, classes, args.seed, args.size))
    teacher = args.teacher and (evaluate.load_imagenet_vit(classes, args.data_root) if args.teacher == "vit_b_16" else
                                evaluate.load_network(args.teacher, classes, size=args.size))
    given = synthesize.given_outliers(args, ce)
    images, labels = evaluate.load(args.dataset, "train", args.data_root, args.size)
    if labels.bincount(minlength=classes).min() < 2:
        evaluate.fail(f"the training set of {args.dataset} is too small: each class needs 2 images")
    args.digest = zlib.crc32(labels.numpy().data, zlib.crc32(images.contiguous().numpy().data))
    args.val = evaluate.load(args.dataset, "val", args.data_root, args.size) if args.recipe == "released" else None
    args.batch = min(args.batch, len(images))
    if args.world > (1 if args.benchmark else args.batch // 4):
        evaluate.fail(f"{args.world} processes are too many: --benchmark takes 1, this run {args.batch // 4} at most")
    for net in [net for net in (args.ce and ce, teacher) if net]:
        evaluate.outputs(net, images[:100], args.dataset, args.device)  # that they are finite
    sets, missing = evaluate.load_benchmark(args.dataset, args.data_root, args.ood, args.size)
    if args.rank == 0:
        if missing:
            print(f"missing, and left out of the means: {', '.join(missing)}", flush=True)
        wait(args)
    return ce, teacher, images.to(args.device), labels.to(args.device), sets, missing, given


def generator(seed, stage):
    """A stage's only source of randomness: its draws are the same whether or not earlier stages were run here."""
    return torch.Generator().manual_seed(10 * seed
                                         + ("weights", "ce", "synthesize", "oal", "teacher", "heads").index(stage))


def build(arch, num_classes, seed, size=evaluate.SIZE):
    """A network whose fresh weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return models.build(arch, num_classes, size)


def augment(images, pad, g):
    """uint8 [B, 3, S, S] -> the same shape: random crop after zero-padding by `pad`, random horizontal flip."""
    b, size, device = len(images), images.shape[-1], images.device
    top, left, flip = (torch.randint(high, (b, 1), generator=g).to(device) for high in (2 * pad + 1, 2 * pad + 1, 2))
    span = torch.arange(size, device=device)
    rows, cols = top + span, left + torch.where(flip == 1, size - 1 - span, span)                     # [B, S] each
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)                              # [B, S + 2 pad, S + 2 pad, 3]
    cut = padded[torch.arange(b, device=device)[:, None, None], rows[:, :, None], cols[:, None, :]]   # [B, S, S, 3]
    return cut.permute(0, 3, 1, 2)


# --- What a stage trains by: terms(x, y), a function of a batch, uint8 [B, 3, S, S] augmented and int64 [B] ->
# {term: scalar}, and the heads that are trained beside the network.


def ce_terms(net, args):
    """Cross-entropy alone: the start and the teacher -> (no heads, terms, weights)."""
    def terms(x, y):
        with models.autocast(args.device):
            return {"ce": F.cross_entropy(net(evaluate.normalize(x, args.dataset)), y)}
    return {}, terms, {"ce": 1.0}


def make_student(student, teacher, outliers, images, labels, args):
    """-> (heads, terms, generator) of the stage 'oal'; fresh heads depend on the seed alone.

    teacher, outliers: None, or a frozen network and the tensors of outliers.pt on the device.
    """
    g = generator(args.seed, "oal")
    make = peer_terms if args.peer else {"oal": oal_terms, "released": released_terms}[args.recipe]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(args.seed, "heads").initial_seed())
        return *make(student, teacher, outliers, images, labels, args, g), g


def oal_terms(student, teacher, outliers, images, labels, args, g):
    """OAL's objective: cross-entropy + 4 KD(logits) + 16 KD(maps) + 1 MICL by default -> (heads, terms).

    Without a teacher no distillation, without outliers no MICL; from a teacher of another shape, such as a ViT, KD of
    its projected features, as released, in place of KD(maps).
    """
    heads = {}
    if outliers:  # about 5,000 images of all classes, by which the lists are sorted
        some = images[::max(1, len(images) // 5000)]
        heads["critic"] = losses.MICL.start(*evaluate.outputs(student, some, args.dataset, args.device))
    same_shape = isinstance(teacher, models.ResNet) and teacher.conv1.weight.shape == student.conv1.weight.shape
    if teacher and not same_shape:
        heads["projection"] = models.projection(teacher.fc.in_features, student.fc.in_features)

    def terms(x, y):
        n = len(x)
        with models.autocast(args.device):
            x = evaluate.normalize(x, args.dataset)
            maps = student.lower(x)                                                       # [B, C, S/R, S/R]
            if outliers:
                # Latents join the batch half-way, so that they share its batch-norm statistics: in a pass of their own
                # they teach the network to recognise the statistics. Under torchrun a process takes its share of them.
                latents = synthesize.outlier_maps(maps, outliers, args.batch // 4, g, args.outliers)
                latents = latents[args.rank::args.world].to(maps)                         # [M, C, S/R, S/R]
                maps = torch.cat([maps, latents]).contiguous(memory_format=torch.channels_last)
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
    """The losses of the paper's code (HengGao12/OAL, openood/trainers/oal_trainer.py) -> (heads, terms), in float32.

    Outliers are drawn without regard to the images, and both CLUBs share the network's optimiser, which moves q down
    the bound. The second has a deeper mean net (openood/losses/deep_mi_loss.py).
    """
    heads, dim = {}, student.fc.in_features
    if teacher:
        heads["projection"] = models.projection(teacher.fc.in_features, dim)
    outliers = outliers and {**outliers, "latent": outliers.get("released", outliers.get("latent"))}
    for kind, deeper in (("boundary", ()), ("latent", (32, 16))):
        if kind in args.weights:
            heads[kind] = losses.CLUB(outliers[kind].shape[1], dim, 512, deeper)

    def terms(x, y):
        x = evaluate.normalize(x, args.dataset)
        logits, features = student(x, return_feature=True)                                # [B, K], [B, D]
        found = {"ce": F.cross_entropy(logits, y)}
        if teacher:
            with torch.no_grad():
                teacher_logits, teacher_features = teacher(x, return_feature=True)
            found["kd"] = losses.distill(logits, teacher_logits)
            found["feat"] = losses.distill(features, heads["projection"](teacher_features))
        for kind in ("boundary", "latent"):
            if kind in heads:
                drawn = draw(outliers[kind], len(y), args, g, replacement=False)          # [B, O]
                found[kind] = losses.micl_released(heads[kind], drawn, features)
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
        outlier_logits = student.classify(draw(gaussian, len(y), args, g, replacement=True))
        return {"ce": F.cross_entropy(logits, y), "vos": heads["vos"](logits, outlier_logits)}

    return heads, terms


def draw(outliers, n, args, g, replacement):
    """n random rows of outliers [M, D] -> [n, D]; without replacement none comes again before all have come.

    A process takes its share of a whole batch's draws: so all stay in step.
    """
    m = len(outliers)
    pick = (torch.randint(m, (args.batch,), generator=g) if replacement else
            torch.randperm(m, generator=g)[torch.arange(args.batch) % m])
    return outliers[pick[args.rank::args.world][:n].to(outliers.device)]


# --- The loop. -------------------------------------------------------------------------------------------------------


def train(stage, net, heads, terms, weights, images, labels, args, g, val=None, keep=True):
    """Trains `net` and its heads in place for one stage, 'ce', 'teacher' or 'oal'; adds the time taken to args.seconds.

    By SGD, a ViT by Adam, with a cosine per step to 0.
    images uint8 [N, 3, S, S] and labels int64 [N] on args.device. The loss is the sum over weights {term: weight} of
    what terms(x, y) returns. g: the stage's generator, which terms may share. With val (images, labels) the network
    ends as that of its best epoch on them. With `keep` checkpoint.pt is saved after each epoch, in a single process
    also at the step where SIGINT or SIGTERM comes, and a stage that it holds goes on from there.
    """
    epochs = getattr(args, f"{stage}_epochs")
    net.to(args.device, memory_format=torch.channels_last).train()
    net.source = f"the network of stage {stage} in {args.out}"  # no longer that of the file it started from
    heads = torch.nn.ModuleDict(heads).to(args.device).train()
    if isinstance(net, models.ViT):
        body = [net.class_token, *net.conv_proj.parameters(), *net.encoder.parameters()]
        groups = [{"params": body, "lr": args.teacher_lr},
                  {"params": list(net.fc.parameters()), "lr": args.teacher_head_lr}]
        optimizer = torch.optim.Adam(groups)
    else:
        rate = args.oal_lr if stage == "oal" else CE["lr"] * args.batch / 128
        groups = [{"params": list(net.parameters())}, *({"params": list(head.parameters()), **HEADS.get(name, {})}
                                                         for name, head in heads.items())]
        optimizer = torch.optim.SGD(groups, **{**CE, "lr": rate})
    per_epoch = (len(images) - 2 * args.world) // args.batch + 1  # a rest too small for batch-norm is left out
    steps, step, order, best = epochs * per_epoch, 0, None, {"accuracy": -1.0}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    state = dict(net=net, heads=heads, optimizer=optimizer, schedule=schedule)
    saved = load_checkpoint(args.out / "checkpoint.pt") if keep else {}
    if saved.get("stage") == stage:
        for name, part in state.items():
            part.load_state_dict(saved[name])
        g.set_state(saved["generator"])
        step, order, best = saved["step"], saved["order"], saved["best"]

    signals = []

    def noted(number, frame):
        signals.append(number)
        signal.signal(number, handlers[number])  # a second one ends the run at once

    # Under torchrun the processes would stop at different steps: there the first signal ends all, without a checkpoint.
    handlers = {number: signal.signal(number, noted) for number in (signal.SIGINT, signal.SIGTERM)
                if keep and args.world == 1}
    begun, unread = time.perf_counter(), []  # terms of the last steps: to read them is to wait for the device
    while step < steps:
        i = step % per_epoch
        if i == 0:
            order = torch.randperm(len(images), generator=g)
        index = order[i * args.batch:(i + 1) * args.batch].to(args.device)
        x, y = augment(images[index], args.crop, g)[args.rank::args.world], labels[index][args.rank::args.world]
        found = {name: value for name, value in terms(x, y).items() if name in weights}
        loss = sum(weights[name] * value for name, value in found.items())
        optimizer.zero_grad()
        loss.backward()
        if args.world > 1:  # every process holds a slice of the batch, and all step by the mean of their gradients
            for p in (p for group in groups for p in group["params"] if p.grad is not None):
                dist.all_reduce(p.grad)
                p.grad /= args.world
        optimizer.step()
        schedule.step()
        step += 1

        unread.append(torch.stack([value.detach() for value in (*found.values(), loss)]))
        ends = i + 1 == per_epoch
        if not (ends or signals or step % 100 == 0):
            continue
        values, elapsed = torch.stack(unread), time.perf_counter() - begun                # [<= 100, terms and sum]
        for t, row in enumerate(values.tolist(), step - len(values)):
            if not all(map(math.isfinite, row)):
                shown = ", ".join(f"{name} {value}" for name, value in zip([*found, "sum"], row))
                evaluate.fail(f"the loss is not finite at {stage} step {t}: {shown}; lower a --w-* weight")
        args.seconds[stage] += elapsed
        if args.rank == 0:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in zip(found, values.mean(0).tolist()))
            print(f"{stage}: epoch {(step - 1) // per_epoch + 1}/{epochs}, step {i + 1}/{per_epoch}, {shown}, "
                  f"{len(values) * args.batch / elapsed:.0f} images/s, {(steps - step) * elapsed / len(values):.0f} s "
                  "left", flush=True)
        if ends and val:
            predicted = evaluate.outputs(net, val[0], args.dataset, args.device)[0].argmax(1)
            accuracy = (predicted == val[1]).double().mean().item()
            if accuracy >= best["accuracy"]:
                best = {"accuracy": accuracy, "net": {key: value.clone() for key, value in net.state_dict().items()}}
            net.train()
        if keep and (ends or signals):
            save_checkpoint({"stage": stage, "step": step, "order": order, "best": best, "generator": g.get_state(),
                             **{name: part.state_dict() for name, part in state.items()}}, args)
        if signals:
            print(f"stopped at {stage} step {step}: go on by the same command and --resume", file=sys.stderr)
            raise SystemExit(128 + signals[0])
        begun, unread = time.perf_counter(), []
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if val:
        net.load_state_dict(best["net"])


# --- Files of args.out, each written whole or not at all by the first process, which the others wait for. ------------


def wait(args):
    """Under torchrun, until every process has come here."""
    if args.world > 1:
        dist.barrier()


def save(content, args, name):
    """A dict, its tensors brought to the CPU: a network's state_dict, outliers, a checkpoint."""
    wait(args)  # none is still looking whether the file is there
    if args.rank == 0:
        evaluate.write(args.out / name, {key: v.cpu() if torch.is_tensor(v) else v for key, v in content.items()})
    wait(args)


def save_checkpoint(state, args):
    """What a resumed run goes on from, and what it must be the same in."""
    save({"options": args.options, "images": args.digest, "seconds": args.seconds, **state}, args, "checkpoint.pt")


def load_checkpoint(path):
    """What save_checkpoint or claim wrote; ends the program where it is something else."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if {"options", "images", "seconds", "stage"} <= saved.keys():
            return saved
    except Exception:  # cut short, or another program's
        pass
    evaluate.fail(f"{path} is not a checkpoint of this program: remove it, or name another folder with --out")


def load_weights(net, args, name):
    """A network from its saved state_dict: the same in every process, whether trained here or in an earlier run."""
    net.source = args.out / name
    net.load_state_dict(torch.load(net.source, map_location="cpu", weights_only=True))
    return net.to(args.device, memory_format=torch.channels_last).eval()


# --- Speed. ----------------------------------------------------------------------------------------------------------


def benchmark(args, net, teacher, images, labels):
    """Images per second of the bare network, of each kind of step and of the test pass -> the dict of benchmark.json.

    Each is timed in this one run, three times in turn after a warm-up, and the best counts. A ratio is the time of our
    step, of the recipe in full, over the sum of its bare parts, measured beside it: 1.0 is a step with no overhead.
    """
    n, args.ce_epochs, args.oal_epochs = min(10, len(images) // args.batch) * args.batch, 1, 1
    images, labels = images[:n], labels[:n]
    net, teacher = (one.to(args.device, memory_format=torch.channels_last).eval() for one in
                    (net, teacher or build(args.arch, net.fc.out_features, args.seed, args.size)))
    codec = synthesize.fit_codec(next(evaluate.stage2(net, images, args.dataset, args.device))[0])
    outliers = {"boundary": torch.randn(200, net.fc.in_features, device=args.device),
                "latent": torch.randn(200, len(codec["basis"]), device=args.device), **codec}
    heads, terms, g = make_student(net, teacher, outliers, images, labels, args)
    optimizer = torch.optim.SGD(net.parameters(), **CE)
    x, y = evaluate.normalize(images[:args.batch], args.dataset), labels[:args.batch]
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

    parts = {"bare": lambda: bare(lambda: F.cross_entropy(net.train()(x), y)),
             "teacher_forward": lambda: torch.no_grad()(bare)(lambda: teacher(x).mean()),
             "outliers": lambda: bare(lambda: net.classify(net.upper(maps)).mean(), step=False),  # half of a network
             "ce_step": lambda: train("ce", net, *ce_terms(net, args), images, labels, args, g, keep=False),
             "oal_step": lambda: train("oal", net, heads, terms, args.weights, images, labels, args, g, keep=False),
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
    parts = best["bare"] + best["teacher_forward"] + best.pop("outliers") * (args.recipe == "oal")
    return {"images_per_second": {name: n / best[name] for name in best},
            "ratio": {"ce": best["ce_step"] / best["bare"], "oal": best["oal_step"] / parts}}


if __name__ == "__main__":
    evaluate.run(main)
