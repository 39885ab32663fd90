"""Linear layers and embeddings whose weight alone is quantized, in groups along K, to int8 or int4: one section each operator.

Schemas are in ``cpp/torch/operators.h``, checks in ``cpp/torch/weight_only*.h``, formulas in ``cpp/contract/ops.h``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_ops import _library
from quant_ops.ops._register import call, call_fast, fake_kernel, inference_only

_ops = torch.ops.quant_ops

# ---- weight_only_linear ------------------------------------------------------------------------------------------------


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
    group_size: int = -1,
    *,
    packed_weight: Tensor | None = None,
    dynamic: bool = False,
    asymmetric: bool = False,
    out_dtype: torch.dtype | None = None,
    x_multiplier: Tensor | None = None,
) -> Tensor:
    """``x @ w.T + bias`` for a weight of 8 or 4 bits with a scale, perhaps a zero point, per group of ``group_size`` k of a row.

    ``w = (weight - weight_zero_point) * weight_scale`` for integer zero points, and ``weight * weight_scale + weight_zero_point``
    for floating ones (torchao's FLOAT domain; its codes [0, 15] less 8 are those here).

    Args:
        x: ``(..., K)``, float32, float16 or bfloat16.
        weight: int8 ``(N, K)``; codes in [-8, 7] for 4 bits. With ``packed_weight`` only its shape is read, so that one byte
            expanded to it will do.
        weight_scale: floating ``(N, ceil(K / group_size))``, or ``(N,)`` with one group. Read without a copy where it is float32;
            on the CPU contiguous ones are the fastest.
        weight_zero_point: of the same shape; int8, another integer dtype with values of int8, or floating.
        bias: floating ``(N,)``.
        bits: 8 or 4.
        group_size: 32, 64, 128, 256, or -1 for one group a row. The last group of a row may be shorter.
        packed_weight: ``pack_weight_only(weight, bits, group_size)``; without it the weight is packed in every call.
        dynamic: quantize each row of x to int8 as :func:`quantize_rows` does, and multiply integers. Sums within a group are exact,
            and ``y = fma(float(sum), x_scale * weight_scale, y)`` goes over the groups in ascending order, starting from the bias.
            False multiplies with sums in float32; on CUDA, tensor cores multiply float16 and bfloat16 by codes less their integer
            zero points, which are exact in both.
        asymmetric: rows of x with a zero point; only with ``dynamic``.
        out_dtype: float32, float16 or bfloat16; default x's dtype.
        x_multiplier: floating ``(K,)``: ``float32(x) * x_multiplier``, in one float32 multiplication an element, takes the place of
            x, whatever its dtype. So on CUDA, without ``dynamic``, the products are those of a float32 x.

    Returns:
        ``(..., N)``. With ``dynamic`` row i of a batch equals row i alone, bit for bit, for any number of threads, instruction set
        and device. Without it the products are summed in float32, 128 at a time, one after the other, and the sum is rounded to the
        dtype: the error stays below ``2 * eps * sum(|x| * |w|)``, eps of float32, for data of mixed sizes and signs; where all
        products were alike it was up to 17 times ``eps * sum(|x| * |w|)``.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes do not fit; codes or zero points outside their range (not looked at on CUDA, since that would stop the
            stream); with ``dynamic``, groups so long that a sum could overflow.
        RuntimeError: a gradient is asked for.
    """
    return call_fast(
        _ops.weight_only_linear.default,
        (x, weight, weight_scale, weight_zero_point, bias),
        bits,
        group_size,
        packed_weight=packed_weight,
        dynamic=dynamic,
        asymmetric=asymmetric,
        out_dtype=out_dtype,
        x_multiplier=x_multiplier,
    )


@fake_kernel("weight_only_linear")
def _(checked: Tensor, x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=checked.dtype)


inference_only("weight_only_linear")


# ---- weight_only_embedding ---------------------------------------------------------------------------------------------


def weight_only_embedding(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bits: int = 8,
    group_size: int = -1,
    *,
    packed_weight: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of a weight of 8 or 4 bits, dequantized: ``F.embedding(indices, w)`` for the ``w`` of :func:`weight_only_linear`.

    Only the rows asked for are read. One packed weight serves both operators, so that a head can share its embedding's.

    Args:
        indices: int32 or int64, of any shape; each in [0, N).
        weight: int8 ``(N, K)``; codes in [-8, 7] for 4 bits. With ``packed_weight`` only its shape is read; without it rows are
            read where they lie, and codes of 4 bits looked through for one that is outside.
        weight_scale: floating ``(N, ceil(K / group_size))``, or ``(N,)`` with one group. Copied to float32 where it is not.
        weight_zero_point: of the same shape; int8, another integer dtype with values of int8, or floating.
        bits: 8 or 4.
        group_size: 32, 64, 128, 256, or -1 for one group a row. The last group of a row may be shorter.
        packed_weight: ``pack_weight_only(weight, bits, group_size)``.
        out_dtype: float32, float16 or bfloat16; default float32.

    Returns:
        ``(*indices.shape, K)``, contiguous: ``(weight - weight_zero_point) * weight_scale``, or with floating zero points
        ``weight * weight_scale + weight_zero_point``, each operation rounded to float32 and the result once to ``out_dtype``. The
        same bits on every device.

    Raises:
        TypeError: a dtype is not one of those above.
        IndexError: an index is negative, or not below N. On CUDA, where looking would wait for the device, the kernel asserts it.
        ValueError: shapes do not fit; codes or zero points outside their range.
        RuntimeError: a gradient is asked for.
    """
    return call_fast(
        _ops.weight_only_embedding.default,
        (indices, weight, weight_scale, weight_zero_point),
        bits,
        group_size,
        packed_weight=packed_weight,
        out_dtype=out_dtype,
    )


@fake_kernel("weight_only_embedding")
def _(checked: Tensor, indices: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return indices.new_empty((*indices.shape, weight.shape[1]), dtype=checked.dtype)


inference_only("weight_only_embedding")


# ---- pack_weight_only --------------------------------------------------------------------------------------------------


def pack_weight_only(weight: Tensor, bits: int = 8, group_size: int = -1) -> Tensor:
    """Codes ``(N, K)`` in the layout that :func:`weight_only_linear` reads, 4 bits as nibbles.

    The same for every device and instruction set (``cpp/contract/weight_only_layout.h``): a packed weight may be moved. Scales and
    zero points are not in it.

    Returns:
        int8, one dimension.

    Raises:
        TypeError: weight is not int8.
        ValueError: another number of dimensions, bits or group size; codes outside of [-8, 7] for 4 bits, on the CPU.
    """
    return call(_ops.pack_weight_only.default, weight, bits, group_size)


@fake_kernel("pack_weight_only")
def _(checked: Tensor, weight: Tensor, bits: int, group_size: int) -> Tensor:
    length = _library.weight_only_bytes(weight.shape[0], weight.shape[1], bits, group_size)
    return weight.new_empty((length,), dtype=checked.dtype)


inference_only("pack_weight_only")


# ---- unpack_weight_only ------------------------------------------------------------------------------------------------


def unpack_weight_only(packed_weight: Tensor, shape: Sequence[int], bits: int = 8, group_size: int = -1) -> Tensor:
    """The codes of ``shape`` that ``packed_weight = pack_weight_only(weight, bits, group_size)`` was made from.

    Raises:
        TypeError: packed_weight is not int8.
        ValueError: it was made from a weight of another shape, or with other bits or group size.
    """
    return call(_ops.unpack_weight_only.default, packed_weight, shape, bits, group_size)


@fake_kernel("unpack_weight_only")
def _(checked: Tensor, packed_weight: Tensor, shape: Sequence[int], **_: Any) -> Tensor:
    return packed_weight.new_empty(shape, dtype=checked.dtype)


inference_only("unpack_weight_only")
