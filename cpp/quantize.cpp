// quant_tensor_forward, quant_tensor_backward and dequant_tensor on the CPU.
//
//   q = clamp(rne(x / scale) + zero_point, qmin, qmax),  x^ = (q - zero_point) * scale
//
// Tensors are walked as runs over the innermost dimension: contiguous runs go to the vector kernels of the table, everything else
// (strided, float64, codes wider than 24 bits) to the scalar functions of quant_math.h. Both give the same bits.
#include <algorithm>
#include <vector>

#include "dtypes.h"
#include "isa/kernels.h"
#include "parallel.h"
#include "strided.h"

namespace quant_ops {
namespace {

constexpr int64_t kGrain = int64_t{1} << 15;  // elements worth a thread

const void* element(const void* p, DType dtype, int64_t offset) {
  return static_cast<const char*>(p) + offset * dtype_bytes(dtype);
}
void* element(void* p, DType dtype, int64_t offset) { return static_cast<char*>(p) + offset * dtype_bytes(dtype); }

// Vector kernels take runs whose data is contiguous and whose scale and zero point step by 0 or 1.
bool is_vector_run(const Iteration& it, int data_operands) {
  for (int o = 0; o < data_operands; ++o)
    if (inner_stride(it, o) != 1 && it.ndim > 0) return false;
  for (int o = data_operands; o < it.operands; ++o)
    if (inner_stride(it, o) != 0 && inner_stride(it, o) != 1) return false;
  return true;
}

// ---- one strided run, element by element ----------------------------------------------------------------------------

template <class X, class Y>
void quantize_strided(const QuantizeParams& p, const Iteration& it, const int64_t* offset, int64_t n) {
  using T = Compute<X>;
  const X* x = static_cast<const X*>(p.x) + offset[0];
  Y* y = static_cast<Y*>(p.y) + offset[1];
  const T* scale = static_cast<const T*>(p.scale) + offset[2];
  const int32_t* zero = p.zero_point + offset[3];
  const int64_t sx = inner_stride(it, 0), sy = inner_stride(it, 1), ss = inner_stride(it, 2), sz = inner_stride(it, 3);
  for (int64_t i = 0; i < n; ++i) {
    const double lo = static_cast<double>(p.qmin) - zero[i * sz], hi = static_cast<double>(p.qmax) - zero[i * sz];
    const T s = scale[i * ss];
    const double steps = clamp_steps<double>(quantize_steps<T>(to_compute(x[i * sx]), s), lo, hi);
    if constexpr (std::is_integral_v<Y>)
      y[i * sy] = static_cast<Y>(steps_to_code(steps, zero[i * sz], p.qmin, p.qmax));
    else
      from_compute(static_cast<T>(steps) * s, &y[i * sy]);
  }
}

template <class X>
void straight_through_strided(const QuantizeBackwardParams& p, const Iteration& it, const int64_t* offset, int64_t n) {
  using T = Compute<X>;
  const X* x = static_cast<const X*>(p.x) + offset[0];
  const X* grad = static_cast<const X*>(p.grad) + offset[1];
  X* dx = static_cast<X*>(p.dx) + offset[2];
  const T* scale = static_cast<const T*>(p.scale) + offset[3];
  const int32_t* zero = p.zero_point + offset[4];
  const int64_t sx = inner_stride(it, 0), sg = inner_stride(it, 1), sd = inner_stride(it, 2);
  const int64_t ss = inner_stride(it, 3), sz = inner_stride(it, 4);
  for (int64_t i = 0; i < n; ++i) {
    const double lo = static_cast<double>(p.qmin) - zero[i * sz], hi = static_cast<double>(p.qmax) - zero[i * sz];
    const bool pass = straight_through<T>(to_compute(x[i * sx]), scale[i * ss], static_cast<T>(lo), static_cast<T>(hi)).pass;
    if (pass)
      dx[i * sd] = grad[i * sg];
    else
      from_compute(T(0), &dx[i * sd]);
  }
}

// ---- gradient of the scale or of the zero point ---------------------------------------------------------------------

// The sum of one chunk of a slice, in the order that ops.h fixes.
template <class X, bool kZeroPoint>
double chunk_sum(const QuantizeBackwardParams& p, const Iteration& reduced, const int64_t* slice, int64_t begin, int64_t end) {
  using T = Compute<X>;
  double lane[kReduceLanes] = {};
  int64_t j = 0;
  for_each_run(reduced, begin, end, [&](const int64_t* offset, int64_t n) {
    const X* x = static_cast<const X*>(p.x) + slice[0] + offset[0];
    const X* grad = static_cast<const X*>(p.grad) + slice[1] + offset[1];
    const T* scale = static_cast<const T*>(p.scale) + slice[2] + offset[2];
    const int32_t* zero = p.zero_point + slice[3] + offset[3];
    const int64_t sx = inner_stride(reduced, 0), sg = inner_stride(reduced, 1);
    const int64_t ss = inner_stride(reduced, 2), sz = inner_stride(reduced, 3);
    for (int64_t i = 0; i < n; ++i, ++j) {
      const double lo = static_cast<double>(p.qmin) - zero[i * sz], hi = static_cast<double>(p.qmax) - zero[i * sz];
      const auto f = straight_through<T>(to_compute(x[i * sx]), scale[i * ss], static_cast<T>(lo), static_cast<T>(hi));
      const double factor = kZeroPoint ? f.zero_factor : f.scale_factor;
      lane[j % kReduceLanes] += static_cast<double>(to_compute(grad[i * sg])) * factor;
    }
  });
  for (int step = kReduceLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
  return lane[0];
}

template <class X, bool kZeroPoint>
void sum_slices(const QuantizeBackwardParams& p, Reduction r, void* gradient) {
  coalesce(&r.kept);
  coalesce(&r.reduced);
  const int64_t slices = numel(r.kept), length = numel(r.reduced), chunks = ceil_div(length, kReduceChunk);
  std::vector<double> partial(static_cast<size_t>(slices * chunks));
  parallel_for(slices * chunks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(length, kReduceChunk))),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   Walk walk;
                   walk.seek(r.kept, r.kept.ndim, task / chunks);
                   const int64_t first = task % chunks * kReduceChunk;
                   partial[static_cast<size_t>(task)] =
                       chunk_sum<X, kZeroPoint>(p, r.reduced, walk.offset, first, std::min(first + kReduceChunk, length));
                 }
               });
  for (int64_t s = 0; s < slices; ++s) {
    Walk walk;
    walk.seek(r.kept, r.kept.ndim, s);
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[static_cast<size_t>(s * chunks + c)];
    static_cast<Compute<X>*>(gradient)[walk.offset[4]] = static_cast<Compute<X>>(sum);
  }
}

}  // namespace

void quantize_cpu(const QuantizeParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  const KernelTable& table = kernels();
  const bool vector = p.narrow && p.x_dtype != DType::kFloat64 && is_vector_run(it, 2);
  parallel_for(numel(it), kGrain, [&](int64_t begin, int64_t end) {
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
      if (vector) {
        QuantizeRun run;
        run.x = element(p.x, p.x_dtype, offset[0]);
        run.y = element(p.y, p.y_dtype, offset[1]);
        run.n = n;
        run.scale = static_cast<const float*>(p.scale) + offset[2];
        run.zero_point = p.zero_point + offset[3];
        run.scale_step = static_cast<int>(inner_stride(it, 2));
        run.zero_step = static_cast<int>(inner_stride(it, 3));
        run.qmin = p.qmin;
        run.qmax = p.qmax;
        run.x_dtype = p.x_dtype;
        run.y_dtype = p.y_dtype;
        run.simulate = p.simulate;
        return table.quantize(run);
      }
      with_float_type(p.x_dtype, [&](auto* x) {
        using X = std::remove_pointer_t<decltype(x)>;
        if (p.simulate) return quantize_strided<X, X>(p, it, offset, n);
        with_integer_type(p.y_dtype, [&](auto* y) { quantize_strided<X, std::remove_pointer_t<decltype(y)>>(p, it, offset, n); });
      });
    });
  });
}

void quantize_backward_cpu(const QuantizeBackwardParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 2);
  const KernelTable& table = kernels();
  const bool vector = p.narrow && p.x_dtype != DType::kFloat64 && is_vector_run(it, 3);
  parallel_for(numel(it), kGrain, [&](int64_t begin, int64_t end) {
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
      if (vector) {
        StraightThroughRun run;
        run.x = element(p.x, p.x_dtype, offset[0]);
        run.grad = element(p.grad, p.x_dtype, offset[1]);
        run.dx = element(p.dx, p.x_dtype, offset[2]);
        run.n = n;
        run.scale = static_cast<const float*>(p.scale) + offset[3];
        run.zero_point = p.zero_point + offset[4];
        run.scale_step = static_cast<int>(inner_stride(it, 3));
        run.zero_step = static_cast<int>(inner_stride(it, 4));
        run.qmin = p.qmin;
        run.qmax = p.qmax;
        run.dtype = p.x_dtype;
        return table.straight_through(run);
      }
      with_float_type(p.x_dtype, [&](auto* x) { straight_through_strided<std::remove_pointer_t<decltype(x)>>(p, it, offset, n); });
    });
  });
  with_float_type(p.x_dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    sum_slices<X, false>(p, p.scale_sum, p.dscale);
    if (p.dzero) sum_slices<X, true>(p, p.zero_sum, p.dzero);
  });
}

void dequantize_cpu(const DequantizeParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  const KernelTable& table = kernels();
  const bool vector = p.narrow && dtype_bytes(p.q_dtype) == 1 && p.y_dtype != DType::kFloat64 && is_vector_run(it, 2);
  parallel_for(numel(it), kGrain, [&](int64_t begin, int64_t end) {
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
      if (vector) {
        DequantizeRun run;
        run.q = element(p.q, p.q_dtype, offset[0]);
        run.y = element(p.y, p.y_dtype, offset[1]);
        run.n = n;
        run.scale = static_cast<const float*>(p.scale) + offset[2];
        run.zero_point = p.zero_point + offset[3];
        run.scale_step = static_cast<int>(inner_stride(it, 2));
        run.zero_step = static_cast<int>(inner_stride(it, 3));
        run.q_dtype = p.q_dtype;
        run.y_dtype = p.y_dtype;
        return table.dequantize(run);
      }
      with_integer_type(p.q_dtype, [&](auto* q) {
        with_float_type(p.y_dtype, [&](auto* y) {
          using Q = std::remove_pointer_t<decltype(q)>;
          using Y = std::remove_pointer_t<decltype(y)>;
          using T = Compute<Y>;
          const Q* from = static_cast<const Q*>(p.q) + offset[0];
          Y* to = static_cast<Y*>(p.y) + offset[1];
          const T* scale = static_cast<const T*>(p.scale) + offset[2];
          const int32_t* zero = p.zero_point + offset[3];
          const int64_t sq = inner_stride(it, 0), sy = inner_stride(it, 1), ss = inner_stride(it, 2), sz = inner_stride(it, 3);
          for (int64_t i = 0; i < n; ++i) from_compute(dequantize_code<T>(from[i * sq], zero[i * sz], scale[i * ss]), &to[i * sy]);
        });
      });
    });
  });
}

}  // namespace quant_ops
