"""The examples run, keep what they promise, and write what they say."""

import importlib.util
from pathlib import Path

import pytest
from processes import python

from quant_ops.convert import files

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["vision", "text_encoder"])
def test_quick(name, tmp_path):
    command = [EXAMPLES / f"{name}.py", "--quick", "--out", tmp_path]
    done = python(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("OK: int8 is within one point of float32\n")
    assert "the same bits" in done.stdout
    assert len(files.read_header(tmp_path / f"{name}.safetensors")["layers"]) >= 3


def test_formats(tmp_path):
    command = [EXAMPLES / "formats.py", "--quick", "--out", tmp_path]
    done = python(*command)
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


def test_simulation(tmp_path):
    command = [EXAMPLES / "simulation.py", "--quick", "--out", tmp_path]
    done = python(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("OK: 8 bits keep what the models have learned\n")
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")
    lines = done.stdout.split("\n\n")[0].splitlines()[1:]
    rows = {line[:14].strip(): [float(cell.strip("% dB")) for cell in line[14:].replace(" dB", "").split()] for line in lines}
    assert len(rows) == 14
    assert rows["MXFP4 (E2M1)"][0] == 4.25
    accuracy, perplexity, sqnr = ({name: row[i] for name, row in rows.items()} for i in (1, 2, 3))
    assert accuracy["INT2"] < 20 < accuracy["INT3"] < accuracy["INT8"]
    assert perplexity["INT8"] < perplexity["INT4"] < perplexity["INT3"] < perplexity["INT2"]
    assert sqnr["float32"] == float("inf")
    assert [sqnr[f"INT{bits}"] for bits in (2, 3, 4, 6, 8)] == sorted(sqnr[f"INT{bits}"] for bits in (2, 3, 4, 6, 8))
    # a mantissa's bit is worth 6 dB, a smaller block of the same elements some, and more exponents none where a scale is there
    assert 5 < sqnr["E4M3"] - sqnr["E5M2"] < 7
    assert sqnr["NVFP4"] > sqnr["MXFP4 (E2M1)"] + 1
    assert abs(sqnr["E5M2"] - sqnr["E3M2"]) < 0.5


def test_generation(tmp_path):
    command = [EXAMPLES / "generation.py", "--quick", "--out", tmp_path]
    done = python(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("OK: files give the same bits, and perplexities are near that of float32\n")
    rows = {line[:20].strip(): [float(figure) for figure in line[20:].split()] for line in done.stdout.splitlines()[1:6]}
    assert list(rows) == ["float32", "int8 dynamic", "int8 weight-only", "int4 weight-only", "int4, int8 inputs"]
    assert rows["int4 weight-only"][1] < 0.75 * rows["int8 weight-only"][1] < 0.25 * rows["float32"][1]
    assert 1 < rows["float32"][0] < 40


def test_accuracy():
    command = [EXAMPLES / "accuracy.py", "--quick"]
    done = python(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("OK: int8 costs less than a percent, and each method saves what it has to\n")
    rows = {line[:28].strip(): line[28:].split() for line in done.stdout.splitlines()[1:-1]}
    assert {"float32", "int8 dynamic", "int8 weight-only", "int4, rows", "int4, rows, GPTQ"} <= rows.keys()
    assert all(0.99 < float(row[0]) / float(rows["float32"][0]) < 1.02 for row in rows.values())


def test_adapters():
    done = python(EXAMPLES / "adapters.py", "--quick")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("OK: adapters on quantized weights learn what those on float32 do, within two points\n")
    rows = {line[2:28].strip(): line[28:].split() for line in done.stdout.splitlines() if " -> " in line and "%" in line}
    rows = {name: cells for name, cells in rows.items() if cells[-1] == "parameters"}
    assert {"float32, by hand", "int8, by hand", "int4 weights, by hand"} <= rows.keys()
    for cells in rows.values():
        first, last = float(cells[0]), float(cells[8])
        assert last < 0.1 * first


SIMULATED = {
    "opt": ("transformers", ["--layers", "1", "--steps", "3"]),
    "codegen": ("transformers", ["--layers", "1", "--steps", "3", "--tokens", "2"]),
    "maskformer": ("transformers", ["--images", "1"]),
    "stable_diffusion": ("diffusers", ["--size", "8", "--steps", "2"]),
    "graphormer": (None, ["--graphs", "16"]),
    "imagebind": (None, ["--images", "16"]),
}
SLOW = ("codegen", "maskformer", "stable_diffusion")  # ten seconds each; the others use the same parts of the package


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SIMULATED])
def test_int_fp_qsim(name):
    needed, arguments = SIMULATED[name]
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    command = [EXAMPLES / "int_fp_qsim" / f"{name}.py", *arguments]
    done = python(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    heading, *lines = done.stdout.splitlines()
    columns = heading.count("%") + heading.count("dB") + heading.count("perplexity")
    rows = {line.rsplit(maxsplit=columns)[0]: [float(figure) for figure in line.split()[-columns:]] for line in lines}
    assert {"E4M3, E4M3, FP16", "INT8, INT8, FP16", "INT4, INT4, FP16"} < rows.keys()
    if "dB" in heading:
        decibels = {row: figures[1 if name == "opt" else 0] for row, figures in rows.items()}
        assert decibels["INT8, INT8, FP16"] > decibels["INT4, INT4, FP16"] + 10
        assert decibels["E4M3, E4M3, FP16"] > decibels["E5M2, E5M2, FP16"] + 2
        assert 10 < decibels["E4M3, E4M3, FP16"] < 60


@pytest.mark.parametrize(("name", "needed"), [(name, needed) for name, (needed, _) in SIMULATED.items() if needed])
def test_int_fp_qsim_without_the_package(name, needed):
    script = EXAMPLES / "int_fp_qsim" / f"{name}.py"
    code = f"import runpy, sys; sys.modules['{needed}'] = None; sys.path.insert(0, r'{script.parent}'); sys.argv = ['{name}']; "
    command = ["-c", code + f"runpy.run_path(r'{script}', run_name='__main__')"]
    done = python(*command)
    assert done.returncode == 1
    assert done.stderr.startswith(f"this example needs {needed} (")
    assert done.stderr.endswith(f"): pip install {needed}\n")
