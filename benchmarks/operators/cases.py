"""What the benchmarks of this folder share: the parametrization by shape, the check of a result, and the tensors and scales."""

import functools

import pytest
import torch

from benchmarks.common import shapes
from quant_ops.report.error import sqnr

QMIN, QMAX = -128, 127
SCALES = ("(1,)", "(N,1,1,1)", "(1,C,1,1)")  # shapes of the scale of an N x C x H x W tensor


def cases(sets):
    """Parametrizes a benchmark over (name of the set, shape)."""
    return pytest.mark.parametrize(
        "case", [pytest.param((name, s), id=f"{name}-{shapes.text(s)}") for name, group in sets.items() for s in group]
    )


def check(result, expected, reference):
    """`expected` is the exact result, or the least SQNR in dB against the reference."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(result, expected)
    else:
        assert sqnr(reference, result) >= expected


@functools.lru_cache(maxsize=1)
def tensor(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def scale_of(kind, shape):
    """Positive scales of one of the shapes SCALES; some elements are clipped."""
    n, c = shape[:2]
    size = dict(zip(SCALES, ((1,), (n, 1, 1, 1), (1, c, 1, 1)), strict=True))[kind]
    return 0.01 + 0.02 * torch.rand(size, generator=torch.Generator().manual_seed(1))


def axis(kind):
    """The axis that torch's per-channel operators take for such a scale; -1 is per tensor."""
    return SCALES.index(kind) - 1


def eager_codes(x, scale):
    return torch.clamp(torch.round(x / scale), QMIN, QMAX)
