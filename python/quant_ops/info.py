"""What this installation is and which kernels it will use, as a dict and as text."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
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
    "int8_chain": ("gemm", "gemm_few_rows", "depthwise", "quantize", "dequantize", "pointwise", "max_pool", "sum_pool"),
    "requantize": ("pointwise",),
    "int8_add": ("pointwise",),
    "int8_mul": ("pointwise",),
    "int8_cat": ("pointwise",),
    "int8_max_pool2d": ("max_pool",),
    "int8_avg_pool2d": ("sum_pool", "pointwise"),
    "int8_adaptive_avg_pool2d": ("sum_pool", "pointwise"),
    "int8_attention": ("column_sums", "center", "range_columns", "quantize", "codes", "pack", "gemm", "gemm_few_rows", "softmax"),
    "weight_only_linear": ("nibbles", "gemm", "gemm_few_rows", "fold", "few_rows", "expand", "float_tile"),
    "weight_only_embedding": ("store",),
    "quant_tensor_forward": ("quantize",),
    "quant_tensor_backward": ("straight_through", "straight_through_columns"),
    "dequant_tensor": ("dequantize",),
    "choose_qparams": ("range", "range_columns"),
    "quantize_rows": ("range", "quantize"),
    "norm_quantize_rows": ("normalize", "range", "quantize"),
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


def cpu_flags() -> set[str]:
    """What the kernel of the system says that the processor has, by its names, e.g. ``"avx512_bf16"``; empty if it says nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


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
            lines += [f"{key}:"] + [f"  {name:<26}{kernel}" for name, kernel in value.items()]
        elif key != "status":
            shown = ", ".join(value) if isinstance(value, list) else value
            lines.append(f"{key + ':':<16}{shown}")
    return "\n".join([*lines, str(report["status"])])


# ---- for bug reports -------------------------------------------------------------------------------------------------------

_PACKAGES = (
    *("numpy", "safetensors", "triton", "torchvision", "torchao", "transformers", "accelerate", "diffusers", "peft", "timm"),
    *("onnx", "onnxscript", "onnxruntime", "bitsandbytes", "optimum-quanto", "compressed-tensors"),
)
_VARIABLES = ("QUANT_OPS_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_")
_OTHER_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "CXX")
_LIBRARIES = ("libquant_ops", "libtorch_cpu", "libtorch_cuda", "libgomp", "libiomp", "libomp", "libmkl_rt", "libopenblas")


def collect_env() -> str:
    """All that a bug report needs, as text: ``print(quant_ops.collect_env())``, or ``python -m quant_ops info --env``.

    Versions, the processor and the instruction set (whether chosen or forced), GPUs, threads, the libraries that this process has
    opened, the environment variables that matter to them, and the result of a check of the kernels against int64 arithmetic.

    Returns:
        A line for each thing. Variables are shown with their values; look over them before you publish.
    """
    return environment_text(environment())


def environment() -> dict[str, Any]:
    """What :func:`collect_env` shows, for machines; ``"status"`` is that of :func:`collect`."""
    report = collect()
    variables = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES) or name in _OTHER_VARIABLES
    }
    return {
        "quant_ops": report["quant_ops"],
        "torch": f"{report['torch']}, built for CUDA {torch.version.cuda}" if torch.version.cuda else report["torch"],
        "python": f"{report['python']} ({platform.python_implementation()}, {platform.python_compiler()})",
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver()).strip() or 'unknown C library'}",
        "compiler of the library": _library.compiler(),
        "compiler found": _compiler_found(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "processor": report["cpu"],
        "processors": f"{os.cpu_count()}, {_usable()} of them usable by this process",
        "memory": _memory(),
        "instruction set": _isa(report),
        "instruction sets": ", ".join(report["isa_available"]),
        "threads": f"{torch.get_num_threads()} of torch within an operator, {torch.get_num_interop_threads()} between operators",
        "GPUs": _gpus(),
        "CUDA operators": report["cuda"],
        "libraries": _opened(),
        "variables": variables,
        "kernels": report.get("kernels", {}),
        "status": report["status"],
    }


def environment_text(report: dict[str, Any]) -> str:
    """The dict of :func:`environment` for people."""
    lines = []
    for key, value in report.items():
        if key == "status":
            lines.append(f"check of the kernels: {value}")
        elif isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {shown}" for name, shown in value.items())] if value else [f"{key}: none"]
        elif isinstance(value, list):
            lines += [f"{key}:", *(f"  {shown}" for shown in value)] if value else [f"{key}: none"]
        else:
            lines.append(f"{key}: {value}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _isa(report: dict[str, Any]) -> str:
    if "isa" not in report:
        return f"none, QUANT_OPS_ISA={report['isa_override']} is refused"
    return f"{report['isa']}, {'forced by QUANT_OPS_ISA' if report['isa_override'] else 'chosen automatically'}"


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _compiler_found() -> str:
    """The first line of the version of the compiler that torch.compile would take, which is CXX or g++."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        return f"none named {name}"
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    return f"{path}: {next(iter(done.stdout.splitlines()), 'no version')}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.1f} GiB" for p in found]


def _opened() -> list[str]:
    """The files of the libraries that compute, of which two of a kind, such as of OpenMP, explain much."""
    maps = Path("/proc/self/maps")
    paths = {str(path) for path in (_library.cpu_library, _library.cuda_library) if path}
    if maps.is_file():
        paths |= {line.split(None, 5)[5] for line in maps.read_text().splitlines() if "/" in line and len(line.split(None, 5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(_LIBRARIES))
