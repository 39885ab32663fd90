// The Hopper engine: IgemmProblem (problem.h) by wgmma and TMA, composed from CUTLASS collectives. Plain host code: the table of
// tiles, which problems they take, and how a problem is laid out for them. The other engines compute what takes() refuses. A
// swapped tile computes y^T = b a^T, so that few rows fill the short side of the matrix instruction (64 x 8..256).
// Read next: gemm.cuh for the kernel, tests/test_cuda_sm90.py.
#pragma once

#include <string_view>

#include "engine/problem.h"

namespace quant_ops::sm90 {

struct Tile {
  const char* name;
  int m, n, k;        // of the product as computed: in a swapped tile, m counts rows of b
  int cluster;        // blocks along m that share their loads of the other operand
  int stages;         // of m x k and n x k codes in shared memory
  int warpgroups;     // that multiply; two share a tile, or one multiplies while the other writes
  bool cooperative;   // two warpgroups share a tile
  bool swapped;       // y^T = b a^T
  int blocks_per_sm;  // resident at once
};

// The smallest tiles leave room for a second block, whose loads go on while the first one starts or writes.
constexpr Tile kTiles[] = {
    // name, m, n, k, cluster, stages, warpgroups, cooperative, swapped, blocks_per_sm
    {"gemm_s8s8_64x16x256_swapped_sm90a", 64, 16, 256, 1, 5, 1, false, true, 2},
    {"gemm_s8s8_64x32x256_swapped_sm90a", 64, 32, 256, 1, 4, 1, false, true, 2},
    {"gemm_s8s8_64x64x256_swapped_sm90a", 64, 64, 256, 1, 6, 2, false, true, 1},
    {"gemm_s8s8_64x128x128_sm90a", 64, 128, 128, 2, 8, 2, false, false, 1},
    {"gemm_s8s8_128x128x128_sm90a", 128, 128, 128, 2, 6, 2, false, false, 1},
    {"gemm_s8s8_128x256x128_sm90a", 128, 256, 128, 2, 4, 2, true, false, 1},
};
constexpr int kKernels = sizeof(kTiles) / sizeof(kTiles[0]);

// The number of a kernel; kKernels if none has that name.
constexpr int kernel_named(std::string_view name) {
  int kernel = 0;
  while (kernel < kKernels && name != kTiles[kernel].name) ++kernel;
  return kernel;
}

// One operand of the product, and what the epilogue reads per row of it. The formula is symmetric in both sides:
// y = max(floor, fma(first.scale * second.scale, float(acc - first.correction * second.correction), bias)).
struct Side {
  int64_t size;
  const int8_t* codes;  // [size, K]
  int64_t stride;
  const float* scale;  // one element if it does not vary
  bool scale_varies;
  const int32_t* correction;  // zero points or sums; null: 0
  bool correction_varies;
};

// TMA needs a valid stride even for one row, for which torch allows any number.
inline int64_t stride_of(int64_t size, int64_t stride, int64_t row) { return size > 1 ? stride : row; }

inline Side row_side(const IgemmProblem& p) {
  return {.size = p.M,
          .codes = p.a,
          .stride = stride_of(p.M, p.a_stride, p.K),
          .scale = p.row_scale,
          .scale_varies = p.row_step != 0,
          .correction = p.row_zero,
          .correction_varies = p.row_step != 0};
}
inline Side column_side(const IgemmProblem& p) {
  return {.size = p.N,
          .codes = p.b,
          .stride = stride_of(p.N, p.b_stride, p.K),
          .scale = p.column_scale,
          .scale_varies = p.column_step != 0,
          .correction = p.column_sum,
          .correction_varies = true};
}
inline Side first_side(const IgemmProblem& p, const Tile& t) { return t.swapped ? column_side(p) : row_side(p); }
inline Side second_side(const IgemmProblem& p, const Tile& t) { return t.swapped ? row_side(p) : column_side(p); }

// Blocks along each side. Those of the first side come in whole clusters.
inline int64_t blocks_first(const IgemmProblem& p, const Tile& t) {
  const int64_t span = static_cast<int64_t>(t.m) * t.cluster;
  return (first_side(p, t).size + span - 1) / span * t.cluster;
}
inline int64_t blocks_second(const IgemmProblem& p, const Tile& t) { return (second_side(p, t).size + t.n - 1) / t.n; }

// Blocks are visited in squares of this width, which read less twice from memory. CUTLASS rounds both sides up to whole squares,
// so the width must divide both to add no blocks.
inline int swizzle(const IgemmProblem& p, const Tile& t) {
  int width = 8;
  while (width > 1 && (blocks_first(p, t) / t.cluster % width != 0 || blocks_second(p, t) % width != 0)) width /= 2;
  return width;
}

// TMA reads and writes boxes whose base and stride are multiples of 16 bytes; CUTLASS demands the same of the contiguous size.
// Its coordinates and numbers of blocks are int32; a kernel that is not persistent has its second side in gridDim.y.
inline bool takes(const IgemmProblem& p, int kernel) {
  if (kernel < 0 || kernel >= kKernels) return false;
  const Tile& t = kTiles[kernel];
  constexpr int64_t kMostElements = INT32_MAX - 1024, kMostBytes = int64_t{1} << 40;  // a tile past the end is still an int32
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  if (p.M < 1 || p.N < 1 || p.K < 1 || p.M > kMostElements || p.N > kMostElements || p.K > kMostElements) return false;

  for (const Side& side : {row_side(p), column_side(p)})
    if (!aligned(side.codes) || side.stride < p.K || side.stride % 16 != 0 || side.stride >= kMostBytes) return false;
  if (p.K % 16 != 0) return false;

  const bool half = p.y_dtype == DType::kFloat16 || p.y_dtype == DType::kBFloat16;
  if (!half && p.y_dtype != DType::kFloat32) return false;
  const int64_t bytes = half ? 2 : 4, y_stride = stride_of(p.M, p.y_stride, p.N);
  if (!aligned(p.y) || p.N * bytes % 16 != 0 || y_stride < p.N || y_stride * bytes % 16 != 0 || y_stride * bytes >= kMostBytes)
    return false;

  if (p.row_step < 0 || p.row_step > 1 || p.column_step < 0 || p.column_step > 1) return false;
  if ((p.row_zero == nullptr) != (p.column_sum == nullptr)) return false;

  const int64_t second = blocks_second(p, t);
  return (t.warpgroups > 1 || second <= 65535) && blocks_first(p, t) <= INT32_MAX / second;
}

// Estimated clocks on a GPU with `sms` multiprocessors. A step of k takes as long as the slowest of: the matrix instruction (4096
// products a clock), shared memory (128 bytes a clock; 64 x n x 32 products read 64 + n rows) and loads from L2 (about 48 bytes a
// clock; a cluster loads its second operand once). All steps together take at least the time of the memory (about 18 bytes a clock
// and multiprocessor on an H200). Writing a tile costs ten instructions an element, which another tile's steps hide unless both
// warpgroups share the tile.
inline double clocks(const IgemmProblem& p, int kernel, int sms) {
  const Tile& t = kTiles[kernel];
  const double products = static_cast<double>(t.m) * t.n * t.k / 4096;
  const double shared_memory = products * (64 + t.n) * 64 / t.n / 128;
  const double loads = (t.m + static_cast<double>(t.n) / t.cluster) * t.k / 48;
  double step = products > shared_memory ? products : shared_memory;
  if (loads > step) step = loads;

  const int64_t blocks = blocks_first(p, t) * blocks_second(p, t), per_sm = (blocks + sms - 1) / sms;
  const double written = t.m * t.n * 10 / 128.0 * static_cast<double>(t.cooperative ? per_sm : 1);
  const double computed = static_cast<double>(per_sm) * static_cast<double>((p.K + t.k - 1) / t.k) * step + written;
  const double M = static_cast<double>(p.M), N = static_cast<double>(p.N), K = static_cast<double>(p.K);
  const double moved = (M * K + N * K + M * N * (p.y_dtype == DType::kFloat32 ? 4 : 2)) / (18.0 * sms);
  constexpr double kStart = 4000;  // launch, descriptors, the first load and the last store
  return kStart + (computed > moved ? computed : moved);
}

// On the current device, which has compute capability 9.0. Uses no workspace. Throws std::runtime_error for a problem that takes()
// refuses and where the launch fails.
void run(const IgemmProblem& p, int kernel, const Launch& at);

}  // namespace quant_ops::sm90
