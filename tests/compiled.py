"""Programs and libraries that tests compile, kept in build/test-cache.

A file is made again when its command, the compiler or the contents of a file that it is made of has changed: the headers come from
the compiler (-MMD). Several workers of pytest may ask for the same file; one makes it and the others wait.
"""

import concurrent.futures
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "test-cache"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


def contents(paths: Iterable[str | Path]) -> dict[str, str]:
    return {str(path): digest((ROOT / path).read_bytes()) if (ROOT / path).is_file() else "" for path in paths}


def made(name: str, command: list[str], inputs: list[Path] | None = None) -> Path:
    """The file that `command` writes to what follows -o; without `inputs` the compiler tells what it has read."""
    CACHE.mkdir(parents=True, exist_ok=True)
    key = digest(json.dumps([version(command[0]), command]).encode())[:16]
    output = CACHE / f"{Path(name).stem}-{key}{Path(name).suffix}"  # nvcc goes by the suffix of what it links
    record, partial = Path(f"{output}.json"), f"{output}.partial"
    with open(f"{output}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = json.loads(record.read_text()) if record.exists() and output.exists() else {}
        if known and known == contents(known if inputs is None else inputs):
            return output
        dependencies = f"{output}.d"
        tell = ["-MMD", "-MF", dependencies] if inputs is None else []
        done = subprocess.run([*command, *tell, "-o", partial], cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        if "-fsyntax-only" in command:  # which writes nothing; the file then says that the command has succeeded
            Path(partial).touch()
        os.replace(partial, output)  # a library that another process has loaded stays as it is
        if inputs is None:
            inputs = [Path(path) for path in Path(dependencies).read_text().replace("\\\n", " ").split(":", 1)[1].split()]
        record.write_text(json.dumps(contents(inputs)))
    return output


def compiled(
    name: str,
    sources: Iterable[str | Path],
    compile_flags: list[str] | Mapping[str | Path, list[str]],
    *,
    compiler: str = CXX,
    link_flags=(),
) -> Path:
    """The program, or with -shared among the flags of the linker the library, of sources and of objects (.o).

    Paths that are not absolute start at the root of the project. The objects are compiled side by side, with the same flags or each
    with its own.
    """

    def object_of(source: str | Path) -> Path:
        flags = compile_flags[source] if isinstance(compile_flags, Mapping) else compile_flags
        source = Path(source)
        if source.suffix == ".o":
            return ROOT / source
        return made(f"{source.stem}.o", [compiler, *flags, "-c", str(source)])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(object_of, sources))
    return made(name, [compiler, *map(str, objects), *link_flags], objects)


def compiled_for_host(
    name: str, sources: Iterable[Path | str], *flags: str, shared: bool = False, link_flags: Iterable[str] = ()
) -> Path:
    """Of CUDA sources that host_emulation.h runs on the host; `shared` for a library of operators, which torch loads."""
    # the checks of _FORTIFY_SOURCE take a change of fibers for a broken stack
    compile_flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w", "-Icpp", "-Icuda", *flags]
    if shared:
        folder = Path(torch.__file__).parent
        compile_flags += ["-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
        compile_flags += ["-isystem", str(folder / "include")]
        link_flags = ["-shared", "-Wl,--no-as-needed", *(str(folder / f"lib/lib{n}.so") for n in ("torch", "torch_cpu", "c10"))]
    return compiled(name, sources, [*compile_flags, "-x", "c++"], link_flags=link_flags)


def source_file(name: str, text: str) -> Path:
    """A source that a test holds as text."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / name
    path.write_text(text)
    return path
