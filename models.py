"""Networks, many images through them, and their files of weights.

`resnet18` has the names and shapes of OpenOOD's `ResNet18_32x32`: checkpoints travel both ways.
`resnet_small` (1.2 M parameters) is for a laptop, `resnet_tiny` (0.3 M) for the embedded images.
For images of 224 each has the stem and the names of torchvision's ResNet.

A classifier has two halves: `lower` gives the feature map of stage 2, `upper` the features. OAL's
outliers are such maps: they enter between the halves, never as images.
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
from torchvision.models import ViT_B_16_Weights, VisionTransformer

# Residual blocks per stage, width of the first stage.
ARCHS = {"resnet18": (2, 64), "resnet_small": (1, 32), "resnet_tiny": (1, 16)}


# --- Networks.

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


class ResNet(nn.Module):
    """Residual network: stem, four stages, mean pool, linear classifier.

    net(x) -> logits [B, C]; net(x, return_feature=True) -> (logits, features [B, 8 * width]).
    The map of stage 2 has the image's side S over R: R = 2, or 8 with torchvision's stem for 224.
    """

    def __init__(self, blocks, width, num_classes, size=32):
        super().__init__()
        large = size >= 224
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

    Its shape is that of the state_dict. Features [B, D] are the class token. Images of any size are
    enlarged. ValueError if it is wider than ViT-L, up to which a head has 64 numbers.
    """

    def __init__(self, state, num_classes):
        width, _, patch, _ = state["conv_proj.weight"].shape
        if width > 1024:
            raise ValueError(f"{width} wide, more than ViT-L")
        side = patch * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1)
        layers = sum(name.endswith(".ln_1.weight") for name in state)
        mlp = len(state["encoder.layers.encoder_layer_0.mlp.0.weight"])
        super().__init__(side, patch, layers, width // 64, width, mlp, num_classes=num_classes)

    fc = property(lambda self: self.heads.head)
    forward, classify = ResNet.forward, ResNet.classify

    def lower(self, x):
        """Images [B, 3, S, S] -> tokens [B, 1 + P, D]: the class's, then those of the P patches."""
        patches = self.conv_proj(F.interpolate(x, self.image_size, mode="bilinear"))
        patches = patches.flatten(2).mT  # [B, P, D]
        return torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1)

    def upper(self, tokens, return_maps=False):
        """Tokens [B, 1 + P, D] -> features [B, D]; a ViT has no maps."""
        features = self.encoder(tokens)[:, 0].float()
        return (features, ()) if return_maps else features


def build(name, num_classes, size=32):
    """A ResNet with fresh weights for images `size` wide. KeyError: the name is not in ARCHS."""
    return ResNet(*ARCHS[name], num_classes, size)


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


def normalize(images, mean, std):
    """uint8 [B, 3, S, S], mean and std [3] -> float32 [B, 3, S, S], channels last."""
    mean, std = (torch.as_tensor(v, device=images.device)[:, None, None] for v in (mean, std))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def to_device(net, device):
    """The network on the device, in the memory layout that is fastest for convolutions."""
    return net.to(device=device, memory_format=torch.channels_last)


@torch.no_grad()
def feature_batches(net, images, mean, std):
    """uint8 [N, 3, S, S] -> batches of (stage-2 maps or tokens, features [B, D]), in test mode.

    On the network's device. FloatingPointError: see check_finite.
    """
    mode, device = net.training, net.fc.weight.device
    net.eval()
    try:
        for batch in progress("batches through the network", images.split(500)):
            with autocast(device):
                maps = net.lower(normalize(batch.to(device), mean, std))
                features = net.upper(maps)
            check_finite(features)
            yield maps, features
    finally:
        net.train(mode)


@torch.no_grad()
def predict(net, images, mean, std):
    """uint8 [N, 3, S, S] -> (logits [N, C], features [N, D]) in float32 on the CPU."""
    features = [features for _, features in feature_batches(net, images, mean, std)]
    logits = torch.cat([net.classify(batch).cpu() for batch in features])
    check_finite(logits)
    return logits, torch.cat(features).cpu()


def check_finite(values):
    """FloatingPointError if the sum of squares of a row of [B, K] is not finite: scores need it."""
    if not values.square().sum(1).isfinite().all():
        raise FloatingPointError("the network gives outputs that are not finite")


def renew_statistics(net, images, mean, std):
    """Sets batch-norm's running statistics to their mean over the images, uint8 [N, 3, S, S].

    After few steps the running means are still those of earlier weights.
    """
    count = math.ceil(len(images) / 500)  # every count-th image: they are sorted by class
    batches = (normalize(images[i::count], mean, std) for i in range(count))
    with autocast(images.device):
        torch.optim.swa_utils.update_bn(batches, net)


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


# --- Files of weights.

# Names in the files of pytorch-cifar, of timm's ViT, of torchvision's ViT -> ours.
RENAMED = {
    r"^linear\.": "fc.",
    r"^cls_token": "class_token",
    r"^pos_embed": "encoder.pos_embedding",
    r"^patch_embed\.proj": "conv_proj",
    r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".self_attention.in_proj_",
    r"\.attn\.proj\.": ".self_attention.out_proj.",
    r"\.mlp\.(fc|linear_)1\.": ".mlp.0.",
    r"\.mlp\.(fc|linear_)2\.": ".mlp.3.",
    r"^norm\.": "encoder.ln.",
    r"^head\.": "heads.head."}

FORMATS = {".onnx": "ONNX", ".npz": "numpy", ".npy": "numpy", ".h5": "HDF5", ".keras": "Keras"}

# Lets torch.load read numpy numbers, such as an accuracy, that numpy 1 or 2 has saved.
NUMPY = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
         for core in ("core", "_core")]
NUMPY += [np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefd")]


def fail(message):
    """Ends the program with one line on stderr and exit status 2: a mistake of the user."""
    print("error:", " ".join(str(message).splitlines()), file=sys.stderr)
    raise SystemExit(2)


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
    except (FileNotFoundError, IsADirectoryError, PermissionError) as problem:
        fail(f"no checkpoint {path} ({problem.strerror}): name a file of weights")
    except ImportError:
        fail(f"{path} needs a package that is not installed: pip install safetensors")
    except Exception as problem:  # another format, a truncated archive, a pickle of objects
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


def load_network(path, num_classes, arch=None, size=32):
    """A file of weights -> the network on the CPU in test mode, of this arch if one is given."""
    state = read_state(Path(path))
    first = state["conv1.weight"].shape if "conv1.weight" in state else ()
    kinds = {width: name for name, (_, width) in ARCHS.items()}
    kind = "ViT" if "conv_proj.weight" in state else kinds.get(first[0]) if first else None
    if kind is None or arch and arch != kind:
        expected = arch or f"{', '.join(ARCHS)} or a ViT"
        fail(f"{path} is a checkpoint of {kind or 'an unknown arch'}: expected {expected}")
    if kind != "ViT" and (first[2:] == (7, 7)) != (size >= 224):
        change = "leave out" if size >= 224 else "add"
        fail(f"{path} is not a network for images {size} wide: {change} --size 224")
    bias = state.get("fc.bias", state.get("heads.head.bias"))
    if bias is not None and bias.numel() != num_classes:
        fail(f"{path} was trained for {bias.numel()} classes: the dataset has {num_classes}")
    noise = torch.randint(256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator())
    try:
        net = ViT(state, num_classes) if kind == "ViT" else build(kind, num_classes, size)
        net.load_state_dict(state)
        predict(net, noise, (0.5,) * 3, (0.25,) * 3)
    except Exception as problem:
        fail(f"{path} is no working {kind} of {num_classes} classes: {str(problem):.300}")
    return net.eval()


def load_imagenet_vit(num_classes, folder):
    """ViT-B/16 with torchvision's ImageNet weights, kept in the folder, and a head of zeros."""
    url = ViT_B_16_Weights.IMAGENET1K_V1.url
    path = Path(folder) / os.path.basename(url)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), re.search(r"-(\w+)\.pth", url)[1])
        state = renamed(torch.load(path, map_location="cpu", weights_only=True))
        net = ViT(state, num_classes)
        net.load_state_dict({**state, **net.heads.state_dict(prefix="heads.")})
    except Exception as problem:  # no network, a file cut short, another network's
        fail(f"no weights {path} ({str(problem):.300}): put the file of {url} there")
    return net
