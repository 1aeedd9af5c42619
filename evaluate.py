"""From images to a verdict: image sets, scores, metrics; and the detector of a trained network.

    python evaluate.py runs/cifar100/student.pt --dataset cifar100 --data-root DIR [--ood FOLDER]
    python evaluate.py runs/photos/student.pt --flag FOLDER [--rate 0.01] > flags.csv

The first measures a network on the benchmark, the second gives a verdict for each image. Lists,
transform and metrics are those of OpenOOD v1.5 (arXiv 2306.09301). A score is a confidence: higher
= more in-distribution.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import shlex
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms import functional as transforms

import losses
import models
from models import Mistake

SIZES = range(32, 321, 32)  # sides of images; a network trained from nothing has 32 by default
ID_SPLITS = ("train", "val", "test")
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


# --- Image sets.

class ImageSet(NamedTuple):
    """An ID set and its OOD sets. The labels of an OOD set are not used."""
    name: str
    classes: list  # names, in the order of the labels
    mean: torch.Tensor  # [3], of the training images from 0 to 1
    std: torch.Tensor  # [3]
    groups: dict  # {"near", "far", "yours": names of OOD sets}; "yours" is in no mean
    splits: dict  # {"train", "val", "test" or an OOD set: (uint8 [N, 3, S, S], labels [N])}
    sources: dict  # {split: "list", "torchvision", "drawn" or "folder"}

    def missing(self):
        """Names of the benchmark's OOD sets that were not found."""
        names = [*self.groups["near"], *self.groups["far"]]
        return [name for name in names if name not in self.splits]


def load_set(dataset, data_root="data", size=32, wanted=None, ood=()):
    """An ID set, a key of NAMED or a folder of classes, and folders of OOD images -> an ImageSet.

    wanted: the splits to read of a named set (all). A missing OOD set is left out.
    """
    if dataset not in NAMED:
        data, wanted = read_classes(dataset, size), ()
    else:
        classes, mean, std, near, far = NAMED[dataset]
        data = ImageSet(dataset, classes, torch.tensor(mean), torch.tensor(std),
                        {"near": near, "far": far}, {}, {})
        wanted = wanted or (*ID_SPLITS, *near, *far)
    root = Path(data_root)
    if data_root != "data" and not root.is_dir():
        raise Mistake(f"no data root {root}: name a folder")
    for split in wanted:
        if dataset == "shapes":
            content, source = draw_set(split, size), "drawn"
        elif (root / "benchmark_imglist").is_dir():
            content, source = read_list(dataset, split, root, size), "list"
        else:
            content, source = from_torchvision(dataset, split, root, size), "torchvision"
        if content:
            data.splits[split], data.sources[split] = content, source
    paths = [os.fsencode(os.path.abspath(folder)).decode(errors="backslashreplace")
             for folder in ood]  # names of files may be no text
    names = [*map(os.path.basename, paths), *ID_SPLITS, *data.groups["near"], *data.groups["far"]]
    data.groups["yours"] = [name if names.count(name) == 1 else path
                            for name, path in zip(names, paths)]
    for name, folder in zip(data.groups["yours"], ood):
        images, *_ = read_folder(folder, size)
        data.splits[name], data.sources[name] = (images, torch.full((len(images),), -1)), "folder"
    return data


def to_tensor(image, size=32):
    """PIL image of up to 16 bits -> uint8 [3, size, size] by OpenOOD's test transform."""
    if image.mode == "F" or image.mode == "I" and np.max(image) > 65535:
        raise ValueError("32 bits a pixel: save it with 8 or 16")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    image = image if image.mode == "RGB" else image.convert("RGB")  # no second copy of a large one
    image = transforms.center_crop(transforms.resize(image, size), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_image(path):
    """A path -> its PIL image. OSError: there is none, or it is not a regular file."""
    if not os.path.isfile(path):
        raise OSError("missing, or not a regular file")  # opening a pipe would wait for ever
    return Image.open(path)


def decode(paths, size=32, turned=True):
    """Image files -> (uint8 [N, 3, size, size], N digests of pixels, {path: reason} of the rest).

    turned: by the rotation that a camera has written into the file (EXIF).
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def read(i):  # -> (the digest of the whole image, ""), or ("", why there is none)
        try:
            with open_image(paths[i]) as image:
                if turned:
                    ImageOps.exif_transpose(image, in_place=True)
                images[i] = to_tensor(image, size)
                sha = hashlib.sha256(repr((image.mode, image.size, image.getpalette())).encode())
                for top in range(0, image.height, 256):  # in strips: no second copy
                    bottom = min(top + 256, image.height)
                    sha.update(image.crop((0, top, image.width, bottom)).tobytes())
                return sha.hexdigest(), ""
        except Exception as problem:  # PIL raises a dozen types for damaged files
            return "", f"{type(problem).__name__}: {problem}".splitlines()[0]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(zip(models.progress("images read", paths),
                           pool.map(read, range(len(paths)))))
    bad = {str(path): reason for path, (_, reason) in results if reason}
    images = images[[not reason for _, (_, reason) in results]] if bad else images
    return images, [digest for _, (digest, _) in results if digest], bad


def cached(path, key, make):
    """The dict that make() returns, kept in the file `path` for as long as the text `key` holds."""
    key = hashlib.sha256(key.encode()).hexdigest()
    try:
        saved = torch.load(path, weights_only=True)
        if saved["key"] == key:
            return saved
    except Exception:  # absent, cut short or empty
        pass
    saved = {**make(), "key": key}
    try:
        write(path, saved)
    except OSError as problem:  # a read-only data folder costs time, not the run
        note(f"not cached: {problem}")
    return saved


# OpenOOD's lists.

def read_list(dataset, split, root, size):
    """A split by its OpenOOD list (lines `path label`) -> (images, labels).

    The images are decoded once and then come from a cache below the root, until a file changes.
    None if an OOD set is not there.
    """
    file = f"{split}_{dataset}.txt" if split in ID_SPLITS else f"test_{split}.txt"
    file, rows = root / "benchmark_imglist" / dataset / file, []
    if file.is_file():
        lines = file.read_text("utf-8-sig", "replace").splitlines()
        rows = [line.rsplit(maxsplit=1) for line in lines if line.strip()]
    try:
        paths = [root / "images_classic" / path for path, _ in rows]
        labels = torch.tensor([int(label) for _, label in rows])
    except ValueError:
        raise Mistake(f"{file} is not a list: each line must be 'path label'")
    stats = [os.stat(path) if os.path.exists(path) else None for path in paths]
    if not any(stats):
        if split in ID_SPLITS:
            raise Mistake(f"no images of {file}: put OpenOOD v1.5's images_classic/ and "
                          f"benchmark_imglist/ into {root}")
        note(f"no images of {file}")
        return None
    if split in ID_SPLITS and not 0 <= labels.min() <= labels.max() < len(NAMED[dataset][0]):
        raise Mistake(f"{file} holds labels that {dataset} does not have: put back OpenOOD's list")

    def make():
        note(f"decoding {len(paths)} images of {file.name}, once")
        images, _, bad = decode(paths, size, turned=False)
        if bad:
            raise Mistake(f"{len(bad)} of the {len(paths)} images of {file} cannot be read: "
                          f"restore {', '.join(bad)[:300]}")
        return {"images": images}
    stamp = [f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}"
             for (path, _), stat in zip(rows, stats)]
    cache = root / "oal_cache" / dataset / f"{file.stem}_{size}.pt"
    return cached(cache, "\n".join([f"resize, crop {size}", *stamp]), make)["images"], labels


# torchvision's downloads.

def from_torchvision(dataset, split, root, size):
    """A split that torchvision downloads -> (images, labels), None where an OOD set fails.

    'val' is the first 1,000 test images and 'test' the others, unlike OpenOOD's lists.
    """
    train, name = split == "train", dataset if split in ID_SPLITS else split
    kind, parts = {"cifar10": ("CIFAR10", [train]), "cifar100": ("CIFAR100", [train]),
                   "svhn": ("SVHN", ["test"]), "mnist": ("MNIST", [False]),
                   "texture": ("DTD", ["train", "val", "test"])}.get(name, (None, []))

    def read(place):
        part, i = place
        image, label = part[i]
        return to_tensor(image, size), label

    def make():
        sets = [getattr(datasets, kind)(root, part, download=True) for part in parts]
        places = [(part, i) for part in sets for i in range(len(part))]
        note(f"decoding {len(places)} images of {name}, once")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images, labels = zip(*pool.map(read, places))
        return {"images": torch.stack(images), "labels": torch.tensor(labels)}
    if not kind:
        return None
    cache = root / "oal_cache" / "torchvision" / f"{name}_{'train' if train else 'test'}_{size}.pt"
    try:
        saved = cached(cache, f"torchvision, resize, crop {size}", make)
    except Exception as problem:  # no network, a broken archive, scipy missing for SVHN
        says = f"torchvision did not bring {name} ({problem})".splitlines()[0]
        if split in ID_SPLITS:
            raise Mistake(f"{says}: try again, or put OpenOOD v1.5's images_classic/ and "
                          f"benchmark_imglist/ into {root}")
        note(says)
        return None
    rows = {"val": slice(1000), "test": slice(1000, None)}.get(split, slice(None))
    return saved["images"][rows], saved["labels"][rows]


# Folders of a user's own images.

def read_folder(folder, size=32):
    """Images below a folder -> (uint8 [N, 3, size, size], their paths, digests of pixels, {path:
    reason} of the unreadable).

    Links are followed. Folders that begin with '.' or '@' (copies, thumbnails) are left out.
    """
    files, visited, left_out = [], set(), []

    def refuse(problem):
        raise problem
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(here) in visited:  # a link may lead back up
            left_out.append(here)
            folders.clear()
            continue
        visited.add(os.path.realpath(here))
        files += [os.path.join(here, name) for name in names]
        left_out += [os.path.join(here, name) for name in folders if name[0] in ".@"]
        folders[:] = sorted(name for name in folders if name[0] not in ".@")
    paths = sorted(file for file in files if file.lower().endswith(datasets.folder.IMG_EXTENSIONS))
    images, digests, bad = decode(paths, size)
    for file, reason in bad.items():
        note(f"unreadable: {file} ({reason})")
    note(f"{folder}: {len(images)} images, {len(bad)} unreadable, {len(files) - len(paths)} other "
         f"files; left out: {', '.join(left_out) or 'no folder'}")
    if not len(images):
        raise Mistake(f"{folder} holds no image that can be read: a name must end in "
                      f"{' '.join(datasets.folder.IMG_EXTENSIONS)}")
    return images, [file for file in paths if file not in bad], digests, bad


def read_classes(folder, size=32):
    """A user's folder train/CLASS/..., with or without val/CLASS/... and test/CLASS/...

    A missing split takes a tenth of each class of train/, or one picture of a class of 4 to 9, by
    the digest of the pixels: copies in a class stay together, every program splits alike, a new
    image moves few others.
    """
    train, splits, digests = Path(folder, "train"), {}, {}
    if not train.is_dir():
        raise Mistake(f"no dataset {folder}: name one of {', '.join(NAMED)}, or a folder with the "
                      "images of each class in train/CLASS")
    classes = sorted(entry.name for entry in train.iterdir()
                     if entry.is_dir() and entry.name[0] not in ".@")
    if len(classes) < 2:
        raise Mistake(f"{train} holds fewer than two classes: add a folder for each, or move up "
                      "those that lie one folder deeper")
    for split in ("val", "test", "train"):
        root = Path(folder, split)
        if not root.is_dir():
            continue
        images, files, digests[split], _ = read_folder(root, size)
        names = [Path(os.path.relpath(file, root)).parts[0] for file in files]
        if strange := sorted(set(names) - set(classes)):
            raise Mistake(f"{root / strange[0]} is no class of {train}: move it away, or add the "
                          "class")
        splits[split] = images, torch.tensor([classes.index(name) for name in names])

    # An absent split takes its share of train/.
    absent = [split for split in ("val", "test") if split not in splits]
    (images, labels), pictures = splits["train"], np.array(digests["train"])
    home = np.full(len(pictures), "train")  # the split of each image
    for label, name in enumerate(classes):
        members = labels.numpy() == label
        different = sorted(set(pictures[members]))
        tenth = max(len(different) // 10, 1) if len(different) >= 4 else 0
        for i, split in enumerate(absent):
            home[members & np.isin(pictures, different[i * tenth:(i + 1) * tenth])] = split
        if (members & (home == "train")).sum() < 2:
            raise Mistake(f"the class {name} has fewer than 2 images to train on in {train}: add "
                          "images, or remove the folder")
    for split in ("train", *absent):
        splits[split] = images[home == split], labels[home == split]
        if not len(splits[split][1]):
            raise Mistake(f"{folder} has no {split}/, and no class has 4 images: add images")

    count = {split: len(labels) for split, (_, labels) in splits.items()}
    note(f"{folder}: {len(classes)} classes, {', '.join(classes)}; {count['train']} images to "
         f"train on, {count['val']} for thresholds, {count['test']} to test")
    images, _ = splits["train"]
    means = torch.stack([image.double().mean((1, 2)) for image in images]) / 255  # [N, 3]
    within = torch.stack([image.double().var((1, 2), correction=0) for image in images]) / 255 ** 2
    std = (within.mean(0) + means.var(0, correction=0)).clamp_min(1e-4).sqrt()  # [3], not 0
    return ImageSet(str(folder), classes, means.mean(0).float(), std.float(),
                    {"near": (), "far": ()}, splits, dict.fromkeys(splits, "folder"))


# --- Embedded images, drawn in a second: the whole method runs with no download.

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
SHAPES_SEEDS = {"train": 0, "val": 1, "test": 2, "held_out": 3,
                "noise": 5, "stripes": 6, "flat": 7, "gradient": 8, "blobs": 9}


def draw_set(split, size=32):
    """An embedded set -> (uint8 [N, 3, S, S], labels int64 [N]), the same on every machine.

    ID: 4 shapes x 2 textures of any colour, place, size and turn, on a gradient with clutter and
    noise. 'held_out' (near-OOD): 4 other shapes drawn alike.
    """
    n = SHAPES_SIZES.get(split, 500)
    g = torch.Generator().manual_seed(SHAPES_SEEDS[split])

    def uniform(low, high):  # [N, 1, 1]
        return low + (high - low) * torch.rand(n, 1, 1, generator=g)

    ticks = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")  # [H, W]
    turn = uniform(0, 2 * math.pi)
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()  # [N, H, W]
    first = torch.rand(n, 3, 1, 1, generator=g)  # two colours per image, at least 0.3 apart
    second = (first + 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=g)) % 1
    labels = torch.full((n,), -1)
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
        kinds = torch.randint(8, (n,), generator=g)
        # Background: a faint gradient; one small square anywhere; the shape over it; noise.
        images = torch.lerp(first, second, 0.1 * (1 + along[:, None]))
        u, v = x - uniform(-1, 1), y - uniform(-1, 1)
        clutter = torch.maximum(u.abs(), v.abs()) < uniform(0.05, 0.2)
        images = torch.where(clutter[:, None], torch.rand(n, 3, 1, 1, generator=g), images)
        scale, du, dv = uniform(0.6, 0.9), uniform(-0.2, 0.2), uniform(-0.2, 0.2)
        u, v = (along - du) / scale, (across - dv) / scale  # the shape's coordinates
        r = (u ** 2 + v ** 2).sqrt()
        shapes = HELD_OUT_SHAPES if split == "held_out" else SHAPES
        masks = torch.stack([inside(u, v, r) for inside in shapes.values()])  # [4, N, H, W]
        mask = masks[kinds // 2, torch.arange(n)]  # [N, H, W]
        checks = ((u * 6).sin() * (v * 6).sin() > 0) & (kinds % 2 == 1)[:, None, None]
        images = torch.where((mask & ~checks)[:, None], second, images)
        images = torch.where((mask & checks)[:, None], torch.lerp(first, second, 0.4), images)
        images = images + 0.03 * torch.randn(images.shape, generator=g)
        labels = labels if split == "held_out" else kinds
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# --- Scores.
# (logits [N, C], features [N, D], ref) -> confidence [N]. `ref` is what a score may know of network
# and training set: weight [C, D] of the classifier, features [M, D], their mean [D]; and, for
# micl_knn, the bank [K, D] of unit features, k, and standard [2, 2], see `reference`.


def nearness(features, bank, k):
    """Features [N, D], bank [M, D], made of unit length -> minus the distance to the k-th [N]."""
    bank, queries = (F.normalize(x.double(), dim=1) for x in (bank, features))
    centre = bank.mean(0)  # subtracted, else rounding hides the distances of nearly equal features
    bank, chunks = (bank - centre).float(), (queries - centre).float().split(500)
    kth = [torch.cdist(chunk, bank).topk(min(k, len(bank)), largest=False)[0][:, -1]
           for chunk in models.progress("chunks of nearest neighbours", chunks)]
    return -torch.cat(kth)


def fdbd(logits, features, ref):
    """Mean distance to the class boundaries over that to the training mean (arXiv 2312.11536)."""
    top, predicted = logits.max(1)
    gap = torch.cdist(ref["weight"], ref["weight"])[predicted]  # [N, C], |w_pred - w_c|
    distance = ((top[:, None] - logits) / gap.clamp_min(1e-12)).sum(1) / (logits.shape[1] - 1)
    return distance / (features - ref["mean"]).norm(dim=1).clamp_min(1e-12)


def micl(logits, features, ref):
    """OAL's detector: top logit above the mean logit, over the distance to the training mean."""
    return losses.ratio(logits, features, ref["mean"])


def micl_knn(logits, features, ref):
    """micl and minus the distance to the k-th nearest training feature, standardised, added.

    The detector of a pretrained network: its features know more than the classes that it learned.
    """
    parts = micl(logits, features, ref), nearness(features, ref["bank"], ref["k"])
    return sum((part - mean) / std for part, (mean, std) in zip(parts, ref["standard"]))


SCORES = {
    # Maximum softmax probability (arXiv 1610.02136); in float32 confident ones would tie at 1.
    "msp": lambda logits, features, ref: logits.double().softmax(1).amax(1),
    # Maximum logit (arXiv 1911.11132).
    "mls": lambda logits, features, ref: logits.amax(1),
    # Negative free energy (arXiv 2010.03759, equation 4, T = 1; the score of OAL's paper).
    "ebo": lambda logits, features, ref: logits.logsumexp(1),
    # Minus the distance to the 50th nearest training feature (arXiv 2204.06507).
    "knn": lambda logits, features, ref: nearness(features, ref["features"], 50),
    "fdbd": fdbd, "micl": micl, "micl_knn": micl_knn}


# --- Metrics.

def detection_metrics(conf_id, conf_ood):
    """Confidences of ID [N] and OOD images [M] -> percentages as in OpenOOD v1.5.

    'aupr_in' and 'aupr_out' have ID or OOD as positive class; 'fpr95': ID flagged once 95 % of OOD
    is caught; 'fpr95_id': OOD accepted once 95 % of ID is. ValueError: an input that is empty, not
    1-D, or holds a NaN.
    """
    conf_id, conf_ood = (np.array(conf.tolist() if torch.is_tensor(conf) else conf, np.float64)
                         for conf in (conf_id, conf_ood))
    if conf_id.ndim != 1 or conf_ood.ndim != 1:
        raise ValueError(f"detection_metrics takes confidences [N] and [M], not {conf_id.shape} "
                         f"and {conf_ood.shape}")
    conf = np.concatenate([conf_id, conf_ood])
    if not len(conf_id) or not len(conf_ood) or np.isnan(conf).any():
        raise ValueError("detection_metrics: no ID or no OOD confidence, or one that is NaN")
    is_id = np.arange(len(conf)) < len(conf_id)
    caught, flagged = roc(-conf, ~is_id)  # OOD is the positive class
    kept, let_in = roc(conf, is_id)
    return {"auroc": 100 * area(caught, flagged) / caught[-1] / flagged[-1],
            "aupr_in": 100 * area(kept / (kept + let_in), kept / kept[-1], start=1),
            "aupr_out": 100 * area(caught / (caught + flagged), caught / caught[-1], start=1),
            "fpr95": 100 * fpr_at_95(caught, flagged),
            "fpr95_id": 100 * fpr_at_95(kept, let_in)}


def roc(score, positive):
    """Score [N], positive bool [N] -> counts [K] of true and of false positives, at or above each
    of its K different values, from the highest on.
    """
    order = np.argsort(-score)
    score, true = score[order], np.cumsum(positive[order])
    ends = np.flatnonzero(np.r_[score[1:] != score[:-1], True])  # last of each group of ties
    return true[ends], ends + 1 - true[ends]


def area(y, x, start=0):
    """Trapezoidal area under the points (0, start), (x_1, y_1), ..."""
    x, y = np.r_[0, x], np.r_[start, y]
    return np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2


def fpr_at_95(true, false):
    """Counts [K] of roc -> false-positive rate, 0 to 1, at the first corner of 95 % recall.

    Corners alone, as in OpenOOD: scikit-learn drops points on a straight line between two others.
    """
    i = np.argmax(true / true[-1] >= 0.95)
    if 0 < i < len(true) - 1:  # the two ends are always kept
        bends = (np.diff(true[i - 1:], 2) != 0) | (np.diff(false[i - 1:], 2) != 0)
        i += np.argmax(np.r_[bends, True])
    return false[i] / false[-1]


# --- A network on the benchmark.

def reference(net, data):
    """A network, its training and validation images -> what scores know of them, on the CPU.

    standard [2, 2]: mean and std of both parts of micl_knn over the validation images; where these
    are few, over the training images, each without itself. bank: at most 5,000 unit features.
    Mistake: all features are equal.
    """
    (images, _), (val, _) = data.splits["train"], data.splits["val"]
    logits, features = models.predict(net, images)
    models.check_different(features)
    mean, k = features.mean(0), 1
    every = slice(None, None, math.ceil(len(features) / 5000))  # of all classes: lists are sorted
    bank = F.normalize(features[every], dim=1).half()
    if len(val) < 19:
        pair, neighbour = (logits[every], features[every]), k + 1  # each is its own nearest
    else:
        pair, neighbour = models.predict(net, val), k
    parts = losses.ratio(*pair, mean), nearness(pair[1], bank, neighbour)
    standard = [torch.stack([part.mean(), part.std().clamp_min(1e-6)]) for part in parts]
    return {"weight": net.fc.weight.detach().cpu().float(), "features": features, "mean": mean,
            "bank": bank, "k": k, "standard": torch.stack(standard)}


def measure(net, data, ref):
    """A network on the sets of data -> (entry of results.json, {score: {set: confidence [N]}})."""
    groups = {name: group for group, names in data.groups.items() for name in names
              if name in data.splits}
    outputs = {name: models.predict(net, data.splits[name][0])
               for name in models.progress("sets through the network", ["test", *groups])}
    hits = (outputs["test"][0].argmax(1) == data.splits["test"][1]).double()
    entry, confidences = {"id_acc": 100 * hits.mean().item(), "scores": {}}, {}
    for score, confidence in SCORES.items():
        conf = {name: confidence(*pair, ref).double() for name, pair in outputs.items()}
        metrics = {name: detection_metrics(conf["test"], conf[name]) for name in groups}
        means = {}
        for group in ("near", "far"):
            members = [metrics[name] for name in groups if groups[name] == group]
            if members:  # an absent group has no mean
                means[group] = {key: np.mean([row[key] for row in members]) for key in members[0]}
        sets = {name: {"group": groups[name], "n": len(conf[name]), **metrics[name]}
                for name in groups}
        entry["scores"][score] = {**means, "sets": sets}
        confidences[score] = conf
    return entry, confidences


def report(paths, data, device, out, facts):
    """{name: file of weights} on the sets of data: prints a table each, writes two files into out.

    results.json has the facts and every figure, scores.npz every confidence.
    """
    begun, results, arrays = time.perf_counter(), {**facts, "models": {}}, {}
    for name, path in paths.items():
        net, detector = open_network(path, data, device)
        ref = reference(net, data)
        ref |= {key: detector[key] for key in ref if key in detector}  # as it judges
        results["models"][name], confidences = measure(net, data, ref)
        results.setdefault("arch", net.arch)
        arrays |= {f"{name}/{score}/{split}": conf.float().numpy()
                   for score, sets in confidences.items() for split, conf in sets.items()}
        scores = dict.fromkeys(["ebo", "fdbd", "micl", score_of(net)])  # each once
        print_table(path, results["models"][name], scores)
    if data.missing():
        print(f"missing, in no mean: {', '.join(data.missing())}")
    results["seconds"]["evaluate"] = time.perf_counter() - begun
    results["seconds"]["total"] = sum(results["seconds"].values())
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    write(Path(out) / "scores.npz", packed.getvalue())
    write(Path(out) / "results.json", json.dumps(results, indent=1))
    print(f"written: {Path(out) / 'results.json'}, scores.npz")


def print_table(path, entry, scores):
    """The figures of one network in Markdown, a row for each of the scores."""
    sets = entry["scores"]["micl"]["sets"]
    columns = [(group, metric) for group in ("near", "far") if group in entry["scores"]["micl"]
               for metric in ("auroc", "fpr95")]
    heads = [*(f"{group} {metric.upper()}" for group, metric in columns), *sets]
    print(f"\n{path}: accuracy {entry['id_acc']:.1f}" + "; AUROC of each set\n" * bool(sets))
    if not sets:
        return
    print(f"| score | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for score in scores:
        row = entry["scores"][score]
        cells = [row[group][metric] for group, metric in columns]
        cells += [row["sets"][name]["auroc"] for name in sets]
        print(f"| {score} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    print(flush=True)


def digest_of(images, labels):
    """A digest of images and labels, 32 bits, without a copy of them."""
    images, labels = (part.cpu().contiguous().numpy().data for part in (images, labels))
    return zlib.crc32(labels, zlib.crc32(images))


def describe(program, data, size, device):
    """What results.json says of every run; code: a digest of the five files."""
    code = hashlib.sha256()
    for name in ("train", "synthesize", "losses", "evaluate", "models"):
        code.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    pairs = [data.splits[split] for split in ID_SPLITS]
    return {"dataset": data.name, "size": size, "classes": data.classes,
            "id": {"n": {split: len(labels) for split, (_, labels) in zip(ID_SPLITS, pairs)},
                   "digest": "-".join(f"{digest_of(*pair):08x}" for pair in pairs)},
            "command": shlex.join([program, *sys.argv[1:]]), "device": device,
            "versions": {package.__name__: package.__version__
                         for package in (torch, torchvision, np)},
            "missing": data.missing(), "sources": data.sources, "code": code.hexdigest()}


# --- The detector: NAME.pt has the weights, NAME.detector.pt what else a verdict needs.

class Detector:
    """detector(images) -> (class indices int64 [N], scores [N]); OOD where score < .threshold.

    images: uint8 [N, 3, S, S], RGB, a tensor or an array, S = .size; `judge` prepares files.
    .threshold flags 5 % of new ID images, or the least that few validation images can give;
    .threshold_at(rate) another share. Also: .net, and the entries of NAME.detector.pt, as .classes.
    """

    def __init__(self, net, content):
        vars(self).update(content, net=net.eval())
        self.threshold = self.threshold_at(max(0.05, 1 / (len(self.val) + 1)))

    def __call__(self, images):
        """ValueError: images of another type or size."""
        if not torch.is_tensor(images):
            images = np.array(images, order="C")
            images = torch.from_numpy(images) if images.dtype == np.uint8 else images
        if images.dtype != torch.uint8 or images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"images must be uint8 [N, 3, {self.size}, {self.size}], RGB, not "
                             f"{images.dtype} {list(images.shape)}: .judge takes files")
        logits, features = models.predict(self.net, images)
        return logits.argmax(1), SCORES[self.score](logits, features, vars(self))

    def judge(self, images):
        """Paths or PIL images, one or a list -> as a call, each turned, resized and cropped.

        ValueError with the path: a file that cannot be read, or neither a path nor a PIL image.
        """
        ready = [torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)]
        one = isinstance(images, (str, os.PathLike, Image.Image)) or not hasattr(images, "__iter__")
        for image in [images] if one else images:
            try:
                opened = image if isinstance(image, Image.Image) else open_image(Path(image))
                ready.append(to_tensor(ImageOps.exif_transpose(opened), self.size)[None])
            except Exception as problem:  # PIL raises a dozen types for damaged files
                raise ValueError(f"{image} cannot be read: {problem}")
        return self(torch.cat(ready))

    def threshold_at(self, rate):
        """The threshold that flags a share of new ID images, 0 < rate < 1, on average.

        The r-th smallest of n validation scores: a new one lies below it r / (n + 1) times.
        ValueError: the n images cannot give the rate.
        """
        n = len(self.val)
        r = math.floor(rate * (n + 1) + 1e-9) if 0 < rate < 1 else 0
        if not 1 <= r <= n:
            least = math.ceil(1e4 / (n + 1)) / 1e4
            raise Mistake(f"{n} validation images cannot give a rate of {rate:g}: name one from "
                          f"{least:g} on, below 1, or add images to val/")
        return self.val[r - 1].item()


def score_of(net):
    """The score of a network's own detector."""
    return "micl_knn" if net.arch == models.PRETRAINED else "micl"


def describe_detector(net, data, grew_from=""):
    """A network, its training and validation images -> the content of NAME.detector.pt.

    grew_from: the digest of the network that it started as. Of validation images that are copies of
    each other one counts.
    """
    ref, score, (images, _) = reference(net, data), score_of(net), data.splits["val"]
    different = {image.numpy().tobytes(): i for i, image in enumerate(images.cpu())}
    conf = SCORES[score](*models.predict(net, images), ref)[list(different.values())]
    names = ("mean", "bank", "k", "standard") if score == "micl_knn" else ("mean",)
    return {"image_mean": net.image_mean.cpu(), "image_std": net.image_std.cpu(),
            "size": net.size, "classes": list(data.classes), "arch": net.arch, "score": score,
            "val": conf.float().sort()[0], "digest": models.digest(net), "grew_from": grew_from,
            **{name: ref[name] for name in names}}


def beside(path):
    """NAME.pt -> the path NAME.detector.pt."""
    return os.path.splitext(path)[0] + ".detector.pt"


def read_detector(path):
    """NAME.pt -> the content of the NAME.detector.pt beside it, {} if there is none."""
    if not os.path.exists(beside(path)):
        return {}
    content = models.load_tensors(beside(path), "a detector of this program")
    names = {"image_mean", "image_std", "classes", "digest"}
    try:
        bank, more = {"micl": ("mean", []), "micl_knn": ("bank", ["k", "standard"])}[
            content["score"]]
        fits = (content[bank].shape[-1:] == content["mean"].shape
                and content["val"].dim() == 1 and len(content["val"])
                and names.union(more) <= content.keys()
                and content["arch"] in models.ARCHS and content["size"] in SIZES)
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise Mistake(f"{beside(path)} is not a detector of this program: train the network again")
    return content


def size_of(path, size):
    """The side of the images of a network's file: of its detector, else --size, else its own."""
    content = read_detector(path)
    if content and size not in (None, content["size"]):
        raise Mistake(f"{path} is for images {content['size']} wide, not {size}: leave out --size")
    side = content["size"] if content else size or models.size_of(path)
    if not side:
        raise Mistake(f"no {beside(path)}: put it beside {path}, which does not say how wide its "
                      "images are; or add --size")
    return side


def open_network(path, data=None, device="cpu"):
    """A file of weights NAME.pt -> (network, content of NAME.detector.pt, {} without that file).

    Without it classes, mean, std and size are those of data, an ImageSet. Mistake: a file is
    missing, damaged or another run's, or its classes are not those of data.
    """
    content = read_detector(path)
    if not content and not data and os.path.exists(path):
        raise Mistake(f"no {beside(path)}: put it beside {path}, or name the ID set by --dataset")
    classes = content["classes"] if content else data.classes if data else []
    if data and classes != data.classes:
        raise Mistake(f"{path} was trained for {len(classes)} other classes than {data.name} has: "
                      f"{', '.join(classes)[:300]}; name its own --dataset")
    size = content["size"] if content else data.splits["train"][0].shape[-1] if data else 32
    try:
        net = models.load_network(path, len(classes), size, content.get("arch"))
    except Mistake as problem:
        raise problem if content else Mistake(f"no {beside(path)}: put it beside the weights; "
                                              f"without it, {problem}")
    if content and content["digest"] != models.digest(net):
        raise Mistake(f"{beside(path)} belongs to other weights than {path}: put back the files of "
                      "one run")
    if content:
        net.set_scale(content["image_mean"], content["image_std"])
    elif net.arch != models.PRETRAINED:
        net.set_scale(data.mean, data.std)
    return models.to_device(net, device), content


def load_detector(path, device="cpu", data=None):
    """A file of weights NAME.pt -> its Detector, by NAME.detector.pt, or by data, an ImageSet.

    ValueError or OSError: a file is missing, damaged or another run's.
    """
    net, content = open_network(path, data, device)
    return Detector(net, content or describe_detector(net, data))


def flag(detector, folder, rate=None):
    """Prints a CSV: path, predicted class, score and verdict of each image of a folder."""
    threshold = detector.threshold if rate is None else detector.threshold_at(rate)
    images, paths, _, bad = read_folder(folder, detector.size)
    labels, scores = (values.tolist() for values in detector(images))
    rows = [["path", "class", detector.score, "verdict"]]
    rows += [[name, detector.classes[label], f"{score:.6f}", "ID" if score >= threshold else "OOD"]
             for name, label, score in zip(paths, labels, scores)]
    rows += [[name, "", "", "unreadable"] for name in bad]
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    n, r = len(detector.val), int((detector.val < threshold).sum()) + 1
    note(f"threshold {threshold:.6f} flags {r / (n + 1):.1%} of new ID images on average: rank {r} "
         f"of {n} validation images, {1 / (n + 1):.1%} each")


# --- Plumbing of the programs, and the command line.

def note(message):
    print(message, file=sys.stderr)


def write(path, content):
    """Writes bytes, text, or another object by torch.save, in one step: whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two runs may share a cache
    content = content.encode() if isinstance(content, str) else content
    try:
        with open(partial, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def guarded(main):
    """Runs a program. What a user can cause ends it with one line on stderr and status 2.

    Ctrl-C ends it with status 130.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130)
    except (Mistake, OSError, FloatingPointError) as problem:
        print("error:", " ".join(str(problem).split()), file=sys.stderr)
        raise SystemExit(2)


def whole(low, high):
    """-> an argparse type: a whole number from low to high."""
    def number(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return int(text)
    return number


positive, seed = whole(1, 10 ** 9), whole(0, 10 ** 17)


def path(text):
    """An argparse type: a path. An empty one may be a shell's variable that was never set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path: name a file or a folder")
    return os.path.expanduser(text)


def fail(message):
    raise Mistake(message)


def common_parser(doc):
    """A parser with the options that the programs share."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--dataset", metavar="{" + ",".join(NAMED) + ",FOLDER}", default="shapes", type=path,
        help="the ID set (%(default)s); FOLDER holds train/CLASS/... (val/, test/)")
    add("--size", type=int, choices=SIZES, metavar="S",
        help="side of the images, a multiple of 32 up to 320 (the network's own)")
    add("--data-root", metavar="DIR", default="data", type=path,
        help="in the OpenOOD v1.5 layout, or where torchvision downloads (%(default)s)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else
        "mps" if torch.backends.mps.is_available() else "cpu")
    return parser


def device(text):
    """An argparse type: a device that computes."""
    try:
        torch.zeros(1, device=text).item()  # no value comes back from 'meta'
    except (RuntimeError, AssertionError, ImportError) as problem:  # without CUDA: AssertionError
        raise argparse.ArgumentTypeError(f"no device '{text}': {str(problem).splitlines()[0]}")
    return text


def main():
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=path, metavar="FILE", help="weights of a network")
    add("--ood", nargs="+", action="extend", default=[], type=path, metavar="FOLDER",
        help="folders of your own OOD images")
    add("--flag", type=path, metavar="FOLDER", help="print class, score and verdict of each "
        "image of the folder, by NAME.detector.pt, else by the images of --dataset")
    add("--rate", type=float, help="of --flag: the share of new ID images to be flagged (0.05)")
    add("--out", default="runs/evaluate", type=path, help="folder for results.json (%(default)s)")
    args = parser.parse_args()
    if args.rate is not None and not args.flag:
        raise Mistake("--rate is of --flag: add --flag FOLDER")
    if args.ood and args.flag:
        raise Mistake("--ood is of the benchmark, --flag is not: leave out one of them")
    size = size_of(args.checkpoint, args.size)
    if args.flag:
        data = None if read_detector(args.checkpoint) else load_set(
            args.dataset, args.data_root, size, ["train", "val"])
        return flag(load_detector(args.checkpoint, args.device, data), args.flag, args.rate)
    if os.path.isfile(args.out):
        raise Mistake(f"{args.out} is a file: name a folder with --out")
    before = Path(args.out, "results.json")
    if before.exists() and '"command": "evaluate.py' not in before.read_text(errors="replace"):
        raise Mistake(f"{before} is another program's: name another folder with --out")
    data = load_set(args.dataset, args.data_root, size, ood=args.ood)
    if not set(data.splits) - set(ID_SPLITS):
        raise Mistake(f"no OOD set of {data.name} is there: name folders with --ood")
    report({Path(args.checkpoint).stem: args.checkpoint}, data, args.device, args.out,
           {**describe("evaluate.py", data, size, args.device), "seconds": {}})


if __name__ == "__main__":
    guarded(main)
