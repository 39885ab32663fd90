"""quant_tensor_forward and dequant_tensor against the formulas: shapes, strides, dtypes, special values."""

import functools
import itertools

import pytest
import reference
import sweep
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from views import FLOATS, SIZES, draw_view, views_of

import quant_ops as qo

RANGES = [(-128, 127), (0, 255), (-8, 7), (-32768, 32767), (0, 65535), (-(2**31), 2**31 - 1)]
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 3.3e38, -3.3e38, 0.5, 1.5, -0.5, 2.5]


def code_dtype(qmin, qmax):
    fits = [
        d for d in (torch.int8, torch.uint8, torch.int16, torch.int32) if torch.iinfo(d).min <= qmin and qmax <= torch.iinfo(d).max
    ]
    return fits[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_forward_over_granularities_ranges_and_strides(isa, dtype, asymmetric):
    x = (torch.randn(3, 5, 4, 6) * 50).to(dtype)
    x.view(-1)[:13] = torch.tensor(SPECIAL).to(dtype)
    for shape, (qmin, qmax) in itertools.product(
        [(), (1,), (3, 1, 1, 1), (1, 5, 1, 1), (5, 1, 1), (6,), (1, 5, 1, 6), (3, 1, 4, 1), (3, 5, 4, 6)], RANGES
    ):
        scale = torch.rand(shape) + 0.01
        zero = torch.randint(-200, 200, shape, dtype=torch.int32)
        given_zero = zero if asymmetric else None
        for view in views_of(x):
            for simulate in (True, False):
                y = qo.quant_tensor_forward(view, scale, zero, qmin, qmax, asymmetric, simulate)
                expected = reference.quantize(x, scale, given_zero, qmin, qmax, simulate)
                if not simulate:
                    assert y.dtype == code_dtype(qmin, qmax)
                    expected = expected.to(y.dtype)
                assert reference.same_bits(y, expected)
                assert y.stride() == torch.empty_like(view).stride()


@pytest.mark.parametrize(
    "zero_dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16]
)
def test_zero_point_dtypes(zero_dtype):
    """Integers as they are; floating ones rounded to even and clamped to the codes first, so that a learned one works."""
    x = torch.randn(4, 9) * 20
    values = [0.5, 1.5, -0.5, 3.2, 300.0, -300.0, torch.nan] if zero_dtype.is_floating_point else [0, 1, 100, 127]
    for value in values:
        zero = torch.tensor(value).to(zero_dtype)
        for simulate in (True, False):
            y = qo.quant_tensor_forward(x, torch.tensor(0.3), zero, -128, 127, True, simulate)
            expected = reference.quantize(x, torch.tensor(0.3), zero, -128, 127, simulate)
            assert reference.same_bits(y, expected if simulate else expected.to(torch.int8))


def test_special_values_have_the_documented_codes():
    x, s = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 3e38, -3e38]), torch.tensor(0.1)
    codes = qo.quant_tensor_forward(x, s, torch.tensor(5), -100, 100, True, False)
    assert codes.tolist() == [5, 100, -100, 5, 100, -100]
    assert qo.quant_tensor_forward(x, s, torch.tensor(120), -100, 100, True, False)[0] == 100  # NaN: clamp(zero_point)
    simulated = qo.quant_tensor_forward(x, s, None, -100, 100)
    assert simulated[0].isnan()
    assert not torch.signbit(simulated[3])
    per_channel = qo.quant_tensor_forward(x[None].repeat(2, 1), torch.tensor([[0.1], [0.2]]), None, -100, 100, simulate=False)
    assert per_channel.tolist() == [[0, 100, -100, 0, 100, -100]] * 2


def test_degenerate_scales_give_what_the_formula_gives():
    x = torch.tensor([1.0, -1.0, 0.0, 5.0])
    for scale in (0.0, -1.0, torch.nan, torch.inf, 1e-45):
        for simulate in (True, False):
            y = qo.quant_tensor_forward(x, torch.tensor(scale), None, -128, 127, simulate=simulate)
            assert torch.equal(
                y.double().nan_to_num(1e9),
                reference.quantize(x, torch.tensor(scale), None, -128, 127, simulate).double().nan_to_num(1e9),
            )


def test_blocks_are_scales_of_a_finer_grid():
    x = torch.randn(6, 32)
    scale = torch.rand(3, 4) + 0.1
    zero = torch.randint(-9, 9, (3, 4))
    wide = scale.repeat_interleave(2, 0).repeat_interleave(8, 1), zero.repeat_interleave(2, 0).repeat_interleave(8, 1)
    for simulate in (True, False):
        y = qo.quant_tensor_forward(x, scale, zero, -128, 127, True, simulate, block_size=[2, 8])
        assert torch.equal(y, qo.quant_tensor_forward(x, *wide, -128, 127, True, simulate))
    q = qo.quant_tensor_forward(x, scale, zero, -128, 127, True, False, block_size=[2, 8])
    assert torch.equal(qo.dequant_tensor(q, scale, zero, block_size=[2, 8]), (q - wide[1]) * wide[0])


def test_writes_stay_inside_and_views_are_read_where_they_are():
    whole = torch.full((40, 50), 42.0)
    for offset in range(20):
        part = whole[3 : 3 + offset, offset : offset + 17]
        part.copy_(torch.randn(part.shape))
        before = whole.clone()
        y = qo.quant_tensor_forward(part, torch.tensor(0.1), None, -128, 127)
        assert torch.equal(y, reference.quantize(part, torch.tensor(0.1), None, -128, 127, True))
        assert torch.equal(whole, before)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 2, 2), ()])
def test_empty_and_scalar_tensors(shape):
    x = torch.randn(shape)
    assert qo.quant_tensor_forward(x, torch.tensor(0.1), None, -128, 127).shape == shape
    assert qo.quant_tensor_forward(x, torch.tensor(0.1), None, 0, 255, simulate=False).dtype == torch.uint8
    assert qo.dequant_tensor(x.to(torch.int8), torch.tensor(0.1)).shape == shape
    dx, ds, _ = qo.quant_tensor_backward(x, x, torch.tensor(0.1), None, -128, 127)
    assert dx.shape == shape
    assert ds.shape == ()


@settings(max_examples=sweep.examples(150), deadline=None)
@given(data=st.data())
def test_forward_of_random_shapes_and_broadcasts(data):
    shape = data.draw(st.lists(st.integers(0, 7), max_size=5))
    permutation = data.draw(st.permutations(range(len(shape))))
    x = (torch.randn([shape[i] for i in permutation]) * 30).permute([permutation.index(i) for i in range(len(shape))])
    if shape and data.draw(st.booleans()):
        x = x[..., :1].expand(shape)  # stride 0
    keep = [n if data.draw(st.booleans()) else 1 for n in shape]
    drop = data.draw(st.integers(0, len(shape)))
    scale = torch.rand(keep[drop:]) + 0.05
    zero = torch.randint(-20, 20, [1 if data.draw(st.booleans()) else n for n in keep])
    simulate = data.draw(st.booleans())
    y = qo.quant_tensor_forward(x, scale, zero, -100, 120, True, simulate)
    expected = reference.quantize(x, scale, zero, -100, 120, simulate)
    assert reference.same_bits(y, expected if simulate else expected.to(torch.int8))


@settings(max_examples=sweep.examples(150), deadline=None)
@given(data=st.data())
def test_rows_columns_and_blocks_of_random_views(data):
    """Long and short runs, parameters along any dimensions or blocks, ordinary and odd scales, dequantized again."""
    dims = data.draw(st.integers(1, 4))
    shape = [data.draw(st.sampled_from(SIZES if d < 2 else SIZES[:6])) for d in range(dims)]
    shape = data.draw(st.permutations(shape))
    blocks = [data.draw(st.sampled_from([1, 1, 2, 8])) for _ in shape] if data.draw(st.booleans()) else [1] * dims
    shape = [n * b if b > 1 and n < 20 else n for n, b in zip(shape, blocks, strict=True)]
    blocks = [b if n % b == 0 else 1 for n, b in zip(shape, blocks, strict=True)]
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    values = (torch.randn(shape) * 30).to(dtype)
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)[: values.numel()].to(dtype)
    grid = [n // b for n, b in zip(shape, blocks, strict=True)]
    scale, zero = (torch.rand([n if data.draw(st.booleans()) else 1 for n in grid]) + 0.05 for _ in range(2))
    zero = ((zero - 0.5) * 60).int()
    if data.draw(st.integers(0, 9)) == 0:
        scale.view(-1)[0] = data.draw(st.sampled_from([0.0, -0.3, torch.nan, torch.inf, 1e-45, 1e-38, 3e38]))
    if scale.dim() > 1 and data.draw(st.booleans()):
        scale = scale.transpose(0, -1).contiguous().transpose(0, -1)
    repeat = lambda t: functools.reduce(  # noqa: E731
        lambda t, d: t.repeat_interleave(blocks[d], d) if t.shape[d] > 1 else t, range(dims), t
    )
    x = draw_view(data, values)
    qmin, qmax = data.draw(st.sampled_from(RANGES[:5]))
    for simulate in (True, False):
        y = qo.quant_tensor_forward(x, scale, zero, qmin, qmax, True, simulate, block_size=blocks)
        expected = reference.quantize(values, repeat(scale), repeat(zero), qmin, qmax, simulate)
        assert reference.same_bits(y, expected if simulate else expected.to(y.dtype))
    back = qo.dequant_tensor(draw_view(data, y), scale, zero, dtype, block_size=blocks)
    assert reference.same_bits(back, ((y.long() - repeat(zero)).float() * repeat(scale)).to(dtype))


def test_agrees_with_torch_where_the_definitions_agree():
    """torch multiplies by the reciprocal: with a power of two as the scale both are the same."""
    x = torch.randn(8, 16, 5, 5) * 10
    scale, zero = torch.tensor(0.125), torch.tensor(3, dtype=torch.int32)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127)
    assert torch.equal(qo.quant_tensor_forward(x, scale, zero, -128, 127, True), expected)
    q = torch.quantize_per_tensor(x, 0.125, 3, torch.qint8)
    # quantize_per_tensor adds the zero point before rounding, which moves ties: compare away from them
    away = ((x / 0.125).frac().abs() - 0.5).abs() > 1e-3
    assert torch.equal(qo.quant_tensor_forward(x, scale, zero, -128, 127, True, False)[away], q.int_repr()[away])


@pytest.mark.slow
def test_more_than_2_31_elements():
    """8 GiB in, 2 GiB out: the last elements are where 32-bit indices would have wrapped."""
    x = torch.zeros(2**31 + 64)
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    y = qo.quant_tensor_forward(x, torch.tensor(0.1), None, -128, 127, simulate=False)
    assert y[-3:].tolist() == [10, -20, 30]
    assert not y[: 2**20].any()


# ---- dequantize ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codes", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_dequantize(isa, dtype, codes):
    info = torch.iinfo(codes)
    q = torch.randint(info.min, info.max, (3, 4, 33)).to(codes)
    q.view(-1)[:2] = torch.tensor([info.min, info.max]).to(codes)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in [(), (4, 1), (33,), (3, 1, 33)]:
        scale, zero = torch.rand(shape) + 0.01, torch.randint(-1000, 1000, shape)
        for view in views_of(q):
            y = qo.dequant_tensor(view, scale, zero, dtype)
            assert reference.same_bits(y, ((q.long() - zero).to(compute) * scale.to(compute)).to(dtype))
