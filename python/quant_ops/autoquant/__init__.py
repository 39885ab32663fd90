"""Chooses for each layer of a model the form that is fastest on this machine for the shapes that it sees.

Read record.py (what layers see), cache.py (times that are known), choice.py (errors, times, the choice) and session.py (the call).
"""

from .cache import AUTOQUANT_CACHE, TimingCache
from .choice import LayerChoice
from .session import AutoquantResult, autoquant_

__all__ = ["AUTOQUANT_CACHE", "AutoquantResult", "LayerChoice", "TimingCache", "autoquant_"]
