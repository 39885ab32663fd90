// Integer products that quantize their floating rows themselves, for layers so small that a launch of quantize_rows would take as
// long as the product: q = clamp(rne(x / scale) + z) of a block's rows, each with a scale and zero point from its range, then
// y = epilogue(q b^T).
//
// A block reads its rows once, keeps their codes in shared memory for the whole of K, and multiplies them with one or several tiles
// of columns. The weight comes through a ring of stages of [kN][kFusedChunk] bytes by cp.async, whose first stages arrive while the
// rows are quantized. Every block of a row of tiles quantizes the same rows, hence wide tiles and few instructions an element
// (quotient.cuh). Warps may share K: their sums meet in shared memory. Bits are those of the other kernels. Read next: fused.h,
// portable.cuh, epilogue.cuh.
#include "engine/fused.h"

#include "device/epilogue.cuh"
#include "device/machine.cuh"
#include "device/range.cuh"
#include "engine/choose.h"

namespace quant_ops {
namespace {

constexpr int kHeld = 8;  // vectors of 16 bytes that a lane quantizes at once; as many are in flight

struct FusedArgs {
  static constexpr bool kBarriers = true;
  const void* x;
  int64_t x_stride;
  int64_t M, N;
  int columns, K;  // of x; of the weight, which is a multiple of 16 and at least `columns`
  bool asymmetric;
  bool whole;        // rows are whole aligned vectors
  int shift;         // then: log2 of a lane's vectors of a row
  int row_elements;  // then: x_stride
  const int8_t* b;
  int64_t b_stride;
  int64_t tiles_m, block_tiles;  // tiles of columns of a block
  Epilogue out;
};

template <class X_, int M, int N, int WarpsM, int WarpsN, int WarpsK, int Stages>
struct FusedShape {
  using X = X_;
  static constexpr int kM = M, kN = N, kWarpsM = WarpsM, kWarpsN = WarpsN, kWarpsK = WarpsK, kStages = Stages;
  static constexpr int kWarps = WarpsM * WarpsN * WarpsK, kThreads = kWarps * kWarp;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static constexpr int kSteps = kFusedChunk / 32 / WarpsK;  // multiplications along K of a warp and stage
  static constexpr int kStageBytes = N * kFusedChunk;
  static constexpr int kPitch = N + 8;  // of sums
  static constexpr int V = 16 / sizeof(X);
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "mma.m16n8k32, two of them by one ldmatrix.x4");
  static_assert(M <= 64 && M % kHeld == 0, "offsets within a block's rows fit an int");
  static_assert(kSteps % 2 == 0, "every stage begins with the same one of two sets of fragments");
};

struct FusedMemory {
  char *codes, *ring;  // codes: [chunks][kM][kFusedChunk], swizzled like the ring's stages
  int32_t* sums;       // [kWarpsK][kM][kPitch]
  float* scale;
  int32_t* zero_point;
};

template <class T>
__device__ __forceinline__ FusedMemory fused_memory(const FusedArgs& a) {
  constexpr int kRing = T::kStages * T::kStageBytes, kSums = T::kWarpsK * T::kM * T::kPitch * 4;
  FusedMemory memory;
  memory.codes = shared_memory();
  memory.ring = memory.codes + (a.K + kFusedChunk - 1) / kFusedChunk * kFusedChunk * T::kM;
  char* const sums = a.block_tiles == 1 ? memory.ring : memory.ring + kRing;
  memory.sums = reinterpret_cast<int32_t*>(sums);
  memory.scale = reinterpret_cast<float*>(a.block_tiles == 1 && kRing > kSums ? sums + kRing : sums + kSums);
  memory.zero_point = reinterpret_cast<int32_t*>(memory.scale + T::kM);
  return memory;
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// What makes codes of a row (quotient.cuh). `scale` is read near ties only.
struct RowCoder {
  CodeFactors factors;
  float base;
};

template <class X>
__device__ __forceinline__ RowCoder coder_of(const Range<float>& range, const QParams<float>& p, bool asymmetric) {
  const float reciprocal = safe_reciprocal(p.scale);
  return {sizeof(X) == 2 && !asymmetric ? symmetric_factors(greater(range.max, -range.min), p.scale, reciprocal)
                                        : checked_factors(reciprocal),
          kMagic + static_cast<float>(p.zero_point)};
}

// Codes of a vector, four in a word. Needs a reciprocal. The smallest element of a row has the code -128 or more, since the zero
// point is chosen by it; the largest one's may be 128.
template <class X, int V>
__device__ __forceinline__ void encode(const RowCoder& coder, const float* scale, const Vector<X, V>& in,
                                       uint32_t (&words)[V / 4]) {
  float x[V], n[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[i] = widen(in.get(i));
    n[i] = fused(x[i], coder.factors.lower, coder.base);
  }
  if (coder.factors.lower != coder.factors.upper) {
    uint32_t differ = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) differ |= float_bits(n[i]) ^ float_bits(fused(x[i], coder.factors.upper, coder.base));
    if (differ != 0) {
      const float s = *scale, reciprocal = safe_reciprocal(s), zero_point = coder.base - kMagic;
#pragma unroll
      for (int i = 0; i < V; ++i) n[i] = mended_quotient(x[i], s, reciprocal) + kMagic + zero_point;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) n[i] = n[i] < kMagic + 127.0f ? n[i] : kMagic + 127.0f;
  }
#pragma unroll
  for (int w = 0; w < V / 4; ++w)
    words[w] = low_bytes(float_bits(n[w * 4]), float_bits(n[w * 4 + 1]), float_bits(n[w * 4 + 2]), float_bits(n[w * 4 + 3]));
}

__device__ __forceinline__ QParams<float> row_params(const Range<float>& range, bool asymmetric) {
  return choose_qparams_of(range.min, range.max, range.finite(), asymmetric ? -128 : -127, 127, asymmetric);
}

// Where the codes of elements c, c + 1, .. of a row are; V of them follow each other if c is a multiple of V.
template <class T>
__device__ __forceinline__ int8_t* code_at(const FusedMemory& memory, int row, int c) {
  const int chunk = c / kFusedChunk, within = c % kFusedChunk;
  return reinterpret_cast<int8_t*>(memory.codes + chunk * (T::kM * kFusedChunk) +
                                   tile_offset<kFusedChunk>(row, within / kVectorBytes) + within % kVectorBytes);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ const typename T::X* row_of(const FusedArgs& a, int64_t m) {
  return static_cast<const typename T::X*>(a.x) + m * a.x_stride;
}

// Codes of a row by division, for any alignment, length and scale.
template <class T>
__device__ __forceinline__ void write_row(const FusedArgs& a, const FusedMemory& memory, int64_t first, int row, int lane) {
  const typename T::X* const x = row_of<T>(a, first + row);
  const Quantizer quantizer = Quantizer::of(memory.scale[row], memory.zero_point[row], -128, 127);
#pragma unroll 1
  for (int c = lane; c < a.columns; c += kWarp) *code_at<T>(memory, row, c) = static_cast<int8_t>(quantizer(widen(x[c])));
}

// Rows that are not whole vectors are read twice, element by element.
template <class T>
__device__ __forceinline__ void quantize_any_rows(const FusedArgs& a, const FusedMemory& memory, int64_t first, int rows, int warp,
                                                  int lane) {
#pragma unroll 1
  for (int row = warp; row < rows; row += T::kWarps) {
    const typename T::X* const x = row_of<T>(a, first + row);
    Range<float> range{0.0f, 0.0f};
#pragma unroll 4
    for (int c = lane; c < a.columns; c += kWarp) range.add(widen(x[c]));
    const auto p = row_params(over_lanes(range, kWarp), a.asymmetric);
    if (lane == 0) {
      memory.scale[row] = p.scale;
      memory.zero_point[row] = p.zero_point;
    }
    __syncwarp();
    write_row<T>(a, memory, first, row, lane);
  }
}

template <class Bounds>
__device__ __forceinline__ void merge_lanes(Bounds* bounds, int mask) {
  uint32_t others[Bounds::kWords];
#pragma unroll
  for (int w = 0; w < Bounds::kWords; ++w) others[w] = __shfl_xor_sync(0xffffffffu, bounds->words[w], mask);
  bounds->merge(others);
}

// Lane l gets number l % kHeld over all lanes. Each exchange halves the number that a lane still has.
template <class Bounds>
__device__ __forceinline__ Bounds over_lanes_each(Bounds (&each)[kHeld], int lane) {
#pragma unroll
  for (int half = kHeld / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      uint32_t others[Bounds::kWords];
#pragma unroll
      for (int w = 0; w < Bounds::kWords; ++w) {
        const uint32_t sent = upper ? each[i].words[w] : each[i + half].words[w];
        each[i].words[w] = upper ? each[i + half].words[w] : each[i].words[w];
        others[w] = __shfl_xor_sync(0xffffffffu, sent, half);
      }
      each[i].merge(others);
    }
  }
#pragma unroll
  for (int mask = kHeld; mask < kWarp; mask *= 2) merge_lanes(&each[0], mask);
  return each[0];
}

// What a warp holds of its rows: kHeld vectors a lane. A row has `width` of them, a power of two, so that vector i is number
// i % width of row i / width.
template <class T>
struct HeldRows {
  static constexpr int V = T::V, kSpan = kWarp * V;  // elements between the vectors of a lane
  Vector<typename T::X, V> in[kHeld];

  // From row `row` of the block's rows on. Rows and columns that do not exist are replaced by others, which change no range.
  __device__ __forceinline__ void load(const FusedArgs& a, const typename T::X* block, int row, int rows, int lane) {
    if (row >= rows) return;
    const uint32_t mask = (1u << a.shift) - 1;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = row + (i >> a.shift), c = lane * V + static_cast<int>(i & mask) * kSpan;
      in[i] = load_vector<V>(block + ((at < rows ? at : rows - 1) * a.row_elements + (c < a.columns ? c : 0)));
    }
  }

  // All of one row, from `column` on.
  __device__ __forceinline__ void load_row(const FusedArgs& a, const typename T::X* row, int column, int lane) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int c = column + lane * V + i * kSpan;
      in[i] = load_vector<V>(row + (c < a.columns ? c : 0));
    }
  }

  // The codes of vector i, whose first column is c.
  __device__ __forceinline__ void store(const FusedArgs& a, const FusedMemory& memory, const RowCoder& coder, int row, int c,
                                        int i) const {
    if (c >= a.columns) return;
    uint32_t words[V / 4];
    encode(coder, memory.scale + row, in[i], words);
    store_vector<V / 4>(reinterpret_cast<uint32_t*>(code_at<T>(memory, row, c)), words);
  }

  // Lane l gets the range of the row of vector l % kHeld.
  template <bool kAsymmetric>
  __device__ __forceinline__ Range<float> ranges(int shift, int lane) const {
    using Bounds = quant_ops::Bounds<typename T::X, kAsymmetric>;
    Bounds each[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      RangeWords<typename T::X, kAsymmetric> words;
#pragma unroll
      for (int w = 0; w < 4; ++w) words.add(in[i].words.at[w]);
      each[i] = Bounds::of(words);
    }
    Bounds mine = over_lanes_each(each, lane);
#pragma unroll
    for (int mask = 1; mask < kHeld; mask *= 2)
      if (mask < 1 << shift) merge_lanes(&mine, mask);
    return mine.range();
  }

  // Returns whether a row's codes need divisions; then they are not right.
  __device__ __forceinline__ bool encode_rows(const FusedArgs& a, const FusedMemory& memory, int row, int lane) const {
    const Range<float> range = a.asymmetric ? ranges<true>(a.shift, lane) : ranges<false>(a.shift, lane);
    const auto p = row_params(range, a.asymmetric);
    const RowCoder mine = coder_of<typename T::X>(range, p, a.asymmetric);
    if (lane < kHeld) {  // the lanes of a row have the same
      memory.scale[row + (lane >> a.shift)] = p.scale;
      memory.zero_point[row + (lane >> a.shift)] = p.zero_point;
    }
    __syncwarp();
    const int mask = (1 << a.shift) - 1, vectors = (a.columns - lane * V + kSpan - 1) / kSpan;  // of the lane
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const RowCoder coder{{__shfl_sync(0xffffffffu, mine.factors.lower, i), __shfl_sync(0xffffffffu, mine.factors.upper, i)},
                           __shfl_sync(0xffffffffu, mine.base, i)};
      const int own = row + (i >> a.shift);
      if ((i & mask) >= vectors) continue;
      uint32_t words[V / 4];
      encode(coder, memory.scale + own, in[i], words);
      int8_t* const to = code_at<T>(memory, own, lane * V) + (i & mask) * (kSpan * T::kM);
      store_vector<V / 4>(reinterpret_cast<uint32_t*>(to), words);
    }
    return __any_sync(0xffffffffu, safe_reciprocal(p.scale) == 0.0f);
  }
};

// Calls use(vectors, first column) for all vectors of a row, kHeld of a lane at once; the next ones are in flight.
template <class T, class Use>
__device__ __forceinline__ void for_each_batch(const FusedArgs& a, const typename T::X* row, int lane, const Use& use) {
  constexpr int kBatch = kHeld * HeldRows<T>::kSpan;
  HeldRows<T> next;
  next.load_row(a, row, 0, lane);
#pragma unroll 1
  for (int column = 0; column < a.columns; column += kBatch) {
    const HeldRows<T> held = next;
    if (column + kBatch < a.columns) next.load_row(a, row, column + kBatch, lane);
    use(held, column);
  }
}

// Rows that are whole vectors but longer than what a warp holds are read twice, the second time from a cache.
template <class T>
__device__ __forceinline__ void quantize_long_rows(const FusedArgs& a, const FusedMemory& memory, const typename T::X* block,
                                                   int64_t first, int rows, int warp, int lane) {
  using X = typename T::X;
#pragma unroll 1
  for (int row = warp; row < rows; row += T::kWarps) {
    const X* const x = block + row * a.row_elements;
    RangeWords<X, true> words;
    for_each_batch<T>(a, x, lane, [&](const HeldRows<T>& held, int) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
#pragma unroll
        for (int w = 0; w < 4; ++w) words.add(held.in[i].words.at[w]);
    });
    auto bounds = Bounds<X, true>::of(words);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) merge_lanes(&bounds, mask);
    const Range<float> range = bounds.range();
    const auto p = row_params(range, a.asymmetric);
    if (lane == 0) {
      memory.scale[row] = p.scale;
      memory.zero_point[row] = p.zero_point;
    }
    __syncwarp();
    if (safe_reciprocal(p.scale) == 0.0f) {
      write_row<T>(a, memory, first, row, lane);
      continue;
    }
    const RowCoder coder = coder_of<X>(range, p, a.asymmetric);
    for_each_batch<T>(a, x, lane, [&](const HeldRows<T>& held, int column) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) held.store(a, memory, coder, row, column + lane * T::V + i * HeldRows<T>::kSpan, i);
    });
  }
}

// The next rows are in flight while the ones before are quantized. `start` runs once the first loads are under way.
template <class T, class Start>
__device__ __forceinline__ void quantize_rows(const FusedArgs& a, const FusedMemory& memory, int64_t first, int warp, int lane,
                                              const Start& start) {
  const int rows = static_cast<int>(a.M - first < T::kM ? a.M - first : T::kM);
  if (!a.whole) {
    start();
    return quantize_any_rows<T>(a, memory, first, rows, warp, lane);
  }
  const typename T::X* const block = row_of<T>(a, first);
  if (kHeld >> a.shift == 0) {
    start();
    return quantize_long_rows<T>(a, memory, block, first, rows, warp, lane);
  }
  const int each = kHeld >> a.shift;  // rows of a warp at once
  HeldRows<T> next;
  next.load(a, block, warp * each, rows, lane);
  start();
  bool divided = false;
#pragma unroll 1
  for (int row = warp * each; row < rows; row += each * T::kWarps) {
    const HeldRows<T> held = next;
    next.load(a, block, row + each * T::kWarps, rows, lane);
    divided = held.encode_rows(a, memory, row, lane) || divided;
  }
  if (!divided) return;
#pragma unroll 1
  for (int row = warp * each; row < rows; row = (row + 1) % each != 0 ? row + 1 : row + 1 + each * (T::kWarps - 1))
    if (safe_reciprocal(memory.scale[row]) == 0.0f) write_row<T>(a, memory, first, row, lane);
}

// ---- product --------------------------------------------------------------------------------------------------------

// The weight's stages in the order in which the block uses them: all chunks of K of a tile, then the next tile. A thread copies the
// same 16-byte vector of every kRows-th column.
template <class T>
struct WeightStages {
  static constexpr int kVectors = kFusedChunk / kVectorBytes, kRows = T::kThreads / kVectors, kCopies = T::kN / kRows;
  static_assert(T::kN % kRows == 0, "alike for every thread");
  const FusedArgs& a;
  char* to;           // the thread's first vector of a stage
  int64_t column;     // its first column
  int left;           // stages that are still to be loaded
  int k, buffer = 0;  // where its vector is along K
  const int8_t* from;
  uint32_t exists;  // a bit for each copy: whether its column does

  __device__ __forceinline__ WeightStages(const FusedArgs& args, char* ring, int64_t first_column, int stages)
      : a(args), left(stages) {
    const int vector = static_cast<int>(threadIdx.x) % kVectors, row = static_cast<int>(threadIdx.x) / kVectors;
    to = ring + tile_offset<kFusedChunk>(row, vector);  // kRows is a multiple of the swizzle's period
    column = first_column + row;
    begin_tile();
  }
  __device__ __forceinline__ void begin_tile() {
    k = static_cast<int>(threadIdx.x) % kVectors * kVectorBytes;
    from = a.b + column * a.b_stride + k;
    exists = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) exists |= static_cast<uint32_t>(column + i * kRows < a.N) << i;
  }

  __device__ __forceinline__ void load() {
    if (left > 0) {
      const bool within = k < a.K;
      const int8_t* at = from;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool valid = within && (exists >> i & 1);
        copy_async<kVectorBytes>(to + buffer * T::kStageBytes + i * (kRows * kFusedChunk), valid ? at : a.b, valid);
        at += a.b_stride * kRows;
      }
      --left;
      buffer = buffer + 1 < T::kStages ? buffer + 1 : 0;
      k += kFusedChunk;
      from += kFusedChunk;
      if (k - static_cast<int>(threadIdx.x) % kVectors * kVectorBytes >= a.K) {
        column += T::kN;
        begin_tile();
      }
    }
    copy_commit();
  }
};

// The operands of a warp's multiplications at one step.
template <class T>
struct Fragments {
  uint32_t a[T::kWarpM / 16][4], b[T::kWarpN / 16][4];

  // `codes` and `stage` are of one chunk of K, of which `step` is the warp's.
  __device__ __forceinline__ void load(const char* codes, const char* stage, int warp_m, int warp_n, int step, int lane) {
#pragma unroll
    for (int i = 0; i < T::kWarpM / 16; ++i)
      load_matrices(codes + tile_offset<kFusedChunk>(warp_m * T::kWarpM + i * 16 + a_row(lane), step * 2 + a_vector(lane)), a[i]);
#pragma unroll
    for (int j = 0; j < T::kWarpN / 16; ++j)
      load_matrices(stage + tile_offset<kFusedChunk>(warp_n * T::kWarpN + j * 16 + b_row(lane), step * 2 + b_vector(lane)), b[j]);
  }

  __device__ __forceinline__ void multiply_to(int32_t (&sums)[T::kWarpM / 16][T::kWarpN / 8][4]) const {
#pragma unroll
    for (int i = 0; i < T::kWarpM / 16; ++i)
#pragma unroll
      for (int j = 0; j < T::kWarpN / 8; ++j) {
        const uint32_t half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply(sums[i][j], a[i], half);
      }
  }
};

// Columns that a thread finishes: the same four of every kStep-th row.
template <class T>
struct FinishedColumns {
  static constexpr int kAcross = T::kN / kFour, kStep = T::kThreads / kAcross;
  int64_t n;
  int row, count;
  OutputColumns<kFour> columns;

  __device__ __forceinline__ FinishedColumns(const FusedArgs& a, int64_t first) {
    n = first + static_cast<int>(threadIdx.x) % kAcross * kFour;
    row = static_cast<int>(threadIdx.x) / kAcross;
    count = row >= kStep || n >= a.N ? 0 : static_cast<int>(a.N - n < kFour ? a.N - n : kFour);
    if (count > 0) columns = output_columns(a.out, n, count);
  }

  __device__ __forceinline__ void finish(const FusedArgs& a, const FusedMemory& memory, int64_t first_row) const {
    if (count == 0) return;
    const int32_t* const from = memory.sums + static_cast<int>(threadIdx.x) % kAcross * kFour;
#pragma unroll 1
    for (int m = row; m < T::kM && first_row + m < a.M; m += kStep) {
      int32_t four[kFour] = {};
#pragma unroll
      for (int part = 0; part < T::kWarpsK; ++part) {
        const auto words = load_vector<kFour>(from + (part * T::kM + m) * T::kPitch);
#pragma unroll
        for (int c = 0; c < kFour; ++c) four[c] += words.get(c);
      }
      finish_four(a.out, {memory.scale[m], memory.zero_point[m], (first_row + m) * a.out.y_sample}, columns, n, count, four);
    }
  }
};

// Leaves the warp's sums at `to`, the place of its first one.
template <class T>
__device__ __forceinline__ void store_sums(int32_t* to, int lane, const int32_t (&sums)[T::kWarpM / 16][T::kWarpN / 8][4]) {
#pragma unroll
  for (int i = 0; i < T::kWarpM / 16; ++i)
#pragma unroll
    for (int j = 0; j < T::kWarpN / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_vector<2>(to + (i * 16 + c_row(lane) + half * 8) * T::kPitch + j * 8 + c_column(lane),
                        {sums[i][j][half * 2], sums[i][j][half * 2 + 1]});
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) fused_kernel(const QO_GRID_CONSTANT FusedArgs a) {
  const FusedMemory memory = fused_memory<T>(a);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_n = warp % T::kWarpsN, warp_m = warp / T::kWarpsN % T::kWarpsM, part = warp / (T::kWarpsN * T::kWarpsM);
  const int64_t place = blockIdx.x / a.tiles_m, first_row = (blockIdx.x - place * a.tiles_m) * T::kM;
  const int64_t first_column = place * a.block_tiles * T::kN, tiles = (a.N - first_column + T::kN - 1) / T::kN;
  const int chunks = (a.K + kFusedChunk - 1) / kFusedChunk;
  const int stages = chunks * static_cast<int>(tiles < a.block_tiles ? tiles : a.block_tiles);

  WeightStages<T> weights(a, memory.ring, first_column, stages);
  quantize_rows<T>(a, memory, first_row, warp, lane, [&] {
#pragma unroll 1
    for (int stage = 0; stage < T::kStages; ++stage) weights.load();
  });

  Fragments<T> fragments[2];
  const auto load_fragments = [&](int chunk, int buffer, int step, Fragments<T>* to) {
    to->load(memory.codes + chunk * (T::kM * kFusedChunk), memory.ring + buffer * T::kStageBytes, warp_m, warp_n,
             part * T::kSteps + step, lane);
  };
  copy_wait<T::kStages - 1>();
  __syncthreads();  // all codes, and the weight's first stage
  load_fragments(0, 0, 0, &fragments[0]);
  int buffer = 0;
#pragma unroll 1
  for (int64_t column = first_column; stages > 0 && column < a.N && column < first_column + a.block_tiles * T::kN;
       column += T::kN) {
    const FinishedColumns<T> finished(a, column);
    int32_t sums[T::kWarpM / 16][T::kWarpN / 8][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int next_chunk = chunk + 1 < chunks ? chunk + 1 : 0, next_buffer = buffer + 1 < T::kStages ? buffer + 1 : 0;
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
        if (step + 1 < T::kSteps) {
          load_fragments(chunk, buffer, step + 1, &fragments[(step + 1) % 2]);
        } else {
          copy_wait<T::kStages - 2>();
          __syncthreads();  // the next stage is there, and all warps have read this one
          load_fragments(next_chunk, next_buffer, 0, &fragments[(step + 1) % 2]);
          weights.load();
        }
        fragments[step % 2].multiply_to(sums);
      }
      buffer = next_buffer;
    }
    if (a.block_tiles == 1) __syncthreads();  // the sums take the ring's place
    store_sums<T>(memory.sums + (part * T::kM + warp_m * T::kWarpM) * T::kPitch + warp_n * T::kWarpN, lane, sums);
    __syncthreads();
    finished.finish(a, memory, first_row);
  }
  copy_wait<0>();
}

// ---- host -----------------------------------------------------------------------------------------------------------

template <class X>
void launch_fused(const IgemmProblem& p, const QuantizeRowsParams& rows, const KernelPlan& kernel, const Launch& at) {
#define QO_FUSED_KERNEL(m, n, wm, wn, wk, s) fused_kernel<FusedShape<X, m, n, wm, wn, wk, s>>,
  static constexpr void (*kernels[])(FusedArgs) = {QO_FUSED_TILES(QO_FUSED_KERNEL)};
#undef QO_FUSED_KERNEL
  const FusedTile& tile = kFusedTiles[kernel.kernel];
  constexpr int64_t V = 16 / sizeof(X);
  const int64_t tiles_n = (p.N + tile.n - 1) / tile.n, vectors = rows.columns / V;
  int shift = 0;
  while (vectors > int64_t{kWarp} << shift) ++shift;
  const FusedArgs a{.x = rows.x,
                    .x_stride = rows.x_stride,
                    .M = p.M,
                    .N = p.N,
                    .columns = static_cast<int>(rows.columns),
                    .K = static_cast<int>(p.K),
                    .asymmetric = rows.asymmetric,
                    .whole = rows.columns % V == 0 && is_aligned(rows.x, 16) &&
                             (p.M == 1 || (rows.x_stride % V == 0 && rows.x_stride <= INT32_MAX / 64)),
                    .shift = shift,
                    .row_elements = p.M == 1 ? 0 : static_cast<int>(rows.x_stride),
                    .b = p.b,
                    .b_stride = p.b_stride,
                    .tiles_m = (p.M + tile.m - 1) / tile.m,
                    .block_tiles = kernel.splits,
                    .out = epilogue_of(p)};
  launch(at, kernels[kernel.kernel], a.tiles_m * ((tiles_n + kernel.splits - 1) / kernel.splits),
         dim3(static_cast<unsigned>(tile.threads())), a, static_cast<int>(fused_shared_bytes(tile, p.K, kernel.splits)));
}

}  // namespace

void run_fused(const IgemmProblem& p, const QuantizeRowsParams& rows, const KernelPlan& kernel, const Launch& at) {
  with_float_type(rows.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>) launch_fused<X>(p, rows, kernel, at);
  });
}

}  // namespace quant_ops
