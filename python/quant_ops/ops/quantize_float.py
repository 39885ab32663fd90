"""Simulated floating formats: ``quant_float_forward`` with one scale or scales that broadcast, ``quant_block_forward`` with a scale
for every block from its data, and their gradients. One section an operator, as in quantize.py.

Schemas are in ``cpp/torch/operators.h``, checks in ``cpp/torch/quantize_float.h``, the formats and their rounding in
``cpp/contract/float_format.h``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant_ops.ops._register import (
    DerivativeError,
    call,
    call_fast,
    expect_no_transform,
    fake_kernel,
    in_transform,
    register_kernel,
    wants_derivative,
)

_ops = torch.ops.quant_ops
_below_autograd = torch._C._AutoDispatchBelowAutograd

# The names of the wrappers' arguments, in the order of the operators' numbers.
SPECIALS = ("none", "nan", "ieee")
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
SCALE_RULES = ("floor", "even", "ceil", "round_up", "e4m3", "bfloat16", "float32")

Seed = int | Tensor | None


def _number(name: str, argument: str, value: str, known: Sequence[str]) -> int:
    if value not in known:
        raise ValueError(f"quant_ops.{name}: expected {argument} to be one of {list(known)}, got {value!r}")
    return known.index(value)


def _special(name: str, special: str | None) -> int | None:
    return None if special is None else _number(name, "special", special, SPECIALS)


def seed_tensor(name: str, rounding: str, seed: Seed, generator: torch.Generator | None) -> Tensor | None:
    """The seed of stochastic rounding as an int64 tensor of one element; None for other roundings, which use none."""
    if rounding != "stochastic":
        return None
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"quant_ops.{name}: expected an int64 as seed, got {seed}")
    return torch.tensor(seed, dtype=torch.int64)


def _call(op: Any, tensors: tuple[Tensor, ...], scale: Tensor | None, *args: Any, **named: Any) -> Any:
    """The operator, past its autograd kernel where neither the tensors nor a scale among ``args`` needs it."""
    if scale is not None and wants_derivative((scale,)):
        return call(op, *tensors, *args, **named)
    return call_fast(op, tensors, *args, **named)


@dataclass(frozen=True)
class _Arguments:
    """An operator's arguments other than tensors. A class of its own, since torch.func takes lists, tuples and dicts apart."""

    operator: str
    integers: Sequence[int]  # positional ones
    named: dict[str, Any]

    def call(self, *tensors: Tensor, last: Sequence[Tensor | None]) -> Tensor:
        result: Tensor = getattr(_ops, self.operator).default(*tensors, *self.integers, *last, **self.named)
        return result

    def backward(self) -> "_Arguments":
        named = {name: value for name, value in self.named.items() if name not in ("saturate", "rounding")}
        return _Arguments(self.operator.replace("forward", "backward"), self.integers, named)


# ---- quant_float_forward ---------------------------------------------------------------------------------------------


def quant_float_forward(
    tensor: Tensor,
    exponent_bits: int,
    mantissa_bits: int,
    scale: Tensor | None = None,
    *,
    bias: int | None = None,
    special: str | None = None,
    saturate: bool = True,
    subnormals: bool = True,
    rounding: str = "nearest_even",
    block_size: Sequence[int] | None = None,
    seed: Seed = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Simulates a binary floating format: ``round_to_format(tensor / scale) * scale``.

    A format has one sign bit, ``exponent_bits`` and ``mantissa_bits``; its numbers are those of IEEE 754 with these widths,
    subnormal ones included. NaN stays NaN and -0 stays -0. fp16 and bf16 are computed in float32, float64 in float64.

    Args:
        tensor: float32, float16, bfloat16 or float64, any shape and strides.
        exponent_bits: 1 to 8. With 1 the values are equally spaced: a sign and an integer of ``mantissa_bits + 1`` bits.
        mantissa_bits: 0 to 23.
        scale: floating, positive; one element, or broadcastable by shape. None is 1.
        bias: of the exponent, ``2 ** (exponent_bits - 1) - 1`` by default. The numbers must be normal ones of float32.
        special: what the codes with the highest exponent are: "none", numbers (OCP FP4 E2M1, FP6); "nan", numbers but for the
            last, which is NaN (OCP FP8 E4M3); "ieee", infinity and NaN (IEEE 754, OCP FP8 E5M2). With 8 exponent bits only "ieee".
            By default what the published standard with these widths and its bias has: "nan" for 4 and 3 bits, "ieee" for 5 and 2,
            5 and 10, and 8 exponent bits; "none" for others.
        saturate: what rounds beyond the largest value, infinities too, becomes that value; otherwise infinity ("ieee") or NaN
            ("nan").
        subnormals: without them the value next to 0 is the smallest normal one.
        rounding: "nearest_even"; "nearest_away", ties away from zero; "toward_zero"; or "stochastic", away from zero with the
            probability of the distance.
        block_size: one entry per dimension; scale then broadcasts to ``tensor.shape / block_size``.
        seed: of "stochastic": an int or an int64 tensor of one element, on the CPU or tensor's device. The random bits of an
            element are those of Philox4x32-10 (Salmon et al., SC 2011) with this key and the element's row-major index, whatever
            the threads, device and memory layout. None draws a seed from ``generator``, or from torch's default one.

    Returns:
        A tensor of tensor's shape, dtype and memory format. Differentiable in ``tensor``: the gradient passes where
        ``|tensor / scale|`` is at most the largest value, and is 0 elsewhere and at NaN.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: widths, bias or names out of range, a format without a finite value other than 0, ``saturate=False`` for a
            format without infinity and NaN, or shapes that do not broadcast.
    """
    name = "quant_float_forward"
    widths = (exponent_bits, mantissa_bits)
    options = {
        "bias": bias,
        "special": _special(name, special),
        "saturate": saturate,
        "subnormals": subnormals,
        "rounding": _number(name, "rounding", rounding, ROUNDINGS),
        "block_size": block_size,
    }
    random = seed_tensor(name, rounding, seed, generator)
    if not torch.compiler.is_compiling() and in_transform() is not None:
        return call(_Simulate.apply, tensor, scale, random, _Arguments(name, widths, options))
    return _call(_ops.quant_float_forward.default, (tensor,), scale, *widths, scale, random, **options)


@fake_kernel("quant_float_forward")
def _(checked: Tensor, tensor: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(tensor, dtype=checked.dtype)


class _Simulate(torch.autograd.Function):
    """quant_float_forward or quant_block_forward with their straight-through derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, scale: Tensor | None, seed: Tensor | None, arguments: _Arguments) -> Tensor:
        return arguments.call(tensor, last=(scale, seed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensor, scale, _, ctx.arguments = inputs
        ctx.save_for_backward(tensor, scale)
        ctx.save_for_forward(tensor, scale)
        ctx.set_materialize_grads(False)  # zeros for a constant scale would look like a derivative by it

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        tensor, scale = ctx.saved_tensors
        _refuse_scale(ctx.arguments.operator, ctx.needs_input_grad[1])
        return None if grad is None else _gradient(grad, tensor, scale, ctx.arguments.backward()), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tensor, scale = ctx.saved_tensors
        _refuse_scale(ctx.arguments.operator, tangents[1] is not None)
        of_tensor = torch.zeros_like(tensor) if tangents[0] is None else tangents[0]
        result: Tensor = _gradient(of_tensor, tensor, scale, ctx.arguments.backward())
        return result


def _refuse_scale(name: str, wanted: bool) -> None:
    if wanted:
        raise DerivativeError(
            f"quant_ops.{name}: expected no derivative by a scale, got one asked for. Use scale.detach(): learned scales are "
            "those of quant_tensor_forward."
        )


def _float_forward_kernel(
    tensor: Tensor, exponent_bits: int, mantissa_bits: int, scale: Tensor | None = None, seed: Tensor | None = None, **named: Any
) -> Any:
    if wants_derivative((tensor, scale)):
        expect_no_transform("quant_float_forward")
        arguments = _Arguments("quant_float_forward", (exponent_bits, mantissa_bits), named)
        return _Simulate.apply(tensor, scale, seed, arguments)  # type: ignore[no-untyped-call]
    with _below_autograd():
        return _ops.quant_float_forward.default(tensor, exponent_bits, mantissa_bits, scale, seed, **named)


register_kernel("quant_float_forward", _float_forward_kernel, "Autograd")


# ---- quant_float_backward --------------------------------------------------------------------------------------------


def quant_float_backward(
    grad: Tensor,
    tensor: Tensor,
    exponent_bits: int,
    mantissa_bits: int,
    scale: Tensor | None = None,
    *,
    bias: int | None = None,
    special: str | None = None,
    subnormals: bool = True,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """The gradient of :func:`quant_float_forward`: ``grad`` where ``|tensor / scale| <= largest value``, else 0.

    This is the piecewise-linear straight-through estimator (arXiv 2004.09602, eq. 9) with the range of the format. Elements that
    are NaN get 0. Differentiable in ``grad``, in which it is linear.

    Args:
        grad: of tensor's shape, any floating dtype.
        tensor, exponent_bits, mantissa_bits, scale, bias, special, subnormals, block_size: as in the forward call.

    Returns:
        A tensor of tensor's shape and dtype.

    Raises:
        TypeError, ValueError: as :func:`quant_float_forward`.
    """
    options = {
        "bias": bias,
        "special": _special("quant_float_backward", special),
        "subnormals": subnormals,
        "block_size": block_size,
    }
    return _gradient(grad, tensor, scale, _Arguments(_FLOAT, (exponent_bits, mantissa_bits), options))


_FLOAT, _BLOCK = "quant_float_backward", "quant_block_backward"


def _gradient(grad: Tensor, tensor: Tensor, scale: Tensor | None, arguments: _Arguments) -> Any:
    """The backward operator that ``arguments`` names."""
    if not torch.compiler.is_compiling() and in_transform() is not None:
        return call(_Pass.apply, grad, tensor, scale, arguments)
    operator = getattr(_ops, arguments.operator).default
    return _call(operator, (grad, tensor), scale, *arguments.integers, scale, **arguments.named)


@fake_kernel("quant_float_backward")
def _(checked: Tensor, tensor: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(tensor, dtype=checked.dtype)


class _Pass(torch.autograd.Function):
    """quant_float_backward or quant_block_backward, which are linear in grad, with its derivatives: the same operator again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, tensor: Tensor, scale: Tensor | None, arguments: _Arguments) -> Tensor:
        return arguments.call(grad, tensor, last=(scale,))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, tensor, scale, ctx.arguments = inputs
        ctx.dtype = grad.dtype
        ctx.save_for_backward(tensor, scale)
        ctx.save_for_forward(tensor, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensor, scale = ctx.saved_tensors
        return _gradient(grad, tensor, scale, ctx.arguments).to(ctx.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tensor, scale = ctx.saved_tensors
        if tangents[0] is None:
            return torch.zeros_like(tensor)
        result: Tensor = _gradient(tangents[0], tensor, scale, ctx.arguments)
        return result


def _pass_kernel(name: str, widths: int) -> Any:
    """The autograd kernel of a backward operator with so many integers after the tensors."""

    def kernel(grad: Tensor, tensor: Tensor, *args: Any, **named: Any) -> Any:
        scale = args[widths] if len(args) > widths else named.pop("scale", named.pop("tensor_scale", None))
        if wants_derivative((grad, tensor, scale)):
            expect_no_transform(name)
            return _Pass.apply(grad, tensor, scale, _Arguments(name, args[:widths], named))  # type: ignore[no-untyped-call]
        with _below_autograd():
            return getattr(_ops, name).default(grad, tensor, *args[:widths], scale, **named)

    return kernel


register_kernel(_FLOAT, _pass_kernel(_FLOAT, 2), "Autograd")

# ---- quant_block_forward ---------------------------------------------------------------------------------------------


def quant_block_forward(
    tensor: Tensor,
    dim: int,
    block_size: int,
    exponent_bits: int,
    mantissa_bits: int,
    tensor_scale: Tensor | None = None,
    *,
    bias: int | None = None,
    special: str | None = None,
    scale_rule: str = "floor",
    scale_divisor: float | None = None,
    rounding: str = "nearest_even",
    seed: Seed = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Simulates a format with a scale for every block of elements: ``round_to_format(tensor / scale) * scale``, saturating.

    Every ``block_size`` elements along ``dim`` are a block, the last of which may be shorter, as if padded with zeros. Its scale
    comes from its largest magnitude, amax. A block of zeros stays zeros; one that holds NaN or Inf becomes NaN.

    Args:
        tensor: float32, float16 or bfloat16, at least one dimension. The block's arithmetic is in float32.
        dim: the dimension that is cut into blocks.
        block_size: elements of a block: 32 in OCP's MX formats, 16 in NVFP4.
        exponent_bits, mantissa_bits, bias, special, rounding, seed, generator: the format of the elements, as in
            :func:`quant_float_forward`. MXINT8's is ``exponent_bits=1, mantissa_bits=6, bias=1``.
        tensor_scale: of "e4m3" only: float32, one element; the two-level form of NVFP4, ``amax of the tensor / (448 * 6)``.
        scale_rule: powers of two (E8M0; OCP Microscaling Formats v1.0, section 6.3), exponents below -127 becoming -127 and beyond
            127 NaN: "floor", ``2 ** (floor(log2(amax)) - emax)`` with the exponent emax of the format's largest value; "even", amax
            rounded to the format's mantissa bits before; "ceil", with ``ceil(log2(amax))``; "round_up",
            ``2 ** ceil(log2(amax / largest))``. Others are ``amax / scale_divisor``: "e4m3" rounds it to E4M3, at least 2^-6 and at
            most 448 (NVFP4); "bfloat16" divides amax rounded to bfloat16 (adaptive block floating point, arXiv 2205.06287);
            "float32" divides amax.
        scale_divisor: the format's largest value by default.

    Returns:
        A tensor of tensor's shape and dtype. Differentiable in ``tensor``: the gradient passes where ``|tensor / scale|`` is at
        most the format's largest value, and is 0 elsewhere; scales count as constants.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: dim, widths or names out of range, block_size < 1, or a tensor_scale for another rule than "e4m3".
    """
    name = "quant_block_forward"
    widths = (dim, block_size, exponent_bits, mantissa_bits)
    options = {
        "bias": bias,
        "special": _special(name, special),
        "rounding": _number(name, "rounding", rounding, ROUNDINGS),
        "scale_rule": _number(name, "scale_rule", scale_rule, SCALE_RULES),
        "scale_divisor": scale_divisor,
    }
    random = seed_tensor(name, rounding, seed, generator)
    if not torch.compiler.is_compiling() and in_transform() is not None:
        return call(_Simulate.apply, tensor, tensor_scale, random, _Arguments(name, widths, options))
    return _call(_ops.quant_block_forward.default, (tensor,), tensor_scale, *widths, tensor_scale, random, **options)


@fake_kernel("quant_block_forward")
def _(checked: Tensor, tensor: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(tensor, dtype=checked.dtype)


def _block_forward_kernel(
    tensor: Tensor,
    dim: int,
    block_size: int,
    exponent_bits: int,
    mantissa_bits: int,
    tensor_scale: Tensor | None = None,
    seed: Tensor | None = None,
    **named: Any,
) -> Any:
    widths = (dim, block_size, exponent_bits, mantissa_bits)
    if wants_derivative((tensor, tensor_scale)):
        expect_no_transform("quant_block_forward")
        arguments = _Arguments("quant_block_forward", widths, named)
        return _Simulate.apply(tensor, tensor_scale, seed, arguments)  # type: ignore[no-untyped-call]
    with _below_autograd():
        return _ops.quant_block_forward.default(tensor, *widths, tensor_scale, seed, **named)


register_kernel("quant_block_forward", _block_forward_kernel, "Autograd")

# ---- quant_block_backward --------------------------------------------------------------------------------------------


def quant_block_backward(
    grad: Tensor,
    tensor: Tensor,
    dim: int,
    block_size: int,
    exponent_bits: int,
    mantissa_bits: int,
    tensor_scale: Tensor | None = None,
    *,
    bias: int | None = None,
    special: str | None = None,
    scale_rule: str = "floor",
    scale_divisor: float | None = None,
) -> Tensor:
    """The gradient of :func:`quant_block_forward`: ``grad`` where ``|tensor / scale| <= largest value``, else 0.

    As :func:`quant_float_backward`, with the scales of the tensor's blocks, which count as constants. A block that holds NaN or Inf
    gets 0.

    Raises:
        TypeError, ValueError: as :func:`quant_block_forward`.
    """
    name = "quant_block_backward"
    options = {
        "bias": bias,
        "special": _special(name, special),
        "scale_rule": _number(name, "scale_rule", scale_rule, SCALE_RULES),
        "scale_divisor": scale_divisor,
    }
    return _gradient(grad, tensor, tensor_scale, _Arguments(name, (dim, block_size, exponent_bits, mantissa_bits), options))


@fake_kernel("quant_block_backward")
def _(checked: Tensor, tensor: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(tensor, dtype=checked.dtype)


register_kernel(_BLOCK, _pass_kernel(_BLOCK, 4), "Autograd")
