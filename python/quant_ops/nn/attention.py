"""torch's multi-head attention with projections that are layers, so that whatever converts an nn.Linear finds them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import int8_attention

ATTENTIONS = ("float", "int8")


class MultiheadAttention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` whose four projections are nn.Linear: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    torch's keeps the first three in one parameter and calls no layer, so nothing can quantize them in place. Made by
    :func:`split_attention_`, or from one module by :meth:`from_float`; it takes and gives what torch's does.

    Attributes:
        attention: "float" computes attention by ``scaled_dot_product_attention``; "int8" by :func:`int8_attention`, on the CPU and
            without gradients, unless the weights of the attention are asked for or dropout is active. May be assigned.
        q_proj, k_proj, v_proj, out_proj: ``embed_dim``, ``kdim`` or ``vdim`` to ``embed_dim`` features.
        bias_k, bias_v: None, or a token that is appended to keys and values, ``(1, 1, embed_dim)``.
    """

    # read by nn.TransformerEncoder and its layers, which then use no fused path
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention: str = "float",
    ) -> None:
        """The arguments are torch's, but for ``attention``.

        Raises:
            ValueError: ``num_heads`` does not divide ``embed_dim``, or an unknown attention.
        """
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"quant_ops.MultiheadAttention: expected num_heads to divide embed_dim, got {num_heads} and {embed_dim}"
            )
        if attention not in ATTENTIONS:
            raise ValueError(f"quant_ops.MultiheadAttention: expected attention in {ATTENTIONS}, got {attention!r}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn, self.attention = dropout, batch_first, add_zero_attn, attention
        made: Any = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **made)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias, **made)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **made)
        for name in ("bias_k", "bias_v"):
            token = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, 1, embed_dim, **made))) if add_bias_kv else None
            self.register_parameter(name, token)

    @classmethod
    def from_float(cls, module: nn.MultiheadAttention, *, attention: str = "float") -> "MultiheadAttention":
        """The same attention with copies of the parameters of torch's.

        Raises:
            TypeError: another class than nn.MultiheadAttention itself.
        """
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(f"quant_ops.MultiheadAttention: expected an nn.MultiheadAttention, got {type(module).__name__}")
        weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        if module._qkv_same_embed_dim:
            weights = module.in_proj_weight.chunk(3)
        made = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            kdim=module.kdim,
            vdim=module.vdim,
            add_zero_attn=module.add_zero_attn,
            batch_first=module.batch_first,
            device="meta",
            attention=attention,
        )
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        needs = weights[0].requires_grad
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            _fill(getattr(made, name), weight, bias, needs)
        _fill(made.out_proj, module.out_proj.weight, module.out_proj.bias, module.out_proj.weight.requires_grad)
        tokens: Any = (module.bias_k, module.bias_v)
        made.bias_k, made.bias_v = tokens
        return made.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: ``(N, L, E)`` if ``batch_first``, else ``(L, N, E)``, or ``(L, E)`` without a batch.

        Args:
            query, key, value: of L, S and S tokens.
            key_padding_mask: ``(N, S)``; attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``. True in a boolean mask hides a key,
                a floating mask is added to the scores.
            need_weights: gives the weights of the attention too, averaged over the heads or not; without them it is faster.
            is_causal: a hint that the mask is causal, which comes with it.

        Returns:
            The result, of query's shape, and the weights, ``(N, L, S)`` or ``(N, num_heads, L, S)``, or None.

        Raises:
            ValueError: ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise ValueError("quant_ops.MultiheadAttention: expected attn_mask together with is_causal, got is_causal alone")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if batched and not self.batch_first:
            projected = tuple(x.transpose(0, 1) for x in projected)
        queries, keys, values = projected
        tokens = keys.shape[1]
        keys, values = self._appended(keys, values)
        mask = self._mask(attn_mask, key_padding_mask, len(queries), keys.shape[1] - tokens, queries.dtype)
        q, k, v = (self._heads(x) for x in (queries, keys, values))
        y, weights = self._attend(q, k, v, mask, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _appended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """With the tokens that add_bias_kv and add_zero_attn append."""
        n = len(keys)
        if self.bias_k is not None and self.bias_v is not None:
            keys = torch.cat([keys, self.bias_k.expand(n, -1, -1).to(keys.dtype)], 1)
            values = torch.cat([values, self.bias_v.expand(n, -1, -1).to(values.dtype)], 1)
        if self.add_zero_attn:
            keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
        return keys, values

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, n: int, added: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks in one, as attention takes it: boolean, True where a key is attended to, or floating."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (n, self.num_heads)))
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        if not masks:
            return None
        if added:
            masks = [F.pad(mask, (0, added)) for mask in masks]
        if all(mask.dtype == torch.bool for mask in masks):
            hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
            return ~hidden
        floats = [
            torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask.to(dtype)
            for mask in masks
        ]
        return floats[0] if len(floats) == 1 else floats[0] + floats[1]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            if self.attention == "int8" and dropout == 0.0:
                return int8_attention(q, k, v, mask), None
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = F.dropout(scores.softmax(-1), dropout)
        return weights @ v, weights

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}, attention={self.attention}"


def _fill(layer: nn.Linear, weight: Tensor, bias: Tensor | None, needs_grad: bool) -> None:
    """Gives a layer copies of these."""
    layer.weight = nn.Parameter(weight.detach().clone(), needs_grad)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), needs_grad))
