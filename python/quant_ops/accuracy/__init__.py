"""Methods that use calibration data to lose less by quantization. Each changes a model in place and returns what it did."""
