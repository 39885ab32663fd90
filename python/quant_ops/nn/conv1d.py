"""int8 nn.Conv1d: a two-dimensional convolution of images of height 1, by the same kernels and with the same bits."""

from typing import Any

import torch
from torch import Tensor, nn

from .conv import QuantConv2d


class QuantConv1d(nn.Module):
    """int8 nn.Conv1d for inference; ``conv`` is the :class:`QuantConv2d` that computes it, with kernels of height 1.

    Shapes: input ``(N, C, L)`` or ``(C, L)``, output ``(N, O, L_out)`` or ``(O, L_out)``, dtypes as for :class:`QuantConv2d`. An
    input whose channels are contiguous, such as ``x.transpose(1, 2)`` of ``(N, L, C)``, is read as it lies.
    """

    def __init__(self, conv: QuantConv2d) -> None:
        super().__init__()
        if conv.kernel_size[0] != 1:
            raise ValueError(f"quant_ops.QuantConv1d: expected a QuantConv2d with kernels of height 1, got {conv.kernel_size}")
        self.conv = conv

    @classmethod
    def from_float(cls, module: nn.Conv1d, **settings: Any) -> "QuantConv1d":
        """The int8 layer of a float nn.Conv1d, which is left as it is; settings and errors as in :meth:`QuantConv2d.from_float`."""
        if not isinstance(module, nn.Conv1d):
            raise TypeError(f"quant_ops.QuantConv1d.from_float: expected an nn.Conv1d, got {type(module).__name__}")
        padding = module.padding if isinstance(module.padding, str) else (0, module.padding[0])
        conv = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            (1, module.kernel_size[0]),
            (1, module.stride[0]),
            padding,
            (1, module.dilation[0]),
            module.groups,
            False,
            module.padding_mode,
            device="meta",
        )
        conv.weight = nn.Parameter(module.weight.detach().unsqueeze(2), requires_grad=False)
        conv.bias = module.bias
        return cls(QuantConv2d.from_float(conv, **settings)).train(module.training)

    def dequantize(self) -> nn.Conv1d:
        """A float32 nn.Conv1d with the weights that this layer computes with."""
        conv = self.conv.dequantize()
        padding = conv.padding if isinstance(conv.padding, str) else conv.padding[1]
        layer = nn.Conv1d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[1],
            conv.stride[1],
            padding,
            conv.dilation[1],
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device=conv.weight.device,
        )
        with torch.no_grad():
            layer.weight.copy_(conv.weight.squeeze(2))
            if conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; see the class for shapes and dtypes."""
        if x.dim() not in (2, 3):
            raise ValueError(f"quant_ops.QuantConv1d: expected x.shape (N, C, L) or (C, L), got {tuple(x.shape)}")
        y: Tensor = self.conv(x.unsqueeze(-2)).squeeze(-2)
        return y
