"""Small vision networks with the structure of well-known ones, as if trained: for the tests of chains."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo
from benchmarks.common.networks import settle_


def conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Bottleneck(nn.Module):
    """Of ResNet-50, written as torchvision writes it: one ReLU module that is called three times."""

    def __init__(self, inputs, hidden, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, hidden), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = conv(hidden, hidden, 3, stride), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = conv(hidden, 4 * hidden), nn.BatchNorm2d(4 * hidden)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != 4 * hidden:
            self.downsample = nn.Sequential(conv(inputs, 4 * hidden, 1, stride), nn.BatchNorm2d(4 * hidden))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, depths=(3, 4, 6, 3), width=8, classes=10):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], width
        for stage, depth in enumerate(depths):
            hidden = width << stage
            for i in range(depth):
                blocks.append(Bottleneck(channels, hidden, 2 if stage and not i else 1))
                channels = 4 * hidden
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(channels, classes)

    def forward(self, x):
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """Of MobileNetV2 and of EfficientNet-lite, which has the kernel size 5 as well."""

    def __init__(self, inputs, outputs, stride, expansion, kernel=3):
        super().__init__()
        hidden = inputs * expansion
        layers = [conv(inputs, hidden), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)] if expansion > 1 else []
        layers += [conv(hidden, hidden, kernel, stride, hidden), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*layers, conv(hidden, outputs), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(self.conv(x)) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """MobileNetV2, or with ``kernels`` EfficientNet-lite: stages of (expansion, outputs, depth, stride)."""

    def __init__(self, stages, kernels=None, stem=8, last=64, classes=10):
        super().__init__()
        blocks, channels = [], stem
        for i, (expansion, outputs, depth, stride) in enumerate(stages):
            for j in range(depth):
                kernel = 3 if kernels is None else kernels[i]
                blocks.append(InvertedResidual(channels, outputs, 1 if j else stride, expansion, kernel))
                channels = outputs
        self.stem = nn.Sequential(conv(3, stem, 3, 2), nn.BatchNorm2d(stem), nn.ReLU6(inplace=True))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(conv(channels, last), nn.BatchNorm2d(last), nn.ReLU6(inplace=True))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x):
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(x.mean([2, 3]))


def double_conv(inputs, outputs):
    return nn.Sequential(
        *(conv(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        *(conv(outputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
    )


class UNet(nn.Module):
    """Each level's values go down through a pool and across to be concatenated with those that come up."""

    def __init__(self, width=8, depth=3, classes=4):
        super().__init__()
        sizes = [width << i for i in range(depth + 1)]
        self.first = double_conv(3, width)
        self.down = nn.ModuleList(double_conv(a, b) for a, b in itertools.pairwise(sizes))
        self.up = nn.ModuleList(double_conv(a + b, a) for a, b in zip(sizes[-2::-1], sizes[::-1], strict=False))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        across = [self.first(x)]
        for down in self.down:
            across.append(down(F.max_pool2d(across[-1], 2)))
        x = across.pop()
        for up in self.up:
            x = up(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), across.pop()], 1))
        return self.last(x)


MOBILENET_V2 = [(1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 3, 2), (6, 24, 4, 2), (6, 32, 3, 1), (6, 40, 3, 2), (6, 80, 1, 1)]
EFFICIENTNET_LITE = [(1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 2, 2), (6, 24, 3, 2), (6, 32, 3, 1), (6, 48, 4, 2), (6, 80, 1, 1)]
NETWORKS = {
    "resnet-50": ResNet,
    "mobilenet-v2": lambda: MobileNet(MOBILENET_V2),
    "efficientnet-lite": lambda: MobileNet(EFFICIENTNET_LITE, kernels=(3, 3, 5, 3, 5, 5, 3)),
    "u-net": UNet,
}


def network_and_images(name, size=64):
    """The folded float network with settled running statistics, and batches to calibrate it with."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = [torch.randn(4, 3, size, size, generator=generator) for _ in range(3)]
    network = NETWORKS[name]()
    ends = [m.bn3 for m in network.modules() if isinstance(m, Bottleneck)]
    ends += [m.conv[-1] for m in network.modules() if isinstance(m, InvertedResidual) and m.residual]
    settle_(network, images, ends)
    qo.fold_batchnorm_(network)
    return network, images


def static(network, images, **settings):
    """The network, statically quantized in place."""
    qo.prepare_(network, qo.Int8Static(**settings))
    qo.calibrate(network, images)
    qo.convert_(network)
    return network
