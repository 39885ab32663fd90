"""QuantConv1d: the integer sums of a one-dimensional convolution in float64, the epilogue's formula, shapes and formats."""

import pytest
import reference
import torch
from torch import nn

import quant_ops as qo


@pytest.mark.parametrize("settings", [{}, {"asymmetric": True}, {"input_scale": 0.03, "input_zero_point": 4}])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(16, 24, 3, padding=1),
        nn.Conv1d(6, 9, 5, stride=2, padding=3, dilation=2, groups=3, bias=False),
        nn.Conv1d(20, 20, 4, padding="same", groups=20),
        nn.Conv1d(5, 8, 3, padding=2, padding_mode="circular"),
        nn.Conv1d(64, 64, 1),
    ],
)
def test_equals_the_exact_sum(layer, settings):
    x = torch.randn(3, layer.in_channels, 37)
    quantized = qo.QuantConv1d.from_float(layer, **settings)
    conv = quantized.conv
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = torch.nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode)
    if settings.get("input_scale"):
        scale, zero, qmin = conv.input_scale, conv.input_zero_point, -128
    else:
        qmin = -128 if settings else -127
        # a padded zero changes no range that holds zero already
        scale, zero = qo.choose_qparams(padded if mode != "constant" else x, [1, 2], qmin, 127, bool(settings))
    codes = qo.quant_tensor_forward(padded, scale, zero, qmin, 127, True, False).double() - zero
    acc = torch.nn.functional.conv1d(codes, conv.weight.squeeze(2).double(), None, layer.stride, 0, layer.dilation, layer.groups)
    bias = None if layer.bias is None else layer.bias.detach()[:, None]
    expected = reference.epilogue(acc.to(torch.int32), scale, conv.weight_scale[:, None], bias)
    assert reference.same_bits(quantized(x), expected)
    assert reference.same_bits(quantized(x[0]), expected[0])
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(quantized(last), expected)
    back = quantized.dequantize()
    assert back(x).shape == expected.shape
    assert torch.equal(back.weight, conv.weight.squeeze(2) * conv.weight_scale[:, None, None])


def test_saved_compiled_and_refused(tmp_path):
    layer, x = nn.Conv1d(8, 8, 3), torch.randn(2, 8, 20)
    quantized = qo.QuantConv1d.from_float(layer)
    other = qo.QuantConv1d.from_float(nn.Conv1d(8, 8, 3))
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), quantized(x))
    assert torch.equal(torch.compile(quantized, fullgraph=True, backend="aot_eager")(x), quantized(x))
    with pytest.raises(TypeError, match=r"expected an nn\.Conv1d, got Conv2d"):
        qo.QuantConv1d.from_float(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"expected x.shape \(N, C, L\)"):
        quantized(torch.randn(2, 8, 3, 3))
    with pytest.raises(ValueError, match="height 1"):
        qo.QuantConv1d(qo.QuantConv2d(1, 1, 3))
