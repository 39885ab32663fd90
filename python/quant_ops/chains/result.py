"""``chain_``: replaces what a chain can compute of a calibrated int8 model by chains, and says what was fused and where it stopped.

Read first: find.py and build.py, the two halves of the work.
"""

import dataclasses
import functools
import itertools
import logging
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._models import Result, Table, call, quiet, reasons
from ..nn import QuantizedLayer
from ..observers import Observer
from .build import chain_of, observer_for, region_of
from .find import Call, Recorder, Stopped, Target, find_regions, find_units, in_order, trace_all
from .layer import Chain
from .operators import example_of

_RESIDUALS = (torch.int8, torch.float16, torch.float32)
_log = logging.getLogger("quant_ops")


@dataclasses.dataclass(repr=False)
class ChainResult(Result):
    """What :func:`chain_` did. ``print(result)`` shows it as a table.

    Attributes:
        model: the model that was given, with the chains in it.
        fused: the name of a chain and one of its steps, for every step: ``("chain_0", "conv3 + add + relu")``.
        stopped: name and reason of everything that ends a chain, and of every int8 layer that is in none.
    """

    model: nn.Module
    fused: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    stopped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def chains(self) -> dict[str, Chain]:
        """The chains by name."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Chain)}

    def _table(self) -> Table:
        lines = [("fused", f"{chain}: {step}") for chain, step in self.fused]
        lines += [("stopped", text) for text in reasons(self.stopped)]
        count = len({chain for chain, _ in self.fused})
        return f"{len(self.fused)} steps in {count} chain{'s' * (count != 1)}", ("fused", "stopped"), lines


# ---- the runs on the examples --------------------------------------------------------------------------------------------


def _calls_of(model: nn.Module, example: Any) -> dict[nn.Module, set[Call]]:
    """How one run calls every module: the number of positional arguments, and the names of the others."""
    calls: dict[nn.Module, set[Call]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, set()).add((len(args), tuple(kwargs)))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _record(model: nn.Module, targets: Sequence[Target], batches: Iterable[Any], observers: Mapping[fx.Node, Observer]) -> None:
    """Runs the model on batches, and beside each traced module its graph."""

    def run(target: Target, recorder: Recorder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.run(*target.bound(args, kwargs))

    handles = [
        target.module.register_forward_pre_hook(functools.partial(run, target, Recorder(target, observers)), with_kwargs=True)
        for target in targets
    ]
    try:
        for batch in batches:
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()


# ---- the graph with chains -----------------------------------------------------------------------------------------------


class _Plan:
    """What is to become of one traced module."""

    def __init__(self, target: Target, residual_dtype: torch.dtype) -> None:
        self.target, self.found = target, find_units(target)
        self.regions = [region_of(units, residual_dtype) for units in find_regions(self._graph, self.found.units)]
        self._prefix = f"{target.name}." if target.name else ""

    @property
    def _graph(self) -> fx.Graph:
        return self.target.graph.graph

    def observers(self) -> dict[fx.Node, Observer]:
        """An observer for every value that needs a scale."""
        return {node: observer_for(region.units) for region in self.regions for node in region.scales.observed}

    def insert(self, observers: Mapping[fx.Node, Observer]) -> list[tuple[str, str]]:
        """Makes the module its graph, with a chain in place of each region. The name of a chain and one of its steps for each."""
        if not self.regions:
            return []
        chains = [chain_of(region, observers) for region in self.regions]
        free = (name for i in itertools.count() if not hasattr(self.target.module, name := f"chain_{i}"))
        names = [next(free) for _ in chains]
        for name, chain in zip(names, chains, strict=True):
            self.target.graph.add_module(name, chain)
        groups: dict[fx.Node, Any] = {node: node for node in self._graph.nodes}
        for i, region in enumerate(self.regions):
            groups |= {node: i for unit in region.units for node in unit.nodes}
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for group in in_order(self._graph, groups):
            if isinstance(group, fx.Node):
                copies[group] = graph.node_copy(group, copies.__getitem__)
                copies[group].meta.clear()
                continue
            region = self.regions[group]
            made = graph.call_module(names[group], tuple(copies[node] for node in region.inputs))
            for i, node in enumerate(region.results):
                copies[node] = made if len(region.results) == 1 else graph.call_function(operator.getitem, (made, i))
        _become(self.target.module, fx.GraphModule(self.target.graph, graph, type(self.target.module).__name__))
        return [(self._prefix + name, str(unit)) for name, region in zip(names, self.regions, strict=True) for unit in region.units]

    def stops(self) -> Stopped:
        """What ends the chains, and the layers that are in none."""
        inside = {node for region in self.regions for unit in region.units for node in unit.nodes}
        modules = dict(self.target.graph.named_modules())
        stopped: Stopped = []
        for node in self._graph.nodes:
            layer = node.op == "call_module" and isinstance(modules[str(node.target)], QuantizedLayer)
            near = example_of(node) is not None and any(other in inside for other in (*node.all_input_nodes, *node.users))
            if node in inside or node.op in ("placeholder", "get_attr", "output") or not (layer or near):
                continue
            name = self._prefix + (str(node.target) if node.op == "call_module" else node.name)
            if node in self.found.reasons:
                stopped.append((name, self.found.reasons[node]))
            elif layer:
                stopped.append((name, "no step of a chain comes before or after it"))
        return stopped


def _become(module: nn.Module, graph: fx.GraphModule) -> None:
    """Makes a module another one, as everybody sees it who has it: the class and the attributes, all but the hooks."""
    new = {name: value for name, value in vars(graph).items() if "hooks" not in name}
    module.__class__ = graph.__class__
    module.__dict__.update(new)


def chain_(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Iterable[Any] | None = None,
    residual_dtype: torch.dtype = torch.float16,
) -> ChainResult:
    """Joins the layers of a calibrated int8 model to chains, in place: values stay int8 from one layer to the next.

    What follows a convolution or a linear layer is computed where its sums are: an addition, an activation, the rounding to the
    next layer's codes. Pools and concatenations work on codes. Each chain is one call of :func:`int8_chain`. A value has the scale
    that the layer which reads it was calibrated with; one that only additions and pools read, which have none, gets it from
    ``example_inputs`` and ``calibration``.

    The model is traced by ``torch.fx`` and becomes an ``fx.GraphModule``. Modules that cannot be traced stay as they are, and those
    inside of them are traced by themselves.

    Args:
        model: in eval mode, with layers of static quantization (:class:`Int8Static`). Fold BatchNorms before quantizing.
        example_inputs: a batch: a tensor is the model's argument, a tuple or list are its arguments, a mapping its keyword
            arguments. It has to take the path through the model that matters, with tensors of the dtype that the model will get;
            batch and image sizes may be others.
        calibration: batches as for :func:`calibrate`, for the scales that are new. Without it ``example_inputs`` is all that they
            are chosen by, and has to be data as the model will see it.
        residual_dtype: of values that additions read: float16 or float32, or int8, which is faster and rounds the sum that runs
            through a residual network in every block.

    Returns:
        The steps of every chain, and where the chains end and why.

    Raises:
        TypeError: calibration is one batch.
        ValueError: residual_dtype is another dtype, the model is in training mode or is a layer itself, or a value that needs a
            scale held NaN or Inf in every batch.
    """
    if isinstance(model, QuantizedLayer):
        raise ValueError(f"quant_ops.chain_: expected a model that contains layers, got a bare {type(model).__name__}.")
    if model.training:
        raise ValueError("quant_ops.chain_: expected a model in eval mode, got one in training mode. Call model.eval() first.")
    if isinstance(calibration, Tensor | Mapping):
        raise TypeError(f"quant_ops.chain_: expected an iterable of batches, got one {type(calibration).__name__}. Write [batch].")
    if residual_dtype not in _RESIDUALS:
        raise ValueError(f"quant_ops.chain_: expected residual_dtype in {_RESIDUALS}, got {residual_dtype}.")
    result = ChainResult(model)
    with quiet(model):
        targets = trace_all(model, _calls_of(model, example_inputs), result.stopped)
        _record(model, targets, [example_inputs], {})
        plans = [_Plan(target, residual_dtype) for target in targets]
        observers = {node: observer for plan in plans for node, observer in plan.observers().items()}
        if observers:
            _record(model, targets, itertools.chain([example_inputs], calibration or ()), observers)
        for plan in plans:
            result.stopped += plan.stops()
            result.fused += plan.insert(observers)
    _log.info("%s", result)
    if not result.fused:
        warnings.warn(
            f"quant_ops.chain_: expected at least one chain, got none: the model stays as it was ({result})", stacklevel=2
        )
    return result
