"""Drop-in quantized layers for inference. They know nothing of how a model is calibrated or converted."""

from collections.abc import Iterable

from torch import nn

from .attention import MultiheadAttention
from .base import QuantizedLayer
from .conv import QuantConv1d, QuantConv2d
from .fused import FusedActivation
from .groups import GROUP_SIZES, ZERO_POINTS
from .int8 import Int8Layer, quantize_weight
from .linear import QuantLinear
from .scaled import ScaledLinear
from .transposed import TransposedLinear, as_linear, is_conv1d_of_transformers
from .weight_only import WeightOnlyEmbedding, WeightOnlyLayer, WeightOnlyLinear

# each under the float layer in whose place it stands
INT8_LAYERS: dict[type[nn.Module], type[Int8Layer]] = {
    **{kind.float_class: kind for kind in (QuantLinear, QuantConv1d, QuantConv2d)},
    TransposedLinear: QuantLinear,
}
WEIGHT_ONLY_LAYERS: dict[type[nn.Module], type[WeightOnlyLayer]] = {
    nn.Linear: WeightOnlyLinear,
    nn.Embedding: WeightOnlyEmbedding,
    TransposedLinear: WeightOnlyLinear,
}
QUANTIZED_LAYERS: dict[str, type[QuantizedLayer]] = {
    kind.__name__: kind for kind in (*INT8_LAYERS.values(), *WEIGHT_ONLY_LAYERS.values())
}


def exact_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, of which a subclass is another one; TransposedLinear for transformers' Conv1D, nn.Linear for a
    ScaledLinear, whose multiplier goes over to whatever is made of it."""
    if is_conv1d_of_transformers(type(module)):
        return TransposedLinear
    return nn.Linear if type(module) is ScaledLinear else type(module)


def float_class(module: nn.Module) -> type[nn.Module]:
    """Which float layer that has a quantized one a layer is: its class or base class."""
    return next(kind for kind in (*INT8_LAYERS, *WEIGHT_ONLY_LAYERS) if isinstance(module, kind))


def is_original(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a quantized layer of this class may stand in place of a float layer, which is of no subclass."""
    exact = exact_class(module)
    return kind in (INT8_LAYERS.get(exact), WEIGHT_ONLY_LAYERS.get(exact))


def show_forms(forms: Iterable[str]) -> str:
    """Those of several layers in one word, for results."""
    return " and ".join(sorted(set(forms), reverse=True)) or "int8"


__all__ = [
    "GROUP_SIZES",
    "INT8_LAYERS",
    "QUANTIZED_LAYERS",
    "WEIGHT_ONLY_LAYERS",
    "ZERO_POINTS",
    "FusedActivation",
    "Int8Layer",
    "MultiheadAttention",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "ScaledLinear",
    "TransposedLinear",
    "WeightOnlyEmbedding",
    "WeightOnlyLayer",
    "WeightOnlyLinear",
    "as_linear",
    "exact_class",
    "float_class",
    "is_original",
    "quantize_weight",
    "show_forms",
]
