"""isa_check.cpp: every table against the scalar one, here and, where the tools are found, for aarch64 under emulation.

Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user-static

The cross compiler takes minutes. fixtures/aarch64.json holds what the sources with its digest have given; as long as they are the
same ``make test`` compares with that, and emulates nothing. After a change it emulates, until

    python tests/test_aarch64.py

has written the file anew.
"""

import functools
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sweep
from compiled import CXX, ROOT, compiled, digest

QEMU = next((name for name in ("qemu-aarch64-static", "qemu-aarch64") if shutil.which(name)), "qemu-aarch64")
CROSS = "aarch64-linux-gnu-g++"
NEON = ["scalar", "neon_dot", "neon_i8mm"]
COUNTS = {"cortex-a57": 1, "neoverse-n1": 2}  # of the tables that a processor runs


def core_sources() -> list[str]:
    return re.search(r"add_library\(core OBJECT([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()


def built_objects() -> list[str]:
    """What `make test` has compiled already, or nothing where ninja would compile any of it again."""
    cache = ROOT / "build/editable/CMakeCache.txt"
    program = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*ninja.*)$", cache.read_text() if cache.exists() else "", re.MULTILINE)
    if program is None or not Path(program[1]).exists():
        return []
    done = subprocess.run([program[1], "-C", cache.parent, "-n", "core"], check=False, capture_output=True, text=True)
    folder = cache.parent / "CMakeFiles/core.dir"
    return [str(folder / f"{source}.o") for source in core_sources()] if "no work to do" in done.stdout else []


# The flags of CMakeLists.txt that matter for the bits: without -ffp-contract=off, gcc contracts on aarch64.
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Icpp"]
# Half as long as -O2. `make test-all` compiles all as it is shipped; the products, whose machine code is looked at, always are.
QUICK_FLAGS = [*FLAGS, "-O1", "-fno-early-inlining"]
PRODUCTS = ["cpp/kernels/neon_dot.cpp", "cpp/kernels/neon_i8mm.cpp"]


RECORD = ROOT / "tests/fixtures/aarch64.json"


@functools.cache
def sources_digest() -> str:
    """Of all that the program is made of, and of how."""
    files = [path for folder in ("contract", "cpu", "kernels") for path in (ROOT / "cpp" / folder).rglob("*") if path.is_file()]
    files += [ROOT / "tests/isa_check.cpp", ROOT / "tests/isa_check.h"]
    named = {str(path.relative_to(ROOT)): digest(path.read_bytes()) for path in files}
    return digest(json.dumps([sorted(named.items()), FLAGS, QUICK_FLAGS, PRODUCTS]).encode())


def recorded() -> dict[str, str] | None:
    """The hashes of the emulated program if it was made of the sources as they are."""
    record = json.loads(RECORD.read_text())
    return record["hashes"] if record["sources"] == sources_digest() and not sweep.ALL else None


def native() -> Path:
    if CXX is None:
        pytest.skip("no C++ compiler")
    return compiled("isa_check", ["tests/isa_check.cpp", *(built_objects() or core_sources())], FLAGS)


def aarch64() -> Path:
    if shutil.which(CROSS) is None:
        pytest.skip(f"no {CROSS}")
    sources = ["tests/isa_check.cpp", *core_sources()]
    flags = {source: FLAGS if sweep.ALL or source in PRODUCTS else QUICK_FLAGS for source in sources}
    return compiled("isa_check_aarch64", flags, flags, compiler=CROSS, link_flags=["-static"])


@functools.cache
def hashes(*command: str | Path) -> dict[str, str]:
    """The hash of all results by instruction set."""
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if "CPU model" in run.stderr:
        pytest.skip(f"{QEMU} is too old: {run.stderr}")
    assert run.returncode == 0, run.stdout + run.stderr
    return dict(line.split() for line in run.stdout.splitlines())


def emulated() -> dict[str, str]:
    return recorded() or emulate("max")


def emulate(cpu: str) -> dict[str, str]:
    program = aarch64()
    if shutil.which(QEMU) is None:
        pytest.skip(f"no {QEMU}")
    return hashes(QEMU, "-cpu", cpu, program)


def test_all_tables_agree_here():
    found = hashes(native())
    assert next(iter(found)) == "scalar"
    assert len(set(found.values())) == 1, found


def test_all_tables_agree_on_aarch64():
    found = emulated()
    assert list(found) == NEON
    assert len(set(found.values())) == 1, found


def test_aarch64_gives_the_bits_of_this_machine():
    assert set(emulated().values()) == set(hashes(native()).values())


@pytest.mark.parametrize("cpu", COUNTS)
def test_a_processor_gets_the_tables_it_runs(cpu):
    """Armv8.0 has no dot product, Armv8.2 has one; an instruction that the processor lacks would end the program."""
    if recorded():
        pytest.skip(f"the sources are those of {RECORD.name}")
    assert list(emulate(cpu)) == NEON[: COUNTS[cpu]]


@pytest.mark.parametrize(("isa", "instruction"), [("neon_dot", "sdot"), ("neon_i8mm", "sudot")])
def test_accumulators_stay_in_registers(isa, instruction):
    """The inner loop of the full tile: 64 products and nothing on the stack."""
    if recorded() and platform.machine() != "aarch64":
        pytest.skip(f"the sources are those of {RECORD.name}")
    objdump = "objdump" if platform.machine() == "aarch64" else "aarch64-linux-gnu-objdump"
    program = native() if platform.machine() == "aarch64" else aarch64()
    if shutil.which(objdump) is None:
        pytest.skip(f"no {objdump}")
    text = subprocess.run([objdump, "-d", "-C", "--no-show-raw-insn", program], check=True, capture_output=True, text=True).stdout
    name = f"gemm_u8s8_8x8_{isa}<8>"
    body = re.search(rf"^[0-9a-f]+ <[^\n]*{re.escape(name)}[^\n]*>:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)[1].splitlines()
    addresses = [int(line.split(":")[0], 16) for line in body]
    first = next(i for i, line in enumerate(body) if f"\t{instruction}\t" in line)
    loop = None
    for i in range(first, len(body)):
        jump = re.search(r"\tb\.\w+\s+([0-9a-f]+)", body[i])
        if jump and int(jump[1], 16) in addresses[: first + 1]:
            loop = body[addresses.index(int(jump[1], 16)) : i + 1]
            break
    assert loop, "no loop"
    assert sum(f"\t{instruction}\t" in line for line in loop) == 64
    assert not [line for line in loop if re.search(r"\[sp|\[x29", line)]


if __name__ == "__main__":
    found = emulate("max")
    assert list(found) == NEON
    assert len(set(found.values())) == 1
    RECORD.write_text(json.dumps({"sources": sources_digest(), "hashes": found}, indent=2) + "\n")
