// quantize_rows on CUDA, which is the first half of a dynamic int8_linear too: each row's scale from its range, then its codes.
//
//   scale, z = choose_qparams_of(min, max);  q = clamp(rne(x / scale) + z, qmin, 127),  qmin -127 symmetric, -128 asymmetric
//
// A row is read once: its threads keep it in registers until its range is known. A short row takes some lanes of a warp, a longer
// one a block. A row beyond the registers of 1024 threads is read twice, the second time from the L2 cache. Bits are those of
// cpp/cpu/qparams.cpp. Read next: range.cuh.
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

// The elements of a row as a thread sees them: vector u of a batch starts at element `first` + u * step, and may begin before the
// row or end behind it.
template <class X>
struct RowVectors {
  static constexpr int V = 16 / sizeof(X);
  const X* x;
  int64_t columns, step;
  Vector<X, V> in[kVectors];

  __device__ __forceinline__ void load(int64_t first) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (first + u * step < columns) in[u] = load_of_run<V>(x, first + u * step, columns);
  }
  __device__ __forceinline__ void add_to(Range<float>* range, int64_t first) const {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (first + u * step < columns) add_vector<V>(in[u], range);
  }
  __device__ __forceinline__ void store_codes(int8_t* q, int64_t first, const Quantizer& quantizer) const {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int64_t e = first + u * step;
      if (e >= columns) break;
      if (quantizer.is_fast()) {
        int8_t codes[V];
#pragma unroll
        for (int i = 0; i < V; ++i) codes[i] = static_cast<int8_t>(quantizer.fast(widen(in[u].get(i))));
        if (e >= 0 && e + V <= columns && misalignment<V>(q + e) == 0) {
          store_vector<V>(q + e, codes);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i)
            if (e + i >= 0 && e + i < columns) q[e + i] = codes[i];
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < V; ++i)
          if (e + i >= 0 && e + i < columns) q[e + i] = static_cast<int8_t>(quantizer.divided(widen(x[e + i])));
      }
    }
  }
};

// kBlock: a block per row, else `width` lanes. kHeld: the row fits the registers of its threads.
template <class X, bool kBlock, bool kHeld>
__global__ void __launch_bounds__(kBlock ? kMostThreads : kThreads)
    quantize_rows_kernel(const QO_GRID_CONSTANT QuantizeRowsArgs<X> a) {
  constexpr int V = 16 / sizeof(X);
  __shared__ Range<float> shared[kWarp];
  const int width = kBlock ? static_cast<int>(blockDim.x) : a.width, thread = kBlock ? threadIdx.x : threadIdx.x % width;
  const int64_t block_rows = kBlock ? 1 : kThreads / width, step = int64_t{width} * V, batch = step * kVectors;
  for (int64_t first_row = blockIdx.x * block_rows; first_row < a.rows; first_row += gridDim.x * block_rows) {
    const int64_t own = first_row + (kBlock ? 0 : threadIdx.x / width);
    const bool active = own < a.rows;
    const int64_t row = active ? own : a.rows - 1;
    int8_t* const q = a.q + row * a.q_stride;
    RowVectors<X> vectors;
    vectors.x = a.x + row * a.x_stride;
    vectors.columns = a.columns;
    vectors.step = step;
    const int64_t start = int64_t{thread} * V - (a.columns > 0 ? misalignment<V>(vectors.x) : 0);

    Range<float> range{0.0f, 0.0f};  // contains 0
    for (int64_t first = start; first < a.columns; first += batch) {
      vectors.load(first);
      vectors.add_to(&range, first);
      if constexpr (kHeld) break;
    }
    range = kBlock ? over_block(range, shared) : over_lanes(range, width);

    // Every thread computes the parameters, which costs less than passing them on.
    const int32_t lowest = a.asymmetric ? -128 : -127;
    const auto p = choose_qparams_of(range.min, range.max, range.finite(), lowest, kHighest, a.asymmetric);
    if (!active) continue;
    if (thread == 0) {
      a.scale[row] = p.scale;
      if (a.zero_point) a.zero_point[row] = p.zero_point;
    }

    const Quantizer quantizer = Quantizer::of(p.scale, p.zero_point, lowest, kHighest);
    for (int64_t first = start; first < a.columns; first += batch) {
      if constexpr (!kHeld) vectors.load(first);
      vectors.store_codes(q, first, quantizer);
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
  const int64_t vectors = (a.columns + V - 1 + (aligned ? 0 : V - 1)) / V;  // at most, of memory that contains a row
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
