"""load_ refuses whatever does not fit, names it, and leaves the model as it was."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from saved_models import Net, format_1, header_of, on_meta, rewritten, saved
from torch import nn

import quant_ops as qo

# ---- files of other models -----------------------------------------------------------------------------------------------


def refused(model, path, words, kind=ValueError):
    """load_ refuses with these words and leaves the model exactly as it was."""
    before = {name: (id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)}
    held = [*model.parameters(), *model.buffers()]
    versions = [(id(tensor), tensor._version) for tensor in held]
    with pytest.raises(kind, match=words) as caught:
        qo.load_(model, path)
    assert str(caught.value).startswith("quant_ops.load_: expected ")
    assert {name: (id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)} == before
    assert [(id(tensor), tensor._version) for tensor in [*model.parameters(), *model.buffers()]] == versions


def test_refuses_other_shapes(tmp_path):
    saved(tmp_path / "m", width=8)
    words = r"to be a file of this model, got 'stem.weight' of shape \(8, 3, 3, 3\) in the file and \(16, 3, 3, 3\) in the model"
    refused(Net(), tmp_path / "m", words)
    refused(on_meta(Net), tmp_path / "m", words)


def test_refuses_other_settings_with_the_same_shapes(tmp_path):
    saved(tmp_path / "m", stride=2)
    refused(Net(), tmp_path / "m", r"got 'stem' with stride=\(2, 2\) in the file and \(1, 1\) in the model")


def test_refuses_other_biases(tmp_path):
    saved(tmp_path / "m", bias=False)
    refused(Net(), tmp_path / "m", r"got no 'stem.bias' in the file \(model: \(16,\)")
    saved(tmp_path / "m")
    refused(Net(bias=False), tmp_path / "m", r"got 'stem' with a bias in the file and without in the model")


def test_refuses_names_that_only_one_side_has(tmp_path):
    saved(tmp_path / "m")
    fresh = Net()
    fresh.more = nn.LayerNorm(3)
    refused(fresh, tmp_path / "m", r"got no 'more.weight' in the file \(model: \(3,\)")
    fresh = Net()
    del fresh.norm
    refused(fresh, tmp_path / "m", r"got 'norm.\w+' of shape \(16,\) in the file alone")
    fresh = Net()
    del fresh.up
    refused(fresh, tmp_path / "m", r"got a QuantLinear 'up' in the file and nothing of that name in the model")


def test_refuses_layers_that_cannot_be_replaced(tmp_path):
    saved(tmp_path / "m")

    class Special(nn.Linear):
        pass

    fresh = Net()
    fresh.up = Special(16, 24)
    refused(fresh, tmp_path / "m", r"got a QuantLinear 'up' in the file and Special of that name in the model")
    fresh = Net()
    fresh.up.register_forward_hook(lambda *_: None)
    refused(fresh, tmp_path / "m", r"got hooks on 'up', which its replacement would lose")


def test_refuses_a_model_with_extra_state(tmp_path):
    saved(tmp_path / "m")

    class Extra(nn.Identity):
        def get_extra_state(self):
            return {"a": 1}

    fresh = Net()
    fresh.more = Extra()
    refused(fresh, tmp_path / "m", "got 'more._extra_state' in the model, which is no tensor")


def test_refuses_a_meta_buffer_that_no_file_holds(tmp_path):
    """A file of an earlier version, or of another model."""
    saved(tmp_path / "m")

    def make(size=3):
        model = Net()
        model.register_buffer("table", torch.ones(size), persistent=False)
        return model

    refused(on_meta(make), tmp_path / "m", "got the non-persistent 'table', which an earlier quant_ops did not save")
    fresh = make()
    qo.load_(fresh, tmp_path / "m")
    assert torch.equal(fresh.table, torch.ones(3))
    qo.save(fresh, tmp_path / "m")
    refused(on_meta(lambda: make(4)), tmp_path / "m", r"got 'table' of shape \(3,\) in the file and \(4,\) in the model")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("up.weight_scale", lambda t: t * 0, "usable layer 'up' .* weight_scale > 0 and finite"),
        ("up.weight_scale", lambda t: t * torch.nan, "usable layer 'up' .* weight_scale > 0 and finite"),
        ("up.weight_scale", lambda t: t[:3], "usable layer 'up'"),
        ("up.weight_scale", lambda t: t.double(), "up.weight_scale of dtype torch.float32"),
        ("up.qweight", lambda t: t.int(), "up.qweight of dtype torch.int8"),
        ("up.weight_scale", None, "'up' without weight_scale in the file"),
        ("up.qweight", None, "no 'up.qweight' in the file"),
        ("head.bias", lambda t: t.int(), "'head.bias' of a dtype like torch.float32 in .*, got torch.int32"),
        ("up.extra", lambda _: torch.ones(2), r"'up.extra' of shape \(2,\) in the file alone"),
    ],
)
def test_refuses_unusable_tensors(tmp_path, name, change, words):
    saved(tmp_path / "m")
    tensors = load_file(tmp_path / "m")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    rewritten(tmp_path / "m", tensors)
    refused(Net(), tmp_path / "m", words)


# ---- files that are none -------------------------------------------------------------------------------------------------


def test_refuses_a_missing_file(tmp_path):
    refused(Net(), tmp_path / "m", r"the path of a file, got .*/m$", FileNotFoundError)
    refused(Net(), tmp_path, "the path of a file", FileNotFoundError)


def test_refuses_truncated_files(tmp_path):
    saved(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        (tmp_path / "m").write_bytes(data[:length])
        refused(Net(), tmp_path / "m", "a whole safetensors file, got .* It is cut off, or no file of quant_ops.save")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("write", [lambda p: torch.save(Bomb(), p), lambda p: p.write_bytes(pickle.dumps(Bomb()))])
def test_never_unpickles(tmp_path, write):
    write(tmp_path / "m")
    refused(Net(), tmp_path / "m", "a whole safetensors file")


def test_refuses_a_foreign_safetensors_file(tmp_path):
    save_file(Net(bias=False).up.state_dict(), tmp_path / "m", metadata={"format": "pt"})
    refused(Net(), tmp_path / "m", "a file of quant_ops.save, got .*, a safetensors file of another program")
    save_file({"a": torch.ones(1)}, tmp_path / "m")
    refused(Net(), tmp_path / "m", "a file of quant_ops.save")


def test_refuses_a_newer_format(tmp_path):
    saved(tmp_path / "m")
    rewritten(tmp_path / "m", header=header_of(tmp_path / "m") | {"format_version": 3, "quant_ops": "9.0"})
    refused(Net(), tmp_path / "m", r"format_version <= 2, got 3 in .*, written by quant_ops 9.0. Upgrade quant_ops")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("layers"),
        lambda h: h.pop("shared"),
        lambda h: h.update(format_version="1"),
        lambda h: h.update(format_version=-5),
        lambda h: h.update(format_version=0),
        lambda h: h.update(format_version=True),
        lambda h: h.update(format_version=1.0),
        lambda h: h.update(format_version=float("nan")),
        lambda h: h.update(format_version=float("inf")),
        lambda h: h.update(format_version=None),
        lambda h: h.update(layers={"up": None}),
        lambda h: h["layers"]["up"].update({"class": ["QuantLinear"]}),
        lambda h: h["layers"]["up"].update(weight_bits=8.0),
        lambda h: h["layers"]["up"].update(weight_bits=True),
        lambda h: h["layers"]["up"].update(compute_dtype="int8"),
        lambda h: h["layers"]["up"].update(compute_dtype=None),
        lambda h: h["layers"]["up"]["config"].update(asymmetric="yes"),
        lambda h: h["layers"]["up"]["config"].update(weight_bits=8.0),
        lambda h: h["layers"]["up"]["config"].update(weight_observer=["minmax"]),
        lambda h: h["layers"]["up"]["arguments"].update(relu=1),
        lambda h: h.update(not_in_state_dict=["nowhere"]),
        lambda h: h.update(not_in_state_dict={}),
        lambda h: h.update(not_in_state_dict=[["up.bias"]]),
        lambda h: h.update(layers=[]),
        lambda h: h["layers"]["up"].update({"class": "Linear"}),
        lambda h: h["layers"]["up"].pop("weight_bits"),
        lambda h: h["layers"]["up"].update(weight_bits=9),
        lambda h: h["layers"]["up"].update(config={"config": "os.system"}),
        lambda h: h["layers"]["up"]["arguments"].update(device="cuda"),
        lambda h: h["layers"]["up"]["arguments"].update(relu="yes"),
        lambda h: h["shared"].update({"tied.weight": "nowhere"}),
    ],
)
def test_refuses_damaged_metadata(tmp_path, change):
    saved(tmp_path / "m")
    header = header_of(tmp_path / "m")
    change(header)
    rewritten(tmp_path / "m", header=header)
    refused(Net(), tmp_path / "m", "metadata of quant_ops.save in .*, got ")


def test_refuses_metadata_that_no_json_parser_should_take(tmp_path):
    saved(tmp_path / "m")
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "m").items()}
    for text in (
        "[" * 100_000,
        '{"format_version": NaN}',
        '{"format_version": 1, "layers": {}, "shared": Infinity}',
        "1" * 5000,
        "",
    ):
        save_file(tensors, tmp_path / "m", metadata={"quant_ops": text})
        refused(Net(), tmp_path / "m", "metadata of quant_ops.save in .*, got ")


@pytest.mark.parametrize("change", [{"in_features": 16.0}, {"in_features": True}, {"in_features": "16"}, {"in_features": [16]}])
def test_refuses_arguments_of_another_type(tmp_path, change):
    saved(tmp_path / "m")
    header = header_of(tmp_path / "m")
    header["layers"]["up"]["arguments"].update(change)
    rewritten(tmp_path / "m", header=header)
    refused(Net(), tmp_path / "m", "got 'up' with in_features=.* in the file and 16 in the model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_scale": torch.full((2, 2), 0.1)}, "input_scale to have one element, or one per step"),
        ({"input_scale": torch.ones(0)}, "input_scale to have one element, or one per step"),
        ({"input_scale": torch.tensor(-1.0)}, "input_scale > 0 and finite"),
        ({"input_zero_point": torch.tensor(1000, dtype=torch.int32)}, "-128 <= input_zero_point <= 127, got 1000"),
        ({"input_zero_point": torch.zeros(3, dtype=torch.int32)}, "one input_zero_point for each of 1 steps, got 3"),
        ({"input_scale": None}, "input_zero_point only together with input_scale"),
        ({"input_scale": torch.ones(3)}, "one input_zero_point for each of 3 steps, got 1"),
        ({"output_scale": torch.ones(3)}, "output_scale to have one element"),
        ({"output_zero_point": torch.tensor(3, dtype=torch.int32)}, "output_zero_point only together with output_scale"),
        ({"input_scale": torch.tensor(0.1, dtype=torch.float64)}, "up.input_scale of dtype torch.float32"),
        ({"asymmetric": True}, "got an input_scale in an asymmetric layer"),
    ],
    ids=str,
)
def test_refuses_layers_that_could_not_run(tmp_path, change, words):
    model = Net().eval()
    qo.prepare_(model, qo.Int8Static(asymmetric=True), exclude=["head", "tied"])
    qo.calibrate(model, [torch.randn(4, 3, 9, 9)])
    qo.convert_(model)
    qo.save(model, tmp_path / "m")
    tensors, header = load_file(tmp_path / "m"), header_of(tmp_path / "m")
    for name, value in change.items():
        if name == "asymmetric":
            header["layers"]["up"]["arguments"][name] = value
        elif value is None:
            del tensors[f"up.{name}"]
        else:
            tensors[f"up.{name}"] = value
    rewritten(tmp_path / "m", tensors, header)
    refused(Net(), tmp_path / "m", words)
    refused(model, tmp_path / "m", words)


def test_a_model_that_refuses_while_it_loads_is_as_it_was(tmp_path):
    class Stubborn(nn.Linear):
        def _load_from_state_dict(self, *_):
            raise KeyError("no")

    def make():
        model = Net()
        model.last = Stubborn(2, 2)
        return model

    model = make()
    qo.quantize_(model, exclude=["last", "head", "tied"])
    qo.save(model, tmp_path / "m")
    fresh = make()
    before = [id(tensor) for tensor in [*fresh.parameters(), *fresh.buffers()]]
    with pytest.raises(KeyError):
        qo.load_(fresh, tmp_path / "m")
    assert [id(tensor) for tensor in [*fresh.parameters(), *fresh.buffers()]] == before
    assert type(fresh.up) is nn.Linear


@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_in_the_header_is_refused_or_harmless(tmp_path_factory, where, value):
    folder = tmp_path_factory.mktemp("m")
    qo.save(format_1.quantized(), folder / "m")
    data = bytearray((folder / "m").read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    data[int(where * end)] = value
    (folder / "m").write_bytes(data)
    fresh = format_1.Net()
    try:
        qo.load_(fresh, folder / "m")
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith("quant_ops.load_: expected ")
        assert not any(isinstance(m, (qo.QuantLinear, qo.QuantConv2d)) for m in fresh.modules())
