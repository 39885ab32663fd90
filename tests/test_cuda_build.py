"""What can be checked of the CUDA operators without a GPU.

* The kernels run on the host (host_emulation.h) over all cases of test_cuda.py: addresses, arithmetic and summation order.
* The address arithmetic and the division-free quotient, exhaustively where that is possible.
* The library that ``make cuda-build`` makes loads beside a torch for the CPU, registers its operators, and spills no registers.
* Fake kernels describe CUDA tensors as the operators make them.
"""

import re
import shutil
import subprocess

import pytest
import sweep
import torch
from compiled import CXX, ROOT, compiled_for_host, source_file
from processes import python
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
    "norm_quantize_rows",
    "quant_float_forward",
    "quant_float_backward",
    "quant_block_forward",
    "quant_block_backward",
    "choose_qparams_affine",
    "quantize_affine",
    "dequantize_affine",
    "int8_gemm",
    "int8_linear",
    "int8_conv2d",
    "requantize",
    "int8_add",
    "int8_mul",
    "int8_cat",
    "int8_max_pool2d",
    "int8_avg_pool2d",
    "int8_adaptive_avg_pool2d",
    "int8_upsample_nearest2d",
    "int8_attention",
    "pack_weight",
    "weight_only_linear",
    "pack_weight_only",
    "unpack_weight_only",
    "weight_only_embedding",
]
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_library = pytest.mark.skipif(not BUILT.is_file(), reason=f"{BUILT.relative_to(ROOT)} is not built: make cuda-build")


@needs_compiler
class TestEmulated(KernelCases):
    @pytest.fixture
    def subject(self, emulated):
        return Subject(emulated, "cpu")


@needs_compiler
@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_asserted(emulated, index):
    library = next(path for path in torch.ops.loaded_libraries if "emulated" in path)
    code = (
        f"import torch; import quant_ops; torch.ops.load_library({library!r})\n"
        "weight = torch.zeros(3, 8, dtype=torch.int8)\n"
        f"torch.ops.quant_ops_emulated.weight_only_embedding(torch.tensor([0, {index}]), weight, torch.ones(3))"
    )
    done = python("-c", code)
    assert done.returncode < 0
    assert "quant_ops.weight_only_embedding: indices" in done.stderr


ARITHMETIC = r"""
#include <cmath>
#include <cstdio>
#include <random>
#include "contract/dtypes.h"
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

// Whether the factors of a symmetric row give the code of x / scale, or differ.
static bool same_factor_code(float x, float scale, const CodeFactors& f) {
  const float lower = fused(x, f.lower, kMagic), upper = fused(x, f.upper, kMagic);
  return lower != upper || lower - kMagic == quantize_steps(x, scale);
}
// All elements of 16 bits with these bits or fewer, in a row whose largest one has them.
template <class X>
static bool same_row(uint32_t bits) {
  const auto value = [](uint32_t b) {
    X x;
    x.bits = static_cast<uint16_t>(b);
    return static_cast<float>(to_compute(x));
  };
  const float absmax = value(bits), scale = choose_qparams_of(0.0f, absmax, true, -127, 127, false).scale;
  const float reciprocal = safe_reciprocal(scale);
  if (reciprocal == 0.0f) return true;
  const CodeFactors f = symmetric_factors(absmax, scale, reciprocal);
  if (std::is_same_v<X, BFloat16> && f.lower != f.upper) return false;  // every row of bfloat16 goes unchecked
  for (uint32_t b = 0; b <= bits; ++b)
    if (!same_factor_code(value(b), scale, f) || !same_factor_code(-value(b), scale, f)) return false;
  return true;
}

// Codes of elements X within a range; half of the ranges have opposite ends, and floats lie next to ties.
template <class X>
static bool same_in_range(std::mt19937_64& random, bool asymmetric) {
  constexpr bool kShort = sizeof(X) == 2;
  const auto value = [](uint32_t bits) {
    X x;
    memcpy(&x, &bits, sizeof(X));
    return static_cast<float>(to_compute(x));
  };
  const uint32_t one = std::is_same_v<X, Half> ? 0x3c00u : std::is_same_v<X, BFloat16> ? 0x3f80u : 0x3f800000u;
  const uint32_t span = kShort ? 0x800u : 0x2000000u;
  const float max = value(one + static_cast<uint32_t>(random() % span));
  const float min = asymmetric && random() % 2 ? -value(one + static_cast<uint32_t>(random() % span)) : -max;
  const int32_t lowest = asymmetric ? -128 : -127;
  const auto p = choose_qparams_of(min, max, true, lowest, 127, asymmetric);
  const RangeCodes codes = RangeCodes::of(Quantizer::of(p.scale, p.zero_point, lowest, 127));
  if (!codes.is_usable()) return false;
  for (int i = 0; i < 2000; ++i) {
    float x[4] = {min, max};
    for (int e = i == 0 ? 2 : 0; e < 4; ++e) {
      const float draw = value(static_cast<uint32_t>(random() % (one + span)));
      x[e] = std::fmin(max, std::fmax(min, random() % 2 ? draw : -draw));
      if (kShort || i % 2) continue;
      const float tie = (static_cast<float>(static_cast<int>(random() % 511) - 255) + 0.5f) * p.scale;
      const float near_tie = bits_float(float_bits(tie) + static_cast<uint32_t>(random() % 7) - 3u);
      x[e] = std::fmin(max, std::fmax(min, near_tie));
    }
    uint32_t words[1];
    asymmetric ? codes.make<kShort, true>(x, words) : codes.make<kShort, false>(x, words);
    for (int e = 0; e < 4; ++e) {
      const auto steps = clamp_steps<double>(quantize_steps(x[e], p.scale), lowest - p.zero_point, 127.0 - p.zero_point);
      if (static_cast<int8_t>(words[0] >> (8 * e)) != steps_to_code(steps, p.zero_point, lowest, 127)) return false;
    }
  }
  return true;
}

// With an argument all draws, otherwise a quarter of them.
int main(int count, char**) {
  const int share = count > 1 ? 1 : 4;
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i)
    for (bool asymmetric : {false, true})
      if (!same_in_range<BFloat16>(random, asymmetric) || !same_in_range<Half>(random, asymmetric) ||
          !same_in_range<float>(random, asymmetric))
        return fail("codes of a range");
  // rows of 16-bit elements with every significand of the largest one
  for (uint32_t bits = 0x4280; bits < 0x4300; ++bits)
    if (!same_row<BFloat16>(bits)) return fail("factors of bfloat16");
  for (uint32_t bits : {0x0007u, 0x0123u, 0x7f7fu, 0x00ffu, 0x3f80u, 0x3ffeu})
    if (!same_row<BFloat16>(bits)) return fail("factors of large and small bfloat16");
  for (uint32_t bits = 0x4c00; bits < 0x5000; ++bits)
    if (!same_row<Half>(bits)) return fail("factors of float16");
  for (uint32_t bits : {0x0001u, 0x0007u, 0x03ffu, 0x7bffu, 0x7800u})
    if (!same_row<Half>(bits)) return fail("factors of large and small float16");
  // checked factors next to ties
  for (int i = 0; i < 1000000 / share; ++i) {
    const float s = bits_float((static_cast<uint32_t>(random()) & 0x7fffffu) | static_cast<uint32_t>(68 + random() % 119) << 23);
    const float r = safe_reciprocal(s), tie = (static_cast<float>(random() % 256) + 0.5f) * s;
    for (int32_t ulp = -3; ulp <= 3; ++ulp)
      if (!same_factor_code(bits_float(float_bits(tie) + static_cast<uint32_t>(ulp)), s, checked_factors(r)))
        return fail("checked factors");
  }
  // FastDiv: around multiples of divisors of every size
  for (int i = 0; i < 2000000 / share; ++i) {
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
  for (int i = 0; i < 4000000 / share; ++i) {
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
  // whole vectors of int8 codes: every bfloat16 and every half, clamped, and next to ties
  for (int i = 0; i < 400; ++i) {
    const int32_t z = i % 2 ? 0 : static_cast<int32_t>(random() % 256) - 128;
    const float s = bits_float((static_cast<uint32_t>(random()) & 0x7fffffu) | static_cast<uint32_t>(120 + random() % 9) << 23);
    const Int8Codes codes = Int8Codes::of(Quantizer::of(s, z, -128, 127));
    for (uint32_t b = 0; b < 65536; b += 4) {
      float x[3][4];
      for (uint32_t e = 0; e < 4; ++e) {
        x[0][e] = bits_float((b + e) << 16);
        x[1][e] = to_compute(Half{static_cast<uint16_t>(b + e)});
        x[2][e] = static_cast<float>((static_cast<double>(random() % 256) - 128.0 - z + 0.5) * s);
        x[2][e] = bits_float(float_bits(x[2][e]) + static_cast<uint32_t>(random() % 1200) - 600);
      }
      for (const auto& four : x) {
        uint32_t sums[4];
        const bool is_short = &four != &x[2];
        if (!(is_short ? codes.make<true>(four, sums) : codes.make<false>(four, sums))) {
          const float total = four[0] - four[0] + four[1] - four[1] + four[2] - four[2] + four[3] - four[3];
          if (total == 0.0f) return fail("numbers have codes");
          continue;
        }
        const uint32_t bytes = low_bytes(sums[0], sums[1], sums[2], sums[3]);
        for (int e = 0; e < 4; ++e) {
          const auto steps = clamp_steps<double>(quantize_steps(four[e], s), -128.0 - z, 127.0 - z);
          if (static_cast<int8_t>(bytes >> (8 * e)) != steps_to_code(steps, z, -128, 127)) return fail("vector of codes");
        }
      }
    }
  }
  // short elements, everywhere where a code could differ from that of the quotient: the scales next to x / middle, where the middle
  // lies between a tie and its neighbour
  for (int bits : {8, 11})
    for (int n = 0; n < 256; ++n)
      for (float end : {-1.0f, 1000.0f}) {
        const float tie = static_cast<float>(n) + 0.5f;
        const double middle = (static_cast<double>(tie) + std::nextafterf(tie, end)) / 2;
        for (int x = 1 << (bits - 1); x < 1 << bits; ++x) {
          int shift = 0;
          const double scale = std::ldexp(std::frexp(x / middle, &shift), 24);
          for (int64_t s = static_cast<int64_t>(scale) - 2; s <= static_cast<int64_t>(scale) + 3; ++s) {
            const auto quotient = VectorQuotient::of(Quantizer::of(static_cast<float>(s), 0, -256, 256));
            const float element = std::ldexp(static_cast<float>(x), 24 - shift);
            if (quotient.sum<true>(element) - kMagic != quantize_steps(element, quotient.scale)) return fail("short elements");
          }
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
    done = subprocess.run([program, *(["all"] if sweep.ALL else [])], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


ROUNDING = r"""
#include <cstdio>
#include <random>
#include "device/rounding.cuh"
using namespace quant_ops;

static std::mt19937_64 random_bits(1);
static uint32_t draw() { return static_cast<uint32_t>(random_bits()); }
static bool same(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }

// A format of every width and bias that float32 holds.
static bool draw_format(FloatFormat* f) {
  const int e = 1 + draw() % 8, m = draw() % 24, bias = static_cast<int>(draw() % 254) - 126;
  const auto special = static_cast<SpecialCodes>(draw() % 3);
  const int reserved = special == SpecialCodes::kIeee ? 1 << m : special == SpecialCodes::kNan ? 1 : 0;
  const int last = (1 << (e + m)) - 1 - reserved;
  const bool saturate = special == SpecialCodes::kNone || draw() % 4 > 0, subnormals = draw() % 4 > 0;
  if (last <= 0 || (!subnormals && last >> m == 0) || bias < (last >> m) - 127) return false;
  *f = float_format(e, m, bias, special, saturate, subnormals, static_cast<Rounding>(draw() % 4));
  return true;
}

// Any number, or one next to a tie or a number of the format, times the scale.
static float draw_element(const FloatFormat& f, float scale) {
  if (draw() % 8 == 0) return bits_float(draw());
  const float range = std::ldexp(f.largest, -static_cast<int>(draw() % 40));
  const float number = round_to_format(range * static_cast<float>(draw()) * 0x1p-31f, f, draw());
  float x = number * scale;
  if (draw() % 2) x = (number + 0.5f * std::ldexp(1.0f, std::max(f.least_exponent, exponent_of(number)) - f.mantissa_bits)) * scale;
  x = bits_float(float_bits(x) + draw() % 7 - 3);
  return draw() % 2 ? x : -x;
}

template <Path kPath>
static bool same_rounding(const FloatFormat& f, float scale) {
  const Rounder round = Rounder::of(f);
  const float reciprocal = round.reciprocal(scale);
  for (int i = 0; i < 300; ++i) {
    const float x = draw_element(f, scale), quotient = x / scale;
    const uint32_t word = draw();
    const float expected = round_to_format(quotient, f, word);
    if (!same(with_sign(round.template operator()<kPath>(__builtin_fabsf(quotient), word), x), expected)) return false;
    if (kPath == Path::kOther || reciprocal == 0.0f) continue;
    const float mended = round.mended(x, scale, reciprocal);
    if (!same(with_sign(round.template operator()<kPath>(mended, word), x), expected)) return false;
    if ((mended <= f.largest) != in_range(quotient, f)) return false;
  }
  return true;
}

int main() {
  for (int i = 0; i < 20000; ++i) {
    FloatFormat f;
    if (!draw_format(&f)) continue;
    float scale = bits_float((draw() & 0x7fffffu) | (87u + draw() % 80) << 23);
    if (draw() % 4 == 0) {  // short and long significands
      const uint32_t kept = draw() % 2 ? 0x7f800000u : 0xffff0000u;
      scale = bits_float((float_bits(scale) & kept) | (draw() % 2 ? 0 : 0x7fffffu));
    }
    const Path path = path_of(f, false);
    const bool good = f.method == RoundingMethod::kElements ? true
                      : path == Path::kPlain                ? same_rounding<Path::kPlain>(f, scale)
                      : path == Path::kRandom               ? same_rounding<Path::kRandom>(f, scale)
                                                            : same_rounding<Path::kOther>(f, scale);
    if (!good) return std::printf("rounding to %d bits from 2^%d to %g, rounding %d, scale %a\n", f.mantissa_bits, f.least_exponent,
                                  f.largest, static_cast<int>(f.rounding), scale), 1;
    f.overflow = f.largest;
    for (int rule = 0; rule < 7; ++rule) {
      const BlockFormat block{f, static_cast<ScaleRule>(rule), f.largest};
      if (f.largest < 0x1p-126f) continue;
      const BlockScales scales = BlockScales::of(block);
      for (int j = 0; j < 300; ++j) {
        uint32_t bits = draw() & 0x7fffffffu;
        if (j % 2) bits &= 0x7f800000u | draw();
        if (j % 3 == 0) bits = (bits & 0x7f800000u) | (((float_bits(f.largest) & 0x7fffffu) + draw() % 5 - 2) & 0x7fffffu);
        if (j % 5 == 0) bits = (bits & 0x7f800000u) | ((0u - (1u << (draw() % 23))) + draw() % 5 - 2 & 0x7fffffu);
        if (!same(scales.scale(bits_float(bits), 1.0f), block_scale(bits, block, 1.0f)))
          return std::printf("rule %d of %d bits from 2^%d to %g, amax %a\n", rule, f.mantissa_bits, f.least_exponent, f.largest,
                             bits_float(bits)), 1;
      }
    }
  }
  return 0;
}
"""


@needs_compiler
def test_rounding_and_scales_of_blocks():
    program = compiled_for_host("rounding", [source_file("rounding.cc", ROUNDING)], "-O2")
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


LAUNCHES = r"""
#include <cstdio>
#include <vector>
#include "device/common.cuh"
#include "launch.h"
using namespace quant_ops;

// The space of x [N, C, P], of which some dimensions are kept: operands x, grad, scale, zero point and, if any is kept, the result.
static Iteration space(const std::vector<int64_t>& shape, const std::vector<bool>& varies, bool kept) {
  Iteration it;
  it.operands = kept ? 5 : 4;
  int64_t stride = 1, parameter = 1;
  for (int d = 0; d < 3; ++d) it.ndim += varies[d] == kept;
  for (int d = 2, i = it.ndim - 1; d >= 0; --d) {
    if (varies[d] == kept) {
      it.size[i] = shape[d];
      it.stride[0][i] = it.stride[1][i] = stride;
      if (varies[d]) it.stride[2][i] = it.stride[3][i] = it.stride[4][i] = parameter;
      --i;
    }
    stride *= shape[d];
    if (varies[d]) parameter *= shape[d];
  }
  return it;
}

// Kernels of one call, with a gradient of the scale and perhaps of the zero point; both vary along the same dimensions.
static int launches(const std::vector<int64_t>& shape, const std::vector<bool>& varies, bool zero_point) {
  const auto n = static_cast<size_t>(shape[0] * shape[1] * shape[2]);
  std::vector<float> x(n, 1.0f), grad(n, 1.0f), dx(n), scale(n, 0.1f), dscale(n), dzero(n);
  std::vector<int32_t> zeros(n);
  const Reduction sum{space(shape, varies, true), space(shape, varies, false)};
  QuantizeBackwardParams p{};
  p.x = x.data();
  p.grad = grad.data();
  p.dx = dx.data();
  p.x_dtype = DType::kFloat32;
  p.scale = scale.data();
  p.zero_point = zero_point ? zeros.data() : nullptr;
  p.exact_in_float32 = true;
  p.qmin = -128;
  p.qmax = 127;
  p.scale_sum = sum;
  p.zero_sum = zero_point ? sum : Reduction{};
  p.dscale = dscale.data();
  p.dzero = zero_point ? dzero.data() : nullptr;
  const QuantizeBackwardPlan plan = plan_quantize_backward(p, GpuLimits{90, 132, 232448, 233472});
  std::vector<double> memory(static_cast<size_t>(plan.bytes / 8 + 8));
  const int64_t before = emulation::launches;
  run_quantize_backward(plan, p, {"", memory.data(), nullptr});
  return static_cast<int>(emulation::launches - before);
}

int main() {
  for (bool zero_point : {false, true}) {
    std::printf("%d", launches({1, 128, 56 * 56}, {false, false, false}, zero_point));  // a tensor
    std::printf(" %d", launches({64, 64, 9}, {true, false, false}, zero_point));        // (C, 1, 1, 1), a weight
    std::printf(" %d", launches({4, 32, 56 * 56}, {true, false, false}, zero_point));   // many chunks a slice
    std::printf(" %d", launches({1, 128, 56 * 56}, {false, true, false}, zero_point));  // (1, C, 1, 1)
    std::printf(" %d", launches({8, 16, 56 * 56}, {false, true, false}, zero_point));   // several runs a slice
    std::printf(" %d", launches({1, 4096, 98}, {false, false, true}, zero_point));      // columns
    std::printf(" %d\n", launches({1, 1000, 98}, {false, false, true}, zero_point));
  }
  std::printf("%d\n", launches({1, 1, 1 << 21}, {false, false, false}, true));
}
"""


@needs_compiler
def test_gradients_take_one_or_two_launches():
    program = compiled_for_host("launches", [source_file("launches.cc", LAUNCHES), "cuda/quantize_backward.cu"])
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    one_sum = "2 1 2 1 2 2 1"
    assert (done.returncode, done.stdout) == (0, f"{one_sum}\n{one_sum}\n3\n"), done.stdout


ROWS = r"""
#include <cstdio>
#include <random>
#include <vector>
#include "device/common.cuh"
#include "launch.h"
using namespace quant_ops;

static std::mt19937 random_bits(1);
static std::normal_distribution<float> normal;

// Rows whose stride is rounded up, with zeros behind the codes, as a GEMM takes them; x and the codes begin anywhere. One row has
// ties, another one is symmetric about zero, so that both of its ends are ties of an asymmetric scale.
template <class X>
static bool rows_are_right(int64_t rows, int64_t columns, int64_t x_offset, int64_t x_padding, int64_t q_offset, int64_t q_padding,
                           bool asymmetric, DType dtype) {
  const int64_t x_stride = columns + x_padding, q_stride = columns + q_padding;
  std::vector<X> memory(static_cast<size_t>(rows * x_stride + 16));
  X* const x = memory.data() + x_offset;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < x_stride; ++c) {
      float value = normal(random_bits) + 0.5f;
      if (r % 3 == 1) value = c == 0 ? 127.0f : c == 1 && r % 2 ? -128.0f : std::floor(value * 8) + 0.5f;
      if (r % 3 == 2) value = c < 2 ? (c == 0 ? 3.0f : -3.0f) : std::fmax(-3.0f, std::fmin(value, 3.0f));
      if (c >= columns) value = 1e30f;  // beside the row
      from_compute(value, &x[r * x_stride + c]);
    }
  std::vector<int8_t> codes(static_cast<size_t>(rows * q_stride + 32), 99);
  int8_t* const q = codes.data() + 8 + q_offset;
  std::vector<float> scale(static_cast<size_t>(rows));
  std::vector<int32_t> zero(static_cast<size_t>(rows), 12345);
  quantize_rows_cuda(QuantizeRowsParams{rows, columns, x, x_stride, dtype, q, scale.data(), asymmetric ? zero.data() : nullptr,
                                        asymmetric}, q_stride, {"", nullptr, nullptr});
  for (const int8_t* p = codes.data(); p < codes.data() + codes.size(); ++p)
    if ((p < q || p >= q + rows * q_stride) && *p != 99) return false;
  for (int64_t r = 0; r < rows; ++r) {
    float min = 0, max = 0;
    for (int64_t c = 0; c < columns; ++c) {
      min = std::fmin(min, to_compute(x[r * x_stride + c]));
      max = std::fmax(max, to_compute(x[r * x_stride + c]));
    }
    const int32_t lowest = asymmetric ? -128 : -127;
    const auto p = choose_qparams_of(min, max, true, lowest, 127, asymmetric);
    if (scale[r] != p.scale || zero[r] != (asymmetric ? p.zero_point : 12345)) return false;
    for (int64_t c = 0; c < q_stride; ++c) {
      int64_t code = 0;
      if (c < columns) code = static_cast<int64_t>(quantize_steps(to_compute(x[r * x_stride + c]), p.scale)) + p.zero_point;
      if (c < columns) code = code < lowest ? lowest : code > 127 ? 127 : code;
      if (q[r * q_stride + c] != code) return false;
    }
  }
  return true;
}

static bool every_type_is_right(int64_t rows, int64_t columns, int64_t x_offset, int64_t x_padding, int64_t q_offset,
                                int64_t q_padding) {
  for (bool asymmetric : {false, true})
    if (!rows_are_right<float>(rows, columns, x_offset % 4, x_padding, q_offset, q_padding, asymmetric, DType::kFloat32) ||
        !rows_are_right<Half>(rows, columns, x_offset, x_padding, q_offset, q_padding, asymmetric, DType::kFloat16) ||
        !rows_are_right<BFloat16>(rows, columns, x_offset, x_padding, q_offset, q_padding, asymmetric, DType::kBFloat16)) {
      std::printf("rows %d columns %d x %d + %d codes %d + %d\n", int(rows), int(columns), int(x_offset), int(x_padding),
                  int(q_offset), int(q_padding));
      return false;
    }
  return true;
}

int main() {
  for (int64_t columns = 0; columns <= 72; ++columns)  // lanes of a warp
    if (!every_type_is_right(columns % 5 + 1, columns, columns % 3, columns % 4, columns % 7, columns % 8)) return 1;
  for (int64_t x_offset = 0; x_offset < 8; ++x_offset)  // every alignment, of a warp and of a block
    for (int64_t q_offset = 0; q_offset < 8; ++q_offset)
      for (int64_t columns : {37, 300, 1500})
        if (!every_type_is_right(2, columns, x_offset, (x_offset + q_offset) % 3, q_offset, x_offset % 4)) return 1;
  for (int64_t columns : {1, 3, 16, 31, 96, 130, 256, 1000, 1024, 1032, 2048, 2500, 4096, 4104, 8200, 16384, 20000, 40000, 70008})
    for (int64_t padding : {0, 1, 8, 15, 40})
      for (int64_t rows : {1, 3, 19, 400})
        if (rows * columns <= (padding == 0 ? 70008 : 20000))
          if (!every_type_is_right(rows, columns, 0, padding % 3, 0, padding)) return 1;
  if (!every_type_is_right(50, 2304, 0, 0, 0, 0) || !every_type_is_right(12, 8448, 0, 0, 0, 0)) return 1;  // more held vectors
  return !every_type_is_right(12, 8449, 0, 0, 0, 0);
}
"""


@needs_compiler
def test_rows_of_every_length_and_alignment():
    program = compiled_for_host("rows", [source_file("rows.cc", ROWS), "cuda/quantize_rows.cu"])
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


CODES = r"""
#include <cstdio>
#include <random>
#include <vector>
#include "device/common.cuh"
#include "launch.h"
using namespace quant_ops;

static std::mt19937 random_bits(1);

struct Case {
  int64_t samples, groups, channels, tap, height, width, border_h, border_w, x_offset, x_padding;
  bool channels_last, own_scales;
};

template <class X>
static X element() {
  X x;
  std::normal_distribution<float> normal(0.3f, 30.0f);
  float value = normal(random_bits);
  if (random_bits() % 5 == 0) value = std::floor(value) + 0.5f;
  if (random_bits() % 997 == 0) value = random_bits() % 2 ? NAN : INFINITY;
  from_compute(value, &x);
  return x;
}
template <>
int8_t element<int8_t>() { return static_cast<int8_t>(random_bits()); }
template <>
uint8_t element<uint8_t>() { return static_cast<uint8_t>(random_bits()); }

template <class X>
static int64_t code_of(X x, float scale, int32_t zero) {
  return steps_to_code(clamp_steps<double>(quantize_steps(to_compute(x), scale), -128.0 - zero, 127.0 - zero), zero, -128, 127);
}
static int64_t code_of(int8_t x, float, int32_t) { return x; }
static int64_t code_of(uint8_t x, float, int32_t) { return x - 128; }

// What gives scales: an array, with a zero point that may be far from all codes, or the kernel, from ranges of 40 parts.
enum class Scales { kGiven, kFar, kSymmetric, kAsymmetric };

template <class X>
static bool codes_are_right(const Case& c, DType dtype, Scales scales) {
  const int64_t all = c.groups * c.channels, pixel = c.groups * c.tap;
  int64_t stride[4];  // N, C, H, W
  if (c.channels_last) {
    stride[1] = 1;
    stride[3] = all + c.x_padding;
    stride[2] = stride[3] * c.width;
    stride[0] = stride[2] * c.height;
  } else {
    stride[3] = 1;
    stride[2] = c.width + c.x_padding;
    stride[1] = stride[2] * c.height;
    stride[0] = stride[1] * all;
  }
  std::vector<X> memory(static_cast<size_t>(c.samples * stride[0] + 32));
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = element<X>();
  X* x = memory.data();
  while (reinterpret_cast<uintptr_t>(x) % 16 != 0) ++x;
  x += c.x_offset;
  const int64_t height = c.height + 2 * c.border_h, width = c.width + 2 * c.border_w, bytes = c.samples * height * width * pixel;
  std::vector<int8_t> codes(static_cast<size_t>(bytes + 64), 99);
  int8_t* q = codes.data() + 16;
  while (reinterpret_cast<uintptr_t>(q) % 16 != 0) ++q;
  std::vector<float> scale;
  std::vector<int32_t> zero;
  for (int64_t n = 0; n < c.samples; ++n) {
    scale.push_back(n == 3 ? 1e-30f : n == 4 ? NAN : 0.25f + 0.1f * static_cast<float>(n));
    zero.push_back(static_cast<int32_t>(random_bits() % 256) - 128 + (n == 1 && scales == Scales::kFar ? 1000 : 0));
  }
  const bool chosen = scales == Scales::kSymmetric || scales == Scales::kAsymmetric;
  std::vector<float> parts(static_cast<size_t>(c.samples) * 80, 0.0f), own_scale(5, -1.0f);
  std::vector<int32_t> own_zero(5, -1);
  SampleRanges ranges;
  if (chosen) {
    ranges = {parts.data(), 40, scales == Scales::kAsymmetric, own_scale.data(), own_zero.data()};
    for (int64_t n = 0; n < c.samples; ++n) {
      float min = 0.0f, max = 0.0f;
      for (int64_t i = 0; i < all * c.height * c.width; ++i) {
        const int64_t column = i % c.width, row = i / c.width % c.height, channel = i / c.width / c.height;
        const X element = x[n * stride[0] + channel * stride[1] + row * stride[2] + column * stride[3]];
        float value = 0.0f;
        if constexpr (!std::is_integral_v<X>) value = to_compute(element);
        float* const part = parts.data() + n * 80 + i % 40 * 2;
        for (float* of : {&min, part}) *of = value != value || *of != *of ? NAN : std::fmin(*of, value);
        for (float* of : {&max, part + 1}) *of = value != value || *of != *of ? NAN : std::fmax(*of, value);
      }
      const auto q = choose_qparams_of(min, max, std::isfinite(min) && std::isfinite(max), ranges.asymmetric ? -128 : -127, 127,
                                       ranges.asymmetric);
      scale[static_cast<size_t>(n)] = q.scale;
      zero[static_cast<size_t>(n)] = q.zero_point;
    }
  }
  const bool own_scales = c.own_scales || chosen;
  InputParams in{};
  in.x = x;
  in.dtype = dtype;
  in.scale = chosen ? nullptr : scale.data();
  in.zero_point = c.own_scales && !chosen ? zero.data() : nullptr;
  in.scale_stride = in.zero_point_stride = c.own_scales ? 1 : 0;
  write_codes_cuda(CodesParams{in, {stride[0], stride[1], stride[2], stride[3]}, c.samples, c.height, c.width, c.channels, c.tap, q,
                               pixel, c.border_h, c.border_w, ranges}, {"", nullptr, nullptr});
  for (size_t n = 0; chosen && n < scale.size(); ++n)
    if (own_zero[n] != zero[n] || (own_scale[n] != scale[n] && scale[n] == scale[n])) return false;
  for (const int8_t* p = codes.data(); p < codes.data() + codes.size(); ++p)
    if ((p < q || p >= q + bytes) && *p != 99) return false;
  for (int64_t i = 0; i < bytes; ++i) {
    const int64_t byte = i % pixel, column = i / pixel % width - c.border_w, row = i / pixel / width % height - c.border_h;
    const int64_t n = i / pixel / width / height, group = byte / c.tap, channel = byte % c.tap;
    const int32_t z = own_scales ? zero[static_cast<size_t>(n)] : 0;
    int64_t expected = static_cast<int8_t>(z - (dtype == DType::kUInt8 ? 128 : 0));
    if (row >= 0 && row < c.height && column >= 0 && column < c.width) {
      const int64_t at = n * stride[0] + (group * c.channels + channel) * stride[1] + row * stride[2] + column * stride[3];
      expected = channel < c.channels ? code_of(x[at], scale[static_cast<size_t>(own_scales ? n : 0)], z) : 0;
    }
    if (q[i] != expected) return false;
  }
  return true;
}

static bool every_type_is_right(const Case& c) {
  const auto floats_are_right = [&](Scales scales) {
    return codes_are_right<float>(c, DType::kFloat32, scales) && codes_are_right<Half>(c, DType::kFloat16, scales) &&
           codes_are_right<BFloat16>(c, DType::kBFloat16, scales);
  };
  if (floats_are_right(Scales::kGiven) && floats_are_right(c.border_w == 0 ? Scales::kSymmetric : Scales::kAsymmetric) &&
      codes_are_right<int8_t>(c, DType::kInt8, Scales::kGiven) && codes_are_right<uint8_t>(c, DType::kUInt8, Scales::kGiven) &&
      (c.border_h != 0 || codes_are_right<float>(c, DType::kFloat32, Scales::kFar)))
    return true;
  std::printf("%d x (%d x %d of %d) x %d x %d border %d %d offset %d padding %d last %d own %d\n", int(c.samples), int(c.groups),
              int(c.channels), int(c.tap), int(c.height), int(c.width), int(c.border_h), int(c.border_w), int(c.x_offset),
              int(c.x_padding), int(c.channels_last), int(c.own_scales));
  return false;
}

// With an argument all combinations, otherwise every fourth or so, the same ones each time.
int main(int count, char**) {
  std::mt19937 choice(2);
  const int64_t channels[][3] = {{1, 3, 4},   {1, 16, 16}, {1, 40, 48}, {1, 64, 64}, {1, 320, 320},
                                 {2, 16, 16}, {2, 12, 16}, {4, 4, 4},   {3, 5, 8},   {1, 100, 112}};
  const int64_t images[][2] = {{1, 1}, {7, 7}, {8, 8}, {14, 14}, {5, 24}, {1, 70}};
  for (const auto& c : channels)
    for (const auto& i : images)
      for (int64_t border = 0; border < 3; ++border)
        for (bool last : {false, true})
          for (int64_t off : {0, 1})
            if ((count > 1 || choice() % 4 == 0) &&
                !every_type_is_right({5, c[0], c[1], c[2], i[0], i[1], border, border % 2, off, off * 8, last, off + border != 1}))
              return 1;
  return 0;
}
"""


@needs_compiler
def test_codes_of_images_with_and_without_borders():
    program = compiled_for_host("codes", [source_file("codes.cc", CODES), "cuda/activations.cu"])
    done = subprocess.run([program, *(["all"] if sweep.ALL else [])], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run_python(code: str) -> str:
    done = python("-c", code, cwd=ROOT / "tests")
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
        text = log.read_text()
        usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        if not usage and "entry function" not in text:  # host code alone
            continue
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
