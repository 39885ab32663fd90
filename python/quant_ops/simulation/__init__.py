"""Layers and products that compute in floating point with operands rounded to number formats."""
