"""torchao's ``utils``: timing and profiling of a model."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .quantization.utils import find_multiple, unwrap_tensor_subclass

__all__ = [
    "benchmark_model",
    "benchmark_torch_function_in_microseconds",
    "find_multiple",
    "profiler_runner",
    "unwrap_tensor_subclass",
]


def benchmark_model(model: nn.Module, num_runs: int, input_tensor: Any) -> float:
    """The mean time of a call in milliseconds, after one untimed call, which compiles what is to be compiled.

    Args:
        input_tensor: the model's argument; a tuple or list are its arguments.

    Raises:
        ValueError: num_runs below 1.
    """
    if num_runs < 1:
        raise ValueError(f"quant_ops.benchmark_model: expected num_runs >= 1, got {num_runs}")
    args = tuple(input_tensor) if isinstance(input_tensor, tuple | list) else (input_tensor,)
    return _mean_seconds(lambda: model(*args), num_runs) * 1e3


def benchmark_torch_function_in_microseconds(f: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """The mean time of a call in microseconds, over a tenth of a second at least."""
    once = _mean_seconds(lambda: f(*args, **kwargs), 1)
    return _mean_seconds(lambda: f(*args, **kwargs), max(1, int(0.1 / max(once, 1e-7)))) * 1e6


def _mean_seconds(call: Callable[[], Any], runs: int) -> float:
    synchronize: Callable[[], Any] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        call()
    synchronize()
    return (time.perf_counter() - start) / runs


def profiler_runner(path: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function under torch's profiler, writes the trace for Chrome to a file, and returns the result."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        result = fn(*args, **kwargs)
    profile.export_chrome_trace(path)
    return result
