"""No call kills the process or hangs it: random hostile calls (hostile_calls.py), in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "hostile_calls.py"


def run(seed: int, count: int) -> None:
    command = [sys.executable, str(SCRIPT), str(seed), str(count)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60 + count / 5)
    last = "\n".join(done.stdout.splitlines()[-2:])
    assert done.returncode == 0, f"status {done.returncode}\n{last}\n{done.stderr[-2000:]}"
    assert "refused" in last


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("seed", range(2))
def test_hostile_calls(seed):
    run(seed, 300)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("seed", range(100, 112))
def test_many_hostile_calls(seed):
    run(seed, 1000)
