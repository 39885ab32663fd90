"""Drop-in int8 layers for inference. They know nothing of how a model is calibrated or converted."""

from torch import nn

from .base import Int8Layer, quantize_weight
from .conv import QuantConv1d, QuantConv2d
from .linear import QuantLinear
from .transposed import TransposedLinear, as_linear, exact_class

# each under the float layer in whose place it stands
INT8_LAYERS: dict[type[nn.Module], type[Int8Layer]] = {
    **{kind.float_class: kind for kind in (QuantLinear, QuantConv1d, QuantConv2d)},
    TransposedLinear: QuantLinear,
}


def float_class(module: nn.Module) -> type[nn.Module]:
    """Which key of :data:`INT8_LAYERS` a float layer belongs to: itself or its base class."""
    return next(kind for kind in INT8_LAYERS if isinstance(module, kind))


__all__ = [
    "INT8_LAYERS",
    "Int8Layer",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "TransposedLinear",
    "as_linear",
    "exact_class",
    "float_class",
    "quantize_weight",
]
