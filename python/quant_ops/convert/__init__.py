"""Float models become int8 ones: which layers, by what config, at once or by calibration or training; and files."""
