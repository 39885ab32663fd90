"""The compiled library: nothing wide leaks into baseline code, inner loops stay in registers, torch only by its stable ABI."""

import functools
import platform
import re
import shutil
import subprocess

import pytest
import sweep
import torch_headers
from compiled import CXX, ROOT, made

from quant_ops import _library

LIBRARY = str(_library.cpu_library)


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} on this machine")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def disassembly() -> dict[str, list[str]]:
    """The instructions of every function, by demangled name."""
    if platform.machine() != "x86_64":
        pytest.skip("the instructions of x86-64 are looked for; test_aarch64.py looks for others")
    if "gemm_u8s8" not in tool("nm", "-C", LIBRARY):
        pytest.skip("a stripped library: its functions cannot be told apart. Install with: pip install --no-build-isolation -e .")
    functions: dict[str, list[str]] = {}
    for line in tool("objdump", "-d", "-C", "--no-show-raw-insn", LIBRARY).splitlines():
        if header := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            body = functions.setdefault(header[1], [])
        elif "\t" in line:
            body.append(line)
    return functions


def innermost_loop(body: list[str], instruction: str) -> list[str]:
    """The instructions between the target of the first backward jump after `instruction` and that jump."""
    addresses = [int(line.split(":")[0], 16) for line in body]
    first = next(i for i, line in enumerate(body) if instruction in line)
    for i in range(first, len(body)):
        jump = re.search(r"\tj\w+ +([0-9a-f]+)", body[i])
        if jump and int(jump[1], 16) <= addresses[first] and int(jump[1], 16) in addresses:
            return body[addresses.index(int(jump[1], 16)) : i + 1]
    raise AssertionError(f"no loop around {instruction}")


@pytest.mark.parametrize(
    ("kernel", "instruction", "products"),
    [("gemm_u8s8_avx512vnni<6, 64>", "vpdpbusd", 24), ("gemm_u8s8_6x8_avx2<6, 64>", "vpmaddwd", 12)],
)
def test_accumulators_stay_in_registers(kernel, instruction, products):
    """The inner loop of the full tile multiplies and never touches the stack: with spills half of the speed is lost."""
    (body,) = (body for name, body in disassembly().items() if kernel in name)
    loop = innermost_loop(body, instruction)
    assert sum(instruction in line for line in loop) == products
    assert not [line for line in loop if "rsp" in line or "rbp)" in line]


def test_saturating_products_are_not_used():
    """vpmaddubsw and vpdpbusds saturate: their sums are not exact, but for those of 4-bit weights, whose pairs stay below 2^12."""
    if platform.machine() != "x86_64":
        pytest.skip("instructions of x86-64")
    text = tool("objdump", "-d", "--no-show-raw-insn", LIBRARY)
    assert "vpdpbusd " in text
    users = [name for name, body in disassembly().items() if any("vpmaddubsw" in line for line in body)]
    assert all(name.endswith("::nibbles(quant_ops::NibbleTile const&, long)") for name in users)
    assert "vpdpbusds" not in text


def test_wide_instructions_stay_in_their_kernels():
    """Outside the kernels of an instruction set no function uses ymm or zmm registers: it would not run on a plain processor."""
    wide = [name for name, body in disassembly().items() if any("%ymm" in line or "%zmm" in line for line in body)]
    assert wide
    # kernels have internal linkage, in an unnamed namespace; shared inline functions would show up with another name
    assert not [name for name in wide if "(anonymous namespace)" not in name]


def test_kernel_headers_open_alone():
    """As an editor opens them: with explicit includes, and a scalar Simd where no instruction set is named.

    Not module.h, which needs pybind11.
    """
    if CXX is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-fsyntax-only", "-Wno-psabi", "-x", "c++", "-Icpp"]
    for path in sweep.part(sorted(path for path in (ROOT / "cpp/kernels").rglob("*.h") if path.name != "module.h"), 5):
        made(path.name, [CXX, *flags, str(path.relative_to(ROOT))])


def test_torch_is_used_through_its_stable_abi_only():
    symbols = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", LIBRARY).splitlines()]
    assert not [s for s in symbols if re.search(r"N2at|N3c10|N5torch", s)]
    assert any(s.startswith("torch_call_dispatcher") for s in symbols)


def test_library_has_no_search_path_of_the_build_machine():
    assert not re.search(r"R(UN)?PATH", tool("readelf", "-d", LIBRARY))


@pytest.mark.parametrize("version", [torch_headers.OLDEST, pytest.param(None, marks=pytest.mark.slow)], ids=["oldest", "newest"])
def test_bindings_compile_with_every_supported_torch(version):
    """Of the CPU and of CUDA, against the headers of the oldest torch that is supported and of the newest that pip offers."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    try:
        found, include = torch_headers.headers(version)
    except torch_headers.Unreachable as error:
        pytest.skip(str(error))
    for source in torch_headers.SOURCES:
        complaints = torch_headers.compile_against(include, source, CXX)
        assert not complaints, f"torch {found}, {source}: {complaints[-4000:]}"
