"""awq_ against the equations of arXiv 2306.00978 in float64, and what it gains over rounding to nearest."""

import copy

import language_model
import pytest
import torch
import torch.nn.functional as F
from smoothing_models import LlamaBlock, outliers_, randomize_
from test_smoothquant import with_outliers
from torch import nn

import quant_ops as qo

SIZE, GROUP = 72, 32  # the last group of a row is short


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(SIZE), nn.Linear(SIZE, width)
        self.out = nn.Linear(width, SIZE)

    def forward(self, x):
        return x + self.out(torch.tanh(self.fc(self.norm(x))))


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(*(randomize_(Block(40)) for _ in range(2))).eval()
    for block in model:
        outliers_(block.norm, (3, 50), by=8.0)
    return model, [torch.randn(3, 20, SIZE) for _ in range(2)]


# ---- the paper in float64 -------------------------------------------------------------------------------------------------


def groups(w, size):
    return [slice(start, min(start + size, w.shape[1])) for start in range(0, w.shape[1], size)]


def rounded(w, size, asymmetric):
    """int4 by the formulas of Int4WeightOnly; in float32, since -amax / s is a tie."""
    y = torch.empty_like(w)
    for part in groups(w.float(), size):
        g = w[:, part].float()
        if asymmetric:
            low, high = g.amin(1, keepdim=True).clamp(max=0), g.amax(1, keepdim=True).clamp(min=0)
            s = (high - low) / 15
            z = (-8 - (low / s).round()).clamp(-8, 7)
        else:
            s, z = 2 * (g.abs().amax(1, keepdim=True) / 15), 0.0
        y[:, part] = (((g / s).round() + z).clamp(-8, 7) - z).double() * s
    return y


def scale_of(x, ratio):
    s = x.abs().mean(0).pow(ratio).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def clip(w, x, size, asymmetric):
    """The clamped weight: of each group that of ten limits with the least squared error of its part of the output."""
    y = w.clone()
    for part in groups(w, size):
        g, rows = w[:, part], x[:, part]
        largest = g.abs().amax(1, keepdim=True)
        candidates = [torch.maximum(torch.minimum(g, largest * (1 - i / 20)), -largest * (1 - i / 20)) for i in range(10)]
        errors = [(rows @ (rounded(c, size, asymmetric) - g).T).square().sum(0) for c in candidates]
        best = torch.stack(errors).argmin(0)
        y[:, part] = torch.stack(candidates)[best, torch.arange(len(w))]
    return y


def paper(block, x, asymmetric):
    """r and s of both layers of a block, their clamped weights and what these are multiplied by."""
    w, v = block.fc.weight.double(), block.out.weight.double()
    h = F.layer_norm(x, (SIZE,), block.norm.weight.double(), block.norm.bias.double())
    t = torch.tanh(h @ w.T + block.fc.bias.double())

    def output(w, v):
        return x + torch.tanh(h @ w.T + block.fc.bias.double()) @ v.T + block.out.bias.double()

    found = {}
    for name, seen, own in (("fc", h, w), ("out", t, v)):
        errors = []
        for step in range(20):
            s = scale_of(seen, step / 20)
            q = rounded(own * s, GROUP, asymmetric) / s
            errors.append((output(q, v) if name == "fc" else output(w, q)).sub(output(w, v)).square().sum().item())
        best = errors.index(min(errors))
        s = scale_of(seen, best / 20)
        found[name] = best / 20, s, clip(own * s, seen / s, GROUP, asymmetric), seen / s
    return found, output(w, v)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_the_equations(asymmetric):
    model, batches = model_and_data()
    before = copy.deepcopy(model)
    config = qo.Int4WeightOnly(group_size=GROUP, asymmetric=asymmetric)
    result = qo.awq_(model, batches, config)
    assert len(result.ratios) == 4
    x = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    for i in (0, 1):
        found, x = paper(before[i], x, asymmetric)
        for name, (ratio, scale, clamped, seen) in found.items():
            layer = f"{i}.{name}"
            assert result.ratios[layer] == ratio
            if ratio:
                torch.testing.assert_close(result.scales[layer].double(), scale, rtol=1e-5, atol=0)
            scaled = before.get_submodule(layer).weight.double() * scale
            expected = rounded(clamped if result.clipped[layer] else scaled, GROUP, asymmetric)
            values = model.get_submodule(layer).dequantize().weight.double()
            same = (values - expected).abs() < 1e-4 * expected.abs().max()
            assert same.double().mean() > 0.9  # a group that is cut at both ends has its zero point at a tie
            errors = [
                ((y - scaled)[:, part] @ seen[:, part].T).square().sum()
                for part in groups(scaled, GROUP)
                for y in (values, expected)
            ]
            assert sum(errors[::2]) < 1.02 * sum(errors[1::2])
        assert result.clipped[f"{i}.fc"] > 0


def test_blocks_or_none():
    """Layers in no block are measured at their own outputs; with one layer in a block both are the same."""
    model, batches = model_and_data()
    model = nn.Sequential(
        nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, 16)), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    )
    config = qo.Int4WeightOnly(group_size=GROUP)
    first, second, third = (copy.deepcopy(model) for _ in range(3))
    one = qo.awq_(first, batches, config, blocks=["0"])
    other = qo.awq_(second, batches, config, blocks=[])
    assert one.ratios == other.ratios
    assert [name for name, _ in one.folded] == [name for name, _ in other.folded]
    with pytest.raises(ValueError, match="expected blocks that follow one another, got"):
        qo.awq_(third, batches, config, blocks=["1", "0"])
    plain = qo.awq_(third, batches, config, ratios=1, clip=False)  # nothing to choose
    assert not plain.scales
    rtn = copy.deepcopy(model)
    qo.quantize_(rtn, config)
    assert torch.equal(third(batches[0]), rtn(batches[0]))


def test_bad_input_and_interruption(monkeypatch):
    model, batches = model_and_data()
    before = copy.deepcopy(model.state_dict())
    for bad in ({"ratios": 0}, {"ratios": True}, {"data": []}, {"steps": 0}, {"blocks": "nothing"}, {"include": ["nothing"]}):
        with pytest.raises(ValueError, match=r"quant_ops\.awq_: expected"):
            qo.awq_(model, **({"data": batches} | bad))
    with pytest.raises(TypeError, match="expected config to be Int8WeightOnly, Int4WeightOnly or"):
        qo.awq_(model, batches, qo.Int8Dynamic())
    with pytest.raises(TypeError, match=r"Write \[batch\]"):
        qo.awq_(model, batches[0])

    calls = []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip_shares(*arguments)

    from quant_ops.accuracy.awq import clip_shares

    monkeypatch.setattr("quant_ops.accuracy.awq.clip_shares", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qo.awq_(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_language_model():
    """With salient channels int4 loses much when it is rounded to nearest, and little with AWQ."""
    model, batches, config = with_outliers(100.0), language_model.calibration(1, 6), qo.Int4WeightOnly(group_size=32)
    x = language_model.held(16)[:, :-1]
    expected, float_model = model(x).detach(), language_model.perplexity(model)
    loss, noise = {}, {}
    for name, method in {
        "rtn": lambda m: qo.quantize_(m, config, include=["layers.*"]),
        "awq": lambda m: qo.awq_(m, batches, config, include=["layers.*"], ratios=8),
    }.items():
        quantized = copy.deepcopy(model)
        method(quantized)
        loss[name] = language_model.perplexity(quantized) - float_model
        noise[name] = ((quantized(x) - expected).norm() / expected.norm()).item()
    print(float_model, loss, noise)
    assert noise["awq"] < 0.7 * noise["rtn"]
    assert loss["awq"] < loss["rtn"] / 2


def test_other_configs():
    model = randomize_(LlamaBlock(64))
    batches = [torch.randn(2, 9, 64) for _ in range(2)]
    expected = model(batches[0]).detach()
    for config in (qo.Int8DynamicInt4Weight(), qo.Int8WeightOnly(), {"mlp.*": qo.Int4WeightOnly(group_size=32), "*": None}):
        rtn, awq = copy.deepcopy(model), copy.deepcopy(model)
        qo.quantize_(rtn, config)
        qo.awq_(awq, batches, config)
        errors = [(quantized(batches[0]) - expected).norm() for quantized in (awq, rtn)]
        assert errors[0] < 1.02 * errors[1]
