"""ScaledLinear, and the multiplier of the input in the layers that are made of it: through every call, file, copy and report."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from layers import MODES, randn
from saved_models import header_of
from test_transposed import Conv1D
from torch import nn

import quant_ops as qo
from quant_ops.compat import int_fp_qsim

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
WEIGHT_ONLY = {
    "int8": {},
    "int4": {"bits": 4, "group_size": 32, "asymmetric": True},
    "int8 dynamic": {"dynamic": True},
    "int4 dynamic": {"bits": 4, "group_size": 32, "dynamic": True, "asymmetric_input": True},
}


def scaled(inputs=40, outputs=12, bias=True, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias)
    return qo.ScaledLinear.from_linear(linear, torch.rand(inputs) * 3 + 0.1)


class Model(nn.Module):
    def __init__(self, scale=True):
        super().__init__()
        torch.manual_seed(0)
        make = scaled if scale else nn.Linear
        self.up, self.norm, self.down = make(40, 48), nn.LayerNorm(48), make(48, 40)
        self.head = nn.Linear(40, 8)

    def forward(self, x):
        return self.head(self.down(F.gelu(self.norm(self.up(x)))))


# ---- ScaledLinear ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_forward_multiplies_in_float32(dtype):
    layer, x = scaled().to(dtype), randn(3, 5, 40, dtype=dtype)
    assert layer.input_multiplier.dtype == torch.float32
    assert layer.weight.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product = (x.to(wide) * layer.input_multiplier).to(dtype)
    assert torch.equal(layer(x), F.linear(product, layer.weight, layer.bias))
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias", "input_multiplier"]
    fresh = qo.ScaledLinear(40, 12, dtype=dtype)
    assert torch.equal(fresh(x), F.linear(x, fresh.weight, fresh.bias))
    fresh.load_state_dict(layer.state_dict())
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_made_of_a_layer_it_shares_the_parameters():
    linear, multiplier = nn.Linear(6, 4, bias=False).eval(), torch.rand(6).double()
    layer = qo.ScaledLinear.from_linear(linear, multiplier)
    assert layer.weight is linear.weight
    assert layer.bias is None
    assert not layer.training
    assert torch.equal(layer.input_multiplier, multiplier.float())
    layer(torch.randn(2, 6)).sum().backward()
    assert linear.weight.grad is not None
    conv1d = Conv1D(4, 6)
    of_conv1d = qo.ScaledLinear.from_linear(conv1d, multiplier)
    assert torch.equal(of_conv1d.weight, conv1d.weight.T)
    again = qo.ScaledLinear.from_linear(layer, torch.ones(6))
    x = torch.randn(3, 6)
    assert torch.equal(again(x), linear(x))


@pytest.mark.parametrize(
    ("multiplier", "error", "text"),
    [
        (torch.ones(5), ValueError, r"expected input_multiplier of shape \(6,\), one element for each input feature, got \(5,\)"),
        (torch.ones(1, 6), ValueError, r"expected input_multiplier of shape \(6,\)"),
        (torch.tensor([1.0, 1, torch.nan, 1, 1, 1]), ValueError, "expected a finite input_multiplier, got nan"),
        (torch.full((6,), torch.inf), ValueError, "expected a finite input_multiplier, got inf"),
        (torch.ones(6, dtype=torch.int32), TypeError, r"expected input_multiplier to be a floating tensor, got torch\.int32"),
        (1.5, TypeError, "expected input_multiplier to be a floating tensor, got float"),
    ],
)
def test_multipliers_that_are_refused(multiplier, error, text):
    linear = nn.Linear(6, 4)
    with pytest.raises(error, match=rf"^quant_ops\.ScaledLinear\.from_linear: {text}"):
        qo.ScaledLinear.from_linear(linear, multiplier)
    for kind in (qo.QuantLinear, qo.WeightOnlyLinear):
        with pytest.raises(error, match=rf"^quant_ops\.{kind.__name__}\.from_float: {text}"):
            kind.from_float(linear, input_multiplier=multiplier)
        if isinstance(multiplier, torch.Tensor) and multiplier.is_floating_point():
            layer = kind.from_float(linear, input_multiplier=torch.ones(6))
            before = copy.deepcopy(layer.state_dict())
            with pytest.raises((ValueError, RuntimeError), match=text.split(r"\(6")[0].split(",")[0] + "|size mismatch"):
                layer.load_state_dict({**before, "input_multiplier": multiplier})
            assert torch.equal(layer.input_multiplier, torch.ones(6))


def test_layers_that_take_no_multiplier():
    with pytest.raises(TypeError, match=r"from_linear: expected an nn\.Linear, got Conv2d"):
        qo.ScaledLinear.from_linear(nn.Conv2d(3, 4, 1), torch.ones(3))
    with pytest.raises(ValueError, match="expected input_multiplier only for a linear layer"):
        qo.QuantConv2d.from_float(nn.Conv2d(3, 4, 1), input_multiplier=torch.ones(3))
    for kind in (qo.QuantLinear, qo.WeightOnlyLinear):
        with pytest.raises(ValueError, match="expected input_multiplier=None with a ScaledLinear"):
            kind.from_float(scaled(), input_multiplier=torch.ones(40))
    static = qo.QuantLinear.from_float(scaled(), input_scale=0.1)
    with pytest.raises(RuntimeError, match=r"expected x_multiplier only with a floating x, got x\.dtype int8"):
        static(torch.ones(2, 40, dtype=torch.int8))


# ---- quantized layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_int8_layer(mode):
    float_layer, x = scaled(), randn(2, 5, 40)
    layer = qo.QuantLinear.from_float(float_layer, **MODES[mode])
    plain = nn.Linear(40, 12)
    plain.load_state_dict({k: v for k, v in float_layer.state_dict().items() if k != "input_multiplier"})
    given = qo.QuantLinear.from_float(plain, input_multiplier=float_layer.input_multiplier.double(), **MODES[mode])
    without = qo.QuantLinear.from_float(plain, **MODES[mode])
    for dtype in FLOATS:
        x = x.to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, given(x))
        assert torch.equal(y, without(x.float() * float_layer.input_multiplier).to(dtype))
    assert torch.equal(layer.weight, without.weight)
    assert layer.input_multiplier is not float_layer.input_multiplier
    assert "multiplied columns" in repr(layer)
    assert "multiplied columns" not in repr(without)


@pytest.mark.parametrize("mode", WEIGHT_ONLY)
def test_weight_only_layer(mode):
    float_layer, settings, x = scaled(), WEIGHT_ONLY[mode], randn(4, 40)
    layer = qo.WeightOnlyLinear.from_float(float_layer, **settings)
    plain = nn.Linear(40, 12)
    plain.load_state_dict({k: v for k, v in float_layer.state_dict().items() if k != "input_multiplier"})
    without = qo.WeightOnlyLinear.from_float(plain, **settings)
    for dtype in FLOATS:
        x = x.to(dtype)
        assert torch.equal(layer(x), without(x.float() * float_layer.input_multiplier).to(dtype))
    assert torch.equal(layer.weight, without.weight)
    assert "multiplied columns" in repr(layer)


@pytest.mark.parametrize("kind", [qo.QuantLinear, qo.WeightOnlyLinear])
def test_state_dicts_copies_and_dtypes(kind):
    for inputs in (40, 1):
        layer, x = kind.from_float(scaled(inputs)), randn(3, inputs)
        y, state = layer(x), layer.state_dict()
        assert state["input_multiplier"].shape == (inputs,)
        empty = kind(inputs, 12)
        assert empty.input_multiplier is None
        assert "input_multiplier" not in empty.state_dict()
        empty.load_state_dict(state)
        meta = kind(inputs, 12, device="meta")
        meta.load_state_dict(state, assign=True)
        for other in (empty, meta, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half().float()):
            assert torch.equal(other(x), y)
        assert layer.half().input_multiplier.dtype == torch.float32
        del state["input_multiplier"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"input_multiplier"'):
            layer.load_state_dict(state)
    old = layer.__getstate__()
    old["_buffers"] = {name: buffer for name, buffer in old["_buffers"].items() if name != "input_multiplier"}
    restored = kind.__new__(kind)
    restored.__setstate__(old)  # pickled before there were multipliers
    assert restored(x).shape == (3, 12)


@pytest.mark.parametrize("kind", [qo.QuantLinear, qo.WeightOnlyLinear])
def test_dequantize_gives_a_scaled_layer(kind):
    layer, x = kind.from_float(scaled()), randn(5, 40)
    back = layer.dequantize()
    assert type(back) is qo.ScaledLinear
    assert torch.equal(back.weight, layer.weight)
    assert torch.equal(back(x), F.linear(x * layer.input_multiplier, layer.weight, layer.bias))
    assert type(kind.from_float(nn.Linear(4, 3)).dequantize()) is nn.Linear
    again = kind.from_float(back)
    assert torch.equal(again.input_multiplier, layer.input_multiplier)


@pytest.mark.parametrize("kind", [qo.QuantLinear, qo.WeightOnlyLinear])
def test_export_and_trace(kind):
    model, x = nn.Sequential(kind.from_float(scaled())).eval(), randn(3, 40)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        assert torch.equal(exported.module()(x), expected)
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
        assert torch.equal(torch.vmap(model)(x), expected)
        doubled = {"0.input_multiplier": model[0].input_multiplier * 2}
        assert not torch.equal(torch.func.functional_call(model, doubled, x), expected)


# ---- models ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [qo.Int8Dynamic(), qo.Int8Dynamic(asymmetric=True), qo.Int8WeightOnly(), qo.Int4WeightOnly(), qo.Int8DynamicInt4Weight()],
    ids=lambda c: type(c).__name__,
)
def test_quantize_save_and_load(config, tmp_path):
    model, x = Model().eval(), randn(2, 7, 40)
    expected = model(x).detach()
    result = qo.quantize_(model, config, exclude=["head"])
    assert result.converted == ["up", "down"]
    assert model.up.input_multiplier is not None
    y = model(x)
    assert (y - expected).norm() < 0.15 * expected.norm()
    qo.save(model, tmp_path / "m")
    assert header_of(tmp_path / "m")["format_version"] == 2
    for scale in (True, False):  # into the smoothed float model and into the plain one
        fresh = Model(scale).eval()
        qo.load_(fresh, tmp_path / "m")
        assert torch.equal(fresh(x), y)
        with torch.device("meta"):
            fresh = Model(scale)
        qo.load_(fresh.eval(), tmp_path / "m")
        assert torch.equal(fresh(x), y)


def test_what_stays_float_keeps_its_multiplier(tmp_path):
    model, x = Model().eval(), randn(2, 40)
    qo.quantize_(model, exclude=["down"])
    y = model(x)
    qo.save(model, tmp_path / "m")
    fresh = Model().eval()
    qo.load_(fresh, tmp_path / "m")
    assert torch.equal(fresh(x), y)
    with pytest.raises(ValueError, match=r"'down\.input_multiplier' of shape \(48,\) in the file alone"):
        qo.load_(Model(scale=False), tmp_path / "m")


def test_tied_weights_have_their_own_multipliers(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = scaled(40, 40), scaled(40, 40)
            self.b.weight = self.a.weight
            self.b.input_multiplier = self.b.input_multiplier.flip(0)

        def forward(self, x):
            return self.a(x) + self.b(x).square()

    model, x = Tied().eval(), randn(3, 40)
    qo.quantize_(model, qo.Int8WeightOnly())
    assert model.a.shares_weight(model.b)
    assert torch.equal(model.a.input_multiplier.flip(0), model.b.input_multiplier)
    y = model(x)
    qo.save(model, tmp_path / "m")
    fresh = Tied().eval()
    qo.load_(fresh, tmp_path / "m")
    assert fresh.a.shares_weight(fresh.b)
    assert torch.equal(fresh(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)


def test_calibration_observes_the_product():
    model, x = Model().eval(), randn(50, 40)
    expected = model(x).detach()
    up = copy.deepcopy(model.up)
    qo.prepare_(model, qo.Int8Static(asymmetric=False))
    assert isinstance(model.up, qo.ScaledLinear)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    state = model.state_dict()
    qo.convert_(model)
    assert model.up.input_scale == (x * up.input_multiplier).abs().max() / 127
    assert torch.equal(model.up.input_multiplier, up.input_multiplier)
    plain = qo.QuantLinear.from_float(up, input_scale=model.up.input_scale)
    assert torch.equal(model.up(x), plain(x))
    assert (model(x) - expected).norm() < 0.05 * expected.norm()
    other = Model().eval()
    qo.prepare_(other, qo.Int8Static(asymmetric=False))
    other.load_state_dict(state)
    qo.convert_(other)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("observer", ["minmax", "lsq"])
def test_training_sees_the_product(observer):
    model, x = Model(), randn(30, 40)
    qo.prepare_qat_(model, qo.Int8Static(observer=observer))
    qo.calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        simulated = model(x)
    qo.convert_(model)
    assert model.up.input_multiplier is not None
    assert (model(x) - simulated).norm() < 1e-3 * simulated.norm()


def test_simulated_layers_round_the_product():
    float_model, x = Model().eval(), randn(6, 40)
    model = copy.deepcopy(float_model)
    qo.quantize_(model, qo.Simulated(input=qo.INT8, weight=None), include=["up"])
    layer = model.up
    product = x * float_model.up.input_multiplier
    plain = nn.Sequential(nn.Linear(40, 48)).eval()
    plain[0].load_state_dict({"weight": float_model.up.weight, "bias": float_model.up.bias})
    qo.quantize_(plain, qo.Simulated(input=qo.INT8, weight=None))
    with torch.no_grad():
        assert torch.equal(layer(x), plain(product))
        assert not torch.equal(layer(x), float_model.up(x))
    back = layer.to_float()
    assert type(back) is qo.ScaledLinear
    with torch.no_grad():
        assert torch.equal(back(x), float_model.up(x))
    seen = nn.Sequential(copy.deepcopy(float_model.up)).eval()
    with torch.no_grad(), qo.simulated_products(qo.Simulated(input=qo.INT8, weight=None)):
        assert torch.equal(seen(x), plain(product))
    qo.simulate_products_(seen, qo.Simulated(input=qo.INT8, weight=None))  # which leaves layers as they are
    with torch.no_grad():
        assert torch.equal(seen(x), float_model.up(x))


def test_calibrated_inputs_are_the_products():
    model, x = nn.Sequential(scaled()).eval(), randn(6, 40)
    int_fp_qsim.calibrate_inputs(model, 8, [x])
    assert torch.equal(model[0].amax_input, (x * model[0].input_multiplier).abs().max())


def test_reports_and_fallback():
    """The clipped share is that of the products, and a layer that becomes float again gets its multiplier back."""
    float_model, x = Model().eval(), randn(64, 40)
    model = copy.deepcopy(float_model)
    qo.prepare_(model, qo.Int8Static(asymmetric=False))
    qo.calibrate(model, [x])
    qo.convert_(model)
    report = qo.compare(float_model, model, x, repeats=0)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["up"].clipped == 0.0
    assert by_name["up"].error < 0.02
    model.up.input_scale.mul_(0.25)
    clipped = {layer.name: layer for layer in qo.compare(float_model, model, x, repeats=0).layers}["up"].clipped
    codes = (x * float_model.up.input_multiplier / model.up.input_scale).round()
    assert clipped == ((codes < -128) | (codes > 127)).float().mean().item()
    assert qo.fallback_(model, qo.compare(float_model, model, x, repeats=0), num=1).returned == ["up"]
    assert type(model.up) is qo.ScaledLinear
    with torch.no_grad():
        assert torch.equal(model.up(x), float_model.up(x))


def test_fused_encoders_call_the_layer():
    """torch's fused path reads linear1.weight and would not multiply."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(40, 4, 48, batch_first=True).eval()
    encoder.linear1 = qo.ScaledLinear.from_linear(encoder.linear1, torch.rand(40) + 0.5)
    x = randn(2, 5, 40)
    expected = encoder(x).detach()  # with gradients enabled nothing is fused
    model = nn.Sequential(encoder, nn.Linear(40, 4)).eval()
    with torch.no_grad():
        assert (encoder(x) - expected).norm() > 0.01 * expected.norm()
        qo.quantize_(model, exclude=["0.*"])
        torch.testing.assert_close(encoder(x), expected)
