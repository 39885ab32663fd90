"""Functions that round to scaled formats: ``quantize_to_int`` and ``quantize_to_fp``.

The module itself can be called: it is qtorch's function ``quantizer``, which has the same name.
"""

import inspect
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import quant_ops as qo

from ..qtorch import quant

__all__ = ["quantize_to_fp", "quantize_to_int"]


def quantize_to_int(
    x_float: Tensor,
    num_bits: int,
    calibration: str = "max",
    percentile: float = 99.0,
    static_scale: Any = None,
    per_channel_axis: int | None = None,
    unsigned: bool = False,
    *,
    amax: Any = None,
) -> Tensor:
    """x rounded to integers in ``[-(2^(num_bits - 1) - 1), 2^(num_bits - 1) - 1]`` times ``amax / (2^(num_bits - 1) - 1)``.

    Gradients pass straight through where x rounds into the range, and are 0 elsewhere.

    Args:
        calibration: how amax is chosen: "max", the largest magnitude, or "percentile".
        percentile: percent of the magnitudes that are not clipped, for "percentile".
        static_scale: the calibrated amax (not a scale), instead: a number, list, array or tensor.
        per_channel_axis: dimension of x whose indices have an amax each; by default the tensor has one.
        unsigned: integers in ``[0, 2^num_bits - 1]``; what is negative becomes 0.
        amax: another name of static_scale.

    Raises:
        TypeError: both static_scale and amax are given, or x is not floating.
        ValueError: another calibration, bits not in [2, 24], a percentile not in [0, 100], a negative amax.
    """
    given = _given("quantize_to_int", x_float, static_scale, amax)
    if given is None:
        given = _amax_of("quantize_to_int", x_float, calibration, percentile, per_channel_axis)
    elif given.dim() == 1 and given.shape[0] > 1 and per_channel_axis is not None:
        given = _along("quantize_to_int", given, x_float, per_channel_axis)
    return qo.IntFormat(num_bits, signed=not unsigned)(x_float, amax=given)


def quantize_to_fp(
    x_float: Tensor,
    mantissa_bits: int,
    exponent_bits: int,
    calibration: str = "max",
    per_channel_axis: int = 0,
    percentile: float = 99.0,
    static_scale: Any = None,
    *,
    amax: Any = None,
) -> Tensor:
    """x rounded to floating point whose exponent bias is the real number for which the largest value is amax.

    That is the plain format with the scale ``amax / largest``. All codes are numbers. Gradients pass straight through within
    ``[-amax, amax]``, and are 0 elsewhere.

    Args:
        calibration, percentile, static_scale, amax: as in :func:`quantize_to_int`. Without static_scale the tensor has one amax.
        per_channel_axis: dimension of x that a static_scale of one dimension belongs to.

    Raises:
        TypeError, ValueError: as :func:`quantize_to_int`; exponent_bits not in [1, 7], or mantissa_bits not in [0, 23].
    """
    given = _given("quantize_to_fp", x_float, static_scale, amax)
    if given is None:
        given = _amax_of("quantize_to_fp", x_float, calibration, percentile, None)
    elif given.dim() == 1 and given.shape[0] > 1:
        given = _along("quantize_to_fp", given, x_float, per_channel_axis)
    bits = (_integer(exponent_bits), _integer(mantissa_bits))
    return qo.FloatFormat(*bits, special="none", scaled=True)(x_float, amax=given)


def _integer(bits: Any) -> Any:
    """Bits may be a tensor, as in the original; the format checks them."""
    return int(bits) if isinstance(bits, Tensor) and bits.numel() == 1 and bits == bits.round() else bits


def _given(function: str, x: Tensor, static_scale: Any, amax: Any) -> Tensor | None:
    """The amax that the caller gives, on x's device."""
    if static_scale is not None and amax is not None:
        raise TypeError(f"quant_ops.{function}: expected static_scale or amax, which are the same, got both")
    given = amax if static_scale is None else static_scale
    if given is None or isinstance(given, Tensor):
        return given if given is None else given.to(x.device)
    made = torch.as_tensor(given, dtype=torch.float32)
    if (made < 0).any():
        raise ValueError(f"quant_ops.{function}: expected amax >= 0, got {given}")
    return made.to(x.device)


def _along(function: str, amax: Tensor, x: Tensor, axis: int) -> Tensor:
    if not -x.dim() <= axis < x.dim() or amax.shape[0] != x.shape[axis]:
        raise ValueError(
            f"quant_ops.{function}: expected an amax for each index of per_channel_axis, got {amax.shape[0]} for dimension {axis} "
            f"of {tuple(x.shape)}"
        )
    return amax.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def _amax_of(function: str, x: Tensor, calibration: str, percentile: float, axis: int | None) -> Tensor | None:
    """The amax of x's data in a shape that broadcasts to x; None for the largest magnitude of all of it."""
    if calibration not in ("max", "percentile"):
        raise ValueError(
            f"quant_ops.{function}: expected calibration to be 'max' or 'percentile', got {calibration!r}. Pass static_scale for "
            "other ones, from calibrate_inputs."
        )
    if calibration == "percentile" and not 0 <= percentile <= 100:
        raise ValueError(f"quant_ops.{function}: expected 0 <= percentile <= 100, got {percentile}")
    if axis is not None and not -x.dim() <= axis < x.dim():
        raise ValueError(f"quant_ops.{function}: expected -{x.dim()} <= per_channel_axis < {x.dim()}, got {axis}")
    if x.numel() == 0 or (calibration == "max" and axis is None):
        return None
    magnitudes = x.detach().abs()
    if axis is None:
        return _percentile(magnitudes.flatten(), percentile)
    rows = magnitudes.movedim(axis, 0).flatten(1) if x.dim() > 1 else magnitudes.unsqueeze(1)
    amax = rows.amax(1) if calibration == "max" else _percentile(rows, percentile)
    return amax.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def _percentile(rows: Tensor, percent: float) -> Tensor:
    """Of the last dimension; the mean of the two neighbours where it lies between them."""
    place = percent / 100 * (rows.shape[-1] - 1)
    ordered = rows.sort(-1).values
    return (ordered[..., math.floor(place)] + ordered[..., math.ceil(place)]) / 2


class _Callable(types.ModuleType):
    """The module's class, which makes it callable."""

    __signature__ = inspect.signature(quant.quantizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
        return quant.quantizer(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
