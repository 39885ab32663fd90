"""quantize_: what it converts, what it leaves and why, and what it must not break."""

import copy
import dataclasses
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import quant_ops as qo
from quant_ops._models import show_bytes
from quant_ops.convert import config


def sqnr(expected, got):
    """Signal to quantization noise in dB."""
    expected, got = expected.detach().double(), got.detach().double()
    return float(10 * torch.log10(expected.square().sum() / (expected - got).square().sum()))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu().mean((2, 3))
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.head(x)


NAMES = ["stem", "head", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def quantized(model):
    return {name for name, module in model.named_modules() if isinstance(module, (qo.QuantLinear, qo.QuantConv2d))}


# ---- what is converted ---------------------------------------------------------------------------------------------------


def test_everything_by_default():
    model = Net().eval()
    x = torch.randn(5, 3, 6, 6)
    expected = model(x)
    result = qo.quantize_(model)
    assert sorted(result.converted) == sorted(NAMES)
    assert result.skipped == []
    assert quantized(model) == set(NAMES)
    assert sqnr(expected, model(x)) > 35
    assert not list(model.parameters())


def test_each_layer_is_what_from_float_makes():
    model, original = Net(), Net()
    qo.quantize_(model, qo.Int8Dynamic(asymmetric=True, weight_bits=5))
    for name in NAMES:
        layer = model.get_submodule(name)
        float_layer = original.get_submodule(name)
        expected = type(layer).from_float(float_layer, asymmetric=True, weight_bits=5)
        assert repr(layer) == repr(expected)
        assert layer.qweight.abs().max() == 15
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), expected.buffers(), strict=True))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], ["head"], set(NAMES) - {"head"}),
        (["blocks.*"], [], {n for n in NAMES if n.startswith("blocks")}),
        (["blocks.*"], ["*.down"], {"blocks.0.up", "blocks.1.up"}),
        (["*.up", "stem"], [], {"stem", "blocks.0.up", "blocks.1.up"}),
        (["*"], ["*"], set()),
        (["blocks.[0].*"], (), {"blocks.0.up", "blocks.0.down"}),
        (("head",), ("stem",), {"head"}),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    model = Net()
    result = qo.quantize_(model, include=include, exclude=exclude)
    assert set(result.converted) == quantized(model) == expected
    reasons = dict(result.skipped)
    assert set(reasons) == set(NAMES) - expected
    for name, reason in reasons.items():
        excluding = [p for p in exclude if p in (name, "*") or (p == "*.down" and name.endswith("down"))]
        assert reason == (f"excluded by {excluding[0]!r}" if excluding else f"not included by {list(include)}")
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 4)


def test_result_is_printed_and_logged(caplog):
    with caplog.at_level(logging.INFO, logger="quant_ops"):
        result = qo.quantize_(Net(), include=["head", "stem"], exclude=["head"])
    lines = str(result).splitlines()
    assert lines[0] == "1 converted, 5 skipped"
    assert lines[1].startswith("int8: 28.4 % of the weights, 3.28 kB -> ")  # 216 of 760
    assert "  int8   stem" in lines
    assert "  float  head: excluded by 'head'" in lines
    assert str(result) in caplog.text


def test_again_does_nothing():
    model = Net()
    qo.quantize_(model)
    before = dict(model.named_modules())
    first = qo.quantize_(Net())
    with pytest.warns(UserWarning, match="expected at least one Linear, Conv1d or Conv2d to convert, got none"):
        result = qo.quantize_(model, include=first.converted)  # patterns may name layers that are int8 already
    assert result.converted == []
    assert result.skipped == [(name, "int8 already") for name in first.converted]
    assert "  int8   stem: int8 already" in str(result).splitlines()
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_is_kept(training):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Sequential(nn.Linear(4, 4))).train(training)
    qo.quantize_(model)
    assert [m.training for m in model.modules()] == [training] * 5
    assert model.eval()(torch.randn(2, 4)).shape == (2, 4)


# ---- shared modules and shared weights -----------------------------------------------------------------------------------


def test_a_module_used_in_two_parents_stays_shared():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(nn.ReLU(), shared)})
    result = qo.quantize_(model)
    assert isinstance(model["a"][0], qo.QuantLinear)
    assert model["a"][0] is model["b"][1]
    assert sorted(result.converted) == ["a.0", "b.1"]


def test_a_module_used_twice_in_one_parent_stays_shared():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    qo.quantize_(model)
    assert isinstance(model[0], qo.QuantLinear)
    assert model[0] is model[2]


def test_a_shared_parent_stays_shared():
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = nn.Sequential(block, nn.Sequential(block))
    qo.quantize_(model)
    assert model[0] is model[1][0]
    assert isinstance(model[0][0], qo.QuantLinear)


def test_a_weight_tied_to_an_embedding():
    """The head gets its own codes; the embedding keeps the float weight."""
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    weight = model["embedding"].weight.detach().clone()
    assert qo.quantize_(model).converted == ["head"]
    assert torch.equal(model["embedding"].weight, weight)


# ---- what is left alone, and why ------------------------------------------------------------------------------------------


class MyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


COMPUTED = "its weight is computed by a hook. Remove it first, e.g. with remove_weight_norm, remove_spectral_norm or prune.remove"


def _hooked(register):
    layer = nn.Linear(4, 4)
    getattr(layer, register)(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (MyLinear(4, 4), "MyLinear is a subclass whose forward may differ"),
        (nn.LazyLinear(4), "LazyLinear is a subclass whose forward may differ"),
        (_hooked("register_forward_hook"), "it has hooks, which a replacement would lose"),
        (_hooked("register_forward_pre_hook"), "it has hooks, which a replacement would lose"),
        (_hooked("register_full_backward_hook"), "it has hooks, which a replacement would lose"),
        (_hooked("register_full_backward_pre_hook"), "it has hooks, which a replacement would lose"),
        (
            parametrizations.weight_norm(nn.Linear(4, 4)),
            "its weight is parametrized. Remove the parametrization first",
        ),
        (prune.identity(nn.Linear(4, 4), "weight"), COMPUTED),
        (torch.nn.utils.spectral_norm(nn.Linear(4, 4)), COMPUTED),
    ],
    ids=[
        "subclass",
        "lazy",
        "forward_hook",
        "forward_pre_hook",
        "backward_hook",
        "backward_pre_hook",
        "parametrized",
        "prune",
        "norm",
    ],
)
def test_left_alone(layer, reason):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    result = qo.quantize_(model)
    assert result.converted == ["0"]
    assert result.skipped == [("1", reason)]
    assert model[1] is layer


class Mixture(nn.Module):
    """Fused experts: parameters of three dimensions, and no layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 4, 8)), nn.Parameter(torch.randn(2, 8, 4))


class Transposed(nn.Module):
    """A matrix of its own, in no class that is known."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(8))


OTHERS = {
    "conv3d": (nn.Conv3d(3, 3, 1), "Conv3d has no int8 form: weight"),
    "up1d": (nn.ConvTranspose1d(3, 3, 1), "ConvTranspose1d has no int8 form: weight"),
    "up2d": (nn.ConvTranspose2d(3, 3, 1), "ConvTranspose2d has no int8 form: weight"),
    "embedding": (nn.Embedding(3, 3), "Embedding has no int8 form: weight"),
    "bag": (nn.EmbeddingBag(3, 3), "EmbeddingBag has no int8 form: weight"),
    "lstm": (nn.LSTM(3, 3, 2), "LSTM has no int8 form: weight_ih_l0, weight_hh_l0, weight_ih_l1, weight_hh_l1"),
    "gru": (nn.GRU(3, 3, 3), "GRU has no int8 form: weight_ih_l0, weight_hh_l0, weight_ih_l1, weight_hh_l1 and 2 more"),
    "bilinear": (nn.Bilinear(2, 3, 4), "Bilinear has no int8 form: weight"),
    "transposed": (Transposed(), "Transposed has no int8 form: weight"),
    "experts": (Mixture(), "Mixture has no int8 form: up, down"),
    "list": (nn.ParameterList([torch.ones(2, 2), torch.ones(2)]), "ParameterList has no int8 form: 0"),
    "lazy": (nn.LazyConvTranspose2d(3, 1), "LazyConvTranspose2d has no int8 form: weight, bias"),
    "normed": (parametrizations.weight_norm(nn.Conv3d(3, 3, 1)), "ParametrizedConv3d has no int8 form: weight"),
}


@pytest.mark.parametrize("call", [qo.quantize_, qo.prepare_, qo.prepare_qat_], ids=lambda f: f.__name__)
def test_every_other_module_with_a_weight_is_named(call):
    model = nn.ModuleDict({name: copy.deepcopy(module) for name, (module, _) in OTHERS.items()})
    model["norm"] = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(3), nn.PReLU())  # vectors are no weights
    model["fc"] = nn.Linear(3, 3)
    before = dict(model.named_modules())
    result = call(model)
    assert (result.converted, result.skipped) == (["fc"], [(name, reason) for name, (_, reason) in OTHERS.items()])
    assert all(module is before[name] for name, module in model.named_modules() if name.partition(".")[0] in OTHERS)


def test_parameters_of_the_model_itself():
    model = Mixture()
    model.fc = nn.Linear(4, 4)
    result = qo.quantize_(model)
    assert result.skipped == [("", "Mixture has no int8 form: up, down")]
    assert str(result).splitlines()[-1] == "  float  the model itself: Mixture has no int8 form: up, down"


@pytest.mark.parametrize("call", [qo.quantize_, qo.prepare_, qo.prepare_qat_], ids=lambda f: f.__name__)
def test_nothing_converted_warns(call):
    model = nn.Sequential(nn.LSTM(3, 3), nn.ReLU())
    with pytest.warns(
        UserWarning, match=rf"^quant_ops\.{call.__name__}: expected at least one .* got none.* \(0: LSTM has no"
    ) as caught:
        result = call(model)
    assert caught[0].filename == __file__
    assert (result.converted, result.share) == ([], 0)


# ---- a layer that a call does not compute as its class does ------------------------------------------------------------------


def _patch_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1


def _patch_call(layer):
    call = layer._call_impl
    layer._call_impl = lambda x: call(x) + 1


@pytest.mark.parametrize("call", [qo.quantize_, qo.prepare_, qo.prepare_qat_], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("patch", "word"),
    [(_patch_forward, "its forward was replaced"), (_patch_call, "its _call_impl was replaced"), (nn.Module.compile, "compiled")],
    ids=["forward", "call", "compile"],
)
def test_a_patched_layer_stays(call, patch, word):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    patch(model[1])
    layer = model[1]
    result = call(model)
    assert (result.converted, [name for name, _ in result.skipped]) == (["0"], ["1"])
    assert word in result.skipped[0][1]
    assert model[1] is layer


def test_fold_and_load_do_not_lose_a_patch(tmp_path):
    def network():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()

    saved, model = network(), network()
    qo.quantize_(saved)
    qo.save(saved, tmp_path / "m")
    _patch_forward(model[0])
    ((name, reason),) = qo.fold_batchnorm_(model).skipped
    assert name == "1"
    assert "Linear '0' does not compute as its class does: its forward was replaced on the instance" in reason
    with pytest.raises(ValueError, match=r"^quant_ops.load_: .* '0' in the model: its forward was replaced on the instance"):
        qo.load_(model, tmp_path / "m")
    assert type(model[2]) is nn.Linear


def test_a_layer_patched_after_prepare_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    qo.prepare_(model, qo.Int8Dynamic())
    _patch_forward(model[1])
    layer = model[1]
    result = qo.convert_(model)
    assert (result.converted, [name for name, _ in result.skipped]) == (["0"], ["1"])
    assert model[1] is layer


# ---- how much is int8, and what it takes --------------------------------------------------------------------------------------


def held(model):
    """Bytes of distinct storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(storages.values())


def test_share_and_memory():
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 32), "body": nn.Linear(32, 64), "head": nn.Linear(64, 50, bias=False)})
    model["head"].weight = nn.Parameter(torch.randn(50, 64))
    before = held(model)
    assert before == 4 * (50 * 32 + 64 * 32 + 64 + 50 * 64)
    result = qo.quantize_(model)
    assert result.share == pytest.approx((64 * 32 + 50 * 64) / (50 * 32 + 64 * 32 + 50 * 64))
    assert (result.bytes_before, result.bytes_after) == (before, held(model))
    model["body"].keep_packed_only()
    model["head"].keep_packed_only()
    outer = nn.ModuleDict({"all": model, "new": nn.Linear(1, 1, bias=False)})
    before = held(outer)
    assert qo.quantize_(outer).bytes_before == before
    assert str(result).splitlines()[1] == f"int8: 76.6 % of the weights, 27.6 kB -> {result.bytes_after / 1000:.1f} kB"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (353_400_000, "353 MB"), (9_996_000, "10.0 MB"), (2.5e12, "2500 GB")],
)
def test_sizes(count, text):
    assert show_bytes(count) == text


def test_a_tied_head_is_named():
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False), "fc": nn.Linear(6, 6)})
    model["head"].weight = model["embedding"].weight
    result = qo.quantize_(model)
    note = "its weight is tied to that of 'embedding', which stays float: the int8 weight comes on top of it"
    assert result.notes == [("head", note)]
    assert result.bytes_before == 4 * (60 + 36 + 6)  # the tied weight once
    assert result.bytes_after > 4 * 60 + 60 + 36
    assert f"  int8   head; {note}" in str(result).splitlines()


def test_tied_layers_are_named():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    qo.prepare_(model, qo.Int8Dynamic())
    assert dict(qo.convert_(model).notes).keys() == {"0", "1"}


def test_a_result_shows_itself_as_its_table():
    result = qo.quantize_(Net(), exclude=[lambda name, _: name == "head"])
    assert repr(result) == str(result)
    assert "head: excluded by &lt;lambda&gt;" in result._repr_html_()


# ---- attention ---------------------------------------------------------------------------------------------------------------


def test_multihead_attention_keeps_its_projection():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, batch_first=True), "out": nn.Linear(16, 8)}).eval()
    result = qo.quantize_(model)
    assert result.converted == ["out"]
    assert result.skipped == [
        ("attention", "MultiheadAttention has no int8 form: in_proj_weight"),
        (
            "attention.out_proj",
            "nn.MultiheadAttention reads the weight itself and never calls the layer. split_attention_ makes it four layers",
        ),
    ]
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert model["attention"](x, x, x)[0].shape == (2, 5, 16)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer(activation, norm_first):
    """In eval mode without gradients torch would take a fused path that reads the float weights of linear1 and linear2."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=True, norm_first=norm_first).eval()
    model = nn.Sequential(layer)
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        expected = model(x)
        result = qo.quantize_(model)
        assert sorted(result.converted) == ["0.linear1", "0.linear2"]
        assert sqnr(expected, model(x)) > 25
        assert not torch.equal(expected, model(x))
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[:, 5:] = True
        assert model[0](x, src_key_padding_mask=mask).isfinite().all()


@pytest.mark.parametrize("include", [["*"], ["*.linear2"]], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder(activation, include):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 7, 32)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 5:] = True
    with torch.no_grad():
        expected, expected_masked = model(x), model(x, src_key_padding_mask=mask)
        qo.quantize_(model, include=include)
        assert len(quantized(model)) == (4 if include == ["*"] else 2)
        assert sqnr(expected, model(x)) > 25
        assert sqnr(expected_masked[~mask], model(x, src_key_padding_mask=mask)[~mask]) > 25


def test_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
    source, target = torch.randn(2, 6, 32), torch.randn(2, 4, 32)
    with torch.no_grad():
        expected = model(source, target)
        qo.quantize_(model)
        assert sqnr(expected, model(source, target)) > 25


# ---- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(3, 3, 1)], ids=["Linear", "Conv2d"])
def test_a_bare_layer(layer):
    name = type(layer).__name__
    message = rf"^quant_ops\.quantize_: expected a model that contains layers, got a bare {name}, .* Quant{name}\.from_float"
    with pytest.raises(ValueError, match=message):
        qo.quantize_(layer)


@pytest.mark.parametrize("arguments", [{"include": ["blocks.*", "tail"]}, {"exclude": ["tail"]}], ids=["include", "exclude"])
def test_a_pattern_without_a_match(arguments):
    model = Net()
    with pytest.raises(ValueError, match=r"^quant_ops\.quantize_: expected the pattern 'tail' to match .*, got none of .*'head'"):
        qo.quantize_(model, **arguments)
    assert not quantized(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"config": "int8"},
            "expected config to be Int8Dynamic, Int8WeightOnly, Int4WeightOnly, Int8DynamicInt4Weight or Simulated, got str",
        ),
        ({"include": "head"}, r"expected include to be a list of patterns, got one str\. Write \['head'\]\."),
        ({"exclude": "head"}, r"expected exclude to be a list of patterns, got one str\. Write \['head'\]\."),
    ],
    ids=["config", "include", "exclude"],
)
def test_wrong_types(arguments, message):
    model = Net()
    with pytest.raises(TypeError, match=rf"^quant_ops\.quantize_: {message}"):
        qo.quantize_(model, **arguments)
    assert not quantized(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad):
    """The error names the layer, and the model still works: the call can be repeated without that layer."""
    model = Net()
    culprit = model.blocks[1]["up"]
    culprit.weight.data[2, 3] = bad
    message = (
        r"^quant_ops\.\w+: expected finite weights, got NaN or Inf, in layer 'blocks\.1\.up'\. Exclude it, or mend it first\.$"
    )
    with pytest.raises(ValueError, match=message):
        qo.quantize_(model)
    assert model.blocks[1]["up"] is culprit
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 4)
    qo.quantize_(model, exclude=["blocks.1.up"])
    assert quantized(model) == set(NAMES) - {"blocks.1.up"}


def test_an_error_leaves_the_model_as_it_was():
    """All weights are looked at before the first layer is replaced."""
    model = Net()
    model.blocks[1]["down"].weight.data[2, 3] = float("nan")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="in layer"):
        qo.quantize_(model)
    assert dict(model.named_modules()) == before


# ---- memory ------------------------------------------------------------------------------------------------------------------


def test_float_weights_are_freed():
    model = Net()
    weights = [weakref.ref(p) for p in model.parameters()]
    result = qo.quantize_(model)
    gc.collect()
    assert len(weights) == 12
    assert not any(w() is not None for w in weights)
    assert len(result.converted) == 6


def test_each_float_weight_is_freed_as_soon_as_it_is_replaced(monkeypatch):
    """At no time more than one layer exists twice: the peak is the float model and one int8 layer, and falls from there."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    from_float = qo.QuantLinear.from_float

    def watch(module, **kwargs):
        alive.append(sum(w() is not None for w in weights))
        return from_float(module, **kwargs)

    monkeypatch.setattr(qo.QuantLinear, "from_float", watch)
    gc.collect()
    gc.disable()  # freed by reference count, not by luck
    try:
        qo.quantize_(model)
    finally:
        gc.enable()
    assert alive == [5, 4, 3, 2, 1]


def test_state_dict_is_a_quarter():
    model = nn.Sequential(nn.Linear(256, 256), nn.Conv2d(32, 64, 3))
    size = lambda m: sum(t.numel() * t.element_size() for t in m.state_dict().values())  # noqa: E731
    before = size(model)
    qo.quantize_(model)
    assert size(model) < 0.27 * before


# ---- config ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"asymmetric": True}, {"weight_bits": 4}, {"asymmetric": True, "weight_bits": 2}])
def test_config_json_round_trip(settings):
    original = qo.Int8Dynamic(**settings)
    restored = config.from_json(original.to_json())
    assert restored == original
    assert type(restored) is qo.Int8Dynamic
    assert hash(restored) == hash(original)


def test_config_is_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        qo.Int8Dynamic().weight_bits = 4
    for bits in (3.5, 1, 9):
        with pytest.raises(ValueError, match=rf"^quant_ops\.Int8Dynamic: expected 2 <= weight_bits <= 8, got {bits}$"):
            qo.Int8Dynamic(weight_bits=bits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"config": "Int3", "weight_bits": 8}',
            r"^quant_ops: expected a config named one of \[.*'Int8Dynamic', 'Int8DynamicInt4Weight', 'Int8Static'.*\], got Int3$",
        ),
        (
            '{"weight_bits": 8}',
            r"^quant_ops: expected a config named one of \[.*'Int8Dynamic', 'Int8DynamicInt4Weight', 'Int8Static'.*\], got None$",
        ),
        (
            '{"config": "Int8Dynamic", "bits": 8}',
            r"^quant_ops\.Int8Dynamic: expected fields among \['asymmetric', 'backward', 'weight_bits', 'weight_observer'\], "
            r"got \['bits'\]$",
        ),
        ('{"config": "Int8Dynamic", "weight_bits": 9}', "expected 2 <= weight_bits <= 8, got 9"),
        ("[]", "^quant_ops: expected "),
    ],
)
def test_config_from_wrong_json(text, message):
    with pytest.raises(ValueError, match=message):
        config.from_json(text)
