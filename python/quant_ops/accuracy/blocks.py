"""A model as a chain of repeated blocks, so that each can be run alone on what it sees when the blocks before it are quantized.

    chain = capture(op, model, find_blocks(op, model), batches_of(op, model, data))
    while chain.name:              the name of the block that it has come to
        for output in chain.outputs(): ...
        chain.advance()            what this block gives now is what the next one gets

Assumes that a block passes the tensor that it gives, or the first of several, on to the next block as it is; other arguments
(masks, rotary angles, caches) are those that the block had in a run of the whole model.
"""

import contextlib
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._models import Forward, call, evaluating
from ..convert.calibrate import device_of, to_device


def batches_of(
    op: str, model: nn.Module, data: Iterable[Any], forward: Forward | None = None, steps: int | None = None
) -> list[Any]:
    """The batches of calibration data, which several passes need, where :func:`calibrate` would put them.

    Raises:
        TypeError: data is no iterable, or is one batch.
        ValueError: there is no batch, or steps < 1.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"quant_ops.{op}: expected steps >= 1, got {steps}")
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable):
        remedy = ". Write [batch]." if isinstance(data, Tensor | Mapping) else ""
        raise TypeError(f"quant_ops.{op}: expected data to be an iterable of batches, got one {type(data).__name__}{remedy}")
    device = device_of(model) if forward is None else None
    batches = []
    for batch in data:
        batches.append(to_device(device, batch))
        if len(batches) == steps:
            break
    if not batches:
        raise ValueError(f"quant_ops.{op}: expected calibration data, got no batch. An iterator is empty after its first use.")
    return batches


# ---- which modules are the blocks ------------------------------------------------------------------------------------


def find_blocks(op: str, model: nn.Module, blocks: str | Sequence[str] | None = None) -> list[str]:
    """The names of a model's blocks in their order; none if it has no repeated part.

    Args:
        blocks: the name of the container (``"model.layers"``), or the names of all blocks. By default those of the longest
            nn.ModuleList or nn.Sequential whose modules are all of one class and hold weights, outside of another such container.

    Raises:
        ValueError: a name is not that of a module, or the container has no modules.
        TypeError: blocks is something else.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if blocks is None:
        found = max(_containers(modules), key=lambda name: len(modules[name]._modules), default=None)
        return [] if found is None else _children(found, modules[found])
    one = isinstance(blocks, str)
    given = [blocks] if isinstance(blocks, str) else list(blocks)
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"quant_ops.{op}: expected blocks to be names of modules, got a {type(name).__name__}")
        if name not in modules or not name:
            containers = list(_containers(modules))
            raise ValueError(f"quant_ops.{op}: expected blocks to be names of modules, got {name!r}. Containers here: {containers}")
    if not one:
        return given
    if not modules[given[0]]._modules:
        raise ValueError(
            f"quant_ops.{op}: expected {given[0]!r} to contain blocks, got a {type(modules[given[0]]).__name__} without"
        )
    return _children(given[0], modules[given[0]])


def _children(name: str, container: nn.Module) -> list[str]:
    return [f"{name}.{child}" if name else child for child in container._modules]


def _containers(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the outermost containers of at least two modules of one class with weights."""
    inside: tuple[str, ...] = ()
    for name, module in modules.items():
        parts = [part for part in module._modules.values() if part is not None]
        repeats = isinstance(module, nn.ModuleList | nn.Sequential) and len(parts) > 1 and len({type(part) for part in parts}) == 1
        if not repeats or (inside and name.startswith(inside)):
            continue
        if len(set(parts)) == len(parts) and all(any(p.dim() > 1 for p in part.parameters()) for part in parts):
            inside = (*inside, f"{name}." if name else "")
            yield name


# ---- what they are called with ---------------------------------------------------------------------------------------


class NoChain(Exception):
    """Why a model's blocks cannot be run one after the other."""


class _Arguments:
    """Arguments of a call, of which every replay gets containers and objects of its own; tensors are not copied.

    A block may change what it is given, as it adds to a cache.
    """

    def __init__(self, arguments: Any, hidden: Tensor) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file, hidden)
        pickler.dump(arguments)
        self.lent, self.takes_hidden = pickler.lent[1:], pickler.found_hidden
        self._pickled = file.getvalue()

    def with_hidden(self, hidden: Tensor) -> Any:
        return _Unpickler(io.BytesIO(self._pickled), [hidden, *self.lent]).load()  # of bytes that this process has written


class _Pickler(pickle.Pickler):
    """Leaves tensors and modules out, by number: 0 is the hidden state."""

    def __init__(self, file: Any, hidden: Tensor) -> None:
        super().__init__(file)
        self.lent: list[Any] = [hidden]
        self.found_hidden = False
        self._numbers = {id(hidden): 0}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor | nn.Module | torch.Generator):
            return None
        number = self._numbers.setdefault(id(value), len(self.lent))
        if number == len(self.lent):
            self.lent.append(value)
        self.found_hidden |= number == 0
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, lent: list[Any]) -> None:
        super().__init__(file)
        self._lent = lent

    def persistent_load(self, number: int) -> Any:
        return self._lent[number]


class _Call:
    """The arguments of all blocks in one call of the model, and the mixed precision that it ran in."""

    def __init__(self, hidden: Tensor) -> None:
        self.device = hidden.device.type
        self.autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        self.blocks: list[_Arguments] = []

    def precision(self) -> Any:
        enabled, dtype = self.autocast
        return torch.autocast(self.device, dtype) if enabled else contextlib.nullcontext()


def first_tensor(output: Any) -> Tensor:
    """The tensor that a block passes on.

    Raises:
        NoChain: there is none.
    """
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    if not isinstance(output, Tensor):
        raise NoChain(f"gives a {type(output).__name__} and no tensor")
    return output


class Chain:
    """The blocks of a model, one after the other, and what the next one gets in each call.

    Attributes:
        names: of all blocks.
        position: of the block that the chain has come to.
        hidden: the tensor that this block gets from the one before it, for every call.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], calls: Sequence[_Call], hidden: list[Tensor]) -> None:
        self.model, self.names, self.hidden, self.position = model, list(names), hidden, 0
        self._calls = calls

    @property
    def name(self) -> str | None:
        """Of the block that it has come to; None after the last."""
        return self.names[self.position] if self.position < len(self.names) else None

    @property
    def block(self) -> nn.Module:
        """The module that stands in this place now."""
        return self.model.get_submodule(self.names[self.position])

    def calls(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments and keyword arguments of the block in every call. They may be changed."""
        for made, hidden in zip(self._calls, self.hidden, strict=True):
            args, kwargs = made.blocks[self.position].with_hidden(hidden)
            yield args, kwargs

    def outputs(self) -> Iterator[Any]:
        """What the block gives in every call, in eval mode and without gradients."""
        for made, (args, kwargs) in zip(self._calls, self.calls(), strict=True):
            with evaluating(self.model), made.precision():
                output = self.block(*args, **kwargs)
            yield output

    def advance(self, outputs: Iterable[Any] | None = None) -> None:
        """Goes on to the next block, which gets what this one gives now; ``outputs`` if that has been computed already.

        After the last block ``hidden`` is what the rest of the model gets.
        """
        self.hidden = [first_tensor(output) for output in (self.outputs() if outputs is None else outputs)]
        self.position += 1


class _Recorder:
    """Hooks on the blocks of a model; it is given every call of one, and says if they do not follow one another."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.calls, self.hidden = names, list[_Call](), list[Tensor]()
        self._next, self._version = 0, 0
        self._given: list[Tensor] = []  # the input of the first block, then the outputs

    def before(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names[index]
        if index != self._next:
            raise NoChain(f"{name!r} is called where {self.names[self._next]!r} was expected")
        if index == 0:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if not tensors:
                raise NoChain(f"{name!r} is called without a tensor")
            self._given = tensors[:1]
            self.calls.append(_Call(tensors[0]))
            self.hidden.append(tensors[0])
        hidden = self._given[-1]
        try:
            arguments = _Arguments((args, kwargs), hidden)
        except Exception as error:
            raise NoChain(f"the arguments of {name!r} cannot be copied ({error})") from error
        if not arguments.takes_hidden:
            raise NoChain(f"{name!r} does not get what {self.names[index - 1]!r} gives")
        if any(value is output for value in arguments.lent for output in self._given[1:]):
            raise NoChain(f"{name!r} gets what an earlier block gives, not the one before it alone")
        self.calls[-1].blocks.append(arguments)
        self._version = 0 if hidden.is_inference() else hidden._version

    def after(self, index: int, output: Any) -> None:
        hidden = self._given[-1]
        if not hidden.is_inference() and hidden._version != self._version:
            raise NoChain(f"{self.names[index]!r} writes into its input")
        try:
            self._given.append(first_tensor(output))
        except NoChain as error:
            raise NoChain(f"{self.names[index]!r} {error}") from error
        self._next = (index + 1) % len(self.names)


def capture(model: nn.Module, names: Sequence[str], batches: Sequence[Any], forward: Forward | None = None) -> Chain:
    """Runs the model once on all batches, in eval mode and without gradients, and keeps what its blocks are called with.

    The input of the first block is kept for every call; of the others only what is no output of a block, which most models give to
    all of their blocks alike. A batch may call the model more than once.

    Raises:
        NoChain: the blocks do not follow one another, or none was called; with the reason. The model is as it was.
    """
    recorder, handles = _Recorder(names), []
    modules = dict(model.named_modules(remove_duplicate=False))
    try:
        for index, name in enumerate(names):
            block = modules[name]
            handles += [
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: recorder.before(index, args, kwargs), with_kwargs=True
                ),
                block.register_forward_hook(lambda _, args, output, index=index: recorder.after(index, output)),
            ]
        with evaluating(model):
            for batch in batches:
                call(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    if not recorder.calls or len(recorder.calls[-1].blocks) < len(names):
        missing = 0 if not recorder.calls else len(recorder.calls[-1].blocks)
        raise NoChain(f"{names[missing]!r} was not called" if names else "there are none")
    return Chain(model, names, recorder.calls, recorder.hidden)
