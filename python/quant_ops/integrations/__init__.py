"""Quantized models in the libraries that save and load models themselves, transformers and diffusers; and peft's adapters.

The first two are imported, and so registered there, as soon as a program has imported quant_ops and the library
(``_libraries.py``). Read first: checkpoint.py, which both stand on.
"""
