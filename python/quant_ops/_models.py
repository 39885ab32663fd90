"""What the packages share about whole models: calling one, its modes, its hooks, and how a result about its layers is shown."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

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


def count_batches(count: int) -> str:
    """For messages."""
    return "1 batch" if count == 1 else f"{count} batches"


def is_recomputing() -> bool:
    """Whether a backward pass is running: a forward inside of it is the repetition that gradient checkpointing makes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def has_hooks(module: nn.Module) -> bool:
    """Whether anything sees or changes what goes into or out of the module, forwards or backwards."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


Table = tuple[str, tuple[str, ...], list[tuple[str, str]]]  # summary, the labels that may occur, label and text of every line


class Result:
    """What a call did to a model's layers. Printed, it is a table: a summary, then a line for each layer."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        summary, labels, lines = self._table()
        width = max(map(len, labels))
        return "\n".join([summary, *(f"  {label:<{width}}  {text}" for label, text in lines)])


def reasons(skipped: list[tuple[str, str]]) -> list[str]:
    """The texts of layers that were left as they were."""
    return [f"{name}: {reason}" for name, reason in skipped]
