// AVX-512 VNNI kernels: vpdpbusd adds four u8 x s8 products to an int32 lane, exactly (its saturating twin vpdpbusds is not used).
// Lanes are output columns, so no sum ever crosses lanes.
#if defined(__x86_64__)
#define QO_ISA avx512vnni
#define QO_SIMD "kernels/simd/avx512.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
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

template <int kTileRows, int kWidth>
void gemm_u8s8_avx512vnni(const GemmTile& t) {
  constexpr int kVectors = kWidth / 16;
  __m512i acc[kTileRows][kVectors];
  unroll<kTileRows>([&](auto r)
                        QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { acc[r.value][v.value] = _mm512_setzero_si512(); }); });
  const int8_t* b = t.b;
  const int8_t* ahead = t.ahead;
  const int64_t* offset = t.a_offset;
  const int64_t k_end = t.quads * kQuad;
  const __m512i flip = _mm512_set1_epi32(static_cast<int32_t>(t.flip));
  for (int64_t tap = 0; tap < t.taps; ++tap, offset += kTileRows) {
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

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  if (rows == kSlimRows) return width == 32 ? gemm_u8s8_avx512vnni<kSlimRows, 32>(tile) : gemm_u8s8_avx512vnni<kSlimRows, 16>(tile);
  with_tile<kRows>(rows, width, [&](auto r, auto w) QO_LAMBDA { gemm_u8s8_avx512vnni<r.value, w.value>(tile); });
}

GemmShape gemm_shape(int64_t rows, int64_t width) { return {"avx512vnni", rows, width}; }

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
