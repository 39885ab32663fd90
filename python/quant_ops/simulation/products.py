"""Products with rounded operands, such as those that a model computes by functions and not by layers.

    y = output(a @ b),   a = input(a), b = input(b), or weight(b) where b is a parameter; the gradient of y by ``backward``

Each method is the torch function of its name. They compute by ATen operators, which the mode of mode.py leaves alone, so that
nothing is rounded twice. Attention is in attention.py, how one operand is rounded in operand.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import attention
from .config import Simulated
from .operand import Layout, round_gradient, rounded

aten = torch.ops.aten
_RESULT = Layout(summed=-1, channel=-1, row=(-1,))  # its last dimension is, as a rule, what the next product sums over


class Products:
    """The products of functions, with the formats of a config."""

    def __init__(self, config: Simulated) -> None:
        self.config = config

    # ---- operands and results --------------------------------------------------------------------------------------------

    def operand(self, site: str, slot: str, x: Tensor, layout: Layout) -> Tensor:
        """x rounded. Every operand and every result of a product comes here, once.

        Args:
            site: which operand of which product, such as "left", "query" or "in_proj".
            slot: "input", "weight" or "output".
        """
        return rounded(x, getattr(self.config, slot), layout, getattr(self.config, f"{slot}_per"))

    def side(self, site: str, x: Tensor, summed: tuple[int, ...], slot: str | None = None) -> Tensor:
        """An operand of a product that sums over the dimensions ``summed`` of x, counted from the last. A parameter is a weight.

        A row is what is summed for one element of the result, a channel an index of the last summed dimension, as for the input of
        a layer. The channel of a weight is an index of the last dimension that is not summed.
        """
        if slot is None:
            slot = "weight" if isinstance(x, nn.Parameter) else "input"
        if slot == "input":
            return self.operand(site, slot, x, Layout(summed=summed[-1], channel=summed[-1], row=summed))
        kept = [d for d in range(-x.dim(), 0) if d not in summed]
        if kept:
            return self.operand(site, slot, x, Layout(summed=summed[-1], channel=kept[-1], row=summed))
        layout = Layout(summed=summed[-1], channel=-x.dim() - 1, row=summed)
        return self.operand(site, slot, x.unsqueeze(0), layout).squeeze(0)

    def result(self, site: str, y: Tensor) -> Tensor:
        """The result of a product: rounded, and its gradient as well."""
        if y.dim() == 0:
            return self.result(site, y.reshape(1)).reshape(())
        return round_gradient(self.operand(site, "output", y, _RESULT), self.config.backward, _RESULT)

    # ---- matrices and vectors --------------------------------------------------------------------------------------------

    def matmul(self, input: Tensor, other: Tensor) -> Tensor:
        return self._product(aten.matmul.default, input, other)

    def rmatmul(self, input: Tensor, other: Tensor) -> Tensor:
        return self._product(aten.matmul.default, other, input)

    def mm(self, input: Tensor, mat2: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return self._product(_wide(aten.mm, out_dtype), input, mat2)

    def bmm(self, input: Tensor, mat2: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return self._product(_wide(aten.bmm, out_dtype), input, mat2)

    def mv(self, input: Tensor, vec: Tensor) -> Tensor:
        return self._product(aten.mv.default, input, vec)

    def dot(self, input: Tensor, tensor: Tensor) -> Tensor:
        return self._product(aten.dot.default, input, tensor)

    def vdot(self, input: Tensor, other: Tensor) -> Tensor:
        return self._product(aten.vdot.default, input, other)

    def inner(self, input: Tensor, other: Tensor) -> Tensor:
        if 0 in (input.dim(), other.dim()):  # a multiplication
            return aten.inner.default(input, other)
        return self._product(aten.inner.default, input, other, summed=(-1,))

    def vecdot(self, x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
        op = functools.partial(aten.linalg_vecdot.default, dim=dim)
        return self._product(op, x, y, summed=(dim if dim < 0 else dim - x.dim(),))

    def multi_dot(self, tensors: Sequence[Tensor]) -> Tensor:
        """Product by product from the left, since the order in which torch multiplies is its own choice."""
        return functools.reduce(self.matmul, tensors)

    def chain_matmul(self, *matrices: Tensor) -> Tensor:
        return self.multi_dot(matrices)

    def _product(self, op: Callable[..., Tensor], a: Tensor, b: Tensor, summed: tuple[int, ...] | None = None) -> Tensor:
        """The product of a, over its last dimension, and b, over its last but one or the one that is given."""
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):  # an error that lets Python try the other operand's operator
            raise TypeError(f"quant_ops.simulated_products: expected tensors, got {type(a).__name__} and {type(b).__name__}")
        if not _floating(a, b) or 0 in (a.dim(), b.dim()) or (summed is None and _is_outer(a, b)):
            return op(a, b)
        a = self.side("left", a, summed or (-1,))
        b = self.side("right", b, summed or ((-1,) if b.dim() == 1 else (-2,)))
        return self.result("product", op(a, b))

    # ---- products that are added to something, which is not rounded --------------------------------------------------------

    def addmm(
        self, input: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype | None = None, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        return _added(input, self.mm(mat1, mat2, out_dtype), beta, alpha)

    def addmm_(self, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return _added_(input, self.mm(mat1, mat2), beta, alpha)

    def addmv(self, input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return _added(input, self.mv(mat, vec), beta, alpha)

    def addmv_(self, input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return _added_(input, self.mv(mat, vec), beta, alpha)

    def baddbmm(
        self,
        input: Tensor,
        batch1: Tensor,
        batch2: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        beta: float = 1,
        alpha: float = 1,
    ) -> Tensor:
        return _added(input, self.bmm(batch1, batch2, out_dtype), beta, alpha)

    def baddbmm_(self, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return _added_(input, self.bmm(batch1, batch2), beta, alpha)

    def addbmm(self, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return _added(input, self._sum_of_products(batch1, batch2), beta, alpha)

    def addbmm_(self, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return _added_(input, self._sum_of_products(batch1, batch2), beta, alpha)

    def _sum_of_products(self, batch1: Tensor, batch2: Tensor) -> Tensor:
        def op(a: Tensor, b: Tensor) -> Tensor:
            return aten.addbmm.default(a.new_zeros(()), a, b, beta=0)

        return self._product(op, batch1, batch2)

    # ---- layers as functions ---------------------------------------------------------------------------------------------

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, site: str = "linear") -> Tensor:
        if not _floating(input, weight):
            return aten.linear.default(input, weight, bias)
        x = self.side(site, input, (-1,), "input")
        return self.result(site, aten.linear.default(x, self.side(site, weight, (-1,), "weight"), bias))

    def bilinear(self, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _floating(input1, input2, weight):
            return aten.bilinear.default(input1, input2, weight, bias)
        left, right = self.side("left", input1, (-1,), "input"), self.side("right", input2, (-1,), "input")
        return self.result("product", aten.bilinear.default(left, right, self.side("weight", weight, (-2, -1), "weight"), bias))

    def grouped_mm(
        self,
        input: Tensor,
        mat2: Tensor,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        a, b = self.side("left", input, (-1,)), self.side("right", mat2, (-2,))
        return self.result("product", aten._grouped_mm.default(a, b, offs, bias, out_dtype))

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return attention.scaled_dot_product_attention(self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def multi_head_attention_forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return attention.multi_head_attention(self, *args, **kwargs)

    # ---- sums over named dimensions --------------------------------------------------------------------------------------

    def tensordot(self, a: Tensor, b: Tensor, dims: Any = 2) -> Tensor:
        dims_a, dims_b = _tensordot_dims(a, dims)
        op = functools.partial(aten.tensordot.default, dims_self=dims_a, dims_other=dims_b)
        if not dims_a or not _floating(a, b):
            return op(a, b)
        left = self.side("left", a, tuple(d if d < 0 else d - a.dim() for d in dims_a))
        right = self.side("right", b, tuple(d if d < 0 else d - b.dim() for d in dims_b))
        return self.result("product", op(left, right))

    def einsum(self, equation: Any, *operands: Any) -> Tensor:
        """A product if an index of two operands is summed. Blocks lie along the last such index of each operand."""
        if isinstance(equation, Tensor):
            equation, operands = _equation((equation, *operands))
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        summed = _summed(equation, operands) if len(operands) > 1 and _floating(*operands) else None
        if summed is not None:
            sides = (self.side(f"operand{i}", x, dims) for i, (x, dims) in enumerate(zip(operands, summed, strict=True)))
            return self.result("product", aten.einsum.default(equation, list(sides)))
        return aten.einsum.default(equation, list(operands))


# ---- what is a product, and over what it sums ----------------------------------------------------------------------------


def _floating(*operands: Any) -> bool:
    return all(isinstance(x, Tensor) and x.is_floating_point() for x in operands)


def _is_outer(a: Tensor, b: Tensor) -> bool:
    """Whether a column times a row multiplies without a sum, as the angles of rotary embeddings, positions times frequencies, do.

    Attention of one token to itself has a single row and counts as a product, and so does what has a weight.
    """
    column = a.dim() > 1 and a.shape[-1] == 1 and a.shape[-2] > 1
    return column and b.dim() > 1 and not isinstance(a, nn.Parameter) and not isinstance(b, nn.Parameter)


def _wide(packet: Any, out_dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """mm or bmm, with a result in a wider dtype where one is asked for."""
    return packet.default if out_dtype is None else functools.partial(packet.dtype, out_dtype=out_dtype)


def _added(input: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta * input + alpha * product``; with beta 0 the input is not looked at, as in torch."""
    if beta == 0:
        return product if alpha == 1 else product * alpha
    input = input.expand_as(product)
    return torch.add(input if beta == 1 else input * beta, product, alpha=alpha)


def _added_(input: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    if beta == 0:
        return input.copy_(_added(input, product, beta, alpha))
    return (input if beta == 1 else input.mul_(beta)).add_(product, alpha=alpha)


def _tensordot_dims(a: Tensor, dims: Any) -> tuple[list[int], list[int]]:
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        return list(range(-dims, 0)), list(range(dims))
    first, second = ([d] if isinstance(d, int) else list(d) for d in dims)
    return first, second


def _equation(interleaved: tuple[Any, ...]) -> tuple[str, tuple[Tensor, ...]]:
    """The equation of einsum's other form: an operand, its subscripts as numbers, the next operand, and so on."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

    def term(subscripts: Any) -> str:
        return "".join("..." if s is Ellipsis else letters[s] for s in subscripts)

    count = len(interleaved) // 2
    equation = ",".join(term(subscripts) for subscripts in interleaved[1 : 2 * count : 2])
    if len(interleaved) % 2:
        equation += "->" + term(interleaved[-1])
    return equation, interleaved[: 2 * count : 2]


def _summed(equation: str, operands: Sequence[Tensor]) -> list[tuple[int, ...]] | None:
    """The dimensions of each operand that are summed with another's, counted from the last; None if there are none at all.

    An operand that has none is rounded along its last dimension. What torch would refuse gives None as well.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [term.partition("...") for term in left.split(",")]
    if len(terms) != len(operands):
        return None
    labels: list[list[str]] = []
    for (before, _, after), x in zip(terms, operands, strict=True):
        labels.append([*before, *[""] * (x.dim() - len(before) - len(after)), *after])
    holders = {letter: sum(letter in each for each in labels) for each in labels for letter in each if letter}
    if not arrow:  # those that appear once are the result's
        right = "".join(letter for letter in holders if left.count(letter) == 1)
    contracted = {letter for letter, count in holders.items() if count > 1 and letter not in right}
    if not contracted:
        return None
    found = [tuple(d - len(each) for d, letter in enumerate(each) if letter in contracted) for each in labels]
    return [dims if dims else (-1,) for dims in found]
