"""The shapes that are timed, by the model or package they come from. SMOKE names the sets that a quick run takes."""

from typing import NamedTuple


class Linear(NamedTuple):
    """y[M, N] = x[M, K] weight[N, K]^T"""

    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def macs(self) -> int:
        return self.M * self.N * self.K


class Conv(NamedTuple):
    """Input N x C x H x H, O output channels, kernel k x k, padding p, stride s, dilation d."""

    N: int
    C: int
    H: int
    O: int
    k: int
    p: int = 0
    s: int = 1
    groups: int = 1
    d: int = 1

    def __str__(self) -> str:
        others = "".join(f"_{name}{value}" for name, value in (("s", self.s), ("g", self.groups), ("d", self.d)) if value > 1)
        return f"{self.N}x{self.C}x{self.H}x{self.H}_{self.O}_k{self.k}_p{self.p}{others}"

    @property
    def out(self) -> int:
        return (self.H + 2 * self.p - self.d * (self.k - 1) - 1) // self.s + 1

    @property
    def macs(self) -> int:
        return self.N * self.O * self.out**2 * (self.C // self.groups) * self.k**2


def text(shape) -> str:
    return str(shape) if isinstance(shape, Linear | Conv) else "x".join(map(str, shape))


LINEAR = {
    "tiny": [Linear(1, 64, 64), Linear(7, 50, 130)],
    "minilm": [Linear(32, 384, 384), Linear(32, 1536, 384), Linear(32, 384, 1536)],
    "bert-base": [Linear(128, 768, 768), Linear(128, 3072, 768), Linear(128, 768, 3072)],
    "vit-b": [Linear(197, 2304, 768), Linear(197, 3072, 768)],
    "llama-7b": [Linear(1, 4096, 4096), Linear(16, 4096, 4096), Linear(128, 4096, 4096), Linear(1, 11008, 4096)],
    "torch_quantizer": [Linear(512, 960, 960)],  # the row of its README
}

# Of linear.py, which compares with other packages: one row at a time to whole batches, small to large weights.
PACKAGES_LINEAR = {
    "tiny": [Linear(1, 64, 64)],
    "minilm": [Linear(1, 384, 384), Linear(128, 384, 384), Linear(128, 1536, 384), Linear(128, 384, 1536)],
    "bert-base": [
        Linear(1, 768, 768),
        Linear(8, 3072, 768),
        Linear(128, 768, 768),
        Linear(128, 3072, 768),
        Linear(128, 768, 3072),
    ],
    "vit-b": [Linear(197, 3072, 768), Linear(197, 768, 3072)],
    "llama-7b": [
        *(Linear(M, 4096, 4096) for M in (1, 4, 16, 64, 512)),
        Linear(1, 11008, 4096),
        Linear(1, 4096, 11008),
    ],
    "torch_quantizer": [Linear(512, 960, 960)],
}

# Weights (N, K) of weight_only.py.
WEIGHT_ONLY = {
    "tiny": [(64, 256)],
    "llama": [(4096, 4096), (4096, 14336)],
    "bert-base": [(768, 3072)],
    "opt-1.3b": [(2048, 2048)],
}

CONV = {
    "tiny": [Conv(1, 8, 8, 16, 3, 1), Conv(2, 8, 8, 8, 3, 1, groups=8)],
    "resnet-50": [
        Conv(1, 3, 224, 64, 7, 3, 2),
        Conv(1, 64, 56, 64, 3, 1),
        Conv(1, 256, 56, 64, 1),
        Conv(1, 128, 28, 128, 3, 1),
        Conv(1, 256, 14, 256, 3, 1),
        Conv(1, 512, 7, 512, 3, 1),
        Conv(32, 256, 14, 256, 3, 1),
    ],
    "resnext-50": [Conv(1, 128, 56, 128, 3, 1, groups=32)],
    "mobilenet": [
        Conv(1, 128, 56, 128, 3, 1, groups=128),
        Conv(1, 64, 112, 64, 3, 1, 2, groups=64),
        Conv(1, 128, 56, 128, 1),
    ],
    "torch_quantizer": [Conv(1, 512, 64, 512, 3)],  # the row of its README
}

# Of conv2d.py, which compares with other packages, beside the layers of ResNet-50 and MobileNetV2.
PACKAGES_CONV = {
    "tiny": [Conv(1, 8, 8, 16, 3, 1), Conv(2, 8, 8, 8, 3, 1, groups=8)],
    "others": [
        Conv(1, 512, 64, 512, 3),  # the row of torch_quantizer's README
        Conv(1, 96, 56, 96, 3, 1, groups=96),
        Conv(1, 128, 56, 128, 3, 1, groups=32),  # ResNeXt-50
        Conv(1, 240, 28, 240, 5, 2, groups=240),  # 5 x 5 depthwise, as in MobileNetV3 and EfficientNet
        Conv(1, 256, 28, 256, 3, 2, d=2),  # dilated, as in DeepLab
        Conv(8, 128, 28, 128, 3, 1, 2),
        Conv(8, 256, 14, 256, 3, 1),
    ],
}

# Tensors of the elementwise operators.
TENSOR = {
    "tiny": [(2, 5, 7, 3)],
    "torch_quant_ext": [(1, 128, 56, 56), (32, 128, 56, 56)],  # the table of its README
}

# Activations of a transformer, (rows, columns).
ROWS = {
    "tiny": [(3, 70)],
    "bert-base": [(128, 768)],
    "llama-7b": [(512, 4096)],
}

SMOKE = ("tiny",)
