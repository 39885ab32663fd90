// weight_only_linear of more rows than the GEMV takes, by wgmma: the table of tiles and the choice among them. Plain host code.
// Read next: weight_only.cuh for the kernel.
#pragma once

#include <algorithm>
#include <string>

#include "launch.h"

namespace quant_ops::sm90 {

constexpr int kWeightStageK = 128;  // k of a stage of the ring in shared memory

struct WeightOnlyTile {
  const char* name;
  int rows;           // of x
  int warpgroups;     // that multiply, each 64 columns
  int blocks_per_sm;  // resident at once
  // Clocks of a multiprocessor for a stage of one tile without its folds, and for a fold: of floats, of codes. Measured on an
  // NVIDIA H200.
  double stage_clocks[2], fold_clocks[2];

  constexpr int columns() const { return 64 * warpgroups; }
  constexpr int threads() const { return 128 * (warpgroups + 1); }  // the last warpgroup loads, and gives its registers away
  constexpr int load_registers() const { return 40; }
  constexpr int multiply_registers() const {
    return std::min(232, (65536 / (threads() * blocks_per_sm) / 8 * 8 * (warpgroups + 1) - load_registers()) / warpgroups / 8 * 8);
  }
  constexpr int weight_bytes(int bits) const { return columns() * kWeightStageK * bits / 8; }
  constexpr int stage_bytes(int bits, int x_bytes) const { return rows * kWeightStageK * x_bytes + weight_bytes(bits); }
  // What fits beside the parameters of the rows and the barriers; more than eight hide nothing.
  constexpr int stages(int bits, int x_bytes) const {
    return std::min(8, (228 * 1024 / blocks_per_sm - 4096) / stage_bytes(bits, x_bytes));
  }
  constexpr int shared_bytes(int bits, int x_bytes) const {
    return stages(bits, x_bytes) * stage_bytes(bits, x_bytes) + 1024;  // the ring starts at a multiple of 1024
  }
};

constexpr WeightOnlyTile kWeightOnlyTiles[] = {
    {"weight_only_32x64_wgmma", 32, 1, 2, {350, 380}, {225, 220}},
    {"weight_only_64x64_wgmma", 64, 1, 2, {520, 460}, {215, 300}},
    {"weight_only_128x128_wgmma", 128, 2, 1, {1150, 1000}, {600, 1030}},
};
constexpr int kWeightOnlyTileCount = sizeof(kWeightOnlyTiles) / sizeof(kWeightOnlyTiles[0]);

// The tile and splits of K with the least time, or the tile of that name (and those splits, if not 0); tile -1 if none takes the
// operands: rows of whole 16-byte vectors, codes without zero points of the weight, floats of at most kMostFloatK. Codes are not
// split. Splits are of `split_stages` stages.
constexpr int64_t kMostFloatK = 128 * kWeightStageK;  // no chain of additions of floats is longer than that of 128 stages
struct WeightOnlyChoice {
  int tile = -1, splits = 1, split_stages = 0;
  double clocks = 0.0;
};
WeightOnlyChoice choose_weight_only(const WeightOnlyParams& p, int64_t multiprocessors, const std::string& name, int64_t splits);

// x_dtype is kInt8 for codes, kFloat16 or kBFloat16. Several splits leave float32 results in `parts`, [splits][M][N]. Throws
// std::runtime_error where the launch fails.
void run_weight_only(const WeightOnlyArgs& a, int bits, DType x_dtype, const WeightOnlyChoice& choice, float* parts, bool early,
                     const Launch& at);

}  // namespace quant_ops::sm90
