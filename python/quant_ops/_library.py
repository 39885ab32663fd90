"""Finds and opens the compiled libraries, and talks to their plain C functions.

Opening them registers the operators with torch; nothing is printed. A failure names its cause and the command that mends it.
QUANT_OPS_LIBRARY_DIR names another folder to take the libraries from. The CUDA library is beside the package where it was built
from the sources, else in the distribution quant_ops_cuda.
"""

import ctypes
import importlib.util
import os
from importlib import metadata
from pathlib import Path

import torch


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # used from a source tree
        return "0.0.0+source"


VERSION = _version("quant_ops")

_CPU_LIBRARY = "libquant_ops.so"
_CUDA_LIBRARY = "libquant_ops_cuda.so"
_CUDA_PACKAGE = "quant_ops_cuda"
_BUILD = "pip install --no-build-isolation ."

_c: ctypes.CDLL | None = None
_c_cuda: ctypes.CDLL | None = None
cpu_library: Path | None = None
cuda_library: Path | None = None
cuda_reason = ""  # why the CUDA operators are not loaded; empty when they are


def _find(name: str) -> Path | None:
    override = os.environ.get("QUANT_OPS_LIBRARY_DIR")
    # an editable install has two folders: the sources and the one where the build put the libraries
    folders = [override] if override else list(__import__("quant_ops").__path__)
    for folder in folders:
        path = Path(folder) / name
        if path.is_file():
            return path.resolve()
    return None


def _find_cuda() -> tuple[Path | None, str]:
    """The CUDA library, or why there is none that goes with this version."""
    path = _find(_CUDA_LIBRARY)
    if path is not None:
        return path, ""
    spec = None if os.environ.get("QUANT_OPS_LIBRARY_DIR") else importlib.util.find_spec(_CUDA_PACKAGE)  # which imports nothing
    if spec is None or spec.origin is None:
        return None, (
            f"{_CUDA_LIBRARY} was not built. Install {_CUDA_PACKAGE} with: pip install 'quant_ops[cuda]', or build it where "
            f"nvcc is found with: {_BUILD}"
        )
    version = _version(_CUDA_PACKAGE)
    if version != VERSION:
        return None, (
            f"expected {_CUDA_PACKAGE} {VERSION}, the version of quant_ops, got {version}. "
            f"Install it with: pip install {_CUDA_PACKAGE}=={VERSION}"
        )
    return Path(spec.origin).parent / _CUDA_LIBRARY, ""


def load() -> None:
    """Registers the operators: the CPU library always, the CUDA library where torch itself has CUDA."""
    global _c, _c_cuda, cpu_library, cuda_library, cuda_reason  # noqa: PLW0603  one state per process, as the operators are
    if _c is not None:
        return
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(f"quant_ops: expected torch >= 2.10, got {torch.__version__}. Upgrade with: pip install 'torch>=2.10'")
    path = _find(_CPU_LIBRARY)
    if path is None:
        raise ImportError(
            f"quant_ops: expected {_CPU_LIBRARY} beside the package, found none in "
            f"{os.environ.get('QUANT_OPS_LIBRARY_DIR') or ', '.join(__import__('quant_ops').__path__)}. Build it with: {_BUILD}"
        )
    try:
        torch.ops.load_library(path)
        _c = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"quant_ops: {path} does not load under torch {torch.__version__}: {error}. Rebuild it with: {_BUILD}"
        ) from error
    for function in (_c.quant_ops_isa, _c.quant_ops_set_isa, _c.quant_ops_isas, _c.quant_ops_kernels, _c.quant_ops_gemm_kernel):
        function.restype = ctypes.c_char_p
    _c.quant_ops_set_isa.argtypes = [ctypes.c_char_p]
    _c.quant_ops_gemm_kernel.argtypes = [ctypes.c_int64] * 2
    for function in (_c.quant_ops_packed_bytes, _c.quant_ops_cuda_packed_bytes):
        function.argtypes = [ctypes.c_int64] * 5
        function.restype = ctypes.c_int64
    _c.quant_ops_weight_only_bytes.argtypes = [ctypes.c_int64] * 4
    _c.quant_ops_weight_only_bytes.restype = ctypes.c_int64
    _c.quant_ops_refusal.argtypes = [ctypes.c_char_p]
    _c.quant_ops_peak.argtypes = [ctypes.c_int64]
    _c.quant_ops_peak.restype = ctypes.c_int64
    _c.quant_ops_compiler.restype = ctypes.c_char_p
    _c.quant_ops_keep_call.restype = None
    _c.quant_ops_kept_call.restype = ctypes.c_int64
    _c.quant_ops_forget_call.argtypes = [ctypes.c_int64]
    _c.quant_ops_forget_call.restype = None
    cpu_library = path

    if torch.version.cuda is None:
        cuda_reason = "this torch is built without CUDA"
        return
    cuda_path, cuda_reason = _find_cuda()
    if cuda_path is not None:
        try:
            torch.ops.load_library(cuda_path)
            _c_cuda = ctypes.CDLL(str(cuda_path))
            _c_cuda.quant_ops_cuda_gemm_kernel.argtypes = [ctypes.c_int64] * 3
            _c_cuda.quant_ops_cuda_gemm_kernel.restype = ctypes.c_char_p
            _c_cuda.quant_ops_cuda_refusal.argtypes = [ctypes.c_char_p]
            _c_cuda.quant_ops_cuda_set_kernel.argtypes = [ctypes.c_char_p]
            cuda_library = cuda_path
        except OSError as error:  # the CPU operators work all the same; info and the first CUDA call tell
            cuda_reason = f"{_CUDA_LIBRARY} does not load: {error}. Rebuild it with: {_BUILD}"


def cmake_prefix_path() -> str:
    """The folder that CMake's ``find_package(quant_ops)`` looks into when it is on ``CMAKE_PREFIX_PATH``, beside torch's."""
    assert cpu_library is not None
    return str(cpu_library.parent / "share" / "cmake")


def _text(value: bytes) -> str:
    text = value.decode()
    if text.startswith("quant_ops"):
        raise RuntimeError(text)
    return text


def _library() -> ctypes.CDLL:
    assert _c is not None
    return _c


def refusal_kind(sentence: str) -> type[Exception]:
    """The exception for an operator's sentence that was raised on this thread, as the check decided."""
    text = sentence.encode()
    kind = _library().quant_ops_refusal(text) or (_c_cuda.quant_ops_cuda_refusal(text) if _c_cuda is not None else 0)
    return (ValueError, TypeError, RuntimeError, IndexError)[kind]


def isa() -> str:
    """The instruction set whose kernels are in use, e.g. ``"avx512vnni"``.

    Raises RuntimeError if QUANT_OPS_ISA names one that is unknown or that this machine does not run.
    """
    return _text(_library().quant_ops_isa())


def isas() -> list[str]:
    """The instruction sets that this machine runs, worst first."""
    return _text(_library().quant_ops_isas()).split(",")


def set_isa(name: str | None) -> str:
    """Uses another instruction set from now on, for tests and bug reports; None chooses automatically. Returns its name."""
    return _text(_library().quant_ops_set_isa((name or "").encode()))


def kernels() -> dict[str, str]:
    """The micro-kernels in use on the CPU, by their entry in the table (``cpp/kernels/table.h``)."""
    return dict(pair.split("=") for pair in _text(_library().quant_ops_kernels()).split(","))


def gemm_kernel(rows: int = 1 << 20, columns: int = 1 << 20) -> str:
    """The CPU's micro-kernel that multiplies ``rows`` of codes by a packed weight of ``columns``; by default of the full tile."""
    return _text(_library().quant_ops_gemm_kernel(rows, columns))


def cuda_gemm_kernel(m: int, n: int, k: int) -> str:
    """The kernel that multiplies ``(m, k)`` codes by an ``(n, k)`` weight on the current CUDA device; ``:4`` = K in four parts.

    QUANT_OPS_CUDA_KERNEL, read once, names another one to use. Raises RuntimeError if it names none that takes these shapes.
    """
    if _c_cuda is None:
        raise RuntimeError(f"quant_ops: expected the CUDA operators to be loaded, got none: {cuda_reason}")
    return _text(_c_cuda.quant_ops_cuda_gemm_kernel(m, n, k))


def peak(iterations: int) -> int:
    """Runs the CPU's multiply-accumulate instruction alone, so often; returns how many products that were, 0 without one.

    Other threads run meanwhile, as ctypes releases the lock of the interpreter.
    """
    return int(_library().quant_ops_peak(iterations))


def keep_call() -> None:
    """Keeps the arguments of this thread's next call of an operator on the CPU."""
    _library().quant_ops_keep_call()


def kept_call() -> int:
    """The number of the call that was kept, -1 if there was none; the next call is not kept."""
    return int(_library().quant_ops_kept_call())


def forget_call(number: int) -> None:
    """Gives up a call that is kept."""
    _library().quant_ops_forget_call(number)


def compiler() -> str:
    """The compiler that built the CPU library, with its version."""
    return _text(_library().quant_ops_compiler())


def set_cuda_kernel(name: str | None) -> None:
    """Uses this kernel for integer products on CUDA from now on, for tests and benchmarks; None: as QUANT_OPS_CUDA_KERNEL says."""
    if _c_cuda is None:
        raise RuntimeError(f"quant_ops: expected the CUDA operators to be loaded, got none: {cuda_reason}")
    _c_cuda.quant_ops_cuda_set_kernel((name or "").encode())


def packed_bytes(out_channels: int, in_channels: int, r: int, s: int, groups: int, device: str = "cpu") -> int:
    """The length of what ``pack_weight`` gives for a weight ``(out_channels, in_channels, r, s)`` on a device."""
    function = _library().quant_ops_cuda_packed_bytes if device == "cuda" else _library().quant_ops_packed_bytes
    return int(function(out_channels, in_channels, r, s, groups))


def weight_only_bytes(n: int, k: int, bits: int, group_size: int) -> int:
    """The length of what ``pack_weight_only`` gives for a weight ``(n, k)``."""
    return int(_library().quant_ops_weight_only_bytes(n, k, bits, group_size))
