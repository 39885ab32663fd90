"""The formats that have names, as the published standards define them.

OCP 8-bit Floating Point Specification (OFP8) v1.0: E4M3, E5M2. OCP Microscaling Formats (MX) v1.0: E3M2, E2M3, E2M1 and the formats
MX. IEEE 754: FP16. E1M2 is the equally spaced 4-bit format of INT-FP-QSim.
"""

from .. import _description
from .blocks import ABFP, MX, BlockFloat, NVFP4Format
from .elementwise import FixedPoint, FloatFormat, IntFormat
from .format import NAMES, Format
from .gradient import WithGradient

INT8 = IntFormat(8)
INT4 = IntFormat(4)

E4M3 = FloatFormat(4, 3)
E5M2 = FloatFormat(5, 2)
E3M2 = FloatFormat(3, 2)
E2M3 = FloatFormat(2, 3)
E2M1 = FloatFormat(2, 1)
E1M2 = FloatFormat(1, 2)
FP16 = FloatFormat(5, 10, saturate=False)
BF16 = FloatFormat(8, 7, saturate=False)

MXFP8_E4M3 = MX(E4M3)
MXFP8_E5M2 = MX(E5M2)
MXFP6_E3M2 = MX(E3M2)
MXFP6_E2M3 = MX(E2M3)
MXFP4 = MX(E2M1)
MXINT8 = MX(FloatFormat(1, 6, bias=1))

NVFP4 = NVFP4Format()
NVFP4_TWO_LEVEL = NVFP4Format(two_level=True)

NAMES.update({value: name for name, value in list(globals().items()) if isinstance(value, Format)})
_description.register(ABFP, MX, BlockFloat, FixedPoint, FloatFormat, IntFormat, NVFP4Format, WithGradient)
