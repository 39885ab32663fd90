"""The command line, ``python -m quant_ops``."""

from .main import main

__all__ = ["main"]
