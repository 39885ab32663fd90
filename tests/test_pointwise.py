"""requantize, int8_add, int8_mul and int8_cat: the bits of the formula for every dtype, size, layout and instruction set."""

import itertools

import pytest
import reference
import torch
from operands import codes, scales
from torch.nn import functional as F
from views import SIZES, views_of

import quant_ops as qo

CODES = [torch.int8, torch.uint8]
RESULTS = [torch.int8, torch.uint8, torch.float32, torch.float16, torch.bfloat16]
EXACT = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6}


def zero_point(dtype):
    return torch.randint(*{torch.int8: (-128, 128), torch.uint8: (0, 256)}[dtype], (), dtype=torch.int32)


def value(x, scale, zero):
    return (x.int() - (0 if zero is None else zero)).float() * scale


def fused(a, b, c):
    return torch.from_numpy(reference.fma32(a.float().numpy(), b.numpy(), c.numpy()))


def result(y, dtype, scale, zero):
    if dtype.is_floating_point:
        return y.to(dtype)
    info = torch.iinfo(dtype)
    steps = torch.nan_to_num((y / scale).round(), nan=0.0)
    return (steps.double() + (0 if zero is None else zero)).clamp(info.min, info.max).to(dtype)


def out_options(dtype):
    if dtype.is_floating_point:
        return {"out_dtype": dtype}
    return {"out_dtype": dtype, "out_scale": scales() * 2, "out_zero_point": zero_point(dtype)}


def expected_of(y, options):
    return result(y, options["out_dtype"], options.get("out_scale"), options.get("out_zero_point"))


@pytest.mark.parametrize("dtype", CODES)
def test_requantize(isa, dtype):
    for out, activation, n in itertools.product(RESULTS, EXACT, [0, *SIZES, 1031]):
        x, scale, zero, options = codes(n, dtype=dtype), scales(), zero_point(dtype), out_options(out)
        y = qo.requantize(x, scale, zero, **options, activation=activation)
        assert reference.same_bits(y, expected_of(EXACT[activation](value(x, scale, zero)), options)), (out, activation, n)


@pytest.mark.parametrize("dtype", CODES)
def test_add(isa, dtype):
    for other, out, activation, n in itertools.product(CODES, RESULTS, EXACT, [1, 31, 33, 64, 515, 1029]):
        a, b, sa, sb, options = codes(n, dtype=dtype), codes(n, dtype=other), scales(), scales(), out_options(out)
        za, zb = zero_point(dtype), zero_point(other)
        y = qo.int8_add(a, b, sa, sb, za, zb, **options, activation=activation)
        exact = fused(b.int() - zb, sb, value(a, sa, za))
        assert reference.same_bits(y, expected_of(EXACT[activation](exact), options)), (other, out, activation, n)


def test_every_code_at_ties_and_limits(isa):
    """Scales whose ratio is a power of two put half of the values on a tie; others leave the range of what is computed fast."""
    x = torch.arange(-128, 128, dtype=torch.int8)
    for scale, out in [
        (0.02, 0.04),
        (0.5, 4.0),
        (3e38, 1.0),
        (1e-40, 1e-40),
        (1.0, 1e-38),
        (1e-3, 1e30),
        (-0.1, 0.2),
        (0.1, -0.2),
        (0.0, 0.0),
    ]:
        for zero, activation in itertools.product([None, torch.tensor(-100), torch.tensor(127)], [None, "relu", "relu6"]):
            s, o = torch.tensor(scale), torch.tensor(out)
            y = qo.requantize(x, s, zero, out_scale=o, out_zero_point=zero, activation=activation)
            assert torch.equal(y, result(EXACT[activation](value(x, s, zero)), torch.int8, o, zero)), (scale, out, zero, activation)
    for nan in (torch.nan, torch.inf):
        y = qo.requantize(x, torch.tensor(nan), out_scale=torch.tensor(1.0), out_zero_point=torch.tensor(3))
        assert torch.equal(y, result(value(x, torch.tensor(nan), None), torch.int8, torch.tensor(1.0), 3))


def product(a, b, sa, sb, za, zb):
    """The product of the differences is exact, that of the scales is rounded, and so is theirs."""
    return ((a.int() - (0 if za is None else za)).float() * (b.int() - (0 if zb is None else zb)).float()) * (sa * sb)


@pytest.mark.parametrize("dtype", CODES)
def test_mul(isa, dtype):
    for other, out, activation, n in itertools.product(CODES, RESULTS, EXACT, [0, 1, 31, 33, 64, 515, 1029]):
        a, b, sa, sb, options = codes(n, dtype=dtype), codes(n, dtype=other), scales(), scales(), out_options(out)
        za, zb = zero_point(dtype), zero_point(other)
        y = qo.int8_mul(a, b, sa, sb, za, zb, **options, activation=activation)
        assert reference.same_bits(y, expected_of(EXACT[activation](product(a, b, sa, sb, za, zb)), options)), (other, out, n)


@pytest.mark.parametrize("dtype", CODES)
def test_mul_by_a_factor_of_each_channel(isa, dtype):
    """Rows that are laid out several at a time, one by one, and longer than what is laid out; images of one pixel or channel."""
    shapes = [
        (2, 5, 3, 7),
        (3, 40, 9, 11),
        (1, 96, 1, 1),
        (2, 1, 4, 5),
        (1, 5000, 2, 2),
        (2, 3, 41, 50),
        (2, 8, 0, 3),
        (0, 4, 2, 2),
    ]
    for shape, other, out in itertools.product(shapes, CODES, [*CODES, torch.float32]):
        a, b, sa, sb, options = (
            codes(*shape, dtype=dtype),
            codes(*shape[:2], 1, 1, dtype=other),
            scales(),
            scales(),
            out_options(out),
        )
        za, zb = zero_point(dtype), zero_point(other)
        expected = expected_of(product(a, b, sa, sb, za, zb), options)
        for image, factor in itertools.product(
            views_of(a), [b, b.contiguous(memory_format=torch.channels_last), b.flip(1).flip(1)]
        ):
            y = qo.int8_mul(image, factor, sa, sb, za, zb, **options)
            assert reference.same_bits(y, expected), (shape, other, out)
            assert y.numel() == 0 or y.stride() == torch.empty_like(image).stride()


def test_every_product_at_ties_and_limits(isa):
    """All pairs of codes; scales that put results on ties, overflow, or are no numbers."""
    a = torch.arange(-128, 128, dtype=torch.int8).repeat_interleave(256)
    b = torch.arange(-128, 128, dtype=torch.int8).repeat(256)
    limits = [(0.5, 0.5, 1.0), (0.25, 2.0, 64.0), (3e38, 3e38, 1.0), (1e-30, 1e-30, 1e-38), (-0.1, 0.2, 1.0), (0.1, 0.1, -0.2)]
    for sa, sb, out in [*limits, (0.0, 1.0, 0.0), (torch.nan, 1.0, 1.0), (1.0, 1.0, 300.0), (1 / 255, 0.02, 0.02)]:
        sa, sb, out = torch.tensor(sa), torch.tensor(sb), torch.tensor(out)
        for za, zb in [(None, None), (torch.tensor(-128), torch.tensor(127))]:
            y = qo.int8_mul(a, b, sa, sb, za, zb, out_scale=out, out_zero_point=za)
            assert torch.equal(y, result(product(a, b, sa, sb, za, zb), torch.int8, out, za)), (sa, sb, out, za)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_smooth_activations(isa, activation):
    """Codes are those of the float32 result, which is torch's to a few units in the last place."""
    x, scale, zero = codes(2000), torch.tensor(0.04), torch.tensor(7)
    y = qo.requantize(x, scale, zero, activation=activation)
    v = value(x, scale, zero).double()
    exact = {"silu": F.silu(v), "gelu": F.gelu(v), "gelu_tanh": F.gelu(v, approximate="tanh")}[activation]
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-21 + 2**-23).all()
    options = {"out_scale": torch.tensor(0.03), "out_zero_point": torch.tensor(-90)}
    assert torch.equal(qo.requantize(x, scale, zero, **options, activation=activation), result(y, torch.int8, *options.values()))


def test_layouts_and_threads(threads):
    a, b, out = codes(3, 40, 9, 11), codes(3, 40, 9, 11, dtype=torch.uint8), {"out_scale": torch.tensor(0.05)}
    sa, sb = scales(), scales()
    expected = qo.int8_add(a, b, sa, sb, **out)
    for x, y in itertools.product(views_of(a), [*views_of(b), b.expand(3, 40, 9, 11)]):
        got = qo.int8_add(x, y, sa, sb, **out)
        assert torch.equal(got, expected)
        assert got.stride() == torch.empty_like(x).stride()
    long = codes(200_003)
    for count in (1, 3):
        threads(count)
        assert torch.equal(qo.requantize(long, sa, out_scale=sb), result(value(long, sa, None), torch.int8, sb, None))


# ---- int8_cat ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_cat(isa, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    parts = [
        codes(2, c, 5, 6, dtype=d).contiguous(memory_format=memory_format)
        for c, d in [(24, CODES[1]), (1, CODES[0]), (300, CODES[0])]
    ]
    given = [scales() for _ in parts]
    zeros = [zero_point(t.dtype) for t in parts]
    for out, dim in itertools.product(RESULTS, [1, -3]):
        options = out_options(out)
        y = qo.int8_cat(parts, given, zeros, dim, **options)
        assert torch.equal(y, torch.cat([qo.requantize(*one, **options) for one in zip(parts, given, zeros, strict=True)], dim))
        assert y.is_contiguous(memory_format=memory_format)


def test_cat_of_any_shape_and_layout():
    for shape in [(4,), (3, 4), (2, 3, 4), (2, 3, 4, 5), (2, 1, 3, 4, 5)]:
        for dim in range(-len(shape), len(shape)):
            parts = []
            for size in (2, 0, 5):
                sizes = list(shape)
                sizes[dim] = size
                parts.append(codes(*sizes))
            given = [scales() for _ in parts]
            expected = torch.cat([qo.requantize(t, s, out_scale=given[0]) for t, s in zip(parts, given, strict=True)], dim)
            for last in (parts[2], *views_of(parts[2])):
                assert torch.equal(qo.int8_cat([*parts[:2], last], given, [], dim, out_scale=given[0]), expected)


def test_cat_copies_codes_of_one_scale(isa):
    """With the scale and the zero point of the result every code stays, whatever the scale."""
    x = torch.arange(-128, 128, dtype=torch.int8).view(2, 128, 1, 1)
    zero = torch.tensor(-3)
    for scale in (1e-45, 1e-40, 1e-3, 0.1, 1.0, 7.7, 1e30, -0.3):
        s = torch.tensor(scale)
        y = qo.int8_cat([x, x], [s, s], [zero, zero], out_scale=s, out_zero_point=zero)
        assert torch.equal(y, torch.cat([x, x], 1))
        assert torch.equal(qo.requantize(x, s, zero, out_scale=s, out_zero_point=zero), x)
    big = torch.tensor(3e38)  # 2 * 3e38 is infinite
    y = qo.int8_cat([x], [big], [], out_scale=big)
    assert torch.equal(y, result(value(x, big, None), torch.int8, big, None))
