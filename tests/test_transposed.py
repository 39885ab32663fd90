"""transformers' Conv1D, y = x W + b with W (in, out): every converting call takes it, as the same nn.Linear would be taken."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo
from quant_ops.compat import torch_quant, torch_quantizer


class Conv1D(nn.Module):
    """As transformers 5 has it. Recognised by its name and module."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.nf)


class Block(nn.Module):
    """GPT-2's MLP."""

    def __init__(self, nx=24, hidden=40):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(hidden, nx), Conv1D(nx, hidden)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


NAMES = ["c_fc", "c_proj"]


def block(seed=0):
    torch.manual_seed(seed)
    model = Block().eval()
    for layer in (model.c_fc, model.c_proj):
        nn.init.normal_(layer.bias)
        nn.init.normal_(layer.weight, std=0.2)
    return model, torch.randn(2, 5, 24)


def linears(model):
    """The same model of nn.Linear, whose conversion has to give the same bits."""
    model = copy.deepcopy(model)
    for name in NAMES:
        conv = model.get_submodule(name)
        linear = nn.Linear(*conv.weight.shape)
        linear.weight, linear.bias = nn.Parameter(conv.weight.detach().t().contiguous()), nn.Parameter(conv.bias.detach())
        model.set_submodule(name, linear)
    return model.eval()


def same_int8(model, reference):
    assert all(type(model.get_submodule(name)) is qo.QuantLinear for name in NAMES)
    got, want = model.state_dict(), reference.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_quantize():
    model, x = block()
    reference = linears(model)
    expected = model(x)
    result = qo.quantize_(model)
    assert (result.converted, result.skipped, result.share) == (NAMES, [], 1)
    weights, vectors = 2 * 24 * 40, 64
    assert result.bytes_before == 4 * (weights + vectors)
    assert result.bytes_after < result.bytes_before / 2
    qo.quantize_(reference)
    same_int8(model, reference)
    assert torch.equal(model(x), reference(x))
    assert F.cosine_similarity(model(x).flatten(), expected.flatten(), dim=0) > 0.999
    assert (model.c_fc.in_features, model.c_fc.out_features) == (24, 40)


def test_half_keeps_its_dtype():
    model, x = block()
    qo.quantize_(model.bfloat16())
    assert model.c_fc.weight.dtype == model(x.bfloat16()).dtype == torch.bfloat16


def test_prepared_layers_have_the_same_parameters_and_output():
    model, x = block()
    expected, parameters, keys = model(x), list(model.parameters()), set(model.state_dict())
    assert qo.prepare_(model).converted == NAMES
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert keys <= set(model.state_dict())
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model(x.transpose(0, 1)), expected.transpose(0, 1))
    assert model(x[:, :0]).shape == (2, 0, 24)
    assert "in_features=24, out_features=40, bias=True" in repr(model.c_fc)


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_static(observer):
    model, x = block()
    reference = linears(model)
    for one in (model, reference):
        qo.prepare_(one, qo.Int8Static(observer=observer, weight_bits=5, weight_observer=observer))
        for name in NAMES:  # the float matrix products may differ in last bits
            one.get_submodule(name).observer(x)
        assert qo.convert_(one).converted == NAMES
    same_int8(model, reference)


CONFIGS = {"static": qo.Int8Static(), "dynamic": qo.Int8Dynamic(), "lsq": qo.Int8Static(observer="lsq")}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training(config):
    """The simulated model's output, gradients and int8 model are those of nn.Linear."""
    model, x = block()
    reference = linears(model)
    gradients = []
    for one in (model, reference):
        qo.prepare_qat_(one, config)
        one.train()
        qo.calibrate(one, [x])
        one(x).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[1].items():
        got = gradients[0][name]
        torch.testing.assert_close(got.t() if name.endswith(".weight") else got, wanted)
    simulated = model.eval()(x)
    assert qo.convert_(model).converted == NAMES
    torch.testing.assert_close(model(x), simulated, rtol=1e-4, atol=1e-4)


def test_prepared_then_trained():
    model, x = block()
    qo.prepare_(model)
    qo.calibrate(model, [x])
    qo.prepare_qat_(model)
    model.train()(x).sum().backward()
    assert model.c_fc.weight.grad.shape == (24, 40)
    assert qo.convert_(model.eval()).converted == NAMES


def test_layers_without_data_become_what_they_were():
    model, x = block()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qo.prepare_qat_(model)
    with torch.no_grad():
        qo.calibrate(model, [x], forward=lambda model, x: model.c_fc(x))
    result = qo.convert_(model)
    assert result.skipped == [("c_proj", "no calibration data has reached it")]
    assert type(model.c_proj) is Conv1D
    assert vars(model.c_proj).keys() - vars(Block().c_proj).keys() == set()
    assert torch.equal(model.c_proj.weight, before["c_proj.weight"])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_save_and_load(tmp_path, device):
    model, x = block()
    qo.quantize_(model, exclude=["c_proj"])
    qo.save(model, tmp_path / "m.safetensors")
    with torch.device(device):
        fresh = Block().eval()
    result = qo.load_(fresh, tmp_path / "m.safetensors")
    assert (result.converted, result.skipped) == (["c_fc"], [("c_proj", "float in the file")])
    assert torch.equal(fresh(x), model(x))
    qo.load_(fresh, tmp_path / "m.safetensors")  # into int8 layers
    assert torch.equal(fresh(x), model(x))


def test_load_names_the_difference(tmp_path):
    model, _ = block()
    qo.quantize_(model)
    qo.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"'c_fc.weight' of shape \(40, 24\) in the file and \(24, 40\) in the model"):
        qo.load_(Block(40, 24), tmp_path / "m.safetensors")


def test_compare_and_fallback():
    model, x = block()
    quantized = copy.deepcopy(model)
    qo.quantize_(quantized)
    report = qo.compare(model, quantized, x)
    assert [(layer.name, layer.kind) for layer in report.layers] == [(name, "QuantLinear") for name in NAMES]
    assert all(layer.sqnr > 30 for layer in report.layers)
    assert report.layers[0].float_bytes == 4 * (24 * 40 + 40)
    returned = qo.fallback_(quantized, report, num=1).returned
    assert [type(quantized.get_submodule(name)) for name in returned] == [Conv1D]


def test_filters():
    model, _ = block()
    assert qo.quantize_(copy.deepcopy(model), exclude=["*proj"]).converted == ["c_fc"]
    assert qo.quantize_(copy.deepcopy(model), {Conv1D: qo.Int8Dynamic(weight_bits=4)}).converted == NAMES
    with pytest.raises(ValueError, match="expected the class Linear to match"):
        qo.quantize_(copy.deepcopy(model), include=[nn.Linear])


class Scaled(Conv1D):
    """No class of transformers."""

    __module__ = __name__

    def forward(self, x):
        return 2 * super().forward(x)


def test_left_alone():
    model = nn.Sequential(Conv1D(4, 4), Scaled(4, 4), Conv1D(4, 4))
    model[2].register_forward_hook(lambda *_: None)
    result = qo.quantize_(model)
    assert result.converted == ["0"]
    assert result.skipped == [
        ("1", "Scaled is a subclass whose forward may differ"),
        ("2", "it has hooks, which a replacement would lose"),
    ]
    with pytest.raises(ValueError, match=r"got a bare Conv1D, .* Use QuantLinear\.from_float"):
        qo.quantize_(Conv1D(4, 4))
    with pytest.raises(TypeError, match=r"QuantConv2d\.from_float: expected an nn\.Conv2d, got Conv1D"):
        qo.QuantConv2d.from_float(Conv1D(4, 4))


def test_class_of_the_same_name_elsewhere():
    other = type("Conv1D", (Conv1D,), {"__module__": "mine", "__mro__": ()})
    unrelated = type("Conv1D", (nn.Module,), {"__module__": "mine"})()
    unrelated.weight = nn.Parameter(torch.ones(2, 2))
    result = qo.quantize_(nn.Sequential(nn.Linear(2, 2), other(2, 2), unrelated))
    assert result.skipped == [
        ("1", "Conv1D is a subclass whose forward may differ"),
        ("2", "Conv1D has no int8 form: weight"),
    ]


def test_too_many_products():
    with torch.device("meta"):
        model = nn.Sequential(Conv1D(4, 70000), Conv1D(4, 140000))
    result = qo.prepare_(model)
    assert result.notes == [("0", "symmetric: with a zero point its sums are exact up to 65793 products")]
    assert result.skipped == [("1", "each output sums 140000 products; an int32 sum is exact for at most 131071")]


def test_compat(tmp_path):
    model, x = block()
    quantizer = torch_quant.Quantizer()
    quantizer.calib(model)(x)
    assert all(type(layer) is qo.QuantLinear for layer in quantizer.quantize(model).children())
    weight, activations = {"n_bits": 8, "scale_method": "max"}, {"n_bits": 8, "scale_method": "max"}
    fake = torch_quantizer.fake_quant(copy.deepcopy(model), weight, activations)
    fake(x)
    real = torch_quantizer.fake2real(fake, tmp_path)
    assert all(type(layer) is qo.QuantLinear for layer in real.children())


def test_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 99, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    make = lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()  # noqa: E731
    model, ids = make(), torch.randint(0, 99, (2, 7))
    with torch.no_grad():
        expected = model(ids)[0]
        assert len(qo.quantize_(model).converted) == 9
        got = model(ids)[0]
        assert (got - expected).norm() < 0.05 * expected.norm()
        qo.save(model, tmp_path / "gpt2.safetensors")
        with torch.device("meta"):
            fresh = make()
        qo.load_(fresh, tmp_path / "gpt2.safetensors")
        assert torch.equal(fresh(ids)[0], got)
