// The portable engine's host side: what this GPU allows, launches, the join of split products, dense GEMM. Read next: portable.cuh.
#include <cmath>

#include "engine/gemv.h"
#include "engine/portable.cuh"
#if defined(QUANT_OPS_SM90)
#include "engine/sm90/sm90.h"
#endif

namespace quant_ops {
namespace {

constexpr int kThreads = 256;

// ---- parts of K -----------------------------------------------------------------------------------------------------

struct JoinArgs {
  static constexpr bool kBarriers = false;
  const int32_t* sums;  // [parts][M][N]
  int64_t parts, M, N;
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
    for (int64_t part = 0; part < a.parts; ++part) {
      const int32_t* from = a.sums + (part * a.M + m) * a.N + n;
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
    finish_four(a.out, row_params(a.out, m), column_params(a.out, n, count), n, count, sums);
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
  static const GpuLimits limits{80, multiprocessors(), 99 << 10, 100 << 10};
#endif
  return limits;
}

// The model takes some microseconds; a layer asks for the same shapes again and again.
IgemmChoice portable_choice(const IgemmShape& shape, const GpuLimits& gpu, const ForcedKernel& forced) {
  if (!forced.name.empty()) return choose_igemm(shape, gpu, forced);
  struct Entry {
    IgemmShape shape{0, 0, 0, 0};
    int arch = 0;
    int64_t multiprocessors = 0;
    IgemmChoice choice{};
  };
  thread_local Entry entries[64];
  uint64_t hash = 0;
  for (const int64_t value : {shape.M, shape.N, shape.K, shape.groups, int64_t{shape.load_bytes}})
    hash = (hash ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15ULL;
  Entry& e = entries[hash >> 58];
  const IgemmShape& known = e.shape;
  if (known.M != shape.M || known.N != shape.N || known.K != shape.K || known.groups != shape.groups ||
      known.load_bytes != shape.load_bytes || e.arch != gpu.arch || e.multiprocessors != gpu.multiprocessors)
    e = {shape, gpu.arch, gpu.multiprocessors, choose_igemm(shape, gpu, forced)};
  return e.choice;
}

void run_igemm(const char* op, IgemmArgs args, const IgemmChoice& choice, IgemmKernel (*kernel_of)(int), Workspace* workspace,
               void* stream) {
  const IgemmTile& tile = kIgemmTiles[choice.tile];
  const int64_t columns = args.N * args.groups;
  int32_t* sums = choice.parts > 1 ? workspace->take<int32_t>(choice.parts * args.M * columns) : nullptr;
  if (workspace->counts()) return;

  const Epilogue out = args.out;
  args.tiles_m = (args.M + tile.m - 1) / tile.m;
  args.tiles_n = (args.N + tile.n - 1) / tile.n;
  args.part_k = choice.part_k;
  args.part_stride = args.M * columns;
  if (choice.parts > 1) {
    args.out = Epilogue{};
    args.out.y = sums;
    args.out.dtype = DType::kInt32;
    args.out.y_sample = columns;  // every row a sample
    args.out.y_column = 1;
    args.out.vectors = args.N % kFour == 0;
  }
  const int64_t tiles = args.tiles_m * args.tiles_n, blocks = tiles * args.groups * choice.parts;
  if (tiles > kMaxGrid || blocks > kMaxGrid)
    throw std::runtime_error(std::string("quant_ops.") + op + ": expected at most 2147483647 blocks, got " +
                             std::to_string(blocks) + ". Split the batch.");
  launch(op, kernel_of(choice.tile), blocks, dim3(static_cast<unsigned>(tile.threads())), stream, args, tile.shared_bytes());
  if (choice.parts == 1) return;
  const JoinArgs join{sums, choice.parts, args.M, columns, FastDiv((columns + kFour - 1) / kFour), out};
  launch(op, join_kernel, blocks_for(args.M * join.fours.divisor, kThreads, kMaxGrid), dim3(kThreads), stream, join);
}

namespace {

IgemmShape shape_of(const IgemmProblem& p) { return {p.M, p.N, p.K, 1, kChunk}; }

#if defined(QUANT_OPS_SM90)
// The Hopper kernel for p: the named one, or the fastest by its own model if that is below `time`; -1: none.
int choose_sm90(const IgemmProblem& p, const GpuLimits& gpu, const ForcedKernel& forced, double time) {
  int best = -1;
  for (int i = 0; gpu.arch == 90 && i < kSm90Kernels; ++i) {
    if (!igemm_sm90_can(p, i) || (!forced.name.empty() && forced.name != kSm90Tiles[i].name)) continue;
    const double own = forced.name.empty() ? igemm_sm90_clocks(p, i, static_cast<int>(gpu.multiprocessors)) : -1.0;
    if (own < time) {
      time = own;
      best = i;
    }
  }
  return best;
}
#endif

// The kernel for a dense product: a portable tile, or another engine's.
struct Chosen {
  enum { kPortable, kGemv, kSm90 } engine;
  IgemmChoice portable;
  int sm90;
  double time;
};

Chosen choose(const char* op, const IgemmProblem& p) {
  const GpuLimits& gpu = gpu_limits();
  const char* name = forced_kernel();
  const ForcedKernel forced(name);
  Chosen c{Chosen::kPortable, portable_choice(shape_of(p), gpu, forced), -1, 0.0};
  c.time = c.portable.tile < 0 ? INFINITY : c.portable.time;
  if (gemv_fits(p.M, p.K, gpu) && (forced.name.empty() ? gemv_time(p.M, p.N, p.K, 0, gpu) < c.time : forced.name == kGemvName)) {
    c.engine = Chosen::kGemv;
    c.time = forced.name.empty() ? gemv_time(p.M, p.N, p.K, 0, gpu) : 0.0;
  }
#if defined(QUANT_OPS_SM90)
  c.sm90 = choose_sm90(p, gpu, forced, c.time);
  if (c.sm90 >= 0) c.engine = Chosen::kSm90;
#endif
  if (c.engine == Chosen::kPortable && c.portable.tile < 0) refuse_forced_kernel(op, name);
  return c;
}

}  // namespace

bool gemv_quantizes(const char* op, const IgemmProblem& p, const FloatingRows& rows) {
  const GpuLimits& gpu = gpu_limits();
  if (!gemv_fits(p.M, p.K, gpu)) return false;
  const ForcedKernel forced(forced_kernel());
  if (!forced.name.empty()) return forced.name == kGemvName;
  IgemmProblem codes = p;
  codes.row_zero = p.column_sum;  // not null for both or neither
  return gemv_time(p.M, p.N, p.K, dtype_bytes(rows.dtype), gpu) < choose(op, codes).time + kLaunchClocks;  // of quantize_rows
}

std::string igemm_kernel_text(const char* op, const IgemmProblem& p) {
  const Chosen c = choose(op, p);
#if defined(QUANT_OPS_SM90)
  if (c.engine == Chosen::kSm90) return kSm90Tiles[c.sm90].name;
#endif
  return c.engine == Chosen::kGemv ? kGemvName : kernel_text(kIgemmTiles[c.portable.tile].name, c.portable.parts);
}

void igemm_cuda(const char* op, const IgemmProblem& p, Workspace* workspace, void* stream) {
  const Chosen c = choose(op, p);
  if (c.engine == Chosen::kGemv) {
    if (!workspace->counts()) gemv_cuda(op, p, nullptr, stream);
    return;
  }
#if defined(QUANT_OPS_SM90)
  if (c.engine == Chosen::kSm90) {
    char* memory = workspace->take<char>(igemm_sm90_workspace(p, c.sm90));
    if (!workspace->counts()) igemm_sm90(p, c.sm90, memory, stream);
    return;
  }
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
  args.out = epilogue_of(p);
  run_igemm(op, args, c.portable, igemm_kernel_of<DenseLoader>, workspace, stream);
}

}  // namespace quant_ops
