"""What stands in the place of an activation after :func:`fuse_activations_` (chains/activations.py), in models and in files."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
"""What torch computes for each name that a layer's ``activation`` may have."""


class FusedActivation(nn.Identity):
    """In the place of an activation that the quantized layers before it compute."""
