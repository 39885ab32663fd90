// quant_tensor_backward on the CPU: the straight-through gradient of the input, and the gradients of scale and zero point.
//
//   dx = g where qmin <= rne(x / scale) + zero_point <= qmax, else 0;   dscale, dzero_point = sums of g * factor over each slice
//
// Sums are taken chunk by chunk in the order that ops.h fixes: along a slice where its elements are neighbours in memory, down the
// rows of a matrix where the slices are. dx is written in the pass that sums, where it is laid out as x is. float64, and codes
// wider than 24 bits, go to the scalar functions of arithmetic.h.
#include <algorithm>

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

// ---- dx by itself ---------------------------------------------------------------------------------------------------

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

// The part of a run that does not depend on where it is.
StraightThroughRun shared_run(const QuantizeBackwardParams& p, int64_t scale_step, int64_t zero_step) {
  StraightThroughRun run;
  run.scale_step = scale_step == 0 ? 0 : 1;
  run.zero_step = zero_step == 0 ? 0 : 1;
  run.qmin = p.qmin;
  run.qmax = p.qmax;
  run.dtype = p.x_dtype;
  return run;
}

// Elements [begin, end), where dx is contiguous along runs.
template <class X>
void straight_through_runs(const QuantizeBackwardParams& p, const Iteration& it, int64_t begin, int64_t end) {
  const int64_t sx = inner_stride(it, 0), sg = inner_stride(it, 1), ss = inner_stride(it, 3), sz = inner_stride(it, 4);
  const KernelTable& table = kernels();
  Stage<X> x, grad;
  Stage<float> scales;
  Stage<int32_t> zeros;
  StraightThroughRun run = shared_run(p, ss, sz);
  for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
    for (int64_t i = 0; i < n; i += kStage) {
      run.n = std::min(kStage, n - i);
      run.x = x.contiguous(static_cast<const X*>(p.x) + offset[0] + i * sx, sx, run.n);
      run.grad = grad.contiguous(static_cast<const X*>(p.grad) + offset[1] + i * sg, sg, run.n);
      run.dx = static_cast<X*>(p.dx) + offset[2] + i;
      run.scale = scales.stepping(static_cast<const float*>(p.scale) + offset[3] + i * ss, ss, run.n);
      run.zero_point = zeros.stepping(p.zero_point + offset[4] + i * sz, sz, run.n);
      table.straight_through(run);
    }
  });
}

template <class X>
void straight_through_elements(const QuantizeBackwardParams& p, bool vector) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 2);
  vector = vector && (it.ndim == 0 || inner_stride(it, 2) == 1);
  parallel_for(numel(it), kElementsPerThread, [&](int64_t begin, int64_t end) {
    if constexpr (!std::is_same_v<X, double>) {
      if (vector) return straight_through_runs<X>(p, it, begin, end);
    }
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) { straight_through_strided<X>(p, it, offset, n); });
  });
}

// ---- sums -----------------------------------------------------------------------------------------------------------

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

// Walks the slices of a reduction once: sums, and dx where it is laid out as x is. Iterations have the operands x, grad, scale and
// zero point.
struct BackwardPass {
  const QuantizeBackwardParams& p;
  Iteration kept, reduced;
  int64_t slices, length, chunks;  // chunks of a slice
  void* dx;                        // null: not wanted
  double* scale_sum;               // [slices, chunks]; null: not wanted
  double* zero_sum;                // likewise

  int64_t chunk_length(int64_t chunk) const { return std::min(kReduceChunk, length - chunk * kReduceChunk); }

  // How many chunks of this many slices together are worth a thread.
  int64_t chunks_per_thread(int64_t columns) const {
    return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, std::min(length, kReduceChunk) * columns));
  }
};

// ---- sums for float64 and wide codes --------------------------------------------------------------------------------

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

template <class X>
void sum_strided(const BackwardPass& pass) {
  parallel_for(pass.slices * pass.chunks, pass.chunks_per_thread(1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Walk slice;
      slice.seek(pass.kept, pass.kept.ndim, task / pass.chunks);
      const int64_t first = task % pass.chunks * kReduceChunk, last = first + pass.chunk_length(task % pass.chunks);
      if (pass.scale_sum) pass.scale_sum[task] = chunk_sum<X, false>(pass.p, pass.reduced, slice.offset, first, last);
      if (pass.zero_sum) pass.zero_sum[task] = chunk_sum<X, true>(pass.p, pass.reduced, slice.offset, first, last);
    }
  });
}

// ---- sums along slices ----------------------------------------------------------------------------------------------

bool varies(const Iteration& it, int operand) {
  for (int d = 0; d < it.ndim; ++d)
    if (it.stride[operand][d] != 0) return true;
  return false;
}

// Runs of consecutive slices are too far apart for the hardware prefetcher: fetches the run that the next slice often continues
// with.
template <class X>
void fetch(const X* p, int64_t n) {
  for (int64_t i = 0; i < n && i < kStage / 4; i += 64 / static_cast<int64_t>(sizeof(X))) __builtin_prefetch(p + i);
}

// Chunks of slices, one at a time: read where they lie if their elements are contiguous, else gathered.
template <class X>
class ChunkSums {
 public:
  explicit ChunkSums(const BackwardPass& pass)
      : pass_(pass),
        sx_(inner_stride(pass.reduced, 0)),
        sg_(inner_stride(pass.reduced, 1)),
        ss_(inner_stride(pass.reduced, 2)),
        sz_(inner_stride(pass.reduced, 3)),
        direct_((pass.reduced.ndim == 0 || (sx_ == 1 && sg_ == 1)) && is_step(ss_) && is_step(sz_)),
        scale_varies_(varies(pass.reduced, 2)),
        zero_varies_(varies(pass.reduced, 3)),
        run_(shared_run(pass.p, ss_, sz_)) {}

  // A chunk of slice s, whose operands start at `offset`.
  void sum(const int64_t* offset, int64_t s, int64_t chunk) {
    const int64_t first = chunk * kReduceChunk, at = s * pass_.chunks + chunk;
    x_ = static_cast<const X*>(pass_.p.x) + offset[0];
    grad_ = static_cast<const X*>(pass_.p.grad) + offset[1];
    dx_ = pass_.dx ? static_cast<X*>(pass_.dx) + offset[0] : nullptr;
    scale_ = static_cast<const float*>(pass_.p.scale) + offset[2];
    zero_ = pass_.p.zero_point + offset[3];
    run_.n = pass_.chunk_length(chunk);
    run_.scale_sum = pass_.scale_sum ? pass_.scale_sum + at : &unused_;
    run_.zero_sum = pass_.zero_sum ? pass_.zero_sum + at : nullptr;
    if (!direct_ || pass_.reduced.ndim > 1) return sum_gathered(first);
    const int64_t begin[] = {first, first, first * ss_, first * sz_};
    sum_in_place(begin);
  }

 private:
  void sum_in_place(const int64_t* offset) {
    run_.x = x_ + offset[0];
    run_.grad = grad_ + offset[1];
    run_.dx = dx_ ? dx_ + offset[0] : nullptr;
    run_.scale = scale_ + offset[2];
    run_.zero_point = zero_ + offset[3];
    table_.straight_through(run_);
  }

  // The chunk from element `first` of the slice on. A chunk that turns out to be one contiguous run is summed in place.
  void sum_gathered(int64_t first) {
    const int64_t count = run_.n;
    int64_t staged = 0;
    for_each_run(pass_.reduced, first, first + count, [&](const int64_t* offset, int64_t n) {
      if (direct_ && n == count) return sum_in_place(offset);
      x_stage_.append(x_ + offset[0], sx_, n, staged);
      grad_stage_.append(grad_ + offset[1], sg_, n, staged);
      if (direct_) fetch(x_ + offset[0] + n, n);
      if (direct_) fetch(grad_ + offset[1] + n, n);
      if (scale_varies_) scale_stage_.append(scale_ + offset[2], ss_, n, staged);
      if (zero_varies_) zero_stage_.append(zero_ + offset[3], sz_, n, staged);
      staged += n;
    });
    if (staged == 0) return;
    StraightThroughRun run = run_;
    run.x = x_stage_.data();
    run.grad = grad_stage_.data();
    run.dx = dx_ ? dx_stage_.data() : nullptr;
    run.scale = scale_varies_ ? scale_stage_.data() : scale_;
    run.scale_step = scale_varies_;
    run.zero_point = zero_varies_ ? zero_stage_.data() : zero_;
    run.zero_step = zero_varies_;
    table_.straight_through(run);
    if (!dx_) return;
    staged = 0;
    for_each_run(pass_.reduced, first, first + count, [&](const int64_t* offset, int64_t n) {
      scatter(dx_stage_.data() + staged, sx_, n, dx_ + offset[0]);
      staged += n;
    });
  }

  const BackwardPass& pass_;
  const KernelTable& table_ = kernels();
  const int64_t sx_, sg_, ss_, sz_;
  const bool direct_, scale_varies_, zero_varies_;
  StraightThroughRun run_;
  double unused_;  // the kernel sums for the scale whenever it sums
  // the slice
  const X* x_;
  const X* grad_;
  X* dx_;
  const float* scale_;
  const int32_t* zero_;
  Stage<X> x_stage_, grad_stage_, dx_stage_;
  Stage<float> scale_stage_;
  Stage<int32_t> zero_stage_;
};

template <class X>
void sum_along_slices(const BackwardPass& pass) {
  // in the order of memory: chunks of a slice first where they follow each other, else the same chunk of all slices
  const bool slice_first = pass.reduced.ndim <= 1;
  parallel_for(pass.slices * pass.chunks, pass.chunks_per_thread(1), [&](int64_t begin, int64_t end) {
    ChunkSums<X> sums(pass);
    int64_t s = slice_first ? begin / pass.chunks : begin % pass.slices;
    int64_t chunk = slice_first ? begin % pass.chunks : begin / pass.slices;
    Walk slice;
    slice.seek(pass.kept, pass.kept.ndim, s);
    for (int64_t task = begin; task < end; ++task) {
      sums.sum(slice.offset, s, chunk);
      if (slice_first) {
        if (++chunk < pass.chunks) continue;
        chunk = 0;
        ++s;
      } else if (++s == pass.slices) {
        s = 0;
        ++chunk;
      }
      slice.next(pass.kept, pass.kept.ndim);
    }
  });
}

// ---- sums down the columns of matrices ------------------------------------------------------------------------------

// Slices that are neighbours in memory along the last kept dimension: the columns of a matrix whose rows are the reduced elements.
bool slices_are_columns(const BackwardPass& pass) {
  const Iteration& kept = pass.kept;
  const int last = kept.ndim - 1;
  return last >= 0 && kept.size[last] >= kFewestColumns && kept.stride[0][last] == 1 && kept.stride[1][last] == 1 &&
         is_step(kept.stride[2][last]) && is_step(kept.stride[3][last]) && !varies(pass.reduced, 2) && !varies(pass.reduced, 3) &&
         inner_stride(pass.reduced, 0) != 1;
}

// lanes[kReduceLanes][kReduceColumns] -> the sums of their columns, `sum_step` apart. Only the first `used` lanes are not 0.
void add_column_lanes(double* lanes, int64_t used, int64_t columns, double* sum, int64_t sum_step) {
  for (int64_t step = kReduceLanes / 2; step > 0; step /= 2)
    for (int64_t l = 0; l < step && l + step < used; ++l)
      for (int64_t c = 0; c < columns; ++c) lanes[l * kReduceColumns + c] += lanes[(l + step) * kReduceColumns + c];
  for (int64_t c = 0; c < columns; ++c) sum[c * sum_step] = lanes[c];
}

// A chunk of the rows of kReduceColumns columns from `column` on, of one matrix.
template <class X>
void sum_columns(const BackwardPass& pass, int64_t matrix, int64_t column, int64_t chunk) {
  const QuantizeBackwardParams& p = pass.p;
  const Iteration &kept = pass.kept, &reduced = pass.reduced;
  const int last = kept.ndim - 1;
  const int64_t first = chunk * kReduceChunk, count = pass.chunk_length(chunk), used = std::min<int64_t>(count, kReduceLanes);
  Walk slice;
  slice.seek(kept, last, matrix);
  alignas(64) double lanes[2][kReduceLanes * kReduceColumns];
  StraightThroughColumnsRun run;
  run.columns = std::min<int64_t>(kReduceColumns, kept.size[last] - column);
  run.x_row = run.dx_row = inner_stride(reduced, 0);
  run.grad_row = inner_stride(reduced, 1);
  run.scale = static_cast<const float*>(p.scale) + slice.offset[2] + column * kept.stride[2][last];
  run.zero_point = p.zero_point + slice.offset[3] + column * kept.stride[3][last];
  run.scale_step = static_cast<int>(kept.stride[2][last]);
  run.zero_step = static_cast<int>(kept.stride[3][last]);
  run.qmin = p.qmin;
  run.qmax = p.qmax;
  run.dtype = p.x_dtype;
  run.lane = 0;
  run.scale_lanes = lanes[0];
  run.zero_lanes = pass.zero_sum ? lanes[1] : nullptr;
  for (double* lane : {run.scale_lanes, run.zero_lanes})
    if (lane) std::fill_n(lane, used * kReduceColumns, 0.0);
  const KernelTable& table = kernels();
  for_each_run(reduced, first, first + count, [&](const int64_t* offset, int64_t n) {
    run.x = static_cast<const X*>(p.x) + slice.offset[0] + column + offset[0];
    run.grad = static_cast<const X*>(p.grad) + slice.offset[1] + column + offset[1];
    run.dx = pass.dx ? static_cast<X*>(pass.dx) + slice.offset[0] + column + offset[0] : nullptr;
    run.rows = n;
    table.straight_through_columns(run);
    run.lane = (run.lane + n) % kReduceLanes;
  });
  const int64_t at = (matrix * kept.size[last] + column) * pass.chunks + chunk;
  if (pass.scale_sum) add_column_lanes(lanes[0], used, run.columns, pass.scale_sum + at, pass.chunks);
  if (pass.zero_sum) add_column_lanes(lanes[1], used, run.columns, pass.zero_sum + at, pass.chunks);
}

template <class X>
void sum_down_columns(const BackwardPass& pass) {
  const int64_t columns = pass.kept.size[pass.kept.ndim - 1], parts = ceil_div(columns, int64_t{kReduceColumns});
  const int64_t tasks = pass.slices / columns * pass.chunks * parts;
  parallel_for(tasks, pass.chunks_per_thread(kReduceColumns), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      sum_columns<X>(pass, task / parts / pass.chunks, task % parts * kReduceColumns, task / parts % pass.chunks);
  });
}

// ---- the operator ---------------------------------------------------------------------------------------------------

template <class X>
void backward_pass(const QuantizeBackwardParams& p, const Reduction& r, bool vector, void* dx, void* dscale, void* dzero) {
  BackwardPass pass{p, r.kept, r.reduced, 0, 0, 0, dx, nullptr, nullptr};
  coalesce(&pass.kept);
  coalesce(&pass.reduced);
  pass.slices = numel(pass.kept);
  pass.length = numel(pass.reduced);
  pass.chunks = ceil_div(pass.length, kReduceChunk);
  ScratchLayout layout;
  const int64_t bytes = pass.slices * pass.chunks * int64_t{sizeof(double)};
  const int64_t scale_at = layout.add(dscale ? bytes : 0), zero_at = layout.add(dzero ? bytes : 0);
  const Scratch scratch(layout.bytes);
  if (dscale) pass.scale_sum = scratch.at<double>(scale_at);
  if (dzero) pass.zero_sum = scratch.at<double>(zero_at);
  if constexpr (std::is_same_v<X, double>) {
    sum_strided<X>(pass);
  } else {
    if (!vector) {
      sum_strided<X>(pass);
    } else if (slices_are_columns(pass)) {
      log_entries({"straight_through_columns"});
      sum_down_columns<X>(pass);
    } else {
      log_entries({"straight_through"});
      sum_along_slices<X>(pass);
    }
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

void quantize_backward_cpu(const QuantizeBackwardParams& p) {
  const bool vector = p.exact_in_float32 && p.x_dtype != DType::kFloat64;
  const bool fused = vector && same_strides(p.it, 0, 2);  // dx in the pass that sums
  if (!vector) log_kernel(one_by_one);
  const bool together =
      p.dzero && same_space(p.scale_sum.kept, p.zero_sum.kept) && same_space(p.scale_sum.reduced, p.zero_sum.reduced);
  with_float_type(p.x_dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    if (!fused) straight_through_elements<X>(p, vector);
    backward_pass<X>(p, p.scale_sum, vector, fused ? p.dx : nullptr, p.dscale, together ? p.dzero : nullptr);
    if (p.dzero && !together) backward_pass<X>(p, p.zero_sum, vector, nullptr, nullptr, p.dzero);
  });
}

}  // namespace quant_ops
