"""The original's layers by their names: functions that make this package's simulated layers, with its arguments in its order.

``amax_input`` and ``amax_weight`` are calibrated largest magnitudes: numbers, arrays or tensors that broadcast to the operand.
Layers of other kinds, Conv3d and ConvTranspose1d among them, are made by :func:`simulated`, and by ``replace_layers``.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import quant_ops as qo

from ...formats import Format

__all__ = ["Conv1d", "Conv2d", "ConvTranspose2d", "Linear", "Quantizer", "simulated"]

Quantizer = Callable[..., Tensor] | None  # a format, or any function of a tensor


def Linear(
    in_features: int,
    out_features: int,
    input_quantizer: Quantizer,
    weight_quantizer: Quantizer,
    output_quantizer: Quantizer,
    *args: Any,
    amax_input: Any = None,
    amax_weight: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """An nn.Linear with rounded operands; further arguments are nn.Linear's."""
    layer = nn.Linear(in_features, out_features, *args, **kwargs)
    return simulated(layer, input_quantizer, weight_quantizer, output_quantizer, amax_input, amax_weight)


def _convolution(kind: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    def make(
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        input_quantizer: Quantizer,
        weight_quantizer: Quantizer,
        output_quantizer: Quantizer,
        *args: Any,
        amax_input: Any = None,
        amax_weight: Any = None,
        **kwargs: Any,
    ) -> nn.Module:
        layer = kind(in_channels, out_channels, kernel_size, *args, **kwargs)
        return simulated(layer, input_quantizer, weight_quantizer, output_quantizer, amax_input, amax_weight)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"An nn.{name} with rounded operands; further arguments are nn.{name}'s."
    return make


Conv1d = _convolution(nn.Conv1d, "Conv1d")
Conv2d = _convolution(nn.Conv2d, "Conv2d")
ConvTranspose2d = _convolution(nn.ConvTranspose2d, "ConvTranspose2d")


def simulated(
    layer: nn.Module,
    input_quantizer: Quantizer,
    weight_quantizer: Quantizer,
    output_quantizer: Quantizer,
    amax_input: Any = None,
    amax_weight: Any = None,
) -> nn.Module:
    """The simulated layer of a float one, which shares its parameters. An amax that is not given is the one it has already, if any.

    Raises:
        ValueError: there is no simulated layer of this kind.
    """
    for name, amax in (("amax_input", amax_input), ("amax_weight", amax_weight)):
        if amax is not None:
            layer.register_buffer(name, torch.as_tensor(amax, dtype=torch.float32, device=next(layer.parameters()).device))
    holder = nn.Sequential(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a conversion of nothing, which is an error here
        result = qo.quantize_(holder, config_of(input_quantizer, weight_quantizer, output_quantizer))
    if not result.converted:
        reason = dict(result.skipped).get("0", "it has no simulated form")
        raise ValueError(f"quant_ops.int_fp_qsim: expected a layer that can be simulated, got {type(layer).__name__}: {reason}")
    return holder[0]


def config_of(input_quantizer: Quantizer, weight_quantizer: Quantizer, output_quantizer: Quantizer) -> qo.Simulated:
    """As in the original, weights that are not calibrated have a scale for the whole tensor."""
    return qo.Simulated(
        input=_taking_amax(input_quantizer),
        weight=_taking_amax(weight_quantizer),
        output=_taking_amax(output_quantizer),
        weight_per="tensor",
    )


@dataclasses.dataclass(frozen=True)
class _WithStaticScale:
    """A function that takes a calibrated amax by the original's name for it, ``static_scale``."""

    function: Callable[..., Tensor]

    def __call__(self, x: Tensor, amax: Tensor | None = None) -> Tensor:
        return self.function(x) if amax is None else self.function(x, static_scale=amax)

    @property
    def __name__(self) -> str:
        """For the layer's text."""
        partial: Any = self.function if isinstance(self.function, functools.partial) else functools.partial(self.function)
        name: str = getattr(partial.func, "__name__", repr(partial.func))
        given = [*map(repr, partial.args), *(f"{key}={value!r}" for key, value in partial.keywords.items())]
        return f"{name}({', '.join(given)})" if given else name


def _taking_amax(quantizer: Quantizer) -> Quantizer:
    if quantizer is None or isinstance(quantizer, Format | _WithStaticScale) or not callable(quantizer):
        return quantizer
    try:
        names = inspect.signature(quantizer).parameters
    except (TypeError, ValueError):  # of some functions that are not written in Python
        return quantizer
    return _WithStaticScale(quantizer) if "static_scale" in names else quantizer
