"""The scale of a format from the largest magnitude of the data: scale = amax / largest (docs/numerics.md, "Choosing scales")."""

import math

import torch
from torch import Tensor

from ..ops import choose_qparams


def compute_dtype(x: Tensor) -> torch.dtype:
    """What scales of x are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scale_of_data(owner: object, x: Tensor, axis: int | None, largest: float) -> Tensor:
    """The largest magnitude of x, or of each index of ``axis``, divided by ``largest``, in a shape that broadcasts to x.

    Positive and normal, so that a slice of zeros stays zeros; NaN where an element is not finite.
    """
    axis = None if axis is None else _dimension(owner, x, axis)
    if axis is not None and x.dim() == 1:  # choose_qparams takes no dimensions for all
        return _scale(x.detach().abs().to(compute_dtype(x)), largest)
    dims = [] if axis is None else [d for d in range(x.dim()) if d != axis]
    qmax = int(largest) if largest.is_integer() and largest < 2**24 else 1
    scale, _ = choose_qparams(x, dims, -qmax, qmax)
    return scale if qmax == largest else (scale / largest).clamp_min(torch.finfo(scale.dtype).tiny)


def scale_from(owner: object, x: Tensor, amax: Tensor | float | None, axis: int | None, largest: float) -> Tensor:
    """The scale for which the largest value of a format stands for ``amax``, or for the largest magnitude of x.

    Differentiable by ``amax``. Errors name ``owner``, the format.
    """
    if amax is None:
        return scale_of_data(owner, x, axis, largest)
    dtype = compute_dtype(x)
    if isinstance(amax, Tensor):
        if not amax.is_floating_point():
            raise TypeError(f"quant_ops.{owner}: expected amax to be floating, got {amax.dtype}")
        amax = amax.to(dtype)
        if axis is not None:
            amax = _along(owner, amax, x, _dimension(owner, x, axis))
    else:
        if amax < 0:
            raise ValueError(f"quant_ops.{owner}: expected amax >= 0, got {amax}")
        amax = torch.full((), amax if math.isfinite(amax) else math.nan, dtype=dtype, device=x.device)
    return _scale(amax, largest)


def _scale(amax: Tensor, largest: float) -> Tensor:
    scale = torch.where(amax == 0, 1.0, (amax / largest).clamp_min(torch.finfo(amax.dtype).tiny))
    return torch.where(amax.isfinite(), scale, torch.nan)


def _dimension(owner: object, x: Tensor, axis: int) -> int:
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"quant_ops.{owner}: expected -x.dim() <= axis < x.dim(), got {axis} and {x.dim()}")
    return axis % x.dim()


def _along(owner: object, amax: Tensor, x: Tensor, axis: int) -> Tensor:
    """One amax for each index of ``axis``, in a shape that broadcasts to x; other shapes broadcast by themselves."""
    if amax.dim() != 1:
        return amax
    if amax.shape[0] not in (1, x.shape[axis]):
        raise ValueError(f"quant_ops.{owner}: expected amax.shape[0] == x.shape[axis], got {amax.shape[0]} and {x.shape[axis]}")
    return amax.reshape([-1 if d == axis else 1 for d in range(x.dim())])
