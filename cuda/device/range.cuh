// Minima and maxima of elements, from which qparams.cu, quantize_rows.cu and gemv.cu choose scales. Neither depends on an order, so
// the bits are the same however threads share the elements. A NaN stays in every range that meets it, so that the range itself
// tells whether all its elements are finite. Device code.
#pragma once

#include "device/common.cuh"

namespace quant_ops {

__device__ __forceinline__ float lesser(float a, float b) {
#if defined(__CUDA_ARCH__)
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a || a < b ? a : b;
#endif
}
__device__ __forceinline__ float greater(float a, float b) {
#if defined(__CUDA_ARCH__)
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a || a > b ? a : b;
#endif
}
__device__ __forceinline__ double lesser(double a, double b) { return a != a || a < b ? a : b; }
__device__ __forceinline__ double greater(double a, double b) { return a != a || a > b ? a : b; }

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

// ---- host: neighbouring threads for one row or slice ----------------------------------------------------------------

// The least power of two that is at least `work`, but at most a warp.
inline int lanes_for(int64_t work) {
  int lanes = 1;
  while (lanes < kWarp && lanes < work) lanes *= 2;
  return lanes;
}

}  // namespace quant_ops
