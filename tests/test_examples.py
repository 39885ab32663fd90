"""The examples run, keep what they promise, and write what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

from quant_ops.convert import files

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["vision", "text_encoder"])
def test_quick(name, tmp_path):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("OK: int8 is within one point of float32\n")
    assert "the same bits" in done.stdout
    assert len(files.read_header(tmp_path / f"{name}.safetensors")["layers"]) >= 3
