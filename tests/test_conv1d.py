"""QuantConv1d: the integer sums of a one-dimensional convolution in float64, the epilogue's formula, shapes, whole models."""

import copy

import pytest
import reference
import torch
from torch import nn

import quant_ops as qo


@pytest.mark.parametrize("settings", [{}, {"asymmetric": True}, {"input_scale": 0.03, "input_zero_point": 4}])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(16, 24, 3, padding=1),
        nn.Conv1d(6, 9, 5, stride=2, padding=3, dilation=2, groups=3, bias=False),
        nn.Conv1d(20, 20, 4, padding="same", groups=20),
        nn.Conv1d(5, 8, 3, padding=2, padding_mode="circular"),
        nn.Conv1d(64, 64, 1),
    ],
)
def test_equals_the_exact_sum(layer, settings):
    x = torch.randn(3, layer.in_channels, 37)
    quantized = qo.QuantConv1d.from_float(layer, **settings)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = torch.nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode)
    if settings.get("input_scale"):
        scale, zero, qmin = quantized.input_scale, quantized.input_zero_point, -128
    else:
        qmin = -128 if settings else -127
        # a padded zero changes no range that holds zero already
        scale, zero = qo.choose_qparams(padded if mode != "constant" else x, [1, 2], qmin, 127, bool(settings))
    codes = qo.quant_tensor_forward(padded, scale, zero, qmin, 127, True, False).double() - zero
    acc = torch.nn.functional.conv1d(codes, quantized.qweight.double(), None, layer.stride, 0, layer.dilation, layer.groups)
    bias = None if layer.bias is None else layer.bias.detach()[:, None]
    expected = reference.epilogue(acc.to(torch.int32), scale, quantized.weight_scale[:, None], bias)
    assert reference.same_bits(quantized(x), expected)
    assert reference.same_bits(quantized(x[0]), expected[0])
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(quantized(last), expected)
    back = quantized.dequantize()
    assert back(x).shape == expected.shape
    assert torch.equal(back.weight, quantized.qweight * quantized.weight_scale[:, None, None])


def test_saved_compiled_and_refused():
    layer, x = nn.Conv1d(8, 8, 3), torch.randn(2, 8, 20)
    quantized = qo.QuantConv1d.from_float(layer)
    assert {name: tuple(t.shape) for name, t in quantized.state_dict().items()} == {
        "qweight": (8, 8, 3),
        "weight_scale": (8,),
        "bias": (8,),
    }
    other = qo.QuantConv1d.from_float(nn.Conv1d(8, 8, 3))
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), quantized(x))
    assert torch.equal(torch.compile(quantized, fullgraph=True, backend="aot_eager")(x), quantized(x))
    with pytest.raises(TypeError, match=r"expected an nn\.Conv1d, got Conv2d"):
        qo.QuantConv1d.from_float(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"expected x.shape \(N, C, L\)"):
        quantized(torch.randn(2, 8, 3, 3))


def test_constructor_reads_arguments_as_nn_conv1d_does():
    layer = qo.QuantConv1d(4, 6, 3, 2, "valid", 2, 2, False, "zeros", asymmetric=True, relu=True)
    assert (layer.weight.shape, layer.kernel_size, layer.stride, layer.dilation) == ((6, 2, 3), (3,), (2,), (2,))
    assert (layer.padding, layer.groups, layer.bias, layer.asymmetric, layer.relu) == ("valid", 2, None, True, True)
    assert str(layer).startswith(
        "QuantConv1d(4, 6, kernel_size=(3,), stride=(2,), dilation=(2,), groups=2, bias=False, weight=int8"
    )


# ---- whole models --------------------------------------------------------------------------------------------------------


def network():
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(112, 4)
    ).eval()


def test_quantized_saved_loaded_compared_and_returned(tmp_path):
    net, x = network(), torch.randn(2, 4, 16)
    expected = net(x)
    assert qo.fold_batchnorm_(net, x).folded == [("0", "1")]
    assert torch.allclose(net(x), expected, atol=1e-5)
    model = copy.deepcopy(net)
    result = qo.quantize_(model, exclude=["5"])
    assert (result.converted, [name for name, _ in result.skipped]) == (["0", "3"], ["5"])
    assert type(model[0]) is type(model[3]) is qo.QuantConv1d
    qo.save(model, tmp_path / "m")
    for fresh in (copy.deepcopy(net), copy.deepcopy(model)):
        assert qo.load_(fresh, tmp_path / "m").converted == ["0", "3"]
        assert torch.equal(fresh(x), model(x))
        assert fresh.state_dict().keys() == model.state_dict().keys()
    report = qo.compare(net, model, x)
    assert [layer.kind for layer in report.layers] == ["QuantConv1d", "QuantConv1d"]
    assert all(layer.sqnr > 30 for layer in report.layers)
    assert qo.fallback_(model, report, 1).returned == [report.worst(1)[0].name]
    assert sum(type(layer) is nn.Conv1d for layer in model) == 1


def test_a_bare_layer_is_refused():
    with pytest.raises(ValueError, match=r"got a bare Conv1d, which cannot be replaced in place\. Use QuantConv1d\.from_float"):
        qo.quantize_(nn.Conv1d(1, 1, 1))


@pytest.mark.parametrize("config", [qo.Int8Static(asymmetric=True), qo.Int8Static("lsq"), qo.Int8Dynamic()], ids=str)
def test_calibrated_layers_are_those_of_from_float(config):
    net, x = network(), torch.randn(2, 4, 16)
    prepared = copy.deepcopy(net)
    assert qo.prepare_(prepared, config).converted == ["0", "3", "5"]
    assert torch.equal(prepared(x), net(x))
    qo.calibrate(prepared, [x])
    trained = copy.deepcopy(prepared)
    qo.convert_(prepared)
    settings = {"asymmetric": config.asymmetric}
    if isinstance(config, qo.Int8Static):
        settings = {"input_scale": prepared[0].input_scale, "input_zero_point": prepared[0].input_zero_point}
    alone = qo.QuantConv1d.from_float(net[0], **settings)
    assert torch.equal(alone(x), prepared[0](x))

    qo.prepare_qat_(trained, config)  # training computes with the codes that the int8 layer will use
    simulated = trained.train()(x)
    simulated.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained[0].parameters())
    expected = trained.eval()(x)
    qo.convert_(trained)
    assert type(trained[3]) is qo.QuantConv1d
    assert torch.allclose(trained(x), expected, rtol=1e-3, atol=1e-4)


def test_keep_packed_only():
    layer, x = qo.QuantConv1d.from_float(nn.Conv1d(6, 9, 3, groups=3)), torch.randn(2, 6, 8)
    packed = copy.deepcopy(layer).keep_packed_only()
    assert packed.is_packed_only
    assert torch.equal(copy.deepcopy(packed)(x), layer(x))
    assert torch.equal(packed.state_dict()["qweight"], layer.qweight)
