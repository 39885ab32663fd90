"""The int8 layers as modules: weights from float layers and back, what is printed, refused settings, memory."""

import copy
import math
import pickle

import pytest
import torch
from layers import LAYERS, conv, divide, linear, linear_reference, randn
from torch import nn

import quant_ops as qo

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
        lambda: qo.QuantConv2d.from_float(nn.Conv2d(1, 1, 1)),
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


def test_a_failed_load_leaves_the_packed_copy_of_the_weights():
    """Scales are refused after the weights have arrived: both forms of the weight are the new ones then."""
    layer, other = (qo.QuantLinear.from_float(nn.Linear(6, 5)) for _ in range(2))
    state = other.state_dict() | {"weight_scale": torch.zeros(5)}
    with pytest.raises(ValueError, match="expected weight_scale > 0 and finite"):
        layer.load_state_dict(state)
    assert torch.equal(layer.packed_weight, qo.pack_weight(layer.weight))
