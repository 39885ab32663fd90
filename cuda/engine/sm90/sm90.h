// The Hopper engine: IgemmProblem (problem.h) by wgmma and TMA, composed from CUTLASS collectives. Plain host code: the table of
// tiles, which problems they take, and how a problem is laid out for them. Whatever igemm_sm90_can refuses is the portable
// engine's. A swapped tile computes y^T = b a^T, so that few rows fill the narrow side of the matrix instruction (64 x 8..256).
// Read next: gemm.cuh for the kernel, tests/test_cuda_sm90.py.
#pragma once

#include <string_view>

#include "engine/problem.h"

namespace quant_ops {

struct Sm90Tile {
  const char* name;
  int m, n, k;        // of the product as computed: m runs over b's rows where swapped
  int cluster;        // blocks along m that share their loads of the other operand
  int stages;         // of m x k and n x k codes in shared memory
  int warpgroups;     // that multiply; two of them share a tile or take turns, one while the other writes
  bool cooperative;   // they share a tile
  bool swapped;       // y^T = b a^T
  int blocks_per_sm;  // resident at once
};

// The narrow ones leave room for a second block, whose loads go on while the first starts or writes.
constexpr Sm90Tile kSm90Tiles[] = {
    {"gemm_s8s8_64x16x256_swapped_sm90a", 64, 16, 256, 1, 5, 1, false, true, 2},
    {"gemm_s8s8_64x32x256_swapped_sm90a", 64, 32, 256, 1, 4, 1, false, true, 2},
    {"gemm_s8s8_64x64x256_swapped_sm90a", 64, 64, 256, 1, 6, 2, false, true, 1},
    {"gemm_s8s8_64x128x128_sm90a", 64, 128, 128, 2, 8, 2, false, false, 1},
    {"gemm_s8s8_128x128x128_sm90a", 128, 128, 128, 2, 6, 2, false, false, 1},
    {"gemm_s8s8_128x256x128_sm90a", 128, 256, 128, 2, 4, 2, true, false, 1},
};
constexpr int kSm90Kernels = sizeof(kSm90Tiles) / sizeof(kSm90Tiles[0]);

// The number of a kernel; kSm90Kernels where there is none of that name.
constexpr int sm90_kernel(std::string_view name) {
  int kernel = 0;
  while (kernel < kSm90Kernels && name != kSm90Tiles[kernel].name) ++kernel;
  return kernel;
}

// One operand of the product with what the epilogue knows per row of it. Both sides play the same part:
// y = max(floor, fma(first.scale * second.scale, float(acc - first.correction * second.correction), bias)).
struct Sm90Side {
  int64_t size;
  const int8_t* codes;  // [size, K]
  int64_t stride;
  const float* scale;  // of one element where it does not vary
  bool scale_varies;
  const int32_t* correction;  // zero points or sums; null: 0
  bool correction_varies;
};

// TMA wants a stride even where there is one row, and torch gives such a dimension any.
inline int64_t sm90_stride(int64_t size, int64_t stride, int64_t row) { return size > 1 ? stride : row; }

inline Sm90Side sm90_rows(const IgemmProblem& p) {
  return {p.M, p.a, sm90_stride(p.M, p.a_stride, p.K), p.row_scale, p.row_step != 0, p.row_zero, p.row_step != 0};
}
inline Sm90Side sm90_columns(const IgemmProblem& p) {
  return {p.N, p.b, sm90_stride(p.N, p.b_stride, p.K), p.column_scale, p.column_step != 0, p.column_sum, true};
}
inline Sm90Side sm90_first(const IgemmProblem& p, const Sm90Tile& t) { return t.swapped ? sm90_columns(p) : sm90_rows(p); }
inline Sm90Side sm90_second(const IgemmProblem& p, const Sm90Tile& t) { return t.swapped ? sm90_rows(p) : sm90_columns(p); }

// Blocks along each side; the first in whole clusters.
inline int64_t sm90_blocks_first(const IgemmProblem& p, const Sm90Tile& t) {
  const int64_t span = static_cast<int64_t>(t.m) * t.cluster;
  return (sm90_first(p, t).size + span - 1) / span * t.cluster;
}
inline int64_t sm90_blocks_second(const IgemmProblem& p, const Sm90Tile& t) { return (sm90_second(p, t).size + t.n - 1) / t.n; }

// Blocks are visited in squares of this width, which re-read less from memory. CUTLASS rounds both sides up to whole squares, so
// that only a width that divides them costs nothing.
inline int sm90_swizzle(const IgemmProblem& p, const Sm90Tile& t) {
  int width = 8;
  while (width > 1 && (sm90_blocks_first(p, t) / t.cluster % width != 0 || sm90_blocks_second(p, t) % width != 0)) width /= 2;
  return width;
}

// TMA reads and writes boxes whose base and stride are multiples of 16 bytes; CUTLASS asks the same of the contiguous size.
// Its coordinates and numbers of blocks are int32; a kernel that is not persistent has its second side in gridDim.y.
inline bool igemm_sm90_can(const IgemmProblem& p, int kernel) {
  if (kernel < 0 || kernel >= kSm90Kernels) return false;
  const Sm90Tile& t = kSm90Tiles[kernel];
  constexpr int64_t kMostElements = INT32_MAX - 1024, kMostBytes = int64_t{1} << 40;  // a tile past the end is still an int32
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  if (p.M < 1 || p.N < 1 || p.K < 1 || p.M > kMostElements || p.N > kMostElements || p.K > kMostElements) return false;

  for (const Sm90Side& side : {sm90_rows(p), sm90_columns(p)})
    if (!aligned(side.codes) || side.stride < p.K || side.stride % 16 != 0 || side.stride >= kMostBytes) return false;
  if (p.K % 16 != 0) return false;

  const bool half = p.y_dtype == DType::kFloat16 || p.y_dtype == DType::kBFloat16;
  if (!half && p.y_dtype != DType::kFloat32) return false;
  const int64_t bytes = half ? 2 : 4, y_stride = sm90_stride(p.M, p.y_stride, p.N);
  if (!aligned(p.y) || p.N * bytes % 16 != 0 || y_stride < p.N || y_stride * bytes % 16 != 0 || y_stride * bytes >= kMostBytes)
    return false;

  if (p.row_step < 0 || p.row_step > 1 || p.column_step < 0 || p.column_step > 1) return false;
  if ((p.row_zero == nullptr) != (p.column_sum == nullptr)) return false;

  const int64_t second = sm90_blocks_second(p, t);
  return (t.warpgroups > 1 || second <= 65535) && sm90_blocks_first(p, t) <= INT32_MAX / second;
}

// Estimated clocks on a GPU with `sms` multiprocessors, to choose by. Per step of k, the slowest of: the matrix instruction (4096
// products a clock), shared memory (128 bytes a clock; 64 x n x 32 products read 64 + n rows) and loads from L2 (some 48 bytes a
// clock, a cluster's second operand once). All steps together take no less than memory needs (some 18 bytes a clock and
// multiprocessor on an H200). Written tiles cost ten instructions an element, hidden behind another tile's steps unless shared.
inline double igemm_sm90_clocks(const IgemmProblem& p, int kernel, int sms) {
  const Sm90Tile& t = kSm90Tiles[kernel];
  const double products = static_cast<double>(t.m) * t.n * t.k / 4096;
  const double shared_memory = products * (64 + t.n) * 64 / t.n / 128;
  const double loads = (t.m + static_cast<double>(t.n) / t.cluster) * t.k / 48;
  double step = products > shared_memory ? products : shared_memory;
  if (loads > step) step = loads;

  const int64_t blocks = sm90_blocks_first(p, t) * sm90_blocks_second(p, t), per_sm = (blocks + sms - 1) / sms;
  const double written = t.m * t.n * 10 / 128.0 * static_cast<double>(t.cooperative ? per_sm : 1);
  const double computed = static_cast<double>(per_sm) * static_cast<double>((p.K + t.k - 1) / t.k) * step + written;
  const double M = static_cast<double>(p.M), N = static_cast<double>(p.N), K = static_cast<double>(p.K);
  const double moved = (M * K + N * K + M * N * (p.y_dtype == DType::kFloat32 ? 4 : 2)) / (18.0 * sms);
  constexpr double kStart = 4000;  // launch, descriptors, the first load and the last store
  return kStart + (computed > moved ? computed : moved);
}

// Bytes, which need not be initialised; 0 for the kernels that there are.
int64_t igemm_sm90_workspace(const IgemmProblem& p, int kernel);

// On the current device, which has compute capability 9.0. Throws std::runtime_error for a problem that igemm_sm90_can refuses and
// where the launch fails.
void igemm_sm90(const IgemmProblem& p, int kernel, void* workspace, void* stream);

}  // namespace quant_ops
