"""What no int8 layer of this machine can beat, measured in this process: all products at the peak, all bytes at the bandwidth.

limit = max(multiply-accumulates / peak, bytes / bandwidth). The peak is that of the instruction set in use.
"""

import concurrent.futures
import ctypes
import functools
import time

import torch

from .. import _library

_ITERATIONS = 1_000_000  # milliseconds, beside which handing the work to threads costs nothing


def peak_gops(threads: int, seconds: float = 1.0) -> float | None:
    """Multiplications and additions per nanosecond of ``threads`` threads that run the multiply-accumulate instruction alone.

    The best of ``seconds``, long enough for the clock to rise and for a moment without other work. None for an instruction set
    without such an instruction.
    """
    if _library.peak(1000) == 0:
        return None
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end or not best:
            macs = sum(pool.map(_library.peak, [_ITERATIONS] * threads))
            best = max(best, 2 * macs / (time.perf_counter() - start) / 1e9)
    return best


@functools.lru_cache
def read_gbs(size: int, threads: int, seconds: float = 0.3) -> float:
    """GB/s of ``threads`` threads that read a buffer of ``size`` bytes again and again with C's memchr, each its own part."""
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    part = max(size // threads, 1 << 18)  # with fewer bytes the call itself would be measured
    buffer = torch.ones(part * threads, dtype=torch.uint8)
    repeats, best = max(2, (1 << 26) // part), 0.0

    def read(thread: int) -> None:
        for _ in range(repeats):
            if memchr(buffer.data_ptr() + thread * part, 0, part) is not None:
                raise AssertionError("a zero among ones")

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end or not best:
            list(pool.map(read, range(threads)))
            best = max(best, part * threads * repeats / (time.perf_counter() - start) / 1e9)
    return best


def limit_seconds(macs: int, size: int, peak: float, bandwidth: float) -> float:
    """The time of so many multiply-accumulates and of one pass over ``size`` bytes, the longer one."""
    return max(2 * macs / peak, size / bandwidth) / 1e9
