"""Int8 layers and their reference: the formulas in integers and float64, every float32 rounding written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo

LAYERS = (qo.QuantLinear, qo.QuantConv2d)
MODES = {
    "dynamic": {},
    "asymmetric": {"asymmetric": True},
    "static": {"input_scale": 0.021},
    "static_zero_point": {"input_scale": 0.021, "input_zero_point": -17},
}
modes = pytest.mark.parametrize("mode", MODES)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(inputs, outputs, bias=True, seed=0, **kwargs):
    torch.manual_seed(seed)
    return qo.QuantLinear.from_float(nn.Linear(inputs, outputs, bias), **kwargs)


def conv(*args, seed=0, quant=None, **kwargs):
    torch.manual_seed(seed)
    return qo.QuantConv2d.from_float(nn.Conv2d(*args, **kwargs), **(quant or {}))


def divide(a, b):
    """The float32 quotient: the float64 one has more than twice the digits, so rounding it again does no harm."""
    return (a.double() / b.double()).float()


def fma(a, b, c):
    """a * b + c for float32 with one rounding: the product is exact in float64, its sum is rounded to odd, then to float32."""
    p, c = (a.double() * b.double()), c.double()
    s = p + c
    back = s - p
    error = (p - (s - back)) + (c - back)
    away = (error > 0) == (s > 0)
    bits = s.contiguous().view(torch.int64)
    odd = torch.where(away, bits + 1, bits - 1).view(torch.float64)
    return torch.where((error != 0) & (bits & 1 == 0), odd, s).float()


def input_codes(layer, x, dims):
    """Codes, scale and zero point of the activations; dims are reduced by dynamic quantization."""
    x = x.float()
    if layer.input_scale is not None:
        scale = layer.input_scale.reshape((1,) * x.dim())
        zero = torch.zeros_like(scale) if layer.input_zero_point is None else layer.input_zero_point.float().reshape(scale.shape)
        qmin = -128
    else:
        low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
        scale = divide(high - low, torch.tensor(255)) if layer.asymmetric else divide(torch.maximum(high, -low), torch.tensor(127))
        scale = torch.where((low == 0) & (high == 0), 1.0, scale)
        zero = (-128 - divide(low, scale).round()).clamp(-128, 127) if layer.asymmetric else torch.zeros_like(scale)
        qmin = -128 if layer.asymmetric else -127
    return (divide(x, scale).round() + zero).clamp(qmin, 127).double(), scale, zero.double()


def finish(layer, acc, scale, dtype):
    """The epilogue; channels are the last dimension, scale broadcasts."""
    assert acc.abs().max() < 2**31 if acc.numel() else True
    factor = scale * layer.weight_scale
    y = acc.float() * factor if layer.bias is None else fma(acc.float(), factor, layer.bias)
    if layer.relu:
        y = y.clamp(min=0)
    if layer.output_scale is None:
        return y.to(dtype)
    zero = 0 if layer.output_zero_point is None else layer.output_zero_point
    return (divide(y, layer.output_scale).round() + zero).clamp(-128, 127).to(torch.int8)


def linear_reference(layer, x):
    q, scale, zero = input_codes(layer, x, (-1,))
    return finish(layer, (q - zero) @ layer.qweight.double().T, scale, x.dtype)


def conv_reference(layer, x):
    """Pads the float image (a padded zero has the code of 0), then convolves the codes in float64, where sums are exact."""
    kernel, dilation = layer.weight.shape[2:], layer.dilation
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    else:
        vertical, horizontal = (0, 0) if layer.padding == "valid" else layer.padding
        sides = [horizontal, horizontal, vertical, vertical]
    padded = F.pad(x.float(), sides, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    q, scale, zero = input_codes(layer, padded, (1, 2, 3))
    acc = F.conv2d(q - zero, layer.qweight.double(), None, layer.stride, 0, dilation, layer.groups)
    return finish(layer, acc.movedim(1, -1), scale, x.dtype).movedim(-1, 1)
