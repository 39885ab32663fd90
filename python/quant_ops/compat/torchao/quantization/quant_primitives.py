"""torchao's ``quant_primitives``: affine quantization in blocks. The functions are those of ``quant_ops``, with its operators.

``choose_qparams_affine`` has the arguments of the document's version in their order; ``keepdim`` of later ones is a keyword.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import quant_ops as qo

from ....ops import MappingType, ZeroPointDomain, dequantize_affine, quantize_affine

__all__ = [
    "MappingType",
    "ZeroPointDomain",
    "choose_qparams_affine",
    "dequantize_affine",
    "dynamically_quantize_per_channel",
    "quantize_activation_per_token_absmax",
    "quantize_affine",
    "safe_int_mm",
]


def choose_qparams_affine(
    input: Tensor,
    mapping_type: MappingType | str,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain | str = ZeroPointDomain.INT,
    *,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As ``quant_ops.choose_qparams_affine``, which documents the arguments and errors."""
    return qo.choose_qparams_affine(
        input,
        mapping_type,
        block_size,
        target_dtype,
        quant_min,
        quant_max,
        eps,
        scale_dtype,
        zero_point_dtype,
        keepdim,
        preserve_zero=preserve_zero,
        zero_point_domain=zero_point_domain,
    )


def dynamically_quantize_per_channel(
    x: Tensor, quant_min: int, quant_max: int, target_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric codes of a matrix (N, K), with a scale and the zero point 0 for each row: ``scale = 2 amax / (max - min)``."""
    eps = torch.finfo(torch.float32).eps
    scale, zero = qo.choose_qparams_affine(
        x, MappingType.SYMMETRIC, (1, x.shape[1]), target_dtype, quant_min, quant_max, eps, zero_point_dtype=torch.int64
    )
    assert zero is not None
    return qo.quantize_affine(x, (1, x.shape[1]), scale, zero, target_dtype, quant_min, quant_max), scale, zero


def quantize_activation_per_token_absmax(t: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes in [-127, 127] of an input (..., K), with a scale for each row (..., 1)."""
    blocks = (*[1] * (t.dim() - 1), t.shape[-1])
    scale_dtype = torch.float32 if t.dtype == torch.float16 else None
    scale, zero = qo.choose_qparams_affine(t, MappingType.SYMMETRIC, blocks, torch.int8, -127, 127, 1e-5, scale_dtype, keepdim=True)
    return qo.quantize_affine(t, blocks, scale, zero, torch.int8, -127, 127), scale


def safe_int_mm(input: Tensor, mat2: Tensor) -> Tensor:
    """``input @ mat2`` of int8 matrices (M, K) and (K, N) in int32, exactly."""
    return qo.int8_gemm(input, mat2.t().contiguous())
