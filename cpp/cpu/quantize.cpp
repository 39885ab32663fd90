// quant_tensor_forward, quant_tensor_backward and dequant_tensor on the CPU.
//
//   q = clamp(rne(x / scale) + zero_point, qmin, qmax),  x^ = (q - zero_point) * scale
//
// Contiguous runs go to the vector kernels of the table, many at a time; what is strided in memory is gathered on the stack first.
// float64, and codes wider than 24 bits, go to the scalar functions of arithmetic.h. All give the same bits.
//
// Gradients are summed chunk by chunk in the order that ops.h fixes: along a slice where its elements are neighbours in memory,
// down the rows of a matrix where the slices are.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "contract/dtypes.h"
#include "contract/iteration.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/table.h"

namespace quant_ops {
namespace {

constexpr int64_t kGrain = int64_t{1} << 15;  // elements worth a thread
constexpr int64_t kStage = kReduceChunk;      // elements gathered on the stack at a time

const void* element(const void* p, DType dtype, int64_t offset) {
  return static_cast<const char*>(p) + offset * dtype_bytes(dtype);
}
void* element(void* p, DType dtype, int64_t offset) { return static_cast<char*>(p) + offset * dtype_bytes(dtype); }

bool is_step(int64_t stride) { return stride == 0 || stride == 1; }

// memcpy, without the call where a few vectors are copied.
void copy_bytes(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kVector = 16;
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  if (bytes < kVector || bytes > 16 * kVector) {
    std::memcpy(t, f, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i < bytes - kVector; i += kVector) std::memcpy(t + i, f + i, kVector);
  std::memcpy(t + bytes - kVector, f + bytes - kVector, kVector);
}

template <class T>
void gather(const T* from, int64_t step, int64_t n, T* to) {
  if (step == 1) return copy_bytes(to, from, n * static_cast<int64_t>(sizeof(T)));
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * step];
}

template <class T>
void scatter(const T* from, int64_t step, int64_t n, T* to) {
  if (step == 1) return copy_bytes(to, from, n * static_cast<int64_t>(sizeof(T)));
  for (int64_t i = 0; i < n; ++i) to[i * step] = from[i];
}

void gather_elements(const void* from, DType dtype, int64_t step, int64_t n, void* to) {
  switch (dtype_bytes(dtype)) {
    case 1: return gather(static_cast<const uint8_t*>(from), step, n, static_cast<uint8_t*>(to));
    case 2: return gather(static_cast<const uint16_t*>(from), step, n, static_cast<uint16_t*>(to));
    default: return gather(static_cast<const uint32_t*>(from), step, n, static_cast<uint32_t*>(to));
  }
}

// ---- scales, reciprocals and zero points ----------------------------------------------------------------------------

// Where the kernels find the parameters of quantize and dequantize: operands 2 and 3 of an Iteration.
struct Parameters {
  const float* scale;
  const float* reciprocal;  // at the scales' offsets; null: divide
  const int32_t* zero_point;
  float tie;
};

// Copies of the scales and zero points in the order in which they are met, so that they step by 0 or 1 along runs, and the scales'
// reciprocals, so that there is one division a scale. Only where they are few against the elements; else the kernels take them
// where they are, and divide.
class DenseParameters {
 public:
  DenseParameters(Iteration* it, const float* scale, const int32_t* zero_point) : parameters_{scale, nullptr, zero_point, -1.0f} {
    const int64_t few = std::max<int64_t>(numel(*it) / 8, 16);
    const Iteration scales = varying(*it, 2), zeros = varying(*it, 3);
    if (numel(scales) > few || numel(zeros) > few) return;
    const int64_t at_scale = scratch_.add(numel(scales) * 4), at_reciprocal = scratch_.add(numel(scales) * 4);
    const int64_t at_zero = scratch_.add(numel(zeros) * 4);
    scratch_.allocate();
    parameters_.scale = copy(scales, scale, scratch_.at<float>(at_scale));
    parameters_.zero_point = copy(zeros, zero_point, scratch_.at<int32_t>(at_zero));
    float* reciprocal = scratch_.at<float>(at_reciprocal);
    for (int64_t i = 0; i < numel(scales); ++i) reciprocal[i] = reciprocal_of(parameters_.scale[i]);
    parameters_.reciprocal = reciprocal;
    make_dense(it, 2);
    make_dense(it, 3);
    zeros_ = numel(zeros);
  }

  const Parameters& parameters() const { return parameters_; }

  // For codes of this range.
  Parameters with_codes(int64_t qmin, int64_t qmax) const {
    Parameters p = parameters_;
    if (p.reciprocal == nullptr) return p;
    int64_t largest = 0;
    for (int64_t i = 0; i < zeros_; ++i)
      largest = std::max({largest, std::abs(qmin - p.zero_point[i]), std::abs(qmax - p.zero_point[i])});
    p.tie = tie_for(largest);
    return p;
  }

 private:
  // The dimensions along which an operand varies, that operand alone.
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

  template <class T>
  static const T* copy(const Iteration& it, const T* from, T* to) {
    T* next = to;
    for_each_run(it, 0, numel(it), [&](const int64_t* offset, int64_t n) {
      gather(from + offset[0], inner_stride(it, 0), n, next);
      next += n;
    });
    return to;
  }

  Scratch scratch_;
  Parameters parameters_;
  int64_t zeros_ = 0;
};

// Calls call(RowsRun, in, out, reciprocal) for the rows of elements [begin, end): operand 0 is read, operand 1 is written and
// contiguous along runs. What is not contiguous is gathered.
template <class Call>
void for_each_rows(const Iteration& it, int64_t begin, int64_t end, const void* in, DType in_dtype, void* out, DType out_dtype,
                   const Parameters& p, const Call& call) {
  const int64_t step = inner_stride(it, 0), scale_step = inner_stride(it, 2), zero_step = inner_stride(it, 3);
  const bool direct = (step == 1 || it.ndim == 0) && is_step(scale_step) && is_step(zero_step);
  for_each_block(it, begin, end, [&](const int64_t* offset, int64_t rows, int64_t n) {
    RowsRun r;
    r.n = n;
    r.scale = p.scale + offset[2];
    r.zero_point = p.zero_point + offset[3];
    const void* from = element(in, in_dtype, offset[0]);
    void* to = element(out, out_dtype, offset[1]);
    const float* reciprocal = p.reciprocal ? p.reciprocal + offset[2] : nullptr;
    if (direct) {
      r.rows = rows;
      r.from_row = row_stride(it, 0);
      r.to_row = row_stride(it, 1);
      r.scale_step = static_cast<int>(scale_step);
      r.zero_step = static_cast<int>(zero_step);
      r.scale_row = row_stride(it, 2);
      r.zero_row = row_stride(it, 3);
      return call(r, from, to, reciprocal);
    }
    uint32_t elements[kStage];
    float scales[kStage];
    int32_t zeros[kStage];
    r.scale_step = scale_step == 0 ? 0 : 1;
    r.zero_step = zero_step == 0 ? 0 : 1;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < n; i += kStage) {
        r.n = std::min(kStage, n - i);
        const int64_t at_scale = row * row_stride(it, 2) + i * scale_step, at_zero = row * row_stride(it, 3) + i * zero_step;
        gather_elements(element(from, in_dtype, row * row_stride(it, 0) + i * step), in_dtype, step, r.n, elements);
        r.scale = p.scale + offset[2] + at_scale;
        r.zero_point = p.zero_point + offset[3] + at_zero;
        if (!is_step(scale_step)) {  // then there are no reciprocals: their scales are dense
          gather(r.scale, scale_step, r.n, scales);
          r.scale = scales;
        }
        if (!is_step(zero_step)) {
          gather(r.zero_point, zero_step, r.n, zeros);
          r.zero_point = zeros;
        }
        call(r, elements, element(to, out_dtype, row * row_stride(it, 1) + i), reciprocal ? reciprocal + at_scale : nullptr);
      }
    }
  });
}

// Whether for_each_rows can write operand 1 where it belongs.
bool writes_rows(const Iteration& it) { return it.ndim == 0 || inner_stride(it, 1) == 1; }

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

// ---- gradients ------------------------------------------------------------------------------------------------------

double add_lanes(double (&lane)[kReduceLanes]) {
  for (int step = kReduceLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
  return lane[0];
}

// The sum of the chunks' n >= 1 sums, in place: chunks of chunks, as ops.h says.
double add_chunks(double* sum, int64_t n) {
  for (int64_t chunks; n > 1; n = chunks) {
    chunks = ceil_div(n, kReduceChunk);
    for (int64_t c = 0; c < chunks; ++c) {
      double lane[kReduceLanes] = {};
      const int64_t first = c * kReduceChunk, count = std::min(kReduceChunk, n - first);
      for (int64_t j = 0; j < count; ++j) lane[j % kReduceLanes] += sum[first + j];
      sum[c] = add_lanes(lane);
    }
  }
  return sum[0];
}

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
  return add_lanes(lane);
}

// One pass over the slices of a reduction: sums, and dx where it is laid out as x is.
struct BackwardPass {
  const QuantizeBackwardParams& p;
  Iteration kept, reduced;
  int64_t slices, length, chunks;
  void* dx;           // null: not wanted
  double* scale_sum;  // [slices, chunks]
  double* zero_sum;   // likewise; null: not wanted

  int64_t chunk_length(int64_t chunk) const { return std::min(kReduceChunk, length - chunk * kReduceChunk); }
  // Tasks of `elements` that are worth a thread.
  static int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)); }
};

bool varies(const Iteration& it, int operand) {
  for (int d = 0; d < it.ndim; ++d)
    if (it.stride[operand][d] != 0) return true;
  return false;
}

// Short runs of many slices are far from each other, where no prefetcher foresees them; the same run of the next slice often
// follows.
template <class X>
void fetch(const X* p, int64_t n) {
  for (int64_t i = 0; i < n && i < kStage / 4; i += 64 / static_cast<int64_t>(sizeof(X))) __builtin_prefetch(p + i);
}

// Slices one by one: chunks are read where they are contiguous, and gathered where they are not.
template <class X>
void sum_along_slices(const BackwardPass& pass) {
  const QuantizeBackwardParams& p = pass.p;
  const Iteration &kept = pass.kept, &reduced = pass.reduced;
  const KernelTable& table = kernels();
  const int64_t sx = inner_stride(reduced, 0), sg = inner_stride(reduced, 1);
  const int64_t ss = inner_stride(reduced, 2), sz = inner_stride(reduced, 3);
  const bool direct = (reduced.ndim == 0 || (sx == 1 && sg == 1)) && is_step(ss) && is_step(sz);
  const bool scale_varies = varies(reduced, 2), zero_varies = varies(reduced, 3);
  // in the order of memory: chunks of a slice first where they follow each other, else the same chunk of all slices
  const bool slice_first = reduced.ndim <= 1;
  X* const dx = static_cast<X*>(pass.dx);
  parallel_for(pass.slices * pass.chunks, pass.grain(std::min(pass.length, kReduceChunk)), [&](int64_t begin, int64_t end) {
    X x_stage[kStage], grad_stage[kStage], dx_stage[kStage];
    float scale_stage[kStage];
    int32_t zero_stage[kStage];
    int64_t s = slice_first ? begin / pass.chunks : begin % pass.slices;
    int64_t chunk = slice_first ? begin % pass.chunks : begin / pass.slices;
    Walk slice;
    slice.seek(kept, kept.ndim, s);
    for (int64_t task = begin; task < end; ++task) {
      const X* x = static_cast<const X*>(p.x) + slice.offset[0];
      const X* grad = static_cast<const X*>(p.grad) + slice.offset[1];
      X* const dx_slice = dx ? dx + slice.offset[0] : nullptr;
      const float* scale = static_cast<const float*>(p.scale) + slice.offset[2];
      const int32_t* zero = p.zero_point + slice.offset[3];
      const int64_t first = chunk * kReduceChunk, count = pass.chunk_length(chunk), at = s * pass.chunks + chunk;
      double unused;
      StraightThroughRun run;
      run.n = count;
      run.scale = scale;
      run.zero_point = zero;
      run.scale_step = run.zero_step = 0;
      run.qmin = p.qmin;
      run.qmax = p.qmax;
      run.dtype = p.x_dtype;
      run.scale_sum = pass.scale_sum ? pass.scale_sum + at : &unused;
      run.zero_sum = pass.zero_sum ? pass.zero_sum + at : nullptr;
      const auto in_place = [&](int64_t offset_x, int64_t offset_grad, int64_t offset_scale, int64_t offset_zero) {
        run.x = x + offset_x;
        run.grad = grad + offset_grad;
        run.dx = dx ? dx_slice + offset_x : nullptr;
        run.scale = scale + offset_scale;
        run.zero_point = zero + offset_zero;
        run.scale_step = static_cast<int>(ss);
        run.zero_step = static_cast<int>(sz);
        table.straight_through(run);
      };
      if (direct && reduced.ndim <= 1) {
        in_place(first, first, first * ss, first * sz);
      } else {
        int64_t staged = 0;
        for_each_run(reduced, first, first + count, [&](const int64_t* offset, int64_t n) {
          if (direct && n == count) return in_place(offset[0], offset[1], offset[2], offset[3]);
          gather(x + offset[0], sx, n, x_stage + staged);
          gather(grad + offset[1], sg, n, grad_stage + staged);
          if (direct) fetch(x + offset[0] + n, n);
          if (direct) fetch(grad + offset[1] + n, n);
          if (scale_varies) gather(scale + offset[2], ss, n, scale_stage + staged);
          if (zero_varies) gather(zero + offset[3], sz, n, zero_stage + staged);
          staged += n;
        });
        if (staged > 0) {
          run.x = x_stage;
          run.grad = grad_stage;
          run.dx = dx ? dx_stage : nullptr;
          if (scale_varies) {
            run.scale = scale_stage;
            run.scale_step = 1;
          }
          if (zero_varies) {
            run.zero_point = zero_stage;
            run.zero_step = 1;
          }
          table.straight_through(run);
          staged = 0;
          if (dx)
            for_each_run(reduced, first, first + count, [&](const int64_t* offset, int64_t n) {
              scatter(dx_stage + staged, sx, n, dx_slice + offset[0]);
              staged += n;
            });
        }
      }
      if (slice_first) {
        if (++chunk < pass.chunks) continue;
        chunk = 0;
        ++s;
      } else if (++s == pass.slices) {
        s = 0;
        ++chunk;
      }
      slice.next(kept, kept.ndim);
    }
  });
}

// float64 and wide codes.
template <class X>
void sum_strided(const BackwardPass& pass) {
  parallel_for(pass.slices * pass.chunks, pass.grain(std::min(pass.length, kReduceChunk)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Walk slice;
      slice.seek(pass.kept, pass.kept.ndim, task / pass.chunks);
      const int64_t first = task % pass.chunks * kReduceChunk, last = first + pass.chunk_length(task % pass.chunks);
      if (pass.scale_sum) pass.scale_sum[task] = chunk_sum<X, false>(pass.p, pass.reduced, slice.offset, first, last);
      if (pass.zero_sum) pass.zero_sum[task] = chunk_sum<X, true>(pass.p, pass.reduced, slice.offset, first, last);
    }
  });
}

// Slices that are neighbours in memory along the last kept dimension, which share nothing but rows of the data.
constexpr int64_t kFewColumns = 8;  // fewer are gathered slice by slice: vectors would be mostly empty
bool slices_are_columns(const BackwardPass& pass) {
  const Iteration& kept = pass.kept;
  const int last = kept.ndim - 1;
  return last >= 0 && kept.size[last] >= kFewColumns && kept.stride[0][last] == 1 && kept.stride[1][last] == 1 &&
         is_step(kept.stride[2][last]) && is_step(kept.stride[3][last]) && !varies(pass.reduced, 2) && !varies(pass.reduced, 3) &&
         inner_stride(pass.reduced, 0) != 1;
}

template <class X>
void sum_down_columns(const BackwardPass& pass) {
  const QuantizeBackwardParams& p = pass.p;
  const Iteration &kept = pass.kept, &reduced = pass.reduced;
  const KernelTable& table = kernels();
  const int outer = kept.ndim - 1;
  const int64_t columns = kept.size[outer], blocks = ceil_div(columns, int64_t{kReduceColumns});
  const int64_t tasks = pass.slices / columns * pass.chunks * blocks;
  parallel_for(tasks, pass.grain(std::min(pass.length, kReduceChunk) * kReduceColumns), [&](int64_t begin, int64_t end) {
    alignas(64) double lanes[2][kReduceLanes * kReduceColumns];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % blocks * kReduceColumns, chunk = task / blocks % pass.chunks,
                    group = task / blocks / pass.chunks;
      const int64_t first = chunk * kReduceChunk, count = pass.chunk_length(chunk), used = std::min<int64_t>(count, kReduceLanes);
      Walk slice;
      slice.seek(kept, outer, group);
      const int64_t at_scale = slice.offset[2] + column * kept.stride[2][outer];
      const int64_t at_zero = slice.offset[3] + column * kept.stride[3][outer];
      StraightThroughColumnsRun run;
      run.columns = std::min<int64_t>(kReduceColumns, columns - column);
      run.x_row = run.dx_row = inner_stride(reduced, 0);
      run.grad_row = inner_stride(reduced, 1);
      run.scale = static_cast<const float*>(p.scale) + at_scale;
      run.zero_point = p.zero_point + at_zero;
      run.scale_step = static_cast<int>(kept.stride[2][outer]);
      run.zero_step = static_cast<int>(kept.stride[3][outer]);
      run.qmin = p.qmin;
      run.qmax = p.qmax;
      run.dtype = p.x_dtype;
      run.lane = 0;
      run.scale_lanes = lanes[0];
      run.zero_lanes = pass.zero_sum ? lanes[1] : nullptr;
      for (double* lane : {run.scale_lanes, run.zero_lanes})
        if (lane) std::fill_n(lane, used * kReduceColumns, 0.0);
      for_each_run(reduced, first, first + count, [&](const int64_t* offset, int64_t n) {
        run.x = static_cast<const X*>(p.x) + slice.offset[0] + column + offset[0];
        run.grad = static_cast<const X*>(p.grad) + slice.offset[1] + column + offset[1];
        run.dx = pass.dx ? static_cast<X*>(pass.dx) + slice.offset[0] + column + offset[0] : nullptr;
        run.rows = n;
        table.straight_through_columns(run);
        run.lane = (run.lane + n) % kReduceLanes;
      });
      const auto finish = [&](double* lane, double* sum) {
        for (int step = kReduceLanes / 2; step > 0; step /= 2)
          for (int64_t l = 0; l < step && l + step < used; ++l)  // the others are 0
            for (int64_t c = 0; c < run.columns; ++c) lane[l * kReduceColumns + c] += lane[(l + step) * kReduceColumns + c];
        for (int64_t c = 0; c < run.columns; ++c) sum[(group * columns + column + c) * pass.chunks + chunk] = lane[c];
      };
      if (pass.scale_sum) finish(lanes[0], pass.scale_sum);
      if (pass.zero_sum) finish(lanes[1], pass.zero_sum);
    }
  });
}

template <class X>
void backward_pass(const QuantizeBackwardParams& p, const Reduction& r, bool vector, void* dx, void* dscale, void* dzero) {
  BackwardPass pass{p, r.kept, r.reduced, 0, 0, 0, dx, nullptr, nullptr};
  coalesce(&pass.kept);
  coalesce(&pass.reduced);
  pass.slices = numel(pass.kept);
  pass.length = numel(pass.reduced);
  pass.chunks = ceil_div(pass.length, kReduceChunk);
  Scratch scratch;
  const int64_t bytes = pass.slices * pass.chunks * static_cast<int64_t>(sizeof(double));
  const int64_t at_scale = scratch.add(dscale ? bytes : 0), at_zero = scratch.add(dzero ? bytes : 0);
  scratch.allocate();
  if (dscale) pass.scale_sum = scratch.at<double>(at_scale);
  if (dzero) pass.zero_sum = scratch.at<double>(at_zero);
  if constexpr (std::is_same_v<X, double>) {
    sum_strided<X>(pass);
  } else {
    if (!vector)
      sum_strided<X>(pass);
    else if (slices_are_columns(pass))
      sum_down_columns<X>(pass);
    else
      sum_along_slices<X>(pass);
  }
  Walk walk;
  for (int64_t s = 0; s < pass.slices; ++s) {
    const auto finish = [&](double* partial, void* gradient) {
      static_cast<Compute<X>*>(gradient)[walk.offset[4]] =
          static_cast<Compute<X>>(add_chunks(partial + s * pass.chunks, pass.chunks));
    };
    if (dscale) finish(pass.scale_sum, dscale);
    if (dzero) finish(pass.zero_sum, dzero);
    walk.next(pass.kept, pass.kept.ndim);
  }
}

// dx by itself, where it is not laid out as x is.
void straight_through_elements(const QuantizeBackwardParams& p, bool vector) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 2);
  const KernelTable& table = kernels();
  vector = vector && (it.ndim == 0 || inner_stride(it, 2) == 1);
  const int64_t ss = inner_stride(it, 3), sz = inner_stride(it, 4);
  parallel_for(numel(it), kGrain, [&](int64_t begin, int64_t end) {
    uint32_t x_stage[kStage], grad_stage[kStage];
    float scale_stage[kStage];
    int32_t zero_stage[kStage];
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
      if (!vector)
        return with_float_type(p.x_dtype,
                               [&](auto* x) { straight_through_strided<std::remove_pointer_t<decltype(x)>>(p, it, offset, n); });
      const auto contiguous = [&](const void* from, int operand, int64_t i, int64_t count, uint32_t* stage) -> const void* {
        const int64_t step = inner_stride(it, operand);
        const void* at = element(from, p.x_dtype, offset[operand] + i * step);
        if (step == 1) return at;
        gather_elements(at, p.x_dtype, step, count, stage);
        return stage;
      };
      for (int64_t i = 0; i < n; i += kStage) {
        StraightThroughRun run;
        run.n = std::min(kStage, n - i);
        run.x = contiguous(p.x, 0, i, run.n, x_stage);
        run.grad = contiguous(p.grad, 1, i, run.n, grad_stage);
        run.dx = element(p.dx, p.x_dtype, offset[2] + i);
        run.scale = static_cast<const float*>(p.scale) + offset[3] + i * ss;
        run.zero_point = p.zero_point + offset[4] + i * sz;
        run.scale_step = ss == 0 ? 0 : 1;
        run.zero_step = sz == 0 ? 0 : 1;
        if (!is_step(ss)) {
          gather(run.scale, ss, run.n, scale_stage);
          run.scale = scale_stage;
        }
        if (!is_step(sz)) {
          gather(run.zero_point, sz, run.n, zero_stage);
          run.zero_point = zero_stage;
        }
        run.qmin = p.qmin;
        run.qmax = p.qmax;
        run.dtype = p.x_dtype;
        table.straight_through(run);
      }
    });
  });
}

bool same_strides(const Iteration& it, int a, int b) {
  for (int d = 0; d < it.ndim; ++d)
    if (it.size[d] > 1 && it.stride[a][d] != it.stride[b][d]) return false;
  return true;
}

bool same_space(const Iteration& a, const Iteration& b) {
  if (a.ndim != b.ndim || a.operands != b.operands) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.size[d] != b.size[d]) return false;
    for (int o = 0; o < a.operands; ++o)
      if (a.stride[o][d] != b.stride[o][d]) return false;
  }
  return true;
}

}  // namespace

void quantize_cpu(const QuantizeParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  const KernelTable& table = kernels();
  if (p.exact_in_float32 && p.x_dtype != DType::kFloat64 && writes_rows(it)) {
    const DenseParameters dense(&it, static_cast<const float*>(p.scale), p.zero_point);
    const Parameters parameters = dense.with_codes(p.qmin, p.qmax);
    QuantizeRun all;
    all.tie = parameters.tie;
    all.qmin = p.qmin;
    all.qmax = p.qmax;
    all.x_dtype = p.x_dtype;
    all.y_dtype = p.y_dtype;
    all.simulate = p.simulate;
    return parallel_for(numel(it), kGrain, [&](int64_t begin, int64_t end) {
      QuantizeRun run = all;
      for_each_rows(it, begin, end, p.x, p.x_dtype, p.y, p.y_dtype, parameters,
                    [&](const RowsRun& rows, const void* x, void* y, const float* reciprocal) {
                      static_cast<RowsRun&>(run) = rows;
                      run.x = x;
                      run.y = y;
                      run.reciprocal = reciprocal;
                      table.quantize(run);
                    });
    });
  }
  parallel_for(numel(it), kGrain, [&](int64_t begin, int64_t end) {
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
      with_float_type(p.x_dtype, [&](auto* x) {
        using X = std::remove_pointer_t<decltype(x)>;
        if (p.simulate) return quantize_strided<X, X>(p, it, offset, n);
        with_integer_type(p.y_dtype, [&](auto* y) { quantize_strided<X, std::remove_pointer_t<decltype(y)>>(p, it, offset, n); });
      });
    });
  });
}

void quantize_backward_cpu(const QuantizeBackwardParams& p) {
  const bool vector = p.exact_in_float32 && p.x_dtype != DType::kFloat64;
  const bool fused = vector && same_strides(p.it, 0, 2);  // dx in the pass that sums
  const bool together =
      p.dzero && same_space(p.scale_sum.kept, p.zero_sum.kept) && same_space(p.scale_sum.reduced, p.zero_sum.reduced);
  if (!fused) straight_through_elements(p, vector);
  with_float_type(p.x_dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    backward_pass<X>(p, p.scale_sum, vector, fused ? p.dx : nullptr, p.dscale, together ? p.dzero : nullptr);
    if (p.dzero && !together) backward_pass<X>(p, p.zero_sum, vector, nullptr, nullptr, p.dzero);
  });
}

void dequantize_cpu(const DequantizeParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  const KernelTable& table = kernels();
  if (p.exact_in_float32 && p.q_dtype != DType::kInt32 && p.y_dtype != DType::kFloat64 && writes_rows(it)) {
    const DenseParameters dense(&it, static_cast<const float*>(p.scale), p.zero_point);
    return parallel_for(numel(it), kGrain, [&](int64_t begin, int64_t end) {
      DequantizeRun run;
      run.q_dtype = p.q_dtype;
      run.y_dtype = p.y_dtype;
      for_each_rows(it, begin, end, p.q, p.q_dtype, p.y, p.y_dtype, dense.parameters(),
                    [&](const RowsRun& rows, const void* q, void* y, const float*) {
                      static_cast<RowsRun&>(run) = rows;
                      run.q = q;
                      run.y = y;
                      table.dequantize(run);
                    });
    });
  }
  parallel_for(numel(it), kGrain, [&](int64_t begin, int64_t end) {
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
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
