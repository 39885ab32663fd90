"""The benchmarks stay alive: their smallest shapes run, with every contender's result checked, without being timed for long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_smoke():
    stdout = run("-m", "pytest", "benchmarks", "-m", "smoke", "--benchmark-disable", "-p", "no:cacheprovider")
    assert " passed" in stdout


def shown(path):
    return run("benchmarks/table.py", "show", str(path))


def test_linear_script(tmp_path):
    out = tmp_path / "linear.json"
    stdout = run("benchmarks/linear.py", "--shapes", "smoke", "--seconds", "0", "--rounds", "1", "--out", str(out))
    assert shown(out) == stdout  # the file holds all that the table says
    data = json.loads(out.read_text())
    timed = {row["contender"] for row in data["results"]}
    assert {"ours dynamic", "ours static", "ours dynamic bf16", "fp32", "bf16"} <= timed
    assert all(row["sqnr_db"] > 30 and 0 < row["min_us"] <= row["median_us"] for row in data["results"])
    assert all(reason for reasons in data["missing"].values() for reason in reasons.values())


def test_model_script(tmp_path):
    out = tmp_path / "model.json"
    stdout = run("benchmarks/bench_model.py", "--smoke", "--batch", "1", "--seconds", "0", "--rounds", "1", "--out", str(out))
    if stdout.startswith("skipped: "):
        pytest.skip(stdout)
    assert shown(out) == stdout
    rows = json.loads(out.read_text())["results"]
    assert {"ours dynamic", "ours dynamic bf16", "fp32", "bf16"} <= {row["contender"] for row in rows}
    assert all(row["sqnr_db"] > 30 for row in rows)


def test_tables_of_results():
    """What is in the repository can be shown."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*-cpu-*.json")):
        assert "|--:|" in shown(path), path.name
