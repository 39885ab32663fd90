"""torchao's ``quantization``."""

from . import GPTQ, quant_api, quant_primitives, smoothquant, utils
from .autoquant import AUTOQUANT_CACHE, DEFAULT_CLASS_LIST, autoquant
from .GPTQ import (
    Int4WeightOnlyGPTQQuantizer,
    Int4WeightOnlyQuantizer,
    Int8DynActInt4WeightGPTQQuantizer,
    Int8DynActInt4WeightQuantizer,
)
from .quant_api import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    apply_dynamic_quant,
    apply_weight_only_int8_quant,
    change_linear_weights_to_int4_woqtensors,
    change_linear_weights_to_int8_dqtensors,
    change_linear_weights_to_int8_woqtensors,
    quantize,
    quantize_,
)
from .quant_primitives import (
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
    safe_int_mm,
)
from .smoothquant import (
    SmoothFakeDynamicallyQuantizedLinear,
    SmoothFakeDynQuantMixin,
    get_scale,
    set_smooth_fq_attribute,
    smooth_fq_linear_to_inference,
    swap_linear_with_smooth_fq_linear,
)
from .utils import compute_error, get_model_size_in_bytes, unwrap_tensor_subclass

__all__ = [
    "AUTOQUANT_CACHE",
    "DEFAULT_CLASS_LIST",
    "GPTQ",
    "Int4WeightOnlyConfig",
    "Int4WeightOnlyGPTQQuantizer",
    "Int4WeightOnlyQuantizer",
    "Int8DynActInt4WeightGPTQQuantizer",
    "Int8DynActInt4WeightQuantizer",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "MappingType",
    "SmoothFakeDynQuantMixin",
    "SmoothFakeDynamicallyQuantizedLinear",
    "ZeroPointDomain",
    "apply_dynamic_quant",
    "apply_weight_only_int8_quant",
    "autoquant",
    "change_linear_weights_to_int4_woqtensors",
    "change_linear_weights_to_int8_dqtensors",
    "change_linear_weights_to_int8_woqtensors",
    "choose_qparams_affine",
    "compute_error",
    "dequantize_affine",
    "get_model_size_in_bytes",
    "get_scale",
    "quant_api",
    "quant_primitives",
    "quantize",
    "quantize_",
    "quantize_affine",
    "safe_int_mm",
    "set_smooth_fq_attribute",
    "smooth_fq_linear_to_inference",
    "smoothquant",
    "swap_linear_with_smooth_fq_linear",
    "unwrap_tensor_subclass",
    "utils",
]
