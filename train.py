"""OAL (Outlier Aware Learning), from the images to the table of results. Paper: Gao et al., arXiv 2406.16525.

    python train.py                                                        # embedded images, no download, minutes
    python train.py --dataset cifar100 --data-root DIR                     # resnet18, 3 x 100 epochs: a GPU
    python train.py --dataset cifar100 --data-root DIR --arch resnet_small # 8 + 16 + 3 epochs: a laptop
    torchrun --nproc_per_node=N train.py --dataset cifar100 --data-root DIR

In the order in which things happen: a cross-entropy network (the baseline, the student's start); its teacher, trained on
from there; outliers synthesised from the network's features (synthesize.py); the student, trained on ID images and
outliers (losses.py); network and student measured side by side (evaluate.py). An ablation is a weight of 0: `--w-kd 0`
trains without logit distillation. Without both distillations there is no teacher.
"""
import argparse
import json
import math
import os
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

BATCH = 128
CE = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)  # OpenOOD v1.5's recipe for CIFAR
LR_PROJECTION, LR_Q = 0.01, 1e-4                                    # of the heads beside the student, as released
OUTLIERS = 32                                                       # latents that join each batch of ID images
LENGTHS = (0.5, 2.5)                                                # of boundary outliers, in mean lengths of ID features
STRETCH = DETAIL = 2.0                                              # latents, their hosts' detail: times 0 to this
CAUTION = 0.8                                                       # share of the critic's c that is asked of the student
WEIGHTS = {"kd": "logit distillation", "feat": "feature distillation", "boundary": "MICL on boundary outliers",
           "latent": "MICL on latent outliers"}
W_FEAT = {"maps": 16.0, "released": 8.0}                            # of feature distillation, by its form
# What the command line leaves open. Epochs of each stage; OAL's rate, 0.005 as released, which suits 100 epochs; padding
# of the random crop, 4 as in OpenOOD, less for a student that sees each image 11 times; outliers per class; steps of the
# diffusion model, at most (synthesize.py ends it after 20 passes); weights, on CIFAR that of logit distillation as
# released; the forms of feature distillation and of MICL.
TIERS = {
    "resnet18": dict(epochs=dict(ce=100, teacher=100, oal=100), oal_lr=0.005, crop=4, per_class=500, diffusion_steps=4000,
                     w_kd=4.0, w_boundary=0.0, w_latent=1.0, feat="maps", micl="energy"),
    "resnet_small": dict(epochs=dict(ce=8, teacher=16, oal=3), oal_lr=0.02, crop=1, per_class=50, diffusion_steps=1000,
                         w_kd=4.0, w_boundary=0.0, w_latent=1.0, feat="maps", micl="energy"),
    "shapes": dict(epochs=dict(ce=8, teacher=8, oal=8), oal_lr=0.01, crop=1, per_class=50, diffusion_steps=1000,
                   w_kd=1.0, w_boundary=1.0, w_latent=1.0, feat="released", micl="bound")}


def generator(seed, stage):
    """A stage's only source of randomness: its draws are the same whether or not earlier stages were run here."""
    return torch.Generator().manual_seed(10 * seed + ("weights", "ce", "synthesize", "oal", "teacher", "critic").index(stage))


def build(arch, num_classes, seed):
    """A network whose fresh weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return models.build(arch, num_classes)


def augment(images, pad, g):
    """uint8 [B, 3, 32, 32] -> the same shape: random crop after zero-padding by `pad`, random horizontal flip."""
    b, device = len(images), images.device
    top, left, flip = (torch.randint(high, (b, 1), generator=g).to(device) for high in (2 * pad + 1, 2 * pad + 1, 2))
    span = torch.arange(32, device=device)
    rows, cols = top + span, left + torch.where(flip == 1, 31 - span, span)                           # [B, 32] each
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)                                # [B, 32 + 2 pad, 32 + 2 pad, 3]
    cut = padded[torch.arange(b, device=device)[:, None, None], rows[:, :, None], cols[:, None, :]]   # [B, 32, 32, 3]
    return cut.permute(0, 3, 1, 2)


def average_gradients(parameters, world):
    """Under torchrun: every process holds a slice of the batch, and all step by the mean of their gradients."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, mean in zip(grads, (flat / world).split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def make_heads(net, teacher, outliers, weights, args):
    """What is trained beside the network, by name: released feature distillation's projection, CLUB's q, VOS's critic."""
    heads = {}
    if "feat" in weights and args.feat == "released":
        heads["projection"] = models.projection(teacher.fc.in_features, net.fc.in_features)
    for kind in ("boundary", "latent"):
        if kind in weights and args.micl in ("released", "club"):
            heads[kind] = losses.CLUB(outliers[kind].shape[1], net.fc.in_features, 512)
    if "vos" in weights:
        heads["vos"] = losses.VOS(net.fc.out_features)
    return torch.nn.ModuleDict(heads)


def outlier_maps(maps, outliers, args, g, mine=slice(None)):
    """Stage-2 maps of ID images [B, C, 16, 16] and the tensors of outliers.pt -> maps of OUTLIERS outliers [32, C, 16, 16].

    Latents of every contrast and sharpness: from flat to glaring, from smooth to rough. `mine` is the share of the 32 that
    is wanted: the draws from g are the same whatever it is.
    """
    codes = torch.randint(len(outliers["latent"]), (OUTLIERS,), generator=g)[mine].to(maps.device)
    hosts = torch.randint(2 ** 31, (OUTLIERS,), generator=g)[mine].to(maps.device) % len(maps)
    hosts = maps[hosts].detach().float()
    if args.outliers == "noise":  # the row to beat: noise as strong as the maps, in place of the latents
        return hosts + hosts.std() * torch.randn(OUTLIERS, *hosts.shape[1:], generator=g)[mine].to(maps.device)
    stretch, detail = (high * torch.rand(OUTLIERS, 1, generator=g)[mine].to(maps.device) for high in (STRETCH, DETAIL))
    return synthesize.transplant(stretch * outliers["latent"][codes], hosts, outliers, detail[:, :, None, None])


def describe(net, maps):
    """Stage-2 maps -> what MICL's critic sees of them in a frozen network: features and pooled stage-3 map [B, D + D/2]."""
    features, (third, _) = net.upper(maps, return_maps=True)
    return torch.cat([features, third.float().mean((2, 3))], dim=1)


@torch.no_grad()
def make_critic(start, taught, images, outliers, args):
    """MICL's critic of the frozen network `start` -> its numbers, a dict of plain tensors on the CPU.

    whiten [P, P] of losses.whitening, and mean [P] after it, radius [] and c [] of losses.level, are for what `describe`
    gives, P = D + D/2. own_mean [D] and own_radius [] are the mean feature of `taught`, the network whose features the student
    imitates, and the mean distance from it; own_c [] is fitted to the start's features. Both c are the bound's times CAUTION.
    u [D] and offset [] are those of losses.open_direction. From up to 10,000 training images and about as many outliers,
    drawn as in training.
    """
    g = generator(args.seed, "critic")
    some = images[torch.randperm(len(images), generator=g)[:10000].to(images.device)]
    inlier, outlier = [], []
    for maps, _ in synthesize.stage2(start, some, args.dataset, args.device):
        with models.autocast(args.device):
            inlier.append(describe(start, maps))                                                      # [500, P]
            for part in maps.split(OUTLIERS):
                outlier.append(describe(start, outlier_maps(part, outliers, args, g)))                # [32, P]
    inlier, outlier = torch.cat(inlier), torch.cat(outlier)
    d, mean, whiten = start.fc.in_features, inlier.mean(0), losses.whitening(inlier)
    energies = [start.classify(seen[:, :d]).logsumexp(1) for seen in (inlier, outlier)]

    def weight(of_inlier, of_outlier):
        distances = [(of - of_inlier.mean(0)).norm(dim=1) for of in (of_inlier, of_outlier)]
        return CAUTION * losses.fit_critic(energies[0], distances[0], energies[1], distances[1]), distances[0].mean()

    (c, radius), (own_c, _) = weight(inlier @ whiten, outlier @ whiten), weight(inlier[:, :d], outlier[:, :d])
    if not (math.isfinite(c) and math.isfinite(own_c)):
        evaluate.fail(f"MICL's critic of {args.out / 'ce.pt'} is not finite: its features are all alike or its "
                      "outliers not finite; train it longer")
    print(f"oal: {args.outliers} outliers, the critic weighs distances in the start by {c:.2f}, in the student by {own_c:.2f}",
          flush=True)
    seen = torch.cat([inlier, outlier])
    levels = losses.level(seen @ whiten, mean @ whiten, radius, c) - start.classify(seen[:, :d]).mean(1)
    u, offset = losses.open_direction(seen[:, :d], levels)
    own = torch.cat([features for _, features in synthesize.stage2(taught, some, args.dataset, args.device)])
    found = {"whiten": whiten, "mean": mean @ whiten, "radius": radius, "c": torch.tensor(c), "u": u, "offset": offset,
             "own_mean": own.mean(0), "own_radius": (own - own.mean(0)).norm(dim=1).mean(), "own_c": torch.tensor(own_c)}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def loss_terms(net, heads, x, y, args, weights, teacher, outliers, start, critic, q_optimizer, g):
    """The terms of the objective for one batch -> {name: scalar}, those that `weights` names.

    x uint8 [B, 3, 32, 32] augmented, y int64 [B]. outliers: the tensors of outliers.pt, sorted by class. start, critic:
    the frozen network in which MICL's critic measures, and its numbers; None without it.
    """
    through = sends_outliers(args, weights)
    with models.autocast(args.device):
        x = evaluate.normalize(x, args.dataset)
        maps = net.lower(x)                                                                           # [B, C, 16, 16]
        if through:
            # Outliers join the batch half-way, so that they share its batch-norm statistics: in a pass of their own
            # they teach the network to recognise the statistics, and accuracy is lost.
            # Under torchrun each process takes its share of them, as of the images.
            outlying = outlier_maps(maps, outliers, args, g, slice(args.rank, None, args.world)).to(maps)
            maps = torch.cat([maps, outlying]).contiguous(memory_format=torch.channels_last)
        features, later = net.upper(maps, return_maps=True)                                           # [B (+ 32), D]
        with torch.no_grad():
            if "kd" in weights or "feat" in weights:
                teacher_maps = teacher.lower(x)
                teacher_features, teacher_later = teacher.upper(teacher_maps, return_maps=True)
                teacher_logits = teacher.classify(teacher_features)
            if critic:  # of the outliers the maps are the student's, so that both networks see the same ones
                seen = torch.cat([describe(start, start.lower(x)), describe(start, maps[len(x):])])   # [B + 32, P]
    h, logits, outlier_logits = features[:len(x)], net.fc(features[:len(x)]), net.fc(features[len(x):])

    terms = {}
    if "ce" in weights:
        terms["ce"] = F.cross_entropy(logits, y)
    if "logitnorm" in weights:
        terms["logitnorm"] = losses.logit_norm(logits, y)
    if "kd" in weights:
        terms["kd"] = losses.distill_logits(logits, teacher_logits)
    if "feat" in weights and args.feat == "maps":
        terms["feat"] = losses.distill_maps([stage[:len(x)] for stage in (maps, *later)], [teacher_maps, *teacher_later])
    elif "feat" in weights:
        terms["feat"] = losses.distill_features(h, heads["projection"](teacher_features))
    if critic:
        # Half by the frozen start, which the student cannot bend, half by the student, whose distances tell more.
        frozen = losses.level(seen @ critic["whiten"], critic["mean"], critic["radius"], critic["c"])  # [B + 32]
        own = losses.level(features.detach(), critic["own_mean"], critic["own_radius"], critic["own_c"])
        levels = (frozen + own) / 2
        terms["latent"] = losses.micl_energy(logits, outlier_logits, levels[:len(x)], levels[len(x):])
    elif through:
        terms["latent"] = losses.micl_bound(logits, outlier_logits)
    for kind in [kind for kind in ("boundary", "latent", "vos") if kind in weights and kind not in terms]:
        per_class = len(outliers[kind]) // net.fc.out_features                                        # sorted by class
        # Always BATCH draws, of which a process takes its share: so all stay in step under torchrun.
        mine = slice(args.rank, args.rank + args.world * len(y), args.world)
        classes, member = (torch.randint(high, (BATCH,), generator=g)[mine].to(y)
                           for high in (net.fc.out_features, per_class))
        o = outliers[kind][(y if kind != "vos" and args.micl == "club" else classes) * per_class + member]  # [B, D or L]
        if kind == "vos":
            terms[kind] = heads[kind](logits, net.fc(o))
        elif args.micl == "bound":
            # As a feature that could occur: no unit is negative, and any length about that of this batch's features.
            length = LENGTHS[0] + (LENGTHS[1] - LENGTHS[0]) * torch.rand(BATCH, 1, generator=g)[mine].to(h)
            o = F.normalize(o.relu(), dim=1) * h.detach().norm(dim=1).mean() * length
            terms[kind] = losses.micl_bound(logits, net.fc(o))
        else:
            if q_optimizer:  # 'club': q is fitted to the pairs by likelihood before the bound is read
                q_optimizer.zero_grad()
                (-heads[kind].log_likelihood(o, h.detach())).backward()
                if args.world > 1:
                    average_gradients(list(heads[kind].parameters()), args.world)
                q_optimizer.step()
            terms[kind] = heads[kind](o, h)
    return terms


def check_finite(stage, first_step, names, values):
    """Ends the run if a value [steps, terms and their weighted sum] is not finite, naming the first such step."""
    bad = (~torch.isfinite(values)).any(1).nonzero()
    if len(bad):
        row = values[bad[0, 0]].tolist()
        evaluate.fail(f"the loss is not finite at {stage} step {first_step + bad[0, 0].item()}: "
                      f"{', '.join(f'{name} {value}' for name, value in zip(names, row))}; lower a --w-* weight, or try "
                      "another --seed")


def train(stage, net, images, labels, args, weights, teacher=None, outliers=None, start=None, critic=None, keep=True):
    """Trains `net` in place for one stage, 'ce', 'teacher' or 'oal', and adds the time that it took to args.seconds.

    images uint8 [N, 3, 32, 32] and labels int64 [N] on args.device. weights: {term: weight}, as weights_of gives them;
    {'ce': 1.0} is plain cross-entropy training. teacher, outliers, start, critic: see loss_terms. With `keep`, saves
    checkpoint.pt after each epoch and starts from it where it holds this stage.
    """
    device, world, rank = args.device, args.world, args.rank
    recipe, epochs = dict(CE, lr=args.oal_lr) if stage == "oal" else CE, args.epochs[stage]
    g = generator(args.seed, stage)
    net.to(device, memory_format=torch.channels_last).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2 ** 31, (), generator=g)))
        heads = make_heads(net, teacher, outliers, weights, args).to(device).train()
    groups, q_parameters = [{"params": list(net.parameters()), "lr": recipe["lr"]}], []
    for name, head in heads.items():
        if name in ("boundary", "latent") and args.micl == "club":  # q is fitted by likelihood in a step of its own
            q_parameters += head.parameters()
        else:                                                       # as released, it shares the one optimiser
            rate = {"projection": LR_PROJECTION, "vos": recipe["lr"]}.get(name, LR_Q)
            groups.append({"params": list(head.parameters()), "lr": rate})
    optimizer = torch.optim.SGD(groups, **recipe)
    q_optimizer = torch.optim.Adam(q_parameters, 1e-3) if q_parameters else None
    trained = [p for group in groups for p in group["params"]]
    base_rates = [group["lr"] for group in groups]
    if outliers is not None:
        outliers = {name: tensor.to(device) for name, tensor in outliers.items()}
    for frozen in (teacher, start):
        if frozen is not None:
            frozen.to(device, memory_format=torch.channels_last).eval()
    if critic is not None:
        critic = {name: tensor.to(device) for name, tensor in critic.items()}

    steps, first_epoch = epochs * ((len(images) - 2 * world) // BATCH + 1), 0
    state = dict(net=net, heads=heads, optimizer=optimizer, **({"q_optimizer": q_optimizer} if q_optimizer else {}))
    saved = load_checkpoint(args) if keep else None
    if saved and saved["stage"] == stage:
        for name, part in state.items():
            part.load_state_dict(saved[name])
        g.set_state(saved["generator"])
        first_epoch = saved["epoch"]

    terminal = sys.stdout.isatty()
    for epoch in range(first_epoch, epochs):
        begun = said = time.perf_counter()
        unread = []                                     # the terms of the last steps: reading them waits for the device
        batches = torch.randperm(len(images), generator=g).split(BATCH)
        if len(batches[-1]) < 2 * world:  # too few for batch-norm in every process
            batches = batches[:-1]
        for i, index in enumerate(batches):
            step = epoch * len(batches) + i
            for group, rate in zip(optimizer.param_groups, base_rates):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            index = index.to(device)
            x, y = augment(images[index], args.crop, g)[rank::world], labels[index][rank::world]
            terms = loss_terms(net, heads, x, y, args, weights, teacher, outliers, start, critic, q_optimizer, g)
            loss = sum(weights[name] * value for name, value in terms.items())
            optimizer.zero_grad()
            loss.backward()
            if world > 1:
                average_gradients(trained, world)
            optimizer.step()

            unread.append(torch.stack([value.detach() for value in (*terms.values(), loss)]))
            if len(unread) == 50 or i + 1 == len(batches):
                values = torch.stack(unread)                                                          # [<= 50, terms]
                check_finite(stage, step + 1 - len(values), [*terms, "sum"], values)
                unread, now = [], time.perf_counter()
                if rank == 0 and (now - said > (1 if terminal else 20) or i + 1 == len(batches)):
                    said, speed = now, (i + 1) * BATCH / (now - begun)
                    left = ((epochs - epoch) * len(batches) - i - 1) * BATCH / speed
                    shown = "  ".join(f"{name} {value:.3f}" for name, value in zip(terms, values.mean(0).tolist()))
                    print(f"{stage}: epoch {epoch + 1}/{epochs}, step {i + 1}/{len(batches)}, {shown}, "
                          f"{speed:.0f} images/s, {left:.0f} s left",
                          end="\r" if terminal and i + 1 < len(batches) else "\n", flush=True)
        args.seconds[stage] += time.perf_counter() - begun
        if not keep:
            continue
        save({"stage": stage, "epoch": epoch + 1, "seconds": args.seconds, "options": args.options,
              "generator": g.get_state(), **{name: part.state_dict() for name, part in state.items()}},
             args, "checkpoint.pt")


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
        torch.save(state, args.out / "partial")
        (args.out / "partial").replace(args.out / name)
    if args.world > 1:
        dist.barrier()


def save_network(net, args, name):
    """Writes a network's plain state_dict."""
    save({key: value.cpu() for key, value in net.state_dict().items()}, args, name)


def load_weights(net, args, name):
    """Reads what save_network wrote: the same network in every process, whether trained here or in an earlier run."""
    net.load_state_dict(torch.load(args.out / name, map_location="cpu", weights_only=True))


def benchmark(args, images, labels, teacher):
    """Images per second of the bare network, of each kind of step and of the test pass -> the dict of benchmark.json.

    Each is timed in this one run, three times in turn, and the best counts. A ratio is the time of our step over the sum
    of its bare parts, measured beside it: 1.0 is a step with no overhead.
    """
    n, repeats = min(10, len(images) // BATCH) * BATCH, 3
    args = argparse.Namespace(**{**vars(args), "epochs": dict(ce=1, teacher=1, oal=1)})
    images, labels = images[:n].to(args.device), labels[:n].to(args.device)
    net, start = (build(args.arch, evaluate.CLASSES[args.dataset], args.seed) for _ in range(2))
    teacher = teacher or build(args.arch, evaluate.CLASSES[args.dataset], args.seed)
    for part in (net, start, teacher):
        part.eval().to(args.device, memory_format=torch.channels_last)
    codec = synthesize.fit_codec(next(synthesize.stage2(net, images, args.dataset, args.device))[0])
    classes = evaluate.CLASSES[args.dataset]
    outliers = {"boundary": torch.randn(classes * 2, net.fc.in_features),
                "latent": torch.randn(classes * 2, len(codec["basis"])), **codec}
    weights = weights_of(args)
    critic = None
    if sends_outliers(args, weights) and args.micl == "energy":
        critic = make_critic(start, start, images, {name: tensor.to(args.device) for name, tensor in outliers.items()}, args)
    optimizer = torch.optim.SGD(net.parameters(), **CE)
    x = evaluate.normalize(images[:BATCH], args.dataset)
    with torch.no_grad():
        maps = net.lower(x[:OUTLIERS])

    def bare(forward):
        net.train()
        for _ in range(n // BATCH):
            with models.autocast(args.device):
                loss = forward()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def frozen(forward):
        with torch.no_grad(), models.autocast(args.device):
            for _ in range(n // BATCH):
                forward()

    wait = torch.accelerator.synchronize if args.device != "cpu" else lambda: None
    parts = {"bare": lambda: bare(lambda: F.cross_entropy(net(x), labels[:BATCH])),
             "bare_upper": lambda: bare(lambda: net.classify(net.upper(maps)).square().mean()),  # the outliers' half
             "teacher_forward": lambda: frozen(lambda: teacher(x)),
             "start_forward": lambda: frozen(lambda: start(x)),
             "start_upper": lambda: frozen(lambda: start.upper(maps)),
             "ce_step": lambda: train("ce", net, images, labels, args, {"ce": 1.0}, keep=False),
             "oal_step": lambda: train("oal", net, images, labels, args, weights, teacher, outliers, start, critic, keep=False),
             "test_pass": lambda: evaluate.outputs(net, images, args.dataset, args.device)}
    seconds = {}
    for _ in range(repeats + 1):  # the first round warms up
        for name, part in parts.items():
            wait()
            begun = time.perf_counter()
            part()
            wait()
            seconds.setdefault(name, []).append(time.perf_counter() - begun)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    bare_parts = {"ce": best["bare"], "oal": best["bare"]}
    through = sends_outliers(args, weights)
    for part, counts in (("bare_upper", through), ("teacher_forward", weights.keys() & {"kd", "feat"}),
                         ("start_forward", critic), ("start_upper", critic)):
        if counts:
            bare_parts["oal"] += best[part]
    named = ("bare", "teacher_forward", "ce_step", "oal_step", "test_pass")
    return {"images_per_second": {name: n / best[name] for name in named},
            "ratio": {name: best[f"{name}_step"] / bare_parts[name] for name in ("ce", "oal")}}


def weights_of(args):
    """The student's objective: {term: weight}, without the terms whose weight is 0."""
    if args.peer:
        return {"logitnorm": {"logitnorm": 1.0}, "vos": {"ce": 1.0, "vos": 0.1}}[args.peer]
    weights = {"ce": 1.0, "kd": args.w_kd, "feat": args.w_feat, "boundary": args.w_boundary, "latent": args.w_latent}
    return {name: weight for name, weight in weights.items() if weight}


def sends_outliers(args, weights):
    """Whether latent outliers go through the network with the batch."""
    return "latent" in weights and args.micl in ("energy", "bound")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = evaluate.fail
    parser.add_argument("--dataset", choices=evaluate.CLASSES, default="shapes", help="the ID set")
    parser.add_argument("--data-root", help="folder in the OpenOOD v1.5 layout, or where torchvision downloads (data)")
    parser.add_argument("--out", help="folder for everything that is written (runs/DATASET)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", choices=models.ARCHS, help="resnet18 on CIFAR, resnet_small on shapes")
    parser.add_argument("--epochs", type=evaluate.positive,
                        help="of each training stage, the teacher's too; default: the tier's own")
    parser.add_argument("--device", default=evaluate.best_device())
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--benchmark", action="store_true", help="measure speed and stop")
    parser.add_argument("--ce", metavar="FILE", help="start from this cross-entropy network and skip its training")
    parser.add_argument("--teacher", metavar="FILE", help="distil from this network and train no teacher; add --feat released "
                        "where it has another arch than the student or has not grown from its start")
    parser.add_argument("--feat", choices=W_FEAT, help="form of feature distillation, see losses.py; default: the tier's")
    parser.add_argument("--micl", choices=("energy", "bound", "released", "club"), help="see losses.py; default: the tier's")
    parser.add_argument("--outliers", choices=("diffusion", "noise"), default="diffusion",
                        help="noise: Gaussian noise in place of synthesised latents, to compare")
    parser.add_argument("--peer", choices=("vos", "logitnorm"), help="train the student by this method in place of OAL")
    parser.add_argument("--sigma", type=float, default=synthesize.SIGMA, help="noise about the boundary, at 768 dims")
    parser.add_argument("--guidance", type=float, default=synthesize.GUIDANCE, help="weight of the condition in sampling")
    for name, what in WEIGHTS.items():
        parser.add_argument(f"--w-{name}", type=float, help=f"weight of {what}; 0 switches it off")
    args = parser.parse_args()
    args.arch = args.arch or ("resnet_small" if args.dataset == "shapes" else "resnet18")
    if args.outliers == "noise" and args.micl in ("released", "club"):
        evaluate.fail(f"--outliers noise is not for --micl {args.micl}, which never sends outliers through the network")
    own = [name for name in WEIGHTS if getattr(args, f"w_{name}") is not None]
    if args.peer and (own or args.benchmark or args.feat or args.micl or args.outliers != "diffusion"):
        evaluate.fail("--peer is another objective than OAL's: leave out --w-*, --feat, --micl, --outliers and --benchmark")
    args.epochs = dict(ce=args.epochs, teacher=args.epochs, oal=args.epochs) if args.epochs else None
    tier = TIERS["shapes" if args.dataset == "shapes" and args.arch == "resnet_small" else args.arch]
    args.micl, args.feat = args.micl or tier["micl"], args.feat or tier["feat"]
    if args.micl == "energy" and args.w_boundary:
        evaluate.fail("--w-boundary is not for --micl energy, which has latent outliers alone: leave it out")
    for name, value in {**tier, "w_feat": W_FEAT[args.feat]}.items():
        if getattr(args, name, None) is None:
            unused = args.peer and name.startswith("w_") or args.micl == "energy" and name == "w_boundary"
            setattr(args, name, 0.0 if unused else value)
    args.options = {name: value for name, value in vars(args).items()
                    if name not in ("data_root", "out", "device", "resume", "benchmark")}
    args.seconds = {"ce": 0.0, "teacher": 0.0, "synthesize": 0.0, "oal": 0.0}
    args.out = Path(args.out or f"runs/{args.dataset}")
    args.data_root = evaluate.check_data_root(args)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    evaluate.check_device(args.device)
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
    held = [name for name in ("ce.pt", "teacher.pt", "outliers.pt", "vos.pt", "critic.pt", "student.pt", "results.json")
            if (args.out / name).exists()]
    if not args.benchmark and (saved and not args.resume or held and not saved):
        evaluate.fail(f"{args.out} holds another run's {', '.join(held) or 'checkpoint.pt'}: name another folder with "
                      "--out" + (", or go on with --resume" if saved else ""))
    classes = evaluate.CLASSES[args.dataset]

    # Images, and everything else that a user can get wrong, before the first second of training.
    ce = evaluate.load_network(args.ce, classes, args.arch) if args.ce else build(args.arch, classes, args.seed)
    teacher = evaluate.load_network(args.teacher, classes) if args.teacher else None
    if teacher and args.feat == "maps" and args.w_feat and teacher.conv1.weight.shape != ce.conv1.weight.shape:
        evaluate.fail(f"the feature maps of --teacher {args.teacher} have other shapes than those of {args.arch}: add "
                      "--feat released, or give a teacher of that arch")
    if args.rank:
        dist.barrier()  # the first process downloads and decodes, the others read what it has left
    images, labels = (tensor.to(args.device) for tensor in evaluate.load(args.dataset, "train", args.data_root))
    if len(images) < BATCH or labels.bincount(minlength=classes).min() < 2:
        evaluate.fail(f"the training set of {args.dataset} in {args.data_root} is too small: it needs {BATCH} images, and "
                      "2 of each class")
    sets, missing = evaluate.load_benchmark(args.dataset, args.data_root)
    if args.rank == 0:
        if missing:
            print(f"missing, and left out of the means: {', '.join(missing)}", flush=True)
        if args.world > 1:
            dist.barrier()
    evaluate.make_folder(args.out)
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
            train("ce", ce, images, labels, args, {"ce": 1.0})
        save_network(ce, args, "ce.pt")
    load_weights(ce, args, "ce.pt")

    # 2. The teacher: what a second cycle of the same recipe, on the same images, makes of that network.
    weights = weights_of(args)
    if weights.keys() & {"kd", "feat"} and not teacher:
        teacher = models.build(args.arch, classes)
        if not (args.out / "teacher.pt").exists():
            load_weights(teacher, args, "ce.pt")
            train("teacher", teacher, images, labels, args, {"ce": 1.0})
            save_network(teacher, args, "teacher.pt")
        load_weights(teacher, args, "teacher.pt")

    # 3. Outliers, from the cross-entropy network's features.
    outliers, begun = None, time.perf_counter()
    if weights.keys() & {"boundary", "latent", "vos"}:
        file = "vos.pt" if args.peer else "outliers.pt"
        if not (args.out / file).exists():
            g = generator(args.seed, "synthesize")
            if args.peer == "vos":
                features = evaluate.outputs(ce, images, args.dataset, args.device)[1]
                found = {"vos": synthesize.gaussian_outliers(features, labels.cpu(), args.per_class, g)}
            else:
                found = synthesize.synthesize(ce, images, labels, args.dataset, args.per_class, args.sigma, args.guidance,
                                              args.diffusion_steps, g, args.device)
            args.seconds["synthesize"] = time.perf_counter() - begun
            save({"stage": "synthesize", "seconds": args.seconds, "options": args.options}, args, "checkpoint.pt")
            save(found, args, file)
        outliers = torch.load(args.out / file, map_location=args.device, weights_only=True)

    # 4. The student. What of MICL's level is linear in the start's features is added to fc, the rest it learns.
    student, critic = models.build(args.arch, classes), None
    if not (args.out / "student.pt").exists():
        load_weights(student, args, "ce.pt")
        if sends_outliers(args, weights) and args.micl == "energy":
            if not (args.out / "critic.pt").exists():
                begun = time.perf_counter()
                taught = teacher if "feat" in weights and args.feat == "maps" else ce
                save(make_critic(ce, taught, images, outliers, args), args, "critic.pt")
                args.seconds["oal"] += time.perf_counter() - begun
            critic = torch.load(args.out / "critic.pt", weights_only=True)
            with torch.no_grad():
                student.fc.weight += critic["u"]
                student.fc.bias += critic["offset"]
        train("oal", student, images, labels, args, weights, teacher, outliers, ce if critic else None, critic)
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
    results = {"dataset": args.dataset, "arch": args.arch, "seed": args.seed,
               "command": " ".join(["train.py", *sys.argv[1:]]), "device": args.device, "options": args.options,
               "versions": evaluate.versions(), "seconds": seconds, "missing": missing, "models": found}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print("\n".join(evaluate.table(results)))
    print(f"written: {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
