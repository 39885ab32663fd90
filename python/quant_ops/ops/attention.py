"""Attention on eight-bit codes: typed wrapper with the documentation, and fake kernel. It is for inference: no gradient.

The schema is in ``cpp/torch/operators.h``, the checks in ``cpp/torch/attention.h``, the arithmetic in ``cpp/contract/ops.h``.
"""

from typing import Any

import torch
from torch import Tensor

from quant_ops.ops._register import call, fake_kernel, inference_only

_ops = torch.ops.quant_ops


def int8_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """``softmax(scale * q @ k.T + mask) @ v`` for every head, with int8 products, on the CPU.

    Rows of ``q``, rows of ``k`` less the mean of its rows, and columns of ``v`` less their means are quantized here, symmetric,
    each with its own scale, separately for every sample and head. Sums of products are exact. The softmax is in float32; its
    probabilities are multiplied as codes of 1/255 of the row's largest. Subtracting the means changes no exact result: the first
    adds one number to all scores of a row, the second is added to the result again. It takes away what all tokens have in common,
    which is most of the magnitude of many models' keys, and small probabilities that have no code count as a token whose ``v`` is
    the mean.

    A result and the exact one differ by at most ``r * (exp(2 * e) * (1 + S / 510 * p) - 1 + 1 / 254)`` and float32's rounding. Here
    ``r`` is the largest magnitude of the column of ``v`` less its mean, ``p`` the row's largest probability, and ``e`` bounds the
    error of a score: ``abs(scale) / 2 * (a * norm1(k') + b * norm1(q) + a * b * D / 2)`` for the worst ``k'``, a row of ``k`` less
    the mean, where ``a`` and ``b`` are the steps of the codes of the rows ``q`` and ``k'``, 1/127 of their largest magnitudes. That
    is the worst case. With random data the signal is 36 dB above the noise.

    Args:
        q: float32, float16 or bfloat16, ``(B, H, L, D)``; read in place if its last dimension is contiguous, as are k and v.
        k: ``(B, H, S, D)``, or fewer heads, which divide H: head ``h`` of q reads head ``h // (H // heads)``.
        v: ``(B, H, S, DV)``, with the heads of k.
        mask: broadcasts to ``(B, H, L, S)``. bool: False where a key is not attended to. Floating: added to the scores.
        causal: row l attends to keys 0 to l.
        scale: of the scores; default ``1 / sqrt(D)``.

    Returns:
        ``(B, H, L, DV)`` of q's dtype, whose memory is that of ``(B, L, H, DV)``: ``y.transpose(1, 2).flatten(2)`` copies nothing.
        The same bits for any number of threads and instruction set. A row that attends to no key is 0. A row depends on all of k
        and v, by their means and v's scales, also with a mask.

    Raises:
        TypeError: another dtype.
        ValueError: shapes do not fit; S > 65793, where a sum could overflow; a mask together with ``causal``; tensors on CUDA.
        RuntimeError: a gradient is asked for.
    """
    return call(_ops.int8_attention.default, q, k, v, mask, causal, scale)


@fake_kernel("int8_attention")
def _(checked: Tensor, q: Tensor, v: Tensor, **_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=checked.dtype).transpose(1, 2)


inference_only("int8_attention")
