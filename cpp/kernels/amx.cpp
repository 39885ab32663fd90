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
#if defined(QUANT_OPS_AMX_EMULATED)
#include <vector>
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

constexpr int64_t kRows = 32, kColumns = 32;  // of a block of sums
constexpr int64_t kCallRows = 96;   // of a call: a multiple of kRows; half a panel stays in the L1 cache while their blocks pass by
constexpr int64_t kFewRows = 6;     // up to here tiles are mostly empty, and one tile of avx512vnni is as fast
constexpr int64_t kTapGroups = 8;   // groups of k: taps of fewer, as of stems, are not worth being gathered
constexpr int64_t kFewGroups = 24;  // up to here the epilogue takes longer than the product, behind which avx512vnni hides it
constexpr int64_t kTileRows = 16;   // rows of a tile of activations and of sums
constexpr int64_t kTileGroups = 16;  // groups of four k of a tile
constexpr int64_t kTileBytes = 64;   // bytes of a row of a tile
constexpr int64_t kTileColumns = 16;

// Tile registers: 2 x 2 sums (row tile r, column tile c is 2 r + c), two of activations, two of weights. Each loaded tile is used
// twice: four loads (8 cycles each) hide behind four products (16 each).
constexpr int kActivations = 4, kWeights = 6;

// Rows of activations, `stride` apart, of which `groups` groups of four k are multiplied, `depth` at a time.
struct Activations {
  const uint8_t* a;
  int64_t stride, rows, groups, depth;
};

// The last groups of a row, with zeros before them, so that there are `depth`.
QO_INLINE void copy_last(const Activations& x, int64_t left, uint8_t* block) {
  std::memset(block, 0, static_cast<size_t>(kRows * kTileBytes));
  for (int64_t r = 0; r < x.rows; ++r)
    std::memcpy(block + r * kTileBytes + (x.depth - left) * kQuad, x.a + r * x.stride + (x.groups - left) * kQuad,
                static_cast<size_t>(left * kQuad));
}

// Columns [n, n + 16 * kColumnTiles) of the panel; the sums to sums[rows][kColumns]. Not inlined: tests/test_isa.py looks at its
// loop.
template <int kRowTiles, int kColumnTiles>
__attribute__((noinline)) void sweep_amx(Tiles& tiles, const GemmTile& t, const Activations& x, int64_t n, int64_t width,
                                         int32_t* sums) {
  unroll<kRowTiles>([&](auto r) QO_LAMBDA {  // every row of a tile from the same place
    unroll<kColumnTiles>(
        [&](auto c) QO_LAMBDA { tiles.template load<2 * r.value + c.value>(t.out.start + n + c.value * kTileColumns, 0); });
  });
  const int64_t b_stride = width * kQuad;
  alignas(64) uint8_t block[kRows * kTileBytes];
  for (int64_t k = 0; k < x.groups; k += x.depth) {
    const int64_t left = x.groups - k;
    const uint8_t* a = x.a + k * kQuad;
    int64_t stride = x.stride;
    if (left < x.depth) {
      copy_last(x, left, block);
      a = block;
      stride = kTileBytes;
    }
    // The last block ends with the panel: weights that were multiplied before meet zeros, and nothing behind the panel is read.
    const int8_t* b = t.b + (left < x.depth ? x.groups - x.depth : k) * b_stride + n * kQuad;
    unroll<kColumnTiles>([&](auto c) QO_LAMBDA { tiles.template load<kWeights + c.value>(b + c.value * kTileBytes, b_stride); });
    unroll<kRowTiles>([&](auto r) QO_LAMBDA {
      tiles.template load<kActivations + r.value>(a + r.value * kTileRows * stride, stride);
      unroll<kColumnTiles>([&](auto c) QO_LAMBDA {
        tiles.template multiply_add<2 * r.value + c.value, kActivations + r.value, kWeights + c.value>();
      });
    });
  }
  unroll<kRowTiles>([&](auto r) QO_LAMBDA {
    unroll<kColumnTiles>([&](auto c) QO_LAMBDA {
      tiles.template store<2 * r.value + c.value>(sums + r.value * kTileRows * kColumns + c.value * kTileColumns, kColumns * 4);
    });
  });
}

// One tap, and rows that are equally far apart. A block is finished before the next one is multiplied: finishing it in parts,
// between the products of the next one, took longer.
void gemm_u8s8_32x32_amx(const GemmTile& t, int64_t rows, int64_t width) {
  alignas(64) int32_t sums[kRows * kColumns];
  Activations x;
  x.stride = rows > 1 ? t.a_offset[1] - t.a_offset[0] : kTileBytes;
  x.groups = t.quads;
  x.depth = x.groups < kTileGroups ? x.groups : kTileGroups;
  Tiles tiles;
  int64_t configured = 0;
  for (int64_t n = 0; n < t.out.columns; n += kColumns) {
    const bool two = n + kTileColumns < width;
    for (int64_t m = 0; m < rows; m += kRows) {
      x.a = t.a + t.a_offset[m];
      x.rows = rows - m < kRows ? rows - m : kRows;
      if (x.rows != configured) {
        TileConfig config;
        for (int r = 0; r < 2 && x.rows > r * kTileRows; ++r) {
          const int64_t left = x.rows - r * kTileRows, tile_rows = left < kTileRows ? left : kTileRows;
          for (int c = 0; c < 2; ++c) config.set(2 * r + c, tile_rows, kTileBytes);
          config.set(kActivations + r, tile_rows, x.depth * kQuad);
        }
        for (int c = 0; c < 2; ++c) config.set(kWeights + c, x.depth, kTileBytes);
        tiles.configure(config);
        configured = x.rows;
      }
      if (x.rows > kTileRows)
        two ? sweep_amx<2, 2>(tiles, t, x, n, width, sums) : sweep_amx<2, 1>(tiles, t, x, n, width, sums);
      else
        two ? sweep_amx<1, 2>(tiles, t, x, n, width, sums) : sweep_amx<1, 1>(tiles, t, x, n, width, sums);
      TileOutput out = t.out.from_column(n).from_tile_row(m);
      if (out.columns > kColumns) out.columns = kColumns;
      finish_sums(out, sums, x.rows, kColumns);
    }
  }
  tiles.release();  // per call: the table has no hook for the end of a thread's work, and live tiles make switches of tasks slow
}

// What tiles are not worth, or not made for.
void gemm_without_tiles(const GemmTile& t, int64_t rows, int64_t width) {
#if defined(QUANT_OPS_AMX_EMULATED)
  std::vector<int64_t> offset(static_cast<size_t>(t.taps * kAvx2Products.gemm_rows));
  GemmTile part = t;
  part.a_offset = offset.data();
  for (int64_t done = 0, count; done < rows; done += count) {
    count = rows - done < kAvx2Products.gemm_rows ? rows - done : kAvx2Products.gemm_rows;
    for (int64_t tap = 0; tap < t.taps; ++tap)
      for (int64_t r = 0; r < count; ++r) offset[static_cast<size_t>(tap * count + r)] = t.a_offset[tap * rows + done + r];
    part.out = t.out.from_tile_row(done);
    kAvx2Products.gemm(part, count, width);
  }
#else
  kAvx512VnniProducts.gemm(t, rows, width);
#endif
}

bool takes_tiles(const GemmTile& t, int64_t rows) {
  if (t.taps != 1 || t.quads == 0) return false;
#if !defined(QUANT_OPS_AMX_EMULATED)  // there the tiles are what is tested
  if (rows <= kFewRows || t.quads <= kFewGroups) return false;
#endif
  for (int64_t r = 2; r < rows; ++r)
    if (t.a_offset[r] - t.a_offset[r - 1] != t.a_offset[1] - t.a_offset[0]) return false;
  return true;
}

void gemm(const GemmTile& t, int64_t rows, int64_t width) {
  if (!takes_tiles(t, rows)) return gemm_without_tiles(t, rows, width);
#if defined(QUANT_OPS_AMX_EMULATED)
  gemm_u8s8_32x32_amx(t, rows, width);
#else
  const int64_t rest = rows % kRows;
  if (rest == 0 || rest > kFewRows) return gemm_u8s8_32x32_amx(t, rows, width);
  gemm_u8s8_32x32_amx(t, rows - rest, width);
  GemmTile last = t;
  last.a_offset += rows - rest;
  last.out = t.out.from_tile_row(rows - rest);
  gemm_without_tiles(last, rest, width);
#endif
}

GemmShape gemm_shape(int64_t rows, int64_t width) {
#if !defined(QUANT_OPS_AMX_EMULATED)
  if (rows <= kFewRows) return kAvx512VnniProducts.gemm_shape(rows, width);
#endif
  return {"amx", rows < kRows ? rows : kRows, width < kColumns ? width : kColumns};
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
    .call_rows = QO_ISA::kCallRows,
    .gathers = QO_ISA::kTapGroups,
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
