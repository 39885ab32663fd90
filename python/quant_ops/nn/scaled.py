"""``y = (x * m) W^T + b``: an nn.Linear whose input is multiplied by a vector first.

This is how a smoothed layer (SmoothQuant, arXiv 2211.10438, eq. 3: ``m = 1 / s`` and W whose columns were multiplied by s) or one
of AWQ (arXiv 2306.00978) is kept in float where no layer before it can take the multiplier in. The quantized layers that are made
of it multiply inside of their operator.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transposed import as_linear


def multiplied(x: Tensor, multiplier: Tensor) -> Tensor:
    """``x * multiplier`` in float32, or float64 for such an x, rounded once to the dtype of x."""
    if x.dtype in (torch.float32, torch.float64):
        return x * multiplier
    return (x.float() * multiplier).to(x.dtype)


def checked_multiplier(who: str, multiplier: Any, in_features: int) -> Tensor:
    """The multiplier in float32, as a tensor of its own.

    Raises:
        TypeError: it is no floating tensor.
        ValueError: it is of another shape than ``(in_features,)``, or holds NaN or Inf.
    """
    if not isinstance(multiplier, Tensor) or not multiplier.is_floating_point():
        got = multiplier.dtype if isinstance(multiplier, Tensor) else type(multiplier).__name__
        raise TypeError(f"quant_ops.{who}: expected input_multiplier to be a floating tensor, got {got}")
    made = multiplier.detach().float().clone(memory_format=torch.contiguous_format)
    if problem := multiplier_problem(made, in_features):
        raise ValueError(f"quant_ops.{who}: expected {problem}")
    return made


def multiplier_problem(multiplier: Tensor, in_features: int) -> str | None:
    """What no layer could use of a multiplier, as the end of a sentence; None if it can."""
    if multiplier.shape != (in_features,):
        return f"input_multiplier of shape ({in_features},), one element for each input feature, got {tuple(multiplier.shape)}"
    if not multiplier.is_meta and not torch.isfinite(multiplier).all():
        return f"a finite input_multiplier, got {multiplier[~torch.isfinite(multiplier)][0].item()}"
    return None


class ScaledLinear(nn.Linear):
    """nn.Linear of ``x * input_multiplier``; see :mod:`quant_ops.nn.scaled`.

    Wherever the package takes an nn.Linear it takes this layer, and gives the int8, weight-only or simulated layer its multiplier.
    The multiplier, a float32 buffer of shape ``(in_features,)`` in the state_dict, stays float32 in ``.half()`` and ``.to(dtype)``.
    The product is one float32 multiplication, rounded to the dtype of x, so that for float32 data the quantized layers see the same
    values.

    Shapes: input ``(..., in_features)``, output ``(..., out_features)``.
    """

    input_multiplier: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("input_multiplier", torch.ones(in_features, dtype=torch.float32, device=device))

    @classmethod
    def from_linear(cls, module: nn.Module, input_multiplier: Tensor) -> "ScaledLinear":
        """A layer with the parameters of an nn.Linear, or the weight of transformers' Conv1D, which it shares.

        Args:
            module: left as it is. Its weight is taken as it is: whoever wants the same function divides its columns by the
                multiplier.
            input_multiplier: floating ``(in_features,)``. That of a ScaledLinear is replaced.

        Raises:
            TypeError: module is no linear layer, or the multiplier no floating tensor.
            ValueError: the multiplier is of another shape, or holds NaN or Inf.
        """
        given, linear = module, as_linear(module)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"quant_ops.ScaledLinear.from_linear: expected an nn.Linear, got {type(given).__name__}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        multiplier = checked_multiplier("ScaledLinear.from_linear", input_multiplier, linear.in_features)
        layer.input_multiplier = multiplier.to(linear.weight.device)
        return layer.train(given.training)

    def _apply(self, fn: Any, recurse: bool = True) -> "ScaledLinear":
        before = self.input_multiplier
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.input_multiplier.dtype != before.dtype:  # .half() and friends
            self.input_multiplier = before.to(self.input_multiplier.device)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``F.linear(input * input_multiplier, weight, bias)``."""
        return F.linear(multiplied(input, self.input_multiplier), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input_multiplier"
