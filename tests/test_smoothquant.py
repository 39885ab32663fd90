"""smoothquant_ against eq. 4 of arXiv 2211.10438 in float64, its search, its static scales, and what it gains with outliers."""

import copy

import language_model
import pytest
import torch
from smoothing_models import LlamaBlock, outliers_, randomize_
from torch import nn

import quant_ops as qo

SIZE = 32


def data(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 7, SIZE, generator=generator) for _ in range(count)]


def inputs(model, batches, name):
    """(rows, K) float64 of what a layer gets."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen).double()


def smoothing(x, weights, alpha):
    """Eq. 4, with the two bounds."""
    activations = x.abs().max(0).values.clamp(min=1e-5)
    columns = torch.cat([w.detach().double() for w in weights]).abs().max(0).values.clamp(min=1e-5)
    return activations.pow(alpha) / columns.pow(1 - alpha)


@pytest.fixture
def block():
    torch.manual_seed(0)
    model = randomize_(LlamaBlock())
    outliers_(model.norm1)
    outliers_(model.norm2, (5,))
    return model


GROUPS = (["attention.q", "attention.k", "attention.v"], ["mlp.gate", "mlp.up"], ["attention.o"], ["mlp.down"])


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.5, 1.0])
def test_the_scale_is_that_of_the_paper(block, alpha):
    with torch.no_grad():
        block.norm1.weight[7] = 0.0  # a dead channel
        block.mlp.gate.weight[:, 9] = block.mlp.up.weight[:, 9] = 0.0  # a dead column
    before = copy.deepcopy(block)
    result = qo.smoothquant_(block, data(), None, alpha=alpha)
    for names in GROUPS:
        weights = [before.get_submodule(name).weight for name in names]
        expected = smoothing(inputs(before, data(), names[0]), weights, alpha)
        for name, weight in zip(names, weights, strict=True):
            layer = block.get_submodule(name)
            torch.testing.assert_close(result.scales[name].double(), expected, rtol=3e-6, atol=0)
            torch.testing.assert_close(layer.weight.double(), weight.double() * expected, rtol=3e-6, atol=1e-12)
            if isinstance(layer, qo.ScaledLinear):
                torch.testing.assert_close(layer.input_multiplier.double(), 1 / expected, rtol=3e-6, atol=0)
    for norm, names in zip(("norm1", "norm2"), GROUPS, strict=False):
        weight = before.get_submodule(norm).weight.double() / result.scales[names[0]].double()
        torch.testing.assert_close(block.get_submodule(norm).weight.double(), weight, rtol=3e-6, atol=1e-12)


def test_the_bounds():
    """max|X| and max|W| are at least 1e-5."""
    model = nn.Sequential(nn.LayerNorm(SIZE, bias=False), nn.Linear(SIZE, 4))
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[1].weight[:, 1] = 0.0
    result = qo.smoothquant_(model, data(), None, alpha=0.5)
    scale, column = result.scales["1"], model[1].weight.abs().amax(0) / result.scales["1"]
    assert scale[0] == pytest.approx((1e-5 / column[0].item()) ** 0.5, rel=1e-5)
    assert 1e2 < scale[1] < 1e3
    assert model(data()[0]).isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        qo.Int8Dynamic(),
        qo.Int8Dynamic(asymmetric=False, weight_bits=5),
        qo.Int8Static(),
        qo.Int8Static(asymmetric=False),
        qo.Int4WeightOnly(group_size=32),
        qo.Int8DynamicInt4Weight(),
    ],
    ids=str,
)
def test_the_search_finds_the_least_error(config):
    """Of one group, whose output is the model's, against every alpha by itself."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.RMSNorm(SIZE), nn.Linear(SIZE, 24, bias=False)), data()
    outliers_(model[0])
    x = torch.cat(batches)
    expected = model(x).detach()

    def error(alpha):
        quantized = copy.deepcopy(model)
        result = qo.smoothquant_(quantized, batches, config, alpha=alpha)
        return (quantized(x) - expected).square().sum().item(), result

    plain = error({"*": None})[0]
    errors = {step / 20: error(step / 20)[0] for step in range(21)}
    found, result = error("search")
    assert found == pytest.approx(min(plain, *errors.values()), rel=1e-3)
    if found < 0.99 * plain:
        assert errors[result.alphas["1"]] == pytest.approx(found, rel=1e-3)
    else:
        assert dict(result.skipped) == {"1": "no alpha is better than no smoothing"}


@pytest.mark.parametrize("asymmetric", [True, False])
def test_static_scales_of_one_pass(block, asymmetric):
    """They are those of a second pass over the smoothed model, to the bit where the layer has a multiplier."""
    config, read = qo.Int8Static(asymmetric=asymmetric), []

    def once():
        read.append(None)
        yield from data()

    twice = copy.deepcopy(block)
    result = qo.smoothquant_(block, once(), config)
    assert len(read) == 1
    assert result.batches == 3
    assert len(result.conversion.converted) == 7
    qo.smoothquant_(twice, data(), None)
    qo.prepare_(twice, config)
    qo.calibrate(twice, data())
    qo.convert_(twice)
    for name in result.conversion.converted:
        mine, theirs = block.get_submodule(name), twice.get_submodule(name)
        assert torch.equal(mine.qweight, theirs.qweight)
        torch.testing.assert_close(mine.input_scale, theirs.input_scale, rtol=2e-6, atol=0)
        if mine.input_multiplier is not None:
            assert torch.equal(mine.input_multiplier, theirs.input_multiplier)
            assert torch.equal(mine.input_scale, theirs.input_scale)
        if asymmetric:
            assert (mine.input_zero_point - theirs.input_zero_point).abs() <= 1


def test_two_steps_a_report_and_a_file(block, tmp_path):
    """A report wants the smoothed float model; quantizing a copy of it is what the call with a config does."""
    float_model, at_once, fresh, x = copy.deepcopy(block), copy.deepcopy(block), copy.deepcopy(block), data(1, 5)[0]
    qo.smoothquant_(float_model, data(), None)
    quantized = copy.deepcopy(float_model)
    qo.quantize_(quantized)
    qo.smoothquant_(at_once, data(), qo.Int8Dynamic())
    assert torch.equal(quantized(x), at_once(x))
    report = qo.compare(float_model, quantized, x, repeats=0)
    assert all(layer.sqnr > 30 for layer in report.layers)
    qo.save(at_once, tmp_path / "model.safetensors")
    qo.load_(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(x), at_once(x))


def test_other_observers_look_at_smoothed_inputs(block):
    config, twice = qo.Int8Static(observer="mse"), copy.deepcopy(block)
    qo.smoothquant_(block, data(), config)
    qo.smoothquant_(twice, data(), None)
    qo.prepare_(twice, config)
    qo.calibrate(twice, data())
    qo.convert_(twice)
    x = data(1, 5)[0]
    assert torch.equal(block(x), twice(x))


def test_left_out_and_interrupted(block, monkeypatch, caplog):
    batches = data()
    batches[1][0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"smoothquant_: expected finite activations, got .* at the inputs of attention.q \(1\)"):
        result = qo.smoothquant_(copy.deepcopy(block), batches, qo.Int8Static())
    clean = qo.smoothquant_(copy.deepcopy(block), [batches[0], batches[2]], None)
    assert all(torch.equal(scale, clean.scales[name]) for name, scale in result.scales.items())
    assert ("mlp.up", "NaN or Inf at its input: 1 batch left out") in result.conversion.notes
    with pytest.warns(UserWarning, match="NaN or Inf"), pytest.raises(ValueError, match="convert_: expected calibration data"):
        qo.smoothquant_(copy.deepcopy(block), [batches[1]], qo.Int8Static())

    expected = block(batches[0]).detach()

    def interrupted(*_):
        raise KeyboardInterrupt

    half = copy.deepcopy(block)
    with monkeypatch.context() as patched:
        patched.setattr("quant_ops.accuracy.rescale.replace_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qo.smoothquant_(half, data(), None)
    assert "scales were folded into ['norm1', 'norm2'], which changes no output" in caplog.text
    torch.testing.assert_close(half(batches[0]), expected, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr("quant_ops.accuracy.smoothquant.convert_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qo.smoothquant_(block, data(), qo.Int8Static())
    torch.testing.assert_close(block(batches[0]), expected, rtol=1e-4, atol=1e-5)
    assert all(type(module) in (nn.Linear, qo.ScaledLinear) for module in block.modules() if isinstance(module, nn.Linear))


def with_outliers(by=30.0):
    """The trained language model with outliers in what its projections read, as large models have them; it computes the same."""
    model = language_model.trained()
    with torch.no_grad():
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers, channels in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), [3, 40, 77]),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), [11, 90]),
            ):
                norm.weight[channels] *= by
                for reader in readers:
                    reader.weight[:, channels] /= by
    return model


def test_perplexity_with_outliers():
    model, batches = with_outliers(), language_model.calibration(2)
    float_model = language_model.perplexity(model)
    assert float_model == pytest.approx(language_model.perplexity(language_model.original()), rel=1e-4)
    x = language_model.held(16)[:, :-1]
    expected = model(x).detach()
    loss, noise = {}, {}
    for name, method in {
        "plain": lambda m, c: (qo.prepare_(m, c), qo.calibrate(m, batches), qo.convert_(m)),
        "smooth": lambda m, c: qo.smoothquant_(m, batches, c),
        "search": lambda m, c: qo.smoothquant_(m, batches, c, alpha="search"),
    }.items():
        quantized = copy.deepcopy(model)
        method(quantized, qo.Int8Static())
        loss[name] = language_model.perplexity(quantized) - float_model
        noise[name] = ((quantized(x) - expected).norm() / expected.norm()).item()
    print(float_model, loss, noise)
    assert noise["smooth"] < noise["plain"] / 4
    assert noise["search"] < 1.1 * noise["smooth"]
    assert loss["smooth"] < loss["plain"] / 4


def test_torchao_computes_the_same_scale(block):
    core = pytest.importorskip("torchao.prototype.smoothquant.core")
    x = inputs(block, data(), "mlp.down").float()
    observer = core.SmoothQuantObserver(block.mlp.down.weight.detach().clone(), alpha=0.6)
    observer(x)
    expected = observer.calculate_qparams()[0]
    result = qo.smoothquant_(block, data(), None, alpha=0.6)
    torch.testing.assert_close(result.scales["mlp.down"], expected, rtol=1e-5, atol=0)
