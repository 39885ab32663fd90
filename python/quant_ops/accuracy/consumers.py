"""Which Linear layers read one tensor, what they read, and the module that makes it, if a scale of its channels may be folded in.

    x / s = norm(...) with its weight and bias divided by s, and W x = (W * s) (x / s)

A run on data answers this. A producer is given only if the layers of the group are all that ever reads its output; whatever else
touches it, or might with other data, forbids that. Read first: watch.py; next: rescale.py.
"""

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._models import Forward, call, patched, quiet
from ..convert.calibrate import count_steps, device_of, expect_batches, progress, to_device
from ..convert.prepared import is_sharded
from ..convert.select import Places
from ..nn import ScaledLinear, TransposedLinear, as_linear, exact_class
from .watch import Producer, Source, Statistics, Watch


@dataclasses.dataclass
class Group:
    """Layers that read one tensor, in the order of their first calls.

    Attributes:
        names, layers: of the same length.
        producer: where a scale of the tensor may be folded; None: nowhere, for this ``reason``.
        low, high: (K,) float32, the exact extremes of the tensor's channels.
        mean: (K,) float64, the mean magnitude of each channel.
        rows: (rows, K), a sample of the tensor in its own dtype; no rows if none were asked for.
    """

    names: list[str]
    layers: list[nn.Module]
    producer: Producer | None
    reason: str
    low: Tensor
    high: Tensor
    mean: Tensor
    rows: Tensor


@dataclasses.dataclass
class Consumers:
    """What :func:`find_consumers` has found.

    Attributes:
        groups: in the order of the first calls of their layers.
        unfit: the layers that are in no group, and why.
        statistics: of every layer that data has reached.
        batches: how many there were.
    """

    groups: list[Group]
    unfit: dict[nn.Module, str]
    statistics: dict[nn.Module, Statistics]
    batches: int

    def left_out(self, places: Mapping[nn.Module, Places], skipped: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Name and reason of all layers that are in no group, ``skipped`` those that were not selected."""
        others = [(place.name, _not_scalable(layer)) for layer, place in places.items() if _not_scalable(layer)]
        return [*skipped, *others, *((places[layer].name, reason) for layer, reason in self.unfit.items())]


def _not_scalable(layer: nn.Module) -> str:
    if isinstance(layer, ScaledLinear):
        return "it has an input_multiplier already"
    return "" if isinstance(layer, nn.Linear | TransposedLinear) else f"{type(layer).__name__} is no Linear layer"


def scalable(places: Mapping[nn.Module, Places]) -> dict[nn.Module, str]:
    """The selected layers whose inputs can be scaled, and their names."""
    return {layer: place.name for layer, place in places.items() if not _not_scalable(layer)}


# ---- conclusions ---------------------------------------------------------------------------------------------------------


def shares_parameters(module: nn.Module, owners: Mapping[int, list[nn.Module]], names: Mapping[nn.Module, str]) -> str | None:
    """What else has one of the module's parameters, for messages; None if nothing has."""
    for key, parameter in module._parameters.items():
        others = [names[other] for other in owners.get(id(parameter), ()) if other is not module]
        if others:
            return f"its {key} is tied to that of {others[0] or 'the model itself'!r}"
    return None


def _unfit_layer(layer: nn.Module, watch: Watch) -> str | None:
    """Why a layer's weight cannot be rescaled."""
    if layer in watch.unfit:
        return watch.unfit[layer]
    if reason := shares_parameters(layer, watch.owners, watch.names):
        return reason
    if (statistics := watch.statistics.get(layer)) is None:
        return "no calibration data has reached it"
    if not statistics.count:
        return "its input held NaN or Inf in every batch" if statistics.left_out else "its input had no rows"
    if layer in watch.read:
        return "something other than the layer itself reads its weight"
    if not weight_of(layer).numel():
        return "it has no weights"
    if any(is_sharded(parameter) or parameter.is_meta for parameter in layer.parameters(recurse=False)):
        return "its weight is sharded (DTensor) or has no data"
    return None


def _unreached(watch: Watch, model: nn.Module) -> list[tuple[str, nn.Module | None, set[int]]]:
    """Modules with weights that no data has reached: name, the called module that holds each, and the sizes of its weights."""
    found: list[tuple[str, nn.Module | None, set[int]]] = []

    def visit(name: str, module: nn.Module, above: nn.Module | None) -> None:
        if module in watch.called:
            above = module
        elif not any(part in watch.called for part in module.modules()):
            sizes = {size for parameter in module.parameters() if parameter.dim() >= 2 for size in parameter.shape}
            if sizes:
                found.append((name, above, sizes))
            return
        for key, child in module.named_children():
            visit(f"{name}.{key}" if name else key, child, above)

    visit("", model, None)
    return found


def _unfit_producer(module: nn.Module, watch: Watch) -> str | None:
    """Why the parameters of a module cannot be divided by a scale, whatever reads its output."""
    if reason := patched(module):
        return reason
    if module in watch.hooked:
        return "it has hooks, which would see other values"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if module in watch.read:
        return "something other than the module itself reads its parameters"
    if any(is_sharded(parameter) or parameter.is_meta for parameter in module.parameters(recurse=False)):
        return "its weight is sharded (DTensor) or has no data"
    return shares_parameters(module, watch.owners, watch.names)


def _producer(watch: Watch, sources: set[Source | None], width: int, unreached: Any) -> Producer | str:
    """The one module whose output the layers of a group read, if its output may be divided by a scale; or why there is none."""
    if None in sources:
        return "its input is computed, by no module"
    if len(sources) > 1:
        return "it reads the outputs of several modules"
    source = next(iter(sources))
    assert source is not None
    module, described = source.module, watch.describe(source.module)
    producer = watch.gains.get((module, source.index))
    if exact_class(module) in (nn.Linear, TransposedLinear):
        producer = Producer("", module, "weight", "bias" if module._parameters.get("bias") is not None else None)
    if producer is None:
        return f"its input comes from {described}, neither a Linear nor a norm with a weight"
    if reason := _unfit_producer(module, watch):
        return f"{described}: {reason}"
    if source.elsewhere:
        return f"the output of {described} is read elsewhere as well: {source.elsewhere}"
    for layer in source.readers:
        if layer in watch.unfit:
            return f"{watch.names[layer]!r}, which stays as it was, reads the output of {described} as well"
    for name, above, sizes in unreached:
        if width in sizes and above in source.seen_in:
            return f"{name!r}, which no data has reached, may read the output of {described} as well"
    return dataclasses.replace(producer, name=watch.names[module])


def _conclude(watch: Watch, model: nn.Module, batches: int) -> Consumers:
    for layer in watch.layers:
        if (reason := _unfit_layer(layer, watch)) is not None:
            watch.unfit[layer] = reason
    unreached = _unreached(watch, model)
    members: dict[nn.Module, list[nn.Module]] = {}
    for layer in watch.statistics:  # in the order of their first calls
        if layer not in watch.unfit:
            members.setdefault(watch.leader(layer), []).append(layer)
    groups = []
    for layers in members.values():
        seen = [watch.statistics[layer] for layer in layers]
        device = seen[0].low.device  # experts may be on several
        low, high, total = ([getattr(one, name).to(device) for one in seen] for name in ("low", "high", "total"))
        found = _producer(watch, set().union(*(watch.read_by[layer] for layer in layers)), low[0].numel(), unreached)
        rows = [part.to(device) for one in seen for part in one.rows]
        groups.append(
            Group(
                names=[watch.layers[layer] for layer in layers],
                layers=layers,
                producer=None if isinstance(found, str) else found,
                reason=found if isinstance(found, str) else "",
                low=functools.reduce(torch.minimum, low),
                high=functools.reduce(torch.maximum, high),
                mean=sum(total[1:], total[0]) / sum(one.count for one in seen),
                rows=torch.cat(rows) if rows else low[0].new_empty(0, low[0].numel()),
            )
        )
    return Consumers(groups, watch.unfit, watch.statistics, batches)


def _eager() -> Any:
    """Compiled models call their hooks. Nothing is compiled before Dynamo is imported, which takes a second."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def find_consumers(
    op: str,
    model: nn.Module,
    layers: Mapping[nn.Module, str],
    data: Iterable[Any],
    forward: Forward | None = None,
    steps: int | None = None,
    rows: int = 0,
) -> Consumers:
    """Runs a model on data, in eval mode and without gradients, and finds the layers that read the same tensors.

    The model is not changed. A tensor that the data never sends to a layer is unknown here: a producer is only given if no module
    that stayed without data may read its output, which is one with a weight of as many channels, in a module that had the output in
    hands.

    Args:
        op: the caller, for messages.
        layers: Linear layers (nn.Linear, or transformers' Conv1D) of the model, and their names.
        data, forward, steps: those of :func:`calibrate`.
        rows: about how many rows of every tensor to keep.

    Raises:
        TypeError: data is one batch.
        ValueError: data is empty, or steps < 1.
    """
    expect_batches(op, data, steps)
    device = device_of(model)
    watch = Watch(model, layers, rows)
    batches = 0
    with quiet(model), _eager(), watch.watching():
        for batch in progress(data, count_steps(data, steps), op):
            watch.finish([call(model, batch if forward is not None else to_device(device, batch), forward)])
            batches += 1
            if batches == steps:
                break
    if batches == 0:
        raise ValueError(f"quant_ops.{op}: expected calibration data, got no batch. An iterator is empty after its first use.")
    if left_out := {layers[layer]: seen.left_out for layer, seen in watch.statistics.items() if seen.left_out}:
        shown = ", ".join(f"{name} ({count})" for name, count in left_out.items())
        warnings.warn(
            f"quant_ops.{op}: expected finite activations, got calls with NaN or Inf, which were left out, at the inputs "
            f"of {shown}",
            stacklevel=3,
        )
    return _conclude(watch, model, batches)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight (outputs, inputs) of a Linear layer, a view of the layer's own."""
    weight = as_linear(layer).weight
    assert isinstance(weight, Tensor)
    return weight.detach()
