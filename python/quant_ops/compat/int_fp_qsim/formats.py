"""The formats that have names there, as formats of this package.

E4M3, E3M4, E5M2 and FP16 are qtorch's: every code is a number, ties go away from zero, and they saturate, so that E4M3 reaches 480
where OCP's ends at 448, and FP16 131008 where IEEE's ends at 65504. ``quant_ops.E4M3`` and ``quant_ops.FP16`` are the standards'.
INT8 and INT4 (narrow: without -128 and -8) and the floating E1M2 and E2M1 have a scale, from the largest magnitude. E3M4 and E5M2,
which the document makes, have no name in the original.
"""

import quant_ops as qo

from ..qtorch import FloatingPoint

__all__ = ["BF16", "E1M2", "E2M1", "E3M4", "E4M3", "E5M2", "FP16", "INT4", "INT8"]

E4M3 = FloatingPoint(4, 3).format("nearest")
E3M4 = FloatingPoint(3, 4).format("nearest")
E5M2 = FloatingPoint(5, 2).format("nearest")
FP16 = FloatingPoint(5, 10).format("nearest")
BF16 = qo.BF16

E1M2 = qo.E1M2.with_(scaled=True)
E2M1 = qo.E2M1.with_(scaled=True)
INT8 = qo.INT8
INT4 = qo.INT4
