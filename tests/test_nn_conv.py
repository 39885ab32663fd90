"""QuantConv2d against the formula, with ``==``."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import MODES, conv, conv_reference, modes, randn
from torch import nn

import quant_ops as qo


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    groups=st.sampled_from([1, 1, 2, 3, 17]),
    channels=st.sampled_from([(1, 1), (1, 2), (3, 5), (4, 4), (2, 33)]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mode=st.sampled_from(list(MODES)),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    channels_last=st.booleans(),
    bias=st.booleans(),
    relu=st.booleans(),
    output=st.sampled_from([{}, {}, {"output_scale": 0.03, "output_zero_point": 11}]),
    seed=st.integers(0, 2**20),
)
def test_conv2d_is_the_formula(
    batch,
    groups,
    channels,
    height,
    width,
    kernel,
    stride,
    padding,
    dilation,
    mode,
    dtype,
    channels_last,
    bias,
    relu,
    output,
    seed,
):
    if padding == "same":
        stride = (1, 1)
    pad = padding if isinstance(padding, tuple) else (0, 0)
    if padding != "same":
        for size, k, p, d in zip((height, width), kernel, pad, dilation, strict=True):
            assume(size + 2 * p >= d * (k - 1) + 1)
    inputs, outputs = channels[0] * groups, channels[1] * groups
    layer = conv(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias,
        seed=seed,
        quant={"relu": relu, **MODES[mode], **output},
    )
    x = randn(batch, inputs, height, width, seed=seed, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.dtype == (torch.int8 if output else dtype)
    assert torch.equal(y, conv_reference(layer, x))
    if channels_last and not x.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)


@modes
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 0), "same", "valid"], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)], ids=str)
def test_padding_modes(mode, padding_mode, padding, kernel):
    """'same' with an even kernel pads one more on the right and at the bottom, in every mode."""
    layer = conv(3, 5, kernel, padding=padding, padding_mode=padding_mode, quant=MODES[mode])
    x = randn(2, 3, 6, 7)
    y = layer(x)
    assert y.shape == nn.Conv2d(3, 5, kernel, padding=padding)(x).shape
    assert torch.equal(y, conv_reference(layer, x))
    assert torch.equal(layer(x[1]), y[1])
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_modes_in_other_dtypes(dtype):
    for padding_mode in ("reflect", "replicate", "circular"):
        layer = conv(3, 5, 3, padding=1, padding_mode=padding_mode)
        x = randn(2, 3, 6, 7, dtype=dtype)
        assert torch.equal(layer(x), conv_reference(layer, x))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_int8_input_of_a_padded_conv(padding_mode):
    """A static layer takes the int8 codes of its input as well as the input."""
    layer = conv(3, 5, 3, padding=1, padding_mode=padding_mode, quant=MODES["static_zero_point"])
    x = randn(2, 3, 6, 7)
    q = qo.quant_tensor_forward(x, layer.input_scale, layer.input_zero_point, -128, 127, asymmetric=True, simulate=False)
    assert torch.equal(layer(q), layer(x))


def test_constructor_reads_arguments_as_nn_conv2d_does():
    a = qo.QuantConv2d(4, 6, (3, 1), stride=2, padding="valid", dilation=(1, 2), groups=2, bias=False, padding_mode="circular")
    b = nn.Conv2d(4, 6, (3, 1), stride=2, padding="valid", dilation=(1, 2), groups=2, bias=False, padding_mode="circular")
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels"):
        assert getattr(a, name) == getattr(b, name)
    assert a.weight.shape == b.weight.shape
    assert a.bias is None
    with pytest.raises(ValueError, match="strided"):
        qo.QuantConv2d(4, 6, 3, stride=2, padding="same")
    with pytest.raises(ValueError, match="groups"):
        qo.QuantConv2d(4, 6, 3, groups=3)
