"""The operators and an AOTInductor package in a C++ program without Python: tests/cpp_program, which docs/cpp.md explains."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compiled import CACHE, CXX, ROOT
from torch import nn

import quant_ops as qo

CMAKE = shutil.which("cmake")

pytestmark = pytest.mark.skipif(CMAKE is None or CXX is None, reason="no cmake or no C++ compiler")


def run(*command, **environment) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def build() -> Path:
    """The configured program; it is kept, so that it is compiled again only where something has changed."""
    folder = CACHE / f"cpp_program-{torch.__version__}"
    prefixes = f"{torch.utils.cmake_prefix_path};{qo.cmake_prefix_path}"
    run(CMAKE, "-S", ROOT / "tests/cpp_program", "-B", folder, f"-DCMAKE_PREFIX_PATH={prefixes}", f"-DCMAKE_CXX_COMPILER={CXX}")
    return folder


def test_the_package_is_found_by_cmake(build):
    cache = (build / "CMakeCache.txt").read_text()
    assert f"quant_ops_DIR:PATH={qo.cmake_prefix_path}/quant_ops\n" in cache
    assert (
        Path(qo.cmake_prefix_path, "quant_ops", "quant_opsConfig.cmake").read_text()
        == (ROOT / "cmake/quant_opsConfig.cmake").read_text()
    )


@pytest.mark.slow
def test_a_program_without_python(build, tmp_path):
    """It runs a compiled model and an operator, and gives the same bits as Python, with every instruction set."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    qo.quantize_(model)
    x = torch.randn(4, 64)
    program = torch.export.export(model, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    expected = model(x)
    assert torch.equal(torch._inductor.aoti_load_package(package)(x), expected)

    run(CMAKE, "--build", build)
    torch.save(x, tmp_path / "x.pt")
    for isa in {qo._library.isas()[-1], "scalar"}:
        output = run(build / "run_package", package, tmp_path / "x.pt", tmp_path / "y.pt", QUANT_OPS_ISA=isa)
        assert torch.equal(torch.load(tmp_path / "y.pt"), expected)
        assert int(output) == qo.quantize_rows(x)[0].sum()
