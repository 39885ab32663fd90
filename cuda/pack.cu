// pack_weight on CUDA: the sums of a weight's columns, and its rows where it cannot be read as it is (cuda_weights.h).
#include "device/common.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;

struct PackArgs {
  static constexpr bool kBarriers = true;
  CudaWeights w;
  const int8_t* weight;
  int32_t* sums;  // null: not wanted
  int8_t* rows;   // null: not wanted
  FastDiv tap;
};

// A warp makes the sum and the row of a column.
__global__ void __launch_bounds__(kThreads) pack_rows_kernel(const QO_GRID_CONSTANT PackArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t o = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (o >= a.w.o) return;
  const int64_t own =
      o % a.w.n / (a.w.n / a.w.joined_groups) * a.w.c;  // the column's first channel among those of the joined groups
  const int8_t* from = a.weight + o * a.w.c * a.w.taps;
  if (a.rows != nullptr)
    for (int64_t k = lane; k < a.w.row_bytes; k += kWarp) {
      const int64_t tap = a.tap.quotient(k), channel = k - tap * a.tap.divisor - own;
      const bool exists = tap < a.w.taps && channel >= 0 && channel < a.w.c;
      a.rows[o * a.w.row_bytes + k] = exists ? from[channel * a.w.taps + tap] : int8_t{0};
    }
  if (a.sums == nullptr) return;
  int32_t sum = 0;
  for (int64_t i = lane; i < a.w.c * a.w.taps; i += kWarp) sum += from[i];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (lane == 0) a.sums[o] = sum;
}

// A thread packs a channel of a depthwise weight, or one of the zeros that fill up its last vector.
__global__ void __launch_bounds__(kThreads) pack_depthwise_kernel(const QO_GRID_CONSTANT PackArgs a) {
  const int64_t o = int64_t{blockIdx.x} * kThreads + threadIdx.x, padded = a.w.rows_bytes / a.w.taps;
  if (o >= padded) return;
  int32_t sum = 0;
  for (int64_t tap = 0; tap < a.w.taps; ++tap) {
    const int8_t value = o < a.w.o ? a.weight[o * a.w.taps + tap] : int8_t{0};
    sum += value;
    if (a.rows != nullptr) a.rows[tap * padded + o] = value;
  }
  if (a.sums != nullptr && o < a.w.o) a.sums[o] = sum;
}

}  // namespace

void pack_weight_cuda(const int8_t* weight, const CudaWeights& w, int32_t* sums, int8_t* rows, const Launch& at) {
  if (w.o == 0 || (sums == nullptr && rows == nullptr)) return;
  const PackArgs a{.w = w, .weight = weight, .sums = sums, .rows = rows, .tap = FastDiv(w.tap_bytes)};
  if (w.depthwise)
    launch(at, pack_depthwise_kernel, blocks_for(w.rows_bytes / w.taps, kThreads, kMaxGrid), dim3(kThreads), a);
  else
    launch(at, pack_rows_kernel, blocks_for(w.o, kThreads / kWarp, kMaxGrid), dim3(kThreads), a);
}

namespace {

// Whether the kernels read the rows of the weight itself, though a packed copy may be there for its sums.
bool reads_plain(const CudaWeights& w, const int8_t* weight) { return w.plain && is_aligned(weight, 16); }

}  // namespace

WeightPlan plan_weight(const CudaWeights& layout, const int8_t* weight, const int8_t* packed, bool with_sums,
                       WorkspaceLayout* workspace) {
  WeightPlan plan{.layout = layout, .with_sums = with_sums};
  if (packed == nullptr && with_sums) plan.sums = workspace->add<int32_t>(layout.o);
  if (!reads_plain(layout, weight) && (packed == nullptr || layout.plain)) plan.rows = workspace->add<int8_t>(layout.rows_bytes);
  return plan;
}

WeightOnDevice run_weight(const WeightPlan& plan, const int8_t* weight, const int8_t* packed, const Launch& at) {
  int32_t* const sums = plan.sums.in(at.memory);
  int8_t* const rows = plan.rows.in(at.memory);
  pack_weight_cuda(weight, plan.layout, sums, rows, at);
  WeightOnDevice made{rows, sums};
  if (plan.with_sums && packed != nullptr) made.sums = reinterpret_cast<const int32_t*>(packed);
  if (!plan.rows) made.rows = reads_plain(plan.layout, weight) ? weight : packed + plan.layout.rows_offset;
  return made;
}

}  // namespace quant_ops
