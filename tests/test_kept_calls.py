"""A layer's second call passes x alone (nn/kept.py): whatever changes between two calls, it gives what the operator gives."""

import copy
import gc
import weakref

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import quant_ops as qo

_LINEAR = qo.QuantLinear.from_float(torch.nn.Linear(24, 20))
_STATIC = qo.QuantLinear.from_float(torch.nn.Linear(24, 20), input_scale=0.03, input_zero_point=3, output_scale=0.05, relu=True)
_CONV = qo.QuantConv2d.from_float(torch.nn.Conv2d(4, 6, 3, padding=1, stride=2)).to(memory_format=torch.channels_last)
_WEIGHT_ONLY = qo.WeightOnlyLinear.from_float(torch.nn.Linear(64, 20), bits=4, group_size=32)
_LAYERS = {"linear": _LINEAR, "static": _STATIC, "conv": _CONV, "weight_only": _WEIGHT_ONLY}


def _input(layer):
    return torch.randn(2, 4, 7, 6) if isinstance(layer, qo.QuantConv2d) else torch.randn(3, layer.in_features)


@pytest.fixture(params=_LAYERS)
def kept(request):
    """A layer whose call is kept, and an input."""
    layer = copy.deepcopy(_LAYERS[request.param])
    x = _input(layer)
    assert torch.equal(layer(x), layer._run(x))
    assert layer._kept is not None
    return layer, x


def _check(layer, x):
    for _ in range(3):
        assert torch.equal(layer(x), layer._run(x))


def test_the_second_call_is_kept_and_equal(kept):
    layer, x = kept
    before = layer._kept
    _check(layer, x)
    other = _input(layer)
    _check(layer, other)
    with torch.inference_mode():
        _check(layer, other.clone())
    assert layer._kept is before


def test_whatever_changes_is_seen(kept):
    layer, x = kept
    before = layer(x)
    layer.weight_scale.mul_(2)  # in place: the call stays
    _check(layer, x)
    assert not torch.equal(layer(x), before)
    layer.weight_scale = layer.weight_scale * 2
    _check(layer, x)
    layer._buffers["bias"] = layer.bias + 1  # as functional_call and accelerate do
    _check(layer, x)
    layer.qweight = layer.qweight.flip(0)
    _check(layer, x)
    layer.load_state_dict({name: value.flip(0) if value.dim() else value for name, value in layer.state_dict().items()})
    _check(layer, x)
    if isinstance(layer, qo.QuantConv2d):
        _check(layer, x[0])  # an image alone
        layer.to(memory_format=torch.contiguous_format)
    _check(layer, x)


def test_a_copy_has_calls_of_its_own(kept):
    layer, x = kept
    before = layer(x)
    other = copy.deepcopy(layer)
    assert other._kept is None
    other.weight_scale.mul_(3)
    _check(other, x)
    assert torch.equal(layer(x), before)


def test_lent_buffers(kept):
    layer, x = kept
    before, lent = layer(x), {"weight_scale": layer.weight_scale * 3}
    for _ in range(2):
        assert not torch.equal(functional_call(layer, lent, (x,)), before)
        assert torch.equal(layer(x), before)


def test_hooks_modes_and_another_forward_are_not_passed_by(kept):
    layer, x = kept
    before, seen = layer(x), []
    with (
        layer.register_forward_hook(lambda *_: seen.append("hook")),
        layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
    ):
        layer(x)
    assert seen == ["pre", "hook"]

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    with Mode():
        layer(x)
    assert not [op for op in seen[2:] if op._schema.name.startswith("quant_ops::_")]
    assert not [node for node in torch.jit.trace(layer, (x,)).graph.nodes() if node.kind().startswith("quant_ops::_")]
    layer.forward = lambda x: x
    assert layer(x) is x
    del layer.forward
    assert torch.equal(layer(x), before)


def test_gradients_are_refused_as_before():
    layer = copy.deepcopy(_LINEAR)
    x = _input(layer)
    layer(x), layer(x)
    y = layer(x.requires_grad_())
    with pytest.raises(RuntimeError, match="expected no gradient"):
        y.sum().backward()


def test_a_kept_call_does_not_outlive_its_layer():
    layer = copy.deepcopy(_LINEAR)
    packed = weakref.ref(layer.packed_weight)
    layer(_input(layer))
    layer.qweight = layer.qweight.flip(0)  # frees the old weight
    gc.collect()
    assert packed() is None
    layer(_input(layer))
    packed = weakref.ref(layer.packed_weight)
    del layer
    gc.collect()
    assert packed() is None


def test_numbers_that_no_layer_keeps_are_refused():
    for number in (-1, 1 << 40):
        with pytest.raises(RuntimeError, match="int8_linear: expected the number of a call that a layer has kept"):
            torch.ops.quant_ops._int8_linear(torch.randn(2, 24), number)
