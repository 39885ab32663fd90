"""QuantLinear and QuantConv2d against the formulas, computed from a layer's own buffers in integers and float64, with ``==``."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
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


# ---- the reference: NUMERICS in float64, every float32 rounding written out --------------------------------------------------


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
    return finish(layer, (q - zero) @ layer.weight.double().T, scale, x.dtype)


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
    acc = F.conv2d(q - zero, layer.weight.double(), None, layer.stride, 0, dilation, layer.groups)
    return finish(layer, acc.movedim(1, -1), scale, x.dtype).movedim(-1, 1)


# ---- from_float: the weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_weight_codes(kind, bits):
    torch.manual_seed(bits)
    float_layer = nn.Linear(33, 17) if kind == "linear" else nn.Conv2d(6, 9, (3, 2), groups=3)
    before = float_layer.weight.detach().clone()
    layer = (qo.QuantLinear if kind == "linear" else qo.QuantConv2d).from_float(float_layer, weight_bits=bits)
    qmax = 2 ** (bits - 1) - 1
    rows, codes = before.flatten(1), layer.weight.flatten(1)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.shape == before.shape
    assert torch.equal(layer.weight_scale, divide(rows.abs().amax(1), torch.tensor(qmax)))
    assert torch.equal(codes, divide(rows, layer.weight_scale[:, None]).round().to(torch.int8))
    assert torch.equal(codes.abs().amax(1), torch.full((len(codes),), qmax, dtype=torch.int8))
    assert torch.equal(layer.bias, float_layer.bias.detach())
    assert layer.bias.data_ptr() != float_layer.bias.data_ptr()
    assert torch.equal(float_layer.weight, before)
    assert not list(layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_from_a_layer_of_another_dtype(dtype):
    torch.manual_seed(0)
    float_layer = nn.Linear(20, 6).to(dtype)
    layer = qo.QuantLinear.from_float(float_layer)
    assert layer.weight_scale.dtype == layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, float_layer.bias.detach().float())
    x = randn(4, 20)
    assert torch.equal(layer(x), linear_reference(layer, x))


def test_training_flag_and_device_of_the_buffers_are_taken_over():
    assert not qo.QuantLinear.from_float(nn.Linear(3, 2).eval()).training
    assert qo.QuantLinear.from_float(nn.Linear(3, 2)).training
    layer = qo.QuantLinear.from_float(nn.Linear(3, 2, device="meta"))
    assert all(b.is_meta for b in layer.buffers())


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bias", [True, False])
def test_dequantize(kind, bias):
    """A float layer with the very weights: code * scale, which quantizes to the same codes again."""
    torch.manual_seed(0)
    if kind == "linear":
        layer = qo.QuantLinear.from_float(nn.Linear(50, 7, bias).eval())
    else:
        float_layer = nn.Conv2d(6, 9, (3, 2), 2, "valid", 2, 3, bias, "reflect")
        layer = qo.QuantConv2d.from_float(float_layer.eval())
    restored = layer.dequantize()
    assert type(restored) is (nn.Linear if kind == "linear" else nn.Conv2d)
    assert not restored.training
    shape = (-1,) + (1,) * (layer.weight.dim() - 1)
    assert torch.equal(restored.weight, layer.weight.float() * layer.weight_scale.reshape(shape))
    assert (restored.bias is None) == (not bias)
    if bias:
        assert torch.equal(restored.bias, layer.bias)
    if kind == "conv":
        assert repr(restored) == repr(float_layer)
    again = type(layer).from_float(restored)
    assert torch.equal(again.weight, layer.weight)
    x = randn(2, 50) if kind == "linear" else randn(2, 6, 9, 9)
    error = (restored(x) - layer(x)).detach()
    assert 10 * torch.log10(restored(x).detach().var() / error.var()) > 35  # dB: what 8-bit activations cost


# ---- Linear --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 9),
    k=st.integers(1, 150),
    n=st.integers(1, 140),
    mode=st.sampled_from(list(MODES)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    bias=st.booleans(),
    relu=st.booleans(),
    output=st.sampled_from([{}, {"output_scale": 0.03}, {"output_scale": 0.03, "output_zero_point": -40}]),
    bits=st.sampled_from([8, 8, 4]),
    seed=st.integers(0, 2**20),
)
def test_linear_is_the_formula(m, k, n, mode, dtype, bias, relu, output, bits, seed):
    layer = linear(k, n, bias, seed=seed, relu=relu, weight_bits=bits, **MODES[mode], **output)
    x = randn(m, k, seed=seed, dtype=dtype)
    y = layer(x)
    assert y.dtype == (torch.int8 if output else dtype)
    assert torch.equal(y, linear_reference(layer, x))


@modes
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (2, 1, 3, 24), (0, 24), (2, 0, 24), (1, 1, 1, 1, 24)], ids=str)
def test_linear_takes_any_rank(mode, shape):
    layer = linear(24, 10, **MODES[mode])
    x = randn(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 10)
    assert torch.equal(y.reshape(-1, 10), linear_reference(layer, x.reshape(-1, 24)))


@modes
def test_linear_takes_views(mode):
    layer = linear(24, 10, **MODES[mode])
    base = randn(26, 7, 30)
    for x in (base[1:25, 2].T, base[:, :, 3:27], base[::2, ::3, :24], base[0].expand(3, 7, 30)[..., 6:], base[:24].movedim(0, 2)):
        assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))


# ---- Conv2d --------------------------------------------------------------------------------------------------------------------


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


# ---- static quantization and chains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", [None, -17])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_static_is_quantize_then_the_integer_operator(kind, zero_point):
    quant = {"input_scale": 0.017, "input_zero_point": zero_point, "relu": True}
    layer = linear(40, 21, **quant) if kind == "linear" else conv(6, 8, 3, 2, 1, groups=2, quant=quant)
    x = 3 * (randn(9, 40) if kind == "linear" else randn(3, 6, 9, 8))  # saturates at both ends
    q = qo.quant_tensor_forward(
        x,
        layer.input_scale,
        layer.input_zero_point,
        -128,
        127,
        asymmetric=zero_point is not None,
        simulate=False,
    )
    assert {-128, 127} <= set(q.unique().tolist())
    common = {"x_scale": layer.input_scale, "x_zero_point": layer.input_zero_point, "relu": True}
    if kind == "linear":
        expected = qo.int8_linear(q, layer.weight, layer.weight_scale, layer.bias, **common)
    else:
        expected = qo.int8_conv2d(q, layer.weight, layer.weight_scale, layer.bias, 2, 1, 1, 2, **common)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(q), expected)


@pytest.mark.parametrize(("scale", "zero_point"), [(0.01, None), (0.013, -128), (0.02, 5)])
def test_a_chain_of_int8_layers_is_the_unchained_computation(scale, zero_point):
    """Linear -> ReLU -> Linear with int8 between them: the same bits as float32 between them."""
    torch.manual_seed(0)
    first, second = nn.Linear(30, 40), nn.Linear(40, 20)
    inner = {"input_scale": scale, "input_zero_point": zero_point}
    outer = {"output_scale": scale, "output_zero_point": zero_point}
    x = randn(11, 30)
    chained = nn.Sequential(
        qo.QuantLinear.from_float(first, relu=True, **outer),
        qo.QuantLinear.from_float(second, **inner),
    )
    plain = nn.Sequential(qo.QuantLinear.from_float(first), nn.ReLU(), qo.QuantLinear.from_float(second, **inner))
    assert chained[0](x).dtype == torch.int8
    assert chained(x).dtype == torch.float32
    assert torch.equal(chained(x), plain(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_chain_of_convolutions(channels_last):
    torch.manual_seed(0)
    a, b, c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8 * 36, 5)
    x = randn(2, 3, 6, 6)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    out_1 = {"output_scale": 0.01, "output_zero_point": -128}
    in_2 = {"input_scale": 0.01, "input_zero_point": -128}
    chained = nn.Sequential(
        qo.QuantConv2d.from_float(a, input_scale=0.03, relu=True, **out_1),
        qo.QuantConv2d.from_float(b, output_scale=0.02, **in_2),
        nn.Flatten(1),
        qo.QuantLinear.from_float(c, input_scale=0.02),
    )
    plain = nn.Sequential(
        qo.QuantConv2d.from_float(a, input_scale=0.03),
        nn.ReLU(),
        qo.QuantConv2d.from_float(b, **in_2),
        nn.Flatten(1),
        qo.QuantLinear.from_float(c, input_scale=0.02),
    )
    assert torch.equal(chained(x), plain(x))


def test_float_zero_points_are_rounded():
    """A learned zero point is rounded to nearest even, not truncated."""
    layer = linear(20, 6, input_scale=torch.tensor(0.02), input_zero_point=torch.tensor(3.7))
    other = linear(20, 6, input_scale=0.02, input_zero_point=4)
    assert torch.equal(layer(randn(5, 20)), other(randn(5, 20)))
    layer = linear(20, 6, output_scale=torch.tensor(0.02), output_zero_point=torch.tensor(-2.5))
    other = linear(20, 6, output_scale=0.02, output_zero_point=-2)
    assert torch.equal(layer(randn(5, 20)), other(randn(5, 20)))


# ---- isolation: a row, or a sample, knows nothing of the others ---------------------------------------------------------------


@modes
def test_row_alone_equals_row_in_a_batch(mode):
    layer = linear(70, 66, **MODES[mode])
    x = randn(13, 70) * torch.logspace(-3, 2, 13)[:, None]
    y = layer(x)
    for i in range(13):
        assert torch.equal(layer(x[i : i + 1]), y[i : i + 1])
        assert torch.equal(layer(x[i]), y[i])


@modes
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_sample_alone_equals_sample_in_a_batch(mode, groups):
    layer = conv(6, 12, 3, padding=1, groups=groups, quant=MODES[mode])
    x = randn(5, 6, 7, 5) * torch.logspace(-3, 2, 5)[:, None, None, None]
    y = layer(x)
    for i in range(5):
        assert torch.equal(layer(x[i : i + 1]), y[i : i + 1])
        assert torch.equal(layer(x[i]), y[i])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["dynamic", "asymmetric"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_bad_row_or_sample_is_nan_and_alone(kind, mode, bad):
    layer = linear(33, 18, **MODES[mode]) if kind == "linear" else conv(3, 18, 3, padding=1, quant=MODES[mode])
    x = randn(7, 33) if kind == "linear" else randn(7, 3, 5, 6)
    good = layer(x)
    x[4].view(-1)[9] = bad
    y = layer(x)
    assert y[4].isnan().all()
    rest = [0, 1, 2, 3, 5, 6]
    assert torch.equal(y[rest], good[rest])


@pytest.mark.parametrize("mode", ["static", "static_zero_point"])
def test_static_nan_counts_as_zero_and_infinity_saturates(mode):
    layer = linear(33, 18, **MODES[mode])
    x = randn(3, 33)
    expected, replaced = x.clone(), x.clone()
    replaced[0, 1], replaced[1, 2], replaced[2, 3] = math.nan, math.inf, -math.inf
    expected[0, 1], expected[1, 2], expected[2, 3] = 0.0, 1e4, -1e4
    assert torch.equal(layer(replaced), layer(expected))


@modes
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_zeros_give_the_bias(kind, mode):
    """Exactly, also at the padded border of an image and beside rows that are not zero."""
    layer = linear(33, 18, **MODES[mode]) if kind == "linear" else conv(3, 18, 3, padding=2, quant=MODES[mode])
    x = randn(4, 33) if kind == "linear" else randn(4, 3, 5, 6)
    x[2] = 0
    y = layer(x)
    bias = layer.bias if kind == "linear" else layer.bias[:, None, None].expand(y.shape[1:])
    assert torch.equal(y[2], bias)
    assert not torch.equal(y[1], bias)


@modes
def test_empty_batches(mode):
    assert linear(7, 3, **MODES[mode])(randn(0, 7)).shape == (0, 3)
    layer = conv(3, 4, 3, stride=2, padding=1, quant=MODES[mode])
    assert layer(randn(0, 3, 8, 9)).shape == (0, 4, 4, 5)


def test_subnormal_rows_stay_finite():
    layer = linear(9, 4)
    x = torch.full((3, 9), 1e-42)
    x[1] = 1e-38
    y = layer(x)
    assert torch.equal(y, linear_reference_with_floor(layer, x))


def linear_reference_with_floor(layer, x):
    """As linear_reference, with the smallest normal number as the least scale."""
    scale = divide(x.abs().amax(-1, keepdim=True), torch.tensor(127)).clamp(min=torch.finfo(torch.float32).tiny)
    q = divide(x, scale).round().clamp(-127, 127).double()
    return finish(layer, q @ layer.weight.double().T, scale, x.dtype)


def test_every_instruction_set_gives_the_same_bits(isa):
    for quant in MODES.values():
        layer, x = linear(130, 77, **quant), randn(19, 130)
        assert torch.equal(layer(x), linear_reference(layer, x))
        assert repr(layer).endswith(f"_{isa})")
        for groups in (1, 3, 6):
            layer, x = conv(6, 12, 3, padding=1, groups=groups, quant=quant), randn(3, 6, 11, 10)
            assert torch.equal(layer(x), conv_reference(layer, x))
            assert repr(layer).endswith(f"_{isa})")


def test_any_number_of_threads_gives_the_same_bits(threads):
    layer, image_layer = linear(200, 150, asymmetric=True), conv(8, 70, 3, padding=1)
    x, image = randn(90, 200), randn(2, 8, 17, 16)
    expected = linear_reference(layer, x), conv_reference(image_layer, image)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(layer(x), expected[0])
        assert torch.equal(image_layer(image), expected[1])


# ---- extra_repr and settings that are refused --------------------------------------------------------------------------------


def test_extra_repr():
    kernel = qo._library.gemm_kernel()
    expected = (
        "QuantLinear(in_features=5, out_features=3, bias=True, weight=int8 per channel, input=int8 symmetric dynamic per row, "
        f"kernel={kernel})"
    )
    assert repr(linear(5, 3)) == expected
    text = repr(linear(5, 3, False, weight_bits=4, input_scale=0.1, input_zero_point=3, output_scale=0.2, relu=True))
    expected = "bias=False, weight=int4 per channel, input=int8 asymmetric static, output=int8, relu=True, kernel="
    assert expected in text
    assert "asymmetric dynamic per row" in repr(linear(5, 3, asymmetric=True))

    text = repr(conv(4, 6, (3, 2), (2, 1), (1, 0), 2, 2, padding_mode="reflect"))
    assert text.startswith("QuantConv2d(4, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 2), groups=2, ")
    assert "padding_mode='reflect', bias=True, weight=int8 per channel, input=int8 symmetric dynamic per sample" in text
    assert "padding='same'" in repr(conv(4, 6, 3, padding="same"))
    plain = repr(conv(4, 6, 1))
    assert not any(word in plain for word in ("padding", "dilation", "groups", "relu", "output"))
    assert "kernel=meta" in repr(qo.QuantLinear(5, 3, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, r"expected 2 <= (weight_)?bits <= 8, got 1"),
        ({"weight_bits": 9}, r"expected 2 <= (weight_)?bits <= 8, got 9"),
        ({"input_zero_point": 3}, "expected input_zero_point only together with input_scale"),
        ({"output_zero_point": 3}, "expected output_zero_point only together with output_scale"),
        ({"asymmetric": True, "input_scale": 0.1}, r"expected asymmetric only for dynamic .* Pass input_zero_point instead\."),
        ({"input_scale": 0.0}, "expected input_scale > 0 and finite, got 0.0"),
        ({"input_scale": -0.5}, "expected input_scale > 0 and finite, got -0.5"),
        ({"input_scale": math.nan}, "expected input_scale > 0 and finite, got nan"),
        ({"input_scale": torch.tensor(math.inf)}, "expected input_scale > 0 and finite, got inf"),
        ({"output_scale": 0.0}, "expected output_scale > 0 and finite, got 0.0"),
        ({"input_scale": torch.ones(2, 1)}, r"expected input_scale .*one element, or one per step, got"),
        ({"output_scale": torch.ones(3)}, r"expected output_scale .*one element, got"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_refused_settings(kind, arguments, message):
    float_layer = nn.Linear(4, 3) if kind == "Linear" else nn.Conv2d(4, 3, 1)
    with pytest.raises(ValueError, match=rf"^quant_ops\.(Quant{kind}|quantize_weight): {message}"):
        getattr(qo, f"Quant{kind}").from_float(float_layer, **arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_must_be_finite(bad):
    float_layer = nn.Linear(4, 3)
    float_layer.weight.data[1, 2] = bad
    with pytest.raises(ValueError, match=r"^quant_ops\.quantize_weight: expected finite weights, got NaN or Inf"):
        qo.QuantLinear.from_float(float_layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_from_float_of_something_else(layer):
    name = layer.__name__.removeprefix("Quant")
    with pytest.raises(TypeError, match=rf"^quant_ops\.Quant{name}\.from_float: expected an nn\.{name}, got ReLU"):
        layer.from_float(nn.ReLU())


# ---- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        lambda: qo.QuantLinear.from_float(nn.Linear(70, 130)),
        lambda: qo.QuantConv2d.from_float(nn.Conv2d(6, 9, 3, groups=3)),
        lambda: qo.QuantConv2d.from_float(nn.Conv2d(20, 20, (3, 5), groups=20)),
    ],
)
def test_keep_packed_only_changes_nothing_but_memory(layer):
    plain = layer()
    packed = copy.deepcopy(plain).keep_packed_only()
    x = torch.randn(2, 70) if isinstance(plain, qo.QuantLinear) else torch.randn(2, plain.in_channels, 8, 9)
    expected, state = plain(x), plain.state_dict()
    assert packed.weight.untyped_storage().nbytes() == 1
    variants = [
        packed,
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
        copy.deepcopy(packed).half().float(),
        copy.deepcopy(packed).to("meta").to_empty(device="cpu"),
    ]
    variants[-1].load_state_dict(state)
    for variant in variants:
        assert torch.equal(variant(x), expected)
        saved = variant.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], state[name]) for name in state)
    assert all(variant.is_packed_only for variant in variants[:-1])
    other = layer()
    packed.load_state_dict(other.state_dict())  # loading keeps the choice
    assert packed.is_packed_only
    assert torch.equal(packed(x), other(x))
    assert torch.equal(packed.dequantize().weight, other.dequantize().weight)


def test_keep_packed_only_needs_a_packed_copy():
    with pytest.raises(RuntimeError, match=r"expected a layer on the CPU, got one on meta"):
        qo.QuantLinear(4, 4, device="meta").keep_packed_only()
