// The Hopper engine's host side without CUDA: which problems a tile takes, and a model of its time. Read next: igemm.h, igemm.cu.
#include "engine/sm90/igemm.h"

#include <algorithm>

#include "engine/remembered.h"

namespace quant_ops::sm90 {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMostRows = INT32_MAX - 1024, kMostStride = int64_t{1} << 40;

// Whether TMA's im2col mode can walk over the image as the convolution does.
bool walks(const Gather& g) {
  const int64_t columns = g.columns.divisor, rows = g.pixels.divisor / columns;
  const int64_t size[2] = {g.height, g.width}, count[2] = {rows, columns};
  for (int d = 0; d < 2; ++d) {
    const int64_t upper = (count[d] - 1) * g.stride[d] - g.pad[d] - (size[d] - 1);
    if (g.stride[d] > 8 || g.pad[d] > 128 || -g.pad[d] > 127 || upper < -128 || upper > 127) return false;
  }
  return g.sample % 16 == 0 && g.row % 16 == 0 && g.pixel % 16 == 0 && g.sample < kMostStride;
}

}  // namespace

// Fitted to benchmarks/gpu/h200_sweep.json.
const Costs kH200 = {4649.68, 1.43318,  52.1636, 0.295418, 2.0057,  120.996, 1847.91, 79.3623,
                     25.6293, 0.983451, 27.0895, 11028,    17.8756, 3417.61, 59.2841};

Problem problem_of(const IgemmProblem& p) {
  return {.M = p.M,
          .N = p.N,
          .K = p.K,
          .a = p.a,
          .a_stride = p.M > 1 ? p.a_stride : p.K,
          .b = p.b,
          .b_stride = p.N > 1 ? p.b_stride : p.K,
          .samples = 1,
          .out = epilogue_of(p)};
}

Schedule schedule_of(const Problem& p, const KernelPlan& plan) {
  const Tile& t = kTiles[plan.kernel];
  const Gather& g = p.gather;
  const auto size = [](int64_t n) { return static_cast<int32_t>(n); };
  const int64_t first = t.swapped ? p.N : p.M, second = t.swapped ? p.M : p.N;
  const int64_t rows = ceil_div(first, t.first * t.cluster), second_blocks = ceil_div(second, t.second);
  const int64_t load = p.gathers ? load_bytes(g.group) : kStepBytes;
  const auto last = [&](int64_t n, int64_t tile, bool is_weight) {
    const int64_t begin = std::max<int64_t>(0, n - tile);
    return size(is_weight ? ceil_div(begin, 16) * 16 : begin);
  };
  return {.first_blocks = size(rows * t.cluster),
          .second_blocks = size(second_blocks),
          .groups = size(p.groups),
          .splits = joins_in_cluster(plan) ? 1 : size(plan.splits),
          .cluster = t.cluster,
          .joined = joins_in_cluster(plan) ? size(plan.splits) : 1,
          .plane = FastDiv(rows * second_blocks),
          .band = FastDiv(kBand * second_blocks),
          .last_band = FastDiv(std::max<int64_t>(1, rows % kBand)),
          .split = FastDiv(joins_in_cluster(plan) ? 1 : plan.splits),
          .steps = size(steps_of(p)),
          .split_steps = size(plan.split_k / kStepBytes),
          .load = size(load),
          .first_rows = size(first),
          .second_rows = size(second),
          .first_last = last(first, t.first, t.swapped),
          .second_last = last(second, t.second, !t.swapped),
          .first_load = size(std::min<int64_t>(t.first, first)),
          .second_load = size(t.cluster > 1 ? t.second / t.cluster : std::min<int64_t>(t.second, second)),
          .k = size(p.K),
          .gathers = p.gathers,
          .ordered = is_ordered(p),
          .tap = size(g.group),
          .tap_loads = size(p.gathers ? ceil_div(g.group, load) : 1),
          .kernel_columns = size(g.kernel_columns.divisor),
          .columns = g.columns,
          .pixels = g.pixels,
          .stride = {g.stride[0], g.stride[1]},
          .pad = {g.pad[0], g.pad[1]},
          .dilation = {g.dilation[0], g.dilation[1]}};
}

bool takes(const Problem& p, int kernel) {
  if (kernel < 0 || kernel >= kKernels) return false;
  const Tile& t = kTiles[kernel];
  if (p.M < 1 || p.N < 1 || p.K < 1 || p.M > kMostRows || p.N * p.groups > kMostRows || p.K > kMostRows) return false;
  if (p.K % 16 != 0 || p.b_stride % 16 != 0 || p.b_stride >= kMostStride / 16) return false;
  if (!is_aligned(p.b, 16)) return false;
  if (!p.gathers) return is_aligned(p.a, 16) && p.a_stride % 16 == 0 && p.a_stride < kMostStride;
  if (t.swapped || !is_aligned(p.gather.codes, 16)) return false;
  const Gather& g = p.gather;
  // a last load of a tap that reaches into the next group would add its products
  if (g.group % 16 != 0 || (p.groups > 1 && g.group % load_bytes(g.group) != 0)) return false;
  const int64_t taps = p.K / g.group, s = g.kernel_columns.divisor, r = taps / s;
  if ((r - 1) * g.dilation[0] > 255 || (s - 1) * g.dilation[1] > 255) return false;
  return walks(g);
}

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
  const double exchanged = static_cast<double>(t.first) * t.second / (128 * t.warpgroups) * static_cast<double>(splits - 1) /
                           static_cast<double>(splits);
  const double joining = splits == 1 ? 0.0
                         : cluster   ? c.cluster_start + exchanged * c.cluster
                                     : c.join_start + sums / (c.join * sms);
  return c.start + std::max(computed, moved) + joining;
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
