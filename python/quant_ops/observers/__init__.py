"""Observers collect statistics of tensors, batch by batch, and choose scales from them."""

from .histogram import MSE, Entropy, Histogram, Percentile
from .observer import EMA, LSQ, MinMax, Observer

__all__ = ["EMA", "LSQ", "MSE", "Entropy", "Histogram", "MinMax", "Observer", "Percentile"]
