"""The int8 operators, one section each: typed wrapper with the documentation and fake kernel. They are for inference: no gradient.

Schemas are in ``cpp/torch/operators.h``, checks in ``cpp/torch/{linear,conv2d,pack}.h``, the formula of the epilogue in
``cpp/contract/ops.h``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_ops import _library
from quant_ops.ops._register import call, fake_kernel, inference_only

_ops = torch.ops.quant_ops

# In the order of their numbers, from 1 on (``Function`` of cpp/contract/functions.h).
ACTIVATIONS = ("relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid", "hardsigmoid")


def activation_number(op: str, activation: str | None) -> int:
    """What the operator ``op`` takes for an activation's name."""
    if activation is None:
        return 0
    if activation not in ACTIVATIONS:
        raise ValueError(f"quant_ops.{op}: expected activation to be None or one of {ACTIVATIONS}, got {activation!r}.")
    return ACTIVATIONS.index(activation) + 1


# ---- int8_gemm -------------------------------------------------------------------------------------------------------


def int8_gemm(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer product ``a @ b.T`` in int32, on every instruction set: no saturation anywhere.

    Args:
        a: int8 or uint8, ``(M, K)``.
        b: int8, ``(N, K)``, as nn.Linear keeps its weight.

    Returns:
        int32 ``(M, N)``.

    Raises:
        TypeError: another dtype.
        ValueError: shapes do not fit, or K > 131071 (65793 for uint8), where the sum could overflow.
    """
    return call(_ops.int8_gemm.default, a, b)


@fake_kernel("int8_gemm")
def _(checked: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=checked.dtype)


inference_only("int8_gemm")


# ---- int8_linear -----------------------------------------------------------------------------------------------------


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    *,
    packed_weight: Tensor | None = None,
    asymmetric: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    relu: bool = False,
    x_multiplier: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Fused int8 linear layer: quantize, multiply exactly, scale, add bias and a residual, activation, convert, in one call.

    ``y = fma(acc, x_scale * weight_scale, bias)`` in float32, where ``acc`` is the exact int32 product of the codes, then the
    residual, then the activation, then one rounding to the result's dtype, or ``clamp(rne(y / out_scale) + out_zero_point)`` for an
    integer result.

    Args:
        x: ``(..., K)``. float32, float16 or bfloat16: quantized here, per row from its data without ``x_scale`` (dynamic), to
            [-128, 127] with it (static). int8 or uint8: codes already, ``x_scale`` required.
        weight: int8 ``(N, K)``.
        weight_scale: floating, one element or ``(N,)``.
        bias: floating ``(N,)``.
        x_scale: one element, or one per row, shape ``(..., 1)``.
        x_zero_point: like ``x_scale``; integer, or floating (rounded).
        packed_weight: ``pack_weight(weight)``, for speed; without it the weight is packed in every call (on CUDA only where it
            has to be).
        asymmetric: dynamic quantization with a zero point.
        out_scale, out_zero_point: one element; the result is int8 (or ``out_dtype=torch.uint8``) for the next layer.
        out_dtype: float32, float16 or bfloat16; default x's dtype (float32 for integer x). int32: ``acc`` itself, without scales,
            such as sums of a part of K that are to be added to those of other parts; bias, residual and activation are refused.
        relu: the same as ``activation="relu"``.
        x_multiplier: floating ``(K,)``, for a floating x: ``float32(x) * x_multiplier``, in one float32 multiplication an element,
            is quantized in place of x. With ``1 / s`` and a weight whose columns were multiplied by ``s`` this is SmoothQuant
            (arXiv 2211.10438, eq. 3) of a layer whose input no layer before it can scale.
        residual: of the result's shape. int8 or uint8, with ``residual_scale``: ``y = fma(residual - residual_zero_point,
            residual_scale, y)``; float32, float16 or bfloat16: ``y = y + residual``. One that does not lie in memory as the result
            does is copied.
        residual_scale, residual_zero_point: one element.
        activation: "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid" or "hardsigmoid", a float32 function of y
            with the same bits on every instruction set; ``cpp/contract/functions.h`` has their definitions and errors.

    Returns:
        ``(..., N)``. Row i of a batch equals row i alone, bit for bit, for any number of threads and instruction set.

    Raises:
        TypeError: a dtype is not one of those above, or ``x_multiplier`` comes with an integer x.
        ValueError: shapes do not fit; K > 131071 (65793 for uint8 or with a zero point); a zero point outside its range.
        RuntimeError: a gradient is asked for.

    On CUDA values are not looked at, which would stop the stream: an integer zero point outside its range is used as it is.
    """
    return call(
        _ops.int8_linear.default,
        x,
        weight,
        weight_scale,
        bias,
        x_scale,
        x_zero_point,
        packed_weight=packed_weight,
        asymmetric=asymmetric,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
        relu=relu,
        x_multiplier=x_multiplier,
        residual=residual,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        activation=activation_number("int8_linear", activation),
    )


@fake_kernel("int8_linear")
def _(checked: Tensor, x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=checked.dtype)


inference_only("int8_linear")


# ---- int8_conv2d -----------------------------------------------------------------------------------------------------


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    *,
    packed_weight: Tensor | None = None,
    asymmetric: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    relu: bool = False,
    channels_last: bool | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Fused int8 convolution (implicit GEMM), with the arithmetic of :func:`int8_linear`.

    Args:
        x: ``(N, C, H, W)`` or ``(C, H, W)``, dtypes as in :func:`int8_linear`; dynamic quantization is per sample. Read in place
            when channels or columns are contiguous (channels_last, NCHW), copied once otherwise.
        weight: int8 ``(O, C / groups, R, S)``.
        weight_scale: one element, ``(O,)`` or ``(O, 1, 1, 1)``.
        stride, dilation: one number or ``(vertical, horizontal)``.
        padding: one number, ``(vertical, horizontal)`` or ``(top, bottom, left, right)``; padded pixels are real zeros.
        x_scale, x_zero_point: one element, or one per sample, shape ``(N, 1, 1, 1)``.
        packed_weight: ``pack_weight(weight, groups)``.
        bias, asymmetric, out_scale, out_zero_point, out_dtype, relu, residual, residual_scale, residual_zero_point, activation: as
            in :func:`int8_linear`.
        channels_last: whether the result of a batch lies in channels_last, by default as x does. Neither order costs a copy.

    Returns:
        ``(N, O, OH, OW)`` with ``OH = (H + top + bottom - dilation * (R - 1) - 1) // stride + 1``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`int8_linear`; also groups that do not divide the channels, an output smaller
            than 1 x 1, and C / groups * R * S beyond the exact bound.
    """
    return call(
        _ops.int8_conv2d.default,
        x,
        weight,
        weight_scale,
        bias,
        as_list(stride),
        as_list(padding),
        as_list(dilation),
        groups,
        x_scale,
        x_zero_point,
        packed_weight=packed_weight,
        asymmetric=asymmetric,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
        relu=relu,
        channels_last=channels_last,
        residual=residual,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        activation=activation_number("int8_conv2d", activation),
    )


def as_list(value: int | Sequence[int]) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]  # type: ignore[list-item]


@fake_kernel("int8_conv2d")
def _(
    checked: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool | None,
    **_: Any,
) -> Tensor:
    top, bottom, left, right = padding if len(padding) == 4 else (padding[0], padding[0], padding[-1], padding[-1])
    reach_h = x.shape[-2] + top + bottom - dilation[0] * (weight.shape[2] - 1) - 1
    reach_w = x.shape[-1] + left + right - dilation[-1] * (weight.shape[3] - 1) - 1
    torch._check(reach_h >= 0)  # for what is derived from the size of the result
    torch._check(reach_w >= 0)
    shape = (*x.shape[:-3], weight.shape[0], reach_h // stride[0] + 1, reach_w // stride[-1] + 1)
    if channels_last is None:
        channels_last = x.dim() == 4 and not x.is_contiguous() and x.stride(1) == 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=checked.dtype, device=x.device, memory_format=memory_format)


inference_only("int8_conv2d")


# ---- pack_weight -----------------------------------------------------------------------------------------------------


def pack_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """An int8 weight, ``(N, K)`` or ``(O, C / groups, R, S)``, in the layout that its device's kernels read.

    On the CPU the same for every instruction set (``cpp/cpu/pack.h``), on CUDA for every GPU
    (``cpp/contract/cuda_weights.h``: the sums of its columns, and its rows where the weight itself will not do). Derived from the
    weight, never to be saved.

    Returns:
        int8, one dimension.

    Raises:
        TypeError: weight is not int8.
        ValueError: another number of dimensions, or groups that do not divide O.
    """
    return call(_ops.pack_weight.default, weight, groups)


@fake_kernel("pack_weight")
def _(checked: Tensor, weight: Tensor, groups: int) -> Tensor:
    r, s = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    device = "cuda" if weight.device.type == "cuda" else "cpu"
    length = _library.packed_bytes(weight.shape[0], weight.shape[1], r, s, groups, device)
    return weight.new_empty((length,), dtype=checked.dtype)


inference_only("pack_weight")


# ---- unpack_weight -----------------------------------------------------------------------------------------------


def unpack_weight(packed_weight: Tensor, shape: Sequence[int], groups: int = 1) -> Tensor:
    """The plain int8 weight of ``shape`` that ``packed_weight = pack_weight(weight, groups)`` was made from.

    Raises:
        TypeError: packed_weight is not int8.
        ValueError: it was made from a weight of another shape or number of groups.
    """
    return call(_ops.unpack_weight.default, packed_weight, shape, groups)


@fake_kernel("unpack_weight")
def _(checked: Tensor, packed_weight: Tensor, shape: Sequence[int], **_: Any) -> Tensor:
    return packed_weight.new_empty(shape, dtype=checked.dtype)


inference_only("unpack_weight")

# ---- transpose_packed_weight -----------------------------------------------------------------------------------------


def transpose_packed_weight(packed_weight: Tensor, shape: Sequence[int]) -> Tensor:
    """``pack_weight(weight.T)`` from ``packed_weight = pack_weight(weight)``, on the CPU, without the plain weight.

    It takes about as long as copying the weight, so that products with the transposed weight, such as the gradient of a linear
    layer's input, need not keep a second copy.

    Args:
        packed_weight: of a linear weight.
        shape: ``(N, K)``, that of the weight.

    Returns:
        int8, one dimension.

    Raises:
        TypeError: packed_weight is not int8.
        ValueError: it was made from a weight of another shape.
    """
    return call(_ops.transpose_packed_weight.default, packed_weight, shape)


@fake_kernel("transpose_packed_weight")
def _(checked: Tensor, packed_weight: Tensor, shape: Sequence[int]) -> Tensor:
    return packed_weight.new_empty((_library.packed_bytes(shape[1], shape[0], 1, 1, 1, "cpu"),), dtype=checked.dtype)


inference_only("transpose_packed_weight")
