"""What stands in the place of an activation after :func:`fuse_activations_` (chains/activations.py), in models and in files."""

from torch import nn


class FusedActivation(nn.Identity):
    """In the place of an activation that the quantized layers before it compute."""
