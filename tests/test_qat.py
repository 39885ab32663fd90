"""Quantization-aware training: the simulated forward, its gradients, what it works with, and the int8 model at the end."""

import copy
import importlib.util
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trained import Net, data, each_config, train

import quant_ops as qo
from quant_ops.report.error import sqnr


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


# ---- forward, backward, int8 ---------------------------------------------------------------------------------------------


@each_config
def test_the_int8_model_computes_what_was_trained(config):
    """The same codes: the difference is the rounding of float sums."""
    model = Net()
    result = qo.prepare_qat_(model, config)
    assert (result.kind, sorted(result.converted)) == ("qat", ["conv", "fc", "grouped"])
    train(model, data())
    x = data(1, seed=7)[0][0]
    weights = {name: getattr(model, name)._simulate_weight().detach() for name in ("conv", "grouped", "fc")}
    with torch.no_grad():
        expected = model(x)
        assert sorted(qo.convert_(model).converted) == ["conv", "fc", "grouped"]
        assert sqnr(expected, model(x)) > 60  # a code on the edge may fall to the other side; else 130
    for name, weight in weights.items():
        layer = getattr(model, name)
        assert layer.config == config
        assert torch.equal(layer.dequantize().weight, weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_straight_through(bits):
    """Value and gradients of a layer, from the operators, with the scales that convert_ will use."""
    model = nn.Sequential(nn.Linear(6, 5))
    qo.prepare_qat_(model, qo.Int8Static(asymmetric=True, weight_bits=bits))
    x = torch.randn(7, 6, requires_grad=True)
    output = model.train()(x)
    grad = torch.randn(7, 5)
    output.backward(grad)
    layer, qmax = model[0], 2 ** (bits - 1) - 1
    weight_scale, _ = qo.choose_qparams(layer.weight.detach(), [1], -qmax, qmax)
    weight = qo.quant_tensor_forward(layer.weight.detach(), weight_scale, None, -qmax, qmax)
    scale, zero_point = qo.choose_qparams(x.detach(), [], -128, 127, True)
    simulated = qo.quant_tensor_forward(x.detach(), scale, zero_point, -128, 127, True)
    assert torch.equal(output, F.linear(simulated, weight, layer.bias))
    torch.testing.assert_close(layer.weight.grad, grad.T @ simulated)  # nothing is outside of a range that holds all
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_the_gradient_of_learned_scales(kind):
    """That of quant_tensor_backward, divided by sqrt(elements * qmax) of one sample or one channel."""
    module = nn.Linear(6, 5) if kind == "Linear" else nn.Conv2d(6, 5, 3, padding=1)
    model = nn.Sequential(module)
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq", weight_bits=3, asymmetric=True))
    x = torch.randn(4, 6) if kind == "Linear" else torch.randn(4, 6, 5, 5)
    output = model(x)
    layer = model[0]
    with torch.no_grad():
        layer.input_scale.mul_(0.4)  # so that something is clipped
    output = model(x)
    grad = torch.randn_like(output)
    output.backward(grad)

    quantized, weight = x.clone().requires_grad_(), layer.weight.detach().clone()
    simulated_x = qo.quant_tensor_forward(
        quantized, layer.input_scale.detach(), layer.input_zero_point.detach(), -128, 127, True
    ).detach()
    simulated_weight = qo.quant_tensor_forward(weight, layer.weight_scale.detach(), None, -3, 3)
    simulated_x.requires_grad_()
    simulated_weight.requires_grad_()
    compute = F.linear if kind == "Linear" else lambda x, w, b: F.conv2d(x, w, b, padding=1)
    compute(simulated_x, simulated_weight, layer.bias.detach()).backward(grad)
    _, scale, zero_point = qo.quant_tensor_backward(
        simulated_x.grad, x, layer.input_scale.detach(), layer.input_zero_point.detach(), -128, 127, True
    )
    torch.testing.assert_close(layer.input_scale.grad, scale / (x[0].numel() * 127) ** 0.5)
    torch.testing.assert_close(layer.input_zero_point.grad, zero_point)
    assert zero_point != 0
    _, scale, _ = qo.quant_tensor_backward(simulated_weight.grad, weight, layer.weight_scale.detach(), None, -3, 3)
    torch.testing.assert_close(layer.weight_scale.grad, scale / (weight[0].numel() * 3) ** 0.5)


@each_config
def test_training_learns(config):
    """The loss on one batch falls to less than half of what converting the untrained model gives."""
    torch.manual_seed(3)
    x, y = data(1)[0]
    target = Net().eval()
    for parameter in target.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    y = target(x).detach()
    model = Net()
    qo.prepare_qat_(model, config)
    first = float(F.mse_loss(model(x), y).detach())
    train(model, [(x, y)] * 60, lr=3e-3)
    qo.convert_(model)
    assert float(F.mse_loss(model(x), y)) < 0.5 * first


# ---- BatchNorm, saving, compiling ----------------------------------------------------------------------------------------


def test_batchnorm_is_folded_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    for x, _ in data():
        model(x)
    model.eval()
    x = data(1, seed=7)[0][0]
    expected = model(x)
    assert qo.fold_batchnorm_(model).folded == [("0", "1")]
    assert qo.prepare_qat_(model, qo.Int8Static(observer="ema")).converted == ["0", "4"]
    train(model, [(x, expected.detach())] * 20, lr=1e-4)
    qo.convert_(model)
    assert [type(layer) for layer in model] == [qo.QuantConv2d, nn.Identity, nn.ReLU, nn.Flatten, qo.QuantLinear]
    assert sqnr(expected, model(x)) > 25


@each_config
def test_saved_loaded_and_continued(config):
    steps = data()
    model = Net()
    qo.prepare_qat_(model, config)
    train(model, steps[:3])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = Net()
    qo.prepare_qat_(resumed, config)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(model)
    for other in (model, resumed, copied):
        train(other, steps[3:])
        qo.convert_(other)
    for other in (resumed, copied):
        for (name, expected), got in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(expected, got), name


@each_config
def test_compiled_training_is_the_same(config):
    """One graph, compiled once for all steps of training, after a calibration."""
    torch._dynamo.reset()
    x, y = data(1)[0]
    models = []
    for compiled in (False, True):
        model = Net()
        qo.prepare_qat_(model, config)
        if not isinstance(config, qo.Int8Dynamic):
            qo.calibrate(model, [x])
        model.train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(4):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                F.mse_loss(run(x * (i + 1)), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for (name, expected), got in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=name)
    torch._dynamo.reset()


# ---- bad input -----------------------------------------------------------------------------------------------------------


def test_searched_scales_need_a_calibration():
    model = nn.Sequential(nn.Linear(4, 4))
    qo.prepare_qat_(model, qo.Int8Static(observer="mse"))
    message = r"^quant_ops\.QatLinear: expected the scales of observer 'mse' to be calibrated before training, got no data"
    with pytest.raises(RuntimeError, match=message):
        model(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"^quant_ops\.convert_: expected calibration data, got none in any layer"):
        qo.convert_(model)


@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_training_that_diverged(name):
    model = nn.Sequential(nn.Linear(4, 4))
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq"))
    model(torch.randn(2, 4))
    getattr(model[0], name).data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=rf"^quant_ops\.convert_: expected a finite {name}, got NaN or Inf from training, in layer '0'$"
    ):
        qo.convert_(model)


def test_a_layer_that_training_never_reached_is_float_again():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq", asymmetric=True))
    model["used"](torch.randn(2, 4))
    result = qo.convert_(model)
    assert result.converted == ["used"]
    assert result.skipped == [("unused", "no calibration data has reached it")]
    assert type(model["unused"]) is nn.Linear
    assert set(vars(model["unused"])) == set(vars(nn.Linear(2, 2)))
    assert dict(model["unused"].named_parameters()).keys() == {"weight", "bias"}
    assert list(model["unused"].buffers()) == []


def test_a_negative_learned_scale_is_its_magnitude():
    """Gradient descent may step over zero."""
    model = nn.Sequential(nn.Linear(4, 4))
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq"))
    x = torch.randn(2, 4)
    expected = model(x)
    model[0].input_scale.data.neg_()
    model[0].weight_scale.data.neg_()
    torch.testing.assert_close(model(x), expected)
    qo.convert_(model)
    assert model[0].input_scale > 0
    torch.testing.assert_close(model(x), expected.detach())


# ---- the example -----------------------------------------------------------------------------------------------------------


def test_digits_example(monkeypatch):
    examples = Path(__file__).parent.parent / "examples"
    monkeypatch.syspath_prepend(str(examples))
    spec = importlib.util.spec_from_file_location("qat_digits", examples / "qat_digits.py")
    qat_digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(qat_digits)
    report = qat_digits.main(["--quick", "--bits", "3"])
    assert report["ok"]
    assert report["accuracy"]["float32"] > 95
    assert report["lost"] > 1.5
    assert report["left"] < report["lost"] / 2
