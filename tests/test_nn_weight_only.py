"""Weight-only layers: the parameters of groups, one operator call, one packed copy of the weight, which layers may share."""

import copy
import io
import itertools
import math
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from layers import divide, randn
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import quant_ops as qo
from quant_ops.convert.files import read_header

SETTINGS = [
    {"bits": bits, "group_size": group, "asymmetric": asymmetric}
    for bits, group, asymmetric in itertools.product((8, 4), (-1, 32, 64), (False, True))
]
SETTINGS += [{"bits": bits, "group_size": 32, "asymmetric": True, "zero_point": "float"} for bits in (8, 4)]
INPUTS = [{}, {"dynamic": True}, {"dynamic": True, "asymmetric_input": True}]
settings = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))


def linear(inputs=77, outputs=40, bias=True, seed=0, **kwargs):
    torch.manual_seed(seed)
    return qo.WeightOnlyLinear.from_float(nn.Linear(inputs, outputs, bias), **kwargs)


def groups_of(k, group):
    return [slice(i, min(i + group, k)) for i in range(0, k, group)] if group > 0 else [slice(0, k)]


def parameters(weight, bits, group_size, asymmetric, zero_point="int"):
    """Codes, scales and zero points, group by group."""
    codes, scales, zeros = torch.empty(weight.shape, dtype=torch.int8), [], []
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for part in groups_of(weight.shape[1], group_size):
        w = weight[:, part]
        if zero_point == "float":
            least, most = w.amin(1), w.amax(1)
            scale = torch.where(most == least, 1.0, divide(most - least, torch.tensor(high - low)))
            zero = torch.where(most == least, least, least - low * scale)
            codes[:, part] = (
                (divide(w - (zero + low * scale)[:, None], scale[:, None]).round() + low).clamp(low, high).to(torch.int8)
            )
            scales.append(scale)
            zeros.append(zero)
            continue
        if asymmetric:
            least, most = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
            scale = divide(most - least, torch.tensor(high - low))
            scale = torch.where(most == least, 1.0, scale)
            zero = (low - divide(least, scale).round()).clamp(low, high)
        else:
            scale, zero = divide(w.abs().amax(1), torch.tensor(7.5 if bits == 4 else 127.0)), torch.zeros(len(w))
            scale = torch.where(scale == 0, 2.0 if bits == 4 else 1.0, scale)
        codes[:, part] = (divide(w, scale[:, None]).round() + zero[:, None]).clamp(low, high).to(torch.int8)
        scales.append(scale)
        zeros.append(zero)
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1).to(torch.float32 if zero_point == "float" else torch.int8)


def values(codes, scale, zero, group_size):
    w = torch.empty(codes.shape)
    for g, part in enumerate(groups_of(codes.shape[1], group_size)):
        q, s, z = codes[:, part].float(), scale[:, g : g + 1], zero[:, g : g + 1]
        w[:, part] = q * s + z if z.is_floating_point() else (q - z.float()) * s
    return w


# ---- from_float and back -----------------------------------------------------------------------------------------------------


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_of_the_groups(settings, dtype):
    """Short last groups, an odd K, a row and a group of zeros."""
    torch.manual_seed(0)
    float_layer = nn.Linear(77, 40).to(dtype)
    with torch.no_grad():
        float_layer.weight[3] = 0
        float_layer.weight[5, 32:64] = 0
        float_layer.weight[7].abs_()
    before = float_layer.weight.detach().clone()
    layer = qo.WeightOnlyLinear.from_float(float_layer, **settings)
    if dtype != torch.float64:  # where quotients are those of float64
        codes, scale, zero = parameters(before.float(), **settings)
        assert torch.equal(layer.qweight, codes)
        assert torch.equal(layer.weight_scale, scale)
        assert torch.equal(torch.zeros_like(zero) if layer.weight_zero_point is None else layer.weight_zero_point, zero)
    assert (layer.weight_zero_point is not None) == layer.asymmetric == settings["asymmetric"]
    zero = torch.zeros_like(layer.weight_scale) if layer.weight_zero_point is None else layer.weight_zero_point
    expected = values(layer.qweight, layer.weight_scale, zero, settings["group_size"])
    restored = layer.dequantize()
    assert type(restored) is nn.Linear
    assert torch.equal(restored.weight, expected)
    assert torch.equal(restored.bias, float_layer.bias.float())
    assert torch.equal(layer.weight, expected.to(dtype))
    assert layer.weight.dtype == layer.compute_dtype == dtype
    step = layer.weight_scale.repeat_interleave(settings["group_size"] if settings["group_size"] > 0 else 77, 1)[:, :77]
    assert ((expected - before).abs() <= step * (0.5 + 1e-5)).all()
    assert (layer.weight[3] == 0).all()
    assert torch.equal(float_layer.weight, before)
    assert not list(layer.parameters())


@pytest.mark.parametrize(("bits", "asymmetric", "group_size"), [(4, False, 32), (4, True, 128), (8, True, 64)])
def test_parameters_are_those_of_torchao(bits, asymmetric, group_size):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    torch.manual_seed(0)
    float_layer, block, low = nn.Linear(256, 48), (1, group_size), -(2 ** (bits - 1))
    mapping = primitives.MappingType.ASYMMETRIC if asymmetric else primitives.MappingType.SYMMETRIC
    scale, zero = primitives.choose_qparams_affine(
        float_layer.weight, mapping, block, torch.int8, low, -low - 1, zero_point_dtype=torch.int8
    )
    codes = primitives.quantize_affine(float_layer.weight, block, scale, zero, torch.int8, low, -low - 1)
    layer = qo.WeightOnlyLinear.from_float(float_layer, bits=bits, asymmetric=asymmetric, group_size=group_size)
    assert torch.equal(layer.weight_scale, scale)
    assert not asymmetric or torch.equal(layer.weight_zero_point, zero)
    steps = float_layer.weight / scale.repeat_interleave(group_size, 1)
    even = (steps - steps.floor() - 0.5).abs() > 1e-5  # torchao multiplies by the reciprocal, which matters next to a tie
    assert torch.equal(layer.qweight[even], codes[even])
    assert (layer.qweight.int() - codes.int()).abs().max() <= 1


@settings
@pytest.mark.parametrize("inputs", INPUTS, ids=["float", "int8", "int8_asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_is_the_operator(settings, inputs, dtype):
    for bias in (False, True):
        layer, x = linear(bias=bias, **settings, **inputs).to(dtype), randn(2, 3, 77).to(dtype)
        codes, scale, zero = layer.qweight, layer.weight_scale, layer.weight_zero_point
        arguments = {"dynamic": "dynamic" in inputs, "asymmetric": "asymmetric_input" in inputs}
        expected = qo.weight_only_linear(x, codes, scale, zero, layer.bias, layer.bits, layer.group_size, **arguments)
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        reference = x.double() @ layer.dequantize().weight.double().T
        reference = reference if layer.bias is None else reference + layer.bias
        assert (y - reference).norm() < (0.02 if inputs else 0.006) * reference.norm()
        with torch.inference_mode():
            assert torch.equal(layer(x), expected)
        with pytest.raises(RuntimeError, match=r"quant_ops\.weight_only_linear: expected no gradient to be asked for"):
            layer(x.clone().requires_grad_()).sum().backward()


def test_one_group_of_8_bits_with_dynamic_rows_is_quant_linear():
    torch.manual_seed(0)
    float_layer, x = nn.Linear(300, 70), randn(5, 300)
    for asymmetric in (False, True):
        layer = qo.WeightOnlyLinear.from_float(float_layer, dynamic=True, asymmetric_input=asymmetric)
        assert torch.equal(layer(x), qo.QuantLinear.from_float(float_layer, asymmetric=asymmetric)(x))


def test_extra_repr():
    kernels = qo._library.kernels()
    expected = "in_features=77, out_features=40, bias=True, weight=int8 symmetric per channel, input=float, kernel="
    assert repr(linear()) == f"WeightOnlyLinear({expected}{kernels['float_tile']})"
    text = repr(linear(bits=4, group_size=32, asymmetric=True, dynamic=True, asymmetric_input=True))
    assert "weight=int4 asymmetric per group of 32, input=int8 asymmetric dynamic per row" in text
    assert text.endswith(f"kernel={kernels['nibbles']})")
    assert "kernel=meta" in repr(qo.WeightOnlyLinear(4, 4, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "WeightOnlyLinear: expected bits 4 or 8, got 5"),
        ({"group_size": 48}, r"WeightOnlyLinear: expected group_size 32, 64, 128, 256 or -1 \(one group a row.*\), got 48"),
        ({"group_size": 0}, r"WeightOnlyLinear: expected group_size 32, .*, got 0"),
        ({"asymmetric_input": True}, r"WeightOnlyLinear: expected asymmetric_input=True only with dynamic=True, got it alone\."),
        (
            {"shared_with": linear(bits=4)},
            r"WeightOnlyLinear: expected a layer with a weight \(40, 77\) of 8 bits .*, got one with",
        ),
        ({"shared_with": linear(76)}, r"WeightOnlyLinear: expected .* \(40, 77\) .*, got one with a weight \(40, 76\)"),
    ],
)
def test_refused_settings(arguments, message):
    with pytest.raises(ValueError, match=rf"^quant_ops\.{message}"):
        linear(**arguments)


@pytest.mark.parametrize(("products", "settings"), [(33025, {"asymmetric": True, "asymmetric_input": True}), (131071, {})])
def test_groups_whose_sums_would_not_be_exact_are_refused(products, settings):
    assert linear(products, 1, dynamic=True, **settings)(torch.ones(1, products)).isfinite().all()
    message = rf"^quant_ops\.WeightOnlyLinear: expected groups of at most {products} weights, .*, got {products + 1}\. Choose a"
    with pytest.raises(ValueError, match=message):
        linear(products + 1, 1, dynamic=True, **settings)
    linear(products + 1, 1, dynamic=True, group_size=32, **settings)


def test_refused_modules():
    with pytest.raises(TypeError, match=r"^quant_ops\.WeightOnlyLinear\.from_float: expected an nn\.Linear, got ReLU"):
        qo.WeightOnlyLinear.from_float(nn.ReLU())
    float_layer = nn.Linear(4, 3)
    float_layer.weight.data[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"^quant_ops\..*expected finite weights, got NaN or Inf"):
        qo.WeightOnlyLinear.from_float(float_layer)


# ---- embeddings --------------------------------------------------------------------------------------------------------------


def embedding(rows=40, size=77, padding_idx=None, seed=0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    return qo.WeightOnlyEmbedding.from_float(nn.Embedding(rows, size, padding_idx, sparse=True).to(dtype), **kwargs)


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_embedding_looks_up_the_values(settings, dtype):
    """Those of a linear layer of the same weight, rounded once to the dtype that the model has."""
    layer = embedding(padding_idx=3, dtype=dtype, **settings)
    same = nn.Linear(77, 40).to(dtype)
    torch.manual_seed(0)
    same.weight.data = nn.Embedding(40, 77, 3).to(dtype).weight.data
    w = qo.WeightOnlyLinear.from_float(same, **settings).dequantize().weight
    for x in (
        torch.randint(40, (2, 5)),
        torch.randint(40, (3,), dtype=torch.int32),
        torch.tensor(7),
        torch.zeros(0, 4, dtype=torch.long),
    ):
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, w.to(dtype)[x.long()])
        with torch.inference_mode():
            assert torch.equal(layer(x), y)
    assert (layer(torch.tensor([3])) == 0).all()
    restored = layer.dequantize()
    assert (type(restored), restored.padding_idx) == (nn.Embedding, 3)
    assert torch.equal(restored.weight, w)
    assert torch.equal(layer.weight, w.to(dtype))
    x = torch.arange(40)
    assert torch.equal(nn.functional.embedding(x, layer.weight), w.to(dtype))
    state = layer.state_dict()
    assert "bias" not in state
    for variant in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), qo.WeightOnlyEmbedding(40, 77, 3, **settings)):
        variant.to(dtype).load_state_dict(state)
        assert torch.equal(variant(x), w.to(dtype))
        assert repr(variant) == repr(layer)
    other = embedding(padding_idx=3, seed=1, dtype=dtype, **settings)
    assert torch.equal(torch.func.functional_call(layer, other.state_dict(), x), other(x))


def test_embeddings_that_are_refused():
    assert (
        repr(embedding(padding_idx=-1, bits=4)) == "WeightOnlyEmbedding(40, 77, padding_idx=39, weight=int4 symmetric per channel)"
    )
    for index in (-1, 40):
        with pytest.raises(IndexError, match=r"^quant_ops\.weight_only_embedding: expected "):
            embedding()(torch.tensor([0, index]))
    with pytest.raises(TypeError, match=r"^quant_ops\.weight_only_embedding: expected indices.dtype in"):
        embedding()(torch.ones(3))
    with pytest.raises(ValueError, match=r"^quant_ops\.WeightOnlyEmbedding.from_float: expected max_norm=None, got 1.0, which"):
        qo.WeightOnlyEmbedding.from_float(nn.Embedding(4, 3, max_norm=1.0))
    with pytest.raises(TypeError, match=r"from_float: expected an nn\.Embedding, got EmbeddingBag"):
        qo.WeightOnlyEmbedding.from_float(nn.EmbeddingBag(4, 3))


# ---- given parameters and codes ----------------------------------------------------------------------------------------------


@settings
def test_given_codes_are_the_layers(settings):
    """As GPTQ gives them: no rounding of the float weight leads to them."""
    float_layer = nn.Linear(77, 40)
    like = qo.WeightOnlyLinear.from_float(float_layer, **settings)
    scale, zero = like.weight_scale * 1.25, like.weight_zero_point
    low = -(2 ** (like.bits - 1))
    codes = torch.randint(low, -low, (40, 77), dtype=torch.int8)
    sizes = {name: value for name, value in settings.items() if name in ("bits", "group_size")}
    layer = qo.WeightOnlyLinear.from_float(float_layer, **sizes, weight_scale=scale, weight_zero_point=zero, codes=codes)
    assert torch.equal(layer.qweight, codes)
    assert torch.equal(layer.weight_scale, scale)
    assert (layer.asymmetric, layer.zero_point) == (like.asymmetric, like.zero_point)
    w = values(codes, scale, torch.zeros(scale.shape) if zero is None else zero, like.group_size)
    assert torch.equal(layer.weight.dequantize(), w)
    x = randn(3, 77)
    assert torch.allclose(layer(x), nn.functional.linear(x, w, float_layer.bias), atol=1e-4)
    scale.zero_()  # the layer's own are copies
    rounded = qo.WeightOnlyLinear.from_float(float_layer, **sizes, weight_scale=like.weight_scale, weight_zero_point=zero)
    assert torch.equal(rounded.qweight, like.qweight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"codes": torch.zeros(40, 77, dtype=torch.int8)},
            "expected weight_scale together with weight_zero_point and codes, got none",
        ),
        (
            {"weight_scale": torch.ones(40, 3), "asymmetric": True},
            "expected weight_zero_point together with weight_scale in an asym",
        ),
        (
            {"weight_scale": torch.ones(40, 2)},
            r"expected weight_scale of shape \(40, 3\), one for each group of a row, got \(40, 2\)",
        ),
        ({"weight_scale": torch.zeros(40, 3)}, r"expected weight_scale > 0 and finite, got 0\.0"),
        ({"weight_zero_point": torch.ones(40, 2)}, r"weight_zero_point of shape \(40, 3\), one for each group of a row, got"),
        ({"weight_zero_point": torch.full((40, 3), math.inf)}, "expected finite weight_zero_point, got NaN or Inf"),
        ({"weight_zero_point": torch.full((40, 3), 200)}, r"expected integer weight_zero_point in \[-128, 127\], got 200 to 200"),
        (
            {"codes": torch.zeros(40, 76, dtype=torch.int8)},
            r"expected codes torch\.int8 of shape \(40, 77\), got torch\.int8 \(40, 76\)",
        ),
        ({"codes": torch.full((40, 77), 8, dtype=torch.int8)}, r"expected codes in \[-8, 7\], got 8 to 8"),
        (
            {"shared_with": linear(bits=4, group_size=32)},
            "expected shared_with, or weight_scale, weight_zero_point and codes, got both",
        ),
        ({"zero_point": "float"}, "expected zero_point='float' only with asymmetric=True"),
        ({"zero_point": "half"}, "expected zero_point 'int' or 'float', got 'half'"),
    ],
)
def test_given_parameters_are_checked(given, message):
    alone = given.keys() & {"zero_point"} or (given.keys() == {"codes"} and "together" in message)
    with pytest.raises(ValueError, match=message):
        linear(bits=4, group_size=32, **(given if alone else {"weight_scale": torch.ones(40, 3)} | given))


def test_floating_zero_points_are_torchaos():
    """Of both packages: quant_ops' own primitive of the FLOAT domain, and torchao where it is installed."""
    weight = torch.randn(40, 128) + 3 * torch.rand(40, 1)  # 0 is outside of many ranges
    module = nn.Linear(128, 40)
    with torch.no_grad():
        module.weight.copy_(weight)
    layer = qo.WeightOnlyLinear.from_float(module, bits=4, group_size=32, asymmetric=True, zero_point="float")
    settings = {"preserve_zero": False, "zero_point_domain": "FLOAT"}
    scale, zero = qo.choose_qparams_affine(weight, "ASYMMETRIC", (1, 32), torch.int32, 0, 15, scale_dtype=torch.float32, **settings)
    assert torch.equal(layer.weight_scale, scale)
    assert torch.equal(layer.weight_zero_point, zero)
    codes = qo.quantize_affine(weight, (1, 32), scale, zero, torch.int32, 0, 15, zero_point_domain="FLOAT")
    assert torch.equal(layer.qweight.int() + 8, codes)
    assert (layer.weight.dequantize() - weight).abs().max() <= scale.max() * 0.501
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    theirs = primitives._choose_qparams_affine_tinygemm(
        weight, primitives.MappingType.ASYMMETRIC, (1, 32), torch.int32, 0, 15, None, torch.float32, torch.float32
    )
    assert torch.equal(theirs[0], scale)
    assert torch.equal(theirs[1], zero)
    assert torch.equal(primitives._quantize_affine_tinygemm(weight, (1, 32), *theirs, torch.int32, 0, 15), codes)


def test_floating_zero_points_in_a_model_and_a_file(tmp_path):
    config = qo.Int4WeightOnly(32, zero_point="float")
    assert qo.config_from_json(config.to_json()) == config
    model, plain = net(config), net(qo.Int4WeightOnly(32))
    assert [model[i].zero_point for i in (0, 1, 3, 4)] == ["float"] * 4
    assert model[0].shares_weight(model[4])
    path, expected = tmp_path / "model.safetensors", model(indices())
    qo.save(model, path)
    assert "zero_point" in read_header(path)["layers"]["1"]["arguments"]
    for fresh in (net(None), plain, net(qo.Int8WeightOnly())):
        qo.load_(fresh, path)
        assert torch.equal(fresh(indices()), expected)
        assert fresh[1].config == config
    qo.save(net(qo.Int4WeightOnly(32)), path)
    assert "zero_point" not in read_header(path)["layers"]["1"]["arguments"]  # as earlier versions wrote it
    with pytest.raises(RuntimeError, match=r"expected '1\.weight_zero_point' of dtype torch\.float32, got torch\.int8"):
        model.load_state_dict(net(qo.Int4WeightOnly(32)).state_dict())


# ---- one copy of the weight, wherever the layer goes -------------------------------------------------------------------------


@settings
def test_the_weight_is_held_once(settings):
    layer = linear(**settings)
    x, state = randn(2, 77), layer.state_dict()
    expected = layer(x)
    packed = qo.pack_weight_only(layer.qweight, layer.bits, layer.group_size)
    assert torch.equal(layer.packed_weight, packed)
    names = {"packed_weight", "weight_scale", "bias"} | ({"weight_zero_point"} if layer.asymmetric else set())
    assert {name for name, _ in layer.named_buffers()} == names
    assert state.keys() == names - {"packed_weight"} | {"qweight"}
    assert state["weight_scale"].shape == (40, {-1: 1, 32: 3, 64: 2}[layer.group_size])
    assert all(tensor.is_contiguous() for tensor in state.values())
    if layer.bits == 4:
        halves = torch.stack([state["qweight"] & 15, state["qweight"] >> 4], 2).flatten(1).int() - 8
        assert state["qweight"].shape == (40, 39)
        assert torch.equal(halves[:, :77], layer.qweight.int())
        assert (halves[:, 77:] == 0).all()
    else:
        assert torch.equal(state["qweight"], layer.qweight)
    variants = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        pickle.loads(ForkingPickler.dumps(layer)),
        copy.deepcopy(layer).half().float(),
        copy.deepcopy(layer).share_memory(),
        copy.deepcopy(layer).to("meta").to_empty(device="cpu"),
        qo.WeightOnlyLinear(77, 40, **settings),
        qo.WeightOnlyLinear(77, 40, **settings, device="meta"),
    ]
    for variant in variants[-3:]:
        variant.load_state_dict(state, assign=variant.device.type == "meta")
    for variant in variants:
        assert torch.equal(variant(x), expected)
        assert repr(variant) == repr(layer)
        saved = variant.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], state[name]) for name in state)
        assert variant.is_packed_only
    other = linear(seed=1, **settings)
    assert torch.equal(torch.func.functional_call(layer, other.state_dict(), x), other(x))
    assert torch.equal(layer(x), expected)
    layer.qweight, layer.weight_scale, layer.bias = other.qweight, other.weight_scale, other.bias
    layer.weight_zero_point = other.weight_zero_point
    assert torch.equal(layer(x), other(x))


def test_a_state_dict_says_whether_there_are_zero_points():
    x, symmetric, asymmetric = randn(2, 77), linear(bits=4), linear(bits=4, asymmetric=True)
    expected = asymmetric(x)
    symmetric.load_state_dict(asymmetric.state_dict())
    assert torch.equal(symmetric(x), expected)
    state = asymmetric.state_dict()
    del state["weight_zero_point"]
    for strict in (False, True):
        with pytest.raises(RuntimeError, match=r"expected 'weight_zero_point' with 'qweight', got the codes alone"):
            asymmetric.load_state_dict(state, strict=strict)
    assert torch.equal(asymmetric(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.zeros(40, 3)}, "expected weight_scale > 0 and finite, got 0.0"),
        ({"weight_scale": torch.ones(40, 1)}, "size mismatch for 1.weight_scale"),
        ({"weight_zero_point": torch.zeros(40, 1, dtype=torch.int8)}, "size mismatch for 1.weight_zero_point"),
        ({"weight_zero_point": torch.zeros(40, 3)}, "of dtype torch.int8, got torch.float32"),
        ({"qweight": torch.zeros(40, 77, dtype=torch.int8)}, "of dtype torch.uint8, got torch.int8"),
        ({"qweight": torch.zeros(40, 38, dtype=torch.uint8)}, "size mismatch for 1.qweight"),
        ({"weight": torch.zeros(40, 77)}, r"expected int4 codes '1\.qweight', got the float weight '1\.weight'\. Load"),
        ({"bias": torch.zeros(4)}, "size mismatch for 1.bias"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_refused_load_changes_nothing(change, message, assign):
    model, other = (nn.Sequential(nn.Linear(9, 77), nn.Linear(77, 40)).eval() for _ in range(2))
    for net in (model, other):
        qo.quantize_(net, qo.Int4WeightOnly(32), exclude=["0"])
    state, x = other.state_dict() | {f"1.{name}": value for name, value in change.items()}, randn(3, 9)
    expected = model(x)
    for strict in (False, True):
        with pytest.raises((RuntimeError, ValueError), match=message):
            model.load_state_dict(state, strict=strict, assign=assign)
        assert torch.equal(model(x), expected)


def test_codes_can_be_assigned():
    layer = linear(bits=4)
    with pytest.raises(ValueError, match=r"expected qweight to be torch\.int8 of shape \(40, 77\), got torch\.uint8 \(40, 39\)"):
        layer.qweight = layer.state_dict()["qweight"]
    with pytest.raises(ValueError, match=r"codes of four bits in \[-8, 7\]"):
        layer.qweight = torch.full((40, 77), 8, dtype=torch.int8)
    with pytest.raises(AttributeError, match="expected weight to be left alone"):
        layer.weight = torch.zeros(40, 77)
    with pytest.raises(RuntimeError, match="expected the weight of a quantized layer to be read only, got zero_"):
        layer.weight.zero_()


# ---- layers that share a weight ----------------------------------------------------------------------------------------------


def tied(**settings):
    """An embedding and a head of one float weight, and a layer beside them."""
    torch.manual_seed(0)
    table, head, other = nn.Embedding(40, 77), nn.Linear(77, 40), nn.Linear(77, 40)
    head.weight = table.weight
    first = qo.WeightOnlyEmbedding.from_float(table, **settings)
    second = qo.WeightOnlyLinear.from_float(head, **settings, dynamic=True, shared_with=first)
    return nn.Sequential(first, second, qo.WeightOnlyLinear.from_float(other, **settings))


def outputs(model):
    return [model[0](torch.arange(40)), *(layer(randn(3, 77)) for layer in model[1:])]


def is_tied(model):
    names = ("packed_weight", "weight_scale", "weight_zero_point")
    shared = [all(a._buffers[name] is b._buffers[name] for name in names) for a, b in ((model[0], model[1]), (model[0], model[2]))]
    assert model[0].shares_weight(model[1]) == shared[0]
    assert not shared[1]
    return shared[0]


@pytest.mark.parametrize("settings", [{}, {"bits": 4, "group_size": 32, "asymmetric": True}], ids=["8", "4"])
def test_a_shared_weight_stays_shared(settings):
    model = tied(**settings)
    expected = outputs(model)
    assert torch.equal(expected[0], model[1].dequantize().weight)
    state = model.state_dict()
    for name in ("qweight", "weight_scale"):
        assert state[f"0.{name}"].data_ptr() == state[f"1.{name}"].data_ptr() != state[f"2.{name}"].data_ptr()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert len(file.getvalue()) < 6500 + 2 * sum(t.nbytes for name, t in state.items() if name.startswith("0."))
    other = tied(**settings)
    other[0].qweight = torch.zeros(40, 77, dtype=torch.int8)  # which is that layer's own
    assert torch.equal(outputs(other)[1], expected[1])
    other = copy.deepcopy(model)
    for tensor in other.buffers():
        tensor.data.zero_()
    other.load_state_dict(state)
    variants = [
        other,
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(ForkingPickler.dumps(model)),
        copy.deepcopy(model).bfloat16().float(),
        copy.deepcopy(model)._apply(lambda tensor: tensor.clone()),  # what .to() another device does
        copy.deepcopy(model).to("meta").to_empty(device="cpu"),
    ]
    variants[-1].load_state_dict(state)
    for variant in variants:
        assert is_tied(variant)
        assert all(map(torch.equal, outputs(variant), expected))


def test_a_state_dict_of_a_shared_weight_is_of_now():
    model, changed = tied(bits=4), tied(bits=4)
    before = model.state_dict()
    changed[0].load_state_dict(embedding(bits=4, seed=9).state_dict())
    model.load_state_dict(changed.state_dict())
    after = model.state_dict()
    assert not torch.equal(after["0.qweight"], before["0.qweight"])
    assert torch.equal(after["0.qweight"], changed.state_dict()["1.qweight"])
    after["0.qweight"].zero_()  # changes no layer
    assert torch.equal(model.state_dict()["0.qweight"], changed.state_dict()["0.qweight"])


# ---- torch.compile, export, fx -----------------------------------------------------------------------------------------------

NETS = [qo.Int8WeightOnly(), qo.Int4WeightOnly(32), qo.Int8DynamicInt4Weight(), qo.Int4WeightOnly(32, zero_point="float")]
nets = pytest.mark.parametrize("config", NETS, ids=["int8", "int4", "int4 dynamic", "int4 float"])


def net(config):
    """An embedding, two layers, and a head of the embedding's weight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(50, 20), nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 20), nn.Linear(20, 50, bias=False)
    ).eval()
    model[4].weight = model[0].weight
    if config is None:
        return model
    qo.quantize_(model, config)
    assert isinstance(config, qo.Int8DynamicInt4Weight) or model[0].shares_weight(model[4])
    return model


def indices(batch=5):
    return torch.arange(batch * 3).reshape(batch, 3) * 7 % 50


@nets
def test_compile_equals_eager_without_recompiling(config):
    model = net(config)
    counter = CompileCounterWithBackend("inductor")
    try:
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        with torch.no_grad():
            frames = []
            for batch in (4, 7, 3):
                x = indices(batch)
                assert torch.equal(compiled(x), model(x))
                frames.append(counter.frame_count)
        assert set(frames) == {1 if isinstance(model[0], qo.WeightOnlyEmbedding) else 2}  # as with any float embedding
    finally:
        torch._dynamo.reset()


@nets
def test_export_trace_and_fx(config):
    model, x = net(config), indices()
    with torch.no_grad():
        expected = model(x)
        for strict in (False, True):
            exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
            assert torch.equal(exported.module()(x), expected)
            assert torch.equal(exported.module()(x[:3]), expected[:3])
        assert torch.equal(torch.jit.trace(model, (x,))(x), expected)
        graph = torch.fx.symbolic_trace(model)
        assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
        for traced in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            assert torch.equal(traced(x), expected)
    with pytest.raises(RuntimeError, match=r"^quant_ops\.WeightOnly\w+: expected no torch\.jit\.script of quantized layers"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match=r"^quant_ops\.WeightOnly\w+: expected no torch\.onnx\.export of quantized layers"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)


@pytest.mark.slow
def test_ahead_of_time_compilation(tmp_path):
    """The C++ runtime gives the same bits, and holds the shared weight once."""
    model, batch = net(NETS[1]), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (indices(),), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for count in (5, 1, 9):
            assert torch.equal(loaded(indices(count)), model(indices(count)))
    assert len([name for name in loaded.get_constant_fqns() if name.endswith("packed_weight")]) == 3


def work(model, x, results):
    torch.set_num_threads(1)
    results.put((model(x).tolist(), all(part.is_packed_only for part in model if hasattr(part, "is_packed_only"))))


def test_spawned_workers_get_the_packed_weight():
    model, x = net(NETS[1]), indices()
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(model, x, results))
    process.start()
    assert results.get(timeout=120) == (model(x).tolist(), True)
    process.join()
