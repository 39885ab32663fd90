"""One layer in float and in int8, timed in turns, after the int8 result has been checked: ``python -m quant_ops bench``.

A quick look at one shape on one machine. The folder benchmarks/ of the sources has the thorough comparison.
"""

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _library
from ..nn import INT8_LAYERS
from ..ops import choose_qparams
from .error import sqnr
from .timing import duration, interleave

_LEAST_SQNR = 30.0  # dB: less is a wrong result, not a rounding error


class CheckFailed(RuntimeError):
    """The int8 result is wrong."""


def linear(bs: int = 512, cin: int = 960, cout: int = 960, *, seconds: float = 1.0) -> dict[str, Any]:
    """Times ``nn.Linear(cin, cout)`` on a batch of ``bs`` rows."""
    return _bench(nn.Linear(cin, cout), (bs, cin), f"linear bs={bs} cin={cin} cout={cout}", 2 * bs * cin * cout, seconds)


def conv2d(
    bs: int = 1,
    cin: int = 960,
    cout: int = 960,
    h: int = 64,
    w: int = 64,
    k: int = 3,
    p: int = 0,
    *,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Times ``nn.Conv2d(cin, cout, k, padding=p)`` on ``bs`` images of h x w."""
    operations = 2 * bs * cin * cout * k * k * (h + 2 * p - k + 1) * (w + 2 * p - k + 1)
    shape = f"conv2d bs={bs} cin={cin} cout={cout} h={h} w={w} k={k} p={p}"
    return _bench(nn.Conv2d(cin, cout, k, padding=p), (bs, cin, h, w), shape, operations, seconds)


def _bench(layer: nn.Module, shape: tuple[int, ...], title: str, operations: int, seconds: float) -> dict[str, Any]:
    device = "cuda" if _library.cuda_library is not None and torch.cuda.is_available() else "cpu"
    half = torch.float16 if device == "cuda" else torch.bfloat16  # the dtype that each device multiplies fast
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device)
    layer = layer.to(device).eval().requires_grad_(False)
    scale, _ = choose_qparams(x, [], -127, 127)
    kind = INT8_LAYERS[type(layer)]
    dynamic, static = kind.from_float(layer), kind.from_float(layer, input_scale=scale)
    reference = layer(x)
    quality = {name: sqnr(reference, quantized(x)) for name, quantized in (("dynamic", dynamic), ("static", static))}
    for name, found in quality.items():
        if found < _LEAST_SQNR:
            raise CheckFailed(f"quant_ops.bench: expected an SQNR of {_LEAST_SQNR} dB of {title}, {name}, got {found:.1f}")
    layer_half, x_half = copy.deepcopy(layer).to(half), x.to(half)
    calls: dict[str, Callable[[], Tensor]] = {
        "FP32": lambda: layer(x),
        "FP16" if half == torch.float16 else "BF16": lambda: layer_half(x_half),
        "INT8 dynamic": lambda: dynamic(x),
        "INT8 static": lambda: static(x),
    }
    with torch.no_grad():
        samples = interleave(calls, seconds=seconds, rounds=5, synchronize=torch.cuda.synchronize if device == "cuda" else None)
    times = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "title": title,
        "device": device,
        "threads": torch.get_num_threads(),
        "kernel": _library.gemm_kernel() if device == "cpu" else device,
        "sqnr_db": quality,
        "seconds": times,
        "tera_operations_per_second": {name: operations / t / 1e12 for name, t in times.items()},
    }


def text(result: dict[str, Any]) -> str:
    """The result for people."""
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    lines = [f"{result['title']} on {result['device']}, {threads}, kernel {result['kernel']}"]
    slowest = result["seconds"]["FP32"]
    for name, t in result["seconds"].items():
        rate = result["tera_operations_per_second"][name]
        lines.append(f"  {name:<14}{duration(t):>8}  {rate:8.3f} Tera-operations/s  {slowest / t:6.2f} x FP32")
    return "\n".join([*lines, "  SQNR: " + ", ".join(f"{name} {value:.1f} dB" for name, value in result["sqnr_db"].items())])
