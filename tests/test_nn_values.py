"""Values of both layers: static quantization, int8 chains, rows and samples that are alone, the same bits everywhere."""

import math

import pytest
import torch
from layers import MODES, conv, conv_reference, divide, finish, linear, linear_reference, modes, randn
from torch import nn

import quant_ops as qo

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
        expected = qo.int8_linear(q, layer.qweight, layer.weight_scale, layer.bias, **common)
    else:
        expected = qo.int8_conv2d(q, layer.qweight, layer.weight_scale, layer.bias, 2, 1, 1, 2, **common)
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
