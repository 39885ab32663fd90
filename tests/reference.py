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


# ---- floating formats ------------------------------------------------------------------------------------------------


def format_bias(exponent_bits: int) -> int:
    return 2 ** (exponent_bits - 1) - 1


def special_of(exponent_bits: int, mantissa_bits: int, bias: int | None, special: str | None) -> str:
    """What is given, or else what the standard with these widths has."""
    standard = {(4, 3): "nan", (5, 2): "ieee", (5, 10): "ieee"} if bias in (None, format_bias(exponent_bits)) else {}
    return special or standard.get((exponent_bits, mantissa_bits), "ieee" if exponent_bits == 8 else "none")


def largest_of(exponent_bits: int, mantissa_bits: int, bias: int | None = None, special: str | None = None) -> float:
    """The value of the last code that is a number, decoded as IEEE 754 does."""
    special = special_of(exponent_bits, mantissa_bits, bias, special)
    bias = format_bias(exponent_bits) if bias is None else bias
    last = 2 ** (exponent_bits + mantissa_bits) - 1 - {"none": 0, "nan": 1, "ieee": 2**mantissa_bits}[special]
    field, mantissa = last >> mantissa_bits, last & (2**mantissa_bits - 1)
    return (mantissa / 2**mantissa_bits + (field > 0)) * 2.0 ** (max(field, 1) - bias)


def round_to_format(
    x: np.ndarray,
    exponent_bits: int,
    mantissa_bits: int,
    bias: int | None = None,
    special: str | None = None,
    saturate: bool = True,
    subnormals: bool = True,
    rounding: str = "nearest_even",
    words: np.ndarray | None = None,
) -> np.ndarray:
    """Each value by the quantum of its binade, in float64, where every step is exact. `words` are the random ones."""
    special = special_of(exponent_bits, mantissa_bits, bias, special)
    bias = format_bias(exponent_bits) if bias is None else bias
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        x = np.asarray(x, np.float64)
    magnitude, largest, least = np.abs(x), largest_of(exponent_bits, mantissa_bits, bias, special), 1 - bias
    finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
    exponent = np.maximum(np.frexp(finite)[1] - 1, least)
    quantum = np.ldexp(1.0, exponent - mantissa_bits)
    if not subnormals:
        quantum = np.where(finite < 2.0**least, 2.0**least, quantum)
    steps = finite / quantum
    down = np.floor(steps)
    if rounding == "nearest_even":
        whole = np.rint(steps)
    elif rounding == "nearest_away":
        whole = np.floor(steps + 0.5)
    elif rounding == "toward_zero":
        whole = down
    else:
        whole = down + (words.astype(np.int64) // 2 < np.rint((steps - down) * 2.0**31))
    beyond = largest if saturate else np.inf if special == "ieee" else np.nan
    rounded = whole * quantum
    rounded = np.where(rounded > largest, largest if rounding == "toward_zero" else beyond, rounded)
    rounded = np.where(np.isinf(magnitude), beyond, rounded)
    return np.where(np.isnan(x), np.nan, np.copysign(rounded, x))


def philox(index: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011): word index % 4 of the counter index // 4 under the key seed."""
    index = np.asarray(index, np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c = [index // 4 & low, index // 4 >> np.uint64(32), np.zeros_like(index), np.zeros_like(index)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> np.uint64(32) ^ c[1] ^ np.uint64(key[0]), b & low, a >> np.uint64(32) ^ c[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.choose((index % 4).astype(np.int64), c).astype(np.uint32)


def block_scales(amax: np.ndarray, largest: float, mantissa_bits: int, rule: str, divisor: float | None, tensor_scale: float):
    """float32 scales of blocks from their largest magnitudes, which hold NaN or Inf where the blocks do."""
    amax = np.asarray(amax, np.float32)
    divisor = np.float32(largest if divisor is None else divisor)
    finite = np.where(np.isfinite(amax), amax, 1).astype(np.float64)
    positive = np.where(finite > 0, finite, 1.0)
    top = np.frexp(largest)[1] - 1
    if rule in ("floor", "even", "ceil", "round_up"):
        significand, exponent = np.frexp(positive)
        significand, exponent = significand * 2, exponent - 1  # 1 <= significand < 2
        if rule == "even":
            exponent = exponent + (np.rint(significand * 2.0**mantissa_bits) >= 2.0 ** (mantissa_bits + 1))
        if rule == "ceil":
            exponent = exponent + (significand > 1)
        exponent = exponent - top
        if rule == "round_up":
            ratio = (positive.astype(np.float32) / np.float32(largest)).astype(np.float64)
            half, exponent = np.frexp(np.where(ratio > 0, ratio, 2.0**-149))
            exponent = exponent - (half == 0.5)
        exponent = np.where(finite > 0, exponent, -127)
        scale = np.ldexp(1.0, np.maximum(np.minimum(exponent, 127), -127))
        scale = np.where(exponent > 127, np.nan, scale)
    elif rule == "e4m3":
        with np.errstate(over="ignore"):
            ratio = finite.astype(np.float32) / divisor / np.float32(tensor_scale)
        rounded = np.maximum(round_to_format(ratio, 4, 3, None, "nan"), 2.0**-6).astype(np.float32)
        scale = rounded * np.float32(tensor_scale)
    else:
        if rule == "bfloat16":
            finite = torch.from_numpy(finite).float().bfloat16().double().numpy()
        scale = np.maximum(finite.astype(np.float32) / divisor, np.float32(2.0**-126))
        scale = np.where(finite > 0, scale, 1)
    return np.where(np.isfinite(amax), scale, np.nan).astype(np.float32)


def quantize_blocks(
    x: torch.Tensor,
    dim: int,
    block_size: int,
    exponent_bits: int,
    mantissa_bits: int,
    tensor_scale: float = 1.0,
    *,
    bias: int | None = None,
    special: str | None = None,
    scale_rule: str = "floor",
    scale_divisor: float | None = None,
    rounding: str = "nearest_even",
    words: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """quant_block_forward and the scale of every element, in numpy; words have x's shape."""
    moved = np.moveaxis(x.float().numpy(), dim, -1)
    length = moved.shape[-1]
    padding = [(0, 0)] * (moved.ndim - 1) + [(0, -length % block_size)]
    blocks = np.pad(moved, padding).reshape(*moved.shape[:-1], -1, block_size)
    with np.errstate(invalid="ignore"):
        amax = np.where(np.isfinite(blocks).all(-1), np.abs(blocks).max(-1), np.nan)
    largest = largest_of(exponent_bits, mantissa_bits, bias, special)
    scale = block_scales(amax, largest, mantissa_bits, scale_rule, scale_divisor, tensor_scale)
    scale = np.moveaxis(np.repeat(scale, block_size, -1)[..., :length], -1, dim)
    with np.errstate(invalid="ignore", over="ignore"):
        quotient = x.float().numpy() / scale
        y = round_to_format(quotient, exponent_bits, mantissa_bits, bias, special, rounding=rounding, words=words)
        y = y.astype(np.float32) * scale
    return torch.from_numpy(np.ascontiguousarray(y)).to(x.dtype), torch.from_numpy(np.ascontiguousarray(scale))
