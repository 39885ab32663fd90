"""What the results say of the machine, and the limits that it sets: the int8 peak, and the bandwidth of reading."""

import concurrent.futures
import ctypes
import datetime
import functools
import importlib.metadata
import os
import time

import torch

from quant_ops import info

try:
    from quant_ops import _kernels
except ImportError:  # an ordinary install leaves the test module out; the share of the peak is then not reported
    _kernels = None

PACKAGES = ("torchao", "onnxruntime", "onnx", "transformers", "llama_cpp_python")


def checked():
    """What info.collect() reports, and the int8 peak of as many threads in GOP/s (None without the module of micro-kernels)."""
    report = info.collect()
    assert report["status"] == "OK", report["status"]
    return {**report, "peak_gops": peak_gops(report["isa"], report["threads"])}


def describe(cpu=None):
    """The machine as it stands in a results file: processor, versions, threads, load and peak."""
    report = checked()
    return {
        "cpu": cpu or report["cpu"],
        **{key: report[key] for key in ("isa", "threads", "torch", "quant_ops", "python")},
        "packages": {package: _version(package) for package in PACKAGES},
        "kernel": report["kernels"]["int8_linear"],
        "date": datetime.date.today().isoformat(),
        "load_before": round(os.getloadavg()[0], 2),
        "peak_gops": report["peak_gops"],
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_gops(isa, threads):
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


@functools.lru_cache
def read_gbs(size, threads):
    """GB/s of `threads` threads that read a buffer of `size` bytes again and again with C's memchr, each its own part."""
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    part = max(size // threads, 1 << 18)  # with fewer bytes the call itself would be measured
    buffer = torch.ones(part * threads, dtype=torch.uint8)
    repeats, best = max(2, (1 << 26) // part), 0.0

    def read(thread):
        for _ in range(repeats):
            assert memchr(buffer.data_ptr() + thread * part, 0, part) is None

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + 0.3
        while (start := time.perf_counter()) < end:
            list(pool.map(read, range(threads)))
            best = max(best, part * threads * repeats / (time.perf_counter() - start) / 1e9)
    return best


def limit_us(macs, size, machine):
    """The time that no int8 layer can beat: all products at the peak, or one pass over `size` bytes. None without a peak."""
    if machine["peak_gops"] is None:
        return None
    return max(2 * macs / machine["peak_gops"], size / read_gbs(size, machine["threads"])) / 1e3
