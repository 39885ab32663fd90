"""compare, the report, and fallback_: figures against the plain formulas, and no model is changed unasked."""

import json
import math
import sys

import pytest
import torch
from torch import nn

import quant_ops as qo


class Net(nn.Module):
    """A layer used twice, a shared one, a call by keyword, one that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Linear(8, 8)
        self.keyword = nn.Linear(8, 6)
        self.alias = self.twice
        self.idle = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.norm(self.stem(x)).mean((2, 3)))
        x = self.alias(self.twice(x).relu())
        return {"y": self.keyword(input=x) if isinstance(self.keyword, nn.Linear) else self.keyword(x)}


def both(config=None, **kwargs):
    model = Net()
    model.train()(torch.randn(16, 3, 6, 6))  # statistics of the BatchNorm
    quantized = Net()
    quantized.load_state_dict(model.state_dict())
    qo.quantize_(quantized, config, **kwargs)
    return model.eval(), quantized.eval()


def held(module):
    """Bytes of the distinct storages of a module."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def by_name(report):
    return {layer.name: layer for layer in report.layers}


BATCH = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))


# ---- compare -------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_formulas():
    model, quantized = both(qo.Int8Dynamic(weight_bits=5))
    report = qo.compare(model, quantized, BATCH)
    assert [layer.name for layer in report.layers] == ["stem", "twice", "keyword"]
    assert report.unreached == ["idle"]
    with torch.no_grad():
        x = BATCH
        stem = model.stem(x)
        pooled = model.norm(stem).mean((2, 3))
        hidden = model.twice(pooled).relu()
        last = model.twice(hidden)
        expected = {
            "stem": (stem, quantized.stem(x)),
            "twice": (
                torch.cat([model.twice(pooled), last]),
                torch.cat([quantized.twice(pooled), quantized.twice(hidden)]),
            ),
            "keyword": (model.keyword(last), quantized.keyword(last)),
        }
        expected_output = model(x)["y"], quantized(x)["y"]
    layers = by_name(report)
    for name, (a, b) in [*expected.items(), ("", expected_output)]:
        found = layers.get(name, report)
        a, b = a.double().flatten(), b.double().flatten()
        error = ((a - b).norm() / a.norm()).square().item()
        assert found.error == pytest.approx(error, rel=1e-9)
        assert found.sqnr == pytest.approx(-10 * math.log10(error), rel=1e-9)
        assert found.cosine == pytest.approx(torch.cosine_similarity(a, b, 0).item(), rel=1e-12)
    assert [layers[name].calls for name in ("stem", "twice", "keyword")] == [1, 2, 1]
    assert all(layer.clipped == 0 for layer in report.layers)
    assert layers["stem"].float_bytes == 4 * (8 * 27 + 8)
    assert layers["stem"].bytes == held(quantized.stem) >= 8 * 27 + 4 * 8 + 4 * 8
    assert (report.float_bytes, report.bytes) == (held(model), held(quantized))  # with the BatchNorm and the idle layer
    assert 0 < report.seconds < 1
    assert 0 < report.float_seconds < 1
    assert all(0 < layer.seconds < 1 and 0 < layer.float_seconds < 1 for layer in report.layers)


@pytest.mark.parametrize("zero_point", [None, 100, -128])
def test_clipped_fraction_counts_the_codes_that_saturate(zero_point):
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    quantized = nn.Sequential(qo.QuantLinear.from_float(model[0], input_scale=0.01, input_zero_point=zero_point))
    x = torch.randn(64, 16)
    codes = torch.round(x / torch.tensor(0.01)) + (zero_point or 0)
    (layer,) = qo.compare(model, quantized, x).layers
    assert layer.clipped == ((codes < -128) | (codes > 127)).double().mean().item()
    assert layer.clipped > 0.1


def test_clipped_fraction_at_the_current_step():
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    scales, zeros = torch.tensor([0.01, 1.0]), torch.tensor([5, -3])
    quantized = nn.Sequential(qo.QuantLinear.from_float(model[0], input_scale=scales, input_zero_point=zeros))
    x = torch.randn(64, 16)
    for step, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        with qo.timestep(quantized, step):
            (layer,) = qo.compare(model, quantized, x).layers
        codes = torch.round(x / scale) + zero
        assert layer.clipped == ((codes < -128) | (codes > 127)).double().mean().item()
    assert layer.clipped == 0


def test_exact_layers_have_infinite_sqnr():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) * 127)
    quantized = nn.Sequential(qo.QuantLinear.from_float(model[0], input_scale=1.0))
    report = qo.compare(model, quantized, torch.arange(-8.0, 8.0).view(4, 4))
    assert report.error == report.layers[0].error == 0
    assert report.sqnr == math.inf
    assert report.layers[0].cosine == pytest.approx(1)
    assert json.loads(report.to_json())["sqnr_db"] is None


def test_a_zero_output_is_not_a_division_by_zero():
    model = nn.Sequential(nn.Linear(4, 4))
    quantized = nn.Sequential(qo.QuantLinear.from_float(model[0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = qo.compare(model, quantized, torch.ones(2, 4))
    assert report.error == math.inf
    assert report.sqnr == -math.inf
    assert report.cosine == 0
    assert qo.Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (BATCH, None),
        ((BATCH,), None),
        ([BATCH], None),
        ({"x": BATCH}, None),
        ({"image": BATCH}, lambda model, batch: model(batch["image"])),
    ],
    ids=["tensor", "tuple", "list", "dict", "forward"],
)
def test_batches(batch, forward):
    assert qo.compare(*both(), batch, forward=forward, repeats=0).sqnr == qo.compare(*both(), BATCH, repeats=0).sqnr


def test_without_times():
    report = qo.compare(*both(), BATCH, repeats=0)
    assert all(layer.seconds is None and layer.float_seconds is None for layer in report.layers)
    assert (report.seconds, report.float_seconds) == (None, None)
    assert "us float" not in report.table()


def test_neither_model_is_changed():
    model, quantized = both()
    model.train()
    model.drop.eval()
    quantized.train()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, quantized)]
    qo.compare(model, quantized, BATCH)
    for m, state in zip((model, quantized), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in m.modules())
    assert model.training
    assert not model.drop.training
    assert quantized.drop.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_error_within_leaves_no_traces():
    model, quantized = both()
    model.train()
    with pytest.raises(ZeroDivisionError):
        qo.compare(model, quantized, BATCH, forward=lambda *_: 1 / 0)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("masked", [False, True])
def test_layers_of_a_fused_encoder_are_reached(masked):
    """Its fused path calls no layer, and makes a nested tensor of a padded batch."""
    torch.manual_seed(0)
    model, quantized = (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval() for _ in range(2))
    quantized.load_state_dict(model.state_dict())
    qo.quantize_(quantized)
    batch = {"src": torch.randn(3, 5, 16)}
    if masked:
        batch["src_key_padding_mask"] = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    report = qo.compare(model, quantized, batch)
    assert report.unreached == []
    assert len(report.layers) == 4
    assert report.sqnr > 30


def test_compare_refuses():
    model, quantized = both()
    with pytest.raises(ValueError, match=r"^quant_ops.compare: expected a quantized model, got one without int8 or simulated"):
        qo.compare(model, model, BATCH)
    with pytest.raises(
        ValueError, match=r"^quant_ops.compare: expected 'stem' of the float model to be a Conv2d .*, got QuantConv2d"
    ):
        qo.compare(quantized, quantized, BATCH)
    other = Net()
    other.twice = nn.Linear(8, 9)
    with pytest.raises(ValueError, match=r"'twice' .* a Linear of weight \(8, 8\), got Linear of weight \(9, 8\)"):
        qo.compare(other, quantized, BATCH)
    with pytest.raises(ValueError, match=r"'stem' .*, got nothing"):
        qo.compare(nn.Sequential(nn.Linear(2, 2)), quantized, BATCH)
    with pytest.raises(ValueError, match=r"expected finite activations, got NaN or Inf in the float model at layer 'stem'"):
        qo.compare(model, quantized, BATCH * torch.nan)
    with pytest.raises(TypeError, match=r"expected floating tensors in the model's output, got none"):
        qo.compare(model, quantized, BATCH, forward=lambda m, b: m(b)["y"].argmax(1))
    with pytest.raises(ValueError, match=r"outputs of the same shapes from both models, got \[\(4, 6\)\] and \[\(2, 6\)\]"):
        qo.compare(model, quantized, BATCH, forward=lambda m, b: m(b)["y"] if m is model else m(b)["y"][:2])


# ---- the report ----------------------------------------------------------------------------------------------------------


def test_worst_table_and_json(tmp_path):
    report = qo.compare(*both(qo.Int8Dynamic(weight_bits=4)), BATCH)
    errors = [layer.error for layer in report.worst(3)]
    assert errors == sorted(errors, reverse=True)
    assert report.worst(1)[0].error == max(layer.error for layer in report.layers)
    lines = str(report).splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:3] == ["layer", "class", "calls"]
    assert lines[1].split()[:3] == ["stem", "QuantConv2d", "1"]
    assert lines[2].split()[3] == f"{report.layers[1].sqnr:.1f}"
    assert lines[4].split()[:2] == ["model", f"{report.sqnr:.1f}"]
    assert lines[4].split()[3:] == [f"{value:.1f}" for value in (report.float_bytes / 1024, report.bytes / 1024)] + [
        f"{1e6 * value:.1f}" for value in (report.float_seconds, report.seconds)
    ]
    assert lines[5] == "never called: idle"
    assert repr(report) == str(report)
    assert report._repr_html_() == f"<pre>{report}</pre>"
    with pytest.raises(ValueError, match=r"^quant_ops.Report.worst: expected n >= 0, got -1"):
        report.worst(-1)
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text + "\n"
    assert qo.Report.from_json(text) == report
    data = json.loads(text)
    assert data["layers"][0]["sqnr_db"] == report.layers[0].sqnr


def test_a_report_of_an_older_version():
    report = qo.compare(*both(), BATCH)
    data = json.loads(report.to_json())
    for key in ("float_bytes", "bytes", "float_seconds", "seconds"):
        del data[key]
    old = qo.Report.from_json(json.dumps(data))
    assert (old.bytes, old.seconds) == (sum(layer.bytes for layer in report.layers), None)
    assert "us float" not in str(old)


@pytest.mark.parametrize("text", ["", "[]", "[" * 5000, "{}", '{"layers": [{}], "unreached": [], "error": 0, "cosine": 1}'])
def test_from_json_refuses(text):
    with pytest.raises(ValueError, match=r"^quant_ops.Report.from_json: expected the JSON of Report.to_json, got "):
        qo.Report.from_json(text)


@pytest.mark.parametrize("repeats", [0, 1])
def test_plot(tmp_path, repeats):
    pytest.importorskip("matplotlib")
    report = qo.compare(*both(), BATCH, repeats=repeats)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    report.plot(tmp_path / "report.svg")
    assert "<svg" in (tmp_path / "report.svg").read_text()


def test_plot_shows_the_worst_first_and_covers_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    model, quantized, x = uneven()
    report = qo.compare(model, quantized, x)
    drawn = []
    save = Figure.savefig
    try:
        Figure.savefig = lambda self, *args, **kwargs: (save(self, *args, **kwargs), drawn.append(self))
        report.plot(tmp_path / "a.png")
        qo.Report([], [], 0.0, 1.0).plot(tmp_path / "b.png")
    finally:
        Figure.savefig = save
    figure = drawn[0]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "3", "0", "2"]
    values = [layer.sqnr for layer in report.worst(4)]
    low, high = figure.axes[0].get_xlim()
    assert low < min(values) < max(values) < high
    assert min(values) - low < 0.2 * (high - low)  # the axis begins near the least value, not at 0
    for axes in figure.axes:
        legend, frame = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert legend.y0 >= frame.y1 - 8
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first one on top


def test_plot_names_what_is_missing(tmp_path, monkeypatch):
    report = qo.compare(*both(), BATCH)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^quant_ops.Report.plot: expected matplotlib.* pip install 'quant_ops\[report\]'"):
        report.plot(tmp_path / "report.png")


# ---- fallback_ -----------------------------------------------------------------------------------------------------------


def floats(model):
    return {name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}


def uneven():
    """Layers that lose unequally much: weights of few bits, in one of them very few."""
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))).eval()
    quantized = nn.Sequential(
        *(qo.QuantLinear.from_float(m, weight_bits=bits) for m, bits in zip(model, (5, 2, 8, 3), strict=True))
    ).eval()
    return model, quantized, torch.randn(16, 32)


def test_num_returns_the_worst_layers():
    model, quantized, x = uneven()
    report = qo.compare(model, quantized, x)
    assert [layer.name for layer in report.worst(4)] == ["1", "3", "0", "2"]
    model.train()
    result = qo.fallback_(quantized, report, num=2)
    assert result.returned == ["1", "3"]
    assert floats(quantized) == {"1", "3"}
    assert torch.equal(quantized[1].weight, model[1].weight)
    assert quantized[1].weight is not model[1].weight
    assert not quantized[1].training
    assert qo.fallback_(quantized, report, num=1).returned == ["0"]  # the next one; those before are float already
    assert qo.fallback_(quantized, report, num=0).returned == []


def test_target_is_met_with_as_few_layers_as_the_order_allows():
    model, quantized, x = uneven()
    report = qo.compare(model, quantized, x)
    result = qo.fallback_(quantized, report, target=20.0)
    assert result.reached
    assert result.returned == ["1", "3"]
    assert len(result.values) == 3
    assert result.values[-2] < 20 <= result.values[-1]
    assert result.values[-1] == pytest.approx(qo.compare(model, quantized, x).sqnr, rel=1e-9)
    assert qo.fallback_(quantized, report, target=20.0).returned == []


def test_metric_of_the_user_and_at_most_num():
    model, quantized, x = uneven()
    report = qo.compare(model, quantized, x)
    seen = []

    def metric(m):
        seen.append(floats(m))
        return float(len(floats(m)))

    result = qo.fallback_(quantized, report, num=2, target=3, metric=metric)
    assert seen[0] == set()
    assert max(map(len, seen)) == 2
    assert len(seen) <= 4 + 4 + 2 + 2
    assert len({frozenset(names) for names in seen}) == len(seen)  # nothing is measured twice
    assert (result.reached, result.returned, result.values) == (False, ["1", "3"], [0, 1, 2])
    assert "target NOT met: 2 is the most that was found, not 3" in str(result)
    assert floats(quantized) == {"1", "3"}
    assert qo.fallback_(quantized, report, target=3, metric=metric).reached


@pytest.mark.parametrize("num", [None, 2])
def test_returns_that_do_not_help_are_not_kept(num):
    """Only layer 2 matters, although its own error is the least; layer 1 even hurts as float."""
    model, quantized, x = uneven()
    report = qo.compare(model, quantized, x)
    assert report.worst(4)[-1].name == "2"

    def metric(m):
        return 10.0 * ("2" in floats(m)) - 1.0 * ("1" in floats(m))

    result = qo.fallback_(quantized, report, num, target=10, metric=metric)
    assert (result.returned, result.values, result.reached) == (["2"], [0, 10], True)
    assert floats(quantized) == {"2"}


def test_layers_that_help_only_together():
    model, quantized, x = uneven()
    report = qo.compare(model, quantized, x)
    result = qo.fallback_(quantized, report, target=1, metric=lambda m: float({"1", "3"} <= floats(m)))
    assert (set(result.returned), result.reached) == ({"1", "3"}, True)


def test_num_returns_only_what_helps():
    """Layer 1 has large errors that nothing sees: the output does not use it."""
    torch.manual_seed(0)

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            self.b(x)
            return self.a(x)

    model, quantized = Blind().eval(), Blind().eval()
    quantized.load_state_dict(model.state_dict())
    qo.quantize_(quantized, {"b": qo.Int8Dynamic(weight_bits=2), "*": qo.Int8Dynamic()})
    report = qo.compare(model, quantized, torch.randn(4, 32))
    assert report.worst(1)[0].name == "b"
    result = qo.fallback_(quantized, report, num=2)
    assert result.returned == ["a"]
    assert result.values[-1] == math.inf


@pytest.mark.parametrize("target", [1e9, math.inf])
def test_a_target_that_only_the_float_model_meets(target):
    model, quantized, x = uneven()
    result = qo.fallback_(quantized, qo.compare(model, quantized, x), target=target)
    assert result.reached is False
    assert len(floats(quantized)) == 3
    assert result.values == sorted(result.values)
    assert math.isfinite(result.values[-1])
    assert f"is the most that was found, not {target:.4g}" in str(result)


def test_unreachable_targets_are_told():
    model, quantized, x = uneven()
    result = qo.fallback_(quantized, qo.compare(model, quantized, x), target=1, metric=lambda m: 0.0)
    assert (result.reached, result.returned, result.values) == (False, [], [0])
    assert floats(quantized) == set()


def test_an_error_of_the_metric_leaves_the_model_as_it_was():
    model, quantized, x = uneven()
    report = qo.compare(model, quantized, x)
    before = dict(quantized.named_modules())
    model.train()

    def metric(m):
        m.eval()
        if floats(m) == {"3"}:
            raise ZeroDivisionError
        return 0.0

    with pytest.raises(ZeroDivisionError):
        qo.fallback_(quantized, report, target=1, metric=metric)
    assert dict(quantized.named_modules()) == before
    assert all(layer.training for layer in model)


def test_shared_layers_return_everywhere():
    model, quantized = both(qo.Int8Dynamic(weight_bits=2))
    report = qo.compare(model, quantized, BATCH)
    result = qo.fallback_(quantized, report, num=3)
    assert sorted(result.returned) == ["keyword", "stem", "twice"]
    assert result.skipped == [("idle", "the batch of the report did not reach it")]
    assert quantized.alias is quantized.twice
    assert type(quantized.alias) is nn.Linear
    with torch.no_grad():
        assert torch.equal(quantized(BATCH)["y"], model(BATCH)["y"])


def test_chained_layers_stay_and_say_why():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    quantized = nn.Sequential(
        qo.QuantLinear.from_float(model[0], input_scale=0.02, output_scale=0.02, output_zero_point=-7),
        qo.QuantLinear.from_float(model[1], input_scale=0.02, input_zero_point=-7),
        qo.QuantLinear.from_float(model[2], relu=True),
    )
    x = torch.randn(5, 8)
    report = qo.compare(model, quantized, x, forward=lambda m, b: m(b).relu())
    assert all(layer.sqnr > 25 for layer in report.layers)
    result = qo.fallback_(quantized, report, num=3)
    assert result.returned == []
    assert dict(result.skipped) == {
        "0": "it gives int8 to the next layer",
        "1": "it takes int8 from the layer before",
        "2": "it has a fused ReLU",
    }


def test_fallback_from_a_report_file():
    model, quantized, x = uneven()
    report = qo.Report.from_json(qo.compare(model, quantized, x).to_json())
    with pytest.raises(ValueError, match=r"^quant_ops.fallback_: expected float_model=, because this report was read from JSON"):
        qo.fallback_(quantized, report, num=1)
    with pytest.raises(ValueError, match=r"^quant_ops.fallback_: expected metric=, because this report was read from JSON"):
        qo.fallback_(quantized, report, target=1, float_model=model)
    assert qo.fallback_(quantized, report, num=1, float_model=model).returned == ["1"]


def test_fallback_refuses():
    model, quantized, x = uneven()
    report = qo.compare(model, quantized, x)
    with pytest.raises(ValueError, match=r"^quant_ops.fallback_: expected num >= 0, or a target, got num=None and target=None"):
        qo.fallback_(quantized, report)
    with pytest.raises(ValueError, match=r"expected num >= 0, or a target, got num=-1"):
        qo.fallback_(quantized, report, num=-1)
    with pytest.raises(ValueError, match="expected a target together with a metric"):
        qo.fallback_(quantized, report, num=1, metric=lambda m: 0)
    with pytest.raises(ValueError, match="expected a number from the metric, got NaN"):
        qo.fallback_(quantized, report, target=1, metric=lambda m: math.nan)
    with pytest.raises(ValueError, match=r"^quant_ops.fallback_: expected 'stem' of the float model .*, got nothing"):
        qo.fallback_(both()[1], report, num=1)
    with pytest.raises(ValueError, match="expected a report of this model, got one with the layer '3'"):
        qo.fallback_(nn.Sequential(*quantized[:3]), report, num=1)
    assert floats(quantized) == set()
