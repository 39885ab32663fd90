"""torchao's ``quantization.utils``: errors, sizes, and layers in place of quantized tensors."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ....report.error import sqnr

__all__ = [
    "compute_error",
    "find_multiple",
    "get_model_size_in_bytes",
    "recommended_inductor_config_setter",
    "unwrap_tensor_subclass",
]


def compute_error(x: Tensor, y: Tensor) -> Tensor:
    """Signal to quantization noise of y against x in dB, from sums in float64; infinite where they are equal."""
    return torch.tensor(sqnr(x, y))


def get_model_size_in_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; quantized ones count as their codes, scales and zero points. Packed copies count too."""
    return sum(map(_bytes, (*model.parameters(), *model.buffers())))


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


def find_multiple(n: int, *args: int) -> int:
    """The least number from n on that all of the others divide."""
    k = math.lcm(*args)
    return -(-n // k) * k


def unwrap_tensor_subclass(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """Replaces every nn.Linear whose weight is a tensor of ``to_aq`` or ``to_laq`` by a layer of quant_ops, in place.

    The layers compute what ``F.linear`` did with the tensors, and can be compiled and exported. A weight with blocks that no
    operator reads becomes a layer that dequantizes it in every call.

    Args:
        filter_fn: of module and name; by default all.

    Returns:
        The model.

    Raises:
        TypeError: the input of a layer is quantized by a function other than ``QuantizeRows``. The model is then as it was.
    """
    from ..forms import unwrap

    return unwrap(model, filter_fn or (lambda *_: True))


def recommended_inductor_config_setter() -> None:
    """Sets those of torchao's recommended options of inductor that this torch has; the operators here need none of them."""
    wanted: Iterable[tuple[str, Any]] = (
        ("coordinate_descent_tuning", True),
        ("coordinate_descent_check_all_directions", True),
        ("force_fuse_int_mm_with_mul", True),
        ("fx_graph_cache", True),
    )
    for name, value in wanted:
        if hasattr(torch._inductor.config, name):
            setattr(torch._inductor.config, name, value)
