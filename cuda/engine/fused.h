// Integer products that quantize their floating rows themselves (fused.cu): the table of tiles. Plain host code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/problem.h"

namespace quant_ops {

// X(rows, columns, warps along rows, warps along columns, warps along K, stages of the weight's ring) of a block
#define QO_FUSED_TILES(X) \
  X(16, 64, 1, 4, 2, 8)   \
  X(32, 128, 1, 4, 2, 6)  \
  X(32, 192, 1, 4, 2, 5)

constexpr int kFusedChunk = 128;  // elements of K of a stage, and bytes of a row of a tile in shared memory

struct FusedTile {
  const char* name;
  int m, n, warps_m, warps_n, warps_k, stages;

  constexpr int threads() const { return 32 * warps_m * warps_n * warps_k; }
  constexpr int64_t ring_bytes() const { return int64_t{stages} * n * kFusedChunk; }
  // Sums of every part of K. Eight more columns avoid bank conflicts.
  constexpr int64_t staging_bytes() const { return int64_t{warps_k} * m * (n + 8) * 4; }
};

#define QO_FUSED_TILE(M, N, WarpsM, WarpsN, WarpsK, Stages) \
  {.name = "fused_s8s8_" #M "x" #N "_mma",                  \
   .m = M,                                                  \
   .n = N,                                                  \
   .warps_m = WarpsM,                                       \
   .warps_n = WarpsN,                                       \
   .warps_k = WarpsK,                                       \
   .stages = Stages},
constexpr FusedTile kFusedTiles[] = {QO_FUSED_TILES(QO_FUSED_TILE)};
#undef QO_FUSED_TILE
constexpr int kFusedTileCount = sizeof(kFusedTiles) / sizeof(kFusedTiles[0]);

// Shared memory of a block that computes `columns` tiles one after the other, all with the same rows: the codes of its rows, the
// ring, the sums, and a scale and a zero point of each row. A single tile leaves its sums where the ring was.
inline int64_t fused_shared_bytes(const FusedTile& t, int64_t K, int64_t columns) {
  const int64_t codes = (K + kFusedChunk - 1) / kFusedChunk * kFusedChunk * t.m;
  return codes + (columns == 1 ? std::max(t.ring_bytes(), t.staging_bytes()) : t.ring_bytes() + t.staging_bytes()) + t.m * 8;
}

// Multiplies p.M rows of floating elements by p.b; they take the place of p's a, row_scale and row_zero, and q, scale and
// zero_point of `rows` are not written. kernel.kernel is a tile's number, kernel.splits how many tiles a block computes.
void run_fused(const IgemmProblem& p, const QuantizeRowsParams& rows, const KernelPlan& kernel, const Launch& at);

}  // namespace quant_ops
