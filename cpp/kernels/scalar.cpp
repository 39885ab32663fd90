// Plain C++ kernels: the reference that every other table must match bit for bit, and the fallback of machines without AVX2.
#define QO_ISA scalar
#define QO_SIMD "kernels/simd/scalar.h"
#include "kernels/target.h"

#include "kernels/generic/depthwise.h"
#include "kernels/generic/nibbles.h"
#include "kernels/simd/depthwise_scalar.h"

namespace quant_ops {
namespace scalar {
namespace {

constexpr int64_t kRows = 6;

template <int kTileRows, int kWidth>
void gemm_u8s8_6x64_scalar(const GemmTile& t) {
  int32_t acc[kTileRows][kPanel];
  for (int r = 0; r < kTileRows; ++r) std::memcpy(acc[r], t.out.start, kWidth * sizeof(int32_t));
  const int8_t* b = t.b;
  const int64_t* offset = t.a_offset;
  for (int64_t tap = 0; tap < t.taps; ++tap, offset += kTileRows)
    for (int64_t k = 0; k < t.quads; ++k, b += kWidth * kQuad)
      for (int r = 0; r < kTileRows; ++r) {
        const uint8_t* a = t.a + offset[r] + k * kQuad;
        for (int64_t n = 0; n < kWidth; ++n)
          for (int i = 0; i < kQuad; ++i) acc[r][n] = Simd::add(acc[r][n], int32_t{a[i]} * b[n * kQuad + i]);
      }
  finish_sums(t.out, &acc[0][0], kTileRows, kPanel);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
  with_tile<kRows>(rows, width, [&](auto r, auto w) { gemm_u8s8_6x64_scalar<r.value, w.value>(tile); });
}

GemmShape gemm_shape(int64_t rows, int64_t width) { return {"scalar", rows, width}; }

struct Dot {
  static int32_t add(int32_t sum, const int8_t* a, const int32_t (&w)[4]) {
    for (int i = 0; i < 16; ++i)
      sum = Simd::add(sum, int32_t{a[i]} * static_cast<int32_t>(static_cast<uint32_t>(w[i / 4]) >> 8 * (i % 4) & 0xffu));
    return sum;
  }
};

constexpr int64_t kNibbleRows = kRows;

void nibbles(const NibbleTile& tile, int64_t rows) {
  with_rows<kNibbleRows>(rows, [&](auto r) { nibble_tile<Dot, r.value, 1>(tile); });
}

int64_t peak(int64_t) { return 0; }  // no instruction of its own to measure

}  // namespace
}  // namespace scalar

constinit const ProductKernels kScalarProducts = {
    .isa = "scalar",
    .gemm_rows = scalar::kRows,
    .slim_rows = scalar::kRows,
    .gemm = scalar::gemm,
    .gemm_shape = scalar::gemm_shape,
    .depthwise = scalar::depthwise<scalar::PlainTaps>,
    .nibble_rows = scalar::kNibbleRows,
    .nibbles = scalar::nibbles,
    .peak = scalar::peak,
};

}  // namespace quant_ops
