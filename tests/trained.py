"""A small model for quantization-aware training: its configs, data and training loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo

CONFIGS = {
    "minmax": qo.Int8Static(),
    "ema": qo.Int8Static(observer="ema", asymmetric=True),
    "lsq": qo.Int8Static(observer="lsq", weight_bits=4, weight_observer="mse"),
    "lsq asymmetric": qo.Int8Static(observer="lsq", asymmetric=True),
    "dynamic": qo.Int8Dynamic(weight_bits=4),
    "dynamic asymmetric": qo.Int8Dynamic(asymmetric=True),
    "searched weights": qo.Int8Static(weight_bits=3, weight_observer="histogram"),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.grouped(self.conv(x).relu()).relu().mean((2, 3)))


def data(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 3, 6, 6, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(count)]


def train(model, steps, lr=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for x, y in steps:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval()
