"""torch_quant_ext: ``quant_tensor_forward(tensor, scale, zero_point, qmin, qmax, asymmetric, simulate)``.

Differences from the original:

* It runs on the CPU as well, takes float16, bfloat16 and float64, any strides, keywords, and may be differentiated.
* Ties are rounded to even; the original computes ``floor(x / scale + 0.5)``. Only exact half steps differ.
* ``simulate=False`` returns integers (int8, uint8, int16 or int32, the narrowest that holds [qmin, qmax]), not float32.
* A floating zero point is rounded and clamped to [qmin, qmax]; the original adds it as it is. An integer one is accepted.
* Scales broadcast by shape alone: ``(1, C, 1, 1)`` is per channel also where N equals C, where the original would take it for one
  scale per sample. Any dimension may have its own scales, several at once too.
* NaN stays NaN when simulating; the original makes qmin of it.
"""

from ..ops import quant_tensor_forward

__all__ = ["quant_tensor_forward"]
