"""Networks, many images through them, and their files of weights.

`resnet18` has the names and shapes of OpenOOD's `ResNet18_32x32`, so that checkpoints travel both
ways. `resnet_small` (1.2 M parameters) is for a laptop, `resnet_tiny` (0.3 M) for the embedded
images. For images of 224 each has the stem and the names of torchvision's ResNet.

A classifier has two halves: `lower` ends with the feature map of stage 2, `upper` ends with the
features. OAL's latents are such maps: they enter between the halves, never as images.
"""
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models import VisionTransformer

# Residual blocks per stage, width of the first stage.
ARCHS = {"resnet18": (2, 64), "resnet_small": (1, 32), "resnet_tiny": (1, 16)}


# --- Networks. ------------------------------------------------------------------------------------

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a module of the given name (arXiv 1512.03385)."""

    def __init__(self, in_width, width, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        layers = []
        if stride != 1 or in_width != width:
            layers = [nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.shortcut_name = shortcut
        self.add_module(shortcut, nn.Sequential(*layers))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.get_submodule(self.shortcut_name)(x))


class ResNet(nn.Module):
    """Residual network: stem, four stages, mean pool, linear classifier.

    net(x) -> logits [B, C]; net(x, return_feature=True) -> (logits, features [B, 8 * width]).
    The map of stage 2 has the image's side S over R: R = 2, or 8 with torchvision's stem for 224.
    """

    def __init__(self, blocks, width, num_classes, size=32):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        shortcut = "shortcut"
        if size >= 224:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            shortcut = "downsample"
        self.bn1 = nn.BatchNorm2d(width)
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
        return self.layer2(self.layer1(x))                 # [B, 2W, S/R, S/R]

    def upper(self, maps, return_maps=False):
        """Stage-2 map [B, 2W, S/R, S/R] -> features [B, 8W], if asked with stages 3 and 4."""
        third = self.layer3(maps)                 # [B, 4W, S/2R, S/2R]
        fourth = self.layer4(third)               # [B, 8W, S/4R, S/4R]
        features = fourth.float().mean((2, 3))    # [B, 8W]; in bf16 energies would tie
        return (features, (third, fourth)) if return_maps else features

    def forward(self, x, return_feature=False):
        features = self.upper(self.lower(x))
        logits = self.classify(features)
        return (logits, features) if return_feature else logits

    def classify(self, features):
        """Features [B, D] -> logits [B, C], in float32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.fc(features)


class ViT(VisionTransformer):
    """torchvision's VisionTransformer (arXiv 2010.11929) with the ResNet's methods.

    Its shape is that of the state_dict; a head has 64 numbers, as in every ViT up to L. Features
    [B, D] are the class token. Images of any size are enlarged.
    """

    def __init__(self, state, num_classes):
        width, _, patch, _ = state["conv_proj.weight"].shape
        side = patch * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1)
        layers = sum(name.endswith(".ln_1.weight") for name in state)
        mlp = len(state["encoder.layers.encoder_layer_0.mlp.0.weight"])
        if not side or width > 1024:
            raise ValueError(f"{layers} layers, {width} wide, images of {side}: no ViT up to L")
        super().__init__(side, patch, layers, width // 64, width, mlp, num_classes=num_classes)

    fc = property(lambda self: self.heads.head)
    forward, classify = ResNet.forward, ResNet.classify

    def lower(self, x):
        """Images [B, 3, S, S] -> tokens [B, 1 + P, D]: the class's, then those of the P patches."""
        patches = self.conv_proj(F.interpolate(x, self.image_size, mode="bilinear"))
        patches = patches.flatten(2).mT                                   # [B, P, D]
        return torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1)

    def upper(self, tokens, return_maps=False):
        """Tokens [B, 1 + P, D] -> features [B, D]; a ViT has no maps."""
        features = self.encoder(tokens)[:, 0].float()
        return (features, ()) if return_maps else features


def build(name, num_classes, size=32):
    """A ResNet with fresh weights for images `size` wide; the name is a key of ARCHS."""
    if name not in ARCHS:
        raise ValueError(f"unknown arch '{name}': choose one of {', '.join(ARCHS)}")
    return ResNet(*ARCHS[name], num_classes, size)


def projection(teacher_dim, student_dim):
    """Teacher features [B, Dt] -> targets [B, Ds] for the student's (released as `DT`)."""
    return nn.Sequential(nn.BatchNorm1d(teacher_dim), nn.Linear(teacher_dim, student_dim),
                         nn.ReLU(), nn.BatchNorm1d(student_dim))


# --- Many images through a network. ---------------------------------------------------------------

def autocast(device, exact=False):
    """bf16 autocast where it is faster than float32; without effect elsewhere and if `exact`.

    An Intel CPU needs AMX for that: a Xeon without it trained resnet_small at 367 images per
    second in bf16, at 495 in float32.
    """
    device, faster = torch.device(device), False
    if device.type == "cuda":
        faster = (torch.cuda.is_available()
                  and torch.cuda.is_bf16_supported(including_emulation=False))
    elif device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch has no such function
        amd = "Intel" not in cpu.get("cpu_name", "") and cpu.get("avx512_bf16", False)
        faster = cpu.get("amx_bf16", False) or amd
    return torch.autocast(device.type, torch.bfloat16, enabled=faster and not exact)


def normalize(images, mean, std):
    """uint8 [B, 3, S, S], mean and std [3] -> float32 [B, 3, S, S], channels last."""
    mean = torch.as_tensor(mean, device=images.device)[:, None, None]
    std = torch.as_tensor(std, device=images.device)[:, None, None]
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def to_device(net, device):
    """The network on the device, in the memory layout that is fastest for convolutions."""
    return net.to(device=device, memory_format=torch.channels_last)


@torch.no_grad()
def feature_batches(net, images, mean, std, exact=False):
    """uint8 [N, 3, S, S] -> batches of (stage-2 maps or tokens, features [B, D]), in test mode.

    On the network's device; `exact`: in float32. FloatingPointError: see check_finite.
    """
    mode, device = net.training, net.fc.weight.device
    net.eval()
    try:
        for batch in progress("batches through the network", images.split(500)):
            with autocast(device, exact):
                maps = net.lower(normalize(batch.to(device), mean, std))
                features = net.upper(maps)
            check_finite(features)
            yield maps, features
    finally:
        net.train(mode)


@torch.no_grad()
def predict(net, images, mean, std, exact=False):
    """uint8 [N, 3, S, S] -> (logits [N, C], features [N, D]) in float32 on the CPU."""
    features = [features for _, features in feature_batches(net, images, mean, std, exact)]
    logits = torch.cat([net.classify(batch).cpu() for batch in features])
    check_finite(logits)
    return logits, torch.cat(features).cpu()


def check_finite(values):
    """FloatingPointError unless the square sums of values [B, K], which scores need, are finite."""
    if not values.square().sum(1).isfinite().all():
        raise FloatingPointError("the network gives outputs that are not finite")


@torch.no_grad()
def renew_statistics(net, images, mean, std):
    """Sets batch-norm's running statistics to their mean over the images, uint8 [N, 3, S, S].

    After few steps the running means are still those of earlier weights.
    """
    parts = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for part in parts:
        part.reset_running_stats()
        part.momentum = None  # a cumulative mean
    net.train()
    count = math.ceil(len(images) / 500)
    for i in range(count):  # every count-th image, as the images are sorted by class
        with autocast(images.device):
            net(normalize(images[i::count], mean, std))
    for part in parts:
        part.momentum = 0.1


def frozen(net, mean, std):
    """A network -> a function: x uint8 [B, 3, S, S] -> (logits, features, maps of stages 2 to 4).

    In test mode, without gradient. A function is no submodule: it is neither trained nor saved.
    """
    net.eval().requires_grad_(False)

    @torch.no_grad()
    def teach(x):
        maps = net.lower(normalize(x, mean, std))
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


# --- Files of weights. ----------------------------------------------------------------------------

def fail(message):
    """Ends the program with one line on stderr and exit status 2: a mistake of the user."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# Other names of weights: pytorch-cifar's, those of timm's ViT, of torchvision's published ViT file.
RENAMED = {r"^linear\.": "fc.",
           r"^cls_token": "class_token", r"^pos_embed": "encoder.pos_embedding",
           r"^patch_embed\.proj": "conv_proj",
           r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.",
           r"\.norm([12])\.": r".ln_\1.", r"\.attn\.qkv\.": ".self_attention.in_proj_",
           r"\.attn\.proj\.": ".self_attention.out_proj.", r"\.mlp\.(fc|linear_)1\.": ".mlp.0.",
           r"\.mlp\.(fc|linear_)2\.": ".mlp.3.", r"^norm\.": "encoder.ln.",
           r"^head\.": "heads.head."}
FORMATS = {".onnx": "ONNX", ".npz": "numpy", ".npy": "numpy", ".h5": "HDF5", ".keras": "Keras"}


def renamed(state):
    """A state_dict with our names, without a wrapper's prefix such as 'module.'."""
    prefix = os.path.commonprefix([name for name, value in state.items() if value.dim() > 1])
    prefix = prefix[:prefix.rfind(".") + 1]
    state = {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}
    for other, ours in RENAMED.items():
        state = {re.sub(other, ours, name): value for name, value in state.items()}
    return state


def read_file(path):
    """A file of weights -> what was saved in it, on the CPU."""
    try:
        path.open("rb").close()
    except OSError as problem:
        fail(f"no checkpoint {path} ({problem.strerror}): name a file of weights")
    if path.suffix in FORMATS:
        fail(f"{path} is a file of {FORMATS[path.suffix]}: give a state_dict saved by torch.save")
    # A saved numpy scalar, such as an accuracy, names numpy's function and type.
    scalar = np.float64(0).__reduce__()[0]
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    codes = "?" + np.typecodes["AllInteger"] + "efd"
    allowed += [np.dtype, *{type(np.dtype(code)) for code in codes}]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would warn before our line
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        fail(f"{path} needs a package that is not installed: pip install safetensors")
    except Exception as problem:  # a text file, a truncated archive, a pickle of other objects
        foreign = re.search(r"GLOBAL (\S+)", str(problem))
        reason = f"it needs the code of {foreign[1]}" if foreign else "cut short, or text"
        if "TorchScript" in str(problem):
            reason = "TorchScript"
        fail(f"{path} is not a file of weights ({reason}): give a state_dict saved by torch.save")


def read_state(path):
    """A file of weights -> its state_dict with our names.

    The file is a dict, a state_dict or with one state_dict inside: a dict of tensors that has a
    convolution. What is no tensor in it is left out.
    """
    content, found = read_file(Path(path)), {}
    for key, part in {"": content, **content}.items() if isinstance(content, dict) else ():
        if isinstance(part, dict):
            tensors = {str(name): value for name, value in part.items() if torch.is_tensor(value)}
            if any(value.dim() == 4 for value in tensors.values()):
                found[key] = tensors
    if len(found) != 1:
        held = ", ".join(map(str, found)) or "no state_dict of a network"
        fail(f"{path} holds {held}: give a file of one dict of tensors")
    state = renamed({name: value.to_dense() for name, value in found.popitem()[1].items()})
    for name, value in state.items():
        if value.is_meta or value.is_complex() or not value.isfinite().all():
            fail(f"{path} holds weights that are not finite numbers ({name}): train it again")
    return state


def load_network(path, num_classes, arch=None, size=32):
    """A file of weights -> the network on the CPU in test mode.

    The first convolution tells the arch, which must be `arch` if that is given.
    """
    state = read_state(path)
    first = state["conv1.weight"].shape if "conv1.weight" in state else ()
    kinds = {width: name for name, (_, width) in ARCHS.items()}
    kind = kinds.get(first[0]) if first else None
    kind = "ViT" if "conv_proj.weight" in state else kind
    if kind is None or arch and arch != kind:
        expected = arch or f"{', '.join(ARCHS)} or a ViT"
        fail(f"{path} is a checkpoint of {kind or 'an unknown arch'}: expected {expected}")
    if kind != "ViT" and (first[2:] == (7, 7)) != (size >= 224):
        change = "leave out" if size >= 224 else "add"
        fail(f"{path} is not a network for images {size} wide: {change} --size 224")
    bias = state.get("fc.bias", state.get("heads.head.bias"))
    if bias is not None and bias.numel() != num_classes:
        fail(f"{path} was trained for {bias.numel()} classes: the dataset has {num_classes}")
    try:
        net = ViT(state, num_classes) if kind == "ViT" else build(kind, num_classes, size)
        net.load_state_dict(state)
    except Exception as problem:  # a ViT's shape is read from its state
        fail(f"{path} does not fit {kind}: {' '.join(str(problem).split())[:200]}")
    noise = torch.randint(256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator())
    try:
        predict(net, noise, (0.5,) * 3, (0.25,) * 3)
    except FloatingPointError:
        fail(f"{path} gives outputs that are not finite: train it again")
    return net.eval()


def load_imagenet_vit(num_classes, folder):
    """ViT-B/16 with torchvision's ImageNet weights, from the folder or downloaded into it.

    The new head is zero. Ends the program without the weights.
    """
    url = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.url
    path = Path(folder) / os.path.basename(url)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), re.search(r"-(\w+)\.pth", url)[1])
        state = renamed(torch.load(path, map_location="cpu", weights_only=True))
        net = ViT(state, num_classes)
        net.load_state_dict({**state, **net.heads.state_dict(prefix="heads.")})
    except Exception as problem:  # no network, a file cut short, another network's
        reason = " ".join(str(problem).split())[:200]
        fail(f"no weights {path} ({reason}): put the file of {url} there")
    return net
