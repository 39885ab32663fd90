"""transformers' Conv1D, the layer of GPT-2: ``y = x W + b`` with W of shape ``(in_features, out_features)``, as an nn.Linear.

Its class is recognised by its name and the module that defines it; transformers itself is not imported. Its int8 layer is a
:class:`QuantLinear` of the transposed weight.
"""

from abc import ABCMeta
from typing import Any

import torch
from torch import Tensor, nn

_DEFINED_IN = ("transformers.pytorch_utils", "transformers.modeling_utils")  # the second: before transformers 4.16


def is_conv1d_of_transformers(kind: type) -> bool:
    """Whether the class is transformers' own Conv1D, not a subclass of it."""
    return kind.__name__ == "Conv1D" and kind.__module__ in _DEFINED_IN


class TransposedLinear(nn.Module, metaclass=ABCMeta):
    """Stands for transformers' Conv1D in ``isinstance``, and computes what it does for layers that are made of one."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        return (cls is TransposedLinear and any(map(is_conv1d_of_transformers, other.__mro__))) or NotImplemented

    def forward(self, x: Tensor) -> Tensor:
        """As transformers computes it, to the bit."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])

    def extra_repr(self) -> str:
        in_features, out_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"


def as_linear(module: nn.Module) -> nn.Module:
    """The nn.Linear of the same values, which shares them, for a Conv1D of transformers; every other module as it is.

    Of a :class:`ScaledLinear`, which is an nn.Linear, the caller asks for the multiplier.
    """
    if not isinstance(module, TransposedLinear):
        return module
    weight, bias = module.weight.detach().t(), module.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.train(module.training)
