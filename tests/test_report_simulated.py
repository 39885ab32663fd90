"""compare and fallback_ on simulated layers: figures against the plain formulas, sizes by the formats' bits."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo


class Net(nn.Module):
    """Layers that are called in every way: with one input and several, by keyword, with a tuple as the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.bag = nn.EmbeddingBag(20, 16)
        self.cell = nn.LSTMCell(16, 16)
        self.gru = nn.GRUCell(16, 16)
        self.conv = nn.ConvTranspose1d(1, 4, 3, stride=2)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.idle = nn.Linear(2, 2)

    def forward(self, words):
        bag = self.bag(words.flatten(), offsets=torch.arange(len(words)) * words.shape[1])
        h, c = self.cell(self.embedding(words)[:, 0], (bag, torch.zeros_like(bag)))
        h, _ = self.cell(h, (h, c))
        h = self.gru(input=h, hx=c)
        return self.head(h), self.conv(h[:, None], output_size=[34])


WORDS = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))


def both(config, model=None):
    model = (Net() if model is None else model).eval()
    quantized = copy.deepcopy(model)
    qo.quantize_(quantized, config)
    return model, quantized


def by_name(report):
    return {layer.name: layer for layer in report.layers}


def sqnr(pairs):
    signal = sum(a.double().square().sum().item() for a, _ in pairs)
    return 10 * math.log10(signal / sum((a - b).double().square().sum().item() for a, b in pairs))


def linears(*features):
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(features))).eval()


# ---- compare -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_of_every_form_are_measured():
    model, quantized = both(qo.Simulated(input=qo.E4M3, weight=qo.INT4, output=qo.E5M2))
    report = qo.compare(model, quantized, WORDS)
    layers = by_name(report)
    assert list(layers) == ["embedding", "bag", "cell", "gru", "conv", "head"]
    assert report.unreached == ["idle"]
    assert {name: layer.kind for name, layer in layers.items()} == {
        "embedding": "SimulatedEmbedding",
        "bag": "SimulatedEmbeddingBag",
        "cell": "SimulatedLSTMCell",
        "gru": "SimulatedGRUCell",
        "conv": "SimulatedConvTranspose1d",
        "head": "SimulatedLinear",
    }
    assert (layers["cell"].calls, layers["gru"].calls) == (2, 1)

    offsets = torch.arange(3) * 5
    bag = model.bag(WORDS.flatten(), offsets)
    x, zero = model.embedding(WORDS)[:, 0], torch.zeros(3, 16)
    first = model.cell(x, (bag, zero))
    second = model.cell(first[0], first)
    h = model.gru(second[0], first[1])
    rounded = qo.E5M2(F.embedding(WORDS, qo.INT4(model.embedding.weight, axis=0)))
    assert layers["embedding"].sqnr == pytest.approx(sqnr([(model.embedding(WORDS), rounded)]), rel=1e-9)
    rounded = qo.E5M2(F.linear(qo.E4M3(h), qo.INT4(model.head.weight, axis=0)))
    assert layers["head"].sqnr == pytest.approx(sqnr([(model.head(h), rounded)]), rel=1e-9)
    pairs = [*zip(first, quantized.cell(x, (bag, zero)), strict=True), *zip(second, quantized.cell(first[0], first), strict=True)]
    assert layers["cell"].sqnr == pytest.approx(sqnr(pairs), rel=1e-9)
    assert layers["bag"].sqnr == pytest.approx(sqnr([(bag, quantized.bag(WORDS.flatten(), offsets))]), rel=1e-9)
    assert report.sqnr == pytest.approx(sqnr(list(zip(model(WORDS), quantized(WORDS), strict=True))), rel=1e-9)
    assert all(10 < layer.sqnr < 40 and 0.95 < layer.cosine < 1 and layer.clipped == 0 for layer in report.layers)


@pytest.mark.parametrize("per", ["tensor", "channel", 6])
def test_clipped_counts_what_is_beyond_a_calibrated_amax(per):
    model, seen, x = linears(16, 4), torch.randn(8, 16), 2 * torch.randn(64, 16)
    quantized = copy.deepcopy(model)
    qo.prepare_(quantized, qo.Simulated(input=qo.INT8, input_per=per))
    qo.calibrate(quantized, [seen])
    qo.convert_(quantized)
    (layer,) = qo.compare(model, quantized, x).layers
    largest = seen.abs()
    if per == "tensor":
        largest = largest.amax()
    elif per == "channel":
        largest = largest.amax(0)
    else:  # blocks of 6, 6 and 4 features; the same for all rows
        largest = torch.cat([part.amax().expand(part.shape[1]) for part in largest.split(per, 1)])
    assert layer.clipped == (x.abs() > largest).double().mean().item() > 0
    assert by_name(qo.compare(model, quantized, seen))["0"].clipped == 0


def test_sizes_are_those_of_the_formats():
    model = linears(64, 32, 16)
    weights, others = 64 * 32 + 32 * 16, 4 * (32 + 16)
    for config, size in {
        qo.Simulated(weight=qo.E4M3): weights,
        qo.Simulated(weight=qo.FP16): 2 * weights,
        qo.Simulated(weight=qo.with_gradient(qo.E3M2, qo.E5M2)): weights * 6 / 8,
        qo.Simulated(weight=qo.MXFP4): weights * 4.25 / 8,
        qo.Simulated(weight=qo.INT4): weights / 2 + 4 * (32 + 16),  # with a float32 scale for each channel
        qo.Simulated(weight=qo.INT4, weight_per="tensor"): weights / 2 + 4 * 2,
        qo.Simulated(weight=qo.INT4, weight_per=32): weights / 2 + 4 * weights / 32,
        qo.Simulated(input=qo.INT4): 4 * weights,
        qo.Simulated(weight=torch.round): 4 * weights,  # nothing is known of a function's values
    }.items():
        quantized = both(config, model)[1]
        report = qo.compare(model, quantized, torch.randn(2, 64))
        assert report.bytes == sum(layer.bytes for layer in report.layers) == size + others, config
        assert report.float_bytes == 4 * weights + others
    _, quantized = both(qo.Simulated(weight=qo.E2M1), model)
    for layer in quantized:
        layer.keep_weights()
    assert qo.compare(model, quantized, torch.randn(2, 64)).bytes == weights / 2 + others
    quantized = copy.deepcopy(model)
    qo.prepare_(quantized, qo.Simulated(input=qo.INT8, weight=qo.INT4))
    qo.calibrate(quantized, [torch.randn(8, 64)])
    qo.convert_(quantized)
    report = qo.compare(model, quantized, torch.randn(2, 64))  # amax of weights are their scales
    assert report.bytes == weights / 2 + 4 * (32 + 16) + others + 2 * 4


def test_a_tied_weight_counts_once_for_each_of_its_forms():
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20, bias=False))
    model[1].weight = model[0].weight
    words = torch.arange(20)
    for configs, size in (
        ({"*": qo.Simulated(weight=qo.E4M3)}, 320),
        ({"0": qo.Simulated(weight=qo.E4M3), "1": qo.Simulated(weight=qo.E2M1)}, 320 + 160),
        ({"0": qo.Simulated(weight=qo.E4M3), "1": None}, 320 + 4 * 320),
    ):
        report = qo.compare(*both(configs, model), words)
        assert (report.float_bytes, report.bytes) == (4 * 320, size)


def test_a_simulation_is_not_timed_and_the_table_says_formats(tmp_path):
    pytest.importorskip("matplotlib")
    report = qo.compare(*both(qo.Simulated(weight=qo.E4M3)), WORDS)
    assert (report.seconds, report.float_seconds) == (None, None)
    assert all(layer.seconds is None and layer.simulated for layer in report.layers)
    header = str(report).splitlines()[0]
    assert header.split()[-3:] == ["KiB", "float", "formats"]
    assert qo.Report.from_json(report.to_json()) == report
    report.plot(tmp_path / "report.svg")
    assert "formats against float" in (tmp_path / "report.svg").read_text()


def test_int8_layers_beside_simulated_ones():
    model = linears(16, 16, 16)
    quantized = copy.deepcopy(model)
    qo.quantize_(quantized, include=["0"])
    qo.quantize_(quantized, qo.Simulated(weight=qo.E2M1), include=["1"])
    report = qo.compare(model, quantized, torch.randn(4, 16))
    assert [(layer.kind, layer.simulated) for layer in report.layers] == [("QuantLinear", False), ("SimulatedLinear", True)]
    assert report.layers[1].bytes == 16 * 16 / 2 + 4 * 16
    assert sorted(qo.fallback_(quantized, report, num=2).returned) == ["0", "1"]
    assert quantized[0].weight is not model[0].weight
    assert {type(layer) for layer in quantized} == {nn.Linear}


@pytest.mark.parametrize("keywords", [{}, {"kdim": 8, "vdim": 24}], ids=["packed", "separate"])
@torch.no_grad()
def test_attention_is_one_layer(keywords):
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **keywords)

        def forward(self, query, key, value, mask=None):
            return self.attention(query, value=value, key=key, attn_mask=mask)[0]

    model, quantized = both(qo.Simulated(input=qo.E4M3, weight=qo.E2M1.with_(scaled=True)), Attention())
    sizes = (16, keywords.get("kdim", 16), keywords.get("vdim", 16))
    batch = [torch.randn(3, 5, size) for size in sizes] + [torch.full((5, 5), -math.inf).triu(1)]
    report = qo.compare(model, quantized, batch)
    (layer,) = report.layers
    assert (layer.name, layer.kind) == ("attention", "SimulatedMultiheadAttention")
    y = [m.attention(*batch[:3], attn_mask=batch[3]) for m in (model, quantized)]
    assert layer.sqnr == pytest.approx(sqnr(list(zip(*y, strict=True))), rel=1e-9)
    weights = 16 * (sum(sizes) + 16)
    assert report.bytes == layer.bytes == weights / 2 + 4 * 4 * 16 + 4 * 4 * 16  # scales and biases of four projections
    qo.keep_weights_(quantized)
    assert qo.compare(model, quantized, batch).bytes == report.bytes
    assert qo.fallback_(quantized, report, num=1).returned == ["attention"]
    assert type(quantized.attention) is nn.MultiheadAttention


def test_encoder_layers_are_reached():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    config = qo.Simulated(qo.E4M3, qo.E4M3)
    model, quantized = both(config, model)
    batch = {"src": torch.randn(3, 5, 16), "src_key_padding_mask": torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])}
    report = qo.compare(model, quantized, batch)
    assert report.unreached == []
    assert set(by_name(report)) == {f"layers.{i}.{name}" for i in range(2) for name in ("self_attn", "linear1", "linear2")}
    assert 10 < report.sqnr < 40
    qo.simulate_products_(quantized, config)  # all products are in layers already
    assert qo.compare(model, quantized, batch) == report


def test_compare_refuses():
    model, quantized = both(qo.Simulated(weight=qo.E4M3))
    with pytest.raises(ValueError, match=r"^quant_ops.compare: expected 'embedding' .* an Embedding .* got SimulatedEmbedding of"):
        qo.compare(quantized, quantized, WORDS)
    other = Net()
    other.cell = nn.LSTMCell(16, 8)
    message = r"^quant_ops.compare: expected 'cell' .* a LSTMCell of weight \(64, 16\), got LSTMCell of weight \(32, 16\)$"
    with pytest.raises(ValueError, match=message):
        qo.compare(other, quantized, WORDS)
    other.cell = nn.GRUCell(16, 16)
    with pytest.raises(ValueError, match=r"a LSTMCell of weight \(64, 16\), got GRUCell of weight \(48, 16\)$"):
        qo.compare(other, quantized, WORDS)
    model.bag.weight.data.fill_(math.inf)
    with pytest.raises(ValueError, match=r"expected finite activations, got NaN or Inf in the float model at layer 'bag'$"):
        qo.compare(model, quantized, WORDS)
    prepared = linears(4, 4, 4)
    qo.prepare_(prepared, qo.Simulated(weight=qo.E4M3))
    with pytest.raises(ValueError, match=r"got one without int8 or simulated layers. Call quantize_ or convert_ first\.$"):
        qo.compare(linears(4, 4, 4), prepared, torch.randn(2, 4))


# ---- fallback_ -----------------------------------------------------------------------------------------------------------


def test_the_most_sensitive_layers_return_with_their_own_parameters():
    model = linears(32, 32, 32, 32, 32)
    formats = {"0": qo.E4M3, "1": qo.IntFormat(2), "2": qo.FP16, "3": qo.IntFormat(3)}
    quantized = both({name: qo.Simulated(weight=format) for name, format in formats.items()}, model)[1]
    x, parameters = torch.randn(16, 32), dict(quantized.named_parameters())
    report = qo.compare(model, quantized, x)
    assert [layer.name for layer in report.worst(4)] == ["1", "3", "0", "2"]
    result = qo.fallback_(quantized, report, target=25.0)
    assert (result.reached, result.returned) == (True, ["1", "3"])
    assert result.values[-1] == pytest.approx(qo.compare(model, quantized, x).sqnr, rel=1e-9)
    assert type(quantized[1]) is type(quantized[3]) is nn.Linear
    assert all(parameter is parameters[name] for name, parameter in quantized.named_parameters())
    assert "target met" in str(result)


def test_a_trained_layer_returns_with_what_it_has_learned():
    model, quantized = both(qo.Simulated(weight=qo.IntFormat(2)), linears(8, 8, 8))
    x = torch.randn(4, 8)
    report = qo.compare(model, quantized, x)
    with torch.no_grad():
        quantized[0].weight.add_(1.0)
    qo.fallback_(quantized, report, num=2)
    assert type(quantized[0]) is nn.Linear or type(quantized[1]) is nn.Linear
    assert not torch.equal(quantized[0].weight, model[0].weight)


def test_what_stays_is_named_as_simulated():
    model, quantized = both(qo.Simulated(weight=qo.E2M1))
    result = qo.fallback_(quantized, qo.compare(model, quantized, WORDS), num=6)
    assert result.kind == "simulated"
    assert "  simulated  idle: the batch of the report did not reach it" in str(result).splitlines()
    assert quantized.head.weight is quantized.embedding.weight
