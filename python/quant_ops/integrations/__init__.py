"""Quantized models in the libraries that save and load models themselves: transformers and diffusers.

Importing ``quant_ops.integrations.transformers`` or ``.diffusers`` registers the package there; ``import quant_ops`` imports
neither. Read first: checkpoint.py, which both stand on.
"""
