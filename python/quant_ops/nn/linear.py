"""QuantLinear."""

import torch
from torch import Tensor, nn

from .base import _QuantModule

_linear = torch.ops.quant_ops.int8_linear.default


class QuantLinear(_QuantModule):
    """int8 nn.Linear for inference: float in, float out, exact int32 sums, one operator call.

    Make one with :meth:`from_float`, or empty with the constructor and ``load_state_dict``; ``asymmetric`` (dynamic quantization
    with a zero point) and ``relu`` are settings of the layer, not part of its state_dict. Weights are replaced by
    ``load_state_dict``; writing into ``weight`` in place would leave the packed copy behind.

    Shapes: input ``(..., in_features)``, output ``(..., out_features)``; float32, float16 or bfloat16 in, the same dtype out. A
    static layer (``input_scale`` given) takes int8 as well, and with ``output_scale`` gives int8 to the next layer.
    """

    _float_class = nn.Linear
    _granularity = "per row"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        *,
        asymmetric: bool = False,
        relu: bool = False,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        super().__init__((out_features, in_features), bias, device, asymmetric, relu)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        *,
        weight_bits: int = 8,
        weight_scale: Tensor | None = None,
        input_scale: Tensor | float | None = None,
        input_zero_point: Tensor | int | None = None,
        asymmetric: bool = False,
        output_scale: Tensor | float | None = None,
        output_zero_point: Tensor | int | None = None,
        relu: bool = False,
    ) -> "QuantLinear":
        """The int8 layer of a float one, which is left as it is.

        Args:
            module: an nn.Linear.
            weight_bits: 2 to 8.
            weight_scale: one per output channel; without it the largest magnitude becomes the largest code.
            input_scale, input_zero_point: static quantization of the input; without them every row is quantized from its data. One
                element, or one per step (see :func:`timestep`).
            asymmetric: dynamic quantization with a zero point.
            output_scale, output_zero_point: int8 output for the next layer.
            relu: fuse a ReLU.

        Raises:
            TypeError: module is not an nn.Linear.
            ValueError: NaN or Inf in the weights, a scale that is not positive and finite, or settings that exclude each other.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"quant_ops.QuantLinear.from_float: expected an nn.Linear, got {type(module).__name__}")
        layer = cls(module.in_features, module.out_features, bias=False, device="meta")
        inputs, output = (input_scale, input_zero_point, asymmetric), (output_scale, output_zero_point, relu)
        layer._take(module, weight_bits, weight_scale, *inputs, *output)
        return layer

    def _run(self, x: Tensor) -> Tensor:
        b = self._buffers
        return _linear(x, b["weight"], b["weight_scale"], b["bias"], **self._options())

    def dequantize(self) -> nn.Linear:
        """A float32 nn.Linear with the weights that this layer computes with."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.weight.device)
        with torch.no_grad():
            linear.weight.copy_(self._float_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self._describe()}"
