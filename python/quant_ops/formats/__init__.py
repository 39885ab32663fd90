"""Number formats, as objects that round tensors: integers, floating and fixed point, and blocks that share a scale.

y = quant_ops.E4M3(x)                          the OCP 8-bit format
y = quant_ops.MXFP4(x)                         4-bit elements, a scale for each 32 of them
y = quant_ops.INT8(x, axis=0)                  a scale for each index of the first dimension
"""

from .blocks import ABFP, MX, BlockFloat, NVFP4Format
from .elementwise import FixedPoint, FloatFormat, IntFormat
from .format import Format, from_json
from .gradient import WithGradient, with_gradient
from .named import (
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
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    NVFP4_TWO_LEVEL,
)

__all__ = [
    "ABFP",
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
    "BlockFloat",
    "FixedPoint",
    "FloatFormat",
    "Format",
    "IntFormat",
    "NVFP4Format",
    "WithGradient",
    "from_json",
    "with_gradient",
]
