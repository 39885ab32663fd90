"""Depthwise convolutions by int8_conv2d: exact sums, and bands of rows whose seams do not show."""

import itertools
import random

import pytest
import reference
import torch

import quant_ops as qo


@pytest.mark.parametrize("seed", range(4))
def test_sums_are_exact(isa, seed):
    """Kernels of up to 7 x 7 and of one row or column, bands and runs that end anywhere, 8-bit input that is read where it lies."""
    rng = random.Random(1000 + seed)
    for _ in range(60):
        c = rng.choice([2, 3, 15, 16, 17, 32, 48, 63, 64, 65, 130])
        r, s = rng.choice([(3, 3), (5, 5), (7, 7), (1, 1), (1, 7), (9, 1), (2, 4), (4, 3), (8, 2)])
        stride, dilation = [rng.randint(1, 3), rng.randint(1, 3)], [rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])]
        padding = [rng.randint(0, 2 * dilation[i // 2]) for i in range(4)]
        h, w = rng.randint(1, 40), rng.choice([1, 2, 5, 7, 8, 31, 90, 150])
        if h + padding[0] + padding[1] <= dilation[0] * (r - 1) or w + padding[2] + padding[3] <= dilation[1] * (s - 1):
            continue
        dtype = rng.choice([torch.int8, torch.uint8])
        info = torch.iinfo(dtype)
        zero = rng.choice([info.min, info.max, 0, rng.randint(info.min, info.max)])
        x = torch.randint(info.min, info.max + 1, (rng.choice([1, 3]), c, h, w)).to(dtype)
        weight = torch.randint(-128, 128, (c, 1, r, s), dtype=torch.int8)
        expected = reference.conv_acc(x, weight, stride, padding, dilation, c, zero).float()
        one = torch.tensor(1.0)
        last = torch.full((x.shape[0], h + 2, w + 3, c + 16), 77, dtype=dtype)  # with other pixels and channels around
        last[:, 1:-1, 2:-1, :c] = x.permute(0, 2, 3, 1)
        views = [
            x,
            x.contiguous(memory_format=torch.channels_last),
            last.permute(0, 3, 1, 2)[:, :c, 1:-1, 2:-1],
            last[..., :c].contiguous().permute(0, 3, 1, 2)[:, :, 1:-1, 2:-1],
        ]
        for view, packed in zip(views, [None, None, qo.pack_weight(weight, c), qo.pack_weight(weight, c)], strict=True):
            y = qo.int8_conv2d(view, weight, one, None, stride, padding, dilation, c, one, torch.tensor(zero), packed_weight=packed)
            assert torch.equal(y, expected), (c, h, w, r, s, stride, padding, dilation, dtype, zero)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 144, 40, 50), (1, 20, 61, 300), (3, 960, 7, 7)])
def test_bands_are_seamless(isa, threads, shape, channels_last):
    """Images that take several bands, by several workers: quantized, static and dynamic."""
    x = torch.randn(shape) * torch.rand(shape[0], 1, 1, 1)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    c = shape[1]
    weight, weight_scale, bias = torch.randint(-128, 128, (c, 1, 5, 3), dtype=torch.int8), torch.rand(c) * 0.01, torch.randn(c)
    for stride, dilation, dynamic, out in itertools.product([1, 2], [1, 3], [False, True], [None, torch.int8]):
        kwargs = {} if dynamic else {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(5)}
        scale, zero = qo.choose_qparams(x, [1, 2, 3], -127, 127, False) if dynamic else kwargs.values()
        q = qo.quant_tensor_forward(x, scale, zero, -127 if dynamic else -128, 127, True, False)
        padding = (2 * dilation, 2 * dilation, dilation, dilation)
        acc = reference.conv_acc(q, weight, (stride, stride), padding, (dilation, dilation), c, zero)
        expected = reference.epilogue(acc, scale, weight_scale[:, None, None], bias[:, None, None])
        if out == torch.int8:
            expected = reference.requantize(expected, 0.04, -3, out)
            kwargs |= {"out_scale": torch.tensor(0.04), "out_zero_point": torch.tensor(-3)}
        for n in (1, 3):
            threads(n)
            y = qo.int8_conv2d(x, weight, weight_scale, bias, stride, padding, dilation, c, out_dtype=out, **kwargs)
            assert reference.same_bits(y, expected), (stride, dilation, dynamic, out, n)
