"""torchao's ``smoothquant``: linear layers that observe their inputs, and int8 ones with a multiplier of the input made of them.

    s = amax(x)^alpha / amax(w)^(1 - alpha) per input feature, both amax at least 1e-5       y = (x / s) (w s)^T
    (SmoothQuant, arXiv 2211.10438, equation 4)

Each layer has an s of its own; ``quant_ops.smoothquant_`` folds it into the layer before where that is possible.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes.aqt import to_aq
from ..forms import int8_layer, replaced
from .quant_primitives import MappingType

__all__ = [
    "SmoothFakeDynQuantMixin",
    "SmoothFakeDynamicallyQuantizedLinear",
    "get_scale",
    "set_smooth_fq_attribute",
    "smooth_fq_linear_to_inference",
    "swap_linear_with_smooth_fq_linear",
]

_LEAST = 1e-5


def get_scale(X_absmax: Tensor, W_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """What each input feature is divided by, of the largest magnitudes (in_features,) of the input and of the weight's columns."""
    x, w = (amax.detach().float().clamp(min=_LEAST) for amax in (X_absmax, W_absmax))
    return (x**alpha / w ** (1 - alpha)).reshape(-1)


class SmoothFakeDynQuantMixin:
    """Kept for its name: the base class of the layers that observe."""


class SmoothFakeDynamicallyQuantizedLinear(SmoothFakeDynQuantMixin, nn.Linear):
    """nn.Linear that observes the largest magnitude of each input feature. It has the float layer's parameters.

    Attributes:
        alpha: how much of the input's range goes over to the weight.
        x_running_abs_max: the magnitudes, a buffer (in_features,); zeros before the first input.
        calibrating: False stops observing.
        debug_skip_scaling: True leaves s = 1.
    """

    x_running_abs_max: Tensor

    def __init__(self, *args: Any, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha, self.calibrating, self.debug_skip_scaling = alpha, True, False
        weight = self.weight
        self.register_buffer("x_running_abs_max", torch.zeros(self.in_features, dtype=torch.float32, device=weight.device))

    @classmethod
    def from_float(cls, mod: nn.Linear, alpha: float = 0.5) -> "SmoothFakeDynamicallyQuantizedLinear":
        """The observing layer of a float one.

        Raises:
            ValueError: alpha is not in [0, 1].
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"quant_ops.smoothquant: expected 0 <= alpha <= 1, got {alpha}")
        made = cls(mod.in_features, mod.out_features, bias=False, device="meta", alpha=alpha)
        made.weight, made.bias = mod.weight, mod.bias
        made.x_running_abs_max = torch.zeros(mod.in_features, dtype=torch.float32, device=mod.weight.device)
        return made.train(mod.training)

    def forward(self, X: Tensor) -> Tensor:
        if self.calibrating:
            with torch.no_grad():
                amax = X.detach().reshape(-1, X.shape[-1]).abs().amax(0).float() if X.numel() else self.x_running_abs_max
                self.x_running_abs_max = torch.maximum(self.x_running_abs_max, amax)
        return F.linear(X, self.weight, self.bias)

    def set_debug_x_absmax(self) -> None:
        """Takes the weight's magnitudes for the input's, so that layers can be timed without calibration."""
        self.x_running_abs_max = self.weight.detach().abs().amax(0).float()

    def to_inference(self) -> nn.Module:
        """The int8 layer.

        Raises:
            ValueError: it has seen no input, or NaN or Inf.
        """
        x_amax = self.x_running_abs_max
        if not bool(x_amax.any()) or not bool(torch.isfinite(x_amax).all()):
            got = "NaN or Inf" if bool(x_amax.any()) else "none"
            raise ValueError(f"quant_ops.smoothquant: expected finite calibration data other than 0, got {got}")
        weight = self.weight.detach()
        scale = get_scale(x_amax, weight.abs().amax(0), self.alpha)
        if self.debug_skip_scaling:
            scale = torch.ones_like(scale)
        smoothed = weight.float() * scale
        eps = torch.finfo(torch.float32).eps
        made = to_aq(smoothed, MappingType.SYMMETRIC, (1, weight.shape[1]), torch.int8, eps=eps)
        multiplier = None if self.debug_skip_scaling else 1 / scale
        layer = int8_layer(made.int_data, made.scale, self.bias, False, weight.dtype, multiplier)
        return layer.train(self.training)


def swap_linear_with_smooth_fq_linear(
    model: nn.Module, skip_fqn_list: list[str] | None = None, cur_fqn: str = "", alpha: float = 0.5
) -> None:
    """Replaces the nn.Linear layers of a model by ones that observe, in place.

    Args:
        skip_fqn_list: names of layers, or of modules with all that is in them, that stay as they are.
        cur_fqn: what the names in the list begin with, as those of a model that this one is a part of.
        alpha: how much of the input's range goes over to the weight.

    Raises:
        ValueError: alpha is not in [0, 1]. The model is then as it was.
    """
    prefix, skipped = f"{cur_fqn}." if cur_fqn else "", tuple(skip_fqn_list or ())
    made: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(f"{prefix}{name}" == one or f"{prefix}{name}".startswith(f"{one}.") for one in skipped)
        if name and type(module) is nn.Linear and not inside:
            made[module] = SmoothFakeDynamicallyQuantizedLinear.from_float(module, alpha)
    replaced(model, made)


def smooth_fq_linear_to_inference(model: nn.Module, debug_skip_calibration: bool = False) -> None:
    """Replaces the layers that observe by int8 ones, in place: a QuantLinear each, with a multiplier of its input.

    Args:
        debug_skip_calibration: takes the weights' magnitudes for the inputs', for timing.

    Raises:
        ValueError: a layer has seen no input, or NaN or Inf. The model is then as it was.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, SmoothFakeDynamicallyQuantizedLinear):
            if debug_skip_calibration:
                module.set_debug_x_absmax()
            try:
                made[module] = module.to_inference()
            except ValueError as error:
                remedy = "Call the model on data, or leave it out with skip_fqn_list"
                raise ValueError(f"{error}, in layer {name!r}. {remedy}.") from None
    replaced(model, made)


def set_smooth_fq_attribute(model: nn.Module, attribute_name: str, new_attribute_val: Any) -> None:
    """Sets an attribute of all layers that observe: alpha, calibrating or debug_skip_scaling."""
    for module in model.modules():
        if isinstance(module, SmoothFakeDynQuantMixin) and hasattr(module, attribute_name):
            setattr(module, attribute_name, new_attribute_val)
