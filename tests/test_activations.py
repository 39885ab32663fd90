"""fuse_activations_: which activations become part of the layer before them, and that the results stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo

X = torch.linspace(-3, 3, 6 * 64).sin().view(6, 64)


class OwnGelu(nn.Module):
    """A class that nobody knows, with the function of a known one."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))


class Mlp(nn.Module):
    def __init__(self, act, gated=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(64, 96), act, nn.Linear(96, 64)
        self.gate = nn.Linear(64, 96) if gated else None

    def forward(self, x):
        h = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(h)


def fused(model, x=X):
    """The model before and after, quantized, and the result."""
    qo.quantize_(model.eval())
    before = model(x).detach()
    result = qo.fuse_activations_(model, x)
    return before, model(x).detach(), result


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "gelu": OwnGelu(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(),
}


@pytest.mark.parametrize("function", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activation_of_a_linear_layer(function, gated):
    model = Mlp(ACTIVATIONS[function], gated)
    before, after, result = fused(model)
    layer = model.gate if gated else model.up
    assert result.fused == [("gate" if gated else "up", "act", function)]
    assert result.skipped == []
    assert isinstance(model.act, nn.Identity)
    assert layer.activation == function
    assert (after - before).norm() < 0.01 * before.norm()  # a code of the next layer may be another one


def test_convolutions_share_an_activation():
    torch.manual_seed(0)
    act = nn.SiLU()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 8, 3), act, nn.Flatten(), nn.Linear(8 * 16, 4), nn.Tanh())
    x = torch.randn(2, 3, 8, 8)
    before, after, result = fused(model, x)
    assert [layer for layer, *_ in result.fused] == ["0", "2"]
    assert all(type(model[i]) is type(model[1]) and isinstance(model[i], nn.Identity) for i in (1, 3))
    assert (after - before).norm() < 0.02 * before.norm()


class Branch(Mlp):
    def forward(self, x):
        h = self.up(x)
        return self.down(self.act(h) + h)


class Sum(Mlp):
    def forward(self, x):
        return self.down(self.act(self.up(x) + 1))


class Functional(Mlp):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branch(nn.GELU()), "the output of QuantLinear 'up' is read elsewhere as well: the model's forward uses it in add.Tensor"),
        (Sum(nn.GELU()), "its input is computed, by no module"),
        (Functional(nn.GELU()), "the example has not reached it"),
        (nn.Sequential(nn.LayerNorm(64), nn.GELU()), "its input comes from LayerNorm '0', no int8 layer"),
    ],
)
def test_left_as_it_was(model, reason):
    before, after, result = fused(model)
    assert result.fused == []
    assert [text for _, text in result.skipped] == [reason]
    assert torch.equal(before, after)


def test_an_activation_that_is_none_of_them():
    class Almost(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    before, after, result = fused(Mlp(Almost()))
    assert (result.fused, result.skipped) == ([], [])
    assert torch.equal(before, after)


def test_files(tmp_path):
    model = Mlp(nn.GELU())
    _, after, _ = fused(model)
    qo.save(model, tmp_path / "model.safetensors")
    fresh = Mlp(nn.GELU()).eval()
    qo.load_(fresh, tmp_path / "model.safetensors")
    assert isinstance(fresh.act, nn.Identity)
    assert torch.equal(fresh(X), after)
    other = Mlp(nn.GELU())
    del other.act
    with pytest.raises(ValueError, match=r"got an activation 'act' that its layer computes, and nothing of that name in the model"):
        qo.load_(other, tmp_path / "model.safetensors")
