"""Quantization-aware training: the simulated forward, its gradients, learned and kept scales, and the int8 model at the end."""

import copy
import importlib.util
import io
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import quant_ops as qo
from quant_ops.convert.qat import QatConv2d, QatLinear
from quant_ops.report.error import sqnr


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


CONFIGS = {
    "minmax": qo.Int8Static(),
    "ema": qo.Int8Static(observer="ema", asymmetric=True),
    "lsq": qo.Int8Static(observer="lsq", weight_bits=4, weight_observer="mse"),
    "lsq asymmetric": qo.Int8Static(observer="lsq", asymmetric=True),
    "dynamic": qo.Int8Dynamic(weight_bits=4),
    "dynamic asymmetric": qo.Int8Dynamic(asymmetric=True),
    "searched weights": qo.Int8Static(weight_bits=3, weight_observer="histogram"),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.grouped(self.conv(x).relu()).relu().mean((2, 3)))


def data(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 3, 6, 6, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(count)]


def train(model, steps, lr=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for x, y in steps:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


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


# ---- scales: live, learned, kept -----------------------------------------------------------------------------------------


def test_parameters_are_the_same_objects_and_learned_scales_are_new_ones():
    model = Net()
    before = dict(model.named_parameters())
    qo.prepare_qat_(model, qo.Int8Static())
    assert dict(model.named_parameters()).keys() == before.keys()
    model = Net()
    before = dict(model.named_parameters())
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq", asymmetric=True))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    learned = {"weight_scale", "input_scale", "input_zero_point"}
    assert after.keys() - before.keys() == {f"{layer}.{name}" for layer in ("conv", "grouped", "fc") for name in learned}
    assert isinstance(model.conv, QatConv2d)
    assert isinstance(model.fc, QatLinear)


def test_live_scales_follow_in_training_only():
    model = nn.Sequential(nn.Linear(4, 4))
    qo.prepare_qat_(model, qo.Int8Static())
    model.train()(torch.ones(2, 4))
    model(torch.full((2, 4), 5.0))
    model.eval()(torch.full((2, 4), 9.0))
    assert float(model[0].observer.max) == 5
    fresh = nn.Sequential(nn.Linear(4, 4)).eval()
    qo.prepare_qat_(fresh, qo.Int8Static())
    assert fresh(torch.ones(2, 4)).isfinite().all()  # the first batch counts in any mode
    assert float(fresh[0].observer.max) == 1


@pytest.mark.parametrize("observer", ["mse", "histogram", "percentile", "entropy"])
def test_searched_scales_stay_as_calibrated(observer):
    model, config = Net(), qo.Int8Static(observer=observer, asymmetric=True)
    qo.prepare_qat_(model, config)
    batches = [x for x, _ in data()]
    qo.calibrate(model, batches)
    static = Net()
    qo.prepare_(static, config)
    qo.calibrate(static, batches)
    scale, zero_point = static.fc.observer.qparams()
    assert not isinstance(model.fc.input_scale, nn.Parameter)
    train(model, data(seed=5))
    assert torch.equal(model.fc.input_scale, scale)
    qo.convert_(model)
    assert torch.equal(model.fc.input_scale, scale)
    assert torch.equal(model.fc.input_zero_point, zero_point)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_learned_scales_start_from_the_first_batch_or_from_calibration(asymmetric):
    x = [batch for batch, _ in data()]
    first, calibrated = Net(), Net()
    for model in (first, calibrated):
        qo.prepare_qat_(model, qo.Int8Static(observer="lsq", asymmetric=asymmetric))
    first(x[0])
    qo.calibrate(calibrated, x)
    assert (
        first.conv.input_scale == qo.choose_qparams(x[0], [], -128, 127, asymmetric)[0]
    )  # less than LSQ's rule, which would clip nothing either
    assert calibrated.conv.input_scale == qo.choose_qparams(torch.cat(x), [], -128, 127, asymmetric)[0]
    before = calibrated.conv.input_scale.detach().clone()
    calibrated(10 * x[0])
    assert torch.equal(calibrated.conv.input_scale, before)


@pytest.mark.parametrize("observer", ["minmax", "lsq", "mse"])
def test_from_a_prepared_model(observer):
    """What has been observed is taken over, with the layer's own config by default."""
    x = [batch for batch, _ in data()]
    model = Net()
    qo.prepare_(model, qo.Int8Static(observer=observer, weight_bits=6))
    qo.calibrate(model, x)
    scale, _ = model.fc.observer.qparams()
    result = qo.prepare_qat_(model)
    assert sorted(result.converted) == ["conv", "fc", "grouped"]
    assert model.fc.config == qo.Int8Static(observer=observer, weight_bits=6)
    model.eval()(x[0])
    assert model.fc.input_qparams()["input_scale"] == scale
    assert len(qo.convert_(model).converted) == 3


def test_learning_starts_from_another_observer():
    x = [batch for batch, _ in data()]
    model = Net()
    qo.prepare_(model, qo.Int8Static(observer="mse"))
    qo.calibrate(model, x)
    scale, _ = model.fc.observer.qparams()
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq"))
    assert model.fc.input_scale == scale
    assert isinstance(model.fc.input_scale, nn.Parameter)


def test_every_step_learns_its_own_scale():
    model = Net()
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq", num_steps=3))
    x, y = data(1)[0]
    for step in range(3):
        with qo.timestep(model, step):
            qo.calibrate(model, [x * (step + 1)])
    before = model.conv.input_scale.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with qo.timestep(model, 1):
        loss = F.mse_loss(model(2 * x), y)
    loss.backward()  # after the block: the step has been left
    optimizer.step()
    changed = model.conv.input_scale != before
    assert changed.tolist() == [False, True, False]
    assert qo.convert_(model).notes == []
    assert model.conv.input_scale.shape == (3,)


def test_a_step_that_training_has_started_itself():
    model = nn.Sequential(nn.Linear(4, 4))
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq", num_steps=2))
    for step in range(2):
        with qo.timestep(model, step):
            model(torch.randn(2, 4)).sum().backward()
    note = "steps [1] had no calibration data and started from the widest range of the others"
    assert qo.convert_(model).notes == [("0", note)]


@pytest.mark.parametrize("observer", ["minmax", "ema", "lsq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_changes_no_scale(observer, bad):
    """As in a step that loss scaling skips; also as the first batch of all."""
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    poisoned = x.clone()
    poisoned[0, 0] = bad
    outputs = []
    for batches in ([x, x], [poisoned, x, poisoned, x]):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 4))
        qo.prepare_qat_(layers, qo.Int8Static(observer=observer))
        outputs.append([layers(batch).detach() for batch in batches][-1])
        notes = qo.convert_(layers).notes
    assert torch.equal(*outputs)
    assert notes == [("0", f"NaN or Inf at its input: {'1 batch' if observer == 'lsq' else '2 batches'} left out")]


def test_learned_scales_do_not_start_on_zeros():
    """An input of zeros says nothing; a channel of zeros, as of a layer that starts at zero, takes the scale of the others."""
    x = data(1)[0][0]
    model, expected = Net(), Net()
    for each in (model, expected):
        nn.init.zeros_(each.fc.weight)
        with torch.no_grad():
            each.conv.weight[0] = 0
        qo.prepare_qat_(each, qo.Int8Static(observer="lsq"))
    model(torch.zeros_like(x))
    model(x)
    expected(x)
    assert torch.equal(model.conv.input_scale, expected.conv.input_scale)
    assert model.conv.weight_scale[0] == model.conv.weight_scale.max() < 0.01
    assert torch.allclose(model.fc.weight_scale, torch.full((4, 1), 8**-0.5 / 127))
    calibrated = nn.Sequential(nn.Linear(4, 4))
    qo.prepare_qat_(calibrated, qo.Int8Static(observer="lsq"))
    qo.calibrate(calibrated, [torch.zeros(2, 4)])
    assert qo.convert_(copy.deepcopy(calibrated)).notes == [("0", "its input was always zero: scale 1")]
    calibrated(torch.ones(2, 4))
    assert float(calibrated[0].input_scale.detach()) == pytest.approx(1 / 255)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("observer", ["lsq", "ema"])
def test_an_averaged_copy_keeps_its_own_scales(observer, buffers):
    """Made before training, and evaluated first on data of another range."""
    if observer == "ema" and not buffers:
        pytest.skip("statistics are buffers")
    model = nn.Sequential(nn.Linear(6, 4))
    qo.prepare_qat_(model, qo.Int8Static(observer=observer))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=buffers)
    for _ in range(4):
        model(torch.randn(8, 6))
        averaged.update_parameters(model)
    averaged.eval()
    before = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    averaged(100 * torch.randn(8, 6))
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    if observer == "lsq":
        assert 0.01 < float(averaged.module[0].input_scale.detach()) < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("observer", ["minmax", "ema", "lsq"])
def test_gradient_checkpointing_counts_a_batch_once(observer, reentrant):
    states = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
        qo.prepare_qat_(model, qo.Int8Static(observer=observer))
        for i in range(3):
            x = (torch.randn(8, 6) * (i + 1)).requires_grad_()
            (checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)).sum().backward()
        states.append({**model.state_dict(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, expected in states[0].items():
        assert torch.equal(states[1][name], expected), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_float32_whatever_the_default_and_the_models_dtype(dtype):
    """A layer that was made under a default dtype, or cast after its calibration, has the scales of one that was not."""
    x = [torch.randn(8, 6)]
    for config in (qo.Int8Static(observer="lsq", asymmetric=True), qo.Int8Static(observer="mse", asymmetric=True)):
        models = [nn.Sequential(nn.Linear(6, 4)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        for model, default in zip(models, (torch.float32, dtype), strict=True):
            torch.set_default_dtype(default)
            try:
                qo.prepare_qat_(model, config)
            finally:
                torch.set_default_dtype(torch.float32)
            qo.calibrate(model, x)
        if config.observer == "lsq":
            models[1](x[0]).sum().backward()
        models[1].to(dtype)
        for name in ("weight_scale", "input_scale", "input_zero_point"):
            expected, got = (getattr(model[0], name) for model in models)
            if expected is not None:
                assert got.dtype == torch.float32, name
                assert torch.equal(got, expected), name
                assert got.grad is None or got.grad.dtype == torch.float32
        assert models[1](x[0].to(dtype)).dtype == dtype
        assert len(qo.convert_(models[1]).converted) == 1


def test_a_state_whose_learned_scales_have_no_dimension():
    model = nn.Sequential(nn.Linear(6, 4))
    qo.prepare_qat_(model, qo.Int8Static(observer="lsq", asymmetric=True))
    model(torch.randn(8, 6))
    assert all(parameter.dim() > 0 for parameter in model.parameters())
    state = model.state_dict()
    for name in ("0.input_scale", "0.input_zero_point"):
        state[name] = state[name].reshape(())
    loaded = nn.Sequential(nn.Linear(6, 4))
    qo.prepare_qat_(loaded, qo.Int8Static(observer="lsq", asymmetric=True))
    loaded.load_state_dict(state)
    x = torch.randn(8, 6)
    assert torch.equal(loaded(x), model(x))


# ---- BatchNorm, saving, compiling, several processes ---------------------------------------------------------------------


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


def test_two_processes_train_one_model(tmp_path):
    """DistributedDataParallel: after each step both have the same parameters, those of one process with both batches."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            import torch
            import torch.distributed as dist
            import torch.nn.functional as F
            from torch import nn
            import quant_ops as qo

            rank, folder = int(sys.argv[1]), sys.argv[2]
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

            def make(config):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
                qo.prepare_qat_(model, config)
                return model

            torch.manual_seed(1)
            steps = [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(5)]
            for config in (qo.Int8Static(observer="lsq", weight_bits=4), qo.Int8Static(), qo.Int8Dynamic(weight_bits=4)):
                one, two = make(config), make(config)
                if isinstance(config, qo.Int8Static):
                    for model in (one, two):
                        qo.calibrate(model, [x for x, _ in steps])
                both = nn.parallel.DistributedDataParallel(two)
                half = slice(4 * rank, 4 * rank + 4)
                for model, part in ((one, slice(None)), (both, half)):
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                    for x, y in steps:
                        optimizer.zero_grad()
                        F.mse_loss(model(x[part]), y[part]).backward()
                        optimizer.step()
                for (name, expected), got in zip(one.named_parameters(), two.parameters()):
                    others = [torch.zeros_like(got) for _ in range(2)]
                    dist.all_gather(others, got.detach())
                    assert torch.equal(*others), (config, name)
                    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=name)
                assert len(qo.convert_(two).converted) == 2
            fresh = make(qo.Int8Static(observer="lsq"))
            try:
                fresh(steps[0][0])
            except RuntimeError as error:
                print("refused" if "several processes would start differently" in str(error) else error, flush=True)
            dist.barrier()
            os._exit(0)
            """
        )
    )
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    results = [worker.communicate(timeout=120) for worker in workers]
    assert [(out.strip(), worker.returncode) for (out, _), worker in zip(results, workers, strict=True)] == [("refused", 0)] * 2, (
        results
    )


def test_two_processes_train_a_sharded_model(tmp_path):
    """FSDP2: the parameters are those of one process, and the converted model that of the gathered state."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            import torch
            import torch.distributed as dist
            import torch.nn.functional as F
            from torch import nn
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            import quant_ops as qo

            rank, folder = int(sys.argv[1]), sys.argv[2]
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
            mesh = init_device_mesh("cpu", (2,))

            def make(config):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
                qo.prepare_qat_(model, config)
                torch.manual_seed(1)
                if not isinstance(config, qo.Int8Dynamic):
                    qo.calibrate(model, [torch.randn(8, 6)])
                return model.train()

            torch.manual_seed(5)
            steps = [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(4)]
            configs = [qo.Int8Static(observer="lsq"), qo.Int8Static(observer="lsq", num_steps=2, asymmetric=False)]
            for config in [*configs, qo.Int8Static(observer="mse"), qo.Int8Dynamic(weight_bits=4)]:
                one, two = make(config), make(config)
                for layer in two:
                    if isinstance(layer, nn.Linear):
                        fully_shard(layer, mesh=mesh)
                fully_shard(two, mesh=mesh)
                optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (one, two)]
                for x, y in steps:
                    for m, o in zip((one, two), optimizers):
                        o.zero_grad()
                        F.mse_loss(m(x), y).backward()
                        o.step()
                for (name, expected), (_, got) in zip(one.named_parameters(), two.named_parameters()):
                    torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-4, atol=1e-6, msg=name)
                state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in two.state_dict().items()}
                whole = make(config)
                whole.load_state_dict(state)
                assert len(qo.convert_(whole).converted) == 2
                qo.convert_(one)
                torch.testing.assert_close(whole(steps[0][0]), one(steps[0][0]), rtol=1e-2, atol=1e-2)
                assert len(qo.convert_(two).converted) == 2
                for (name, expected), got in zip(whole.state_dict().items(), two.state_dict().values(), strict=True):
                    assert torch.equal(got, expected), (config, name)
            print("equal", flush=True)
            dist.barrier()
            os._exit(0)
            """
        )
    )
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    results = [worker.communicate(timeout=120) for worker in workers]
    assert [(out.strip(), worker.returncode) for (out, _), worker in zip(results, workers, strict=True)] == [("equal", 0)] * 2, (
        results
    )


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
