"""Options of a run, and `measure`, which times a call with pytest-benchmark and says what its time means.

A run: python -m pytest benchmarks/operators --benchmark-json=out.json. Read next: bench_linear.py, cases.py.
"""

import warnings

import pytest
import torch

import quant_ops as qo
from benchmarks.common import machine as this_machine
from benchmarks.common import shapes


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="torch threads (default 1)")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    config.addinivalue_line("markers", "smoke: the smallest shapes, which keep the benchmarks alive in the tests")
    torch.set_num_threads(config.getoption("--threads"))
    # some contenders use torch.ao's quantized tensors, which announce their removal on every use
    warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(min_rounds=5, max_time=0.3, disable_gc=True))
        if item.callspec.params["case"][0] in shapes.SMOKE:
            item.add_marker(pytest.mark.smoke)


@pytest.fixture(scope="session")
def machine():
    """What info.collect() says of this machine, and its int8 peak in GOP/s."""
    return this_machine.checked()


@pytest.fixture
def measure(benchmark, machine):
    """Times call() in the group of its stem and shape.

    macs: multiply-accumulates, reported as GOP/s (2 a MAC) and, for int8 (`share`), as a share of the int8 peak.
    memory: bytes that must be read or written at least once, reported as GB/s.
    """

    def run(call, *, stem, case, contender, macs=None, memory=None, share=False, detail=""):
        benchmark.group = f"{stem} {shapes.text(case[1])}{detail}"
        benchmark.extra_info.update(
            stem=stem,
            set=case[0],
            shape=shapes.text(case[1]) + detail,
            contender=contender,
            threads=machine["threads"],
            isa=machine["isa"],
            kernel=machine["kernels"].get(stem),
            torch=machine["torch"],
            quant_ops=qo.__version__,
            cpu=machine["cpu"],
            peak_gops=machine["peak_gops"],
        )
        with torch.inference_mode():
            result = benchmark(call)
        if benchmark.stats is None:  # --benchmark-disable
            return result
        seconds = benchmark.stats.stats.min
        if macs:
            benchmark.extra_info["gops"] = 2 * macs / seconds / 1e9
            if share and machine["peak_gops"]:
                benchmark.extra_info["percent_of_peak"] = 100 * benchmark.extra_info["gops"] / machine["peak_gops"]
        if memory:
            benchmark.extra_info.update(bytes=memory, gbs=memory / seconds / 1e9)
        return result

    return run
