"""``y = x W^T + b`` with int8 x and W: QuantLinear. Read first: int8.py."""

import torch
from torch import Tensor, nn

from ..ops.backward import differentiable
from .int8 import Int8Layer
from .kept import repeater

_linear = torch.ops.quant_ops.int8_linear.default


class QuantLinear(Int8Layer):
    """int8 nn.Linear with a frozen weight: float in, float out, exact int32 sums, one operator call.

    Make one with :meth:`from_float`, or empty with the constructor and ``load_state_dict``; ``asymmetric`` (dynamic quantization
    with a zero point), ``relu``, ``activation`` and ``backward`` (gradients flow to the input) are settings of the layer, not part
    of its state_dict; ``backward`` may be assigned. Weights are replaced by ``load_state_dict``, or by assigning ``qweight``. The
    layer has buffers and no parameters.

    Shapes: input ``(..., in_features)``, output ``(..., out_features)``; float32, float16 or bfloat16 in, the same dtype out. A
    static layer (``input_scale`` given) takes int8 as well, and with ``output_scale`` gives int8 to the next layer.

    ``input_multiplier``, None or a float32 buffer ``(in_features,)``, multiplies a floating input before it is quantized; a layer
    with one takes no int8.
    """

    float_class = nn.Linear
    geometry = ("in_features", "out_features")
    optional = (*Int8Layer.optional, "input_multiplier")
    _granularity = "per row"
    _repeats = repeater("int8_linear")

    input_multiplier: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        *,
        asymmetric: bool = False,
        relu: bool = False,
        activation: str | None = None,
        backward: bool = False,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        super().__init__((out_features, in_features), bias, device, asymmetric, relu, activation, backward)

    def _run(self, x: Tensor, through: bool = False) -> Tensor:
        b = self._buffers
        weight, options = b["qweight"], self._options()
        if (multiplier := b["input_multiplier"]) is not None:
            options["x_multiplier"] = multiplier
        weight = self._placeholder if weight is None else weight
        if through:
            return differentiable("int8_linear", x, weight, b["weight_scale"], b["bias"], **options)
        return _linear(x, weight, b["weight_scale"], b["bias"], **options)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self._describe()}"
