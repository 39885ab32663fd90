// choose_qparams and quantize_rows on the CPU: scales and zero points from the range of the data (choose_qparams_of in
// quant_math.h). Minimum and maximum do not depend on the order they are taken in, so any split over threads gives the same bits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "igemm.h"
#include "parallel.h"
#include "strided.h"

namespace quant_ops {
namespace {

constexpr int64_t kGrain = int64_t{1} << 16;

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

template <class X>
SliceRange<Compute<X>> part_range(const ChooseQParams& p, const Iteration& reduced, int64_t slice, int64_t begin, int64_t end) {
  using T = Compute<X>;
  SliceRange<T> r{T(0), T(0), true};
  bool first = true;
  const auto include = [&](T low, T high, bool finite) {
    r.min = first ? low : std::min(r.min, low);
    r.max = first ? high : std::max(r.max, high);
    r.finite = r.finite && finite;
    first = false;
  };
  for_each_run(reduced, begin, end, [&](const int64_t* offset, int64_t n) {
    const X* x = static_cast<const X*>(p.x) + slice + offset[0];
    if constexpr (!std::is_same_v<X, double>) {
      if (inner_stride(reduced, 0) == 1) {
        Range range{INFINITY, -INFINITY, 0};
        kernels().range(x, p.x_dtype, n, false, &range);
        return include(range.min, range.max, range.abs_bits < 0x7f800000u);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const T v = to_compute(x[i * inner_stride(reduced, 0)]);
      include(v, v, v - v == T(0));
    }
  });
  return r;
}

template <class X>
void choose_qparams_typed(const ChooseQParams& p) {
  using T = Compute<X>;
  Reduction r = p.range;
  coalesce(&r.kept);
  sort_and_coalesce(&r.reduced, 0);
  const int64_t slices = numel(r.kept), length = numel(r.reduced);
  const int64_t parts = std::clamp<int64_t>(length / kGrain, 1, std::max<int64_t>(1, 256 / std::max<int64_t>(slices, 1)));
  std::vector<SliceRange<T>> partial(static_cast<size_t>(slices * parts));
  parallel_for(slices * parts, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length / parts)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   Walk walk;
                   walk.seek(r.kept, r.kept.ndim, task / parts);
                   const int64_t part = task % parts;
                   partial[static_cast<size_t>(task)] =
                       part_range<X>(p, r.reduced, walk.offset[0], part * length / parts, (part + 1) * length / parts);
                 }
               });
  for (int64_t s = 0; s < slices; ++s) {
    SliceRange<T> all = partial[static_cast<size_t>(s * parts)];
    for (int64_t part = 1; part < parts; ++part) all.merge(partial[static_cast<size_t>(s * parts + part)]);
    Walk walk;
    walk.seek(r.kept, r.kept.ndim, s);
    const auto q = choose_qparams_of<T>(all.min, all.max, all.finite, p.qmin, p.qmax, p.asymmetric);
    static_cast<T*>(p.scale)[walk.offset[1]] = q.scale;
    p.zero_point[walk.offset[1]] = q.zero_point;
  }
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
      QuantizeRun run;
      run.x = x;
      run.y = p.q + row * p.columns;
      run.n = p.columns;
      run.scale = p.scale + row;
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
