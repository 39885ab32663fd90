// weight_only_linear of few rows: the weight is read once, at the speed of the memory.
//
// A block computes 32 columns for 8 or 16 rows. Its warps share K, a piece of 64 or 128 k at a time, and each has its next piece in
// flight while it multiplies. Rows of x go from the L2 cache to registers: a warp reads what no other warp of the block does.
// Codes: the exact sums of the groups meet in shared memory, and then one thread a result folds them in ascending order, so that
// the bits are those of the CPU. Floats: a warp folds its own groups in registers, and the warps' results are added. Scales and
// zero points are copied to shared memory beforehand, those of as many groups as it holds; then comes the next round. Read next:
// device/weight_only.cuh.
#include "device/common.cuh"
#include "device/weight_only.cuh"

namespace quant_ops {
namespace {

// Words in shared memory from group to group of what columns have, and from row to row of their sums: more than 32, so that lanes
// with the same column meet less often in a bank.
constexpr int kColumnPitch = kWeightOnlyColumns + 4, kSumPitch = kWeightOnlyColumns + 1;
constexpr int kPieceLoads = 4;  // 16-byte loads of a lane
constexpr int kAhead = 4;       // pieces that are fetched to the L2 cache while the rows of x are being quantized

struct GemvArgs : WeightOnlyArgs {
  int round_groups;
  int kept_rows;  // whose sums are kept: those of a block that exist
};

template <int kBits>
constexpr int kPieceSteps = kPieceLoads / Octets<kBits>::kWords;

// What a block has in shared memory, of the groups of a round.
struct SharedRound {
  float* scale;       // [groups][kColumnPitch], as are the next two
  uint32_t* zero;     // codes: the zero point, or the bits of float_zero; floats: an addend of CodePairs
  int32_t* code_sum;  // codes
  int32_t* row_sum;   // codes: [groups][kept_rows]
  int32_t* sums;      // codes: [groups][kept_rows][kSumPitch]
};

template <bool kCodes>
__device__ __forceinline__ SharedRound shared_round(const GemvArgs& a) {
  const int columns = a.round_groups * kColumnPitch;
  const bool zero = !kCodes || a.row_sum != nullptr;
  SharedRound r{};
  r.scale = reinterpret_cast<float*>(shared_memory());
  r.zero = reinterpret_cast<uint32_t*>(r.scale + columns);
  r.code_sum = reinterpret_cast<int32_t*>(r.zero + (zero ? columns : 0));
  r.row_sum = r.code_sum + (kCodes && a.row_zero != nullptr ? columns : 0);
  r.sums = r.row_sum + (kCodes && zero ? a.round_groups * a.kept_rows : 0);
  return r;
}

// Begins to copy what groups [first, first + count) have. Lanes take what lies side by side.
template <class X, int kBits>
__device__ __forceinline__ void load_round(const GemvArgs& a, const SharedRound& r, int first, int count, int64_t n0, int64_t m0) {
  constexpr bool kCodes = std::is_same_v<X, int8_t>;
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto take = [&](int g, int c) {
    const bool exists = n0 + c < a.N;
    const int64_t n = exists ? n0 + c : a.N - 1, group = first + g, zero_at = n * a.zero_stride[0] + group * a.zero_stride[1];
    const int to = g * kColumnPitch + c;
    copy_async<4>(r.scale + to, a.scale + n * a.scale_stride[0] + group * a.scale_stride[1], true);
    const int32_t zero = a.zero_point != nullptr ? a.zero_point[zero_at] : 0;
    if constexpr (!kCodes) {
      r.zero[to] = CodePairs<X, kBits>::addend(zero);
    } else {
      if (a.zero_point != nullptr) r.zero[to] = static_cast<uint32_t>(zero);
      if (a.float_zero != nullptr) r.zero[to] = float_bits(a.float_zero[zero_at]);
      if (a.row_zero != nullptr) r.code_sum[to] = sum_of_codes(a, kBits, group, n);
    }
  };
  // Unrolled, these loops would need more registers than there are.
  if (a.scale_stride[1] == 1) {
#pragma unroll 1
    for (int c = warp; c < kWeightOnlyColumns; c += warps)
#pragma unroll 1
      for (int g = lane; g < count; g += kWarp) take(g, c);
  } else {
#pragma unroll 1
    for (int g = warp; g < count; g += warps) take(g, lane);
  }
  if constexpr (kCodes) {
    for (int i = static_cast<int>(threadIdx.x); a.row_sum != nullptr && i < count * a.kept_rows; i += threads) {
      const int64_t group = i / a.kept_rows, m = m0 + i % a.kept_rows;
      r.row_sum[i] = m < a.M ? a.row_sum[(first + group) * a.M + m] : 0;
    }
    for (int i = static_cast<int>(threadIdx.x); i < count * a.kept_rows * kSumPitch; i += threads) r.sums[i] = 0;
  }
  copy_commit();
}

// A lane's part of a piece: of the weight, and of its row of each eight rows of x.
template <class X, int kBits, int kRowTiles>
struct Piece {
  Octets<kBits> weight[kPieceSteps<kBits>];
  Vector<uint32_t, kXWords<X>> x[kPieceSteps<kBits>][kRowTiles];

  // `rows` are the lane's octets of step 0 of its rows; a piece that is not whole has zeros behind K.
  __device__ __forceinline__ void load_x(const X* const (&rows)[kRowTiles], int64_t left, int step) {
    using Words = Vector<uint32_t, kXWords<X>>;
    constexpr int kSteps = kPieceSteps<kBits>;
    const int64_t k = int64_t{step} * kStepK;
    if (k + kSteps * kStepK <= left) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int u = 0; u < kSteps; ++u)
          x[u][r] = load_vector<kXWords<X>>(reinterpret_cast<const uint32_t*>(rows[r] + k + u * kStepK));
    } else {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int u = 0; u < kSteps; ++u)
          x[u][r] = k + u * kStepK < left ? load_vector<kXWords<X>>(reinterpret_cast<const uint32_t*>(rows[r] + k + u * kStepK))
                                          : Words{};
    }
  }
};

template <class X, int kBits, int kRowTiles>
struct GemvWarp {
  static constexpr bool kCodes = std::is_same_v<X, int8_t>;
  SumOf<X> sums[kRowTiles][2][4] = {};
  float y[kRowTiles][2][4] = {};  // floats: what is folded

  // Adds a piece's products. Sums of a group, or of the part of one that the piece has, go where they are folded.
  __device__ __forceinline__ void multiply_piece(const GemvArgs& a, const SharedRound& r, const Piece<X, kBits, kRowTiles>& piece,
                                                 int first_group, int step, int end, int lane) {
    const int mask = static_cast<int>((1u << a.group_shift) - 1);
#pragma unroll
    for (int u = 0; u < kPieceSteps<kBits>; ++u) {
      const int s = step + u;
      if (s >= end) break;
      const int group = (s >> a.group_shift) - first_group, column = group * kColumnPitch + lane / 4 * kLaneColumns;
      uint32_t addends[kLaneColumns] = {};
      if constexpr (!kCodes) {
        const auto words = load_vector<kLaneColumns>(r.zero + column);
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) addends[c] = words.get(c);
      }
      const StepOperands<X, kBits> operands(piece.weight[u], addends);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) operands.multiply_rows(piece.x[u][t].words.at, sums[t]);
      if (u + 1 < kPieceSteps<kBits> && s + 1 < end && ((s + 1) & mask) != 0) continue;
      if constexpr (kCodes)
        keep_sums(a, r, group, lane, mask < kPieceSteps<kBits>);
      else
        fold(load_vector<kLaneColumns>(r.scale + column));
    }
  }

  // To shared memory; `whole`: no other piece has a part of this group.
  __device__ __forceinline__ void keep_sums(const GemvArgs& a, const SharedRound& r, int group, int lane, bool whole) {
    const int row = lane % 4 * 2;
    int32_t* const to = r.sums + (group * a.kept_rows + row) * kSumPitch + lane / 4 * kLaneColumns;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row + t * 8 + half < a.kept_rows) {
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) {
            int32_t* const at = to + (t * 8 + half) * kSumPitch + c;
            const int32_t sum = sums[t][c / 2][c % 2 * 2 + half] >> kCodeShift<kBits>;
            if (whole)
              *at = sum;
            else
              atomicAdd(at, sum);
          }
        }
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) sums[t][c / 2][c % 2 * 2 + half] = 0;
      }
  }

  // Floats: to where the rounds were, [warps][rows][kSumPitch].
  __device__ __forceinline__ void leave_results(int warp, int lane) const {
    float* const to = reinterpret_cast<float*>(shared_memory()) + (warp * kRowTiles * 8 + lane % 4 * 2) * kSumPitch;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[(t * 8 + i % 2) * kSumPitch + lane / 4 * kLaneColumns + j * 2 + i / 2] = y[t][j][i];
  }

  __device__ __forceinline__ void fold(const Vector<float, kLaneColumns>& scale) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[t][j][i] = fused(sums[t][j][i], scale.get(j * 2 + i / 2), y[t][j][i]);
          sums[t][j][i] = 0.0f;
        }
  }
};

// A thread's results, from codes or from the warps' floats: result i is element threadIdx.x + i * blockDim.x of [rows][32].
template <int kRows>
struct Results {
  static constexpr int kCount = kRows * kWeightOnlyColumns / (kLeastWarps * kWarp);
  float y[kCount];
  float row_scale[kCount];
  int32_t row_zero[kCount];

  __device__ __forceinline__ static int row(int i) {
    return (static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x)) / kWeightOnlyColumns;
  }
  __device__ __forceinline__ static int column() { return static_cast<int>(threadIdx.x) % kWeightOnlyColumns; }

  __device__ __forceinline__ void load_rows(const GemvArgs& a, int64_t m0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool exists = row(i) < kRows && m0 + row(i) < a.M;
      row_scale[i] = exists ? a.row_scale[m0 + row(i)] : 0.0f;
      row_zero[i] = exists && a.row_zero != nullptr ? a.row_zero[m0 + row(i)] : 0;
    }
  }

  // Folds the sums of a round. Nothing but the last multiplication and addition waits for the group before.
  template <bool kPlain>
  __device__ __forceinline__ void fold(const GemvArgs& a, const SharedRound& r, int count, int64_t m0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (row(i) >= a.kept_rows || m0 + row(i) >= a.M) break;
      const int32_t* const sums = r.sums + row(i) * kSumPitch + column();
      const float* const scale = r.scale + column();
#pragma unroll 8
      for (int g = 0; g < count; ++g) {
        FoldColumn f{.scale = scale[g * kColumnPitch], .zero = 0, .float_zero = 0.0f, .code_sum = 0};
        int32_t row_sum = 0;
        if constexpr (!kPlain) {
          const int at = g * kColumnPitch + column();
          if (a.zero_point != nullptr) f.zero = static_cast<int32_t>(r.zero[at]);
          if (a.float_zero != nullptr) f.float_zero = bits_float(r.zero[at]);
          if (a.row_zero != nullptr) f.code_sum = r.code_sum[at];
          if (a.row_sum != nullptr) row_sum = r.row_sum[g * a.kept_rows + row(i)];
        }
        y[i] = fold_group<kPlain>(a, sums[g * a.kept_rows * kSumPitch], f, row_scale[i], row_zero[i], row_sum, y[i]);
      }
    }
  }

  template <bool kCodes>
  __device__ __forceinline__ void store(const GemvArgs& a, int64_t n0, int64_t m0) const {
    const float* const parts = reinterpret_cast<const float*>(shared_memory());
    const int warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t n = n0 + column();
      if (row(i) >= kRows || m0 + row(i) >= a.M || n >= a.N) break;
      float value = y[i];
      if constexpr (!kCodes) {
        value = 0.0f;
        for (int w = 0; w < warps; ++w) value += parts[(w * kRows + row(i)) * kSumPitch + column()];
        value += bias_of(a, n);
      }
      store_result(a, m0 + row(i), n, value);
    }
  }
};

template <class X, int kBits, int kRowTiles>
__global__ void __launch_bounds__(most_warps(kRowTiles * 8) * kWarp) gemv_kernel(const QO_GRID_CONSTANT GemvArgs a) {
  constexpr bool kCodes = std::is_same_v<X, int8_t>;
  constexpr int kRows = kRowTiles * 8;
  constexpr int kSteps = kPieceSteps<kBits>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t row_blocks = (a.M + kRows - 1) / kRows;  // neighbouring blocks share columns
  const int64_t column_block = blockIdx.x / row_blocks;
  const int64_t n0 = column_block * kWeightOnlyColumns, m0 = (blockIdx.x - column_block * row_blocks) * kRows;
  const X* rows[kRowTiles];  // those that do not exist repeat the last one
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    const int64_t m = m0 + t * 8 + lane / 4;
    rows[t] = static_cast<const X*>(a.x) + (m < a.M ? m : a.M - 1) * a.x_stride + lane % 4 * kOctet;
  }
  const int64_t x_left = a.K - lane % 4 * kOctet;

  const WeightLane<kBits> weight(a, n0, lane);
  const SharedRound shared = shared_round<kCodes>(a);
  Piece<X, kBits, kRowTiles> piece, next;
  weight.load(warp * kSteps, piece.weight);
  if constexpr (kCodes) {
#pragma unroll 1
    for (int i = 1; i <= kAhead; ++i) weight.template fetch<kSteps>((warp + i * warps) * kSteps);
  }

  GemvWarp<X, kBits, kRowTiles> product;
  Results<kRows> results;
  if constexpr (kCodes) {
#pragma unroll
    for (float& y : results.y) y = bias_of(a, n0 + results.column());
  }
#pragma unroll 1
  for (int first = 0; first < a.groups; first += a.round_groups) {
    const int count = a.groups - first < a.round_groups ? a.groups - first : a.round_groups;
    const int begin = a.groups == 1 ? 0 : first << a.group_shift;
    const int end = first + count == a.groups ? a.steps : (first + count) << a.group_shift;
    int step = begin + warp * kSteps;
    if (first > 0) weight.load(step, piece.weight);
    load_round<X, kBits>(a, shared, first, count, n0, m0);
    if (first == 0) {
      wait_for_kernel_before();
      if constexpr (kCodes) results.load_rows(a, m0);
    }
    piece.load_x(rows, x_left, step);
    copy_wait<0>();
    __syncthreads();
#pragma unroll 2
    for (; step < end; step += warps * kSteps) {
      const int after = step + warps * kSteps;
      if (after < end) {
        weight.load(after, next.weight);
        next.load_x(rows, x_left, after);
      }
      product.multiply_piece(a, shared, piece, first, step, end, lane);
      piece = next;
    }
    __syncthreads();
    if constexpr (kCodes) {
      if (is_plain(a))
        results.template fold<true>(a, shared, count, m0);
      else
        results.template fold<false>(a, shared, count, m0);
    }
    __syncthreads();
  }

  if constexpr (!kCodes) {
    product.leave_results(warp, lane);
    __syncthreads();
  }
  results.template store<kCodes>(a, n0, m0);
}

// ---- host -----------------------------------------------------------------------------------------------------------

using GemvKernel = void (*)(GemvArgs);

template <class X>
GemvKernel gemv_kernel_of(int bits, int rows) {
  if (bits == 4) return rows == 8 ? gemv_kernel<X, 4, 1> : gemv_kernel<X, 4, 2>;
  return rows == 8 ? gemv_kernel<X, 8, 1> : gemv_kernel<X, 8, 2>;
}

int kept_rows(const WeightOnlyArgs& a, const WarpsOverK& w) { return static_cast<int>(std::min<int64_t>(a.M, w.rows)); }

}  // namespace

int gemv_round_words(bool codes, bool zero, bool row_zero, int rows) {
  return codes ? kColumnPitch * (1 + zero + row_zero) + rows * (zero + kSumPitch) : kColumnPitch * 2;
}

int gemv_shared_bytes(const WeightOnlyArgs& a, int, bool codes, const WarpsOverK& w) {
  const bool zero = a.row_sum != nullptr;
  const int round = w.round_groups * gemv_round_words(codes, zero, a.row_zero != nullptr, kept_rows(a, w)) * 4;
  return codes ? round : std::max(round, w.warps * w.rows * kSumPitch * 4);
}

void run_weight_only_gemv(const WeightOnlyArgs& a, int bits, DType x_dtype, const WarpsOverK& w, bool early, const Launch& at) {
  const GemvKernel kernel = x_dtype == DType::kInt8      ? gemv_kernel_of<int8_t>(bits, w.rows)
                            : x_dtype == DType::kFloat16 ? gemv_kernel_of<Half>(bits, w.rows)
                                                         : gemv_kernel_of<BFloat16>(bits, w.rows);
  const int64_t blocks = (a.M + w.rows - 1) / w.rows * ((a.N + kWeightOnlyColumns - 1) / kWeightOnlyColumns);
  GemvArgs args{};
  static_cast<WeightOnlyArgs&>(args) = a;
  args.round_groups = w.round_groups;
  args.kept_rows = kept_rows(a, w);
  launch(at, kernel, blocks, dim3(static_cast<unsigned>(w.warps * kWarp)), args,
         gemv_shared_bytes(a, bits, x_dtype == DType::kInt8, w), early ? Start::kEarly : Start::kInOrder);
}

}  // namespace quant_ops
