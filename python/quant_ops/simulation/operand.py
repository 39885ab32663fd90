"""How an operand of a layer or product is rounded to a format: which elements share a scale, and along which dimension blocks lie.

``per`` says which elements share the scale of a format that takes an amax:

    "tensor"    all of them
    "channel"   those of a channel: of an output channel for a weight, of an input channel or feature for an input
    "row"       those of a token of a linear layer or of a sample of a convolution
    32          blocks of so many elements along the dimension that the product sums over; the last one may be shorter
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Format, with_gradient

Rounding = Format | Callable[..., Tensor]  # a format, or any function of a tensor; None leaves the tensor as it is
Per = str | int

PER = ("tensor", "channel", "row")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the dimensions of an operand are, counted from the last one, so that inputs with and without a batch are alike.

    Attributes:
        summed: the dimension that the product sums over; blocks lie along it.
        channel: whose indices are channels.
        row: the dimensions of a row: a token or a sample.
    """

    summed: int
    channel: int
    row: tuple[int, ...]


def rounded(x: Tensor, rounding: Rounding | None, layout: Layout, per: Per = "tensor", amax: Tensor | None = None) -> Tensor:
    """x rounded, in its own shape and dtype; differentiable as the format is. What is not floating is returned as it is.

    Args:
        amax: calibrated largest magnitudes, shaped as :func:`amax_of` gives them; by default those of x. What takes no amax ignores
            them.
    """
    if rounding is None or not x.is_floating_point() or x.numel() == 0:
        return x
    if not isinstance(rounding, Format):
        return rounding(x, amax=amax) if amax is not None and takes_amax(rounding) else rounding(x)
    format = rounding.along(layout.summed)
    if not format.takes_amax:
        return format(x)
    if isinstance(per, int):
        blocks, dim = blocks_of(x, layout.summed, per), layout.summed % x.dim()
        y = format(blocks, amax=amax_of(x, layout, per) if amax is None else amax)
        return y.flatten(dim, dim + 1).narrow(dim, 0, x.shape[dim])
    if per == "channel":
        return format(x, amax=amax, axis=layout.channel)
    if per == "row" and amax is None:
        amax = x.detach().abs().amax(layout.row, keepdim=True)
    return format(x, amax=amax)


def round_gradient(x: Tensor, rounding: Rounding | None, layout: Layout) -> Tensor:
    """x itself, with its gradient rounded; blocks lie along the dimension that the gradient is summed over."""
    if rounding is None or not x.is_floating_point() or not torch.is_grad_enabled():
        return x
    if isinstance(rounding, Format):
        return with_gradient(None, rounding.along(layout.summed))(x)
    return _Gradient.apply(x, rounding)  # type: ignore[no-untyped-call]


class _Gradient(torch.autograd.Function):
    """x, with a gradient that a function of the user has rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rounding(grad), None


def amax_of(x: Tensor, layout: Layout, per: Per) -> Tensor:
    """Largest magnitudes of x: a scalar per tensor, ``(C,)`` per channel, what broadcasts to x or its blocks per row or block."""
    x = x.detach().abs()
    if isinstance(per, int):
        return blocks_of(x, layout.summed, per).amax(layout.summed, keepdim=True)
    if per == "channel":
        channel = layout.channel % x.dim()
        return x.amax([d for d in range(x.dim()) if d != channel])
    return x.amax(layout.row, keepdim=True) if per == "row" else x.amax()


def takes_amax(rounding: Rounding | None) -> bool:
    """Whether calibrated amax are of use: to a format with a scale from them, and to a function with a parameter ``amax``."""
    if isinstance(rounding, Format):
        return rounding.takes_amax
    return rounding is not None and _has_amax(rounding)


@functools.lru_cache(maxsize=256)
def _has_amax(function: Callable[..., Tensor]) -> bool:
    try:
        return "amax" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some functions that are not written in Python
        return False


def blocks_of(x: Tensor, dim: int, size: int) -> Tensor:
    """x with a dimension, counted from the last one, as two: blocks, and elements of a block, at ``dim`` again.

    The last block is filled up with zeros.
    """
    rest = -x.shape[dim] % size
    if rest:
        x = F.pad(x, (*(0, 0) * (-dim - 1), 0, rest))
    return x.unflatten(dim, (-1, size))
