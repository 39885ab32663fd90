// quant_tensor_backward on CUDA: dx = g inside the range, 0 outside; dscale and dzero_point are sums of g * factor over a slice.
//
// One kernel reads x and g once, writes dx and adds the 1024 elements of each chunk. Slices of one chunk are then done, and so are
// those of a few chunks where a block takes a whole slice. Otherwise it leaves one float64 per chunk, and a second kernel adds 1024
// of them in the same way, for both gradients at once; it is launched until one sum a slice is left (one launch up to 2^20
// elements a slice), and starts while the one before ends. The order of every addition is the one that ops.h fixes (32 lanes, a
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

constexpr int kX = 0, kGrad = 1, kScale = 2, kZero = 3, kResult = 4;  // operands; the last one of kept spaces alone

// Where the sums of a gradient go.
template <class T>
struct GradientOut {
  double* chunk_sums;  // [slices, chunks]; null: a sum is that of its slice
  T* gradient;         // likewise null: not wanted here

  __device__ __forceinline__ void write(int64_t chunk, int64_t result, double sum) const {
    if (chunk_sums != nullptr)
      chunk_sums[chunk] = sum;
    else if (gradient != nullptr)
      gradient[result] = static_cast<T>(sum);
  }
};

__device__ __forceinline__ double over_lanes(double sum) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  return sum;
}

// ---- slices of any strides ------------------------------------------------------------------------------------------

template <class X>
struct BackwardArgs {
  static constexpr bool kBarriers = true;
  Dims<5> kept;
  Dims<4> reduced;
  const X* x;
  const X* grad;
  X* dx;  // laid out as x; null: not wanted here
  const Compute<X>* scale;
  const int32_t* zero_point;
  int32_t qmin, qmax;
  int64_t slices, length, chunks;
  GradientOut<Compute<X>> scale_out, zero_out;
};

// Sums over a lane's elements of a chunk: first, first + 32, ... below `end`, of the slice that starts at `slice`. kConstant tells
// that scale and zero point do not change within a slice.
template <class X, bool kConstant>
__device__ __forceinline__ void accumulate(const BackwardArgs<X>& a, const int64_t (&slice)[5], int64_t first, int64_t end,
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
  let_next_kernel_start();
  const int64_t tasks = a.slices * a.chunks, step = int64_t{gridDim.x} * kWarps;
  const int lane = threadIdx.x % kWarp;
  for (int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; task < tasks; task += step) {
    const int64_t index = task / a.chunks, begin = (task - index * a.chunks) * kReduceChunk;
    const int64_t end = begin + kReduceChunk < a.length ? begin + kReduceChunk : a.length;
    int64_t slice[5];
    a.kept.seek(index, slice);
    double ds, dz;
    accumulate<X, kConstant>(a, slice, begin + lane, end, &ds, &dz);
    ds = over_lanes(ds);
    dz = over_lanes(dz);
    if (lane == 0) {
      a.scale_out.write(task, slice[kResult], ds);
      a.zero_out.write(task, slice[kResult], dz);
    }
  }
}

// A block per chunk of 16 neighbouring slices: threadIdx.x is the slice, threadIdx.y the lane.
template <class X, bool kConstant>
__global__ void __launch_bounds__(kSlices* kWarp) backward_columns_kernel(const QO_GRID_CONSTANT BackwardArgs<X> a) {
  __shared__ double sums[2][kWarp][kSlices];
  let_next_kernel_start();
  const int64_t bundles = (a.slices + kSlices - 1) / kSlices, tasks = bundles * a.chunks;
  const int column = threadIdx.x, lane = threadIdx.y;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t chunk = task / bundles, index = (task - chunk * bundles) * kSlices + column, begin = chunk * kReduceChunk;
    const int64_t end = begin + kReduceChunk < a.length ? begin + kReduceChunk : a.length;
    int64_t slice[5];
    double ds = 0.0, dz = 0.0;
    if (index < a.slices) {
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
      a.scale_out.write(index * a.chunks + chunk, slice[kResult], sums[0][0][column]);
      a.zero_out.write(index * a.chunks + chunk, slice[kResult], sums[1][0][column]);
    }
    __syncthreads();
  }
}

// ---- evenly spaced slices that are runs of memory -------------------------------------------------------------------

constexpr int kMostWarps = 16;   // of a block that takes a whole slice, one a chunk
constexpr int kSmallBlock = 64;  // threads, for few chunks: all multiprocessors get some

// Element p of slice s is at slice_stride * s + p + gap * (p / run), in x, grad and dx alike.
template <class X>
struct RunsArgs {
  static constexpr bool kBarriers = true;
  const X* x;
  const X* grad;
  X* dx;  // null: not wanted here
  const Compute<X>* scale;
  const int32_t* zero_point;
  int64_t scale_stride, zero_stride, result_stride;  // between slices
  int32_t qmin, qmax;
  int32_t slice_stride, gap, length, tasks;
  SmallDiv run, chunks;
  bool whole;  // a block takes a slice
  GradientOut<Compute<X>> scale_out, zero_out;
};

template <class X>
struct RunsBatch {
  X x[kBatch<X>], grad[kBatch<X>];
};

// A warp per chunk, its lanes along the slice. Such slices need few addresses, and the next elements are on their way while those
// before are added. kZeroSum: the gradient of the zero point is wanted too.
template <class X, bool kZeroSum>
__global__ void __launch_bounds__(kMostWarps* kWarp) backward_runs_kernel(const QO_GRID_CONSTANT RunsArgs<X> a) {
  using T = Compute<X>;
  constexpr int kSums = kZeroSum ? 2 : 1, kStep = kBatch<X> * kWarp;
  __shared__ double shared[kSums][kMostWarps];
  let_next_kernel_start();
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp, warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t task = static_cast<int32_t>(blockIdx.x * (blockDim.x / kWarp)) + warp;
  if (task >= a.tasks) return;
  const int32_t slice = a.chunks.quotient(task), chunk = task - slice * a.chunks.divisor;
  const int32_t begin = chunk * static_cast<int32_t>(kReduceChunk);
  const int32_t end = a.length - begin < kReduceChunk ? a.length : begin + static_cast<int32_t>(kReduceChunk);
  const auto offset = [&](int32_t p) { return slice * a.slice_stride + p + a.gap * a.run.quotient(p); };
  const auto load = [&](int32_t first, RunsBatch<X>* batch) {
#pragma unroll
    for (int b = 0; b < kBatch<X>; ++b) {
      if (first + b * kWarp >= end) continue;
      const int32_t at = offset(first + b * kWarp);
      batch->x[b] = a.x[at];
      batch->grad[b] = a.grad[at];
    }
  };
  RunsBatch<X> next;
  load(begin + lane, &next);
  const T scale = a.scale[slice * a.scale_stride];
  const int64_t zero = zero_at(a.zero_point, slice * a.zero_stride);
  const T lo = static_cast<T>(a.qmin - zero), hi = static_cast<T>(a.qmax - zero);
  double sums[kSums] = {};
#pragma unroll 1
  for (int32_t first = begin + lane; first < end; first += kStep) {
    const RunsBatch<X> batch = next;
    if (end - first > kStep) load(first + kStep, &next);
#pragma unroll
    for (int b = 0; b < kBatch<X>; ++b) {
      if (first + b * kWarp >= end) continue;
      const StraightThrough<T> f = straight_through<T>(widen(batch.x[b]), scale, lo, hi);
      const double g = static_cast<double>(widen(batch.grad[b]));
      sums[0] += g * static_cast<double>(f.scale_factor);
      if constexpr (kZeroSum) sums[1] += g * static_cast<double>(f.zero_factor);
      if (a.dx != nullptr) a.dx[offset(first + b * kWarp)] = f.pass ? batch.grad[b] : X{};
    }
  }
#pragma unroll
  for (double& sum : sums) sum = over_lanes(sum);
  if (a.whole) {  // lane c of the next level has the sum of chunk c
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      if (lane == 0) shared[i][warp] = sums[i];
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = over_lanes(lane < a.chunks.divisor ? shared[i][lane] : 0.0);
  }
  if (lane > 0) return;
  a.scale_out.write(task, slice * a.result_stride, sums[0]);
  if constexpr (kZeroSum) a.zero_out.write(task, slice * a.result_stride, sums[1]);
}

// ---- chunks of chunks -----------------------------------------------------------------------------------------------

// The sums of a gradient's chunks.
template <class T>
struct ChunkSums {
  Dims<1> kept;        // of the gradient
  const double* from;  // [slices, count]
  double* to;          // [slices, chunks]; the last level writes the gradient instead
  T* gradient;
  int64_t slices, count;
  FastDiv chunks;  // of kReduceChunk sums, of a slice
  int width;       // lanes of a chunk: 32, or as many as there are sums
};

template <class T>
struct AddChunksArgs {
  static constexpr bool kBarriers = true;
  ChunkSums<T> of[2];  // the second one is added by blocks from first_blocks on
  int64_t first_blocks;
};

// One level of chunks of chunks. Lanes without a sum add zeros, which changes nothing: no sum is -0.
template <class T>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(const QO_GRID_CONSTANT AddChunksArgs<T> a) {
  constexpr int kAhead = 8;
  let_next_kernel_start();
  wait_for_kernel_before();
  const bool second = blockIdx.x >= a.first_blocks;
  const ChunkSums<T>& s = a.of[second];
  const int64_t block = blockIdx.x - (second ? a.first_blocks : 0);
  const int lane = threadIdx.x % s.width;
  const int64_t task = block * (kThreads / s.width) + threadIdx.x / s.width, slice = s.chunks.quotient(task);
  const int64_t chunks = s.chunks.divisor, begin = (task - slice * chunks) * kReduceChunk;
  const int64_t end = slice >= s.slices ? 0 : begin + kReduceChunk < s.count ? begin + kReduceChunk : s.count;
  double sum = 0.0;
  for (int64_t c = begin + lane; c < end; c += kWarp * kAhead) {
    double next[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) next[i] = c + i * kWarp < end ? s.from[slice * s.count + c + i * kWarp] : 0.0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum += next[i];
  }
  for (int mask = s.width / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (lane != 0 || slice >= s.slices) return;
  if (chunks > 1) {
    s.to[task] = sum;
  } else {
    int64_t at[1];
    s.kept.seek(slice, at);
    s.gradient[at[0]] = static_cast<T>(sum);
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

bool same_space(const Iteration& a, const Iteration& b) {
  if (a.ndim != b.ndim || a.operands != b.operands) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.size[d] != b.size[d]) return false;
    for (int o = 0; o < a.operands; ++o)
      if (a.stride[o][d] != b.stride[o][d]) return false;
  }
  return true;
}

// Whether scale and zero point do not change within a slice.
bool is_constant(const Iteration& reduced) {
  for (int d = 0; d < reduced.ndim; ++d)
    if (reduced.stride[kScale][d] != 0 || reduced.stride[kZero][d] != 0) return false;
  return true;
}

// Whether backward_runs_kernel takes the slices of a coalesced reduction: x and grad are laid out alike, and 32 bits hold every
// offset.
bool are_runs(const Reduction& r) {
  const Iteration &kept = r.kept, &reduced = r.reduced;
  if (kept.ndim > 1 || reduced.ndim < 1 || reduced.ndim > 2 || inner_stride(reduced, kX) != 1 || !is_constant(reduced))
    return false;
  int64_t last = 0;  // the largest offset
  for (const Iteration* it : {&kept, &reduced})
    for (int d = 0; d < it->ndim; ++d) {
      if (it->stride[kX][d] != it->stride[kGrad][d]) return false;
      last += (it->size[d] - 1) * it->stride[kX][d];
    }
  return last < INT32_MAX && numel(kept) * numel(reduced) < INT32_MAX;
}

bool is_whole(const Reduction& r) { return are_runs(r) && chunks_of(numel(r.reduced)) <= kMostWarps; }

Reduction coalesced(Reduction r) {
  coalesce(&r.kept);
  coalesce(&r.reduced);
  return r;
}

// The number of sums in all levels of chunks of chunks, of slices that the first kernel does not finish.
int64_t partial_sums(const Reduction& r) {
  int64_t count = chunks_of(numel(r.reduced)), sums = 0;
  if (is_whole(coalesced(r))) return 0;
  for (; count > 1; count = chunks_of(count)) sums += count;
  return numel(r.kept) * sums;
}

template <class X>
void sum_runs(const QuantizeBackwardParams& p, const Reduction& r, X* dx, const GradientOut<Compute<X>>& scale_out,
              const GradientOut<Compute<X>>& zero_out, const Launch& at) {
  const Iteration &kept = r.kept, &reduced = r.reduced;
  const int64_t run = reduced.size[reduced.ndim - 1], length = numel(reduced), chunks = chunks_of(length);
  const int64_t tasks = numel(kept) * chunks;
  const bool whole = is_whole(r) && chunks > 1;
  const int64_t threads = whole                                                       ? chunks * kWarp
                          : tasks * kWarp < 4 * multiprocessors() * int64_t{kThreads} ? kSmallBlock
                                                                                      : kThreads;
  const RunsArgs<X> a{.x = static_cast<const X*>(p.x),
                      .grad = static_cast<const X*>(p.grad),
                      .dx = dx,
                      .scale = static_cast<const Compute<X>*>(p.scale),
                      .zero_point = p.zero_point,
                      .scale_stride = inner_stride(kept, kScale),
                      .zero_stride = inner_stride(kept, kZero),
                      .result_stride = inner_stride(kept, kResult),
                      .qmin = p.qmin,
                      .qmax = p.qmax,
                      .slice_stride = static_cast<int32_t>(inner_stride(kept, kX)),
                      .gap = static_cast<int32_t>(reduced.ndim > 1 ? reduced.stride[kX][0] - run : 0),
                      .length = static_cast<int32_t>(length),
                      .tasks = static_cast<int32_t>(tasks),
                      .run = SmallDiv(run),
                      .chunks = SmallDiv(chunks),
                      .whole = whole,
                      .scale_out = scale_out,
                      .zero_out = zero_out};
  const auto kernel = zero_out.chunk_sums != nullptr || zero_out.gradient != nullptr ? backward_runs_kernel<X, true>
                                                                                     : backward_runs_kernel<X, false>;
  launch(at, kernel, blocks_for(tasks, threads / kWarp, kMaxGrid), dim3(static_cast<unsigned>(threads)), a);
}

// Sums over the chunks of the slices of r, which is coalesced, and dx unless it is null.
template <class X>
void sum_chunks(const QuantizeBackwardParams& p, const Reduction& r, X* dx, const GradientOut<Compute<X>>& scale_out,
                const GradientOut<Compute<X>>& zero_out, const Launch& at) {
  if (are_runs(r)) return sum_runs(p, r, dx, scale_out, zero_out, at);
  const int64_t slices = numel(r.kept), length = numel(r.reduced), chunks = chunks_of(length);
  const BackwardArgs<X> a{.kept = make_dims<5>(r.kept, 0, r.kept.ndim),
                          .reduced = make_dims<4>(r.reduced, 0, r.reduced.ndim),
                          .x = static_cast<const X*>(p.x),
                          .grad = static_cast<const X*>(p.grad),
                          .dx = dx,
                          .scale = static_cast<const Compute<X>*>(p.scale),
                          .zero_point = p.zero_point,
                          .qmin = p.qmin,
                          .qmax = p.qmax,
                          .slices = slices,
                          .length = length,
                          .chunks = chunks,
                          .scale_out = scale_out,
                          .zero_out = zero_out};
  const bool constant = is_constant(r.reduced);
  const bool neighbours = r.kept.ndim > 0 && inner_stride(r.kept, kX) == 1 && r.kept.size[r.kept.ndim - 1] >= kSlices / 2 &&
                          r.reduced.ndim > 0 && inner_stride(r.reduced, kX) != 1;
  if (neighbours) {
    const int64_t tasks = (slices + kSlices - 1) / kSlices * chunks;
    const auto kernel = constant ? backward_columns_kernel<X, true> : backward_columns_kernel<X, false>;
    launch(at, kernel, blocks_for(tasks, 1, kMaxGrid), dim3(kSlices, kWarp), a);
  } else {
    const auto kernel = constant ? backward_kernel<X, true> : backward_kernel<X, false>;
    launch(at, kernel, blocks_for(slices * chunks, kWarps, kMaxGrid), dim3(kThreads), a);
  }
}

// The next level of a gradient's chunks, for all of which it moves `out` and `count` on.
template <class T>
ChunkSums<T> next_level(const Iteration& kept, GradientOut<T>* out, int64_t* count) {
  ChunkSums<T> sums{.kept = make_dims<1>(kept, kResult, kept.ndim),
                    .from = out->chunk_sums,
                    .to = out->chunk_sums + numel(kept) * *count,
                    .gradient = out->gradient,
                    .slices = numel(kept),
                    .count = *count,
                    .chunks = FastDiv(chunks_of(*count)),
                    .width = lanes_for(*count)};
  out->chunk_sums = sums.to;
  *count = chunks_of(*count);
  return sums;
}

// Adds the chunks' sums of one or two gradients, level by level.
template <class T>
void add_chunks(const Reduction (&r)[2], GradientOut<T> (&out)[2], bool early, const Launch& at) {
  int64_t count[2];
  for (int i = 0; i < 2; ++i) count[i] = out[i].chunk_sums != nullptr ? chunks_of(numel(r[i].reduced)) : 1;
  while (count[0] > 1 || count[1] > 1) {
    AddChunksArgs<T> a{};
    int64_t blocks[2] = {0, 0};
    for (int i = 0; i < 2; ++i) {
      if (count[i] == 1) continue;
      a.of[i] = next_level(r[i].kept, &out[i], &count[i]);
      blocks[i] = blocks_for(a.of[i].slices * count[i], kThreads / a.of[i].width, kMaxGrid / 2);
    }
    a.first_blocks = blocks[0];
    launch(at, add_chunks_kernel<T>, blocks[0] + blocks[1], dim3(kThreads), a, 0, early ? Start::kEarly : Start::kInOrder);
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

QuantizeBackwardPlan plan_quantize_backward(const QuantizeBackwardParams& p, const GpuLimits& gpu) {
  QuantizeBackwardPlan plan;
  for (int d = 0; d < p.it.ndim; ++d)
    plan.same_layout = plan.same_layout && (p.it.size[d] == 1 || p.it.stride[0][d] == p.it.stride[2][d]);
  plan.early = gpu.arch >= 90;
  WorkspaceLayout workspace;
  const auto add = [&](const Reduction& r) {
    const int64_t sums = partial_sums(r);
    return sums > 0 ? workspace.add<double>(sums) : Slot<double>{};
  };
  plan.scale_sum = add(p.scale_sum);
  if (p.dzero != nullptr) {
    plan.same_slices = same_space(p.scale_sum.kept, p.zero_sum.kept) && same_space(p.scale_sum.reduced, p.zero_sum.reduced);
    plan.zero_sum = add(p.zero_sum);
  }
  plan.bytes = workspace.bytes();
  return plan;
}

void run_quantize_backward(const QuantizeBackwardPlan& plan, const QuantizeBackwardParams& p, const Launch& at) {
  const Reduction sums[2] = {coalesced(p.scale_sum), coalesced(p.zero_sum)};
  with_float_type(p.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    using T = Compute<X>;
    X* const dx = static_cast<X*>(p.dx);
    const GradientOut<T> none{};
    GradientOut<T> out[2] = {{plan.scale_sum.in(at.memory), static_cast<T*>(p.dscale)},
                             {plan.zero_sum.in(at.memory), static_cast<T*>(p.dzero)}};
    if (!plan.same_layout) straight_through_alone<X>(p, at);
    sum_chunks<X>(p, sums[0], plan.same_layout ? dx : nullptr, out[0], plan.same_slices ? out[1] : none, at);
    if (p.dzero != nullptr && !plan.same_slices) sum_chunks<X>(p, sums[1], nullptr, none, out[1], at);
    add_chunks<T>(sums, out, plan.early, at);
  });
}

}  // namespace quant_ops
