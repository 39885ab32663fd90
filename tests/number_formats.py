"""The number formats that their tests go through, and how results are compared."""

import numpy as np
import torch

import quant_ops as qo
from quant_ops.formats.format import NAMES

NAMED = {name: getattr(qo, name) for name in sorted(NAMES.values())}
SCALED_E4M3 = qo.FloatFormat(4, 3, scaled=True)
UNNAMED = [
    qo.IntFormat(5, narrow=False, rounding="toward_zero"),
    qo.IntFormat(3, signed=False, rounding="nearest_away"),
    qo.FloatFormat(3, 4),
    SCALED_E4M3,
    qo.FloatFormat(4, 3, bias=11, special="nan", subnormals=False, rounding="nearest_away"),
    qo.FixedPoint(8, 4),
    qo.FixedPoint(6, -2, symmetric=True, rounding="toward_zero"),
    qo.FixedPoint(6, 3, clamp=False),
    qo.BlockFloat(6),
    qo.BlockFloat(6, axis=-1),
    qo.BlockFloat(6, block_size=5, dim=0, rounding="nearest_away"),
    qo.MX(qo.E3M2, block_size=7, dim=0, scale_rule="round_up", rounding="toward_zero"),
    qo.NVFP4Format(two_level=True, dim=0),
    qo.ABFP(8),
    qo.ABFP(4, block_size=8, gain=2.5, dim=0),
]
SCALED = [qo.INT8, qo.IntFormat(4, narrow=False, rounding="nearest_away"), SCALED_E4M3, qo.E2M1.with_(scaled=True)]
E3M4 = qo.FloatFormat(3, 4)
FORMATS = [*NAMED.values(), *UNNAMED]
BLOCKS = (qo.MX, qo.NVFP4Format, qo.BlockFloat, qo.ABFP)
HALF = [torch.bfloat16, torch.float16]


def patterns(dtype):
    """Every value of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same(a, b):
    """Equal bits but for NaN, of which there is one kind, and the sign of zero."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def cast(x, dtype):
    """x through a dtype of ml_dtypes, as float32."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(x.float().numpy().astype(dtype).astype(np.float32))
