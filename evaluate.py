"""The benchmark: image sets, scores, metrics, tables; and the detector of a trained network.

    python evaluate.py runs/cifar100/student.pt --dataset cifar100 --data-root DIR   # all sets
    python evaluate.py runs/cifar100/ce.pt runs/cifar100/student.pt --dataset cifar100 \\
        --data-root DIR --ood FOLDER --plot out.png                                  # and yours
    python evaluate.py runs/photos/student.pt --flag FOLDER > flags.csv     # verdict per image
    python evaluate.py --collect runs/*/results.json                        # tables over seeds

Lists, transform and metrics are those of OpenOOD v1.5 (arXiv 2306.09301). A score is a confidence:
higher = more in-distribution.
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

SIZE, SIZES = 32, (32, 64, 128, 224)
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


def note(message):
    print(message, file=sys.stderr)


def run(main):
    """Runs a program. What a user or the machine causes ends it with one line on stderr."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it may be closed
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130)
    except FloatingPointError as problem:
        fail(f"{problem}: train it again, on more images or with a lower --w-* weight")
    except OSError as problem:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # else Python flushes a broken stdout again at exit
        if not isinstance(problem, BrokenPipeError):
            fail(problem)
        os.dup2(null, 2)
        raise SystemExit(141)
    except (MemoryError, RuntimeError) as problem:
        words = ("MemoryError", "allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc",
                 "start new thread")
        if not any(word.lower() in repr(problem).lower() for word in words):
            raise
        fail("no memory left: take a smaller --size or another --device, and go on with --resume")


def write(path, content):
    """Writes text, bytes, or another object by torch.save. An OSError leaves the old file whole."""
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    elif not isinstance(content, bytes):
        buffer = io.BytesIO()  # torch.save to a file makes a RuntimeError of a full disk
        torch.save(content, buffer)
        content = buffer.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
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
    classes: list       # names, in the order of the labels
    mean: torch.Tensor  # [3], of the training images from 0 to 1
    std: torch.Tensor   # [3]
    groups: dict        # {"near", "far", "yours": names of OOD sets}; "yours" is in no mean
    splits: dict        # {"train", "val", "test" or an OOD set: (uint8 [N, 3, S, S], int64 [N])}
    sources: dict       # {split: "list", "torchvision", "drawn" or "folder"}

    def missing(self):
        """Names of the benchmark's OOD sets that were not found."""
        names = [*self.groups["near"], *self.groups["far"]]
        return [name for name in names if name not in self.splits]


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
    else:  # long and thin: only the crop is computed, within 1 of 255, to save memory
        box = [*(start * sides / resized), *((start + size) * sides / resized)]
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(paths, size=SIZE):
    """Image files -> (list of uint8 [3, size, size], {path: reason} of the unreadable files)."""
    images, bad, brightest = [], {}, []  # the brightest pixel of each 16-bit image

    def read(path):
        if not os.path.isfile(path):
            return "not a regular file"  # opening a named pipe would wait for ever
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):
                    brightest.append(np.max(image))
                return to_tensor(image, size)
        except Exception as problem:  # PIL raises a dozen types for damaged files
            return f"{type(problem).__name__}: {problem}".splitlines()[0]

    with ThreadPoolExecutor() as pool:
        results = pool.map(read, paths)
        for path, result in zip(models.progress("images read", paths), results):
            if torch.is_tensor(result):
                images.append(result)
            else:
                bad[str(path)] = result
    if brightest and max(brightest) < 16384:
        note(f"note: the largest value of the {len(brightest)} 16-bit images is {max(brightest)} "
             "of 65535: scale them to 16 bits")
    return images, bad


def read_list(list_path, root, size):
    """An OpenOOD list (lines `path label`) -> (images, labels), None if the set is not there.

    The images are decoded once and then come from a cache below the root.
    """
    if not list_path.is_file():
        return None
    cache = list_path.stem if size == SIZE else f"{list_path.stem}_{size}"
    cache = root / "oal_cache" / list_path.parent.name / f"{cache}.pt"
    text = list_path.read_text("utf-8-sig", "replace")
    key = hashlib.sha256(f"RGB, Resize({size}), CenterCrop({size})\n{text}".encode()).hexdigest()
    try:
        saved = torch.load(cache, weights_only=True)
        if saved["key"] == key and saved["crc"] == zlib.crc32(saved["images"].numpy().data):
            return saved["images"], saved["labels"]
    except Exception:  # absent or damaged: the images are decoded anew
        pass
    try:
        rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
        paths = [root / "images_classic" / path for path, _ in rows]
        labels = torch.tensor([int(label) for _, label in rows])
    except ValueError:
        paths = []
    if not paths:
        fail(f"{list_path} is not a list, or empty: each line must be 'path label'")
    if not any(path.is_file() for path in paths):
        note(f"none of the {len(paths)} images of {list_path} is there, the first is {paths[0]}")
        return None
    note(f"decoding the {len(paths)} images of {list_path.name}, once")
    images, bad = decode(paths, size)
    for path, reason in bad.items():
        fail(f"{len(bad)} of the {len(paths)} images of {list_path} cannot be read, the first is "
             f"{path} ({reason}): restore it")
    images = torch.stack(images)
    try:
        write(cache, {"key": key, "crc": zlib.crc32(images.numpy().data), "images": images,
                      "labels": labels})
    except OSError as problem:  # a read-only data folder costs time, not the run
        note(f"not cached: {problem}")
    return images, labels


def from_torchvision(name, split, root, size):
    """A set that torchvision downloads -> (images, labels), or None where that fails.

    Of an ID set 'val' is the first 1,000 test images and 'test' the others, unlike OpenOOD's lists.
    """
    makers = {"cifar10": lambda: [datasets.CIFAR10(root, split == "train", download=True)],
              "cifar100": lambda: [datasets.CIFAR100(root, split == "train", download=True)],
              "svhn": lambda: [datasets.SVHN(root, "test", download=True)],
              "mnist": lambda: [datasets.MNIST(root, train=False, download=True)],
              "texture": lambda: [datasets.DTD(root, part, download=True)
                                  for part in ("train", "val", "test")]}
    if name not in makers:
        return None
    try:
        pairs = [(to_tensor(image, size), label)
                 for source in makers[name]() for image, label in source]
    except Exception as problem:  # no network, a server's refusal, scipy missing for SVHN
        note(f"torchvision did not bring {name}: {problem}".splitlines()[0])
        return None
    images, labels = torch.stack([image for image, _ in pairs]), [label for _, label in pairs]
    if split not in ("train", "val", "test"):
        return images, torch.full((len(images),), -1)
    part = {"train": slice(None), "val": slice(1000), "test": slice(1000, None)}[split]
    return images[part], torch.tensor(labels)[part]


def read_split(dataset, split, data_root, size):
    """One split of a named set -> ((images, labels) or None for a missing OOD set, its source)."""
    if dataset == "shapes":
        return draw_set(split, size), "drawn"
    root, is_id = Path(data_root), split in ("train", "val", "test")
    list_path = root / "benchmark_imglist" / dataset / f"test_{split}.txt"
    if is_id:
        list_path = list_path.with_name(f"{split}_{dataset}.txt")
    if (root / "benchmark_imglist").is_dir():
        loaded, source = read_list(list_path, root, size), "list"
    else:
        loaded = from_torchvision(dataset if is_id else split, split, root, size)
        source = "torchvision"
    if is_id and loaded is None:
        fail(f"no images of {list_path}: put OpenOOD v1.5's images_classic/ and benchmark_imglist/ "
             f"into {root}")
    if is_id and not 0 <= loaded[1].min() <= loaded[1].max() < len(NAMED[dataset][0]):
        fail(f"{list_path} holds labels that {dataset} does not have: put back OpenOOD's list")
    return loaded, source


def load_set(dataset, data_root="data", size=SIZE, wanted=None, ood=()):
    """A key of NAMED, or a folder of classes; folders of OOD images -> an ImageSet.

    wanted: the splits to read of a named set (all). A missing OOD set is left out.
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


def read_folder(folder, size=SIZE):
    """Images below a folder -> (uint8 [N, 3, size, size], paths, {path: reason} of the unreadable).

    Links are followed. Folders that begin with '.' or '@' (copies, thumbnails) are left out.
    """
    if not Path(folder).is_dir():
        fail(f"{folder} is not a folder: name one that holds images")
    files, bad, left_out, visited = [], {}, [], set()
    locked = lambda problem: bad.update({problem.filename: "a folder that cannot be listed"})
    for here, folders, names in os.walk(folder, followlinks=True, onerror=locked):
        folders.sort()
        if os.path.realpath(here) in visited:  # a link to a folder that was read
            names, folders[:] = [], []
        visited.add(os.path.realpath(here))
        files += [os.path.join(here, name) for name in names]
        left_out += [os.path.join(here, name) for name in folders if name[0] in ".@"]
        folders[:] = [name for name in folders if name[0] not in ".@"]
    endings = datasets.folder.IMG_EXTENSIONS
    paths = sorted(path for path in files if path.lower().endswith(endings))
    images, unreadable = decode(paths, size)
    bad |= unreadable
    for path, reason in bad.items():
        note(f"unreadable: {path} ({reason})")
    hidden = f", {len(left_out)} folders left out, the first is {left_out[0]}" if left_out else ""
    note(f"{folder}: {len(images)} images, {len(bad)} unreadable, {len(files) - len(paths)} other "
         f"files{hidden}")
    if not images:
        fail(f"{folder} holds no image that can be read: a name must end in {' '.join(endings)}")
    return torch.stack(images), [path for path in paths if path not in bad], bad


def read_classes(folder, size=SIZE):
    """A user's folder train/CLASS/..., with or without val/ (valid/, validation/) and test/.

    A missing split takes a tenth of each class of train/, or one image of a class of 4 to 9, by the
    digest of the path below the folder: every program splits alike, a new image moves few others.
    """
    root, train, splits, names = Path(folder), Path(folder, "train"), {}, {}
    if not train.is_dir():
        fail(f"no folder {train}: put the images of each class into {train / 'CLASS'}")
    plain = lambda name: unicodedata.normalize("NFC", name)  # macOS writes an accent apart
    classes = sorted({plain(path.name) for path in train.iterdir()
                      if path.is_dir() and path.name[0] not in ".@"})
    if len(classes) < 2:
        held = f"the class {classes[0]} alone" if classes else "no class"
        fail(f"{train} holds {held}: add another folder")
    for name in ("train", "val", "valid", "validation", "test"):
        split = "val" if name.startswith("val") else name
        if split in splits or not (root / name).is_dir():
            continue
        images, paths, _ = read_folder(root / name, size)
        names[split] = [plain(os.path.relpath(path, root)) for path in paths]
        of_image = [Path(path).parts[1] for path in names[split]]
        for label in set(of_image) - set(classes):
            fail(f"{root / name / label} is no class of {train}: move it away, or add the class")
        splits[split] = images, torch.tensor([classes.index(label) for label in of_image])

    images, labels = splits["train"]
    absent = [split for split in ("val", "test") if split not in splits]
    indices = {split: [] for split in ("train", *absent)}  # of the images in train/
    rank = lambda i: hashlib.sha256(os.fsencode(names["train"][i])).digest()
    for label, name in enumerate(classes):
        own = sorted((labels == label).nonzero().flatten().tolist(), key=rank)
        tenth = max(len(own) // 10, 1) if len(own) >= 4 else 0
        for split in absent:
            indices[split] += own[:tenth]
            own = own[tenth:]
        if len(own) < 2:
            fail(f"the class {name} has {len(own)} images to train on in {train}: it needs 2")
        indices["train"] += own
    for split, chosen in indices.items():
        if not chosen:
            fail(f"{root} has no {split}/, and no class has 4 images: add images")
        splits[split] = images[sorted(chosen)], labels[sorted(chosen)]

    images, labels = splits["train"]
    note(f"{root}: {len(classes)} classes, {', '.join(classes)}; {len(images)} images to train on, "
         f"{len(splits['val'][0])} for thresholds, {len(splits['test'][0])} to test")
    levels = torch.arange(256).double() / 255
    counts = [channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]
    shares = torch.stack(counts).double() / counts[0].sum()          # [3, 256]
    mean = shares @ levels                                           # [3]
    std = (shares @ levels ** 2 - mean ** 2).clamp_min(1e-4).sqrt()  # 0.01 if in one colour
    return ImageSet(str(folder), classes, mean.float(), std.float(), {"near": (), "far": ()},
                    splits, dict.fromkeys(splits, "folder"))


# --- Embedded images, drawn in a second: the whole method runs with no download. ------------------

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


def draw_set(split, size=SIZE):
    """An embedded set -> (uint8 [N, 3, S, S], labels int64 [N]), the same on every machine.

    ID: 4 shapes x 2 textures of any colour, place, size and turn, on a gradient with clutter and
    noise. 'held_out' (near-OOD): 4 other shapes drawn alike. None for an unknown name.
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
        u, v = (along - du) / scale, (across - dv) / scale               # the shape's coordinates
        r = (u ** 2 + v ** 2).sqrt()
        shapes = HELD_OUT_SHAPES if split == "held_out" else SHAPES
        masks = torch.stack([inside(u, v, r) for inside in shapes.values()])          # [4, N, H, W]
        mask = masks[kinds // 2, torch.arange(n)]                                     # [N, H, W]
        checks = ((u * 6).sin() * (v * 6).sin() > 0) & (kinds % 2 == 1)[:, None, None]
        images = torch.where((mask & ~checks)[:, None], second, images)
        images = torch.where((mask & checks)[:, None], torch.lerp(first, second, 0.4), images)
        images = images + 0.03 * torch.randn(images.shape, generator=g)
        labels = labels if split == "held_out" else kinds
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# --- Scores. --------------------------------------------------------------------------------------
# (logits [N, C], features [N, D], ref) -> confidence [N]. `ref` is what a score may know of network
# and training set: weight [C, D] of the classifier, features [M, D], their mean [D].


def knn(logits, features, ref, k=50, megabytes=256):
    """Minus the distance to the k-th nearest training feature, unit length (arXiv 2204.06507).

    The centre is subtracted, else rounding would hide the distances of nearly equal features.
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
    """Mean distance to the class boundaries over that to the training mean (arXiv 2312.11536)."""
    top, predicted = logits.max(1)
    gap = torch.cdist(ref["weight"], ref["weight"])[predicted]      # [N, C], |w_pred - w_c|
    distance = ((top[:, None] - logits) / gap.clamp_min(1e-12)).sum(1) / (logits.shape[1] - 1)
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
    """Confidences of ID [N] and OOD images [M] -> percentages as in OpenOOD v1.5.

    'aupr_in' and 'aupr_out' have ID or OOD as positive class; 'fpr95': ID flagged once 95 % of OOD
    is caught; 'fpr95_id': OOD accepted once 95 % of ID is. ValueError: an empty input or a NaN.
    """
    conf_id, conf_ood = (torch.as_tensor(conf).detach().cpu().double().flatten().numpy()
                         for conf in (conf_id, conf_ood))
    conf = np.concatenate([conf_id, conf_ood])
    if not len(conf_id) or not len(conf_ood) or np.isnan(conf).any():
        raise ValueError("detection_metrics: no ID or no OOD confidence, or one that is NaN")
    order = np.argsort(conf)
    conf, ood = conf[order], (order >= len(conf_id)).astype(np.float64)
    ends = np.flatnonzero(np.r_[conf[1:] != conf[:-1], True])  # last of each group of ties
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

    As in OpenOOD that curve has corners alone, no points on a straight line between two others.
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
    """What scores may know of a network and, where they are there, its training images."""
    ref = {"weight": net.fc.weight.detach().cpu().float()}
    if "train" in data.splits:
        images, _ = data.splits["train"]
        _, ref["features"] = models.predict(net, images, data.mean, data.std)
        ref["mean"] = ref["features"].mean(0)
    return ref


def evaluate(net, data, scores, ref):
    """A network on the sets of data -> (entry of results.json, {score: {set: confidence [N]}})."""
    groups = {name: group for group, names in data.groups.items() for name in names
              if name in data.splits}
    outputs = {name: models.predict(net, data.splits[name][0], data.mean, data.std)
               for name in ("test", *groups)}
    labels = data.splits["test"][1]
    hits = (outputs["test"][0].argmax(1) == labels).double()
    entry = {"id_acc": 100 * hits.mean().item(), "n_id": len(labels), "scores": {}}
    confidences = {}
    for score in scores:
        conf = {name: SCORES[score](*pair, ref).double() for name, pair in outputs.items()}
        sets, means = {}, {}
        for name, group in groups.items():
            metrics = detection_metrics(conf["test"], conf[name])
            sets[name] = {"group": group, "n": len(conf[name]), **metrics}
        for group in ("near", "far"):
            members = [row for row in sets.values() if row["group"] == group]
            if members:  # an absent group has no mean
                means[group] = {key: sum(row[key] for row in members) / len(members)
                                for key in metrics}
        entry["scores"][score] = {**means, "sets": sets}
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
    start, student = results["models"]["ce"], results["models"]["oal"]
    yield (f"accuracy  {start['id_acc']:6.2f} -> {student['id_acc']:6.2f}   cross-entropy network "
           "-> student, percent")
    for group in ("near", "far"):
        if group in start["scores"]["ebo"]:
            ebo, own = ([entry["scores"][score][group]["auroc"] for entry in (start, student)]
                        for score in ("ebo", "micl"))
            yield (f"{group + '-OOD':<9} {ebo[0]:6.2f} -> {own[1]:6.2f}   AUROC by ebo -> AUROC by "
                   f"micl; ebo alone {ebo[0]:.2f} -> {ebo[1]:.2f}, micl alone {own[0]:.2f} -> "
                   f"{own[1]:.2f}")


def table_rows(runs):
    """results.json dicts -> {label: {seed: (entry of models, minutes of its training)}}.

    A start given by --ce is left out if the run that trained it is there too.
    """
    kinds = [", ".join(str(results[key]) for key in ("dataset", "arch", "size") if key in results)
             for results in runs]  # evaluate.py's results have no arch
    trained = [results["models"]["ce"] for results in runs
               if "seed" in results and not results["options"]["ce"]]
    rows = {}
    for number, (results, kind) in enumerate(zip(runs, kinds)):
        for name, entry in results["models"].items():
            label, seed = name, results.get("seed", f"run {number}")
            if "seed" in results:  # a run of train.py
                options, label = results["options"], results["label"]
                if name == "ce" and options["ce"] and entry in trained:
                    continue
                if name == "ce":
                    label = ("start" if options["ce"] else
                             f"start: cross-entropy, {options['ce_epochs']} epochs")
            row = rows.setdefault(f"{label} ({kind} px)" if len(set(kinds)) > 1 else label, {})
            if seed in row and row[seed][0] != entry:
                fail(f"two runs with different figures are seed {seed} of {label}: leave one out")
            row[seed] = entry, results["seconds"].get(name, 0) / 60
    return rows


def tables(runs):
    """results.json dicts -> the lines of two Markdown tables, mean±standard deviation (n - 1).

    A row is a label over its seeds. Scores: those of ebo, fdbd, micl that all networks have, else
    all that they share.
    """
    rows = {label: list(zip(*row.values())) for label, row in table_rows(runs).items()}
    entries = [entry for members, _ in rows.values() for entry in members]
    common = [score for score in SCORES if all(score in entry["scores"] for entry in entries)]
    scores = [score for score in common if score in ("ebo", "fdbd", "micl")] or common
    sizes = [{name: row["n"] for name, row in entry["scores"][scores[0]]["sets"].items()}
             for entry in entries]
    if any(other != sizes[0] for other in sizes):
        fail("the runs were measured on different OOD sets: make a table of each kind")

    def mean_std(values):
        spread = f"±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{spread}" if values else ""

    def cell(members, name, metric):  # of a group or a set, by each score
        figures = []
        for score in scores:
            found = [entry["scores"][score] for entry in members]
            figures.append(mean_std([{**row, **row["sets"]}[name][metric] for row in found]))
        return " / ".join(figures)

    def table(head, body):
        lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *body)]
        return [lines[0], "|---" * len(head) + "|", *lines[1:]]

    groups = [group for group in ("near", "far") if group in entries[0]["scores"][scores[0]]]
    columns = [(group, metric) for group in groups for metric in ("auroc", "fpr95")]
    titles = [f"{group} {metric.upper()}" for group, metric in columns]
    heading = ", ".join(runs[0][key] for key in ("dataset", "arch") if key in runs[0])
    body = [[label, len(members), mean_std([spent for spent in minutes if spent]),
             mean_std([entry["id_acc"] for entry in members]),
             *(cell(members, group, metric) for group, metric in columns)]
            for label, (members, minutes) in rows.items()]
    lines = [f"cells: {' / '.join(scores)}; minutes: of this training alone", "",
             *table([heading, "runs", "minutes", "accuracy", *titles], body)]
    if sizes[0]:
        titles = [f"{title(name, sizes[0])} ({n})" for name, n in sizes[0].items()]
        body = [[label, *(cell(members, name, "auroc") for name in sizes[0])]
                for label, (members, _) in rows.items()]
        lines += ["", *table(["AUROC", *titles], body)]
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
            for key, label in (("test", "ID"), (name, readable(title(name, names)))):
                axis.hist(conf[key].numpy(), bins, density=True, alpha=0.6, label=label)
            axis.axvline(threshold_at(conf["test"], tpr), color="black", linewidth=1)
            auroc = detection_metrics(conf["test"], conf[name])["auroc"]
            axis.set_title(f"{readable(heading)}, AUROC {auroc:.1f}", fontsize=9)
            axis.set_yticks([])
            axis.legend(fontsize=7)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:].lower(), dpi=70)
    write(path, picture.getvalue())


# --- The detector: NAME.pt has the weights, NAME.detector.pt what else a verdict needs. -----------

class Detector:
    """detector(images uint8 [N, 3, S, S]) -> (class indices int64 [N], scores [N], P(ID) [N]).

    The score is `micl`, P(ID) that of MICL's critic, NaN without one. Attributes: net, and the
    entries of NAME.detector.pt, such as .classes and .threshold.
    """
    a = tau = math.nan

    def __init__(self, net, content):
        self.net = net
        self.__dict__.update(content)

    def __call__(self, images):
        logits, features = models.predict(self.net, images, self.image_mean, self.image_std)
        critic = losses.MICL(self.mean, self.a, self.tau)
        score = critic.score(logits, features)
        return logits.argmax(1), score, critic.probability(score)


def digest(net):
    """A digest of a network's weights, the same for every file and device."""
    sha = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def detector_of(net, arch, data, critic=None):
    """A network, its training and validation images, the student's critic -> NAME.detector.pt."""
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


def beside(path):
    """NAME.pt -> the path NAME.detector.pt."""
    return Path(os.path.splitext(path)[0] + ".detector.pt")


def read_detector(path):
    """NAME.pt -> the dict of the NAME.detector.pt beside it, None if there is none."""
    if not beside(path).exists():
        return None
    try:
        content = torch.load(beside(path), map_location="cpu", weights_only=True)
        keys = ["image_mean", "image_std", "mean", "threshold", *({"a", "tau"} & content.keys())]
        shapes = [tuple(content[key].shape) for key in keys]
        fits = (shapes[:2] == [(3,), (3,)] and not any(shapes[3:])
                and all(content[key].isfinite().all() for key in keys)
                and min(content["image_std"]) > 0 and content.get("a", 1) > 0
                and all(isinstance(name, str) for name in (content["digest"], *content["classes"]))
                and type(content["size"]) is type(content["n_val"]) is int
                and content["size"] in SIZES and content["n_val"] > 0)
    except Exception:  # a text file, a truncated archive, other entries
        fits = False
    if not fits:
        fail(f"{beside(path)} is not a detector: remove it, and name the ID set by --dataset")
    return content


def open_network(path, content, size, device, data=None):
    """-> (network on the device, data with the mean and std that NAME.detector.pt has).

    A note says where data is not what the network was trained on.
    """
    classes = data.classes if data else content["classes"]
    net = models.to_device(models.load_network(path, len(classes), size=size), device)
    if not content:
        return net, data
    if content["digest"] != digest(net) or content["mean"].shape != (net.fc.in_features,):
        fail(f"{beside(path)} belongs to other weights than {path}: put back the two files of one run")
    if not data:
        return net, None
    differs = []
    if list(classes) != content["classes"]:
        differs.append("classes (labels are compared by number)")
    if size != content["size"]:
        differs.append(f"size ({size}, trained at {content['size']})")
    if not torch.allclose(data.mean, content["image_mean"], atol=1e-3):
        differs.append("mean of the images (the network's own is used)")
    if differs:
        note(f"note: --dataset {data.name} is not what {path} was trained on: {', '.join(differs)}")
    return net, data._replace(mean=content["image_mean"], std=content["image_std"])


def load_detector(path, device="cpu"):
    """A file of weights NAME.pt with NAME.detector.pt beside it -> a Detector; no images needed."""
    content = read_detector(path)
    if content is None:
        fail(f"no {beside(path)}: name the ID set of {path} by --dataset")
    net, _ = open_network(path, content, content["size"], device)
    return Detector(net, content)


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
    """A parser with the options that the programs share; check_common checks them."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--dataset", metavar="{" + ",".join(NAMED) + ",FOLDER}",
                        help="the ID set (shapes); FOLDER holds train/CLASS/... (val/, test/)")
    parser.add_argument("--size", type=int, choices=SIZES, help="side of the images (32)")
    parser.add_argument("--data-root", metavar="DIR",
                        help="in the OpenOOD v1.5 layout, or where torchvision downloads (data)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")
    return parser


def check_common(args):
    """Fills in the defaults of the shared options; ends the program where one is of no use."""
    args.dataset, args.size = args.dataset or "shapes", args.size or SIZE
    try:
        (torch.zeros(1, device=args.device) + 1).item()  # no value comes back from 'meta'
    except (RuntimeError, AssertionError, ImportError) as problem:  # without CUDA: AssertionError
        fail(f"no device {args.device}: {str(problem).splitlines()[0]}")
    if args.dataset in NAMED and args.size not in (SIZE, 224):
        fail(f"--size {args.size}: the images of {args.dataset} are {SIZE} wide: leave it out")
    if args.dataset not in NAMED and not Path(args.dataset).is_dir():
        fail(f"no dataset {args.dataset}: name a folder, or one of {', '.join(NAMED)}")
    if args.data_root and not Path(args.data_root).is_dir():
        fail(f"no data root {args.data_root}: name a folder")
    args.data_root = args.data_root or "data"


def main():
    parser = common_parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", help="files of weights, each a row of the result")
    parser.add_argument("--score", choices=[*SCORES, "all"], default="all")
    parser.add_argument("--ood", nargs="+", action="extend", default=[], metavar="FOLDER",
                        help="folders of your own OOD images")
    parser.add_argument("--flag", metavar="FOLDER",
                        help="print class, score (micl for all), verdict, P(ID) of each image")
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
        fail("checkpoints: name files of weights, one for --flag without --plot and --ood")
    contents = [read_detector(path) for path in args.checkpoints]
    sizes = {content["size"] for content in contents if content}
    given = args.dataset
    if len(sizes) == 1 and (given or not args.flag):
        args.size = args.size or sizes.pop()
    check_common(args)
    if args.flag:
        flag(args, contents[0], given)
    else:
        measure(args, contents)


def measure(args, contents):
    """Networks on the benchmark: prints the tables, writes results.json and the picture."""
    path = Path(args.out) / "results.json"
    if path.exists() and '"command": "evaluate.py' not in path.read_text(errors="replace"):
        fail(f"{path} holds another program's results: name another folder with --out")
    drawable = args.plot and args.plot.lower().endswith((".png", ".pdf", ".svg"))
    if args.plot and not (drawable and find_spec("matplotlib")):
        fail(f"--plot {args.plot}: install matplotlib; the file must end in .png, .pdf or .svg")
    start, columns = time.perf_counter(), {}
    scores = list(SCORES) if args.score == "all" else [args.score]
    of_train = ("knn",) if all(contents) else ("knn", "fdbd", "micl")  # a detector knows the mean
    lists = Path(args.data_root) / "benchmark_imglist" / args.dataset
    train_list = lists / f"train_{args.dataset}.txt"
    listed = args.dataset in NAMED and lists.is_dir()
    if args.score == "all" and listed and not train_list.is_file():
        scores = [score for score in scores if score not in of_train]
        note(f"no {train_list}: {', '.join(of_train)} left out")
    needs_train = any(score in of_train for score in scores)
    wanted = ["train", "test"] if needs_train else ["test"]
    if args.dataset in NAMED:
        wanted += [*NAMED[args.dataset][3], *NAMED[args.dataset][4]]
    data = load_set(args.dataset, args.data_root, args.size, wanted, args.ood)
    if not set(data.splits) - {"train", "val", "test"}:
        fail(f"no OOD set of {data.name} is there: name folders with --ood")
    results = {**describe("evaluate.py", args, data), "models": {}}
    for file, content in zip(args.checkpoints, contents):
        name = Path(file).stem if Path(file).stem not in results["models"] else file
        net, own = open_network(file, content, args.size, args.device, data)
        ref = reference(net, own)
        if content:
            ref["mean"] = content["mean"]
        results["models"][name], conf = evaluate(net, own, scores, ref)
        columns |= {f"{name}: {score}": conf[score] for score in scores
                    if score in ("ebo", "micl", args.score)}
    results["seconds"] = {"total": time.perf_counter() - start}
    print("\n".join(tables([results])))
    write(path, json.dumps(results, indent=1))
    if args.plot:
        plot(args.plot, columns, args.threshold_tpr)
    print(f"written: {path}{f', {args.plot}' if args.plot else ''}")


def flag(args, content, dataset):
    """Prints a CSV: path, predicted class, score, verdict and P(ID) of each image of a folder.

    Images of the ID set are read if the detector lacks the score, the threshold, or is not there.
    """
    path, score = args.checkpoints[0], "micl" if args.score == "all" else args.score
    by_detector = content and score == "micl" and args.threshold_tpr == 0.95
    if by_detector and not dataset:
        data, args.size = None, content["size"]
    elif content and not dataset and content["classes"] != SHAPE_CLASSES:
        fail("another score or threshold needs images of the ID set: name it by --dataset")
    else:
        data = load_set(args.dataset, args.data_root, args.size, ("train", "val"))
    net, data = open_network(path, content, args.size, args.device, data)
    detector = Detector(net, content or detector_of(net, "", data))
    threshold, n_val = detector.threshold.item(), detector.n_val
    images, paths, bad = read_folder(args.flag, args.size)
    labels, conf, p_id = detector(images)
    if not by_detector:
        ref, val = {**reference(net, data), "mean": detector.mean}, data.splits["val"][0]
        of_val, conf = (SCORES[score](*models.predict(net, some, data.mean, data.std), ref)
                        for some in (val, images))
        threshold, n_val = threshold_at(of_val.double(), args.threshold_tpr), len(val)
    rows = [["path", "class", score, "verdict", "p_id"]]
    for name, label, value, p in zip(paths, labels.tolist(), conf.double().tolist(), p_id.tolist()):
        rows.append([name, detector.classes[label], f"{value:.6f}",
                     "ID" if value >= threshold else "OOD", "" if math.isnan(p) else f"{p:.4f}"])
    rows += [[name, "", "", "unreadable", ""] for name in bad]
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    note(f"threshold {threshold:.6f}: {args.threshold_tpr:.0%} of the {n_val} validation images "
         "reach it")


if __name__ == "__main__":
    run(main)
