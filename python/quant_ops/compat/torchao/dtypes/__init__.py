"""torchao's ``dtypes``: quantized tensors that stand as weights in an nn.Linear."""

from . import aqt
from .aqt import AffineQuantizedTensor, LinearActQuantizedTensor, to_aq, to_laq

__all__ = ["AffineQuantizedTensor", "LinearActQuantizedTensor", "aqt", "to_aq", "to_laq"]
