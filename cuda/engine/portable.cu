// The portable engine's host side: limits of this GPU, launches, the join of split products, and the dense product by any engine.
// Read next: portable.cuh.
#include "engine/gemv.h"
#include "engine/portable.cuh"
#if defined(QUANT_OPS_SM90)
#include "engine/sm90/igemm.h"
#endif

namespace quant_ops {
namespace {

constexpr int kThreads = 256;

// ---- splits of K ----------------------------------------------------------------------------------------------------

struct JoinArgs {
  static constexpr bool kBarriers = false;
  const int32_t* sums;  // [splits][M][N]
  int64_t splits, M, N;
  FastDiv fours;  // of a row
  Epilogue out;
};

// A thread adds and finishes four columns of a row.
__global__ void __launch_bounds__(kThreads) join_kernel(const QO_GRID_CONSTANT JoinArgs a) {
  const int64_t total = a.M * a.fours.divisor, step = int64_t{gridDim.x} * kThreads;
  const bool whole = a.N % kFour == 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t m = a.fours.quotient(i), n = (i - m * a.fours.divisor) * kFour;
    const int count = static_cast<int>(a.N - n < kFour ? a.N - n : kFour);
    int32_t sums[kFour] = {};
    for (int64_t split = 0; split < a.splits; ++split) {
      const int32_t* from = a.sums + (split * a.M + m) * a.N + n;
      if (whole) {
        const auto words = load_vector<kFour>(from);
#pragma unroll
        for (int c = 0; c < kFour; ++c) sums[c] += words.get(c);
      } else {
#pragma unroll
        for (int c = 0; c < kFour; ++c)
          if (c < count) sums[c] += from[c];
      }
    }
    finish_four(a.out, output_row(a.out, m), output_columns(a.out, n, count), n, count, sums);
  }
}

}  // namespace

const GpuLimits& gpu_limits() {
#if defined(__CUDACC__)
  thread_local int known = -1;
  thread_local GpuLimits limits{};
  int device = 0;
  cudaGetDevice(&device);
  if (device != known) {
    const auto attribute = [&](cudaDeviceAttr name, int missing) {
      int value = 0;
      return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : missing;
    };
    limits.arch = attribute(cudaDevAttrComputeCapabilityMajor, 8) * 10 + attribute(cudaDevAttrComputeCapabilityMinor, 0);
    limits.multiprocessors = multiprocessors();
    limits.block_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 99 << 10);
    limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, 100 << 10);
    known = device;
  }
#else
  static const GpuLimits limits{80, multiprocessors(), 227 << 10, 228 << 10};
#endif
  return limits;
}

void run_portable(IgemmArgs args, const KernelPlan& kernel, IgemmKernel (*kernel_of)(int tile), int32_t* sums, const Launch& at) {
  const IgemmTile& tile = kIgemmTiles[kernel.kernel];
  const int64_t columns = args.N * args.groups;
  const Epilogue out = args.out;
  args.tiles_m = (args.M + tile.m - 1) / tile.m;
  args.tiles_n = (args.N + tile.n - 1) / tile.n;
  args.split_k = kernel.split_k;
  args.split_stride = args.M * columns;
  if (kernel.splits > 1)  // every row is a sample
    args.out = {.y = sums, .dtype = DType::kInt32, .y_sample = columns, .y_column = 1, .vectors = args.N % kFour == 0};
  const int64_t tiles = args.tiles_m * args.tiles_n, blocks = tiles * args.groups * kernel.splits;
  if (tiles > kMaxGrid || blocks > kMaxGrid)
    throw std::runtime_error(std::string("quant_ops.") + at.op + ": expected at most 2147483647 blocks, got " +
                             std::to_string(blocks) + ". Split the batch.");
  launch(at, kernel_of(kernel.kernel), blocks, dim3(static_cast<unsigned>(tile.threads())), args, tile.shared_bytes(),
         args.early ? Start::kEarly : Start::kInOrder);
  if (kernel.splits == 1) return;
  join_splits(sums, kernel.splits, args.M, columns, out, at);
}

void join_splits(const int32_t* sums, int64_t splits, int64_t M, int64_t columns, const Epilogue& out, const Launch& at) {
  const JoinArgs join{
      .sums = sums, .splits = splits, .M = M, .N = columns, .fours = FastDiv((columns + kFour - 1) / kFour), .out = out};
  launch(at, join_kernel, blocks_for(M * join.fours.divisor, kThreads, kMaxGrid), dim3(kThreads), join);
}

// ---- dense products -------------------------------------------------------------------------------------------------

void run_product(const IgemmProblem& p, const KernelPlan& kernel, int32_t* sums, const Launch& at) {
  if (kernel.engine == Engine::kGemv) return run_gemv(p, at);
#if defined(QUANT_OPS_SM90)
  if (kernel.engine == Engine::kSm90) return sm90::run(sm90::problem_of(p), kernel, sums, at);
#endif
  IgemmArgs args{};
  args.M = p.M;
  args.N = p.N;
  args.K = p.K;
  args.a = p.a;
  args.a_stride = p.a_stride;
  args.b = p.b;
  args.b_stride = p.b_stride;
  args.groups = 1;
  args.early = p.early;
  args.out = epilogue_of(p);
  run_portable(args, kernel, igemm_kernel_of<DenseLoader>, sums, at);
}

}  // namespace quant_ops
