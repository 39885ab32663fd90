"""What row-wise parts have to agree on: the range of a row before they quantize, and the epilogue of the sums that they add.

    x_scale, x_zero_point = those of the whole row, from the smallest and largest element of all parts (one all-reduce of M pairs)
    acc = sum over the processes of int32 sums (one all-reduce of M * N integers, without a rounding)
    y = fma(float(acc), x_scale * weight_scale, bias), the activation, then one rounding: the formula of cpp/contract/ops.h

so that the results are those of the whole layer, bit for bit. Read next: layers.py.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from ..ops import quant_tensor_forward, quantize_rows


def shared_qparams(x: Tensor, dims: tuple[int, ...], asymmetric: bool, group: Any) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of slices of which every process has a part. They have one more dimension, of 1.

    The dynamic operators take nothing but its ends from a row, so that a row of the two ends gets the parameters of the whole one.

    Args:
        x: this process's part, floating.
        dims: those of a slice.
        group: the processes; None: x is whole.
    """
    ends = torch.stack((-x.amin(dims), x.amax(dims))).float()
    if group is not None:
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    _, scale, zero_point = quantize_rows(torch.stack((-ends[0], ends[1]), -1), asymmetric)
    return scale, zero_point if asymmetric else None


def _activated(y: Tensor, activation: int) -> Tensor:
    """The activation of this number, with the operators' own bits: of a product of zeros, whose sums are -0, with y as residual."""
    one, rows = torch.ones((), device=y.device), y.reshape(-1, y.shape[-1])
    x, weight = (torch.zeros(n, 1, dtype=torch.int8, device=y.device) for n in rows.shape)
    made: Tensor = torch.ops.quant_ops.int8_linear(x, weight, -one, None, one, residual=rows, activation=activation)
    return made.view_as(y)


def finished(
    acc: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    relu: bool = False,
    activation: int = 0,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """The epilogue of int8_linear and int8_conv2d for int32 sums; scales and bias broadcast to them."""
    product = row_scale * column_scale
    if bias is None:
        y = acc * product
    elif bias.dim() == 1:  # rows of a linear layer
        flat = acc.float().flatten(0, -2) if acc.dim() > 1 else acc.float()
        y = fused_multiply_add(flat, product.expand_as(acc).reshape(flat.shape), bias).view(acc.shape)
    else:
        y = fused_multiply_add(acc.float(), product, bias)
    if relu:
        y = y.clamp_min(0.0)
    elif activation:
        y = _activated(y, activation)
    if out_scale is not None:
        zero_point = None if out_zero_point is None else out_zero_point.to(torch.int32)
        return quant_tensor_forward(y, out_scale, zero_point, -128, 127, zero_point is not None, simulate=False)
    return y.to(dtype)


_CHUNK = 1 << 14  # elements whose float64 stays in a cache


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` with one rounding, on every device, of float32 tensors; b and c broadcast to a, which has a dimension.

    torch.addcmul rounds once or twice, as it was compiled. Here the product is exact in float64, and its sum with c is rounded
    there and then to float32. That can differ from one rounding only where the first result is a tie of the second. On the CPU
    those few elements are looked for and computed with a sum that is never a tie; elsewhere, where looking would wait, all are.
    """
    if a.device.type != "cpu" or is_compiling():
        return _rounded_to_odd(a, b, c).float()
    y = torch.empty_like(a)
    rows = max(1, _CHUNK * len(a) // max(a.numel(), 1))
    for chunk in zip(*(t.split(rows) for t in (a, b.expand_as(a), c.expand_as(a), y)), strict=True):
        _into(*chunk)
    return y


def _into(a: Tensor, b: Tensor, c: Tensor, y: Tensor) -> None:
    total = a.double().mul_(b).add_(c)
    y.copy_(total)
    tie = (total.view(torch.int64) & 0x1FFFFFFF) == 0x10000000
    tie |= y.abs() < torch.finfo(torch.float32).tiny  # subnormal results have ties elsewhere
    at = tie.nonzero(as_tuple=True)
    if at[0].numel():
        y[at] = _rounded_to_odd(a[at], b[at], c[at]).float()


def _rounded_to_odd(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """In float64; rounding it to float32 is rounding the exact sum (Boldo and Melquiond, IEEE TC 57(4), 2008).

    Where the sum is inexact and its last bit is 0, it is moved one step towards what was rounded off.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    taken = total - product
    rest = (product - (total - taken)) + (addend - taken)  # what was rounded off (Knuth's two-sum); NaN beyond float64
    bits = total.view(torch.int64)
    step = torch.where((rest > 0) == (total > 0), 1, -1)
    inexact = ((rest > 0) | (rest < 0)) & ((bits & 1) == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64)
