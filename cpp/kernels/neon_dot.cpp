// NEON kernels for processors with the dot product of Armv8.2 (Neoverse N1, Apple M1). Its sdot multiplies signed bytes,
// activations are unsigned: a - 128 is multiplied, and the sums start from 128 * column_sum, which is exact modulo 2^32. column_sum
// goes over all taps. Tested under emulation, never timed on hardware.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/table.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("arch=armv8.2-a+dotprod")
namespace quant_ops {
namespace {

#include "kernels/simd/neon.h"
//
#include "kernels/generic/unroll.h"
//
#include "kernels/generic/elementwise.h"

struct Dot {
  using A = int8x16_t;
  static QO_INLINE A load16(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80))); }
  static QO_INLINE A load4(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return vreinterpretq_s8_u32(vdupq_n_u32(four ^ 0x80808080u));
  }
  static QO_INLINE Simd::I start(const int32_t* column_sum) { return vshlq_n_s32(vld1q_s32(column_sum), 7); }
  template <int kLane>
  static QO_INLINE Simd::I add(Simd::I sum, int8x16_t b, A a) {
    return vdotq_laneq_s32(sum, b, a, kLane);
  }
  static QO_INLINE Simd::I add(Simd::I sum, int8x16_t b, A a) { return vdotq_s32(sum, b, a); }
};

#include "kernels/simd/dot_neon.h"
//
#include "kernels/generic/depthwise.h"

template <int kRows>
void gemm_u8s8_8x8_neon_dot(const GemmTile& t, int64_t width) {
  swept_tile<kRows>(t, width);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  unroll<kRows>([&](auto r) QO_LAMBDA {
    if (rows == r.value + 1) gemm_u8s8_8x8_neon_dot<r.value + 1>(tile, width);
  });
}

}  // namespace

const KernelTable kNeonDotKernels = {
    "neon_dot",
    "gemm_u8s8_8x8_neon_dot",
    kRows,
    kRows,
    false,
    gemm,
    depthwise_run,
    quantize_run,
    dequantize_run,
    ste_run,
    ste_columns_run,
    range_run,
    range_columns_run,
    codes_run,
    pack_run,
    nullptr,
    peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif
