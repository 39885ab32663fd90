// NEON kernels for processors with the int8 extension of Armv8.6 (Neoverse V1 and N2, Apple M2): sudot multiplies signed weights by
// unsigned activations as they are, so nothing has to be corrected. Its matrix instructions (usmmla) want eight k of a column side
// by side, which the packed panel has not. Tested under emulation, never timed on hardware.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/table.h"
#include "kernels/target.h"

QO_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")
namespace quant_ops {
namespace {

#include "kernels/simd/neon.h"
//
#include "kernels/generic/unroll.h"
//
#include "kernels/generic/elementwise.h"

struct Dot {
  using A = uint8x16_t;
  static QO_INLINE A load16(const uint8_t* p) { return vld1q_u8(p); }
  static QO_INLINE A load4(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
  }
  static QO_INLINE Simd::I start(const int32_t*) { return vdupq_n_s32(0); }
  template <int kLane>
  static QO_INLINE Simd::I add(Simd::I sum, int8x16_t b, A a) {
    return vsudotq_laneq_s32(sum, b, a, kLane);
  }
  static QO_INLINE Simd::I add(Simd::I sum, int8x16_t b, A a) { return vusdotq_s32(sum, a, b); }
};

#include "kernels/simd/dot_neon.h"
//
#include "kernels/generic/depthwise.h"

template <int kRows>
void gemm_u8s8_8x8_neon_i8mm(const GemmTile& t, int64_t width) {
  swept_tile<kRows>(t, width);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  unroll<kRows>([&](auto r) QO_LAMBDA {
    if (rows == r.value + 1) gemm_u8s8_8x8_neon_i8mm<r.value + 1>(tile, width);
  });
}

}  // namespace

const KernelTable kNeonI8mmKernels = {
    "neon_i8mm",
    "gemm_u8s8_8x8_neon_i8mm",
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
