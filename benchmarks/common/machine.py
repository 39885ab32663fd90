"""What the results say of the machine, and the limits that it sets: the int8 peak, and the bandwidth of reading."""

import datetime
import importlib.metadata
import os

from quant_ops import info
from quant_ops._memory import is_kept
from quant_ops.report.limits import limit_seconds, peak_gops, read_gbs

PACKAGES = ("torchao", "onnxruntime", "onnx", "transformers", "llama_cpp_python")


def checked():
    """What info.collect() reports, and the int8 peak of as many threads in GOP/s (None if the instruction set has none)."""
    report = info.collect()
    assert report["status"] == "OK", report["status"]
    return {**report, "peak_gops": peak_gops(report["threads"])}


def describe(cpu=None):
    """The machine as it stands in a results file: processor, versions, threads, load and peak."""
    report = checked()
    return {
        "cpu": cpu or report["cpu"],
        **{key: report[key] for key in ("isa", "threads", "torch", "quant_ops", "python")},
        "packages": {package: _version(package) for package in PACKAGES},
        "memory_kept": is_kept(),
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


def limit_us(macs, size, machine):
    """The time that no int8 layer can beat: all products at the peak, or one pass over `size` bytes. None without a peak."""
    if machine["peak_gops"] is None:
        return None
    return limit_seconds(macs, size, machine["peak_gops"], read_gbs(size, machine["threads"])) * 1e6
