"""quant_ops.autoquant_: what it records, how it chooses, its cache, and that nothing is left behind when it fails."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn

import quant_ops as qo
from quant_ops.autoquant import choice as choice_module
from quant_ops.autoquant.choice import Budget

DYNAMIC, WEIGHT_ONLY, STATIC = qo.Int8Dynamic(), qo.Int8WeightOnly(), qo.Int8Static()
NAMES = {"float": None, DYNAMIC.to_json(): DYNAMIC, WEIGHT_ONLY.to_json(): WEIGHT_ONLY, STATIC.to_json(): STATIC}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.Dropout(0.5)).train()


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(72, 5)
    )


class Decided(qo.TimingCache):
    """Seconds by a function of candidate and key, for whatever is asked."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return self.seconds(NAMES[key.candidate], key)


def fast(*winners):
    """The first is the fastest, and so on; float and what is not named are slow."""
    return Decided(lambda config, key: 1.0 + winners.index(config) if config in winners else 10.0)


def hooks(module):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


def kinds(module):
    return {name: type(layer).__name__ for name, layer in module.named_modules() if name}


# ---- recording and choosing ----------------------------------------------------------------------------------------------


def test_times_everything_and_shows_it():
    net, x, cache = images().eval(), torch.randn(2, 3, 8, 8), qo.TimingCache()
    result = qo.autoquant_(net, x, candidates=(DYNAMIC, WEIGHT_ONLY, STATIC), seconds=0.05, cache=cache)
    assert result.finished
    assert [layer.name for layer in result.layers] == ["0", "2", "4"]
    assert [set(layer.seconds) for layer in result.layers] == [
        {"float", "Int8Dynamic", "Int8Static"},
        {"float", "Int8Dynamic", "Int8Static"},
        {"float", "Int8Dynamic", "Int8WeightOnly", "Int8Static"},
    ]
    assert all(math.isfinite(t) and t > 0 for t in cache.values())
    assert len(cache) == 3 + 3 + 4
    for layer in result.layers:
        best = min(layer.seconds, key=layer.seconds.get)
        assert layer.config is None or type(layer.config).__name__ == best
        assert f"{layer.name}: 1 x {next(iter(layer.inputs))[0]} float32; float " in str(result)
    assert " dB" in str(result)
    key = next(key for key in cache if key.layer == "Linear")
    assert key[1:5] == ((2, 72), (5, 72), (5,), "float32")
    assert (key.device, key.threads, key.weight_dtype, key.autocast) == ("cpu", torch.get_num_threads(), "float32", "")
    grouped = next(key for key in cache if "groups=2" in key.layer)
    assert grouped.activation == (2, 8, 8, 8)
    assert not hooks(net)


@pytest.mark.parametrize("winner", [DYNAMIC, WEIGHT_ONLY, STATIC])
def test_a_cache_decides_alone(winner, monkeypatch):
    monkeypatch.setattr(choice_module, "interleave", None)
    net, x = model(), torch.randn(16, 24)
    before = copy.deepcopy(net).eval()
    result = qo.autoquant_(net, x, candidates=(DYNAMIC, WEIGHT_ONLY, STATIC), cache=fast(winner))
    assert [layer.config for layer in result.layers] == [winner] * 2
    assert net.training
    again = copy.deepcopy(before).train()
    qo.autoquant_(again, x, candidates=(DYNAMIC, WEIGHT_ONLY, STATIC), cache=fast(winner))
    net.eval(), again.eval()
    assert torch.equal(net(x), again(x))
    if winner is STATIC:
        hidden = before[1](before[0](x))
        assert torch.equal(net[2].input_scale, (hidden.max() / 255).detach())
        assert torch.equal(net[0].input_scale, ((x.max() - x.min()) / 255).detach())
    else:
        expected = copy.deepcopy(before)
        qo.quantize_(expected, winner)
        assert torch.equal(net(x), expected(x))


@pytest.mark.parametrize("winner", [DYNAMIC, WEIGHT_ONLY, STATIC])
def test_scaled_layers_keep_their_multiplier(winner):
    layer, x = qo.ScaledLinear.from_linear(nn.Linear(24, 8), torch.rand(24) + 0.5), torch.randn(16, 24)
    net, expected = nn.Sequential(layer).eval(), nn.Sequential(copy.deepcopy(layer)).eval()
    result = qo.autoquant_(net, x, candidates=(DYNAMIC, WEIGHT_ONLY, STATIC), cache=fast(winner))
    assert result.converted == ["0"]
    if winner is STATIC:
        qo.prepare_(expected, STATIC)
        qo.calibrate(expected, [x])
        qo.convert_(expected)
    else:
        qo.quantize_(expected, winner)
    assert torch.equal(net(x), expected(x))


def test_float_is_kept_unless_a_candidate_is_faster():
    for seconds in (1.0, 0.98):
        net = model()
        result = qo.autoquant_(net, torch.randn(16, 24), cache=Decided(lambda config, key, t=seconds: 1.0 if config is None else t))
        assert not result.converted
        assert {layer.reason for layer in result.layers} == {"no candidate is faster"}
        assert kinds(net) == kinds(model())


def test_shapes_are_weighed_by_times_seen():
    """int8 wins a row, float wins 16 rows: what was seen more often decides."""
    times = Decided(lambda config, key: {(True, True): 10.0, (True, False): 1.0}.get((config is None, key.activation[0] == 1), 4.0))
    for rows, layers in (([1, 16, 16], "Linear"), ([1, 1, 16], "QuantLinear")):
        net = model()
        inputs = [torch.randn(n, 24) for n in rows]
        result = qo.autoquant_(net, inputs, candidates=[DYNAMIC], cache=times, forward=lambda net, inputs: [net(x) for x in inputs])
        assert type(net[0]).__name__ == layers
        assert result.layers[0].inputs == {((1, 24), "float32"): rows.count(1), ((16, 24), "float32"): rows.count(16)}
        assert result.layers[0].seconds == {
            "float": 10.0 * rows.count(1) + rows.count(16),
            "Int8Dynamic": 4.0 * 3,
        }


def test_the_error_bound_is_measured():
    """One column of large weights takes the codes of the others; the next best candidate is taken, or float."""
    net, x = model().eval(), torch.randn(64, 24)
    with torch.no_grad():
        net[0].weight[:, 0], x[:, 0] = 300.0, 0.0
    expected = net[0](x).detach().double()
    errors = {}
    for config in (DYNAMIC, WEIGHT_ONLY):
        layer = nn.Sequential(copy.deepcopy(net[0]))
        qo.quantize_(layer, config)
        errors[config] = float((layer(x).detach().double() - expected).square().sum() / expected.square().sum())
    assert errors[DYNAMIC] > 0.01
    result = qo.autoquant_(copy.deepcopy(net), x, cache=fast(DYNAMIC, WEIGHT_ONLY))
    assert result.layers[0].errors == pytest.approx({"Int8Dynamic": errors[DYNAMIC], "Int8WeightOnly": errors[WEIGHT_ONLY]})
    assert result.layers[0].config is None
    assert "is faster, but its error" in result.layers[0].reason
    assert result.layers[1].config == DYNAMIC
    assert qo.autoquant_(copy.deepcopy(net), x, max_error=None, cache=fast(DYNAMIC)).layers[0].config == DYNAMIC


def test_what_cannot_be_a_candidate_says_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head, self.odd = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False), nn.Linear(8, 8)
            self.hooked, self.nan, self.wide = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8).double()
            self.attention, self.left = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            x = self.emb(ids)
            self.hooked(x), self.nan(x / 0), self.wide(x.double()), self.odd(input=x), self.attention(x, x, x), self.left(x)
            return self.head(x)

    net = Net()
    net.hooked.register_forward_hook(lambda *_: None)
    result = qo.autoquant_(net, torch.arange(9), cache=fast(DYNAMIC), exclude=["left"])
    reasons = {layer.name: layer.reason for layer in result.layers} | dict(result.skipped)
    assert reasons == {
        "head": "its weight is tied to that of 'emb', which stays float",
        "odd": "it is called with keyword arguments",
        "nan": "its input held NaN or Inf",
        "wide": "its input is float64, not float32, float16 or bfloat16",
        "hooked": "it has hooks, which a replacement would lose",
        "attention.out_proj": (
            "nn.MultiheadAttention reads the weight itself and never calls the layer. split_attention_ makes it four layers"
        ),
        "left": "excluded by 'left'",
    }
    assert result.converted == ["head"]


def test_fused_encoders_and_autocast_are_seen():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    with torch.autocast("cpu", torch.bfloat16):
        cache = qo.TimingCache()
        result = qo.autoquant_(net, torch.randn(2, 5, 8), seconds=0.0, cache=cache)
    assert [layer.name for layer in result.layers] == ["layers.0.linear1", "layers.0.linear2"]
    assert {(key.autocast, key.weight_dtype) for key in cache} == {("bfloat16", "float32")}
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("winner", [DYNAMIC, WEIGHT_ONLY, STATIC])
def test_inference_mode(winner):
    """The layers can be used outside of it, and moved."""
    net, x = model().eval(), torch.randn(16, 24)
    with torch.inference_mode():
        qo.autoquant_(net, x, candidates=[winner], cache=fast(winner))
        y = net(x)
    assert torch.equal(net(x), y)
    assert not any(tensor.is_inference() for tensor in net.state_dict().values())
    other = model().eval()
    qo.autoquant_(other, x, candidates=[winner], cache=fast(winner))
    assert torch.equal(other(x), y)


def test_nothing_to_choose_for():
    with pytest.warns(UserWarning, match="expected at least one Linear, Conv1d or Conv2d, got none: the model stays as it was"):
        assert not qo.autoquant_(nn.Sequential(nn.Embedding(3, 4)), torch.arange(3)).layers


def test_the_budget_is_shared(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(choice_module.time, "perf_counter", lambda: now[0])
    budget = Budget(0.9, 3)
    assert budget.share() == pytest.approx(0.3)
    now[0] = 0.7
    assert budget.share() == pytest.approx(0.1)
    now[0] = 2.0
    assert budget.share() == 0.0
    assert Budget(100.0, 2).share() == 0.5


def test_interrupted_calls_are_not_counted():
    assert choice_module.undisturbed_median([1.0, 1.2, 30.0, 31.0, 32.0, 1.1]) == 1.1
    assert choice_module.undisturbed_median([2.0]) == 2.0


def test_a_spent_budget_leaves_out_the_shapes_with_the_least_work():
    net, cache = model(), qo.TimingCache()
    rows = [1, 1, 1, 4, 16, 2]
    inputs = [torch.randn(n, 24) for n in rows]
    result = qo.autoquant_(net, inputs, seconds=0.0, cache=cache, forward=lambda net, inputs: [net(x) for x in inputs])
    assert {key.activation for key in cache} == {(16, 24), (16, 40)}
    assert sum(result.layers[0].inputs.values()) == 6
    assert result.layers[0].seconds["float"] == next(t for key, t in cache.items() if key[:2] == ("float", (16, 24)))


# ---- when it chooses -----------------------------------------------------------------------------------------------------


def test_the_first_call_decides():
    net, x = model(), torch.randn(5, 24)
    result = qo.autoquant_(net, cache=fast(WEIGHT_ONLY))
    assert not result.finished
    assert "waiting" in str(result)
    assert kinds(net) == kinds(model())
    net.eval()
    y = net(x)
    assert result.converted == ["0", "2"]
    assert result.layers[0].calls == 1
    assert torch.equal(net(x), y)
    assert not hooks(net)
    with pytest.raises(RuntimeError, match="got one that has chosen already"):
        result.finalize()


@pytest.mark.parametrize("manual", [False, True])
def test_a_compiled_model(manual):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    inner = model().eval()
    compiled, x = torch.compile(inner, backend=backend), torch.randn(5, 24)
    forward = compiled.forward
    result = qo.autoquant_(compiled, cache=fast(DYNAMIC), manual=manual)
    if manual:
        compiled(x), compiled(x[:1]), compiled(x[:1])
        assert not graphs
        assert result.finalize() is result
        assert result.layers[0].inputs == {((5, 24), "float32"): 1, ((1, 24), "float32"): 2}
        assert compiled.forward is forward
    y = compiled(x)
    assert result.converted == ["0", "2"]
    assert [sum("int8_linear" in target for target in graph) for graph in graphs] == [2]
    assert torch.equal(y, inner(x))
    assert not hooks(compiled)
    torch._dynamo.reset()


def test_layers_that_are_compiled_already_are_recorded_eagerly():
    torch._dynamo.reset()
    net = nn.Sequential(torch.compile(model().eval(), backend="eager"))
    net(torch.randn(5, 24))
    assert qo.autoquant_(net, torch.randn(5, 24), cache=fast(DYNAMIC)).converted == ["0._orig_mod.0", "0._orig_mod.2"]
    torch._dynamo.reset()


def test_cancel_and_unseen_layers():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, both=False):
            return self.b(self.a(x)) if both else self.a(x)

    net, x = Branches(), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"^quant_ops\.autoquant_: expected inputs that reach every layer, got none at \['b'\]\. "):
        qo.autoquant_(net, x, cache=fast(DYNAMIC))
    assert (kinds(net), hooks(net)) == (kinds(Branches()), 0)
    result = qo.autoquant_(net, cache=fast(DYNAMIC))
    with pytest.raises(ValueError, match="got none at"):
        net(x)
    assert kinds(net) == kinds(Branches())
    net(x, both=True)  # it went on recording
    assert result.converted == ["a", "b"]
    assert result.layers[0].calls == 2
    net = Branches()
    result = qo.autoquant_(net, x, cache=fast(DYNAMIC), error_on_unseen=False)
    assert (result.converted, result.skipped) == (["a"], [("b", "no input has reached it")])
    net = Branches()
    result = qo.autoquant_(net, manual=True)
    result.cancel()
    assert (kinds(net), hooks(net), str(result)) == (kinds(Branches()), 0, "cancelled")
    with pytest.raises(RuntimeError, match="got one that was cancelled"):
        result.finalize()


@pytest.mark.parametrize("at", [1, 2, "replace"])
def test_an_interruption_leaves_the_model_as_it_was(at, monkeypatch, tmp_path):
    net, x, calls = model(), torch.randn(5, 24), []
    layers = dict(net.named_modules())
    timed = choice_module.interleave

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return timed(*args, **kwargs) if at != "replace" else {name: [1.0 - int(name)] for name in args[0]}

    monkeypatch.setattr(choice_module, "interleave", interrupted)
    if at == "replace":

        def replaced(self, name, value):
            nn.Module.__setattr__(self, name, value)
            if name == "2" and not isinstance(value, nn.Linear):
                raise KeyboardInterrupt

        monkeypatch.setattr(nn.Sequential, "__setattr__", replaced, raising=False)
        monkeypatch.setattr(choice_module, "undisturbed_median", lambda values: 2.0 + values[0])
    path = tmp_path / "times.json"
    with pytest.raises(KeyboardInterrupt):
        qo.autoquant_(net, x, seconds=0.0, cache=path)
    assert dict(net.named_modules()) == layers
    assert hooks(net) == 0
    assert net.training
    assert len(qo.TimingCache.load(path)) == {1: 0, 2: 3, "replace": 6}[at]


# ---- the cache -----------------------------------------------------------------------------------------------------------


def test_the_file_and_the_pickle(tmp_path, monkeypatch):
    path, x = tmp_path / "times.json", torch.randn(16, 24)
    first = qo.autoquant_(model(), x, seconds=0.0, cache=path)
    cache = qo.TimingCache.load(path)
    assert len(cache) == 6
    assert pickle.loads(pickle.dumps(cache)) == cache
    monkeypatch.setattr(choice_module, "interleave", None)
    again = qo.autoquant_(model(), x, cache=path)
    assert [layer.seconds for layer in again.layers] == [layer.seconds for layer in first.layers]
    assert again.converted == first.converted
    threads = torch.get_num_threads()
    assert {key.threads for key in cache} == {threads}
    qo.AUTOQUANT_CACHE.update(cache)
    assert cache.items() <= qo.AUTOQUANT_CACHE.items()
    assert [layer.config for layer in qo.autoquant_(model(), x).layers] == [layer.config for layer in first.layers]


def test_other_machines_and_versions_are_refused(tmp_path, monkeypatch):
    path, x = tmp_path / "times.json", torch.randn(16, 24)
    qo.autoquant_(model(), x, seconds=0.0, cache=path)
    pickled = pickle.dumps(qo.TimingCache.load(path))
    content = json.loads(path.read_text())
    content["measured on"] |= {"cpu": "another", "torch": "1.0"}
    path.write_text(json.dumps(content))
    net = model()
    with pytest.raises(
        ValueError,
        match=r"^quant_ops\.TimingCache\.load: expected times of cpu '.*', torch '.*', got times of cpu 'another', torch '1\.0'\. "
        r"Delete '.*times\.json', give another path, or pass ignore_other=True, which measures anew\.$",
    ):
        qo.autoquant_(net, x, cache=path)
    assert (kinds(net), hooks(net)) == (kinds(model()), 0)
    qo.autoquant_(net, x, seconds=0.0, cache=path, ignore_other=True)
    assert json.loads(path.read_text())["measured on"] == qo.autoquant.cache.here()
    here = qo.autoquant.cache.here()
    monkeypatch.setattr(qo.autoquant.cache, "here", lambda: here | {"instruction set": "another"})
    other = pickle.loads(pickled)
    with pytest.raises(
        ValueError, match=r"TimingCache\.update: expected times of instruction set 'another', got .* dict\(other\)\.$"
    ):
        qo.TimingCache().update(other)
    taken = qo.TimingCache()
    taken.update(dict(other))
    assert taken == other


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "measured on": {}, "fields": [], "times": []}', "a\0b"])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^quant_ops\.TimingCache\.load: expected a file of TimingCache\.save, got '.*', which"):
        qo.autoquant_(model(), torch.randn(5, 24), cache=path)
    assert path.read_text() == text


@pytest.mark.parametrize("change", [{-1: -1.0}, {-1: math.nan}, {-1: "1"}, {9: "2"}, {1: [1.5, 2]}, {0: None}])
def test_a_broken_entry_is_refused(change, tmp_path):
    path = tmp_path / "times.json"
    qo.autoquant_(model(), torch.randn(5, 24), seconds=0.0, cache=path)
    content = json.loads(path.read_text())
    for place, value in change.items():
        content["times"][2][place] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="which cannot be read as one"):
        qo.TimingCache.load(path)


# ---- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"candidates": ()}, ValueError, "expected at least one candidate, got none"),
        ({"candidates": ["int8"]}, TypeError, r"expected candidates to be configs \(Int8Dynamic, .*\), got 'int8'"),
        (
            {"candidates": [qo.Int8Static(num_steps=2)]},
            ValueError,
            r"expected a static candidate with num_steps=1, got 2\. Use prepare_\.",
        ),
        ({"seconds": -1}, ValueError, "expected seconds >= 0, got -1"),
        ({"seconds": math.nan}, ValueError, "expected seconds >= 0, got nan"),
        ({"max_error": 0}, ValueError, "expected max_error > 0 or None, got 0"),
        ({"manual": True}, ValueError, "expected no example_inputs with manual=True, got both.*"),
        ({"cache": 1}, TypeError, r"expected cache to be a TimingCache or the path of one, got int\. Make one with .*"),
        ({"include": ["no"]}, ValueError, "expected the pattern 'no' to match a .*"),
    ],
)
def test_refusals(settings, error, message):
    net = model()
    with pytest.raises(error, match=rf"^quant_ops\.autoquant_: {message}$"):
        qo.autoquant_(net, torch.randn(5, 24), **settings)
    assert (kinds(net), hooks(net)) == (kinds(model()), 0)


def test_a_model_compiled_in_place_needs_inputs():
    torch._dynamo.reset()
    net = model().eval()
    net.compile(backend="eager")
    with pytest.raises(ValueError, match=r"expected example_inputs for a model that its own compile\(\) has compiled, got none"):
        qo.autoquant_(net)
    assert not hooks(net)
    x = torch.randn(5, 24)
    net(x)
    assert qo.autoquant_(net, x, cache=fast(DYNAMIC)).converted == ["0", "2"]
    assert "QuantLinear" in kinds(net).values()
    net(x)
    torch._dynamo.reset()
