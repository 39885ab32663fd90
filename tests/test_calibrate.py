"""prepare_, calibrate, convert_: the layers that come out, on any model, with any data, alone and in two processes."""

import copy
import io
import logging
import pickle
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from torch import nn

import quant_ops as qo
from quant_ops.observers import Observer
from quant_ops.prepared import Prepared, PreparedConv2d, PreparedLinear

KINDS = sorted(Observer.kinds)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect")
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = self.depthwise(self.stem(x).relu()).relu().mean((2, 3))
        return self.head(self.body(x))


NAMES = ["stem", "depthwise", "body.0", "body.2", "head"]


def batches(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(count)]


def inputs(model, data):
    """What every layer sees, all batches in one."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(tensors) for name, tensors in seen.items()}


def sqnr(expected, got):
    expected, got = expected.detach().double(), got.detach().double()
    return float(10 * torch.log10(expected.square().sum() / (expected - got).square().sum()))


# ---- prepared layers are the float layers --------------------------------------------------------------------------------


def test_prepared_layers_compute_the_same_with_the_same_parameters():
    model = Net().eval()
    x = batches(1)[0]
    expected, parameters, keys = model(x), list(model.parameters()), set(model.state_dict())
    result = qo.prepare_(model)
    assert (result.kind, sorted(result.converted), result.skipped) == ("prepared", sorted(NAMES), [])
    assert torch.equal(model(x), expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert keys < set(model.state_dict())
    assert isinstance(model.stem, nn.Conv2d)
    assert isinstance(model.head, PreparedLinear)
    assert "observer='minmax'" in repr(model.head)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_converted_layers_are_those_of_from_float(asymmetric):
    """Bit for bit, with the scales that choose_qparams finds in all that a layer has seen."""
    model, data = Net().eval(), batches()
    seen = inputs(model, data)
    original = copy.deepcopy(model)
    config = qo.Int8Static(asymmetric=asymmetric, weight_bits=5)
    qo.prepare_(model, config)
    assert qo.calibrate(model, data) == 3
    result = qo.convert_(model)
    assert (sorted(result.converted), result.skipped, result.notes) == (sorted(NAMES), [], [])
    for name in NAMES:
        scale, zero_point = qo.choose_qparams(seen[name], [], -128, 127, asymmetric)
        kind = qo.QuantLinear if isinstance(original.get_submodule(name), nn.Linear) else qo.QuantConv2d
        settings = {"input_scale": scale, "input_zero_point": zero_point if asymmetric else None}
        expected = kind.from_float(original.get_submodule(name), weight_bits=5, **settings)
        layer = model.get_submodule(name)
        assert type(layer) is kind
        assert layer.config == config
        assert repr(layer) == repr(expected)
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), expected.buffers(), strict=True))
    assert not any(isinstance(module, (Prepared, Observer)) for module in model.modules())


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_observer(kind, asymmetric):
    model, data = Net().eval(), batches()
    expected = model(data[0])
    qo.prepare_(model, qo.Int8Static(observer=kind, asymmetric=asymmetric))
    qo.calibrate(model, data)
    qo.convert_(model)
    assert sqnr(expected, model(data[0])) > 22


def test_settings_reach_the_observer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    qo.prepare_(model, {"0": qo.Int8Static("percentile", percentile=90.0), "1": qo.Int8Static("ema", momentum=0.5, num_steps=3)})
    assert model[0].observer.percentile == 90.0
    assert (model[1].observer.momentum, model[1].num_steps) == (0.5, 3)


@pytest.mark.parametrize("observer", ["mse", "histogram"])
def test_weight_observer(observer):
    """At 3 bits a searched weight scale has the smaller error in every channel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8))
    model[0].weight.data.copy_(torch.randn(8, 256))
    error = {}
    for weight_observer in ("minmax", observer):
        quantized = copy.deepcopy(model)
        qo.quantize_(quantized, qo.Int8Dynamic(weight_bits=3, weight_observer=weight_observer))
        error[weight_observer] = (quantized[0].dequantize().weight - model[0].weight).square().sum(1)
    assert (error[observer] < 0.8 * error["minmax"]).all()


def test_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    qo.quantize_(model, qo.Int8Dynamic(weight_observer="mse"))
    assert model.head.weight.is_meta
    with torch.device("meta"):
        model = Net()
    assert len(qo.prepare_(model).converted) == 5


def test_config_of_layers():
    model = Net()
    qo.quantize_(model, qo.Int8Dynamic(weight_bits=7))
    assert model.head.config == qo.Int8Dynamic(weight_bits=7)
    assert copy.deepcopy(model).head.config == model.head.config
    assert pickle.loads(pickle.dumps(model)).head.config == model.head.config
    assert qo.QuantLinear.from_float(nn.Linear(2, 2)).config is None


# ---- any model -----------------------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """Control flow on values, and one layer many times in a forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.step = nn.Linear(6, 6)
        self.rare = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(5):
            x = self.step(x)
            if x.abs().max() > 1e6:
                x = self.rare(x)
        return x


def test_control_flow_and_a_layer_used_many_times():
    model, x = Loop().eval(), torch.randn(3, 6)
    seen = inputs(model, [x])["step"]
    assert len(seen) == 15
    qo.prepare_(model)
    qo.calibrate(model, [x])
    assert model.step.observer.count.tolist() == [5]
    result = qo.convert_(model)
    assert model.step.input_scale == qo.choose_qparams(seen, [], -128, 127)[0]
    assert result.converted == ["step"]
    assert result.skipped == [("rare", "no calibration data has reached it")]
    assert type(model.rare) is nn.Linear
    assert set(vars(model.rare)) == set(vars(nn.Linear(2, 2)))
    assert "float  rare: no calibration data has reached it" in str(result)
    assert model(x).isfinite().all()


def test_shared_layers_stay_shared():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": nn.Sequential(nn.ReLU(), shared)})
    forward = lambda m, x: m["b"](m["a"](x))  # noqa: E731
    result = qo.prepare_(model)
    assert sorted(result.converted) == ["a.0", "a.2", "b.1"]
    assert model["a"][0] is model["a"][2] is model["b"][1]
    qo.calibrate(model, [torch.randn(3, 6)], forward)
    assert model["a"][0].observer.count.tolist() == [3]
    assert sorted(qo.convert_(model).converted) == ["a.0", "a.2", "b.1"]
    assert isinstance(model["a"][0], qo.QuantLinear)
    assert model["a"][0] is model["a"][2] is model["b"][1]


def test_a_tied_weight_stays_tied_while_prepared():
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    qo.prepare_(model)
    assert model["head"].weight is model["embedding"].weight


def test_transformer_encoder():
    """Its fused path would never call the layers."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    with torch.no_grad():
        expected = model(x)
        result = qo.prepare_(model)
        assert len(result.converted) == 4
        qo.calibrate(model, [{"src": x, "src_key_padding_mask": mask}, x])
        assert sorted(qo.convert_(model).converted) == sorted(result.converted)
        assert sqnr(expected, model(x)) > 25


def test_an_encoder_of_which_nothing_is_replaced_keeps_its_fast_path():
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1), "head": nn.Linear(32, 2)}
    )
    qo.prepare_(model, include=["head"])
    assert model["encoder"].use_nested_tensor
    assert model["encoder"].layers[0].activation_relu_or_gelu


def test_any_forward_calibrates():
    model, x = Net().eval(), batches(1)[0]
    qo.prepare_(model)
    model(x)
    assert len(qo.convert_(model).converted) == 5


def test_half_precision():
    model = Net().eval().bfloat16()
    x = batches(1)[0].bfloat16()
    expected = model(x)
    qo.prepare_(model, qo.Int8Static("mse"))
    qo.calibrate(model, [x])
    qo.convert_(model)
    assert model(x).dtype == torch.bfloat16
    assert sqnr(expected, model(x)) > 20


# ---- which layers, which config ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [qo.prepare_, qo.prepare_qat_, qo.quantize_], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([nn.Conv2d], [], {"stem", "depthwise"}),
        (["*"], [nn.Conv2d, "head"], {"body.0", "body.2"}),
        ([lambda name, module: getattr(module, "in_features", 0) == 8], [], {"body.0", "head"}),
        (["body.*", nn.Conv2d], [lambda name, module: name.endswith("2")], {"stem", "depthwise", "body.0"}),
    ],
    ids=["class", "exclude", "function", "mixed"],
)
def test_filters(call, include, exclude, expected):
    model = Net()
    result = call(model, include=include, exclude=exclude)
    assert set(result.converted) == expected
    assert {name for name, _ in result.skipped} == set(NAMES) - expected
    assert {n for n, m in model.named_modules() if isinstance(m, (Prepared, qo.QuantLinear, qo.QuantConv2d))} == expected


def test_reasons_name_the_filter():
    def small(name, module):
        return name == "head"

    result = qo.prepare_(Net(), include=[nn.Linear], exclude=[small])
    assert dict(result.skipped)["head"] == "excluded by small"
    assert dict(result.skipped)["stem"] == "not included by [Linear]"


def test_a_config_for_every_layer():
    static, dynamic, low = qo.Int8Static("mse"), qo.Int8Dynamic(asymmetric=True), qo.Int8Static(weight_bits=4)
    model = Net().eval()
    configs = {"head": None, "stem": static, nn.Conv2d: dynamic, lambda name, module: name == "body.0": low}
    result = qo.prepare_(model, configs)
    assert sorted(result.converted) == ["body.0", "depthwise", "stem"]
    skipped = dict(result.skipped)
    assert skipped["head"] == "'head' has no config"
    assert skipped["body.2"].startswith("no config for it among ['head', 'stem', Conv2d, <lambda>]")
    qo.calibrate(model, batches())
    assert sorted(qo.convert_(model).converted) == ["body.0", "depthwise", "stem"]
    assert model.stem.config is static
    assert model.depthwise.config is dynamic
    assert model.depthwise.asymmetric
    assert model.depthwise.input_scale is None
    assert model.get_submodule("body.0").weight_bits == 4
    assert model(batches(1)[0]).isfinite().all()


def test_configs_for_quantize():
    model = Net()
    result = qo.quantize_(model, {"body.*": qo.Int8Dynamic(weight_bits=4), "*": qo.Int8Dynamic()})
    assert len(result.converted) == 5
    assert (model.body[0].weight_bits, model.head.weight_bits) == (4, 8)


def test_one_layer_two_configs():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(
        ValueError, match=r"^quant_ops\.prepare_: expected one config for the layer that is both 'a' and 'b', got Int8St"
    ):
        qo.prepare_(model, {"a": qo.Int8Static(), "b": qo.Int8Static("mse")})
    assert model["a"] is shared


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"config": "int8"}, TypeError, "expected config to be an Int8Static or an Int8Dynamic, got str$"),
        ({"config": {"head": 8}}, TypeError, "expected config to be an Int8Static or an Int8Dynamic, got int$"),
        ({"config": {"tail": qo.Int8Static()}}, ValueError, "expected the pattern 'tail' to match a Linear or Conv2d, got none of"),
        ({"include": [nn.LSTM]}, ValueError, "expected the class LSTM to match a Linear or Conv2d, got none of"),
        ({"include": "head"}, TypeError, r"expected include to be a list of patterns, got one str\. Write \['head'\]\."),
    ],
)
def test_wrong_arguments(arguments, kind, message):
    with pytest.raises(kind, match=rf"^quant_ops\.prepare_: {message}"):
        qo.prepare_(Net(), **arguments)


def test_a_static_config_is_not_for_quantize():
    with pytest.raises(TypeError, match=r"Int8Dynamic, got Int8Static\. Use prepare_, calibrate and convert_\.$"):
        qo.quantize_(Net(), qo.Int8Static())


def test_prepared_twice():
    model = Net()
    qo.prepare_(model)
    before = dict(model.named_modules())
    for call in (qo.prepare_, qo.quantize_):
        result = call(model)
        assert result.converted == []
        assert set(result.skipped) == {(name, "prepared already. convert_ makes it int8") for name in NAMES}
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("call", [qo.prepare_, qo.prepare_qat_, qo.convert_], ids=lambda f: f.__name__)
def test_a_bare_layer(call):
    with pytest.raises(ValueError, match=rf"^quant_ops\.{call.__name__}: expected a model that contains layers, got a bare Linear"):
        call(nn.Linear(2, 2))


# ---- any data ------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, scale=1.0, *, shift=0.0):
        return self.fc(x * scale + shift)


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
    assert float(model.fc.input_scale) == pytest.approx(2 / 127)


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
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    results = [worker.communicate(timeout=120) for worker in workers]
    assert [(out.strip(), worker.returncode) for (out, _), worker in zip(results, workers, strict=True)] == [("equal", 0)] * 2, (
        results
    )


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
    model = Net().eval()
    qo.prepare_(model, qo.Int8Static(observer=kind))
    x = batches(1)[0]
    x[1, 2, 3, 4] = bad
    with pytest.raises(
        ValueError, match=r"^quant_ops\.calibrate: expected finite activations, got NaN or Inf at the inputs of \['stem', "
    ):
        qo.calibrate(model, [*batches(), x])
    before = dict(model.named_modules())
    message = r"^quant_ops\.convert_: expected finite activations in calibration, got NaN or Inf .* at the input of layer 'stem'$"
    with pytest.raises(ValueError, match=message):
        qo.convert_(model)
    assert dict(model.named_modules()) == before
    for module in model.modules():
        if isinstance(module, Prepared):
            module.observer.reset()
    qo.calibrate(model, batches())
    assert len(qo.convert_(model).converted) == 5


def test_a_weight_that_became_nan():
    model = Net().eval()
    qo.prepare_(model)
    qo.calibrate(model, batches())
    model.body[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^quant_ops\.convert_: expected finite weights, got NaN or Inf, in layer 'body\.0'$"):
        qo.convert_(model)
    assert isinstance(model.stem, PreparedConv2d)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_and_a_weight_of_zeros(kind):
    """Scale 1, named in the notes; the output is the bias."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    bias = model[1].bias.detach().clone()
    qo.prepare_(model, qo.Int8Static(observer=kind, weight_observer=kind))
    qo.calibrate(model, [torch.randn(5, 4)])
    result = qo.convert_(model)
    assert result.notes == [("1", "its input was always zero: scale 1")]
    assert "int8   1; its input was always zero: scale 1" in str(result)
    assert torch.equal(model(torch.randn(2, 4)), bias.expand(2, 2))


def test_dynamic_layers_alone_need_no_data():
    model = Net().eval()
    qo.prepare_(model, qo.Int8Dynamic())
    assert len(qo.convert_(model).converted) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"observer": "mean"}, r"expected observer to be one of \['ema', .*\], got 'mean'"),
        ({"weight_observer": None}, r"expected weight_observer to be one of \[.*\], got None"),
        ({"num_steps": 0}, "expected 1 <= num_steps, got 0"),
        ({"num_steps": 2.0}, r"expected 1 <= num_steps, got 2\.0"),
        ({"weight_bits": 9}, "expected 2 <= weight_bits <= 8, got 9"),
        ({"percentile": 50}, "expected 50 < percentile <= 100, got 50"),
        ({"momentum": 0}, "expected 0 < momentum <= 1, got 0"),
    ],
)
def test_wrong_configs(settings, message):
    with pytest.raises(ValueError, match=rf"^quant_ops\.Int8Static: {message}$"):
        qo.Int8Static(**settings)


@pytest.mark.parametrize("settings", [{}, {"observer": "percentile", "percentile": 99.5, "num_steps": 4, "weight_bits": 4}])
def test_config_json_round_trip(settings):
    config = qo.Int8Static(**settings)
    assert qo.config_from_json(config.to_json()) == config
    assert hash(qo.config_from_json(config.to_json())) == hash(config)
