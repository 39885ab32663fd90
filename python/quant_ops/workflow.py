"""Whole models: replace float layers by int8 ones, and say what was done."""

import dataclasses
import fnmatch
import logging
from collections.abc import Sequence

import torch
from torch import nn

from .config import Int8Dynamic
from .nn import QuantConv2d, QuantLinear

_log = logging.getLogger("quant_ops")


@dataclasses.dataclass
class ConversionResult:
    """What a converting call did. ``print(result)`` shows it as a table.

    Attributes:
        converted: names of the layers that are int8 now.
        skipped: name and reason of every Linear or Conv2d that stayed as it was.
    """

    converted: list[str] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.skipped)} skipped"]
        lines += [f"  int8   {name}" for name in self.converted]
        lines += [f"  float  {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def _matches(name: str, patterns: Sequence[str]) -> str | None:
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def _skip_reason(name: str, module: nn.Module, parent: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if isinstance(module, QuantLinear | QuantConv2d):
        return "int8 already"
    if pattern := _matches(name, exclude):
        return f"excluded by {pattern!r}"
    if not _matches(name, include):
        return f"not included by {list(include)}"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads the weight itself and never calls the layer"
    if "parametrizations" in module._modules:
        return "its weight is parametrized. Remove the parametrization first"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} is a subclass whose forward may differ"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which a replacement would lose"
    return None


def quantize_(
    model: nn.Module,
    config: Int8Dynamic | None = None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> ConversionResult:
    """Replaces the nn.Linear and nn.Conv2d layers of a model by int8 ones, in place, without data.

    A layer that the model uses in several places stays shared. Each float weight is freed as soon as its layer is replaced.

    Args:
        model: any module; its own layers are replaced, so it must not be a Linear or Conv2d itself.
        config: default ``Int8Dynamic()``.
        include, exclude: patterns of ``fnmatch`` over the names of ``model.named_modules()``, e.g. ``["*.head"]``. Exclusion wins.

    Returns:
        What was converted, and what was skipped and why.

    Raises:
        TypeError: config is of another kind, or a pattern list is one string.
        ValueError: model is a Linear or Conv2d itself, a pattern matches no layer, or a weight holds NaN or Inf.
    """
    config = Int8Dynamic() if config is None else config
    if not isinstance(config, Int8Dynamic):
        raise TypeError(f"quant_ops.quantize_: expected config to be an Int8Dynamic, got {type(config).__name__}")
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise TypeError(
                f"quant_ops.quantize_: expected {argument} to be a list of patterns, got one str. Write [{patterns!r}]."
            )
    if isinstance(model, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"quant_ops.quantize_: expected a model that contains layers, got a bare {type(model).__name__}, which cannot be "
            "replaced in place. Use QuantLinear.from_float or QuantConv2d.from_float."
        )
    layers = [
        (name, module, parent, attribute)
        for prefix, parent in model.named_modules(remove_duplicate=False)
        for attribute, module in parent._modules.items()  # named_children would name a repeated module once
        if isinstance(module, nn.Linear | nn.Conv2d | QuantLinear | QuantConv2d)
        for name in [f"{prefix}.{attribute}" if prefix else attribute]
    ]
    for pattern in (*(p for p in include if p != "*"), *exclude):
        if not any(fnmatch.fnmatchcase(name, pattern) for name, *_ in layers):
            raise ValueError(
                f"quant_ops.quantize_: expected the pattern {pattern!r} to match a Linear or Conv2d, got none of "
                f"{[name for name, *_ in layers]}"
            )

    result = ConversionResult()
    places: dict[nn.Module, list[tuple[str, nn.Module, str]]] = {}  # of every layer to be replaced
    for name, module, parent, attribute in layers:
        if reason := _skip_reason(name, module, parent, include, exclude):
            result.skipped.append((name, reason))
            continue
        if module not in places and not (module.weight.is_meta or torch.isfinite(module.weight).all()):
            raise ValueError(
                f"quant_ops.quantize_: expected finite weights, got NaN or Inf, in layer {name!r}. Exclude it, or mend it first."
            )
        places.setdefault(module, []).append((name, parent, attribute))
        result.converted.append(name)

    module = None  # type: ignore[assignment]  # so that only `places` holds the last layer
    layers.clear()
    while places:
        module = next(iter(places))  # type: ignore[assignment]
        kind = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
        layer = kind.from_float(module, weight_bits=config.weight_bits, asymmetric=config.asymmetric)  # type: ignore[arg-type]
        for _, parent, attribute in places.pop(module):
            setattr(parent, attribute, layer)
            if isinstance(parent, nn.TransformerEncoderLayer):
                parent.activation_relu_or_gelu = 0  # its fused inference path would read float weights
        del module  # the last reference: the float weight is freed here
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, QuantLinear) for m in encoder.modules()):
            encoder.use_nested_tensor = False  # nested tensors are for the fused path
    _log.info("%s", result)
    return result
