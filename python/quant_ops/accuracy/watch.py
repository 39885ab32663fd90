"""Sees a run of a model: which modules make tensors, which read them, and what Linear layers are given.

Hooks see the calls of modules, a dispatch mode every operator. A tensor and its views and copies that keep the last dimension, the
channels, count as one. For every module with vectors as its parameters the run tries out whether its output is proportional to one.
Read next: consumers.py, the conclusions.
"""

import contextlib
import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._models import has_hooks, patched


@dataclasses.dataclass(frozen=True)
class Producer:
    """A module whose output is divided by s when these parameters are.

    Attributes:
        weight, bias: names of its parameters; the bias may be None.
        offset: the output is proportional to ``offset + weight``, which is 1 for the norms of Gemma and otherwise 0.
    """

    name: str
    module: nn.Module
    weight: str
    bias: str | None
    offset: float = 0.0


class Statistics:
    """What a layer has been given: extremes and magnitudes of each channel, and a sample of rows.

    Attributes:
        low, high: (K,) float32, exact over all rows.
        total: (K,) float64, the sum of the magnitudes.
        count: of rows.
        left_out: calls whose input held NaN or Inf; they count for nothing else.
    """

    def __init__(self) -> None:
        self.low = self.high = self.total = torch.empty(0)
        self.count = self.left_out = self.seen = 0
        self._kept: list[Tensor] = []
        self._stride = 1

    def add(self, low: Tensor, high: Tensor, total: Tensor, count: int) -> None:
        if not self.count:
            self.low, self.high, self.total = low, high, total
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self.total = self.total + total
        self.count += count

    def sample(self, rows: Tensor, most: int) -> None:
        """Keeps between ``most`` and twice as many rows of all that there are, evenly spaced."""
        first = -self.seen % self._stride
        self._kept.append(rows[first :: self._stride].clone())
        self.seen += len(rows)
        while sum(map(len, self._kept)) > 2 * most:
            self._kept, self._stride = [torch.cat(self._kept)[::2].clone()], 2 * self._stride

    @property
    def rows(self) -> list[Tensor]:
        """The sample; empty for a layer that reads what another one has kept."""
        return [kept for kept in self._kept if len(kept)]


# ---- modules whose output is proportional to a weight --------------------------------------------------------------------


def _gain_of(module: nn.Module, args: Any, kwargs: Any, index: int) -> Producer | None:
    """How a norm's output depends on its parameters, tried out on the arguments of a call; None if it is no such module.

    With a gain and a bias of values that are exact in every dtype, both times powers of two, the output has to be times these
    powers, to the bit. So neither the class nor the names of its parameters need to be known.
    """
    named = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    shapes = {parameter.shape for parameter in named.values()}
    if not 1 <= len(named) <= 2 or len(shapes) != 1 or len(next(iter(shapes))) != 1:
        return None
    if patched(module) or any(True for child in module.children() for _ in child.parameters()):
        return None
    names = list(named)
    for weight, *others in [names, names[::-1]][: len(names)]:
        for offset in (0.0, 1.0):
            bias = others[0] if others else None
            try:
                proportional = _is_proportional(module, weight, bias, offset, args, kwargs, index)
            except Exception:  # a forward of any class may raise anything
                return None
            if proportional:
                return Producer("", module, weight, bias, offset)
    return None


def _is_proportional(module: nn.Module, weight: str, bias: str | None, offset: float, args: Any, kwargs: Any, index: int) -> bool:
    size = len(module._parameters[weight])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    factor = 2.0 ** torch.randint(-1, 3, (size,), generator=generator)
    gain = torch.randint(1, 17, (size,), generator=generator) / 8
    shift = torch.randint(-8, 9, (size,), generator=generator) / 8

    def outputs(gain: Tensor, shift: Tensor) -> list[Any]:
        probe = copy.copy(module)
        values = {weight: gain - offset} | ({} if bias is None else {bias: shift})
        probe.__dict__["_parameters"] = {
            name: None if old is None else nn.Parameter(values[name].to(old), requires_grad=False)
            for name, old in module._parameters.items()
        }
        return tree_leaves(type(module).forward(probe, *args, **kwargs))

    plain, scaled = outputs(gain, shift), outputs(gain * factor, shift * factor)
    mine = plain[index]
    if mine.shape[-1:] != factor.shape or not mine.reshape(-1, size).ne(0).any(0).all():
        return False
    pairs = [(a, b) for i, (a, b) in enumerate(zip(plain, scaled, strict=True)) if i != index and isinstance(a, Tensor)]
    return torch.equal(mine * factor.to(mine), scaled[index]) and all(torch.equal(a, b) for a, b in pairs)


# ---- the run -------------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_COPIES = (_aten.clone.default, _aten._to_copy.default)
_SHAPE_ALONE = {  # is all that these operators read of a tensor
    *(getattr(_aten, name) for name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")),
    *(getattr(_aten, name) for name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")),
}


class Source:
    """An output of a module, over all of its calls: who reads it."""

    def __init__(self, module: nn.Module, index: int) -> None:
        self.module, self.index = module, index
        self.readers: dict[nn.Module, None] = {}
        self.elsewhere: str | None = None  # what else does
        self.seen_in: set[nn.Module | None] = set()  # modules whose own code had it in hands; None: outside of the model


class _Root:
    """One tensor of one call, with its views and copies; ``source`` is None if no module has returned it."""

    def __init__(self, source: Source | None) -> None:
        self.source = source
        self.first: nn.Module | None = None  # the first layer that has read it


def _channels_at(tensor: Tensor, channels: int) -> int | None:
    """The place of channel 0 modulo the number of channels, if the last dimension of the tensor are channels; else None."""
    if tensor.layout != torch.strided or tensor.dim() == 0 or tensor.shape[-1] != channels:
        return None
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    if (channels > 1 and tensor.stride(-1) != 1) or any(stride % channels for stride in strides):
        return None
    return int(tensor.storage_offset() % channels)


def _keeps_channels(func: Any, args: Any, source: Tensor, made: Tensor) -> bool:
    """Whether the last dimension of what an operator made of a tensor is that of the tensor, value by value."""
    if source.dim() == 0 or made.shape[-1:] != source.shape[-1:]:
        return False
    if func in _COPIES:
        return made.is_floating_point()
    if func is _aten.index_select.default:
        return args[0] is source and args[1] % source.dim() != source.dim() - 1
    if func is _aten.index.Tensor:
        masks = (torch.bool, torch.uint8)
        covered = sum(index.dim() if index is not None and index.dtype in masks else 1 for index in args[1])
        return args[0] is source and covered < source.dim()
    if made.dtype != source.dtype or made.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
        return False
    place = _channels_at(source, source.shape[-1])
    return place is not None and place == _channels_at(made, source.shape[-1])


class Watch(TorchDispatchMode):
    """Sees every operator, and who makes and reads which tensor."""

    def __init__(self, model: nn.Module, layers: Mapping[nn.Module, str], rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers, self.rows = layers, rows
        self.names: dict[nn.Module, str] = {}
        self.owners: dict[int, list[nn.Module]] = {}
        for name, module in model.named_modules():
            self.names[module] = name
            for tensor in module._parameters.values():
                if tensor is not None:
                    self.owners.setdefault(id(tensor), []).append(module)
        self.hooked = {module for module in self.names if has_hooks(module)}  # before this class adds its own
        self.inside: list[nn.Module] = []
        self.given: list[dict[_Root, bool]] = []  # what each of these was called with, and whether anything has been seen to use it
        self.called: set[nn.Module] = set()
        self.known: dict[int, tuple[weakref.ref[Tensor], _Root]] = {}
        self.sources: dict[tuple[nn.Module, int], Source] = {}
        self.gains: dict[tuple[nn.Module, int], Producer | None] = {}
        self.read: set[nn.Module] = set()  # modules whose parameters others read
        self.read_by: dict[nn.Module, set[Source | None]] = {}
        self.together: dict[nn.Module, nn.Module] = {}  # a forest: layers that read one tensor have one root
        self.statistics: dict[nn.Module, Statistics] = {}
        self.unfit: dict[nn.Module, str] = {}
        self._reduced: tuple[Any, Any] = (lambda: None, None)
        self._paused = False

    def describe(self, module: nn.Module | None) -> str:
        if module is None:
            return "what calls the model"
        return f"{type(module).__name__} {self.names[module]!r}" if self.names.get(module) else "the model's forward"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def _root(self, value: Any) -> _Root | None:
        reference, root = self.known.get(id(value), (None, None))
        return root if reference is not None and reference() is value else None

    def _remember(self, value: Tensor, root: _Root) -> None:
        self.known[id(value)] = weakref.ref(value), root

    def finish(self, output: list[Any]) -> None:
        """At the end of a batch. The list of the only reference to what the model has returned is emptied."""
        for leaf in tree_leaves(output):
            if (root := self._root(leaf)) is not None and root.source is not None:
                root.source.elsewhere = root.source.elsewhere or "the model returns it"
            leaf = None
        output.clear()
        if any(self._alive()):
            gc.collect()
        for source in self._alive():
            source.elsewhere = source.elsewhere or "something keeps it after the call"
        self.known.clear()
        self.inside.clear()
        self.given.clear()
        self._reduced = (lambda: None, None)

    def _alive(self) -> Iterator[Source]:
        for reference, root in self.known.values():
            if reference() is not None and root.source is not None and root.source.elsewhere is None:
                yield root.source

    # ---- operators ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self._paused:
            self._note(func, args, kwargs, made)
        return made

    def _note(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        inside = self.inside[-1] if self.inside else None
        if func.overloadpacket in _SHAPE_ALONE:
            return
        for value in tree_leaves((args, kwargs)):
            if not isinstance(value, Tensor):
                continue
            owners = self.owners.get(id(value), ())
            if inside not in owners:
                self.read.update(owners)
            if (root := self._root(value)) is None:
                continue
            self._touch(root)
            if inside is not None and inside in self.layers:
                continue
            if root.source is not None:
                root.source.seen_in.add(inside)
            results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
            if results and all(leaf is not value and _keeps_channels(func, args, value, leaf) for leaf in results):
                for leaf in results:
                    self._remember(leaf, root)
            elif root.source is not None and root.source.elsewhere is None:
                root.source.elsewhere = f"{self.describe(inside)} uses it in {func.name().partition('::')[2]}"

    # ---- calls of modules ----------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside.append(module)
        self.called.add(module)
        roots = {root for value in tree_leaves((args, kwargs)) if (root := self._root(value)) is not None}
        self.given.append(dict.fromkeys(roots, False))
        for root in roots:
            if root.source is not None:
                root.source.seen_in.add(module)
        if module in self.layers:
            self._paused = True
            try:
                self._read(module, (*args, *kwargs.values())[0])
            finally:
                self._paused = False

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = self.given.pop() if self.given else {}
        if self.inside:
            self.inside.pop()
        parent = self.inside[-1] if self.inside else None
        for index, value in enumerate(tree_leaves(output)):
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
                continue
            if (root := self._root(value)) is None:
                source = self.sources.setdefault((module, index), Source(module, index))
                self._remember(value, root := _Root(source))
                if (module, index) not in self.gains:
                    self._paused = True
                    try:
                        self.gains[module, index] = _gain_of(module, args, kwargs, index)
                    finally:
                        self._paused = False
            if root.source is not None:
                root.source.seen_in.add(parent)
            given.pop(root, None)  # it is passed on
        for root, used in given.items():
            if not used and root.source is not None and root.source.elsewhere is None:  # a kernel that is no operator of torch?
                root.source.elsewhere = f"{self.describe(module)} is called with it, and is not seen to use it"

    def _touch(self, root: _Root) -> None:
        for given in self.given:
            if root in given:
                given[root] = True

    def _read(self, layer: nn.Module, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided or x.is_nested:
            self.unfit[layer] = "its input is no dense floating tensor"
            return
        if (root := self._root(x)) is None:
            self._remember(x, root := _Root(None))
        self.read_by.setdefault(layer, set()).add(root.source)
        if root.source is not None:
            root.source.readers[layer] = None
            self._join(layer, next(iter(root.source.readers)))
        statistics = self.statistics.setdefault(layer, Statistics())
        reduced = self._reduce(x)
        if reduced is None:
            statistics.left_out += 1
        elif reduced:
            statistics.add(*reduced)
            if self.rows and root.first in (None, layer):
                statistics.sample(x.detach().reshape(-1, x.shape[-1]), self.rows)
        root.first = root.first or layer
        self._join(layer, root.first)

    def _reduce(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int] | tuple[()] | None:
        """Once for the layers that read a tensor one after the other; empty without rows, None with NaN or Inf."""
        reference, reduced = self._reduced
        if reference() is not x:
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            reduced = ()
            if rows.numel():
                low, high = rows.aminmax(dim=0)
                finite = bool(low.isfinite().all() & high.isfinite().all())
                reduced = (low, high, rows.abs().sum(0, dtype=torch.float64), len(rows)) if finite else None
            self._reduced = weakref.ref(x), reduced
        result: tuple[Tensor, Tensor, Tensor, int] | tuple[()] | None = reduced
        return result

    def _join(self, one: nn.Module, other: nn.Module) -> None:
        self.together[self.leader(one)] = self.leader(other)

    def leader(self, layer: nn.Module) -> nn.Module:
        while (above := self.together.setdefault(layer, layer)) is not layer:
            layer = above
        return layer
