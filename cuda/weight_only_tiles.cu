// weight_only_linear of many rows: tiles of 32, 64 or 128 rows x 128 columns by mma.sync.
//
// Rows of x and words of the packed weight come through a ring of kStages buffers in shared memory, which cp.async fills ahead. Two
// rows of four warps share a tile, 32 columns each. A warp makes operands of the weight's octets in registers, once for all of its
// rows, and folds the sums of every group into its results there: exact ones in ascending order of the groups, so that the bits are
// those of the CPU, floating ones of at most kChunkSteps steps. Floating results go to shared memory after every kTotalSteps steps,
// and are added to those before, so that no chain of additions is long. Read next: device/weight_only.cuh.
#include "device/common.cuh"
#include "device/weight_only.cuh"

namespace quant_ops {
namespace {

constexpr int kWarpsM = 2, kWarpsN = kTileColumns / kWeightOnlyColumns, kThreads = kWarpsM * kWarpsN * kWarp;
constexpr int kStages = 3;
constexpr int kRowBytes = 128;   // of x in a stage
constexpr int kTotalSteps = 64;  // 2048 k
constexpr int kColumnQuads = kTileColumns / kLaneColumns;

struct TileArgs : WeightOnlyArgs {
  int splits, split_steps;
  float* parts;     // null: one split
  int total_steps;  // floats: results go to shared memory after so many steps, a power of two; 0: never
};

template <class X, int kBitsOfCode, int kTiles>
struct Tile {
  static constexpr bool kCodes = std::is_same_v<X, int8_t>;
  static constexpr int kBits = kBitsOfCode;
  static constexpr int kRowTiles = kTiles;  // of eight rows, of a warp
  static constexpr int kWarpRows = kTiles * 8, kRows = kWarpsM * kWarpRows;
  static constexpr int kSteps = kRowBytes / (kStepK * static_cast<int>(sizeof(X)));  // of a stage
  // Lanes read eight bytes (codes) or 16 (floats) of an octet; so rows meet in no bank.
  static constexpr int kPitch = kRowBytes + (kCodes ? 32 : 64);
  static constexpr int kWords = kSteps * 4 * Octets<kBits>::kWords;  // of a column in a stage
  static constexpr int kWeightBytes = kWords * kTileColumns * 4;
  static constexpr int kStageBytes = kRows * kPitch + kWeightBytes;
  static constexpr int kChunkSteps = kCodes ? 1 << 30 : kBits == 4 ? 4 : 2;  // floats: that are summed by mma alone
};

// Where word `word` of the octets' words of columns 4 quad .. is in a stage. The exclusive or spreads the lanes of a load over all
// banks.
template <int kBits>
__device__ __forceinline__ int weight_place(int word, int quad) {
  const int octet = word / Octets<kBits>::kWords;
  return (word * kColumnQuads + (quad ^ (octet & 3) << 1)) * kVectorBytes;
}

// ---- copies to shared memory ----------------------------------------------------------------------------------------

// What a thread copies of the weight: words of four columns, eight words apart. Neighbouring lanes copy neighbouring memory.
template <class T>
struct WeightCopies {
  static constexpr int kCount = T::kWords / 8;
  static_assert(kThreads == 8 * kColumnQuads && T::kWords % 8 == 0);
  ColumnWords column;
  int words, quad, word;

  __device__ __forceinline__ WeightCopies(const WeightOnlyArgs& a, int64_t n0) {
    const int thread = static_cast<int>(threadIdx.x);
    quad = T::kBits == 4 ? thread / 32 * 4 + thread % 4 : thread % 32;
    word = T::kBits == 4 ? thread % 32 / 4 : thread / 32;
    const int64_t n = n0 + quad * kLaneColumns;
    const bool exists = n < a.padded_n;
    column = column_words(a.codes, T::kBits, a.column_bytes, a.padded_n, exists ? n : 0);
    words = exists ? static_cast<int>(a.column_bytes / 4) : 0;
  }
  __device__ __forceinline__ void load(char* stage, int number) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int in_stage = word + i * 8, in_column = number * T::kWords + in_stage;
      const bool valid = in_column < words;
      copy_async<kVectorBytes>(stage + weight_place<T::kBits>(in_stage, quad), column.first + (valid ? in_column : 0) * column.step,
                               valid);
    }
  }
};

// What a thread copies of x: the same vector of every 32nd row.
template <class T, class X>
struct RowCopies {
  static constexpr int kVectors = kRowBytes / kVectorBytes, kStep = kThreads / kVectors, kCount = T::kRows / kStep;
  static_assert(T::kRows % kStep == 0);
  const X* at;
  int64_t step, left;  // rows from the thread's first one on
  int64_t elements;    // of a row, from the thread's vector on
  int place;

  __device__ __forceinline__ RowCopies(const WeightOnlyArgs& a, int64_t m0) {
    constexpr int kElements = kVectorBytes / static_cast<int>(sizeof(X));
    const int vector = static_cast<int>(threadIdx.x) % kVectors, row = static_cast<int>(threadIdx.x) / kVectors;
    at = static_cast<const X*>(a.x) + (m0 + row) * a.x_stride + vector * kElements;
    step = a.x_stride * kStep;
    left = a.M - m0 - row;
    elements = a.K - vector * kElements;
    place = row * T::kPitch + vector * kVectorBytes;
  }
  __device__ __forceinline__ void load(const WeightOnlyArgs& a, char* stage, int number) const {
    const int64_t k = int64_t{number} * T::kSteps * kStepK;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid = i * kStep < left && k < elements;
      copy_async<kVectorBytes>(stage + place + i * kStep * T::kPitch, valid ? at + i * step + k : static_cast<const X*>(a.x),
                               valid);
    }
  }
};

// ---- the fold -------------------------------------------------------------------------------------------------------

// What a group of the lane's columns has.
template <class T, class X>
struct LaneColumns {
  FoldColumn column[kLaneColumns];
  uint32_t addends[kLaneColumns];  // floats

  __device__ __forceinline__ void load(const WeightOnlyArgs& a, int group, int64_t n) {
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const bool exists = n + c < a.N && group < a.groups;
      const int64_t zero_at = (n + c) * a.zero_stride[0] + group * a.zero_stride[1];
      column[c] = {};
      if (exists) column[c].scale = a.scale[(n + c) * a.scale_stride[0] + group * a.scale_stride[1]];
      if (exists && a.zero_point != nullptr) column[c].zero = a.zero_point[zero_at];
      if constexpr (T::kCodes) {
        if (exists && a.float_zero != nullptr) column[c].float_zero = a.float_zero[zero_at];
        if (exists && a.row_zero != nullptr) column[c].code_sum = sum_of_codes(a, T::kBits, group, n + c);
        addends[c] = 0;
      } else {
        addends[c] = CodePairs<X, T::kBits>::addend(column[c].zero);
      }
    }
  }
};

// Of a row of codes, in shared memory.
struct RowParams {
  float scale;
  int32_t zero;
};

template <class T, class X>
struct TileWarp {
  using Sums = SumOf<X>[T::kRowTiles][2][4];
  Sums sums = {};
  float y[T::kRowTiles][2][4];

  __device__ __forceinline__ void start(const WeightOnlyArgs& a, int64_t n) {
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t)
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c)
        y[t][c / 2][c % 2 * 2] = y[t][c / 2][c % 2 * 2 + 1] = T::kCodes ? bias_of(a, n + c) : 0.0f;
  }

  // Adds the products of step `u` of a stage. The lane has octet t of columns 4 quad .., and of the rows of x from `x` on.
  __device__ __forceinline__ void multiply_step(const char* words, const char* x, int u, int t, int quad,
                                                const LaneColumns<T, X>& columns) {
    Octets<T::kBits> octets;
#pragma unroll
    for (int w = 0; w < Octets<T::kBits>::kWords; ++w) {
      const int place = weight_place<T::kBits>((u * 4 + t) * Octets<T::kBits>::kWords + w, quad);
      const auto four = load_vector<kLaneColumns>(reinterpret_cast<const uint32_t*>(words + place));
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) octets.words[w][c] = four.get(c);
    }
    const StepOperands<X, T::kBits> operands(octets, columns.addends);
#pragma unroll
    for (int r = 0; r < T::kRowTiles; ++r) {
      const char* const at = x + r * 8 * T::kPitch + u * kStepK * static_cast<int>(sizeof(X));
      const auto in = load_vector<kXWords<X>>(reinterpret_cast<const uint32_t*>(at));
      operands.multiply_rows(in.words.at, sums[r]);
    }
  }

  __device__ __forceinline__ void fold_floats(const LaneColumns<T, X>& columns) {
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t)
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int j = c / 2, i = c % 2 * 2 + r;
          y[t][j][i] = fused(sums[t][j][i], columns.column[c].scale, y[t][j][i]);
          sums[t][j][i] = 0;
        }
  }

  // `m` is the lane's first row, of which `params` has the parameters.
  template <bool kPlain>
  __device__ __forceinline__ void fold_codes(const WeightOnlyArgs& a, const LaneColumns<T, X>& columns, int group, int64_t m,
                                             const RowParams* params) {
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = m + t * 8 + r;
        const RowParams of_row = params[t * 8 + r];
        const int32_t row_sum = !kPlain && a.row_sum != nullptr && row < a.M ? a.row_sum[group * a.M + row] : 0;
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) {
          const int j = c / 2, i = c % 2 * 2 + r;
          y[t][j][i] = fold_group<kPlain>(a, sums[t][j][i] >> kCodeShift<T::kBits>, columns.column[c], of_row.scale, of_row.zero,
                                          row_sum, y[t][j][i]);
          sums[t][j][i] = 0;
        }
      }
  }

  // The results of the lane's columns from n and rows from m on; `totals`: what is in shared memory, if anything is.
  __device__ __forceinline__ void store(const TileArgs& a, int split, int64_t n, int64_t m, const float* totals) const {
    ResultTensor to{a.y, a.y_dtype, a.y_stride, a.y_vectors};
    if (a.parts != nullptr) to = {a.parts + split * a.M * a.N, DType::kFloat32, a.N, a.N % kLaneColumns == 0};
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = m + t * 8 + half;
        float values[kLaneColumns];
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) {
          const int j = c / 2, i = c % 2 * 2 + half;
          values[c] = y[t][j][i];
          if constexpr (!T::kCodes) {
            if (totals != nullptr) values[c] += totals[((t * 2 + j) * 4 + i) * kThreads];
            if (a.parts == nullptr) values[c] += bias_of(a, n + c);
          }
        }
        if (row < a.M && n < a.N) store_results(to, a.N, row, n, values);
      }
  }

  // Adds the results to those in shared memory, and begins anew.
  __device__ __forceinline__ void add_to(float* totals) {
#pragma unroll
    for (int t = 0; t < T::kRowTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          totals[((t * 2 + j) * 4 + i) * kThreads] += y[t][j][i];
          y[t][j][i] = 0.0f;
        }
  }
};

template <class X, int kBits, int kTiles>
__global__ void __launch_bounds__(kThreads) tile_kernel(const QO_GRID_CONSTANT TileArgs a) {
  using T = Tile<X, kBits, kTiles>;
  char* const memory = shared_memory();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_m = warp / kWarpsN, warp_n = warp % kWarpsN, g = lane / 4, t = lane % 4;
  const int64_t tiles_m = (a.M + T::kRows - 1) / T::kRows, part = blockIdx.x / tiles_m;  // neighbouring blocks share columns
  const int64_t tile_n = part / a.splits, m0 = (blockIdx.x - part * tiles_m) * T::kRows;
  const int64_t n0 = tile_n * kTileColumns;
  const int split = static_cast<int>(part - tile_n * a.splits);
  const int begin = split * a.split_steps, end = begin + a.split_steps < a.steps ? begin + a.split_steps : a.steps;
  const int64_t n = n0 + warp_n * kWeightOnlyColumns + g * kLaneColumns, m = m0 + warp_m * T::kWarpRows + t * 2;
  const WeightCopies<T> weight(a, n0);
  const RowCopies<T, X> rows(a, m0);
  const int stages = (end - begin + T::kSteps - 1) / T::kSteps, first_stage = begin / T::kSteps;
  const auto load = [&](int number, bool of_rows, bool of_weight) {
    if (number < stages) {
      char* const stage = memory + number % kStages * T::kStageBytes;
      if (of_weight) weight.load(stage + T::kRows * T::kPitch, first_stage + number);
      if (of_rows) rows.load(a, stage, first_stage + number);
    }
    if (of_rows) copy_commit();
  };

  LaneColumns<T, X> columns, ahead;
  columns.load(a, begin >> a.group_shift, n);
  TileWarp<T, X> product;
  product.start(a, n);
  float* const totals = reinterpret_cast<float*>(memory + kStages * T::kStageBytes) + threadIdx.x;
  if constexpr (!T::kCodes)
    for (int i = 0; a.total_steps > 0 && i < kTiles * 8; ++i) totals[i * kThreads] = 0.0f;

#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) load(s, false, true);
  wait_for_kernel_before();
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) load(s, true, false);
  RowParams* const params = reinterpret_cast<RowParams*>(memory + kStages * T::kStageBytes);
  if constexpr (T::kCodes) {
    const int64_t row = m0 + threadIdx.x;
    const bool exists = row < a.M;
    if (threadIdx.x < T::kRows)
      params[threadIdx.x] = {exists ? a.row_scale[row] : 0.0f, exists && a.row_zero != nullptr ? a.row_zero[row] : 0};
  }
  if constexpr (!T::kCodes) ahead.load(a, (begin >> a.group_shift) + 1, n);
  const RowParams* const of_rows = params + warp_m * T::kWarpRows + t * 2;

  const int group_mask = static_cast<int>((1u << a.group_shift) - 1);
  const int fold_mask = group_mask & (T::kChunkSteps - 1);  // both are powers of two less one
#pragma unroll 1
  for (int number = 0; number < stages; ++number) {
    copy_wait<kStages - 2>();
    __syncthreads();                         // all threads have this stage, and have read the one before
    load(number + kStages - 1, true, true);  // into the buffer of the stage before
    const char* const stage = memory + number % kStages * T::kStageBytes;
    const char* const x = stage + (warp_m * T::kWarpRows + g) * T::kPitch + t * kOctet * static_cast<int>(sizeof(X));
    const char* const words = stage + T::kRows * T::kPitch;
#pragma unroll 1  // the fold is long, and the caches of instructions are short
    for (int u = 0; u < T::kSteps; ++u) {
      const int step = begin + number * T::kSteps + u;
      if (step >= end) break;
      product.multiply_step(words, x, u, t, warp_n * kWeightOnlyColumns / kLaneColumns + g, columns);
      if (((step + 1) & fold_mask) != 0 && step + 1 < end) continue;
      const int group = step >> a.group_shift;
      if constexpr (T::kCodes) {  // reads its columns here alone
        if (is_plain(a))
          product.template fold_codes<true>(a, columns, group, m, of_rows);
        else
          product.template fold_codes<false>(a, columns, group, m, of_rows);
        columns.load(a, group + 1, n);
      } else {
        product.fold_floats(columns);
        if (((step + 1) & group_mask) == 0) {
          columns = ahead;
          ahead.load(a, group + 2, n);
        }
        if (a.total_steps > 0 && ((step + 1) & (a.total_steps - 1)) == 0) product.add_to(totals);
      }
    }
  }
  copy_wait<0>();

  product.store(a, split, n, m, a.total_steps > 0 ? totals : nullptr);
}

// A thread adds the splits of four columns of a row.
__global__ void __launch_bounds__(kThreads) join_tiles_kernel(const QO_GRID_CONSTANT TileArgs a) {
  const int64_t fours = (a.N + kLaneColumns - 1) / kLaneColumns, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t m = i / fours, n = (i - m * fours) * kLaneColumns;
  if (m >= a.M) return;
  float values[kLaneColumns] = {};
  for (int split = 0; split < a.splits; ++split) {
    const float* const from = a.parts + (split * a.M + m) * a.N + n;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      if (n + c < a.N) values[c] += from[c];
  }
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) values[c] += bias_of(a, n + c);
  store_results({a.y, a.y_dtype, a.y_stride, a.y_vectors}, a.N, m, n, values);
}

// ---- host -----------------------------------------------------------------------------------------------------------

using TileKernel = void (*)(TileArgs);

template <class X, int kBits>
TileKernel tile_kernel_of(int rows) {
  return rows == 32 ? tile_kernel<X, kBits, 2> : rows == 64 ? tile_kernel<X, kBits, 4> : tile_kernel<X, kBits, 8>;
}
template <class X>
TileKernel tile_kernel_of(int rows, int bits) {
  return bits == 4 ? tile_kernel_of<X, 4>(rows) : tile_kernel_of<X, 8>(rows);
}

bool has_totals(bool codes, const WeightOnlyTiles& tiles) { return !codes && tiles.split_steps > 2 * kTotalSteps; }

}  // namespace

int tiles_shared_bytes(const WeightOnlyTiles& tiles, int bits, bool codes) {
  const int weight = codes ? (bits == 4 ? Tile<int8_t, 4, 2>::kWeightBytes : Tile<int8_t, 8, 2>::kWeightBytes)
                           : (bits == 4 ? Tile<Half, 4, 2>::kWeightBytes : Tile<Half, 8, 2>::kWeightBytes);
  const int pitch = codes ? Tile<int8_t, 4, 2>::kPitch : Tile<Half, 4, 2>::kPitch;
  const int behind = codes                      ? tiles.rows * static_cast<int>(sizeof(RowParams))
                     : has_totals(codes, tiles) ? tiles.rows * kTileColumns * static_cast<int>(sizeof(float))
                                                : 0;
  return kStages * (tiles.rows * pitch + weight) + behind;
}

void run_weight_only_tiles(const WeightOnlyArgs& a, int bits, DType x_dtype, const WeightOnlyTiles& tiles, float* parts, bool early,
                           const Launch& at) {
  const TileKernel kernel = x_dtype == DType::kInt8      ? tile_kernel_of<int8_t>(tiles.rows, bits)
                            : x_dtype == DType::kFloat16 ? tile_kernel_of<Half>(tiles.rows, bits)
                                                         : tile_kernel_of<BFloat16>(tiles.rows, bits);
  const bool codes = x_dtype == DType::kInt8;
  const int64_t blocks = (a.M + tiles.rows - 1) / tiles.rows * ((a.N + kTileColumns - 1) / kTileColumns) * tiles.splits;
  TileArgs args{};
  static_cast<WeightOnlyArgs&>(args) = a;
  args.splits = tiles.splits;
  args.split_steps = tiles.split_steps;
  args.parts = tiles.splits > 1 ? parts : nullptr;
  args.total_steps = has_totals(codes, tiles) ? kTotalSteps : 0;
  launch(at, kernel, blocks, dim3(kThreads), args, tiles_shared_bytes(tiles, bits, codes), early ? Start::kEarly : Start::kInOrder);
  if (tiles.splits > 1) join_weight_only_parts(a, parts, tiles.splits, at);
}

void join_weight_only_parts(const WeightOnlyArgs& a, float* parts, int splits, const Launch& at) {
  TileArgs args{};
  static_cast<WeightOnlyArgs&>(args) = a;
  args.splits = splits;
  args.parts = parts;
  const int64_t fours = a.M * ((a.N + kLaneColumns - 1) / kLaneColumns);
  launch(at, join_tiles_kernel, (fours + kThreads - 1) / kThreads, dim3(kThreads), args);
}

}  // namespace quant_ops
