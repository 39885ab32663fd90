"""The operators, one section each: typed wrapper with the documentation, fake kernel, autograd formula.

Schemas and CPU kernels are registered by ``libquant_ops`` (``cpp/torch/operators.h``). The wrappers raise TypeError or ValueError
where ``torch.ops.quant_ops.*`` raises RuntimeError, with the same words. Formulas and rounding: ``cpp/contract/arithmetic.h``.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quant_ops import _library

_ops = torch.ops.quant_ops
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_IMPLEMENTATION = torch.library.Library("quant_ops", "IMPL")  # autograd kernels of the int8 operators; must stay alive


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls an operator; its complaint about a dtype becomes a TypeError, about anything else a ValueError."""
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        text = str(error).split("\n")[0]
        if text.startswith("quant_ops::"):  # the dispatcher: an argument that is no Tensor, int, ...
            raise TypeError(text) from None
        if not text.startswith("quant_ops."):
            raise
        kind = TypeError if re.match(r"quant_ops\.\w+: expected (\w+\.dtype|out_dtype|the result's dtype)", text) else ValueError
        raise kind(text) from None


def _expect(condition: bool, op: str, relation: str) -> None:
    if not condition:
        raise RuntimeError(f"quant_ops.{op}: expected {relation}")


def _shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + (",)" if len(shape) == 1 else ")")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expect_floating(op: str, name: str, tensor: Tensor) -> None:
    expected = "(float32, float16, bfloat16, float64)"
    _expect(tensor.dtype in _FLOATING, op, f"{name}.dtype in {expected}, got {_name(tensor.dtype)}")


def _expect_codes(op: str, qmin: int, qmax: int) -> None:
    _expect(qmin < qmax, op, f"qmin < qmax, got {qmin} and {qmax}")
    _expect(qmin >= -(2**31) and qmax < 2**31, op, f"qmin and qmax to fit int32, got {qmin} and {qmax}")


def _expect_parameter(op: str, name: str, tensor: Tensor, parameter: Tensor, block_size: Sequence[int] | None) -> None:
    """A scale or zero point has one element or broadcasts, by shape, to the tensor or to its grid of blocks."""
    shape = list(tensor.shape)
    grid = shape
    if block_size is not None:
        text = f"{_shape(block_size)} and tensor.shape {_shape(shape)}"
        _expect(len(block_size) == len(shape), op, f"one block_size entry per dimension of tensor, got block_size {text}")
        fits = all(b >= 1 and n % b == 0 for n, b in zip(shape, block_size, strict=True))
        _expect(fits, op, f"block_size to divide tensor.shape, got block_size {text}")
        grid = [n // b for n, b in zip(shape, block_size, strict=True)]
    if parameter.dim() == 0 or all(size == 1 for size in parameter.shape):
        return
    broadcasts = parameter.dim() <= len(grid) and all(
        p == 1 or p == n for p, n in zip(reversed(parameter.shape), reversed(grid), strict=False)
    )
    target = "tensor.shape" if block_size is None else "tensor.shape / block_size"
    _expect(
        broadcasts,
        op,
        f"{name} to have one element or to broadcast to {target}, got {name}.shape {_shape(parameter.shape)} and tensor.shape "
        f"{_shape(shape)}. For one {name} per channel of dimension 1 use the shape (1, C, 1, 1).",
    )


def _expect_parameters(
    op: str,
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    asymmetric: bool,
    block_size: Sequence[int] | None,
) -> None:
    _expect_floating(op, "scale", scale)
    _expect(not asymmetric or zero_point is not None, op, "a zero_point with asymmetric=True, got None")
    _expect_parameter(op, "scale", tensor, scale, block_size)
    if asymmetric and zero_point is not None:
        _expect_parameter(op, "zero_point", tensor, zero_point, block_size)


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
    return _call(
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


def _code_dtype(qmin: int, qmax: int) -> torch.dtype:
    for dtype in (torch.int8, torch.uint8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= qmin and qmax <= info.max:
            return dtype
    return torch.int32


@torch.library.register_fake("quant_ops::quant_tensor_forward")
def _(
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
    op = "quant_tensor_forward"
    _expect_floating(op, "tensor", tensor)
    _expect_codes(op, qmin, qmax)
    _expect_parameters(op, tensor, scale, zero_point, asymmetric, block_size)
    return torch.empty_like(tensor, dtype=tensor.dtype if simulate else _code_dtype(qmin, qmax))


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
    return _call(
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


@torch.library.register_fake("quant_ops::quant_tensor_backward")
def _(
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
    op = "quant_tensor_backward"
    _expect_floating(op, "tensor", tensor)
    _expect_codes(op, qmin, qmax)
    same = grad.shape == tensor.shape
    _expect(same, op, f"grad.shape == tensor.shape, got {_shape(grad.shape)} and {_shape(tensor.shape)}")
    _expect_parameters(op, tensor, scale, zero_point, asymmetric, block_size)
    compute = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    grad_zero_point = tensor.new_empty(scale.shape, dtype=compute)
    if asymmetric and zero_point is not None:
        dtype = zero_point.dtype if zero_point.is_floating_point() else compute
        grad_zero_point = tensor.new_empty(zero_point.shape, dtype=dtype)
    return torch.empty_like(tensor), tensor.new_empty(scale.shape, dtype=scale.dtype), grad_zero_point


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
    return _call(_ops.dequant_tensor.default, tensor, scale, zero_point, dtype, block_size=block_size)


@torch.library.register_fake("quant_ops::dequant_tensor")
def _(
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    op = "dequant_tensor"
    codes = (torch.int8, torch.uint8, torch.int16, torch.int32)
    _expect(tensor.dtype in codes, op, f"tensor.dtype in (int8, uint8, int16, int32), got {_name(tensor.dtype)}")
    _expect(dtype in _FLOATING, op, f"the result's dtype in (float32, float16, bfloat16, float64), got {_name(dtype)}")
    _expect_parameters(op, tensor, scale, zero_point, zero_point is not None, block_size)
    return torch.empty_like(tensor, dtype=dtype)


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
    return _call(_ops.choose_qparams.default, tensor, dim, qmin, qmax, asymmetric)


@torch.library.register_fake("quant_ops::choose_qparams")
def _(tensor: Tensor, dim: Sequence[int], qmin: int, qmax: int, asymmetric: bool = False) -> tuple[Tensor, Tensor]:
    op = "choose_qparams"
    _expect_floating(op, "tensor", tensor)
    _expect_codes(op, qmin, qmax)
    _expect(asymmetric or qmax > 0, op, f"qmax > 0 for a symmetric range, got {qmax}. Use asymmetric=True.")
    dims = tensor.dim()
    for d in dim:
        _expect(-dims <= d < dims, op, f"dim in [{-dims}, {dims - 1}], got {d}")
    reduced = {d % dims for d in dim} or set(range(dims))
    shape = [1 if d in reduced else size for d, size in enumerate(tensor.shape)]
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.new_empty(shape, dtype=dtype), tensor.new_empty(shape, dtype=torch.int32)


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
    return _call(_ops.quantize_rows.default, x, asymmetric)


@torch.library.register_fake("quant_ops::quantize_rows")
def _(x: Tensor, asymmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    op = "quantize_rows"
    _expect(x.dtype in _FLOATING[:3], op, f"x.dtype in (float32, float16, bfloat16), got {_name(x.dtype)}")
    _expect(x.dim() >= 1, op, f"x to have at least one dimension, got shape {_shape(x.shape)}")
    rows = [*x.shape[:-1], 1]
    q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32)


# ---- the int8 operators: shared checks, and no gradient --------------------------------------------------------------

_ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)


def _expect_int8(op: str, name: str, tensor: Tensor) -> None:
    remedy = ". Quantize it first, e.g. with quant_tensor_forward(simulate=False)." if tensor.dtype in _FLOATING else ""
    _expect(tensor.dtype == torch.int8, op, f"{name}.dtype int8, got {_name(tensor.dtype)}{remedy}")


def _expect_exact(op: str, what: str, k: int, unsigned: bool) -> None:
    bound = 65793 if unsigned else 131071
    remedy = ". Symmetric int8 activations reach 131071; else split the sum." if unsigned else ". Split the sum into parts."
    _expect(k <= bound, op, f"{what} <= {bound} so that the int32 sum is exact, got {k}{remedy}")


def _out_dtype(op: str, x: Tensor, out_scale: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    if out_scale is not None:
        dtype = out_dtype or torch.int8
        _expect(dtype in (torch.int8, torch.uint8), op, f"out_dtype int8 or uint8 with out_scale, got {_name(dtype)}")
        return dtype
    dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    remedy = ". Integer output needs out_scale." if dtype in (torch.int8, torch.uint8) else ""
    _expect(dtype in _FLOATING[:3], op, f"out_dtype in (float32, float16, bfloat16), got {_name(dtype)}{remedy}")
    return dtype


def _expect_activation(op: str, x: Tensor, x_scale: Tensor | None) -> None:
    _expect(x.dtype in _ACTIVATIONS, op, f"x.dtype in (float32, float16, bfloat16, int8, uint8), got {_name(x.dtype)}")
    _expect(
        x_scale is not None or x.is_floating_point(),
        op,
        f"x_scale with a quantized x, got x.dtype {_name(x.dtype)} and no x_scale. Pass the scale that x was quantized with.",
    )


class _Inference(torch.autograd.Function):
    """Computes without a graph; a gradient that is asked for gets a clear error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, op: Any, kwargs: dict[str, Any], *args: Any) -> Tensor:
        ctx.name = op._schema.name.replace("::", ".")
        ctx.like = [(a.shape, a.dtype) if isinstance(a, Tensor) else None for a in args]
        result: Tensor = op(*args, **kwargs)
        if not result.is_floating_point():
            ctx.mark_non_differentiable(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = zip(ctx.needs_input_grad[2:], ctx.like, strict=True)
        return None, None, *(_no_gradient(grad, *like, ctx.name) if needs and like else None for needs, like in needed)


# An operator, so that tracing (torch.compile with gradients enabled) meets the fake kernel and only a real backward pass raises.
@torch.library.custom_op("quant_ops::_no_gradient", mutates_args=())
def _no_gradient(grad: Tensor, shape: Sequence[int], dtype: torch.dtype, op: str) -> Tensor:
    raise RuntimeError(
        f"{op}: expected no gradient to be asked for, got a backward pass through an int8 operator, which is for "
        "inference. Train with the simulated quant_tensor_forward, or call it under torch.no_grad()."
    )


@_no_gradient.register_fake
def _(grad: Tensor, shape: Sequence[int], dtype: torch.dtype, op: str) -> Tensor:
    return grad.new_empty(shape, dtype=dtype)


def _inference_only(op: Any) -> None:
    """Registers the autograd kernel of an int8 operator: straight to the kernel unless an input requires a gradient."""
    below_autograd = torch._C._AutoDispatchBelowAutograd
    is_grad_enabled = torch.is_grad_enabled

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            tensors = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            return _Inference.apply(op, tensors, *args)  # type: ignore[no-untyped-call]
        with below_autograd():
            return op(*args, **kwargs)

    _IMPLEMENTATION.impl(op._schema.name.removeprefix("quant_ops::"), kernel, "Autograd")


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
    return _call(_ops.int8_gemm.default, a, b)


@torch.library.register_fake("quant_ops::int8_gemm")
def _(a: Tensor, b: Tensor) -> Tensor:
    op = "int8_gemm"
    _expect(a.dtype in (torch.int8, torch.uint8), op, f"a.dtype in (int8, uint8), got {_name(a.dtype)}")
    _expect_int8(op, "b", b)
    shapes = f"{_shape(a.shape)} and {_shape(b.shape)}"
    _expect(a.dim() == 2 and b.dim() == 2, op, f"a.shape (M, K) and b.shape (N, K), got {shapes}")
    remedy = "b is [N, K], as nn.Linear keeps its weight."
    same = a.shape[1] == b.shape[1]
    _expect(same, op, f"a.shape[1] == b.shape[1], got {a.shape[1]} and {b.shape[1]}. {remedy}")
    _expect_exact(op, "K", a.shape[1], a.dtype == torch.uint8)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


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
) -> Tensor:
    """Fused int8 linear layer: quantize, multiply exactly, scale, add bias, ReLU, convert, in one call.

    ``y = fma(acc, x_scale * weight_scale, bias)`` in float32, where ``acc`` is the exact int32 product of the codes, then ReLU,
    then one rounding to the result's dtype, or ``clamp(rne(y / out_scale) + out_zero_point)`` for an integer result.

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
        out_dtype: float32, float16 or bfloat16; default x's dtype (float32 for integer x).
        relu: clamp negative results to 0.

    Returns:
        ``(..., N)``. Row i of a batch equals row i alone, bit for bit, for any number of threads and instruction set.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes do not fit; K > 131071 (65793 for uint8 or with a zero point); a zero point outside its range.
        RuntimeError: a gradient is asked for.

    On CUDA values are not looked at, which would stop the stream: an integer zero point outside its range is used as it is.
    """
    return _call(
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
    )


@torch.library.register_fake("quant_ops::int8_linear")
def _(
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
) -> Tensor:
    op = "int8_linear"
    _expect_int8(op, "weight", weight)
    _expect(weight.dim() == 2, op, f"weight.shape (N, K), got {_shape(weight.shape)}")
    _expect(x.dim() >= 1, op, f"x to have at least one dimension, got shape {_shape(x.shape)}")
    _expect(x.shape[-1] == weight.shape[1], op, f"x.shape[-1] == weight.shape[1], got {x.shape[-1]} and {weight.shape[1]}")
    _expect_activation(op, x, x_scale)
    _expect_exact(op, "in_features", weight.shape[1], asymmetric or x_zero_point is not None or x.dtype == torch.uint8)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=_out_dtype(op, x, out_scale, out_dtype))


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
        bias, asymmetric, out_scale, out_zero_point, out_dtype, relu: as in :func:`int8_linear`.

    Returns:
        ``(N, O, OH, OW)`` with ``OH = (H + top + bottom - dilation * (R - 1) - 1) // stride + 1``; channels_last if x is.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`int8_linear`; also groups that do not divide the channels, an output smaller
            than 1 x 1, and C / groups * R * S beyond the exact bound.
    """
    return _call(
        _ops.int8_conv2d.default,
        x,
        weight,
        weight_scale,
        bias,
        _list(stride),
        _list(padding),
        _list(dilation),
        groups,
        x_scale,
        x_zero_point,
        packed_weight=packed_weight,
        asymmetric=asymmetric,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
        relu=relu,
    )


def _list(value: int | Sequence[int]) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]  # type: ignore[list-item]


def _pair(op: str, name: str, value: Sequence[int], at_least: int) -> tuple[int, int]:
    _expect(len(value) in (1, 2), op, f"{name} to be one or two numbers, got {_shape(value)}")
    _expect(all(v >= at_least for v in value), op, f"{name} >= {at_least}, got {_shape(value)}")
    return value[0], value[-1]


def _padding(op: str, padding: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right)"""
    if len(padding) == 4:
        _expect(all(p >= 0 for p in padding), op, f"padding >= 0, got {_shape(padding)}")
        top, bottom, left, right = padding
        return top, bottom, left, right
    vertical, horizontal = _pair(op, "padding", padding, 0)
    return vertical, vertical, horizontal, horizontal


@torch.library.register_fake("quant_ops::int8_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
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
) -> Tensor:
    op = "int8_conv2d"
    _expect_int8(op, "weight", weight)
    _expect(weight.dim() == 4, op, f"weight.shape (O, C/groups, R, S), got {_shape(weight.shape)}")
    _expect(x.dim() in (3, 4), op, f"x.shape (N, C, H, W) or (C, H, W), got {_shape(x.shape)}")
    c, h, w = x.shape[-3:]
    o, group_channels, r, s = weight.shape
    _expect(
        groups >= 1 and c % groups == 0 and o % groups == 0,
        op,
        f"groups to divide the input and output channels, got groups {groups}, {c} input and {o} output channels",
    )
    _expect(
        c >= 1 and group_channels * groups == c,
        op,
        f"x.shape[-3] == weight.shape[1] * groups, got {c} and {group_channels} * {groups}",
    )
    _expect(r >= 1 and s >= 1, op, f"a kernel of at least 1 x 1, got {r} x {s}")
    stride_h, stride_w = _pair(op, "stride", stride, 1)
    dilation_h, dilation_w = _pair(op, "dilation", dilation, 1)
    top, bottom, left, right = _padding(op, padding)
    reach_h = h + top + bottom - dilation_h * (r - 1) - 1
    reach_w = w + left + right - dilation_w * (s - 1) - 1
    _expect(
        reach_h >= 0 and reach_w >= 0,
        op,
        f"an output of at least 1 x 1, got an input of {h} x {w}, padding {_shape(padding)}, dilation {_shape(dilation)} and a "
        f"kernel of {r} x {s}",
    )
    _expect_exact(
        op,
        "C/groups * R * S",
        group_channels * r * s,
        asymmetric or x_zero_point is not None or x.dtype == torch.uint8,
    )
    _expect_activation(op, x, x_scale)
    shape = (*x.shape[:-3], o, reach_h // stride_h + 1, reach_w // stride_w + 1)
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.stride(1) == 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=_out_dtype(op, x, out_scale, out_dtype), device=x.device, memory_format=memory_format)


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
    return _call(_ops.pack_weight.default, weight, groups)


@torch.library.register_fake("quant_ops::pack_weight")
def _(weight: Tensor, groups: int = 1) -> Tensor:
    op = "pack_weight"
    _expect_int8(op, "weight", weight)
    _expect(weight.dim() in (2, 4), op, f"weight.shape (N, K) or (O, C/groups, R, S), got {_shape(weight.shape)}")
    _expect(
        groups >= 1 and weight.shape[0] % groups == 0 and (groups == 1 or weight.dim() == 4),
        op,
        f"groups to divide the output channels of a convolution, got groups {groups} and weight.shape {_shape(weight.shape)}",
    )
    r, s = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    device = "cuda" if weight.device.type == "cuda" else "cpu"
    return weight.new_empty((_library.packed_bytes(weight.shape[0], weight.shape[1], r, s, groups, device),))


# ---- unpack_weight -----------------------------------------------------------------------------------------------


def unpack_weight(packed_weight: Tensor, shape: Sequence[int], groups: int = 1) -> Tensor:
    """The plain int8 weight of ``shape`` that ``packed_weight = pack_weight(weight, groups)`` was made from.

    Raises:
        TypeError: packed_weight is not int8.
        ValueError: it was made from a weight of another shape or number of groups.
    """
    return _call(_ops.unpack_weight.default, packed_weight, shape, groups)


@torch.library.register_fake("quant_ops::unpack_weight")
def _(packed_weight: Tensor, shape: Sequence[int], groups: int = 1) -> Tensor:
    op = "unpack_weight"
    _expect_int8(op, "packed_weight", packed_weight)
    _expect(len(shape) in (2, 4), op, f"shape (N, K) or (O, C/groups, R, S), got {_shape(shape)}")
    _expect(
        groups >= 1 and shape[0] % groups == 0 and (groups == 1 or len(shape) == 4),
        op,
        f"groups to divide the output channels of a convolution, got groups {groups} and shape {_shape(shape)}",
    )
    return packed_weight.new_empty(shape)


for _op in (
    _ops.int8_gemm.default,
    _ops.int8_linear.default,
    _ops.int8_conv2d.default,
    _ops.pack_weight.default,
    _ops.unpack_weight.default,
):
    _inference_only(_op)
