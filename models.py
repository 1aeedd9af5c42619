"""Networks: residual classifiers of three sizes, the ViT that can teach them, the projection of its features.

`resnet18` is the network of the OpenOOD v1.5 CIFAR board; its parameter names and shapes are those of OpenOOD's
`ResNet18_32x32`, so checkpoints travel both ways. `resnet_small` has the same names, one block per stage and half the
width (1.2 M parameters), and trains on a laptop; `resnet_tiny`, a quarter as wide (0.3 M), is for the embedded images.
For images of 224 each has the stem and the names of torchvision's ResNet.

A classifier is two halves: `lower` ends with the feature map of stage 2, `upper` goes from there to the features.
OAL's synthesised latents are such maps: they enter between the halves and never exist as images.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import VisionTransformer

# Residual blocks per stage, width of the first stage.
ARCHS = {"resnet18": (2, 64), "resnet_small": (1, 32), "resnet_tiny": (1, 16)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a module of that name (He et al. 2016, arXiv 1512.03385, figure 3)."""

    def __init__(self, in_width, width, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut_name, layers = shortcut, []
        if stride != 1 or in_width != width:
            layers = [nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.add_module(shortcut, nn.Sequential(*layers))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.get_submodule(self.shortcut_name)(x))


class ResNet(nn.Module):
    """Residual network: stem, four stages, mean pool, linear classifier.

    net(x) -> logits [B, C];  net(x, return_feature=True) -> (logits [B, C], features [B, D]), D = 8 * width.
    For images 32 to 128 wide the stem is a 3x3 convolution, so that stage 2 has 1 / R = 1 / 2 of their side; for 224 it
    is torchvision's, a 7x7 convolution and a pool at stride 2 each, and R = 8.
    """

    def __init__(self, blocks, width, num_classes, size=32):
        super().__init__()
        large = size >= 224
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False) if large else nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        shortcut, widths = "downsample" if large else "shortcut", [width, width, 2 * width, 4 * width, 8 * width]
        for i in range(4):
            ends = [(widths[i], 2 if i else 1)] + [(widths[i + 1], 1)] * (blocks - 1)  # of each block: width in, stride
            stage = [BasicBlock(start, widths[i + 1], stride, shortcut) for start, stride in ends]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(widths[-1], num_classes)

    def lower(self, x):
        """Images [B, 3, S, S] -> feature map of stage 2 [B, 2 * width, S/R, S/R]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # [B, W, 2S/R, 2S/R]
        return self.layer2(self.layer1(x))                 # [B, 2W, S/R, S/R]

    def upper(self, maps, return_maps=False):
        """Stage-2 map [B, 2 * width, S/R, S/R] -> features [B, 8 * width], if asked with the maps of stages 3, 4."""
        third = self.layer3(maps)                 # [B, 4W, S/2R, S/2R]
        fourth = self.layer4(third)               # [B, 8W, S/4R, S/4R]
        features = fourth.float().mean((2, 3))    # [B, D]; float32: energies of bf16 features would tie
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
    """torchvision's VisionTransformer as a classifier like the ResNet above; features [B, D] are its class token.

    Dosovitskiy et al., arXiv 2010.11929; of the shape of a state_dict, with 64 numbers per head as all have up to
    ViT-L; ViT-B/16, the teacher of the released code, has 12 layers and D = 768. Images are enlarged here, on their
    device.
    """

    def __init__(self, state, num_classes):
        width, _, patch, _ = state["conv_proj.weight"].shape
        side = patch * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1)
        layers = sum(name.endswith(".ln_1.weight") for name in state)
        mlp = len(state["encoder.layers.encoder_layer_0.mlp.0.weight"])
        if not side or width > 1024:
            raise ValueError(f"a ViT of {layers} layers, {width} wide, for images of {side}: not one up to ViT-L")
        super().__init__(side, patch, layers, width // 64, width, mlp, num_classes=num_classes)

    fc = property(lambda self: self.heads.head)
    forward, classify = ResNet.forward, ResNet.classify

    def lower(self, x):
        """Images [B, 3, S, S] -> tokens [B, 1 + P, D]: the class's, then those of the P patches."""
        patches = self.conv_proj(F.interpolate(x, self.image_size, mode="bilinear"))      # [B, D, sqrt P, sqrt P]
        return torch.cat([self.class_token.expand(len(x), -1, -1), patches.flatten(2).mT], dim=1)

    def upper(self, tokens, return_maps=False):
        """Tokens [B, 1 + P, D] -> features [B, D], if asked with no maps."""
        features = self.encoder(tokens)[:, 0].float()
        return (features, ()) if return_maps else features


def build(name, num_classes, size=32):
    """The ResNet `name`, a key of ARCHS, with fresh weights, for images `size` wide; ValueError for any other name."""
    if name not in ARCHS:
        raise ValueError(f"unknown arch '{name}': choose one of {', '.join(ARCHS)}")
    return ResNet(*ARCHS[name], num_classes, size)


def autocast(device):
    """bf16 autocast where the device has bf16 instructions, but for Intel CPUs without AMX; else a null context.

    A Xeon of that kind trained resnet_small on 367 images per second in bf16 and on 495 in float32. A CPU without the
    instructions would emulate them and be slower than in float32.
    """
    device, cpu = torch.device(device), torch.cpu.get_capabilities()
    faster = {"cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
              "cpu": cpu.get("amx_bf16")
                     or cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", "")}.get(device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(faster))


def projection(teacher_dim, student_dim):
    """Teacher features [B, Dt] -> targets for the student's features [B, Ds].

    Batch-norm, linear, ReLU, batch-norm: `DT` in networks/kd_model.py of the released code.
    """
    return nn.Sequential(nn.BatchNorm1d(teacher_dim), nn.Linear(teacher_dim, student_dim),
                         nn.ReLU(), nn.BatchNorm1d(student_dim))
