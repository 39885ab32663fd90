"""calibrate: any data, continued, in two processes, and what it refuses."""

import copy
import io
import logging
import sys
import textwrap
import types

import pytest
import torch
from models import Net, Two, batches
from processes import Started
from torch import nn

import quant_ops as qo
from quant_ops.convert.prepared import PreparedLinear
from quant_ops.observers import Observer

KINDS = sorted(Observer.kinds)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


@pytest.mark.parametrize(
    ("data", "forward", "top"),
    [
        ([torch.ones(2, 4)], None, 1),
        ([(torch.ones(2, 4), 3.0)], None, 3),
        ([[torch.ones(2, 4), torch.tensor(4.0)]], None, 4),
        ([{"x": torch.ones(2, 4), "shift": 4.0}], None, 5),
        (({"x": torch.ones(2, 4), "scale": float(i)} for i in range(7)), None, 6),
        ([(torch.ones(2, 4), torch.tensor([0, 1]))], lambda model, batch: model(batch[0]), 1),
    ],
    ids=["tensor", "tuple", "list", "dict", "generator", "forward"],
)
def test_batches(data, forward, top):
    model = Two()
    qo.prepare_(model)
    qo.calibrate(model, data, forward)
    assert float(model.fc.observer.max) == top


def test_a_data_loader():
    data = torch.utils.data.TensorDataset(torch.arange(40.0).reshape(10, 4))
    model = Two()
    qo.prepare_(model)
    assert qo.calibrate(model, torch.utils.data.DataLoader(data, batch_size=3)) == 4
    assert float(model.fc.observer.max) == 39


def test_steps_end_it_early():
    seen = []

    def data():
        for i in range(10):
            seen.append(i)
            yield torch.full((1, 4), float(i))

    model = Two()
    qo.prepare_(model)
    assert qo.calibrate(model, data(), steps=3) == 3
    assert seen == [0, 1, 2]
    assert float(model.fc.observer.max) == 2
    assert qo.calibrate(model, [torch.full((1, 4), 7.0)], steps=5) == 1  # goes on
    assert float(model.fc.observer.max) == 7


def test_modes_gradients_and_parameters_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.train()
    model[2].eval()
    qo.prepare_(model)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]

    def forward(model, batch):
        assert not any(module.training for module in model.modules())
        assert not model(batch).requires_grad

    qo.calibrate(model, [torch.randn(3, 4)], forward)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items() if "observer" not in key)
    assert torch.is_grad_enabled()


def test_an_error_in_the_model_restores_the_mode():
    model = Two().train()
    qo.prepare_(model)
    with pytest.raises(RuntimeError):
        qo.calibrate(model, [torch.randn(2, 5)])
    assert model.training
    assert model.fc.training


def test_an_interrupt_keeps_what_it_has(caplog):
    def data():
        yield torch.ones(1, 4)
        yield torch.full((1, 4), 2.0)
        raise KeyboardInterrupt

    model = Two().train()
    qo.prepare_(model)
    with caplog.at_level(logging.WARNING, logger="quant_ops"):
        assert qo.calibrate(model, data()) == 2
    assert "interrupted after 2 batches" in caplog.text
    assert model.training
    qo.convert_(model)
    assert float(model.fc.input_scale) == pytest.approx(2 / 255)


def test_an_interrupt_before_the_first_batch():
    def data():
        raise KeyboardInterrupt
        yield

    model = Two()
    qo.prepare_(model)
    with pytest.raises(KeyboardInterrupt):
        qo.calibrate(model, data())


def test_progress(monkeypatch, capfd):
    """tqdm decides by the terminal (disable=None); without tqdm nothing is shown."""
    calls = []
    fake = types.ModuleType("tqdm")
    fake.tqdm = lambda data, **settings: calls.append(settings) or data
    monkeypatch.setitem(sys.modules, "tqdm", fake)
    model = Two()
    qo.prepare_(model)
    qo.calibrate(model, [torch.randn(1, 4)] * 5, steps=3)
    qo.calibrate(model, iter([torch.randn(1, 4)]))
    assert [call["total"] for call in calls] == [3, None]
    assert all(call["disable"] is None for call in calls)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    qo.calibrate(model, [torch.randn(1, 4)])
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# ---- saved and continued, and in several processes -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_continued(kind):
    data = batches(4)
    config = qo.Int8Static(observer=kind, asymmetric=True)
    whole, first = Net().eval(), Net().eval()
    for model in (whole, first):
        qo.prepare_(model, config)
    qo.calibrate(whole, data)
    qo.calibrate(first, data[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = Net().eval()
    qo.prepare_(resumed, config)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    qo.calibrate(resumed, data[2:])
    for model in (whole, resumed):
        qo.convert_(model)
    for (name, expected), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, got), name


def test_two_processes_are_one_that_saw_all(tmp_path):
    """Each calibrates on half of the data; one of them alone reaches a layer."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            import torch
            import torch.distributed as dist
            from torch import nn
            import quant_ops as qo

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    torch.manual_seed(0)
                    self.a, self.b, self.rare = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

                def forward(self, x):
                    x = self.b(self.a(x).relu())
                    return self.rare(x) if x.abs().max() > 3 else x

            rank, folder = int(sys.argv[1]), sys.argv[2]
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
            torch.manual_seed(1)
            data = [torch.randn(5, 6) * (i + 1) for i in range(6)]
            for kind in ("minmax", "ema", "percentile", "mse", "entropy", "histogram", "lsq"):
                config = qo.Int8Static(observer=kind, asymmetric=kind != "entropy")
                one, two = Net().eval(), Net().eval()
                for model in (one, two):
                    qo.prepare_(model, config)
                qo.calibrate(one, data)
                qo.calibrate(two, data[:3] if rank == 0 else data[3:])
                assert rank == 1 or two.rare.observer.empty
                qo.synchronize_(two)
                for name in ("a", "b", "rare"):
                    mine, all_of = (getattr(m, name).observer for m in (two, one))
                    for key, expected in all_of.state_dict().items():
                        got = mine.state_dict()[key]
                        if not key.startswith("average"):  # an average of the processes', whose order is lost
                            assert torch.allclose(got, expected, rtol=1e-12, atol=0, equal_nan=True), (kind, name, key)
                    if kind not in ("ema", "lsq"):
                        assert all(torch.equal(a, b) for a, b in zip(mine.qparams(), all_of.qparams())), (kind, name)
                scales = [torch.zeros(3) for _ in range(2)]
                dist.all_gather(scales, torch.stack([getattr(two, n).observer.qparams()[0] for n in ("a", "b", "rare")]))
                assert torch.equal(*scales), kind
            print("equal", flush=True)
            dist.barrier()
            os._exit(0)
            """
        )
    )
    workers = [Started(script, rank, tmp_path) for rank in range(2)]
    results = [worker.result(120) for worker in workers]
    assert [(done.stdout.strip(), done.returncode) for done in results] == [("equal", 0)] * 2, results


# ---- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda m: qo.calibrate(m, [torch.ones(1)]), qo.convert_, qo.synchronize_])
def test_not_prepared(call):
    with pytest.raises(
        ValueError, match=r"^quant_ops\.\w+: expected a prepared model, got one without prepared layers\. Call prepare_ "
    ):
        call(Net())


def test_no_calibration_data():
    model = Two()
    qo.prepare_(model)
    with pytest.raises(ValueError, match=r"^quant_ops\.calibrate: expected calibration data, got no batch\."):
        qo.calibrate(model, iter([]))
    with pytest.raises(
        ValueError, match=r"^quant_ops\.convert_: expected calibration data, got none in any layer\. Call calibrate first\.$"
    ):
        qo.convert_(model)
    assert isinstance(model.fc, PreparedLinear)


@pytest.mark.parametrize("data", [torch.ones(2, 4), {"x": torch.ones(2, 4)}], ids=["tensor", "dict"])
def test_one_batch_instead_of_many(data):
    model = Two()
    qo.prepare_(model)
    with pytest.raises(
        TypeError, match=r"^quant_ops\.calibrate: expected an iterable of batches, got one \w+\. Write \[batch\]\.$"
    ):
        qo.calibrate(model, data)


def test_steps_below_one():
    model = Two()
    qo.prepare_(model)
    with pytest.raises(ValueError, match=r"^quant_ops\.calibrate: expected steps >= 1, got 0$"):
        qo.calibrate(model, [torch.ones(2, 4)], steps=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_are_not_finite(kind, bad):
    """The batch is left out, with a warning and a note."""
    models = Net().eval(), Net().eval()
    for model in models:
        qo.prepare_(model, qo.Int8Static(observer=kind))
    x = batches(1)[0]
    x[1, 2, 3, 4] = bad
    with pytest.warns(
        UserWarning, match=r"^quant_ops\.calibrate: expected finite activations, got .* at the inputs of stem \(1\), "
    ):
        qo.calibrate(models[0], [*batches(), x])
    qo.calibrate(models[1], batches())
    results = [qo.convert_(model) for model in models]
    assert len(results[0].converted) == 5
    assert results[0].notes == [(name, "NaN or Inf at its input: 1 batch left out") for name in results[0].converted]
    assert results[1].notes == []
    for (name, expected), got in zip(models[1].state_dict().items(), models[0].state_dict().values(), strict=True):
        assert torch.equal(got, expected), name


def test_no_batch_is_finite():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    qo.prepare_(model)
    with pytest.warns(UserWarning, match="got batches with NaN or Inf"):
        qo.calibrate(model, [torch.full((2, 4), float("nan"))])
    with pytest.raises(ValueError, match=r"^quant_ops\.convert_: expected calibration data, got batches with NaN or Inf alone\."):
        qo.convert_(model)
    assert isinstance(model[0], PreparedLinear)
    qo.calibrate(model[1:], [torch.ones(2, 4)])
    reason = "its input held NaN or Inf in every batch (1 batch)"
    assert qo.convert_(model).skipped == [("0", reason)]
