// The kernels of weight_only_linear on CUDA, a contract between them and weight_only.cpp, which chooses among them. Plain host
// code. Read next: weight_only.cpp; device/weight_only.cuh for how a packed weight is read.
#pragma once

#include "contract/ops.h"
#include "contract/weight_only_layout.h"
#include "device/layout.cuh"
#include "device/workspace.h"

namespace quant_ops {

// The operands as all kernels read them. Rows of x are whole 16-byte vectors: codes from quantize_rows, or floats whose K is a
// multiple of eight. Steps are those of device/weight_only.cuh.
struct WeightOnlyArgs {
  static constexpr bool kBarriers = true;
  int64_t M, N, K;  // K: of a row in memory, elements beyond the weight's are zeros
  const void* x;
  int64_t x_stride;          // in elements
  const float* row_scale;    // of codes, as are the next two
  const int32_t* row_zero;   // null: none
  const int32_t* row_sum;    // [groups][M] sums of a - zero_a; null: neither zero_point nor float_zero is there
  const int8_t* codes;       // of the packed weight
  const int32_t* code_sums;  // likewise: sum_place
  int64_t column_bytes, padded_n;
  int64_t weight_k;  // that the weight has
  int steps, groups;
  int group_shift;  // the group of step s is s >> group_shift
  const float* scale;
  int64_t scale_stride[2];
  const int8_t* zero_point;
  const float* float_zero;
  int64_t zero_stride[2];
  const float* bias;
  void* y;
  DType y_dtype;
  int64_t y_stride;
  bool y_vectors;  // four neighbouring columns from a multiple of four on are one aligned vector
};

// What multiplies. Each kernel takes any number of rows.
enum class WeightOnlyEngine : int32_t {
  kGemv,    // the warps of a block share K; up to 16 rows of codes or of 16-bit floats (weight_only_gemv.cu)
  kTiles,   // tiles of the result, likewise (weight_only_tiles.cu)
  kFloats,  // float32 products, of any x and of weights with float_zero (weight_only_floats.cu)
  kWgmma,   // tiles of the Hopper engine (engine/sm90/weight_only.cuh)
};

// GEMV and float32 products: 32 columns of the result of a block, whose warps share K. What a group needs is in shared memory for
// `round_groups` groups at a time.
constexpr int kWeightOnlyColumns = 32;
struct WarpsOverK {
  int rows;  // of a block: 8 or 16 (GEMV), 1 or 8 (float32)
  int warps;
  int round_groups;
};
constexpr int kLeastWarps = 4;
constexpr int most_warps(int rows) { return rows <= 8 ? 16 : 8; }      // more rows need more registers
int gemv_round_words(bool codes, bool zero, bool row_zero, int rows);  // of a group
int gemv_shared_bytes(const WeightOnlyArgs& a, int bits, bool codes, const WarpsOverK& w);
int float_products_shared_bytes(const WeightOnlyArgs& a, const WarpsOverK& w);
void run_weight_only_gemv(const WeightOnlyArgs& a, int bits, DType x_dtype, const WarpsOverK& w, bool early, const Launch& at);
void run_weight_only_floats(const WeightOnlyArgs& a, int bits, DType x_dtype, const WarpsOverK& w, const Launch& at);

// Tiles: `rows` x 128 of the result of a block. x_dtype is that of rows in memory: kInt8 for codes, kFloat16 or kBFloat16. Of
// floats, K may be split: each split leaves float32 results in `parts`, [splits][M][N], which another kernel adds. Codes are not
// split, as the order of their groups is part of the contract.
constexpr int kTileColumns = 128;
constexpr int kWeightOnlyTileRows[] = {32, 64, 128};
constexpr int kSplitSteps = 8;  // steps of a split are a multiple of it, since 256 k hold whole groups
struct WeightOnlyTiles {
  int rows = 0;
  int splits = 1;
  int split_steps = 0;  // all if there is one split
};
int tiles_shared_bytes(const WeightOnlyTiles& tiles, int bits, bool codes);
void run_weight_only_tiles(const WeightOnlyArgs& a, int bits, DType x_dtype, const WeightOnlyTiles& tiles, float* parts, bool early,
                           const Launch& at);

// y = the sum of `parts`, [splits][M][N], and the bias (weight_only_tiles.cu).
void join_weight_only_parts(const WeightOnlyArgs& a, float* parts, int splits, const Launch& at);

// ---- operands (weight_only_pack.cu) ---------------------------------------------------------------------------------

void pack_weight_only_cuda(const int8_t* weight, const WeightOnlyLayout& layout, int8_t* packed, const Launch& at);
void unpack_weight_only_cuda(const int8_t* packed, const WeightOnlyLayout& layout, int8_t* weight, const Launch& at);

// row_sum of WeightOnlyArgs, [groups][M], from codes and zero points.
struct GroupSumsParams {
  int64_t M, K, group, groups;
  const int8_t* codes;
  int64_t stride;
  const int32_t* zero;  // null: 0
  int32_t* sums;
};
void group_sums_cuda(const GroupSumsParams& p, const Launch& at);

// Rows of floats with `columns` elements, to rows of `padded` ones, the rest zeros.
struct PadRowsParams {
  int64_t rows, columns, padded;
  const void* x;
  int64_t x_stride;
  DType dtype;
  void* to;
};
void pad_rows_cuda(const PadRowsParams& p, const Launch& at);

}  // namespace quant_ops
