// The portable integer engine (sm_80 and newer): one kernel over a loader of rows, for GEMM and for implicit-GEMM convolution.
//
// A block computes a tile of [kM, kN]. Its codes come through a ring of kStages buffers of [kM + kN][kK] bytes in shared memory,
// which cp.async fills kStages - 1 steps ahead. Warps read them by ldmatrix and multiply by mma.sync. Buffers are swizzled
// (tile_offset), so that neither side has bank conflicts. Sums leave through shared memory, 16 rows of a warp at a time, so that
// stores are vectors. K may be split over blocks: each split then writes its sums, and join_kernel adds and finishes them.
// Read next: layout.cuh for the addresses, epilogue.cuh, portable.cu.
#pragma once

#include "device/epilogue.cuh"
#include "device/machine.cuh"
#include "engine/choose.h"

namespace quant_ops {

struct IgemmArgs {
  static constexpr bool kBarriers = true;
  int64_t M, N, K;  // of one group
  const int8_t* a;  // of dense products; convolutions have `gather`
  int64_t a_stride;
  const int8_t* b;  // [groups][N][b_stride]
  int64_t b_stride;
  Gather gather;
  Epilogue out;
  int64_t tiles_m, tiles_n, groups;
  int64_t split_k;       // elements of K of a split, a multiple of the tile's
  int64_t split_stride;  // elements of y between splits
  bool early;            // as in IgemmProblem
};

template <int M, int N, int K, int WarpsM, int WarpsN, int Stages>
struct Tile {
  static constexpr int kM = M, kN = N, kK = K, kWarpsM = WarpsM, kWarpsN = WarpsN, kStages = Stages;
  static constexpr int kThreads = WarpsM * WarpsN * kWarp;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static constexpr int kStageBytes = (M + N) * K;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "mma.m16n8k32, two of them by one ldmatrix.x4");
};

// ---- loaders --------------------------------------------------------------------------------------------------------

// What a thread copies of a tile: the same 16-byte vector of every kStep-th row.
template <int kRows, int kK, int kThreads>
struct ThreadCopies {
  static constexpr int kVectors = kK / kVectorBytes, kStep = kThreads / kVectors, kCount = kRows / kStep;
  static_assert(kThreads % kVectors == 0 && kRows % kStep == 0, "whole rows, alike for every thread");
  __device__ __forceinline__ static int vector() { return static_cast<int>(threadIdx.x) % kVectors; }
  __device__ __forceinline__ static int row(int i) { return static_cast<int>(threadIdx.x) / kVectors + i * kStep; }
};

// Rows [first, rows) of a matrix whose K is contiguous. Rows beyond are zeros.
template <int kRows, int kK, int kThreads>
struct DenseRows : ThreadCopies<kRows, kK, kThreads> {
  using ThreadCopies<kRows, kK, kThreads>::kCount;
  const int8_t* at;    // the thread's vector of its first row
  const int8_t* safe;  // an address for copies that read nothing
  int64_t step, K;
  uint32_t exists;

  __device__ __forceinline__ DenseRows(const int8_t* matrix, int64_t stride, int64_t first, int64_t rows, int64_t K_)
      : safe(matrix), step(stride * this->kStep), K(K_), exists(0) {
    at = matrix + (first + this->row(0)) * stride + this->vector() * kVectorBytes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) exists |= static_cast<uint32_t>(first + this->row(i) < rows) << i;
  }

  __device__ __forceinline__ void load(char* tile, int64_t k) const {
    const bool within = k + this->vector() * kVectorBytes < K;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid = within && (exists >> i & 1);
      copy_async<kVectorBytes>(tile + tile_offset<kK>(this->row(i), this->vector()), valid ? at + i * step + k : safe, valid);
    }
  }
};

struct DenseLoader {
  template <class T>
  struct Rows : DenseRows<T::kM, T::kK, T::kThreads> {
    __device__ __forceinline__ Rows(const IgemmArgs& a, int64_t first, int64_t)
        : DenseRows<T::kM, T::kK, T::kThreads>(a.a, a.a_stride, first, a.M, a.K) {}
  };
};

// Pixels of a convolution, by copies of kBytes. The tap does not change within a copy. Rows beyond the last one repeat it.
template <int kBytes>
struct GatherLoader {
  template <class T>
  struct Rows : ThreadCopies<T::kM, T::kK, T::kThreads> {
    using ThreadCopies<T::kM, T::kK, T::kThreads>::kCount;
    const Gather& g;
    int64_t K;
    GatherRow rows[kCount];

    __device__ __forceinline__ Rows(const IgemmArgs& a, int64_t first, int64_t group) : g(a.gather), K(a.K) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t m = first + this->row(i);
        rows[i] = gather_row(g, m < a.M ? m : a.M - 1, group);
      }
    }

    __device__ __forceinline__ void load(char* tile, int64_t k) const {
#pragma unroll
      for (int byte = 0; byte < kVectorBytes; byte += kBytes) {
        const int64_t element = k + this->vector() * kVectorBytes + byte;
        const bool within = element < K;
        const GatherTap tap = gather_tap(g, element);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const bool pixel = within && inside(g, rows[i], tap), padded = within && g.padding != nullptr;
          const int8_t* from = pixel    ? rows[i].at + tap.offset
                               : padded ? g.padding + int64_t{rows[i].sample} * kVectorBytes
                                        : g.codes;
          copy_async<kBytes>(tile + tile_offset<T::kK>(this->row(i), this->vector()) + byte, from, pixel || padded);
        }
      }
    }
  };
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

// Blocks that run at the same time share rows and columns: they go down kTall tiles before the next column of tiles.
struct TilePlace {
  int64_t m, n, group, split;
};
__device__ __forceinline__ TilePlace tile_place(const IgemmArgs& a) {
  constexpr uint32_t kTall = 8;
  const uint32_t tiles_m = static_cast<uint32_t>(a.tiles_m), tiles_n = static_cast<uint32_t>(a.tiles_n), tiles = tiles_m * tiles_n;
  const uint32_t outer = blockIdx.x / tiles, tile = blockIdx.x - outer * tiles, groups = static_cast<uint32_t>(a.groups);
  const uint32_t band = tile / (kTall * tiles_n), in_band = tile - band * kTall * tiles_n, left = tiles_m - band * kTall;
  const uint32_t height = left < kTall ? left : kTall, column = in_band / height;
  return {band * kTall + in_band - column * height, column, outer % groups, outer / groups};
}

template <class T>
__device__ __forceinline__ void multiply_stage(const char* stage, int warp_m, int warp_n, int lane,
                                               int32_t (&sums)[T::kWarpM / 16][T::kWarpN / 8][4]) {
  const char* tile_b = stage + T::kM * T::kK;
#pragma unroll
  for (int k = 0; k < T::kK / 32; ++k) {
    uint32_t a[T::kWarpM / 16][4], b[T::kWarpN / 16][4];
#pragma unroll
    for (int i = 0; i < T::kWarpM / 16; ++i)
      load_matrices(stage + tile_offset<T::kK>(warp_m * T::kWarpM + i * 16 + a_row(lane), k * 2 + a_vector(lane)), a[i]);
#pragma unroll
    for (int j = 0; j < T::kWarpN / 16; ++j)
      load_matrices(tile_b + tile_offset<T::kK>(warp_n * T::kWarpN + j * 16 + b_row(lane), k * 2 + b_vector(lane)), b[j]);
#pragma unroll
    for (int i = 0; i < T::kWarpM / 16; ++i)
#pragma unroll
      for (int j = 0; j < T::kWarpN / 8; ++j) {
        const uint32_t half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply(sums[i][j], a[i], half);
      }
  }
}

// Writes the warp's results to y, from row m and column n on. n counts from the group's first column, which is `first`.
template <class T>
__device__ __forceinline__ void finish_warp(const Epilogue& e, char* staging, int64_t m, int64_t M, int64_t n, int64_t N,
                                            int64_t first, int lane, const int32_t (&sums)[T::kWarpM / 16][T::kWarpN / 8][4]) {
  constexpr int kPitch = T::kWarpN + 8;  // with eight more, the lanes' pairs of columns lie in different banks
  constexpr int kAcross = T::kWarpN / kFour, kRowsAtOnce = kWarp / kAcross;
  int32_t* block = reinterpret_cast<int32_t*>(staging);
  const bool across = e.y_column == 1;  // else rows are contiguous in y, and lanes go down the 16 rows first
  const auto columns_from = [&](int64_t column) { return static_cast<int>(N - column < kFour ? N - column : kFour); };
  OutputColumns<kFour> columns;
  if (across && n + lane % kAcross * kFour < N)
    columns = output_columns(e, first + n + lane % kAcross * kFour, columns_from(n + lane % kAcross * kFour));
#pragma unroll
  for (int i = 0; i < T::kWarpM / 16; ++i) {
    __syncwarp();  // all lanes have read the 16 rows before
#pragma unroll
    for (int j = 0; j < T::kWarpN / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int32_t* to = block + (c_row(lane) + half * 8) * kPitch + j * 8 + c_column(lane);
        store_vector<2>(to, {sums[i][j][half * 2], sums[i][j][half * 2 + 1]});
      }
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < 16 / kRowsAtOnce; ++r) {
      const int row = across ? r * kRowsAtOnce + lane / kAcross : lane & 15;
      const int column = across ? lane % kAcross * kFour : (r * 2 + (lane >> 4)) * kFour;
      if (m + i * 16 + row >= M || n + column >= N) continue;
      const int count = columns_from(n + column);
      if (!across) columns = output_columns(e, first + n + column, count);
      const auto words = load_vector<kFour>(block + row * kPitch + column);
      int32_t four[kFour];
#pragma unroll
      for (int c = 0; c < kFour; ++c) four[c] = words.get(c);
      finish_four(e, output_row(e, m + i * 16 + row), columns, first + n + column, count, four);
    }
  }
}

template <class T, class Loader>
__global__ void __launch_bounds__(T::kThreads) igemm_kernel(const QO_GRID_CONSTANT IgemmArgs args) {
  char* memory = shared_memory();
  const TilePlace place = tile_place(args);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_m = warp / T::kWarpsN, warp_n = warp % T::kWarpsN;

  // the block's rows, columns and k
  const typename Loader::template Rows<T> a(args, place.m * T::kM, place.group);
  const DenseRows<T::kN, T::kK, T::kThreads> b(args.b + place.group * args.N * args.b_stride, args.b_stride, place.n * T::kN,
                                               args.N, args.K);
  const int64_t k_begin = place.split * args.split_k, left = args.K - k_begin;
  const int steps = static_cast<int>(((left < args.split_k ? left : args.split_k) + T::kK - 1) / T::kK);
  const auto load = [&](int step, bool rows, bool columns) {
    if (step < steps) {
      char* stage = memory + step % T::kStages * T::kStageBytes;
      if (rows) a.load(stage, k_begin + int64_t{step} * T::kK);
      if (columns) b.load(stage + T::kM * T::kK, k_begin + int64_t{step} * T::kK);
    }
    if (rows) copy_commit();
  };

  // products
  int32_t sums[T::kWarpM / 16][T::kWarpN / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < T::kStages - 1; ++step) load(step, false, true);
  wait_for_kernel_before();
#pragma unroll 1
  for (int step = 0; step < T::kStages - 1; ++step) load(step, true, false);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<T::kStages - 2>();
    __syncthreads();                          // all threads have this step's codes, and have read those of the step before
    load(step + T::kStages - 1, true, true);  // into the buffer of the step before
    multiply_stage<T>(memory + step % T::kStages * T::kStageBytes, warp_m, warp_n, lane, sums);
  }
  copy_wait<0>();
  __syncthreads();

  // results
  Epilogue e = args.out;
  if (place.split > 0) e.y = static_cast<int32_t*>(e.y) + place.split * args.split_stride;
  char* staging = memory + warp * (16 * (T::kWarpN + 8) * 4);
  finish_warp<T>(e, staging, place.m * T::kM + warp_m * T::kWarpM, args.M, place.n * T::kN + warp_n * T::kWarpN, args.N,
                 place.group * args.N, lane, sums);
}

// ---- host -----------------------------------------------------------------------------------------------------------

using IgemmKernel = void (*)(IgemmArgs);

// The kernel for a tile of choose.h, by the tile's number.
template <class Loader>
IgemmKernel igemm_kernel_of(int tile) {
#define QO_IGEMM_KERNEL(m, n, k, wm, wn, s) igemm_kernel<Tile<m, n, k, wm, wn, s>, Loader>,
  static constexpr IgemmKernel kernels[] = {QO_IGEMM_TILES(QO_IGEMM_KERNEL)};
#undef QO_IGEMM_KERNEL
  return kernels[tile];
}

// Launches the portable kernel that was chosen for `args`, whose tiles and splits it fills in, and the join of the splits. `sums`
// is workspace for kernel.sums values.
void run_portable(IgemmArgs args, const KernelPlan& kernel, IgemmKernel (*kernel_of)(int tile), int32_t* sums, const Launch& at);

}  // namespace quant_ops
