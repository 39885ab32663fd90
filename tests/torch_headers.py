"""The headers of another torch: the few files of its wheel that the bindings include, fetched by parts of the file.

    python tests/torch_headers.py [VERSION ...]

compiles ``cpp/torch/*.cpp`` against the headers of these versions (by default of the oldest that is supported and of the newest
that pip offers) and says which compile. pip tells where a wheel is, without downloading it; build/torch-headers keeps the headers.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "2.10.0"
CACHE = ROOT / "build" / "torch-headers"
FOLDERS = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/", "torch/headeronly/")
SOURCES = ("library_cpu.cpp", "library_meta.cpp", "exports.cpp", "library_cuda.cpp")


class Unreachable(Exception):
    """No index, or none that has the version or serves parts of a file."""


class RemoteFile(io.RawIOBase):
    """A file of a server that serves parts, read a mebibyte at a time."""

    BLOCK = 1 << 20

    def __init__(self, url: str) -> None:
        self.url, self.position, self.blocks = url, 0, {}
        answer, _ = self.part(0, 0)
        self.size = int(answer.rsplit("/", 1)[1])

    def part(self, first: int, last: int) -> tuple[str, bytes]:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={first}-{last}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            if response.status != 206:
                raise Unreachable(f"no parts of {self.url.rsplit('/', 1)[-1]} to be had")
            return response.headers["Content-Range"], response.read()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: bytearray) -> int:
        block, offset = divmod(self.position, self.BLOCK)
        if self.position >= self.size:
            return 0
        if block not in self.blocks:
            self.blocks[block] = self.part(block * self.BLOCK, min((block + 1) * self.BLOCK, self.size) - 1)[1]
        data = self.blocks[block][offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def wheel(version: str | None) -> tuple[str, str]:
    """The version and address of the wheel that pip would install; of the newest torch for None."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--only-binary", ":all:", "--report", str(report), "torch" if version is None else f"torch=={version}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise Unreachable(f"pip finds no torch {version or ''}: {done.stderr.strip().splitlines()[-1:]}")
        (found,) = json.loads(report.read_text())["install"]
    return found["metadata"]["version"], found["download_info"]["url"]


def headers(version: str | None = None) -> tuple[str, Path]:
    """The version, and the include folder with the headers of its wheel."""
    ready = CACHE / (version or "") / "ready"
    if version is not None and ready.exists():
        return version, ready.parent
    try:
        found, url = wheel(version)
        ready = CACHE / found / "ready"
        if ready.exists():
            return found, ready.parent
        path = Path(url.removeprefix("file://"))
        with (
            path.open("rb") if url.startswith("file://") else io.BufferedReader(RemoteFile(url), 1 << 16) as remote,
            zipfile.ZipFile(remote) as archive,
        ):
            for name in archive.namelist():
                inside = name.removeprefix("torch/include/")
                if inside != name and inside.startswith(FOLDERS) and not name.endswith("/"):
                    to = CACHE / found / inside
                    to.parent.mkdir(parents=True, exist_ok=True)
                    partial = to.with_suffix(f".{os.getpid()}")  # several processes may fetch the same
                    partial.write_bytes(archive.read(name))
                    partial.replace(to)
    except (OSError, subprocess.TimeoutExpired, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise Unreachable(f"no wheel of torch {version or ''} to be had: {error}") from error
    ready.touch()
    return found, ready.parent


def compile_against(include: Path, source: str, compiler: str) -> str:
    """The compiler's complaints; empty when it has none."""
    command = [
        compiler,
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Werror",
        "-fvisibility=hidden",
        "-Icpp",
        "-Icuda",
        "-isystem",
        str(include),
    ]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", *(["-DUSE_CUDA"] if "cuda" in source else [])]
    done = subprocess.run([*command, f"cpp/torch/{source}"], cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def main(versions: list[str | None]) -> int:
    failed = 0
    for version in versions:
        found, include = headers(version)
        for source in SOURCES:
            complaints = compile_against(include, source, os.environ.get("CXX", "c++"))
            print(f"torch {found}, {source}: {'does not compile' if complaints else 'compiles'}\n{complaints[-2000:]}".rstrip())
            failed += bool(complaints)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(list(sys.argv[1:]) or [OLDEST, None]))
