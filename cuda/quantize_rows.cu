// quantize_rows on CUDA, which is the first half of a dynamic int8_linear too: each row's scale from its range, then its codes.
//
//   scale, z = choose_qparams_of(min, max);  q = clamp(rne(x / scale) + z, qmin, 127),  qmin -127 symmetric, -128 asymmetric
//
// A row is read once: its threads keep it in registers until its range is known. A short row takes some lanes of a warp, a longer
// one a block. A row beyond the registers of a block is read twice, the second time from the L2 cache. x is read by aligned
// vectors, and so are the codes written: where the vectors of both begin at different elements, lanes exchange codes. Bits are
// those of cpp/cpu/quantize_rows.cpp. Read next: RangeCodes in quotient.cuh, range.cuh.
#include <algorithm>

#include "device/range.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 128;      // of a block of short rows
constexpr int kMostThreads = 512;  // of a block of one row; more would leave a thread too few registers
constexpr int kMostHeld = 8;       // 16-byte vectors that a thread keeps

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
  BlockRows block{};
};

// How rows lie in memory.
enum class Rows {
  kWhole,  // every row is whole vectors, which are aligned, and so are their codes
  kAny,
  kLong,  // any, and not held in registers
};

// A row as one of its threads sees it, by vectors of V elements that are aligned in memory: the first one may begin before the row,
// the last one may end behind it. Rows that are read twice may be longer than an int counts.
template <class X, class Index>
struct Row {
  static constexpr int V = 16 / sizeof(X);
  using Codes = Bytes<V>;

  const X* x;
  int8_t* q;
  Index columns;
  Index readable_from, readable_to;  // elements around the row, less than a vector on each side, that x holds as well

  __device__ __forceinline__ Row(const QuantizeRowsArgs<X>& a, int64_t row) {
    const int64_t before = row * a.x_stride, behind = (a.rows - 1 - row) * a.x_stride;
    x = a.x + computed_here(before);
    q = a.q + computed_here(row * a.q_stride);
    columns = static_cast<Index>(a.columns);
    readable_from = before < V ? -static_cast<Index>(before) : 1 - V;
    readable_to = columns + (behind < V ? static_cast<Index>(behind) : V - 1);
  }

  // Elements e, e + 1, ..., e + V - 1, or zeros in place of those outside of the row.
  __device__ __forceinline__ Vector<X, V> load(Index e) const {
    constexpr bool kReadTwice = sizeof(Index) > sizeof(int);
    if (e >= readable_from && e + V <= readable_to) return kReadTwice ? load_vector<V>(x + e) : load_streaming<V>(x + e);
    X elements[V] = {};
    if (e < columns) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (e + i >= 0 && e + i < columns) elements[i] = x[e + i];
    }
    Vector<X, V> v;
    memcpy(&v.words, elements, sizeof(v.words));
    return v;
  }
  __device__ __forceinline__ void clear_outside(Index e, Vector<X, V>* v) const {
    if (e >= columns || (e >= 0 && e + V <= columns)) return;
    constexpr int kPerWord = 4 / sizeof(X);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (e + i < 0 || e + i >= columns) v->words.at[i / kPerWord] &= kPerWord == 1 ? 0u : 0xffffu << (16 - i % kPerWord * 16);
  }

  // The codes of elements e + from, ..., e + to - 1 that exist.
  __device__ __forceinline__ void store_bytes(Index e, Codes codes, int from, int to) const {
    from = e + from < 0 ? static_cast<int>(-e) : from;
    to = e + to > columns ? static_cast<int>(columns - e) : to;
#pragma unroll 1
    for (int i = from; i < to; ++i) q[e + i] = static_cast<int8_t>(codes >> (8 * i));
  }
  __device__ __forceinline__ void store_aligned(Index e, Codes codes) const {
    expect_aligned(q + e, sizeof(Codes));
    *reinterpret_cast<Codes*>(q + e) = codes;
  }
  // The codes of a vector, which in memory may belong to two vectors. The first `head` codes complete the vector in memory that the
  // lane before began, and codes of the lane behind, if it holds the next ones of this row, complete the one that begins here. All
  // lanes take part.
  __device__ __forceinline__ void store_exchanged(Index e, Codes codes, int lanes, bool active) const {
    const int lane = static_cast<int>(threadIdx.x % kWarp), place = lane % lanes;
    const Codes next = __shfl_sync(0xffffffffu, codes, lane + 1);
    if (!active || e >= columns) return;
    const int head = static_cast<int>((0u - reinterpret_cast<uintptr_t>(q + e)) % V);
    const Index begin = e + head;
    const bool whole = begin >= 0 && begin + V <= columns && (head == 0 || place != lanes - 1);
    const bool whole_before = begin >= V && begin <= columns && place != 0;
    if (whole) store_aligned(begin, head == 0 ? codes : codes >> (8 * head) | next << (8 * (V - head)));
    store_bytes(e, codes, whole_before ? head : 0, whole ? head : V);
  }
};

// The vectors of a row, kHeld of them in registers of each of its threads.
template <class X, bool kAsymmetric, int kHeld, Rows kRows>
__global__ void __launch_bounds__(kMostThreads, 1) quantize_rows_kernel(const QO_GRID_CONSTANT QuantizeRowsArgs<X> a) {
  constexpr bool kLoops = kRows == Rows::kLong, kWhole = kRows == Rows::kWhole;
  using Index = std::conditional_t<kLoops, int64_t, int>;
  using Bounds = quant_ops::Bounds<X, kAsymmetric>;
  using RowOfX = Row<X, Index>;
  constexpr int V = RowOfX::V;
  alignas(16) __shared__ uint32_t shared[Bounds::kWords][kWarp];
  let_next_kernel_start();

  const int in_block = static_cast<int>(threadIdx.x) >> a.block.shift;
  const int thread = static_cast<int>(threadIdx.x) - in_block * a.block.width;
  const int64_t own = int64_t{blockIdx.x} * a.block.rows + in_block;
  const bool active = own < a.rows;
  const int64_t row_index = active ? own : a.rows - 1;
  const RowOfX row(a, row_index);
  const Index step = static_cast<Index>(a.block.width) * V, batch = step * kHeld;
  const Index before = kWhole || row.columns == 0 ? 0 : misalignment<V>(row.x), start = thread * V - before;
  const Index end = kLoops ? row.columns + before + start : start + 1;  // of the batches; alike for all threads

  Vector<X, V> in[kHeld];
  RangeWords<X, kAsymmetric> extremes;
  for (Index base = start; base < end; base += batch) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const Index e = base + u * step;
      if constexpr (kWhole)
        in[u] = e < row.columns ? load_streaming<V>(row.x + e) : Vector<X, V>{};
      else
        in[u] = row.load(e);
    }
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if constexpr (!kWhole) row.clear_outside(base + u * step, &in[u]);
#pragma unroll
      for (int w = 0; w < 4; ++w) extremes.add(in[u].words.at[w]);
    }
    if constexpr (!kLoops) break;
  }
  Bounds bounds = Bounds::of(extremes);
  share_bounds(&bounds, a.block.width, shared);

  // Every thread computes the parameters, which costs less than passing them on.
  const Range<float> range = bounds.range();
  const RangeCodes int8 = RangeCodes::of(quantizer_of(range, kAsymmetric));
  if (active && thread == 0) {
    a.scale[row_index] = int8.quantizer.scale;
    if (a.zero_point) a.zero_point[row_index] = int8.quantizer.zero_point;
  }
  const bool fast = active && int8.is_usable();
  if (fast || !kWhole) {
    for (Index base = start; base < end; base += batch) {
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const Index e = base + u * step;
        if (kWhole && e >= row.columns) break;
        if constexpr (kLoops) in[u] = row.load(e);
        const Bytes<V> codes = codes_in_range<kAsymmetric>(in[u], int8);
        if constexpr (kWhole)
          row.store_aligned(e, codes);
        else
          row.store_exchanged(e, codes, a.block.width < kWarp ? a.block.width : kWarp, fast);
      }
      if constexpr (!kLoops) break;
    }
  }
  if (!active) return;
  if (!fast) {
#pragma unroll 1
    for (Index e = thread; e < row.columns; e += a.block.width) row.q[e] = static_cast<int8_t>(int8.quantizer(widen(row.x[e])));
  }
  for (int64_t c = a.columns + thread; c < a.q_stride; c += a.block.width) row.q[c] = 0;
}

template <class X, bool kAsymmetric>
void launch_rows(const QuantizeRowsParams& p, int64_t q_stride, const Launch& at) {
  constexpr int64_t V = 16 / sizeof(X);
  QuantizeRowsArgs<X> a{.rows = p.rows,
                        .columns = p.columns,
                        .x = static_cast<const X*>(p.x),
                        .x_stride = p.x_stride,
                        .q = p.q,
                        .q_stride = q_stride,
                        .scale = p.scale,
                        .zero_point = p.zero_point};
  const bool aligned = is_aligned(a.x, 16) && (a.x_stride % V == 0 || a.rows == 1);
  const bool whole = aligned && a.columns % V == 0 && is_aligned(a.q, V) && (a.q_stride % V == 0 || a.rows == 1);
  const int64_t vectors = (a.columns + V - 1 + (aligned ? 0 : V - 1)) / V;  // at most, of memory that contains a row
  // The more a thread holds, the fewer threads wait for a row's range. But few elements are spread over all multiprocessors.
  const int64_t warps = a.rows * vectors / (kWarp * multiprocessors());  // of a multiprocessor, if threads hold one vector
  int held = !whole || warps >= 48 ? 4 : warps >= 16 ? 2 : 1;
  if (warps >= 48 && vectors > 256 * held) held = kMostHeld;
  while (held < kMostHeld && vectors > kMostThreads * held) held *= 2;
  const bool loops = vectors > kMostThreads * held;
  const int64_t threads = (vectors + held - 1) / held;
  a.block = block_rows_for(threads, kThreads, kMostThreads);
  const auto run = [&](auto kernel) {
    launch(at, kernel, blocks_for(a.rows, a.block.rows, kMaxGrid), dim3(static_cast<unsigned>(a.block.threads)), a);
  };
  if (loops) return run(quantize_rows_kernel<X, kAsymmetric, 4, Rows::kLong>);
  if (!whole)
    return run(held == 4 ? quantize_rows_kernel<X, kAsymmetric, 4, Rows::kAny>
                         : quantize_rows_kernel<X, kAsymmetric, kMostHeld, Rows::kAny>);
  switch (held) {
    case 1: return run(quantize_rows_kernel<X, kAsymmetric, 1, Rows::kWhole>);
    case 2: return run(quantize_rows_kernel<X, kAsymmetric, 2, Rows::kWhole>);
    case 4: return run(quantize_rows_kernel<X, kAsymmetric, 4, Rows::kWhole>);
    default: return run(quantize_rows_kernel<X, kAsymmetric, kMostHeld, Rows::kWhole>);
  }
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsParams& p, int64_t q_stride, const Launch& at) {
  if (p.rows == 0) return;
  with_float_type(p.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>)
      p.asymmetric ? launch_rows<X, true>(p, q_stride, at) : launch_rows<X, false>(p, q_stride, at);
  });
}

}  // namespace quant_ops
