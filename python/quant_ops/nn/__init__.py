"""The int8 layers."""

from .base import quantize_weight
from .conv import QuantConv2d
from .conv1d import QuantConv1d
from .linear import QuantLinear

Int8Layer = QuantLinear | QuantConv2d

__all__ = ["Int8Layer", "QuantConv1d", "QuantConv2d", "QuantLinear", "quantize_weight"]
