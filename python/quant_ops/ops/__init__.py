"""The operators: ``quantize`` for floating tensors, ``affine`` for torchao's primitives, ``int8`` for integer products, ``codes``
for what lies between them, ``attention``, ``weight_only`` for weights in groups.

The wrappers raise TypeError or ValueError where ``torch.ops.quant_ops.*`` raises RuntimeError, with the same words.
"""

from quant_ops.ops import batching as batching  # registers its rules
from quant_ops.ops.affine import MappingType, ZeroPointDomain, choose_qparams_affine, dequantize_affine, quantize_affine
from quant_ops.ops.attention import int8_attention
from quant_ops.ops.backward import int8_conv2d_backward, int8_linear_backward, weight_only_linear_backward
from quant_ops.ops.chain import int8_chain
from quant_ops.ops.codes import (
    int8_adaptive_avg_pool2d,
    int8_add,
    int8_avg_pool2d,
    int8_cat,
    int8_max_pool2d,
    int8_mul,
    int8_upsample_nearest2d,
    requantize,
)
from quant_ops.ops.int8 import int8_conv2d, int8_gemm, int8_linear, pack_weight, transpose_packed_weight, unpack_weight
from quant_ops.ops.quantize import (
    choose_qparams,
    dequant_tensor,
    norm_quantize_rows,
    quant_tensor_backward,
    quant_tensor_forward,
    quantize_rows,
)
from quant_ops.ops.quantize_float import quant_block_backward, quant_block_forward, quant_float_backward, quant_float_forward
from quant_ops.ops.sharding import register_rules
from quant_ops.ops.weight_only import pack_weight_only, unpack_weight_only, weight_only_embedding, weight_only_linear

register_rules()

__all__ = [
    "MappingType",
    "ZeroPointDomain",
    "choose_qparams",
    "choose_qparams_affine",
    "dequant_tensor",
    "dequantize_affine",
    "int8_adaptive_avg_pool2d",
    "int8_add",
    "int8_attention",
    "int8_avg_pool2d",
    "int8_cat",
    "int8_chain",
    "int8_conv2d",
    "int8_conv2d_backward",
    "int8_gemm",
    "int8_linear",
    "int8_linear_backward",
    "int8_max_pool2d",
    "int8_mul",
    "int8_upsample_nearest2d",
    "norm_quantize_rows",
    "pack_weight",
    "pack_weight_only",
    "quant_block_backward",
    "quant_block_forward",
    "quant_float_backward",
    "quant_float_forward",
    "quant_tensor_backward",
    "quant_tensor_forward",
    "quantize_affine",
    "quantize_rows",
    "requantize",
    "transpose_packed_weight",
    "unpack_weight",
    "unpack_weight_only",
    "weight_only_embedding",
    "weight_only_linear",
    "weight_only_linear_backward",
]
