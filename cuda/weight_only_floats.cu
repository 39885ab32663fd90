// weight_only_linear in float32, for x of float32 and for weights with floating zero points, whose sum with the codes has no short
// form: w = q * scale + zero is made in float32. Integer zero points are taken off the codes first, and the scale is for the sum of
// a group. A block computes 32 columns for a few rows, and its warps share K. Sums of at most kPieceSteps steps of a lane are added
// to the others at once, so that no chain of additions is long. Read next: device/weight_only.cuh.
#include "device/common.cuh"
#include "device/weight_only.cuh"

namespace quant_ops {
namespace {

constexpr int kPieceSteps = 4, kMostWarps = 8;
constexpr int kPitch = kWeightOnlyColumns + 1, kColumnPitch = kWeightOnlyColumns + 4;
constexpr int kHalf = kOctet / 2;

struct FloatArgs : WeightOnlyArgs {
  int round_groups;
};

// What groups have, in shared memory: [groups][kColumnPitch] each.
struct SharedColumns {
  float* scale;
  float* zero;  // integer or floating
};

__device__ __forceinline__ void load_columns(const FloatArgs& a, const SharedColumns& shared, int first, int count, int64_t n0) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto take = [&](int g, int c) {
    const int64_t n = n0 + c < a.N ? n0 + c : a.N - 1, group = first + g;
    const int64_t zero_at = n * a.zero_stride[0] + group * a.zero_stride[1];
    const int to = g * kColumnPitch + c;
    shared.scale[to] = a.scale[n * a.scale_stride[0] + group * a.scale_stride[1]];
    shared.zero[to] = a.zero_point != nullptr   ? static_cast<float>(a.zero_point[zero_at])
                      : a.float_zero != nullptr ? a.float_zero[zero_at]
                                                : 0.0f;
  };
  if (a.scale_stride[1] == 1) {  // lanes take what lies side by side
    for (int c = warp; c < kWeightOnlyColumns; c += warps)
      for (int g = lane; g < count; g += kWarp) take(g, c);
  } else {
    for (int g = warp; g < count; g += warps) take(g, lane);
  }
}

// Four k of four columns as numbers of float32: of the codes less their integer zero points, or of the weight itself.
template <int kBits>
__device__ __forceinline__ void numbers_of(const Octets<kBits>& octets, int half, bool whole,
                                           const Vector<float, kLaneColumns>& scale, const Vector<float, kLaneColumns>& zero,
                                           float (&w)[kLaneColumns][kHalf]) {
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) {
    uint32_t quads[2];
    unsigned_bytes(octets, c, quads);
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float code = float_of_byte(quads[half], k) - static_cast<float>(8388608 + kByteOffset<kBits>);
      w[c][k] = whole ? fused(code, scale.get(c), zero.get(c)) : code - zero.get(c);
    }
  }
}

// Rows of x as the lane reads them.
template <class X, int kRows>
struct FloatRows {
  const X* at;  // the lane's octet of step 0 in row 0
  int64_t stride, readable;
  int rows;

  // Elements k, ..., k + 3 of every row.
  __device__ __forceinline__ void load(int64_t k, float (&x)[kRows][kHalf]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool valid = r < rows && k < readable;
      const auto in = valid ? load_vector<kHalf>(at + r * stride + k) : Vector<X, kHalf>{};
#pragma unroll
      for (int i = 0; i < kHalf; ++i) x[r][i] = widen(in.get(i));
    }
  }
};

// The lanes of a column and then the warps meet, where the columns' parameters were.
template <int kRows>
__device__ __forceinline__ void add_up(const FloatArgs& a, float (&y)[kRows][kLaneColumns], int64_t n0, int64_t m0, int rows) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int threads = static_cast<int>(blockDim.x);
  float* const parts = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      y[r][c] += __shfl_xor_sync(0xffffffffu, y[r][c], 1);
      y[r][c] += __shfl_xor_sync(0xffffffffu, y[r][c], 2);
      if (lane % 4 == 0) parts[(warp * kRows + r) * kPitch + lane / 4 * kLaneColumns + c] = y[r][c];
    }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rows * kWeightOnlyColumns; i += threads) {
    const int r = i / kWeightOnlyColumns, c = i % kWeightOnlyColumns;
    if (n0 + c >= a.N) continue;
    float result = 0.0f;
    for (int w = 0; w < threads / kWarp; ++w) result += parts[(w * kRows + r) * kPitch + c];
    store_result(a, m0 + r, n0 + c, result + bias_of(a, n0 + c));
  }
}

template <class X, int kBits, int kRows>
__global__ void __launch_bounds__(kMostWarps* kWarp, kRows == 1 ? 2 : 1) float_products_kernel(const QO_GRID_CONSTANT FloatArgs a) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp, t = lane % 4;
  const int64_t row_blocks = (a.M + kRows - 1) / kRows, column_block = blockIdx.x / row_blocks;
  const int64_t n0 = column_block * kWeightOnlyColumns, m0 = (blockIdx.x - column_block * row_blocks) * kRows;
  const int rows = static_cast<int>(a.M - m0 < kRows ? a.M - m0 : kRows);
  const bool whole = a.float_zero != nullptr;  // the scale is in the weight
  const int mask = static_cast<int>((1u << a.group_shift) - 1);

  const WeightLane<kBits> weight(a, n0, lane);
  const FloatRows<X, kRows> x{static_cast<const X*>(a.x) + m0 * a.x_stride + t * kOctet, a.x_stride, a.K - t * kOctet, rows};
  SharedColumns shared;
  shared.scale = reinterpret_cast<float*>(shared_memory());
  shared.zero = shared.scale + a.round_groups * kColumnPitch;

  float y[kRows][kLaneColumns] = {};
#pragma unroll 1
  for (int first = 0; first < a.groups; first += a.round_groups) {
    const int count = a.groups - first < a.round_groups ? a.groups - first : a.round_groups;
    const int begin = a.groups == 1 ? 0 : first << a.group_shift;
    const int end = first + count == a.groups ? a.steps : (first + count) << a.group_shift;
    int piece = begin + warp * kPieceSteps;
    Octets<kBits> octets[kPieceSteps];
    weight.load(piece, octets);
    load_columns(a, shared, first, count, n0);
    __syncthreads();
#pragma unroll 1
    for (; piece < end; piece += warps * kPieceSteps) {
      float sums[kRows][kLaneColumns] = {};
#pragma unroll
      for (int u = 0; u < kPieceSteps; ++u) {
        const int step = piece + u;
        if (step >= end) break;
        const int column = ((step >> a.group_shift) - first) * kColumnPitch + lane / 4 * kLaneColumns;
        const auto scale = load_vector<kLaneColumns>(shared.scale + column), zero = load_vector<kLaneColumns>(shared.zero + column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float w[kLaneColumns][kHalf], of_x[kRows][kHalf];
          x.load(int64_t{step} * kStepK + half * kHalf, of_x);
          numbers_of(octets[u], half, whole, scale, zero, w);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int c = 0; c < kLaneColumns; ++c)
#pragma unroll
              for (int k = 0; k < kHalf; ++k) sums[r][c] = fused(of_x[r][k], w[c][k], sums[r][c]);
        }
        if (u + 1 < kPieceSteps && step + 1 < end && ((step + 1) & mask) != 0) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) {
            y[r][c] = whole ? y[r][c] + sums[r][c] : fused(sums[r][c], scale.get(c), y[r][c]);
            sums[r][c] = 0.0f;
          }
      }
      weight.load(piece + warps * kPieceSteps, octets);
    }
    __syncthreads();
  }

  add_up(a, y, n0, m0, rows);
}

// ---- host -----------------------------------------------------------------------------------------------------------

using FloatKernel = void (*)(FloatArgs);

template <class X>
FloatKernel float_kernel_of(int bits, int rows) {
  if (bits == 4) return rows == 1 ? float_products_kernel<X, 4, 1> : float_products_kernel<X, 4, 8>;
  return rows == 1 ? float_products_kernel<X, 8, 1> : float_products_kernel<X, 8, 8>;
}

}  // namespace

int float_products_shared_bytes(const WeightOnlyArgs&, const WarpsOverK& w) {
  return std::max(w.round_groups * kColumnPitch * 2, w.warps * w.rows * kPitch) * 4;
}

void run_weight_only_floats(const WeightOnlyArgs& a, int bits, DType x_dtype, const WarpsOverK& w, const Launch& at) {
  const FloatKernel kernel = x_dtype == DType::kFloat32   ? float_kernel_of<float>(bits, w.rows)
                             : x_dtype == DType::kFloat16 ? float_kernel_of<Half>(bits, w.rows)
                                                          : float_kernel_of<BFloat16>(bits, w.rows);
  const int64_t blocks = (a.M + w.rows - 1) / w.rows * ((a.N + kWeightOnlyColumns - 1) / kWeightOnlyColumns);
  FloatArgs args{};
  static_cast<WeightOnlyArgs&>(args) = a;
  args.round_groups = w.round_groups;
  launch(at, kernel, blocks, dim3(static_cast<unsigned>(w.warps * kWarp)), args, float_products_shared_bytes(a, w));
}

}  // namespace quant_ops
