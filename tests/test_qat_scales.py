"""Scales of quantization-aware training: live, learned and kept ones, and where they start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from trained import Net, data, train

import quant_ops as qo
from quant_ops.convert.qat import QatConv2d, QatLinear


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


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
