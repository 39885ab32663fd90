"""Fixtures: every instruction set this machine runs, thread counts, and seeds."""

import os

import operands
import pytest
import sweep
import torch
from compiled import ROOT, compiled_for_host

from quant_ops import _library

# Workers of pytest-xdist share the cores, also with the processes that they start. Tests of thread counts set their own.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(params=_library.isas())
def isa(request):
    """Runs the test once with each instruction set."""
    yield _library.set_isa(request.param)
    _library.set_isa(None)


@pytest.fixture(autouse=True)
def _seed():
    """The same numbers for a test alone, after any other, and on any worker."""
    torch.manual_seed(0)
    operands.generator.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated_library():
    """The library of the CUDA operators with their kernels run on the host (host_emulation.h), for tensors of the CPU."""
    folders = (ROOT / "cuda", ROOT / "cuda" / "engine")
    sources = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".cu", ".cpp"))
    sources = [*(path.relative_to(ROOT) for path in sources), "cpp/torch/library_cuda.cpp"]
    return compiled_for_host("libquant_ops_emulated", sources, "-DQUANT_OPS_EMULATION", shared=True)


@pytest.fixture(scope="session")  # operators can be registered once in a process
def emulated(emulated_library):
    """Its operators."""
    torch.ops.load_library(emulated_library)
    return torch.ops.quant_ops_emulated


def pytest_collection_modifyitems(config, items):
    skip = pytest.mark.skip(reason="no CUDA device")
    sampled = {}
    for item in items:
        if "cuda" in item.keywords:
            if not torch.cuda.is_available():
                item.add_marker(skip)
        elif mark := item.get_closest_marker("sampled"):
            sampled.setdefault((item.nodeid.split("[")[0], *mark.args), []).append(item)
    for (test, count), cases in sampled.items():
        if len(cases) > 1:  # one alone was asked for by its name
            left_out = set(cases) - set(sweep.part(cases, count, test))
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)
