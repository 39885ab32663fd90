"""What row-wise parts have to agree on: the range of a row before they quantize, and the epilogue of the sums that they add.

    x_scale, x_zero_point = those of the whole row, from the smallest and largest element of all parts (one all-reduce of M pairs)
    acc = sum over the processes of int32 sums (one all-reduce of M * N integers, without a rounding)
    y = fma(float(acc), x_scale * weight_scale, bias), ReLU, then one rounding: the formula of cpp/contract/ops.h

so that the results are those of the whole layer, bit for bit. Read next: layers.py.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import quant_tensor_forward, quantize_rows


def shared_qparams(least: Tensor, most: Tensor, asymmetric: bool, group: Any) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of slices of which every process has a part, from its parts' ends. They have one more dimension, of 1.

    The dynamic operators take nothing but its ends from a row, so that a row of the two ends gets the parameters of the whole one.
    """
    ends = torch.stack((-least, most)).float()
    if group is not None:
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    _, scale, zero_point = quantize_rows(torch.stack((-ends[0], ends[1]), -1), asymmetric)
    return scale, zero_point if asymmetric else None


def finished(
    acc: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """The epilogue of int8_linear and int8_conv2d for int32 sums; scales and bias broadcast to them."""
    product = row_scale * column_scale
    y = acc * product if bias is None else fused_multiply_add(acc.float(), product, bias)
    if relu:
        y = y.clamp_min(0.0)
    if out_scale is not None:
        zero_point = None if out_zero_point is None else out_zero_point.to(torch.int32)
        return quant_tensor_forward(y, out_scale, zero_point, -128, 127, zero_point is not None, simulate=False)
    return y.to(dtype)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors with one rounding, on every device.

    The product is exact in float64. Its sum with c is rounded to odd there (Boldo and Melquiond, IEEE TC 57(4), 2008): where it is
    inexact and its last bit is 0, it is moved one step towards what was rounded off, after which rounding to float32 is that of the
    exact sum. torch.addcmul rounds once or twice, as it was compiled.
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    taken = total - product
    rest = (product - (total - taken)) + (addend - taken)  # what was rounded off (Knuth's two-sum); NaN beyond float64
    bits = total.view(torch.int64)
    step = torch.where((rest > 0) == (total > 0), 1, -1)
    inexact = ((rest > 0) | (rest < 0)) & ((bits & 1) == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()
