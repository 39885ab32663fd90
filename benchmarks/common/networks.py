"""Networks of convolutions: ResNet-50, MobileNetV2 and V3, EfficientNet-Lite0, a detector of YOLO's kind and a U-Net.

Random weights, as if trained: gains and offsets that differ, settled running statistics. NETWORKS has them in full, SMALL in a size
for tests; each makes an nn.Module that torch.fx can trace and that takes images (N, 3, H, W). Read next: packages/networks.py.
"""

import functools

import torch
from torch import nn

from benchmarks.common import shapes


def block(inputs, outputs, kernel=1, stride=1, groups=1, activation=nn.ReLU):
    """Convolution, BatchNorm and activation, which may be None."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([activation(inplace=True)] if activation else []))


class Residual(nn.Module):
    """The sum of a chain of blocks and a shortcut."""

    def __init__(self, body, shortcut=None, relu=False):
        super().__init__()
        self.body, self.shortcut, self.relu = body, nn.Identity() if shortcut is None else shortcut, relu

    def forward(self, x):
        y = self.body(x) + self.shortcut(x)
        return torch.relu_(y) if self.relu else y


# ---- classifiers ---------------------------------------------------------------------------------------------------------------


def classifier(layers, channels, classes):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def resnet(depths, width, classes):
    layers, channels = [block(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)], width
    for stage, depth in enumerate(depths):
        hidden = width << stage
        for i in range(depth):
            stride = 2 if stage and not i else 1
            last = block(hidden, 4 * hidden, activation=None)
            body = nn.Sequential(block(channels, hidden), block(hidden, hidden, 3, stride), last)
            layers.append(Residual(body, None if i else block(channels, 4 * hidden, 1, stride, activation=None), relu=True))
            channels = 4 * hidden
    return classifier(layers, channels, classes)


class SqueezeExcite(nn.Module):
    """Multiplies the channels by what two 1 x 1 convolutions of their means say."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        means = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * nn.functional.hardsigmoid(self.up(torch.relu(self.down(means))))


def inverted_residual(inputs, hidden, outputs, kernel, stride, activation, excite=False):
    body = nn.Sequential(
        *([block(inputs, hidden, activation=activation)] if hidden != inputs else []),
        block(hidden, hidden, kernel, stride, hidden, activation),
        *([SqueezeExcite(hidden, -(-hidden // 32) * 8)] if excite else []),
        block(hidden, outputs, activation=None),
    )
    return Residual(body) if stride == 1 and inputs == outputs else body


def mobile(stages, stem, last, classes, activation=nn.ReLU):
    """MobileNetV2 and EfficientNet-Lite; a stage is (expansion, outputs, depth, stride of the first block, kernel)."""
    layers, channels = [block(3, stem, 3, 2, activation=activation)], stem
    for expansion, outputs, depth, first_stride, kernel in stages:
        for i in range(depth):
            stride = 1 if i else first_stride
            layers.append(inverted_residual(channels, expansion * channels, outputs, kernel, stride, activation))
            channels = outputs
    return classifier([*layers, block(channels, last, activation=activation)], last, classes)


def mobilenet_v3(stages, stem, last, hidden, classes):
    """A stage is (kernel, hidden channels, outputs, squeeze and excite, activation, stride)."""
    layers, channels = [block(3, stem, 3, 2, activation=nn.Hardswish)], stem
    for kernel, wide, outputs, excite, activation, stride in stages:
        layers.append(inverted_residual(channels, wide, outputs, kernel, stride, activation, excite))
        channels = outputs
    layers += [block(channels, last, activation=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(last, hidden), nn.Hardswish(), nn.Linear(hidden, classes))


# ---- dense outputs -------------------------------------------------------------------------------------------------------------


class Concatenate(nn.Module):
    """The results of several branches, side by side."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class SpatialPyramid(nn.Module):
    """Largest values over ever larger windows, side by side."""

    def __init__(self, channels):
        super().__init__()
        self.first = block(channels, channels // 2, activation=nn.SiLU)
        self.last = block(2 * channels, channels, activation=nn.SiLU)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        levels = [self.first(x)]
        for _ in range(3):
            levels.append(self.pool(levels[-1]))
        return self.last(torch.cat(levels, 1))


def cross_stage(inputs, outputs, depth):
    """Half of the channels go through `depth` residual blocks."""
    half = outputs // 2
    bodies = [nn.Sequential(block(half, half, activation=nn.SiLU), block(half, half, 3, activation=nn.SiLU)) for _ in range(depth)]
    branch = nn.Sequential(block(inputs, half, activation=nn.SiLU), *map(Residual, bodies))
    return nn.Sequential(Concatenate(branch, block(inputs, half, activation=nn.SiLU)), block(outputs, outputs, activation=nn.SiLU))


class Detector(nn.Module):
    """A backbone of cross-stage blocks, a pyramid that goes up once, and a head on the finer of two grids."""

    def __init__(self, width, depths, outputs):
        super().__init__()
        silu, w = nn.SiLU, width
        self.early = nn.Sequential(
            block(3, w, 3, 2, activation=silu), block(w, 2 * w, 3, 2, activation=silu), cross_stage(2 * w, 2 * w, depths[0]),
            block(2 * w, 4 * w, 3, 2, activation=silu), cross_stage(4 * w, 4 * w, depths[1]),
        )  # fmt: skip
        self.late = nn.Sequential(
            block(4 * w, 8 * w, 3, 2, activation=silu), cross_stage(8 * w, 8 * w, depths[2]),
            SpatialPyramid(8 * w), block(8 * w, 4 * w, activation=silu),
        )  # fmt: skip
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.head = nn.Sequential(cross_stage(8 * w, 4 * w, depths[0]), nn.Conv2d(4 * w, outputs, 1))

    def forward(self, x):
        fine = self.early(x)
        return self.head(torch.cat([self.up(self.late(fine)), fine], 1))


class UNet(nn.Module):
    """Two 3 x 3 convolutions a level; going up, the level of the same size is put beside what comes from below."""

    def __init__(self, width, levels, classes):
        super().__init__()
        channels = [width << i for i in range(levels)]
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="nearest")
        self.down = nn.ModuleList(self.two(a, b) for a, b in zip([3, *channels], channels, strict=False))
        self.rise = nn.ModuleList(self.two(a + b, a) for a, b in zip(channels[-2::-1], channels[:0:-1], strict=True))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def two(inputs, outputs):
        return nn.Sequential(block(inputs, outputs, 3), block(outputs, outputs, 3))

    def forward(self, x):
        kept = []
        for level in self.down:
            x = level(self.pool(x) if kept else x)
            kept.append(x)
        for level, beside in zip(self.rise, kept[-2::-1], strict=True):
            x = level(torch.cat([beside, self.up(x)], 1))
        return self.head(x)


# ---- by name -------------------------------------------------------------------------------------------------------------------

_V2 = [
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3)
]  # fmt: skip
_LITE0 = [
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)
]  # fmt: skip
_RE, _HS = nn.ReLU, nn.Hardswish
_V3 = [
    (3, 16, 16, False, _RE, 1), (3, 64, 24, False, _RE, 2), (3, 72, 24, False, _RE, 1), (5, 72, 40, True, _RE, 2),
    (5, 120, 40, True, _RE, 1), (5, 120, 40, True, _RE, 1), (3, 240, 80, False, _HS, 2), (3, 200, 80, False, _HS, 1),
    (3, 184, 80, False, _HS, 1), (3, 184, 80, False, _HS, 1), (3, 480, 112, True, _HS, 1), (3, 672, 112, True, _HS, 1),
    (5, 672, 160, True, _HS, 2), (5, 960, 160, True, _HS, 1), (5, 960, 160, True, _HS, 1),
]  # fmt: skip

NETWORKS = {
    "resnet-50": functools.partial(resnet, (3, 4, 6, 3), 64, 1000),
    "mobilenet-v2": functools.partial(mobile, _V2, 32, 1280, 1000),
    "mobilenet-v3": functools.partial(mobilenet_v3, _V3, 16, 960, 1280, 1000),
    "efficientnet-lite0": functools.partial(mobile, _LITE0, 32, 1280, 1000, nn.ReLU6),
    "yolo": functools.partial(Detector, 32, (1, 2, 2), 85),
    "u-net": functools.partial(UNet, 32, 4, 2),
}
SMALL = {
    "resnet-50": functools.partial(resnet, (2, 1), 8, 10),
    "mobilenet-v2": functools.partial(mobile, [(1, 8, 1, 1, 3), (6, 8, 2, 2, 3)], 8, 32, 10),
    "mobilenet-v3": functools.partial(mobilenet_v3, [_V3[1], (5, 72, 24, True, _HS, 1)], 16, 32, 32, 10),
    "efficientnet-lite0": functools.partial(mobile, [(1, 8, 1, 1, 3), (6, 8, 2, 2, 5)], 8, 32, 10, nn.ReLU6),
    "yolo": functools.partial(Detector, 8, (1, 1, 1), 10),
    "u-net": functools.partial(UNet, 8, 2, 2),
}


@torch.no_grad()
def settle_(network, images, ends):
    """Weights as if trained, and the running statistics of these batches; the network is in eval mode afterwards.

    ends: the BatchNorms that end a branch beside a shortcut, which is small after training.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.momentum = None  # the mean over all batches
    for norm in ends:
        norm.weight.mul_(0.25)
    for batch in images:
        network(batch)
    network.eval().requires_grad_(False)


def network_and_images(make, size, batches=3):
    """(a network in eval mode with its BatchNorms, and batches of four images to calibrate it with), channels_last."""
    torch.manual_seed(0)
    images = [torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last) for _ in range(batches)]
    network = make().to(memory_format=torch.channels_last)
    lasts = [module.body[-1][1] for module in network.modules() if isinstance(module, Residual)]
    settle_(network, images, [last for last in lasts if isinstance(last, nn.BatchNorm2d)])
    return network, images


def conv_shapes(name, batch=1, size=224):
    """The distinct convolutions of a network, in their order."""
    seen = {}

    def note(conv, args, output):
        kernel, padding, stride = conv.kernel_size[0], conv.padding[0], conv.stride[0]
        seen[shapes.Conv(*args[0].shape[:3], conv.out_channels, kernel, padding, stride, conv.groups)] = 1

    with torch.device("meta"):
        network = NETWORKS[name]().eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        network(torch.empty(batch, 3, size, size))
    return list(seen)
