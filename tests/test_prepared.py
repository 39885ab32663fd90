"""prepare_ and convert_: the layers that come out, on any model."""

import copy
import pickle

import pytest
import torch
from models import NAMES, Net, batches, inputs
from torch import nn

import quant_ops as qo
from quant_ops.convert.prepared import Prepared, PreparedConv2d, PreparedLinear
from quant_ops.observers import Observer
from quant_ops.report.error import sqnr

KINDS = sorted(Observer.kinds)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


# ---- prepared layers are the float layers --------------------------------------------------------------------------------


def test_prepared_layers_compute_the_same_with_the_same_parameters():
    model = Net().eval()
    x = batches(1)[0]
    expected, parameters, keys = model(x), list(model.parameters()), set(model.state_dict())
    result = qo.prepare_(model)
    assert (result.kind, sorted(result.converted), result.skipped) == ("prepared", sorted(NAMES), [])
    assert torch.equal(model(x), expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert keys < set(model.state_dict())
    assert isinstance(model.stem, nn.Conv2d)
    assert isinstance(model.head, PreparedLinear)
    assert "observer='minmax'" in repr(model.head)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_converted_layers_are_those_of_from_float(asymmetric):
    """Bit for bit, with the scales that choose_qparams finds in all that a layer has seen."""
    model, data = Net().eval(), batches()
    seen = inputs(model, data)
    original = copy.deepcopy(model)
    config = qo.Int8Static(asymmetric=asymmetric, weight_bits=5)
    qo.prepare_(model, config)
    assert qo.calibrate(model, data) == 3
    result = qo.convert_(model)
    assert (sorted(result.converted), result.skipped, result.notes) == (sorted(NAMES), [], [])
    for name in NAMES:
        scale, zero_point = qo.choose_qparams(seen[name], [], -128, 127, asymmetric)
        kind = qo.QuantLinear if isinstance(original.get_submodule(name), nn.Linear) else qo.QuantConv2d
        settings = {"input_scale": scale, "input_zero_point": zero_point if asymmetric else None}
        expected = kind.from_float(original.get_submodule(name), weight_bits=5, **settings)
        layer = model.get_submodule(name)
        assert type(layer) is kind
        assert layer.config == config
        assert repr(layer) == repr(expected)
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), expected.buffers(), strict=True))
    assert not any(isinstance(module, (Prepared, Observer)) for module in model.modules())


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_observer(kind, asymmetric):
    model, data = Net().eval(), batches()
    expected = model(data[0])
    qo.prepare_(model, qo.Int8Static(observer=kind, asymmetric=asymmetric))
    qo.calibrate(model, data)
    qo.convert_(model)
    assert sqnr(expected, model(data[0])) > 22


def test_settings_reach_the_observer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    qo.prepare_(model, {"0": qo.Int8Static("percentile", percentile=90.0), "1": qo.Int8Static("ema", momentum=0.5, num_steps=3)})
    assert model[0].observer.percentile == 90.0
    assert (model[1].observer.momentum, model[1].num_steps) == (0.5, 3)


@pytest.mark.parametrize("observer", ["mse", "histogram"])
def test_weight_observer(observer):
    """At 3 bits a searched weight scale has the smaller error in every channel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8))
    model[0].weight.data.copy_(torch.randn(8, 256))
    error = {}
    for weight_observer in ("minmax", observer):
        quantized = copy.deepcopy(model)
        qo.quantize_(quantized, qo.Int8Dynamic(weight_bits=3, weight_observer=weight_observer))
        error[weight_observer] = (quantized[0].dequantize().weight - model[0].weight).square().sum(1)
    assert (error[observer] < 0.8 * error["minmax"]).all()


def test_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    qo.quantize_(model, qo.Int8Dynamic(weight_observer="mse"))
    assert model.head.weight.is_meta
    with torch.device("meta"):
        model = Net()
    assert len(qo.prepare_(model).converted) == 5


def test_config_of_layers():
    model = Net()
    qo.quantize_(model, qo.Int8Dynamic(weight_bits=7))
    assert model.head.config == qo.Int8Dynamic(weight_bits=7)
    assert copy.deepcopy(model).head.config == model.head.config
    assert pickle.loads(pickle.dumps(model)).head.config == model.head.config
    assert qo.QuantLinear.from_float(nn.Linear(2, 2)).config is None


# ---- any model -----------------------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """Control flow on values, and one layer many times in a forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.step = nn.Linear(6, 6)
        self.rare = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(5):
            x = self.step(x)
            if x.abs().max() > 1e6:
                x = self.rare(x)
        return x


def test_control_flow_and_a_layer_used_many_times():
    model, x = Loop().eval(), torch.randn(3, 6)
    seen = inputs(model, [x])["step"]
    assert len(seen) == 15
    qo.prepare_(model)
    qo.calibrate(model, [x])
    assert model.step.observer.count.tolist() == [5]
    result = qo.convert_(model)
    assert model.step.input_scale == qo.choose_qparams(seen, [], -128, 127, True)[0]
    assert result.converted == ["step"]
    assert result.skipped == [("rare", "no calibration data has reached it")]
    assert type(model.rare) is nn.Linear
    assert set(vars(model.rare)) == set(vars(nn.Linear(2, 2)))
    assert "float  rare: no calibration data has reached it" in str(result)
    assert model(x).isfinite().all()


def test_shared_layers_stay_shared():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": nn.Sequential(nn.ReLU(), shared)})
    forward = lambda m, x: m["b"](m["a"](x))  # noqa: E731
    result = qo.prepare_(model)
    assert sorted(result.converted) == ["a.0", "a.2", "b.1"]
    assert model["a"][0] is model["a"][2] is model["b"][1]
    qo.calibrate(model, [torch.randn(3, 6)], forward)
    assert model["a"][0].observer.count.tolist() == [3]
    assert sorted(qo.convert_(model).converted) == ["a.0", "a.2", "b.1"]
    assert isinstance(model["a"][0], qo.QuantLinear)
    assert model["a"][0] is model["a"][2] is model["b"][1]


def test_a_tied_weight_stays_tied_while_prepared():
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    qo.prepare_(model)
    assert model["head"].weight is model["embedding"].weight


def test_transformer_encoder():
    """Its fused path would never call the layers."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    with torch.no_grad():
        expected = model(x)
        result = qo.prepare_(model)
        assert len(result.converted) == 4
        qo.calibrate(model, [{"src": x, "src_key_padding_mask": mask}, x])
        assert sorted(qo.convert_(model).converted) == sorted(result.converted)
        assert sqnr(expected, model(x)) > 25


def test_an_encoder_of_which_nothing_is_replaced_keeps_its_fast_path():
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1), "head": nn.Linear(32, 2)}
    )
    qo.prepare_(model, include=["head"])
    assert model["encoder"].use_nested_tensor
    assert model["encoder"].layers[0].activation_relu_or_gelu


def test_any_forward_calibrates():
    model, x = Net().eval(), batches(1)[0]
    qo.prepare_(model)
    model(x)
    assert len(qo.convert_(model).converted) == 5


def test_half_precision():
    model = Net().eval().bfloat16()
    x = batches(1)[0].bfloat16()
    expected = model(x)
    qo.prepare_(model, qo.Int8Static("mse"))
    qo.calibrate(model, [x])
    qo.convert_(model)
    assert model(x).dtype == torch.bfloat16
    assert sqnr(expected, model(x)) > 20


def test_a_weight_that_became_nan():
    model = Net().eval()
    qo.prepare_(model)
    qo.calibrate(model, batches())
    model.body[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^quant_ops\.convert_: expected finite weights, got NaN or Inf, in layer 'body\.0'$"):
        qo.convert_(model)
    assert isinstance(model.stem, PreparedConv2d)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_and_a_weight_of_zeros(kind):
    """Scale 1, named in the notes; the output is the bias."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    bias = model[1].bias.detach().clone()
    qo.prepare_(model, qo.Int8Static(observer=kind, weight_observer=kind))
    qo.calibrate(model, [torch.randn(5, 4)])
    result = qo.convert_(model)
    assert result.notes == [("1", "its input was always zero: scale 1")]
    assert "int8   1; its input was always zero: scale 1" in str(result)
    assert torch.equal(model(torch.randn(2, 4)), bias.expand(2, 2))


def test_dynamic_layers_alone_need_no_data():
    model = Net().eval()
    qo.prepare_(model, qo.Int8Dynamic())
    assert len(qo.convert_(model).converted) == 5
