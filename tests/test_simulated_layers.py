"""Simulated layers against the float layers' own functions on operands that are rounded by hand, bit for bit."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo
from quant_ops.simulation.layers import SIMULATED, SimulatedLayer

X = {
    "linear": (nn.Linear(24, 10), lambda: torch.randn(3, 5, 24)),
    "conv1d": (nn.Conv1d(8, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 8, 9)),
    "conv2d": (nn.Conv2d(8, 6, 3, stride=2, padding="valid"), lambda: torch.randn(2, 8, 9, 7)),
    "conv2d unbatched": (nn.Conv2d(8, 6, 3, padding_mode="reflect", padding=1), lambda: torch.randn(8, 9, 7)),
    "conv3d": (nn.Conv3d(8, 6, 2), lambda: torch.randn(2, 8, 3, 4, 5)),
    "transposed 1d": (nn.ConvTranspose1d(8, 6, 3, 2), lambda: torch.randn(2, 8, 5)),
    "transposed 2d": (nn.ConvTranspose2d(8, 6, 3, 2, groups=2, output_padding=1), lambda: torch.randn(2, 8, 5, 4)),
    "transposed 3d": (nn.ConvTranspose3d(8, 6, 2, bias=False), lambda: torch.randn(2, 8, 2, 3, 2)),
    "embedding": (nn.Embedding(11, 16, padding_idx=3), lambda: torch.randint(11, (4, 3))),
    "bag": (nn.EmbeddingBag(11, 16, mode="mean"), lambda: torch.randint(11, (4, 3))),
}
FORMATS = {
    "integers": {"input": qo.INT8, "weight": qo.INT4, "output": qo.FP16},
    "per tensor": {"input": qo.INT4, "weight": qo.INT8, "output": qo.INT8, "weight_per": "tensor"},
    "floats": {"input": qo.E4M3, "weight": qo.E2M1.with_(scaled=True), "output": qo.E5M2},
    "blocks": {"input": qo.MXFP8_E4M3, "weight": qo.MXFP4},
    "rows": {"input": qo.INT8, "weight": qo.INT8, "input_per": "row"},
    "blocks of integers": {"input": qo.INT8, "weight": qo.INT4, "input_per": 4, "weight_per": 4, "output": qo.INT8},
    "functions": {"input": lambda x: x * 2, "weight": lambda w: w.round(decimals=1), "output": lambda y: y.clamp(-1, 1)},
}


def summed_dims(layer) -> tuple[int, int]:
    """The dimensions of input and weight that the product sums over, counted from the front of a batched input."""
    if isinstance(layer, nn.Linear | nn.Embedding | nn.EmbeddingBag):
        return -1, 1
    dims = layer.weight.dim()
    return 1 - dims, 0 if "Transpose" in type(layer).__name__ else 1


def by_hand(x: torch.Tensor, format, per, summed: int, channel: int, row: list[int]) -> torch.Tensor:
    if format is None:
        return x
    if not isinstance(format, qo.Format):
        return format(x)
    format = format.along(summed)
    if not format.takes_amax:
        return format(x)
    if isinstance(per, int):
        return torch.cat([format(part, amax=part.abs().amax(summed, keepdim=True)) for part in x.split(per, summed)], summed)
    amax = {"tensor": lambda: x.abs().max(), "row": lambda: x.abs().amax(row, keepdim=True)}
    if per == "channel":
        return torch.stack([format(part) for part in x.unbind(channel)], channel)
    return format(x, amax=amax[per]())


def expected(layer, x, formats):
    summed_x, summed_w = summed_dims(layer)
    transposed = summed_w == 0
    if x.is_floating_point():
        rows = [-1] if isinstance(layer, nn.Linear) else list(range(summed_x, 0))
        x = by_hand(x, formats.get("input"), formats.get("input_per", "tensor"), summed_x, summed_x, rows)
    plain = copy.deepcopy(layer)
    channel = 1 if transposed else 0
    weight = by_hand(layer.weight.detach(), formats["weight"], formats.get("weight_per", "channel"), summed_w, channel, [])
    plain.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        y = plain(x)
    return by_hand(y, formats.get("output"), "tensor", -1 if isinstance(layer, nn.Linear) else summed_x, 0, [])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", X)
def test_values(name, formats):
    layer, make = X[name]
    x, model = make(), nn.Sequential(copy.deepcopy(layer))
    result = qo.quantize_(model, qo.Simulated(**formats))
    assert (result.converted, result.skipped, result.kind, result.share) == (["0"], [], "simulated", 1.0)
    assert type(model[0]) is SIMULATED[type(layer)]
    with torch.no_grad():
        assert torch.equal(model(x), expected(layer, x, formats))


def test_cells():
    """Both products of a step are rounded each for itself; without formats the cells are torch's to rounding."""
    formats = qo.Simulated(input=qo.INT8, weight=qo.INT4, output=qo.FP16)
    lstm, gru = nn.LSTMCell(12, 7), nn.GRUCell(12, 7, bias=False)
    model = nn.ModuleDict({"lstm": copy.deepcopy(lstm), "gru": copy.deepcopy(gru)})
    assert qo.quantize_(model, formats).converted == ["lstm", "gru"]
    x, h, c = torch.randn(4, 12), torch.randn(4, 7), torch.randn(4, 7)

    def product(cell, what, a):
        weight = qo.INT4(getattr(cell, f"weight_{what}").detach(), axis=0)
        return qo.FP16(F.linear(qo.INT8(a), weight, getattr(cell, f"bias_{what}", None)))

    with torch.no_grad():
        i, f, g, o = (product(lstm, "ih", x) + product(lstm, "hh", h)).chunk(4, -1)
        c1 = f.sigmoid() * c + i.sigmoid() * g.tanh()
        for got, want in zip(model["lstm"](x, (h, c)), (o.sigmoid() * c1.tanh(), c1), strict=True):
            assert torch.equal(got, want)
        (r, z, n), (hr, hz, hn) = product(gru, "ih", x).chunk(3, -1), product(gru, "hh", h).chunk(3, -1)
        n = (n + (r + hr).sigmoid() * hn).tanh()
        torch.testing.assert_close(model["gru"](x, h), (1 - (z + hz).sigmoid()) * n + (z + hz).sigmoid() * h)
        for cell, arguments in ((lstm, ()), (gru, ()), (lstm, ((h, c),)), (gru, (h,))):
            same = SIMULATED[type(cell)].from_float(cell, qo.Simulated(weight=lambda w: w))
            torch.testing.assert_close(same(x, *arguments), cell(x, *arguments))
            if not arguments:
                torch.testing.assert_close(same(x[0]), cell(x[0]))


def test_a_bag_with_offsets_and_weights():
    bag = nn.EmbeddingBag(11, 16, mode="sum", include_last_offset=True)
    model = nn.ModuleList([copy.deepcopy(bag)])
    qo.quantize_(model, qo.Simulated(weight=qo.INT4))
    indices, offsets, weights = torch.randint(11, (9,)), torch.tensor([0, 4, 9]), torch.rand(9)
    bag.weight.data = qo.INT4(bag.weight.data, axis=0)
    with torch.no_grad():
        assert torch.equal(model[0](indices, offsets, per_sample_weights=weights), bag(indices, offsets, weights))
        assert torch.equal(model[0](input=indices, offsets=offsets), bag(input=indices, offsets=offsets))


def test_transformers_conv1d():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(10, 24)
    nn.init.normal_(layer.bias)
    model = nn.Sequential(copy.deepcopy(layer))
    qo.quantize_(model, qo.Simulated(input=qo.MXFP8_E4M3, weight=qo.INT4))
    x = torch.randn(3, 5, 24)
    layer.weight.data = qo.INT4(layer.weight.data, axis=1)
    assert torch.equal(model(x), layer(qo.MXFP8_E4M3(x)))
    assert type(model[0].to_float()) is type(layer)


# ---- calibration ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)).relu().mean((2, 3)))


def amax_by_hand(method, x, **settings):
    observer = {"max": "minmax"}.get(method, method)
    kind = __import__("quant_ops.observers", fromlist=["Observer"]).Observer.kinds[observer]
    made = kind(**settings)
    made(x)
    return made.amax()


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("per", ["tensor", "channel", 3])
def test_calibrated(observer, per):
    """amax of inputs, weights and outputs is stored, shown and used; the layer's output is that of operands rounded by hand."""
    config = qo.Simulated(
        *(qo.INT8, qo.INT4, qo.INT8), input_per=per, weight_per=per, output_per=per, observer=observer, weight_observer=observer
    )
    model, original = nn.Sequential(nn.Linear(6, 9)), None
    original = copy.deepcopy(model)
    data = [torch.randn(5, 7, 6) * 3 for _ in range(3)]
    result = qo.prepare_(model, config)
    assert (result.kind, result.converted) == ("prepared", ["0"])
    assert qo.calibrate(model, data) == 3
    result = qo.convert_(model)
    assert (result.kind, result.converted, result.skipped, result.notes) == ("simulated", ["0"], [], [])
    layer, x = model[0], torch.randn(2, 6) * 5
    assert all(f"amax_{what}=" in str(model) for what in ("input", "weight", "output"))
    shape = {"tensor": ((), (), ()), "channel": ((6,), (9,), (9,)), 3: ((2, 1), (9, 2, 1), (3, 1))}[per]
    assert tuple(tuple(getattr(layer, f"amax_{what}").shape) for what in ("input", "weight", "output")) == shape
    if observer == "minmax":
        seen, weight = torch.cat(data).flatten(0, 1), original[0].weight.detach()
        y = torch.cat([original(batch) for batch in data]).flatten(0, 1).detach()
        for what, t in (("input", seen), ("output", y)):
            magnitude = t.abs().amax(0)
            want = {"tensor": magnitude.max(), "channel": magnitude, 3: magnitude.view(-1, 3).amax(1, keepdim=True)}[per]
            assert torch.equal(getattr(layer, f"amax_{what}"), want)
        rows = weight.abs().view(9, 2, 3).amax(2, keepdim=True)
        assert torch.equal(layer.amax_weight, {"tensor": rows.max(), "channel": rows.amax((1, 2)), 3: rows}[per])
    elif per == "channel":
        seen = torch.cat(data).flatten(0, 1)
        want = amax_by_hand(observer, original[0].weight.detach(), format=qo.INT4, axis=0).flatten()
        assert torch.equal(layer.amax_weight, want)
        assert (layer.amax_input / seen.abs().amax(0) > 0.5).all()
        assert (layer.amax_input / seen.abs().amax(0) < 1.1).all()

    def rounded(t, format, amax):
        if per == 3:
            return format(t.unflatten(-1, (-1, 3)), amax=amax).flatten(-2)
        return format(t, amax=amax) if per == "tensor" else format(t, amax=amax.view(-1, 1) if t is weight else amax)

    weight = original[0].weight.detach()
    y = F.linear(rounded(x, qo.INT8, layer.amax_input), rounded(weight, qo.INT4, layer.amax_weight), original[0].bias.detach())
    with torch.no_grad():
        assert torch.equal(model(x), rounded(y, qo.INT8, layer.amax_output))


def test_one_calibration_serves_several_formats():
    """amax is what is stored, so that other formats can be put in place afterwards; one without amax ignores them, and says so."""
    model = Net().eval()
    data = [torch.randn(4, 3, 9, 9) for _ in range(2)]
    qo.prepare_(model, qo.Simulated(input=qo.INT8, weight=qo.INT8, observer="percentile"))
    qo.calibrate(model, data)
    qo.convert_(model)
    amax = {name: buffer.clone() for name, buffer in model.named_buffers() if "amax" in name}
    assert set(amax) == {f"{layer}.amax_{what}" for layer in ("stem", "head") for what in ("input", "weight")}
    floats = copy.deepcopy(model)
    for name in ("stem", "head"):
        layer = getattr(floats, name)
        kept = {what: getattr(layer, f"amax_{what}") for what in ("input", "weight")}
        setattr(floats, name, layer.to_float())
        for what, value in kept.items():
            getattr(floats, name).register_buffer(f"amax_{what}", value)
    other = copy.deepcopy(floats)
    result = qo.quantize_(other, qo.Simulated(input=qo.INT4, weight=qo.INT4))
    assert result.notes == []
    x = qo.INT4(data[0], amax=amax["stem.amax_input"])
    weight = qo.INT4(other.stem.weight.detach(), amax=amax["stem.amax_weight"], axis=0)
    with torch.no_grad():
        assert torch.equal(other.stem(data[0]), F.conv2d(x, weight, other.stem.bias))
    result = qo.quantize_(floats, qo.Simulated(input=qo.E4M3, weight=qo.INT4))
    assert result.notes == [(name, "amax_input is not used: E4M3 takes no amax") for name in ("stem", "head")]


def test_a_function_with_amax_is_given_the_calibrated_one():
    seen = []

    def clipped(x, amax=None):
        seen.append(amax)
        return x if amax is None else x.clamp(-amax, amax)

    model = nn.Sequential(nn.Linear(4, 4))
    qo.prepare_(model, qo.Simulated(input=clipped))
    qo.calibrate(model, [torch.full((2, 4), 2.0)])
    qo.convert_(model)
    model(torch.full((1, 4), 5.0))
    assert seen == [2]


def test_what_calibration_cannot_do():
    rows = qo.Simulated(input=qo.INT8, input_per="row")
    with pytest.raises(ValueError, match=r"quant_ops\.prepare_: expected input_per to be 'tensor', .* got 'row' for layer 'stem'"):
        qo.prepare_(Net(), rows)
    unused = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3), "cell": nn.GRUCell(3, 3)})
    result = qo.prepare_(unused, qo.Simulated(input=qo.INT8))
    assert result.notes == [("cell", "GRUCell is not calibrated: its scales follow from the data of each call")]
    with pytest.raises(ValueError, match=r"quant_ops\.convert_: expected calibration data, got none in any layer"):
        qo.convert_(unused)
    qo.calibrate(unused, [torch.randn(2, 3)], forward=lambda model, batch: model["used"](batch))
    result = qo.convert_(unused)
    assert result.converted == ["used"]
    assert ("unused", "no calibration data has reached it") in result.skipped
    assert type(unused["unused"]) is nn.Linear
    model = nn.Sequential(nn.Linear(3, 3))
    qo.prepare_(model, qo.Simulated(input=qo.INT8, output=qo.FP16))
    with pytest.warns(UserWarning, match=r"left out, at the inputs of 0 \(1\)"):
        qo.calibrate(model, [torch.randn(2, 3), torch.full((2, 3), torch.nan)])
    assert qo.convert_(model).notes == [("0", "NaN or Inf at its input: 1 batch left out")]


# ---- which layers --------------------------------------------------------------------------------------------------------


class Named(nn.Linear):
    def name(self):
        return f"named {self.out_features}"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses():
    """One that computes as its base class does is simulated and stays what it was; another is named."""
    model = nn.ModuleDict({"named": Named(4, 3), "doubled": Doubled(4, 3), "lstm": nn.LSTM(4, 3)})
    model["clipped"] = nn.Embedding(5, 4, max_norm=1.0)
    model["sparse"] = nn.EmbeddingBag(5, 4, sparse=True)
    result = qo.quantize_(model, qo.Simulated(weight=qo.INT8))
    assert result.converted == ["named"]
    reasons = dict(result.skipped)
    assert reasons["doubled"] == "Doubled is a subclass with a forward of its own"
    assert reasons["lstm"] == "LSTM has no simulated form: weight_ih_l0, weight_hh_l0"
    assert reasons["clipped"] == "max_norm changes its weight in every call, which a rounded weight does not allow"
    assert reasons["sparse"] == "its gradients are sparse, which a rounded weight does not allow"
    layer = model["named"]
    assert (isinstance(layer, Named), isinstance(layer, SimulatedLayer), layer.name()) == (True, True, "named 3")
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert (type(again), again.name()) == (type(layer), "named 3")
    x = torch.randn(2, 4)
    assert torch.equal(again(x), layer(x))
    back = layer.to_float()
    assert (type(back), vars(back).keys()) == (Named, vars(Named(4, 3)).keys())
    assert back.weight is layer.weight
    with pytest.warns(UserWarning, match=r"expected at least one layer that can be simulated to convert, got none"):
        again = qo.quantize_(model, qo.Simulated(weight=qo.INT4), include=["named"])
    assert dict(again.skipped)["named"] == "simulated already. Its to_float() is the float layer"


def test_different_formats_for_different_layers():
    model = Net()
    configs = {"stem": qo.Simulated(weight=qo.E4M3), nn.Linear: qo.Simulated(input=qo.INT8, weight=qo.MXFP4)}
    assert qo.quantize_(model, configs).converted == ["stem", "head"]
    assert (model.stem.config, model.head.config) == tuple(configs.values())
    with pytest.raises(TypeError, match=r"of quantized layers or of simulated ones, got both\. Call it once for each"):
        qo.quantize_(Net(), {"stem": qo.Simulated(weight=qo.E4M3), "head": qo.Int8Dynamic()})
    with pytest.raises(ValueError, match=r"got a bare Embedding, which cannot be replaced in place\. Wrap it in an nn\.Sequential"):
        qo.quantize_(nn.Embedding(3, 3), qo.Simulated(weight=qo.E4M3))
    with pytest.raises(ValueError, match=r"quant_ops\.save: .* simulated layer 'stem'\. Keep the state_dict"):
        qo.save(model, "never.safetensors")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "a format for input, weight, output or backward, got none"),
        ({"input": 8}, TypeError, "input to be a format, a function of a tensor or None, got 8"),
        ({"input": qo.FloatFormat}, TypeError, "got the class FloatFormat"),
        ({"weight": qo.INT8, "weight_per": "group"}, ValueError, "weight_per to be one of .* or the size of a block, got 'group'"),
        ({"weight": qo.INT8, "input_per": 0}, ValueError, "input_per to be one of .* got 0"),
        ({"weight": qo.INT8, "observer": "lsq"}, ValueError, "observer to be another than 'lsq'"),
        ({"weight": qo.INT8, "observer": "max"}, ValueError, "observer to be one of"),
    ],
)
def test_wrong_configs(arguments, error, message):
    with pytest.raises(error, match=rf"^quant_ops\.Simulated: expected .*{message}"):
        qo.Simulated(**arguments)


def test_config_as_json():
    config = qo.Simulated(qo.E4M3, qo.MXFP4, qo.with_gradient(qo.FP16, qo.E5M2), qo.E5M2, weight_per=32, observer="mse")
    assert qo.config_from_json(config.to_json()) == config
    assert str(config).startswith(
        "Simulated(input=E4M3, weight=MXFP4, output=with_gradient(FP16, E5M2), backward=E5M2, weight_per=32"
    )
    with pytest.raises(TypeError, match=r"to_json: expected weight to be a format, got the function"):
        qo.Simulated(weight=torch.round).to_json()


# ---- weights are rounded once --------------------------------------------------------------------------------------------


def counting(counts):
    def rounding(weight):
        counts.append(weight.dtype)
        return weight.round(decimals=1)

    return rounding


def test_the_weight_is_rounded_again_when_it_changes():
    counts: list[torch.dtype] = []
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    qo.quantize_(model, qo.Simulated(weight=counting(counts)))
    weight, x = model[0].weight, torch.randn(2, 4)

    def rounds(change=lambda: None):
        change()
        before = len(counts)
        for _ in range(3):
            assert torch.equal(model(x.to(weight.dtype)), F.linear(x.to(weight.dtype), weight.round(decimals=1), model[0].bias))
        return len(counts) - before

    with torch.no_grad():
        assert (rounds(), rounds()) == (1, 0)
        assert rounds(lambda: weight.add_(0.3)) == 1
        assert rounds(lambda: model[0].weight.set_(torch.randn(4, 4))) == 1
        assert rounds(lambda: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})) == 1
        assert (rounds(model.double), counts[-1]) == (1, torch.float64)
        model.train()
        assert rounds() == 3
        model.eval()
        layer, config = model[0], model[0].config
        assert rounds() == 0
        assert rounds(lambda: setattr(layer, "config", qo.Simulated(weight=config.weight))) == 1
        assert rounds(lambda: layer.register_buffer("amax_weight", torch.ones(4))) == 1
        assert rounds(lambda: layer.amax_weight.mul_(2)) == 1
        replaced = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        model[0].weight, weight = replaced, replaced
        assert rounds() == 1
        assert copy.deepcopy(model)[0]._rounded == {}
    assert rounds() == 3  # gradients may be wanted
    with torch.inference_mode():
        assert rounds() <= 1
        assert rounds() == 0


def test_kept_weights():
    """As buffers, also under gradients and in a compiled model; training does not use them."""
    counts: list[torch.dtype] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTMCell(4, 4)).eval()
    state = set(model.state_dict())
    qo.quantize_(model, qo.Simulated(weight=counting(counts)))
    with torch.inference_mode():
        assert (qo.keep_weights_(model), len(counts)) == (2, 3)
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(2, 4)
    y = model(x)[0]
    assert torch.equal(compiled(x)[0], y)
    assert (len(counts), set(model.state_dict())) == (3, state)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(model(x)[0], y)
    model.train()
    assert not torch.equal(model(x)[0], y)
    model.eval()
    qo.keep_weights_(model, keep=False)
    assert not torch.equal(model(x)[0], y)
    assert not list(model.buffers())
    qo.keep_weights_(model)
    assert set(vars(model[0].to_float())["_buffers"]) == set()


def test_state_dict_carries_amax():
    model, x = Net().eval(), torch.randn(4, 3, 9, 9)
    config = qo.Simulated(input=qo.INT8, weight=qo.INT4, output=qo.INT8)
    fresh = copy.deepcopy(model)
    qo.prepare_(model, config)
    qo.calibrate(model, [x])
    qo.convert_(model)
    qo.quantize_(fresh, config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    model.head.amax_input.fill_(1e6)
    half = copy.deepcopy(model).half()
    assert half(x.half()).dtype == torch.float16
    assert half.head.amax_input == 1e6  # beyond float16


def test_prepared_layers_are_trained_with_their_amax():
    model, x = Net(), torch.randn(4, 3, 9, 9)
    qo.prepare_(model, qo.Simulated(input=qo.INT8, weight=qo.INT4))
    qo.calibrate(model, [x])
    parameters = dict(model.named_parameters())
    result = qo.prepare_qat_(model)
    assert (result.kind, result.converted) == ("simulated", ["stem", "head"])
    assert model.stem.amax_input == x.abs().max()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_multihead_attention(batch_first, separate):
    """By hand: inputs of the projections, q, k, probabilities and v are inputs; scores and attention are outputs, masks are not."""
    dims = {"kdim": 10, "vdim": 14} if separate else {}
    layer = nn.MultiheadAttention(12, 3, batch_first=batch_first, **dims).eval()
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)
    model = nn.ModuleList([copy.deepcopy(layer)])
    result = qo.quantize_(model, qo.Simulated(input=qo.INT8, weight=qo.INT4, output=qo.E4M3))
    assert (result.converted, result.skipped, result.share) == (["0"], [], 1.0)
    query, key, value = torch.randn(2, 5, 12), torch.randn(2, 6, dims.get("kdim", 12)), torch.randn(2, 6, dims.get("vdim", 12))
    mask = torch.rand(5, 6) < 0.3
    mask[:, 0] = False

    def linear(x, weight, bias):
        return qo.E4M3(F.linear(qo.INT8(x), qo.INT4(weight, axis=0), bias))

    with torch.no_grad():
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight] if separate else layer.in_proj_weight.chunk(3)
        parts = zip((query, key, value), weights, layer.in_proj_bias.chunk(3), strict=True)
        q, k, v = (linear(x, w, b).unflatten(-1, (3, 4)).transpose(1, 2) for x, w, b in parts)
        scores = qo.E4M3(qo.INT8(q) @ qo.INT8(k).transpose(-2, -1)) / 2
        p = scores.masked_fill(mask, -torch.inf).softmax(-1)
        y = qo.E4M3(qo.INT8(p) @ qo.INT8(v)).transpose(1, 2).flatten(2)
        y = linear(y, layer.out_proj.weight, layer.out_proj.bias)
        turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
        got, probabilities = model[0](*map(turn, (query, key, value)), attn_mask=mask)
    torch.testing.assert_close(turn(got), y, rtol=0, atol=0.07)  # one step of E4M3, where sums round differently
    assert (turn(got) == y).float().mean() > 0.95
    torch.testing.assert_close(probabilities, p.mean(1))


def test_an_encoder_has_its_attention_simulated_once():
    """The fused path of torch's encoder is left, and no operand of a replaced layer is rounded twice by the products' mode."""
    inputs, weights = [], []

    def spy(seen):
        def rounding(x):
            seen.append(tuple(x.shape))
            return x

        return rounding

    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    expected, x = copy.deepcopy(model), torch.randn(2, 5, 16)
    config = qo.Simulated(input=spy(inputs), weight=spy(weights))
    assert qo.quantize_(model, config).converted == [f"layers.0.{name}" for name in ("self_attn", "linear1", "linear2")]
    qo.simulate_products_(model, config)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))
        model(x)
    one = [(5, 2, 16), *[(2, 2, 5, 8)] * 3, (2, 2, 5, 5), (5, 2, 16), (2, 5, 16), (2, 5, 32)]
    assert sorted(inputs) == sorted(one * 2)
    assert weights == [(48, 16), (16, 16), (32, 16), (16, 32)]  # kept between the calls
