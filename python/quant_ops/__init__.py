"""Fast, exact int8 and simulated low-precision operators for PyTorch, on CPU and CUDA.

The operators are ``torch.ops.quant_ops.*``; the functions of the same names here check their arguments with Python exceptions.
Start with :func:`quantize_` for a whole model or :class:`QuantLinear` and :class:`QuantConv2d` for one layer.
"""

import importlib

from . import _libraries, _library
from ._memory import keep_memory

_library.load()

from .accuracy.awq import AWQResult, awq_  # noqa: E402
from .accuracy.gptq import GPTQResult, gptq_  # noqa: E402
from .accuracy.smoothquant import SmoothQuantResult, smoothquant_  # noqa: E402
from .autoquant import AUTOQUANT_CACHE, AutoquantResult, LayerChoice, TimingCache, autoquant_  # noqa: E402
from .chains.activations import ActivationResult, fuse_activations_  # noqa: E402
from .chains.layer import Chain, ChainTimes  # noqa: E402
from .chains.result import ChainResult, chain_  # noqa: E402
from .convert.calibrate import calibrate, synchronize_  # noqa: E402
from .convert.config import (  # noqa: E402
    Int4WeightOnly,
    Int8Dynamic,
    Int8DynamicInt4Weight,
    Int8Static,
    Int8WeightOnly,
)
from .convert.config import from_json as config_from_json  # noqa: E402
from .convert.files import load_, save  # noqa: E402
from .convert.fold import FoldResult, fold_batchnorm_  # noqa: E402
from .convert.select import ConversionResult  # noqa: E402
from .convert.split import SplitResult, split_attention_  # noqa: E402
from .convert.steps import count_timesteps, timestep  # noqa: E402
from .convert.workflow import convert_, prepare_, prepare_qat_, quantize_  # noqa: E402
from .formats import (  # noqa: E402
    ABFP,
    BF16,
    E1M2,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FP16,
    INT4,
    INT8,
    MX,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    NVFP4_TWO_LEVEL,
    BlockFloat,
    FixedPoint,
    FloatFormat,
    Format,
    IntFormat,
    NVFP4Format,
    WithGradient,
    with_gradient,
)
from .formats import from_json as format_from_json  # noqa: E402
from .info import collect_env, kernel_for  # noqa: E402
from .nn import (  # noqa: E402
    MultiheadAttention,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    ScaledLinear,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
)
from .ops import (  # noqa: E402
    MappingType,
    ZeroPointDomain,
    choose_qparams,
    choose_qparams_affine,
    dequant_tensor,
    dequantize_affine,
    int8_adaptive_avg_pool2d,
    int8_add,
    int8_attention,
    int8_avg_pool2d,
    int8_cat,
    int8_chain,
    int8_conv2d,
    int8_conv2d_backward,
    int8_gemm,
    int8_linear,
    int8_linear_backward,
    int8_max_pool2d,
    int8_mul,
    int8_upsample_nearest2d,
    norm_quantize_rows,
    pack_weight,
    pack_weight_only,
    quant_block_backward,
    quant_block_forward,
    quant_float_backward,
    quant_float_forward,
    quant_tensor_backward,
    quant_tensor_forward,
    quantize_affine,
    quantize_rows,
    requantize,
    transpose_packed_weight,
    unpack_weight,
    unpack_weight_only,
    weight_only_embedding,
    weight_only_linear,
    weight_only_linear_backward,
)
from .report.compare import compare  # noqa: E402
from .report.fallback import FallbackResult, fallback_  # noqa: E402
from .report.report import LayerReport, Report  # noqa: E402
from .simulation.config import Simulated  # noqa: E402
from .simulation.layers import keep_weights_  # noqa: E402
from .simulation.mode import simulate_products_, simulated_products  # noqa: E402

__version__ = _library.VERSION
cmake_prefix_path = _library.cmake_prefix_path()  # as torch.utils.cmake_prefix_path, for find_package(quant_ops)
_libraries.register_when_imported()


def __getattr__(name: str) -> object:
    """Parts that need other packages, imported when they are used."""
    if name == "onnx":
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ABFP",
    "AUTOQUANT_CACHE",
    "BF16",
    "E1M2",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FP16",
    "INT4",
    "INT8",
    "MX",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "MXINT8",
    "NVFP4",
    "NVFP4_TWO_LEVEL",
    "AWQResult",
    "ActivationResult",
    "AutoquantResult",
    "BlockFloat",
    "Chain",
    "ChainResult",
    "ChainTimes",
    "ConversionResult",
    "FallbackResult",
    "FixedPoint",
    "FloatFormat",
    "FoldResult",
    "Format",
    "GPTQResult",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8DynamicInt4Weight",
    "Int8Static",
    "Int8WeightOnly",
    "IntFormat",
    "LayerChoice",
    "LayerReport",
    "MappingType",
    "MultiheadAttention",
    "NVFP4Format",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "Report",
    "ScaledLinear",
    "Simulated",
    "SmoothQuantResult",
    "SplitResult",
    "TimingCache",
    "WeightOnlyEmbedding",
    "WeightOnlyLinear",
    "WithGradient",
    "ZeroPointDomain",
    "__version__",
    "autoquant_",
    "awq_",
    "calibrate",
    "chain_",
    "choose_qparams",
    "choose_qparams_affine",
    "cmake_prefix_path",
    "collect_env",
    "compare",
    "config_from_json",
    "convert_",
    "count_timesteps",
    "dequant_tensor",
    "dequantize_affine",
    "fallback_",
    "fold_batchnorm_",
    "format_from_json",
    "fuse_activations_",
    "gptq_",
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
    "keep_memory",
    "keep_weights_",
    "kernel_for",
    "load_",
    "norm_quantize_rows",
    "pack_weight",
    "pack_weight_only",
    "prepare_",
    "prepare_qat_",
    "quant_block_backward",
    "quant_block_forward",
    "quant_float_backward",
    "quant_float_forward",
    "quant_tensor_backward",
    "quant_tensor_forward",
    "quantize_",
    "quantize_affine",
    "quantize_rows",
    "requantize",
    "save",
    "simulate_products_",
    "simulated_products",
    "smoothquant_",
    "split_attention_",
    "synchronize_",
    "timestep",
    "transpose_packed_weight",
    "unpack_weight",
    "unpack_weight_only",
    "weight_only_embedding",
    "weight_only_linear",
    "weight_only_linear_backward",
    "with_gradient",
]
