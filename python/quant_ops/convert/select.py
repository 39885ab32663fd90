"""Chooses the layers that a call converts, each with its config, and replaces one layer by another."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._models import Result, Table, has_hooks, reasons
from ..nn import INT8_LAYERS, Int8Layer, float_class
from ..nn.loading import check_loads
from .config import Config, Scheme
from .prepared import Prepared

Filter = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Configs = Scheme | Mapping[Filter, Scheme | None]
FLOAT = tuple(INT8_LAYERS)  # the float layers that have an int8 one
FLOAT_OR_INT8: tuple[type[nn.Module], ...] = (*FLOAT, Int8Layer)
KINDS = "Linear, Conv1d or Conv2d"  # the same, for messages


@dataclasses.dataclass
class ConversionResult(Result):
    """What a converting call did. ``print(result)`` shows it as a table.

    Attributes:
        converted: names of the layers that are now of the kind that the call makes.
        skipped: name and reason of every Linear, Conv1d or Conv2d that stayed as it was.
        notes: name of a converted layer and what had to be assumed for it.
        kind: what the call makes: "int8", "prepared" or "qat".
    """

    converted: list[str] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    kind: str = "int8"

    def _table(self) -> Table:
        notes = {name: "".join(f"; {note}" for of, note in self.notes if of == name) for name, _ in self.notes}
        lines = [(self.kind, name + notes.get(name, "")) for name in self.converted]
        lines += [("float", text) for text in reasons(self.skipped)]
        return f"{len(self.converted)} converted, {len(self.skipped)} skipped", (self.kind, "float"), lines


@dataclasses.dataclass
class Places:
    """A layer's name, and every parent and attribute where it has to be replaced; with its config."""

    name: str
    config: Scheme
    parents: list[tuple[nn.Module, str]]


def _matches(name: str, module: nn.Module, filter: Filter) -> bool:
    if isinstance(filter, str):
        return fnmatch.fnmatchcase(name, filter)
    return isinstance(module, filter) if isinstance(filter, type) else bool(filter(name, module))


def _first(filters: Iterable[Filter], name: str, module: nn.Module) -> Filter | None:
    return next((filter for filter in filters if _matches(name, module, filter)), None)


def _show(filter: Filter) -> str:
    return repr(filter) if isinstance(filter, str) else getattr(filter, "__name__", repr(filter))


def _show_all(filters: Iterable[Filter]) -> str:
    return "[" + ", ".join(_show(f) for f in filters) + "]"


def _skip_reason(name: str, module: nn.Module, parent: nn.Module, accepted: tuple[type[nn.Module], ...]) -> str | None:
    if isinstance(module, Int8Layer):
        return "int8 already"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads the weight itself and never calls the layer"
    if "parametrizations" in module._modules:
        return "its weight is parametrized. Remove the parametrization first"
    if type(module) not in accepted:
        if isinstance(module, Prepared):
            return f"{module.kind} already. convert_ makes it int8"
        return f"{type(module).__name__} is a subclass whose forward may differ"
    if has_hooks(module):
        return "it has hooks, which a replacement would lose"
    return None


def check_model(op: str, model: nn.Module) -> None:
    """A layer cannot be replaced in place in itself."""
    if isinstance(model, FLOAT):
        kind = float_class(model)
        raise ValueError(
            f"quant_ops.{op}: expected a model that contains layers, got a bare {kind.__name__}, which cannot be replaced in "
            f"place. Use {INT8_LAYERS[kind].__name__}.from_float, or wrap it in an nn.Sequential."
        )


def all_layers(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module, str]]:
    """Name, layer, parent and attribute of every float or int8 layer of these kinds, under every name that it has."""
    return [
        (f"{prefix}.{attribute}" if prefix else attribute, module, parent, attribute)
        for prefix, parent in model.named_modules(remove_duplicate=False)
        for attribute, module in parent._modules.items()  # named_children would name a repeated module once
        if isinstance(module, FLOAT_OR_INT8)
    ]


def select(
    op: str,
    model: nn.Module,
    config: Configs,
    include: Sequence[Filter],
    exclude: Sequence[Filter],
    kinds: tuple[type[Scheme], ...],
    accepted: tuple[type[nn.Module], ...] = FLOAT,
    result_kind: str = "int8",
) -> tuple[dict[nn.Module, Places], ConversionResult]:
    """The layers that a call converts, in the model's order, and why it leaves out the others.

    Nothing has been changed when an error is raised: weights are looked at here.
    """
    configs: Mapping[Filter, Scheme | None] = config if isinstance(config, Mapping) else {"*": config}
    for one in configs.values():
        if one is not None and not isinstance(one, kinds):
            names = " or an ".join(kind.__name__ for kind in kinds)
            remedy = ". Use prepare_, calibrate and convert_." if isinstance(one, Config) else ""
            raise TypeError(f"quant_ops.{op}: expected config to be an {names}, got {type(one).__name__}{remedy}")
    for argument, filters in (("include", include), ("exclude", exclude)):
        if isinstance(filters, str):
            raise TypeError(f"quant_ops.{op}: expected {argument} to be a list of patterns, got one str. Write [{filters!r}].")
    check_model(op, model)
    layers = all_layers(model)
    for filter in (*include, *exclude, *configs):
        exact = isinstance(filter, str | type) and filter != "*"
        if exact and not any(_matches(name, module, filter) for name, module, *_ in layers):
            what = "pattern" if isinstance(filter, str) else "class"
            raise ValueError(
                f"quant_ops.{op}: expected the {what} {_show(filter)} to match a {KINDS}, got none of "
                f"{[name for name, *_ in layers]}"
            )

    result = ConversionResult(kind=result_kind)
    places: dict[nn.Module, Places] = {}
    for name, module, parent, attribute in layers:
        chosen: Scheme | None = None
        found: Filter | None
        reason = "int8 already" if isinstance(module, Int8Layer) else None
        if reason is None and (found := _first(exclude, name, module)) is not None:
            reason = f"excluded by {_show(found)}"
        elif reason is None and _first(include, name, module) is None:
            reason = f"not included by {_show_all(include)}"
        elif reason is None:
            found = _first(configs, name, module)
            chosen = configs[found] if found is not None else None
            reason = _skip_reason(name, module, parent, accepted)
            if reason is None and chosen is None:
                reason = f"no config for it among {_show_all(configs)}" if found is None else f"{_show(found)} has no config"
        if reason is not None:
            result.skipped.append((name, reason))
            continue
        assert chosen is not None
        weight: Any = module.weight
        if module not in places and not (weight.is_meta or torch.isfinite(weight).all()):
            raise ValueError(
                f"quant_ops.{op}: expected finite weights, got NaN or Inf, in layer {name!r}. Exclude it, or mend it first."
            )
        place = places.setdefault(module, Places(name, chosen, []))
        if place.config != chosen:
            raise ValueError(
                f"quant_ops.{op}: expected one config for the layer that is both {place.name!r} and {name!r}, got {place.config} "
                f"and {chosen}"
            )
        place.parents.append((parent, attribute))
        result.converted.append(name)
    return places, result


def replace_(model: nn.Module, places: dict[nn.Module, Places], make: Callable[[nn.Module, Places], nn.Module]) -> None:
    """Puts ``make(layer, places)`` wherever the layer was. Empties ``places``: each layer is freed as soon as it is replaced."""
    while places:
        module = next(iter(places))
        layer = make(module, places[module])
        for parent, attribute in places.pop(module).parents:
            setattr(parent, attribute, layer)
        del module  # the last reference: the float weight is freed here
    leave_fused_paths(model)
    check_loads(model)


def leave_fused_paths(model: nn.Module) -> None:
    """Turns off the fused inference paths of torch's encoders, which read float weights and call no layer."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(
            isinstance(part, Int8Layer | Prepared) for part in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # nested tensors are for the fused path
            else:
                module.activation_relu_or_gelu = 0
