"""glibc's allocator keeps what torch frees, so that the next large result does not lie on fresh pages."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h
_NEVER = 2**31 - 1

_STATE = {"kept": False}


def keep_memory() -> None:
    """Lets this process keep the memory of tensors that are freed, for its own next tensors, until it ends. On the CPU, with glibc.

    Without it glibc maps every large tensor anew and unmaps it when it is freed, and the system clears each page when it is first
    written to, which takes longer than most operators take to write it. The price: memory stays at what the process has needed at
    most, and somewhat above it, since the first few results make the holes into which later ones of their sizes fall.
    ``docs/guide.md`` has figures. Call it once, before the first model runs; other allocators, such as jemalloc by ``LD_PRELOAD``,
    have settings of their own.

    Raises:
        RuntimeError: the C library is not glibc.
    """
    library, version = platform.libc_ver()
    if library != "glibc":
        raise RuntimeError(f"quant_ops.keep_memory: expected glibc, got {library or 'another C library'} {version}".rstrip() + ".")
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_TRIM_THRESHOLD, _NEVER)
    if not mallopt(_MMAP_THRESHOLD, 1 << 30):  # before glibc 2.35 there is a limit of 32 MiB
        mallopt(_MMAP_MAX, 0)
    _STATE["kept"] = True


def is_kept() -> bool:
    """Whether :func:`keep_memory` was called."""
    return _STATE["kept"]
