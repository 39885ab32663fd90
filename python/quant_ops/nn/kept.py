"""A layer's operator call that the library has kept, so that the next one passes x alone.

Every argument of an operator costs a search among the keywords and two conversions: for a small layer they take longer than the
product. The library keeps them (``cpp/torch/repeat.h``), and its operator ``_int8_linear(x, number)`` runs ``int8_linear`` with
them, checks included. Read first: base.py, which decides when a kept call is the layer's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..ops._register import constant

for _name in ("_int8_linear", "_int8_conv2d", "_weight_only_linear"):
    constant(_name)  # a layer repeats a call only where nothing asks for a derivative


def repeater(name: str) -> Callable[[Tensor, int], Tensor]:
    """The operator that repeats calls of the operator ``name``, without the Python around it."""
    call: Callable[[Tensor, int], Tensor] = getattr(torch.ops.quant_ops, f"_{name}").default._op
    return call


class KeptCall:
    """One call, kept as long as this object lives: for the buffers that were its arguments, and inputs of ``dim`` dimensions."""

    __slots__ = ("buffers", "call", "dim", "number")

    def __init__(self, call: Callable[[Tensor, int], Tensor], number: int, dim: int, buffers: dict[str, Tensor | None]) -> None:
        self.call = call
        self.number = number
        self.dim = dim
        self.buffers = tuple(buffers.values())

    def __del__(self, forget: Callable[[int], None] = _library.forget_call) -> None:
        forget(self.number)


def kept_call(
    run: Callable[[Tensor], Tensor], x: Tensor, call: Any, buffers: dict[str, Tensor | None]
) -> tuple[Tensor, KeptCall | None]:
    """``run(x)``, and the call of an operator that it was, if the operator can be repeated."""
    _library.keep_call()
    try:
        y = run(x)
    finally:
        number = _library.kept_call()
    return y, None if number < 0 else KeptCall(call, number, x.dim(), buffers)
