// AVX-512 VNNI kernels: vpdpbusd adds four u8 x s8 products to an int32 lane, exactly (its saturating twin vpdpbusds is not used).
// Lanes are output columns, so no sum ever crosses lanes.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "target.h"

#if defined(__x86_64__)
QO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace quant_ops {
namespace {

#include "simd_avx512.inl"
//
#include "unroll.inl"
//
#include "elementwise.inl"

// 6 rows x 64 columns: 24 accumulators + 4 weights + 1 broadcast activation = 29 of 32 zmm. A vpdpbusd takes 4 to 5 cycles and one
// or two start per cycle, so ten or more independent ones are needed: tiles of three rows and more run at full speed.
template <int kRows, int kWidth>
void gemm_u8s8_6x64_avx512vnni(const GemmTile& t) {
  constexpr int kVectors = kWidth / 16;
  __m512i acc[kRows][kVectors];
  unroll<kRows>([&](auto r)
                    QO_LAMBDA { unroll<kVectors>([&](auto v) QO_LAMBDA { acc[r.value][v.value] = _mm512_setzero_si512(); }); });
  const int8_t* b = t.b;
  const int8_t* ahead = t.ahead;
  const int64_t* offset = t.a_offset;
  const int64_t k_end = t.k4 * kGroupK;
  for (int64_t tap = 0; tap < t.taps; ++tap, offset += kRows) {
    const uint8_t* a[kRows];
    unroll<kRows>([&](auto r) QO_LAMBDA { a[r.value] = t.a + offset[r.value]; });
    for (int64_t k = 0; k < k_end; k += kGroupK, b += kWidth * kGroupK) {
      __m512i bv[kVectors];
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += kWidth;
      unroll<kVectors>([&](auto v) QO_LAMBDA { bv[v.value] = _mm512_loadu_si512(b + v.value * 64); });
      unroll<kRows>([&](auto r) QO_LAMBDA {
        int32_t four;
        __builtin_memcpy(&four, a[r.value] + k, 4);
        const __m512i av = _mm512_set1_epi32(four);
        unroll<kVectors>([&](auto v)
                             QO_LAMBDA { acc[r.value][v.value] = _mm512_dpbusd_epi32(acc[r.value][v.value], av, bv[v.value]); });
      });
    }
  }
  finish_tile<kRows, kVectors>(t.out, [&](auto r, auto v) QO_LAMBDA { return acc[r.value][v.value]; });
}

constexpr int64_t kRows = 6;

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_tile<kRows>(rows, width, [&](auto r, auto w) QO_LAMBDA { gemm_u8s8_6x64_avx512vnni<r.value, w.value>(tile); });
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

const KernelTable kAvx512VnniKernels = {
    "avx512vnni",
    "gemm_u8s8_6x64_avx512vnni",
    kRows,
    gemm,
    depthwise_pixel,
    quantize_run,
    dequantize_run,
    ste_run,
    ste_columns_run,
    range_run,
    range_columns_run,
    codes_run,
    peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif
