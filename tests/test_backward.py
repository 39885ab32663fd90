"""backward=True: the gradient of the input of frozen quantized layers, against the formula, and what may not be asked of it."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import quant_ops as qo

ops = torch.ops.quant_ops
K, N = 96, 48


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def _linear():
    return nn.Linear(K, N)


def _int8(**settings):
    return qo.QuantLinear.from_float(_linear(), backward=True, **settings)


def _weight_only(**settings):
    return qo.WeightOnlyLinear.from_float(_linear(), backward=True, **settings)


def _conv(*args, kind=qo.QuantConv2d, settings=None, **kwargs):
    return kind.from_float(kind.float_class(*args, **kwargs), backward=True, **(settings or {}))


MULTIPLIER = torch.linspace(-1.5, 2, K)
LINEAR = {
    "int8": _int8,
    "int8 asymmetric": functools.partial(_int8, asymmetric=True),
    "int8 static": functools.partial(_int8, input_scale=0.015),
    "int8 static zero point": functools.partial(_int8, input_scale=0.01, input_zero_point=-30),
    "int8 steps": functools.partial(_int8, input_scale=torch.tensor([0.01, 0.02]), input_zero_point=torch.tensor([-30, 9])),
    "int8 multiplier": functools.partial(_int8, input_multiplier=MULTIPLIER, asymmetric=True),
    "int8 static multiplier": functools.partial(_int8, input_multiplier=MULTIPLIER, input_scale=0.02),
    "int8 relu": functools.partial(_int8, relu=True),
    "int8 6 bits": functools.partial(_int8, weight_bits=6),
    "weight-only int8": _weight_only,
    "weight-only int8 groups": functools.partial(_weight_only, group_size=32, asymmetric=True),
    "weight-only int4": functools.partial(_weight_only, bits=4, group_size=64, asymmetric=True, input_multiplier=MULTIPLIER),
    "weight-only int4 floating zero": functools.partial(_weight_only, bits=4, group_size=32, asymmetric=True, zero_point="float"),
    "int4 with int8 rows": functools.partial(_weight_only, bits=4, group_size=32, dynamic=True, asymmetric_input=True),
}
CONV = {
    "plain": lambda: _conv(6, 8, 3),
    "static": lambda: _conv(6, 8, 3, padding=1, settings={"input_scale": 0.01, "input_zero_point": 20, "relu": True}),
    "groups": lambda: _conv(6, 8, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
    "depthwise same": lambda: _conv(6, 6, 4, padding="same", groups=6),
    "reflect": lambda: _conv(6, 8, 3, padding=1, padding_mode="reflect"),
    "channels last": lambda: _conv(6, 8, 3).to(memory_format=torch.channels_last),
    "1d": lambda: _conv(6, 8, 3, stride=2, padding=1, kind=qo.QuantConv1d),
}


def _rows(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator).to(dtype)


def _gradient(layer, x, grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad.dtype == x.dtype
    return y.detach(), x.grad


def _formula(layer, x, y, grad):
    """In float64: the dequantized layer's gradient, 0 where a static scale clips and where a fused ReLU has cut off."""
    grad = grad.double()
    if getattr(layer, "relu", False):
        grad = grad * (y > 0)
    floating = layer.dequantize().double()
    x = x.double().requires_grad_()
    seen = x
    if isinstance(floating, qo.ScaledLinear):
        multiplier = layer.input_multiplier.double()
        seen = x * multiplier
        floating = functools.partial(F.linear, weight=floating.weight)
    scale = getattr(layer, "input_scale", None)
    if scale is not None:
        zero = torch.zeros(()) if layer.input_zero_point is None else layer.input_zero_point
        scale, zero = scale.reshape(-1)[0], zero.reshape(-1)[0]
        code = torch.round(seen.detach().float() / scale) + zero
        seen = seen * ((code >= -128) & (code <= 127))
    result = floating(seen)
    result.backward(grad)
    return x.grad


def _cosine(a, b):
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LINEAR)
def test_gradient_of_a_linear_layer_is_the_formula(name, dtype):
    layer, x, grad = LINEAR[name](), _rows(3, 17, K, dtype=dtype), _rows(3, 17, N, dtype=dtype)
    y, found = _gradient(layer, x, grad)
    expected = _formula(layer, x, y, grad)
    if name.startswith("int8"):  # half a step of the row's codes at most, summed over N
        assert _cosine(found, expected) > 0.9999
        clipped = expected == 0
        assert torch.equal(found[clipped], torch.zeros_like(found[clipped]))
        assert bool(clipped.any()) == ("static" in name or "steps" in name)
    else:
        torch.testing.assert_close(
            found.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
        )
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("multiplier", [None, MULTIPLIER])
def test_the_int8_gradient_has_the_bits_of_its_formula(isa, dtype, multiplier):
    layer = _int8(input_multiplier=multiplier)
    x, grad = _rows(5, K, dtype=dtype), _rows(5, N, dtype=dtype)
    grad[2] = 0
    q, scale, _ = qo.quantize_rows(grad.float() * layer.weight_scale)
    sums = qo.int8_gemm(q, layer.qweight.T.contiguous())
    factor = scale if multiplier is None else scale * multiplier
    expected = (sums.float() * factor).to(dtype)
    assert torch.equal(_gradient(layer, x, grad)[1], expected)
    plain = qo.int8_linear_backward(grad, layer.qweight, layer.weight_scale, x_multiplier=multiplier)
    assert torch.equal(plain, expected)
    alone = torch.stack([_gradient(layer, x[i], grad[i])[1] for i in range(5)])
    assert torch.equal(alone, expected)  # a row's gradient does not depend on the others


@pytest.mark.parametrize("name", CONV)
def test_gradient_of_a_convolution_is_the_formula(name):
    layer = CONV[name]()
    shape = (2, 6, 11) if name == "1d" else (2, 6, 9, 8)
    for sample in (slice(None), 0):
        x = _rows(*shape)[sample]
        with torch.no_grad():
            grad = _rows(*layer(x).shape)
        y, found = _gradient(layer, x, grad)
        torch.testing.assert_close(found.double(), _formula(layer, x, y, grad), rtol=1e-4, atol=1e-5)
        if name in ("plain", "groups", "1d"):
            half = _gradient(layer, x.bfloat16(), grad.bfloat16())[1]
            assert _cosine(half, found) > 0.9999


def test_clipping_is_that_of_quant_tensor_backward():
    layer = _int8(input_scale=0.02, input_zero_point=40)
    x, grad = torch.arange(-200, 200).reshape(-1, 1) * 0.03 + torch.zeros(K), _rows(400, N)
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    everywhere = qo.int8_linear_backward(grad, layer.qweight, layer.weight_scale)
    expected = qo.quant_tensor_backward(everywhere, x, layer.input_scale, layer.input_zero_point, -128, 127, True)[0]
    found = _gradient(layer, x, grad)[1]
    assert torch.equal(found, expected)
    assert 0.1 < (found == 0).float().mean() < 0.9


@pytest.mark.parametrize("make", [_int8, _weight_only, functools.partial(_int8, asymmetric=True)])
def test_gradients_point_where_those_of_the_float_layer_do(make):
    torch.manual_seed(0)
    floating = _linear()
    torch.manual_seed(0)
    layer = make()
    x, grad = _rows(64, K), _rows(64, N)
    assert _cosine(_gradient(layer, x, grad)[1], _gradient(floating, x, grad)[1]) >= 0.999


def test_more_output_features_than_an_exact_sum_holds():
    layer = qo.QuantLinear.from_float(nn.Linear(4, 131_200), backward=True)
    x, grad = _rows(2, 4), _rows(2, 131_200)
    y, found = _gradient(layer, x, grad)
    torch.testing.assert_close(found.double(), _formula(layer, x, y, grad), rtol=1e-4, atol=1e-2)


def test_overflow_is_seen_by_a_scaler_of_losses():
    layer, grad = _int8(), _rows(3, N)
    grad[1, 4] = float("inf")
    found = _gradient(layer, _rows(3, K), grad)[1]
    assert torch.equal(found.isfinite().all(1), torch.tensor([True, False, True]))


def test_a_dynamic_layer_keeps_nothing_of_its_input():
    kept = []
    layer, x = _int8(asymmetric=True), _rows(5, K).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    held = {t.untyped_storage().data_ptr() for t in (*layer.buffers(), layer._placeholder)}
    assert kept
    assert all(t.untyped_storage().data_ptr() in held for t in kept)


# ---- transforms ----------------------------------------------------------------------------------------------------------

SOME = ["int8 asymmetric", "int8 static multiplier", "int8 relu", "weight-only int4", "int4 with int8 rows"]


def _case(name):
    return (CONV["static"](), _rows(4, 6, 9, 8)) if name == "conv" else (LINEAR[name](), _rows(4, K))


@pytest.mark.parametrize("name", [*SOME, "conv"])
def test_every_way_to_the_gradient_gives_the_same_bits(name):
    layer, x = _case(name)

    def loss(a):
        return layer(a).pow(2).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    expected = leaf.grad

    def same(function):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        return torch.equal(leaf.grad, expected)

    assert same(lambda a: checkpoint(loss, a, use_reentrant=False))
    if name in ("int8 asymmetric", "weight-only int4", "conv"):
        assert same(torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True))
    assert torch.equal(torch.func.grad(loss)(x), expected)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    assert same(lambda a: torch.func.functional_call(layer, state, a).pow(2).sum())
    each = torch.vmap(torch.func.grad(loss))(x)
    assert _cosine(each, expected) > 1 - 1e-6
    if not name.startswith("weight-only"):
        assert torch.equal(each, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(loss)


@pytest.mark.parametrize("name", ["int8_linear", "int8_conv2d", "weight_only_linear"])
def test_opcheck_of_the_differentiable_operators(name):
    layer, x = _case("conv" if name == "int8_conv2d" else "weight-only int4" if name == "weight_only_linear" else "int8 relu")
    arguments = (layer.weight_scale, *([None, None, 4, 64] if name == "weight_only_linear" else []))
    torch.library.opcheck(getattr(ops, f"_{name}_differentiable").default, (x.requires_grad_(), layer.qweight, *arguments))


@pytest.mark.slow
def test_compiled_by_inductor():
    model = nn.Sequential(nn.Linear(K, K), LINEAR["int8 asymmetric"](), nn.ReLU(), nn.Linear(N, 4))
    compiled, x = torch.compile(model, fullgraph=True), _rows(6, K)
    for _ in range(2):
        found = []
        for call in (model, compiled):
            model.zero_grad()
            call(x).pow(2).sum().backward()
            found.append([p.grad for p in model.parameters()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*SOME, "conv"])
def test_second_derivatives_and_forward_mode_are_refused(name):
    layer, x = _case(name)

    def loss(a):
        return layer(a).pow(2).sum()

    second = r"^quant_ops\.\w+_backward: expected the gradient .* to be differentiated no further, got a second derivative\. .*\.$"
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=second):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=second):
        torch.func.grad(lambda a: torch.func.grad(loss)(a).sum())(x)
    forward = r"^quant_ops\.\w+: expected no derivative in forward mode, got one .* in reverse mode: use backward\(\)\.$"
    with pytest.raises(RuntimeError, match=forward):
        torch.func.jvp(layer, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=forward):
        layer(torch.autograd.forward_ad.make_dual(x, x))


def test_what_else_is_refused():
    match = r"^quant_ops\.QuantLinear: expected backward=True only with a floating output, got output_scale\. Codes carry no .*$"
    with pytest.raises(ValueError, match=match):
        _int8(output_scale=0.1)
    layer, x = _int8(), _rows(2, K).requires_grad_()
    layer.output_scale = torch.tensor(0.1)
    with pytest.raises(RuntimeError, match=r"^quant_ops\.int8_linear: expected a floating result .* got out_scale\. "):
        layer(x)
    layer.output_scale, layer.bias = None, layer.bias.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^quant_ops\.int8_linear: expected a gradient of x alone .* got one of bias\. "):
        layer(x)
    frozen = qo.QuantLinear.from_float(_linear())
    with pytest.raises(RuntimeError, match=r"got a backward pass .* Train with a layer made with backward=True, .*no_grad\(\)\.$"):
        frozen(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"Differentiate a layer with backward=True, in reverse mode, or the simulated"):
        torch.func.grad(lambda a: frozen(a).sum())(x)
    with pytest.raises(
        ValueError, match=r"^quant_ops\.int8_linear_backward: expected grad\.shape\[-1\] == weight\.shape\[0\], got"
    ):
        qo.int8_linear_backward(_rows(2, K), layer.qweight, layer.weight_scale)
    with pytest.raises(TypeError, match=r"^quant_ops\.int8_linear_backward: expected grad\.dtype in .*, got torch\.int8$"):
        qo.int8_linear_backward(layer.qweight.T, layer.qweight, layer.weight_scale)
    with pytest.raises(ValueError, match=r"^quant_ops\.Int8WeightOnly: expected backward to be True or False, got 1$"):
        qo.Int8WeightOnly(backward=1)


# ---- the setting ---------------------------------------------------------------------------------------------------------

CONFIGS = [qo.Int8Dynamic, qo.Int8Static, qo.Int8WeightOnly, qo.Int4WeightOnly, qo.Int8DynamicInt4Weight]


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, 64), nn.ReLU(), nn.Linear(64, N))


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_the_setting_goes_from_the_config_into_files_and_copies(kind, tmp_path):
    config = kind(backward=True)
    assert qo.config_from_json(config.to_json()) == config
    assert not kind().backward
    assert "backward" not in kind().to_json()  # so that earlier versions read it
    model, x = _network(), _rows(4, K)
    if kind is qo.Int8Static:
        qo.prepare_(model, config)
        qo.calibrate(model, [x])
        qo.convert_(model)
    else:
        qo.quantize_(model, config)
    assert ", backward=True, kernel=" in repr(model[0])
    qo.save(model, tmp_path / "model.safetensors")
    loaded = _network()
    qo.load_(loaded, tmp_path / "model.safetensors")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    found = [_gradient(net, x, _rows(4, N))[1] for net in (model, *copies)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    for layer in (model[0], model[2]):
        layer.backward = False
    assert "backward" not in repr(model)
    with pytest.raises(RuntimeError, match="backward=True"):
        _gradient(model, x, _rows(4, N))


def test_layers_pickled_before_the_setting_existed():
    layer = _int8()
    state = layer.__getstate__()
    del state["backward"]
    old = qo.QuantLinear.__new__(qo.QuantLinear)
    old.__setstate__(state)
    assert not old.backward
    assert torch.equal(old(_rows(2, K)), layer(_rows(2, K)))


# ---- adapters ------------------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("config", [qo.Int8Dynamic(backward=True), qo.Int4WeightOnly(group_size=32, backward=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_below_frozen_layers_trains(config, dtype):
    model, x, y = _network().to(dtype), _rows(64, K, dtype=dtype), torch.arange(64) % N
    qo.quantize_(model, config)
    before = copy.deepcopy(model.state_dict())
    losses = {}
    for name, net in {"float": _network(), "quantized": model}.items():
        torch.manual_seed(1)
        net[0] = Lora(net.requires_grad_(False)[0])
        net.to(dtype)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
        for _ in range(40):
            loss = F.cross_entropy(net(x).float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(name, []).append(loss.item())
    first, last = losses["quantized"][0], losses["quantized"][-1]
    assert last < 0.9 * first
    fallen, expected = first - last, losses["float"][0] - losses["float"][-1]
    assert abs(fallen - expected) < 0.1 * expected
    model[0] = model[0].base
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
