#include "engine/sm90/choose.h"

#include <algorithm>

#include "engine/remembered.h"

namespace quant_ops::sm90 {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// Fitted to benchmarks/gpu/h200_sweep.json.
const Costs kH200 = {4811.05, 393.115, 1.37479, 68.0556, 0.455402, 2.31514, 185.997, 1861.16, 45.7171,
                     23.6814, 1.41005, 17.4387, 57.5494, 10725.3,  14.3912, 2483.43, 98.3019};

bool joins_in_cluster(const Problem& p, int kernel, int64_t multiprocessors, int64_t splits) {
  constexpr int64_t kMost = 8;  // blocks of a cluster on every GPU
  const Tile& t = kTiles[kernel];
  const int64_t first = t.swapped ? p.N : p.M, second = t.swapped ? p.M : p.N;
  const int64_t blocks = ceil_div(first, t.first) * ceil_div(second, t.second) * p.groups * splits;
  // clusters stay within a group of multiprocessors, so that some of these are left over
  return splits > 1 && splits <= kMost && t.cluster == 1 && blocks * 8 <= multiprocessors * t.blocks_per_sm * 7;
}

double clocks(const Problem& p, int kernel, int64_t multiprocessors, int64_t splits, const Costs& c) {
  const Tile& t = kTiles[kernel];
  const int64_t steps = ceil_div(steps_of(p), splits), load = p.gathers ? load_bytes(p.gather.group) : kStepBytes;
  const int64_t first = t.swapped ? p.N : p.M, second = t.swapped ? p.M : p.N;
  const int64_t units = ceil_div(first, t.first * t.cluster) * t.cluster * ceil_div(second, t.second) * p.groups * splits;
  const int64_t per_sm = ceil_div(units, multiprocessors), rounds = ceil_div(per_sm, t.blocks_per_sm);
  const int64_t last = per_sm - (rounds - 1) * t.blocks_per_sm;  // blocks of the last round

  const double products = static_cast<double>(t.first) * t.second * kStepBytes / 4096 * c.product;
  const auto loaded = static_cast<double>(std::min<int64_t>(t.first, first) + std::min<int64_t>(t.second, second));
  const double bytes = loaded * kStepBytes / c.ingest;
  const double rows = loaded * static_cast<double>(kStepBytes / load) * (p.gathers ? c.image_row : c.row);
  const double alone = std::max(c.step, c.latency / (t.stages - 1)), shared = std::max({products, bytes, rows});
  const auto round = [&](int64_t blocks) {
    return static_cast<double>(steps) * std::max(shared * static_cast<double>(blocks), alone);
  };
  const double writing = c.write_start + static_cast<double>(t.first) * t.second / (128 * t.warpgroups) * c.write;
  const double hidden = t.blocks_per_sm > 1 ? c.hidden : 1.0;  // what of it is seen, of all rounds but the last
  const double others = static_cast<double>(rounds - 1);
  const double computed = others * (round(t.blocks_per_sm) + hidden * writing) + round(last) + writing;

  const double M = static_cast<double>(p.M), N = static_cast<double>(p.N * p.groups), K = static_cast<double>(p.K);
  const bool cluster = joins_in_cluster(p, kernel, multiprocessors, splits);
  const double sums = splits > 1 && !cluster ? M * N * 4.0 * static_cast<double>(splits) : 0.0;
  const double codes = p.gathers ? static_cast<double>(p.samples) * static_cast<double>(p.gather.sample) : M * K;
  const double sms = static_cast<double>(multiprocessors);
  const double result = M * N * static_cast<double>(dtype_bytes(p.out.dtype));
  const double moved = (codes + N * K + (sums > 0 ? sums : result)) / (c.memory * sms);
  const double own = loaded - static_cast<double>(t.second - t.second / t.cluster);  // of a block; its cluster loads the rest
  const double cached = static_cast<double>(units * steps * kStepBytes) * own / (c.cache * sms);
  const double exchanged = static_cast<double>(t.first) * t.second / (128 * t.warpgroups) * static_cast<double>(splits - 1) /
                           static_cast<double>(splits);
  const double joining = splits == 1 ? 0.0
                         : cluster   ? c.cluster_start + exchanged * c.cluster
                                     : c.join_start + sums / (c.join * sms);
  const double start = c.start + (std::min(t.first, t.second) < 32 ? c.narrow : 0.0);
  return start + std::max({computed, moved, cached}) + joining;
}

KernelPlan choose(const Problem& p, int64_t multiprocessors) {
  const Gather& g = p.gather;
  const auto alignment = [](const void* at) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) % 16); };
  // all that a choice depends on but the wanted kernel and the costs
  const std::array<int64_t, 26> key{multiprocessors,
                                    p.M,
                                    p.N,
                                    p.K,
                                    p.groups,
                                    p.a_stride,
                                    p.b_stride,
                                    p.gathers,
                                    p.samples,
                                    static_cast<int64_t>(p.out.dtype),
                                    alignment(p.a) + 16 * alignment(p.b) + 256 * alignment(g.codes),
                                    g.sample,
                                    g.row,
                                    g.pixel,
                                    g.group,
                                    g.height,
                                    g.width,
                                    g.stride[0],
                                    g.stride[1],
                                    g.pad[0],
                                    g.pad[1],
                                    g.dilation[0],
                                    g.dilation[1],
                                    g.pixels.divisor,
                                    g.columns.divisor,
                                    g.kernel_columns.divisor};
  return remembered(key, [&] { return choose(p, multiprocessors, KernelChoice()); });
}

KernelPlan choose(const Problem& p, int64_t multiprocessors, const KernelChoice& wanted, const Costs& costs) {
  constexpr int64_t kMostSumBytes = int64_t{64} << 20;  // of all splits
  KernelPlan best;
  const int64_t steps = steps_of(p), sum_bytes = 4 * p.M * p.N * p.groups;
  for (int i = 0; i < kKernels; ++i) {
    if ((!wanted.name.empty() && wanted.name != kTiles[i].name) || !takes(p, i)) continue;
    const bool any = wanted.splits == 0;
    const int64_t most = any ? std::max<int64_t>(1, std::min(kMostSplits, steps / kLeastSteps)) : wanted.splits;
    for (int64_t splits = any ? 1 : wanted.splits; splits <= most; ++splits) {
      const int64_t split_steps = ceil_div(steps, splits), used = ceil_div(steps, split_steps);  // none is empty
      const bool cluster = joins_in_cluster(p, i, multiprocessors, used);
      if (any && splits > 1 && !cluster && splits * sum_bytes > kMostSumBytes) break;
      const double time = clocks(p, i, multiprocessors, used, costs);
      if (best.engine != Engine::kNone && time >= best.time) continue;
      best = {.engine = Engine::kSm90,
              .kernel = i,
              .splits = used,
              .split_k = split_steps * kStepBytes,
              .time = time,
              .sums = used > 1 && !cluster ? used * p.M * p.N * p.groups : 0};
    }
  }
  return best;
}

}  // namespace quant_ops::sm90
