"""QUANT_OPS_LOG: a line for every call of an operator, with the kernel that it takes. Each in a process of its own."""

import re

import pytest
import torch
from test_info import python
from test_opcheck import SAMPLES

import quant_ops as qo
from quant_ops import _library

_SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = ["tests"]
import torch
from test_opcheck import SAMPLES
for op, samples in SAMPLES.items():
    for name, (args, kwargs) in list(samples.items())[:3]:
        print(f"{op} {name}", file=sys.stderr, flush=True)
        with torch.no_grad():
            getattr(torch.ops.quant_ops, op)(*args, **kwargs)
"""


COMPOSED = {"int8_linear_backward", "weight_only_linear_backward", "int8_conv2d_backward"}  # the operators within write lines


@pytest.fixture(scope="module")
def lines():
    """What each sample of test_opcheck writes: {(operator, sample): lines}."""
    done = python("-c", _SCRIPT, QUANT_OPS_LOG="1")
    assert done.returncode == 0, done.stderr
    found: dict[tuple[str, ...], list[str]] = {}
    key: tuple[str, ...] = ("import",)
    found[key] = []
    for line in done.stderr.splitlines():
        if line.startswith("quant_ops: "):
            found[key].append(line.removeprefix("quant_ops: "))
        else:
            found[key := tuple(line.split(" "))] = []
    del found["import",]  # making the samples calls operators too
    return found


def test_every_call_writes_one_line(lines):
    assert {op for op, _ in lines} == set(SAMPLES)
    known = set(_library.kernels().values())
    for (op, sample), written in lines.items():
        if op in COMPOSED:
            continue
        assert len(written) == 1, (op, sample, written)
        call, _, kernel = written[0].partition(") cpu: ")
        assert call.startswith(f"{op}("), written
        names = kernel.split(", ")
        assert all(n in known or re.fullmatch(r"gemm_u8s8_\d+x\d+_\w+|one_by_one|none", n) for n in names), written


def test_lines_have_shapes_and_kernels():
    script = """
import torch, quant_ops as qo
x, w, s = torch.ones(40, 64), torch.ones(80, 64, dtype=torch.int8), torch.ones(80, 1)
qo.int8_linear(x, w, s, packed_weight=qo.pack_weight(w), relu=True)
qo.int8_linear(x[:0], w, s)
qo.int8_conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3, dtype=torch.int8), torch.tensor(0.5), padding=1, groups=4)
qo.quant_tensor_forward(x.double(), torch.tensor(0.5), None, -8, 7)
qo.weight_only_linear(x, w, s)
try:
    qo.int8_linear(x[:, :3], w, s)
except ValueError:
    pass
"""
    done = python("-c", script, QUANT_OPS_LOG="1")
    assert done.returncode == 0, done.stderr
    packed = qo.pack_weight(torch.ones(80, 64, dtype=torch.int8)).numel()
    kernels = _library.kernels()
    assert done.stderr.splitlines() == [
        f"quant_ops: pack_weight(weight=int8(80, 64)) cpu: {kernels['pack']}",
        "quant_ops: int8_linear(x=float32(40, 64), weight=int8(80, 64), weight_scale=float32(80, 1), "
        f"packed_weight=int8({packed},), relu=True) cpu: {qo.kernel_for(40, 80, 64)}",
        "quant_ops: int8_linear(x=float32(0, 64), weight=int8(80, 64), weight_scale=float32(80, 1)) cpu: none",
        "quant_ops: int8_conv2d(x=float32(1, 4, 5, 5), weight=int8(4, 1, 3, 3), weight_scale=float32(), padding=(1,), "
        f"groups=4) cpu: {kernels['depthwise']}",
        "quant_ops: quant_tensor_forward(tensor=float64(40, 64), scale=float32(), zero_point=None, qmin=-8, qmax=7) "
        "cpu: one_by_one",
        "quant_ops: weight_only_linear(x=float32(40, 64), weight=int8(80, 64), weight_scale=float32(80, 1)) "
        f"cpu: {kernels['expand']}, {kernels['float_tile']}",
    ]


def test_lines_of_cuda(emulated_library):
    """With emulated kernels: a product has the name of its plan, another operator that of the first kernel that it launches."""
    script = f"""
import torch
torch.ops.load_library({str(emulated_library)!r})
ops = torch.ops.quant_ops_emulated
codes, s = torch.ones(40, 64, dtype=torch.int8), torch.ones(40, 1)
ops.int8_gemm(codes, codes)
ops.int8_linear(codes.float(), codes, s, relu=True)
ops.int8_conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3, dtype=torch.int8), torch.tensor(0.5), groups=4)
ops.weight_only_linear(torch.ones(2, 64), codes, s)
ops.quantize_rows(torch.ones(2, 4))
ops.int8_gemm(codes[:0], codes)
"""
    done = python("-c", script, QUANT_OPS_LOG="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    calls = [line.removeprefix("quant_ops: ").split(" cuda: ") for line in done.stderr.splitlines()]
    assert [call.split("(")[0] for call, _ in calls] == [
        *("int8_gemm", "int8_linear", "int8_conv2d", "weight_only_linear", "quantize_rows", "int8_gemm")
    ]
    assert calls[1][0] == "int8_linear(x=float32(40, 64), weight=int8(40, 64), weight_scale=float32(40, 1), relu=True)"
    patterns = [r"igemm_s8s8_\w+(:\d+)?", r"\w+_s8s8_\w+(:\d+)?", "depthwise|direct", r"weight_only_\w+", "kernel", "none"]
    assert all(re.fullmatch(p, kernel) for p, (_, kernel) in zip(patterns, calls, strict=True)), calls


@pytest.mark.parametrize("value", ["", "0"])
def test_no_log(value):
    done = python("-c", "import torch, quant_ops; quant_ops.quantize_rows(torch.ones(2, 2))", QUANT_OPS_LOG=value)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_value_that_is_neither_is_refused():
    script = """
import torch, quant_ops
for call in (quant_ops.quantize_rows, torch.ops.quant_ops.quantize_rows):
    try:
        call(torch.ones(2, 2))
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""
    done = python("-c", script, QUANT_OPS_LOG="yes")
    sentence = "quant_ops: expected QUANT_OPS_LOG to be 0 or 1, got 'yes'. Unset it to write no log."
    assert (done.returncode, done.stdout.splitlines()) == (0, [sentence] * 2), done.stderr


def test_fake_kernels_write_nothing():
    script = """
import torch, quant_ops as qo
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    qo.quantize_rows(torch.ones(2, 2))
"""
    done = python("-c", script, QUANT_OPS_LOG="1")
    assert (done.returncode, done.stderr) == (0, "")
