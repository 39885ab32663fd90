"""quant_ops.compat.torch_quant (BladeDISC's): the block of its document, filters, calibration, training and observers."""

import types

import pytest
import torch
import torch.nn.functional as F
from documents import run
from torch import nn

import quant_ops as qo
from quant_ops.nn import Int8Layer

TORCH_QUANT = """
from quant_ops.compat.torch_quant import Quantizer

model = MyModel() # torch.nn.Module
typical_data = torch.tensor([1, 2, 3])
quantizer = Quantizer()

# create a proxy model and run forward to calibrate quantization params
quantizer.calib(model)(typical_data)

# [Optional] perform automatic mixed precision quantization
# create a proxy model and run forward to fallback few sensitive layers to float precision
amp_model = quantizer.amp(model)
amp_model(typical_data)
quantizer.fallback(amp_model, num=1)

# create a proxy model representing quantized model
quant_model = quantizer.quantize(model)

# run inference on quantized model
output = quant_model(typical_data)

# or save model as torchscript
traced = torch.jit.trace(quant_model, typical_data)
torch.jit.save(traced, 'quant.pt')

# or further optimized using BladeDISC
opt = torch_blade.optimize(quant_model)
"""


class Tokens(nn.Module):
    """Takes token ids; the layer "outlier" suffers from int8, whatever its magnitude."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 32)
        self.up = nn.Linear(32, 64)
        self.outlier = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)
        with torch.no_grad():
            self.outlier.weight.mul_(1e-2)
            self.outlier.weight[:, 0] = 3  # one column of large weights, for an input that is 0, takes the codes of all the others
            self.outlier.bias.zero_()
            self.up.weight[0] = 0
            self.up.bias[0] = 0

    def forward(self, ids):
        return self.head(self.outlier(self.up(self.embedding(ids)).relu()) * 1e2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_torch_quant_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Tokens().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blade = types.SimpleNamespace(optimize=torch.compile)
    found = run(TORCH_QUANT, torch=torch, MyModel=lambda: model, torch_blade=blade)
    ids, quantized = found["typical_data"], found["quant_model"]
    assert {name: type(module) for name, module in quantized.named_children()} == {
        "embedding": nn.Embedding,
        "up": qo.QuantLinear,
        "outlier": nn.Linear,
        "head": qo.QuantLinear,
    }
    assert {name: type(module) for name, module in model.named_children()} == {
        "embedding": nn.Embedding,
        "up": nn.Linear,
        "outlier": nn.Linear,
        "head": nn.Linear,
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    expected = model(ids)
    assert (found["output"] - expected).norm() < 0.03 * expected.norm()
    assert torch.equal(torch.jit.load("quant.pt")(ids), found["output"])


def test_torch_quant_filter_backend_and_amp():
    from quant_ops.compat.torch_quant import Backend, Device, ModuleFilter, Quantizer

    model, ids = Tokens().eval(), torch.arange(16)
    quantizer = Quantizer(ModuleFilter(exclude_names=["head"]), Backend.DISC, Device.GPU)
    with pytest.raises(ValueError, match="expected quantize after calib or qat of the same model, got neither"):
        quantizer.quantize(model)
    quantizer.calib(model)(ids)
    amp = quantizer.amp(model)
    with pytest.raises(ValueError, match="expected fallback after a run of the amp model"):
        quantizer.fallback(amp, 1)
    assert torch.equal(amp(ids), model(ids))
    assert not any(module._forward_hooks for module in model.modules())
    assert [layer.name for layer in amp.report()] == ["outlier", "up"]
    assert amp(ids).isfinite().all()
    assert [layer.calls for layer in amp.report()] == [2, 2]
    quantized = quantizer.quantize(model)
    assert type(quantized.head) is nn.Linear
    assert quantized.up.input_zero_point is None
    assert quantizer.fallback(amp, 1) == ["outlier"]
    assert quantizer.module_filter.exclude_names == ["head", "outlier"]
    assert type(quantizer.quantize(model).outlier) is nn.Linear

    only = Quantizer(ModuleFilter(include_classes=[nn.Linear], exclude_names=["up"]))
    only.calib(model)(ids)
    assert type(only.quantize(model).up) is nn.Linear
    assert isinstance(only.quantize(model).head, qo.QuantLinear)
    with pytest.raises(TypeError, match="expected act_ob_ctr to be an observer's name or class"):
        Quantizer(act_ob_ctr=torch.nn.Identity)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(x)


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Conv1d(8, 8, 1), nn.Flatten(0), nn.Linear(72, 4)).eval()


@pytest.mark.parametrize(
    ("settings", "quantized"),
    [
        ({"exclude_classes": [Block]}, {"1", "3"}),
        ({"exclude_classes": ["Block"]}, {"1", "3"}),
        ({"include_classes": [Block]}, {"0.lin"}),
        ({"include_classes": [nn.Linear]}, {"0.lin", "3"}),
        ({"include_classes": [Block], "include_names": ["3"]}, {"0.lin", "3"}),
        ({"include_names": ["0"], "exclude_classes": [nn.Linear]}, set()),
        ({"include_op_types": [nn.Linear]}, {"0.lin", "3"}),
        ({"exclude_op_types": [nn.Linear]}, {"1"}),
        ({"include_op_types": [nn.Linear], "exclude_names": ["0"]}, {"3"}),
    ],
)
@pytest.mark.filterwarnings("ignore:quant_ops.prepare_. expected at least one")
def test_torch_quant_filters(settings, quantized):
    """A container class stands for all within."""
    from quant_ops.compat.torch_quant import ModuleFilter, Quantizer

    model, quantizer = blocks(), Quantizer(ModuleFilter(**settings))
    proxy = quantizer.calib(model)
    with torch.no_grad():
        proxy[3](proxy[2](proxy[1](proxy[0](torch.randn(9, 8)).T)))
    if not quantized:
        with pytest.raises(ValueError, match="expected quantize after calib"):
            quantizer.quantize(model)
        return
    made = quantizer.quantize(model)
    assert {name for name, layer in made.named_modules() if isinstance(layer, Int8Layer)} == quantized


@pytest.mark.parametrize("field", ["include_names", "exclude_names"])
def test_torch_quant_refuses_a_name_that_no_module_has(field):
    from quant_ops.compat.torch_quant import ModuleFilter, Quantizer

    with pytest.raises(ValueError, match=rf"^quant_ops\.ModuleFilter: expected {field} of modules of the model, got \['b1'\]$"):
        Quantizer(ModuleFilter(**{field: ["0", "b1"]})).calib(blocks())


def test_torch_quant_calibration_is_the_models():
    """It goes on with a second calib, is saved, may be quantized by another Quantizer, and training starts from it."""
    from quant_ops.compat.torch_quant import Backend, Quantizer

    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.linspace(-12.7, 12.7, 16).reshape(2, 8)
    Quantizer(backend=Backend.DISC).calib(model)(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Quantizer(backend=Backend.DISC).calib(model)(x / 100)
    made = Quantizer(backend=Backend.DISC).quantize(model)
    assert float(made[0].input_scale) == pytest.approx(0.1)
    assert type(model[0]) is nn.Linear
    resumed = nn.Sequential(nn.Linear(8, 4)).eval()
    quantizer = Quantizer(backend=Backend.DISC)
    quantizer.calib(resumed)
    resumed.load_state_dict(state)
    again = quantizer.quantize(resumed)
    assert torch.equal(again(x), made(x))
    assert again.state_dict().keys() == made.state_dict().keys()
    trained = quantizer.qat(resumed)
    trained(x / 100)
    assert float(trained[0].input_scale.detach()) == pytest.approx(0.1)


def test_torch_quant_observers_of_backends_and_by_class():
    from functools import partial

    from quant_ops.compat import torch_quant as tq

    x = torch.distributions.StudentT(3.0).sample((64, 8))
    for backend, observer, zero_point in (("REFERENCE", "minmax", True), ("DISC", "minmax", False), ("FBGEMM", "histogram", True),
                                          ("MNN", "histogram", False)):  # fmt: skip
        model = nn.Sequential(nn.Linear(8, 4)).eval()
        quantizer = tq.Quantizer(backend=tq.Backend[backend], bias_ob_ctr=tq.BiasObserver)
        quantizer.calib(model)(x)
        layer = quantizer.quantize(model)[0]
        assert (layer.config.observer, layer.input_zero_point is not None) == (observer, zero_point)
    given = partial(tq.HistogramObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    quantizer = tq.Quantizer(act_ob_ctr=given, w_ob_ctr=tq.PerChannelMinMaxObserver)
    quantizer.calib(model, act_ob_ctr=tq.MinMaxObserver)(x)
    assert quantizer.quantize(model)[0].config == qo.Int8Static("minmax")


@pytest.mark.parametrize("device", ["AARCH64", "GPU"])
@pytest.mark.parametrize("backend", ["REFERENCE", "FBGEMM", "MNN"])
def test_torch_quant_refuses_backends_without_observers_for_the_device(backend, device):
    from quant_ops.compat.torch_quant import Backend, Device, MinMaxObserver, Quantizer

    pair = (None, Backend[backend], Device[device])
    with pytest.raises(
        RuntimeError, match=rf"expected Backend\.DISC, .* on Device\.{device}, got Backend\.{backend}\. Pass act_ob_ctr"
    ):
        Quantizer(*pair)
    with pytest.raises(RuntimeError, match=r"expected Backend\.DISC"):
        Quantizer(*pair, act_ob_ctr=MinMaxObserver)
    Quantizer(*pair, act_ob_ctr=MinMaxObserver, w_ob_ctr=MinMaxObserver)
    Quantizer(None, Backend.DISC, Device[device])


def test_torch_quant_toggle_observer():
    from quant_ops.compat.torch_quant import Quantizer, toggle_observer

    model, x = nn.Sequential(Block(), nn.Linear(8, 4)).eval(), torch.linspace(-1, 1, 16).reshape(2, 8)
    quantizer = Quantizer()
    proxy, expected = quantizer.calib(model), model(x)
    with pytest.raises(ValueError, match=r"expected calibrated layers for fake_quant=True, got no data in \['0.lin', '1'\]"):
        toggle_observer(proxy, observe=False, fake_quant=True)
    with pytest.raises(ValueError, match="expected observe or fake_quant, got both"):
        toggle_observer(proxy, observe=True, fake_quant=True)
    proxy(x)
    scale = proxy[1].observer.qparams()[0]

    toggle_observer(proxy, observe=False, fake_quant=True)
    simulated = proxy.train()(100 * x)
    assert not torch.allclose(simulated, model(100 * x))  # clipped
    assert torch.equal(proxy[1].observer.qparams()[0], scale)
    torch.testing.assert_close(proxy(x), quantizer.quantize(model)(x))
    toggle_observer(proxy, observe=False, fake_quant=False)
    assert torch.equal(proxy(100 * x), model(100 * x))
    assert torch.equal(proxy[1].observer.qparams()[0], scale)
    toggle_observer(proxy, observe=True, fake_quant=False)
    assert torch.equal(proxy(2 * x), model(2 * x))
    wider = proxy[1].observer.qparams()[0]
    assert wider > scale
    toggle_observer(proxy, observe=False, fake_quant=True)
    torch.testing.assert_close(proxy(2 * x), quantizer.quantize(model)(2 * x))  # the observers are the model's
    assert torch.equal(quantizer.calib(model)(x), expected)  # observes again
    assert model[1].observer.observe


def test_torch_quant_toggle_observer_keeps_learned_scales():
    from quant_ops.compat.torch_quant import Quantizer, toggle_observer

    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8)
    quantizer = Quantizer()
    quantizer.calib(model)(x)
    proxy = quantizer.qat(model)
    with torch.no_grad():
        proxy[0].input_scale.mul_(2)
    simulated, scale = proxy(x), proxy[0].input_scale.clone()
    toggle_observer(proxy, observe=False, fake_quant=False)
    assert torch.equal(proxy(x), model(x))
    toggle_observer(proxy, observe=True, fake_quant=False)
    proxy(100 * x)
    toggle_observer(proxy, observe=False, fake_quant=True)
    assert torch.equal(proxy[0].input_scale, scale)
    assert torch.equal(proxy(x), simulated)
    fresh = Quantizer().qat(nn.Sequential(nn.Linear(8, 4)))
    toggle_observer(fresh, observe=False, fake_quant=True)
    fresh(x)
    assert float(fresh[0].input_scale.detach()) != 1  # its first batch started it


@pytest.mark.parametrize("trained", [False, True])
def test_torch_quant_methods_for_graph_modules(trained):
    from quant_ops.compat.torch_quant import ModuleFilter, ObserverTypes, Quantizer

    outer = nn.Sequential(nn.Linear(8, 8), blocks()).eval()
    root, x = outer[1], torch.randn(8, 9)
    trace = lambda: torch.fx.symbolic_trace(nn.Sequential(root[0], root[1], root[2], root[3]))  # noqa: E731
    quantizer = Quantizer(ModuleFilter(exclude_names=["0", "1.1"]))
    gm, types = trace(), ObserverTypes("minmax", "minmax")
    calibrated = lambda gm: gm.get_submodule("0.lin")(x.T)  # noqa: E731
    quantizer.calib_gm("1", gm, root, types)
    assert [type(gm.get_submodule(name)).__name__ for name in ("0.lin", "1", "3")] == ["PreparedLinear", "Conv1d", "PreparedLinear"]
    assert calibrated(gm).shape == (9, 8)
    gm.get_submodule("3")(torch.randn(2, 72))
    if trained:
        gm = trace()
        quantizer.qat_gm("1", gm, root, ObserverTypes())
        assert type(gm.get_submodule("3")).__name__ == "QatLinear"
        calibrated(gm).sum().backward()
    gm = trace()
    quantizer.quantize_gm("1", gm, root)
    assert [type(gm.get_submodule(name)) for name in ("0.lin", "1", "3")] == [qo.QuantLinear, nn.Conv1d, qo.QuantLinear]
    assert type(root[3]) is nn.Linear
    with pytest.raises(ValueError, match=r"expected calib_gm with root, .* Call calib\(gm\) instead"):
        quantizer.calib_gm("1", root, root, types)
    with pytest.raises(NotImplementedError, match=r"expected amp\(root\)"):
        quantizer.amp_gm("1", gm, root)
    with pytest.raises(NotImplementedError, match="whose files are not written here"):
        quantizer.export_mnn_params(root, x)


def test_torch_quant_qat_trains_the_models_own_parameters():
    from quant_ops.compat.torch_quant import Quantizer

    model, ids = Tokens(), torch.arange(16)
    quantizer = Quantizer()
    proxy = quantizer.qat(model)
    proxy(ids)
    optimizer = torch.optim.Adam(proxy.parameters(), lr=1e-2)
    before = model.head.weight.detach().clone()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(proxy(ids), ids % 4)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.head.weight, before)
    quantized = quantizer.quantize(model.eval())
    assert (quantized(ids).argmax(1) == ids % 4).float().mean() > 0.8
