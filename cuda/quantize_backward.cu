// quant_tensor_backward on CUDA: dx = g inside the range, 0 outside; dscale and dzero_point are sums of g * factor over a slice.
//
// One kernel reads x and g once, writes dx and leaves one float64 per chunk of 1024 elements. A second kernel adds 1024 chunks in
// the same way, and is launched until one sum a slice is left. The order of every addition is the one that ops.h fixes (32 lanes, a
// butterfly, chunks of chunks), so the bits are those of the CPU. A lane of that order is a lane of a warp that lies along the
// slice. If neighbouring slices are neighbours in memory, 16 slices share a block instead, so that loads stay coalesced. Read next:
// straight_through in arithmetic.h.
#include "device/range.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSlices = 16;  // side by side in a block: 32 bytes of float16, a whole sector
template <class X>
constexpr int kBatch = sizeof(X) == 8 ? 2 : 8;  // elements a lane has in flight
static_assert(kReduceLanes == kWarp, "a lane of the fixed order is a lane of a warp");

constexpr int kX = 0, kGrad = 1, kScale = 2, kZero = 3;  // operands of both spaces

template <class X>
struct BackwardArgs {
  static constexpr bool kBarriers = true;
  Dims<4> kept, reduced;
  const X* x;
  const X* grad;
  X* dx;  // laid out as x; null: not wanted here
  const Compute<X>* scale;
  const int32_t* zero_point;
  int32_t qmin, qmax;
  int64_t slices, length, chunks;
  double* scale_sum;  // [slices, chunks]; null: not wanted here
  double* zero_sum;
};

// Sums over a lane's elements of a chunk: first, first + 32, ... below `end`, of the slice that starts at `slice`. kConstant tells
// that scale and zero point do not change within a slice.
template <class X, bool kConstant>
__device__ __forceinline__ void accumulate(const BackwardArgs<X>& a, const int64_t (&slice)[4], int64_t first, int64_t end,
                                           double* scale_sum, double* zero_sum) {
  using T = Compute<X>;
  constexpr int kBatch = quant_ops::kBatch<X>, kMoving = kConstant ? 2 : 4;
  const int inner = a.reduced.ndim - 1;
  const int64_t length = inner >= 0 ? a.reduced.size[inner].divisor : 1;
  int64_t at[4] = {0, 0, 0, 0}, column = length;  // index in the last dimension; starting at `length` makes the first element seek
  const X* const x_slice = a.x + slice[kX];
  const X* const grad_slice = a.grad + slice[kGrad];
  X* const dx_slice = a.dx ? a.dx + slice[kX] : nullptr;
  const T* const scale_slice = a.scale + slice[kScale];
  const int64_t zero = zero_at(a.zero_point, slice[kZero]);
  const T scale = *scale_slice, lo = static_cast<T>(a.qmin - zero), hi = static_cast<T>(a.qmax - zero);
  double ds = 0.0, dz = 0.0;
  for (; first < end; first += kWarp * kBatch) {
    X x[kBatch], grad[kBatch];
    int64_t x_at[kBatch];
    T scales[kBatch];
    int32_t zeros[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t position = first + b * kWarp;
      if (position < end) {
        column += kWarp;
        if (column < length) {
#pragma unroll
          for (int o = 0; o < kMoving; ++o) at[o] += a.reduced.stride[o][inner] * kWarp;
        } else {
          a.reduced.seek(position, at);
          column = inner >= 0 ? position - a.reduced.size[inner].quotient(position) * length : 0;
        }
        x_at[b] = at[kX];
        x[b] = x_slice[at[kX]];
        grad[b] = grad_slice[at[kGrad]];
        if constexpr (!kConstant) {
          scales[b] = scale_slice[at[kScale]];
          zeros[b] = zero_at(a.zero_point, slice[kZero] + at[kZero]);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarp < end) {
        StraightThrough<T> f;
        if constexpr (kConstant) {
          f = straight_through<T>(widen(x[b]), scale, lo, hi);
        } else {
          const int64_t z = zeros[b];
          f = straight_through<T>(widen(x[b]), scales[b], static_cast<T>(a.qmin - z), static_cast<T>(a.qmax - z));
        }
        const double g = static_cast<double>(widen(grad[b]));
        ds += g * static_cast<double>(f.scale_factor);
        dz += g * static_cast<double>(f.zero_factor);
        if (dx_slice) dx_slice[x_at[b]] = f.pass ? grad[b] : X{};
      }
    }
  }
  *scale_sum = ds;
  *zero_sum = dz;
}

// A warp per chunk, its lanes along the slice.
template <class X, bool kConstant>
__global__ void __launch_bounds__(kThreads) backward_kernel(const QO_GRID_CONSTANT BackwardArgs<X> a) {
  const int64_t tasks = a.slices * a.chunks, step = int64_t{gridDim.x} * kWarps;
  const int lane = threadIdx.x % kWarp;
  for (int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; task < tasks; task += step) {
    const int64_t index = task / a.chunks, begin = (task - index * a.chunks) * kReduceChunk;
    const int64_t end = begin + kReduceChunk < a.length ? begin + kReduceChunk : a.length;
    int64_t slice[4];
    a.kept.seek(index, slice);
    double ds, dz;
    accumulate<X, kConstant>(a, slice, begin + lane, end, &ds, &dz);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      ds += __shfl_xor_sync(0xffffffffu, ds, mask);
      dz += __shfl_xor_sync(0xffffffffu, dz, mask);
    }
    if (lane == 0) {
      if (a.scale_sum) a.scale_sum[task] = ds;
      if (a.zero_sum) a.zero_sum[task] = dz;
    }
  }
}

// A block per chunk of 16 neighbouring slices: threadIdx.x is the slice, threadIdx.y the lane.
template <class X, bool kConstant>
__global__ void __launch_bounds__(kSlices* kWarp) backward_columns_kernel(const QO_GRID_CONSTANT BackwardArgs<X> a) {
  __shared__ double sums[2][kWarp][kSlices];
  const int64_t bundles = (a.slices + kSlices - 1) / kSlices, tasks = bundles * a.chunks;
  const int column = threadIdx.x, lane = threadIdx.y;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t chunk = task / bundles, index = (task - chunk * bundles) * kSlices + column, begin = chunk * kReduceChunk;
    const int64_t end = begin + kReduceChunk < a.length ? begin + kReduceChunk : a.length;
    double ds = 0.0, dz = 0.0;
    if (index < a.slices) {
      int64_t slice[4];
      a.kept.seek(index, slice);
      accumulate<X, kConstant>(a, slice, begin + lane, end, &ds, &dz);
    }
    sums[0][lane][column] = ds;
    sums[1][lane][column] = dz;
    __syncthreads();
    for (int half = kWarp / 2; half > 0; half /= 2) {
      if (lane < half) {
        sums[0][lane][column] += sums[0][lane + half][column];
        sums[1][lane][column] += sums[1][lane + half][column];
      }
      __syncthreads();
    }
    if (lane == 0 && index < a.slices) {
      if (a.scale_sum) a.scale_sum[index * a.chunks + chunk] = sums[0][0][column];
      if (a.zero_sum) a.zero_sum[index * a.chunks + chunk] = sums[1][0][column];
    }
    __syncthreads();
  }
}

template <class T>
struct AddChunksArgs {
  static constexpr bool kBarriers = true;
  Dims<1> kept;        // of the gradient
  const double* from;  // [slices, count]
  double* to;          // [slices, chunks]; the last level writes the gradient instead
  T* gradient;
  int64_t slices, count;
  FastDiv chunks;  // of kReduceChunk sums, of a slice
  int width;       // lanes of a chunk: 32, or as many as there are sums
};

// One level of chunks of chunks. Lanes without a sum add zeros, which changes nothing: no sum is -0.
template <class T>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(const QO_GRID_CONSTANT AddChunksArgs<T> a) {
  constexpr int kAhead = 8;
  const int64_t chunks = a.chunks.divisor, tasks = a.slices * chunks, block_tasks = kThreads / a.width;
  const int lane = threadIdx.x % a.width;
  for (int64_t first = blockIdx.x * block_tasks; first < tasks; first += gridDim.x * block_tasks) {
    const int64_t task = first + threadIdx.x / a.width, slice = a.chunks.quotient(task);
    const int64_t begin = (task - slice * chunks) * kReduceChunk;
    const int64_t end = task >= tasks ? 0 : begin + kReduceChunk < a.count ? begin + kReduceChunk : a.count;
    double sum = 0.0;
    for (int64_t c = begin + lane; c < end; c += kWarp * kAhead) {
      double next[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) next[i] = c + i * kWarp < end ? a.from[slice * a.count + c + i * kWarp] : 0.0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) sum += next[i];
    }
    for (int mask = a.width / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane != 0 || task >= tasks) continue;
    if (chunks > 1) {
      a.to[task] = sum;
    } else {
      int64_t at[1];
      a.kept.seek(slice, at);
      a.gradient[at[0]] = static_cast<T>(sum);
    }
  }
}

// ---- dx alone, any strides ------------------------------------------------------------------------------------------

template <class X>
struct StraightThroughArgs {
  static constexpr bool kBarriers = false;
  Dims<5> dims;  // x, grad, dx, scale, zero_point
  int64_t n;
  const X* x;
  const X* grad;
  X* dx;
  const Compute<X>* scale;
  const int32_t* zero_point;
  int32_t qmin, qmax;
};

template <class X>
__global__ void __launch_bounds__(kThreads) straight_through_kernel(const QO_GRID_CONSTANT StraightThroughArgs<X> a) {
  using T = Compute<X>;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    int64_t at[5];
    a.dims.seek(i, at);
    const int64_t z = zero_at(a.zero_point, at[4]);
    const auto f = straight_through<T>(widen(a.x[at[0]]), a.scale[at[3]], static_cast<T>(a.qmin - z), static_cast<T>(a.qmax - z));
    a.dx[at[2]] = f.pass ? a.grad[at[1]] : X{};
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

int64_t chunks_of(int64_t n) { return (n + kReduceChunk - 1) / kReduceChunk; }

// The number of sums in all levels of chunks of chunks.
int64_t partial_sums(const Reduction& r) {
  int64_t count = chunks_of(numel(r.reduced)), sums = count;
  for (; count > 1; sums += count) count = chunks_of(count);
  return numel(r.kept) * sums;
}

bool same_space(const Iteration& a, const Iteration& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.size[d] != b.size[d]) return false;
    for (int o = 0; o < 4; ++o)
      if (a.stride[o][d] != b.stride[o][d]) return false;
  }
  return true;
}

// Sums over the chunks of the slices of r, and dx unless it is null.
template <class X>
void sum_chunks(const QuantizeBackwardParams& p, Reduction r, X* dx, double* scale_sum, double* zero_sum, const Launch& at) {
  coalesce(&r.kept);
  coalesce(&r.reduced);
  BackwardArgs<X> a;
  a.kept = make_dims<4>(r.kept, 0, r.kept.ndim);
  a.reduced = make_dims<4>(r.reduced, 0, r.reduced.ndim);
  a.x = static_cast<const X*>(p.x);
  a.grad = static_cast<const X*>(p.grad);
  a.dx = dx;
  a.scale = static_cast<const Compute<X>*>(p.scale);
  a.zero_point = p.zero_point;
  a.qmin = p.qmin;
  a.qmax = p.qmax;
  a.slices = numel(r.kept);
  a.length = numel(r.reduced);
  a.chunks = chunks_of(a.length);
  a.scale_sum = scale_sum;
  a.zero_sum = zero_sum;
  bool constant = true;
  for (int d = 0; d < r.reduced.ndim; ++d)
    constant = constant && r.reduced.stride[kScale][d] == 0 && r.reduced.stride[kZero][d] == 0;
  const bool neighbours = r.kept.ndim > 0 && inner_stride(r.kept, kX) == 1 && r.kept.size[r.kept.ndim - 1] >= kSlices / 2 &&
                          r.reduced.ndim > 0 && inner_stride(r.reduced, kX) != 1;
  if (neighbours) {
    const int64_t tasks = (a.slices + kSlices - 1) / kSlices * a.chunks;
    const auto kernel = constant ? backward_columns_kernel<X, true> : backward_columns_kernel<X, false>;
    launch(at, kernel, blocks_for(tasks, 1, kMaxGrid), dim3(kSlices, kWarp), a);
  } else {
    const auto kernel = constant ? backward_kernel<X, true> : backward_kernel<X, false>;
    launch(at, kernel, blocks_for(a.slices * a.chunks, kWarps, kMaxGrid), dim3(kThreads), a);
  }
}

// Adds the chunks' sums, level by level. `sum` holds partial_sums(r) numbers, and starts with those of the chunks.
template <class X>
void add_chunks(Reduction r, double* sum, void* gradient, const Launch& at) {
  using T = Compute<X>;
  coalesce(&r.kept);
  const int64_t slices = numel(r.kept);
  int64_t count = chunks_of(numel(r.reduced));
  for (bool last = false; !last;) {
    const int64_t chunks = chunks_of(count);
    double* const to = sum + slices * count;
    const AddChunksArgs<T> a{.kept = make_dims<1>(r.kept, 4, r.kept.ndim),
                             .from = sum,
                             .to = to,
                             .gradient = static_cast<T*>(gradient),
                             .slices = slices,
                             .count = count,
                             .chunks = FastDiv(chunks),
                             .width = lanes_for(count)};
    launch(at, add_chunks_kernel<T>, blocks_for(slices * chunks, kThreads / a.width, kMaxGrid), dim3(kThreads), a);
    sum = to;
    count = chunks;
    last = chunks == 1;
  }
}

template <class X>
void straight_through_alone(const QuantizeBackwardParams& p, const Launch& at) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 2);
  const StraightThroughArgs<X> a{.dims = make_dims<5>(it, 0, it.ndim),
                                 .n = numel(it),
                                 .x = static_cast<const X*>(p.x),
                                 .grad = static_cast<const X*>(p.grad),
                                 .dx = static_cast<X*>(p.dx),
                                 .scale = static_cast<const Compute<X>*>(p.scale),
                                 .zero_point = p.zero_point,
                                 .qmin = p.qmin,
                                 .qmax = p.qmax};
  launch(at, straight_through_kernel<X>, blocks_for(a.n, kThreads, kMaxGrid), dim3(kThreads), a);
}

}  // namespace

QuantizeBackwardPlan plan_quantize_backward(const QuantizeBackwardParams& p) {
  QuantizeBackwardPlan plan;
  for (int d = 0; d < p.it.ndim; ++d)
    plan.same_layout = plan.same_layout && (p.it.size[d] == 1 || p.it.stride[0][d] == p.it.stride[2][d]);
  WorkspaceLayout workspace;
  plan.scale_sum = workspace.add<double>(partial_sums(p.scale_sum));
  if (p.dzero != nullptr) {
    plan.same_slices = same_space(p.scale_sum.kept, p.zero_sum.kept) && same_space(p.scale_sum.reduced, p.zero_sum.reduced);
    plan.zero_sum = workspace.add<double>(partial_sums(p.zero_sum));
  }
  plan.bytes = workspace.bytes();
  return plan;
}

void run_quantize_backward(const QuantizeBackwardPlan& plan, const QuantizeBackwardParams& p, const Launch& at) {
  double* const scale_sum = plan.scale_sum.in(at.memory);
  double* const zero_sum = plan.zero_sum.in(at.memory);
  with_float_type(p.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    X* const dx = static_cast<X*>(p.dx);
    if (!plan.same_layout) straight_through_alone<X>(p, at);
    sum_chunks<X>(p, p.scale_sum, plan.same_layout ? dx : nullptr, scale_sum, plan.same_slices ? zero_sum : nullptr, at);
    if (plan.zero_sum && !plan.same_slices) sum_chunks<X>(p, p.zero_sum, nullptr, nullptr, zero_sum, at);
    add_chunks<X>(p.scale_sum, scale_sum, p.dscale, at);
    if (plan.zero_sum) add_chunks<X>(p.zero_sum, zero_sum, p.dzero, at);
  });
}

}  // namespace quant_ops
