// The choice among the tiles of weight_only.h: a model of their time. Plain host code.
#include "engine/sm90/weight_only.h"

namespace quant_ops::sm90 {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The clocks that the tiles of a multiprocessor take, one after the other: tiles that are resident at once take as long.
double weight_only_clocks(const WeightOnlyParams& p, const WeightOnlyTile& t, int64_t multiprocessors, const WeightOnlyChoice& c) {
  const bool in_stage = p.group > 0 && p.group < kWeightStageK, beyond = p.group <= 0 || p.group > kWeightStageK;
  const double folds = in_stage ? static_cast<double>(kWeightStageK / p.group) : p.codes && beyond ? 0.0 : 1.0;
  const double stage = t.stage_clocks[p.codes ? 1 : 0] + folds * t.fold_clocks[p.codes ? 1 : 0];
  const int64_t blocks = ceil_div(p.M, t.rows) * ceil_div(p.N, t.columns()) * c.splits;
  const double computed = static_cast<double>(ceil_div(blocks, multiprocessors)) * c.split_stages * stage;
  if (c.splits == 1) return computed;
  constexpr double kJoinClocks = 3000, kBytesPerClock = 30;
  return computed + kJoinClocks +
         8.0 * static_cast<double>(c.splits * p.M * p.N) / (static_cast<double>(multiprocessors) * kBytesPerClock);
}

}  // namespace

WeightOnlyChoice choose_weight_only(const WeightOnlyParams& p, int64_t multiprocessors, const std::string& name, int64_t splits) {
  constexpr int64_t kMost = INT32_MAX - 1024, kMostSplits = 8, kLeastStages = 4, kMostPartBytes = int64_t{64} << 20;
  WeightOnlyChoice best;
  if (p.K == 0 || p.M > kMost || p.N > kMost || p.K > kMost || p.float_zero != nullptr) return best;
  if (p.codes ? p.zero_point != nullptr : p.in.dtype == DType::kFloat32 || p.K > kMostFloatK) return best;
  const int64_t stages = ceil_div(p.K, kWeightStageK);
  for (int i = 0; i < kWeightOnlyTileCount; ++i) {
    if (!name.empty() && name != kWeightOnlyTiles[i].name) continue;
    const bool any = splits == 0 && !p.codes;
    for (int64_t wanted = any || p.codes ? 1 : splits; wanted <= (any ? kMostSplits : p.codes ? 1 : splits); ++wanted) {
      const int64_t split_stages = ceil_div(stages, wanted), used = ceil_div(stages, split_stages);  // none is empty
      if (any && wanted > 1 && (split_stages < kLeastStages || used * p.M * p.N * 4 > kMostPartBytes)) break;
      WeightOnlyChoice c{i, static_cast<int>(used), static_cast<int>(split_stages)};
      c.clocks = weight_only_clocks(p, kWeightOnlyTiles[i], multiprocessors, c);
      if (best.tile < 0 || c.clocks < best.clocks) best = c;
    }
  }
  return best;
}

}  // namespace quant_ops::sm90
