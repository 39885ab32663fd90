"""INT-FP-QSim: ``replace_layers``, static calibration and its quantizers. Change ``int_fp_qsim`` to this package in import lines.

    from quant_ops.compat.int_fp_qsim.formats import INT8, INT4, FP16
    from quant_ops.compat.int_fp_qsim.replace import replace_layers
    from quant_ops.compat.int_fp_qsim.static_calib import calibrate_inputs, calibrate_weights
    from quant_ops.compat.int_fp_qsim import FloatingPoint, quantizer       where the document imports from qtorch

Differences from the original:

* Any model, on CPU and CUDA. Layers are Linear, Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d, MultiheadAttention and
  transformers' Conv1D, also those of subclasses with the same forward; the original replaces Linear, Conv1d, Conv2d and
  ConvTranspose2d of exactly these classes. Products in attention are simulated in any code, not in six classes of transformers and
  diffusers; see attention.py for the order of scale, mask and output quantizer, which differs between the original's classes.
* Formats are objects of this package, see formats.py: ``INT8(x, amax=a, axis=0)``, where the original has
  ``INT8(x, static_scale=a, per_channel_axis=0)``. ``BF16`` keeps x's dtype. NaN stays NaN. Gradients are 0 beyond the range of
  E4M3 and FP16, too; qtorch lets them pass.
* A calibrated amax is a buffer, float32, and so a part of the state_dict. It is used by formats and functions that take one, and
  ignored, with a note in the log, by those that take none, such as E4M3; the original raises a TypeError there.
* ``quantize_to_int`` and ``quantize_to_fp`` compute in x's dtype, and CUDA and CPU agree. ``per_channel_axis`` has an amax for each
  index of that dimension; the original reduces that dimension instead. ``unsigned`` makes 0 of negative values, where the original
  raises. Gradients of integers pass where x rounds into the range, up to half a step beyond amax.
* ``quantize_to_fp`` chooses exponents exactly; the original takes the floor of a float32 logarithm, which can be off by one next to
  powers of two, and adds 1e-10 to amax. Its gradient is straight through up to amax; the original's passes nothing but values of
  less than a step, although its document asks for the former.
* Calibration runs in eval mode, by the observers of ``quant_ops``, whose histograms and searches are finer. "entropy" works for
  weights too. A batch that is a list or tuple is the model's arguments, not one of them. Batches with NaN or Inf are left out.
  Wrong methods, empty data and a bare tensor in place of batches are errors. Nothing is printed; the logger "quant_ops" has it.
* Replaced layers are ``quant_ops`` layers, and the names in layers.py functions that make them. Their ``config`` holds the formats.
* ``E3M4`` and ``E5M2`` are among the formats.

Results depend on neither threads nor device. Optimizers keep working: a replaced layer has the float layer's parameters. New code
is better off with ``quant_ops.Simulated``, which has scales per channel, row and block, and a format for gradients.
"""

from ..qtorch import BlockFloatingPoint, FixedPoint, FloatingPoint, FloatingPointNumber, Number
from ..qtorch.quant import Quantizer, block_quantize, fixed_point_quantize, float_quantize
from . import attention, formats, layers, quantizer, replace, static_calib
from .replace import replace_layers
from .static_calib import calibrate_inputs, calibrate_weights

__all__ = [
    "BlockFloatingPoint",
    "FixedPoint",
    "FloatingPoint",
    "FloatingPointNumber",
    "Number",
    "Quantizer",
    "attention",
    "block_quantize",
    "calibrate_inputs",
    "calibrate_weights",
    "fixed_point_quantize",
    "float_quantize",
    "formats",
    "layers",
    "quantizer",
    "replace",
    "replace_layers",
    "static_calib",
]
