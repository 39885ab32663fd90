"""The operators on codes between products, against torch's float operators on channels_last images.

Results are checked before anything is timed: with codes as floats and scales of 1 both are exact, or nearly so.
"""

import functools

import pytest
import torch
from torch.nn import functional as F

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.operators.cases import cases

ONE = torch.tensor(1.0)


def _scaled(x):
    return (x * x[:, :, :1, :1] / 128).round().clamp(-128, 127)


OPERATORS = {  # ours on codes, torch's on floats, images read
    "requantize": (lambda q: qo.requantize(q, ONE, out_scale=ONE * 2), lambda x: (x / 2).round(), 1),
    "add": (lambda q: qo.int8_add(q, q, ONE, ONE, out_scale=ONE * 4), lambda x: ((x + x) / 4).round(), 2),
    "channels": (lambda q: qo.int8_mul(q, q[:, :, :1, :1], ONE, ONE / 128, out_scale=ONE), _scaled, 1),
    "cat": (lambda q: qo.int8_cat([q, q], [ONE, ONE], [], out_scale=ONE), lambda x: torch.cat([x, x], 1), 2),
    "max_pool": (lambda q: qo.int8_max_pool2d(q, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), 1),
    "adaptive": (lambda q: qo.int8_adaptive_avg_pool2d(q, ONE, None, 1), lambda x: F.adaptive_avg_pool2d(x, 1), 1),
    "upsample": (lambda q: qo.int8_upsample_nearest2d(q, 2), lambda x: F.interpolate(x, scale_factor=2.0), 1),
}


@functools.lru_cache(maxsize=1)
def codes(shape):
    q = torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return q.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("contender", ["ours", "eager"])
@cases(shapes.TENSOR)
def bench_codes(measure, case, contender, operator):
    ours, eager, read = OPERATORS[operator]
    q = codes(case[1])
    x = q.float()
    result = ours(q)
    torch.testing.assert_close(result.float(), eager(x), atol=1e-4, rtol=0)
    call = (lambda: ours(q)) if contender == "ours" else (lambda: eager(x))
    measure(call, stem=f"codes {operator}", case=case, contender=contender, memory=read * q.numel() + result.nbytes)
