"""quant_block_forward and quant_block_backward: against an exact formula, hand-worked blocks, and ml_dtypes' casts."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import reference
import sweep
import torch
from test_quantize_float import assert_same
from views import views_of

import quant_ops as qo

# exponent bits, mantissa bits, and the keywords of the elements of OCP's and NVIDIA's formats
ELEMENTS = {
    "MXFP8 E4M3": (4, 3, {"special": "nan"}),
    "MXFP8 E5M2": (5, 2, {"special": "ieee"}),
    "MXFP6 E3M2": (3, 2, {}),
    "MXFP6 E2M3": (2, 3, {}),
    "MXFP4": (2, 1, {}),
    "MXINT8": (1, 6, {"bias": 1}),
    "widest": (8, 7, {"special": "ieee"}),
    "no vector method": (5, 23, {}),
}
POWERS = ["floor", "even", "ceil", "round_up"]
RULES = [*POWERS, "e4m3", "bfloat16", "float32"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def data(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Blocks of very different magnitudes, some of zeros, some with NaN or Inf, and amax on and beside powers of two."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-12, 12, shape[:-1]).float()).unsqueeze(-1)
    flat = x.view(-1)
    flat[torch.randint(flat.numel(), (3,))] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x[0] = 0
    x[1] = torch.tensor([1.0, 2.0, 4.0, 7.9, 6.0, 1.75, 448.0, 3.5])[torch.randint(8, shape[1:])]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_formats_rules_dims_and_tails(isa, rule, dtype):
    cases = list(itertools.product(ELEMENTS, [(9, 70), (4, 33, 6), (3, 5, 4, 6)], (1, 16, 32, 100)))
    for name, shape, block in sweep.part(cases, 30):
        e, m, options = ELEMENTS[name]
        x = data(shape, dtype)
        for dim in range(-1, x.dim() - 1):
            expected, _ = reference.quantize_blocks(x, dim, block, e, m, scale_rule=rule, **options)
            for view in views_of(x):
                assert_same(qo.quant_block_forward(view, dim, block, e, m, scale_rule=rule, **options), expected)


@pytest.mark.parametrize("rounding", ["nearest_away", "toward_zero", "stochastic"])
def test_other_roundings(isa, rounding):
    for shape, dim, block in [((5, 70), -1, 32), ((5, 70), 0, 2), ((3, 40, 9), 1, 16), ((2, 3, 4, 5), 1, 3), ((1, 5000), 1, 4096)]:
        x = data(shape, torch.float32) if shape[0] > 1 else torch.randn(shape)
        words = reference.philox(np.arange(x.numel()), 11).reshape(shape)
        expected, _ = reference.quantize_blocks(x, dim, block, 2, 1, rounding=rounding, words=words)
        for view in views_of(x):
            y = qo.quant_block_forward(view, dim, block, 2, 1, rounding=rounding, seed=11)
            assert_same(y, expected)


def test_blocks_worked_by_hand():
    """OCP Microscaling v1.0, section 6.3: 2^floor(log2(amax)) / 2^emax; beyond the largest value elements saturate."""
    x = torch.tensor([[7.9, 1.0, -0.3, 0.2], [0.0, 0.0, -0.0, 0.0], [6.0, 5.0, 2.5, -0.26]])
    y = qo.quant_block_forward(x, -1, 4, 2, 1)  # E2M1: emax 2, so all scales are 1
    assert y.tolist() == [[6.0, 1.0, -0.5, 0.0], [0.0] * 4, [6.0, 4.0, 2.0, -0.5]]
    assert y[1].signbit().tolist() == [False, False, True, False]
    assert qo.quant_block_forward(x, -1, 4, 2, 1, scale_rule="even")[0].tolist() == [8.0, 1.0, 0.0, 0.0]  # 7.9 rounds to 8
    assert qo.quant_block_forward(x, -1, 4, 2, 1, scale_rule="ceil")[2].tolist() == [6.0, 4.0, 2.0, 0.0]  # scale 2, 2.5 is a tie
    assert qo.quant_block_forward(x, -1, 4, 2, 1, scale_rule="round_up")[2].tolist() == [6.0, 4.0, 2.0, -0.5]  # 6 / 6: scale 1
    integers = qo.quant_block_forward(torch.tensor([1.99, -1.99, 0.5, 0.01]), 0, 32, 1, 6, bias=1)  # MXINT8: steps of 2^-6
    assert integers.tolist() == [127 / 64, -127 / 64, 0.5, 1 / 64]


def test_scales_at_the_ends_of_e8m0():
    """Exponents are -127 to 127; what is smaller becomes -127, and beyond 127 the scale is NaN."""
    smallest = torch.tensor([2.0**-149, 2.0**-140, 2.0**-130, 2.0**-127])
    for block in (1, 4):
        for dtype in (torch.float32, torch.bfloat16):
            x = smallest.to(dtype)
            expected, scale = reference.quantize_blocks(x, 0, block, 2, 1)
            assert (scale == 2.0**-127).all()
            assert_same(qo.quant_block_forward(x, 0, block, 2, 1), expected)
    large = torch.tensor([3.0e38, 2.0**127, 1.0])
    assert qo.quant_block_forward(large, 0, 1, 1, 6, bias=1).isfinite().all()  # emax 0: the scale is 2^127
    assert qo.quant_block_forward(large, 0, 1, 1, 6, bias=1, scale_rule="ceil").isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4(isa, dtype):
    """Scales of 16 by ml_dtypes' E4M3, elements by its E2M1; one level, and two with a scale for the tensor."""
    x = (torch.randn(6, 64) * torch.tensor([1e-6, 1e-3, 1.0, 30.0, 1e4, 0.0]).unsqueeze(1)).to(dtype)
    blocks = x.float().numpy().reshape(6, 4, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    for tensor_scale in (None, torch.tensor(float(amax.max())) / (448 * 6)):
        second = np.float32(1) if tensor_scale is None else tensor_scale.numpy()
        ratio = np.clip(amax / np.float32(6) / second, np.float32(2**-6), np.float32(448))
        scale = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * second
        elements = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        expected = (elements * scale).reshape(6, 64)
        assert_same(qo.quant_block_forward(x, -1, 16, 2, 1, tensor_scale, scale_rule="e4m3"), expected)


def test_adaptive_block_floating_point_by_a_divisor(isa):
    """bfloat16 scales and integer elements (arXiv 2205.06287): a gain makes the range narrower, and elements saturate."""
    x = torch.randn(7, 128)
    for bits, gain in ((8, 1.0), (6, 4.0)):
        steps = 2 ** (bits - 1) - 1
        amax = x.view(7, 2, 64).abs().amax(-1, keepdim=True).bfloat16().float()
        scale = amax / (steps * gain)
        expected = (x.view(7, 2, 64) / scale).round().clamp(-steps, steps) * scale
        y = qo.quant_block_forward(
            x, -1, 64, 1, bits - 2, bias=3 - bits, scale_rule="bfloat16", scale_divisor=steps * gain
        )  # a quantum of 1
        assert torch.equal(y, expected.view(7, 128))


def test_threads_change_no_bit(threads):
    x = data((37, 65, 21), torch.float32)
    for dim, rounding in itertools.product((0, 1, 2), ("nearest_even", "stochastic")):
        round_it = lambda dim=dim, rounding=rounding: qo.quant_block_forward(x, dim, 32, 4, 3, rounding=rounding, seed=3)  # noqa: E731
        threads(1)
        expected = round_it()
        for count in (2, 3, 5):
            threads(count)
            assert_same(round_it(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_passes_inside_of_the_range(isa, dtype):
    x = data((6, 70, 5), dtype)
    for name, rule, dim in itertools.product(("MXFP4", "MXINT8"), ("floor", "float32"), (0, 1, 2)):
        e, m, options = ELEMENTS[name]
        _, scale = reference.quantize_blocks(x, dim, 32, e, m, scale_rule=rule, **options)
        inside = (x.float() / scale).abs() <= reference.largest_of(e, m, options.get("bias"))
        assert 0 < int(inside.sum()) < x.numel()
        for view, grad in zip(views_of(x), views_of(torch.randn(x.shape)), strict=True):
            expected = torch.where(inside, grad.to(dtype), 0)
            y = qo.quant_block_backward(grad, view, dim, 32, e, m, scale_rule=rule, **options)
            assert torch.equal(y, expected)
            leaf = view.detach().requires_grad_()
            y = qo.quant_block_forward(leaf, dim, 32, e, m, scale_rule=rule, **options)
            assert torch.equal(torch.autograd.grad(y, leaf, grad.to(dtype))[0], expected)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (1,), (1, 1)])
def test_empty_and_single_elements(shape):
    x = torch.randn(shape)
    for dim in range(len(shape)):
        expected, _ = reference.quantize_blocks(x, dim, 32, 4, 3) if x.numel() else (x, None)
        assert torch.equal(qo.quant_block_forward(x, dim, 32, 4, 3), expected)
        assert qo.quant_block_backward(x, x, dim, 32, 4, 3).shape == shape


X = torch.randn(2, 3)
REFUSED = [
    (lambda: qo.quant_block_forward(torch.tensor(1.0), 0, 32, 4, 3), r"tensor to have at least one dimension, got shape \(\)"),
    (lambda: qo.quant_block_forward(X, 2, 32, 4, 3), r"dim in \[-2, 1\], got 2"),
    (lambda: qo.quant_block_forward(X, 0, 0, 4, 3), r"block_size >= 1, got 0"),
    (lambda: qo.quant_block_forward(X, 0, 32, 0, 3), r"exponent_bits in \[1, 8\], got 0"),
    (lambda: qo.quant_block_forward(X, 0, 32, 4, 3, scale_rule="up"), r"scale_rule to be one of .*got 'up'"),
    (lambda: qo.quant_block_forward(X, 0, 32, 4, 3, scale_divisor=2.0), r"no scale_divisor with a scale that is a power of two"),
    (
        lambda: qo.quant_block_forward(X, 0, 32, 4, 3, scale_rule="float32", scale_divisor=0.0),
        r"scale_divisor in \[2\^-126, 2\^128\), got 0",
    ),
    (lambda: qo.quant_block_forward(X, 0, 32, 4, 3, torch.tensor(1.0)), r"scale_rule 4 \(e4m3\) with a tensor_scale, got 0"),
    (lambda: qo.quant_block_forward(X, 0, 32, 4, 3, torch.ones(2), scale_rule="e4m3"), r"a tensor_scale of one element"),
    (lambda: qo.quant_block_backward(X[0], X, 0, 32, 4, 3), r"grad\.shape == tensor\.shape"),
]
REFUSED_DTYPES = [
    (lambda: qo.quant_block_forward(X.double(), 0, 32, 4, 3), r"tensor\.dtype in .*got float64.*convert it first"),
    (lambda: qo.quant_block_forward(X.int(), 0, 32, 4, 3), r"tensor\.dtype in .*got int32"),
    (
        lambda: qo.quant_block_forward(X, 0, 32, 4, 3, torch.ones((), dtype=torch.bfloat16), scale_rule="e4m3"),
        r"tensor_scale\.dtype float32, got bfloat16",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED)
def test_bad_values_are_refused(call, sentence):
    with pytest.raises(ValueError, match=r"quant_ops\.quant_block_.*: expected " + sentence):
        call()


@pytest.mark.parametrize(("call", "sentence"), REFUSED_DTYPES)
def test_bad_dtypes_are_refused(call, sentence):
    with pytest.raises(TypeError, match=r"quant_ops\.quant_block_.*: expected " + sentence):
        call()
