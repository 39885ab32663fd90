"""Which layers a converting call takes, with which config, and why it leaves out the others."""

import copy

import pytest
import torch
from models import NAMES, Net, batches
from torch import nn

import quant_ops as qo
from quant_ops.convert.prepared import Prepared, PreparedLinear
from quant_ops.observers import Observer

KINDS = sorted(Observer.kinds)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


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
        ({"config": "int8"}, TypeError, "expected config to be Int8Static, Int8Dynamic or Simulated, got str$"),
        ({"config": {"head": 8}}, TypeError, "expected config to be Int8Static, Int8Dynamic or Simulated, got int$"),
        (
            {"config": {"tail": qo.Int8Static()}},
            ValueError,
            "expected the pattern 'tail' to match a Linear, Conv1d or Conv2d, got none of",
        ),
        ({"include": [nn.LSTM]}, ValueError, "expected the class LSTM to match a Linear, Conv1d or Conv2d, got none of"),
        ({"include": "head"}, TypeError, r"expected include to be a list of patterns, got one str\. Write \['head'\]\."),
    ],
)
def test_wrong_arguments(arguments, kind, message):
    with pytest.raises(kind, match=rf"^quant_ops\.prepare_: {message}"):
        qo.prepare_(Net(), **arguments)


def test_a_static_config_is_not_for_quantize():
    with pytest.raises(
        TypeError, match=r"Int8DynamicInt4Weight or Simulated, got Int8Static\. Use prepare_, calibrate and convert_\.$"
    ):
        qo.quantize_(Net(), qo.Int8Static())


def test_prepared_twice():
    model = Net()
    qo.prepare_(model)
    before = dict(model.named_modules())
    for call in (qo.prepare_, qo.quantize_):
        with pytest.warns(UserWarning, match="got none"):
            result = call(model)
        assert result.converted == []
        assert set(result.skipped) == {(name, "prepared already. convert_ makes it int8") for name in NAMES}
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("call", [qo.prepare_, qo.prepare_qat_, qo.convert_], ids=lambda f: f.__name__)
def test_a_bare_layer(call):
    with pytest.raises(ValueError, match=rf"^quant_ops\.{call.__name__}: expected a model that contains layers, got a bare Linear"):
        call(nn.Linear(2, 2))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("call", [qo.prepare_, qo.prepare_qat_], ids=lambda f: f.__name__)
def test_convert_keeps_the_reason_of_prepare(call, copied):
    model = Net().eval()
    model.extra = nn.Linear(2, 2)
    model.extra.register_forward_hook(lambda *_: None)
    call(model, qo.Int8Dynamic(), exclude=["head"])
    expected = {"head": "excluded by 'head'", "extra": "it has hooks, which a replacement would lose"}
    model.late = nn.Linear(2, 2)
    model = copy.deepcopy(model) if copied else model
    assert dict(qo.convert_(model).skipped) == expected | {"late": "it is not prepared"}
    assert not any("reason" in key for module in model.modules() for key in vars(module))  # forgotten
    assert qo.prepare_(model, include=["head"]).converted == ["head"]
    assert dict(qo.prepare_(nn.Sequential(model.late, nn.Linear(2, 2))).skipped) == {}


# ---- names, sums that are not exact, replaced forwards -------------------------------------------------------------------


def test_an_exact_name_is_no_pattern():
    """In every list of filters and in mappings, where it wins over the patterns before it."""

    def model():
        return nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    assert qo.quantize_(model(), include=["a[0]"]).converted == ["a[0]"]
    assert qo.quantize_(model(), exclude=["a[0]"]).converted == ["a0", "b"]
    made = model()
    qo.quantize_(made, {"*": qo.Int8Dynamic(), "a[0]": qo.Int8Dynamic(weight_bits=4), "b": None})
    assert (made["a[0]"].weight_bits, made["a0"].weight_bits, type(made["b"])) == (4, 8, nn.Linear)
    without = nn.ModuleDict({"a0": nn.Linear(4, 4)})
    assert qo.quantize_(without, include=["a[0]"]).converted == ["a0"]  # a pattern, where no layer has this name


@pytest.mark.parametrize("layer", ["Linear", "Conv2d"])
@pytest.mark.parametrize("call", [qo.quantize_, qo.prepare_, qo.prepare_qat_], ids=lambda f: f.__name__)
def test_sums_that_would_not_be_exact(call, layer):
    """Beyond 65793 products symmetric, with a note; beyond 131071 float, with the reason."""

    def make(products):
        return nn.Linear(products, 1) if layer == "Linear" else nn.Conv2d(products, 1, 1)

    model = nn.ModuleDict({str(n): make(n) for n in (65793, 65794, 131071, 131072)})
    result = call(model)
    assert result.converted == ["65793", "65794", "131071"]
    assert result.skipped == [("131072", "each output sums 131072 products; an int32 sum is exact for at most 131071")]
    assert [name for name, note in result.notes if note.startswith("symmetric: ")] == ["65794", "131071"]
    data = {name: torch.randn(1, int(name), *[1, 1][: 2 * (layer == "Conv2d")]) for name in model}
    expected = {name: made(data[name]).detach() for name, made in model.items()}
    if call is not qo.quantize_:
        qo.convert_(model)
    assert [model[name].config.asymmetric for name in result.converted] == [True, False, False]
    for name, made in model.items():
        assert made(data[name]).isfinite().all()
        assert (made(data[name]) - expected[name]).abs().max() < 0.1


def test_convert_leaves_float_what_was_prepared_otherwise():
    model = nn.ModuleDict({"large": nn.Linear(65794, 1), "small": nn.Linear(4, 4)})
    for name, layer in model.items():
        model[name] = PreparedLinear.from_float(layer, qo.Int8Static(asymmetric=True))
        model[name](torch.randn(2, layer.in_features))
    result = qo.convert_(model)
    assert result.converted == ["small"]
    assert result.skipped == [("large", "its sums with a zero point are not exact. Prepare it as symmetric")]
    assert type(model["large"]) is nn.Linear


def test_a_conversion_that_fails_changes_nothing(monkeypatch):
    """The last layer fails, e.g. for want of memory."""
    model = Net().eval()
    qo.prepare_(model)
    qo.calibrate(model, batches())
    before, state = dict(model.named_modules()), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(self):
        if self.out_features == 4:
            raise MemoryError
        return make(self)

    make = PreparedLinear.to_int8
    monkeypatch.setattr(PreparedLinear, "to_int8", fail)
    with pytest.raises(MemoryError):
        qo.convert_(model)
    assert dict(model.named_modules()) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    monkeypatch.undo()
    assert len(qo.convert_(model).converted) == 5


def test_conversion_in_inference_mode():
    """The layers may be used, copied and loaded into outside of it."""
    x = batches(1)
    for workflow in ("static", "dynamic", "training"):
        model = Net().eval()
        with torch.inference_mode():
            if workflow == "dynamic":
                qo.quantize_(model)
            else:
                (qo.prepare_ if workflow == "static" else qo.prepare_qat_)(model, qo.Int8Static("lsq"))
                qo.calibrate(model, x)
                qo.convert_(model)
            expected = model(x[0]).clone()
        assert torch.equal(copy.deepcopy(model)(x[0]), expected)
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
        assert torch.equal(model(x[0]), expected)
    model = Net().train()
    with torch.inference_mode():
        qo.prepare_qat_(model)
    model(x[0]).sum().backward()
