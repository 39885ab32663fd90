"""Builds, tests and times the CUDA operators on a machine with a GPU, and writes one JSON: the script behind ``make gpu-check``.

Works offline with whatever torch the running Python has; nothing is installed. Stages run in order, each with a time limit; one
that fails is recorded and the next one starts. ``--rehearse`` goes as far as a machine without a GPU can: it builds for one
architecture, collects the tests, and runs the benchmark's code on small CPU tensors.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
LIBRARIES = ("libquant_ops.so", "libquant_ops_cuda.so")
TOTAL_SECONDS = 470
CORRECTNESS = ("build", "test", "memcheck")  # a failure of one of these is the script's failure


class Record:
    """The JSON file: rewritten whole, and at once, with every entry."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        self.data = {"stages": {}, "ceilings": [], "rows": []}
        if not fresh:
            self.data = json.loads(path.read_text())

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        partial.replace(self.path)


def run(command: list[str], limit: float, env: dict[str, str] | None = None) -> tuple[str, str]:
    """(ok | failed | timeout, the end of what it printed)"""
    try:
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=env, timeout=limit, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return ("ok" if done.returncode == 0 else "failed"), done.stdout[-6000:]
    except subprocess.TimeoutExpired as late:
        text = late.stdout or ""
        return "timeout", (text.decode(errors="replace") if isinstance(text, bytes) else text)[-6000:]
    except OSError as error:
        return "failed", str(error)


# ---- stages --------------------------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and Path(folder, "bin", "nvcc").is_file():
            return str(Path(folder, "bin", "nvcc"))
    return shutil.which("nvcc")


def describe_machine() -> dict:
    import torch

    facts = {"python": sys.version.split()[0], "torch": torch.__version__, "torch_cuda": torch.version.cuda, "cpus": os.cpu_count()}
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["capability"] = list(torch.cuda.get_device_capability())
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = getattr(properties, "L2_cache_size", None)
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    facts["nvidia_smi"] = run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 20)[1].strip()
    facts["nvcc"] = run([find_nvcc() or "nvcc", "--version"], 20)[1].strip().splitlines()[-2:]
    return facts


def architecture(facts: dict) -> str:
    major, minor = facts.get("capability") or (9, 0)
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def build(facts: dict, limit: float) -> tuple[str, str]:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    nvcc = find_nvcc()
    if cmake is None or nvcc is None:
        return "failed", f"cmake: {cmake}, nvcc: {nvcc}. Both are needed."
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DQUANT_OPS_CUDA=ON", f"-DQUANT_OPS_CUDA_ARCHS={architecture(facts)}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if ninja and not (BUILD / "Makefile").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    start = time.monotonic()
    status, text = run(configure, limit)
    if status != "ok":
        return status, text
    jobs = str(max(1, (os.cpu_count() or 1) // (1 if facts["gpu"] else 2)))
    status, built = run([cmake, "--build", str(BUILD), "--parallel", jobs], limit - (time.monotonic() - start))
    missing = [name for name in LIBRARIES if not (BUILD / name).is_file()]
    if status == "ok" and missing:
        return "failed", f"{missing} not built\n{text}"
    return status, text[-1500:] + built[-4000:]


def environment() -> dict[str, str]:
    paths = [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "QUANT_OPS_LIBRARY_DIR": str(BUILD), "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def test(on_gpu: bool, limit: float) -> tuple[str, str]:
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    if not on_gpu:
        return run([*pytest, "--collect-only", "-q", "-m", "cuda", "tests/test_cuda.py"], limit, environment())
    loaded = "import quant_ops._library as l; assert l.cuda_library, l.cuda_reason; print(l.cuda_library)"
    status, text = run([sys.executable, "-c", loaded], 60, environment())
    if status != "ok":
        return status, text
    status, text = run([*pytest, "-m", "cuda", "tests", "--ignore=tests/test_kernels.py"], limit, environment())
    if status == "ok" and not re.search(r"\d+ passed", text):
        return "failed", "no test ran\n" + text
    kernels = run([*pytest, "-x", "tests/test_kernels.py"], max(20.0, limit / 3), environment())  # skips itself where not built
    return status, text + "\n" + kernels[1][-600:]


SMOKE = """
import torch, quant_ops as qo
for shape, scales in [((1000,), ()), ((7, 16, 7, 7), (16, 1, 1)), ((130, 24), (24,)), ((33, 50), (33, 1)), ((2100, 24), (1, 24))]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, s = torch.randn(shape, device="cuda").to(dtype), torch.rand(scales, device="cuda") + 0.1
        z = torch.randn(scales, device="cuda")
        for view in (x, x.transpose(0, -1), x[..., 1:]):
            if view.shape[-1] != shape[-1] and scales and s.shape[-1] not in (1,):
                continue
            if view.stride() != x.stride() and s.numel() > 1:
                continue
            q = qo.quant_tensor_forward(view, s, z, -128, 127, True, False)
            qo.quant_tensor_forward(view, s, z, -128, 127, True, True)
            qo.dequant_tensor(q, s, z.round().int(), dtype)
            qo.quant_tensor_backward(view, view, s, z, -128, 127, True)
torch.cuda.synchronize()
print("smoke finished")
"""


def memcheck(limit: float) -> tuple[str, str]:
    nvcc = find_nvcc()
    tool = shutil.which("compute-sanitizer") or (nvcc and shutil.which("compute-sanitizer", path=str(Path(nvcc).parent)))
    if not tool:
        return "skipped", "compute-sanitizer was not found"
    env = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor has bounds of its own
    status, text = run([tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SMOKE], limit, env)
    if status == "failed" and "ERROR SUMMARY" not in text:
        return "skipped", "compute-sanitizer does not run here: " + text[-1500:]
    return status, text


# ---- benchmark (a process of its own) ------------------------------------------------------------------------------------------

ROTATE_BYTES = 240 << 20  # twice what any L2 holds
SHAPES = [(1, 128, 56, 56), (32, 128, 56, 56), (16, 256, 128, 128)]
SMALL_SHAPES = [(1, 8, 6, 6), (2, 8, 8, 8)]


class Timer:
    """Microseconds of one call: the median over replays of a CUDA graph of many calls on rotated buffers, results kept apart."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self, make, call, bytes_moved: int) -> float:
        import torch

        sets = max(2, min(128, -(-ROTATE_BYTES // max(bytes_moved, 1)))) if self.device == "cuda" else 2
        inputs = [make() for _ in range(sets)]
        if self.device != "cuda":
            start = time.perf_counter()
            for i in inputs:
                call(*i)
            return (time.perf_counter() - start) / sets * 1e6
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in inputs[:2]:
                call(*i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call(*i) for i in inputs]
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / sets)
        del results, graph
        return statistics.median(times)


def bench(record: Record, device: str, seconds: float) -> None:
    import torch

    import quant_ops as qo

    stop = time.monotonic() + seconds
    timer = Timer(device)
    copies: dict[int, float] = {}

    def copy_us(bytes_moved: int) -> float:
        """copy_ that reads and writes as many bytes together."""
        if bytes_moved not in copies:
            n = max(1, bytes_moved // 2)

            def pair():
                buffer = torch.empty(n, dtype=torch.uint8, device=device).random_()
                return buffer, torch.empty_like(buffer)

            copies[bytes_moved] = timer(pair, lambda a, b: b.copy_(a), bytes_moved)
        return copies[bytes_moved]

    one = torch.zeros(1, device=device)
    floor = timer(lambda: (one,), lambda a: a.add_(1), 1 << 22)
    record.data["ceilings"].append({"what": "kernel of one element, per launch in a graph", "us": floor})
    for megabytes in (1, 4, 16, 64, 256, 1024) if device == "cuda" else (1,):
        us = copy_us(megabytes << 20)
        record.data["ceilings"].append({"what": f"copy_, {megabytes} MiB moved", "us": us, "gb_s": (megabytes << 20) / us / 1e3})
        record.save()

    def row(op: str, shape, dtype, parameter: str, bytes_moved: int, make, call, peers: dict) -> None:
        if time.monotonic() > stop:
            record.data["stages"].setdefault("bench", {})["cut"] = "time was up"
            return
        entry = {
            "op": op,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "scale": parameter,
            "bytes": bytes_moved,
        }
        try:
            us = timer(make, call, bytes_moved)
            entry |= {
                "us": us,
                "gb_s": bytes_moved / us / 1e3,
                "copy_us": copy_us(bytes_moved),
                "of_copy": copy_us(bytes_moved) / us,
            }
            entry["peers"] = {}
            for name, peer in peers.items():
                try:
                    peer_us = timer(make, peer, bytes_moved)
                    entry["peers"][name] = {"us": peer_us, "speedup": peer_us / us}
                except Exception as error:  # a peer that does not support the case is part of the picture
                    entry["peers"][name] = {"error": str(error).splitlines()[0][:200] if str(error) else repr(error)}
        except Exception as error:
            entry["error"] = str(error)[:500]
        record.data["rows"].append(entry)
        record.save()

    def eager(x, s):
        return (torch.round(x / s).clamp(-128, 127) * s).to(x.dtype)

    torch._dynamo.config.recompile_limit = 64  # one compilation a case
    compiled = torch.compile(eager, dynamic=False)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES if device == "cuda" else SMALL_SHAPES:
            n, size = torch.Size(shape).numel(), dtype.itemsize
            for parameter, scale_shape in {"tensor": (), "dim 0": (shape[0], 1, 1, 1), "dim 1": (1, shape[1], 1, 1)}.items():
                scale = torch.rand(scale_shape, device=device) * 0.05 + 0.02
                zeros = torch.zeros(scale.numel(), dtype=torch.int32, device=device)
                axis = 1 if parameter == "dim 1" else 0
                make = lambda shape=shape, dtype=dtype: (torch.randn(shape, device=device, dtype=torch.float32).to(dtype),)  # noqa: E731

                def torch_fake(x, scale=scale, zeros=zeros, axis=axis):
                    if scale.dim() == 0:
                        return torch.fake_quantize_per_tensor_affine(x, scale, zeros, -128, 127)
                    return torch.fake_quantize_per_channel_affine(x, scale.view(-1), zeros, axis, -128, 127)

                peers = {"torch.fake_quantize": torch_fake, "eager": lambda x, scale=scale: eager(x, scale)}
                if device == "cuda" and stop - time.monotonic() > 60:
                    peers["torch.compile"] = lambda x, scale=scale: compiled(x, scale)
                simulate = lambda x, scale=scale: qo.quant_tensor_forward(x, scale, None, -128, 127)  # noqa: E731
                row("quantize, simulated", shape, dtype, parameter, 2 * n * size, make, simulate, peers)
                to_int8 = lambda x, scale=scale: qo.quant_tensor_forward(x, scale, None, -128, 127, False, False)  # noqa: E731
                eager_int8 = {"eager": lambda x, scale=scale: torch.round(x / scale).clamp(-128, 127).to(torch.int8)}
                row("quantize to int8", shape, dtype, parameter, n * (size + 1), make, to_int8, eager_int8)

                codes = lambda shape=shape: (torch.randint(-128, 128, shape, device=device, dtype=torch.int8),)  # noqa: E731
                back = lambda q, scale=scale, dtype=dtype: qo.dequant_tensor(q, scale, None, dtype)  # noqa: E731
                eager_back = {"eager": lambda q, scale=scale, dtype=dtype: (q * scale).to(dtype)}
                row("dequantize int8", shape, dtype, parameter, n * (size + 1), codes, back, eager_back)

                two = lambda make=make: (*make(), *make())  # noqa: E731
                gradient = lambda g, x, scale=scale: qo.quant_tensor_backward(g, x, scale, None, -128, 127)  # noqa: E731

                def eager_gradient(g, x, scale=scale):
                    v = x / scale
                    steps = torch.round(v)
                    inside = (steps >= -128) & (steps <= 127)
                    factor = torch.where(inside, steps - v, steps.clamp(-128, 127))
                    return torch.where(inside, g, 0), (g * factor).sum_to_size(scale.shape)

                row("backward", shape, dtype, parameter, 3 * n * size, two, gradient, {"eager": eager_gradient})


def table(record: Record) -> str:
    lines = [
        f"{c['what']:<48}{c['us']:>10.2f} us" + (f"{c['gb_s']:>9.0f} GB/s" if "gb_s" in c else "") for c in record.data["ceilings"]
    ]
    lines.append("")
    lines.append(f"{'op':<22}{'shape':<20}{'dtype':<10}{'scale':<8}{'us':>9}{'GB/s':>7}{'of copy':>9}  faster than")
    for r in record.data["rows"]:
        head = f"{r['op']:<22}{'x'.join(map(str, r['shape'])):<20}{r['dtype']:<10}{r['scale']:<8}"
        if "us" not in r:
            lines.append(f"{head}  {r.get('error', '')[:80]}")
            continue
        peers = ", ".join(f"{name} {p['speedup']:.2f}x" for name, p in r["peers"].items() if "speedup" in p)
        lines.append(f"{head}{r['us']:>9.2f}{r['gb_s']:>7.0f}{r['of_copy']:>8.0%}   {peers}")
    return "\n".join(lines)


# ---- all together --------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out") / "gpu_check.json")
    parser.add_argument("--rehearse", action="store_true", help="go as far as a machine without a GPU can")
    parser.add_argument("--bench-only", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bench_only:
        record = Record(options.out, fresh=False)
        bench(record, "cpu" if options.rehearse else "cuda", options.bench_only)
        record.save()
        return 0

    start = time.monotonic()
    record = Record(options.out, fresh=True)

    def left() -> float:
        return TOTAL_SECONDS - (time.monotonic() - start)

    def stage(name: str, work, limit: float) -> str:
        begin = time.monotonic()
        try:
            status, text = work(max(10.0, min(limit, left())))
        except Exception as error:  # recorded, so that the later stages still run
            status, text = "failed", repr(error)
        if name == "bench":  # its process has added rows to the file
            record.data = json.loads(options.out.read_text())
        entry = {"status": status, "seconds": round(time.monotonic() - begin, 1), "output": text}
        record.data["stages"][name] = {**record.data["stages"].get(name, {}), **entry}
        record.save()
        print(f"{name:<10}{status:<9}{entry['seconds']:>7.1f} s", flush=True)
        if status not in ("ok", "skipped"):
            print(text[-3000:], flush=True)
        return status

    try:
        facts = describe_machine()
    except ImportError as error:
        print(f"torch must be importable by {sys.executable}: {error}")
        return 1
    record.data["machine"] = facts
    record.data["rehearsal"] = options.rehearse
    record.save()
    on_gpu = facts["gpu"] is not None
    if not on_gpu and not options.rehearse:
        print("no GPU that torch can use; --rehearse goes as far as this machine can")
        return 1
    print(f"{facts['gpu'] or 'no GPU'}, torch {facts['torch']}, architecture {architecture(facts)}", flush=True)

    results = {"build": stage("build", lambda limit: build(facts, limit), 200)}
    have = all((BUILD / name).is_file() for name in LIBRARIES)
    without = ("skipped", "the libraries were not built") if not have else ("skipped", "no GPU")
    results["test"] = stage("test", lambda limit: test(on_gpu, limit) if have else without, 150)
    results["memcheck"] = stage("memcheck", lambda limit: memcheck(limit) if have and on_gpu else without, 60)
    child = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out)]
    child += [] if on_gpu else ["--rehearse"]
    reserve = 15.0  # the child stops by itself before it is stopped
    stage(
        "bench",
        lambda limit: run([*child, "--bench-only", str(limit - reserve)], limit, environment()) if have else without,
        max(40.0, left() - 5),
    )
    print(table(record))
    print(f"written to {options.out}")
    return int(any(results[name] not in ("ok", "skipped") for name in CORRECTNESS))


if __name__ == "__main__":
    sys.exit(main())
