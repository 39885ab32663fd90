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


def test_formats(tmp_path):
    command = [sys.executable, EXAMPLES / "formats.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("OK: every line rises with its bits\n")
    assert (tmp_path / "formats.png").read_bytes().startswith(b"\x89PNG")
    rows = {
        line.rsplit(maxsplit=5)[0].strip(): list(map(float, line.split()[-5:]))
        for line in done.stdout.splitlines()[2:-3]
        if "." in line
    }
    gaussian = {name: rows[name][1] for name in ("INT8", "MXFP4", "NVFP4", "MXFP8_E4M3", "MXFP6_E2M3")}
    # decibels that follow from the distribution: a step of 1/127 of the largest of some ten thousand values, and 2^-4 of a value
    assert 38 < gaussian["INT8"] < 44
    assert 29 < gaussian["MXFP8_E4M3"] < 33
    assert gaussian["MXFP4"] < gaussian["NVFP4"] < gaussian["MXFP8_E4M3"] <= gaussian["MXFP6_E2M3"] + 1
    assert rows["MXFP4"][0] == 4.25
