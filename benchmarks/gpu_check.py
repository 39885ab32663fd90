"""`python benchmarks/gpu_check.py`, from any folder, is `python -m benchmarks.gpu.check` from the root of the sources."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
runpy.run_module("benchmarks.gpu.check", run_name="__main__")
