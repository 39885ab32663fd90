"""The quantize family, one section an operator: typed wrapper with the documentation, fake kernel, gradient.

Schemas are in ``cpp/torch/operators.h``, checks in ``cpp/torch/quantize.h``, formulas and rounding in
``cpp/contract/arithmetic.h``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_ops.ops._register import call, fake_kernel

_ops = torch.ops.quant_ops

# ---- quant_tensor_forward --------------------------------------------------------------------------------------------


def quant_tensor_forward(
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    asymmetric: bool = False,
    simulate: bool = True,
    *,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """Quantizes a tensor: ``q = clamp(rne(tensor / scale) + zero_point, qmin, qmax)``.

    The quotient is the IEEE one, rounded to nearest even, as in ONNX QuantizeLinear; the zero point is added after rounding. NaN
    stays NaN when simulating and has the code of 0 otherwise; infinities saturate. fp16 and bf16 are computed in float32.

    Args:
        tensor: float32, float16, bfloat16 or float64, any shape and strides.
        scale: floating, positive; one element, or broadcastable by shape, e.g. ``(1, C, 1, 1)`` for one scale per channel.
        zero_point: integer, or floating (rounded and clamped to [qmin, qmax] first); shaped like a scale. Ignored unless
            ``asymmetric``.
        qmin, qmax: smallest and largest code, within int32.
        asymmetric: use the zero point.
        simulate: return ``(q - zero_point) * scale`` in tensor's dtype; otherwise the codes in the narrowest of int8, uint8,
            int16, int32 that holds [qmin, qmax].
        block_size: one entry per dimension; scale and zero point then broadcast to ``tensor.shape / block_size``.

    Returns:
        A tensor of tensor's shape and memory format. Differentiable when simulating: straight-through for ``tensor``, learned
        step size (LSQ, arXiv 1902.08153) for ``scale``, and for a floating ``zero_point``.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes do not broadcast, or qmin >= qmax.
    """
    return call(
        _ops.quant_tensor_forward.default,
        tensor,
        scale,
        zero_point,
        qmin,
        qmax,
        asymmetric,
        simulate,
        block_size=block_size,
    )


@fake_kernel("quant_tensor_forward")
def _(checked: Tensor, tensor: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(tensor, dtype=checked.dtype)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    tensor, scale, zero_point, ctx.qmin, ctx.qmax, ctx.asymmetric, _ = inputs
    ctx.block_size = keyword_only_inputs["block_size"]
    ctx.save_for_backward(tensor, scale, zero_point)


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensor, scale, zero_point = ctx.saved_tensors
    grad_tensor, grad_scale, grad_zero_point = _ops.quant_tensor_backward.default(
        grad, tensor, scale, zero_point, ctx.qmin, ctx.qmax, ctx.asymmetric, block_size=ctx.block_size
    )
    learned = zero_point is not None and zero_point.is_floating_point() and ctx.asymmetric
    return grad_tensor, grad_scale, grad_zero_point if learned else None, None, None, None, None


torch.library.register_autograd("quant_ops::quant_tensor_forward", _forward_backward, setup_context=_forward_context)


# ---- quant_tensor_backward -------------------------------------------------------------------------------------------


def quant_tensor_backward(
    grad: Tensor,
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    asymmetric: bool = False,
    *,
    block_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the simulated :func:`quant_tensor_forward`.

    With ``v = rne(tensor / scale) + zero_point``, in range where ``qmin <= v <= qmax``:

    * ``grad_tensor = grad`` in range, 0 outside (piecewise-linear estimator, arXiv 2004.09602, eq. 9);
    * ``grad_scale`` = sum of ``grad * ((q - zero_point) - tensor / scale)`` in range, ``grad * (q - zero_point)`` outside
      (LSQ, arXiv 1902.08153, eq. 3, without its gradient factor);
    * ``grad_zero_point`` = sum of ``-scale * grad`` outside; zeros when symmetric.

    Elements that are NaN contribute nothing. Sums are taken in float64 in a fixed order: they do not depend on threads or device.

    Returns:
        ``(grad_tensor, grad_scale, grad_zero_point)``: tensor's shape and dtype, scale's, and zero_point's (float32 for an
        integer zero point; scale's shape without one).

    Raises:
        TypeError, ValueError: as :func:`quant_tensor_forward`.
    """
    return call(
        _ops.quant_tensor_backward.default,
        grad,
        tensor,
        scale,
        zero_point,
        qmin,
        qmax,
        asymmetric,
        block_size=block_size,
    )


@fake_kernel("quant_tensor_backward")
def _(
    checked: tuple[Tensor, ...], tensor: Tensor, scale: Tensor, zero_point: Tensor | None, asymmetric: bool, **_: Any
) -> tuple[Tensor, ...]:
    of_tensor, of_scale, of_zero_point = (result.dtype for result in checked)
    shape = zero_point.shape if asymmetric and zero_point is not None else scale.shape
    return (
        torch.empty_like(tensor, dtype=of_tensor),
        tensor.new_empty(scale.shape, dtype=of_scale),
        tensor.new_empty(shape, dtype=of_zero_point),
    )


# ---- dequant_tensor --------------------------------------------------------------------------------------------------


def dequant_tensor(
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """Codes back to real values: ``(tensor - zero_point) * scale``, rounded once to ``dtype``.

    Args:
        tensor: int8, uint8, int16 or int32 codes of any shape and strides.
        scale, zero_point, block_size: as in :func:`quant_tensor_forward`.
        dtype: float32, float16, bfloat16 or float64.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes do not broadcast.
    """
    return call(_ops.dequant_tensor.default, tensor, scale, zero_point, dtype, block_size=block_size)


@fake_kernel("dequant_tensor")
def _(checked: Tensor, tensor: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(tensor, dtype=checked.dtype)


# ---- choose_qparams --------------------------------------------------------------------------------------------------


def choose_qparams(tensor: Tensor, dim: Sequence[int], qmin: int, qmax: int, asymmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the range of the data, reduced over ``dim`` (``[]`` = all), which is kept as size 1.

    Symmetric: ``scale = absmax / qmax``, zero point 0. Asymmetric: the range is widened to contain 0,
    ``scale = (max - min) / (qmax - qmin)``, ``zero_point = clamp(qmin - rne(min / scale), qmin, qmax)``. A slice of zeros gets
    scale 1; a scale that would be subnormal becomes the smallest normal number; a slice that holds NaN or Inf gets a NaN scale.

    Args:
        tensor: float32, float16, bfloat16 or float64.

    Returns:
        ``(scale, zero_point)``: float32 (float64 for a float64 tensor) and int32.

    Raises:
        TypeError: tensor is not floating.
        ValueError: qmin >= qmax, qmax <= 0 for a symmetric range, or a dim out of range.
    """
    return call(_ops.choose_qparams.default, tensor, dim, qmin, qmax, asymmetric)


@fake_kernel("choose_qparams")
def _(checked: tuple[Tensor, Tensor], tensor: Tensor, dim: Sequence[int], **_: Any) -> tuple[Tensor, ...]:
    reduced = {d % tensor.dim() for d in dim} or set(range(tensor.dim()))
    shape = [1 if d in reduced else size for d, size in enumerate(tensor.shape)]
    return tuple(tensor.new_empty(shape, dtype=result.dtype) for result in checked)


# ---- quantize_rows ---------------------------------------------------------------------------------------------------


def quantize_rows(x: Tensor, asymmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic int8 quantization of every row (last dimension): :func:`choose_qparams` and the codes in one pass.

    Args:
        x: float32, float16 or bfloat16, shape ``(..., K)``.
        asymmetric: codes in [-128, 127] with a zero point; otherwise in [-127, 127].

    Returns:
        ``(q, scale, zero_point)``: int8 ``(..., K)``, float32 ``(..., 1)``, int32 ``(..., 1)``.

    Raises:
        TypeError: x has another dtype.
        ValueError: x has no dimension.
    """
    return call(_ops.quantize_rows.default, x, asymmetric)


@fake_kernel("quantize_rows")
def _(checked: tuple[Tensor, Tensor, Tensor], x: Tensor, **_: Any) -> tuple[Tensor, ...]:
    rows = [*x.shape[:-1], 1]
    return tuple(x.new_empty(shape, dtype=result.dtype) for shape, result in zip((x.shape, rows, rows), checked, strict=True))
