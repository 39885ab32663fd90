// AVX-512 VNNI kernels: vpdpbusd adds four u8 x s8 products to an int32 lane, exactly (its saturating twin vpdpbusds is not used).
// Lanes are output columns, so no sum ever crosses lanes.
#if defined(__x86_64__)
#define QO_ISA avx512vnni
#define QO_SIMD "kernels/simd/avx512.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prfchw")
#include "kernels/generic/depthwise.h"
#include "kernels/generic/nibbles.h"
#include "kernels/simd/depthwise_avx512.h"

namespace quant_ops {
namespace avx512vnni {
namespace {

// 6 rows x 64 columns: 24 accumulators + 4 weights + 1 broadcast activation = 29 of 32 zmm. A vpdpbusd takes 4 to 5 cycles and one
// or two start per cycle, so ten or more independent ones are needed: tiles of three rows and more run at full speed.
//
// A full tile prefetches a part of the next panel. Shorter tiles are bound by memory: the out-of-order window is full of vpdpbusd,
// so the hardware does not run ahead, and they prefetch the same panel 4 KiB ahead.
//
// Slim panels use tiles of 12 x 32 or 12 x 16, which have as many independent sums.
constexpr int64_t kRows = 6, kSlimRows = 12;
constexpr int64_t kAheadBytes = 4096;

// rows: of the call, and so the offsets of a tap.
template <int kTileRows, int kWidth>
void gemm_u8s8_avx512vnni(const GemmTile& t, int64_t rows) {
  constexpr int kVectors = kWidth / 16;
  __m512i acc[kTileRows][kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    const __m512i start = Simd::load_int(t.out.start + v.value * 16);
    unroll<kTileRows>([&](auto r) QO_LAMBDA { acc[r.value][v.value] = start; });
  });
  prefetch_results<kTileRows>(t.out, 0);
  const int8_t* b = t.b;
  const int8_t* ahead = t.ahead;
  const int64_t* offset = t.a_offset;
  const int64_t k_end = t.quads * kQuad;
  const __m512i flip = _mm512_set1_epi32(static_cast<int32_t>(t.flip));
  for (int64_t tap = 0; tap < t.taps; ++tap, offset += rows) {
    const uint8_t* a[kTileRows];
    unroll<kTileRows>([&](auto r) QO_LAMBDA { a[r.value] = t.a + offset[r.value]; });
    for (int64_t k = 0; k < k_end; k += kQuad, b += kWidth * kQuad) {
      __m512i bv[kVectors];
      if constexpr (kTileRows < kRows) {
        unroll<kVectors>([&](auto v) QO_LAMBDA { _mm_prefetch(b + kAheadBytes + v.value * 64, _MM_HINT_T0); });
      } else {
        _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += kWidth;
      }
      unroll<kVectors>([&](auto v) QO_LAMBDA { bv[v.value] = _mm512_loadu_si512(b + v.value * 64); });
      unroll<kTileRows>([&](auto r) QO_LAMBDA {
        int32_t four;
        __builtin_memcpy(&four, a[r.value] + k, 4);
        const __m512i av = _mm512_xor_si512(_mm512_set1_epi32(four), flip);  // hidden behind the products
        unroll<kVectors>([&](auto v)
                             QO_LAMBDA { acc[r.value][v.value] = _mm512_dpbusd_epi32(acc[r.value][v.value], av, bv[v.value]); });
      });
    }
  }
  finish_tile<kTileRows, kVectors>(t.out, [&](auto r, auto v) QO_LAMBDA { return acc[r.value][v.value]; });
}

void multiply_tile(const GemmTile& t, int64_t tile_rows, int64_t rows, int64_t width) {
  if (tile_rows == kSlimRows)
    return width == 32 ? gemm_u8s8_avx512vnni<kSlimRows, 32>(t, rows) : gemm_u8s8_avx512vnni<kSlimRows, 16>(t, rows);
  with_tile<kRows>(tile_rows, width, [&](auto r, auto w) QO_LAMBDA { gemm_u8s8_avx512vnni<r.value, w.value>(t, rows); });
}

// Calls of many rows: twelve sums are accumulated while the epilogue of the twelve before them runs, a part of it after each of the
// first groups of k, since both wait for other units of the processor. 12 + 12 sums, 4 weights and an
// activation are 29 of 32 zmm; the epilogue reads what it needs of the columns from memory. A half tile reads a weight for half as
// many products as a full one, so the panel has to be near.
constexpr int kHalfSums = 12;
constexpr int64_t kCallRows = 60;
constexpr int64_t kHalvesBytes = int64_t{128} << 10;  // most bytes of such a panel

template <int kVectors>
struct HalfTile {
  static constexpr int kRows = kHalfSums / kVectors;
  static constexpr int kTogether = 4 / kVectors;  // rows that are finished together
  static constexpr int kParts = kRows / kTogether;
  __m512i acc[kRows][kVectors];
};

// Rows [row, row + kRows) of the call. between(part) is called after each of the first kParts groups of k.
template <int kVectors, bool kFlip, class Between>
QO_INLINE void multiply_half(const GemmTile& t, int64_t rows, int64_t row, HalfTile<kVectors>& half, const Between& between) {
  using Half = HalfTile<kVectors>;
  prefetch_results<Half::kRows>(t.out, row);
  const int64_t number = row / Half::kRows;
  const int8_t* ahead = t.ahead + (number < 3 ? number : 3) * (t.taps * t.quads * kVectors * 16);
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    const __m512i start = Simd::load_int(t.out.start + v.value * 16);
    unroll<Half::kRows>([&](auto r) QO_LAMBDA { half.acc[r.value][v.value] = start; });
  });
  const int8_t* b = t.b;
  const int64_t* offset = t.a_offset + row;
  const int64_t k_end = t.quads * kQuad;
  const __m512i flip = _mm512_set1_epi32(static_cast<int32_t>(t.flip));
  const uint8_t* a[Half::kRows];
  const auto add = [&](int64_t k) QO_LAMBDA {
    __m512i bv[kVectors];
    _mm_prefetch(ahead, _MM_HINT_T1);
    ahead += kVectors * 16;
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      bv[v.value] = _mm512_loadu_si512(b + v.value * 64);
      asm volatile("" : "+v"(bv[v.value]));  // or every product reads it again
    });
    unroll<Half::kRows>([&](auto r) QO_LAMBDA {
      int32_t four;
      __builtin_memcpy(&four, a[r.value] + k, 4);
      __m512i av = _mm512_set1_epi32(four);
      if constexpr (kFlip) av = _mm512_xor_si512(av, flip);
      unroll<kVectors>(
          [&](auto v) QO_LAMBDA { half.acc[r.value][v.value] = _mm512_dpbusd_epi32(half.acc[r.value][v.value], av, bv[v.value]); });
    });
    b += kVectors * 64;
  };
  for (int64_t tap = 0; tap < t.taps; ++tap, offset += rows) {
    unroll<Half::kRows>([&](auto r) QO_LAMBDA { a[r.value] = t.a + offset[r.value]; });
    int64_t k = 0;
    if (tap == 0)
      unroll<Half::kParts>([&](auto part) QO_LAMBDA {
        add(part.value * kQuad);
        between(part);
        k = (part.value + 1) * kQuad;
      });
    for (; k < k_end; k += kQuad) add(k);
  }
}

// As many rows of the call as fill half tiles; returns how many. kWhole: all columns are valid.
template <class Y, class Column, bool kWhole, bool kFlip, int kVectors>
__attribute__((noinline)) int64_t multiply_halves(const GemmTile& t, int64_t rows) {
  using Half = HalfTile<kVectors>;
  const TileOutput& o = t.out;
  const int64_t y_stride = o.y_stride;
  const Rounding<Y> rounding(o);
  Column columns[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA { columns[v.value] = Column(o, v.value * Simd::N); });
  // Codes are rounded in one part and stored in the next one: so a part does not have to wait for its own results.
  std::conditional_t<sizeof(Y) == 1, Requantize::Rounded, Nothing> rounded{};
  const auto finish = [&](auto part, const Half& half, int64_t row) QO_LAMBDA {
    const auto with_part = [&](auto number, const auto& use) QO_LAMBDA {
      constexpr int kFirst = number.value * Half::kTogether;
      use(row + kFirst, [&](auto r, auto v) QO_LAMBDA { return half.acc[kFirst + r.value][v.value]; });
    };
    if constexpr (sizeof(Y) == 1 && part.value > 0)
      with_part(Int<part.value - 1>{}, [&](int64_t first, const auto& sum) QO_LAMBDA {
        store_block<Half::kTogether, kVectors, kWhole, Column>(o, rounding, rounded, 0, static_cast<Y*>(o.y) + first * y_stride,
                                                               y_stride, first, o.columns, sum);
      });
    if constexpr (part.value < Half::kParts)
      with_part(part, [&](int64_t first, const auto& sum) QO_LAMBDA {
        if constexpr (sizeof(Y) == 1)
          rounded = round_block<Half::kTogether, kVectors>(o, rounding, columns, first, sum);
        else
          finish_block<Y, Half::kTogether, kVectors, kWhole>(o, rounding, columns, 0, static_cast<Y*>(o.y) + first * y_stride,
                                                             y_stride, first, o.columns, sum);
      });
  };
  Half before, now;
  multiply_half<kVectors, kFlip>(t, rows, 0, before, [](auto) QO_LAMBDA {});
  int64_t row = Half::kRows;
  for (; row + Half::kRows <= rows; row += Half::kRows) {
    multiply_half<kVectors, kFlip>(t, rows, row, now, [&](auto part) QO_LAMBDA { finish(part, before, row - Half::kRows); });
    finish(Int<Half::kParts>{}, before, row - Half::kRows);
    before = now;
  }
  unroll<Half::kParts + 1>([&](auto part) QO_LAMBDA { finish(part, before, row - Half::kRows); });
  return row;
}

template <class Y, class Column, bool kWhole, bool kFlip>
QO_INLINE int64_t multiply_halves(const GemmTile& t, int64_t rows, int64_t width) {
  switch (width) {
    case 64: return multiply_halves<Y, Column, kWhole, kFlip, 4>(t, rows);
    case 48: return multiply_halves<Y, Column, kWhole, kFlip, 3>(t, rows);
    case 32: return multiply_halves<Y, Column, kWhole, kFlip, 2>(t, rows);
    default: return multiply_halves<Y, Column, kWhole, kFlip, 1>(t, rows);
  }
}

// The same with a function and without a residual.
int64_t multiply_function(const GemmTile& t, int64_t rows, int64_t width) {
  const TileOutput& o = t.out;
  const bool codes = dtype_bytes(o.dtype) == 1, floats = o.dtype == DType::kFloat32, whole = o.columns == width;
  int64_t done = 0;
  with_function(o.extras->function, [&](auto function) QO_LAMBDA {
    if constexpr (function.value >= Function::kHardswish) {
      using Values = OneFunctionVector<function.value>;
      if (codes && whole)
        done = multiply_halves<Code, OneFunctionSteps<function.value>, true, false>(t, rows, width);
      else if (codes)
        done = multiply_halves<Code, OneFunctionSteps<function.value>, false, false>(t, rows, width);
      else if (floats && whole)
        done = multiply_halves<float, Values, true, false>(t, rows, width);
    }
  });
  return done;
}

// The rows of the call that are multiplied by halves, if it is of one of the kinds that are worth it.
int64_t multiply_first_rows(const GemmTile& t, int64_t rows, int64_t width) {
  const TileOutput& o = t.out;
  const int64_t parts = width == 48 ? HalfTile<3>::kParts : HalfTile<4>::kParts;
  const bool near = t.taps > 0 && t.quads >= parts && t.taps * t.quads * kQuad * width <= kHalvesBytes;
  if (!near || !o.shared || rows < kSlimRows) return 0;
  const bool codes = dtype_bytes(o.dtype) == 1, floats = o.dtype == DType::kFloat32, whole = o.columns == width, flip = t.flip != 0;
  using Steps = StepsVector<true>;
  using Values = ColumnVector<true>;
  if (o.extras == nullptr) {
    if (codes && whole)
      return flip ? multiply_halves<Code, Steps, true, true>(t, rows, width)
                  : multiply_halves<Code, Steps, true, false>(t, rows, width);
    if (codes)
      return flip ? multiply_halves<Code, Steps, false, true>(t, rows, width)
                  : multiply_halves<Code, Steps, false, false>(t, rows, width);
    if (floats && whole)
      return flip ? multiply_halves<float, Values, true, true>(t, rows, width)
                  : multiply_halves<float, Values, true, false>(t, rows, width);
    return 0;
  }
  // as in chains, whose codes are unsigned
  if (flip) return 0;
  if (o.extras->function != Function::kNone) return o.residual == nullptr ? multiply_function(t, rows, width) : 0;
  if (whole && o.extras->residual_dtype == DType::kFloat32) {
    using Residual = ResidualVector<Values, float, true>;
    if (floats) return multiply_halves<float, Residual, true, false>(t, rows, width);
    if (codes) return multiply_halves<Code, InSteps<Residual, false>, true, false>(t, rows, width);
  }
  if (!codes || o.extras->residual_dtype != DType::kUInt8) return 0;
  return whole ? multiply_halves<Code, ResidualVector<Steps, uint8_t, true>, true, false>(t, rows, width)
               : multiply_halves<Code, ResidualVector<Steps, uint8_t, false>, false, false>(t, rows, width);
}

void gemm(const GemmTile& t, int64_t rows, int64_t width) {
  const int64_t full = width <= kSlimColumns ? kSlimRows : kRows;
  if (rows <= kRows || rows == full) return multiply_tile(t, rows, rows, width);
  int64_t done = multiply_first_rows(t, rows, width);
  GemmTile part = t;
  const int64_t quarter = t.taps * t.quads * width;
  for (int64_t i = 0, count; done < rows; done += count, ++i) {
    const int64_t left = rows - done;
    count = left >= kSlimRows ? full : left <= kRows ? left : (left + 1) / 2;
    part.a_offset = t.a_offset + done;
    part.ahead = t.ahead + (i < 3 ? i : 3) * quarter;
    part.out = t.out.from_tile_row(done);
    multiply_tile(part, count, rows, width);
  }
}

GemmShape gemm_shape(int64_t rows, int64_t width) {
  const int64_t full = width <= kSlimColumns ? kSlimRows : kRows;
  return {"avx512vnni", rows < full ? rows : full, width};
}

// Four sums of sixteen lanes each -> their four totals.
__m128i totals(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Here lanes are k: four columns of the plain weight at a time, while the next four are prefetched. The asm barriers keep g++ from
// grouping the products, which would spill the sums.
template <int kTileRows>
void dot_u8s8_4x4_avx512vnni(const DotTile& t) {
  constexpr int kColumns = 4;
  const __m512i ones = _mm512_set1_epi8(1);
  alignas(64) int32_t acc[kTileRows][kPanel], column_sum[kPanel];
  for (int64_t n = 0; n < t.out.columns; n += kColumns) {
    const int8_t* b[kColumns];  // past the last column, the last one again
    unroll<kColumns>(
        [&](auto j) QO_LAMBDA { b[j.value] = t.b + (n + j.value < t.out.columns ? n + j.value : t.out.columns - 1) * t.b_stride; });
    __m512i sum[kColumns], product[kTileRows][kColumns];
    unroll<kColumns>([&](auto j) QO_LAMBDA {
      sum[j.value] = _mm512_setzero_si512();
      unroll<kTileRows>([&](auto r) QO_LAMBDA { product[r.value][j.value] = _mm512_setzero_si512(); });
    });
    for (int64_t k = 0; k < t.k; k += 64) {
      const __mmask64 mask = t.k - k >= 64 ? ~__mmask64{0} : (__mmask64{1} << (t.k - k)) - 1;
      __m512i a[kTileRows];
      unroll<kTileRows>([&](auto r) QO_LAMBDA { a[r.value] = _mm512_maskz_loadu_epi8(mask, t.a + r.value * t.a_stride + k); });
      unroll<kColumns>([&](auto j) QO_LAMBDA {
        const __m512i bv = _mm512_maskz_loadu_epi8(mask, b[j.value] + k);
        _mm_prefetch(b[j.value] + k + kColumns * t.b_stride, _MM_HINT_T0);
        sum[j.value] = _mm512_dpbusd_epi32(sum[j.value], ones, bv);
        asm volatile("" : "+v"(sum[j.value]));
        unroll<kTileRows>([&](auto r) QO_LAMBDA {
          product[r.value][j.value] = _mm512_dpbusd_epi32(product[r.value][j.value], a[r.value], bv);
          asm volatile("" : "+v"(product[r.value][j.value]));
        });
      });
    }
    const auto store = [&](int32_t* to, const __m512i(&v)[kColumns])
                           QO_LAMBDA { _mm_store_si128(reinterpret_cast<__m128i*>(to + n), totals(v[0], v[1], v[2], v[3])); };
    store(column_sum, sum);
    unroll<kTileRows>([&](auto r) QO_LAMBDA { store(acc[r.value], product[r.value]); });
  }
  TileOutput out = t.out;
  out.column_sum = column_sum;
  finish_sums(out, &acc[0][0], kTileRows, kPanel);
}

void dot(const DotTile& tile, int64_t rows) {
  with_rows<kDotRows>(rows, [&](auto r) QO_LAMBDA { dot_u8s8_4x4_avx512vnni<r.value>(tile); });
}

// vpdpbusd with the nibbles as its unsigned operand.
struct Dot {
  static QO_INLINE Simd::I add(Simd::I sum, const int8_t* a, const Simd::I (&w)[4]) {
    unroll<4>([&](auto i) QO_LAMBDA {
      int32_t four;
      __builtin_memcpy(&four, a + i.value * kQuad, sizeof(four));
      sum = _mm512_dpbusd_epi32(sum, w[i.value], _mm512_set1_epi32(four));
    });
    return sum;
  }
};

constexpr int64_t kNibbleRows = 16;  // 16 sums, 4 weights, an activation

void nibbles(const NibbleTile& tile, int64_t rows) {
  with_rows<kNibbleRows>(rows, [&](auto r) QO_LAMBDA { nibble_tile<Dot, r.value, 1>(tile); });
}

int64_t peak(int64_t iterations) {
  constexpr int kChains = 24;
  __m512i acc[kChains];
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  unroll<kChains>([&](auto c) QO_LAMBDA { acc[c.value] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < iterations; ++i)
    unroll<kChains>([&](auto c) QO_LAMBDA {
      acc[c.value] = _mm512_dpbusd_epi32(acc[c.value], a, b);
      asm volatile("" : "+v"(acc[c.value]));
    });
  return iterations * kChains * 64;
}

}  // namespace
}  // namespace avx512vnni

constinit const ProductKernels kAvx512VnniProducts = {
    .isa = "avx512vnni",
    .gemm_rows = avx512vnni::kRows,
    .slim_rows = avx512vnni::kSlimRows,
    .flips = true,
    .call_rows = avx512vnni::kCallRows,
    .gemm = avx512vnni::gemm,
    .gemm_shape = avx512vnni::gemm_shape,
    .depthwise = avx512vnni::depthwise<avx512vnni::QuadsOfTaps>,
    .nibble_rows = avx512vnni::kNibbleRows,
    .nibbles = avx512vnni::nibbles,
    .dot = avx512vnni::dot,
    .peak = avx512vnni::peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif
