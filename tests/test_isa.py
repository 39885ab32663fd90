"""Instruction sets: which one is chosen, what its inner loops are made of, and AMX in software where the processor has none."""

import functools
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import test_build
import test_kernels

from quant_ops import _library

kernels = pytest.importorskip("quant_ops._kernels", reason="built for development only: pip install --no-build-isolation -e .")

ORDER = {  # worst first
    "x86_64": ["scalar", "avx2", "avx512", "avxvnni", "avx512vnni", "amx"],
    "aarch64": ["scalar", "neon_dot", "neon_i8mm"],
}.get(platform.machine(), ["scalar"])
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
FLAGS = {  # as the kernel names them
    "scalar": set(),
    "avx2": AVX2,
    "avx512": AVX512,
    "avxvnni": AVX2 | {"avx_vnni"},
    "avx512vnni": AVX512 | {"avx512_vnni"},
    "amx": AVX512 | {"avx512_vnni", "amx_tile", "amx_int8"},
    "neon_dot": {"asimddp"},
    "neon_i8mm": {"asimddp", "i8mm"},
}


@pytest.fixture
def environment(monkeypatch):
    """Sets QUANT_OPS_ISA and lets the library choose anew; the former choice comes back afterwards."""

    def choose(name: str | None) -> str:
        if name is None:
            monkeypatch.delenv("QUANT_OPS_ISA", raising=False)
        else:
            monkeypatch.setenv("QUANT_OPS_ISA", name)
        return _library.set_isa(None)

    yield choose
    monkeypatch.undo()
    _library.set_isa(None)


def processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


# ---- dispatch ---------------------------------------------------------------------------------------------------------------


def test_sets_are_listed_worst_first():
    assert _library.isas() == [isa for isa in ORDER if isa in _library.isas()]
    assert _library.isas()[0] == "scalar"
    assert kernels.isas() == _library.isas()


def test_a_set_runs_where_the_processor_has_it():
    flags = processor_flags()
    for isa in set(ORDER) - {"amx"}:
        assert (isa in _library.isas()) == (FLAGS[isa] <= flags), isa
    if "amx" in _library.isas():  # not the other way round: the system may refuse the permission
        assert FLAGS["amx"] <= flags


def test_the_best_set_is_chosen(environment):
    assert environment(None) == _library.isas()[-1]
    assert environment("") == _library.isas()[-1]


@pytest.mark.parametrize("isa", ORDER)
def test_environment_variable_names_the_set(environment, isa):
    if isa in _library.isas():
        assert environment(isa) == isa
        assert _library.isa() == isa
    else:
        with pytest.raises(
            RuntimeError, match=f"QUANT_OPS_ISA to be one of {', '.join(_library.isas())} on this machine, got '{isa}'"
        ):
            environment(isa)


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx", " avx2", "amx_emulated"])
def test_unknown_sets_are_errors(environment, name):
    with pytest.raises(RuntimeError, match=f"QUANT_OPS_ISA to be one of .*, got '{name}'"):
        environment(name)
    with pytest.raises(RuntimeError, match=f"the instruction set to be one of .*, got '{name}'"):
        _library.set_isa(name)


# ---- machine code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "instruction", "products"),
    [("gemm_u8s8_12x16_avx512<12>", "vpmaddwd", 24), ("gemm_u8s8_6x16_avxvnni<6>", "vpdpbusd", 12)],
)
def test_accumulators_stay_in_registers(kernel, instruction, products):
    """As in test_build.py: the inner loop of the full tile multiplies and never touches the stack."""
    (body,) = (body for name, body in test_build.disassembly().items() if kernel in name)
    loop = test_build.innermost_loop(body, instruction)
    assert sum(instruction in line for line in loop) == products
    assert not [line for line in loop if "rsp" in line or "rbp)" in line]


def test_tiles_stay_in_registers():
    """The loop of the full AMX tile loads four tiles, multiplies four pairs and stores nothing but gathered activations."""
    (body,) = (body for name, body in test_build.disassembly().items() if "sweep_amx<2, 2>" in name)
    loop = "\n".join(test_build.innermost_loop(body, "tdpbusd"))
    assert {name: loop.count(name) for name in ("tdpbusd", "tileloadd", "tilestored", "tilezero", "tilecfg")} == {
        "tdpbusd": 4,
        "tileloadd": 4,
        "tilestored": 0,
        "tilezero": 0,
        "tilecfg": 0,
    }


@pytest.mark.parametrize("isa", kernels.isas())
def test_names_of_kernels_are_those_of_functions(isa):
    """A table names every kernel as the linker does; instruction sets with the same vectors share the kernels that need no more."""
    names = dict(kernels.kernel_names(isa))
    assert {"gemm", "depthwise", "quantize", "dequantize", "straight_through", "range", "codes", "pack"} <= set(names)
    assert {"quantize_float", "quantize_blocks", "quantize_block_columns", "random_words"} <= set(names)
    assert ("dot" in names) == (isa == "avx512vnni")
    assert names["gemm"] == kernels.gemm_name(isa, kernels.gemm_rows(isa), 64)
    if "quant_ops::scalar::" not in (symbols := test_build.tool("nm", "-C", test_build.LIBRARY)):
        pytest.skip("a stripped library")
    for entry in set(names) - {"gemm", "gemm_few_rows"}:
        space, function = names[entry].split("::")
        assert re.search(rf"quant_ops::{space}::\(anonymous namespace\)::{function}[(<]", symbols), names[entry]


@pytest.mark.parametrize("isa", kernels.isas())
def test_the_gemm_is_named_after_the_tile_that_runs(isa):
    tiles = {  # (rows, width of the panel): rows x columns of sums in registers
        "scalar": {(6, 64): "6x64", (1, 16): "1x16"},
        "avx2": {(6, 64): "6x8", (3, 64): "3x16", (1, 64): "1x32", (1, 16): "1x8"},
        "avx512": {(12, 64): "12x16", (6, 64): "6x32", (6, 16): "6x16", (1, 64): "1x64"},
        "avxvnni": {(6, 64): "6x16", (3, 64): "3x32", (1, 64): "1x64", (1, 32): "1x16"},
        "avx512vnni": {(6, 64): "6x64", (12, 32): "12x32", (12, 16): "12x16", (1, 48): "1x48"},
        "amx": {(32, 64): "32x32", (7, 16): "7x16"},
        "neon_dot": {(8, 64): "8x8", (4, 64): "4x16", (1, 64): "1x32", (1, 16): "1x16"},
        "neon_i8mm": {(8, 64): "8x8", (4, 64): "4x16", (1, 64): "1x32", (1, 16): "1x16"},
    }
    for (rows, width), tile in tiles[isa].items():
        assert kernels.gemm_name(isa, rows, width) == f"gemm_u8s8_{tile}_{isa}"


def test_kernels_are_private():
    """A kernel that the linker may share between objects would run with the instructions of any of them."""
    symbols = re.findall(r"^[0-9a-f]* (\w) (.*gemm_u8s8.*)$", test_build.tool("nm", "-C", test_build.LIBRARY), re.MULTILINE)
    if not symbols:
        pytest.skip("a stripped library")
    assert {kind for kind, _ in symbols} <= {"t", "r"}
    assert {isa for isa in ORDER if any(isa in name for _, name in symbols)} == set(ORDER)


# ---- AMX in software --------------------------------------------------------------------------------------------------------

emulated = pytest.mark.parametrize("isa", kernels.emulated_isas())


@emulated
@pytest.mark.parametrize("fill", ["random", "max", "min", "alternating", "sparse"])
def test_emulated_gemm_is_exact_for_all_small_shapes(isa, fill):
    test_kernels.test_gemm_is_exact_for_all_small_shapes(isa, fill)


@emulated
def test_emulated_gemm_wraps_and_comes_back(isa):
    test_kernels.test_gemm_sums_wrap_and_come_back_at_the_largest_k(isa)


@emulated
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8"])
def test_emulated_epilogue_rounds_as_specified(isa, dtype):
    test_kernels.test_epilogue_rounds_as_specified(isa, dtype, relu=True, with_bias=True)


@functools.cache
def products(taps: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations [taps, 70, 4 quads], weights [80, k, taps] and their exact products."""
    rng = np.random.default_rng(taps * 1000 + k)
    a = rng.integers(0, 256, (taps, 70, (k + 3) // 4 * 4)).astype(np.uint8)
    b = rng.integers(-128, 128, (80, k, taps)).astype(np.int8)
    return a, b, np.einsum("tmk,nkt->mn", a[:, :, :k].astype(np.int64), b.astype(np.int64))


@pytest.mark.parametrize("isa", [*test_kernels.ISAS, *kernels.emulated_isas()])
@pytest.mark.parametrize(
    ("taps", "k"),
    # blocks of k that end inside a tap, span two or many, and a rest of every kind; more k than a chunk of avx2 and avx512 holds
    [
        *((1, k) for k in (64, 68, 300, 1024, 1028, 2500)),
        *((2, 8), (2, 64), (3, 30), (4, 128), (9, 3), (9, 64), (9, 65), (9, 120), (25, 16), (40, 28), (300, 4)),
    ],
)
def test_blocks_of_k_may_span_taps(isa, taps, k):
    a, b, expected = products(taps, k)
    ones, zeros = np.ones(96, np.float32), np.zeros(96, np.float32)
    for n, rows in [(80, kernels.gemm_rows(isa)), (33, kernels.gemm_rows(isa)), (17, 1), (64, 5), (1, 3)]:
        y = test_kernels.Guarded((70, n), np.int32)
        kernels.gemm(isa, a, b[:n], y.view, "int32", np.zeros(70, np.int32), ones[:70], ones, zeros, rows=rows)
        assert np.array_equal(y.view, expected[:, :n]), (n, rows)
        y.check()
