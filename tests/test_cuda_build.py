"""What can be checked of the CUDA operators without a GPU.

* The kernels run on the host (host_emulation.h) over all cases of test_cuda.py: addresses, arithmetic and summation order.
* The address arithmetic and the division-free quotient, exhaustively where that is possible.
* The library that ``make cuda-build`` makes loads beside a torch for the CPU, registers its operators, and spills no registers.
* Fake kernels describe CUDA tensors as the operators make them.
"""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from compiled import CXX, ROOT, compiled_for_host, source_file
from test_cuda import KernelCases, Subject
from torch._subclasses.fake_tensor import FakeTensorMode

import quant_ops as qo
from quant_ops import _library

BUILD = ROOT / "build" / "cuda"
BUILT = BUILD / "libquant_ops_cuda.so"
OPERATORS = [
    "quant_tensor_forward",
    "quant_tensor_backward",
    "dequant_tensor",
    "choose_qparams",
    "quantize_rows",
    "int8_gemm",
    "int8_linear",
    "int8_conv2d",
    "pack_weight",
]
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_library = pytest.mark.skipif(not BUILT.is_file(), reason=f"{BUILT.relative_to(ROOT)} is not built: make cuda-build")


@needs_compiler
class TestEmulated(KernelCases):
    @pytest.fixture
    def subject(self, emulated):
        return Subject(emulated, "cpu")


ARITHMETIC = r"""
#include <cstdio>
#include <random>
#include "device/layout.cuh"
#include "device/quotient.cuh"
using namespace quant_ops;

static int fail(const char* what) { std::printf("%s\n", what); return 1; }
static bool same_code(float x, float s, float r) {
  const double lo = -16777216.0, hi = 16777216.0;  // the widest bounds that take this path
  const double a = clamp_steps<double>(quantize_steps(x, s), lo, hi);
  const double b = clamp_steps<double>(round_even(mended_quotient(x, s, r)) + 0.0f, lo, hi);
  return a == b || (a != a && b != b);
}

int main() {
  std::mt19937_64 random(1);
  // FastDiv: around multiples of divisors of every size
  for (int i = 0; i < 2000000; ++i) {
    const int64_t d = static_cast<int64_t>(random() >> (1 + random() % 63)) + 1;
    const int64_t n = static_cast<int64_t>(random() >> (1 + random() % 63));
    const FastDiv div(d);
    const int64_t multiple = n / d * d;
    for (int64_t m : {n, multiple, multiple - 1})
      if (m >= 0 && div.quotient(m) != m / d) return fail("FastDiv");
  }
  // every bfloat16 over random scales
  for (int i = 0; i < 200; ++i) {
    const float s = bits_float(static_cast<uint32_t>(random()) & 0x7fffffffu), r = safe_reciprocal(s);
    if (r == 0.0f) continue;
    for (uint32_t b = 0; b < 65536; ++b)
      if (!same_code(bits_float(b << 16), s, r)) return fail("quotient of bfloat16");
  }
  // floats next to ties, for scales with long and short significands
  for (int i = 0; i < 4000000; ++i) {
    uint32_t bits = (static_cast<uint32_t>(random()) & 0x7fffffu) | static_cast<uint32_t>(68 + random() % 119) << 23;
    if (random() % 4 == 0) bits |= 0x7ffff0u;
    const float s = bits_float(bits), r = safe_reciprocal(s);
    if (r == 0.0f) return fail("scales within 2^-59 .. 2^59 have a safe reciprocal");
    const double k = static_cast<double>(static_cast<int64_t>(random() >> (40 + random() % 23))) + 0.5;
    const float tie = static_cast<float>(k * s);
    for (int32_t ulp = -3; ulp <= 3; ++ulp) {
      const float x = bits_float(float_bits(tie) + static_cast<uint32_t>(ulp));
      if (!same_code(x, s, r) || !same_code(-x, s, r)) return fail("quotient next to a tie");
    }
  }
  for (float s : {8.67361737988403547e-19f, 1.15292150460684698e18f, 1.0f, 3.0f})
    for (uint32_t b = 0; b < 0xffffff00u; b += 251)
      if (!same_code(bits_float(b), s, safe_reciprocal(s))) return fail("quotient over all exponents");
  for (float s : {0.0f, -1.0f, 1e-38f, 1e-45f, 3e38f, bits_float(0x7f800000u), bits_float(0x7fc00000u)})
    if (safe_reciprocal(s) != 0.0f) return fail("unsafe scales are divided by");
  return 0;
}
"""


@needs_compiler
def test_fast_division_and_mended_quotient():
    program = compiled_for_host("arithmetic", [source_file("arithmetic.cc", ARITHMETIC)], "-O2")
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


ROWS_WITH_PADDING = r"""
#include <cstdio>
#include <random>
#include <vector>
#include "launch.h"
using namespace quant_ops;

// The second user of the row kernels, a GEMM, takes rows whose stride is rounded up, with zeros behind the codes.
int main() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int64_t rows : {1, 3, 19})
    for (int64_t columns : {0, 1, 3, 16, 31, 130, 1000, 2500, 20000})
      for (int64_t padding : {0, 1, 15, 40})
        for (bool asymmetric : {false, true}) {
          if (rows * columns > 20000) continue;
          const int64_t x_stride = columns + padding % 3, q_stride = columns + padding;
          std::vector<float> x(static_cast<size_t>(rows * x_stride + 1));
          for (float& v : x) v = normal(random) + 0.5f;
          std::vector<int8_t> q(static_cast<size_t>(rows * q_stride + 2), 99);
          std::vector<float> scale(static_cast<size_t>(rows));
          std::vector<int32_t> zero(static_cast<size_t>(rows), 12345);
          quantize_rows_cuda(QuantizeRowsParams{rows, columns, x.data(), x_stride, DType::kFloat32, q.data() + 1, scale.data(),
                                                asymmetric ? zero.data() : nullptr, asymmetric}, q_stride, {"", nullptr, nullptr});
          bool ok = q.front() == 99 && q.back() == 99;
          for (int64_t r = 0; r < rows; ++r) {
            float min = 0, max = 0;
            for (int64_t c = 0; c < columns; ++c) {
              min = std::fmin(min, x[r * x_stride + c]);
              max = std::fmax(max, x[r * x_stride + c]);
            }
            const int32_t lowest = asymmetric ? -128 : -127;
            const auto p = choose_qparams_of(min, max, true, lowest, 127, asymmetric);
            ok = ok && scale[r] == p.scale && zero[r] == (asymmetric ? p.zero_point : 12345);
            for (int64_t c = 0; c < q_stride; ++c) {
              int64_t code = c < columns ? static_cast<int64_t>(quantize_steps(x[r * x_stride + c], p.scale)) + p.zero_point : 0;
              if (c < columns) code = code < lowest ? lowest : code > 127 ? 127 : code;
              ok = ok && q[1 + r * q_stride + c] == code;
            }
          }
          if (!ok) {
            std::printf("rows %d columns %d padding %d asymmetric %d\n", int(rows), int(columns), int(padding), asymmetric);
            return 1;
          }
        }
  return 0;
}
"""


@needs_compiler
def test_rows_with_padding():
    program = compiled_for_host("rows", [source_file("rows.cc", ROWS_WITH_PADDING), "cuda/quantize_rows.cu"])
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@needs_library
def test_library_loads_and_registers_operators():
    output = run_python(
        f"import torch; [torch.ops.load_library(p) for p in ({str(_library.cpu_library)!r}, {str(BUILT)!r})]\n"
        f"for name in {OPERATORS}: print(torch._C._dispatch_has_kernel_for_dispatch_key('quant_ops::' + name, 'CUDA'))"
    )
    assert output.split() == ["True"] * len(OPERATORS)


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_library_needs_no_cuda_library():
    output = subprocess.run(["nm", "-D", "--undefined-only", str(BUILT)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in output.splitlines()]
    of_cuda = {
        name: kind for kind, name in symbols if re.match(r"cuda[A-Z]|cu[A-Z]|__cuda|.*_cuda_(stream|guard|check|blas)", name)
    }
    assert of_cuda == {"aoti_torch_get_current_cuda_stream": "w"}


@needs_library
def test_no_kernel_spills_registers():
    logs = list(BUILD.glob("ptxas-*.log"))
    assert logs, "the build keeps the words of ptxas"
    for log in logs:
        usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.read_text())
        assert usage, log
        assert set(usage) == {("0", "0", "0")}, log


# ---- fake kernels ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simulate", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fakes_describe_cuda_tensors(simulate, layout):
    real = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    expected = torch.ops.quant_ops.quant_tensor_forward(real, torch.ones(3, 1, 1), None, 0, 255, False, simulate)
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, device="cuda", memory_format=layout)
        scale = torch.empty(3, 1, 1, device="cuda")
        y = torch.ops.quant_ops.quant_tensor_forward(x, scale, None, 0, 255, False, simulate)
        assert (y.device.type, y.dtype, y.shape, y.stride()) == ("cuda", expected.dtype, expected.shape, expected.stride())
        z = torch.empty(3, 1, 1, device="cuda", dtype=torch.int32)
        dx, ds, dz = torch.ops.quant_ops.quant_tensor_backward(x, x, scale, z, 0, 255, True)
        assert (dx.device.type, dx.dtype, dx.stride()) == ("cuda", x.dtype, x.stride())
        assert (ds.device.type, ds.shape, dz.shape, dz.dtype) == ("cuda", scale.shape, z.shape, torch.float32)
        codes = torch.empty(2, 3, 4, 5, device="cuda", dtype=torch.int8)
        back = qo.dequant_tensor(codes, scale, None, torch.bfloat16)
        assert (back.device.type, back.dtype, back.stride()) == ("cuda", torch.bfloat16, codes.stride())
        s, z = qo.choose_qparams(x, [0, 2, 3], -128, 127)
        assert (s.device.type, s.shape, s.dtype, z.dtype) == ("cuda", (1, 3, 1, 1), torch.float32, torch.int32)
        q, s, z = qo.quantize_rows(x)
        assert (q.device.type, q.dtype, q.shape, s.shape, z.shape) == ("cuda", torch.int8, x.shape, (2, 3, 4, 1), (2, 3, 4, 1))
        assert q.is_contiguous()
