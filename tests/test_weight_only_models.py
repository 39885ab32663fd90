"""Whole models with weight-only layers: which layers a config takes, tied embeddings, files, reports, the command line."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from saved_models import header_of, on_meta, rewritten
from torch import nn

import quant_ops as qo
from quant_ops.__main__ import main
from quant_ops._models import held_bytes

CONFIGS = [qo.Int8WeightOnly(), qo.Int4WeightOnly(32), qo.Int8DynamicInt4Weight()]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)


class Net(nn.Module):
    """A language model in small: an embedding, positions, a convolution, two layers, a head of the embedding's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(60, 40)
        self.positions = nn.Embedding(8, 40)
        self.mix = nn.Conv1d(40, 40, 3, padding=1)
        self.up = nn.Linear(40, 70)
        self.down = nn.Linear(70, 40, bias=False)
        self.head = nn.Linear(40, 60, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        x = x + self.mix(x.mT).mT
        return self.head(x + self.down(self.up(x).relu()))


IDS = torch.arange(14).reshape(2, 7) * 11 % 60
CONV = ("mix", "Conv1d has no form of {}")


def quantized(config):
    model = Net().eval()
    return model, qo.quantize_(model, config)


# ---- which layers, and what the call says ------------------------------------------------------------------------------------


@configs
def test_each_config_takes_its_layers(config):
    expected = Net().eval()(IDS)
    model, result = quantized(config)
    name, dynamic = type(config).__name__, isinstance(config, qo.Int8DynamicInt4Weight)
    assert result.converted == [*([] if dynamic else ["embedding", "positions"]), "up", "down", "head"]
    skipped = [] if not dynamic else [(kept, f"Embedding has no form of {name}") for kept in ("embedding", "positions")]
    assert result.skipped == [*skipped, ("mix", f"Conv1d has no form of {name}")]
    assert result.kind == ("int8" if isinstance(config, qo.Int8WeightOnly) else "int4")
    assert result.forms == dict.fromkeys(result.converted, result.kind)
    assert model.up.config == model.head.config == config
    assert (model.up.bits, model.up.group_size, model.up.asymmetric) == tuple(config.settings().values())
    assert (model.up.dynamic, model.up.asymmetric_input) == (dynamic, dynamic)
    y = model(IDS)
    assert (y - expected).norm() < (0.02 if result.kind == "int8" else 0.2) * expected.norm()
    assert result.bytes_after == held_bytes(model)
    again = qo.quantize_(model, {"*": qo.Int8Dynamic()})
    assert again.converted == ["mix"]
    assert [reason for name, reason in again.skipped if name == "up"] == [f"{result.kind} already"]


def test_configs_may_be_mixed():
    """Each layer by the first filter that matches; embeddings only by a weight-only one."""
    configs = {
        "up": qo.Int4WeightOnly(),
        "positions": None,
        "head": qo.Int8Dynamic(),
        "*": qo.Int8Dynamic(),
        "embedding": CONFIGS[0],
    }
    model, result = quantized(configs)
    assert result.kind == "int8 and int4"
    assert result.forms == {"embedding": "int8", "mix": "int8", "up": "int4", "down": "int8", "head": "int8"}
    assert [type(layer).__name__ for layer in (model.embedding, model.mix, model.up, model.down)] == [
        *("WeightOnlyEmbedding", "QuantConv1d", "WeightOnlyLinear", "QuantLinear")
    ]
    assert result.skipped == [("positions", "'positions' has no config")]
    lines = str(result).splitlines()
    assert lines[1].startswith("int8 and int4: ")
    assert "  int4   up" in lines
    assert "  int8   down" in lines
    model, result = quantized({"up": qo.Int4WeightOnly(), "*": qo.Int8Dynamic()})
    assert ("embedding", "Embedding has no form of Int8Dynamic") in result.skipped
    model, result = quantized(qo.Int8Dynamic())
    assert ("embedding", "Embedding has no int8 form: weight") in result.skipped
    assert type(model.embedding) is nn.Embedding


def test_embeddings_can_be_left_out():
    model = Net()
    result = qo.quantize_(model, qo.Int4WeightOnly(), exclude=[nn.Embedding])
    assert result.converted == ["up", "down", "head"]
    assert type(model.embedding) is nn.Embedding
    note = "its weight is tied to that of 'embedding', which stays float: the int4 weight comes on top of it"
    assert result.notes == [("head", note)]


class Scaled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_are_left_alone():
    model = nn.ModuleDict(
        {
            "plain": nn.Embedding(4, 3, padding_idx=1, sparse=True, scale_grad_by_freq=True),
            "norm": nn.Embedding(4, 3, max_norm=1.0),
            "scaled": Scaled(4, 3),
            "bag": nn.EmbeddingBag(4, 3),
            "hooked": nn.Embedding(4, 3),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    result = qo.quantize_(model, qo.Int4WeightOnly())
    assert result.converted == ["plain"]
    assert model["plain"].padding_idx == 1
    assert result.skipped == [
        ("norm", "max_norm changes its weight in every call, which a packed weight does not allow"),
        ("scaled", "Scaled is a subclass whose forward may differ"),
        ("bag", "EmbeddingBag has no int4 form: weight"),
        ("hooked", "it has hooks, which a replacement would lose"),
    ]


def test_sums_that_would_not_be_exact():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1_100_000, 1), nn.Linear(1_000_000, 1))
    result = qo.quantize_(copy.deepcopy(model), qo.Int8DynamicInt4Weight(group_size=-1))
    assert result.skipped == [("0", "each output sums 1100000 products; an int32 sum is exact for at most 1052688")]
    assert len(qo.quantize_(model, qo.Int8DynamicInt4Weight()).converted) == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: qo.prepare_(Net(), qo.Int4WeightOnly()), r"got Int4WeightOnly\. Use quantize_\.$"),
        (
            lambda: qo.quantize_(Net(), {"up": qo.Int4WeightOnly(), "*": qo.Simulated(weight=qo.INT4)}),
            "quantized layers or of simulated ones, got",
        ),
        (
            lambda: qo.quantize_(nn.Embedding(4, 3), qo.Int4WeightOnly()),
            r"got a bare Embedding, .* Use WeightOnlyEmbedding\.from_float",
        ),
        (lambda: qo.quantize_(nn.Linear(4, 3), qo.Int4WeightOnly()), r"got a bare Linear, .* Use WeightOnlyLinear\.from_float"),
        (lambda: qo.quantize_(Net(), qo.Int4WeightOnly(), include=["x"]), "to match a Linear, Conv1d, Conv2d or Embedding, got"),
        (lambda: qo.Int4WeightOnly(48), r"Int4WeightOnly: expected group_size 32, 64, 128, 256 or -1 \(one .*\), got 48"),
        (lambda: qo.Int8WeightOnly(True), "Int8WeightOnly: expected group_size 32, .*, got True"),
        (lambda: qo.Int8DynamicInt4Weight(asymmetric=1), "Int8DynamicInt4Weight: expected asymmetric to be True or False, got 1"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises((TypeError, ValueError), match=rf"^quant_ops\..*{words}"):
        call()


@configs
def test_configs_as_json(config):
    assert qo.config_from_json(config.to_json()) == config
    assert qo.Int4WeightOnly(None) == qo.Int4WeightOnly(-1)


# ---- tied embeddings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: type(config).__name__)
def test_a_tied_head_shares_the_packed_weight(config):
    model, result = quantized(config)
    form = result.kind
    assert model.head.shares_weight(model.embedding)
    assert result.notes == [
        ("embedding", f"its weight is tied to that of 'head', which shares the {form} weight"),
        ("head", f"its weight is tied to that of 'embedding', which shares the {form} weight"),
    ]
    assert result.bytes_after == held_bytes(model) < held_bytes(Net())
    separate = copy.deepcopy(model)
    separate.head = copy.deepcopy(model.head)
    assert held_bytes(separate) - held_bytes(model) == held_bytes(model.head)
    expected = (60 * 40 + 8 * 40 + 2 * 2800) / (60 * 40 + 8 * 40 + 2 * 2800 + 40 * 40 * 3)
    assert abs(result.share - expected) < 1e-9


def test_tied_layers_of_different_configs_have_copies_of_their_own():
    model, result = quantized({"head": qo.Int4WeightOnly(64), "*": qo.Int4WeightOnly(32)})
    assert not model.head.shares_weight(model.embedding)
    assert result.notes[0] == ("embedding", "its weight is tied to that of 'head', which has an int4 copy of its own")
    model, result = quantized({"head": qo.Int8DynamicInt4Weight(32), "*": qo.Int4WeightOnly(32, asymmetric=False)})
    assert model.head.shares_weight(model.embedding)
    assert model.head.dynamic
    model, result = quantized({"head": qo.Int8Dynamic(), "*": qo.Int4WeightOnly(32)})
    assert result.notes[0] == ("embedding", "its weight is tied to that of 'head', which has an int8 copy of its own")


def test_a_tied_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, tie_word_embeddings=True, **sizes)

    def make():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    model, ids = make(), torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = model(ids).logits
        result = qo.quantize_(model, qo.Int8WeightOnly())
        y = model(ids).logits
        assert (y - expected).norm() < 0.02 * expected.norm()
        assert {name for name, _ in result.notes} == {"model.embed_tokens", "lm_head"}
        qo.save(model, tmp_path / "m")
        fresh = on_meta(make)
        qo.load_(fresh, tmp_path / "m")
        for net in (model, copy.deepcopy(model), fresh):
            assert net.lm_head.shares_weight(net.model.embed_tokens)
            assert torch.equal(net(ids).logits, y)
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(fresh.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), tokens)


# ---- files -------------------------------------------------------------------------------------------------------------------


@configs
@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)], ids=["float", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files(tmp_path, config, make, dtype):
    model, _ = quantized(config)
    model.to(dtype)
    expected = model(IDS)
    qo.save(model, tmp_path / "m")
    header, tensors = header_of(tmp_path / "m"), load_file(tmp_path / "m")
    tied = not isinstance(config, qo.Int8DynamicInt4Weight)
    assert header["format_version"] == 2
    assert ("head.qweight" in header["shared"]) == tied == ("head.qweight" not in tensors)
    assert tensors["up.qweight"].dtype == (torch.int8 if config.settings()["bits"] == 8 else torch.uint8)
    assert (tmp_path / "m").stat().st_size < held_bytes(model) + 8000
    fresh = make().eval()
    result = qo.load_(fresh, tmp_path / "m")
    assert torch.equal(fresh(IDS), expected)
    assert repr(fresh) == repr(model)
    assert fresh.up.config == config
    assert ("mix", "float in the file") in result.skipped
    assert fresh.head.shares_weight(fresh.embedding) == tied
    assert (fresh.head.weight.dtype, fresh.embedding.weight.dtype) == (dtype, dtype)
    assert held_bytes(fresh) == held_bytes(model)
    qo.save(fresh, tmp_path / "n")
    assert (tmp_path / "n").read_bytes() == (tmp_path / "m").read_bytes()
    qo.load_(fresh, tmp_path / "m")  # once more, onto quantized layers
    assert torch.equal(fresh(IDS), expected)
    assert fresh.head.shares_weight(fresh.embedding) == tied


def test_layers_of_one_weight_stay_two(tmp_path):
    """They are alike in the file, but not one module in the model."""
    make = lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))  # noqa: E731
    model = make()
    model[1].weight = model[0].weight
    qo.quantize_(model, qo.Int8WeightOnly())
    assert model[0].shares_weight(model[1])
    qo.save(model, tmp_path / "m")
    fresh = make()
    qo.load_(fresh, tmp_path / "m")
    assert fresh[0] is not fresh[1]
    assert fresh[0].shares_weight(fresh[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, t: h["layers"]["up"]["arguments"].update(bits=8), "expected metadata of quant_ops.save"),
        (lambda h, t: h["layers"]["up"]["arguments"].update(group_size=48), "expected metadata of quant_ops.save"),
        (lambda h, t: h["layers"]["up"]["arguments"].update(group_size=True), "expected metadata of quant_ops.save"),
        (lambda h, t: h["layers"]["up"]["arguments"].update(dynamic=1), "expected metadata of quant_ops.save"),
        (
            lambda h, t: h["layers"]["up"]["arguments"].update(group_size=64),
            "usable layer 'up' in .*size mismatch for weight_scale",
        ),
        (lambda h, t: h["layers"]["up"]["arguments"].update(asymmetric_input=True), "usable layer 'up' .* only with dynamic=True"),
        (
            lambda h, t: h["layers"].update(embedding=h["layers"]["up"]),
            "got a WeightOnlyLinear 'embedding' in the file and Embedding",
        ),
        (lambda h, t: t.pop("up.weight_zero_point"), "usable layer 'up' .* expected 'weight_zero_point' with 'qweight'"),
        (
            lambda h, t: t.update({"up.qweight": t["up.qweight"][:, 1:]}),
            r"'up.weight' of shape \(70, 19\) in the file and \(70, 20\)",
        ),
        (lambda h, t: t.update({"up.qweight": t["up.qweight"].char()}), "expected up.qweight of dtype torch.uint8 in"),
        (lambda h, t: t.update({"up.weight_scale": -t["up.weight_scale"]}), "usable layer 'up' .* expected weight_scale > 0"),
        (lambda h, t: t.update({"positions.bias": torch.zeros(8)}), "'positions' with a bias in the file and without in the model"),
    ],
)
def test_refused_files(tmp_path, change, words):
    qo.save(quantized(CONFIGS[1])[0], tmp_path / "m")
    header, tensors, model = header_of(tmp_path / "m"), load_file(tmp_path / "m"), Net()
    change(header, tensors)
    rewritten(tmp_path / "m", tensors, header)
    before = [*model.modules(), *model.parameters()]
    with pytest.raises(ValueError, match=rf"(?s)^quant_ops\.load_: .*{words}"):
        qo.load_(model, tmp_path / "m")
    assert all(a is b for a, b in zip([*model.modules(), *model.parameters()], before, strict=True))


def test_a_file_of_other_bits_fits_no_int8_model(tmp_path):
    qo.save(quantized(CONFIGS[1])[0], tmp_path / "m")
    model = Net()
    qo.quantize_(model, exclude=["mix"])
    with pytest.raises(ValueError, match=r"got a WeightOnlyLinear 'up' in the file and QuantLinear of that name in the model"):
        qo.load_(model, tmp_path / "m")
    model, _ = quantized(CONFIGS[0])  # of other bits and groups: the file's replace them
    qo.load_(model, tmp_path / "m")
    assert (model.up.bits, model.up.group_size) == (4, 32)


# ---- reports -----------------------------------------------------------------------------------------------------------------


def test_compare_and_fallback():
    model, _ = quantized(CONFIGS[1])
    report = qo.compare(Net().eval(), model, IDS, repeats=1)
    assert [layer.name for layer in report.layers] == ["embedding", "positions", "up", "down", "head"]
    assert all(15 < layer.sqnr < 35 and layer.clipped == 0 and not layer.chained for layer in report.layers)
    assert report.bytes == held_bytes(model)
    assert "packed" in str(report).splitlines()[0]
    assert qo.Report.from_json(report.to_json()).layers == report.layers
    result = qo.fallback_(model, report, target=report.sqnr + 12)
    assert result.reached
    assert result.kind == "int4"
    assert {"embedding", "head"} <= set(result.returned)
    assert model.head.weight is model.embedding.weight  # tied again
    wrong, model = Net(), quantized(CONFIGS[1])[0]
    wrong.up = nn.Embedding(70, 40)
    with pytest.raises(ValueError, match=r"expected 'up' of the float model to be a Linear of weight \(70, 40\), got Embedding"):
        qo.compare(wrong, model, IDS)


def test_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_weight_only_net.py").write_text("from test_weight_only_models import IDS, Net\nbatches = [IDS]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["quantize", "my_weight_only_net:Net", "m", "--config"]
    assert main([*command, "Int4WeightOnly"]) == 0
    assert "int4   head; its weight is tied to that of 'embedding', which shares the int4 weight" in capsys.readouterr().out
    assert main(["report", "m"]) == 0
    assert "WeightOnlyEmbedding(num_embeddings=60" in capsys.readouterr().out
    settings = json.dumps({"config": "Int8WeightOnly", "group_size": 32})
    assert main([*command, settings, "--data", "my_weight_only_net:batches", "--target", "60", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["config"] == {"config": "Int8WeightOnly", "group_size": 32, "asymmetric": False}
    assert said["skipped"]["embedding"] == "returned to float for the target"
    fresh = Net().eval()
    qo.load_(fresh, "m")
    assert type(fresh.embedding) is nn.Embedding
    assert main([*command, "Int3"]) == 2
    assert "expected a config named one of" in capsys.readouterr().err
    assert main([*command, "Int4WeightOnly", "--batches", "2"]) == 2
    assert "--batches only where something is calibrated" in capsys.readouterr().err
