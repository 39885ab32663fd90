"""QuantLinear against the formula, with ``==``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import MODES, linear, linear_reference, modes, randn
from torch import nn

import quant_ops as qo


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 9),
    k=st.integers(1, 150),
    n=st.integers(1, 140),
    mode=st.sampled_from(list(MODES)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    bias=st.booleans(),
    relu=st.booleans(),
    output=st.sampled_from([{}, {"output_scale": 0.03}, {"output_scale": 0.03, "output_zero_point": -40}]),
    bits=st.sampled_from([8, 8, 4]),
    seed=st.integers(0, 2**20),
)
def test_linear_is_the_formula(m, k, n, mode, dtype, bias, relu, output, bits, seed):
    layer = linear(k, n, bias, seed=seed, relu=relu, weight_bits=bits, **MODES[mode], **output)
    x = randn(m, k, seed=seed, dtype=dtype)
    y = layer(x)
    assert y.dtype == (torch.int8 if output else dtype)
    assert torch.equal(y, linear_reference(layer, x))


@modes
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (2, 1, 3, 24), (0, 24), (2, 0, 24), (1, 1, 1, 1, 24)], ids=str)
def test_linear_takes_any_rank(mode, shape):
    layer = linear(24, 10, **MODES[mode])
    x = randn(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 10)
    assert torch.equal(y.reshape(-1, 10), linear_reference(layer, x.reshape(-1, 24)))


@modes
def test_linear_takes_views(mode):
    layer = linear(24, 10, **MODES[mode])
    base = randn(26, 7, 30)
    for x in (base[1:25, 2].T, base[:, :, 3:27], base[::2, ::3, :24], base[0].expand(3, 7, 30)[..., 6:], base[:24].movedim(0, 2)):
        assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 10), lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.Conv1d(4, 6, 3)])
def test_given_codes_are_the_layers(make):
    """As GPTQ gives them: no rounding of the float weight leads to them."""
    module = make()
    kind = {nn.Linear: qo.QuantLinear, nn.Conv2d: qo.QuantConv2d, nn.Conv1d: qo.QuantConv1d}[type(module)]
    codes, scale = torch.randint(-7, 8, module.weight.shape, dtype=torch.int8), torch.rand(len(module.weight)) + 0.5
    layer = kind.from_float(module.bfloat16(), weight_bits=4, weight_scale=scale, codes=codes)
    assert torch.equal(layer.qweight, codes)
    assert torch.equal(layer.weight_scale, scale)
    for arguments, message in [
        ({"codes": codes}, "expected weight_scale together with codes, got codes alone"),
        ({"codes": codes + 1, "weight_scale": scale}, r"expected codes in \[-7, 7\], got -6 to 8"),
        ({"codes": codes.int(), "weight_scale": scale}, r"expected codes torch\.int8 of shape \(.*\), got torch\.int32"),
        ({"codes": codes[1:], "weight_scale": scale}, r"expected codes torch\.int8 of shape \(.*\), got torch\.int8"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind.from_float(module, weight_bits=4, **arguments)
