"""The benchmark: its images, its scores, its metrics.

    python evaluate.py runs/cifar100/student.pt --dataset cifar100 --data-root DIR              # all scores, all sets
    python evaluate.py runs/cifar100/ce.pt runs/cifar100/student.pt --dataset cifar100 --data-root DIR --plot out.png
    python evaluate.py student.pt --dataset cifar100 --data-root DIR --score ebo --ood FOLDER   # a row for your images
    python evaluate.py student.pt --dataset cifar100 --data-root DIR --flag FOLDER > flags.csv  # verdict per image

The protocol is that of OpenOOD v1.5 (arXiv 2306.09301): its lists, its transform, its metrics. A score here is a
confidence: higher = more in-distribution.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import center_crop, resize

import losses
import models

SIZE = 32
CIFAR_FAR = ("mnist", "svhn", "texture", "places365", "scenes")
# The names of CIFAR's classes, in the order of their labels.
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm""".split()
# The ID sets that have a name. A user's folder of classes adds an entry of its own, with its images (read_classes).
ID_SETS = {"shapes": dict(classes=8, names=[f"{texture} {shape}" for shape in ("disc", "square", "triangle", "cross")
                                            for texture in ("plain", "checked")],
                          mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
                          groups={"near": ("held_out",), "far": ("noise", "stripes", "flat", "gradient", "blobs")}),
           "cifar10": dict(classes=10, names=CIFAR10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
                           groups={"near": ("cifar100", "tin"), "far": CIFAR_FAR}),
           "cifar100": dict(classes=100, names=CIFAR100, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761),
                            groups={"near": ("cifar10", "tin"), "far": CIFAR_FAR})}
NAMED = tuple(ID_SETS)


def fail(message):
    """Ends the program as every mistake of a user does: one line on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run(main):
    """Runs a program. What the system refuses ends it in one line, a signal or a reader that has gone in none."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # a file name that is not UTF-8 as it is
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130)
    except OSError as problem:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # if it was stdout that failed, what it still holds would fail again at exit
        if not isinstance(problem, BrokenPipeError):
            fail(problem)
        os.dup2(null, 2)
        raise SystemExit(141)


def write(path, content):
    """Writes a file whole or not at all: text, bytes, or by torch.save anything else. Its OSError names the file."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    if isinstance(content, str):
        content = content.encode()
    elif not isinstance(content, bytes):
        buffer = io.BytesIO()  # writing to a file, torch.save makes a RuntimeError of a full disk
        torch.save(content, buffer)
        content = buffer.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path))
    finally:
        partial.unlink(missing_ok=True)


# --- Images: a set is a uint8 tensor [N, 3, S, S], S = --size, and int64 labels [N], -1 for OOD. ---------------------


def to_tensor(image, size=SIZE):
    """PIL image of any size and mode -> uint8 [3, size, size] by OpenOOD's test transform: without EXIF rotation."""
    if image.mode.startswith("I"):  # 16-bit gray, which PIL would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    image = center_crop(resize(image.convert("RGB"), size), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(paths, size=SIZE):
    """Image files -> ([(path, uint8 [3, size, size])] of the readable, {path: reason} of the rest)."""
    def read(path):
        if not os.path.isfile(path):
            return "neither a regular file nor a folder that can be listed"  # to open a named pipe would wait for ever
        try:
            with Image.open(path) as image:
                return to_tensor(image, size)
        except Exception as problem:  # a damaged file makes PIL raise any of a dozen types
            return f"{type(problem).__name__}: {problem}".splitlines()[0]
    with ThreadPoolExecutor() as pool:  # PIL decodes outside Python's lock
        results = list(zip(map(str, paths), pool.map(read, paths)))
    return ([(path, result) for path, result in results if torch.is_tensor(result)],
            {path: result for path, result in results if not torch.is_tensor(result)})


def read_list(list_path, image_root, cache_path, size=SIZE):
    """The images of one OpenOOD list (lines `path label`) -> (images, labels), decoded once, then read from the cache.

    None if not one file of the list is there. A changed list, a truncated cache or an altered one are decoded anew.
    """
    text = list_path.read_text("utf-8-sig", "replace")
    key = hashlib.sha256(f"RGB, Resize({size}), CenterCrop({size})\n{text}".encode()).hexdigest()
    try:
        saved = torch.load(cache_path, weights_only=True)
        if saved["key"] == key and saved["crc"] == zlib.crc32(saved["images"].numpy().data):
            return saved["images"], saved["labels"]
    except Exception:  # absent, truncated, not ours: whatever it is, the image files decide
        pass
    try:
        paths, labels = zip(*(line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()))
        paths, labels = [image_root / path for path in paths], torch.tensor([int(label) for label in labels])
    except ValueError:
        fail(f"{list_path} is not a list, or empty: each line must be 'path label'")
    if not any(path.is_file() for path in paths):
        print(f"none of the {len(paths)} images of {list_path} is there, the first is {paths[0]}", file=sys.stderr)
        return None
    print(f"decoding the {len(paths)} images of {list_path.name}, once", file=sys.stderr)
    good, bad = decode(paths, size)
    for path, reason in bad.items():
        fail(f"{len(bad)} of the {len(paths)} images of {list_path} cannot be read, the first is {path} ({reason})")
    images = torch.stack([image for _, image in good])
    try:
        write(cache_path, {"key": key, "crc": zlib.crc32(images.numpy().data), "images": images, "labels": labels})
    except OSError as problem:  # a read-only data folder costs time, not the run
        print(f"not cached: {problem}", file=sys.stderr)
    return images, labels


def from_torchvision(name, split, root, size):
    """The set `name` as torchvision downloads it into root -> (images, labels), or None where that fails."""
    parts = {"train": slice(None), "val": slice(1000), "test": slice(1000, None)}  # of an ID set, as OpenOOD has them
    try:
        if name in ("cifar10", "cifar100"):
            sources = [getattr(datasets, name.upper())(root, split == "train", download=True)]
        elif name == "svhn":
            sources = [datasets.SVHN(root, "test", download=True)]
        elif name == "mnist":
            sources = [datasets.MNIST(root, train=False, download=True)]
        elif name == "texture":  # OpenOOD takes all 5,640 images of DTD
            sources = [datasets.DTD(root, part, download=True) for part in ("train", "val", "test")]
        else:
            return None
        images = torch.stack([to_tensor(image, size) for source in sources for image, _ in source])
        if split in parts:
            return images[parts[split]], torch.tensor(sources[0].targets)[parts[split]]
        return images, torch.full((len(images),), -1)
    except Exception as problem:  # no network, a full disk, a server's refusal, scipy missing for SVHN
        print(f"torchvision did not bring {name}: {problem}".splitlines()[0], file=sys.stderr)
        return None


def load(dataset, split, data_root=None, size=SIZE):
    """One set -> (images uint8 [N, 3, S, S], labels int64 [N]); None for an OOD set that is not to be had.

    dataset: a key of ID_SETS, the size of a folder's images its own; data_root is CIFAR's alone. split: 'train', 'val'
    or 'test' of the ID set, an OOD set of its groups, or 'val_tin', OpenOOD's OOD images for choices. Ends the program
    if an ID set is missing.
    """
    if dataset not in NAMED:
        return ID_SETS[dataset]["splits"].get(split)
    if dataset == "shapes":
        return draw_set(split, size)
    root, is_id, loaded = Path(data_root), split in ("train", "val", "test"), None
    name = f"{split}_{dataset}" if is_id else split if split == "val_tin" else f"test_{split}"
    list_path = root / "benchmark_imglist" / dataset / f"{name}.txt"
    if not (root / "benchmark_imglist").is_dir():  # no OpenOOD tree
        loaded = from_torchvision(dataset if is_id else split, split, root, size)
    elif list_path.is_file():
        cache_path = root / "oal_cache" / dataset / (f"{name}.pt" if size == SIZE else f"{name}_{size}.pt")
        loaded = read_list(list_path, root / "images_classic", cache_path, size)
    if is_id and loaded is None:
        fail(f"no images of {list_path}: put images_classic/ and benchmark_imglist/ of OpenOOD v1.5 into {root}")
    if is_id and not 0 <= int(loaded[1].min()) <= int(loaded[1].max()) < ID_SETS[dataset]["classes"]:
        fail(f"{list_path} holds labels outside 0..{ID_SETS[dataset]['classes'] - 1}: it is not a list of {dataset}")
    return loaded


def files_below(folder):
    """The files below a folder, links followed, but for a link to a folder that it lies in; and folders not listed."""
    files, folders = [], [(folder, ())]
    while folders:
        folder, above = folders.pop()
        here = os.path.realpath(folder)
        try:
            paths = [folder / name for name in os.listdir(folder)] if here not in above else []
        except OSError:
            files.append(folder)  # decode says that it cannot be read
            continue
        folders += [(path, (*above, here)) for path in paths if os.path.isdir(path)]
        files += [path for path in paths if not os.path.isdir(path)]
    return files


def read_folder(folder, size=SIZE):
    """All images below a folder -> (uint8 [N, 3, size, size], their N paths, {path: reason} of the unreadable ones)."""
    endings = datasets.folder.IMG_EXTENSIONS
    if not Path(folder).is_dir():
        fail(f"{folder} is not a folder: name one that holds images")
    seen = files_below(Path(folder))
    paths = sorted(path for path in seen if path.name.lower().endswith(endings) or os.path.isdir(path))
    good, bad = decode(paths, size)
    for path, reason in bad.items():
        print(f"unreadable: {path} ({reason})", file=sys.stderr)
    print(f"{folder}: {len(good)} images, {len(bad)} unreadable, {len(seen) - len(paths)} other files", file=sys.stderr)
    if not good:
        fail(f"{folder} holds no image that can be read: its name must end in {' '.join(endings)}")
    return torch.stack([image for _, image in good]), [path for path, _ in good], bad


def read_classes(folder, size=SIZE):
    """A user's folder of classes -> an entry like those of ID_SETS, with the classes' names and the images of 'splits'.

    A class is all that lies below train/CLASS, classes sorted by name. A split val/ or test/ that is not there takes a
    tenth of each class of train/ (one image of a class of 4 to 9), chosen by a digest of the path below the folder:
    the same for every program and seed, and a new image moves hardly another. Mean and std are the training images'.
    """
    root, splits = Path(folder), {}
    if not (root / "train").is_dir():
        fail(f"no folder {root / 'train'}: put the images of each class into {root / 'train' / 'CLASS'}")
    names = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    if len(names) < 2:
        fail(f"{root / 'train'} holds {f'the class {names[0]} alone' if names else 'no class'}: add another folder")
    absent = [split for split in ("val", "test") if not (root / split).is_dir()]
    for split in [split for split in ("train", "val", "test") if split not in absent]:
        images, paths, _ = read_folder(root / split, size)
        paths = [Path(path).relative_to(root) for path in paths]
        for path in paths:
            if path.parts[1] not in names:
                fail(f"{root / split / path.parts[1]} is no class of {root / 'train'}: move it away, or add the class")
        splits[split] = images, torch.tensor([names.index(path.parts[1]) for path in paths])
        if split == "train":
            order = torch.tensor(sorted(range(len(paths)), key=lambda i: hashlib.sha256(bytes(paths[i])).digest()))
    images, labels = splits["train"]
    home = torch.full_like(labels, -1)                                # index into `absent`, -1 for training
    for label in range(len(names)):
        mine = order[labels[order] == label]
        tenth = max(len(mine) // 10, len(mine) >= 4)
        for i in range(len(absent)):
            home[mine[i * tenth:(i + 1) * tenth]] = i
    splits |= {split: (images[home == i], labels[home == i]) for i, split in ((-1, "train"), *enumerate(absent))}
    images, labels = splits["train"]
    for name, count in zip(names, labels.bincount(minlength=len(names)).tolist()):
        if count < 2:
            fail(f"the class {name} has {count} images to train on in {root / 'train'}: it needs 2")
    if not all(len(splits[split][0]) for split in absent):
        fail(f"{root} has no {absent[0]}/, and classes of fewer than 4 images none to spare for it: add images")
    print(f"{root}: {len(names)} classes, {', '.join(names)}; {len(images)} images to train on, "
          f"{len(splits['val'][0])} for thresholds, {len(splits['test'][0])} to test", file=sys.stderr)
    levels = torch.arange(256).double() / 255
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.transpose(0, 1)]).double()
    mean, square = (counts @ power / counts[0].sum() for power in (levels, levels ** 2))                # [3] each
    std = (square - mean ** 2).clamp_min(1e-4).sqrt()                 # of images all in one colour too
    return dict(classes=len(names), names=names, mean=tuple(mean.tolist()), std=tuple(std.tolist()), groups={},
                splits=splits)


def id_set(args):
    """The entry in ID_SETS of --dataset, added first where that is a folder."""
    if args.dataset not in NAMED:
        ID_SETS[args.dataset] = read_classes(args.dataset, args.size)
    return ID_SETS[args.dataset]


# --- Embedded images: drawn in a second, so that the whole method runs with no download. -----------------------------

# Which points of the plane, x and y [N, H, W] at distance r, lie in the shape of radius 1 about the origin. Four are
# the ID classes, x 2 textures = 8; the others are near-OOD: the same style, other shapes.
SHAPES = {"disc": lambda x, y, r: r < 0.9,
          "square": lambda x, y, r: torch.maximum(x.abs(), y.abs()) < 0.8,
          "triangle": lambda x, y, r: (y > -0.5) & (y < 1 - math.sqrt(3) * x.abs()),
          "cross": lambda x, y, r: (torch.minimum(x.abs(), y.abs()) < 0.33) & (torch.maximum(x.abs(), y.abs()) < 1)}
HELD_OUT_SHAPES = {"ring": lambda x, y, r: (r < 1) & (r > 0.55),
                   "star": lambda x, y, r: r < 0.65 + 0.35 * torch.cos(5 * torch.atan2(y, x)),
                   "bar": lambda x, y, r: (x.abs() < 1) & (y.abs() < 0.4),
                   "half_disc": lambda x, y, r: (r < 1) & (y > 0)}
SHAPES_SIZES = {"train": 4000, "val": 500, "test": 1500, "held_out": 1500}  # other sets: 500


def draw_set(split, size=SIZE):
    """An embedded set -> (images uint8 [N, 3, S, S], labels int64 [N]), the same on every machine and for every seed.

    ID classes: 4 shapes x 2 textures (plain, checked), any colour, place, size and turn, on a background gradient with
    clutter and noise. 'held_out' (near-OOD): 4 other shapes drawn the same way. None for a split that does not exist.
    """
    names = ("train", "val", "test", "held_out", "val_held_out", *ID_SETS["shapes"]["groups"]["far"])
    if split not in names:
        return None
    n = SHAPES_SIZES.get(split, 500)
    g = torch.Generator().manual_seed(names.index(split))
    uniform = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=g)  # a number for each image
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")  # [H, W]
    turn = uniform(0, 2 * math.pi)
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()  # [N, H, W], turned axes
    first = torch.rand(n, 3, 1, 1, generator=g)                                       # two colours per image, apart
    second = (first + 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=g)) % 1            # by 0.3 or more in each channel
    far = {"noise": lambda: torch.rand(n, 3, size, size, generator=g),
           "stripes": lambda: torch.where(((along * uniform(3, 12)).sin() > 0)[:, None], first, second),
           "flat": lambda: first.expand(n, 3, size, size),
           "gradient": lambda: torch.lerp(first, second, along[:, None] / 2 + 0.5),
           "blobs": lambda: F.interpolate(torch.rand(n, 3, 5, 5, generator=g), size, mode="bicubic")}
    if split in far:
        images = far[split]()
    else:
        shapes = HELD_OUT_SHAPES if "held_out" in split else SHAPES
        labels = torch.randint(8, (n,), generator=g)
        # Background: a faint gradient; clutter: one small square anywhere; then the shape over it; then noise.
        images = torch.lerp(first, second, 0.1 * (1 + along[:, None]))
        u, v = x - uniform(-1, 1), y - uniform(-1, 1)
        clutter = torch.maximum(u.abs(), v.abs()) < uniform(0.05, 0.2)
        images = torch.where(clutter[:, None], torch.rand(n, 3, 1, 1, generator=g), images)
        scale, du, dv = uniform(0.6, 0.9), uniform(-0.2, 0.2), uniform(-0.2, 0.2)
        u, v = (along - du) / scale, (across - dv) / scale                            # the shape's own coordinates
        r = (u ** 2 + v ** 2).sqrt()
        masks = torch.stack([inside(u, v, r) for inside in shapes.values()])          # [4, N, H, W]
        mask = masks[labels // 2, torch.arange(n)]                                    # [N, H, W]
        checks = ((u * 6).sin() * (v * 6).sin() > 0) & (labels % 2 == 1)[:, None, None]
        images = torch.where((mask & ~checks)[:, None], second, images)
        images = torch.where((mask & checks)[:, None], torch.lerp(first, second, 0.4), images)
        images = images + 0.03 * torch.randn(images.shape, generator=g)
    labels = labels if split in ("train", "val", "test") else torch.full((n,), -1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# --- From images to network outputs. ---------------------------------------------------------------------------------


def normalize(images, dataset):
    """uint8 [B, 3, S, S] -> float32 [B, 3, S, S] with the ID set's mean and standard deviation, channels last."""
    mean, std = (torch.tensor(ID_SETS[dataset][key], device=images.device)[:, None, None] for key in ("mean", "std"))
    return images.float().div(255).sub(mean).div(std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def stage2(net, images, dataset, device):
    """Images uint8 [N, 3, S, S] -> batches of (stage-2 maps [B, C, S/R, S/R] or a ViT's tokens, features [B, D])."""
    net.eval().to(device=device, memory_format=torch.channels_last)
    for batch in images.split(500):
        with models.autocast(device):
            maps = net.lower(normalize(batch.to(device), dataset))
            features = net.upper(maps)
        check_outputs(net, features)
        yield maps, features


@torch.inference_mode()
def outputs(net, images, dataset, device):
    """Images uint8 [N, 3, S, S] -> (logits [N, C], features [N, D]), float32, on the CPU; ends if not finite."""
    features = [features for _, features in stage2(net, images, dataset, device)]
    logits, features = torch.cat([net.classify(batch).cpu() for batch in features]), torch.cat(features).cpu()
    check_outputs(net, logits)
    return logits, features


def check_outputs(net, values):
    """Ends where outputs [B, K], or the sums of their squares, are not finite, as those of finite weights can be."""
    if not values.square().sum(1).isfinite().all():
        fail(f"{getattr(net, 'source', 'the network')} gives outputs that are not finite: train it at a lower rate")


# Other names of weights: of wrappers, of pytorch-cifar, of timm's ViT, of the file of torchvision's.
RENAMED = {r"^((module|model|_orig_mod)\.)+": "", r"^linear\.": "fc.",
           "^cls_token": "class_token", "^pos_embed": "encoder.pos_embedding", r"^patch_embed\.proj": "conv_proj",
           r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.", r"\.norm([12])\.": r".ln_\1.",
           r"\.attn\.qkv\.": ".self_attention.in_proj_", r"\.attn\.proj\.": ".self_attention.out_proj.",
           r"\.mlp\.(fc|linear_)1\.": ".mlp.0.", r"\.mlp\.(fc|linear_)2\.": ".mlp.3.",
           r"^norm\.": "encoder.ln.", r"^head\.": "heads.head."}


def renamed(state):
    """A state_dict with the names that our networks have."""
    for other, ours in RENAMED.items():
        state = {re.sub(other, ours, str(name)): value for name, value in state.items()}
    return state


def load_network(path, num_classes, arch=None, size=SIZE):
    """A checkpoint file -> the network, on the CPU in eval mode; ends the program if it is not one of num_classes.

    Takes a state_dict, plain or the one dict of tensors in a dict, whatever its key, also with the names of RENAMED.
    The arch is read from the first convolution, and must be `arch` where given; a ResNet's must be for the size.
    """
    # What a pickled numpy scalar, such as an accuracy, is made of: its function, as numpy 1 and 2 name it, and types.
    scalars = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    types = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]}
    try:
        with torch.serialization.safe_globals([*scalars, np.dtype, *types]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a text file, a truncated archive, a pickle of anything but tensors
        if getattr(problem, "filename", None):
            fail(f"no checkpoint {path} ({problem.strerror}): name a file of weights")
        foreign = re.search(r"GLOBAL (\S+)", str(problem))
        reason = f"it needs the code of {foreign[1]}" if foreign else "cut short, or text"
        fail(f"{path} is not a file of weights ({reason}): give a state_dict saved by torch.save")
    is_state = lambda part: isinstance(part, dict) and part and all(map(torch.is_tensor, part.values()))
    parts = {"": content, **content} if isinstance(content, dict) else {}
    inside = {key: part for key, part in parts.items() if is_state(part)}
    if len(inside) != 1:
        fail(f"{path} holds {', '.join(map(str, inside)) or 'no state_dict'}: give a file of one dict of tensors")
    state = {name: value.to_dense() for part in inside.values() for name, value in renamed(part).items()}
    if any(value.is_meta or value.is_complex() or value.is_floating_point() and not value.isfinite().all()
           for value in state.values()):
        fail(f"{path} holds weights that are not finite numbers: train it again with a lower rate")
    shape = getattr(state.get("conv1.weight"), "shape", ())
    found = next((name for name, (_, width) in models.ARCHS.items() if shape[:1] == (width,)),
                 "ViT" if "conv_proj.weight" in state else None)
    if found is None or (arch and arch != found):
        fail(f"{path} is a checkpoint of {found or 'an unknown arch'}: expected "
             f"{arch or ' or '.join([*models.ARCHS, 'a ViT'])}")
    if found != "ViT" and (shape[2:] == (7, 7)) != (size >= 224):
        fail(f"{path} is not a network for images {size} wide: {'leave out' if size >= 224 else 'add'} --size 224")
    bias = state.get("fc.bias", state.get("heads.head.bias"))
    if bias is not None and bias.numel() != num_classes:
        fail(f"{path} was trained for {bias.numel()} classes: the dataset has {num_classes}")
    try:
        net = models.ViT(state, num_classes) if found == "ViT" else models.build(found, num_classes, size)
        net.load_state_dict(state)
    except Exception as problem:  # a ViT's shape is read from its state
        fail(f"{path} does not fit {found}: {' '.join(str(problem).split())[:200]}")
    net.source = path
    return net.eval()


def load_imagenet_vit(num_classes, folder):
    """ViT-B/16 with torchvision's ImageNet weights, from their file in the folder or downloaded there, but for a head.

    The head is new, of zeros, for num_classes. Ends the program where the file is not to be had, or is another.
    """
    url = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.url
    path = Path(folder) / os.path.basename(url)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), re.search(r"-(\w+)\.pth", url)[1])
        state = renamed(torch.load(path, map_location="cpu", weights_only=True))
        net = models.ViT(state, num_classes)
        net.load_state_dict({**state, **net.heads.state_dict(prefix="heads.")})
    except Exception as problem:  # no network, a file cut short, another network's
        fail(f"no weights {path} ({' '.join(str(problem).split())[:200]}): put the file of {url} there")
    net.source = path
    return net


# --- Scores: (logits [N, C], features [N, D], ref) -> confidence [N], higher = more in-distribution. `ref` is what a
# score may know of the network and its training set: dict(weight [C, D], features [M, D], mean [D] of the features).


def knn(logits, features, ref, k=50, megabytes=256):
    """Minus the distance to the k-th nearest training feature, unit length (Sun et al., arXiv 2204.06507; k = 50).

    Never holds more distances at once than `megabytes`. Measured from the bank's centre: from the origin all distances
    of features that have collapsed to nearly one would cancel to the same float32 number.
    """
    bank = F.normalize(ref["features"].double(), dim=1)
    centre = bank.mean(0)
    bank, queries = (bank - centre).float(), (F.normalize(features.double(), dim=1) - centre).float()
    half = bank.square().sum(1) / 2                                                  # |q - b|^2 = |q|^2 + 2 (half - qb)
    rows = max(1, megabytes * 2 ** 20 // (4 * len(bank)))
    kth = [torch.addmm(half, chunk, bank.T, alpha=-1).topk(min(k, len(bank)), largest=False, sorted=False)[0].amax(1)
           for chunk in queries.split(rows)]
    return -(queries.square().sum(1) + 2 * torch.cat(kth)).clamp_min(0).sqrt()


def fdbd(logits, features, ref):
    """Mean distance to the decision boundaries over the distance to the training mean (Liu & Qin, arXiv 2312.11536)."""
    top, predicted = logits.max(1)
    gap = torch.cdist(ref["weight"], ref["weight"])[predicted]                      # [N, C], |w_pred - w_c|
    distance = ((top[:, None] - logits) / gap.clamp_min(1e-12)).sum(1) / (logits.shape[1] - 1)
    return distance / (features - ref["mean"]).norm(dim=1).clamp_min(1e-12)


def micl(logits, features, ref):
    """OAL's detector: top logit above the mean logit, over the distance to the training mean (losses.MICL)."""
    return losses.MICL(ref["mean"]).score(logits, features)


SCORES = {
    # Maximum softmax probability (Hendrycks & Gimpel, arXiv 1610.02136); in float32 confident ones would tie at 1.
    "msp": lambda logits, features, ref: logits.double().softmax(1).amax(1),
    # Maximum logit (Hendrycks et al., arXiv 1911.11132).
    "mls": lambda logits, features, ref: logits.amax(1),
    # Negative free energy (Liu et al., arXiv 2010.03759, equation 4, T = 1; the score of OAL's paper).
    "ebo": lambda logits, features, ref: logits.logsumexp(1),
    "knn": knn, "fdbd": fdbd, "micl": micl}
NEED_TRAINING_SET = ("knn", "fdbd", "micl")


# --- Metrics. --------------------------------------------------------------------------------------------------------


def detection_metrics(conf_id, conf_ood):
    """How well a confidence separates ID from OOD, as OpenOOD v1.5 computes it (evaluators/metrics.py), in percent.

    conf_id [N], conf_ood [M]: tensors or arrays, higher = more in-distribution. Returns a dict: 'auroc'; 'aupr_in' and
    'aupr_out', trapezoidal areas with ID or OOD as the positive class; 'fpr95', the share of ID flagged once 95 % of
    OOD is caught; 'fpr95_id', the share of OOD accepted once 95 % of ID is. Equal confidences count as one threshold.
    """
    conf_id, conf_ood = (torch.as_tensor(conf).detach().cpu().double().flatten().numpy()
                         for conf in (conf_id, conf_ood))
    conf = np.concatenate([conf_id, conf_ood])
    if not len(conf_id) or not len(conf_ood) or np.isnan(conf).any():
        raise ValueError("detection_metrics: no ID or no OOD confidence, or one that is NaN")
    order = np.argsort(conf)
    conf, ood = conf[order], (order >= len(conf_id)).astype(np.float64)
    ends = np.flatnonzero(np.r_[conf[1:] != conf[:-1], True])         # one group per distinct confidence, ascending
    caught = np.cumsum(ood)[ends]                                     # OOD positive: thresholds from the lowest up
    flagged = ends + 1 - caught
    kept, let_in = ((n[-1] - np.r_[0, n[:-1]])[::-1] for n in (flagged, caught))  # ID positive: from the highest down
    area = lambda true, false: np.trapezoid(np.r_[1, true / (true + false)], np.r_[0, true / true[-1]])
    return {"auroc": 100 * np.trapezoid(np.r_[0, caught], np.r_[0, flagged]) / caught[-1] / flagged[-1],
            "aupr_in": 100 * area(kept, let_in), "aupr_out": 100 * area(caught, flagged),
            "fpr95": 100 * fpr_at_recall(caught, flagged, 0.95), "fpr95_id": 100 * fpr_at_recall(kept, let_in, 0.95)}


def fpr_at_recall(true, false, recall):
    """False-positive rate at the first point of scikit-learn's ROC curve that reaches the recall.

    The curve leaves out points on a straight line between their neighbours (its default `drop_intermediate`), which
    OpenOOD inherits: among ties the next corner of the curve counts, not the threshold itself.
    """
    i = np.argmax(true / true[-1] >= recall)
    if 0 < i < len(true) - 1:  # the two ends are always on the curve
        i += np.argmax(np.r_[(np.diff(true[i - 1:], 2) != 0) | (np.diff(false[i - 1:], 2) != 0), True])
    return false[i] / false[-1]


def threshold_at(conf_id, tpr):
    """The confidence at or above which at least the share `tpr` of the ID images [N] lies."""
    conf = np.sort(np.asarray(conf_id, dtype=np.float64))[::-1]
    return float(conf[max(1, math.ceil(tpr * len(conf))) - 1])


# --- Benchmark. ------------------------------------------------------------------------------------------------------


def load_benchmark(dataset, data_root, folders=(), size=SIZE):
    """Every test set -> ({'id': (images, labels), name or full path: (images, labels)}, names of missing OOD sets)."""
    sets = {"id": load(dataset, "test", data_root, size)}
    found = {name: load(dataset, name, data_root, size) for name in sum(ID_SETS[dataset]["groups"].values(), ())}
    sets |= {name: loaded for name, loaded in found.items() if loaded}  # scenes: not of the benchmark, never missing
    for folder in folders:
        images = read_folder(folder, size)[0]
        sets[os.path.abspath(folder)] = images, torch.full((len(images),), -1)
    return sets, [name for name, loaded in found.items() if loaded is None and name != "scenes"]


def reference(net, dataset, images, device):
    """What scores may know of a network (see 'Scores'), from the training images."""
    features = outputs(net, images, dataset, device)[1]
    return {"weight": net.fc.weight.detach().cpu().float(), "features": features, "mean": features.mean(0)}


def evaluate(net, sets, dataset, device, scores, ref):
    """One network on load_benchmark's sets and its reference() -> (entry of results.json, {score: {set: conf [N]}})."""
    names, sizes = list(sets), [len(images) for images, _ in sets.values()]
    found = [outputs(net, images, dataset, device) for images, _ in sets.values()]
    logits, features = map(torch.cat, zip(*found))
    accuracy = (logits[:sizes[0]].argmax(1) == sets["id"][1]).double().mean().item()
    entry, by_set = {"id_acc": 100 * accuracy, "n_id": sizes[0], "scores": {}}, {}
    group_of = {name: group for group, members in ID_SETS[dataset]["groups"].items() for name in members}
    for score in scores:
        by_set[score] = dict(zip(names, SCORES[score](logits, features, ref).double().split(sizes)))
        rows = {}
        for name in names[1:]:
            found = detection_metrics(by_set[score]["id"], by_set[score][name])
            rows[name] = {"group": group_of.get(name, "yours"), "n": len(by_set[score][name]), **found}
        result = {}
        for group in ("near", "far"):
            members = [row for row in rows.values() if row["group"] == group]
            if members:  # no set, no mean: an absent group is absent, never zero
                result[group] = {key: sum(row[key] for row in members) / len(members) for key in found}
        entry["scores"][score] = {**result, "sets": rows}
    return entry, by_set


def headline(results):
    """results.json's dict -> three lines: accuracy, near, far of the cross-entropy network and of the student."""
    before, after = (results["models"][name] for name in ("ce", "oal"))
    yield f"accuracy  {before['id_acc']:6.2f} -> {after['id_acc']:6.2f}   cross-entropy network -> student, percent"
    for group in ("near", "far"):
        if group in before["scores"]["ebo"]:
            (e1, m1), (e2, m2) = ([entry["scores"][score][group]["auroc"] for score in ("ebo", "micl")]
                                  for entry in (before, after))
            yield (f"{group + '-OOD':<9} {e1:6.2f} -> {m2:6.2f}   AUROC by ebo -> AUROC by micl; "
                   f"ebo alone {e1:.2f} -> {e2:.2f}, micl alone {m1:.2f} -> {m2:.2f}")


def title(name, names):
    """A set's name as a heading: the last part of a user's folder, all of it where another set ends in that too."""
    last = [Path(one).name for one in names]
    return name if last.count(Path(name).name) > 1 else Path(name).name or name


def tables(runs):
    """results.json dicts -> the lines of two Markdown tables, means with standard deviations (n - 1) over a row's runs.

    By ebo, fdbd and micl where all networks were measured by them, else by every score that all were measured by.
    A row is the student of one set of options and one kind of teacher, whatever the seed and the networks' files, under
    the words that not all commands begin with. The starts, one a seed, are a row of their own, as is a network measured
    by evaluate.py.
    """
    of_a_run = r" --(resume|(seed|out|data-root|device|ce|teacher)[ =]('[^']*'|\S+))(?= |$)"
    commands = [re.sub(of_a_run, "", results["command"]).replace("=", " ").split() for results in runs]
    base = os.path.commonprefix([words for words in commands if words[0] == "train.py"])
    base = base[:-1] if base and base[-1].startswith("--") else base  # its value is not common
    best = lambda options: ", the best" * (options.get("recipe") == "released")
    start = lambda options: "" if options["ce"] else f", {options.get('ce_epochs')} epochs{best(options)}"
    starts = {start(results["options"]) for results in runs if "seed" in results} - {""}  # "": a file's
    rows = {}  # what makes a row -> (its name, {seed, or number of the run: entry of results.json's models})
    for i, (results, words) in enumerate(zip(runs, commands)):
        for name, entry in results["models"].items():
            size, taught = results.get("size", SIZE), results.get("teacher") or ""
            options = {**results.get("options", {}), "size": size, "seed": 0, "ce": 0, "teacher": taught}
            key, label = (name, str(options)), f"`{' '.join(words[len(base):])}`" if words[len(base):] else "student"
            label += ", ViT teacher" * taught.startswith("ViT")
            if "seed" not in results:  # of evaluate.py: runs whose commands differ in numbers alone
                key, label = (name, size, re.sub(r"\d+", "", results["command"])), name
            elif name == "ce":
                kind = start(results["options"]) if len(starts) > 1 else ""
                key = (name, results["dataset"], results["arch"], size, kind)
                label = f"start: cross-entropy, {results['arch']}{f', {size} px' * (size != SIZE)}{kind}"
            held = rows.setdefault(key, (label, {}))[1].setdefault(results.get("seed", f"run {i}"), entry)
            if held["id_acc"] != entry["id_acc"] or name != "ce" and held != entry:  # a start is measured once a row
                fail(f"two runs with different figures are seed {results.get('seed')} of {label}: leave one out")
    rows = list(rows.values())
    entries = [entry for _, row in rows for entry in row.values()]
    common = [score for score in SCORES if all(score in entry["scores"] for entry in entries)]
    scores = [score for score in common if score in ("ebo", "fdbd", "micl")] or common
    sets, *others = ({name: found["n"] for name, found in entry["scores"][scores[0]]["sets"].items()}
                     for entry in entries)
    if any(other != sets for other in others):
        fail("the runs were measured on different OOD sets: make a table of each kind")

    line = lambda *cells: f"| {' | '.join(map(str, cells))} |"
    def cell(values):  # of each run, or of each run by each score -> means, scores beside each other
        return " / ".join(f"{one.mean():.1f}" + (f"±{one.std(ddof=1):.1f}" if len(one) > 1 else "")
                          for one in np.atleast_2d(np.array(values).T))

    columns = [(group, metric) for group in ("near", "far") if group in entries[0]["scores"][scores[0]]
               for metric in ("auroc", "fpr95")]
    command = f"`{' '.join(base)}`" if base else "network"
    by_group = [f"cells: {' / '.join(scores)}", "", line(command, "runs", "accuracy", *(
        f"{group} {metric.upper()}" for group, metric in columns)), "|---" * (3 + len(columns)) + "|"]
    by_set = ["", line("AUROC", *(f"{title(name, sets)} ({n})" for name, n in sets.items())),
              "|---" * (1 + len(sets)) + "|"]
    for name, row in rows:
        found = [[entry["scores"][score] for score in scores] for entry in row.values()]
        by_group.append(line(name, len(row), cell([entry["id_acc"] for entry in row.values()]), *(
            cell([[one[group][metric] for one in run] for run in found]) for group, metric in columns)))
        by_set.append(line(name, *(cell([[one["sets"][key]["auroc"] for one in run] for run in found])
                                   for key in sets)))
    missing = sorted({name for results in runs for name in results["missing"]})
    return [*by_group, *(by_set if sets else []),  # no sets: a folder of classes without --ood
            *([f"\nmissing, in no mean: {', '.join(missing)}"] if missing else [])]


def collect(paths):
    """results.json files -> the lines of README's tables."""
    try:
        return tables([json.loads(Path(path).read_text()) for path in paths])
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError) as problem:
        fail(f"--collect {' '.join(map(str, paths))}: not results.json files of one benchmark ({problem})")


def plot(path, columns, tpr):
    """{heading: {set: conf [N]}} -> a picture of histograms: a row per OOD set, ID beside it, the threshold, AUROC."""
    from matplotlib.figure import Figure
    names = [name for name in next(iter(columns.values())) if name != "id"]
    # A file name that is not UTF-8 cannot be drawn, and a dollar would begin a formula.
    readable = lambda text: text.encode(errors="replace").decode().replace("$", r"\$")
    figure = Figure(figsize=(3.2 * len(columns), 1.6 * len(names)))
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for row, name in zip(axes, names):
        for axis, (heading, conf) in zip(row, columns.items()):
            bins = np.linspace(*np.quantile(np.concatenate([conf["id"], conf[name]]), [0.001, 0.999]), 60)
            for one, label in (("id", "ID"), (name, readable(title(name, names)))):
                axis.hist(conf[one].numpy(), bins, density=True, alpha=0.6, label=label)
            axis.axvline(threshold_at(conf["id"], tpr), color="black", linewidth=1)
            auroc = detection_metrics(conf["id"], conf[name])["auroc"]
            axis.set_title(f"{readable(heading)}, AUROC {auroc:.1f}", fontsize=9)
            axis.set_yticks([])
            axis.legend(fontsize=7)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:].lower(), dpi=70)
    write(path, picture.getvalue())


def describe(program, args):
    """What results.json says of every run: ID set, size of images, names of classes, command, device, versions."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}
    return {"dataset": args.dataset, "size": args.size, "classes": ID_SETS[args.dataset]["names"],
            "command": shlex.join([program, *sys.argv[1:]]), "device": args.device, "versions": versions}


# --- Command line. ---------------------------------------------------------------------------------------------------


def number(kind, low, high):
    """An argparse type: a finite number of the kind, int or float, from low to high."""
    def read(text):
        if not low <= kind(text) <= high:  # nor is a NaN
            raise ValueError
        return kind(text)
    read.__name__ = f"{'whole' if kind is int else 'finite'} number from {low} to {high}:"  # of argparse's message
    return read


POSITIVE, SEED, FINITE = number(int, 1, 10 ** 9), number(int, 0, 10 ** 17), number(float, -1e308, 1e308)


def common_parser(doc):
    """A program's parser, with the options that all three programs share; check_common reads them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--dataset", default="shapes", metavar="{" + ",".join(NAMED) + ",FOLDER}",
                        help="the ID set; FOLDER holds your images as train/CLASS/..., and val/ and test/ if you like")
    parser.add_argument("--size", type=int, choices=(32, 64, 128, 224), default=SIZE,
                        help="side of the images (32); 224: with the stem of torchvision's ResNet")
    parser.add_argument("--data-root", help="folder in the OpenOOD v1.5 layout, or where torchvision downloads (data)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")
    return parser


def check_common(args):
    """Ends where --device, --dataset, --size or --data-root is of no use; `data`, the default root, can be made."""
    try:
        (torch.zeros(1, device=args.device) + 1).item()  # a value has to come back: none does from 'meta'
    except (RuntimeError, AssertionError, ImportError) as problem:  # a torch built without CUDA: an AssertionError
        fail(f"no device {args.device}: {str(problem).splitlines()[0]}")
    if args.dataset in NAMED and args.size not in (SIZE, 224):
        fail(f"--size {args.size}: the images of {args.dataset} are {SIZE} wide, or 224: leave it out")
    if args.dataset not in NAMED and not Path(args.dataset).is_dir():
        fail(f"no dataset {args.dataset}: choose one of {', '.join(NAMED)}, or a folder that holds train/CLASS/...")
    if args.data_root is not None and not Path(args.data_root).is_dir():
        fail(f"no data root {args.data_root}: name a folder that holds images_classic/ and benchmark_imglist/")
    args.data_root = args.data_root or "data"


def main():
    parser = common_parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", help="one or more files of weights, each a column of the result")
    parser.add_argument("--score", choices=[*SCORES, "all"], default="all")
    parser.add_argument("--ood", nargs="+", default=[], metavar="FOLDER", help="folders of your own OOD images")
    parser.add_argument("--flag", metavar="FOLDER", help="print path, score (micl for all), verdict of each image")
    parser.add_argument("--threshold-tpr", type=number(float, 1e-6, 1), metavar="T", default=0.95,
                        help="the threshold of --flag and --plot accepts this share of the ID images (0.95)")
    parser.add_argument("--plot", metavar="FILE.png", help="histograms of the score (ebo and micl for all)")
    parser.add_argument("--collect", nargs="+", metavar="RESULTS.json", help="print the tables of these runs and stop")
    parser.add_argument("--out", default="runs/evaluate", help="folder for results.json")
    args = parser.parse_args()
    if args.collect:
        print("\n".join(collect(args.collect)))
        return
    if not args.checkpoints or args.flag and (len(args.checkpoints) > 1 or args.plot or args.ood):
        fail("checkpoints: name one or more files of weights, one alone for --flag without --plot and --ood, or runs "
             "with --collect")
    check_common(args)
    classes, nets = id_set(args)["classes"], {}
    for path in args.checkpoints:
        nets[Path(path).stem if Path(path).stem not in nets else path] = load_network(path, classes, size=args.size)
    if args.flag:
        return flag(*nets.values(), "micl" if args.score == "all" else args.score, args)
    results_path = Path(args.out) / "results.json"
    if results_path.exists() and '"command": "evaluate.py' not in results_path.read_text(errors="replace"):
        fail(f"{results_path} holds another program's results: name another folder with --out")
    if args.plot and not (Path(args.plot).suffix.lower() in (".png", ".pdf", ".svg") and find_spec("matplotlib")):
        fail(f"--plot {args.plot}: the file must end in .png, .pdf or .svg, and matplotlib must be installed")
    start, scores, columns = time.perf_counter(), list(SCORES) if args.score == "all" else [args.score], {}
    train_list = Path(args.data_root) / "benchmark_imglist" / args.dataset / f"train_{args.dataset}.txt"
    if args.score == "all" and train_list.parent.is_dir() and not train_list.is_file():
        scores = [score for score in scores if score not in NEED_TRAINING_SET]
        print(f"no {train_list}: {', '.join(NEED_TRAINING_SET)} left out", file=sys.stderr)
    sets, missing = load_benchmark(args.dataset, args.data_root, args.ood, args.size)
    if len(sets) == 1:
        fail(f"no OOD set for {args.dataset} ({', '.join(missing) or 'none'} missing): name folders with --ood")
    results = {**describe("evaluate.py", args), "missing": missing, "models": {}}
    for name, net in nets.items():
        ref, _ = reference_and_critic(net, scores, args)
        results["models"][name], conf = evaluate(net, sets, args.dataset, args.device, scores, ref)
        columns |= {f"{name}: {score}": conf[score] for score in scores if score in ("ebo", "micl", args.score)}
    results["seconds"] = {"total": time.perf_counter() - start}
    print("\n".join(tables([results])))
    write(results_path, json.dumps(results, indent=1))
    if args.plot:
        plot(args.plot, columns, args.threshold_tpr)
    print(f"written: {results_path}{f', {args.plot}' if args.plot else ''}")


def reference_and_critic(net, scores, args):
    """-> (reference(), the critic NAME.critic.pt beside the network's NAME.pt or None).

    The critic's mean spares the training images where the scores need no more of them.
    """
    path, critic = Path(net.source).with_suffix(".critic.pt"), None
    if path.exists():
        try:
            critic = losses.MICL(**torch.load(path, map_location="cpu", weights_only=True))
            finite = all(value.isfinite().all() for value in critic.state_dict().values())
            fits = finite and critic.mean.shape == (net.fc.in_features,) and critic.tau.dim() == critic.log_a.dim() == 0
        except Exception:  # a text file, a truncated archive, other tensors
            fits = False
        if not fits:
            fail(f"{path} is not the critic of the weights beside it: remove it, and there is no probability")
    if any(score == "knn" or score in ("fdbd", "micl") and not critic for score in scores):
        images, _ = load(args.dataset, "train", args.data_root, args.size)
        return reference(net, args.dataset, images, args.device), critic
    return {"weight": net.fc.weight.detach().cpu().float(), "mean": critic and critic.mean}, critic


def flag(net, score, args):
    """Prints a CSV: path, score and verdict of each image of a folder, and MICL's probability if there is a critic."""
    images, paths, bad = read_folder(args.flag, args.size)
    ref, critic = reference_and_critic(net, [score], args)
    of_val, conf = (SCORES[score](*outputs(net, of, args.dataset, args.device), ref).double()
                    for of in (load(args.dataset, "val", args.data_root, args.size)[0], images))
    threshold = threshold_at(of_val, args.threshold_tpr)
    rows = [["path", score, "verdict", "p_id"]]
    for path, value in zip(paths, conf):
        p_id = f"{critic.probability(value):.4f}" if critic else ""
        rows.append([path, f"{value:.6f}", "ID" if value >= threshold else "OOD", p_id])
    rows += [[path, "", "unreadable", ""] for path in bad]
    columns = 4 if critic and score == "micl" else 3
    csv.writer(sys.stdout, lineterminator="\n").writerows(row[:columns] for row in rows)
    print(f"threshold {threshold:.6f}: {args.threshold_tpr:.0%} of the ID images reach it", file=sys.stderr)


if __name__ == "__main__":
    run(main)
