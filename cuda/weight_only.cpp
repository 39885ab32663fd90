// weight_only_linear on CUDA: start reading here. The formula is in ops.h.
//
// Rows of x become int8 codes (quantize_rows.cu), with their sums over groups where the weight has zero points; or they are read
// where they are, unless a row does not consist of whole aligned vectors. Then one product follows, of three (weight_only.h). The
// packed weight is that of the CPU. Bits of results from codes are those of cpp/cpu/weight_only.cpp, too.
#include "weight_only.h"

#include <algorithm>
#include <stdexcept>

#include "contract/dtypes.h"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int64_t kStep = 32;                   // k of a step (device/weight_only.cuh)
constexpr int kGemvRows = 16;                   // most rows of the GEMV
constexpr int kProcessorWarps = 16;             // of a multiprocessor: their loads fill the memory's latency
constexpr int kRoundBytes = 40 << 10;           // shared memory for the groups of a round
constexpr int kLeastRoundGroups = 8;            // 256 k at least
constexpr int64_t kExactTileK = (1 << 17) - 1;  // a tile sums codes of four bits that are 16 times as large, in int32

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool has_group_zeros(const WeightOnlyParams& p) { return p.zero_point != nullptr || p.float_zero != nullptr; }

// What memory a row of x must consist of: vectors of 16 bytes, of floats eight elements, which one octet has.
bool is_whole(const WeightOnlyParams& p) {
  const int64_t bytes = dtype_bytes(p.in.dtype);
  return p.K % 8 == 0 && is_aligned(p.in.x, kVectorBytes) && (p.M == 1 || p.x_stride * bytes % kVectorBytes == 0);
}

int group_shift(const WeightOnlyLayout& l) {
  if (l.groups == 1) return 31;
  int shift = 0;
  while (kStep << shift < l.group) ++shift;
  return shift;
}

// All but the addresses that only the run knows.
WeightOnlyArgs args_of(const WeightOnlyParams& p, const WeightOnlyLayout& l) {
  WeightOnlyArgs a{};
  a.M = p.M;
  a.N = p.N;
  a.K = p.K;
  a.x = p.in.x;
  a.x_stride = p.x_stride;
  a.codes = l.codes(p.packed, 0);
  a.code_sums = l.sums(p.packed);
  a.column_bytes = l.column_bytes;
  a.padded_n = l.padded_n;
  a.weight_k = p.K;
  a.steps = static_cast<int>(ceil_div(p.K, kStep));
  a.groups = static_cast<int>(l.groups);
  a.group_shift = group_shift(l);
  a.scale = p.scale;
  a.zero_point = p.zero_point;
  a.float_zero = p.float_zero;
  for (int i = 0; i < 2; ++i) {
    a.scale_stride[i] = p.scale_stride[i];
    a.zero_stride[i] = p.zero_stride[i];
  }
  a.bias = p.bias;
  a.y = p.y;
  a.y_dtype = p.y_dtype;
  a.y_stride = p.y_stride;
  a.y_vectors = p.y_stride % 4 == 0 && is_aligned(p.y, 4 * dtype_bytes(p.y_dtype));
  return a;
}

// ---- the choice of a kernel -----------------------------------------------------------------------------------------

// Few blocks have many warps each, so that enough loads are in flight; many blocks have few, so that they run all at once.
WarpsOverK warps_over_k(const WeightOnlyParams& p, const WeightOnlyLayout& l, int rows, int most, int group_bytes,
                        const GpuLimits& gpu) {
  const int64_t blocks = ceil_div(p.M, rows) * ceil_div(p.N, kWeightOnlyColumns);
  int warps = most;
  while (warps > kLeastWarps && blocks * warps > kProcessorWarps * gpu.multiprocessors) warps /= 2;
  const int fitting = std::max(kLeastRoundGroups, kRoundBytes / group_bytes);
  return {.rows = rows, .warps = warps, .round_groups = static_cast<int>(std::min<int64_t>(l.groups, fitting))};
}

// The tile that takes the least time, in units of a row of a tile: unpacking the weight costs as much as some rows. 0: none.
int choose_tile_rows(const WeightOnlyParams& p, int steps, const GpuLimits& gpu) {
  constexpr int64_t kUnpackRows = 32;
  if (p.K == 0 || (p.codes && p.K > kExactTileK)) return 0;
  int best = 0;
  int64_t best_time = 0;
  for (int rows : kWeightOnlyTileRows) {
    if (tiles_shared_bytes(rows, p.bits, p.codes, steps) > gpu.block_bytes) continue;
    const int64_t blocks = ceil_div(p.M, rows) * ceil_div(p.N, kTileColumns);
    const int64_t time = ceil_div(blocks, gpu.multiprocessors) * (kUnpackRows + rows);
    if (best == 0 || time <= best_time) {
      best = rows;
      best_time = time;
    }
  }
  return best;
}

constexpr const char* kPrefix = "weight_only_";

std::string name_of(const WeightOnlyPlan& plan) {
  switch (plan.engine) {
    case WeightOnlyEngine::kFloats: return "weight_only_float32";
    case WeightOnlyEngine::kGemv: return "weight_only_gemv";
    default: return kPrefix + std::to_string(plan.tile_rows) + "x" + std::to_string(kTileColumns);
  }
}

// Which product computes it. QUANT_OPS_CUDA_KERNEL may name one; other names are for other operators.
void choose_product(const WeightOnlyParams& p, const GpuLimits& gpu, const KernelChoice& wanted, WeightOnlyPlan* plan) {
  const bool named = wanted.name.rfind(kPrefix, 0) == 0;
  const WeightOnlyLayout& l = plan->layout;
  const WeightOnlyArgs a = args_of(p, l);
  const bool zeros = has_group_zeros(p), row_zero = p.in.mode == Activation::kDynamicAsymmetric;
  if (!p.codes && (p.in.dtype == DType::kFloat32 || p.float_zero != nullptr)) {
    plan->engine = WeightOnlyEngine::kFloats;
    plan->warps = warps_over_k(p, l, p.M == 1 ? 1 : 8, most_warps(16), kWeightOnlyColumns * 2 * 4, gpu);
  } else {
    plan->tile_rows = p.M > kGemvRows || named ? choose_tile_rows(p, a.steps, gpu) : 0;
    for (int rows : kWeightOnlyTileRows)
      if (wanted.name == kPrefix + std::to_string(rows) + "x" + std::to_string(kTileColumns) && plan->tile_rows > 0)
        plan->tile_rows = rows;
    const bool gemv = plan->tile_rows == 0 || wanted.name == "weight_only_gemv";
    plan->engine = gemv ? WeightOnlyEngine::kGemv : WeightOnlyEngine::kTiles;
    const int rows = p.M <= 8 ? 8 : 16;
    plan->warps = warps_over_k(p, l, rows, most_warps(rows), 4 * gemv_round_words(p.codes, zeros, row_zero, rows), gpu);
  }
  if (named && name_of(*plan) != wanted.name)
    throw std::runtime_error(
        "quant_ops.weight_only_linear: expected QUANT_OPS_CUDA_KERNEL to name a kernel that takes these operands, got " +
        wanted.name + ". Unset it, or name " + name_of(*plan) + ".");
}

}  // namespace

WeightOnlyPlan plan_weight_only(const WeightOnlyParams& p, const GpuLimits& gpu, const KernelChoice& wanted) {
  WeightOnlyPlan plan{};
  WorkspaceLayout workspace;
  plan.layout = weight_only_layout(p.N, p.K, p.bits, p.group);
  choose_product(p, gpu, wanted, &plan);
  if (p.codes) {
    plan.row_bytes = std::max<int64_t>(1, ceil_div(p.K, kStep)) * kStep;
    plan.codes = workspace.add<int8_t>(p.M * plan.row_bytes);
    plan.row_scale = workspace.add<float>(p.M);
    if (p.in.mode == Activation::kDynamicAsymmetric) plan.row_zero = workspace.add<int32_t>(p.M);
    if (has_group_zeros(p)) plan.row_sum = workspace.add<int32_t>(p.M * plan.layout.groups);
    plan.early = gpu.arch >= 90 && !plan.row_sum;
  } else if (!is_whole(p)) {
    plan.padded_k = ceil_div(p.K, 8) * 8;
    plan.rows = workspace.add<char>(p.M * plan.padded_k * dtype_bytes(p.in.dtype));
  }
  plan.bytes = workspace.bytes();
  return plan;
}

void run_weight_only(const WeightOnlyPlan& plan, const WeightOnlyParams& p, const Launch& at) {
  WeightOnlyArgs a = args_of(p, plan.layout);
  if (p.codes) {
    int8_t* const codes = plan.codes.in(at.memory);
    quantize_rows_cuda({.rows = p.M,
                        .columns = p.K,
                        .x = p.in.x,
                        .x_stride = p.x_stride,
                        .x_dtype = p.in.dtype,
                        .q = codes,
                        .scale = plan.row_scale.in(at.memory),
                        .zero_point = plan.row_zero.in(at.memory),
                        .asymmetric = p.in.mode == Activation::kDynamicAsymmetric},
                       plan.row_bytes, at);
    if (plan.row_sum)
      group_sums_cuda({.M = p.M,
                       .K = p.K,
                       .group = plan.layout.group,
                       .groups = plan.layout.groups,
                       .codes = codes,
                       .stride = plan.row_bytes,
                       .zero = plan.row_zero.in(at.memory),
                       .sums = plan.row_sum.in(at.memory)},
                      at);
    a.x = codes;
    a.x_stride = a.K = plan.row_bytes;
    a.row_scale = plan.row_scale.in(at.memory);
    a.row_zero = plan.row_zero.in(at.memory);
    a.row_sum = plan.row_sum.in(at.memory);
  } else if (plan.rows) {
    char* const rows = plan.rows.in(at.memory);
    if (p.K > 0)
      pad_rows_cuda({.rows = p.M,
                     .columns = p.K,
                     .padded = plan.padded_k,
                     .x = p.in.x,
                     .x_stride = p.x_stride,
                     .dtype = p.in.dtype,
                     .to = rows},
                    at);
    a.x = rows;
    a.x_stride = a.K = plan.padded_k;
  }
  const DType of_rows = p.codes ? DType::kInt8 : p.in.dtype;
  switch (plan.engine) {
    case WeightOnlyEngine::kGemv: return run_weight_only_gemv(a, p.bits, of_rows, plan.warps, plan.early, at);
    case WeightOnlyEngine::kTiles: return run_weight_only_tiles(a, p.bits, of_rows, plan.tile_rows, plan.early, at);
    case WeightOnlyEngine::kFloats: return run_weight_only_floats(a, p.bits, of_rows, plan.warps, at);
  }
}

}  // namespace quant_ops
