// weight_only_linear on CUDA: start reading here. The formula is in ops.h.
//
// Rows of x become int8 codes (quantize_rows.cu), with their sums over groups where the weight has zero points; or they are read
// where they are, unless a row does not consist of whole aligned vectors. Then one product follows, of four (weight_only.h). The
// packed weight is that of the CPU. Bits of results from codes are those of cpp/cpu/weight_only.cpp, too.
#include "weight_only.h"

#include <algorithm>
#include <stdexcept>

#include "contract/dtypes.h"
#include "engine/remembered.h"
#include "launch.h"
#if defined(QUANT_OPS_SM90)
#include "engine/sm90/weight_only.h"
#endif

namespace quant_ops {
namespace {

constexpr int64_t kStep = 32;                   // k of a step (device/weight_only.cuh)
constexpr int kGemvRows = 16;                   // most rows of the GEMV
constexpr int kProcessorWarps = 16;             // of a multiprocessor: their loads fill the memory's latency
constexpr int kFloatGroupBytes = 320;           // at least what the float32 products keep of a group
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

// Few blocks have many warps each, so that enough loads are in flight; many blocks have few, so that they run all at once. Blocks
// that share a multiprocessor share its memory, of which some is left to the first cache.
WarpsOverK warps_over_k(const WeightOnlyParams& p, const WeightOnlyLayout& l, int rows, int most, int group_bytes,
                        const GpuLimits& gpu) {
  const int64_t blocks = ceil_div(p.M, rows) * ceil_div(p.N, kWeightOnlyColumns);
  int warps = most;
  while (warps > kLeastWarps && blocks * warps > kProcessorWarps * gpu.multiprocessors) warps /= 2;
  const int64_t together = std::min<int64_t>(kProcessorWarps / warps, ceil_div(blocks, gpu.multiprocessors));
  const int64_t bytes = std::min(gpu.block_bytes, gpu.shared_bytes * 7 / 10 / together);
  const int64_t fitting = std::max<int64_t>(kLeastRoundGroups, bytes / group_bytes);
  return {.rows = rows, .warps = warps, .round_groups = static_cast<int>(std::min<int64_t>(l.groups, fitting))};
}

constexpr int64_t kMostSplits = 8, kLeastSplitSteps = 16;
constexpr int64_t kMostPartBytes = int64_t{64} << 20;

// Clocks of tiles with K in `splits`: unpacking the weight costs as much as 32 rows of a tile.
double tile_clocks(const WeightOnlyParams& p, const WeightOnlyTiles& t, const GpuLimits& gpu) {
  constexpr double kRowClocks = 2.6, kUnpackRows = 32, kJoinClocks = 3000, kBytesPerClock = 30;
  const double processors = static_cast<double>(gpu.multiprocessors);
  const int64_t blocks = ceil_div(p.M, t.rows) * ceil_div(p.N, kTileColumns) * t.splits;
  const double waves = static_cast<double>(ceil_div(blocks, gpu.multiprocessors));
  const double product = waves * t.split_steps * (kUnpackRows + t.rows) * kRowClocks;
  if (t.splits == 1) return product;
  return product + kJoinClocks + 8.0 * static_cast<double>(t.splits * p.M * p.N) / (processors * kBytesPerClock);
}

// The tiles and splits that take the least time; a number of rows or splits may be given. Without rows: none.
WeightOnlyTiles choose_tiles(const WeightOnlyParams& p, int64_t steps, int rows, int64_t splits, const GpuLimits& gpu) {
  WeightOnlyTiles best;
  double best_clocks = 0.0;
  if (p.K == 0 || (p.codes && p.K > kExactTileK)) return best;
  for (int r : kWeightOnlyTileRows)
    for (int64_t wanted = splits > 0 ? splits : 1; wanted <= (splits > 0 ? splits : kMostSplits); ++wanted) {
      WeightOnlyTiles t{.rows = r, .splits = 1, .split_steps = static_cast<int>(steps)};
      if (wanted > 1) {
        const int64_t split_steps = ceil_div(ceil_div(steps, wanted), kSplitSteps) * kSplitSteps;
        t.split_steps = static_cast<int>(split_steps);
        t.splits = static_cast<int>(ceil_div(steps, split_steps));  // none is empty
        if (splits == 0 && (split_steps < kLeastSplitSteps || t.splits * p.M * p.N * 4 > kMostPartBytes)) continue;
      }
      if ((rows != 0 && rows != r) || tiles_shared_bytes(t, p.bits, p.codes) > gpu.block_bytes) continue;
      const double clocks = tile_clocks(p, t, gpu);
      if (best.rows != 0 && clocks > best_clocks) continue;
      best = t;
      best_clocks = clocks;
    }
  return best;
}

WeightOnlyTiles remembered_tiles(const WeightOnlyParams& p, int64_t steps, const GpuLimits& gpu) {
  const std::array<int64_t, 7> key{p.M, p.N, p.K, p.bits, p.codes, gpu.multiprocessors, gpu.block_bytes};
  return remembered(key, [&] { return choose_tiles(p, steps, 0, p.codes ? 1 : 0, gpu); });
}

constexpr const char* kPrefix = "weight_only_";
constexpr const char* kGemvOnlyName = "weight_only_gemv";

std::string tiles_name(int rows) { return kPrefix + std::to_string(rows) + "x" + std::to_string(kTileColumns); }

// Clocks of the GEMV for more than eight rows on an NVIDIA H200.
double gemv_clocks(const WeightOnlyParams& p, const GpuLimits& gpu) {
  const double of_weight = p.codes ? 0.11 : p.bits == 4 ? 0.065 : 0.12;
  return of_weight * static_cast<double>(p.N * p.K) / static_cast<double>(gpu.multiprocessors);
}

// Gives the product to the Hopper engine, to the tile of that name if there is one; false if it does not take the operands.
bool choose_wgmma(const WeightOnlyParams& p, const GpuLimits& gpu, const std::string& name, int64_t splits, WeightOnlyPlan* plan) {
#if defined(QUANT_OPS_SM90)
  if (gpu.arch != 90 || (p.codes && p.K > kExactTileK)) return false;
  const auto choose = [&] { return sm90::choose_weight_only(p, gpu.multiprocessors, name, splits); };
  const std::array<int64_t, 7> key{p.M, p.N, p.K, p.bits, p.group, p.codes, gpu.multiprocessors};
  const bool remembers = name.empty() && p.float_zero == nullptr && (p.zero_point == nullptr || !p.codes);
  const sm90::WeightOnlyChoice choice = remembers ? remembered(key, choose) : choose();
  if (choice.tile < 0 || (name.empty() && p.M <= kGemvRows && choice.clocks >= gemv_clocks(p, gpu))) return false;
  plan->engine = WeightOnlyEngine::kWgmma;
  plan->wgmma_tile = choice.tile;
  plan->tiles = {.rows = 0, .splits = choice.splits, .split_steps = choice.split_stages};
  return true;
#else
  static_cast<void>(p), static_cast<void>(gpu), static_cast<void>(name), static_cast<void>(splits), static_cast<void>(plan);
  return false;
#endif
}

// Which product computes it. QUANT_OPS_CUDA_KERNEL may name one; other names are for other operators.
void choose_product(const WeightOnlyParams& p, const GpuLimits& gpu, const KernelChoice& wanted, WeightOnlyPlan* plan) {
  const bool named = wanted.name.rfind(kPrefix, 0) == 0;
  const WeightOnlyLayout& l = plan->layout;
  const WeightOnlyArgs a = args_of(p, l);
  const bool zeros = has_group_zeros(p), row_zero = p.in.mode == InputMode::kDynamicAsymmetric;
  if (!p.codes && (p.in.dtype == DType::kFloat32 || p.float_zero != nullptr)) {
    plan->engine = WeightOnlyEngine::kFloats;
    plan->warps = warps_over_k(p, l, p.M == 1 ? 1 : 8, most_warps(16), kFloatGroupBytes, gpu);
  } else {
    int tile_rows = 0;
    for (int rows : kWeightOnlyTileRows)
      if (named && wanted.name == tiles_name(rows)) tile_rows = rows;
    const bool gemv = (p.M <= kGemvRows && tile_rows == 0) || (named && wanted.name == kGemvOnlyName);
    // for up to eight rows the GEMV is the fastest
    const bool wgmma = named ? tile_rows == 0 && wanted.name != kGemvOnlyName : p.M > 8;
    if (wgmma && choose_wgmma(p, gpu, named ? wanted.name : "", named ? wanted.splits : 0, plan)) return;
    if (!gemv && named)
      plan->tiles = choose_tiles(p, a.steps, tile_rows, p.codes ? 1 : wanted.splits, gpu);
    else if (!gemv)
      plan->tiles = remembered_tiles(p, a.steps, gpu);
    plan->engine = plan->tiles.rows == 0 ? WeightOnlyEngine::kGemv : WeightOnlyEngine::kTiles;
    const int rows = p.M <= 8 ? 8 : 16;
    plan->warps = warps_over_k(p, l, rows, most_warps(rows),
                               4 * gemv_round_words(p.codes, zeros, row_zero, static_cast<int>(std::min<int64_t>(p.M, rows))), gpu);
  }
  if (named && kernel_text(*plan) != wanted.name)
    throw std::runtime_error(
        "quant_ops.weight_only_linear: expected QUANT_OPS_CUDA_KERNEL to name a kernel that takes these operands, got " +
        wanted.name + ". Unset it, or name " + kernel_text(*plan) + ".");
}

}  // namespace

std::string kernel_text(const WeightOnlyPlan& plan) {
  switch (plan.engine) {
    case WeightOnlyEngine::kFloats: return "weight_only_float32";
    case WeightOnlyEngine::kGemv: return kGemvOnlyName;
#if defined(QUANT_OPS_SM90)
    case WeightOnlyEngine::kWgmma: return sm90::kWeightOnlyTiles[plan.wgmma_tile].name;
#endif
    default: return tiles_name(plan.tiles.rows);
  }
}

WeightOnlyPlan plan_weight_only(const WeightOnlyParams& p, const GpuLimits& gpu, const KernelChoice& wanted) {
  WeightOnlyPlan plan{};
  WorkspaceLayout workspace;
  plan.layout = weight_only_layout(p.N, p.K, p.bits, p.group);
  choose_product(p, gpu, wanted, &plan);
  if (p.codes) {
    plan.row_bytes = std::max<int64_t>(1, ceil_div(p.K, kStep)) * kStep;
    plan.codes = workspace.add<int8_t>(p.M * plan.row_bytes);
    plan.row_scale = workspace.add<float>(p.M);
    if (p.in.mode == InputMode::kDynamicAsymmetric) plan.row_zero = workspace.add<int32_t>(p.M);
    if (has_group_zeros(p)) plan.row_sum = workspace.add<int32_t>(p.M * plan.layout.groups);
    plan.early = gpu.arch >= 90 && !plan.row_sum;
  } else if (!is_whole(p)) {
    plan.padded_k = ceil_div(p.K, 8) * 8;
    plan.rows = workspace.add<char>(p.M * plan.padded_k * dtype_bytes(p.in.dtype));
  }
  if (plan.tiles.splits > 1) plan.parts = workspace.add<float>(plan.tiles.splits * p.M * p.N);
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
                        .asymmetric = p.in.mode == InputMode::kDynamicAsymmetric},
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
    case WeightOnlyEngine::kTiles:
      return run_weight_only_tiles(a, p.bits, of_rows, plan.tiles, plan.parts.in(at.memory), plan.early, at);
    case WeightOnlyEngine::kFloats: return run_weight_only_floats(a, p.bits, of_rows, plan.warps, at);
#if defined(QUANT_OPS_SM90)
    case WeightOnlyEngine::kWgmma: {
      const sm90::WeightOnlyChoice choice{plan.wgmma_tile, plan.tiles.splits, plan.tiles.split_steps};
      return sm90::run_weight_only(a, p.bits, of_rows, choice, plan.parts.in(at.memory), plan.early, at);
    }
#else
    case WeightOnlyEngine::kWgmma: return;
#endif
  }
}

}  // namespace quant_ops
