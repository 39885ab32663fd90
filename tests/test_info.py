"""``python -m quant_ops info``, the environment variables, and what importing does: each in a process of its own."""

import json
import os
import re
import subprocess
import sys

import processes
import pytest
import torch

import quant_ops as qo
from quant_ops import _library, info

ISAS = _library.isas()


def python(*arguments, **environment):
    """Runs Python with the variables of quant_ops set to exactly these."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("QUANT_OPS_")}
    return processes.python(*arguments, environment=clean | environment)


# ---- info --------------------------------------------------------------------------------------------------------------------


def test_info():
    done = python("-m", "quant_ops", "info")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "OK"
    assert any(line.split() == ["quant_ops:", qo.__version__] for line in lines)
    assert any(line.split() == ["torch:", torch.__version__] for line in lines)
    assert f"isa_available:  {', '.join(ISAS)}" in lines
    kernels = dict(line.split(None, 1) for line in lines[lines.index("kernels:") + 1 : -1])
    assert kernels["int8_gemm"] == kernels["int8_linear"]
    assert kernels["int8_gemm"].startswith("gemm_")
    assert kernels["int8_gemm"].endswith(ISAS[-1])
    names = (name.removeprefix("quant_ops::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("quant_ops::"))
    assert set(kernels) == {name for name in names if not name.startswith("_")} - {
        *("pack_weight", "unpack_weight", "transpose_packed_weight", "pack_weight_only", "unpack_weight_only"),
        *("int8_linear_backward", "weight_only_linear_backward", "int8_conv2d_backward"),  # compositions of others
        "int8_upsample_nearest2d",  # copies
    }


@pytest.mark.parametrize("isa", ISAS)
def test_info_json_honours_the_instruction_set(isa):
    done = python("-m", "quant_ops", "info", "--json", QUANT_OPS_ISA=isa)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "OK"
    assert report["isa"] == report["isa_override"] == isa
    assert report["isa_available"] == ISAS
    assert report["library"] == str(_library.cpu_library)
    full, *few = report["kernels"]["int8_linear"].split(", ")
    assert full.endswith(f"_{isa}")
    assert len(few) == (isa == "amx")  # a few rows are another set's
    assert all(name.endswith("_avx512vnni") for name in few)
    depthwise, vectors = report["kernels"]["int8_conv2d"], report["kernels"]["quant_tensor_forward"]
    assert depthwise.endswith(f", {isa}::depthwise")
    assert isa.startswith(vectors.removesuffix("::quantize")) or isa == "amx"  # sets with the same vectors share their kernels


def test_info_says_what_is_wrong():
    for arguments in (["info"], ["info", "--json"]):
        done = python("-m", "quant_ops", *arguments, QUANT_OPS_ISA="sse9")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        reason = json.loads(done.stdout)["status"] if "--json" in arguments else done.stdout.splitlines()[-1]
        expected = f"quant_ops: expected QUANT_OPS_ISA to be one of {', '.join(ISAS)} on this machine, got 'sse9'. "
        assert reason == expected + "Unset it to choose automatically."


def test_info_reports_a_failed_check(monkeypatch):
    """The self-check can fail: it compares with int64 arithmetic, not with itself."""
    right = qo.ops.int8_gemm
    monkeypatch.setattr(info.ops, "int8_gemm", lambda a, b: right(a, b) + 1)
    assert info.collect()["status"] == "int8_gemm disagrees with int64 arithmetic"
    monkeypatch.undo()
    linear = qo.ops.int8_linear
    monkeypatch.setattr(info.ops, "int8_linear", lambda *a: torch.nextafter(linear(*a), torch.tensor(torch.inf)))
    report = info.collect()
    assert report["status"].startswith("int8_linear disagrees")
    assert info.text(report).splitlines()[-1] == report["status"]
    monkeypatch.undo()
    assert info.collect()["status"] == "OK"


def test_command_line_without_a_command():
    done = python("-m", "quant_ops")
    assert done.returncode == 2
    assert "usage: python -m quant_ops" in done.stderr


# ---- for bug reports ---------------------------------------------------------------------------------------------------------


def test_collect_env():
    report = qo.collect_env()
    for words in (
        f"quant_ops: {qo.__version__}",
        f"torch: {torch.__version__}",
        "compiler of the library: GCC",
        f"processor: {info.cpu_model()}",
        f"instruction set: {_library.isa()}, ",
        f"threads: {torch.get_num_threads()} of torch",
        f"  {_library.cpu_library}",
        "  int8_linear: gemm_",
    ):
        assert words in report, words
    assert report.splitlines()[-1] == "check of the kernels: OK"
    assert sum("libtorch_cpu" in line for line in report.splitlines()) == 1


def test_info_env_of_a_forced_and_a_refused_instruction_set():
    done = python("-m", "quant_ops", "info", "--env", QUANT_OPS_ISA="scalar", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "instruction set: scalar, forced by QUANT_OPS_ISA\n" in done.stdout
    assert "variables:\n" in done.stdout
    assert "  OMP_NUM_THREADS: 1\n" in done.stdout
    assert "  QUANT_OPS_ISA: scalar\n" in done.stdout
    refused = python("-m", "quant_ops", "info", "--env", "--json", QUANT_OPS_ISA="sse9", CXX="no-such-compiler")
    assert refused.returncode == 1
    report = json.loads(refused.stdout)
    assert report["status"].startswith("quant_ops: expected QUANT_OPS_ISA to be one of ")
    assert report["instruction set"] == "none, QUANT_OPS_ISA=sse9 is refused"
    assert report["compiler found"] == "none named no-such-compiler"


# ---- import ------------------------------------------------------------------------------------------------------------------


def test_import_prints_nothing():
    command = [sys.executable, "-W", "error::DeprecationWarning:quant_ops", "-c", "import quant_ops"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_leaves_torch_as_it_was():
    """No global setting changes: threads, default dtype, grad mode, deterministic mode."""
    script = """
import torch
state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
                 torch.are_deterministic_algorithms_enabled(), torch.initial_seed(), torch.random.get_rng_state().sum().item())
torch.manual_seed(3)
before = state()
import quant_ops
from quant_ops import _library
_library.load()
assert state() == before
"""
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_libraries(tmp_path):
    done = python("-c", "import quant_ops", QUANT_OPS_LIBRARY_DIR=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: quant_ops: expected libquant_ops.so beside the package, found none in {tmp_path}. ")
    assert last.endswith("Build it with: pip install --no-build-isolation .")


def test_a_broken_library(tmp_path):
    (tmp_path / "libquant_ops.so").write_bytes(b"not a library")
    done = python("-c", "import quant_ops", QUANT_OPS_LIBRARY_DIR=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: quant_ops: {tmp_path / 'libquant_ops.so'} does not load under torch {torch.__version__}: "
    )
    assert last.endswith("Rebuild it with: pip install --no-build-isolation .")


def test_libraries_from_another_folder():
    done = python("-c", "import quant_ops", QUANT_OPS_LIBRARY_DIR=str(_library.cpu_library.parent))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- instruction sets --------------------------------------------------------------------------------------------------------

_EVERY_OPERATOR = """
import torch, quant_ops as qo
x, q, s = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.int8), torch.tensor(0.5)
image, kernel = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1, dtype=torch.int8)
calls = {
    "quant_tensor_forward": lambda: qo.quant_tensor_forward(x, s, None, -8, 7),
    "quant_tensor_backward": lambda: qo.quant_tensor_backward(x, x, s, None, -8, 7),
    "dequant_tensor": lambda: qo.dequant_tensor(q, s),
    "choose_qparams": lambda: qo.choose_qparams(x, [], -127, 127),
    "quantize_rows": lambda: qo.quantize_rows(x),
    "int8_gemm": lambda: qo.int8_gemm(q, q),
    "int8_linear": lambda: qo.int8_linear(x, q, s),
    "int8_conv2d": lambda: qo.int8_conv2d(image, kernel, s),
    "int8_attention": lambda: qo.int8_attention(image, image, image),
    "norm_quantize_rows": lambda: qo.norm_quantize_rows(x, None, None, 1e-5),
    "raw": lambda: torch.ops.quant_ops.int8_linear(x, q, s),
}
for name, call in calls.items():
    try:
        call()
        print(name, "ran")
    except RuntimeError as error:
        print(name, str(error).split("\\n")[0])
"""


def test_operators_refuse_an_unknown_instruction_set():
    done = python("-c", _EVERY_OPERATOR, QUANT_OPS_ISA="avx1024")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 11
    for line in lines:
        reason = line.split(" ", 1)[1]
        assert reason.startswith("quant_ops: expected QUANT_OPS_ISA to be one of scalar"), line
        assert reason.endswith("got 'avx1024'. Unset it to choose automatically."), line


def test_empty_means_automatic():
    done = python("-c", "from quant_ops import _library; print(_library.isa(), _library.isas()[-1])", QUANT_OPS_ISA="")
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1


def test_set_isa_round_trip():
    automatic = _library.isa()
    try:
        for name in ISAS:
            assert _library.set_isa(name) == name
            assert _library.isa() == name
            assert _library.gemm_kernel().endswith(name)
        with pytest.raises(RuntimeError, match=r"^quant_ops: expected the instruction set to be one of .*, got 'mmx'\."):
            _library.set_isa("mmx")
        assert _library.isa() == ISAS[-1]  # the refused name changed nothing
    finally:
        assert _library.set_isa(None) == automatic


def test_set_isa_none_goes_back_to_the_environment():
    script = "from quant_ops import _library as l; print(l.isa(), l.set_isa('scalar'), l.set_isa(None))"
    done = python("-c", script, QUANT_OPS_ISA=ISAS[len(ISAS) // 2])
    assert done.stdout.split() == [ISAS[len(ISAS) // 2], "scalar", ISAS[len(ISAS) // 2]]


def test_isas_begin_with_scalar():
    assert ISAS[0] == "scalar"
    assert len(set(ISAS)) == len(ISAS)


def test_printed_names_are_those_of_the_library():
    """What info prints are entries of the table, by the names that the functions have in the library."""
    names = _library.kernels()
    printed = {name for kernels in info.collect()["kernels"].values() for name in kernels.split(", ")}
    assert printed <= set(names.values())
    assert all(name.split("::")[-1] == entry for entry, name in names.items() if not entry.startswith("gemm"))


@pytest.mark.parametrize("isa", ISAS)
def test_kernel_for_names_the_tile(isa):
    """A full tile, a slim one where all columns fit into half a panel, and a lower one for few rows."""
    _library.set_isa(isa)
    try:
        rows = {m: int(re.fullmatch(rf"gemm_u8s8_(\d+)x\d+_({isa}|avx512vnni)", qo.kernel_for(m, 32, 4096))[1]) for m in (1, 128)}
        full = int(re.fullmatch(rf"gemm_u8s8_(\d+)x\d+_{isa}", qo.kernel_for(128, 4096, 4096))[1])
    finally:
        _library.set_isa(None)
    assert rows[1] == 1
    assert rows[128] >= full >= rows[1]


def test_kernel_for_names_the_kernel():
    assert qo.kernel_for(128, 64, 64) == _library.gemm_kernel() == _library.kernels()["gemm"]
    assert qo.kernel_for(1, 64, 64) == _library.gemm_kernel(1, 64)
    for arguments in ((0, 1, 1, "cpu"), (1, 1, 1, "meta")):
        with pytest.raises(ValueError, match=r"quant_ops\.kernel_for: expected sizes of at least 1 and device cpu or cuda"):
            qo.kernel_for(*arguments)
    if _library.cuda_library is None:
        with pytest.raises(RuntimeError, match="CUDA"):
            qo.kernel_for(1, 64, 64, "cuda")
