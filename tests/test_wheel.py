"""What `make wheel` and `make wheel-cuda` put into dist/, and what a user can do with the wheel alone.

The wheel is that of QUANT_OPS_TEST_WHEEL, or the one in dist/, or made; making it takes minutes.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from compiled import ROOT

import quant_ops as qo
from quant_ops import _library

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("pip._vendor.tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd=ROOT, **environment) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


# ---- the library of any build --------------------------------------------------------------------------------------------


def newer(version: str, than: str) -> bool:
    return [int(n) for n in version.split(".")] > [int(n) for n in than.split(".")]


@pytest.mark.skipif("linux-x86_64" not in sysconfig.get_platform() or shutil.which("nm") is None, reason="Linux, x86-64 and nm")
def test_the_library_runs_on_old_systems():
    """Nothing newer than glibc 2.17 and gcc 5's libstdc++, and nothing of libstdc++ that a certain torch would have to export."""
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", _library.cpu_library).splitlines()]
    asked = {match.groups() for s in symbols if (match := re.search(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)$", s))}
    newest = {"GLIBC": "2.17", "GLIBCXX": "3.4.21", "CXXABI": "1.3.9"}
    assert not [(name, version) for name, version in asked if newer(version, newest[name])]
    assert not [s for s in symbols if s.startswith("_Z") and "@" not in s]
    shown = [line.split() for line in run("nm", "-D", "--defined-only", _library.cpu_library).splitlines()]
    assert not [name for *_, kind, name in shown if kind != "t" and not name.startswith("quant_ops_")]


# ---- wheels and the sdist ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> Path:
    given = os.environ.get("QUANT_OPS_TEST_WHEEL")
    if given:
        return Path(given).resolve()
    found = list((ROOT / "dist").glob(f"quant_ops-{qo.__version__}-py3-none-manylinux*.whl"))
    if not found:
        run("make", "wheel")
        found = list((ROOT / "dist").glob(f"quant_ops-{qo.__version__}-py3-none-manylinux*.whl"))
    return max(found, key=lambda path: path.stat().st_mtime)


@pytest.mark.slow
def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as file:
        contents = {name: file.read(name) for name in file.namelist() if not name.endswith("/")}
    metadata = f"quant_ops-{qo.__version__}.dist-info/"
    library = contents.pop("quant_ops/libquant_ops.so")
    for name in ("quant_ops/py.typed", "quant_ops/share/cmake/quant_ops/quant_opsConfig.cmake", metadata + "licenses/LICENSE"):
        assert name in contents
    python = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py")}
    assert {name for name in contents if name.endswith(".py")} == python
    rest = {name for name in contents if not name.startswith(metadata) and not name.endswith(".py")}
    assert rest == {"quant_ops/py.typed", "quant_ops/share/cmake/quant_ops/quant_opsConfig.cmake"}  # no sources, no tests
    for folder in {str(ROOT), sysconfig.get_path("platlib"), str(Path(torch.__file__).parent), str(Path.home())} - {"/"}:
        assert folder.encode() not in library, folder
        assert not [name for name, content in contents.items() if folder.encode() in content], folder
    tags = re.findall(r"^Tag: (.*)$", contents[metadata + "WHEEL"].decode(), re.MULTILINE)
    assert all(tag.startswith("py3-none-manylinux_2_") for tag in tags), tags
    assert all(int(tag.split("_")[2]) <= 28 for tag in tags), tags


@pytest.mark.slow
def test_what_the_sdist_holds(tmp_path):
    """All that a build needs, and nothing large."""
    run(sys.executable, "-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})")
    (path,) = tmp_path.glob("*.tar.gz")
    assert path.stat().st_size < 4 << 20
    with tarfile.open(path) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    tracked = run("git", "ls-files", "cmake", "cpp", "cuda", "python", "CMakeLists.txt", "LICENSE", "pyproject.toml").split()
    assert set(tracked) <= names
    assert not [name for name in names if name.startswith(("build/", "dist/", ".venv/"))]


@pytest.mark.slow
def test_a_user_without_the_sources(wheel, tmp_path):
    """In a fresh environment, with this torch; QUANT_OPS_TEST_PYTHONS names Pythons of environments that have another torch."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    fresh = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    for package in ("torch", "torchgen", "numpy", "numpy.libs", "safetensors", "tqdm", "typing_extensions.py", "sympy", "mpmath"):
        installed = Path(torch.__file__).parent.parent / package
        if installed.exists():
            (fresh / package).symlink_to(installed.resolve())
    for package in ("filelock", "fsspec", "jinja2", "markupsafe", "networkx"):
        if (installed := Path(torch.__file__).parent.parent / package).exists():
            (fresh / package).symlink_to(installed.resolve())
    pythons = [environment / "bin/python", *os.environ.get("QUANT_OPS_TEST_PYTHONS", "").split(os.pathsep)]
    here = run(sys.executable, ROOT / "tests/wheel_smoke.py").splitlines()[-1]
    assert here.startswith("bits ")
    assert run(sys.executable, ROOT / "tests/wheel_smoke.py", QUANT_OPS_ISA="scalar").splitlines()[-1] == here
    for i, python in enumerate(p for p in pythons if str(p)):
        target = tmp_path / f"wheel{i}"
        run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel)
        alone = {"cwd": tmp_path, "PYTHONPATH": str(target)}
        assert run(python, "-m", "quant_ops", "info", **alone).splitlines()[-1] == "OK"
        found = run(python, "-c", "import quant_ops; print(quant_ops.__file__)", **alone)
        assert Path(found.strip()).is_relative_to(target)
        assert run(python, ROOT / "tests/wheel_smoke.py", **alone).splitlines()[-1] == here


# ---- the second distribution ---------------------------------------------------------------------------------------------


def test_the_extra_asks_for_this_version():
    assert PROJECT["optional-dependencies"]["cuda"] == [f"quant_ops_cuda=={PROJECT['version']}"]


@pytest.fixture
def cuda_package(tmp_path, monkeypatch):
    """Makes a distribution quant_ops_cuda of a version, whose library holds nothing."""

    def make(version: str) -> Path:
        (tmp_path / "quant_ops_cuda").mkdir()
        (tmp_path / "quant_ops_cuda/__init__.py").touch()
        library = tmp_path / "quant_ops_cuda/libquant_ops_cuda.so"
        library.touch()
        information = tmp_path / f"quant_ops_cuda-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quant_ops_cuda\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return library

    monkeypatch.delenv("QUANT_OPS_LIBRARY_DIR", raising=False)
    monkeypatch.setattr(_library, "_find", lambda name: None)  # none beside the package
    return make


def test_the_cuda_library_of_the_second_distribution(cuda_package):
    library = cuda_package(qo.__version__)
    assert _library._find_cuda() == (library, "")


def test_a_cuda_library_of_another_version_is_refused(cuda_package):
    cuda_package("0.0.1")
    path, reason = _library._find_cuda()
    assert path is None
    assert reason == (
        f"expected quant_ops_cuda {qo.__version__}, the version of quant_ops, got 0.0.1. "
        f"Install it with: pip install quant_ops_cuda=={qo.__version__}"
    )


def test_no_cuda_library(monkeypatch):
    monkeypatch.setattr(_library, "_find", lambda name: None)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    path, reason = _library._find_cuda()
    assert path is None
    assert "pip install 'quant_ops[cuda]'" in reason


@pytest.mark.slow
def test_the_wheel_of_the_second_distribution(tmp_path):
    """Its steps, with a library that is built already: the CPU's stands for CUDA's."""
    library = tmp_path / "libquant_ops_cuda.so"
    shutil.copy(_library.cpu_library, library)
    run("make", "wheel-cuda", f"CUDA_LIBRARY={library}", f"DIST={tmp_path}")
    (path,) = tmp_path.glob(f"quant_ops_cuda-{qo.__version__}-py3-none-manylinux*.whl")
    with zipfile.ZipFile(path) as file:
        names = {name for name in file.namelist() if not name.endswith("/") and ".dist-info/" not in name}
        assert any(name.endswith("licenses/LICENSE") for name in file.namelist())
    assert names == {"quant_ops_cuda/__init__.py", "quant_ops_cuda/libquant_ops_cuda.so"}
