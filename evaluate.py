"""The benchmark: image sets, scores, metrics, tables; and the detector of a trained network.

    python evaluate.py runs/cifar100/student.pt --dataset cifar100 --data-root DIR [--ood FOLDER]
    python evaluate.py runs/photos/student.pt --flag FOLDER > flags.csv  # verdict per image
    python evaluate.py --collect results/cifar100/*.json  # tables over seeds

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
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms import functional as transforms

import losses
import models
from models import Mistake, fail

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


def note(message):
    print(message, file=sys.stderr)


def guarded(main):
    """Runs a program. What a user or the machine causes ends it with a line on stderr, status 2."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout = sys.stdout or open(os.devnull, "w")  # each may be closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # what is printed to None goes to stdout
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # names of any bytes
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        raise SystemExit(130)
    except BrokenPipeError:
        os._exit(141)  # without the flush that would fail again
    except Mistake as problem:
        says = str(problem)
    except FloatingPointError as problem:
        says = f"{problem}: train it again, on more images or with a lower --w-* weight"
    except OSError as problem:
        try:
            sys.stdout.flush()  # what was measured before
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the flush at exit would fail again
        says = str(problem)
    except (MemoryError, RuntimeError) as problem:
        if not models.out_of_memory(problem):
            raise
        says = "no memory left: take a smaller --size or another --device, and another --out"
    print("error:", " ".join(says.split()), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes text, bytes, or another object by torch.save. An OSError leaves the old file whole."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")  # one name: a kill leaves one file at most
    if isinstance(content, str):
        content = content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as problem:  # an older torch.save makes the second of the first
        cause = problem if isinstance(problem, OSError) else problem.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path))
    finally:
        partial.unlink(missing_ok=True)


# --- Images.

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


def to_tensor(image, size=32):
    """PIL image of up to 16 bits -> uint8 [3, size, size] by OpenOOD's test transform."""
    if image.mode == "F" or image.mode == "I" and np.max(image) > 65535:
        raise ValueError("32 bits a pixel: save it with 8 or 16")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    image, sides = image.convert("RGB"), np.array(image.size)
    if sides.max() <= 32 * sides.min():
        image = transforms.center_crop(transforms.resize(image, size), size)
    else:  # whole, a thin image would be enlarged to gigabytes
        resized = size * sides // sides.min()
        start = ((resized - size) / 2).round()
        box = [*(start * sides / resized), *((start + size) * sides / resized)]
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(paths, size=32, turned=True):
    """Image files -> (uint8 [N, 3, size, size], N digests of pixels, {path: reason} of the rest).

    turned: by the rotation that a camera has written into the file (EXIF).
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    brightest = []  # the brightest pixel of each 16-bit image

    def read(i):  # -> (the digest of the whole image, ""), or ("", why there is none)
        if not os.path.isfile(paths[i]):
            return "", "not a regular file"  # opening a named pipe would wait for ever
        try:
            with Image.open(paths[i]) as image:
                image = ImageOps.exif_transpose(image) if turned else image
                images[i] = to_tensor(image, size)
                if image.mode.startswith("I"):
                    brightest.append(np.max(image))
                kind = repr((image.mode, image.size, image.getpalette())).encode()
                return hashlib.sha256(kind + image.tobytes()).hexdigest(), ""
        except Exception as problem:  # PIL raises a dozen types for damaged files
            if models.out_of_memory(problem):
                raise
            return "", f"{type(problem).__name__}: {problem}".splitlines()[0]

    with ThreadPoolExecutor() as pool:
        pairs = zip(models.progress("images read", paths), pool.map(read, range(len(paths))))
        found = [result for _, result in pairs]
    if brightest and max(brightest) < 16384:
        note(f"note: the largest value of the {len(brightest)} 16-bit images is {max(brightest)} "
             "of 65535: scale them")
    bad = {str(path): reason for path, (_, reason) in zip(paths, found) if reason}
    good = [i for i, (_, reason) in enumerate(found) if not reason]
    return images[good] if bad else images, [found[i][0] for i in good], bad


def decode_once(paths, size, turned, cache, stamp):
    """As decode, kept in the file `cache` while the stamp, a text, is the same. None: no path is a
    file. Under torchrun the images are a map of the cache: all processes share one copy.
    """
    how = f"RGB, Resize({size}), CenterCrop({size}), turned: {turned}\n{stamp}"
    key = hashlib.sha256(how.encode(errors="surrogateescape")).hexdigest()
    shared = os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        saved = torch.load(cache, mmap=shared, weights_only=True)
        if saved["key"] == key:
            return saved["images"], saved["digests"], saved["bad"]
    except Exception:  # absent or damaged
        pass
    if not any(map(os.path.isfile, paths)):
        return None
    note(f"decoding {len(paths)} images, once; kept in {cache}")
    saved = dict(zip(("images", "digests", "bad"), decode(paths, size, turned)), key=key)
    try:
        write(cache, saved)
        if shared:
            saved = torch.load(cache, mmap=True, weights_only=True)
    except (OSError, RuntimeError) as problem:  # a read-only data folder costs time, not the run
        note(f"not cached: {problem}")
    return saved["images"], saved["digests"], saved["bad"]


def read_list(list_path, root, size):
    """An OpenOOD list (lines `path label`) -> (images, labels), None if the set is not there.

    The images are decoded once and then come from a cache below the root.
    """
    if not list_path.is_file():
        return None
    text = list_path.read_text("utf-8-sig", "replace")
    try:
        rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
        paths = [root / "images_classic" / path for path, _ in rows]
        labels = torch.tensor([int(label) for _, label in rows])
    except ValueError:
        fail(f"{list_path} is not a list: each line must be 'path label'")
    cache = root / "oal_cache" / list_path.parent.name / f"{list_path.stem}_{size}.pt"
    found = decode_once(paths, size, False, cache, text)
    if not found:
        note(f"none of the {len(paths)} images of {list_path} is there: "
             f"{', '.join(map(str, paths[:1]))}")
        return None
    images, _, bad = found
    if bad:
        cache.unlink(missing_ok=True)
        fail(f"{len(bad)} of the {len(paths)} images of {list_path} cannot be read: "
             f"restore {', '.join(bad)[:300]}")
    return images, labels


def from_torchvision(dataset, split, root, size):
    """A split that torchvision downloads -> (images, labels), None where that fails.

    'val' is the first 1,000 test images and 'test' the others, unlike OpenOOD's lists.
    """
    name, cifar = dataset if split in ID_SPLITS else split, [split == "train"]
    rows = {"val": slice(1000), "test": slice(1000, None)}.get(split, slice(None))
    try:
        kind, parts = {"cifar10": ("CIFAR10", cifar), "cifar100": ("CIFAR100", cifar),
                       "svhn": ("SVHN", ["test"]), "mnist": ("MNIST", [False]),
                       "texture": ("DTD", ["train", "val", "test"])}[name]
        pairs = [(to_tensor(image, size), label) for part in parts
                 for image, label in getattr(datasets, kind)(root, part, download=True)]
    except Exception as problem:  # another set, no network, scipy missing for SVHN
        if models.out_of_memory(problem):
            raise
        note(f"torchvision did not bring {name}: {problem}".splitlines()[0])
        return None
    images, labels = torch.stack([image for image, _ in pairs]), [label for _, label in pairs]
    return images[rows], torch.tensor(labels)[rows]


def load_set(dataset, data_root="data", size=32, wanted=None, ood=()):
    """An ID set, a key of NAMED or a folder of classes, and folders of OOD images -> an ImageSet.

    wanted: the splits to read of a named set (all). A missing OOD set is left out.
    """
    root, lists = Path(data_root), Path(data_root) / "benchmark_imglist"
    if dataset not in NAMED:
        data, wanted = read_classes(dataset, size, root), ()
    else:
        classes, mean, std, near, far = NAMED[dataset]
        data = ImageSet(dataset, classes, torch.tensor(mean), torch.tensor(std),
                        {"near": near, "far": far}, {}, {})
        wanted = wanted or (*ID_SPLITS, *near, *far)
    for split in wanted:
        file = f"{split}_{dataset}.txt" if split in ID_SPLITS else f"test_{split}.txt"
        if dataset == "shapes":
            content, source = draw_set(split, size), "drawn"
        elif lists.is_dir():
            content, source = read_list(lists / dataset / file, root, size), "list"
        else:
            content, source = from_torchvision(dataset, split, root, size), "torchvision"
        if content:
            data.splits[split], data.sources[split] = content, source
        elif split in ID_SPLITS:
            fail(f"no images of {lists / dataset / file}: put OpenOOD v1.5's images_classic/ and "
                 f"benchmark_imglist/ into {root}")
        if split in ID_SPLITS and not 0 <= content[1].min() <= content[1].max() < len(classes):
            fail(f"{lists / dataset / file} holds labels that {dataset} does not have: put back "
                 "OpenOOD's list")
    data.groups["yours"] = tuple(os.path.abspath(folder) for folder in ood)
    for folder in data.groups["yours"]:
        images, *_ = read_folder(folder, size)
        data.splits[folder] = images, torch.full((len(images),), -1)
        data.sources[folder] = "folder"
    return data


def read_folder(folder, size=32, cache=None):
    """Images below a folder -> (uint8 [N, 3, size, size], their paths, digests of pixels, {path:
    reason} of the unreadable), kept in the file `cache`, if one is given.

    Links are followed. Folders that begin with '.' or '@' (copies, thumbnails) are left out.
    """
    files, locked, left_out, visited, roots = [], [], [], set(), [folder]
    for root in roots:  # links come last: a link from class to class brings no images
        for here, folders, names in os.walk(root, onerror=locked.append):
            if os.path.realpath(here) in visited:  # read already, by its own name or another link
                folders.clear()
                continue
            visited.add(os.path.realpath(here))
            files += [os.path.join(here, name) for name in names]
            left_out += [name for name in folders if name[0] in ".@"]
            folders[:] = sorted(name for name in folders if name[0] not in ".@")
            roots += filter(os.path.islink, [os.path.join(here, name) for name in folders])
    endings = datasets.folder.IMG_EXTENSIONS
    paths = sorted(path for path in files if path.lower().endswith(endings))
    if cache:
        stats = [os.stat(path) if os.path.exists(path) else None for path in paths]
        stamp = [f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}"
                 for path, stat in zip(paths, stats)]
        found = decode_once(paths, size, True, cache, "\n".join(stamp))
        images, digests, unreadable = found or decode(paths, size)
    else:
        images, digests, unreadable = decode(paths, size)
    bad = {problem.filename: "a folder that cannot be listed" for problem in locked} | unreadable
    for path, reason in bad.items():
        note(f"unreadable: {path} ({reason})")
    which = f": {', '.join(sorted(left_out))}" if left_out else ""
    note(f"{folder}: {len(images)} images, {len(bad)} unreadable, {len(files) - len(paths)} other "
         f"files, {len(left_out)} folders left out{which}")
    if not len(images):
        fail(f"{folder} holds no image that can be read: a name must end in {' '.join(endings)}")
    return images, [path for path in paths if path not in bad], digests, bad


def class_names(train):
    """The folder train/ -> the names of its classes, sorted."""
    if not train.is_dir():
        fail(f"no folder {train}: put the images of each class into {train / 'CLASS'}")
    names = {normalize("NFC", path.name)  # macOS writes an accent apart
             for path in train.iterdir() if path.is_dir()}
    left_out = sorted(name for name in names if name[0] in ".@")
    classes = sorted(names - set(left_out))
    if len(classes) < 2:
        left = f" (left out, for their first letter: {', '.join(left_out)})" if left_out else ""
        fail(f"{train} holds fewer than two classes{left}: add a folder for each, or move up "
             "those that lie one folder deeper")
    return classes


def read_classes(folder, size=32, data_root="data"):
    """A user's folder train/CLASS/..., with or without val/ (valid/, validation/) and test/.

    A missing split takes a tenth of each class of train/, or one picture of a class of 4 to 9, by
    the digest of the pixels: copies stay together, every program splits alike, a new image moves
    few others. The images are decoded once and then come from a cache below the data root.
    """
    root, splits, digests = Path(folder), {}, {}
    classes = class_names(root / "train")
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    for name in ("validation", "valid", "val", "test", "train"):
        if not (root / name).is_dir():
            continue
        split = "val" if name.startswith("val") else name
        if split in splits:
            fail(f"{root} has two of val/, valid/ and validation/: keep one")
        cache = Path(data_root, "oal_cache", "folders", f"{key}_{split}_{size}.pt")
        images, paths, digests[split], _ = read_folder(root / name, size, cache)
        own = [normalize("NFC", Path(os.path.relpath(path, root)).parts[1]) for path in paths]
        for other in set(own) - set(classes):
            fail(f"{root / name / other} is no class of {root / 'train'}: move it away, or add "
                 "the class")
        splits[split] = images, torch.tensor([classes.index(one) for one in own])
    if "val" in splits and set(digests["val"]) <= set(digests["train"]):
        fail(f"all images of val/ in {root} are copies of images of train/, and say nothing of new "
             "ones: remove val/, or fill it with others")

    # An absent split takes its share of train/.
    absent = [split for split in ("val", "test") if split not in splits]
    (images, labels), own = splits["train"], np.array(digests["train"])
    home = np.full(len(own), "train")  # the split of each image
    for label, name in enumerate(classes):
        members = labels.numpy() == label
        pictures = sorted(set(own[members]))
        tenth = max(len(pictures) // 10, 1) if len(pictures) >= 4 else 0
        for i, split in enumerate(absent):
            home[members & np.isin(own, pictures[i * tenth:(i + 1) * tenth])] = split
        left = (members & (home == "train")).sum()
        if left < 2:
            fail(f"the class {name} has {left} images to train on in {root / 'train'}: it needs 2, "
                 "or remove the folder")
    for split in ("train", *absent) if absent else ():
        index = np.flatnonzero(home == split)
        if not len(index):
            fail(f"{root} has no {split}/, and no class has 4 images: add images")
        splits[split], digests[split] = (images[index], labels[index]), own[index].tolist()

    count = {split: len(labels) for split, (_, labels) in splits.items()}
    note(f"{root}: {len(classes)} classes, {', '.join(classes)}; {count['train']} images to train "
         f"on, {count['val']} for thresholds, {count['test']} to test")
    different = {split: set(some) for split, some in digests.items()}
    copies = sum(count.values()) - len(set.union(*different.values()))
    if copies:
        shared = sum(map(len, different.values())) - len(set.union(*different.values()))
        note(f"note: {copies} of these images are copies of others"
             + f"; {shared} stand in two of train/, val/ and test/" * bool(shared))
    images, _ = splits["train"]
    means = torch.stack([image.double().mean((1, 2)) for image in images]) / 255  # [N, 3]
    within = torch.stack([image.double().var((1, 2), correction=0) for image in images]) / 255 ** 2
    mean = means.mean(0)  # [3]
    std = (within.mean(0) + means.var(0, correction=0)).clamp_min(1e-4).sqrt()  # not 0
    return ImageSet(str(folder), classes, mean.float(), std.float(), {"near": (), "far": ()},
                    splits, dict.fromkeys(splits, "folder"))


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
    return losses.MICL(ref["mean"]).score(logits, features)


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


FEW = 19  # ID images: of fewer, even the smallest confidence flags more than one in twenty


def rank(n):
    """The threshold is the r-th smallest of n confidences; a new one is below it r / (n + 1) times.
    """
    return max(1, (n + 1) // 20)


def threshold_at(conf_id):
    """Confidences of ID images [N] -> the threshold that a new one misses one time in twenty."""
    return float(np.sort(np.asarray(conf_id, np.float64))[rank(len(conf_id)) - 1])


def flagged_at_worst(n):
    """The share of new ID images that threshold_at of n images flags at most, 95 times of 100.

    That share is Beta(r, n + 1 - r): the p at which a binomial count of n reaches r with 95 %.
    """
    r, (low, high) = rank(n), (0.0, 1.0)
    while high - low > 1e-6:
        p = (low + high) / 2
        below = sum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                             + i * math.log(p) + (n - i) * math.log1p(-p)) for i in range(r))
        low, high = (p, high) if below > 0.05 else (low, p)
    return high


# --- Benchmark.

def reference(net, data):
    """A network, its training and validation images -> what scores know of them, on the CPU.

    standard [2, 2]: mean and std of both parts of micl_knn over the validation images; where these
    are few, over the training images, each without itself. bank: at most 5,000 unit features.
    """
    (images, _), (val, _) = data.splits["train"], data.splits["val"]
    logits, features = models.predict(net, images)
    ref = {"weight": net.fc.weight.detach().cpu().float(), "features": features,
           "mean": features.mean(0), "k": 1}
    some = slice(None, None, math.ceil(len(features) / 5000))  # lists are sorted by class
    ref["bank"] = F.normalize(features[some], dim=1).half()
    if few := len(val) < FEW:
        logits, features = logits[some], features[some]
    else:
        logits, features = models.predict(net, val)
    parts = micl(logits, features, ref), nearness(features, ref["bank"], ref["k"] + few)
    ref["standard"] = torch.stack([torch.stack([part.mean(), part.std().clamp_min(1e-6)])
                                   for part in parts])
    return ref


def evaluate(net, data, scores, ref):
    """A network on the sets of data -> (entry of results.json, {score: {set: confidence [N]}})."""
    groups = {name: group for group, names in data.groups.items() for name in names
              if name in data.splits}
    outputs = {name: models.predict(net, data.splits[name][0])
               for name in models.progress("sets through the network", ["test", *groups])}
    hits = (outputs["test"][0].argmax(1) == data.splits["test"][1]).double()
    entry = {"id_acc": 100 * hits.mean().item(), "scores": {}}
    confidences = {}
    for score in scores:
        conf = {name: SCORES[score](*pair, ref).double() for name, pair in outputs.items()}
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


def digest_of(images, labels):
    """A digest of images and labels, 32 bits, without a copy of them."""
    images, labels = (part.cpu().contiguous().numpy().data for part in (images, labels))
    return zlib.crc32(labels, zlib.crc32(images))


def code_digest():
    """A digest of the five files."""
    code = hashlib.sha256()
    for name in ("train", "synthesize", "losses", "evaluate", "models"):
        code.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return code.hexdigest()


def describe(program, data, size, device, code):
    """What results.json says of every run; code: the digest when it began."""
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, np)}
    own = {split: data.splits[split] for split in ID_SPLITS}
    return {"dataset": data.name, "size": size, "classes": data.classes,
            "id": {"n": {split: len(labels) for split, (_, labels) in own.items()},
                   "digest": "-".join(f"{digest_of(*pair):08x}" for pair in own.values())},
            "command": shlex.join([program, *sys.argv[1:]]), "device": device,
            "versions": versions, "missing": data.missing(), "sources": data.sources,
            "code": code}


# --- Tables and pictures.

def table_rows(runs):
    """results.json dicts -> {label: {seed: (entry of "models", minutes of its training)}}."""
    rows = {}
    for number, run in enumerate(runs):
        seed = run.get("seed", f"run {number}")
        for name, entry in run["models"].items():
            label, minutes = run.get("label", name), run["seconds"].get(name, 0) / 60
            if name == "ce" and "label" in run:  # evaluate.py's results have no label
                known = rows.get("start", {}).get(seed)
                if known and known[0] == entry:  # the same, given by --ce
                    rows["start"][seed] = known[0], max(known[1], minutes)
                    continue
                label = f"start of {label}" if known else "start"
            row = rows.setdefault(label, {})
            if seed in row:
                fail(f"two runs are seed {seed} of {label}: leave one out")
            row[seed] = entry, minutes
    return rows


def mean_std(values):
    std = f"±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{std}" if values else ""


def gain(differences):
    """Differences of pairs -> their mean±standard error."""
    n = len(differences)
    error = f"±{np.std(differences, ddof=1) / math.sqrt(n):.2f}" if n > 1 else ""
    return f"{np.mean(differences):+.2f}{error}"


def markdown(head, body):
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *body)]
    return ["", lines[0], "|---" * len(head) + "|", *lines[1:]]


def tables(runs):
    """results.json dicts -> the lines of their Markdown tables, mean±standard deviation (n - 1).

    A row is a label over its seeds. Scores: ebo, fdbd and micl, or ebo, micl and micl_knn of a
    pretrained network, else those that there are. Of several runs a last table has each row minus
    the first run's row, seed by seed.
    """
    kinds = [[run["dataset"], run.get("arch"), run["size"],
              {name: row["n"] for name, row in score["sets"].items()}, run.get("id")]
             for run in runs for entry in run["models"].values()
             for score in entry["scores"].values()]
    if any(kind != kinds[0] for kind in kinds):
        fail("the runs differ in dataset, arch, size, ID images or OOD sets: make a table of each "
             "kind")
    dataset, arch, _, sets, _ = kinds[0]
    some = next(iter(runs[0]["models"].values()))["scores"]
    pretrained = runs[0].get("options", {}).get("pretrained")
    scores = ("ebo", "micl", "micl_knn") if pretrained else ("ebo", "fdbd", "micl")
    scores = [score for score in scores if score in some] or list(some)
    columns = {f"{group} {metric.upper()}": (group, metric) for group in ("near", "far")
               if group in some[scores[0]] for metric in ("auroc", "fpr95")}
    heads, paired = ["accuracy", *columns], ["accuracy", *(columns or sets)]

    def figures(entry):  # {head or set: its numbers, one by each score}
        by_score = [entry["scores"][score] for score in scores]
        return {"accuracy": [entry["id_acc"]],
                **{head: [row[group][metric] for row in by_score]
                   for head, (group, metric) in columns.items()},
                **{name: [row["sets"][name]["auroc"] for row in by_score] for name in sets}}

    def cells(runs, names, show=mean_std):
        return [" / ".join(show(numbers) for numbers in zip(*(run[name] for run in runs)))
                for name in names]

    rows = table_rows(runs)
    first = runs[0].get("label", next(iter(rows)))
    base = {seed: figures(entry) for seed, (entry, _) in rows[first].items()}
    means, aurocs, gains = [], [], []
    for label, row in rows.items():
        minutes = [spent for _, spent in row.values() if spent]
        own = {seed: figures(entry) for seed, (entry, _) in row.items()}
        means.append([label, len(row), mean_std(minutes), *cells(own.values(), heads)])
        aurocs.append([label, *cells(own.values(), sets)])
        less = [{head: np.subtract(own[seed][head], base[seed][head]) for head in paired}
                for seed in own if seed in base]
        if less and label != first:
            gains.append([label, len(less), *cells(less, paired, gain)])
    lines = [f"cells: {' / '.join(scores)}; minutes: of this training alone"]
    lines += markdown([f"{dataset}, {arch}" if arch else dataset, "runs", "minutes", *heads], means)
    if sets:
        lines += markdown(["AUROC", *(f"{Path(name).name} ({n})" for name, n in sets.items())],
                          aurocs)
    if len(runs) > 1 and gains:
        names = [Path(head).name if head in sets else head for head in paired]
        lines += markdown([f"less {first}, mean±standard error", "pairs", *names], gains)
    missing = sorted({name for run in runs for name in run["missing"]})
    return lines + ["", f"missing, in no mean: {', '.join(missing)}"] * bool(missing)


def collect(paths):
    """results.json files -> the lines of their tables."""
    runs = []
    for path in paths:
        content = Path(path).read_bytes()
        with models.refusal(f"{path} is no results.json: name those of runs"):
            runs.append(json.loads(content))
    with models.refusal(f"--collect {' '.join(map(str, paths))}: no results.json of one benchmark"):
        return tables(runs)


def plot(path, columns, names):
    """{heading: {set: conf [N]}}, names of OOD sets -> a picture: a row of histograms for each set,
    beside those of the ID set.
    """
    from matplotlib.figure import Figure

    def drawable(text):  # not UTF-8, it cannot be drawn; a dollar would begin a formula
        return text.encode(errors="replace").decode().replace("$", r"\$")

    figure = Figure(figsize=(4 * len(columns), 2.2 * len(names)))
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for row, name in zip(axes, names):
        for axis, (heading, conf) in zip(row, columns.items()):
            pair = [conf["test"].numpy(), conf[name].numpy()]
            low, high = np.quantile(np.concatenate(pair), [0.001, 0.999])
            axis.hist(pair, 60, range=(low, high), density=True, histtype="stepfilled",
                      alpha=0.6, label=["ID", drawable(Path(name).name)])
            auroc = detection_metrics(*pair)["auroc"]
            axis.set_title(f"{drawable(heading)}: AUROC {auroc:.1f}", fontsize=9)
            axis.set_yticks([])
            axis.legend(fontsize=8)
    figure.tight_layout(w_pad=2)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    write(path, picture.getvalue())


# --- The detector: NAME.pt has the weights, NAME.detector.pt what else a verdict needs.

class Detector:
    """detector(images) -> (class indices int64 [N], scores [N], P(ID) [N]); OOD below .threshold.

    images: uint8 [N, 3, S, S], RGB, a tensor or an array, S = .size; `judge` prepares files. The
    score is .score. P(ID): an ID image against an outlier of this run, equally likely beforehand;
    NaN where there were none. Attributes: net, and the entries of NAME.detector.pt, as .classes.
    """
    a = tau = math.nan
    made = start = digest = ""  # how it was made, from which network, and its own digest

    def __init__(self, net, content):
        vars(self).update(content, net=net.eval())

    def __call__(self, images):
        """ValueError: images of another type or size."""
        if not torch.is_tensor(images):
            images = np.array(images, order="C")
            images = torch.from_numpy(images) if images.dtype == np.uint8 else images
        if images.dtype != torch.uint8 or images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"images must be uint8 [N, 3, {self.size}, {self.size}], RGB, not "
                             f"{images.dtype} {list(images.shape)}: .judge takes files")
        self.net.eval()  # whatever its owner has done to it
        logits, features = models.predict(self.net, images)
        score = SCORES[self.score](logits, features, vars(self))
        return logits.argmax(1), score, (self.a * (score - self.tau)).sigmoid()

    def judge(self, images):
        """Paths or PIL images, one or a list -> as a call, each turned, resized and cropped.

        OSError or ValueError: a file that cannot be read, or neither a path nor a PIL image.
        """
        kinds = (str, os.PathLike, Image.Image)
        ready = [torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)]
        one = isinstance(images, kinds) or not hasattr(images, "__iter__")
        for image in [images] if one else images:
            if not isinstance(image, kinds):
                raise ValueError(f"judge takes paths and PIL images, not {type(image).__name__}")
            try:
                opened = image if isinstance(image, Image.Image) else Image.open(image)
                ready.append(to_tensor(ImageOps.exif_transpose(opened), self.size)[None])
            except Exception as problem:  # PIL raises a dozen types for damaged files
                if isinstance(problem, OSError) or models.out_of_memory(problem):
                    raise
                raise ValueError(f"{image} cannot be read: {problem}")
        return self(torch.cat(ready))


def digest(net):
    """A digest of a network's weights, the same for every file and device."""
    sha = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def describe_detector(net, data, score="micl", outliers=None, **more):
    """A network, its training and validation images -> the entries of NAME.detector.pt.

    outliers: logits and features of outliers in test mode, to which a and tau are fitted. more:
    texts, how the network was made. Mistake: all features are equal.
    """
    ref = reference(net, data)
    models.check_different(ref["features"])
    conf = SCORES[score](*models.predict(net, data.splits["val"][0]), ref)
    content = {"image_mean": net.image_mean.cpu(), "image_std": net.image_std.cpu(),
               "size": net.size, "classes": list(data.classes), "arch": net.arch, "score": score,
               "mean": ref["mean"], "n_val": len(conf), "digest": digest(net), **more,
               "threshold": torch.tensor(threshold_at(conf), dtype=torch.float32)}
    if score == "micl_knn":
        content |= {key: ref[key] for key in ("bank", "k", "standard")}
    if outliers:
        content["a"], content["tau"] = losses.fit_critic(conf, SCORES[score](*outliers, ref))
    return content


def beside(path):
    """NAME.pt -> the path NAME.detector.pt."""
    return os.path.splitext(path)[0] + ".detector.pt"


def read_detector(path):
    """NAME.pt -> the dict of the NAME.detector.pt beside it, None if there is none."""
    if not os.path.exists(beside(path)):
        return None
    with models.refusal(f"{beside(path)} is not a detector: remove it, and name the ID set by "
                        "--dataset"):
        content = models.load_tensors(beside(path))
        mean, std = content["image_mean"], content["image_std"]
        scalars = [content["threshold"], *(content[key] for key in ("a", "tau") if key in content)]
        texts = [content["digest"], content["arch"], *content["classes"]]
        fits = (mean.shape == std.shape == (3,) and std.min() > 0 and content.get("a", 1) > 0
                and not any(scalar.dim() for scalar in scalars) and content["mean"].dim() == 1
                and content["size"] in SIZES and content["n_val"] > 0
                and all(type(content[key]) is int for key in ("size", "n_val"))
                and all(scalar.is_floating_point() for scalar in scalars)
                and type(content["classes"]) is list and all(type(text) is str for text in texts))
        if content["score"] == "micl_knn":
            bank, standard = content["bank"], content["standard"]
            fits = (fits and bank.dim() == 2 and bank.shape[1:] == content["mean"].shape
                    and len(bank) and standard.shape == (2, 2) and standard[:, 1].min() > 0
                    and type(content["k"]) is int and 0 < content["k"] <= len(bank))
        if not (fits and content["score"] in ("micl", "micl_knn") and all(
                value.isfinite().all() for value in content.values() if torch.is_tensor(value))):
            raise ValueError("an entry does not fit")
    return content


def size_of(path, given):
    """The side of the images of a network's file: of its detector file, else --size, else its own.
    """
    content = read_detector(path)
    if content and given not in (None, content["size"]):
        fail(f"{path} is for images {content['size']} wide, not {given}: leave out --size")
    return content["size"] if content else given or models.size_of_stem(path)


def load_detector(path, device="cpu", data=None):
    """A file of weights NAME.pt -> its Detector, by NAME.detector.pt, without images.

    If that file is missing, the classes, mean, std and size are those of data, an ImageSet, and the
    Detector has no threshold yet. ValueError or OSError: a file is missing, damaged or another
    run's, or its classes are not those of data.
    """
    content = facts = read_detector(path)
    if not content and not os.path.exists(path):
        fail(f"no checkpoint {path}: name a file of weights")
    if not content and not data:
        fail(f"no {beside(path)}: name the ID set of {path} by --dataset")
    if not content:
        size, stem = data.splits["train"][0].shape[-1], models.size_of_stem(path)
        size = stem if stem > 96 > size else size  # a network for large images enlarges small ones
        facts = {"classes": list(data.classes), "arch": None, "image_mean": data.mean,
                 "image_std": data.std, "size": size}
    if data and facts["classes"] != data.classes:
        lists = [f"{len(names)} classes, {', '.join(names)[:300]}"
                 for names in (facts["classes"], data.classes)]
        fail(f"{path} was trained for {lists[0]}: {data.name} has {lists[1]}; name its own "
             "--dataset")
    net = models.load_network(path, len(facts["classes"]), facts["arch"], facts["size"])
    if not content and net.arch not in models.ARCHS:
        facts["image_mean"], facts["image_std"], _ = models.PRETRAINED[net.arch]
    models.set_scale(net, facts["image_mean"], facts["image_std"])
    if content and (content["digest"] != digest(net)
                    or content["mean"].shape != (net.fc.in_features,)):
        fail(f"{beside(path)} belongs to other weights than {path}: put back the files of one run")
    return Detector(models.to_device(net, device), {**facts, "arch": net.arch})


# --- Command line.

def number(kind, low, high):
    """An argparse type: a finite number of the kind, int or float, from low to high."""
    def read(text):
        if not low <= kind(text) <= high:  # nor is a NaN
            raise ValueError
        return kind(text)
    read.__name__ = f"{'whole' if kind is int else 'finite'} number from {low} to {high}:"
    return read


def some_path(text):
    """An argparse type: a path. An empty one may be a shell's variable that was never set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path: name a file or a folder")
    return os.path.expanduser(text)


def folder(text):
    """An argparse type: the path of a folder that is there."""
    text = some_path(text)
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"no folder '{text}': name one of images")
    return text


def id_set(text):
    """An argparse type: a name of an ID set, or the path of a folder, written in one way."""
    path = text if text in NAMED else os.path.normpath(some_path(text))
    return os.path.abspath(path) if path in NAMED and path != text else path  # the folder ./shapes


POSITIVE, SEED = number(int, 1, 10 ** 9), number(int, 0, 10 ** 17)
FINITE = number(float, -1e308, 1e308)


def common_parser(doc):
    """A parser with the options that the programs share; check_common checks them."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--dataset", metavar="{" + ",".join(NAMED) + ",FOLDER}", type=id_set,
                        help="the ID set (shapes); FOLDER holds train/CLASS/... (val/, test/)")
    parser.add_argument("--size", type=int, choices=SIZES, metavar="S", help="side of the images, "
                        "a multiple of 32 up to 320 (the network's, or 32)")
    parser.add_argument("--data-root", metavar="DIR", default="data", type=some_path,
                        help="in the OpenOOD v1.5 layout, or where torchvision downloads "
                        "(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")
    return parser


def check_common(args, alone=True):
    """Ends the program where a shared option is of no use; fills in the dataset.

    alone: torchrun is refused.
    """
    args.dataset = args.dataset or "shapes"
    if alone and os.environ.get("WORLD_SIZE", "1") != "1":
        fail("this program is one process: start it without torchrun")
    device = args.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's: each its own GPU
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device).item()  # no value comes back from 'meta'
    except (RuntimeError, AssertionError, ImportError) as problem:  # without CUDA: AssertionError
        fail(f"no device {args.device}: {str(problem).splitlines()[0]}")
    if args.dataset not in NAMED and not Path(args.dataset).is_dir():
        fail(f"no dataset {args.dataset}: name a folder, or one of {', '.join(NAMED)}")
    if args.data_root != "data" and not Path(args.data_root).is_dir():
        fail(f"no data root {args.data_root}: name a folder")


def main():
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=some_path,
        help="files of weights, each a row of the result")
    add("--score", choices=[*SCORES, "all"], default="all")
    add("--ood", nargs="+", action="extend", default=[], type=folder, metavar="FOLDER",
        help="folders of your own OOD images")
    add("--flag", type=folder, metavar="FOLDER", help="print class, score, verdict and P(ID) of "
        "each image of the folder, by NAME.detector.pt, else by the images of --dataset")
    add("--plot", metavar="FILE.png", type=some_path, help="histograms of a near and a far set: "
        "the first network by energy, the last by its detector's score")
    add("--collect", nargs="+", action="extend", metavar="RESULTS.json",
        help="print the tables of these runs and stop")
    add("--out", default="runs/evaluate", type=some_path, help="folder for results.json")
    args = parser.parse_args()
    if args.collect:
        print("\n".join(collect(args.collect)))
        return
    if not args.checkpoints:
        fail("no checkpoints: name files of weights")
    if args.flag and (args.checkpoints[1:] or args.plot or args.ood or args.score != "all"):
        fail("--flag judges by one network's own score: name one file of weights, and leave out "
             "--score, --plot and --ood")
    own_set = args.dataset
    check_common(args)
    sizes = [size_of(path, args.size) for path in args.checkpoints]
    if len(set(sizes)) > 1:
        fail(f"these networks are for images {', '.join(map(str, sizes))} wide: measure them one "
             "by one")
    args.size = sizes[0]
    if args.flag:
        flag(args, own_set)
    else:
        measure(args)


def measure(args):
    """Networks on the benchmark: prints the tables, writes results.json and the picture."""
    path = Path(args.out) / "results.json"
    if path.exists() and '"command": "evaluate.py' not in path.read_text(errors="replace"):
        fail(f"{path} holds another program's results: name another folder with --out")
    if args.plot and not (args.plot.lower().endswith(".png") and find_spec("matplotlib")):
        fail(f"--plot {args.plot}: install matplotlib, and name a file that ends in .png")
    start, confidences = time.perf_counter(), {}
    scores = list(SCORES) if args.score == "all" else [args.score]
    data = load_set(args.dataset, args.data_root, args.size, ood=args.ood)
    if not set(data.splits) - set(ID_SPLITS):
        fail(f"no OOD set of {data.name} is there: name folders with --ood")
    results = {**describe("evaluate.py", data, args.size, args.device, code_digest()), "models": {}}
    for file in args.checkpoints:
        name = Path(file).stem if Path(file).stem not in results["models"] else file
        results["models"][name], confidences[name] = measure_file(file, data, scores, args.device)
    results["seconds"] = {"total": time.perf_counter() - start}
    print("\n".join(tables([results])))
    write(path, json.dumps(results, indent=1))
    if args.plot:
        detector, first = read_detector(file), next(iter(confidences))
        by = ("ebo", detector["score"] if detector else "micl")
        by = by if args.score == "all" else (args.score, args.score)
        sets = {group: [one for one in members if one in data.splits]
                for group, members in data.groups.items()}
        plot(args.plot, {f"{one}, {score}": confidences[one][score]
                         for one, score in zip((first, name), by)},
             [*sets["near"][:1], *sets["far"][:1], *sets["yours"]][:2])
    print(f"written: {path}{f', {args.plot}' if args.plot else ''}")


def measure_file(path, data, scores, device):
    """A file of weights on the sets of data -> as evaluate(), by what its detector file knows."""
    detector = load_detector(path, device, data)
    return evaluate(detector.net, data, scores, reference(detector.net, data) | vars(detector))


def flag(args, own_set):
    """Prints a CSV: path, predicted class, score, verdict and P(ID) of each image of a folder.

    own_set: a given --dataset, of the network's classes. Its images make the detector of a file
    that has none.
    """
    path, = args.checkpoints
    data = load_set(own_set, args.data_root, args.size, ["train", "val"]) if own_set else None
    detector = load_detector(path, args.device, data)
    if not read_detector(path):
        detector = Detector(detector.net, describe_detector(detector.net, data))
    images, paths, _, bad = read_folder(args.flag, detector.size)
    labels, score, p_id = (values.tolist() for values in detector(images))
    threshold, n = detector.threshold.item(), detector.n_val
    rows = [["path", "class", detector.score, "verdict", "p_id"]]
    for name, label, value, p in zip(paths, labels, score, p_id):
        rows.append([name, detector.classes[label], f"{value:.6f}",
                     "ID" if value >= threshold else "OOD", "" if math.isnan(p) else f"{p:.4f}"])
    rows += [[name, "", "", "unreadable", ""] for name in bad]
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    note(f"threshold {threshold:.6f}, of {n} validation images: {worth(n)}")


def worth(n):
    """What a threshold of n validation images promises, in words."""
    mean, worst = rank(n) / (n + 1), flagged_at_worst(n)
    few = f"; {FEW} images make it 5 %" * (n < FEW)
    return f"it flags {mean:.0%} of new ID images on average, {worst:.0%} at worst{few}"


if __name__ == "__main__":
    guarded(main)
