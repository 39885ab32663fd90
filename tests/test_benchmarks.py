"""The benchmarks stay alive: their smallest shapes run, with every contender's result checked, without being timed for long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python

from benchmarks.gpu import check

ROOT = Path(__file__).parent.parent


def run(*arguments):
    done = python(*arguments, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_smoke():
    stdout = run("-m", "pytest", "benchmarks/operators", "-m", "smoke", "--benchmark-disable", "-p", "no:cacheprovider")
    assert " passed" in stdout


def shown(path):
    return run("-m", "benchmarks.table", "show", str(path))


def test_linear_script(tmp_path):
    out = tmp_path / "linear.json"
    stdout = run("-m", "benchmarks.packages.linear", "--shapes", "smoke", "--seconds", "0", "--rounds", "1", "--out", str(out))
    assert shown(out) == stdout  # the file holds all that the table says
    data = json.loads(out.read_text())
    timed = {row["contender"] for row in data["results"]}
    assert {"ours dynamic", "ours static", "ours dynamic bf16", "fp32", "bf16"} <= timed
    assert all(row["sqnr_db"] > 30 and 0 < row["min_us"] <= row["median_us"] for row in data["results"])
    assert all(reason for reasons in data["missing"].values() for reason in reasons.values())


def test_weight_only_script(tmp_path):
    out = tmp_path / "weight_only.json"
    stdout = run("-m", "benchmarks.packages.weight_only", "--shapes", "smoke", "--seconds", "0", "--rounds", "1", "--out", str(out))
    assert shown(out) == stdout
    data = json.loads(out.read_text())
    timed = {(row["stem"], row["contender"]) for row in data["results"]}
    ours = {("4 bits", "ours W4A8"), ("4 bits", "ours W4A16"), ("8 bits", "ours W8A8"), ("8 bits", "ours W8A16 bf16")}
    torchs = {("4 bits", "fp32"), ("4 bits", "int4pack_mm"), ("8 bits", "int8pack_mm bf16")}
    assert ours | torchs <= timed, data["missing"]
    assert all(row["sqnr_db"] > 15 and 0 < row["min_us"] <= row["median_us"] for row in data["results"])


def test_model_script(tmp_path):
    out = tmp_path / "model.json"
    options = ("--smoke", "--batch", "1", "--seconds", "0", "--rounds", "1", "--out", str(out))
    stdout = run("-m", "benchmarks.packages.models", *options)
    if stdout.startswith("skipped: "):
        pytest.skip(stdout)
    assert shown(out) == stdout
    rows = json.loads(out.read_text())["results"]
    assert {"ours dynamic", "ours dynamic bf16", "fp32", "bf16"} <= {row["contender"] for row in rows}
    assert all(row["sqnr_db"] > 30 for row in rows)


def test_conv2d_script(tmp_path):
    out = tmp_path / "conv2d.json"
    stdout = run("-m", "benchmarks.packages.conv2d", "--sets", "smoke", "--seconds", "0", "--rounds", "1", "--out", str(out))
    assert shown(out) == stdout
    rows = json.loads(out.read_text())["results"]
    timed = {(row["stem"], row["contender"]) for row in rows}
    assert {("conv2d", name) for name in ("ours dynamic", "ours static", "fp32", "bf16")} | {("conv2d int8", "ours")} <= timed
    assert all(row["sqnr_db"] > 20 and 0 < row["min_us"] <= row["median_us"] for row in rows)


def test_networks_script(tmp_path):
    out = tmp_path / "networks.json"
    names = ("resnet-50", "mobilenet-v2", "u-net")
    options = ("--smoke", "--batch", "1", "--threads", "1", "--seconds", "0", "--rounds", "1", "--out", str(out))
    stdout = run("-m", "benchmarks.packages.networks", *options, "--networks", *names)
    assert shown(out) == stdout
    rows = json.loads(out.read_text())["results"]
    for network in names:
        of_network = {row["contender"]: row for row in rows if row["stem"] == network}
        assert {"ours dynamic", "ours static", "ours static chained", "fp32", "bf16"} <= of_network.keys()
        # int8 between the layers is what the next layer would have made of the float; only an average of codes loses a little
        assert abs(of_network["ours static"]["sqnr_db"] - of_network["ours static chained"]["sqnr_db"]) < 0.5
        # the others' sums may saturate where the processor has no VNNI
        assert all(row["sqnr_db"] > 20 for name, row in of_network.items() if name.startswith(("ours", "fp32", "bf16")))


def test_generation_script(tmp_path):
    out = tmp_path / "generation.json"
    options = ("--smoke", "--threads", "1", "--prompts", "16", "--tied", "--seconds", "0", "--rounds", "1", "--out", str(out))
    own = [f"ours {scheme}" for scheme in ("int8 dynamic", "int8 weight-only", "int4 weight-only", "W4A8")]
    stdout = run("-m", "benchmarks.packages.generation", *options, "--contenders", *own, "bf16")
    if stdout.startswith("skipped: "):
        pytest.skip(stdout)
    assert shown(out) == stdout
    rows = json.loads(out.read_text())["results"]
    assert {(row["stem"], row["contender"]) for row in rows} == {
        (stem, name) for stem in ("prompt", "decode", "layers") for name in (*own, "fp32", "bf16")
    }
    size = {row["contender"]: row["bytes"] for row in rows}
    # the head shares the weight of the embedding where both are quantized
    assert size["ours int4 weight-only"] < size["ours int8 weight-only"] < size["ours int8 dynamic"] < size["bf16"] < size["fp32"]
    assert size["ours int4 weight-only"] < size["ours W4A8"] < size["bf16"]


def test_calibration_script():
    stdout = run("-m", "benchmarks.packages.calibration", "--smoke")
    observers = ("minmax", "ema", "percentile", "mse", "entropy", "histogram", "lsq")
    assert all(f"  {observer:<12}" in stdout for observer in observers)


def test_gpu_scripts_rehearse(tmp_path):
    """The code that runs on a GPU, on small CPU tensors."""
    out = tmp_path / "gpu.json"
    machine = {"gpu": None, "torch": "any", "date": "today"}
    begun = {"kind": "gpu", "machine": machine, "stages": {}, "cut": [], "ceilings": [], "missing": {}, "results": []}
    out.write_text(json.dumps(begun))
    sections = ("ceilings", "linear", "conv2d", "rows", "elementwise", "floats", "kernels")
    options = ("--rehearse", "--no-compile", "--seconds", "600")  # rows are left out when the time is up
    run("-m", "benchmarks.gpu.bench", "--out", str(out), "--section", *sections, *options)
    data = json.loads(out.read_text())
    assert not data["cut"]
    assert not [name for name in data["missing"] if name.startswith(("ours", "all", "bf16", "eager"))]
    assert {row["contender"] for row in data["results"]} >= {"ours", "ours dynamic", "ours static", "bf16", "fp16", "eager"}
    stems = {row["stem"] for row in data["results"]}
    assert stems >= {"linear", "gemm", "conv2d", "quantize_rows", "choose_qparams", "quantize to int8", "backward", "floats"}
    assert all(row["floor_us"] > 0 and 0 < row["min_us"] <= row["median_us"] for row in data["results"])
    tables = shown(out)
    assert all(f"| {stem} |" in tables for stem in stems)
    assert run("-m", "benchmarks.gpu.smoke", "--rehearse") == "smoke finished\n"  # no operator is left out
    assert run("-m", "benchmarks.gpu.digest", "--out", str(out), "--rehearse").endswith("all the same\n")
    assert len(json.loads(out.read_text())["digests"]) >= 12


def test_gpu_check_is_found_where_it_was(tmp_path):
    """From any folder, by the path that others call."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--rehearse" in done.stdout


def test_gpu_check_names_tests_that_exist():
    assert [name for name in check.CPU_TESTS if not (ROOT / name).exists()] == []


def test_tables_of_results():
    """What is in the repository can be shown."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        assert "|--:|" in shown(path), path.name
