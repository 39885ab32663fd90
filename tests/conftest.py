"""Fixtures: every instruction set this machine runs, thread counts, and seeds."""

import pytest
import torch

from quant_ops import _library


@pytest.fixture(params=_library.isas())
def isa(request):
    """Runs the test once with each instruction set."""
    yield _library.set_isa(request.param)
    _library.set_isa(None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
