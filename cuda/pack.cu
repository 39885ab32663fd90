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
  const int64_t own = o % a.w.n / (a.w.n / a.w.merged) * a.w.c;  // the column's first channel among those of merged groups
  const int8_t* from = a.weight + o * a.w.c * a.w.taps;
  if (a.rows != nullptr)
    for (int64_t k = lane; k < a.w.row; k += kWarp) {
      const int64_t tap = a.tap.quotient(k), channel = k - tap * a.tap.divisor - own;
      const bool exists = tap < a.w.taps && channel >= 0 && channel < a.w.c;
      a.rows[o * a.w.row + k] = exists ? from[channel * a.w.taps + tap] : int8_t{0};
    }
  if (a.sums == nullptr) return;
  int32_t sum = 0;
  for (int64_t i = lane; i < a.w.c * a.w.taps; i += kWarp) sum += from[i];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (lane == 0) a.sums[o] = sum;
}

// Of a depthwise weight, a thread per channel, also of those that only fill up a vector.
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

void pack_weight_cuda(const int8_t* weight, const CudaWeights& w, int32_t* sums, int8_t* rows, void* stream) {
  if (w.o == 0 || (sums == nullptr && rows == nullptr)) return;
  const PackArgs a{w, weight, sums, rows, FastDiv(w.tap)};
  if (w.depthwise)
    launch("pack_weight", pack_depthwise_kernel, blocks_for(w.rows_bytes / w.taps, kThreads, kMaxGrid), dim3(kThreads), stream, a);
  else
    launch("pack_weight", pack_rows_kernel, blocks_for(w.o, kThreads / kWarp, kMaxGrid), dim3(kThreads), stream, a);
}

WeightOnDevice::WeightOnDevice(const CudaWeights& w, const int8_t* weight, const int8_t* packed, bool with_sums,
                               Workspace* workspace)
    : w_(w), weight_(weight) {
  const bool as_it_is = w.plain && is_aligned(weight, 16);
  if (packed != nullptr) sums = reinterpret_cast<const int32_t*>(packed);
  if (as_it_is)
    rows = weight;
  else if (packed != nullptr && !w.plain)
    rows = packed + w.rows_offset;
  if (packed == nullptr && with_sums) sums = made_sums_ = workspace->take<int32_t>(w.o);
  if (rows == nullptr) rows = made_rows_ = workspace->take<int8_t>(w.rows_bytes);
  if (!with_sums) sums = nullptr;
}

void WeightOnDevice::prepare(void* stream) const { pack_weight_cuda(weight_, w_, made_sums_, made_rows_, stream); }

}  // namespace quant_ops
