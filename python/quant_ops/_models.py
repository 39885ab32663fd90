"""What the packages share about whole models: calls, modes, hooks and memory of one, and how a result about its layers is shown."""

import contextlib
import html
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Calls a model with a batch as a data set gives it, or by ``forward``."""
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):  # tokenizers return mappings that are no dict
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no fused encoder path, which would not call its layers. Every module gets its mode back."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def count_batches(count: int) -> str:
    """For messages."""
    return "1 batch" if count == 1 else f"{count} batches"


def is_recomputing() -> bool:
    """Whether a backward pass is running: a forward inside of it is the repetition that gradient checkpointing makes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def has_hooks(module: nn.Module) -> bool:
    """Whether anything sees or changes what goes into or out of the module, forwards or backwards."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


# Attributes of an instance that take part in a call of it, in place of those of its class.
_CALLED = ("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl")


def patched(module: nn.Module) -> str | None:
    """How a call of the module differs from what its class does, other than by hooks; None if it does not."""
    for name in _CALLED:
        if name in vars(module):
            return f"its {name} was replaced on the instance, which a replacement would lose"
    if vars(module).get("_compiled_call_impl") is not None:
        return "it was compiled with its own compile(), which a replacement would lose. Compile it afterwards"
    return None


def held_bytes(*modules: nn.Module) -> int:
    """Bytes of memory that parameters and buffers hold, packed copies included. What several of them share counts once."""
    return bytes_of(itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that tensors hold. What several of them share counts once."""
    held: dict[Any, int] = {}
    for tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            continue  # no data yet, not even a shape
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
        if plain and tensor.numel():
            # A dimension of stride 0 repeats the same memory.
            sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            held[key] = math.prod(sizes) * tensor.element_size()
        else:  # no address to compare
            held[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(held.values())


def show_bytes(count: float) -> str:
    """A size in decimal units, with three digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.{0 if unit == 'bytes' or count >= 99.95 else 1 if count >= 9.995 else 2}f} {unit}"


Table = tuple[str, tuple[str, ...], list[tuple[str, str]]]  # summary, the labels that may occur, label and text of every line


class Printed:
    """Shows itself as its text wherever Python shows a value: printed, as the last expression in a REPL, and in a notebook."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class Result(Printed):
    """What a call did to a model's layers. Shown, it is a table: a summary, then a line for each layer."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        summary, labels, lines = self._table()
        width = max(map(len, labels))
        return "\n".join([summary, *(f"  {label:<{width}}  {text}" for label, text in lines)])


def reasons(skipped: list[tuple[str, str]]) -> list[str]:
    """The texts of layers that were left as they were. The name of a whole model among its modules is empty."""
    return [f"{name or 'the model itself'}: {reason}" for name, reason in skipped]
