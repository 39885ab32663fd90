"""The benchmarks stay alive: their smallest shapes run, with every contender's result checked, without being timed."""

import subprocess
import sys
from pathlib import Path


def test_smoke():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-m", "smoke", "--benchmark-disable", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout
