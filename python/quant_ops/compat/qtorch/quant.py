"""qtorch.quant: functions that round tensors to qtorch's number formats. What differs is in the package's docstring."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

import quant_ops as qo

from .number import BlockFloatingPoint, FixedPoint, FloatingPoint, Number

__all__ = ["Quantizer", "block_quantize", "fixed_point_quantize", "float_quantize", "quantizer"]


def quantizer(
    forward_number: Number | None = None,
    backward_number: Number | None = None,
    forward_rounding: str = "stochastic",
    backward_rounding: str = "stochastic",
    clamping_grad_zero: bool = False,
    backward_hooks: Iterable[Callable[[Tensor], Tensor]] = (),
    *,
    forward_num: Number | None = None,
    backward_num: Number | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function that rounds tensors to one format and their gradients to another; None leaves them as they are.

    Args:
        forward_number, backward_number: the two formats; ``forward_num`` and ``backward_num`` are other names of them.
        forward_rounding, backward_rounding: "nearest" or "stochastic".
        clamping_grad_zero: no gradient passes where a fixed-point number was clamped. Otherwise it passes everywhere.
        backward_hooks: functions of the gradient, applied to it before it is rounded.

    Raises:
        ValueError: another rounding, no number of this module, or ``clamping_grad_zero`` for one that is not clamped fixed point.
        TypeError: a number given by both of its names.
    """
    forward = _number("forward", forward_number, forward_num)
    backward = _number("backward", backward_number, backward_num)
    for rounding in (forward_rounding, backward_rounding):
        _expect_rounding("quantizer", rounding)
    if clamping_grad_zero and forward is not None and not (isinstance(forward, FixedPoint) and forward.clamp):
        raise ValueError(f"quant_ops.quantizer: expected a clamped FixedPoint with clamping_grad_zero, got {forward}")
    rounded = qo.with_gradient(
        forward.format(forward_rounding) if forward else None,
        backward.format(backward_rounding) if backward else None,
        everywhere=not clamping_grad_zero,
    )
    hooks = tuple(backward_hooks)
    if not hooks:
        return rounded

    def quantize(x: Tensor) -> Tensor:
        y = rounded(x)
        y = y.view_as(y) if y is x else y
        for hook in hooks if y.requires_grad else ():
            y.register_hook(hook)
        return y

    return quantize


def _number(side: str, number: Number | None, other: Number | None) -> Number | None:
    if number is not None and other is not None:
        raise TypeError(f"quant_ops.quantizer: expected {side}_number or {side}_num, got both")
    found = other if number is None else number
    if found is not None and not isinstance(found, Number):
        raise ValueError(f"quant_ops.quantizer: expected {side}_number to be a number of quant_ops.compat.qtorch, got {found!r}")
    return found


def _expect_rounding(function: str, rounding: str) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"quant_ops.{function}: expected rounding to be 'nearest' or 'stochastic', got {rounding!r}")


def _quantized(function: str, x: Tensor, number: Number, rounding: str) -> Tensor:
    _expect_rounding(function, rounding)
    return qo.with_gradient(number.format(rounding), None, everywhere=True)(x)


def float_quantize(x: Tensor, exp: int, man: int, rounding: str = "stochastic") -> Tensor:
    """x rounded to :class:`FloatingPoint`."""
    return _quantized("float_quantize", x, FloatingPoint(exp, man), rounding)


def fixed_point_quantize(
    x: Tensor, wl: int, fl: int, clamp: bool = True, symmetric: bool = False, rounding: str = "stochastic"
) -> Tensor:
    """x rounded to :class:`FixedPoint`."""
    return _quantized("fixed_point_quantize", x, FixedPoint(wl, fl, clamp, symmetric), rounding)


def block_quantize(x: Tensor, wl: int, dim: int = -1, rounding: str = "stochastic") -> Tensor:
    """x rounded to :class:`BlockFloatingPoint`."""
    return _quantized("block_quantize", x, BlockFloatingPoint(wl, dim), rounding)


class Quantizer(nn.Module):
    """:func:`quantizer` as a module."""

    def __init__(
        self,
        forward_number: Number | None = None,
        backward_number: Number | None = None,
        forward_rounding: str = "stochastic",
        backward_rounding: str = "stochastic",
    ) -> None:
        super().__init__()
        self.quantize = quantizer(forward_number, backward_number, forward_rounding, backward_rounding)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x)
