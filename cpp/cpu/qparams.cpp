// choose_qparams on the CPU: the scale and zero point of every slice from the range of its data (choose_qparams_of in
// arithmetic.h). Minimum and maximum do not depend on the order they are taken in, so any split over threads gives the same bits.
// Ranges are taken along a slice where its elements are neighbours in memory, down the rows of a matrix where the slices are.
#include <algorithm>
#include <cmath>

#include "contract/dtypes.h"
#include "contract/iteration.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/staging.h"
#include "kernels/table.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 16;
constexpr int64_t kColumnsPerTask = 1024;  // their ranges stay in the L1 cache

template <class T>
struct MinMax {
  T min = INFINITY, max = -INFINITY;
  bool finite = true;

  void merge(const MinMax& other) {
    min = std::min(min, other.min);
    max = std::max(max, other.max);
    finite = finite && other.finite;
  }
};

// Of no elements, for kernels to fold into.
constexpr Range kEmpty{INFINITY, -INFINITY, 0};
MinMax<float> min_max(const Range& range) { return {.min = range.min, .max = range.max, .finite = range.abs_bits < 0x7f800000u}; }

// Of elements [begin, end) of a slice.
template <class X>
MinMax<Compute<X>> part_range(const ChooseQParams& p, const Iteration& reduced, int64_t slice, int64_t begin, int64_t end) {
  const int64_t step = inner_stride(reduced, 0);
  const X* slice_x = static_cast<const X*>(p.x) + slice;
  if constexpr (std::is_same_v<X, double>) {
    MinMax<double> r;
    for_each_run(reduced, begin, end, [&](const int64_t* offset, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const double v = slice_x[offset[0] + i * step];
        r.merge({v, v, v - v == 0.0});
      }
    });
    return r;
  } else {
    Range range = kEmpty;
    if (reduced.ndim == 1 && step == 1) {
      kernels().range(slice_x + begin, p.x_dtype, end - begin, false, &range);
      return min_max(range);
    }
    for_each_run(reduced, begin, end, [&](const int64_t* offset, int64_t n) {
      const X* x = slice_x + offset[0];
      if (step == 1 || n == 1) return kernels().range(x, p.x_dtype, n, false, &range);
      Stage<X> stage;
      for (int64_t i = 0; i < n; i += kStage) {
        const int64_t count = std::min(kStage, n - i);
        kernels().range(stage.contiguous(x + i * step, step, count), p.x_dtype, count, false, &range);
      }
    });
    return min_max(range);
  }
}

template <class T>
void write_qparams(const ChooseQParams& p, int64_t at, const MinMax<T>& r, bool empty) {
  const auto q = empty ? choose_qparams_of<T>(T(0), T(0), true, p.qmin, p.qmax, p.asymmetric)
                       : choose_qparams_of<T>(r.min, r.max, r.finite, p.qmin, p.qmax, p.asymmetric);
  static_cast<T*>(p.scale)[at] = q.scale;
  p.zero_point[at] = q.zero_point;
}

// Parts that each of `slices` is cut into, so that few long ones occupy all threads.
int64_t parts_of(int64_t slices, int64_t length, int64_t elements) {
  const int64_t wanted = ceil_div(4 * parallel_threads(), std::max<int64_t>(slices, 1));
  return parallel_threads() == 1
             ? 1
             : std::clamp<int64_t>(elements / kElementsPerThread, 1, std::max<int64_t>(1, std::min(length, wanted)));
}

template <class X>
void choose_along_slices(const ChooseQParams& p, const Reduction& r) {
  using T = Compute<X>;
  const int64_t slices = numel(r.kept), length = numel(r.reduced), parts = parts_of(slices, length, length);
  const Scratch scratch(slices * parts * int64_t{sizeof(MinMax<T>)});
  auto* partial = scratch.at<MinMax<T>>(0);
  parallel_for(slices * parts, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, length / parts)),
               [&](int64_t begin, int64_t end) {
                 Walk walk;
                 walk.seek(r.kept, r.kept.ndim, begin / parts);
                 int64_t part = begin % parts;
                 for (int64_t task = begin; task < end; ++task) {
                   partial[task] = part_range<X>(p, r.reduced, walk.offset[0], part * length / parts, (part + 1) * length / parts);
                   if (++part == parts) {
                     part = 0;
                     walk.next(r.kept, r.kept.ndim);
                   }
                 }
               });
  Walk walk;
  for (int64_t s = 0; s < slices; ++s) {
    MinMax<T> all = partial[s * parts];
    for (int64_t part = 1; part < parts; ++part) all.merge(partial[s * parts + part]);
    write_qparams(p, walk.offset[1], all, length == 0);
    walk.next(r.kept, r.kept.ndim);
  }
}

// Slices that are neighbours in memory along the last kept dimension: the columns of a matrix whose rows are the reduced elements.
bool slices_are_columns(const Reduction& r) {
  const int last = r.kept.ndim - 1;
  return last >= 0 && r.kept.size[last] >= kFewestColumns && r.kept.stride[0][last] == 1 && inner_stride(r.reduced, 0) != 1;
}

// Rows [begin, end) of some columns of one matrix, folded into run's ranges. `x` is the first of these columns in the first row.
template <class X>
void find_column_ranges(const Reduction& r, int64_t begin, int64_t end, const X* x, RangeColumnsRun* run) {
  run->x_row = inner_stride(r.reduced, 0);
  std::fill_n(run->min, run->columns, kEmpty.min);
  std::fill_n(run->max, run->columns, kEmpty.max);
  std::fill_n(run->abs_bits, run->columns, kEmpty.abs_bits);
  for_each_run(r.reduced, begin, end, [&](const int64_t* offset, int64_t n) {
    run->x = x + offset[0];
    run->rows = n;
    kernels().range_columns(*run);
  });
}

template <class X>
void choose_down_columns(const ChooseQParams& p, const Reduction& r) {
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
               std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, length / parts * width)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t column = task % column_blocks * kColumnsPerTask, part = task / column_blocks % parts;
                   const int64_t matrix = task / column_blocks / parts, at = part * slices + matrix * columns + column;
                   Walk walk;
                   walk.seek(r.kept, outer, matrix);
                   RangeColumnsRun run;
                   run.dtype = p.x_dtype;
                   run.columns = std::min(kColumnsPerTask, columns - column);
                   run.min = min + at;
                   run.max = max + at;
                   run.abs_bits = abs_bits + at;
                   find_column_ranges(r, part * length / parts, (part + 1) * length / parts,
                                      static_cast<const X*>(p.x) + walk.offset[0] + column, &run);
                 }
               });
  Walk walk;
  for (int64_t s = 0; s < slices; ++s) {
    MinMax<float> all;
    for (int64_t i = s; i < slices * parts; i += slices) all.merge(min_max({min[i], max[i], abs_bits[i]}));
    write_qparams(p, walk.offset[1], all, length == 0);
    walk.next(r.kept, r.kept.ndim);
  }
}

template <class X>
void choose_qparams_typed(const ChooseQParams& p) {
  Reduction r = p.range;
  coalesce(&r.kept);
  sort_and_coalesce(&r.reduced, 0);
  if constexpr (!std::is_same_v<X, double>) {
    if (slices_are_columns(r)) return choose_down_columns<X>(p, r);
  }
  choose_along_slices<X>(p, r);
}

}  // namespace

void choose_qparams_cpu(const ChooseQParams& p) {
  with_float_type(p.x_dtype, [&](auto* x) { choose_qparams_typed<std::remove_pointer_t<decltype(x)>>(p); });
}

}  // namespace quant_ops
