"""Copies, pickles, checkpoints and conversions of int8 layers: their numbers stay, bit for bit."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from operands import images, vision_model
from torch import nn

import quant_ops as qo

# ---- copies and checkpoints ------------------------------------------------------------------------------------------------


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def _through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _through_pickle, _through_torch_save])
def test_a_copy_is_equal_and_independent(duplicate, static):
    model = vision_model(static)
    expected = model(images(3))
    other = duplicate(model)
    assert repr(other) == repr(model)
    assert torch.equal(other(images(3)), expected)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
        assert torch.equal(mine, theirs)
    for layer in other:
        if isinstance(layer, (qo.QuantConv2d, qo.QuantLinear)):
            layer.qweight = torch.zeros_like(layer.qweight)
    assert torch.equal(model(images(3)), expected)
    assert not torch.equal(other(images(3)), expected)


def test_pickles_do_not_hold_the_packed_weight():
    layer = qo.QuantLinear.from_float(nn.Linear(512, 512))
    assert len(pickle.dumps(layer)) < 1.5 * layer.weight.numel()


def empty_vision_model(device=None):
    return nn.Sequential(
        qo.QuantConv2d(3, 10, 3, padding=1, device=device),
        nn.ReLU(),
        qo.QuantConv2d(10, 10, 3, stride=2, groups=10, device=device),
        nn.Flatten(1),
        qo.QuantLinear(10 * 3 * 3, 7, device=device),
    ).eval()


def _state_by_torch(model, path):
    torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def _state_by_safetensors(model, path):
    safetensors.torch.save_file(model.state_dict(), path)
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("through_file", [_state_by_torch, _state_by_safetensors])
def test_state_dict_round_trip(through_file, static, tmp_path):
    model = vision_model(static)
    state = through_file(model, tmp_path / "state")
    assert not any("packed" in key for key in state)
    assert state["4.qweight"].dtype == torch.int8
    assert state["4.weight_scale"].dtype == torch.float32
    assert ("0.input_zero_point" in state) == static

    expected = model(images(3))
    fresh = empty_vision_model()
    missing, unexpected = fresh.load_state_dict(state, strict=True)
    assert not missing
    assert not unexpected
    assert torch.equal(fresh(images(3)), expected)

    torch.manual_seed(9)  # a quantized model with other weights
    other = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 10, 3, stride=2, groups=10))
    other.extend([nn.Flatten(1), nn.Linear(90, 7)])
    qo.quantize_(other, qo.Int8Dynamic(asymmetric=False))
    assert not torch.equal(other(images(3)), expected)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(images(3)), expected)
    assert torch.equal(copy.deepcopy(other)(images(3)), expected)


@pytest.mark.parametrize("static", [False, True])
def test_state_dict_onto_the_meta_device(static):
    model = vision_model(static)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images(3))

    assigned = empty_vision_model("meta")
    assert all(b.is_meta for b in assigned.buffers())
    assert assigned(images(2).to("meta")).shape == (2, 7)
    assigned.load_state_dict(state, strict=True, assign=True)
    assert not any(b.is_meta for b in assigned.buffers())
    assert assigned[0].weight_scale.data_ptr() == state["0.weight_scale"].data_ptr()
    assert torch.equal(assigned(images(3)), expected)

    with torch.device("meta"):
        emptied = empty_vision_model()
    emptied.to_empty(device="cpu")
    emptied.load_state_dict(state, strict=True)
    assert torch.equal(emptied(images(3)), expected)


def test_strict_loading_reports_what_does_not_fit():
    static = qo.QuantLinear.from_float(nn.Linear(4, 3), input_scale=0.1)
    dynamic = qo.QuantLinear.from_float(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match=r"Missing key.*input_scale"):
        static.load_state_dict(dynamic.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        qo.QuantLinear(4, 3, bias=False).load_state_dict(dynamic.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        dynamic.load_state_dict(nn.Linear(4, 3).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        dynamic.load_state_dict(qo.QuantLinear(5, 3).state_dict())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "output_scale"])
def test_loading_refuses_a_bad_scale(name, bad):
    layer = qo.QuantLinear.from_float(nn.Linear(4, 3), input_scale=0.1, output_scale=0.2)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state[name].view(-1)[0] = bad
    with pytest.raises(ValueError, match=rf"^quant_ops\.QuantLinear: expected {name} > 0 and finite, got "):
        qo.QuantLinear(4, 3).load_state_dict(state)


# ---- .half() and friends: only the activations change their dtype ------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float64),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.half().float(),
        lambda m: m.to("cpu"),
    ],
    ids=["half", "bfloat16", "float64", "channels_last", "half_float", "cpu"],
)
def test_conversions_keep_the_numbers(convert, static):
    model = vision_model(static)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {dtype: model(images(3, dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert convert(model) is model
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in after.items():
        assert value.dtype == before[key].dtype, key
        assert torch.equal(value, before[key]), key
    for dtype, result in expected.items():
        assert model(images(3, dtype)).dtype == dtype
        assert torch.equal(model(images(3, dtype)), result)
    assert torch.equal(copy.deepcopy(model)(images(3)), expected[torch.float32])
