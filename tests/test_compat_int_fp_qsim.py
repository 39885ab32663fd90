"""quant_ops.compat.int_fp_qsim: every block of its document runs, and layers compute what quantizing by hand gives."""

import copy
import functools
import inspect
import logging
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documents import CUSTOM_FORMAT, run
from torch import nn

import quant_ops as qo
from quant_ops.compat import int_fp_qsim, qtorch
from quant_ops.compat.int_fp_qsim import formats, layers, quantizer, static_calib
from quant_ops.compat.int_fp_qsim.attention import MultiheadAttention
from quant_ops.compat.int_fp_qsim.quantizer import quantize_to_fp, quantize_to_int
from quant_ops.compat.int_fp_qsim.replace import DEFAULT_MAPPING, products, replace_layers
from quant_ops.compat.int_fp_qsim.static_calib import calibrate_inputs, calibrate_weights

# The document's code blocks. Import lines are changed; what else is mended is said above each of them.

# FloatingPointNumber and replace_layers are imported; the rest of the block is in documents.py.
CUSTOM_IMPORTS = """
from quant_ops.compat.int_fp_qsim import FloatingPoint, FloatingPointNumber
from quant_ops.compat.int_fp_qsim import quantizer
from quant_ops.compat.int_fp_qsim.replace import replace_layers
"""

# Nothing is mended. resnet50, get_dataloaders and eval are the test's, and .cuda() does nothing where there is no CUDA.
STATIC = """
from quant_ops.compat.int_fp_qsim.formats import INT8, INT4, FP16
from quant_ops.compat.int_fp_qsim.replace import replace_layers
from quant_ops.compat.int_fp_qsim.static_calib import calibrate_inputs, calibrate_weights

def do_static_calibration(
    model, dataloader, num_bits, method, percentile, num_samples=5
):
    # [OPTIONAL] Function that tells the model how to process the inputs.
    def batch_process_func(model, inputs):
        # Most commonly used for BERT / OPT
        model(inputs[0].cuda())

    # This function will pass `num_samples` batches of data
    # from `dataloader` and calibrate the model for `num_bits`
    # based on the specified `method`.
    calibrate_inputs(
        model.cuda(),
        num_bits,
        dataloader,
        method=method,
        batch_process_func=batch_process_func,
        percentile=percentile,
        num_samples=num_samples
    )

    # This following function performs the same for the model.
    # No data batches are required here since this is done on weights.
    calibrate_weights(model, num_bits, False, method="max", perchannel=True)

model = resnet50(pretrained=True)
data_dir = "/data/datasets/imagenet"
data_loaders = get_dataloaders(
    data_dir,
    128,
    32,
    4,
)

# The following function will compute and attach static
# scales as attributes to the FP32 model layers.
do_static_calibration(
    model,
    data_loaders.train_loader,
    num_bits=8,
    method="percentile",
    percentile=99.99,
    num_samples=1
)

# Replace layers will copy the static scale attributes
# from the FP32 layers to the replaced quant layers.
replace_layers(
    model,
    input_quantizer=INT8,
    weight_quantizer=INT4,
    output_quantizer=FP16
)

# If you print the model at this stage, you should
# be able to see the computed scales attached as
# `amax_input` and `amax_weight`
print(model)

# During inference, each layer's forward call will
# check if scales are attached as layer attributes.
# If they are, then the model will use the attached
# scales to perform the quantization.
eval(model, data_loaders.val_loader, "cuda")
"""

# Nothing is mended. torchvision is the test's.
QAT = """
from quant_ops.compat.int_fp_qsim.replace import replace_layers
from quant_ops.compat.int_fp_qsim.formats import INT8, FP16

model = torchvision.models.resnet50()
# Quantize inputs and weights using INT8 and outputs in FP16
replace_layers(
    model,
    input_quantizer=INT8,
    weight_quantizer=INT8,
    output_quantizer=FP16
)

# Proceed with training...
"""


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """What stands for torchvision's model of the document."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2 = Block(8, 8, 1), Block(8, 16, 2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())).mean((2, 3)))


LAYERS = ["conv1", *(f"layer{i}.{name}" for i in (1, 2) for name in ("conv1", "conv2", "shortcut")), "fc"]


def resnet50(pretrained=False):
    """With random weights, and the statistics of data if it shall be a trained one."""
    torch.manual_seed(0)
    model = ResNet()
    if pretrained:
        model(torch.randn(16, 3, 16, 16))
    return model.eval()


def images(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(count)]


# ---- quantizing by hand --------------------------------------------------------------------------------------------------


def integers(x, amax, bits):
    """Half to even, narrow; in float32, as the operators."""
    most = 2 ** (bits - 1) - 1
    scale = torch.as_tensor(amax) / most
    return (x / scale).round().clamp(-most, most) * scale


def away(steps):
    return (steps.abs() + 0.5).floor().copysign(steps)


def floating(x, exp, man):
    """qtorch's: half away from zero, all exponents for numbers, saturating."""
    exponent = (torch.frexp(x.double()).exponent - 1).clamp(2 - 2 ** (exp - 1))
    step = torch.exp2((exponent - man).double())
    largest = (2 - 2.0**-man) * 2.0 ** (2 ** (exp - 1))
    return (away(x.double() / step) * step).clamp(-largest, largest).float()


def plain(layer, x, weight):
    """The float layer with another weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def traffic(model, x):
    """Input and output of every layer."""
    seen = {}
    named = [(name, model.get_submodule(name)) for name in LAYERS]
    hooks = [
        layer.register_forward_hook(lambda _, args, y, name=name: seen.__setitem__(name, (args[0], y))) for name, layer in named
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def assert_layers(model, x, input_of, weight_of, output_of):
    """Every layer computes what its operands, rounded by hand, give."""
    for name, (given, y) in traffic(model, x).items():
        layer = model.get_submodule(name)
        expected = output_of(plain(layer, input_of(layer, given), weight_of(layer, layer.weight.detach())))
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=1e-6)  # a step of FP16 where the sums differ in their last bit
        assert (y == expected).float().mean() > 0.99


# ---- the document --------------------------------------------------------------------------------------------------------


def test_document_custom_format():
    model, x = resnet50(pretrained=True), images()[0]
    float_model = copy.deepcopy(model)
    found = run(CUSTOM_IMPORTS + CUSTOM_FORMAT, model=model)
    assert found["FloatingPoint"] is qtorch.FloatingPoint
    assert_layers(model, x, *2 * [lambda _, given: floating(given, 3, 4)], lambda y: floating(y, 3, 4))
    with torch.no_grad():
        assert 8 < snr(float_model(x), model(x)) < 35

    weight = torch.randn(4, 10)
    seen = []
    model.fc.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append((grad_input[0], grad_output[0])))
    model.zero_grad()
    (model(x) * weight).sum().backward()
    (grad_input, grad_output), layer = seen[0], model.fc
    assert torch.equal(grad_output, weight)
    expected = floating(floating(grad_output, 5, 2) @ floating(layer.weight.detach(), 3, 4), 5, 2)
    torch.testing.assert_close(grad_input, expected, rtol=0.25, atol=1e-6)
    assert (grad_input == expected).float().mean() > 0.99


def test_document_static_quantization(monkeypatch, capsys, caplog):
    if not torch.cuda.is_available():
        for kind in (torch.Tensor, nn.Module):
            monkeypatch.setattr(kind, "cuda", lambda self: self)
    caplog.set_level(logging.INFO, "quant_ops")
    train = [(x, torch.zeros(len(x))) for x in images()]
    evaluated = []
    run(
        STATIC,
        resnet50=resnet50,
        get_dataloaders=lambda *_: types.SimpleNamespace(train_loader=train, val_loader=images()),
        eval=lambda model, data, device: evaluated.append((model, device)),
    )
    (model, device) = evaluated[0]
    assert device == "cuda"
    printed = capsys.readouterr().out
    assert printed.count("amax_input=") == printed.count("amax_weight=") == len(LAYERS)
    assert "8 converted" in caplog.text

    reference = traffic(resnet50(pretrained=True), images()[0])
    for name in LAYERS:
        layer = model.get_submodule(name)
        magnitudes = reference[name][0].abs().numpy()
        low, high = (np.percentile(magnitudes, 99.99, method=method) for method in ("lower", "higher"))
        assert low - 2 * high / 2048 <= float(layer.amax_input) <= high  # a bin of the histogram
        assert torch.equal(layer.amax_weight, layer.weight.detach().flatten(1).abs().amax(1).reshape(layer.amax_weight.shape))
        assert layer.amax_weight.dim() == layer.weight.dim()
    assert_layers(
        model,
        images()[2] * 1.5,
        lambda layer, x: integers(x, layer.amax_input, 8),
        lambda layer, weight: integers(weight, layer.amax_weight, 4),
        lambda y: floating(y, 5, 10),
    )


def test_document_training():
    found = run(QAT, torchvision=types.SimpleNamespace(models=types.SimpleNamespace(resnet50=resnet50)))
    model, x, y = found["model"].train(), torch.cat(images()), torch.arange(12) % 10
    assert_layers(
        copy.deepcopy(model).eval(),
        x,
        lambda _, given: integers(given, given.abs().max(), 8),
        lambda _, weight: integers(weight, weight.abs().max(), 8),
        lambda y: floating(y, 5, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        losses.append(F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def snr(reference, got):
    return float(10 * (reference.square().sum() / (reference - got).square().sum()).log10().detach())


# ---- names ---------------------------------------------------------------------------------------------------------------


def test_quantizer_is_a_module_and_a_function():
    import quant_ops.compat.int_fp_qsim.quantizer as module

    assert module is quantizer
    assert isinstance(module, types.ModuleType)
    assert module.quantize_to_int is quantize_to_int
    assert inspect.signature(quantizer) == inspect.signature(qtorch.quant.quantizer)
    number, x = int_fp_qsim.FloatingPoint(4, 3), torch.randn(100) * 300
    for arguments in ({"forward_number": number}, {"forward_num": number}):
        assert torch.equal(quantizer(**arguments, forward_rounding="nearest")(x), floating(x, 4, 3))
    assert torch.equal(quantizer(number, None, "nearest")(x), int_fp_qsim.float_quantize(x, 4, 3, "nearest"))
    assert int_fp_qsim.FloatingPointNumber is int_fp_qsim.FloatingPoint is qtorch.FloatingPoint


def test_formats():
    x = torch.cat([torch.randn(1000) * 200, torch.tensor([1e9, -1e9, 1.0625, 65504.0, 65520.0])])
    for format, exp, man in ((formats.E4M3, 4, 3), (formats.E3M4, 3, 4), (formats.E5M2, 5, 2), (formats.FP16, 5, 10)):
        assert torch.equal(format(x), floating(x, exp, man))
    assert repr(formats.E4M3) == "FloatFormat(4, 3, special='none', rounding='nearest_away')"
    assert (formats.E4M3.largest, formats.FP16.largest) == (480, 131008)
    assert torch.equal(formats.BF16(x), x.bfloat16().float())
    x = torch.randn(64, 8)
    for format, bits in ((formats.INT8, 8), (formats.INT4, 4)):
        assert torch.equal(format(x), integers(x, x.abs().max(), bits))
        assert torch.equal(format(x), quantize_to_int(x, bits))
    assert torch.equal(formats.E1M2(x), quantize_to_fp(x, 2, 1))
    assert torch.equal(formats.E2M1(x), quantize_to_fp(x, mantissa_bits=1, exponent_bits=2))


# ---- quantizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantize_to_int(bits):
    x = torch.randn(6, 7, 5) * 3
    assert torch.equal(quantize_to_int(x, bits), integers(x, x.abs().max(), bits))
    for amax in (1.5, [1.5], np.float32(1.5), np.array([1.5]), torch.tensor(1.5)):
        assert torch.equal(quantize_to_int(x, bits, static_scale=amax), integers(x, 1.5, bits))
        assert torch.equal(quantize_to_int(x, bits, amax=amax), integers(x, 1.5, bits))
    largest = x.abs().amax((0, 2), keepdim=True)
    expected = integers(x, largest, bits)
    assert torch.equal(quantize_to_int(x, bits, per_channel_axis=1), expected)
    assert torch.equal(quantize_to_int(x, bits, per_channel_axis=-2), expected)
    assert torch.equal(quantize_to_int(x, bits, static_scale=largest), expected)
    assert torch.equal(quantize_to_int(x, bits, static_scale=largest.flatten(), per_channel_axis=1), expected)
    most = 2**bits - 1
    scale = x.abs().max() / most
    assert torch.equal(quantize_to_int(x, bits, unsigned=True), (x / scale).round().clamp(0, most) * scale)


@pytest.mark.parametrize("percent", [100, 99, 90.5, 0])
def test_percentile(percent):
    x = torch.randn(11, 13)
    amax = np.percentile(x.abs().numpy(), percent, method="midpoint")
    assert torch.equal(quantize_to_int(x, 8, "percentile", percent), integers(x, torch.tensor(amax), 8))
    rows = np.percentile(x.abs().numpy(), percent, axis=0, method="midpoint", keepdims=True)
    got = quantize_to_int(x, 8, "percentile", percent, per_channel_axis=1)
    assert torch.equal(got, integers(x, torch.from_numpy(rows), 8))


@pytest.mark.parametrize(("exp", "man"), [(4, 3), (2, 1), (1, 2), (3, 4), (5, 2)])
def test_quantize_to_fp(exp, man):
    """The formula of "FP8 Quantization: The Power of the Exponent", in float64, where its logarithm is far from rounding."""
    x = torch.randn(40, 30) * 3

    def by_formula(x, amax):
        x, amax = x.double(), torch.as_tensor(amax).double()
        bias = 2**exp - amax.log2() + np.log2(2 - 2.0**-man) - 1
        x = x.clamp(-amax, amax)
        exponent = (x.abs().log2() + bias).floor().clamp(1)
        step = torch.exp2(exponent - man - bias)
        return (x / step).round() * step

    for amax in (None, 2.5, 100.0):
        got = quantize_to_fp(x, man, exp, static_scale=amax)
        expected = by_formula(x, x.abs().max() if amax is None else amax)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)
    rows = x.abs().amax(1)
    expected = by_formula(x, rows.unsqueeze(1))
    for amax in (rows, rows.unsqueeze(1), rows.numpy()):
        torch.testing.assert_close(quantize_to_fp(x, man, exp, static_scale=amax).double(), expected, rtol=1e-5, atol=1e-7)
    got = quantize_to_fp(x.t(), man, exp, per_channel_axis=1, amax=rows)
    torch.testing.assert_close(got.t().double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(quantize_to_fp(x, torch.tensor([float(man)]), exp), quantize_to_fp(x, man, exp))
    assert torch.equal(quantize_to_fp(x, man, exp), qo.FloatFormat(exp, man, special="none", scaled=True)(x))


@pytest.mark.parametrize(
    "quantize",
    [functools.partial(quantize_to_int, num_bits=8), functools.partial(quantize_to_fp, mantissa_bits=3, exponent_bits=4)],
)
def test_gradients_are_piecewise_linear(quantize):
    x, weight = (torch.randn(1000) * 3).requires_grad_(), torch.randn(1000)
    (quantize(x, static_scale=2.0) * weight).sum().backward()
    inside, outside = x.detach().abs() <= 2, x.detach().abs() > 2.1
    assert torch.equal(x.grad[inside], weight[inside])
    assert not x.grad[outside].any()
    x.grad = None
    (quantize(x) * weight).sum().backward()
    inside = x.detach().abs() < x.detach().abs().max()
    assert torch.equal(x.grad[inside], weight[inside])


def test_dtypes_and_nothing():
    for quantize in (
        functools.partial(quantize_to_int, num_bits=4),
        functools.partial(quantize_to_fp, mantissa_bits=1, exponent_bits=2),
    ):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            x = torch.randn(8, 8).to(dtype)
            assert quantize(x).dtype == quantize(x, calibration="percentile").dtype == dtype
        assert quantize(torch.zeros(3)).tolist() == [0, 0, 0]
        assert quantize(torch.ones(0, 4), calibration="percentile").shape == (0, 4)
        assert quantize(torch.tensor([1.0, torch.nan]))[1].isnan()


# ---- calibration ---------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """Takes keyword arguments."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None):
        x = self.drop(self.first(input=self.embed(input_ids)))
        return self.second(x if attention_mask is None else x * attention_mask.unsqueeze(-1))


@pytest.mark.parametrize("method", ["max", "percentile", "MSE", "entropy"])
def test_methods_are_the_observers(method):
    model = resnet50(pretrained=True)
    seen = traffic(model, torch.cat(images()))
    calibrate_inputs(model, 4, images(), method=method, percentile=99.0)
    calibrate_weights(model, 4, False, method=method, perchannel=True, percentile=99.0)
    kind = qo.observers.Observer.kinds["minmax" if method == "max" else method.lower()]
    settings = {"format": qo.INT4, **({"percentile": 99.0} if method == "percentile" else {})}
    for name in LAYERS:
        layer = model.get_submodule(name)
        for x, axis, amax in ((seen[name][0], None, layer.amax_input), (layer.weight, 0, layer.amax_weight)):
            observer = kind(axis=axis, **settings)
            observer(x)
            torch.testing.assert_close(amax, observer.amax(), rtol=1e-5, atol=0)
            assert not amax.requires_grad
            assert amax.dtype == torch.float32


@pytest.mark.parametrize(
    "batch",
    [
        torch.tensor([[1, 2, 3]]),
        (torch.tensor([[1, 2, 3]]), torch.ones(1, 3)),
        [torch.tensor([[1, 2, 3]])],
        {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)},
    ],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_batches(batch):
    model = Words().train()
    model.first.eval()
    state = torch.get_rng_state()
    calibrate_inputs(model, 8, [batch])
    assert torch.equal(state, torch.get_rng_state())  # no dropout
    assert [module.training for module in model.children()] == [True, False, True, True]
    x = model.embed.weight[[1, 2, 3]]
    assert model.first.amax_input == x.abs().max()
    assert model.second.amax_input == model.first(x).abs().max()
    assert not hasattr(model.embed, "amax_input")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_number_of_samples_and_generators():
    def batches():
        for i in range(1, 100):
            yield torch.full((1, 4), float(i))

    data, model = batches(), nn.Sequential(nn.Linear(4, 4))
    calibrate_inputs(model, 8, data, num_samples=3)
    assert (model[0].amax_input, next(data)[0, 0]) == (3, 4)
    calibrate_inputs(model, 8, data)
    assert model[0].amax_input == 9  # five batches, 5 to 9; the former amax is gone
    assert set(model.state_dict()) == {"0.weight", "0.bias", "0.amax_input"}


def test_an_exception_leaves_the_model_as_it_was():
    model = Words().train()

    def fail(model, batch):
        model(batch)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        calibrate_inputs(model, 8, [torch.tensor([[1]])], batch_process_func=fail)
    assert model.training
    assert model.drop.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model.first, "amax_input")


def test_what_calibration_warns_of():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.zero, self.unused = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.attention = nn.MultiheadAttention(2, 1)  # its own layer is never called, which is no reason for a warning

        def forward(self, x):
            return self.used(x) + self.zero(0 * x.nan_to_num())

    model = Branches()
    with pytest.warns(UserWarning, match="calibrate_inputs") as warned:
        calibrate_inputs(model, 8, [torch.ones(1, 2), torch.tensor([[5.0, torch.inf]])])
    assert [str(w.message) for w in warned] == [
        "quant_ops.calibrate_inputs: expected data at the input of every layer, got none, so that no amax is attached, at unused",
        "quant_ops.calibrate_inputs: expected finite inputs, got batches with NaN or Inf, which were left out, at used (1)",
        "quant_ops.calibrate_inputs: expected inputs other than 0, got nothing else, and an amax of 0, at zero",
    ]
    assert (model.used.amax_input, model.zero.amax_input) == (1, 0)
    assert not hasattr(model.unused, "amax_input")


def test_encoders_of_torch():
    """Their fused path calls no layer, and makes nested tensors of masked batches."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padded = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) > 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate_inputs(model, 8, [x], batch_process_func=lambda model, x: model(x, src_key_padding_mask=padded))
    assert torch.backends.mha.get_fastpath_enabled()
    assert [name for name, _ in model.named_buffers()] == [f"layers.{i}.linear{j}.amax_input" for i in (0, 1) for j in (1, 2)]


def test_weights():
    model = nn.Sequential(nn.Linear(6, 5), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(4, 3, 2))
    calibrate_weights(model, 8, False)
    for layer in model:
        assert torch.equal(layer.amax_weight, layer.weight.detach().abs().max())
    calibrate_weights(model, 8, False, perchannel=True)
    for layer, axis in zip(model, (0, 1, 0), strict=True):
        dims = [d for d in range(layer.weight.dim()) if d != axis]
        assert torch.equal(layer.amax_weight, layer.weight.detach().abs().amax(dims, keepdim=True))
    wide = nn.Sequential(nn.Linear(4, 2100))
    calibrate_weights(wide, 4, False, "entropy", True)
    parts = nn.Sequential(nn.Linear(4, 100))
    parts[0].weight = nn.Parameter(wide[0].weight.detach()[1000:1100])
    calibrate_weights(parts, 4, False, "entropy", True)
    assert torch.equal(wide[0].amax_weight[1000:1100], parts[0].amax_weight)


def test_calibrating_under_inference_mode_does_not_prevent_training():
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.inference_mode():
        calibrate_inputs(model, 8, [torch.randn(3, 4)])
        calibrate_weights(model, 8, False)
    replace_layers(model, formats.INT8, formats.INT8, None)
    model(torch.randn(3, 4)).sum().backward()
    assert model[0].weight.grad is not None


# ---- replacing -----------------------------------------------------------------------------------------------------------


def test_replace_layers_gives_the_model_and_shares_parameters():
    model = resnet50(pretrained=True)
    parameters = dict(model.named_parameters())
    assert replace_layers(model, formats.E4M3, formats.E4M3, formats.BF16) is model
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(isinstance(model.get_submodule(name).config, qo.Simulated) for name in LAYERS)
    assert_layers(model, images()[0], *2 * [lambda _, x: floating(x, 4, 3)], lambda y: y.bfloat16().float())
    again = str(model)
    with pytest.warns(UserWarning, match="quantize_"):
        replace_layers(model, formats.E4M3, formats.E4M3, formats.BF16)
    assert str(model) == again


def test_a_layer_alone_and_no_quantizer():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    replaced = replace_layers(layer, formats.INT8, None, None)
    assert replaced is not layer
    assert torch.equal(replaced(x), F.linear(integers(x, x.abs().max(), 8), layer.weight, layer.bias))


def test_user_functions_get_a_calibrated_amax():
    """By the name that they have for it; one that has none is called without."""
    calls = []

    def own(x, static_scale=None):
        calls.append(static_scale)
        return x

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(6, 4)
    calibrate_inputs(model, 8, [2 * x])
    calibrate_weights(model, 8, False, perchannel=True)
    amax_input, amax_weight = model[0].amax_input, model[0].amax_weight
    replace_layers(model, own, functools.partial(quantize_to_int, num_bits=4), lambda y: y + 1)
    expected = F.linear(x, integers(model[0].weight.detach(), amax_weight, 4), model[0].bias) + 1
    assert torch.equal(model(x), expected)
    assert calls == [amax_input]
    assert "own" in str(model)
    assert "weight=quantize_to_int(num_bits=4)" in str(model)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    fresh = replace_layers(nn.Sequential(nn.Linear(4, 4)), own, own, None)
    fresh(x)
    assert calls[-2:] == [None, None]


def test_a_format_without_a_scale_ignores_the_calibration(caplog):
    caplog.set_level(logging.INFO, "quant_ops")
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(6, 4)
    calibrate_inputs(model, 8, [x])
    replace_layers(model, formats.E4M3, formats.E4M3, None)
    assert "amax_input is not used" in caplog.text
    assert torch.equal(model(x), F.linear(floating(x, 4, 3), floating(model[0].weight.detach(), 4, 3), model[0].bias))


def test_a_replaced_model_can_be_calibrated():
    model, x = resnet50(pretrained=True), images()[0]
    replace_layers(model, formats.INT8, formats.INT4, None)
    model(x)  # its rounded weights are kept
    calibrate_inputs(model, 8, images())
    calibrate_weights(model, 8, False, perchannel=True)
    assert str(model).count("amax_input=") == len(LAYERS)
    assert_layers(
        model,
        2 * x,
        lambda layer, x: integers(x, layer.amax_input, 8),
        lambda layer, weight: integers(weight, layer.amax_weight, 4),
        lambda y: y,
    )


def test_mapping():
    model = resnet50(pretrained=True)
    replace_layers(model, formats.INT8, formats.INT8, None, {nn.Linear: layers.Linear})
    assert [name for name in LAYERS if hasattr(model.get_submodule(name), "config")] == ["fc"]

    class Own(nn.Module):
        @classmethod
        def from_float(cls, module):
            made = cls()
            made.inner, made.quantizer, made.amax = module, module.input_quantizer, module.amax_input
            return made

    model = resnet50(pretrained=True)
    calibrate_inputs(model, 8, images())
    amax = model.layer1.conv1.amax_input
    mapping = copy.deepcopy(DEFAULT_MAPPING)
    mapping.update({Block: Own})
    replace_layers(model, formats.INT8, formats.INT8, None, mapping)
    assert isinstance(model.layer1, Own)
    assert model.layer1.quantizer == formats.INT8
    assert model.layer1.amax is None
    assert model.layer1.inner.conv1.amax_input is amax
    assert not hasattr(model.layer1.inner.conv1, "config")
    assert hasattr(model.fc, "config")


def test_layers_by_name():
    x = torch.randn(2, 6, 9, 9)
    torch.manual_seed(1)
    layer = layers.Conv2d(6, 4, 3, formats.INT8, formats.INT4, None, 2, padding=1, groups=2, amax_input=1.5)
    expected = F.conv2d(integers(x, 1.5, 8), integers(layer.weight, layer.weight.abs().max(), 4), layer.bias, 2, 1, 1, 2)
    assert torch.equal(layer(x), expected)
    layer = layers.ConvTranspose2d(6, 4, 3, None, formats.E4M3, None, 2, 1, 1)
    assert torch.equal(layer(x), F.conv_transpose2d(x, floating(layer.weight.detach(), 4, 3), layer.bias, 2, 1, 1))
    layer = layers.Conv1d(6, 4, 3, formats.E4M3, None, None, bias=False)
    assert torch.equal(layer(x.flatten(2)), F.conv1d(floating(x.flatten(2), 4, 3), layer.weight))
    amax = np.array([[1.0], [2.0], [0.1]], dtype=np.float32)
    layer = layers.Linear(9, 3, None, formats.INT8, formats.BF16, bias=False, amax_weight=amax)
    expected = F.linear(x, integers(layer.weight, torch.from_numpy(amax), 8))
    assert torch.equal(layer(x), expected.bfloat16().float())
    assert inspect.signature(layers.Conv2d).parameters["input_quantizer"]
    assert layers.Conv2d.__name__ == "Conv2d"


class Attending(nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(8, 24), nn.Linear(8, 8), heads

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_is_simulated():
    model, x = Attending(), torch.randn(3, 5, 8)
    reference = copy.deepcopy(model)
    replace_layers(model, formats.E4M3, formats.E4M3, formats.FP16)

    def e4m3(x):
        return floating(x, 4, 3)

    def linear(layer, x):
        return floating(F.linear(e4m3(x), e4m3(layer.weight.detach()), layer.bias), 5, 10)

    q, k, v = (e4m3(part.unflatten(-1, (2, -1)).transpose(1, 2)) for part in linear(reference.qkv, x).chunk(3, -1))
    scores = floating(q @ k.transpose(-1, -2), 5, 10) / 2
    y = floating(e4m3(scores.softmax(-1)) @ v, 5, 10).transpose(1, 2).flatten(2)
    expected = linear(reference.out, y)
    with torch.no_grad():
        got = model(x)
    assert (got == expected).float().mean() > 0.9
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    other = copy.deepcopy(model)
    products[model].remove()
    assert not torch.equal(model(x), got)
    assert torch.equal(other(x), got)
    only_layers = replace_layers(copy.deepcopy(reference), formats.E4M3, formats.E4M3, formats.FP16, {nn.Linear: layers.Linear})
    assert torch.equal(only_layers(x), model(x))


def test_multihead_attention():
    x = torch.randn(5, 3, 8)
    torch.manual_seed(2)
    layer = MultiheadAttention(8, 2, formats.E4M3, formats.E4M3, formats.FP16, batch_first=True)
    torch.manual_seed(2)
    plain_layer = nn.MultiheadAttention(8, 2, batch_first=True)
    y, expected = layer(x, x, x)[0], plain_layer(x, x, x)[0]
    assert 15 < snr(expected, y) < 45
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    before = model(x)
    replace_layers(model, formats.E4M3, formats.E4M3, formats.FP16)
    assert 15 < snr(before, model(x)) < 45


# ---- refusals ------------------------------------------------------------------------------------------------------------

MODEL = nn.Sequential(nn.Linear(4, 4))
X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quantize_to_int(X, 8, "entropy"),
            ValueError,
            r"quantize_to_int: expected calibration to be 'max' or 'percentile', got 'entropy'\. Pass static_scale .*",
        ),
        (
            lambda: quantize_to_int(X, 8, "percentile", 101),
            ValueError,
            r"quantize_to_int: expected 0 <= percentile <= 100, got 101",
        ),
        (
            lambda: quantize_to_fp(X, 2, 1, static_scale=1.0, amax=1.0),
            TypeError,
            r"quantize_to_fp: expected static_scale or amax, .*, got both",
        ),
        (lambda: quantize_to_int(X, 8, static_scale=[-1.0]), ValueError, r"quantize_to_int: expected amax >= 0, got \[-1\.0\]"),
        (
            lambda: quantize_to_int(X, 8, per_channel_axis=2),
            ValueError,
            r"quantize_to_int: expected -2 <= per_channel_axis < 2, got 2",
        ),
        (
            lambda: quantize_to_fp(X, 2, 1, static_scale=[1.0, 2.0, 3.0]),
            ValueError,
            r"quantize_to_fp: expected an amax for each index of per_channel_axis, got 3 for dimension 0 of \(2, 4\)",
        ),
        (lambda: quantize_to_int(X.long(), 8), TypeError, r"INT8: expected x to be float32, .*, got torch\.int64"),
        (lambda: quantize_to_int(X, 1), ValueError, r"IntFormat: expected 2 <= bits <= 24, got 1"),
        (lambda: quantize_to_fp(X, 2, 1.5), ValueError, r"FloatFormat: expected 1 <= exponent_bits <= 8, got 1\.5"),
        (
            lambda: calibrate_inputs(MODEL, 8, [X], method="min"),
            ValueError,
            r"calibrate_inputs: expected method to be one of \['entropy', 'max', 'mse', 'percentile'\], got 'min'",
        ),
        (
            lambda: calibrate_weights(MODEL, 8, False, method=None),
            ValueError,
            r"calibrate_weights: expected method to be one of .*, got None",
        ),
        (lambda: calibrate_inputs(MODEL, 8, [X], num_samples=0), ValueError, r"calibrate_inputs: expected num_samples >= 1, got 0"),
        (
            lambda: calibrate_inputs(MODEL, 8, [X], percentile=5),
            ValueError,
            r"calibrate_inputs: expected 50 < percentile <= 100, got 5",
        ),
        (
            lambda: calibrate_inputs(MODEL, 8, X),
            TypeError,
            r"calibrate_inputs: expected an iterable of batches, got one Tensor\. Write \[batch\]\.",
        ),
        (
            lambda: calibrate_inputs(MODEL, 8, {"x": X}),
            TypeError,
            r"calibrate_inputs: expected an iterable of batches, got one dict\. Write \[batch\]\.",
        ),
        (
            lambda: calibrate_inputs(MODEL, 8, []),
            ValueError,
            r"calibrate_inputs: expected calibration data, got no batch\. An iter.*",
        ),
        (
            lambda: calibrate_inputs(MODEL, 8, [X * torch.nan]),
            ValueError,
            r"calibrate_inputs: expected data at the layers' inputs, got NaN or Inf in every batch",
        ),
        (
            lambda: calibrate_inputs(MODEL, 8, [X], batch_process_func=lambda model, x: None),
            ValueError,
            r"calibrate_inputs: expected data at the layers' inputs, got none in 1 batches",
        ),
        (
            lambda: calibrate_inputs(nn.Sequential(nn.ReLU()), 8, [X]),
            ValueError,
            r"calibrate_inputs: expected a model with layers \(Linear, Conv1d, Conv2d, Conv3d, \.\.\.\), got none in Sequential",
        ),
        (
            lambda: calibrate_weights(nn.Sequential(nn.Linear(2, 2, device="meta")), 8, False),
            ValueError,
            r"calibrate_weights: expected weights with data, got one without, in layer '0'",
        ),
        (
            lambda: layers.simulated(nn.ReLU(), formats.INT8, None, None),
            ValueError,
            r"int_fp_qsim: expected a layer that can be simulated, got ReLU: it has no simulated form",
        ),
        (
            lambda: replace_layers(nn.Bilinear(2, 2, 2), formats.INT8, None, None, {nn.Bilinear: layers.simulated}),
            ValueError,
            r"int_fp_qsim: expected a layer that can be simulated, got Bilinear: .*",
        ),
        (
            lambda: calibrate_weights(not_finite(), 8, False),
            ValueError,
            r"calibrate_weights: expected finite weights, got NaN or Inf, in layer the model itself",
        ),
    ],
)
def test_refusals(call, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=rf"^quant_ops\.{message}$"):
            call()
    assert not list(MODEL.buffers())


def not_finite():
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, torch.inf)
    return layer


def test_static_calib_names_what_it_offers():
    assert static_calib.__all__ == ["calibrate_inputs", "calibrate_weights"]
