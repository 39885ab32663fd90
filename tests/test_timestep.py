"""Temporal quantization: which step a layer computes with, how it is counted, compiled, saved and refused."""

import contextlib
import copy
import importlib.util
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import quant_ops as qo

STEPS = 4


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


class Net(nn.Module):
    """A convolution, and a Linear that every forward uses twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.fc(self.fc(x).relu())


def batch(step):
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)) * (step + 1)


def prepared(**settings):
    model = Net().eval()
    qo.prepare_(model, qo.Int8Static(num_steps=STEPS, **settings))
    return model


def converted(**settings):
    model = prepared(**settings)
    for step in range(STEPS):
        with qo.timestep(model, step):
            qo.calibrate(model, [batch(step)])
    qo.convert_(model)
    return model


def single(step, **settings):
    """The model with the scales of one step only."""
    model = Net().eval()
    qo.prepare_(model, qo.Int8Static(**settings))
    qo.calibrate(model, [batch(step)])
    qo.convert_(model)
    return model


# ---- what a step computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_every_step_is_a_model_of_its_own(observer, asymmetric):
    settings = {"observer": observer, "asymmetric": asymmetric}
    model, x = converted(**settings), batch(9)
    assert model.conv.input_scale.shape == model.fc.input_scale.shape == (STEPS,)
    assert (model.conv.input_zero_point is not None) == asymmetric
    assert model.conv.timestep is model.fc.timestep
    assert len(set(model.conv.input_scale.tolist())) == STEPS
    for step in range(STEPS):
        with qo.timestep(model, step):
            assert torch.equal(model(x), single(step, **settings)(x))
    assert torch.equal(model(x), single(0, **settings)(x))  # outside, the step before


def test_the_step_is_restored():
    model = converted()
    with qo.timestep(model, 2):
        with qo.timestep(model, 3):
            assert int(model.fc.timestep) == 3
        assert int(model.fc.timestep) == 2
        with contextlib.suppress(KeyError), qo.timestep(model, torch.tensor(1)):
            assert int(model.fc.timestep) == 1
            raise KeyError
        assert int(model.fc.timestep) == 2
    assert int(model.fc.timestep) == 0


def test_a_layer_used_twice_observes_both_in_its_step():
    model = prepared()
    with qo.timestep(model, 2):
        qo.calibrate(model, [batch(0), batch(1)])
    assert model.fc.observer.count.tolist() == [0, 0, 4, 0]
    assert model.conv.observer.count.tolist() == [0, 0, 2, 0]


def test_steps_without_data():
    model = prepared()
    with qo.timestep(model, 2):
        qo.calibrate(model, [batch(1)])
    result = qo.convert_(model)
    note = "steps [0, 1, 3] had no calibration data and take the widest range of the others"
    assert sorted(result.notes) == [("conv", note), ("fc", note)]
    assert f"int8   conv; {note}" in str(result)
    assert torch.equal(model(batch(9)), single(1)(batch(9)))


def test_layers_with_and_without_steps():
    model = Net().eval()
    qo.prepare_(model, {"conv": qo.Int8Static(num_steps=STEPS), "fc": qo.Int8Static()})
    for step in range(STEPS):
        with qo.timestep(model, step):
            qo.calibrate(model, [batch(step)])
    qo.convert_(model)
    assert model.fc.timestep is None
    assert model.fc.input_scale.dim() == 0
    assert model.conv.num_steps == STEPS
    with qo.timestep(model, STEPS - 1):
        assert model(batch(0)).isfinite().all()


def test_repr():
    assert "input=int8 asymmetric static in 4 steps" in repr(converted())


# ---- counting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls_per_step", [1, 2])
def test_counted_by_forwards_of_the_model(calls_per_step):
    """Not by calls of a layer: ``fc`` is called twice in each forward."""
    model, x = converted(), batch(9)
    for _ in range(2):  # every block starts at 0
        with qo.count_timesteps(model, calls_per_step):
            found = [model(x) for _ in range(STEPS * calls_per_step)]
        for i, y in enumerate(found):
            assert torch.equal(y, single(i // calls_per_step)(x))
    assert int(model.fc.timestep) == 0


def test_calibration_counts_as_well():
    model, explicit = prepared(), prepared()
    with qo.count_timesteps(model):
        qo.calibrate(model, [batch(step) for step in range(STEPS)])
    for step in range(STEPS):
        with qo.timestep(explicit, step):
            qo.calibrate(explicit, [batch(step)])
    for name, value in explicit.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_scheduler_that_makes_a_call_too_many():
    """It uses the last step, is warned of, and shifts no later run."""
    model, x = converted(), batch(9)
    message = r"^quant_ops\.count_timesteps: expected at most 4 \* 1 calls of the model, got 5\."
    for _ in range(2):
        with pytest.warns(UserWarning, match=message), qo.count_timesteps(model):
            found = [model(x) for _ in range(STEPS + 1)]
        for i, y in enumerate(found):
            assert torch.equal(y, single(min(i, STEPS - 1))(x))


def test_wrapping_around():
    model, x = converted(), batch(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with qo.count_timesteps(model, wrap=True):
            found = [model(x) for _ in range(2 * STEPS)]
    assert all(torch.equal(found[i], found[i + STEPS]) for i in range(STEPS))
    assert not torch.equal(found[0], found[1])


def test_no_call_is_warned_of():
    message = r"^quant_ops\.count_timesteps: expected calls of the model, got none"
    with pytest.warns(UserWarning, match=message), qo.count_timesteps(converted()):
        pass


# ---- torch.compile -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    before = torch._dynamo.config.error_on_recompile
    torch._dynamo.config.error_on_recompile = True
    yield lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.config.error_on_recompile = before
    torch._dynamo.reset()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_compiled_once_for_all_steps(compiled, asymmetric):
    model, x = converted(asymmetric=asymmetric), batch(9)
    fast = compiled(model)
    with torch.no_grad():
        for step in [0, 1, 2, 3, 1]:
            for target in (model, fast):  # the step may be set through either
                with qo.timestep(target, step):
                    assert torch.equal(fast(x), single(step, asymmetric=asymmetric)(x))


def test_a_compiled_model_counts(compiled):
    model, x = converted(), batch(9)
    fast = compiled(model)
    with torch.no_grad(), qo.count_timesteps(fast):
        for step in range(STEPS):
            assert torch.equal(fast(x), single(step)(x))


@pytest.mark.slow  # the tests above compile the same graph with aot_eager
def test_compiled_by_inductor():
    torch._dynamo.reset()
    model, x = converted(), batch(9)
    fast = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for step in range(STEPS):
            with qo.timestep(fast, step):
                torch.testing.assert_close(fast(x), single(step)(x), rtol=0.05, atol=0.02)


# ---- moved, copied, saved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.half().float(), lambda m: m.to("cpu")]
)
def test_copies_have_a_step_of_their_own(move):
    original, x = converted(), batch(9)
    model = move(original)
    for step in range(STEPS):
        with qo.timestep(model, step):
            assert torch.equal(model(x), single(step)(x))
            assert model is original or int(original.fc.timestep) == 0


def test_tensors_that_a_move_has_separated_are_joined_again():
    model, x = converted(), batch(9)
    model.fc.timestep = model.fc.timestep.clone()
    with qo.timestep(model, 3):
        assert model.fc.timestep is model.conv.timestep
        assert torch.equal(model(x), single(3)(x))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_saved_with_the_model(asymmetric):
    """The scales are; the current step is not. A fresh layer learns from the checkpoint that it has steps."""
    model, x = converted(asymmetric=asymmetric), batch(9)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert not any("timestep" in name for name in model.state_dict())
    fresh = Net().eval()
    qo.quantize_(fresh)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.fc.num_steps == STEPS
    for step in range(STEPS):
        with qo.timestep(fresh, step):
            assert torch.equal(fresh(x), single(step, asymmetric=asymmetric)(x))


def test_a_prepared_model_is_saved_with_its_steps():
    model, fresh = prepared(), prepared()
    with qo.timestep(model, 1):
        qo.calibrate(model, [batch(0)])
    fresh.load_state_dict(model.state_dict())
    assert fresh.fc.observer.count.tolist() == [0, 2, 0, 0]


# ---- layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [qo.QuantLinear, qo.QuantConv2d])
def test_from_float_with_a_scale_per_step(kind):
    module = nn.Linear(6, 5) if kind is qo.QuantLinear else nn.Conv2d(6, 5, 1)
    scales, zero_points = torch.tensor([0.1, 0.02, 0.3]), torch.tensor([3, -4, 5])
    x = torch.randn(2, 6) if kind is qo.QuantLinear else torch.randn(2, 6, 3, 3)
    layer = kind.from_float(module, input_scale=scales, input_zero_point=zero_points)
    for step in range(3):
        with qo.timestep(layer, step):
            expected = kind.from_float(module, input_scale=scales[step], input_zero_point=zero_points[step])(x)
            assert torch.equal(layer(x), expected)
    broadcast = kind.from_float(module, input_scale=scales, input_zero_point=7)
    assert broadcast.input_zero_point.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_scale": torch.ones(2, 2)}, r"expected input_scale to have one element, or one per step, got shape \(2, 2\)"),
        ({"input_scale": torch.ones(0)}, r"expected input_scale to have one element, or one per step, got shape \(0,\)"),
        ({"input_scale": torch.tensor([1.0, 0.0])}, r"expected input_scale > 0 and finite, got 0\.0"),
        (
            {"input_scale": torch.ones(3), "input_zero_point": torch.ones(2)},
            "expected one input_zero_point for each of 3 steps, got 2",
        ),
        ({"output_scale": torch.ones(2)}, r"expected output_scale to have one element, got shape \(2,\)"),
        ({"weight_scale": torch.ones(3)}, "expected one scale for each of 4 channels, got 3"),
        ({"weight_scale": torch.zeros(4)}, "expected scale > 0 and finite, got"),
    ],
)
def test_wrong_scales(settings, message):
    with pytest.raises(ValueError, match=rf"^quant_ops\.\w+: {message}"):
        qo.QuantLinear.from_float(nn.Linear(4, 4), **settings)


# ---- wrong steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-1, STEPS, 1.5, torch.tensor(STEPS)], ids=str)
def test_a_wrong_step(step):
    model = converted()
    message = r"^quant_ops\.timestep: expected an integer 0 <= step < 4, got "
    with pytest.raises(ValueError, match=message), qo.timestep(model, step):
        pass
    assert int(model.fc.timestep) == 0


def test_the_smallest_number_of_steps_counts():
    model = Net()
    qo.prepare_(model, {"conv": qo.Int8Static(num_steps=3), "fc": qo.Int8Static(num_steps=2)})
    with pytest.raises(ValueError, match="0 <= step < 2, got 2"), qo.timestep(model, 2):
        pass


@pytest.mark.parametrize("call", [lambda m: qo.timestep(m, 0), qo.count_timesteps])
def test_a_model_without_steps(call):
    with (
        pytest.raises(
            ValueError, match=r"^quant_ops\.\w+: expected a model whose layers have scales per step, got none\. Prepare it"
        ),
        call(single(0)),
    ):
        pass


def test_calls_per_step_below_one():
    message = r"^quant_ops\.count_timesteps: expected calls_per_step >= 1, got 0$"
    with pytest.raises(ValueError, match=message), qo.count_timesteps(converted(), 0):
        pass


# ---- the example -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unet", ["small", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_diffusion_example(unet, tmp_path):
    if unet == "diffusers":
        pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("diffusion", Path(__file__).parent.parent / "examples" / "diffusion.py")
    diffusion = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diffusion)
    report = diffusion.main(["--quick", "--unet", unet, "--out", str(tmp_path)])
    assert report["ok"]
    assert report["mean"]["per step"] < 0.95 * report["mean"]["one scale"]
    assert len(report["errors"]["per step"]) == diffusion.STEPS
    for name in ("samples.png", "error.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
