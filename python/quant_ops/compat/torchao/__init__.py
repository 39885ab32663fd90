"""torchao as of its document on quantization (version 0.3). Change ``torchao`` to this package in import lines.

    from quant_ops.compat import torchao
    from quant_ops.compat.torchao.quantization import quant_api
    from quant_ops.compat.torchao.quantization.smoothquant import swap_linear_with_smooth_fq_linear
    from quant_ops.compat.torchao.dtypes import to_aq

Differences from the original:

* Codes, scales and zero points of weights are torchao's, to the bit; products are computed by the operators of ``quant_ops``, on
  CPU and CUDA, in eager mode as well as compiled. Weights of any number of features may be int4 ones; torchao pads them.
* ``change_linear_weights_to_*``, ``quantize_`` and the quantizers put layers of ``quant_ops`` in place of nn.Linear, which can be
  compiled, exported and saved; biases are kept. ``quantize`` puts tensors into nn.Linear, and ``unwrap_tensor_subclass`` makes
  layers of them, where the original registers a parametrization.
* ``to_laq`` takes any function that quantizes the input; a ``QuantizeRows`` (those of ``get_apply_*``) is done by the operator.
* A quantized tensor refuses operators other than linear, mm, addmm, detach, clone, to, t and copy_; it has ``dequantize()``.
* ``autoquant`` times each layer alone, with the values that it has seen, and prints nothing: ``model.autoquant_result`` is a table.
  AUTOQUANT_CACHE has seconds by ``quant_ops.autoquant.cache.Key``, and refuses the times of another machine or version.
* The GPTQ quantizers are ``quant_ops.gptq_``: by hooks, block by block, in place, and a layer is quantized with the inputs that the
  quantized layers before it give. ``InputRecorder`` takes texts or lists of tokens, not names of tasks of lm_eval, and
  ``TransformerEvalWrapper`` gives perplexities.
* SmoothQuant's magnitudes are at least 1e-5, where the original divides by zero, and a buffer of the layer. A layer that has seen
  nothing is an error.
* ``device``, ``inner_k_tiles``, ``padding_allowed``, ``precision`` and the settings of inductor are accepted and ignored: the model
  stays where it is, and layers compute in the dtype of their input.
* An error leaves the model as it was.
"""

from . import _eval, dtypes, quantization, utils
from .quantization import apply_dynamic_quant, apply_weight_only_int8_quant, autoquant, quantize_

__all__ = [
    "_eval",
    "apply_dynamic_quant",
    "apply_weight_only_int8_quant",
    "autoquant",
    "dtypes",
    "quantization",
    "quantize_",
    "utils",
]
