"""Chooses the layers that a call converts, each with its config, and replaces one layer by another."""

import dataclasses
import fnmatch
import logging
import math
import sys
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._description import Config
from .._libraries import LIBRARIES, integration
from .._models import Result, Table, has_hooks, held_bytes, patched, reasons, show_bytes
from ..nn import (
    INT8_LAYERS,
    WEIGHT_ONLY_LAYERS,
    MultiheadAttention,
    QuantizedLayer,
    ScaledLinear,
    TransposedLinear,
    WeightOnlyLayer,
    as_linear,
    exact_class,
)
from ..nn.groups import most_products
from ..nn.loading import check_loads
from ..observers import Observer
from ..simulation.config import Simulated
from ..simulation.layers import SIMULATED, SimulatedLayer
from ..simulation.recast import Recast
from .config import Int8DynamicInt4Weight, Scheme, WeightOnly
from .prepared import Prepared, is_sharded

Filter = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Configs = Scheme | Mapping[Filter, Scheme | None]
FLOAT = tuple(INT8_LAYERS)  # the float layers that have an int8 one
SIMULABLE = tuple(SIMULATED)  # the float layers that have a simulated one

_ALREADY = {f"{form} already": form for form in ("int8", "int4")}  # reasons to leave a layer out, and what it is
_REASON = "_quant_ops_reason"  # attribute of a layer that prepare_ skipped: why, for convert_
_log = logging.getLogger("quant_ops")


@dataclasses.dataclass(repr=False)
class ConversionResult(Result):
    """What a converting call did. It prints as a table, also in a notebook.

    Attributes:
        converted: names of the layers that are now of the kind that the call makes.
        skipped: name and reason of every layer of the kinds that the call converts that stayed as it was, and of every other module
            that owns a float parameter of two or more dimensions, such as an LSTM.
        notes: name of a converted layer and what had to be assumed for it, or what its conversion could not do.
        kind: what the call makes: "int8", "int4", "int8 and int4", "prepared", "qat" or "simulated".
        forms: of each quantized layer among the converted ones, "int8" or "int4".
        share: fraction of the model's weights (parameters of two or more dimensions) that are in layers of this kind now.
        bytes_before, bytes_after: memory that the whole model's tensors hold, packed copies included, what is shared once.
    """

    converted: list[str] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    kind: str = "int8"
    forms: dict[str, str] = dataclasses.field(default_factory=dict)
    share: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0

    def _table(self) -> Table:
        notes = {name: "".join(f"; {note}" for of, note in self.notes if of == name) for name, _ in self.notes}
        lines = [(self.forms.get(name, self.kind), name + notes.get(name, "")) for name in self.converted]
        lines += [
            (_ALREADY.get(reason, "float"), text) for (_, reason), text in zip(self.skipped, reasons(self.skipped), strict=True)
        ]
        summary = f"{len(self.converted)} converted, {len(self.skipped)} skipped"
        if self.share is not None:
            summary += (
                f"\n{self.kind}: {100 * self.share:.1f} % of the weights, "
                f"{show_bytes(self.bytes_before)} -> {show_bytes(self.bytes_after)}"
            )
        return summary, tuple({label for label, _ in lines} | {"float"}), lines


class Survey:
    """What a converting call says about the whole model: begun before the first layer is replaced, finished after the last."""

    def __init__(self, op: str, model: nn.Module, family: str = "int8") -> None:
        self._op, self._model, self._family = op, model, family
        self._classes = classes_for(family)
        self._before = _size(model)
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((name, module))
        self._tied = {  # each layer's weight and the other modules that have the same one
            name: [other for other, owner in owners.get(id(module._parameters.get("weight")), ()) if owner is not module]
            for name, module, *_ in all_layers(model, self._classes)
        }

    def finish(self, result: ConversionResult) -> ConversionResult:
        """Adds what stayed float beside the layers, tied weights, and sizes; warns if nothing was converted, and logs."""
        model, done = self._model, _DONE[result.kind]
        made = {name: model.get_submodule(name) for name in result.converted}
        result.forms = {name: layer.form for name, layer in made.items() if isinstance(layer, QuantizedLayer)}
        _remember(model, result, self._classes)
        form = "int8" if result.kind in ("prepared", "qat") else result.kind
        result.skipped += [
            (name, _no_form(module, weights, form)) for name, module, weights in _other_weights(model, self._classes)
        ]
        order = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        result.skipped.sort(key=lambda entry: order.get(entry[0], len(order)))
        for name in result.converted:
            for other in self._tied.get(name, ()):
                layer, partner = made[name], model.get_submodule(other)
                kept = not isinstance(partner, done)
                if not isinstance(layer, QuantizedLayer):
                    what = "stays float" if kept else ""
                elif kept:
                    what = f"stays float: the {layer.form} weight comes on top of it"
                elif isinstance(layer, WeightOnlyLayer) and layer.shares_weight(partner):
                    what = f"shares the {layer.form} weight"
                else:
                    what = f"has an {partner.form} copy of its own"
                if what:
                    result.notes.append((name, f"its weight is tied to that of {other or 'the model itself'!r}, which {what}"))
        result.bytes_before = self._before
        measure(model, result)
        _log.info("%s", result)
        if not result.converted:
            found = "; ".join(reasons(result.skipped)[:3]) + ("; ..." if len(result.skipped) > 3 else "")
            warnings.warn(
                f"quant_ops.{self._op}: expected at least one {_KINDS[self._family]} to convert, got none: the model stays as it "
                f"was{f' ({found})' if found else ''}.",
                stacklevel=4,
            )
        return result


def measure(model: nn.Module, result: ConversionResult) -> None:
    """Share and memory of the model as it is now."""
    result.share = _share(model, _DONE[result.kind])
    result.bytes_after = _size(model)


def _remember(model: nn.Module, result: ConversionResult, classes: tuple[type[nn.Module], ...]) -> None:
    """Leaves with each layer that prepare_ skips why, so that convert_ can say so; copies of the model keep it until then."""
    for _, layer, *_ in all_layers(model, classes):
        vars(layer).pop(_REASON, None)
    if result.kind in ("prepared", "qat"):
        for name, reason in result.skipped:
            layer = model.get_submodule(name)
            if not isinstance(layer, Prepared | QuantizedLayer):
                vars(layer)[_REASON] = reason


def remembered(layer: nn.Module) -> str:
    """Why prepare_ or prepare_qat_ skipped the layer."""
    return vars(layer).get(_REASON, "it is not prepared")


def _size(model: nn.Module) -> int:
    """Bytes that the model holds, without the statistics of a calibration."""
    return held_bytes(model) - held_bytes(*(module for module in model.modules() if isinstance(module, Observer)))


def _other_weights(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module, list[str]]]:
    """Every module but the layers of these kinds that owns float parameters of two or more dimensions; with their names."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*classes, SimulatedLayer)):
            continue
        if isinstance(module, parametrize.ParametrizationList):
            continue  # named with the module whose weight it computes
        own = list(module._parameters.items())
        if parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            own += [(key, parameter) for key, made in lists.items() for parameter in made.parameters(recurse=False)]
        weights = [key for key, parameter in own if _is_weight(parameter)]
        if weights:
            found.append((name, module, list(dict.fromkeys(weights))))
    return found


def _is_weight(parameter: nn.Parameter | None) -> bool:
    if parameter is None or not parameter.is_floating_point():
        return False
    return nn.parameter.is_lazy(parameter) or parameter.dim() >= 2


def _no_form(module: nn.Module, weights: list[str], form: str) -> str:
    named = ", ".join(weights[:4]) + (f" and {len(weights) - 4} more" if len(weights) > 4 else "")
    return f"{type(module).__name__} has no {form} form: {named}"


def _share(model: nn.Module, done: Any) -> float:
    """The fraction of the weights' elements that is in layers of these classes."""
    layers = [module for module in model.modules() if isinstance(module, done)]
    weights: dict[int, torch.Size] = {}  # a float weight that several of them share counts once
    for layer in layers:
        parameter = layer._parameters.get("weight")
        if isinstance(layer, QuantizedLayer):
            held: Any = layer._buffers["packed_weight"]  # which tied layers share
            weights[id(layer if held is None else held)] = layer.weight.shape
        elif parameter is None:
            weights.update({id(p): p.shape for p in layer.parameters() if _is_weight(p)})
        else:
            weights[id(parameter)] = layer.weight.shape
    taken = sum(map(math.prod, weights.values()))
    theirs = {id(parameter) for layer in layers for parameter in layer.parameters()}
    rest = sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in theirs and not nn.parameter.is_lazy(parameter) and _is_weight(parameter)
    )
    return taken / (taken + rest) if taken else 0.0


# What makes up the share of the weights that a call reports, by its kind.
_DONE: dict[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(("int8", "int4", "int8 and int4"), (QuantizedLayer,)),
    **dict.fromkeys(("prepared", "qat"), (QuantizedLayer, Recast)),
    "simulated": (SimulatedLayer,),
}


@dataclasses.dataclass
class Places:
    """A layer's name, and every parent and attribute where it has to be replaced; with its config."""

    name: str
    config: Scheme
    parents: list[tuple[nn.Module, str]]


def family_of(op: str, config: Configs) -> str:
    """What the configs make, which says which layers a call is about: "int8", "weight-only" (perhaps among int8), "simulated"."""
    configs = [one for one in (config.values() if isinstance(config, Mapping) else [config]) if one is not None]
    found = {isinstance(one, Simulated) for one in configs}
    if len(found) > 1:
        raise TypeError(
            f"quant_ops.{op}: expected configs of quantized layers or of simulated ones, got both. Call it once for each, with "
            "include="
        )
    if True in found:
        return "simulated"
    return "weight-only" if any(isinstance(one, WeightOnly) for one in configs) else "int8"


def float_classes(config: Scheme) -> tuple[type[nn.Module], ...]:
    """The float layers that a config of quantized layers has a form for."""
    if isinstance(config, Int8DynamicInt4Weight):
        return nn.Linear, TransposedLinear
    return tuple(WEIGHT_ONLY_LAYERS) if isinstance(config, WeightOnly) else FLOAT


def _matches(name: str, module: nn.Module, filter: Filter, names: Container[str]) -> bool:
    """``names`` are those of all layers: a filter that is one of them is no pattern, as ``a[0]`` may be."""
    if isinstance(filter, str):
        return name == filter if filter in names else fnmatch.fnmatchcase(name, filter)
    return isinstance(module, filter) if isinstance(filter, type) else bool(filter(name, module))


def _first(filters: Collection[Filter], name: str, module: nn.Module, names: Container[str]) -> Filter | None:
    """The layer's own name, wherever it stands among the filters, or else the first filter that matches."""
    if name in (filter for filter in filters if isinstance(filter, str)):
        return name
    return next((filter for filter in filters if _matches(name, module, filter, names)), None)


# The most products in an exact int32 sum, by whether the activations have a zero point; the operators refuse more.
_MOST_PRODUCTS = {False: 131071, True: 65793}


_SYMMETRIC_NOTE = f"symmetric: with a zero point its sums are exact up to {_MOST_PRODUCTS[True]} products"


def fitting(layer: Any, config: Scheme) -> Scheme | str:
    """The config with which the layer's sums are exact: the given one or, if that is enough, a symmetric one; or why none is."""
    if isinstance(config, Simulated) or nn.parameter.is_lazy(layer.weight):
        return config
    weight: Any = as_linear(layer).weight
    products = weight.shape[1:].numel()
    if isinstance(config, WeightOnly):
        settings = config.settings() | config.linear_settings()
        limit = most_products(settings["bits"], settings["asymmetric"], settings.get("asymmetric_input", False))
        fits = not settings.get("dynamic") or settings["group_size"] != -1 or products <= limit
        return config if fits else f"each output sums {products} products; an int32 sum is exact for at most {limit}"
    if products <= _MOST_PRODUCTS[config.asymmetric]:
        return config
    if products <= _MOST_PRODUCTS[False]:
        return dataclasses.replace(config, asymmetric=False)
    return f"each output sums {products} products; an int32 sum is exact for at most {_MOST_PRODUCTS[False]}"


def _show(filter: Filter) -> str:
    return repr(filter) if isinstance(filter, str) else getattr(filter, "__name__", repr(filter))


def _show_all(filters: Iterable[Filter]) -> str:
    return "[" + ", ".join(_show(f) for f in filters) + "]"


def _skip_reason(module: nn.Module, parent: nn.Module, accepted: tuple[type[nn.Module], ...], simulated: bool) -> str | None:
    if isinstance(module, QuantizedLayer):
        return f"{module.form} already"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads the weight itself and never calls the layer. split_attention_ makes it four layers"
    if "parametrizations" in module._modules:
        return "its weight is parametrized. Remove the parametrization first"
    if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
        return "fully_shard was applied to the layer itself. Quantize before it"
    if isinstance(module, SimulatedLayer):
        return "simulated already. Its to_float() is the float layer"
    if isinstance(module, Prepared) and type(module) not in accepted:
        return f"{module.kind} already. convert_ makes it {'simulated' if isinstance(module.config, Simulated) else 'int8'}"
    if not isinstance(module, Recast):
        if simulated and not _is_unchanged(module):
            return f"{type(module).__name__} is a subclass with a forward of its own"
        if not simulated and exact_class(module) not in accepted:
            return f"{type(module).__name__} is a subclass whose forward may differ"
    if "weight" in vars(module):  # no parameter or buffer: old weight_norm, spectral_norm and prune set it before every call
        return (
            "its weight is computed by a hook. Remove it first, e.g. with remove_weight_norm, remove_spectral_norm or prune.remove"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return f"max_norm changes its weight in every call, which a {'rounded' if simulated else 'packed'} weight does not allow"
    if simulated and isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return "its gradients are sparse, which a rounded weight does not allow"
    if has_hooks(module):
        return "it has hooks, which a replacement would lose"
    return patched(module)


def _no_config_form(module: nn.Module, config: Scheme | None) -> str | None:
    """Why a config does not apply to a layer that others apply to."""
    if config is None or isinstance(config, Simulated) or isinstance(module, (QuantizedLayer, *float_classes(config))):
        return None
    return f"{type(module).__name__} has no form of {type(config).__name__}"


def _is_unchanged(module: nn.Module) -> bool:
    """Whether the layer computes what its class of torch does, be it of a subclass."""
    if exact_class(module) in SIMULATED:
        return True
    kind = simulable_class(module)
    names = ("forward", "_conv_forward", "_output_padding")
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in names)


def simulable_class(module: nn.Module) -> type[nn.Module]:
    """Which key of SIMULATED a float layer belongs to."""
    return next(kind for kind in SIMULATED if isinstance(module, kind))


FAMILIES: dict[str, tuple[type[nn.Module], ...]] = {
    "int8": FLOAT,
    "weight-only": tuple(dict.fromkeys((*FLOAT, *WEIGHT_ONLY_LAYERS))),
    "simulated": SIMULABLE,
}
_KINDS = {
    "int8": "Linear, Conv1d or Conv2d",
    "weight-only": "Linear, Conv1d, Conv2d or Embedding",
    "simulated": "layer that can be simulated",
}  # the same, for messages


def classes_for(family: str) -> tuple[type[nn.Module], ...]:
    """The layers that a call is about: those that it can convert, and quantized ones."""
    return (*FAMILIES[family], QuantizedLayer)


def check_model(op: str, model: nn.Module, family: str = "int8") -> None:
    """A layer cannot be replaced in place in itself."""
    kinds = FAMILIES[family]
    if isinstance(model, kinds):
        kind = next(kind for kind in kinds if isinstance(model, kind))
        shown = type(model) if kind is TransposedLinear else kind
        made = (WEIGHT_ONLY_LAYERS | INT8_LAYERS if family == "int8" else INT8_LAYERS | WEIGHT_ONLY_LAYERS).get(kind)
        remedy = "Wrap it" if family == "simulated" or made is None else f"Use {made.__name__}.from_float, or wrap it"
        raise ValueError(
            f"quant_ops.{op}: expected a model that contains layers, got a bare {shown.__name__}, which cannot be replaced in "
            f"place. {remedy} in an nn.Sequential."
        )


def all_layers(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module, nn.Module, str]]:
    """Name, layer, parent and attribute of every layer of the classes, in the model's order, under every name that it has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        (name, module, modules[name.rpartition(".")[0]], name.rpartition(".")[2])
        for name, module in modules.items()
        if name and isinstance(module, classes)
    ]


def select(
    op: str,
    model: nn.Module,
    config: Configs,
    include: Sequence[Filter],
    exclude: Sequence[Filter],
    kinds: tuple[type[Scheme], ...],
    accepted: tuple[type[nn.Module], ...] = FAMILIES["weight-only"],
    result_kind: str = "int8",
) -> tuple[dict[nn.Module, Places], ConversionResult]:
    """The layers that a call converts, in the model's order, and why it leaves out the others.

    Nothing has been changed when an error is raised: weights are looked at here.
    """
    configs: Mapping[Filter, Scheme | None] = config if isinstance(config, Mapping) else {"*": config}
    for one in configs.values():
        if one is not None and not isinstance(one, kinds):
            named = " or ".join([", ".join(kind.__name__ for kind in kinds[:-1]), kinds[-1].__name__])
            remedy = ""
            if isinstance(one, Config):
                remedy = ". Use quantize_." if isinstance(one, WeightOnly) else ". Use prepare_, calibrate and convert_."
            raise TypeError(f"quant_ops.{op}: expected config to be {named}, got {type(one).__name__}{remedy}")
    family = family_of(op, config)
    simulated = family == "simulated"
    for argument, filters in (("include", include), ("exclude", exclude)):
        if isinstance(filters, str):
            raise TypeError(f"quant_ops.{op}: expected {argument} to be a list of patterns, got one str. Write [{filters!r}].")
    check_model(op, model, family)
    layers = all_layers(model, classes_for(family))
    names = {name for name, *_ in layers}
    for filter in (*include, *exclude, *configs):
        exact = isinstance(filter, str | type) and filter != "*"
        if exact and not any(_matches(name, module, filter, names) for name, module, *_ in layers):
            what = "pattern" if isinstance(filter, str) else "class"
            raise ValueError(
                f"quant_ops.{op}: expected the {what} {_show(filter)} to match a {_KINDS[family]}, got none of "
                f"{[name for name, *_ in layers]}"
            )

    result = ConversionResult(kind=result_kind)
    places: dict[nn.Module, Places] = {}
    for name, module, parent, attribute in layers:
        chosen: Scheme | None = None
        found: Filter | None
        if isinstance(parent, nn.MultiheadAttention) and (parent in places or isinstance(parent, SimulatedLayer)):
            continue  # a part of that layer
        reason = f"{module.form} already" if isinstance(module, QuantizedLayer) else None
        if reason is None and (found := _first(exclude, name, module, names)) is not None:
            reason = f"excluded by {_show(found)}"
        elif reason is None and _first(include, name, module, names) is None:
            reason = f"not included by {_show_all(include)}"
        elif reason is None:
            found = _first(tuple(configs), name, module, names)
            chosen = configs[found] if found is not None else None
            reason = _no_config_form(module, chosen) or _skip_reason(module, parent, accepted, simulated)
            if reason is None and chosen is None:
                reason = f"no config for it among {_show_all(configs)}" if found is None else f"{_show(found)} has no config"
            if reason is None and chosen is not None:
                asked, fit = chosen, fitting(module, chosen)
                reason, chosen = (fit, None) if isinstance(fit, str) else (None, fit)
                if chosen is not None and chosen != asked:
                    result.notes.append((name, _SYMMETRIC_NOTE))
        if reason is not None:
            result.skipped.append((name, reason))
            continue
        assert chosen is not None
        weights = [p for p in module._parameters.values() if _is_weight(p) and p is not None and not nn.parameter.is_lazy(p)]
        if module not in places and not all(weight.is_meta or torch.isfinite(weight).all() for weight in weights):
            raise ValueError(
                f"quant_ops.{op}: expected finite weights, got NaN or Inf, in layer {name!r}. Exclude it, or mend it first."
            )
        if result_kind in ("prepared", "qat", "simulated") and any(map(is_sharded, weights)):
            raise ValueError(
                f"quant_ops.{op}: expected whole weights, got a sharded one (DTensor) in layer {name!r}. Call {op}, and calibrate, "
                "before the model is sharded."
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
        with torch.inference_mode(False):  # its tensors would be refused outside of inference mode
            layer = make(module, places[module])
        for parent, attribute in places.pop(module).parents:
            setattr(parent, attribute, layer)
        del module  # the last reference: the float weight is freed here
    settle(model)


def settle(model: nn.Module) -> None:
    """What every call does to a model after it has replaced layers."""
    leave_fused_paths(model)
    check_loads(model)
    tell_library(model)


def tell_library(model: nn.Module) -> None:
    """Lets ``save_pretrained`` of a model of transformers or diffusers know what is quantized; neither is imported here."""
    for defined_in, name in LIBRARIES.items():
        kind = getattr(sys.modules.get(defined_in), name, None)
        if kind is None or not any(isinstance(module, kind) for module in model.modules()):
            continue
        if (found := integration(defined_in)) is not None:
            found.attach(model)


def leave_fused_paths(model: nn.Module) -> None:
    """Turns off the fused inference paths of torch's encoders, which read float weights and call no layer."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(
            isinstance(part, QuantizedLayer | Recast | ScaledLinear | MultiheadAttention) for part in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # nested tensors are for the fused path
            else:
                module.activation_relu_or_gelu = 0
