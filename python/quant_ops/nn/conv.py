"""QuantConv2d."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import _QuantModule

_conv2d = torch.ops.quant_ops.int8_conv2d.default


class QuantConv2d(_QuantModule):
    """int8 nn.Conv2d for inference: any channels, stride, padding, dilation and groups; see :class:`QuantLinear`.

    Dynamic quantization is per sample. channels_last input gives channels_last output without a copy.
    """

    _float_class = nn.Conv2d
    _granularity = "per sample"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        *,
        asymmetric: bool = False,
        relu: bool = False,
    ) -> None:
        # nn.Conv2d knows how to read these arguments; on the meta device it costs no memory
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, padding_mode
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        self._pad_input = [left, right, top, bottom] if padding_mode != "zeros" else None
        self._pad = [0] if padding_mode != "zeros" else [top, bottom, left, right]
        geometry = {"stride": conv.stride, "padding": self._pad, "dilation": conv.dilation, "groups": groups}
        defaults = {"stride": ((1, 1),), "padding": ([0], [0] * 4), "dilation": ((1, 1),), "groups": (1,)}
        self._geometry = {name: value for name, value in geometry.items() if value not in defaults[name]}
        super().__init__(tuple(conv.weight.shape), bias, device, asymmetric, relu)

    @property
    def _groups(self) -> int:
        return self.groups

    @classmethod
    def from_float(
        cls,
        module: nn.Conv2d,
        *,
        weight_bits: int = 8,
        weight_scale: Tensor | None = None,
        input_scale: Tensor | float | None = None,
        input_zero_point: Tensor | int | None = None,
        asymmetric: bool = False,
        output_scale: Tensor | float | None = None,
        output_zero_point: Tensor | int | None = None,
        relu: bool = False,
    ) -> "QuantConv2d":
        """The int8 layer of a float nn.Conv2d; arguments and errors as in :meth:`QuantLinear.from_float`."""
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"quant_ops.QuantConv2d.from_float: expected an nn.Conv2d, got {type(module).__name__}")
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            False,
            module.padding_mode,
            device="meta",
        )
        inputs, output = (input_scale, input_zero_point, asymmetric), (output_scale, output_zero_point, relu)
        layer._take(module, weight_bits, weight_scale, *inputs, *output)
        return layer

    def _run(self, x: Tensor) -> Tensor:
        b = self._buffers
        if self._pad_input is not None:
            x = F.pad(x, self._pad_input, self.padding_mode)
        return _conv2d(x, b["weight"], b["weight_scale"], b["bias"], **self._geometry, **self._options())

    def dequantize(self) -> nn.Conv2d:
        """A float32 nn.Conv2d with the weights that this layer computes with."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]
            device=self.weight.device,
        )
        with torch.no_grad():
            conv.weight.copy_(self._float_weight())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if any(p != 0 for p in (self._pad_input or self._pad)):
            parts.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        return ", ".join([*parts, f"bias={self.bias is not None}", self._describe()])
