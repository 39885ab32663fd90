"""Random operands from one generator, seeded anew for each test (conftest.py), and int8 layers in a small model of images."""

import torch
from torch import nn

import quant_ops as qo

generator = torch.Generator().manual_seed(0)


def floats(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


def codes(*shape, dtype=torch.int8):
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=dtype)


def scales(*shape, dtype=torch.float32):
    return (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(dtype)


def vision_model(static=False):
    """Conv2d, depthwise Conv2d and Linear, int8, with a ReLU and a flatten between them (exact in any backend)."""
    torch.manual_seed(1)
    settings = [{"input_scale": 0.02, "input_zero_point": 5}, {"input_scale": 0.01}, {"input_scale": 0.03}] if static else [{}] * 3
    return nn.Sequential(
        qo.QuantConv2d.from_float(nn.Conv2d(3, 10, 3, padding=1), **settings[0]),
        nn.ReLU(),
        qo.QuantConv2d.from_float(nn.Conv2d(10, 10, 3, stride=2, groups=10), **settings[1]),
        nn.Flatten(1),
        qo.QuantLinear.from_float(nn.Linear(10 * 3 * 3, 7), **settings[2]),
    ).eval()


def images(batch, dtype=torch.float32):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch)).to(dtype)
