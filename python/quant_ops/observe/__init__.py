"""Observers: what they have seen of a tensor chooses its scale."""

from .histogram import MSE, Entropy, Histogram, Percentile
from .observer import EMA, LSQ, MinMax, Observer

__all__ = ["EMA", "LSQ", "MSE", "Entropy", "Histogram", "MinMax", "Observer", "Percentile"]
