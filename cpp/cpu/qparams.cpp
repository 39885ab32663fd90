// choose_qparams and quantize_rows on the CPU: scales and zero points from the range of the data (choose_qparams_of in
// arithmetic.h). Minimum and maximum do not depend on the order they are taken in, so any split over threads gives the same bits.
#include <algorithm>
#include <cmath>

#include "contract/iteration.h"
#include "cpu/activations.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace quant_ops {
namespace {

constexpr int64_t kGrain = int64_t{1} << 16;

constexpr int64_t kColumns = 1024;  // of a matrix at a time: their ranges stay in the first cache
constexpr int64_t kStage = 512;     // strided elements gathered on the stack

template <class T>
struct SliceRange {
  T min, max;
  bool finite;

  void merge(const SliceRange& other) {
    min = std::min(min, other.min);
    max = std::max(max, other.max);
    finite = finite && other.finite;
  }
};

constexpr Range kEmpty{INFINITY, -INFINITY, 0};

// Of elements [begin, end) of a slice.
template <class X>
SliceRange<Compute<X>> part_range(const ChooseQParams& p, const Iteration& reduced, int64_t slice, int64_t begin, int64_t end) {
  const int64_t step = inner_stride(reduced, 0);
  const X* slice_x = static_cast<const X*>(p.x) + slice;
  if constexpr (std::is_same_v<X, double>) {
    SliceRange<double> r{INFINITY, -INFINITY, true};
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
      return {range.min, range.max, range.abs_bits < 0x7f800000u};
    }
    for_each_run(reduced, begin, end, [&](const int64_t* offset, int64_t n) {
      const X* x = slice_x + offset[0];
      if (step == 1 || n == 1) return kernels().range(x, p.x_dtype, n, false, &range);
      X stage[kStage];
      for (int64_t i = 0; i < n; i += kStage) {
        const int64_t count = std::min(kStage, n - i);
        for (int64_t j = 0; j < count; ++j) stage[j] = x[(i + j) * step];
        kernels().range(stage, p.x_dtype, count, false, &range);
      }
    });
    return {range.min, range.max, range.abs_bits < 0x7f800000u};
  }
}

template <class T>
void write_qparams(const ChooseQParams& p, int64_t at, const SliceRange<T>& r, bool empty) {
  const auto q = empty ? choose_qparams_of<T>(T(0), T(0), true, p.qmin, p.qmax, p.asymmetric)
                       : choose_qparams_of<T>(r.min, r.max, r.finite, p.qmin, p.qmax, p.asymmetric);
  static_cast<T*>(p.scale)[at] = q.scale;
  p.zero_point[at] = q.zero_point;
}

// Parts that each of `slices` is cut into, so that few long ones occupy all threads.
int64_t parts_of(int64_t slices, int64_t length, int64_t elements) {
  const int64_t wanted = ceil_div(4 * parallel_threads(), std::max<int64_t>(slices, 1));
  return parallel_threads() == 1 ? 1 : std::clamp<int64_t>(elements / kGrain, 1, std::max<int64_t>(1, std::min(length, wanted)));
}

template <class X>
void choose_along_slices(const ChooseQParams& p, const Reduction& r) {
  using T = Compute<X>;
  const int64_t slices = numel(r.kept), length = numel(r.reduced), parts = parts_of(slices, length, length);
  Scratch scratch;
  const int64_t at = scratch.add(slices * parts * static_cast<int64_t>(sizeof(SliceRange<T>)));
  scratch.allocate();
  auto* partial = scratch.at<SliceRange<T>>(at);
  parallel_for(slices * parts, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length / parts)),
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
    SliceRange<T> all = partial[s * parts];
    for (int64_t part = 1; part < parts; ++part) all.merge(partial[s * parts + part]);
    write_qparams(p, walk.offset[1], all, length == 0);
    walk.next(r.kept, r.kept.ndim);
  }
}

// Slices that are neighbours in memory along the last kept dimension: down the rows, all columns of a row at a time.
constexpr int64_t kFewColumns = 8;  // fewer are gathered slice by slice: vectors would be mostly empty
bool slices_are_columns(const Reduction& r) {
  const int last = r.kept.ndim - 1;
  return last >= 0 && r.kept.size[last] >= kFewColumns && r.kept.stride[0][last] == 1 && inner_stride(r.reduced, 0) != 1;
}

template <class X>
void choose_down_columns(const ChooseQParams& p, const Reduction& r) {
  const int outer = r.kept.ndim - 1;
  const int64_t slices = numel(r.kept), length = numel(r.reduced), columns = r.kept.size[outer];
  const int64_t blocks = ceil_div(columns, kColumns), groups = slices / columns, width = std::min(columns, kColumns);
  const int64_t parts = parts_of(groups * blocks, length, length * width);
  Scratch scratch;  // a range for each slice and part
  const int64_t at_min = scratch.add(slices * parts * 4), at_max = scratch.add(slices * parts * 4);
  const int64_t at_bits = scratch.add(slices * parts * 4);
  scratch.allocate();
  float *min = scratch.at<float>(at_min), *max = scratch.at<float>(at_max);
  uint32_t* abs_bits = scratch.at<uint32_t>(at_bits);
  std::fill_n(min, slices * parts, kEmpty.min);
  std::fill_n(max, slices * parts, kEmpty.max);
  std::fill_n(abs_bits, slices * parts, kEmpty.abs_bits);
  parallel_for(groups * parts * blocks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length / parts * width)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t column = task % blocks * kColumns, part = task / blocks % parts, group = task / blocks / parts;
                   const int64_t at = part * slices + group * columns + column;
                   Walk walk;
                   walk.seek(r.kept, outer, group);
                   RangeColumnsRun run;
                   run.dtype = p.x_dtype;
                   run.columns = std::min(kColumns, columns - column);
                   run.x_row = inner_stride(r.reduced, 0);
                   run.min = min + at;
                   run.max = max + at;
                   run.abs_bits = abs_bits + at;
                   for_each_run(r.reduced, part * length / parts, (part + 1) * length / parts,
                                [&](const int64_t* offset, int64_t n) {
                                  run.x = static_cast<const X*>(p.x) + walk.offset[0] + column + offset[0];
                                  run.rows = n;
                                  kernels().range_columns(run);
                                });
                 }
               });
  Walk walk;
  for (int64_t s = 0; s < slices; ++s) {
    SliceRange<float> all{kEmpty.min, kEmpty.max, true};
    for (int64_t i = s; i < slices * parts; i += slices) all.merge({min[i], max[i], abs_bits[i] < 0x7f800000u});
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
  switch (p.x_dtype) {
    case DType::kFloat32: return choose_qparams_typed<float>(p);
    case DType::kFloat16: return choose_qparams_typed<Half>(p);
    case DType::kBFloat16: return choose_qparams_typed<BFloat16>(p);
    default: return choose_qparams_typed<double>(p);
  }
}

void quantize_rows_cpu(const QuantizeRowsParams& p) {
  const KernelTable& table = kernels();
  InputParams in{};
  in.mode = p.asymmetric ? Activation::kDynamicAsymmetric : Activation::kDynamic;
  parallel_for(p.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.columns)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const char* x = static_cast<const char*>(p.x) + row * p.x_stride * dtype_bytes(p.x_dtype);
      Range range{0.0f, 0.0f, 0};
      table.range(x, p.x_dtype, p.columns, only_magnitude(in), &range);
      const RowCodes codes = row_codes(in, row, range);
      p.scale[row] = codes.scale;
      p.zero_point[row] = codes.zero_point - kSignedOffset;
      const float reciprocal = reciprocal_of(codes.scale);
      QuantizeRun run;
      run.x = x;
      run.y = p.q + row * p.columns;
      run.n = p.columns;
      run.scale = p.scale + row;
      run.reciprocal = &reciprocal;
      run.tie = tie_for(255);
      run.zero_point = p.zero_point + row;
      run.scale_step = run.zero_step = 0;
      run.qmin = p.asymmetric ? -128 : -127;
      run.qmax = 127;
      run.x_dtype = p.x_dtype;
      run.y_dtype = DType::kInt8;
      run.simulate = false;
      table.quantize(run);
    }
  });
}

}  // namespace quant_ops
