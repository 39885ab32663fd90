// The Hopper engine's host side without CUDA: which problems a tile takes, and how its blocks share one. Read next: choose.h,
// igemm.cu.
#include "engine/sm90/igemm.h"

#include <algorithm>

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

}  // namespace quant_ops::sm90
