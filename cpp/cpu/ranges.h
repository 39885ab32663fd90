// The range of every slice of a tensor: its smallest and largest element, and whether it holds NaN or infinities. They do not
// depend on the order they are taken in, so any split over threads gives the same. Ranges are taken along a slice where its
// elements are neighbours in memory, down the rows of a matrix where the slices are. For qparams.cpp and affine.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "contract/dtypes.h"
#include "contract/iteration.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/staging.h"
#include "kernels/log.h"
#include "kernels/table.h"

namespace quant_ops {

constexpr int64_t kElementsPerRangeThread = int64_t{1} << 16;
constexpr int64_t kColumnsPerTask = 1024;  // their ranges stay in the L1 cache

template <class T>
struct MinMax {
  T min = INFINITY, max = -INFINITY;
  bool finite = true, nan = false;

  void merge(const MinMax& other) {
    min = std::min(min, other.min);
    max = std::max(max, other.max);
    finite = finite && other.finite;
    nan = nan || other.nan;
  }
};

// Of no elements, for kernels to fold into.
constexpr Range kEmptyRange{INFINITY, -INFINITY, 0};
inline MinMax<float> min_max(const Range& range) {
  return {.min = range.min, .max = range.max, .finite = range.abs_bits < 0x7f800000u, .nan = range.abs_bits > 0x7f800000u};
}

// Of elements [begin, end) of a slice.
template <class X>
MinMax<Compute<X>> part_range(const X* slice_x, DType dtype, const Iteration& reduced, int64_t begin, int64_t end) {
  const int64_t step = inner_stride(reduced, 0);
  if constexpr (std::is_same_v<X, double>) {
    MinMax<double> r;
    for_each_run(reduced, begin, end, [&](const int64_t* offset, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const double v = slice_x[offset[0] + i * step];
        r.merge({v, v, v - v == 0.0, v != v});
      }
    });
    return r;
  } else {
    Range range = kEmptyRange;
    if (reduced.ndim == 1 && step == 1) {
      kernels().range(slice_x + begin, dtype, end - begin, false, &range);
      return min_max(range);
    }
    for_each_run(reduced, begin, end, [&](const int64_t* offset, int64_t n) {
      const X* x = slice_x + offset[0];
      if (step == 1 || n == 1) return kernels().range(x, dtype, n, false, &range);
      Stage<X> stage;
      for (int64_t i = 0; i < n; i += kStage) {
        const int64_t count = std::min(kStage, n - i);
        kernels().range(stage.contiguous(x + i * step, step, count), dtype, count, false, &range);
      }
    });
    return min_max(range);
  }
}

// Parts that each of `slices` is cut into, so that few long ones occupy all threads.
inline int64_t parts_of(int64_t slices, int64_t length, int64_t elements) {
  const int64_t wanted = ceil_div(4 * parallel_threads(), std::max<int64_t>(slices, 1));
  return parallel_threads() == 1
             ? 1
             : std::clamp<int64_t>(elements / kElementsPerRangeThread, 1, std::max<int64_t>(1, std::min(length, wanted)));
}

// Of a slice without elements.
template <class T>
constexpr MinMax<T> kNoElements = {.min = T(0), .max = T(0)};

template <class X, class Write>
void ranges_along_slices(const X* x, DType dtype, const Reduction& r, const Write& write) {
  using T = Compute<X>;
  const int64_t slices = numel(r.kept), length = numel(r.reduced), parts = parts_of(slices, length, length);
  const Scratch scratch(parts == 1 ? 0 : slices * parts * int64_t{sizeof(MinMax<T>)});
  auto* partial = scratch.at<MinMax<T>>(0);
  parallel_for(slices * parts, std::max<int64_t>(1, kElementsPerRangeThread / std::max<int64_t>(1, length / parts)),
               [&](int64_t begin, int64_t end) {
                 Walk walk;
                 walk.seek(r.kept, r.kept.ndim, begin / parts);
                 int64_t part = begin % parts;
                 for (int64_t task = begin; task < end; ++task) {
                   const MinMax<T> range =
                       part_range(x + walk.offset[0], dtype, r.reduced, part * length / parts, (part + 1) * length / parts);
                   if (parts == 1)
                     write(walk.offset[1], length == 0 ? kNoElements<T> : range);
                   else
                     partial[task] = range;
                   if (++part == parts) {
                     part = 0;
                     walk.next(r.kept, r.kept.ndim);
                   }
                 }
               });
  if (parts == 1) return;
  Walk walk;
  for (int64_t s = 0; s < slices; ++s) {
    MinMax<T> all = partial[s * parts];
    for (int64_t part = 1; part < parts; ++part) all.merge(partial[s * parts + part]);
    write(walk.offset[1], length == 0 ? kNoElements<T> : all);
    walk.next(r.kept, r.kept.ndim);
  }
}

// Slices that are neighbours in memory along the last kept dimension: the columns of a matrix whose rows are the reduced elements.
inline bool slices_are_columns(const Reduction& r) {
  const int last = r.kept.ndim - 1;
  return last >= 0 && r.kept.size[last] >= kFewestColumns && r.kept.stride[0][last] == 1 && inner_stride(r.reduced, 0) != 1;
}

// Rows [begin, end) of some columns of one matrix, folded into run's ranges. `x` is the first of these columns in the first row.
template <class X>
void find_column_ranges(const Reduction& r, int64_t begin, int64_t end, const X* x, RangeColumnsRun* run) {
  run->x_row = inner_stride(r.reduced, 0);
  std::fill_n(run->min, run->columns, kEmptyRange.min);
  std::fill_n(run->max, run->columns, kEmptyRange.max);
  std::fill_n(run->abs_bits, run->columns, kEmptyRange.abs_bits);
  for_each_run(r.reduced, begin, end, [&](const int64_t* offset, int64_t n) {
    run->x = x + offset[0];
    run->rows = n;
    kernels().range_columns(*run);
  });
}

template <class X, class Write>
void ranges_down_columns(const X* x, DType dtype, const Reduction& r, const Write& write) {
  const int outer = r.kept.ndim - 1;
  const int64_t slices = numel(r.kept), length = numel(r.reduced), columns = r.kept.size[outer], matrices = slices / columns;
  const int64_t column_blocks = ceil_div(columns, kColumnsPerTask), width = std::min(columns, kColumnsPerTask);
  const int64_t parts = parts_of(matrices * column_blocks, length, length * width);
  ScratchLayout layout;  // a range for each part and slice
  const int64_t min_at = layout.add(slices * parts * 4), max_at = layout.add(slices * parts * 4);
  const int64_t bits_at = layout.add(slices * parts * 4);
  const Scratch scratch(layout.bytes);
  float *min = scratch.at<float>(min_at), *max = scratch.at<float>(max_at);
  uint32_t* abs_bits = scratch.at<uint32_t>(bits_at);
  parallel_for(matrices * parts * column_blocks,
               std::max<int64_t>(1, kElementsPerRangeThread / std::max<int64_t>(1, length / parts * width)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t column = task % column_blocks * kColumnsPerTask, part = task / column_blocks % parts;
                   const int64_t matrix = task / column_blocks / parts, at = part * slices + matrix * columns + column;
                   Walk walk;
                   walk.seek(r.kept, outer, matrix);
                   RangeColumnsRun run;
                   run.dtype = dtype;
                   run.columns = std::min(kColumnsPerTask, columns - column);
                   run.min = min + at;
                   run.max = max + at;
                   run.abs_bits = abs_bits + at;
                   find_column_ranges(r, part * length / parts, (part + 1) * length / parts, x + walk.offset[0] + column, &run);
                 }
               });
  Walk walk;
  for (int64_t s = 0; s < slices; ++s) {
    MinMax<float> all;
    for (int64_t i = s; i < slices * parts; i += slices) all.merge(min_max({min[i], max[i], abs_bits[i]}));
    write(walk.offset[1], length == 0 ? kNoElements<float> : all);
    walk.next(r.kept, r.kept.ndim);
  }
}

// Calls write(where the slice's result is, range), from any thread, for the slices of a Reduction whose operands are x and (kept)
// the result.
template <class X, class Write>
void for_each_range(const void* x, DType dtype, Reduction r, const Write& write) {
  coalesce(&r.kept);
  sort_and_coalesce(&r.reduced, 0);
  if constexpr (std::is_same_v<X, double>) {
    log_kernel(one_by_one);
  } else if (slices_are_columns(r)) {
    log_entries({"range_columns"});
    return ranges_down_columns(static_cast<const X*>(x), dtype, r, write);
  } else {
    log_entries({"range"});
  }
  ranges_along_slices(static_cast<const X*>(x), dtype, r, write);
}

}  // namespace quant_ops
