// quantize_rows on CUDA, also the first half of a dynamic int8_linear: each row's scale from its range, then its codes.
//
//   scale, z = choose_qparams_of(min, max);  q = clamp(rne(x / scale) + z, qmin, 127),  qmin -127 symmetric, -128 asymmetric
//
// A row is read once: its threads keep it in registers until its range is known. Short rows have a part of a warp, longer ones a
// block; rows beyond the registers of 1024 threads are read twice, the second time from the L2 cache. Bits are those of
// cpp/qparams.cpp. Read next: range.cuh.
#include <algorithm>

#include "device/range.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;       // of a block of short rows
constexpr int kMostThreads = 1024;  // for one row
constexpr int kVectors = 4;         // 16 bytes each, that a thread keeps and has in flight
constexpr int32_t kHighest = 127;

template <class X>
struct QuantizeRowsArgs {
  static constexpr bool kBarriers = true;
  int64_t rows, columns;
  const X* x;
  int64_t x_stride;
  int8_t* q;
  int64_t q_stride;
  float* scale;
  int32_t* zero_point;  // null: not wanted
  bool asymmetric;
  int width = 0;  // threads of a row, where a block has several
};

// From a row's elements to its codes. Bounds are so narrow that float32 holds all of it exactly.
struct RowCode {
  float scale, reciprocal;  // reciprocal 0: only exact() will do
  int32_t zero_point, lowest;

  __device__ __forceinline__ int8_t fast(float x) const {
    const int32_t q = nearest_int(mended_quotient(x, scale, reciprocal)) + zero_point;
    return static_cast<int8_t>(q < lowest ? lowest : q > kHighest ? kHighest : q);
  }
  __device__ __forceinline__ int8_t exact(float x) const {
    const float lo = static_cast<float>(lowest - zero_point), hi = static_cast<float>(kHighest - zero_point);
    return static_cast<int8_t>(steps_to_code(clamp_steps(quantize_steps(x, scale), lo, hi), zero_point, lowest, kHighest));
  }
};

// kBlock: a block per row, else `width` lanes. kHeld: the row fits the registers of its threads.
template <class X, bool kBlock, bool kHeld>
__global__ void __launch_bounds__(kBlock ? kMostThreads : kThreads) quantize_rows_kernel(const QO_GRID_CONSTANT QuantizeRowsArgs<X> a) {
  constexpr int V = 16 / sizeof(X);
  __shared__ SliceRange<float> shared[kWarp];
  const int width = kBlock ? static_cast<int>(blockDim.x) : a.width, thread = kBlock ? threadIdx.x : threadIdx.x % width;
  const int64_t block_rows = kBlock ? 1 : kThreads / width, step = int64_t{width} * V, batch = step * kVectors;
  for (int64_t first_row = blockIdx.x * block_rows; first_row < a.rows; first_row += gridDim.x * block_rows) {
    const int64_t own = first_row + (kBlock ? 0 : threadIdx.x / width);
    const bool active = own < a.rows;
    const int64_t row = active ? own : a.rows - 1;
    const X* const x = a.x + row * a.x_stride;
    int8_t* const q = a.q + row * a.q_stride;
    const int64_t start = int64_t{thread} * V - (a.columns > 0 ? misalignment<V>(x) : 0);

    // range; it contains 0
    Vector<X, V> in[kVectors];
    const auto load = [&](int64_t first) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u)
        if (first + u * step < a.columns) in[u] = load_of_run<V>(x, first + u * step, a.columns);
    };
    SliceRange<float> range{0.0f, 0.0f};
    for (int64_t first = start; first < a.columns; first += batch) {
      load(first);
#pragma unroll
      for (int u = 0; u < kVectors; ++u)
        if (first + u * step < a.columns) add_vector<V>(in[u], &range);
      if constexpr (kHeld) break;
    }
    range = kBlock ? over_block(range, shared) : over_lanes(range, width);

    // parameters: by every thread, which costs less than handing them over
    const int32_t lowest = a.asymmetric ? -128 : -127;
    const auto p = choose_qparams_of(range.min, range.max, range.finite(), lowest, kHighest, a.asymmetric);
    const RowCode code{p.scale, safe_reciprocal(p.scale), p.zero_point, lowest};
    if (!active) continue;
    if (thread == 0) {
      a.scale[row] = p.scale;
      if (a.zero_point) a.zero_point[row] = p.zero_point;
    }

    // codes
    for (int64_t first = start; first < a.columns; first += batch) {
      if constexpr (!kHeld) load(first);
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        const int64_t e = first + u * step;
        if (e >= a.columns) break;
        if (code.reciprocal != 0.0f) {
          int8_t codes[V];
#pragma unroll
          for (int i = 0; i < V; ++i) codes[i] = code.fast(widen(in[u].get(i)));
          if (e >= 0 && e + V <= a.columns && misalignment<V>(q + e) == 0) {
            store_vector<V>(q + e, codes);
          } else {
#pragma unroll
            for (int i = 0; i < V; ++i)
              if (e + i >= 0 && e + i < a.columns) q[e + i] = codes[i];
          }
        } else {
#pragma unroll 1
          for (int i = 0; i < V; ++i)
            if (e + i >= 0 && e + i < a.columns) q[e + i] = code.exact(widen(x[e + i]));
        }
      }
      if constexpr (kHeld) break;
    }
    for (int64_t c = a.columns + thread; c < a.q_stride; c += width) q[c] = 0;
  }
}

template <class X>
void launch_rows(const QuantizeRowsParams& p, int64_t q_stride, const Launch& at) {
  constexpr int64_t V = 16 / sizeof(X);
  QuantizeRowsArgs<X> a{.rows = p.rows,
                        .columns = p.columns,
                        .x = static_cast<const X*>(p.x),
                        .x_stride = p.x_stride,
                        .q = p.q,
                        .q_stride = q_stride,
                        .scale = p.scale,
                        .zero_point = p.zero_point,
                        .asymmetric = p.asymmetric};
  const bool aligned = is_aligned(a.x, 16) && (a.x_stride % V == 0 || a.rows == 1);
  const int64_t vectors = (a.columns + V - 1 + (aligned ? 0 : V - 1)) / V;  // that a row may lie in
  // Rows that leave multiprocessors idle are spread over more threads, because only their latency counts.
  const int64_t each = a.rows < 2 * multiprocessors() ? 1 : kVectors, threads = (vectors + each - 1) / each;
  if (threads <= kWarp) {
    a.width = lanes_for(threads);
    return launch(at, quantize_rows_kernel<X, false, true>, blocks_for(a.rows, kThreads / a.width, kMaxGrid), dim3(kThreads), a);
  }
  a.width = static_cast<int>(std::min<int64_t>((threads + kWarp - 1) / kWarp * kWarp, kMostThreads));
  const auto kernel =
      vectors <= int64_t{a.width} * kVectors ? quantize_rows_kernel<X, true, true> : quantize_rows_kernel<X, true, false>;
  launch(at, kernel, blocks_for(a.rows, 1, kMaxGrid), dim3(static_cast<unsigned>(a.width)), a);
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsParams& p, int64_t q_stride, const Launch& at) {
  if (p.rows == 0) return;
  with_float_type(p.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>) launch_rows<X>(p, q_stride, at);
  });
}

}  // namespace quant_ops
