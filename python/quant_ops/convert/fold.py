"""Folds BatchNorms into the Linear or convolution before them: w' = w * g, b' = (b - mean) * g + beta, g = gamma / sqrt(var + eps).

A pair may be folded if the BatchNorm is all that ever sees the layer's output. That is read off the graph of ``torch.fx`` and off a
run on an example; where neither is available, neighbours in an ``nn.Sequential`` are folded. A pair that is not known to be safe
is left as it was, with a reason.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._models import Result, Table, has_hooks, patched, reasons
from ..nn import QuantizedLayer

_log = logging.getLogger("quant_ops")

# The BatchNorm that normalizes the channels of each layer's output.
_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# A BatchNorm1d accepts outputs of another rank from these layers too, but then it does not normalize their channels.
_RANK: dict[type[nn.Module], int] = {nn.Linear: 2, nn.Conv1d: 3, nn.ConvTranspose1d: 3}

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_WATCHED = (*_PAIRS, _BatchNorm, QuantizedLayer)  # leaves of the graph, and what a run watches

_Found = nn.Module | str  # the layer that a BatchNorm may be folded into, or the reason why there is none


@dataclasses.dataclass(repr=False)
class FoldResult(Result):
    """What :func:`fold_batchnorm_` did. ``print(result)`` shows it as a table.

    Attributes:
        folded: names of each layer and of the BatchNorm that it has taken in.
        skipped: name and reason of every BatchNorm that stayed as it was.
    """

    folded: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def _table(self) -> Table:
        lines = [("folded", f"{batchnorm} into {layer}") for layer, batchnorm in self.folded]
        lines += [("skipped", text) for text in reasons(self.skipped)]
        return f"{len(self.folded)} folded, {len(self.skipped)} skipped", ("folded", "skipped"), lines


# ---- the model's modules -------------------------------------------------------------------------------------------------


class _Modules:
    """Every name of every module, and the modules that hold each parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, list[str]] = {}
        self.owners: dict[int, list[nn.Module]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        for module in self.names:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                self.owners.setdefault(id(tensor), []).append(module)
        self.batchnorms = [module for module in self.names if isinstance(module, _BatchNorm)]

    def name(self, module: nn.Module) -> str:
        return self.names[module][0]

    def describe(self, module: nn.Module) -> str:
        return f"{type(module).__name__} {self.name(module)!r}"


def _unfit(module: nn.Module, modules: _Modules) -> str | None:
    """Why this layer or BatchNorm cannot be folded, regardless of its neighbours; None if it can."""
    names = modules.names[module]
    if len(names) > 1:
        return f"{type(module).__name__} is shared by {names}"
    if type(module) not in _PAIRS and not isinstance(module, _NORMS):
        return f"{type(module).__name__} is a subclass whose forward may differ"
    if parametrize.is_parametrized(module):
        return f"the weight of {modules.describe(module)} is parametrized. Remove the parametrization first"
    if has_hooks(module):
        return f"{modules.describe(module)} has hooks, which would see other values"
    if reason := patched(module):
        return f"{modules.describe(module)} does not compute as its class does: {reason}"
    for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if tensor.is_meta:
            return f"{modules.describe(module)} has no data, only shapes"
        if type(tensor) not in (Tensor, nn.Parameter) or not (tensor.is_floating_point() or attribute == "num_batches_tracked"):
            return f"{attribute} of {modules.describe(module)} is no plain floating-point tensor"
        if others := [modules.name(other) for other in modules.owners[id(tensor)] if other is not module]:
            return f"{modules.describe(module)} shares its {attribute} with {others}"
    if isinstance(module, _NORMS) and applied_after(module) is None:  # last: it runs the module, whose hooks would see that
        return f"{type(module).__name__} is a subclass whose forward may differ"
    return None


def applied_after(batchnorm: Any) -> list[nn.Module] | None:
    """What a BatchNorm in eval mode applies to the normalized tensor: its children one after the other, as timm's BatchNormAct2d
    does. None for a subclass that computes anything else, which is tried out, so that no class is named."""
    children = list(batchnorm.children())
    if type(batchnorm) in _NORMS or batchnorm.running_mean is None:
        return children
    mean = batchnorm.running_mean
    rank = next(rank for norm, rank in zip(_NORMS, (3, 4, 5), strict=True) if isinstance(batchnorm, norm))
    shape = (2, batchnorm.num_features, *(3,) * (rank - 2))
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).to(mean.device, mean.dtype)
    try:
        with torch.no_grad():
            got = batchnorm(x.clone())
            y = nn.functional.batch_norm(x, mean, batchnorm.running_var, batchnorm.weight, batchnorm.bias, eps=batchnorm.eps)
            for child in children:
                y = child(y)
            return children if torch.equal(got, y) else None
    except Exception:  # a forward of any class may raise anything
        return None


def _misfit(layer: Any, batchnorm: nn.Module, modules: _Modules) -> str | None:
    """Why this BatchNorm cannot be folded into this layer, although it directly follows it."""
    if isinstance(layer, QuantizedLayer):
        return f"{modules.describe(layer)} before it is {layer.form} already. Fold before quantizing"
    if type(layer) not in _PAIRS and not isinstance(layer, tuple(_PAIRS)):
        return f"it follows {modules.describe(layer)}, no Linear or convolution"
    if reason := _unfit(layer, modules):
        return reason
    if not isinstance(batchnorm, _PAIRS[type(layer)]):
        return f"after {modules.describe(layer)} a {type(batchnorm).__name__} does not normalize the layer's outputs"
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if outputs != batchnorm.num_features:
        return f"it normalizes {batchnorm.num_features} channels, and {modules.describe(layer)} has {outputs}"
    return None


# ---- who sees a layer's output: the graph --------------------------------------------------------------------------------


class GraphTracer(fx.Tracer):
    """Leaves are the layers and BatchNorms, of any class, and what torch.fx takes for one."""

    proxy_buffer_attributes = True  # a forward that reads running_mean itself shows in the graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, _WATCHED)
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if (m._forward_hooks or m._forward_pre_hooks) and not self.is_leaf_module(m, self.path_of_module(m)):
            raise TypeError(f"{type(m).__name__} has hooks, which may do anything with tensors that they see")
        return super().call_module(m, forward, args, kwargs)


def _graphs(model: nn.Module) -> list[fx.Graph]:
    """The model's graph; with optional arguments two, with values and with their defaults; none if one of them cannot be traced."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    try:
        parameters = inspect.signature(model.forward).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        scratch = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # forward may set attributes
        graphs = [GraphTracer().trace(scratch, concrete_args=values) for values in ([None, defaults] if defaults else [None])]
    except Exception as error:  # a forward may raise anything when it is given proxies
        _log.debug("torch.fx cannot trace %s: %s", type(model).__name__, error)
        return []
    kept = any(isinstance(leaf, fx.Proxy) for module in scratch.modules() for leaf in tree_leaves(vars(module)))
    return [] if kept else graphs  # anything may read a tensor that an attribute keeps


def _by_graph(graph: fx.Graph, modules: _Modules) -> dict[nn.Module, _Found]:
    calls: dict[nn.Module, list[fx.Node]] = {}
    read: set[nn.Module] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(modules.model.get_submodule(node.target), []).append(node)
        elif node.op == "get_attr":
            read.add(modules.model.get_submodule(node.target.rpartition(".")[0]))
    of_node = {node: module for module, nodes in calls.items() for node in nodes}

    def look(batchnorm: nn.Module) -> _Found:
        nodes = calls.get(batchnorm, [])
        if len(nodes) != 1:
            return f"forward calls it {len(nodes)} times"
        if len(nodes[0].all_input_nodes) != 1:
            return "it has other inputs than one tensor"
        source = nodes[0].all_input_nodes[0]
        if source not in of_node:
            return f"its input comes from {source.name!r}, no Linear or convolution"
        layer = of_node[source]
        if len(calls[layer]) != 1:
            return f"forward calls {modules.describe(layer)} {len(calls[layer])} times"
        if others := [user.name for user in source.users if user is not nodes[0]]:
            return f"the output of {modules.describe(layer)} goes to {others} as well"
        if touched := [module for module in (layer, batchnorm) if module in read]:
            return f"forward reads the tensors of {modules.describe(touched[0])} itself"
        return layer

    return {batchnorm: look(batchnorm) for batchnorm in modules.batchnorms}


# ---- who sees a layer's output: a run on an example ----------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Sees every operator of a run, and so who reads the outputs of the layers and the tensors of layers and BatchNorms."""

    def __init__(self, modules: _Modules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = modules
        self.inside: list[nn.Module] = []
        self.calls: dict[nn.Module, int] = {}
        self.outputs: dict[int, tuple[nn.Module, weakref.ref[Tensor]]] = {}
        self.sources: dict[nn.Module, Any] = {}  # of every BatchNorm, its input's layer
        self.readers: dict[nn.Module, set[nn.Module | None]] = {}  # of every layer's output; None: outside of all that is watched
        self.ranks: dict[nn.Module, int] = {}
        self.read: set[nn.Module] = set()

    def layer_of(self, value: Any) -> nn.Module | None:
        layer, output = self.outputs.get(id(value), (None, lambda: None))
        return layer if layer is not None and output() is value else None

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside.append(module)
        self.calls[module] = self.calls.get(module, 0) + 1
        values = [*args, *kwargs.values()]
        self.sources[module] = self.layer_of(values[0]) if len(values) == 1 else None

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside.pop()
        if isinstance(output, Tensor):
            self.outputs[id(output)] = module, weakref.ref(output)
            self.ranks[module] = output.dim()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = self.inside[-1] if self.inside else None
        for value in tree_leaves((args, kwargs)):
            if not isinstance(value, Tensor):
                continue
            if (layer := self.layer_of(value)) is not None:
                self.readers.setdefault(layer, set()).add(inside)
            owners = self.modules.owners.get(id(value), ())
            if inside not in owners:
                self.read.update(owners)
        return func(*args, **(kwargs or {}))


def _by_run(modules: _Modules, example: Any) -> dict[nn.Module, _Found]:
    watch, handles = _Watch(modules), []
    for module in modules.names:
        if isinstance(module, _WATCHED):
            handles.append(module.register_forward_pre_hook(watch.before, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.after))
    try:
        with torch.no_grad(), watch:
            if isinstance(example, Mapping):
                kept = modules.model(**example)
            else:
                kept = modules.model(*(example if isinstance(example, tuple) else (example,)))
        alive = {layer for layer, output in watch.outputs.values() if output() is not None}  # with the result, or in an attribute
        del kept
    finally:
        for handle in handles:
            handle.remove()

    def look(batchnorm: nn.Module) -> _Found:
        if (count := watch.calls.get(batchnorm, 0)) != 1:
            return f"the example's run calls it {count} times"
        layer = watch.sources[batchnorm]
        if layer is None:
            return "its input does not come directly from a Linear or convolution"
        if (count := watch.calls[layer]) != 1:
            return f"the example's run calls {modules.describe(layer)} {count} times"
        if watch.readers.get(layer, set()) - {batchnorm} or layer in alive:
            return f"the output of {modules.describe(layer)} is used elsewhere as well"
        if touched := [module for module in (layer, batchnorm) if module in watch.read]:
            return f"the example's run reads the tensors of {modules.describe(touched[0])} elsewhere as well"
        if watch.ranks[layer] != _RANK.get(type(layer), watch.ranks[layer]):
            return (
                f"the output of {modules.describe(layer)} has {watch.ranks[layer]} dimensions, of which it normalizes another one"
            )
        return layer

    return {batchnorm: look(batchnorm) for batchnorm in modules.batchnorms}


# ---- who sees a layer's output: neighbours in a Sequential ---------------------------------------------------------------


def _by_neighbours(modules: _Modules) -> dict[nn.Module, _Found]:
    reason = (
        "torch.fx cannot trace the model, and it does not follow a Linear or convolution in an nn.Sequential. Give example_inputs"
    )
    found: dict[nn.Module, _Found] = dict.fromkeys(modules.batchnorms, reason)
    for parent in modules.names:
        if type(parent) is nn.Sequential:
            for layer, batchnorm in itertools.pairwise(parent):
                if batchnorm in found and isinstance(layer, (*_PAIRS, QuantizedLayer)):
                    found[batchnorm] = layer
    return found


# ---- folding -------------------------------------------------------------------------------------------------------------


def gain_and_offset(batchnorm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A BatchNorm with running statistics as ``y = gain * x + offset``, float64."""
    mean, variance = batchnorm.running_mean, batchnorm.running_var
    assert mean is not None
    assert variance is not None
    gain = (variance.detach().double() + batchnorm.eps).rsqrt()
    if batchnorm.weight is not None:
        gain = gain * batchnorm.weight.detach().double()
    offset = -mean.detach().double() * gain
    return gain, offset if batchnorm.bias is None else offset + batchnorm.bias.detach().double()


def _folded(layer: Any, batchnorm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of both in one, computed in float64, in the dtype and layout of the layer's weight."""

    def double(tensor: Any) -> Tensor:
        return tensor.detach().to("cpu", torch.float64)

    weight = double(layer.weight)
    gain, bias = (tensor.cpu() for tensor in gain_and_offset(batchnorm))
    if layer.bias is not None:
        bias = double(layer.bias) * gain + bias
    if isinstance(layer, _TRANSPOSED):  # [C, O / groups, ...], where row c belongs to the group c / (C / groups)
        channels = weight.unflatten(0, (layer.groups, -1))
        shape = (layer.groups, 1, -1) + (1,) * (weight.dim() - 2)
        folded = (channels * gain.reshape(shape)).reshape(weight.shape)
    else:  # [O, C / groups, ...]
        folded = weight * gain.reshape((-1,) + (1,) * (weight.dim() - 1))
    old = layer.weight.detach()
    return torch.empty_like(old).copy_(folded), bias.to(old.device, old.dtype)


def _expect_rank(rank: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A hook of the nn.Identity in place of a BatchNorm1d."""
    if args[0].dim() != rank:
        raise ValueError(
            f"quant_ops.fold_batchnorm_: expected x.dim() == {rank} after a layer that has taken in a BatchNorm1d, got "
            f"{args[0].dim()}: it would have normalized another dimension. Fold with such example_inputs, and it is left alone."
        )


def _fold_reason(batchnorm: nn.Module, found: list[_Found], modules: _Modules) -> _Found:
    """The layer to fold this BatchNorm into, or why there is none."""
    if reason := _unfit(batchnorm, modules):
        return reason
    if batchnorm.running_mean is None:
        return "it has no running statistics: it normalizes with those of each batch in eval mode too"
    for layer in found:
        if isinstance(layer, str):
            return layer
    if len(set(found)) > 1:
        return "torch.fx and the example's run do not agree on what comes before it"
    return _misfit(layer, batchnorm, modules) or layer


def fold_batchnorm_(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None) -> FoldResult:
    """Folds the BatchNorms of a model in eval mode into the Linear or convolution before them, in place, before :func:`quantize_`.

    The layer gets a new weight and bias, computed in float64, and the BatchNorm becomes an nn.Identity, or what it applies to the
    normalized tensor, such as the activation of timm's BatchNormAct2d; the results of the model stay the same up to rounding. A
    BatchNorm is folded only if nothing else uses the layer or its output, by the graph that ``torch.fx`` traces and, with
    ``example_inputs``, by a run; if both are available, they have to agree. In a model that cannot be traced, and without an
    example, direct neighbours in an nn.Sequential are folded; this assumes that nothing else reads from inside of the Sequential.

    Folds BatchNorm1d, 2d and 3d into convolutions and transposed convolutions of as many dimensions, and BatchNorm1d into Linear.
    Since a BatchNorm1d after a Linear would normalize tokens, not features, in an input of three dimensions, the nn.Identity in its
    place refuses such an input.

    Args:
        model: any module in eval mode.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments, which the model is called with
            once. It should take the path through the model that matters.

    Returns:
        What was folded, and which BatchNorms were skipped and why.

    Raises:
        ValueError: the model or one of its BatchNorms is in training mode.
    """
    modules = _Modules(model)
    for module in (model, *modules.batchnorms):
        if module.training:
            name = modules.name(module)
            raise ValueError(
                "quant_ops.fold_batchnorm_: expected a model in eval mode, got "
                f"{modules.describe(module) if name else 'the model'} in training mode. Call model.eval() first."
            )
    sources = [_by_graph(graph, modules) for graph in _graphs(model)]
    if example_inputs is not None:
        sources.append(_by_run(modules, example_inputs))
    if not sources:
        sources.append(_by_neighbours(modules))

    result = FoldResult()
    for batchnorm in modules.batchnorms:
        name = modules.name(batchnorm)
        layer = _fold_reason(batchnorm, [source[batchnorm] for source in sources], modules)
        if isinstance(layer, str):
            result.skipped.append((name, layer))
            continue
        weight, bias = _folded(layer, batchnorm)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            result.skipped.append((name, f"the weights of {modules.describe(layer)} would not be finite"))
            continue
        trains = next(t.requires_grad for t in (layer.bias, batchnorm.bias, layer.weight) if isinstance(t, Tensor))
        layer.bias = nn.Parameter(bias, trains)
        layer.weight = nn.Parameter(weight, bool(layer.weight.requires_grad))
        after = [module for module in applied_after(batchnorm) or () if type(module) is not nn.Identity]
        rest = after[0] if len(after) == 1 else nn.Sequential(*after) if after else nn.Identity().eval()
        if type(layer) in _RANK:
            rest.register_forward_pre_hook(functools.partial(_expect_rank, _RANK[type(layer)]))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, rest)
        result.folded.append((modules.name(layer), name))
    _log.info("%s", result)
    return result
