"""The quantize family, one section an operator: typed wrapper with the documentation, fake kernel, gradient.

Schemas are in ``cpp/torch/operators.h``, checks in ``cpp/torch/quantize.h``, formulas and rounding in
``cpp/contract/arithmetic.h``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_ops.ops._register import (
    DerivativeError,
    call,
    call_fast,
    constant,
    expect_no_transform,
    fake_kernel,
    in_transform,
    inference_only,
    register_kernel,
    wants_derivative,
)

_ops = torch.ops.quant_ops
_below_autograd = torch._C._AutoDispatchBelowAutograd

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
        A tensor of tensor's shape and memory format. Differentiable when simulating, backward, forward and under torch.func:
        straight-through for ``tensor``, learned step size (LSQ, arXiv 1902.08153) for ``scale``, and for a floating
        ``zero_point``.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes do not broadcast, or qmin >= qmax.
    """
    if simulate and not torch.compiler.is_compiling() and in_transform() is not None:
        return call(_Simulate.apply, tensor, scale, zero_point, qmin, qmax, asymmetric, block_size)
    return call_fast(
        _ops.quant_tensor_forward.default,
        (tensor, scale, zero_point),
        qmin,
        qmax,
        asymmetric,
        simulate,
        block_size=block_size,
    )


@fake_kernel("quant_tensor_forward")
def _(checked: Tensor, tensor: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(tensor, dtype=checked.dtype)


class _Simulate(torch.autograd.Function):
    """The simulated value with its straight-through derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        tensor: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        qmin: int,
        qmax: int,
        asymmetric: bool,
        block_size: Sequence[int] | None,
    ) -> Tensor:
        result: Tensor = _ops.quant_tensor_forward.default(
            tensor, scale, zero_point, qmin, qmax, asymmetric, True, block_size=block_size
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = inputs[3:]
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensor, scale, zero_point = ctx.saved_tensors
        grad_tensor, grad_scale, grad_zero_point = _gradient(grad, tensor, scale, zero_point, *ctx.options)
        learned = ctx.needs_input_grad[2] and _is_learned(zero_point, ctx.options[2])
        return grad_tensor, grad_scale, grad_zero_point if learned else None, *[None] * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tensor, scale, zero_point = ctx.saved_tensors
        return _by_factors(tangents[:3], tensor, scale, zero_point, ctx.options)


def _forward_kernel(
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    asymmetric: bool = False,
    simulate: bool = True,
    *,
    block_size: Sequence[int] | None = None,
) -> Any:
    if simulate and wants_derivative((tensor, scale, zero_point)):
        expect_no_transform("quant_tensor_forward")
        return _Simulate.apply(tensor, scale, zero_point, qmin, qmax, asymmetric, block_size)  # type: ignore[no-untyped-call]
    with _below_autograd():
        return _ops.quant_tensor_forward.default(tensor, scale, zero_point, qmin, qmax, asymmetric, simulate, block_size=block_size)


register_kernel("quant_tensor_forward", _forward_kernel, "Autograd")


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

    Differentiable: it is linear in ``grad``. Its factors count as constants, as rounding passes derivatives straight through; only
    the mixed derivatives of a learned zero point with a scale are not zero then, and are refused.

    Returns:
        ``(grad_tensor, grad_scale, grad_zero_point)``: tensor's shape and dtype, scale's, and zero_point's (float32 for an
        integer zero point; scale's shape without one).

    Raises:
        TypeError, ValueError: as :func:`quant_tensor_forward`.
    """
    if not torch.compiler.is_compiling() and in_transform() is not None:
        return call(_Gradient.apply, grad, tensor, scale, zero_point, qmin, qmax, asymmetric, block_size)
    return call_fast(
        _ops.quant_tensor_backward.default,
        (grad, tensor, scale, zero_point),
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


def _is_learned(zero_point: Tensor | None, asymmetric: bool) -> bool:
    return zero_point is not None and zero_point.is_floating_point() and asymmetric


def _spread(parameter: Tensor, tensor: Tensor, block_size: Sequence[int] | None) -> Tensor:
    """A scale or zero point, or its derivative, in a shape that broadcasts to the tensor's; differentiable."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    for d in range(-parameter.dim(), 0) if block_size is not None else ():
        if parameter.shape[d] > 1:
            parameter = parameter.repeat_interleave(block_size[d], d)  # type: ignore[index]
    return parameter


def _by_factors(
    derivatives: Sequence[Tensor | None], tensor: Tensor, scale: Tensor, zero_point: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """The sum of the derivatives of tensor, scale and zero point times the factors of NUMERICS section 3 (straight_through in
    ``cpp/contract/arithmetic.h``), in tensor's shape and dtype; linear in the derivatives, and differentiable in them."""
    qmin, qmax, asymmetric, block_size = options
    compute = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        x, s = tensor.to(compute), _spread(scale.to(compute), tensor, block_size)
        zero = torch.zeros((), dtype=torch.float64, device=tensor.device)
        if zero_point is not None and asymmetric:
            zero = _spread(zero_point.to(torch.float64), tensor, block_size)
            zero = zero.round().clamp(qmin, qmax) if zero_point.is_floating_point() else zero
        quotient = x / s
        steps = quotient.round()
        inside = (steps >= qmin - zero) & (steps <= qmax - zero)
        clamped = torch.minimum(torch.maximum(steps.double(), qmin - zero), qmax - zero).to(compute)
        scale_factor = torch.where(inside, steps - quotient, clamped).nan_to_num(0.0)
        zero_factor = torch.where(inside | steps.isnan(), torch.zeros_like(x), -s)
    of_tensor, of_scale, of_zero_point = derivatives
    total = torch.zeros_like(x)
    if of_tensor is not None:
        total = total + torch.where(inside, of_tensor.to(compute), 0.0)
    if of_scale is not None:
        total = total + _spread(of_scale.to(compute), tensor, block_size) * scale_factor
    if of_zero_point is not None and _is_learned(zero_point, asymmetric):
        total = total + _spread(of_zero_point.to(compute), tensor, block_size) * zero_factor
    return total.to(tensor.dtype)


class _Gradient(torch.autograd.Function):
    """quant_tensor_backward, which is linear in grad, with its derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        tensor: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        qmin: int,
        qmax: int,
        asymmetric: bool,
        block_size: Sequence[int] | None,
    ) -> Any:
        return _ops.quant_tensor_backward.default(grad, tensor, scale, zero_point, qmin, qmax, asymmetric, block_size=block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = inputs[4:]
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(*inputs[1:4])
        ctx.save_for_forward(*inputs[1:4])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensor, scale, zero_point = ctx.saved_tensors
        _, _, needs_scale, needs_zero, *_ = ctx.needs_input_grad
        if _is_learned(zero_point, ctx.options[2]):
            _refuse_mixed((needs_scale and grads[2] is not None) or (needs_zero and grads[1] is not None))
        of_grad = _by_factors(grads, tensor, scale, zero_point, ctx.options).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return of_grad, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        tensor, scale, zero_point = ctx.saved_tensors
        of_grad, _, of_scale, of_zero, *_ = tangents
        _refuse_mixed(_is_learned(zero_point, ctx.options[2]) and (of_scale is not None or of_zero is not None))
        of_grad = torch.zeros_like(tensor) if of_grad is None else of_grad
        return tuple(_gradient(of_grad, tensor, scale, zero_point, *ctx.options))


def _refuse_mixed(mixed: bool) -> None:
    if mixed:
        raise DerivativeError(
            "quant_ops.quant_tensor_backward: expected no second derivative by a scale and a learned zero point together, got one. "
            "Keep one of them constant with detach()."
        )


def _gradient(grad: Tensor, tensor: Tensor, scale: Tensor, zero_point: Tensor | None, *options: Any) -> Any:
    """quant_tensor_backward where torch.func may be at work."""
    if in_transform() is not None:
        return _Gradient.apply(grad, tensor, scale, zero_point, *options)  # type: ignore[no-untyped-call]
    *others, block_size = options
    if not wants_derivative((grad, tensor, scale, zero_point)):
        with _below_autograd():
            return _ops.quant_tensor_backward.default(grad, tensor, scale, zero_point, *others, block_size=block_size)
    return _ops.quant_tensor_backward.default(grad, tensor, scale, zero_point, *others, block_size=block_size)


def _backward_kernel(
    grad: Tensor,
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    asymmetric: bool = False,
    *,
    block_size: Sequence[int] | None = None,
) -> Any:
    if wants_derivative((grad, tensor, scale, zero_point)):
        expect_no_transform("quant_tensor_backward")
        return _Gradient.apply(grad, tensor, scale, zero_point, qmin, qmax, asymmetric, block_size)  # type: ignore[no-untyped-call]
    with _below_autograd():
        return _ops.quant_tensor_backward.default(grad, tensor, scale, zero_point, qmin, qmax, asymmetric, block_size=block_size)


register_kernel("quant_tensor_backward", _backward_kernel, "Autograd")


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
    return call_fast(_ops.dequant_tensor.default, (tensor, scale, zero_point), dtype, block_size=block_size)


@fake_kernel("dequant_tensor")
def _(checked: Tensor, tensor: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(tensor, dtype=checked.dtype)


inference_only("dequant_tensor")


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


constant("choose_qparams")


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


constant("quantize_rows")


# ---- norm_quantize_rows ----------------------------------------------------------------------------------------------


def norm_quantize_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool = False,
    asymmetric: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize_rows` of the LayerNorm or RMSNorm of every row, on the CPU; x is read once, no normalized row is written.

    Everything is in float32, for ``t = x + residual``: ``d = t - mean(t)`` (RMSNorm: t itself),
    ``r = 1 / sqrt(mean(d * d) + eps)``, ``y = fma(d * r, weight, bias)``, then codes of y. Sums have a fixed order, so the bits are
    the same for any number of threads and instruction set.

    Args:
        x: float32, float16 or bfloat16, shape ``(..., K)``.
        weight, bias: floating, ``(K,)``, or None.
        eps: is added to the variance.
        rms: RMSNorm.
        asymmetric: as :func:`quantize_rows` takes it.
        residual: of x's shape and dtype, added to x.

    Returns:
        ``(q, scale, zero_point)``, which :func:`int8_linear` takes: int8 ``(..., K)``, float32 ``(..., 1)``, int32 ``(..., 1)``.

    Raises:
        TypeError: x has another dtype, or residual another one than x.
        ValueError: shapes do not fit; tensors on CUDA.
    """
    return call(_ops.norm_quantize_rows.default, x, weight, bias, eps, rms, asymmetric, residual)


@fake_kernel("norm_quantize_rows")
def _(checked: tuple[Tensor, Tensor, Tensor], x: Tensor, **_: Any) -> tuple[Tensor, ...]:
    rows = [*x.shape[:-1], 1]
    return tuple(x.new_empty(shape, dtype=result.dtype) for shape, result in zip((x.shape, rows, rows), checked, strict=True))


constant("norm_quantize_rows")
