"""``replace_layers``: makes the layers of a model simulated ones, in place, and simulates the products of its functions."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

import quant_ops as qo

from ...nn import TransposedLinear
from .attention import MultiheadAttention
from .layers import Conv1d, Conv2d, ConvTranspose2d, Linear, Quantizer, config_of, simulated

__all__ = ["DEFAULT_MAPPING", "replace_layers"]

DEFAULT_MAPPING: dict[type[nn.Module], Any] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.MultiheadAttention: MultiheadAttention,
    nn.Conv3d: simulated,
    nn.ConvTranspose1d: simulated,
    nn.ConvTranspose3d: simulated,
    TransposedLinear: simulated,
}
products: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()  # of each model: its remove() ends it
_OWN: tuple[Callable[..., nn.Module], ...] = tuple(DEFAULT_MAPPING.values())


def replace_layers(
    module: nn.Module,
    input_quantizer: Quantizer,
    weight_quantizer: Quantizer,
    output_quantizer: Quantizer,
    mapping: Mapping[type[nn.Module], Any] | None = None,
) -> nn.Module:
    """Replaces the layers of a model by simulated ones, in place, with what ``calibrate_inputs`` and ``calibrate_weights`` found.

    What was replaced, and what was not and why, is logged on the logger "quant_ops" at level INFO. A model that has been replaced
    already stays as it is, with a warning. ``products[model].remove()`` makes products of functions ordinary ones again.

    Args:
        module: the model.
        input_quantizer, weight_quantizer, output_quantizer: formats, or functions of a tensor that return one of its shape; None
            leaves the operand as it is. A function with a parameter ``static_scale`` or ``amax`` is given a calibrated amax.
        mapping: which classes of layers are replaced, by default ``DEFAULT_MAPPING``. With nn.MultiheadAttention among them, the
            products of functions are simulated too. A value that is none of that mapping's is a class whose ``from_float`` is
            called with the layer, as in the original: only layers of just this class, and nothing within them.

    Returns:
        The model; the new layer if module is itself a layer.
    """
    mapping = mapping or DEFAULT_MAPPING
    config = config_of(input_quantizer, weight_quantizer, output_quantizer)
    own = tuple(kind for kind, made in mapping.items() if made in _OWN)
    others = {kind: made for kind, made in mapping.items() if made not in _OWN}
    if type(module) in others:
        return _from_float(module, others[type(module)], config)
    if isinstance(module, own):
        return simulated(module, input_quantizer, weight_quantizer, output_quantizer)
    left: set[str] = set()
    made: dict[nn.Module, nn.Module] = {}  # a layer in several places stays one
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) in others and not _is_within(name, left):
            if layer not in made:
                made[layer] = _from_float(layer, others[type(layer)], config)
            module.set_submodule(name, made[layer])
            left.add(name)

    def mapping_has_it(name: str, layer: nn.Module) -> bool:
        return isinstance(layer, own) and not _is_within(name, left)

    qo.quantize_(module, config, include=[mapping_has_it])
    if nn.MultiheadAttention in own and not hasattr(module, "_simulates_products"):
        products[module] = qo.simulate_products_(module, config)
    return module


def _is_within(name: str, names: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in names)


def _from_float(layer: nn.Module, kind: Any, config: qo.Simulated) -> nn.Module:
    """By a class of the user, which finds quantizers and amax as attributes of the float layer."""
    found: Any = layer
    found.input_quantizer, found.weight_quantizer, found.output_quantizer = config.input, config.weight, config.output
    for name in ("amax_input", "amax_weight"):
        if not hasattr(layer, name):
            setattr(layer, name, None)
    return kind.from_float(layer)
