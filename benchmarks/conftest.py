"""Shared by the benchmarks: options, the machine's int8 peak, and `measure`, which times a call and says what its time means.

A run: python -m pytest benchmarks --benchmark-json=out.json. Read next: README.md, shapes.py.
"""

import concurrent.futures
import time
import warnings

import pytest
import shapes
import torch

import quant_ops as qo
from quant_ops import info

try:
    from quant_ops import _kernels
except ImportError:  # an ordinary install leaves the test module out; the share of the peak is then not reported
    _kernels = None


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="torch threads (default 1)")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    config.addinivalue_line("markers", "smoke: the smallest shapes, which keep the benchmarks alive in the tests")
    torch.set_num_threads(config.getoption("--threads"))
    # torch.ao's quantized tensors, which some contenders are made of, announce their removal on every use
    warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(min_rounds=5, max_time=0.3, disable_gc=True))
        if item.callspec.params["case"][0] in shapes.SMOKE:
            item.add_marker(pytest.mark.smoke)


def cases(sets):
    """Parametrizes a benchmark over (name of the set, shape)."""
    return pytest.mark.parametrize(
        "case", [pytest.param((name, s), id=f"{name}-{_text(s)}") for name, shapes_ in sets.items() for s in shapes_]
    )


def _text(shape):
    return str(shape) if hasattr(shape, "macs") else "x".join(map(str, shape))


def sqnr(reference, result):
    """Signal to noise in dB; how closely an approximate contender computes the same thing."""
    reference, result = reference.double(), result.double()
    return (20 * torch.log10(reference.norm() / (reference - result).norm().clamp_min(1e-300))).item()


def _peak_gops(isa, threads):
    """Multiplications and additions per nanosecond of `threads` threads that run the multiply-accumulate instruction alone."""
    if _kernels is None or _kernels.peak(isa, 1000) == 0:
        return None
    iterations, best = 1_000_000, 0.0  # milliseconds, beside which handing the work to threads costs nothing
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + 1.0  # long enough for the clock to rise and for a moment without other work
        while (start := time.perf_counter()) < end:
            macs = sum(pool.map(_kernels.peak, [isa] * threads, [iterations] * threads))
            best = max(best, 2 * macs / (time.perf_counter() - start) / 1e9)
    return best


@pytest.fixture(scope="session")
def machine():
    """What info.collect() says of this machine, and its int8 peak in GOP/s."""
    report = info.collect()
    assert report["status"] == "OK"
    return {**report, "peak_gops": _peak_gops(report["isa"], report["threads"])}


@pytest.fixture
def measure(benchmark, machine):
    """Times call() in the group of its stem and shape.

    macs: multiply-accumulates, reported as GOP/s (2 a MAC) and, for int8 (`share`), as a share of the int8 peak.
    memory: bytes that have to be read and written at least once, reported as GB/s.
    """

    def run(call, *, stem, case, contender, macs=None, memory=None, share=False, detail=""):
        benchmark.group = f"{stem} {_text(case[1])}{detail}"
        benchmark.extra_info.update(
            stem=stem,
            set=case[0],
            shape=_text(case[1]) + detail,
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
