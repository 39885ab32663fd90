"""The int8 layers as modules: weights from float layers and back, what is printed, refused settings, memory."""

import copy
import io
import math
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from layers import LAYERS, conv, divide, linear, linear_reference, randn
from torch import nn

import quant_ops as qo
from quant_ops.nn import weight as weight_module

# ---- from_float: the weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_weight_codes(kind, bits):
    torch.manual_seed(bits)
    float_layer = nn.Linear(33, 17) if kind == "linear" else nn.Conv2d(6, 9, (3, 2), groups=3)
    before = float_layer.weight.detach().clone()
    layer = (qo.QuantLinear if kind == "linear" else qo.QuantConv2d).from_float(float_layer, weight_bits=bits)
    qmax = 2 ** (bits - 1) - 1
    rows, codes = before.flatten(1), layer.qweight.flatten(1)
    assert layer.qweight.dtype == torch.int8
    assert layer.qweight.shape == before.shape
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
    assert torch.equal(restored.weight, layer.qweight.float() * layer.weight_scale.reshape(shape))
    assert (restored.bias is None) == (not bias)
    if bias:
        assert torch.equal(restored.bias, layer.bias)
    if kind == "conv":
        assert repr(restored) == repr(float_layer)
    again = type(layer).from_float(restored)
    assert torch.equal(again.qweight, layer.qweight)
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


@pytest.mark.parametrize(
    ("inputs", "settings"), [(131072, {}), (65794, {"asymmetric": True}), (65794, {"input_scale": 0.1, "input_zero_point": 3})]
)
def test_sums_that_would_not_be_exact_are_refused(inputs, settings):
    """Here, and not at every call. One product fewer is accepted."""
    with pytest.raises(
        ValueError, match=rf"^quant_ops.QuantLinear: expected at most {inputs - 1} products in a sum, .*, got {inputs}"
    ):
        linear(inputs, 1, **settings)
    assert linear(inputs - 1, 1, **settings)(torch.ones(1, inputs - 1)).isfinite().all()


# ---- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        lambda: qo.QuantLinear.from_float(nn.Linear(70, 130)),
        lambda: qo.QuantLinear.from_float(nn.Linear(1, 1)),
        lambda: qo.QuantConv2d.from_float(nn.Conv2d(6, 9, 3, groups=3)),
        lambda: qo.QuantConv2d.from_float(nn.Conv2d(20, 20, (3, 5), groups=20)),
        lambda: qo.QuantConv2d.from_float(nn.Conv2d(1, 1, 1)),
        lambda: qo.QuantConv1d.from_float(nn.Conv1d(6, 9, 3, groups=3)),
    ],
)
def test_the_weight_is_held_once(layer):
    """On the CPU only the packed copy is kept; whatever needs the codes unpacks them."""
    made = layer()
    shape = made.weight.shape
    features = (made.in_features,) if isinstance(made, qo.QuantLinear) else (made.in_channels, *[8] * (len(shape) - 2))
    x = torch.randn(2, *features)
    expected, state = made(x), made.state_dict()
    held = sum(t.untyped_storage().nbytes() for t in made.buffers() if t.dtype == torch.int8)
    assert held == made.packed_weight.numel()
    assert made.keep_packed_only() is made
    assert state["qweight"].shape == made.qweight.shape == shape
    assert torch.equal(qo.pack_weight(weight_module.as_image_kernel(state["qweight"]), made.groups), made.packed_weight)
    variants = [
        made,
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        pickle.loads(ForkingPickler.dumps(made)),
        copy.deepcopy(made).half().float(),
        copy.deepcopy(made).share_memory(),
        copy.deepcopy(made).to("meta").to_empty(device="cpu"),
        type(made)(**{name: getattr(made, name) for name in made.geometry}),
    ]
    for variant in variants[-2:]:
        variant.load_state_dict(state)
    for variant in variants:
        assert torch.equal(variant(x), expected)
        saved = variant.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], state[name]) for name in state)
        assert variant.is_packed_only
        assert [name for name, buffer in variant.named_buffers() if buffer.numel() >= made.weight.numel()][-1] == "packed_weight"
    other = layer()
    made.load_state_dict(other.state_dict())
    assert made.is_packed_only
    assert torch.equal(made(x), other(x))
    assert torch.equal(made.dequantize().weight, other.dequantize().weight)


def work(model, x, results):
    torch.set_num_threads(1)
    results.put((model(x).tolist(), all(layer.is_packed_only for layer in model)))


def test_spawned_workers_get_the_packed_weight():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).eval(), torch.randn(3, 16)
    qo.quantize_(model)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(model, x, results))
    process.start()
    assert results.get(timeout=120) == (model(x).tolist(), True)
    process.join()


def test_pickles_of_the_first_version_are_read():
    layer, x = linear(6, 5), randn(3, 6)
    state = layer.__getstate__()
    state["_buffers"] = {"weight": state["_buffers"].pop("qweight"), **state["_buffers"]}
    for name in ("_weight_shape", "compute_dtype", "channels_last"):
        del state[name]
    old = qo.QuantLinear.__new__(qo.QuantLinear)
    old.__setstate__(state | {"_was_packed_only": True})
    assert torch.equal(old(x), layer(x))
    assert old.weight.dtype == torch.float32


def test_keep_packed_only_needs_a_packed_copy():
    with pytest.raises(RuntimeError, match=r"expected a layer on the CPU, got one on meta"):
        qo.QuantLinear(4, 4, device="meta").keep_packed_only()


@pytest.mark.parametrize(
    "change",
    [
        {"weight_scale": torch.zeros(5)},
        {"weight_scale": torch.ones(4)},
        {"qweight": torch.zeros(4, 6, dtype=torch.int8)},
        {"qweight": torch.zeros(5, 6)},
        {"weight": torch.zeros(5, 6)},
        {"input_zero_point": torch.tensor(3, dtype=torch.int32)},
        {"input_scale": torch.tensor(0.1), "input_zero_point": torch.tensor(1.0)},
        {"input_scale": torch.tensor(0.1), "input_zero_point": torch.tensor(128)},
        {"input_scale": torch.full((2, 2), 0.1)},
        {"bias": torch.zeros(4)},
        {"bias": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_refused_load_changes_nothing(change, strict, assign):
    """Neither the layer nor the model around it, whose other layers come before it."""
    model, other = (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)).eval() for _ in range(2))
    for net in (model, other):
        qo.quantize_(net, exclude=["0"])
    state = other.state_dict() | {f"2.{name}": value for name, value in change.items()}
    before, x = {name: tensor.clone() for name, tensor in model.state_dict().items()}, randn(3, 6)
    expected = model(x)
    with pytest.raises((RuntimeError, ValueError)):
        model.load_state_dict(state, strict=strict, assign=assign)
    assert torch.equal(model(x), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    layer = model[2]
    with pytest.raises((RuntimeError, ValueError)):
        layer.load_state_dict({name.removeprefix("2."): t for name, t in state.items() if name.startswith("2.")}, strict=strict)
    assert torch.equal(model(x), expected)


def test_a_float_checkpoint_is_named():
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    state = model.state_dict()
    qo.quantize_(model)
    for strict in (False, True):
        with pytest.raises(
            RuntimeError, match=r"expected int8 codes '0\.qweight', got the float weight '0\.weight'\. Load the float"
        ):
            model.load_state_dict(state, strict=strict)
    quantized = model.state_dict()
    foreign = nn.Sequential(nn.Linear(6, 5)).load_state_dict(quantized, strict=False)
    assert foreign.missing_keys == ["0.weight"]
    assert set(foreign.unexpected_keys) == {"0.qweight", "0.weight_scale"}


@pytest.mark.parametrize("prefix", ["", "0."])
def test_state_dicts_of_the_first_version_are_read(prefix):
    layer, other, x = linear(6, 5), linear(6, 5, seed=1), randn(3, 6)
    state = {prefix + name.replace("qweight", "weight"): tensor for name, tensor in layer.state_dict().items()}
    assert prefix + "weight" in state
    (nn.Sequential(other) if prefix else other).load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_inference_mode_leaves_nothing_that_cannot_be_loaded_into():
    with torch.inference_mode():
        layer = linear(6, 5, input_scale=0.1)
    other, x = linear(6, 5, seed=1, input_scale=0.2), randn(3, 6)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


# ---- the stand-in for the float weight -----------------------------------------------------------------------------------


def test_weight_stands_for_the_values():
    for layer in (linear(8, 4), conv(4, 6, 3, groups=2), qo.QuantConv1d.from_float(nn.Conv1d(4, 6, 3))):
        weight, values = layer.weight, layer.dequantize().weight.detach()
        assert isinstance(weight, torch.Tensor)
        assert (weight.shape, weight.dtype, weight.device, weight.ndim) == (values.shape, values.dtype, values.device, values.dim())
        assert (weight.numel(), len(weight), weight.stride(), weight.requires_grad) == (
            values.numel(),
            len(values),
            values.stride(),
            False,
        )
        assert layer.weight is weight
        assert torch.equal(weight, values)
        for result in (weight + 0, weight.clone(), weight.float(), weight[0:], weight.contiguous(), weight.detach() + 0):
            assert type(result) is torch.Tensor
            assert torch.equal(result, values)
        assert weight.tolist() == values.tolist()
        assert repr(weight) == repr(values)
        assert torch.equal(copy.deepcopy(weight), values)
        assert torch.equal(pickle.loads(pickle.dumps(weight)), values)
        assert not list(layer.parameters())
        assert "weight" not in layer.state_dict()
        assert all(type(buffer) is torch.Tensor for buffer in layer.buffers())
        layer.load_state_dict({name: tensor * 2 if "scale" in name else tensor for name, tensor in layer.state_dict().items()})
        assert torch.equal(layer.weight, values * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_functional_use_of_weight_and_bias(dtype):
    layer, x = linear(8, 4), randn(3, 8).to(dtype)
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.bias.dtype == torch.float32
    expected = nn.functional.linear(x, layer.dequantize().weight.to(dtype), layer.bias.to(dtype))
    assert torch.equal(nn.functional.linear(x, layer.weight, layer.bias), expected)
    assert torch.equal(nn.functional.linear(x, layer.weight, bias=layer.bias), expected)
    assert torch.equal(x @ layer.weight.T + layer.bias.to(dtype), x @ layer.dequantize().weight.to(dtype).T + layer.bias.to(dtype))
    image = conv(4, 6, 3, padding=1, groups=2).to(dtype)
    pixels = randn(2, 4, 5, 5).to(dtype)
    expected = nn.functional.conv2d(pixels, image.dequantize().weight.to(dtype), image.bias.to(dtype), 1, 1, 1, 2)
    assert torch.equal(nn.functional.conv2d(pixels, image.weight, image.bias, 1, 1, 1, 2), expected)


def test_a_gradient_passes_through_the_values_of_weight():
    layer, x = linear(8, 4), randn(3, 8).requires_grad_()
    nn.functional.linear(x, layer.weight).sum().backward()
    assert torch.equal(x.grad, layer.weight.sum(0).expand(3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multi_head_attention_forward_reads_the_weights(dtype):
    layers = [nn.Linear(16, 16) for _ in range(4)]
    int8 = [qo.QuantLinear.from_float(layer).to(dtype) for layer in layers]
    x = randn(9, 2, 16).to(dtype)

    def pool(q, k, v, c):
        return nn.functional.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=16,
            num_heads=4,
            q_proj_weight=q.weight,
            k_proj_weight=k.weight,
            v_proj_weight=v.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([q.bias, k.bias, v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=c.weight,
            out_proj_bias=c.bias,
            use_separate_proj_weight=True,
            training=False,
            need_weights=False,
        )[0]

    expected = pool(*(layer.dequantize().to(dtype) for layer in int8))
    assert torch.equal(pool(*int8), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.zero_(),
        lambda layer: layer.weight.data.copy_(torch.ones(4, 8)),
        lambda layer: nn.init.xavier_uniform_(layer.weight),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: layer.weight.__iadd__(1),
        lambda layer: torch.mul(torch.ones(4, 8), 2, out=layer.weight),
        lambda layer: torch.ops.aten.zero_(layer.weight),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: setattr(layer.weight, "data", torch.ones(4, 8)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(4, 8))),
        lambda layer: setattr(layer, "weight", torch.ones(4, 8)),
        lambda layer: setattr(layer, "weight", None),
    ],
)
def test_weight_is_read_only(write):
    layer, x = linear(8, 4), randn(3, 8)
    expected = layer(x)
    with pytest.raises((RuntimeError, AttributeError), match=r"^quant_ops.*qweight"):
        write(layer)
    assert torch.equal(layer(x), expected)
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False
    layer.requires_grad_(False)


def test_codes_can_be_assigned():
    layer, other, x = linear(8, 4), linear(8, 4, seed=1), randn(3, 8)
    layer.qweight, layer.weight_scale, layer.bias = other.qweight, other.weight_scale, other.bias
    assert torch.equal(layer(x), other(x))
    with pytest.raises(ValueError, match=r"expected qweight to be torch\.int8 of shape \(4, 8\), got torch\.float32 \(4, 8\)"):
        layer.qweight = torch.ones(4, 8)


def test_functional_call_computes_with_the_codes_it_is_given():
    layer, other, x = linear(8, 4), linear(8, 4, seed=1), randn(3, 8)
    expected = layer(x)
    assert torch.equal(torch.func.functional_call(layer, other.state_dict(), x), other(x))
    assert torch.equal(layer(x), expected)
    model, image = nn.Sequential(conv(4, 6, 3)), randn(2, 4, 5, 5)
    another = nn.Sequential(conv(4, 6, 3, seed=1))
    assert torch.equal(torch.func.functional_call(model, another.state_dict(), image), another(image))


def test_weights_can_be_told_apart():
    """Code that looks for tied weights compares pointers and uses tensors as keys."""
    layer, other = linear(8, 4), linear(8, 4)
    assert layer.weight.data_ptr() == layer.weight.data_ptr() != other.weight.data_ptr()
    assert {layer.weight: 1, other.weight: 2}[layer.weight] == 1


def test_compute_dtype_follows_the_model():
    layer = qo.QuantLinear.from_float(nn.Linear(8, 4).bfloat16())
    assert layer.weight.dtype == torch.bfloat16
    assert layer.to("cpu").weight.dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16
    assert copy.deepcopy(layer).weight.dtype == torch.float16
    assert layer.to(torch.float64).weight.dtype == torch.float64
    assert layer.to("meta").weight.is_meta
    assert layer.weight.dtype == torch.float64


class Reader(nn.Module):
    """Looks at its layer's weight as transformers and CLIP do, and uses it too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        assert self.fc.weight.shape[0] == 4
        return self.fc(x.to(self.fc.weight.dtype)) + nn.functional.linear(x, self.fc.weight, self.fc.bias)


@pytest.mark.parametrize("config", [qo.Int8Dynamic(), qo.Int8Static()], ids=str)
def test_a_model_that_reads_the_weight(config):
    torch.manual_seed(0)
    model, x = Reader().eval(), randn(16, 8)
    expected = model(x).detach()
    qo.prepare_(model, config)
    qo.calibrate(model, [x])
    qo.convert_(model)
    got = model(x)
    assert (got - expected).norm() < 0.02 * expected.norm()
    try:
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), got)
    finally:
        torch._dynamo.reset()
    for strict in (False, True):
        assert torch.allclose(torch.export.export(model, (x,), strict=strict).module()(x), got)
    assert torch.allclose(torch.jit.trace(model, (x,))(x), got)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["fc"]
    assert torch.allclose(graph(x), got)
    assert torch.allclose(copy.deepcopy(graph)(x), got)


@pytest.mark.parametrize("exclude", [[], ["*.linear2"]])
def test_fused_paths_of_encoders_do_not_bypass_the_int8_product(exclude):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, mask = randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    expected = model(x, src_key_padding_mask=mask)
    qo.quantize_(model, exclude=exclude)
    calls = []
    for layer in model.layers:
        layer.linear1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for net in (model, copy.deepcopy(model)):
            got = net(x, src_key_padding_mask=mask)
            assert (got - expected)[~mask].norm() < 0.05 * expected[~mask].norm()
    assert len(calls) == 4
    for layer in model.layers:  # the stand-in alone keeps torch from its fused path
        layer.activation_relu_or_gelu = 1
    with torch.no_grad():
        assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert len(calls) == 8


# ---- torch.fx, torch.jit, ONNX -------------------------------------------------------------------------------------------


def test_symbolic_trace_makes_one_node_of_a_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)
    ).eval()
    x = randn(2, 3, 8, 8)
    qo.prepare_(model, qo.Int8Static())
    qo.calibrate(model, [x])
    qo.convert_(model)
    graph = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in graph.graph.nodes][1:-1] == [("call_module", str(i)) for i in range(5)]
    for traced in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(traced(x), model(x))


def test_script_and_onnx_say_what_to_do_instead():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4)).eval(), randn(2, 3, 4, 4)
    qo.quantize_(model)
    with pytest.raises(RuntimeError, match=r"^quant_ops\.QuantConv2d: expected no torch\.jit\.script .* Use torch\.jit\.trace or"):
        torch.jit.script(model)
    with pytest.raises(
        RuntimeError, match=r"^quant_ops\.QuantConv2d: expected no torch\.onnx\.export .* Call quant_ops.onnx.export"
    ):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
    assert torch.equal(torch.jit.trace(model, (x,))(x), model(x))


def test_the_exporter_to_onnx_by_dynamo_ends_in_the_same_sentence():
    pytest.importorskip("onnxscript")
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), randn(2, 8)
    qo.quantize_(model)
    with pytest.raises(Exception, match=r"quant_ops\.QuantLinear: expected no torch\.onnx\.export .* Call quant_ops.onnx.export"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=True)


# ---- channels_last -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
def test_a_model_moved_to_channels_last_runs_in_it(before):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")
    ).eval()
    x = randn(2, 1, 9, 9)
    if before:
        model.to(memory_format=torch.channels_last)
    qo.quantize_(model)
    plain = copy.deepcopy(model)
    for layer in plain:
        layer.channels_last = False
    model.to(memory_format=torch.channels_last)
    for net in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        hidden = x
        for layer, other in zip(net.children(), plain, strict=True):
            y = layer(hidden)
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(y, other(hidden.contiguous()))
            hidden = y
    assert plain(x).is_contiguous()
    assert model(x[0]).dim() == 3
    assert model[0].dequantize()(x).is_contiguous(memory_format=torch.channels_last)
    assert model.half().float()(x).is_contiguous(memory_format=torch.channels_last)
    assert model.to(memory_format=torch.contiguous_format)(x).is_contiguous()
    line = qo.QuantConv1d.from_float(nn.Conv1d(4, 6, 3))
    assert line.to(memory_format=torch.channels_last)(randn(2, 4, 9)).is_contiguous()
    assert linear(4, 3).to(memory_format=torch.channels_last_3d)(randn(2, 4)).shape == (2, 3)


# ---- the default dtype ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_no_scale(dtype):
    torch.manual_seed(0)
    float_layer = nn.Linear(8, 4)
    settings = {"input_scale": 0.1, "input_zero_point": 3, "output_scale": 0.3}
    expected = qo.QuantLinear.from_float(float_layer, **settings).state_dict()
    torch.set_default_dtype(dtype)
    try:
        layer, empty = qo.QuantLinear.from_float(float_layer, **settings), qo.QuantLinear(8, 4)
        assert layer.dequantize().weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.input_scale == torch.tensor(0.1)
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    assert (layer.weight.dtype, empty.weight.dtype) == (torch.float32, dtype)
    assert empty.weight_scale.dtype == empty.bias.dtype == torch.float32
