"""int8 convolutions: QuantConv2d and QuantConv1d, which is the same operator on images of height 1. Read first: int8.py."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.backward import differentiable
from .int8 import Int8Layer
from .kept import repeater
from .weight import as_image_kernel

_conv2d = torch.ops.quant_ops.int8_conv2d.default


class _QuantConv(Int8Layer):
    """What both convolutions share. The float class interprets the constructor's arguments, so that they mean the same as there."""

    float_class: ClassVar[Any]  # nn.Conv1d or nn.Conv2d
    geometry = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    _granularity = "per sample"

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        *,
        asymmetric: bool = False,
        relu: bool = False,
        activation: str | None = None,
        backward: bool = False,
    ) -> None:
        arguments = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        conv = self.float_class(*arguments, device="meta")  # the meta device costs no memory
        for name in self.geometry:
            setattr(self, name, getattr(conv, name))
        self._padded = any(conv._reversed_padding_repeated_twice)
        missing = (1,) * (2 - len(conv.kernel_size))  # a Conv1d is a convolution of images of height 1
        left, right, top, bottom = [*conv._reversed_padding_repeated_twice, 0, 0][:4]  # torch lists the last dimension first
        in_forward = padding_mode != "zeros"  # the operator itself pads only with zeros
        self._pad_input = [left, right, top, bottom] if in_forward else None
        options = {
            "stride": (*missing, *conv.stride),
            "padding": [0] * 4 if in_forward else [top, bottom, left, right],
            "dilation": (*missing, *conv.dilation),
            "groups": groups,
        }
        defaults = {"stride": (1, 1), "padding": [0] * 4, "dilation": (1, 1), "groups": 1}
        self._conv_options = {name: value for name, value in options.items() if value != defaults[name]}
        super().__init__(tuple(conv.weight.shape), bias, device, asymmetric, relu, activation, backward)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self._padded:
            parts.append(f"padding={self.padding!r}")
        if set(self.dilation) != {1}:
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        return ", ".join([*parts, f"bias={self.bias is not None}", self._describe()])


class QuantConv2d(_QuantConv):
    """int8 nn.Conv2d for inference: any channels, stride, padding, dilation and groups; see :class:`QuantLinear`.

    Dynamic quantization is per sample. channels_last input gives channels_last output without a copy. Once the layer was moved with
    ``.to(memory_format=torch.channels_last)``, or made from a layer that was, every output is channels_last.
    """

    float_class = nn.Conv2d
    _repeats = repeater("int8_conv2d")

    def _is_one_call(self) -> bool:
        return self._pad_input is None and super()._is_one_call()

    def _run(self, x: Tensor, through: bool = False) -> Tensor:
        b = self._buffers
        weight = b["qweight"]
        options = self._conv_options | self._options()
        if self.channels_last and x.dim() == 4:
            options["channels_last"] = True
        if self._pad_input is not None:
            x = F.pad(x, self._pad_input, self.padding_mode)
        weight = self._placeholder if weight is None else weight
        if through:
            return differentiable("int8_conv2d", x, weight, b["weight_scale"], b["bias"], **options)
        return _conv2d(x, weight, b["weight_scale"], b["bias"], **options)


class QuantConv1d(_QuantConv):
    """int8 nn.Conv1d for inference, by the kernels of :class:`QuantConv2d` and with the same bits.

    Shapes: input ``(N, C, L)`` or ``(C, L)``, output ``(N, O, L_out)`` or ``(O, L_out)``, dtypes as for :class:`QuantLinear`. An
    input whose channels are contiguous, such as ``x.transpose(1, 2)`` of ``(N, L, C)``, is read as it lies.
    """

    float_class = nn.Conv1d

    def _run(self, x: Tensor, through: bool = False) -> Tensor:
        if x.dim() not in (2, 3):
            raise ValueError(f"quant_ops.QuantConv1d: expected x.shape (N, C, L) or (C, L), got {tuple(x.shape)}")
        b = self._buffers
        x = x.unsqueeze(-2)
        if self._pad_input is not None:
            x = F.pad(x, self._pad_input, self.padding_mode)
        weight = self._placeholder if b["qweight"] is None else as_image_kernel(b["qweight"])
        options = self._conv_options | self._options()
        if through:
            return differentiable("int8_conv2d", x, weight, b["weight_scale"], b["bias"], **options).squeeze(-2)
        return _conv2d(x, weight, b["weight_scale"], b["bias"], **options).squeeze(-2)
