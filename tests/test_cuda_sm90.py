"""What can be checked of the Hopper engine (cuda/engine/sm90) without a GPU.

* Which problems it takes, and the arguments it gives to CUTLASS, on the host: sm90_rules.cpp and sm90_arguments.cu.
* Of the library that ``make cuda-build`` makes: each kernel multiplies by the asynchronous matrix instruction, loads and stores
  through TMA, has the fused multiply-add of the formula, and keeps everything in registers.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from compiled import ROOT, compiled, compiled_for_host
from test_cuda_build import BUILD, BUILT, needs_compiler

# name, m, n, k, cluster, stages, warpgroups, cooperative, swapped, blocks per multiprocessor
TILES = re.findall(
    r'\{"gemm_s8s8_(\w+)_sm90a", (\d+), (\d+), (\d+), (\d+), (\d+), (\d+), (\w+), (\w+), (\d+)\}',
    (ROOT / "cuda" / "engine" / "sm90" / "sm90.h").read_text(),
)
DTYPES = 3


def cuobjdump() -> str | None:
    """The disassembler: of the CUDA toolkit, or the one that Triton carries."""
    triton = find_spec("triton")
    carried = [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations or [])] if triton else []
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *carried]))


def commands() -> list[str]:
    """How the build compiles the engine; empty where the library is built without it."""
    database = BUILD / "compile_commands.json"
    entries = json.loads(database.read_text()) if database.is_file() and BUILT.is_file() else []
    return [entry["command"] for entry in entries if "/engine/sm90/gemm_" in entry["file"]]


needs_engine = pytest.mark.skipif(not commands(), reason="the library is not built, or without the Hopper engine: make cuda-build")


@needs_compiler
def test_takes_what_is_legal():
    program = compiled_for_host("sm90_rules", ["tests/sm90_rules.cpp"], "-O2")
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_engine
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_arguments_compute_the_formula():
    command = re.sub(r" -x cu -c .*", "", commands()[0]).replace("-O3", "-O1").replace("-Xptxas -v", "")
    compiler, *flags = shlex.split(command)
    program = compiled("sm90_arguments", ["tests/sm90_arguments.cu"], [*flags, "-Icuda"], compiler=compiler)
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_engine
def test_kernels_stay_in_registers():
    """65 536 registers per multiprocessor, for all blocks that should be there at once."""
    assert len(TILES) == len(commands())
    for name, *_, warpgroups, _cooperative, _swapped, blocks in TILES:
        log = (BUILD / f"ptxas-gemm_{name}.cu.o.log").read_text()
        usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert usage == [("0", "0", "0")] * DTYPES, name
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
        threads = 128 * (int(warpgroups) + 1)  # one more warpgroup loads
        assert len(registers) == DTYPES, name
        assert max(registers) * threads * int(blocks) <= 65536, name
        assert not re.search(r"serializ|setmaxnreg", log), name  # what ptxas says when it gives up on wgmma


@needs_engine
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: it comes with the CUDA toolkit, and with triton")
@pytest.mark.parametrize("tile", TILES, ids=[tile[0] for tile in TILES])
def test_kernels_use_hopper_instructions(tile):
    name, (m, n, k, cluster), cooperative = tile[0], map(int, tile[1:5]), tile[7] == "true"
    tool = cuobjdump()
    (built,) = BUILD.glob(f"**/gemm_{name}.cu.o")
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])}  # it calls nvdisasm
    text = subprocess.run([tool, "-sass", built], check=True, capture_output=True, text=True, env=environment).stdout
    kernels = text.split("Function : ")[1:]
    assert len(kernels) == DTYPES
    for sass in kernels:
        products = re.findall(r"IGMMA\.(\w+)\.S8\.S8", sass)
        assert set(products) == {f"64x{n}x32"}
        # a step of k is unrolled, once or more
        assert len(products) % (k // 32 * m // (128 if cooperative else 64)) == 0
        assert "UTMALDG.3D" in sass
        assert ("UTMALDG.3D.MULTICAST" in sass) == (cluster > 1)
        assert "UTMASTG.3D" in sass
        assert not re.search(r"\b(LDL|STL)\b", sass)
        # per element of the tile and thread: one conversion, one product of the scales, one fused multiply-add
        elements = m * n // (256 if cooperative else 128)
        assert len(re.findall(r"\bI2FP\.F32\.S32\b", sass)) == len(re.findall(r"\bFFMA\b", sass)) == elements
        assert len(re.findall(r"\bFMUL\b", sass)) >= elements
