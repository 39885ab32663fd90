"""Finds the chains of a model: traces it by torch.fx, joins convolutions, additions and activations to steps, and steps to regions.

Modules that torch.fx cannot trace stay calls in the graph of the module around them, and are looked into by themselves. A region is
a connected set of steps that one operator call can stand for: no value leaves it and comes back. Read first: operators.py; next:
build.py, the program of a region.
"""

import copy
import dataclasses
import heapq
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..convert.fold import GraphTracer, gain_and_offset
from ..nn import QuantConv2d, QuantizedLayer
from .operators import EXAMPLE, Op, rank_of, recognize
from .rewrite import changes_of, name_operators, remove_unread, viewed_by

Stopped = list[tuple[str, str]]  # names of modules or nodes, and why a chain ends there

# ---- graphs --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Target:
    """A module of the model that torch.fx has traced, and which is to become its graph.

    Attributes:
        parameters: of its forward, in the order of the graph's placeholders.
    """

    name: str
    module: nn.Module
    graph: fx.GraphModule
    parameters: list[str]

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments of a call, one for each placeholder."""
        signature = inspect.signature(self.module.forward)
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return [call.arguments[name] for name in self.parameters]


class _Tracer(GraphTracer):
    """Notes the innermost module whose forward could not be traced."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves, self.failed = leaves, ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


Call = tuple[int, tuple[str, ...]]  # the number of positional arguments of a call, and the names of the others


def _module_of(module: nn.Module, graph: fx.Graph, traced: nn.Module) -> fx.GraphModule:
    """The graph with the modules of ``module``, and with the tensors that tracing the copy has made constants."""
    made = {name: value for name, value in vars(traced).items() if isinstance(value, Tensor) and name not in vars(module)}
    try:
        vars(module).update(made)
        return fx.GraphModule(module, graph)
    finally:
        for name in made:
            del vars(module)[name]


def _trace(module: nn.Module, call: Call) -> tuple[fx.GraphModule, list[str], dict[str, str]]:
    """The graph of such calls, the parameters of its placeholders, and the modules in it that could not be traced, with reasons.

    Raises:
        Exception: of whatever kind the module's own forward raises when it is given proxies.
    """
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters.values()):
        raise TypeError("its forward takes *args or **kwargs")
    given = {*list(parameters)[: call[0]], *call[1]}
    constants = {name: parameter.default for name, parameter in parameters.items() if name not in given}
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    shared |= {id(layer): layer for layer in module.modules() if isinstance(layer, QuantizedLayer)}
    reasons: dict[str, str] = {}
    while True:
        tracer = _Tracer({*reasons})
        scratch = copy.deepcopy(module, dict(shared))  # forward may set attributes
        try:
            graph = tracer.trace(scratch, concrete_args=constants or None)
        except Exception as error:  # a forward may raise anything when it is given proxies
            if not tracer.failed:
                raise
            reasons[tracer.failed] = _untraceable(error)
            continue
        if any(isinstance(leaf, fx.Proxy) for part in scratch.modules() for leaf in tree_leaves(vars(part))):
            raise TypeError("its forward keeps tensors in attributes")
        return _module_of(module, graph, scratch), list(parameters), reasons


def _untraceable(error: Exception) -> str:
    return f"torch.fx cannot trace it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


def trace_all(model: nn.Module, calls: Mapping[nn.Module, set[Call]], stopped: Stopped) -> list[Target]:
    """The outermost modules that torch.fx can trace, of those with quantized layers.

    Args:
        calls: how the example's run has called each module.
        stopped: gets what could not be traced.
    """
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    targets: dict[nn.Module, Target] = {}
    looked_at: set[nn.Module] = set()

    def look(module: nn.Module) -> None:
        if module in looked_at or not any(isinstance(part, QuantizedLayer) for part in module.modules()):
            return
        looked_at.add(module)
        inside: Iterable[nn.Module] = module.children()
        if type(module) not in (nn.ModuleList, nn.ModuleDict) and not isinstance(module, QuantizedLayer):
            if len(ways := calls.get(module, set())) != 1:
                stopped.append((names[module], f"the example's run calls it in {len(ways)} ways"))
            else:
                try:
                    graph, parameters, reasons = _trace(module, next(iter(ways)))
                except Exception as error:
                    stopped.append((names[module], _untraceable(error)))
                else:
                    targets[module] = Target(names[module], module, graph, parameters)
                    inside = [module.get_submodule(name) for name in reasons]
                    stopped.extend((names[module.get_submodule(name)], reason) for name, reason in reasons.items())
        for child in inside:
            look(child)

    look(model)
    return list(targets.values())


class Recorder(fx.Interpreter):
    """Runs a graph, notes the shape and the dtype of every tensor, and shows those of some nodes to observers."""

    def __init__(self, target: Target, observers: Mapping[fx.Node, Any]) -> None:
        super().__init__(target.graph)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.observers:
            self.observers[n](value)
        elif isinstance(value, Tensor) and EXAMPLE not in n.meta:
            n.meta[EXAMPLE] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return value


# ---- steps ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Unit:
    """What becomes one step of a program: an operator with the addition and the activation after it.

    Attributes:
        nodes: of the graph, in their order; the last one has the result.
        inputs: the nodes that it reads.
        batchnorm: what is to be folded into the layer.
        residual: the node that is added, one of the inputs.
        activation: its name, as a program has it.
        path: the name of the layer in the traced module.
    """

    kind: str
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    numbers: tuple[Any, ...] = ()
    layer: Any = None
    path: str = ""
    batchnorm: nn.BatchNorm2d | None = None
    residual: fx.Node | None = None
    activation: str | None = None

    @property
    def result(self) -> fx.Node:
        return self.nodes[-1]

    def __str__(self) -> str:
        name = self.path or (str(self.nodes[0].target) if self.nodes[0].op == "call_module" else self.nodes[0].name)
        parts = [name if self.layer is not None else f"{name} ({self.kind})"]
        parts += ["batchnorm"] * (self.batchnorm is not None) + ["add"] * (self.residual is not None)
        if self.activation is not None and self.kind != "requantize":
            parts.append(self.activation)
        return " + ".join(parts)


@dataclasses.dataclass
class Found:
    """What has been recognized of a graph.

    Attributes:
        units: each step under all of its nodes.
        reasons: of nodes whose tensors no step computes.
    """

    units: dict[fx.Node, Unit] = dataclasses.field(default_factory=dict)
    reasons: dict[fx.Node, str] = dataclasses.field(default_factory=dict)


def find_units(target: Target) -> Found:
    """The steps of a graph. Operators without effect are taken out of it."""
    graph, modules = target.graph.graph, dict(target.graph.named_modules())
    name_operators(graph, modules)
    found, layouts = Found(), _Layouts()
    for node in list(graph.nodes):
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        op = recognize(node, modules)
        if isinstance(op, Op):
            op = _writes_elsewhere(node, op, modules) or op
        if isinstance(op, Op) and op.kind == "batchnorm":
            reason = _unfoldable(op, found.units, target.graph)
            if reason is not None:
                op = Op("conv2d", op.inputs, layer=_as_convolution(op)) if op.inputs[0] in found.units else reason
        if isinstance(op, Op) and op.kind == "mul":
            op = _float_factor(op, found.units) or op
        if isinstance(op, Op):
            op = layouts.misfit(node, op) or op
        if isinstance(op, str):
            found.reasons[node] = op
        elif op.kind == "same" and node.target == "contiguous" and not _is_layout_unread(node, modules):
            found.reasons[node] = "it lays out a tensor for what has no int8 operator"
        elif op.kind == "same":
            node.replace_all_uses_with(op.inputs[0])
            graph.erase_node(node)
        else:
            _join(node, op, found.units)
    remove_unread(graph, modules)
    return found


@dataclasses.dataclass(eq=False)
class _Alike:
    """Values of four dimensions that lie alike: as rows, as images, or (None) as whoever comes next wants it."""

    nodes: list[fx.Node]
    rows: bool | None = None


class _Layouts:
    """How the values of four dimensions lie: rows of linear layers in torch's order, images in channels_last.

    A convolution and a flattening read both. Elementwise operators need operands that lie alike.
    """

    _ELEMENTWISE = ("add", "mul", "activation", "batchnorm", "same")

    def __init__(self) -> None:
        self._of: dict[fx.Node, _Alike] = {}

    def misfit(self, node: fx.Node, op: Op) -> str | None:
        """Why an operator cannot read its inputs as they lie; else it is noted how they and its result do."""
        inputs = [] if op.kind in ("conv2d", "flatten") else list(op.inputs)
        if op.kind == "mul" and inputs[0].meta[EXAMPLE].shape != inputs[1].meta[EXAMPLE].shape:
            inputs.pop()  # one factor for each channel, which lies alike either way
        nodes = [n for n in (*inputs, node) if rank_of(n) == 4]
        groups = list(dict.fromkeys(self._of.setdefault(n, _Alike([n])) for n in nodes))
        known = {group.rows for group in groups if group.rows is not None}
        if op.kind not in self._ELEMENTWISE:
            known.add(op.kind == "linear")
        if len(known) > 1:
            return "it would read rows of a linear layer together with an image, which lie differently in memory"
        if groups:
            whole = _Alike([n for group in groups for n in group.nodes], next(iter(known), None))
            self._of.update(dict.fromkeys(whole.nodes, whole))
        return None


def _is_layout_unread(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether all readers of a node are int8 operators, which read any layout."""
    for user in node.users:
        op = recognize(user, modules)
        if isinstance(op, str) or (op.kind == "same" and not _is_layout_unread(user, modules)):
            return False
    return True


def _writes_elsewhere(node: fx.Node, op: Op, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the order of operators in place forbids this one: steps run when their region does, on values of their own."""
    written = op.inputs[0] if op.in_place else None
    while written is not None:
        if written.op == "placeholder" or len(written.users) > 1:
            return f"it changes {written.name} in place, which others may read"
        written = viewed_by(written)
    for source in op.inputs:
        if len(source.users) > 1:
            for changing in changes_of(source, modules):
                if changing is not node:
                    return f"{changing.name} changes {source.name} in place, which it reads"
    return None


_TAKE_ACTIVATIONS = ("conv2d", "linear", "add", "mul")


def _join(node: fx.Node, op: Op, units: dict[fx.Node, Unit]) -> None:
    """Makes a step of an operator, or makes it a part of the step before it."""
    before = units.get(op.inputs[0])
    if op.kind == "batchnorm":
        assert before is not None
        before.batchnorm = op.layer
        before.activation = op.numbers[0] if op.numbers else None
        _extend(before, node, units)
    elif op.kind == "activation" and before is not None and before.kind in _TAKE_ACTIVATIONS and _is_open(before):
        before.activation = op.numbers[0]
        _extend(before, node, units)
    elif op.kind == "activation":
        units[node] = Unit("requantize", [node], list(op.inputs), activation=op.numbers[0])
    elif op.kind == "add" and (product := _product_of(op, units)) is not None:
        product.residual = op.inputs[1] if op.inputs[0] is product.result else op.inputs[0]
        product.inputs.append(product.residual)
        _extend(product, node, units)
    else:
        path = str(node.target) if node.op == "call_module" else ""
        units[node] = Unit(op.kind, [node], list(op.inputs), op.numbers, op.layer, path)
        if op.layer is not None:
            units[node].activation = "relu" if op.layer.relu else getattr(op.layer, "activation", None)


def _extend(unit: Unit, node: fx.Node, units: dict[fx.Node, Unit]) -> None:
    unit.nodes.append(node)
    units[node] = unit


def _is_open(unit: Unit) -> bool:
    """Whether what comes next may be a part of this step: its result has one reader, and no activation yet."""
    return len(unit.result.users) == 1 and unit.activation is None


def _product_of(op: Op, units: Mapping[fx.Node, Unit]) -> Unit | None:
    """The product that takes an addition in: of two the later one, since the other's result has to be there."""
    if op.inputs[0] is op.inputs[1]:
        return None
    products = [
        unit
        for node in op.inputs
        if (unit := units.get(node)) is not None and unit.kind in ("conv2d", "linear") and _is_open(unit) and unit.residual is None
    ]
    order = {node: i for i, node in enumerate(units)}
    return max(products, key=lambda unit: order[unit.result], default=None)


def _as_convolution(op: Op) -> QuantConv2d:
    """A depthwise convolution of one pixel, whose scales are the gains: a BatchNorm that no convolution can take in."""
    gain, offset = gain_and_offset(op.layer)
    conv = nn.utils.skip_init(nn.Conv2d, len(gain), len(gain), 1, groups=len(gain), device=gain.device)
    conv.weight, conv.bias = nn.Parameter(gain.float().reshape(-1, 1, 1, 1)), nn.Parameter(offset.float())
    return QuantConv2d.from_float(conv, activation=op.numbers[0] if op.numbers else None).train(op.layer.training)


def _unfoldable(op: Op, units: Mapping[fx.Node, Unit], graph: fx.GraphModule) -> str | None:
    """Why the layer before a BatchNorm cannot take it in."""
    before = units.get(op.inputs[0])
    if (
        before is None
        or before.kind != "conv2d"
        or not _is_open(before)
        or before.residual is not None
        or before.batchnorm is not None
    ):
        return "it does not follow an int8 convolution directly"
    if sum(node.op == "call_module" and graph.get_submodule(str(node.target)) is before.layer for node in graph.graph.nodes) > 1:
        return f"the layer before it, {before.path}, is called more than once"
    return None


def _float_factor(op: Op, units: Mapping[fx.Node, Unit]) -> str | None:
    """Why a product is left to float: the error of a rounded term stays as it is in a sum, that of a factor is multiplied."""
    outside = [node.name for node in op.inputs if node not in units]
    return f"of its factors {', '.join(outside)} is computed in float" if outside else None


# ---- regions -------------------------------------------------------------------------------------------------------------


def find_regions(graph: fx.Graph, units: Mapping[fx.Node, Unit]) -> list[list[Unit]]:
    """Sets of steps that a chain may compute, each in an order in which they can run.

    Steps that depend on each other are in one region, unless a value would leave it and come back.
    """
    region: dict[Unit, int] = {}
    for unit in [units[node] for node in graph.nodes if node in units and units[node].result is node]:
        region[unit] = len(region)
        for source in unit.inputs:
            if source in units and (other := region[units[source]]) != region[unit]:
                joined = {u: other if r == region[unit] else r for u, r in region.items()}
                region = joined if _is_acyclic(graph, units, joined) else region
    regions: dict[int, list[Unit]] = {}
    for unit, number in region.items():
        regions.setdefault(number, []).append(unit)
    return [trimmed for members in regions.values() if _pays(trimmed := _trim(members))]


_USELESS_FIRST = ("add", "mul", "requantize", "avg_pool2d", "adaptive_avg_pool2d", "mean", "slice", "channel_shuffle")
_USELESS_LAST = ("max_pool2d", "upsample_nearest2d", "flatten", "cat", "requantize", "slice", "channel_shuffle")


def _is_useless_first(unit: Unit) -> bool:
    """A layer without a scale is a BatchNorm that has been made a convolution."""
    return unit.kind in _USELESS_FIRST or (unit.layer is not None and unit.layer.input_scale is None)


def _trim(units: list[Unit]) -> list[Unit]:
    """Without the steps at the ends of a region that would only round values which float operators take or give as they are."""
    while True:
        results = {unit.result for unit in units}
        read = {source for unit in units for source in unit.inputs}
        kept = [
            unit
            for unit in units
            if not (_is_useless_first(unit) and results.isdisjoint(unit.inputs))
            and not (unit.kind in _USELESS_LAST and unit.result not in read)
        ]
        if len(kept) == len(units):
            return units
        units = kept


def _pays(units: list[Unit]) -> bool:
    """Whether a chain saves anything: a layer alone is one call already."""
    return any(unit.layer is not None for unit in units) and sum(len(unit.nodes) for unit in units) > 1


def _is_acyclic(graph: fx.Graph, units: Mapping[fx.Node, Unit], region: Mapping[Unit, int]) -> bool:
    groups = {node: _group(node, units, region) for node in graph.nodes}
    return len(list(in_order(graph, groups))) == len(set(groups.values()))


def _group(node: fx.Node, units: Mapping[fx.Node, Unit], region: Mapping[Unit, int]) -> Any:
    """What a node belongs to: itself, its step, or the region of that."""
    unit = units.get(node)
    return node if unit is None else region.get(unit, unit)


def in_order(graph: fx.Graph, groups: Mapping[fx.Node, Any]) -> Iterator[Any]:
    """The groups of a graph's nodes, each after those that it depends on; ends early where they depend on each other."""
    first: dict[Any, int] = {}
    needs: dict[Any, set[Any]] = {}
    readers: dict[Any, set[Any]] = {}
    for i, node in enumerate(graph.nodes):
        group = groups[node]
        first.setdefault(group, i)
        needs.setdefault(group, set()).update(groups[source] for source in node.all_input_nodes if groups[source] != group)
        for source in needs[group]:
            readers.setdefault(source, set()).add(group)
    ready = [(first[group], group) for group, sources in needs.items() if not sources]
    heapq.heapify(ready)
    while ready:
        _, group = heapq.heappop(ready)
        yield group
        for reader in readers.get(group, ()):
            needs[reader].discard(group)
            if not needs[reader]:
                heapq.heappush(ready, (first[reader], reader))
