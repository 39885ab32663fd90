"""The pools and the upsampling of codes: torch's windows, exact sums, any layout, every instruction set."""

import itertools

import pytest
import reference
import torch
from operands import codes, scales
from test_pointwise import CODES, RESULTS, expected_of, out_options, zero_point
from torch.nn import functional as F
from views import views_of

import quant_ops as qo

# kernel_size, stride, padding, ceil_mode
WINDOWS = [
    (2, None, 0, False),
    (3, 2, 1, False),
    (3, 2, 1, True),
    (3, 2, 0, True),
    (3, 1, 1, False),
    (5, 1, 2, False),
    ((2, 3), (1, 2), (1, 0), True),
    ((1, 7), (3, 5), (0, 3), False),
    (4, 3, 2, True),
    (1, 2, 0, False),
]
SHAPES = [(2, 3, 9, 11), (1, 32, 8, 7), (2, 70, 7, 8), (1, 200, 7, 7), (16, 8, 9)]


def layouts(x):
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)


def check_format(y, x):
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.stride(1) == 1
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", CODES)
def test_max_pool(isa, dtype):
    for shape, (kernel, stride, pad, ceil), dilation in itertools.product(SHAPES, WINDOWS, [1, 2, (1, 3)]):
        wide = codes(*shape, dtype=dtype)
        try:
            exact = F.max_pool2d(wide.float(), kernel, stride, pad, dilation, ceil)
        except RuntimeError:  # no window fits
            with pytest.raises(ValueError, match=r"a result of at least 1 x 1, got|padding of at most half"):
                qo.int8_max_pool2d(wide, kernel, stride, pad, dilation, ceil)
            continue
        expected = exact.nan_to_num(neginf=torch.iinfo(dtype).min).to(dtype)
        for x in layouts(wide):
            y = qo.int8_max_pool2d(x, kernel, stride, pad, dilation, ceil)
            assert torch.equal(y, expected), (shape, kernel, stride, pad, ceil, dilation)
            check_format(y, x)


@pytest.mark.parametrize("dtype", CODES)
def test_avg_pool(isa, dtype):
    for shape, (kernel, stride, pad, ceil), include in itertools.product(SHAPES, WINDOWS, [False, True]):
        wide, scale, zero = codes(*shape, dtype=dtype), scales(), zero_point(dtype)
        steps, ones = (wide.int() - zero).double(), torch.ones(shape, dtype=torch.float64)
        sums = F.avg_pool2d(steps, kernel, stride, pad, ceil, divisor_override=1)
        there = F.avg_pool2d(ones, kernel, stride, pad, ceil, divisor_override=1)
        count = (there / F.avg_pool2d(ones, kernel, stride, pad, ceil, include)).round()
        for divisor, out, x in itertools.product([None, -5], RESULTS[:3], layouts(wide)):
            options = out_options(out)
            y = qo.int8_avg_pool2d(x, scale, zero, kernel, stride, pad, ceil, include, divisor, **options)
            exact = sums.float() * (scale / (count if divisor is None else torch.tensor(divisor)).float())
            assert reference.same_bits(y.contiguous(), expected_of(exact, options)), (shape, kernel, stride, pad, ceil, include)
            check_format(y, x)


@pytest.mark.parametrize("dtype", CODES)
def test_adaptive_avg_pool(isa, dtype):
    for shape, size in itertools.product([*SHAPES, (1, 1030, 7, 7), (3, 5, 1, 1)], [1, (3, 2), (7, 9), 7]):
        wide, scale, zero = codes(*shape, dtype=dtype), scales(), zero_point(dtype)
        rows, columns = (size, size) if isinstance(size, int) else size
        parts = []
        for h, w in itertools.product(range(rows), range(columns)):
            top, left = h * shape[-2] // rows, w * shape[-1] // columns
            bottom, right = -(-(h + 1) * shape[-2] // rows), -(-(w + 1) * shape[-1] // columns)
            window = (wide.int() - zero)[..., top:bottom, left:right].flatten(-2)
            parts.append(window.sum(-1).float() * (scale / torch.tensor(float(window.shape[-1]))))
        exact = torch.stack(parts, -1).unflatten(-1, (rows, columns))
        for out, x in itertools.product(RESULTS, layouts(wide)):
            options = out_options(out)
            y = qo.int8_adaptive_avg_pool2d(x, scale, zero, size, **options)
            assert reference.same_bits(y.contiguous(), expected_of(exact, options)), (shape, size, out)
            check_format(y, x)


@pytest.mark.parametrize("factor", [1, 2, 3, (2, 5)])
def test_upsample(factor):
    for shape, dtype in itertools.product(SHAPES, CODES):
        wide = codes(*shape, dtype=dtype)
        vertical, horizontal = (factor, factor) if isinstance(factor, int) else factor
        expected = wide.repeat_interleave(vertical, -2).repeat_interleave(horizontal, -1)
        for x in layouts(wide):
            y = qo.int8_upsample_nearest2d(x, factor)
            assert torch.equal(y, expected)
            check_format(y, x)
    image = codes(2, 3, 4, 5)
    assert torch.equal(F.interpolate(image.float(), scale_factor=2.0).to(torch.int8), qo.int8_upsample_nearest2d(image, 2))


def test_views_batches_and_threads(threads):
    wide = codes(4, 40, 20, 24)
    scale, zero = scales(), torch.tensor(5)
    calls = [
        lambda x: qo.int8_max_pool2d(x, 3, 2, 1),
        lambda x: qo.int8_avg_pool2d(x, scale, zero, 3, 2, 1),
        lambda x: qo.int8_adaptive_avg_pool2d(x, scale, zero, (3, 5)),
        lambda x: qo.int8_upsample_nearest2d(x, 2),
    ]
    for call in calls:
        threads(1)
        expected = call(wide)
        for x, count in itertools.product(views_of(wide), (1, 3)):
            threads(count)
            assert torch.equal(call(x), expected)
        last = wide.contiguous(memory_format=torch.channels_last)
        for part in (slice(1, 3), slice(0, 0)):
            assert torch.equal(call(last[part, 8:]), expected[part, 8:])
        assert torch.equal(call(wide[2]), expected[2])
        assert call(wide[:, :0]).shape == expected[:, :0].shape


def test_the_largest_sums(isa):
    """Every code as far as can be from the zero point, in windows as large as an image."""
    for value, zero, dtype in [(127, -128, torch.int8), (-128, 127, torch.int8), (255, 0, torch.uint8), (0, 255, torch.uint8)]:
        x = torch.full((1, 40, 60, 70), value, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for image in (x, x.contiguous()):
            y = qo.int8_adaptive_avg_pool2d(image, torch.tensor(1.0), torch.tensor(zero), 1)
            assert torch.equal(y, torch.full((1, 40, 1, 1), float((value - zero) * 4200) * (1 / torch.tensor(4200.0))))
