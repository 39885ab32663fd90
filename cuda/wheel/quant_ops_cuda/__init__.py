"""Holds libquant_ops_cuda.so, which quant_ops opens. There is nothing to import here."""
