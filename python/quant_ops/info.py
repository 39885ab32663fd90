"""What this installation is and which kernels it will use, as a dict and as text."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import _library, ops

# The micro-kernels of an operator, as entries of the kernel table. For activations that are not quantized yet the integer operators
# also use `range` and `codes`. Only an instruction set that multiplies a few rows by another one has `gemm_few_rows`.
_ENTRIES = {
    "int8_gemm": ("gemm", "gemm_few_rows"),
    "int8_linear": ("gemm", "gemm_few_rows"),
    "int8_conv2d": ("gemm", "gemm_few_rows", "depthwise"),
    "weight_only_linear": ("nibbles", "gemm", "gemm_few_rows", "fold", "few_rows", "expand", "float_tile"),
    "weight_only_embedding": ("store",),
    "quant_tensor_forward": ("quantize",),
    "quant_tensor_backward": ("straight_through", "straight_through_columns"),
    "dequant_tensor": ("dequantize",),
    "choose_qparams": ("range", "range_columns"),
    "quantize_rows": ("range", "quantize"),
    "quant_float_forward": ("quantize_float", "random_words"),
    "quant_float_backward": ("quantize_float",),
    "quant_block_forward": ("quantize_blocks", "quantize_block_columns", "random_words"),
    "quant_block_backward": ("quantize_blocks", "quantize_block_columns"),
    "choose_qparams_affine": ("range", "range_columns"),
    "quantize_affine": ("quantize_affine",),
    "dequantize_affine": ("dequantize_affine",),
}


def cpu_model() -> str:
    """For people, and to tell machines apart."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _self_check() -> str:
    """Runs the operators on small data against int64; empty when all is well."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (7, 130), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (70, 130), generator=generator, dtype=torch.int8)
    if not torch.equal(ops.int8_gemm(a, b).long(), a.long() @ b.long().T):
        return "int8_gemm disagrees with int64 arithmetic"
    x = torch.randn(7, 130, generator=generator)
    q, scale, _ = ops.quantize_rows(x)
    expected = (q.long() @ b.long().T).float() * (scale * 0.01)
    if not torch.equal(ops.int8_linear(x, b, torch.tensor(0.01)), expected):
        return "int8_linear disagrees with quantize_rows and int64 arithmetic"
    return ""


def kernel_for(m: int, n: int, k: int, device: str | torch.device = "cpu") -> str:
    """Name of the kernel that ``int8_gemm`` and a static ``int8_linear`` of (m, k) by (n, k) take on a device.

    On CUDA it depends on the shape, on the current GPU and on ``QUANT_OPS_CUDA_KERNEL``; ":4" after it says that K is cut into four
    parts. On the CPU it is the instruction set's for a packed weight, its tile as large as ``m`` and ``n`` allow.

    Raises:
        ValueError: a size below 1, or another kind of device.
        RuntimeError: CUDA's operators are not there.
    """
    kind = torch.device(device).type
    if min(m, n, k) < 1 or kind not in ("cpu", "cuda"):
        raise ValueError(
            f"quant_ops.kernel_for: expected sizes of at least 1 and device cpu or cuda, got {m}, {n}, {k} and {device}"
        )
    return _library.cuda_gemm_kernel(m, n, k) if kind == "cuda" else _library.gemm_kernel(m, n)


def collect() -> dict[str, Any]:
    """Version, libraries, instruction set, kernel per operator, and a self-check; ``"status"`` is ``"OK"`` or one reason."""
    report: dict[str, Any] = {
        "quant_ops": _library.VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "library": str(_library.cpu_library),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa_available": _library.isas(),
        "isa_override": os.environ.get("QUANT_OPS_ISA"),
        "cuda": str(_library.cuda_library) if _library.cuda_library else f"off: {_library.cuda_reason}",
    }
    try:
        report["isa"] = _library.isa()
        kernels = _library.kernels()
        report["kernels"] = {
            op: ", ".join(kernels[entry] for entry in entries if entry in kernels) for op, entries in _ENTRIES.items()
        }
        if _library.cuda_library and torch.cuda.is_available():
            report["cuda_kernels"] = {
                f"linear {m}x4096x4096": _library.cuda_gemm_kernel(m, 4096, 4096) for m in (1, 16, 64, 256, 4096)
            }
        report["status"] = _self_check() or "OK"
    except RuntimeError as error:
        report["status"] = str(error)
    return report


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{key}:"] + [f"  {name:<22}{kernel}" for name, kernel in value.items()]
        elif key != "status":
            shown = ", ".join(value) if isinstance(value, list) else value
            lines.append(f"{key + ':':<16}{shown}")
    return "\n".join([*lines, str(report["status"])])
