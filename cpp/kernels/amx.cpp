// AMX-INT8 kernels: tdpbusd multiplies a tile of 16 rows x 64 k by one of 64 k x 16 columns. It reads the packed panel as it
// is: 16 quads of k, 64 bytes of each (amx_tile.h). All but the GEMM is AVX-512, as in avx512vnni.cpp.
//
// Compiled a second time for the tests with QUANT_OPS_AMX_EMULATED: every tile instruction in software, the rest AVX2.
#if defined(__x86_64__)
#if defined(QUANT_OPS_AMX_EMULATED)
#define QO_ISA amx_emulated
#define QO_SIMD "kernels/simd/avx2.h"
#else
#define QO_ISA amx
#define QO_SIMD "kernels/simd/avx512.h"
#endif
#include "kernels/target.h"

#if defined(QUANT_OPS_AMX_EMULATED)
QO_TARGET_BEGIN("avx2,fma,f16c")
#include "kernels/simd/depthwise_avx2.h"
#else
QO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#include "kernels/simd/depthwise_avx512.h"
#endif
#include "kernels/generic/depthwise.h"
#include "kernels/simd/amx_tile.h"

#if defined(QUANT_OPS_AMX_EMULATED)
#define QO_NIBBLES kAvx2Products
#define QO_NIBBLE_ROWS 8
#define QO_PRODUCTS kAmxEmulatedProducts
#else
#define QO_NIBBLES kAvx512VnniProducts
#define QO_NIBBLE_ROWS 16
#define QO_PRODUCTS kAmxProducts
#endif

namespace quant_ops {
namespace QO_ISA {
namespace {

#if defined(QUANT_OPS_AMX_EMULATED)
using Taps = PairsOfTaps;
#else
using Taps = QuadsOfTaps;
#endif

constexpr int64_t kRows = 32;
constexpr int64_t kFewRows = 6;      // up to here tiles are mostly empty, and one tile of avx512vnni is as fast
constexpr int64_t kShortTap = 8;     // groups of k: taps of fewer, as of stems, would be copied into mostly empty tiles
constexpr int64_t kFewGroups = 24;   // up to here the epilogue takes longer than the product, behind which avx512vnni hides it
constexpr int64_t kTileRows = 16;    // rows of a tile of activations and of sums
constexpr int64_t kTileGroups = 16;  // groups of four k of a tile
constexpr int64_t kTileBytes = 64;   // bytes of a row of a tile
constexpr int64_t kTileColumns = 16;

// Tile registers: 2 x 2 sums (row tile r, column tile c is 2 r + c), two of activations, two of weights. Each loaded tile is used
// twice: four loads (8 cycles each) hide behind four products (16 each).
constexpr int kActivations = 4, kWeights = 6;

// n groups of four k, n <= 16. Nothing outside is touched.
QO_INLINE void copy_groups(uint8_t* to, const uint8_t* from, int64_t n) {
#if defined(QUANT_OPS_AMX_EMULATED)
  std::memcpy(to, from, static_cast<size_t>(n * kQuad));
#else
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  _mm512_mask_storeu_epi32(to, mask, _mm512_maskz_loadu_epi32(mask, from));
#endif
}

// Walks along k, one block of `depth` groups of all rows at a time.
class Activations {
 public:
  const uint8_t* a;  // the block: row r at a + r * stride
  int64_t stride;

  Activations(const GemmTile& t, int64_t rows, int64_t depth) : t_(t), offset_(t.a_offset), rows_(rows), depth_(depth) {
    measure();
  }

  // The next `fresh` groups; fewer than `depth` of them are the last ones, with zeros before.
  QO_INLINE void next(int64_t fresh) {
    if (fresh == depth_ && k_ + depth_ <= t_.quads && even_) {  // where they are
      a = t_.a + offset_[0] + k_ * kQuad;
      stride = spacing_;
      advance(depth_);
      return;
    }
    if (fresh < depth_) std::memset(block_, 0, sizeof(block_));
    for (int64_t at = depth_ - fresh; at < depth_;) {
      const int64_t run = t_.quads - k_ < depth_ - at ? t_.quads - k_ : depth_ - at;
      for (int64_t r = 0; r < rows_; ++r) copy_groups(block_ + r * kTileBytes + at * kQuad, t_.a + offset_[r] + k_ * kQuad, run);
      at += run;
      advance(run);
    }
    a = block_;
    stride = kTileBytes;
  }

 private:
  void measure() {  // are the rows of this tap equally spaced?
    spacing_ = rows_ > 1 ? offset_[1] - offset_[0] : kTileBytes;
    even_ = true;
    for (int64_t r = 2; r < rows_; ++r) even_ = even_ && offset_[r] - offset_[r - 1] == spacing_;
  }
  QO_INLINE void advance(int64_t groups) {
    k_ += groups;
    if (k_ < t_.quads) return;
    k_ = 0;
    offset_ += rows_;
    if (++tap_ < t_.taps && t_.quads >= depth_) measure();  // shorter taps are copied in any case
  }

  const GemmTile& t_;
  const int64_t* offset_;  // of the tap
  int64_t rows_, depth_, tap_ = 0, k_ = 0, spacing_;
  bool even_;
  alignas(64) uint8_t block_[kRows * kTileBytes];
};

// Columns [n, n + 16 * kColumnTiles) of the panel. Not inlined: tests/test_isa.py looks at its loop.
template <int kRowTiles, int kColumnTiles>
__attribute__((noinline)) void sweep_amx(Tiles& tiles, const GemmTile& t, int64_t rows, int64_t depth, int64_t n, int64_t width,
                                         int32_t* sum) {
  unroll<kRowTiles>([&](auto r) QO_LAMBDA {  // every row of a tile from the same place
    unroll<kColumnTiles>(
        [&](auto c) QO_LAMBDA { tiles.template load<2 * r.value + c.value>(t.out.start + n + c.value * kTileColumns, 0); });
  });
  const int64_t groups = t.taps * t.quads, b_stride = width * kQuad;
  Activations rows_of(t, rows, depth);
  for (int64_t done = 0; done < groups;) {
    const int64_t fresh = groups - done < depth ? groups - done : depth;
    rows_of.next(fresh);
    done += fresh;
    // The last block ends with the panel: weights that were multiplied before meet zeros, and nothing behind the panel is read.
    const int8_t* b = t.b + (done - depth) * b_stride + n * kQuad;
    unroll<kColumnTiles>([&](auto c) QO_LAMBDA { tiles.template load<kWeights + c.value>(b + c.value * kTileBytes, b_stride); });
    unroll<kRowTiles>([&](auto r) QO_LAMBDA {
      tiles.template load<kActivations + r.value>(rows_of.a + r.value * kTileRows * rows_of.stride, rows_of.stride);
      unroll<kColumnTiles>([&](auto c) QO_LAMBDA {
        tiles.template multiply_add<2 * r.value + c.value, kActivations + r.value, kWeights + c.value>();
      });
    });
  }
  unroll<kRowTiles>([&](auto r) QO_LAMBDA {
    unroll<kColumnTiles>([&](auto c) QO_LAMBDA {
      tiles.template store<2 * r.value + c.value>(sum + r.value * kTileRows * kPanel + n + c.value * kTileColumns, kPanel * 4);
    });
  });
}

void gemm_u8s8_32x32_amx(const GemmTile& t, int64_t rows, int64_t width) {
  alignas(64) int32_t sum[kRows * kPanel];
  const int64_t groups = t.taps * t.quads;
  if (groups == 0) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(sum + r * kPanel, t.out.start, static_cast<size_t>(width) * sizeof(int32_t));
  } else {
    const int64_t depth = groups < kTileGroups ? groups : kTileGroups;
    const int64_t tile_rows[2] = {rows < kTileRows ? rows : kTileRows, rows < kTileRows ? 0 : rows - kTileRows};
    TileConfig config;
    for (int r = 0; r < 2 && tile_rows[r] > 0; ++r) {
      for (int c = 0; c < 2; ++c) config.set(2 * r + c, tile_rows[r], kTileBytes);
      config.set(kActivations + r, tile_rows[r], depth * kQuad);
    }
    for (int c = 0; c < 2; ++c) config.set(kWeights + c, depth, kTileBytes);
    Tiles tiles;
    tiles.configure(config);
    for (int64_t n = 0; n < t.out.columns; n += 2 * kTileColumns) {
      const bool two = n + kTileColumns < width;
      if (tile_rows[1] > 0)
        two ? sweep_amx<2, 2>(tiles, t, rows, depth, n, width, sum) : sweep_amx<2, 1>(tiles, t, rows, depth, n, width, sum);
      else
        two ? sweep_amx<1, 2>(tiles, t, rows, depth, n, width, sum) : sweep_amx<1, 1>(tiles, t, rows, depth, n, width, sum);
    }
    tiles.release();  // per call: the table has no hook for the end of a thread's work, and live tiles make switches of tasks slow
  }
  finish_sums(t.out, sum, rows, kPanel);
}

void gemm(const GemmTile& tile, int64_t rows, int64_t width) {
#if !defined(QUANT_OPS_AMX_EMULATED)
  const bool is_short = tile.quads < kShortTap || tile.taps * tile.quads <= kFewGroups;
  if (rows <= kFewRows || is_short) return kAvx512VnniProducts.gemm(tile, rows, width);
#endif
  gemm_u8s8_32x32_amx(tile, rows, width);
}

GemmShape gemm_shape(int64_t rows, int64_t width) {
#if !defined(QUANT_OPS_AMX_EMULATED)
  if (rows <= kFewRows) return kAvx512VnniProducts.gemm_shape(rows, width);
#endif
  return {"amx", rows, width < 2 * kTileColumns ? width : 2 * kTileColumns};
}

// The nibbles of a weight are unpacked by vectors: see avx512vnni.cpp.
constexpr int64_t kNibbleRows = QO_NIBBLE_ROWS;
void nibbles(const NibbleTile& tile, int64_t rows) { QO_NIBBLES.nibbles(tile, rows); }

int64_t peak(int64_t iterations) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kTileRows, kTileBytes);
  Tiles tiles;
  tiles.configure(config);
  for (int64_t i = 0; i < iterations; ++i)
    unroll<4>([&](auto c)
                  QO_LAMBDA { tiles.template multiply_add<c.value, kActivations + c.value / 2, kWeights + c.value % 2>(); });
  tiles.release();
  return iterations * 4 * kTileRows * kTileColumns * kTileBytes;
}

}  // namespace
}  // namespace QO_ISA

constinit const ProductKernels QO_PRODUCTS = {
    .isa = QO_TEXT(QO_ISA),
    .gemm_rows = QO_ISA::kRows,
    .slim_rows = QO_ISA::kRows,
    .row_step = QO_ISA::kTileRows,
    .gemm = QO_ISA::gemm,
    .gemm_shape = QO_ISA::gemm_shape,
    .depthwise = QO_ISA::depthwise<QO_ISA::Taps>,
    .nibble_rows = QO_ISA::kNibbleRows,
    .nibbles = QO_ISA::nibbles,
    .peak = QO_ISA::peak,
};

}  // namespace quant_ops
QO_TARGET_END
#endif
