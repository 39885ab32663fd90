// Minima and maxima of runs of elements, which quantize_rows.cu and qparams.cu make scales of. Neither depends on an order, so any
// split over threads gives the same bits; a NaN stays in the range it meets, so that the range itself tells whether all of it is
// finite. Device code.
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
struct SliceRange {
  T min, max;

  __device__ __forceinline__ void add(T value) {
    min = lesser(min, value);
    max = greater(max, value);
  }
  __device__ __forceinline__ void merge(const SliceRange& other) {
    min = lesser(min, other.min);
    max = greater(max, other.max);
  }
  __device__ __forceinline__ bool finite() const { return min - min == T(0) && max - max == T(0); }
};

template <class T>
__device__ __forceinline__ SliceRange<T> empty_range() {
  return {static_cast<T>(INFINITY), static_cast<T>(-INFINITY)};
}

template <int V, class X>
__device__ __forceinline__ void add_vector(const Vector<X, V>& in, SliceRange<Compute<X>>* range) {
#pragma unroll
  for (int i = 0; i < V; ++i) range->add(widen(in.get(i)));
}

// By how many elements p misses a multiple of V elements. Rows are read by the vectors of memory that they lie in.
template <int V, class X>
__device__ __forceinline__ int misalignment(const X* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(X) % V);
}

// Elements [first, first + V) of a run of `length` >= 1, run + first aligned. In place of elements outside of the run comes its
// first or last one, which changes no range.
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

// Over `width` neighbouring lanes, a power of two up to a warp. All lanes of the warp take part.
template <class T>
__device__ __forceinline__ SliceRange<T> over_lanes(SliceRange<T> range, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2)
    range.merge({__shfl_xor_sync(0xffffffffu, range.min, mask), __shfl_xor_sync(0xffffffffu, range.max, mask)});
  return range;
}

// Over all threads of a block of whole warps in a row; `shared` has one entry a warp.
template <class T>
__device__ __forceinline__ SliceRange<T> over_block(SliceRange<T> range, SliceRange<T>* shared) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  range = over_lanes(range, kWarp);
  __syncthreads();  // of the round before, everything is read
  if (lane == 0) shared[threadIdx.x / kWarp] = range;
  __syncthreads();
  return over_lanes(lane < warps ? shared[lane] : shared[0], kWarp);
}

// ---- host: neighbouring threads for one row or slice ----------------------------------------------------------------

// The power of two from 1 to a warp that holds `work`.
inline int lanes_for(int64_t work) {
  int lanes = 1;
  while (lanes < kWarp && lanes < work) lanes *= 2;
  return lanes;
}

}  // namespace quant_ops
