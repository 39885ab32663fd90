"""The operators again, in a few lines of torch and numpy each: what the kernels are compared with.

Integers are computed in int64 or float64, where they are exact; float32 steps are single IEEE operations of torch or numpy.
"""

import numpy as np
import torch
import torch.nn.functional as F


def steps_of(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """rne(x / scale) in float32, or float64 for float64."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.round(x.to(compute) / scale.to(compute))


def integer_zero_point(zero_point, qmin, qmax):
    if zero_point is None:
        return torch.zeros((), dtype=torch.int64)
    if zero_point.is_floating_point():
        return zero_point.double().nan_to_num(0.0).round().clamp(qmin, qmax).long()
    return zero_point.long()


def quantize(x, scale, zero_point, qmin, qmax, simulate):
    """quant_tensor_forward; scale and zero_point broadcast by torch's rules. Integer results are int64."""
    steps = steps_of(x, scale)
    z = integer_zero_point(zero_point, qmin, qmax)
    relative = torch.minimum(torch.maximum(steps.double(), (qmin - z).double()), (qmax - z).double())  # NaN stays
    if simulate:
        return ((relative + 0.0).to(steps.dtype) * scale.to(steps.dtype)).to(x.dtype)
    return (torch.where(steps.isnan(), 0.0, relative).long() + z).clamp(qmin, qmax)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c with one rounding: the product is exact in float64, the sum is rounded to odd there, then to float32."""
    product = a.astype(np.float64) * b.astype(np.float64)
    c = np.broadcast_to(c.astype(np.float64), product.shape)
    total = product + c
    with np.errstate(invalid="ignore"):
        c_part = total - product
        error = (product - (total - c_part)) + (c - c_part)  # two-sum: total + error is exact
    inexact = (error != 0) & np.isfinite(total)
    even = (total.view(np.int64) & 1) == 0
    with np.errstate(invalid="ignore"):
        toward = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(inexact & even, toward, total).astype(np.float32)


def epilogue(acc, row_scale, column_scale, bias=None, relu=False):
    """fma(float(acc), row_scale * column_scale, bias), ReLU; acc is int64 holding int32 values, all arguments broadcast."""
    scale = np.asarray(row_scale, np.float32) * np.asarray(column_scale, np.float32)
    acc32 = np.broadcast_to(np.asarray(acc), np.broadcast_shapes(np.shape(acc), scale.shape)).astype(np.float32)
    y = acc32 * scale if bias is None else fma32(acc32, np.broadcast_to(scale, acc32.shape), np.asarray(bias, np.float32))
    return torch.from_numpy(np.where(y < 0, np.float32(0), y) if relu else np.ascontiguousarray(y))


def requantize(y: torch.Tensor, out_scale: float, out_zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return quantize(y, torch.tensor(out_scale), torch.tensor(out_zero_point), info.min, info.max, simulate=False).to(dtype)


def linear_acc(q: torch.Tensor, weight: torch.Tensor, zero_point=0) -> torch.Tensor:
    """int64 sum over k of (q - zero_point) * weight."""
    return (q.long() - zero_point) @ weight.long().T


def conv_acc(q, weight, stride, padding, dilation, groups, zero_point=0):
    """Exact sums of a convolution, in float64 (all below 2^53). padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    x = F.pad(q.double() - torch.as_tensor(zero_point).double(), (left, right, top, bottom))
    return F.conv2d(x, weight.double(), None, stride, 0, dilation, groups).long()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits, except that any NaN equals any NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Like same, and zeros have the same sign."""
    return same(a, b) and bool((torch.signbit(a) == torch.signbit(b))[~a.isnan()].all())
