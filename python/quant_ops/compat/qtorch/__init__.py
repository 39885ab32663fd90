"""qtorch (QPyTorch): its number formats, and in ``quant_ops.compat.qtorch.quant`` the functions that round to them.

    from quant_ops.compat.qtorch import FloatingPoint
    from quant_ops.compat.qtorch.quant import quantizer

Its formats are not the standard's of the same widths: every code of ``FloatingPoint(exp, man)`` is a number, so that 4 exponent
and 3 mantissa bits reach 480 where OCP's E4M3 ends at 448. ``quant_ops`` itself has both: ``FloatFormat(4, 3)`` and ``E4M3``.

Differences from the original:

* CPU and CUDA alike; float32, float16, bfloat16 and, for most formats, float64, of any strides. The original takes float32.
* NaN stays NaN. The original makes the largest value of it in floating point.
* Results depend on neither threads nor device. Ties of fixed point go to even, as in the original's CPU code; its CUDA kernels
  round them away from zero. Ties of floating point go away from zero, as there.
* Ties of negative block floating point go away from zero. In the original, which adds an offset first, they go towards it.
* Values below the smallest normal number are rounded once. The original adds an offset in float32 first, so that a value just below
  a tie can go up.
* Fixed point without ``clamp`` leaves large values as they are. The original makes infinity of those beyond ``2^(128 - fl)``.
* ``FloatingPoint(8, man)`` has float32's infinity, as the original has in effect; ``FloatingPoint(8, 23)`` changes nothing.
* Random numbers come from torch's generator, so ``torch.manual_seed`` makes every stochastic rounding repeatable.
* ``float_quantize``, ``fixed_point_quantize`` and ``block_quantize`` let gradients pass. The original's results have none.
* ``backward_hooks`` are called with and without ``clamping_grad_zero``, which works without a ``backward_number`` too. Wrong
  arguments are a ValueError, not an AssertionError.
* Fixed point has 2 to 24 bits, block floating point 2 to 25.
* ``quantizer`` takes ``forward_num`` and ``backward_num`` too, and ``FloatingPointNumber`` is ``FloatingPoint``: the document of
  INT-FP-QSim has these names.

There are no wrappers of optimizers and no automatic conversion of models (``qtorch.optim``, ``qtorch.auto_low``).
"""

from .number import BlockFloatingPoint, FixedPoint, FloatingPoint, FloatingPointNumber, Number

__all__ = ["BlockFloatingPoint", "FixedPoint", "FloatingPoint", "FloatingPointNumber", "Number"]
