"""Benchmarks of quant_ops. README.md says what is measured and how; run them from the root of the sources."""
