"""torchao's ``quant_api``: linear layers of a model quantized in place, as tensors (``quantize``) or as layers (the others)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import quant_ops as qo

from ....ops import MappingType, ZeroPointDomain
from ..dtypes.aqt import AffineQuantizedTensor, LinearActQuantizedTensor, QuantizeRows, to_aq, to_laq
from ..forms import replaced
from .autoquant import autoquant
from .GPTQ import (
    Int4WeightOnlyGPTQQuantizer,
    Int4WeightOnlyQuantizer,
    Int8DynActInt4WeightGPTQQuantizer,
    Int8DynActInt4WeightQuantizer,
)
from .utils import unwrap_tensor_subclass

__all__ = [
    "Int4WeightOnlyConfig",
    "Int4WeightOnlyGPTQQuantizer",
    "Int4WeightOnlyQuantizer",
    "Int8DynActInt4WeightGPTQQuantizer",
    "Int8DynActInt4WeightQuantizer",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "apply_dynamic_quant",
    "apply_weight_only_int8_quant",
    "autoquant",
    "change_linear_weights_to_int4_woqtensors",
    "change_linear_weights_to_int8_dqtensors",
    "change_linear_weights_to_int8_woqtensors",
    "get_apply_8da4w_quant",
    "get_apply_int4wo_quant",
    "get_apply_int8dyn_quant",
    "get_apply_int8wo_quant",
    "quantize",
    "quantize_",
]

Apply = Callable[[Tensor], Tensor]
FilterFn = Callable[[nn.Module, str], bool]
_EPS = torch.finfo(torch.float32).eps


def _is_linear(module: nn.Module, *_: Any) -> bool:
    """nn.Linear and subclasses with a float weight, but the projection of nn.MultiheadAttention, which is never called."""
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and not isinstance(module._parameters.get("weight"), AffineQuantizedTensor | LinearActQuantizedTensor)
    )


def quantize(model: nn.Module, apply_tensor_subclass: Apply, filter_fn: FilterFn | None = None) -> nn.Module:
    """Replaces the weights of linear layers, in place, by what a function makes of them, e.g. that of ``get_apply_int4wo_quant()``.

    Args:
        apply_tensor_subclass: of the weight; returns a tensor of ``to_aq`` or ``to_laq``.
        filter_fn: of module and name; by default every nn.Linear.

    Returns:
        The model. ``unwrap_tensor_subclass`` makes layers of the tensors, which can be compiled and exported.

    Raises:
        TypeError: the function returns no tensor. If anything is raised, the model is as it was.
    """
    chosen = filter_fn or _is_linear
    made: dict[Any, nn.Parameter] = {}
    for name, module in model.named_modules():
        if chosen(module, name):
            weight = apply_tensor_subclass(module.weight)
            if not isinstance(weight, Tensor):
                raise TypeError(f"quant_ops.quantize: expected the function to return a tensor, got {type(weight).__name__}")
            made[module] = nn.Parameter(weight, requires_grad=False)
    for module, parameter in made.items():
        module.weight = parameter
    return model


def get_apply_int8wo_quant() -> Apply:
    """int8 weights, one scale for each row."""

    def apply_int8wo_quant(weight: Tensor) -> Tensor:
        return to_aq(weight, MappingType.SYMMETRIC, (1, weight.shape[1]), torch.int8, eps=_EPS, zero_point_dtype=torch.int64)

    return apply_int8wo_quant


def get_apply_int8dyn_quant() -> Apply:
    """int8 weights, one scale for each row, and inputs quantized by rows, symmetrically."""

    def apply_int8dyn_quant(weight: Tensor) -> Tensor:
        return to_laq(get_apply_int8wo_quant()(weight), QuantizeRows(asymmetric=False))

    return apply_int8dyn_quant


def get_apply_int4wo_quant(groupsize: int = 32, inner_k_tiles: int = 8) -> Apply:
    """int4 weights in groups, with floating zero points; ``inner_k_tiles`` is accepted and ignored.

    Raises:
        ValueError: a group size other than 32, 64, 128 and 256.
    """
    _expect_group("get_apply_int4wo_quant", groupsize)

    def apply_int4wo_quant(weight: Tensor) -> Tensor:
        return to_aq(
            weight,
            MappingType.ASYMMETRIC,
            (1, groupsize),
            torch.int32,
            0,
            15,
            1e-6,
            zero_point_dtype=torch.bfloat16,
            preserve_zero=False,
            zero_point_domain=ZeroPointDomain.FLOAT,
            extended_layout="tensor_core_tiled",
        )

    return apply_int4wo_quant


def get_apply_8da4w_quant(groupsize: int = 32) -> Apply:
    """Symmetric int4 weights in groups, and inputs quantized by rows with a zero point.

    Raises:
        ValueError: a group size other than 32, 64, 128 and 256.
    """
    _expect_group("get_apply_8da4w_quant", groupsize)

    def apply_8da4w_quant(weight: Tensor) -> Tensor:
        made = to_aq(weight, MappingType.SYMMETRIC, (1, groupsize), torch.int8, -8, 7, _EPS, extended_layout="tensor_core_tiled")
        return to_laq(made, QuantizeRows(asymmetric=True))

    return apply_8da4w_quant


def _expect_group(op: str, groupsize: Any) -> None:
    if groupsize not in (32, 64, 128, 256):
        raise ValueError(f"quant_ops.{op}: expected groupsize 32, 64, 128 or 256, got {groupsize!r}")


# ---- layers --------------------------------------------------------------------------------------------------------------


def change(model: nn.Module, apply: Apply, filter_fn: FilterFn | None = None) -> None:
    """Puts the layers that ``unwrap_tensor_subclass`` makes of what a function makes of the weights in place, all or none."""
    chosen = filter_fn or _is_linear
    made: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if chosen(module, name):
            alone = nn.Sequential(_copy_with(module, nn.Parameter(apply(module.weight), requires_grad=False)))
            made[module] = unwrap_tensor_subclass(alone)[0]  # type: ignore[index]
    if model in made:
        raise ValueError(
            "quant_ops.quant_api: expected a model that contains layers, got a bare Linear, which cannot be replaced in place. "
            "Wrap it in an nn.Sequential."
        )
    replaced(model, made)


def _copy_with(module: Any, weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight, linear.bias = weight, module.bias
    return linear.train(module.training)


def change_linear_weights_to_int8_dqtensors(model: nn.Module, filter_fn: FilterFn | None = None, **kwargs: Any) -> None:
    """Makes the linear layers of more than 16 features int8 ones whose inputs are quantized in every call, in place.

    Args:
        filter_fn: of module and name, in place of that rule. Further arguments are accepted and ignored.
    """
    wide = filter_fn or (lambda module, *_: _is_linear(module) and module.in_features > 16)
    change(model, get_apply_int8dyn_quant(), wide)


def change_linear_weights_to_int8_woqtensors(model: nn.Module, filter_fn: FilterFn | None = None, **kwargs: Any) -> None:
    """Gives the linear layers int8 weights, in place; inputs and products stay floating."""
    change(model, get_apply_int8wo_quant(), filter_fn)


def change_linear_weights_to_int4_woqtensors(
    model: nn.Module, groupsize: int = 128, inner_k_tiles: int = 8, filter_fn: FilterFn | None = None
) -> None:
    """Gives the linear layers int4 weights in groups with floating zero points, in place. Any number of features.

    Raises:
        ValueError: a group size other than 32, 64, 128 and 256.
    """
    change(model, get_apply_int4wo_quant(groupsize), filter_fn)


def apply_dynamic_quant(model: nn.Module, filter_fn: FilterFn | None = None) -> None:
    """The same as ``change_linear_weights_to_int8_dqtensors``."""
    change_linear_weights_to_int8_dqtensors(model, filter_fn)


def apply_weight_only_int8_quant(model: nn.Module, filter_fn: FilterFn | None = None) -> None:
    """The same as ``change_linear_weights_to_int8_woqtensors``."""
    change_linear_weights_to_int8_woqtensors(model, filter_fn)


# ---- names of later versions ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Int8WeightOnlyConfig:
    """int8 weights, one scale for each row."""


@dataclasses.dataclass
class Int8DynamicActivationInt8WeightConfig:
    """int8 weights, one scale for each row, and inputs quantized by rows, symmetrically."""


@dataclasses.dataclass
class Int4WeightOnlyConfig:
    """int4 weights in groups, with floating zero points."""

    group_size: int = 128


def quantize_(model: nn.Module, config: Any, filter_fn: FilterFn | None = None) -> None:
    """Makes the linear layers quantized ones, in place.

    Args:
        config: one of the configs above, a config of ``quant_ops``, or a function as for ``quantize``.

    Raises:
        TypeError: another config.
    """
    if isinstance(config, Int8WeightOnlyConfig):
        apply = get_apply_int8wo_quant()
    elif isinstance(config, Int8DynamicActivationInt8WeightConfig):
        apply = get_apply_int8dyn_quant()
    elif isinstance(config, Int4WeightOnlyConfig):
        apply = get_apply_int4wo_quant(config.group_size)
    elif callable(config):
        apply = config
    else:
        chosen = filter_fn or _is_linear
        qo.quantize_(model, config, include=[lambda name, module: chosen(module, name)])
        return
    change(model, apply, filter_fn)
