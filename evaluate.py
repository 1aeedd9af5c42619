"""The benchmark: image sets, scores, metrics, tables; and the detector that a trained network is.

    python evaluate.py runs/cifar100/student.pt --dataset cifar100 --data-root DIR   # all sets
    python evaluate.py runs/cifar100/ce.pt runs/cifar100/student.pt --dataset cifar100 \\
        --data-root DIR --ood FOLDER --plot out.png                                  # and yours
    python evaluate.py runs/photos/student.pt --flag FOLDER > flags.csv     # verdict per image
    python evaluate.py --collect runs/*/results.json                        # tables over seeds

Lists, transform and metrics are those of OpenOOD v1.5 (arXiv 2306.09301). A score here is a
confidence: higher = more in-distribution.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision import datasets

import losses
import models
from models import fail

SIZE = 32
CIFAR_FAR = ("mnist", "svhn", "texture", "places365")
SHAPE_FAR = ("noise", "stripes", "flat", "gradient", "blobs")
# Names of the classes, in the order of their labels.
SHAPE_CLASSES = [f"{texture} {shape}" for shape in ("disc", "square", "triangle", "cross")
                 for texture in ("plain", "checked")]
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
# ID sets with a name: classes, mean and std of the images, near-OOD sets, far-OOD sets.
NAMED = {
    "shapes": (SHAPE_CLASSES, (0.5,) * 3, (0.25,) * 3, ("held_out",), SHAPE_FAR),
    "cifar10": (CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
                ("cifar100", "tin"), CIFAR_FAR),
    "cifar100": (CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761),
                 ("cifar10", "tin"), CIFAR_FAR)}


def run(main):
    """Runs a program; what a user or the machine can cause ends it in one line, without traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it was closed
    if hasattr(sys.stdout, "reconfigure"):            # a notebook's has no such method
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # odd file names
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130)
    except FloatingPointError as problem:
        fail(f"{problem}: train it again, on more images or with a lower --w-* weight")
    except OSError as problem:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # what a broken stdout still holds would fail again at exit
        if not isinstance(problem, BrokenPipeError):
            fail(problem)
        os.dup2(null, 2)
        raise SystemExit(141)
    except (MemoryError, RuntimeError) as problem:
        says = f"{type(problem).__name__}: {problem}".lower()
        words = ("memoryerror", "allocate memory", "out of memory", "alloc_failed", "bad_alloc",
                 "start new thread")
        if not any(word in says for word in words):
            raise
        fail("no memory left: take a smaller --size or another --device; --resume goes on with a run")


def write(path, content):
    """Writes a file whole or not at all: text, bytes, or anything else by torch.save.

    An OSError names the file.
    """
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


# --- Images. --------------------------------------------------------------------------------------


class ImageSet(NamedTuple):
    """An ID set and its OOD sets."""
    name: str
    classes: list   # names, in the order of the labels
    mean: torch.Tensor  # [3], of the training images from 0 to 1
    std: torch.Tensor   # [3]
    groups: dict    # {"near", "far", "yours": names of OOD sets}; "yours" is in no mean
    splits: dict    # {"train", "val", "test" or an OOD set: (uint8 [N, 3, S, S], int64 [N])}
    sources: dict   # {split: "list", "torchvision", "drawn" or "folder"}

    def missing(self):
        return [name for group in ("near", "far") for name in self.groups[group]
                if name not in self.splits]


def to_tensor(image, size=SIZE):
    """PIL image of any size and mode -> uint8 [3, size, size] by OpenOOD's test transform."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    image, sides = image.convert("RGB"), np.array(image.size)
    resized = size * sides // sides.min()
    start = ((resized - size) / 2).round().astype(int)
    if resized.max() <= 32 * size:
        image = image.resize(resized.tolist(), Image.Resampling.BILINEAR)
        image = image.crop([*start, *(start + size)])
    else:  # long and thin, resized it would fill the memory: the crop alone, within 1 of 255
        box = [*(start * sides / resized), *((start + size) * sides / resized)]
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(paths, size=SIZE):
    """Image files -> ([(path, uint8 [3, size, size])], {path: reason} of the unreadable)."""
    brightest = []  # of each 16-bit file

    def read(path):
        if not os.path.isfile(path):
            return "not a regular file"  # to open a named pipe would wait for ever
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):
                    brightest.append(int(np.asarray(image).max()))
                return to_tensor(image, size)
        except Exception as problem:  # a damaged file makes PIL raise any of a dozen types
            return f"{type(problem).__name__}: {problem}".splitlines()[0]
    with ThreadPoolExecutor() as pool:  # PIL decodes outside Python's lock
        results = pool.map(read, paths)
        results = [(str(path), next(results)) for path in models.progress("images read", paths)]
    if brightest and max(brightest) < 16384:
        print(f"note: the largest value of the {len(brightest)} 16-bit images is {max(brightest)} "
              "of 65535: they are read as dark; scale them to 16 bits", file=sys.stderr)
    return ([(path, result) for path, result in results if torch.is_tensor(result)],
            {path: result for path, result in results if not torch.is_tensor(result)})


def read_list(list_path, image_root, cache_path, size=SIZE):
    """An OpenOOD list (lines `path label`) -> (images, labels), decoded once, then from a cache.

    None if not one of its files is there. A changed list or a damaged cache is decoded anew.
    """
    text = list_path.read_text("utf-8-sig", "replace")
    key = hashlib.sha256(f"RGB, Resize({size}), CenterCrop({size})\n{text}".encode()).hexdigest()
    try:
        saved = torch.load(cache_path, weights_only=True)
        if saved["key"] == key and saved["crc"] == zlib.crc32(saved["images"].numpy().data):
            return saved["images"], saved["labels"]
    except Exception:  # absent, truncated, another program's: the image files decide
        pass
    try:
        rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
        paths = [image_root / path for path, _ in rows]
        labels = torch.tensor([int(label) for _, label in rows])
    except ValueError:
        paths = []
    if not paths:
        fail(f"{list_path} is not a list, or empty: each line must be 'path label'")
    if not any(path.is_file() for path in paths):
        print(f"none of the {len(paths)} images of {list_path} is there, the first is {paths[0]}",
              file=sys.stderr)
        return None
    print(f"decoding the {len(paths)} images of {list_path.name}, once", file=sys.stderr)
    good, bad = decode(paths, size)
    for path, reason in bad.items():
        fail(f"{len(bad)} of the {len(paths)} images of {list_path} cannot be read, the first is "
             f"{path} ({reason})")
    images = torch.stack([image for _, image in good])
    try:
        write(cache_path, {"key": key, "crc": zlib.crc32(images.numpy().data), "images": images,
                           "labels": labels})
    except OSError as problem:  # a read-only data folder costs time, not the run
        print(f"not cached: {problem}", file=sys.stderr)
    return images, labels


def from_torchvision(name, split, root, size):
    """A set as torchvision downloads it -> (images, labels), or None where that fails.

    Of an ID set 'val' is the first 1,000 test images and 'test' the others: not OpenOOD's lists.
    """
    try:
        if name in ("cifar10", "cifar100"):
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            sources = [kind(root, split == "train", download=True)]
        elif name == "svhn":
            sources = [datasets.SVHN(root, "test", download=True)]
        elif name == "mnist":
            sources = [datasets.MNIST(root, train=False, download=True)]
        elif name == "texture":
            sources = [datasets.DTD(root, part, download=True) for part in ("train", "val", "test")]
        else:
            return None
        images = torch.stack([to_tensor(image, size) for source in sources for image, _ in source])
    except Exception as problem:  # no network, a server's refusal, scipy missing for SVHN
        print(f"torchvision did not bring {name}: {problem}".splitlines()[0], file=sys.stderr)
        return None
    if split not in ("train", "val", "test"):
        return images, torch.full((len(images),), -1)
    part = {"train": slice(None), "val": slice(1000), "test": slice(1000, None)}[split]
    return images[part], torch.tensor(sources[0].targets)[part]


def read_split(dataset, split, data_root, size):
    """One split of a named set -> ((images, labels) or None for a missing OOD set, its source)."""
    if dataset == "shapes":
        return draw_set(split, size), "drawn"
    root, is_id = Path(data_root), split in ("train", "val", "test")
    name = f"{split}_{dataset}" if is_id else split if split.startswith("val_") else f"test_{split}"
    list_path = root / "benchmark_imglist" / dataset / f"{name}.txt"
    loaded, source = None, "list"
    if not (root / "benchmark_imglist").is_dir():  # not an OpenOOD tree
        source = "torchvision"
        loaded = from_torchvision(dataset if is_id else split, split, root, size)
    elif list_path.is_file():
        cache = root / "oal_cache" / dataset / (f"{name}.pt" if size == SIZE else f"{name}_{size}.pt")
        loaded = read_list(list_path, root / "images_classic", cache, size)
    if is_id and loaded is None:
        fail(f"no images of {list_path}: put images_classic/ and benchmark_imglist/ of OpenOOD v1.5 "
             f"into {root}")
    if is_id and not 0 <= int(loaded[1].min()) <= int(loaded[1].max()) < len(NAMED[dataset][0]):
        fail(f"{list_path} holds labels outside 0..{len(NAMED[dataset][0]) - 1}: it is not a list of "
             f"{dataset}")
    return loaded, source


def load_set(dataset, data_root="data", size=SIZE, wanted=None, ood=()):
    """-> an ImageSet. dataset: a key of NAMED, or a folder of classes, which needs no data_root.

    wanted: the splits to read (all). ood: folders of OOD images, which make the group 'yours'. An
    OOD set of the benchmark that is not there is left out; a missing ID set ends the program.
    """
    if dataset in NAMED:
        classes, mean, std, near, far = NAMED[dataset]
        data = ImageSet(dataset, classes, torch.tensor(mean), torch.tensor(std),
                        {"near": near, "far": far}, {}, {})
        for split in ("train", "val", "test", *near, *far) if wanted is None else wanted:
            loaded, source = read_split(dataset, split, data_root, size)
            if loaded is not None:
                data.splits[split], data.sources[split] = loaded, source
    else:
        data = read_classes(dataset, size)
    data.groups["yours"] = tuple(os.path.abspath(folder) for folder in ood)
    for folder in data.groups["yours"]:
        images, _, _ = read_folder(folder, size)
        data.splits[folder] = images, torch.full((len(images),), -1)
        data.sources[folder] = "folder"
    return data


def files_below(folder):
    """All files below a folder, links followed -> (files, folders not listed, folders left out).

    A folder is visited once. Left out are those that begin with '.' or '@': copies and thumbnails.
    """
    files, locked, left_out, visited = [], [], [], {os.path.realpath(folder)}
    note = lambda problem: locked.append(problem.filename)
    for here, folders, names in os.walk(folder, followlinks=True, onerror=note):
        files += [os.path.join(here, name) for name in names]
        below, folders[:] = sorted(folders), []
        for name in below:
            place = os.path.realpath(os.path.join(here, name))
            if name[0] in ".@":
                left_out.append(os.path.join(here, name))
            elif place not in visited:
                visited.add(place)
                folders.append(name)  # os.walk goes on into these
    return files, locked, left_out


def read_folder(folder, size=SIZE):
    """Images below a folder -> (uint8 [N, 3, size, size], their N paths, {path: reason} unreadable)."""
    endings = datasets.folder.IMG_EXTENSIONS
    if not Path(folder).is_dir():
        fail(f"{folder} is not a folder: name one that holds images")
    files, locked, left_out = files_below(folder)
    paths = sorted(path for path in files if path.lower().endswith(endings))
    good, bad = decode(paths, size)
    bad |= {path: "a folder that cannot be listed" for path in locked}
    for path, reason in bad.items():
        print(f"unreadable: {path} ({reason})", file=sys.stderr)
    hidden = f", {len(left_out)} folders left out, the first is {left_out[0]}" if left_out else ""
    print(f"{folder}: {len(good)} images, {len(bad)} unreadable, {len(files) - len(paths)} other "
          f"files{hidden}", file=sys.stderr)
    if not good:
        fail(f"{folder} holds no image that can be read: its name must end in {' '.join(endings)}")
    return torch.stack([image for _, image in good]), [path for path, _ in good], bad


def read_classes(folder, size=SIZE):
    """A user's folder train/CLASS/..., with or without val/ (valid/, validation/) and test/.

    Classes are sorted by name. A split that is not there takes a tenth of each class of train/ (one
    image of a class of 4 to 9), chosen by a digest of the path below the folder: the same for every
    program and seed, and a new image moves hardly another. Mean and std are the training images'.
    """
    root = Path(folder)
    val = next((name for name in ("val", "valid", "validation") if (root / name).is_dir()), "val")
    folders = {"train": root / "train", "val": root / val, "test": root / "test"}
    if not folders["train"].is_dir():
        fail(f"no folder {root / 'train'}: put the images of each class into {root / 'train' / 'CLASS'}")
    plain = lambda name: unicodedata.normalize("NFC", name)  # macOS writes an accent as two characters
    classes = sorted({plain(path.name) for path in folders["train"].iterdir()
                      if path.is_dir() and path.name[0] not in ".@"})
    if len(classes) < 2:
        held = f"the class {classes[0]} alone" if classes else "no class"
        fail(f"{root / 'train'} holds {held}: add another folder")
    splits, order = {}, []
    for split in [split for split in folders if folders[split].is_dir()]:
        images, paths, _ = read_folder(folders[split], size)
        paths = [Path(path).relative_to(root) for path in paths]
        for path in paths:
            if plain(path.parts[1]) not in classes:
                fail(f"{root / Path(*path.parts[:2])} is no class of {root / 'train'}: move it away, "
                     "or add the class")
        splits[split] = images, torch.tensor([classes.index(plain(path.parts[1])) for path in paths])
        if split == "train":
            names = [os.fsencode(plain(str(path))) for path in paths]
            order = sorted(range(len(paths)), key=lambda i: hashlib.sha256(names[i]).digest())
    absent = [split for split in ("val", "test") if split not in splits]
    images, labels = splits["train"]
    home = torch.full_like(labels, -1)  # index into `absent`; -1: stays in train
    for label in range(len(classes)):
        own = torch.tensor([i for i in order if labels[i] == label], dtype=torch.int64)
        tenth = max(len(own) // 10, 1) if len(own) >= 4 else 0
        for i in range(len(absent)):
            home[own[i * tenth:(i + 1) * tenth]] = i
    for i, split in ((-1, "train"), *enumerate(absent)):
        splits[split] = images[home == i], labels[home == i]
    images, labels = splits["train"]
    for name, count in zip(classes, labels.bincount(minlength=len(classes)).tolist()):
        if count < 2:
            fail(f"the class {name} has {count} images to train on in {root / 'train'}: it needs 2")
    for split in absent:
        if not len(splits[split][0]):
            fail(f"{root} has no {split}/, and classes of fewer than 4 images none to spare for it: "
                 "add images")
    print(f"{root}: {len(classes)} classes, {', '.join(classes)}; {len(images)} images to train on, "
          f"{len(splits['val'][0])} for thresholds, {len(splits['test'][0])} to test", file=sys.stderr)
    levels = torch.arange(256).double() / 255
    counts = torch.stack([channel.flatten().bincount(minlength=256)
                          for channel in images.transpose(0, 1)]).double()     # [3, 256]
    counts = counts / counts.sum(1, keepdim=True)
    mean = counts @ levels                                                     # [3]
    std = (counts @ levels ** 2 - mean ** 2).clamp_min(1e-4).sqrt()            # 0.01 if in one colour
    return ImageSet(str(folder), classes, mean.float(), std.float(), {"near": (), "far": ()}, splits,
                    dict.fromkeys(splits, "folder"))


# --- Embedded images: drawn in a second, so that the whole method runs with no download. ----------

# Points x, y [N, H, W] at distance r from the origin -> whether they lie in the shape of radius 1.
SHAPES = {"disc": lambda x, y, r: r < 0.9,
          "square": lambda x, y, r: torch.maximum(x.abs(), y.abs()) < 0.8,
          "triangle": lambda x, y, r: (y > -0.5) & (y < 1 - math.sqrt(3) * x.abs()),
          "cross": lambda x, y, r: ((torch.minimum(x.abs(), y.abs()) < 0.33)
                                    & (torch.maximum(x.abs(), y.abs()) < 1))}
HELD_OUT_SHAPES = {"ring": lambda x, y, r: (r < 1) & (r > 0.55),
                   "star": lambda x, y, r: r < 0.65 + 0.35 * torch.cos(5 * torch.atan2(y, x)),
                   "bar": lambda x, y, r: (x.abs() < 1) & (y.abs() < 0.4),
                   "half_disc": lambda x, y, r: (r < 1) & (y > 0)}
SHAPES_SIZES = {"train": 4000, "val": 500, "test": 1500, "held_out": 1500}  # other sets: 500
SHAPES_SEEDS = {name: seed for seed, name in enumerate(
    ("train", "val", "test", "held_out", "no longer drawn", *SHAPE_FAR))}


def draw_set(split, size=SIZE):
    """An embedded set -> (images uint8 [N, 3, S, S], labels int64 [N]), the same on every machine.

    ID: 4 shapes x 2 textures (plain, checked), any colour, place, size and turn, on a gradient with
    clutter and noise. 'held_out' (near-OOD): 4 other shapes drawn alike. None for another name.
    """
    if split not in SHAPES_SEEDS:
        return None
    n = SHAPES_SIZES.get(split, 500)
    g = torch.Generator().manual_seed(SHAPES_SEEDS[split])
    uniform = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=g)
    ticks = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")                                # [H, W]
    turn = uniform(0, 2 * math.pi)
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()  # [N, H, W]
    first = torch.rand(n, 3, 1, 1, generator=g)                          # two colours per image, at
    second = (first + 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=g)) % 1   # least 0.3 apart
    if split == "noise":
        images = torch.rand(n, 3, size, size, generator=g)
    elif split == "stripes":
        images = torch.where(((along * uniform(3, 12)).sin() > 0)[:, None], first, second)
    elif split == "flat":
        images = first.expand(n, 3, size, size)
    elif split == "gradient":
        images = torch.lerp(first, second, along[:, None] / 2 + 0.5)
    elif split == "blobs":
        images = F.interpolate(torch.rand(n, 3, 5, 5, generator=g), size, mode="bicubic")
    else:
        labels = torch.randint(8, (n,), generator=g)
        # Background: a faint gradient; one small square anywhere; the shape over it; noise.
        images = torch.lerp(first, second, 0.1 * (1 + along[:, None]))
        u, v = x - uniform(-1, 1), y - uniform(-1, 1)
        clutter = torch.maximum(u.abs(), v.abs()) < uniform(0.05, 0.2)
        images = torch.where(clutter[:, None], torch.rand(n, 3, 1, 1, generator=g), images)
        scale, du, dv = uniform(0.6, 0.9), uniform(-0.2, 0.2), uniform(-0.2, 0.2)
        u, v = (along - du) / scale, (across - dv) / scale               # the shape's coordinates
        r = (u ** 2 + v ** 2).sqrt()
        shapes = HELD_OUT_SHAPES if split == "held_out" else SHAPES
        masks = torch.stack([inside(u, v, r) for inside in shapes.values()])          # [4, N, H, W]
        mask = masks[labels // 2, torch.arange(n)]                                    # [N, H, W]
        checks = ((u * 6).sin() * (v * 6).sin() > 0) & (labels % 2 == 1)[:, None, None]
        images = torch.where((mask & ~checks)[:, None], second, images)
        images = torch.where((mask & checks)[:, None], torch.lerp(first, second, 0.4), images)
        images = images + 0.03 * torch.randn(images.shape, generator=g)
    if split not in ("train", "val", "test"):
        labels = torch.full((n,), -1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# --- Scores: (logits [N, C], features [N, D], ref) -> confidence [N]. `ref` is what a score may know
# of the network and its training set: weight [C, D], features [M, D], mean [D] of the features.


def knn(logits, features, ref, k=50, megabytes=256):
    """Minus the distance to the k-th nearest training feature, unit length (arXiv 2204.06507).

    Never holds more distances at once than `megabytes`. Measured from the bank's centre: from the
    origin the distances of nearly equal features would cancel to one float32 number.
    """
    bank = F.normalize(ref["features"].double(), dim=1)
    centre = bank.mean(0)
    bank = (bank - centre).float()
    queries = (F.normalize(features.double(), dim=1) - centre).float()
    half = bank.square().sum(1) / 2                           # |q - b|^2 = |q|^2 + 2 (half - q b)
    rows = max(1, megabytes * 2 ** 20 // (4 * len(bank)))
    kth = []
    for chunk in models.progress("chunks of nearest neighbours", queries.split(rows)):
        gaps = torch.addmm(half, chunk, bank.T, alpha=-1)     # [rows, M]
        kth.append(gaps.topk(min(k, len(bank)), largest=False, sorted=False)[0].amax(1))
    return -(queries.square().sum(1) + 2 * torch.cat(kth)).clamp_min(0).sqrt()


def fdbd(logits, features, ref):
    """Mean distance to the decision boundaries over that to the training mean (arXiv 2312.11536)."""
    top, predicted = logits.max(1)
    gap = torch.cdist(ref["weight"], ref["weight"])[predicted]                # [N, C], |w_pred - w_c|
    distance = (top[:, None] - logits) / gap.clamp_min(1e-12)
    distance = distance.sum(1) / (logits.shape[1] - 1)
    return distance / (features - ref["mean"]).norm(dim=1).clamp_min(1e-12)


def micl(logits, features, ref):
    """OAL's detector: top logit above the mean logit, over the distance to the training mean."""
    return losses.MICL(ref["mean"]).score(logits, features)


SCORES = {
    # Maximum softmax probability (arXiv 1610.02136); in float32 confident ones would tie at 1.
    "msp": lambda logits, features, ref: logits.double().softmax(1).amax(1),
    # Maximum logit (arXiv 1911.11132).
    "mls": lambda logits, features, ref: logits.amax(1),
    # Negative free energy (arXiv 2010.03759, equation 4, T = 1; the score of OAL's paper).
    "ebo": lambda logits, features, ref: logits.logsumexp(1),
    "knn": knn, "fdbd": fdbd, "micl": micl}


# --- Metrics. -------------------------------------------------------------------------------------


def detection_metrics(conf_id, conf_ood):
    """How well a confidence separates ID from OOD, in percent, as OpenOOD v1.5 computes it.

    conf_id [N], conf_ood [M]: tensors or arrays, higher = more in-distribution. Returns 'auroc';
    'aupr_in' and 'aupr_out', trapezoidal areas with ID or OOD as the positive class; 'fpr95', the
    share of ID flagged once 95 % of OOD is caught; 'fpr95_id', the share of OOD accepted once 95 %
    of ID is. Equal confidences are one threshold. ValueError on an empty input or a NaN.
    """
    conf_id, conf_ood = (torch.as_tensor(conf).detach().cpu().double().flatten().numpy()
                         for conf in (conf_id, conf_ood))
    conf = np.concatenate([conf_id, conf_ood])
    if not len(conf_id) or not len(conf_ood) or np.isnan(conf).any():
        raise ValueError("detection_metrics: no ID or no OOD confidence, or one that is NaN")
    order = np.argsort(conf)
    conf, ood = conf[order], (order >= len(conf_id)).astype(np.float64)
    ends = np.flatnonzero(np.r_[conf[1:] != conf[:-1], True])  # last of each group of ties, ascending
    # OOD positive: the threshold rises, more OOD is caught and more ID flagged.
    caught = np.cumsum(ood)[ends]
    flagged = ends + 1 - caught
    # ID positive: the threshold falls, more ID is kept and more OOD let in.
    kept = (flagged[-1] - np.r_[0, flagged[:-1]])[::-1]
    let_in = (caught[-1] - np.r_[0, caught[:-1]])[::-1]
    return {"auroc": 100 * area(caught, flagged) / caught[-1] / flagged[-1],
            "aupr_in": 100 * area(kept / (kept + let_in), kept / kept[-1], start=1),
            "aupr_out": 100 * area(caught / (caught + flagged), caught / caught[-1], start=1),
            "fpr95": 100 * fpr_at_recall(caught, flagged, 0.95),
            "fpr95_id": 100 * fpr_at_recall(kept, let_in, 0.95)}


def area(y, x, start=0):
    """Trapezoidal area under the points (0, start), (x_1, y_1), ..."""
    x, y = np.r_[0, x], np.r_[start, y]
    return np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2


def fpr_at_recall(true, false, recall):
    """False-positive rate at the first point of scikit-learn's ROC curve that reaches the recall.

    That curve leaves out points on a straight line between their neighbours (its default
    `drop_intermediate`, which OpenOOD inherits): the next corner of the curve counts.
    """
    i = np.argmax(true / true[-1] >= recall)
    if 0 < i < len(true) - 1:  # the two ends are always on the curve
        bends = (np.diff(true[i - 1:], 2) != 0) | (np.diff(false[i - 1:], 2) != 0)
        i += np.argmax(np.r_[bends, True])
    return false[i] / false[-1]


def threshold_at(conf_id, tpr):
    """The confidence at or above which at least the share `tpr` of the ID images [N] lies."""
    conf = np.sort(np.asarray(conf_id, dtype=np.float64))[::-1]
    count = math.ceil(round(tpr * len(conf), 6))  # 0.55 * 100 is a little more than 55
    return float(conf[max(1, count) - 1])


# --- Benchmark. -----------------------------------------------------------------------------------


def reference(net, data):
    """What scores may know of a network (see 'Scores'), from the training images."""
    _, features = models.predict(net, data.splits["train"][0], data.mean, data.std)
    weight = net.fc.weight.detach().cpu().float()
    return {"weight": weight, "features": features, "mean": features.mean(0)}


def evaluate(net, data, scores, ref):
    """One network on the sets of data -> (entry of results.json, {score: {set: confidence [N]}}).

    The set 'test' is the ID set; `ref` is what reference() returns.
    """
    groups = {name: group for group, names in data.groups.items() for name in names
              if name in data.splits}
    images, labels = data.splits["test"]
    found = {name: models.predict(net, data.splits[name][0], data.mean, data.std)
             for name in ("test", *groups)}
    correct = found["test"][0].argmax(1) == labels
    entry = {"id_acc": 100 * correct.double().mean().item(), "n_id": len(images), "scores": {}}
    confidences = {}
    for score in scores:
        conf = {name: SCORES[score](*pair, ref).double() for name, pair in found.items()}
        rows = {name: {"group": group, "n": len(conf[name]),
                       **detection_metrics(conf["test"], conf[name])}
                for name, group in groups.items()}
        means = {}
        for group in ("near", "far"):
            members = [row for row in rows.values() if row["group"] == group]
            if members:  # no set, no mean: an absent group is absent, never zero
                means[group] = {key: sum(row[key] for row in members) / len(members)
                                for key in members[0] if key not in ("group", "n")}
        entry["scores"][score] = {**means, "sets": rows}
        confidences[score] = conf
    return entry, confidences


def describe(program, args, data):
    """What results.json says of every run."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__,
                "numpy": np.__version__}
    return {"dataset": data.name, "size": args.size, "classes": data.classes,
            "command": shlex.join([program, *sys.argv[1:]]), "device": args.device,
            "versions": versions, "missing": data.missing(), "sources": data.sources}


def headline(results):
    """results.json's dict -> lines: accuracy, near and far of the start and of the student."""
    before, after = results["models"]["ce"], results["models"]["oal"]
    yield (f"accuracy  {before['id_acc']:6.2f} -> {after['id_acc']:6.2f}   cross-entropy network -> "
           "student, percent")
    for group in ("near", "far"):
        if group in before["scores"]["ebo"]:
            ebo, own = ([entry["scores"][score][group]["auroc"] for entry in (before, after)]
                        for score in ("ebo", "micl"))
            yield (f"{group + '-OOD':<9} {ebo[0]:6.2f} -> {own[1]:6.2f}   AUROC by ebo -> AUROC by "
                   f"micl; ebo alone {ebo[0]:.2f} -> {ebo[1]:.2f}, micl alone {own[0]:.2f} -> "
                   f"{own[1]:.2f}")


def table_rows(runs):
    """results.json dicts -> {label: {seed: (entry of models, minutes of its training)}}.

    The start of a run with --ce is left out where the run that trained it is there too.
    """
    kinds = {(results["dataset"], results.get("arch"), results["size"]) for results in runs}
    trained = [results["models"]["ce"] for results in runs
               if "seed" in results and not results["options"]["ce"]]
    rows = {}
    for number, results in enumerate(runs):
        kind = [results["dataset"], results.get("arch"), f"{results['size']} px"]
        kind = f" ({', '.join(filter(None, kind))})"  # evaluate.py's results have no arch
        for name, entry in results["models"].items():
            seed, options = results.get("seed", f"run {number}"), results.get("options", {})
            label = results.get("label", name) if name == "oal" else name
            if name == "ce" and options:
                if options["ce"] and entry in trained:
                    continue
                label = ("start: given by --ce" if options["ce"] else
                         f"start: cross-entropy, {options['ce_epochs']} epochs")
            row = rows.setdefault(label + kind * (len(kinds) > 1), {})
            if seed in row and row[seed][0] != entry:
                fail(f"two runs with different figures are seed {seed} of {label}: leave one out")
            row[seed] = entry, results["seconds"].get(name, 0) / 60
    return rows


def tables(runs):
    """results.json dicts -> the lines of two Markdown tables, mean±standard deviation (n - 1).

    A row is a label over its seeds, by ebo, fdbd and micl where all networks were measured by them,
    else by every score that all were measured by.
    """
    rows = table_rows(runs)
    entries = [entry for row in rows.values() for entry, _ in row.values()]
    common = [score for score in SCORES if all(score in entry["scores"] for entry in entries)]
    scores = [score for score in common if score in ("ebo", "fdbd", "micl")] or common
    sizes = [{name: found["n"] for name, found in entry["scores"][scores[0]]["sets"].items()}
             for entry in entries]
    if any(other != sizes[0] for other in sizes):
        fail("the runs were measured on different OOD sets: make a table of each kind")

    def mean_std(values):
        spread = f"±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{spread}"

    def cell(row, read):  # the scores beside each other
        return " / ".join(mean_std([read(entry["scores"][score]) for entry, _ in row.values()])
                          for score in scores)

    line = lambda *cells: f"| {' | '.join(map(str, cells))} |"
    columns = [(group, metric) for group in ("near", "far")
               if group in entries[0]["scores"][scores[0]] for metric in ("auroc", "fpr95")]
    first = runs[0]
    heading = f"{first['dataset']}, {first.get('arch', '')}".strip(", ")
    lines = [f"cells: {' / '.join(scores)}; minutes: of this training alone", "",
             line(heading, "runs", "minutes", "accuracy",
                  *(f"{group} {metric.upper()}" for group, metric in columns)),
             "|---" * (4 + len(columns)) + "|"]
    for label, row in rows.items():
        minutes = [spent for _, spent in row.values() if spent]
        lines.append(line(label, len(row), mean_std(minutes) if minutes else "",
                          mean_std([entry["id_acc"] for entry, _ in row.values()]),
                          *(cell(row, lambda found: found[group][metric]) for group, metric in columns)))
    if sizes[0]:
        lines += ["", line("AUROC", *(f"{title(name, sizes[0])} ({n})" for name, n in sizes[0].items())),
                  "|---" * (1 + len(sizes[0])) + "|"]
        lines += [line(label, *(cell(row, lambda found: found["sets"][name]["auroc"])
                                for name in sizes[0])) for label, row in rows.items()]
    missing = sorted({name for results in runs for name in results["missing"]})
    return lines + ([f"\nmissing, in no mean: {', '.join(missing)}"] if missing else [])


def title(name, names):
    """A set's heading: the last part of a folder, all of it where another set ends in that too."""
    last = [Path(one).name for one in names]
    return name if last.count(Path(name).name) > 1 else Path(name).name or name


def collect(paths):
    """results.json files -> the lines of README's tables."""
    try:
        return tables([json.loads(Path(path).read_text()) for path in paths])
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as problem:
        fail(f"--collect {' '.join(map(str, paths))}: not results.json files of one benchmark "
             f"({problem})")


def plot(path, columns, tpr):
    """{heading: {set: conf [N]}} -> a picture: per OOD set its histogram beside the ID set's."""
    from matplotlib.figure import Figure
    names = [name for name in next(iter(columns.values())) if name != "test"]
    # A file name that is not UTF-8 cannot be drawn, and a dollar would begin a formula.
    readable = lambda text: text.encode(errors="replace").decode().replace("$", r"\$")
    figure = Figure(figsize=(3.2 * len(columns), 1.6 * len(names)))
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for row, name in zip(axes, names):
        for axis, (heading, conf) in zip(row, columns.items()):
            both = np.concatenate([conf["test"], conf[name]])
            bins = np.linspace(*np.quantile(both, [0.001, 0.999]), 60)
            for one, label in (("test", "ID"), (name, readable(title(name, names)))):
                axis.hist(conf[one].numpy(), bins, density=True, alpha=0.6, label=label)
            axis.axvline(threshold_at(conf["test"], tpr), color="black", linewidth=1)
            auroc = detection_metrics(conf["test"], conf[name])["auroc"]
            axis.set_title(f"{readable(heading)}, AUROC {auroc:.1f}", fontsize=9)
            axis.set_yticks([])
            axis.legend(fontsize=7)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:].lower(), dpi=70)
    write(path, picture.getvalue())


# --- The detector: NAME.pt, a network's weights, and NAME.detector.pt, what else a verdict needs. ---


class Detector:
    """detector(images uint8 [N, 3, S, S]) -> (class indices int64 [N], scores [N], P(ID) [N]).

    The score is `micl`; P(ID) is that of MICL's critic, NaN for a network without one. Attributes:
    the network, and the entries of NAME.detector.pt (README), such as .classes and .threshold.
    """

    def __init__(self, net, content):
        self.net = net
        self.__dict__.update(content)

    def __call__(self, images):
        logits, features = models.predict(self.net, images, self.image_mean, self.image_std)
        critic = losses.MICL(self.mean, getattr(self, "a", math.nan), getattr(self, "tau", math.nan))
        score = critic.score(logits, features)
        return logits.argmax(1), score, critic.probability(score)


def digest(net):
    """A digest of a network's weights, whatever file or device they come from."""
    found = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def detector_of(net, arch, data, critic=None):
    """A network, its training and validation images, the student's critic -> NAME.detector.pt's dict."""
    mean = reference(net, data)["mean"]
    images, _ = data.splits["val"]
    conf = losses.MICL(mean).score(*models.predict(net, images, data.mean, data.std))
    content = {"image_mean": data.mean.cpu(), "image_std": data.std.cpu(),
               "size": images.shape[-1], "classes": list(data.classes), "arch": arch, "mean": mean,
               "threshold": torch.tensor(threshold_at(conf, 0.95)), "n_val": len(conf),
               "digest": digest(net)}
    if critic:
        content |= {"a": critic.log_a.exp().detach().cpu(), "tau": critic.tau.detach().cpu()}
    return content


def read_detector(path):
    """NAME.pt -> the dict of the NAME.detector.pt beside it, None if there is none."""
    beside = Path(path).with_suffix(".detector.pt")
    if not beside.exists():
        return None
    try:
        content = torch.load(beside, map_location="cpu", weights_only=True)
        keys = ["image_mean", "image_std", "mean", "threshold", *({"a", "tau"} & content.keys())]
        shapes = [tuple(content[key].shape) for key in keys]
        fits = (shapes[:2] == [(3,), (3,)] and not any(shapes[3:])
                and all(content[key].isfinite().all() for key in keys)
                and isinstance(content["digest"], str) and len(content["classes"]) > 1
                and content["size"] in (32, 64, 128, 224) and content["n_val"] > 0)
    except Exception:  # a text file, a truncated archive, other entries
        fits = False
    if not fits:
        fail(f"{beside} is not a detector: remove it, and name the ID set by --dataset")
    return content


def load_detector(path, device="cpu"):
    """A file of weights NAME.pt with NAME.detector.pt beside it -> a Detector; no images needed."""
    content = read_detector(path)
    if content is None:
        fail(f"no {Path(path).with_suffix('.detector.pt')}: name the ID set of {path} by --dataset")
    net = models.load_network(path, len(content["classes"]), size=content["size"])
    check_digest(path, net, content)
    return Detector(models.to_device(net, device), content)


def check_digest(path, net, content):
    """Ends the program where NAME.detector.pt was made for other weights than NAME.pt."""
    if content["digest"] != digest(net) or content["mean"].shape != (net.fc.in_features,):
        fail(f"{Path(path).with_suffix('.detector.pt')} belongs to other weights than {path}: put "
             "back the two files of one run")


# --- Command line. --------------------------------------------------------------------------------


def number(kind, low, high):
    """An argparse type: a finite number of the kind, int or float, from low to high."""
    def read(text):
        if not low <= kind(text) <= high:  # nor is a NaN
            raise ValueError
        return kind(text)
    read.__name__ = f"{'whole' if kind is int else 'finite'} number from {low} to {high}:"
    return read


POSITIVE, SEED = number(int, 1, 10 ** 9), number(int, 0, 10 ** 17)
FINITE = number(float, -1e308, 1e308)


def common_parser(doc):
    """A program's parser, with the options that the programs share; check_common reads them."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--dataset", metavar="{" + ",".join(NAMED) + ",FOLDER}",
                        help="the ID set (shapes); FOLDER holds train/CLASS/... and, if you like, "
                        "val/ and test/")
    parser.add_argument("--size", type=int, choices=(32, 64, 128, 224), help="side of the images "
                        "(32); 224: with the stem of torchvision's ResNet")
    parser.add_argument("--data-root", metavar="DIR", help="in the OpenOOD v1.5 layout, or where "
                        "torchvision downloads (data)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")
    return parser


def check_common(args):
    """Fills in --dataset, --size and --data-root; ends where one of them or --device is of no use."""
    args.dataset, args.size = args.dataset or "shapes", args.size or SIZE
    try:
        (torch.zeros(1, device=args.device) + 1).item()  # no value comes back from 'meta'
    except (RuntimeError, AssertionError, ImportError) as problem:  # without CUDA: AssertionError
        fail(f"no device {args.device}: {str(problem).splitlines()[0]}")
    if args.dataset in NAMED and args.size not in (SIZE, 224):
        fail(f"--size {args.size}: the images of {args.dataset} are {SIZE} wide, or 224: leave it out")
    if args.dataset not in NAMED and not Path(args.dataset).is_dir():
        fail(f"no dataset {args.dataset}: choose one of {', '.join(NAMED)}, or a folder that holds "
             "train/CLASS/...")
    if args.data_root is not None and not Path(args.data_root).is_dir():
        fail(f"no data root {args.data_root}: name a folder that holds images_classic/ and "
             "benchmark_imglist/")
    args.data_root = args.data_root or "data"


def main():
    parser = common_parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", help="files of weights, each a row of the result")
    parser.add_argument("--score", choices=[*SCORES, "all"], default="all")
    parser.add_argument("--ood", nargs="+", action="extend", default=[], metavar="FOLDER",
                        help="folders of your own OOD images")
    parser.add_argument("--flag", metavar="FOLDER",
                        help="print path, class, score (micl for all), verdict, P(ID) of each image")
    parser.add_argument("--threshold-tpr", type=number(float, 1e-6, 1), metavar="T", default=0.95,
                        help="the threshold accepts this share of the ID images (0.95)")
    parser.add_argument("--plot", metavar="FILE.png", help="histograms (ebo and micl for all)")
    parser.add_argument("--collect", nargs="+", action="extend", metavar="RESULTS.json",
                        help="print the tables of these runs and stop")
    parser.add_argument("--out", default="runs/evaluate", help="folder for results.json")
    args = parser.parse_args()
    if args.collect:
        print("\n".join(collect(args.collect)))
        return
    if not args.checkpoints or args.flag and (len(args.checkpoints) > 1 or args.plot or args.ood):
        fail("checkpoints: name one or more files of weights, one alone for --flag without --plot "
             "and --ood, or runs with --collect")
    given = args.dataset
    contents = [read_detector(path) for path in args.checkpoints]
    sizes = {content["size"] for content in contents if content}
    if not args.size and len(sizes) == 1 and (given or not args.flag):
        args.size = sizes.pop()
    check_common(args)
    if args.flag:
        flag(args, contents[0], given)
    else:
        measure(args, contents)


def open_network(path, content, data, args):
    """-> (network on the device, data normalised as the network was trained).

    Says in one line where --dataset disagrees with NAME.detector.pt.
    """
    net = models.load_network(path, len(data.classes), size=args.size)
    if content:
        check_digest(path, net, content)
        differs = []
        if list(data.classes) != content["classes"]:
            differs.append("classes (labels are compared by number)")
        if args.size != content["size"]:
            differs.append(f"size ({args.size}, trained at {content['size']})")
        own = data._replace(mean=content["image_mean"], std=content["image_std"])
        if not torch.allclose(data.mean, own.mean, atol=1e-3):
            differs.append("mean of the images (the network's own is used)")
        if differs:
            print(f"note: --dataset {data.name} is not what {path} was trained on: "
                  f"{', '.join(differs)}", file=sys.stderr)
        data = own
    return models.to_device(net, args.device), data


def measure(args, contents):
    """Networks on the benchmark: prints the tables, writes results.json and the picture."""
    results_path = Path(args.out) / "results.json"
    if results_path.exists() and '"command": "evaluate.py' not in results_path.read_text(errors="replace"):
        fail(f"{results_path} holds another program's results: name another folder with --out")
    suffix = args.plot and Path(args.plot).suffix.lower()
    if args.plot and (suffix not in (".png", ".pdf", ".svg") or not find_spec("matplotlib")):
        fail(f"--plot {args.plot}: the file must end in .png, .pdf or .svg, and matplotlib must be "
             "installed")
    start, columns = time.perf_counter(), {}
    scores = list(SCORES) if args.score == "all" else [args.score]
    lists = Path(args.data_root) / "benchmark_imglist" / args.dataset
    train_list = lists / f"train_{args.dataset}.txt"
    of_mean = () if all(contents) else ("fdbd", "micl")  # a detector knows the mean
    if args.score == "all" and args.dataset in NAMED and lists.is_dir() and not train_list.is_file():
        scores = [score for score in scores if score not in ("knn", *of_mean)]
        print(f"no {train_list}: {', '.join(('knn', *of_mean))} left out", file=sys.stderr)
    needs_train = any(score in ("knn", *of_mean) for score in scores)
    wanted = ["train"] * needs_train + ["test"]
    if args.dataset in NAMED:
        wanted += [*NAMED[args.dataset][3], *NAMED[args.dataset][4]]
    data = load_set(args.dataset, args.data_root, args.size, wanted, args.ood)
    if not any(name in data.splits for names in data.groups.values() for name in names):
        fail(f"no OOD set for {data.name} ({', '.join(data.missing()) or 'none'} missing): name "
             "folders with --ood")
    results = {**describe("evaluate.py", args, data), "models": {}}
    for path, content in zip(args.checkpoints, contents):
        name = Path(path).stem if Path(path).stem not in results["models"] else path
        net, own = open_network(path, content, data, args)
        ref = reference(net, own) if needs_train else {"weight": net.fc.weight.detach().cpu().float()}
        if content:
            ref["mean"] = content["mean"]
        results["models"][name], conf = evaluate(net, own, scores, ref)
        columns |= {f"{name}: {score}": conf[score] for score in scores
                    if score in ("ebo", "micl", args.score)}
    results["seconds"] = {"total": time.perf_counter() - start}
    print("\n".join(tables([results])))
    write(results_path, json.dumps(results, indent=1))
    if args.plot:
        plot(args.plot, columns, args.threshold_tpr)
    print(f"written: {results_path}{f', {args.plot}' if args.plot else ''}")


def flag(args, content, dataset):
    """Prints a CSV: path, predicted class, score, verdict and P(ID) of each image of a folder.

    By the detector's two files alone. The images of the ID set are read for another score or
    threshold, and for a network that has no NAME.detector.pt.
    """
    path, score = args.checkpoints[0], "micl" if args.score == "all" else args.score
    own = content and score == "micl" and args.threshold_tpr == 0.95
    if own and not dataset:
        detector, n_val = load_detector(path, args.device), content["n_val"]
        threshold, args.size = detector.threshold.item(), detector.size
    else:
        data = load_set(args.dataset, args.data_root, args.size, ("train", "val"))
        net, data = open_network(path, content, data, args)
        content = content or detector_of(net, "", data)
        detector, n_val = Detector(net, content), len(data.splits["val"][0])
        threshold = content["threshold"].item()
    images, paths, bad = read_folder(args.flag, args.size)
    labels, conf, p_id = detector(images)
    if not own:
        ref = {**reference(net, data), "mean": detector.mean}
        of_val, conf = (SCORES[score](*models.predict(net, of, data.mean, data.std), ref)
                        for of in (data.splits["val"][0], images))
        threshold = threshold_at(of_val.double(), args.threshold_tpr)
    rows = [["path", "class", score, "verdict", "p_id"]]
    for name, label, value, p in zip(paths, labels.tolist(), conf.double().tolist(), p_id.tolist()):
        rows.append([name, detector.classes[label], f"{value:.6f}",
                     "ID" if value >= threshold else "OOD", "" if math.isnan(p) else f"{p:.4f}"])
    rows += [[name, "", "", "unreadable", ""] for name in bad]
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    print(f"threshold {threshold:.6f}: {args.threshold_tpr:.0%} of the {n_val} validation images "
          "reach it", file=sys.stderr)


if __name__ == "__main__":
    run(main)
