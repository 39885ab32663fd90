// AVX-VNNI kernels: vpdpbusd on ymm registers, for processors with VNNI but without AVX-512 (Alder Lake and later clients).
#if defined(__x86_64__)
#define QO_ISA avxvnni
#define QO_SIMD "kernels/simd/avx2.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("avxvnni,avx2,fma,f16c")
#include "kernels/generic/depthwise.h"
#include "kernels/generic/nibbles.h"
#include "kernels/simd/depthwise_avx2.h"

namespace quant_ops {
namespace avxvnni {
namespace {

struct QuadsOfTaps : Interleave {
  template <int kShift>
  static QO_INLINE __m256i weights(const int8_t* p) {
    return _mm256_slli_epi32(Simd::load_int(reinterpret_cast<const int32_t*>(p)), 8 * kShift);
  }
  static QO_INLINE __m256i dot(__m256i acc, const uint8_t* codes, __m256i w) {
    return _mm256_dpbusd_avx_epi32(acc, Simd::load_int(reinterpret_cast<const int32_t*>(codes)), w);
  }
};

// Columns [n, n + 8 * kVectors) of the panel.
template <int kRows, int kVectors>
QO_INLINE void sweep(const GemmTile& t, int64_t n, int64_t b_stride) {
  __m256i acc[kRows][kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    const __m256i start = Simd::load_int(t.out.start + n + v.value * Simd::N);
    unroll<kRows>([&](auto r) QO_LAMBDA { acc[r.value][v.value] = start; });
  });
  const int8_t* b = t.b + n * kQuad;
  const int64_t* offset = t.a_offset;
  const int64_t k_end = t.quads * kQuad;
  for (int64_t tap = 0; tap < t.taps; ++tap, offset += kRows) {
    const uint8_t* a[kRows];
    unroll<kRows>([&](auto r) QO_LAMBDA { a[r.value] = t.a + offset[r.value]; });
    for (int64_t k = 0; k < k_end; k += kQuad, b += b_stride) {
      __m256i bv[kVectors];
      unroll<kVectors>([&](auto v) QO_LAMBDA { bv[v.value] = Simd::load_int(reinterpret_cast<const int32_t*>(b + v.value * 32)); });
      unroll<kRows>([&](auto r) QO_LAMBDA {
        int32_t four;
        __builtin_memcpy(&four, a[r.value] + k, 4);
        const __m256i av = _mm256_set1_epi32(four);
        unroll<kVectors>([&](auto v) QO_LAMBDA {
          acc[r.value][v.value] = _mm256_dpbusd_avx_epi32(acc[r.value][v.value], av, bv[v.value]);
          asm volatile("" : "+x"(acc[r.value][v.value]));  // row by row: g++ loads all rows first and spills accumulators
        });
      });
    }
  }
  finish_tile<kRows, kVectors>(t.out.from_column(n), [&](auto r, auto v) QO_LAMBDA { return acc[r.value][v.value]; });
}

// 6 rows x 16 columns: 12 accumulators + 2 weights + 1 activation = 15 of 16 ymm; the panel is swept sixteen columns at a time. Few
// rows take more columns at a time instead.
constexpr int64_t kRows = 6;
constexpr int vectors_of(int64_t rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

template <int kTileRows>
void gemm_u8s8_6x16_avxvnni(const GemmTile& t, int64_t width) {
  constexpr int kVectors = vectors_of(kTileRows);
  int64_t n = 0;
  for (; n + kVectors * 8 <= width && n < t.out.columns; n += kVectors * 8) sweep<kTileRows, kVectors>(t, n, width * kQuad);
  if constexpr (kVectors > 2)
    for (; n < t.out.columns; n += 16) sweep<kTileRows, 2>(t, n, width * kQuad);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_rows<kRows>(rows, [&](auto r) QO_LAMBDA { gemm_u8s8_6x16_avxvnni<r.value>(tile, width); });
}

GemmShape gemm_shape(int64_t rows, int64_t width) {
  return swept_shape("avxvnni", rows, width, vectors_of(rows) * Simd::N, 2 * Simd::N);
}

// vpdpbusd with the nibbles as its unsigned operand.
struct Dot {
  static QO_INLINE Simd::I add(Simd::I sum, const int8_t* a, const Simd::I (&w)[4]) {
    unroll<4>([&](auto i) QO_LAMBDA {
      int32_t four;
      __builtin_memcpy(&four, a + i.value * kQuad, sizeof(four));
      sum = _mm256_dpbusd_avx_epi32(sum, w[i.value], _mm256_set1_epi32(four));
    });
    return sum;
  }
};

// 8 rows x 8 columns: 8 sums, 4 weights, an activation. One or two rows take all 16 columns at a time.
constexpr int64_t kNibbleRows = 8;

void nibbles(const NibbleTile& tile, int64_t rows) {
  with_rows<kNibbleRows>(rows, [&](auto r) QO_LAMBDA { nibble_tile<Dot, r.value, r.value <= 2 ? 2 : 1>(tile); });
}

int64_t peak(int64_t iterations) {
  constexpr int kChains = 12;
  __m256i acc[kChains];
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  unroll<kChains>([&](auto c) QO_LAMBDA { acc[c.value] = _mm256_setzero_si256(); });
  for (int64_t i = 0; i < iterations; ++i)
    unroll<kChains>([&](auto c) QO_LAMBDA {
      acc[c.value] = _mm256_dpbusd_avx_epi32(acc[c.value], a, b);
      asm volatile("" : "+x"(acc[c.value]));
    });
  return iterations * kChains * 32;
}

}  // namespace
}  // namespace avxvnni

constinit const ProductKernels kAvxVnniProducts = {
    .isa = "avxvnni",
    .gemm_rows = avxvnni::kRows,
    .slim_rows = avxvnni::kRows,
    .gemm = avxvnni::gemm,
    .gemm_shape = avxvnni::gemm_shape,
    .depthwise = avxvnni::depthwise<avxvnni::QuadsOfTaps>,
    .nibble_rows = avxvnni::kNibbleRows,
    .nibbles = avxvnni::nibbles,
    .peak = avxvnni::peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif
