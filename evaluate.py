"""The benchmark: its images, its scores, its metrics.

    python evaluate.py runs/cifar100/student.pt --dataset cifar100 --data-root DIR              # all scores, all sets
    python evaluate.py runs/cifar100/ce.pt runs/cifar100/student.pt --dataset cifar100 --data-root DIR --plot out.png
    python evaluate.py student.pt --dataset cifar100 --data-root DIR --score ebo --ood FOLDER   # a row for your images
    python evaluate.py student.pt --dataset cifar100 --data-root DIR --flag FOLDER > flags.csv  # verdict per image
    python evaluate.py runs/photos/student.pt --dataset photos --flag FOLDER > flags.csv        # by your own classes

The protocol is that of OpenOOD v1.5 (arXiv 2306.09301): its lists, its transform, its metrics. A score here is a
confidence: higher = more in-distribution. In reading order: images, embedded images, network outputs, scores, metrics,
benchmark, command line.
"""
import argparse
import csv
import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
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
VERSIONS = {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}
NOT_IN_BENCHMARK = ("scenes",)  # measured where a list names it, not reported as missing where none does


def fail(message):
    """Ends the program as every mistake of a user does: one line on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_folder(path):
    """Makes a folder that is to be written to; ends the program where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        fail(f"cannot make {path} ({problem.strerror}): name another folder")
    if not os.access(path, os.W_OK):
        fail(f"cannot write to {path}: name another folder")


# ---------------------------------------------------------------------------------------------------------------------
# Images: every set is a uint8 tensor [N, 3, S, S] and an int64 tensor of labels [N], -1 for OOD. S = 32, but for a
# user's folder of classes with --size.


def to_tensor(image, size=SIZE):
    """PIL image of any size and mode -> uint8 [3, size, size] by OpenOOD's test transform.

    RGB, shorter side to `size` (bilinear, antialiased), centre crop; a photograph's EXIF rotation is not applied, as in
    OpenOOD. 16-bit gray is scaled to 8 bits: PIL would clip it.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    image = center_crop(resize(image.convert("RGB"), size), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(paths, size=SIZE):
    """Image files -> (uint8 [N, 3, size, size] of the readable, their indices in paths, {path: reason} of the rest)."""
    def read(path):
        if not os.path.isfile(path):
            return "neither a regular file nor a folder that can be listed"  # to open a named pipe would wait for ever
        try:
            with Image.open(path) as image:
                return to_tensor(image, size)
        except Exception as problem:  # a damaged file makes PIL raise any of a dozen types
            return f"{type(problem).__name__}: {problem}".splitlines()[0]

    with ThreadPoolExecutor() as pool:  # PIL decodes outside Python's lock
        results = list(pool.map(read, paths))
    good = [i for i, result in enumerate(results) if torch.is_tensor(result)]
    images = torch.stack([results[i] for i in good]) if good else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return images, good, {str(paths[i]): r for i, r in enumerate(results) if not torch.is_tensor(r)}


def read_list(list_path, image_root, cache_path):
    """The images of one OpenOOD list (lines `path label`) -> (images, labels), decoded once, then read from the cache.

    None if not one file of the list is there (a set that was not downloaded), which is said; ends the program if some
    are not there or cannot be decoded. The cache's key is a digest of the list and the transform: a changed list,
    another program's file, a truncated cache or one with altered images are all decoded anew.
    """
    text = list_path.read_text("utf-8-sig", "replace")
    key = hashlib.sha256(f"RGB, Resize({SIZE}), CenterCrop({SIZE})\n{text}".encode()).hexdigest()
    try:
        saved = torch.load(cache_path, weights_only=True)
        if saved["key"] == key and saved["crc"] == zlib.crc32(saved["images"].numpy().data):
            return saved["images"], saved["labels"]
    except Exception:  # absent, truncated, not ours: whatever it is, the image files decide
        pass
    try:
        rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
        paths, labels = [image_root / path for path, _ in rows], torch.tensor([int(label) for _, label in rows])
    except ValueError:
        fail(f"{list_path} is not a list: each line must be 'path label'")
    if not paths:
        fail(f"{list_path} is empty: fetch it again")
    absent = [path for path in paths if not path.is_file()]
    if len(absent) == len(paths):
        print(f"none of the {len(paths)} images of {list_path} is there, the first is {absent[0]}", file=sys.stderr)
        return None
    if absent:
        fail(f"{len(absent)} of the {len(paths)} images of {list_path} are not there, the first is {absent[0]}: "
             "fetch them or correct the list")
    print(f"decoding the {len(paths)} images of {list_path.name}, once", file=sys.stderr, flush=True)
    images, _, bad = decode(paths)
    if bad:
        path, reason = next(iter(bad.items()))
        fail(f"{len(bad)} of the {len(paths)} images of {list_path} cannot be decoded, the first is {path} ({reason}): "
             "fetch them again")
    try:
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        partial = cache_path.with_suffix(f".{os.getpid()}")  # renamed when whole: a killed run leaves no half cache
        torch.save({"key": key, "crc": zlib.crc32(images.numpy().data), "images": images, "labels": labels}, partial)
        partial.replace(cache_path)
    except (OSError, RuntimeError) as problem:  # a read-only data folder costs time, not the run
        print(f"not cached: {problem}", file=sys.stderr, flush=True)
    return images, labels


def from_torchvision(name, train, root):
    """The set `name` as torchvision downloads it into root -> (images, labels), or None where that fails."""
    try:
        if name in ("cifar10", "cifar100"):
            source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, train, download=True)
            return torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(source.targets)
        if name == "svhn":
            images = torch.from_numpy(datasets.SVHN(root, "test", download=True).data)
        elif name == "mnist":
            images = torch.stack([to_tensor(image) for image, _ in datasets.MNIST(root, train=False, download=True)])
        elif name == "texture":  # OpenOOD takes all 5,640 images of DTD
            parts = [datasets.DTD(root, part, download=True) for part in ("train", "val", "test")]
            images = torch.stack([to_tensor(image) for part in parts for image, _ in part])
        else:
            return None
        return images, torch.full((len(images),), -1)
    except Exception as problem:  # no network, a full disk, a server's refusal, scipy missing for SVHN
        print(f"torchvision did not bring {name}: {problem}".splitlines()[0], file=sys.stderr, flush=True)
        return None


def load(dataset, split, data_root=None):
    """One set -> (images uint8 [N, 3, S, S], labels int64 [N]); None for an OOD set that is not to be had.

    dataset: a key of ID_SETS; data_root is CIFAR's alone. split: 'train', 'val' or 'test' of the ID set, an OOD set of
    its groups, or 'val_tin', OpenOOD's OOD images for choices. Ends the program if an ID set is missing.
    """
    if dataset not in NAMED:
        return ID_SETS[dataset]["splits"].get(split)
    if dataset == "shapes":
        return draw_set(split)
    root, is_id = Path(data_root), split in ("train", "val", "test")
    lists = root / "benchmark_imglist" / dataset
    if not (root / "benchmark_imglist").is_dir():  # no OpenOOD tree
        loaded = from_torchvision(dataset if is_id else split, split == "train", root)
        if loaded is None:
            if is_id:
                fail(f"no {dataset} in {root} and none could be downloaded: put images_classic/ and benchmark_imglist/ "
                     "of OpenOOD v1.5 there, or try again with a network")
            return None
        images, labels = loaded
        if split == "val":  # the sizes of OpenOOD's lists: 1,000 to choose, 9,000 to report
            return images[:1000], labels[:1000]
        if split == "test":
            return images[1000:], labels[1000:]
        return images, labels if is_id else torch.full_like(labels, -1)
    name = f"{split}_{dataset}" if is_id else split if split == "val_tin" else f"test_{split}"
    list_path, loaded = lists / f"{name}.txt", None
    if list_path.is_file():
        loaded = read_list(list_path, root / "images_classic", root / "oal_cache" / dataset / f"{name}.pt")
    if loaded is None and is_id:
        fail(f"none of the images of {list_path} is there: put OpenOOD v1.5's into {root / 'images_classic'}"
             if list_path.is_file() else f"no list {list_path}: put OpenOOD v1.5's lists there")
    if is_id and not 0 <= int(loaded[1].min()) <= int(loaded[1].max()) < ID_SETS[dataset]["classes"]:
        fail(f"{list_path} holds labels outside 0..{ID_SETS[dataset]['classes'] - 1}: it is not a list of {dataset}")
    return loaded


def files_below(folder, above=()):
    """The files below a folder, links followed, but for a link to a folder that it lies in; and folders not listed."""
    here = os.path.realpath(folder)
    try:
        names = os.listdir(folder) if here not in above else []
    except OSError:
        return [folder]  # decode says that it cannot be read
    return sum((files_below(folder / name, (*above, here)) if (folder / name).is_dir() else [folder / name]
                for name in names), [])


def read_folder(folder, size=SIZE):
    """All images below a folder -> (uint8 [N, 3, size, size], their N paths, {path: reason} of the unreadable ones).

    Files count as images by their ending; how many do not is said. Ends the program if the folder is not there or has
    no readable image.
    """
    endings = datasets.folder.IMG_EXTENSIONS
    if not Path(folder).is_dir():
        fail(f"{folder} is not a folder: name one that holds images")
    files = files_below(Path(folder))
    paths = sorted(path for path in files if path.name.lower().endswith(endings) or path.is_dir())
    if not paths:
        fail(f"{folder} holds no image, {len(files)} other files: an image must end in {' '.join(endings)}")
    images, good, bad = decode(paths, size)
    for path, reason in bad.items():
        print(f"unreadable: {path} ({reason})", file=sys.stderr, flush=True)
    print(f"{folder}: {len(good)} images, {len(bad)} unreadable, {len(files) - len(paths)} other files",
          file=sys.stderr, flush=True)
    if not good:
        fail(f"none of the {len(paths)} images of {folder} can be decoded: replace them")
    return images, [str(paths[i]) for i in good], bad


def read_classes(folder, size=SIZE):
    """A user's folder of classes -> an entry like those of ID_SETS, with the classes' names and the images of 'splits'.

    A class is all that lies below train/CLASS, classes sorted by name. A split val/ or test/ that is not there takes a
    tenth of each class of train/ (one image of a class of 4 to 9), chosen by a digest of the path below the folder:
    the same for every program and seed, and a new image moves hardly another. Mean and std are the training images'.
    Ends the program on a class of fewer than 2 training images, one class alone, or a class that train/ lacks.
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
          f"{len(splits['val'][0])} for thresholds, {len(splits['test'][0])} to test", file=sys.stderr, flush=True)
    levels = torch.arange(256).double() / 255
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.transpose(0, 1)]).double()
    mean, square = (counts @ power / counts[0].sum() for power in (levels, levels ** 2))                # [3] each
    std = (square - mean ** 2).clamp_min(1e-4).sqrt()                 # of images all in one colour too
    return dict(classes=len(names), names=names, mean=tuple(mean.tolist()), std=tuple(std.tolist()), groups={},
                size=size, splits=splits)


def id_set(args):
    """The entry in ID_SETS of --dataset, added first where that is a folder."""
    if args.dataset not in NAMED:
        ID_SETS[args.dataset] = read_classes(args.dataset, args.size)
    return ID_SETS[args.dataset]


# ---------------------------------------------------------------------------------------------------------------------
# Embedded images: drawn in a second, so that the whole method runs with no download.

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


def uniform(n, low, high, generator):
    """[n, 1, 1] draws between low and high, to be broadcast over the pixels of n images."""
    return low + (high - low) * torch.rand(n, 1, 1, generator=generator)


def draw_set(split):
    """An embedded set -> (images uint8 [N, 3, 32, 32], labels int64 [N]), the same on every machine and for every seed.

    ID classes: 4 shapes x 2 textures (plain, checked), any colour, place, size and turn, on a background gradient with
    clutter and noise. 'held_out' (near-OOD): 4 other shapes drawn the same way. Far-OOD: 'noise', 'stripes', 'flat',
    'gradient', 'blobs'. None for a split that does not exist.
    """
    names = ("train", "val", "test", "held_out", "val_held_out", *ID_SETS["shapes"]["groups"]["far"])
    if split not in names:
        return None
    n = SHAPES_SIZES.get(split, 500)
    g = torch.Generator().manual_seed(names.index(split))
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")  # [H, W]
    turn = uniform(n, 0, 2 * math.pi, g)
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()  # [N, H, W], turned axes
    first = torch.rand(n, 3, 1, 1, generator=g)                                       # two colours per image, apart
    second = (first + 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=g)) % 1            # by 0.3 or more in each channel
    labels = torch.full((n,), -1)
    if split == "noise":
        images = torch.rand(n, 3, SIZE, SIZE, generator=g)
    elif split == "stripes":
        on = ((along * uniform(n, 3, 12, g)).sin() > 0)[:, None]
        images = torch.where(on, first, second)
    elif split == "flat":
        images = first.expand(n, 3, SIZE, SIZE)
    elif split == "gradient":
        images = torch.lerp(first, second, along[:, None] / 2 + 0.5)
    elif split == "blobs":
        coarse = torch.rand(n, 3, 5, 5, generator=g)
        images = F.interpolate(coarse, SIZE, mode="bicubic")
    else:
        shapes = HELD_OUT_SHAPES if "held_out" in split else SHAPES
        labels = torch.randint(8, (n,), generator=g)
        # Background: a faint gradient; clutter: one small square anywhere; then the shape over it; then noise.
        images = torch.lerp(first, second, 0.1 * (1 + along[:, None]))
        u, v = x - uniform(n, -1, 1, g), y - uniform(n, -1, 1, g)
        clutter = torch.maximum(u.abs(), v.abs()) < uniform(n, 0.05, 0.2, g)
        images = torch.where(clutter[:, None], torch.rand(n, 3, 1, 1, generator=g), images)
        scale, du, dv = uniform(n, 0.6, 0.9, g), uniform(n, -0.2, 0.2, g), uniform(n, -0.2, 0.2, g)
        u, v = (along - du) / scale, (across - dv) / scale                            # the shape's own coordinates
        r = (u ** 2 + v ** 2).sqrt()
        masks = torch.stack([inside(u, v, r) for inside in shapes.values()])          # [4, N, H, W]
        mask = masks[labels // 2, torch.arange(n)]                                    # [N, H, W]
        checks = ((u * 6).sin() * (v * 6).sin() > 0) & (labels % 2 == 1)[:, None, None]
        images = torch.where((mask & ~checks)[:, None], second, images)
        images = torch.where((mask & checks)[:, None], torch.lerp(first, second, 0.4), images)
        images = images + 0.03 * torch.randn(images.shape, generator=g)
        if "held_out" in split:
            labels = torch.full((n,), -1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# ---------------------------------------------------------------------------------------------------------------------
# From images to network outputs.


def best_device():
    """'cuda', 'mps' or 'cpu': the first that is there."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def normalize(images, dataset):
    """uint8 [B, 3, S, S] -> float32 [B, 3, S, S] with the ID set's mean and standard deviation, channels last."""
    mean, std = (torch.tensor(ID_SETS[dataset][key], device=images.device)[:, None, None] for key in ("mean", "std"))
    return images.float().div(255).sub(mean).div(std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def stage2(net, images, dataset, device):
    """Images uint8 [N, 3, S, S] -> batches of (stage-2 maps [B, C, S/2, S/2], features [B, D]), in eval mode.

    Convolutions run in bf16 where models.autocast says so, pooling always in float32.
    """
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


def check_outputs(net, *outputs):
    """Ends the program where outputs [B, K] of the network, or the sums of their squares, are not finite: scores of
    such are no verdict. Finite weights are no guarantee, as a negative variance shows."""
    if not all(values.square().sum(1).isfinite().all() for values in outputs):
        fail(f"{getattr(net, 'source', 'the network')} gives outputs that are not finite: train it again with a lower "
             "rate, or take another file")


# What a pickled numpy scalar, such as an accuracy, is made of: its function, as numpy 1 and 2 name it, and types.
NUMPY_SCALARS = [*((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
                 np.dtype, *{type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]}]


def load_network(path, num_classes, arch=None):
    """A checkpoint file -> the network, on the CPU in eval mode; ends the program if it is not one of num_classes.

    Takes a state_dict, plain or the one dict of tensors in a dict, whatever its key; names that begin with 'module.',
    'model.' or '_orig_mod.', and pytorch-cifar's 'linear.' for 'fc.'; numpy scalars beside the weights. The arch is
    read from the width of the first convolution, and must be `arch` where that is given.
    """
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a text file, a truncated archive, a pickle of anything but tensors
        if getattr(problem, "filename", None):
            fail(f"no checkpoint {path} ({problem.strerror}): name a file of weights")
        foreign = re.search(r"GLOBAL (\S+)", str(problem))
        reason = f"it needs the code of {foreign[1]}" if foreign else "cut short, or text"
        fail(f"{path} is not a file of weights ({reason}): give a state_dict saved by torch.save")
    is_state = lambda part: isinstance(part, dict) and part and all(map(torch.is_tensor, part.values()))
    inside = {"": content} if is_state(content) else {
        key: part for key, part in (content.items() if isinstance(content, dict) else ()) if is_state(part)}
    if len(inside) != 1:
        fail(f"{path} holds {', '.join(map(str, inside)) or 'no state_dict'}: give one dict of tensors, saved by "
             "torch.save")
    state = {re.sub(r"^linear\.", "fc.", re.sub(r"^((module|model|_orig_mod)\.)+", "", str(name))): value.to_dense()
             for part in inside.values() for name, value in part.items()}
    if any(value.is_floating_point() and not torch.isfinite(value).all() for value in state.values()):
        fail(f"{path} holds weights that are not finite: train it again with a lower rate")
    widths = {width: name for name, (_, width) in models.ARCHS.items()}
    found = widths.get(len(state["conv1.weight"]) if "conv1.weight" in state and state["conv1.weight"].dim() else None)
    if found is None or (arch and arch != found):
        fail(f"{path} is a checkpoint of {found or 'an unknown arch'}: expected {arch or ' or '.join(models.ARCHS)}")
    net = models.build(found, num_classes)
    if "fc.weight" in state and state["fc.weight"].dim() and len(state["fc.weight"]) != num_classes:
        fail(f"{path} was trained for {len(state['fc.weight'])} classes: the dataset has {num_classes}")
    try:
        net.load_state_dict(state)
    except RuntimeError as problem:
        fail(f"{path} does not fit {found}: {' '.join(str(problem).split())[:200]}")
    net.source = path
    return net.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Scores: (logits [N, C], features [N, D], ref) -> confidence [N], higher = more in-distribution. `ref` is what a score
# may know of the network and its training set: ref = dict(weight [C, D], features [M, D], mean [D] of the features).


def msp(logits, features=None, ref=None):
    """Maximum softmax probability (Hendrycks & Gimpel, arXiv 1610.02136)."""
    return logits.double().softmax(1).amax(1)  # float64: confident float32 probabilities would tie at 1


def mls(logits, features=None, ref=None):
    """Maximum logit (Hendrycks et al., arXiv 1911.11132)."""
    return logits.amax(1)


def ebo(logits, features=None, ref=None):
    """Negative free energy log sum exp(logits) (Liu et al., arXiv 2010.03759, equation 4, T = 1; OAL's own score)."""
    return logits.logsumexp(1)


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


SCORES = {"msp": msp, "mls": mls, "ebo": ebo, "knn": knn, "fdbd": fdbd, "micl": micl}
NEED_TRAINING_SET = ("knn", "fdbd", "micl")
NEED_MEAN = ("fdbd", "micl")  # of it no more than the mean feature, which a critic's file holds


# ---------------------------------------------------------------------------------------------------------------------
# Metrics.


def detection_metrics(conf_id, conf_ood):
    """How well a confidence separates ID from OOD, as OpenOOD v1.5 computes it (evaluators/metrics.py), in percent.

    conf_id [N], conf_ood [M]: tensors or arrays, higher = more in-distribution. Returns a dict: 'auroc'; 'aupr_in' and
    'aupr_out', trapezoidal areas with ID or OOD as the positive class; 'fpr95', the share of ID flagged once 95 % of
    OOD is caught; 'fpr95_id', the share of OOD accepted once 95 % of ID is accepted. Equal confidences count as one
    threshold, as in scikit-learn. Raises ValueError on an empty input or a NaN.
    """
    conf_id, conf_ood = (torch.as_tensor(conf).detach().cpu().double().flatten().numpy()
                         for conf in (conf_id, conf_ood))
    if not len(conf_id) or not len(conf_ood):
        raise ValueError("detection_metrics needs at least one ID and one OOD confidence")
    conf = np.concatenate([conf_id, conf_ood])
    if np.isnan(conf).any():
        raise ValueError("detection_metrics: a confidence is NaN")
    order = np.argsort(conf)
    conf, ood = conf[order], (order >= len(conf_id)).astype(np.float64)
    ends = np.flatnonzero(np.r_[conf[1:] != conf[:-1], True])         # one group per distinct confidence, ascending
    caught = np.cumsum(ood)[ends]                                     # OOD positive: thresholds from the lowest up
    flagged = ends + 1 - caught
    kept, let_in = ((n[-1] - np.r_[0, n[:-1]])[::-1] for n in (flagged, caught))  # ID positive: from the highest down
    return {"auroc": 100 * np.trapezoid(np.r_[0, caught], np.r_[0, flagged]) / caught[-1] / flagged[-1],
            "aupr_in": 100 * average_precision(kept, let_in),
            "aupr_out": 100 * average_precision(caught, flagged),
            "fpr95": 100 * fpr_at_recall(caught, flagged, 0.95),
            "fpr95_id": 100 * fpr_at_recall(kept, let_in, 0.95)}


def average_precision(true, false):
    """Trapezoidal area under precision over recall, from cumulative counts of true and false positives."""
    recall, precision = np.r_[0, true / true[-1]], np.r_[1, true / (true + false)]
    return np.trapezoid(precision, recall)


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


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark.


def load_benchmark(dataset, data_root, folders=()):
    """Every test set -> ({'id': (images, labels), name: (images, labels), ...}, names of the missing OOD sets).

    Folders of a user's images become sets under the folder's full path; what is unreadable in them is said.
    """
    yours = {}
    for folder in folders:
        images, paths, _ = read_folder(folder, ID_SETS[dataset].get("size", SIZE))
        yours[os.path.abspath(folder)] = images, torch.full((len(paths),), -1)
    sets, missing = {"id": load(dataset, "test", data_root)}, []
    for name in sum(ID_SETS[dataset]["groups"].values(), ()):
        loaded = load(dataset, name, data_root)
        if loaded is not None:
            sets[name] = loaded
        elif name not in NOT_IN_BENCHMARK:
            missing.append(name)
    return {**sets, **yours}, missing


def reference(net, dataset, images, device, critic=None):
    """What scores may know of a network (see 'Scores'): its outputs on the training images where they are given, else
    the mean that its critic's file holds."""
    ref = {"weight": net.fc.weight.detach().cpu().float()}
    if images is not None:
        ref["features"] = outputs(net, images, dataset, device)[1]
        ref["mean"] = ref["features"].mean(0)
    elif critic:
        ref["mean"] = critic.mean
    return ref


def load_critic(path, dim):
    """The critic file beside weights NAME.pt, NAME.critic.pt -> losses.MICL; None where there is none."""
    path = Path(path).with_suffix(".critic.pt")
    if not path.exists():
        return None
    try:
        critic = losses.MICL(**torch.load(path, map_location="cpu", weights_only=True))
        if critic.mean.shape == (dim,) and all(v.isfinite().all() for v in critic.state_dict().values()):
            return critic
    except Exception:  # a text file, a truncated archive, other tensors
        pass
    fail(f"{path} is not the critic of the weights beside it: remove it, and the score goes without a probability")


def confidences(net, images, dataset, device, scores, ref):
    """One forward pass over images [N] -> ({score: confidence [N]}, predictions int64 [N])."""
    logits, features = outputs(net, images, dataset, device)
    return {name: SCORES[name](logits, features, ref).double() for name in scores}, logits.argmax(1)


def evaluate(net, sets, dataset, device, scores, ref):
    """One network on load_benchmark's sets and its reference() -> (entry of results.json, {score: {set: conf [N]}})."""
    names, sizes = list(sets), [len(images) for images, _ in sets.values()]
    conf, predicted = confidences(net, torch.cat([images for images, _ in sets.values()]), dataset, device, scores, ref)
    correct = predicted[:sizes[0]] == sets["id"][1]
    entry, by_set = {"id_acc": 100 * correct.double().mean().item(), "n_id": sizes[0], "scores": {}}, {}
    for score in scores:
        by_set[score] = dict(zip(names, conf[score].split(sizes)))
        rows = {}
        for name in names[1:]:
            group = next((g for g, members in ID_SETS[dataset]["groups"].items() if name in members), "yours")
            found = detection_metrics(by_set[score]["id"], by_set[score][name])
            rows[name] = {"group": group, "n": len(by_set[score][name]), **{k: float(v) for k, v in found.items()}}
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


RUN_WORDS = ("--seed", "--out", "--data-root", "--device", "--ce", "--teacher")  # of a run, not of a row


def tables(runs, scores):
    """results.json dicts -> the lines of two Markdown tables, means with standard deviations (n - 1) over a row's runs.

    A row is the student of one command, whatever its RUN_WORDS, under the words that not all commands begin with. The
    cross-entropy networks from which students started, one a seed, are a row of their own; a network measured by
    evaluate.py has a row under its name.
    """
    commands = []  # without RUN_WORDS, a list of words each
    for results in runs:
        words = iter(shlex.split(results["command"].replace("=", " ")))
        commands.append([word for word in words if word != "--resume" and not (word in RUN_WORDS and next(words, ""))])
    base = os.path.commonprefix([words for words in commands if words[0] == "train.py"])
    rows = {}  # label -> {seed, or number of the run: entry of results.json's models}
    for i, (results, words) in enumerate(zip(runs, commands)):
        for name, entry in results["models"].items():
            options = f"`{' '.join(words[len(base):])}`" if words[len(base):] else "no option"
            label = (name if "seed" not in results else options if name == "oal" else
                     f"start: cross-entropy, {results['arch']}")
            held = rows.setdefault(label, {}).setdefault(results.get("seed", f"run {i}"), entry)
            if held["id_acc"] != entry["id_acc"]:
                fail(f"two runs with different figures are seed {results.get('seed')} of {label}: leave one out")
    entries = [entry for row in rows.values() for entry in row.values()]
    scores = [score for score in scores if all(score in entry["scores"] for entry in entries)]
    sets, *others = ({name: found["n"] for name, found in entry["scores"][scores[0]]["sets"].items()}
                     for entry in entries)
    if any(other != sets for other in others):
        fail("the runs were measured on different OOD sets: make a table of each kind")

    def cell(values):
        return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")

    yield f"| `{' '.join(base)}` | runs | accuracy | score | near AUROC | near FPR95 | far AUROC | far FPR95 |"
    yield "|---" * 8 + "|"
    for name, row in rows.items():
        for score in scores:
            start = [name, len(row), cell([e["id_acc"] for e in row.values()])] if score == scores[0] else [""] * 3
            means = [cell([e["scores"][score][group][metric] for e in row.values()])
                     if group in entries[0]["scores"][score] else "" for group in ("near", "far")
                     for metric in ("auroc", "fpr95")]
            yield "| " + " | ".join(map(str, [*start, score, *means])) + " |"
    if not sets:  # a folder of classes without --ood
        return
    yield ""
    yield "| AUROC | score | " + " | ".join(f"{title(name, sets)} ({n})" for name, n in sets.items()) + " |"
    yield "|---" * (2 + len(sets)) + "|"
    for name, row in rows.items():
        for score in scores:
            means = [cell([e["scores"][score]["sets"][one]["auroc"] for e in row.values()]) for one in sets]
            yield "| " + " | ".join([name if score == scores[0] else "", score, *means]) + " |"
    missing = sorted({name for results in runs for name in results["missing"]})
    if missing:
        yield f"\nmissing, in no mean: {', '.join(missing)}"


def collect(paths):
    """results.json files -> the lines of README's tables."""
    try:
        return list(tables([json.loads(Path(path).read_text()) for path in paths], ("ebo", "fdbd", "micl")))
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as problem:
        fail(f"--collect: not all of {', '.join(map(str, paths))} are results.json files of one benchmark "
             f"({type(problem).__name__} {problem}): leave out those that are not")


def check_plot(path):
    """Ends the program, before it has worked for minutes, where the picture could not be drawn at its end."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        fail("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        fail(f"--plot {path}: the file must end in .png, .pdf or .svg")
    make_folder(Path(path).parent)


def plot(path, columns, tpr):
    """{heading: {set: conf [N]}} -> a picture of histograms: a row per OOD set, ID beside it, the threshold, AUROC."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = [name for name in next(iter(columns.values())) if name != "id"]
    figure, axes = pyplot.subplots(len(names), len(columns), squeeze=False,
                                   figsize=(3.2 * len(columns), 1.6 * len(names)))
    for row, name in zip(axes, names):
        for axis, (heading, conf) in zip(row, columns.items()):
            both = np.concatenate([conf["id"], conf[name]])
            bins = np.linspace(*np.quantile(both, [0.001, 0.999]), 60)
            for one, label in (("id", "ID"), (name, title(name, names))):
                axis.hist(conf[one].numpy(), bins, density=True, alpha=0.6, label=label)
            axis.axvline(threshold_at(conf["id"], tpr), color="black", linewidth=1)
            axis.set_title(f"{heading}, AUROC {detection_metrics(conf['id'], conf[name])['auroc']:.1f}", fontsize=9)
            axis.set_yticks([])
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def describe(dataset):
    """What results.json says of the ID set: its name, and the names of a folder's classes."""
    return {"dataset": dataset, **({} if dataset in NAMED else {"classes": ID_SETS[dataset]["names"]})}


# ---------------------------------------------------------------------------------------------------------------------
# Command line.


def number(kind, low, high):
    """An argparse type: a finite number of the kind, int or float, from low to high."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole' if kind is int else 'finite'} number from "
                                             f"{low} to {high}")
        return value
    return read


POSITIVE, SEED, FINITE = number(int, 1, 10 ** 9), number(int, 0, 10 ** 17), number(float, -math.inf, math.inf)


def check_device(name):
    """Ends the program where torch cannot compute on the device."""
    try:
        torch.zeros(1, device=name) + 1
    except (RuntimeError, AssertionError) as problem:  # torch built without CUDA raises an AssertionError
        fail(f"no device {name}: {str(problem).splitlines()[0]}")


def add_data_options(parser):
    """The options of every program that name the ID set; check_data reads them."""
    parser.add_argument("--dataset", default="shapes", metavar="{" + ",".join(NAMED) + ",FOLDER}",
                        help="the ID set; FOLDER holds your images as train/CLASS/..., and val/ and test/ if you like")
    parser.add_argument("--size", type=int, choices=(32, 64, 128), default=SIZE,
                        help="side of the images of a FOLDER, the same for every program (32)")
    parser.add_argument("--data-root", help="folder in the OpenOOD v1.5 layout, or where torchvision downloads (data)")


def check_data(args):
    """The data root. Ends the program where --dataset, or --data-root if named, is not there; `data` is made later."""
    if args.dataset in NAMED and args.size != SIZE:
        fail(f"--size {args.size}: the images of {args.dataset} are {SIZE} wide: leave it out")
    if args.dataset not in NAMED and not Path(args.dataset).is_dir():
        fail(f"no dataset {args.dataset}: choose one of {', '.join(NAMED)}, or a folder that holds train/CLASS/...")
    if args.data_root is not None and not Path(args.data_root).is_dir():
        fail(f"no data root {args.data_root}: name a folder that holds images_classic/ and benchmark_imglist/")
    return args.data_root or "data"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("checkpoints", nargs="*", help="one or more files of weights, each a column of the result")
    add_data_options(parser)
    parser.add_argument("--score", choices=[*SCORES, "all"], default="all")
    parser.add_argument("--ood", nargs="+", default=[], metavar="FOLDER", help="folders of your own OOD images")
    parser.add_argument("--flag", metavar="FOLDER",
                        help="print path, score (micl for all) and verdict of each image, CSV")
    parser.add_argument("--threshold-tpr", type=number(float, 1e-6, 1), metavar="T", default=0.95,
                        help="the threshold of --flag and --plot accepts this share of the ID images (0.95)")
    parser.add_argument("--plot", metavar="FILE.png", help="histograms of the score (ebo and micl for all)")
    parser.add_argument("--collect", nargs="+", metavar="RESULTS.json",
                        help="print README's tables of these runs and stop")
    parser.add_argument("--out", default="runs/evaluate", help="folder for results.json")
    parser.add_argument("--device", default=best_device())
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="surrogateescape")  # a file name that is not UTF-8 is printed as it is
    if args.collect:
        print("\n".join(collect(args.collect)))
        return
    if not args.checkpoints:
        fail("no checkpoints: name one or more files of weights, or runs with --collect")
    check_device(args.device)
    data_root = check_data(args)
    classes, nets, critics = id_set(args)["classes"], {}, {}
    for path in args.checkpoints:
        name = Path(path).stem if Path(path).stem not in nets else str(path)
        nets[name] = load_network(path, classes)
        critics[name] = load_critic(path, nets[name].fc.in_features)
    scores = list(SCORES) if args.score == "all" else [args.score]
    lists = Path(data_root) / "benchmark_imglist"
    train_list = lists / args.dataset / f"train_{args.dataset}.txt"
    if args.score == "all" and args.dataset in NAMED[1:] and lists.is_dir() and not train_list.is_file():
        known = () if None in critics.values() else NEED_MEAN
        scores = [score for score in SCORES if score not in NEED_TRAINING_SET or score in known]
        print(f"no training images of {args.dataset}: {', '.join(set(SCORES) - set(scores))} left out", file=sys.stderr)
    if args.flag:
        if len(nets) > 1:
            fail("--flag takes one checkpoint")
        flag(*nets.values(), *critics.values(), "micl" if args.score == "all" else args.score, args, data_root)
        return

    results_path = Path(args.out) / "results.json"
    if results_path.exists() and '"command": "evaluate.py' not in results_path.read_text(errors="replace"):
        fail(f"{results_path} holds another program's results: name another folder with --out")
    make_folder(args.out)
    if args.plot:
        check_plot(args.plot)
    start = time.perf_counter()
    sets, missing = load_benchmark(args.dataset, data_root, args.ood)
    if len(sets) == 1:
        fail(f"no OOD set for {args.dataset}: nothing to detect ({', '.join(missing) or 'none'} missing); name folders "
             "with --ood")
    results = {**describe(args.dataset), "command": shlex.join(["evaluate.py", *sys.argv[1:]]), "device": args.device,
               "versions": VERSIONS, "missing": missing, "models": {}}
    columns = {}
    for name, net in nets.items():
        ref = reference(net, args.dataset, train_images(scores, critics[name], args, data_root), args.device,
                        critics[name])
        results["models"][name], conf = evaluate(net, sets, args.dataset, args.device, scores, ref)
        columns |= {f"{name}: {score}": conf[score] for score in scores if score in ("ebo", "micl", args.score)}
    results["seconds"] = {"total": time.perf_counter() - start}
    print("\n".join(tables([results], SCORES)))
    results_path.write_text(json.dumps(results, indent=1))
    if args.plot:
        plot(args.plot, columns, args.threshold_tpr)
    print(f"written: {results_path}{f', {args.plot}' if args.plot else ''}")


def train_images(scores, critic, args, data_root):
    """The training images where one of the scores needs them: a critic's file spares some of them."""
    needed = [score for score in scores if score in NEED_TRAINING_SET and not (critic and score in NEED_MEAN)]
    return load(args.dataset, "train", data_root)[0] if needed else None


def flag(net, critic, score, args, data_root):
    """Prints a CSV: path, score and verdict of each image of a folder, and MICL's probability if there is a critic."""
    p_id = critic.probability if critic and score == "micl" else None
    images, paths, bad = read_folder(args.flag, args.size)
    ref = reference(net, args.dataset, train_images([score], critic, args, data_root), args.device, critic)
    of_val, conf = (confidences(net, of, args.dataset, args.device, [score], ref)[0][score]
                    for of in (load(args.dataset, "val", data_root)[0], images))
    threshold = threshold_at(of_val, args.threshold_tpr)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", score, "verdict", *(["p_id"] if p_id else [])])
    for path, value in zip(paths, conf):
        verdict = "ID" if value >= threshold else "OOD"
        writer.writerow([path, f"{value:.6f}", verdict, *([f"{p_id(value):.4f}"] if p_id else [])])
    for path in bad:
        writer.writerow([path, "", "unreadable", *([""] if p_id else [])])
    print(f"threshold {threshold:.6f}: {args.threshold_tpr:.0%} of the ID images reach it", file=sys.stderr)


if __name__ == "__main__":
    main()
