// Minima and maxima of elements, from which qparams.cu, quantize_rows.cu and gemv.cu choose scales. Neither depends on an order, so
// the bits are the same however threads share the elements. A NaN stays in every range that meets it, so that the range itself
// tells whether all its elements are finite. Device code.
#pragma once

#include "device/common.cuh"

namespace quant_ops {

__device__ __forceinline__ double lesser(double a, double b) { return a != a || a < b ? a : b; }
__device__ __forceinline__ double greater(double a, double b) { return a != a || a > b ? a : b; }

// The greater (kGreater) or lesser elements of two pairs of 16-bit floating numbers X.
template <class X, bool kGreater>
__device__ __forceinline__ uint32_t extreme_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t c;
  if constexpr (std::is_same_v<X, Half> && kGreater)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else if constexpr (std::is_same_v<X, Half>)
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else if constexpr (kGreater)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#else
  const auto extreme = [](uint32_t u, uint32_t v) {
    const float x = to_compute(X{static_cast<uint16_t>(u)}), y = to_compute(X{static_cast<uint16_t>(v)});
    return (x != x || (kGreater ? x > y : x < y) ? u : v) & 0xffffu;
  };
  return extreme(a, b) | extreme(a >> 16, b >> 16) << 16;
#endif
}

// The greater magnitudes of two pairs, with signs that mean nothing.
template <class X>
__device__ __forceinline__ uint32_t greater_magnitudes(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  uint32_t c;
  if constexpr (std::is_same_v<X, Half>)
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#else
  return extreme_pair<X, true>(a & 0x7fff7fffu, b & 0x7fff7fffu);
#endif
}

template <class T>
struct Range {
  T min, max;

  __device__ __forceinline__ void add(T value) {
    min = lesser(min, value);
    max = greater(max, value);
  }
  __device__ __forceinline__ void merge(const Range& other) {
    min = lesser(min, other.min);
    max = greater(max, other.max);
  }
  __device__ __forceinline__ bool finite() const { return min - min == T(0) && max - max == T(0); }
};

template <class T>
__device__ __forceinline__ Range<T> empty_range() {
  return {static_cast<T>(INFINITY), static_cast<T>(-INFINITY)};
}

// The range of zero and many elements X, in words of X: one float32 number or a pair of 16-bit ones, of which the hardware takes
// two extremes at once. Symmetric scales need the greatest absolute value alone.
template <class X, bool kAsymmetric>
struct RangeWords {
  static constexpr bool kPairs = sizeof(X) == 2;
  static constexpr uint32_t kSigns = kPairs ? 0x80008000u : 0x80000000u;

  uint32_t greatest = 0, least = 0;  // symmetric: of absolute values; not used

  __device__ __forceinline__ void add(uint32_t word) {
    if constexpr (kPairs && !kAsymmetric)
      greatest = greater_magnitudes<X>(greatest, word);
    else
      greatest = extreme<true>(greatest, kAsymmetric ? word : word & ~kSigns);
    if constexpr (kAsymmetric) least = extreme<false>(least, word);
  }
  template <bool kGreater>
  __device__ __forceinline__ static uint32_t extreme(uint32_t a, uint32_t b) {
    if constexpr (kPairs) return extreme_pair<X, kGreater>(a, b);
    const float x = bits_float(a), y = bits_float(b);
    return float_bits(kGreater ? greater(x, y) : lesser(x, y));
  }
};

// The same as few words, of which threads take the greatest: max and -min, which share a word if they are a pair; the greatest
// absolute value stands for both.
template <class X, bool kAsymmetric>
struct Bounds {
  using Words = RangeWords<X, kAsymmetric>;
  static constexpr int kWords = kAsymmetric && !Words::kPairs ? 2 : 1;
  uint32_t words[kWords];

  __device__ __forceinline__ static Bounds of(const Words& w) {
    if constexpr (kWords == 2) return {{w.greatest, w.least ^ Words::kSigns}};
    if constexpr (!kAsymmetric) return {{w.greatest & ~Words::kSigns}};
    const uint32_t negated = w.least ^ Words::kSigns;
    return {{Words::template extreme<true>((w.greatest & 0xffffu) | negated << 16, w.greatest >> 16 | (negated & 0xffff0000u))}};
  }
  __device__ __forceinline__ void merge(const uint32_t (&others)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = Words::template extreme<true>(words[i], others[i]);
  }
  __device__ __forceinline__ Range<float> range() const {
    float max, min_negated;
    if constexpr (Words::kPairs) {
      max = widen(X{static_cast<uint16_t>(words[0])});
      min_negated = widen(X{static_cast<uint16_t>(words[0] >> 16)});
      if constexpr (!kAsymmetric) max = min_negated = greater(max, min_negated);
    } else {
      max = bits_float(words[0]);
      min_negated = bits_float(words[kWords - 1]);
    }
    return {-min_negated, max};
  }
};

// choose_qparams_of for int8 codes of a range that contains zero, and is as wide on both sides of it if symmetric. A usual scale
// takes no branches.
__device__ __forceinline__ Quantizer quantizer_of(const Range<float>& range, bool asymmetric) {
  constexpr int32_t kHighest = 127;
  constexpr float kSmall = 8.88178419700125232e-16f, kLarge = 1.12589990684262400e+15f;  // 2^-50, 2^50
  const int32_t lowest = asymmetric ? -128 : -127;
  const float span = asymmetric ? range.max - range.min : range.max, steps = asymmetric ? 255.0f : 127.0f;
  if (span >= kSmall && span <= kLarge) {
    Quantizer q = Quantizer::of(small_quotient(span, steps, asymmetric ? 1.0f / 255.0f : 1.0f / 127.0f), 0, lowest, kHighest);
    const int32_t zero = lowest - nearest_int(small_quotient(range.min, q.scale, q.reciprocal));
    if (asymmetric) q.zero_point = zero > kHighest ? kHighest : zero;
    return q;
  }
  const auto p = choose_qparams_of(range.min, range.max, range.finite(), lowest, kHighest, asymmetric);
  return Quantizer::of(p.scale, p.zero_point, lowest, kHighest);
}

template <int V, class X>
__device__ __forceinline__ void add_vector(const Vector<X, V>& in, Range<Compute<X>>* range) {
#pragma unroll
  for (int i = 0; i < V; ++i) range->add(widen(in.get(i)));
}

// How many elements p is behind a multiple of V elements. Rows are read by the aligned vectors of memory that contain them.
template <int V, class X>
__device__ __forceinline__ int misalignment(const X* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(X) % V);
}

// Elements [first, first + V) of a run of `length` >= 1, where run + first is aligned. The first or last element of the run stands
// in for those outside of it, and changes no range.
template <int V, class X>
__device__ __forceinline__ Vector<X, V> load_of_run(const X* run, int64_t first, int64_t length) {
  if (first >= 0 && first + V <= length) return load_vector<V>(run + first);
  X elements[V];
  const X head = run[0];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int64_t at = first + i;
    elements[i] = at <= 0 || length == 1 ? head : run[at < length ? at : length - 1];
  }
  Vector<X, V> v;
  memcpy(&v.words, elements, sizeof(v.words));
  return v;
}

// The range over `width` neighbouring lanes, a power of two up to a warp. All lanes of the warp take part.
template <class T>
__device__ __forceinline__ Range<T> over_lanes(Range<T> range, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2)
    range.merge({__shfl_xor_sync(0xffffffffu, range.min, mask), __shfl_xor_sync(0xffffffffu, range.max, mask)});
  return range;
}

// The range over all threads of a block. Blocks are whole warps, and `shared` has one entry a warp.
template <class T>
__device__ __forceinline__ Range<T> over_block(Range<T> range, Range<T>* shared) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  range = over_lanes(range, kWarp);
  __syncthreads();  // everything of the round before has been read
  if (lane == 0) shared[threadIdx.x / kWarp] = range;
  __syncthreads();
  return over_lanes(lane < warps ? shared[lane] : shared[0], kWarp);
}

// The bounds of `width` neighbouring threads, a power of two of a warp or a whole block, from those of each. All threads of the
// block take part. `shared` is aligned to 16 bytes.
template <class Bounds>
__device__ __forceinline__ void share_bounds(Bounds* bounds, int width, uint32_t (*shared)[kWarp]) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    if (mask >= width) continue;
    uint32_t others[Bounds::kWords];
#pragma unroll
    for (int w = 0; w < Bounds::kWords; ++w) others[w] = __shfl_xor_sync(0xffffffffu, bounds->words[w], mask);
    bounds->merge(others);
  }
  if (width <= kWarp) return;
  constexpr int kFour = 4;  // words of a load; zeros, which change no bound, fill the last one
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp), warps = width / kWarp;
  const int filled = (warps + kFour - 1) / kFour * kFour;
  if (lane == 0 || (warp == warps - 1 && warp + lane < filled)) {
#pragma unroll
    for (int w = 0; w < Bounds::kWords; ++w) shared[w][warp + lane] = lane == 0 ? bounds->words[w] : 0u;
  }
  __syncthreads();
#pragma unroll 1
  for (int first = 0; first < filled; first += kFour) {
    Vector<uint32_t, kFour> in[Bounds::kWords];
#pragma unroll
    for (int w = 0; w < Bounds::kWords; ++w) in[w] = load_vector<kFour>(&shared[w][first]);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      uint32_t others[Bounds::kWords];
#pragma unroll
      for (int w = 0; w < Bounds::kWords; ++w) others[w] = in[w].words.at[i];
      bounds->merge(others);
    }
  }
}

// ---- host: neighbouring threads for one row or slice ----------------------------------------------------------------

// The least power of two that is at least `work`, but at most a warp.
inline int lanes_for(int64_t work) {
  int lanes = 1;
  while (lanes < kWarp && lanes < work) lanes *= 2;
  return lanes;
}

constexpr int kWholeBlock = 31;  // a shift by which every thread of a block belongs to its first row

// Rows or slices of a block. A thread's row in its block is its index >> shift.
struct BlockRows {
  int width;  // threads of a row
  int shift;
  int rows;
  int threads;
};

// For rows that keep `threads` threads busy: lanes of a warp in blocks of `small` threads, or a block of at most `most` threads.
inline BlockRows block_rows_for(int64_t threads, int small, int64_t most) {
  if (threads > kWarp) {
    const int width = static_cast<int>((threads + kWarp - 1) / kWarp * kWarp < most ? (threads + kWarp - 1) / kWarp * kWarp : most);
    return {width, kWholeBlock, 1, width};
  }
  BlockRows block{lanes_for(threads), 0, 0, small};
  while (1 << block.shift < block.width) ++block.shift;
  block.rows = small / block.width;
  return block;
}

}  // namespace quant_ops
