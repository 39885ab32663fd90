// quant_tensor_forward and dequant_tensor on the CPU.
//
//   q = clamp(rne(x / scale) + zero_point, qmin, qmax),  x^ = (q - zero_point) * scale
//
// Contiguous runs go to the vector kernels of the table, many rows at a time; strided ones are gathered on the stack first
// (staging.h). float64, and codes wider than 24 bits, go to the scalar functions of arithmetic.h. All give the same bits.
// Gradients: quantize_backward.cpp.
#include <algorithm>
#include <cstdlib>

#include "contract/dtypes.h"
#include "contract/iteration.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/staging.h"
#include "kernels/log.h"
#include "kernels/table.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 15;

// ---- scales, reciprocals and zero points ----------------------------------------------------------------------------

// The scales and zero points of an Iteration (operands 2 and 3), as the kernels read them. Where they are few against the elements,
// they are copied in the order in which they are met, so that they step by 0 or 1 along runs, and each scale's reciprocal is
// computed once; else the kernels read them where they are, and divide.
class DenseQParams {
 public:
  DenseQParams(Iteration* it, const void* scale, const int32_t* zero_point)
      : few_(std::max<int64_t>(numel(*it) / 8, 16)),
        scales_(varying(*it, 2)),
        zeros_(varying(*it, 3)),
        dense_(numel(scales_) <= few_ && numel(zeros_) <= few_),
        scratch_(dense_ ? 2 * padded(scales_) + padded(zeros_) : 0),
        scale_(static_cast<const float*>(scale)),
        zero_point_(zero_point) {
    if (!dense_) return;
    scale_ = copy(scales_, scale_, scratch_.at<float>(0));
    float* reciprocal = scratch_.at<float>(padded(scales_));
    for (int64_t i = 0; i < numel(scales_); ++i) reciprocal[i] = reciprocal_of(scale_[i]);
    reciprocal_ = reciprocal;
    zero_point_ = copy(zeros_, zero_point_, scratch_.at<int32_t>(2 * padded(scales_)));
    make_dense(it, 2);
    make_dense(it, 3);
  }

  const float* scale(int64_t offset) const { return scale_ + offset; }
  const int32_t* zero_point(int64_t offset) const { return zero_point_ + offset; }
  // Null: divide.
  const float* reciprocal(int64_t offset) const { return reciprocal_ ? reciprocal_ + offset : nullptr; }

  // QuantizeRun::tie for codes of this range.
  float tie(int64_t qmin, int64_t qmax) const {
    if (!dense_) return -1.0f;
    int64_t largest = 0;
    for (int64_t i = 0; i < numel(zeros_); ++i)
      largest = std::max({largest, std::abs(qmin - zero_point_[i]), std::abs(qmax - zero_point_[i])});
    return tie_for(largest);
  }

 private:
  // The dimensions along which an operand varies, of that operand alone.
  static Iteration varying(const Iteration& it, int operand) {
    Iteration v;
    v.operands = 1;
    for (int d = 0; d < it.ndim; ++d) {
      if (it.stride[operand][d] == 0) continue;
      v.size[v.ndim] = it.size[d];
      v.stride[0][v.ndim++] = it.stride[operand][d];
    }
    return v;
  }

  static void make_dense(Iteration* it, int operand) {
    int64_t next = 1;
    for (int d = it->ndim - 1; d >= 0; --d) {
      if (it->stride[operand][d] == 0) continue;
      it->stride[operand][d] = next;
      next *= it->size[d];
    }
  }

  static int64_t padded(const Iteration& it) { return round_up(numel(it) * 4, 64); }

  template <class T>
  static const T* copy(const Iteration& it, const T* from, T* to) {
    T* next = to;
    for_each_run(it, 0, numel(it), [&](const int64_t* offset, int64_t n) {
      gather(from + offset[0], inner_stride(it, 0), n, next);
      next += n;
    });
    return to;
  }

  const int64_t few_;
  const Iteration scales_, zeros_;
  const bool dense_;
  const Scratch scratch_;
  const float* scale_;
  const float* reciprocal_ = nullptr;
  const int32_t* zero_point_;
};

// ---- vector kernels -------------------------------------------------------------------------------------------------

// Operands 0 and 1.
struct Elements {
  const void* in;
  DType in_dtype;
  void* out;
  DType out_dtype;
};

// Unsigned integers as wide as the dtype's elements: to move them, not to compute.
template <class F>
void with_storage_type(DType dtype, const F& f) {
  switch (dtype_bytes(dtype)) {
    case 1: return f(static_cast<uint8_t*>(nullptr));
    case 2: return f(static_cast<uint16_t*>(nullptr));
    default: return f(static_cast<uint32_t*>(nullptr));
  }
}

// Calls call(in, out, reciprocal) for the rows of elements [begin, end), each time with the rows in *run. Operand 1 is contiguous
// along runs. Where another operand is not, every row is gathered, a stage at a time.
template <class Call>
void for_each_rows(const Iteration& it, int64_t begin, int64_t end, const Elements& e, const DenseQParams& qparams, RowsRun* run,
                   const Call& call) {
  const int64_t step = inner_stride(it, 0), scale_step = inner_stride(it, 2), zero_step = inner_stride(it, 3);
  run->rows = 1;
  run->from_row = row_stride(it, 0);
  run->to_row = row_stride(it, 1);
  run->scale_row = row_stride(it, 2);
  run->zero_row = row_stride(it, 3);
  run->scale_step = scale_step == 0 ? 0 : 1;
  run->zero_step = zero_step == 0 ? 0 : 1;
  if ((step == 1 || it.ndim == 0) && is_step(scale_step) && is_step(zero_step))
    return for_each_block(it, begin, end, [&](const int64_t* offset, int64_t rows, int64_t n) {
      run->n = n;
      run->rows = rows;
      run->scale = qparams.scale(offset[2]);
      run->zero_point = qparams.zero_point(offset[3]);
      call(element(e.in, e.in_dtype, offset[0]), element(e.out, e.out_dtype, offset[1]), qparams.reciprocal(offset[2]));
    });
  with_storage_type(e.in_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Stage<T> elements;
    Stage<float> scales;
    Stage<int32_t> zeros;
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t count) {
      for (int64_t i = 0; i < count; i += kStage) {
        const int64_t n = run->n = std::min(kStage, count - i), at_scale = offset[2] + i * scale_step;
        run->scale = scales.stepping(qparams.scale(at_scale), scale_step, n);
        run->zero_point = zeros.stepping(qparams.zero_point(offset[3] + i * zero_step), zero_step, n);
        // reciprocals are dense, so that the scales that they belong to are not gathered
        call(elements.contiguous(static_cast<const T*>(e.in) + offset[0] + i * step, step, n),
             element(e.out, e.out_dtype, offset[1] + i), qparams.reciprocal(at_scale));
      }
    });
  });
}

// Whether for_each_rows can write operand 1 where it belongs.
bool writes_rows(const Iteration& it) { return it.ndim == 0 || inner_stride(it, 1) == 1; }

void quantize_rows(const QuantizeParams& p, Iteration* it) {
  log_entries({"quantize"});
  const DenseQParams qparams(it, p.scale, p.zero_point);
  QuantizeRun shared;
  shared.tie = qparams.tie(p.qmin, p.qmax);
  shared.qmin = p.qmin;
  shared.qmax = p.qmax;
  shared.x_dtype = p.x_dtype;
  shared.y_dtype = p.y_dtype;
  shared.simulate = p.simulate;
  const KernelTable& table = kernels();
  parallel_for(numel(*it), kElementsPerThread, [&](int64_t begin, int64_t end) {
    QuantizeRun run = shared;
    for_each_rows(*it, begin, end, {p.x, p.x_dtype, p.y, p.y_dtype}, qparams, &run,
                  [&](const void* x, void* y, const float* reciprocal) {
                    run.x = x;
                    run.y = y;
                    run.reciprocal = reciprocal;
                    table.quantize(run);
                  });
  });
}

void dequantize_rows(const DequantizeParams& p, Iteration* it) {
  log_entries({"dequantize"});
  const DenseQParams qparams(it, p.scale, p.zero_point);
  const KernelTable& table = kernels();
  parallel_for(numel(*it), kElementsPerThread, [&](int64_t begin, int64_t end) {
    DequantizeRun run;
    run.q_dtype = p.q_dtype;
    run.y_dtype = p.y_dtype;
    for_each_rows(*it, begin, end, {p.q, p.q_dtype, p.y, p.y_dtype}, qparams, &run, [&](const void* q, void* y, const float*) {
      run.q = q;
      run.y = y;
      table.dequantize(run);
    });
  });
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

template <class Q, class Y>
void dequantize_strided(const DequantizeParams& p, const Iteration& it, const int64_t* offset, int64_t n) {
  using T = Compute<Y>;
  const Q* q = static_cast<const Q*>(p.q) + offset[0];
  Y* y = static_cast<Y*>(p.y) + offset[1];
  const T* scale = static_cast<const T*>(p.scale) + offset[2];
  const int32_t* zero = p.zero_point + offset[3];
  const int64_t sq = inner_stride(it, 0), sy = inner_stride(it, 1), ss = inner_stride(it, 2), sz = inner_stride(it, 3);
  for (int64_t i = 0; i < n; ++i) from_compute(dequantize_code<T>(q[i * sq], zero[i * sz], scale[i * ss]), &y[i * sy]);
}

}  // namespace

void quantize_cpu(const QuantizeParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  if (p.exact_in_float32 && p.x_dtype != DType::kFloat64 && writes_rows(it)) return quantize_rows(p, &it);
  log_kernel(one_by_one);
  with_float_type(p.x_dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    const auto quantize = [&](auto* y) {
      parallel_for(numel(it), kElementsPerThread, [&](int64_t begin, int64_t end) {
        for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
          quantize_strided<X, std::remove_pointer_t<decltype(y)>>(p, it, offset, n);
        });
      });
    };
    if (p.simulate) return quantize(x);
    with_integer_type(p.y_dtype, quantize);
  });
}

void dequantize_cpu(const DequantizeParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  if (p.exact_in_float32 && p.q_dtype != DType::kInt32 && p.y_dtype != DType::kFloat64 && writes_rows(it))
    return dequantize_rows(p, &it);
  log_kernel(one_by_one);
  with_integer_type(p.q_dtype, [&](auto* q) {
    with_float_type(p.y_dtype, [&](auto* y) {
      parallel_for(numel(it), kElementsPerThread, [&](int64_t begin, int64_t end) {
        for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
          dequantize_strided<std::remove_pointer_t<decltype(q)>, std::remove_pointer_t<decltype(y)>>(p, it, offset, n);
        });
      });
    });
  });
}

}  // namespace quant_ops
