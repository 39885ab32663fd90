"""Attention as two products with rounded operands, and the linear products around it.

    scores = output(input(q) @ input(k)^T)                  blocks along the features
    p      = dropout(softmax(scores * scale + mask))        in floating point: a mask is never rounded
    y      = output(input(p) @ input(v))                    blocks along the keys

This order is the only one, however a model or torch computes attention: the scale follows the rounding of the scores. In half
precision everything between the operands and y is in float32. The class of the products is in products.py.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .products import Products

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def scaled_dot_product_attention(
    products: "Products",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function of that name: ``(..., L, E), (..., S, E), (..., S, Ev) -> (..., L, Ev)``, of ``products``' formats.

    Rows whose keys are all masked give 0, as torch's do.
    """
    _expect("scaled_dot_product_attention", query, key, value, attn_mask, is_causal)
    if enable_gqa and query.dim() < 3:
        raise ValueError(f"quant_ops.scaled_dot_product_attention: expected a dimension of heads, got query {tuple(query.shape)}")
    arguments = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if torch.is_autocast_enabled(query.device.type):  # the operands get the dtype that torch would give them, and no other product
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if x.dtype != torch.float64 else x for x in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            return attend(products, query, key, value, *arguments)[0]
    return attend(products, query, key, value, *arguments)[0]


def attend(
    products: "Products",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The result of attention, and the probabilities before they are rounded."""
    dtype = query.dtype
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k = products.side("query", query, (-1,)), products.side("key", key, (-1,))
    if dtype in _HALF:
        q, k = q.float(), k.float()
    scores = products.result("scores", _per_group(q, k.transpose(-2, -1), enable_gqa))
    scores = _masked(scores, scale, mask, is_causal)
    p = torch.softmax(scores, -1) if mask is None else aten._safe_softmax.default(scores, -1)  # 0 where all is masked
    if dropout_p > 0:
        p = torch.dropout(p, dropout_p, True)
    v = products.side("value", value, (-2,))
    y = _per_group(products.side("probabilities", p, (-1,)), v.to(p.dtype), enable_gqa)
    return products.result("attention", y).to(dtype), p.to(dtype)


def _masked(scores: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        return torch.add(mask, scores, alpha=scale)
    scores = scores * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores if mask is None else torch.where(mask, scores, -math.inf)


def _per_group(a: Tensor, b: Tensor, enable_gqa: bool) -> Tensor:
    """a @ b, where each matrix of b serves a group of neighbouring heads of a; their rows are multiplied at once."""
    heads = a.shape[-3] if enable_gqa else 0
    if not enable_gqa or b.shape[-3] == heads:
        return aten.matmul.default(a, b)
    if heads % b.shape[-3]:
        raise ValueError(
            "quant_ops.scaled_dot_product_attention: expected the heads of query to be a multiple of those of key and value, got "
            f"{heads} and {b.shape[-3]}"
        )
    grouped = a.unflatten(-3, (b.shape[-3], -1)).flatten(-3, -2)
    return aten.matmul.default(grouped, b).unflatten(-2, (-1, a.shape[-2])).flatten(-4, -3)


def _expect(op: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    operands = (query, key, value)
    if any(x.is_nested for x in operands):
        raise TypeError(f"quant_ops.{op}: expected tensors that are not nested, got a nested one. Pad the sequences and mask them.")
    dtypes = {x.dtype for x in operands}
    if not query.is_floating_point() or (len(dtypes) > 1 and not torch.is_autocast_enabled(query.device.type)):
        raise TypeError(f"quant_ops.{op}: expected query, key and value of one floating dtype, got {sorted(map(str, dtypes))}")
    if min(x.dim() for x in operands) < 2:
        raise ValueError(f"quant_ops.{op}: expected two dimensions at least, got {[tuple(x.shape) for x in operands]}")
    if mask is not None and is_causal:
        raise ValueError(f"quant_ops.{op}: expected no attn_mask where is_causal is set, got both")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"quant_ops.{op}: expected attn_mask to be boolean or floating, got {mask.dtype}")


# ---- multi-head attention ------------------------------------------------------------------------------------------------


def multi_head_attention(
    products: "Products",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.functional.multi_head_attention_forward: linear products, attention and a linear product.

    The three projections are products of their own, also where they share an input, which is rounded once then. A packed weight
    is rounded once. Keys and values that are appended, and static ones, are operands like others. The weights that are returned
    are the probabilities before they are rounded; rows whose keys are all masked give 0, with and without ``need_weights``.
    """
    is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, num_heads)  # type: ignore[attr-defined]
    if not is_batched:
        query, key, value = _unsqueezed(query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, embed_dim = query.shape
    _expect_sizes(query, key, value, embed_dim_to_check, num_heads, use_separate_proj_weight)
    if is_causal and attn_mask is None:
        raise ValueError("quant_ops.multi_head_attention: expected an attn_mask where is_causal is set, which is a hint, got none")
    is_causal = is_causal and key_padding_mask is None and not need_weights
    padding, mask = _float_masks(query, key_padding_mask, None if is_causal else attn_mask)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, num_heads, length, -1)

    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    q, k, v = _projected(products, query, key, value, weights, in_proj_bias)
    if bias_k is not None and bias_v is not None:
        if static_k is not None or static_v is not None:
            raise ValueError("quant_ops.multi_head_attention: expected no bias_k and bias_v for static keys or values, got both")
        k, v = (torch.cat([x, bias.expand(1, batch, -1)]) for x, bias in ((k, bias_k), (v, bias_v)))
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    k, v = (own if static is None else static.unflatten(0, (batch, num_heads)) for own, static in ((k, static_k), (v, static_v)))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

    mask = _merged(padding, mask, k.shape[-2])
    y, p = attend(products, q, k, v, mask, dropout_p if training else 0.0, is_causal)
    y = y.permute(2, 0, 1, 3).reshape(length, batch, embed_dim)
    y = products.linear(y, out_proj_weight, out_proj_bias, site="out_proj")
    y = y if is_batched else y.squeeze(1)
    if not need_weights:
        return y, None
    p = p.mean(1) if average_attn_weights else p
    return y, p if is_batched else p.squeeze(0)


def _projected(
    products: "Products", query: Tensor, key: Tensor, value: Tensor, weights: Any, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections, by one weight of three times the rows or by three."""
    x_q = products.side("in_proj.query", query, (-1,), "input")
    x_k = x_q if key is query else products.side("in_proj.key", key, (-1,), "input")
    x_v = x_k if value is key else x_q if value is query else products.side("in_proj.value", value, (-1,), "input")
    names = ("query", "key", "value")
    if not isinstance(weights, Tensor):
        rounded = [products.side(f"in_proj.{name}", w, (-1,), "weight") for name, w in zip(names, weights, strict=True)]
    else:
        packed = products.side("in_proj", weights, (-1,), "weight")
        if x_q is x_k and x_k is x_v:
            q, k, v = aten.linear.default(x_q, packed, bias).chunk(3, -1)
            return products.result("in_proj.query", q), products.result("in_proj.key", k), products.result("in_proj.value", v)
        rounded = list(packed.chunk(3))
    biases = (None, None, None) if bias is None else bias.chunk(3)
    inputs = zip(names, (x_q, x_k, x_v), rounded, biases, strict=True)
    q, k, v = (products.result(f"in_proj.{name}", aten.linear.default(x, w, b)) for name, x, w, b in inputs)
    return q, k, v


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """``(S, N, E) -> (N, heads, S, E / heads)``"""
    return x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)


def _unsqueezed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With a dimension of batches; what was one tensor stays one."""
    q = query.unsqueeze(1)
    k = q if key is query else key.unsqueeze(1)
    return q, k, k if value is key else q if value is query else value.unsqueeze(1)


def _float_masks(query: Tensor, padding: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The masks as numbers that are added to scores; a boolean one here says what is left out."""

    def as_floats(given: Tensor | None, name: str) -> Tensor | None:
        if given is None or given.is_floating_point():
            return given
        if given.dtype != torch.bool:
            raise TypeError(f"quant_ops.multi_head_attention: expected {name} to be boolean or floating, got {given.dtype}")
        return torch.zeros_like(given, dtype=query.dtype).masked_fill_(given, -math.inf)

    return as_floats(padding, "key_padding_mask"), as_floats(mask, "attn_mask")


def _merged(padding: Tensor | None, mask: Tensor | None, keys: int) -> Tensor | None:
    """One mask for ``keys`` keys, of which the masks do not know those that were appended."""
    parts = [None if padding is None else padding[:, None, None], mask]
    given = [F.pad(part, (0, keys - part.shape[-1])) for part in parts if part is not None]
    return sum(given[1:], given[0]) if given else None


def _expect_sizes(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, separate: bool) -> None:
    what = "quant_ops.multi_head_attention: expected"
    if query.shape[-1] != embed_dim or embed_dim % num_heads:
        raise ValueError(f"{what} query.shape[-1] == {embed_dim}, a multiple of {num_heads} heads, got {query.shape[-1]}")
    dims = 2 if separate else 3
    if key.shape[:dims] != value.shape[:dims]:
        raise ValueError(f"{what} key and value of like shapes, got {tuple(key.shape)} and {tuple(value.shape)}")
