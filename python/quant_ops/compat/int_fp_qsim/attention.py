"""Attention. There are no classes for single models: ``replace_layers`` simulates the products of functions in any model.

These are torch.matmul, bmm, baddbmm, einsum, scaled_dot_product_attention and their like, whichever code calls them: that of OPT,
BERT, CodeGen, DETR, MaskFormer, Graphormer, ImageBind and diffusers, or the user's own. Queries and keys are rounded by the input
quantizer, their product by the output quantizer, and then scaled and masked in float; likewise the probabilities and the values.
Their scales, where a format has one, follow from the data of each call.
"""

from typing import Any

from torch import nn

from .layers import Quantizer, simulated

__all__ = ["MultiheadAttention"]


def MultiheadAttention(
    embed_dim: int,
    num_heads: int,
    input_quantizer: Quantizer,
    weight_quantizer: Quantizer,
    output_quantizer: Quantizer,
    *args: Any,
    **kwargs: Any,
) -> nn.Module:
    """An nn.MultiheadAttention with rounded operands; further arguments are nn.MultiheadAttention's."""
    layer = nn.MultiheadAttention(embed_dim, num_heads, *args, **kwargs)
    return simulated(layer, input_quantizer, weight_quantizer, output_quantizer)
