"""Builds, tests and times the CUDA operators on a machine with a GPU; writes one JSON, prints its table: ``make gpu-check``.

Works offline with whatever torch the running Python has; nothing is installed. Stages run in order, each in processes of its own
with a time limit; one that fails is recorded and the next one starts. ``--rehearse`` runs the same stages on a machine without a
GPU: it builds for one architecture, collects the CUDA tests, and runs the benchmark's code on small CPU tensors.
Read next: bench.py, cases.py, smoke.py.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import table
from benchmarks.gpu.record import Record

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # the package as installed: sources and libraries in one folder
LIBRARIES = ("libquant_ops.so", "libquant_ops_cuda.so")
TOTAL_SECONDS = 570.0
REHEARSAL_FACTOR = 8.0  # two cores in place of sixteen
# stage -> the most seconds it may take; a stage that comes later may count on its own share of the total
LIMITS = {
    "build": 210.0,
    "code": 20.0,
    "test": 110.0,
    "memcheck": 60.0,
    "racecheck": 30.0,
    "cpu": 40.0,
    "ceilings": 25.0,
    "linear": 100.0,
    "conv2d": 50.0,
    "rows": 30.0,
    "elementwise": 60.0,
    "floats": 30.0,
    "kernels": 20.0,
    "weight_only": 60.0,
    "digest": 25.0,
    "sweep": 40.0,
    "models": 110.0,
}
BENCHMARK = ("ceilings", "linear", "conv2d", "rows", "elementwise", "floats", "kernels", "weight_only")
PROGRAMS = ("digest", "sweep", "models")  # modules of this folder
RESERVED = 150.0  # for the benchmark, out of the stages before it
CORRECTNESS = ("build", "test", "memcheck", "racecheck", "cpu")  # unfinished, they are the script's failure, as any failed stage is
SASS = ("IGMMA", "IMMA", "UTMALDG", "LDGSTS", "LDL", "STL")
_STEMS = (
    "quantize",
    "quantize_backward",
    "quantize_float",
    "quantize_block",
    "affine",
    "qparams",
    "quantize_rows",
    "linear",
    "conv2d",
    "conv2d_depthwise",
)
CPU_TESTS = [f"tests/test_{name}.py" for name in ("kernels", "isa", *_STEMS)]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
PARALLEL = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
Outcome = tuple[str, str]  # ok | failed | timeout | skipped, and the end of what was printed


def run(command: list[str], limit: float, env: dict[str, str] | None = None) -> Outcome:
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


def program(name: str) -> str | None:
    """The path of one of the CUDA toolkit's or this Python's programs."""
    folders = [Path(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    folders += [Path("/usr/local/cuda/bin"), Path(sys.executable).parent]
    return shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)


def environment(**others: str) -> dict[str, str]:
    """With the package that was built."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(SITE), os.environ.get("PYTHONPATH")) if p), **others}
    env.pop("QUANT_OPS_LIBRARY_DIR", None)
    return env


# ---- stages --------------------------------------------------------------------------------------------------------------------


def describe_machine() -> dict:
    import torch

    facts = {"python": sys.version.split()[0], "torch": torch.__version__, "torch_cuda": torch.version.cuda, "cpus": os.cpu_count()}
    facts |= {"gpu": None, "capability": None, "date": time.strftime("%Y-%m-%d")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = torch.cuda.get_device_name()
        facts["capability"] = list(torch.cuda.get_device_capability())
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = getattr(properties, "L2_cache_size", None)
    facts["nvcc"] = run([program("nvcc") or "nvcc", "--version"], 20)[1].strip().splitlines()[-2:]
    return facts


def clocks() -> str:
    query = "driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    return run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 20)[1].strip()


def architecture(facts: dict) -> str:
    major, minor = facts["capability"] or (9, 0)
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def build(facts: dict, limit: float) -> Outcome:
    cmake, nvcc, ninja = program("cmake"), program("nvcc"), program("ninja")
    if cmake is None or nvcc is None:
        return "failed", f"cmake: {cmake}, nvcc: {nvcc}. Both are needed."
    shutil.rmtree(SITE, ignore_errors=True)  # nothing older is tested in place of what fails to build
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DQUANT_OPS_CUDA=ON", f"-DQUANT_OPS_CUDA_ARCHS={architecture(facts)}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    status, pybind = run([sys.executable, "-m", "pybind11", "--cmakedir"], 30)
    if status == "ok":  # the module of micro-kernels, for the stage cpu
        configure += ["-DQUANT_OPS_KERNELS_MODULE=ON", f"-Dpybind11_DIR={pybind.strip()}"]
    if ninja and not (BUILD / "Makefile").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    start = time.monotonic()
    status, text = run(configure, limit)
    if status != "ok":
        return status, text
    jobs = str(max(1, (os.cpu_count() or 1) // (1 if facts["gpu"] else 2)))
    status, built = run([cmake, "--build", str(BUILD), "--parallel", jobs], limit - (time.monotonic() - start))
    text = text[-1500:] + built[-4000:]
    missing = [name for name in LIBRARIES if not (BUILD / name).is_file()]
    if status != "ok" or missing:
        return ("failed" if status == "ok" else status), f"{missing} not built\n{text}"
    shutil.copytree(ROOT / "python" / "quant_ops", SITE / "quant_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in (*BUILD.glob("libquant_ops*.so"), *BUILD.glob("_kernels*.so")):
        shutil.copy2(library, SITE / "quant_ops")
    return "ok", text


def code(limit: float) -> Outcome:
    """Counts the instructions that tell which engines the library holds, and whether anything lies in local memory."""
    cuobjdump = program("cuobjdump")
    if cuobjdump is None:
        return "skipped", "cuobjdump was not found"
    script = f"{cuobjdump} -sass {SITE / 'quant_ops' / LIBRARIES[1]} | grep -oE '\\b({'|'.join(SASS)})\\b' | sort | uniq -c"
    return run(["sh", "-c", script], limit)


def test(on_gpu: bool, limit: float) -> Outcome:
    pytest = [*PYTEST, "-m", "cuda"]
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_cuda*.py"))
    if not on_gpu:
        return run([*pytest, "--collect-only", "-q", *files], limit, environment())
    loaded = "import quant_ops._library as l; assert l.cuda_library, l.cuda_reason; print(l.cuda_library)"
    status, text = run([sys.executable, "-c", loaded], 60, environment())
    if status != "ok":
        return status, text
    status, text = run([*pytest, *PARALLEL, *files], limit, environment())
    if status == "ok" and not re.search(r"\.\s+\[100%\]|\d+ passed", text):
        return "failed", "no test ran\n" + text
    return status, text


def sanitize(tool: str, on_gpu: bool, limit: float) -> Outcome:
    """compute-sanitizer over smoke.py; on a machine without a GPU smoke.py alone, on the CPU."""
    script = [sys.executable, "-m", "benchmarks.gpu.smoke", *(["--few"] if tool == "racecheck" else [])]
    if not on_gpu:
        return run([*script, "--rehearse"], limit, environment())
    sanitizer = program("compute-sanitizer")
    if sanitizer is None:
        return "skipped", "compute-sanitizer was not found"
    # so that every tensor has bounds of its own
    env = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    status, text = run([sanitizer, "--tool", tool, "--error-exitcode", "9", *script], limit, env)
    if status == "failed" and "ERROR SUMMARY" not in text and "RACECHECK SUMMARY" not in text and "smoke finished" not in text:
        return "skipped", "compute-sanitizer does not run here: " + text[-1500:]
    return status, text


def cpu(limit: float) -> Outcome:
    """The micro-kernels of every instruction set that this processor runs."""
    if not list((SITE / "quant_ops").glob("_kernels*.so")):
        return "skipped", "the module of micro-kernels was not built: pybind11 is missing"
    return run([*PYTEST, "-x", *PARALLEL, *CPU_TESTS], limit, environment())


def bench(section: str, out: Path, on_gpu: bool, limit: float) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.gpu.bench", "--out", str(out), "--section", section]
    command += ["--seconds", str(limit * 0.8)]  # it stops by itself before it is stopped
    return run(command + ([] if on_gpu else ["--rehearse"]), limit, environment())


def program_stage(name: str, out: Path, on_gpu: bool, limit: float) -> Outcome:
    """One of PROGRAMS, which adds to the JSON; the sweep writes one of its own beside it."""
    if not on_gpu and name != "digest":
        return "skipped", "it needs a GPU"
    to = out.with_name("sweep.json") if name == "sweep" else out
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--out", str(to)]
    command += ["--rehearse"] if not on_gpu else [] if name == "digest" else ["--seconds", str(limit * 0.6)]
    return run(command, limit, environment())


# ---- all together --------------------------------------------------------------------------------------------------------------


class Stages:
    """Runs stages one after the other, each within its own limit and what is left of the whole, and records what came of them."""

    def __init__(self, record: Record, chosen: list[str], on_gpu: bool):
        self.record, self.chosen, self.on_gpu, self.start = record, chosen, on_gpu, time.monotonic()
        self.slower = 1.0 if on_gpu else REHEARSAL_FACTOR

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def run(self, name: str, work: Callable[[float], Outcome]) -> None:
        if name not in self.chosen:
            return
        begin = self.seconds()
        left = TOTAL_SECONDS * self.slower - begin - (0.0 if name in BENCHMARK or name in PROGRAMS else RESERVED)
        try:
            status, text = work(max(10.0, min(LIMITS[name] * self.slower, left)))
        except Exception as error:  # recorded, so that the later stages still run
            status, text = "failed", repr(error)
        if name in BENCHMARK or name in PROGRAMS:  # its process has added to the file
            self.record.data = json.loads(self.record.path.read_text())
        seconds = round(self.seconds() - begin, 1)
        entry = {"status": status, "seconds": seconds, "clocks": clocks() if self.on_gpu else "", "output": text}
        self.record.data["stages"][name] = entry
        self.record.save()
        print(f"{name:<12}{status:<9}{seconds:>7.1f} s", flush=True)
        if status in ("failed", "timeout"):
            print(text[-3000:], flush=True)

    def failed(self) -> bool:
        statuses = {name: entry["status"] for name, entry in self.record.data["stages"].items()}
        late = [name for name in CORRECTNESS if statuses.get(name) == "timeout"]
        return bool(late) or "failed" in statuses.values()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out") / "gpu_check.json")
    parser.add_argument("--rehearse", action="store_true", help="run on a machine without a GPU, as far as that goes")
    parser.add_argument("--stages", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="only these, on what is built")
    options = parser.parse_args()
    record = Record(options.out, fresh=True)
    try:
        facts = describe_machine()
    except ImportError as error:
        print(f"torch must be importable by {sys.executable}: {error}")
        return 1
    on_gpu = facts["gpu"] is not None
    record.data |= {"machine": facts, "rehearsal": options.rehearse}
    record.save()
    if not on_gpu and not options.rehearse:
        print("no GPU that torch can use; --rehearse goes as far as this machine can")
        return 1
    print(f"{facts['gpu'] or 'no GPU'}, torch {facts['torch']}, architecture {architecture(facts)}", flush=True)

    chosen = options.stages if set(options.stages).isdisjoint(BENCHMARK) else [*options.stages, "ceilings"]  # for the floors
    stages = Stages(record, chosen, on_gpu)
    stages.run("build", functools.partial(build, facts))
    if not (SITE / "quant_ops" / LIBRARIES[1]).is_file():
        print(f"nothing to test: {LIBRARIES[1]} was not built")
        return 1
    stages.run("code", code)
    stages.run("test", functools.partial(test, on_gpu))
    for tool in ("memcheck", "racecheck"):
        stages.run(tool, functools.partial(sanitize, tool, on_gpu))
    stages.run("cpu", cpu)
    for section in BENCHMARK:
        stages.run(section, functools.partial(bench, section, options.out, on_gpu))
    for name in PROGRAMS:
        stages.run(name, functools.partial(program_stage, name, options.out, on_gpu))
    print(table.show(record.data))
    print(f"written to {options.out}, {stages.seconds():.0f} s in all")
    return int(stages.failed())


if __name__ == "__main__":
    sys.exit(main())
