"""Rewrites several nodes of a graph that are one operator as that one: SiLU, parts of the channels and the channel shuffle.

Sizes are those that the example's run has noted in ``node.meta``. Also here: which nodes share memory or write in place. Read
first: operators.py.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .operators import Op, example_of, rank_of, recognize

_GATED = {"sigmoid": F.silu, "hardsigmoid": F.hardswish}
_PARTS = (torch.chunk, torch.split, torch.functional.split, torch.tensor_split, "chunk", "split", "tensor_split")
_VIEWS = (torch.reshape, "reshape", "view")
_TRANSPOSES = (torch.transpose, "transpose")


def name_operators(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Rewrites a graph in place; what it computes stays the same."""
    for node in list(graph.nodes):
        found = _gate(node, modules) or _part(node) or _shuffle(node)
        if found is None:
            continue
        function, arguments = found
        with graph.inserting_before(node):
            whole = graph.call_function(function, arguments)
        whole.meta.update(node.meta)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    remove_unread(graph, modules)


def _name_of(node: fx.Node) -> str:
    """Of its method or function."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = _name_of(node)
    return bool(node.kwargs.get("inplace")) or name == "setitem" or (name.endswith("_") and not name.endswith("__"))


# Functions and methods whose result may share memory with their first argument.
_SHARING = {
    *("chunk", "split", "tensor_split", "unbind", "getitem", "select", "narrow"),
    *("flatten", "unflatten", "ravel", "reshape", "reshape_as", "view", "view_as", "squeeze", "unsqueeze", "expand", "expand_as"),
    *("t", "transpose", "permute", "movedim", "swapaxes", "swapdims", "contiguous", "to", "detach"),
}


def viewed_by(node: fx.Node) -> fx.Node | None:
    """What a node may be a view of."""
    shares = node.op in ("call_function", "call_method") and _name_of(node) in _SHARING and node.args
    return node.args[0] if shares and isinstance(node.args[0], fx.Node) else None


def changes_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterator[fx.Node]:
    """What writes into a node's tensor, or into a view of it."""
    for user in node.users:
        if user.args[:1] == (node,) and is_in_place(user, modules):
            yield user
        elif viewed_by(user) is node:
            yield from changes_of(user, modules)


def remove_unread(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Takes out what nothing reads. torch.fx's own would take out what only changes a tensor in place as well."""
    for node in reversed(list(graph.nodes)):
        if not node.users and not node.is_impure() and not is_in_place(node, modules):
            graph.erase_node(node)


def _gate(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Any, tuple[Any, ...]] | None:
    """``x * sigmoid(x)`` is SiLU, and ``x * hardsigmoid(x)`` Hardswish."""
    product = recognize(node, modules) if node.op in ("call_function", "call_method") else ""
    if not isinstance(product, Op) or product.kind != "mul" or product.in_place:
        return None
    for x, gate in (product.inputs, product.inputs[::-1]):
        activation = recognize(gate, modules)
        if isinstance(activation, Op) and activation.kind == "activation" and activation.inputs == (x,) and not activation.in_place:
            function = _GATED.get(activation.numbers[0])
            return None if function is None else (function, (x,))
    return None


def _part(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """One of the tensors that chunk and split make of an image's channels is a slice of them."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node) or type(node.args[1]) is not int:
        return None
    whole, index = node.args[0], node.args[1]
    x = whole.args[0] if whole.args else None
    if whole.target not in _PARTS or not isinstance(x, fx.Node) or rank_of(x) != 4 or len(whole.all_input_nodes) > 1:
        return None
    sizes, dim = whole.args[1:2], whole.kwargs.get("dim", whole.args[2] if len(whole.args) > 2 else 0)
    if len(sizes) != 1 or not set(whole.kwargs) <= {"dim"} or dim not in (1, -3):
        return None
    parts = getattr(example_of(x), _name_of(whole))(sizes[0], 1)
    if not -len(parts) <= index < len(parts):
        return None
    index %= len(parts)
    start = sum(part.shape[1] for part in parts[:index])
    return operator.getitem, (x, (slice(None), slice(start, start + parts[index].shape[1])))


def _shuffle(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Channels as groups, transposed, and as channels again."""
    moved = _only_input(node, _VIEWS)
    if moved is not None and moved.target == "contiguous":
        moved = _only_input(moved, ("contiguous",))
    apart = None if moved is None or moved.args[1:] not in ((1, 2), (2, 1)) else _only_input(moved, _TRANSPOSES)
    x = None if apart is None else _only_input(apart, _VIEWS, of_one_reader=False)
    if moved is None or apart is None or x is None:
        return None
    shapes = [tuple(example.shape) if (example := example_of(n)) is not None else () for n in (x, apart, node)]
    if len(shapes[0]) != 4 or shapes[0] != shapes[2] or len(shapes[1]) != 5:
        return None
    n, groups, per_group, *image = shapes[1]
    if (n, groups * per_group, *image) != shapes[0]:
        return None
    return torch.channel_shuffle, (x, groups)


def _only_input(node: fx.Node, targets: tuple[Any, ...], of_one_reader: bool = True) -> fx.Node | None:
    """The tensor that a node of one of these functions reads, if nothing else reads it or that is allowed."""
    x = node.args[0] if node.args and node.target in targets else None
    if not isinstance(x, fx.Node) or rank_of(x) < 0:
        return None
    return x if len(x.users) == 1 or not of_one_reader else None
