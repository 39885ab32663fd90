// Which kernel an integer product gets on a GPU, and how many splits of K: a model of the time that each would take. Plain host
// code.
//
//   blocks = tiles * groups * splits;   time = waves * (start + steps * step) + the splits' extra traffic
//
// A step (a tile's k elements of K) takes as long as the slowest of its multiplications, its loads and their latency. A wave is the
// blocks that are resident at once. The last wave counts in proportion to its blocks, so that one more row never costs a jump.
// QUANT_OPS_CUDA_KERNEL names a kernel to use instead. Read next: choose.cpp, portable.cuh.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "engine/fused.h"
#include "engine/problem.h"

namespace quant_ops {

// X(rows, columns, k, warps along rows, warps along columns, stages) of a block. Every loader has a kernel for each of them.
#define QO_IGEMM_TILES(X)  \
  X(16, 64, 128, 1, 4, 4)  \
  X(32, 64, 128, 1, 4, 4)  \
  X(64, 64, 128, 2, 2, 3)  \
  X(64, 128, 64, 2, 2, 4)  \
  X(128, 128, 64, 2, 2, 4) \
  X(128, 256, 64, 2, 4, 4)

struct IgemmTile {
  const char* name;
  int m, n, k, warps_m, warps_n, stages;

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int ring_bytes() const { return stages * (m + n) * k; }
  // The epilogue passes 16 rows of each warp's sums through the same memory. Eight extra columns avoid bank conflicts.
  constexpr int staging_bytes() const { return warps_m * warps_n * 16 * (n / warps_n + 8) * 4; }
  constexpr int shared_bytes() const { return ring_bytes() > staging_bytes() ? ring_bytes() : staging_bytes(); }
};

#define QO_IGEMM_TILE(M, N, K, WarpsM, WarpsN, Stages) \
  {.name = "igemm_s8s8_" #M "x" #N "x" #K "_mma", .m = M, .n = N, .k = K, .warps_m = WarpsM, .warps_n = WarpsN, .stages = Stages},
constexpr IgemmTile kIgemmTiles[] = {QO_IGEMM_TILES(QO_IGEMM_TILE)};
#undef QO_IGEMM_TILE
constexpr int kIgemmTileCount = sizeof(kIgemmTiles) / sizeof(kIgemmTiles[0]);

struct GpuLimits {
  int arch;  // 80, 86, 89, 90, 100, 120
  int64_t multiprocessors;
  int64_t block_bytes, shared_bytes;  // shared memory: what a block may have, what a multiprocessor has
};
const GpuLimits& gpu_limits();  // of the current device

struct IgemmShape {
  int64_t M, N, K, groups;
  int load_bytes = 16;  // of a, by one copy: 16 or 4
};

inline bool tile_fits(const IgemmTile& t, const GpuLimits& gpu) { return t.shared_bytes() <= gpu.block_bytes; }

// Blocks that a multiprocessor holds. Limits are shared memory, of which the system takes 1 KiB a block, and registers: a thread
// needs one for each of its sums and about 90 more.
inline int64_t resident_blocks(const IgemmTile& t, const GpuLimits& gpu) {
  const int64_t sums = int64_t{t.m} * t.n / t.threads(), registers = std::min<int64_t>(255, sums + 90) * t.threads();
  return std::max<int64_t>(
      1, std::min({gpu.shared_bytes / (t.shared_bytes() + 1024), 65536 / registers, int64_t{1536} / t.threads()}));
}

constexpr double kLaunchClocks = 2500;                 // a kernel after another one
constexpr double kCacheBytes = 48, kMemoryBytes = 18;  // per clock and multiprocessor, from the L2 cache and from memory
constexpr int64_t kMostSplits = 16;
constexpr int64_t kLeastSteps = 4;  // of a split: fewer do not fill the pipeline

// The model's clocks for a shape and a tile, with K in `splits` of `steps` steps each.
inline double igemm_time(const IgemmShape& shape, const IgemmTile& t, const GpuLimits& gpu, int64_t splits, int64_t steps) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const double rate = gpu.arch == 80 || gpu.arch == 90 || gpu.arch == 100 ? 2048 : 1024;  // multiplications by mma.sync a clock
  const double start = 1500, finish = 4.0 * t.m * t.n / 128;

  const int64_t tiles = ceil_div(shape.M, t.m) * ceil_div(shape.N, t.n) * shape.groups, blocks = tiles * splits;
  const int64_t resident = resident_blocks(t, gpu), slots = resident * gpu.multiprocessors;
  // blocks of a multiprocessor that take turns; each does a step in the time that follows
  const double active = std::min<double>(static_cast<double>(resident), static_cast<double>(blocks) / gpu.multiprocessors);
  const double side_by_side = std::max(1.0, active);
  // small warp tiles read more shared memory per multiplication than it can deliver: they reach a part of the rate
  const double warp_m = static_cast<double>(t.m) / t.warps_m, warp_n = static_cast<double>(t.n) / t.warps_n;
  const double reached = std::min(1.0, 128.0 * warp_m * warp_n / (warp_m + warp_n) / rate);
  const double multiply = static_cast<double>(t.m) * t.n * t.k / (rate * reached) * side_by_side;
  const double fetch = static_cast<double>(t.m + t.n) * t.k / kCacheBytes * side_by_side * (shape.load_bytes < 16 ? 2.0 : 1.0);
  const double latency = 700.0 / (t.stages - 1);  // of a load, divided by the stages in flight
  const double block_time = start + static_cast<double>(steps) * std::max({multiply, fetch, latency}) + finish * side_by_side;
  const double waves = std::max(1.0, static_cast<double>(blocks) / static_cast<double>(slots));
  const double compute = block_time * waves;

  const double operands = static_cast<double>(shape.groups) * shape.K * static_cast<double>(shape.M + shape.N);
  const double bandwidth = kMemoryBytes * static_cast<double>(gpu.multiprocessors);
  const double sums = splits == 1 ? 0.0 : 8.0 * static_cast<double>(splits) * shape.M * shape.N * shape.groups;
  const double joining = splits == 1 ? 0.0 : kLaunchClocks + sums / (kCacheBytes * static_cast<double>(gpu.multiprocessors));
  return kLaunchClocks + std::max(compute, operands / bandwidth) + joining;
}

// ---- up to eight rows (gemv.cu) -------------------------------------------------------------------------------------

constexpr int kGemvRows = 8, kGemvColumns = 16, kGemvWarps = 8;
constexpr const char* kGemvName = "gemv_s8s8_16x8_mma";

// Bytes between rows in shared memory. All banks are 128 bytes; an odd multiple of 64 keeps the eight lanes that read at once
// apart.
inline int64_t gemv_pitch(int64_t K) { return (K + 127) / 128 * 128 + 64; }
inline int64_t gemv_shared_bytes(int64_t K) {
  return kGemvRows * gemv_pitch(K) + kGemvWarps * kGemvColumns * kGemvRows * 4 + kGemvRows * 8;
}
inline bool gemv_fits(int64_t M, int64_t K, const GpuLimits& gpu) {
  return M <= kGemvRows && gemv_shared_bytes(K) <= gpu.block_bytes;
}

// The model's clocks. x_bytes is the size of an element of floating rows, which every block quantizes for itself; 0 for codes.
inline double gemv_time(int64_t M, int64_t N, int64_t K, int64_t x_bytes, const GpuLimits& gpu) {
  const double blocks = static_cast<double>((N + kGemvColumns - 1) / kGemvColumns), sms = static_cast<double>(gpu.multiprocessors);
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(gpu.shared_bytes / (gemv_shared_bytes(K) + 1024), 4));
  const double waves = std::max(1.0, blocks / (sms * static_cast<double>(resident)));
  const double rows = static_cast<double>(M) * static_cast<double>(K);
  // A block first writes its rows to shared memory. Floating rows are read twice and cost about twenty instructions an element.
  // Where not said otherwise, constants are fitted to benchmarks/gpu/h200_sweep.json.
  const double staging = x_bytes == 0 ? 1000 + 480.0 * static_cast<double>(M) + rows / 50
                                      : 1500 + rows * (2.0 * static_cast<double>(x_bytes) / 48 + 20.0 / 128);
  const double loads = 930.0 * static_cast<double>(K) / (64.0 * kGemvWarps * 4) + 930;
  const double reached = resident == 1 ? 1 / 2.07 : 1 / 1.3;  // of the memory's rate
  const double memory = static_cast<double>(N) * static_cast<double>(K) / (kMemoryBytes * reached * std::min(blocks, sms));
  return kLaunchClocks + std::max((staging + loads) * waves, memory + staging) + 500;
}

// ---- rows quantized by the product's kernel (fused.cu) ---------------------------------------------------------------

inline bool fused_fits(const FusedTile& t, int64_t K, int64_t columns, const GpuLimits& gpu) {
  return K > 0 && fused_shared_bytes(t, K, columns) <= gpu.block_bytes;
}

// The model's clocks, where a block computes `columns` tiles. About nine instructions an element make the codes.
inline double fused_time(const IgemmProblem& p, const FusedTile& t, int64_t columns, int64_t x_bytes, const GpuLimits& gpu) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const double sms = static_cast<double>(gpu.multiprocessors), rows = static_cast<double>(t.m) * static_cast<double>(p.K);
  const double blocks = static_cast<double>(ceil_div(p.M, t.m) * ceil_div(ceil_div(p.N, t.n), columns));
  const double encode = rows * (9.0 / 128 + static_cast<double>(x_bytes) / kCacheBytes);
  const double multiply = t.m * t.n * kFusedChunk / 1800.0, fetch = t.n * kFusedChunk / kCacheBytes;
  const double stages = static_cast<double>(columns * ceil_div(p.K, kFusedChunk));
  const double latency = 700.0 / (t.stages - 1), finish = 6.0 * t.m * t.n / 128 * static_cast<double>(columns);
  const double block_time = 2500 + encode + stages * std::max({multiply, fetch, latency}) + finish;
  const double waves = std::max(1.0, std::ceil(blocks / sms - 1e-9));  // a multiprocessor has registers for one block
  const double bytes = static_cast<double>(p.K) * static_cast<double>(p.M * x_bytes + p.N);
  return kLaunchClocks + std::max(block_time * waves, bytes / (kMemoryBytes * sms));
}

constexpr int64_t kMostFusedColumns = 8;  // tiles of a block

// The clocks of quantize_rows beside another kernel.
inline double rows_clocks(int64_t M, int64_t K, int64_t x_bytes, const GpuLimits& gpu) {
  const double bytes = static_cast<double>(M) * static_cast<double>(K) * static_cast<double>(x_bytes + 1);
  return 3500 + bytes / (kMemoryBytes * static_cast<double>(gpu.multiprocessors));
}

// ---- choice ---------------------------------------------------------------------------------------------------------

// A kernel to use in place of the fastest one, for tests and benchmarks.
struct KernelChoice {
  std::string name;    // empty: as the model likes
  int64_t splits = 0;  // 0: likewise

  KernelChoice() = default;
  explicit KernelChoice(const std::string& text);  // as kernel_text gives it
};

// What set_kernel_choice said last, at first the value of QUANT_OPS_CUDA_KERNEL.
const KernelChoice& kernel_choice();
void set_kernel_choice(const char* text);  // null or empty: QUANT_OPS_CUDA_KERNEL again

// The tile and splits with the least time, or the wanted ones. Engine::kNone if no tile has the wanted name. M, N, groups >= 1.
KernelPlan choose_tile(const IgemmShape& shape, const GpuLimits& gpu, const KernelChoice& wanted);

// The kernel for a dense product among all engines. Engine::kNone if none has the wanted name and takes the problem.
KernelPlan choose_kernel(const IgemmProblem& p, const GpuLimits& gpu, const KernelChoice& wanted);

// The kernel that is to quantize the rows of p too, from a dtype of x_bytes; Engine::kNone if that is slower than quantize_rows and
// `other`, the kernel that would multiply their codes.
KernelPlan choose_quantizing_kernel(const IgemmProblem& p, int64_t x_bytes, const GpuLimits& gpu, const KernelChoice& wanted,
                                    const KernelPlan& other);

// Whether the wanted kernel is one of the portable engine.
bool names_tile(const KernelChoice& wanted);

// The tile for a convolution. A wanted name of a kernel that only dense products have leaves the choice to the model.
KernelPlan choose_conv_tile(const IgemmShape& shape, const GpuLimits& gpu, const KernelChoice& wanted);

// The kernel's name, with ":4" for four splits: "igemm_s8s8_64x64x128_mma:4".
std::string kernel_text(const KernelPlan& kernel);

// Throws if the plan found no kernel.
void expect_kernel(const char* op, const KernelPlan& kernel, const KernelChoice& wanted);

}  // namespace quant_ops
