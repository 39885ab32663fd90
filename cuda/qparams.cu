// choose_qparams on CUDA: the scale and zero point of every slice from its range (choose_qparams_of in arithmetic.h).
//
// A few long slices are cut into parts, so that they occupy the whole GPU: one kernel leaves a range per part, a second one merges
// the parts of a slice. Many slices have one part each, and the first kernel finishes them. Threads read along a slice by 16-byte
// vectors. Slices that are neighbours in memory are read side by side, down the rows. Bits are those of cpp/cpu/qparams.cpp. Read
// next: range.cuh.
#include <algorithm>

#include "device/range.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors a thread has in flight
constexpr int64_t kBlocksPerSm = 8;
constexpr int64_t kFewColumns = 8;  // fewer are read slice by slice

// Where a slice's result goes: to its scale and zero point, or to the ranges of parts that finish_kernel or another kernel merges.
template <class X>
struct Results {
  using T = Compute<X>;
  Dims<2> kept;  // x, result
  T* scale;
  int32_t* zero_point;
  Range<T>* partial;  // [slices, parts]; null: there is one part, whose result is final
  int64_t slices, parts;
  int32_t qmin, qmax;
  bool asymmetric;

  __device__ __forceinline__ void finish(int64_t slice, const Range<T>& range) const {
    int64_t at[2] = {0, slice * kept.stride[1][0]};
    if (kept.ndim > 1) kept.seek(slice, at);
    if (kept.ndim == 0) at[1] = 0;
    const auto p = choose_qparams_of<T>(range.min, range.max, range.finite(), qmin, qmax, asymmetric);
    scale[at[1]] = p.scale;
    zero_point[at[1]] = p.zero_point;
  }
  __device__ __forceinline__ void write(int64_t slice, int64_t part, const Range<T>& range) const {
    if (partial == nullptr)
      finish(slice, range);
    else
      partial[slice * parts + part] = range;
  }
};

// ---- along slices ---------------------------------------------------------------------------------------------------

// A slice is `runs` of `length` neighbouring elements. A run lies in at most `pitch` vectors; unit u is vector u % pitch of run
// u / pitch.
template <class X>
struct AlongArgs {
  static constexpr bool kBarriers = true;
  Results<X> results;
  const X* x;
  Dims<1> runs;
  int64_t length, units, part_units;
  FastDiv pitch, parts;
  int width;  // threads of a task, if a block has several tasks
};

// A block (kBlock) or `width` lanes read a part of a slice. Four blocks a multiprocessor leave a thread 64 registers; with more
// blocks ptxas would spill.
template <class X, bool kBlock>
__global__ void __launch_bounds__(kThreads, 4) range_along_kernel(const QO_GRID_CONSTANT AlongArgs<X> a) {
  using T = Compute<X>;
  constexpr int V = 16 / sizeof(X);
  __shared__ Range<T> shared[kThreads / kWarp];
  const int width = kBlock ? kThreads : a.width, thread = threadIdx.x % width;
  const int64_t block_tasks = kThreads / width, tasks = a.results.slices * a.results.parts;
  for (int64_t first = blockIdx.x * block_tasks; first < tasks; first += gridDim.x * block_tasks) {
    const int64_t own = first + threadIdx.x / width, task = own < tasks ? own : tasks - 1;
    const int64_t slice = a.parts.quotient(task), part = task - slice * a.results.parts;
    const int64_t begin = part * a.part_units, end = begin + a.part_units < a.units ? begin + a.part_units : a.units;
    int64_t at[2];
    a.results.kept.seek(slice, at);
    Range<T> range = empty_range<T>();
    for (int64_t unit = begin + thread; unit < end; unit += int64_t{width} * kUnroll) {
      Vector<X, V> in[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        // Beyond the end of the part or of a run, elements of the slice are read once more, which changes no range.
        const int64_t wanted = unit + int64_t{u} * width, own_unit = wanted < end ? wanted : end - 1;
        const int64_t run = a.pitch.quotient(own_unit), vector = own_unit - run * a.pitch.divisor;
        int64_t offset[1];
        a.runs.seek(run, offset);
        const X* const x = a.x + at[0] + offset[0];
        in[u] = load_of_run<V>(x, vector * V - misalignment<V>(x), a.length);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) add_vector<V>(in[u], &range);
    }
    range = kBlock ? over_block(range, shared) : over_lanes(range, width);
    if (thread == 0 && own < tasks) a.results.write(slice, part, range);
  }
}

// ---- slices that are one run each -----------------------------------------------------------------------------------

template <class X>
struct RunArgs {
  static constexpr bool kBarriers = true;
  Results<X> results;
  const X* x;
  int64_t length, part_vectors;
  FastDiv parts;
  int width;  // threads of a task
};

// As range_along_kernel, with extremes of words in place of elements, and addresses without divisions.
template <class X, bool kAsymmetric, bool kBlock>
__global__ void __launch_bounds__(kThreads, 4) range_run_kernel(const QO_GRID_CONSTANT RunArgs<X> a) {
  constexpr int V = 16 / sizeof(X);
  __shared__ Range<float> shared[kThreads / kWarp];
  const int width = kBlock ? static_cast<int>(blockDim.x) : a.width, thread = static_cast<int>(threadIdx.x) % width;
  const int64_t block_tasks = blockDim.x / width, tasks = a.results.slices * a.results.parts;
  for (int64_t first = blockIdx.x * block_tasks; first < tasks; first += gridDim.x * block_tasks) {
    const int64_t own = first + static_cast<int>(threadIdx.x) / width, task = own < tasks ? own : tasks - 1;
    const int64_t slice = a.parts.quotient(task), part = task - slice * a.results.parts;
    int64_t at[2];
    a.results.kept.seek(slice, at);
    const X* const run = a.x + computed_here(at[0]);
    const int64_t before = misalignment<V>(run), vectors = (before + a.length + V - 1) / V;
    const int64_t begin = part * a.part_vectors, end = begin + a.part_vectors < vectors ? begin + a.part_vectors : vectors;
    RangeWords<X, kAsymmetric> extremes;
    for (int64_t vector = begin + thread; vector < end; vector += int64_t{width} * kUnroll) {
      Vector<X, V> in[kUnroll] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t own_vector = vector + u * width;
        if (own_vector < end) in[u] = load_of_run<V>(run, own_vector * V - before, a.length);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int w = 0; w < 4; ++w) extremes.add(in[u].words.at[w]);
    }
    Range<float> range = Bounds<X, kAsymmetric>::of(extremes).range();
    range = kBlock ? over_block(range, shared) : over_lanes(range, width);
    if (thread == 0 && own < tasks) a.results.write(slice, part, range);
  }
}

// ---- evenly spaced slices of whole aligned vectors ------------------------------------------------------------------

template <class X>
struct WholeArgs {
  static constexpr bool kBarriers = true;
  Results<X> results;
  const X* x;
  int64_t stride;
  int32_t vectors, part_vectors, tasks;
  SmallDiv parts;
  BlockRows block;
};

// Such slices need few addresses, and small ones take no longer than their way from memory.
template <class X, bool kAsymmetric>
__global__ void __launch_bounds__(kThreads) range_whole_kernel(const QO_GRID_CONSTANT WholeArgs<X> a) {
  using Bounds = quant_ops::Bounds<X, kAsymmetric>;
  constexpr int V = 16 / sizeof(X);
  alignas(16) __shared__ uint32_t shared[Bounds::kWords][kWarp];
  let_next_kernel_start();
  const int32_t in_block = static_cast<int32_t>(threadIdx.x) >> a.block.shift;
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - in_block * a.block.width;
  const int32_t own = static_cast<int32_t>(blockIdx.x) * a.block.rows + in_block, task = own < a.tasks ? own : a.tasks - 1;
  const int32_t slice = a.parts.quotient(task), part = task - slice * a.parts.divisor;
  const X* const x = a.x + slice * a.stride;
  const int32_t begin = part * a.part_vectors, end = begin + a.part_vectors < a.vectors ? begin + a.part_vectors : a.vectors;
  RangeWords<X, kAsymmetric> extremes;
  for (int32_t vector = begin + thread; vector < end; vector += a.block.width * kUnroll) {
    Vector<X, V> in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t own_vector = vector + u * a.block.width;
      in[u] = own_vector < end ? load_vector<V>(x + int64_t{own_vector} * V) : Vector<X, V>{};
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int w = 0; w < 4; ++w) extremes.add(in[u].words.at[w]);
  }
  Bounds bounds = Bounds::of(extremes);
  share_bounds(&bounds, a.block.width, shared);
  if (thread == 0 && own < a.tasks) a.results.write(slice, part, bounds.range());
}

// ---- down columns ---------------------------------------------------------------------------------------------------

template <class X>
struct DownArgs {
  static constexpr bool kBarriers = true;
  Results<X> results;
  const X* x;
  Dims<1> rows;
  int64_t length, part_rows;
  FastDiv columns, tiles, parts;  // slices that are neighbours; tiles of them
};

// A block takes kAcross * V neighbouring slices and the rows of one part; each thread takes V slices and every kDown-th row.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) range_down_kernel(const QO_GRID_CONSTANT DownArgs<X> a) {
  using T = Compute<X>;
  constexpr int kAcross = V > 1 ? 8 : kWarp, kDown = kThreads / kAcross, kTile = kAcross * V;
  __shared__ Range<T> shared[kDown][kTile];
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const int64_t columns = a.columns.divisor, bundles = a.results.slices / columns;
  const int64_t tasks = bundles * a.tiles.divisor * a.results.parts;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t tile_index = a.parts.quotient(task), part = task - tile_index * a.results.parts;
    const int64_t bundle = a.tiles.quotient(tile_index), column = (tile_index - bundle * a.tiles.divisor) * kTile;
    const int64_t begin = part * a.part_rows, end = begin + a.part_rows < a.length ? begin + a.part_rows : a.length;
    int64_t at[2];
    a.results.kept.seek(bundle * columns, at);
    const int64_t wanted = column + across * V;
    const X* const x = a.x + at[0] + (wanted < columns ? wanted : columns - V);
    Range<T> range[V];
#pragma unroll
    for (int i = 0; i < V; ++i) range[i] = empty_range<T>();
    for (int64_t row = begin + down; row < end; row += kDown * kUnroll) {
      Vector<X, V> in[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t wanted_row = row + u * kDown;
        int64_t offset[1];
        a.rows.seek(wanted_row < end ? wanted_row : end - 1, offset);
        in[u] = load_vector<V>(x + offset[0]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int i = 0; i < V; ++i) range[i].add(widen(in[u].get(i)));
    }
    __syncthreads();  // all threads have read the task before
#pragma unroll
    for (int i = 0; i < V; ++i) shared[down][across * V + i] = range[i];
    __syncthreads();
    const int64_t own = column + threadIdx.x;
    if (threadIdx.x < kTile && own < columns) {
      Range<T> all = shared[0][threadIdx.x];
      for (int d = 1; d < kDown; ++d) all.merge(shared[d][threadIdx.x]);
      a.results.write(bundle * columns + own, part, all);
    }
  }
}

// ---- merging parts --------------------------------------------------------------------------------------------------

template <class X>
struct FinishArgs {
  static constexpr bool kBarriers = true;
  Results<X> results;
  int width;
};

// `width` lanes merge the parts of a slice. A slice without parts is empty, and gets what a slice of zeros gets.
template <class X>
__global__ void __launch_bounds__(kThreads) finish_kernel(const QO_GRID_CONSTANT FinishArgs<X> a) {
  using T = Compute<X>;
  const Results<X>& r = a.results;
  const int lane = threadIdx.x % a.width;
  const int64_t block_slices = kThreads / a.width;
  for (int64_t first = blockIdx.x * block_slices; first < r.slices; first += gridDim.x * block_slices) {
    const int64_t slice = first + threadIdx.x / a.width;
    Range<T> range = r.parts > 0 ? empty_range<T>() : Range<T>{T(0), T(0)};
    if (slice < r.slices)
      for (int64_t part = lane; part < r.parts; part += a.width) range.merge(r.partial[slice * r.parts + part]);
    range = over_lanes(range, a.width);
    if (lane == 0 && slice < r.slices) r.finish(slice, range);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

bool is_multiple(const Iteration& it, int ndim, int64_t vector) {
  for (int d = 0; d < ndim; ++d)
    if (it.stride[0][d] % vector != 0) return false;
  return true;
}

// Slices that are neighbours in memory, read down their rows: units are rows. Gives the least units of a part, which occupy all
// threads of a block.
int64_t plan_down(const ChooseQParams& p, QParamsPlan* plan) {
  const Iteration &kept = plan->range.kept, &reduced = plan->range.reduced;
  const int last = kept.ndim - 1;
  const int64_t widest = 16 / dtype_bytes(p.x_dtype);
  const bool whole = is_aligned(p.x, 16) && kept.size[last] % widest == 0 && is_multiple(kept, last, widest) &&
                     is_multiple(reduced, reduced.ndim, widest);
  plan->vector = whole ? widest : 1;
  plan->run = 1;
  plan->units = numel(reduced);
  const int64_t across = whole ? 8 : kWarp, tile = across * plan->vector;
  plan->workers = plan->slices / kept.size[last] * ((kept.size[last] + tile - 1) / tile);
  return kThreads / across * kUnroll;
}

// Slices read one by one: units are the vectors in which their runs lie.
int64_t plan_along(const ChooseQParams& p, QParamsPlan* plan) {
  const Iteration &kept = plan->range.kept, &reduced = plan->range.reduced;
  const int inner = reduced.ndim - 1;
  const int64_t widest = 16 / dtype_bytes(p.x_dtype);
  plan->vector = widest;
  plan->run = inner >= 0 && inner_stride(reduced, 0) == 1 ? reduced.size[inner] : 1;
  const bool whole =
      is_aligned(p.x, 16) && plan->run % widest == 0 && is_multiple(kept, kept.ndim, widest) && is_multiple(reduced, inner, widest);
  const int64_t slack = whole || plan->run == 1 ? 0 : widest - 1;
  plan->units = numel(reduced) / plan->run * ((plan->run + widest - 1 + slack) / widest);
  plan->workers = plan->slices;
  return kThreads * kUnroll;
}

template <class X>
Results<X> results_of(const QParamsPlan& plan, const ChooseQParams& p, void* memory) {
  using T = Compute<X>;
  return {.kept = make_dims<2>(plan.range.kept, 0, plan.range.kept.ndim),
          .scale = static_cast<T*>(p.scale),
          .zero_point = p.zero_point,
          .partial = static_cast<Range<T>*>(memory),
          .slices = plan.slices,
          .parts = plan.parts,
          .qmin = p.qmin,
          .qmax = p.qmax,
          .asymmetric = p.asymmetric};
}

template <class X>
void run_down(const QParamsPlan& plan, const ChooseQParams& p, const Launch& at) {
  const Iteration &kept = plan.range.kept, &reduced = plan.range.reduced;
  const auto run = [&](auto vector) {
    constexpr int V = decltype(vector)::value, kTile = (V > 1 ? 8 : kWarp) * V;
    const int64_t columns = kept.size[kept.ndim - 1];
    const DownArgs<X> a{.results = results_of<X>(plan, p, at.memory),
                        .x = static_cast<const X*>(p.x),
                        .rows = make_dims<1>(reduced, 0, reduced.ndim),
                        .length = plan.units,
                        .part_rows = plan.part_units,
                        .columns = FastDiv(columns),
                        .tiles = FastDiv((columns + kTile - 1) / kTile),
                        .parts = FastDiv(plan.parts)};
    launch(at, range_down_kernel<X, V>, blocks_for(plan.workers * plan.parts, 1, kMaxGrid), dim3(kThreads), a);
  };
  if (plan.vector > 1)
    run(std::integral_constant<int, 16 / sizeof(X)>());
  else
    run(std::integral_constant<int, 1>());
}

template <class X, bool kAsymmetric>
void run_runs(const QParamsPlan& plan, const ChooseQParams& p, const Launch& at) {
  constexpr int64_t V = 16 / sizeof(X), kMost = int64_t{1} << 30;
  const Iteration& kept = plan.range.kept;
  const int64_t stride = kept.ndim == 0 ? 0 : kept.stride[0][0], tasks = plan.slices * plan.parts;
  if (kept.ndim <= 1 && stride % V == 0 && plan.run % V == 0 && is_aligned(p.x, 16) && plan.units <= kMost && tasks <= kMost) {
    // Slices that leave multiprocessors idle are spread over more threads.
    const int64_t each = tasks < multiprocessors() * kThreads / kWarp ? 1 : kUnroll;
    const BlockRows rows = block_rows_for((plan.part_units + each - 1) / each, kThreads, kThreads);
    const WholeArgs<X> a{.results = results_of<X>(plan, p, at.memory),
                         .x = static_cast<const X*>(p.x),
                         .stride = stride,
                         .vectors = static_cast<int32_t>(plan.units),
                         .part_vectors = static_cast<int32_t>(plan.part_units),
                         .tasks = static_cast<int32_t>(tasks),
                         .parts = SmallDiv(plan.parts),
                         .block = rows};
    return launch(at, range_whole_kernel<X, kAsymmetric>, blocks_for(tasks, rows.rows, kMaxGrid),
                  dim3(static_cast<unsigned>(rows.threads)), a);
  }
  const bool block = plan.part_units > kWarp * kUnroll;
  // Slices that leave multiprocessors idle are spread over more threads.
  const int64_t each = plan.slices * plan.parts < multiprocessors() * kThreads / kWarp ? 1 : kUnroll;
  const int64_t wanted = (plan.part_units + each - 1) / each;
  const int threads = block ? static_cast<int>(std::min<int64_t>((wanted + kWarp - 1) / kWarp * kWarp, kThreads)) : kThreads;
  const RunArgs<X> a{.results = results_of<X>(plan, p, at.memory),
                     .x = static_cast<const X*>(p.x),
                     .length = plan.run,
                     .part_vectors = plan.part_units,
                     .parts = FastDiv(plan.parts),
                     .width = block ? threads : lanes_for(wanted)};
  const int64_t blocks = blocks_for(plan.slices * plan.parts, threads / a.width, kMaxGrid);
  launch(at, block ? range_run_kernel<X, kAsymmetric, true> : range_run_kernel<X, kAsymmetric, false>, blocks,
         dim3(static_cast<unsigned>(threads)), a);
}

template <class X>
void run_along(const QParamsPlan& plan, const ChooseQParams& p, const Launch& at) {
  if constexpr (!std::is_same_v<X, double>) {
    if (numel(plan.range.reduced) == plan.run && plan.run > 1)
      return p.asymmetric ? run_runs<X, true>(plan, p, at) : run_runs<X, false>(plan, p, at);
  }
  const Iteration& reduced = plan.range.reduced;
  const bool block = plan.part_units > kWarp * kUnroll;
  int width = kThreads;
  if (!block)  // slices that leave multiprocessors idle are spread over more lanes
    width =
        lanes_for(plan.slices < multiprocessors() * kThreads / kWarp ? plan.part_units : (plan.part_units + kUnroll - 1) / kUnroll);
  const int64_t runs = numel(reduced) / plan.run;
  const AlongArgs<X> a{.results = results_of<X>(plan, p, at.memory),
                       .x = static_cast<const X*>(p.x),
                       .runs = make_dims<1>(reduced, 0, plan.run > 1 ? reduced.ndim - 1 : reduced.ndim),
                       .length = plan.run,
                       .units = plan.units,
                       .part_units = plan.part_units,
                       .pitch = FastDiv(plan.units / runs),
                       .parts = FastDiv(plan.parts),
                       .width = width};
  const int64_t blocks = blocks_for(plan.slices * plan.parts, kThreads / width, kMaxGrid);
  launch(at, block ? range_along_kernel<X, true> : range_along_kernel<X, false>, blocks, dim3(kThreads), a);
}

}  // namespace

QParamsPlan plan_choose_qparams(const ChooseQParams& p, int64_t multiprocessors) {
  QParamsPlan plan{.range = p.range, .slices = numel(p.range.kept), .length = numel(p.range.reduced)};
  Iteration &kept = plan.range.kept, &reduced = plan.range.reduced;
  coalesce(&kept);
  if (plan.length > 0) {
    for (int d = 0; d < reduced.ndim; ++d)
      if (reduced.stride[0][d] == 0) reduced.size[d] = 1;  // the same elements again
    sort_and_coalesce(&reduced, 0);
    const int last = kept.ndim - 1;
    plan.down = last >= 0 && kept.stride[0][last] == 1 && kept.size[last] >= kFewColumns && reduced.ndim > 0 &&
                inner_stride(reduced, 0) != 1;
    const int64_t least_units = plan.down ? plan_down(p, &plan) : plan_along(p, &plan);
    const int64_t wanted = multiprocessors * kBlocksPerSm / std::max<int64_t>(plan.workers, 1);
    plan.parts = std::max<int64_t>(1, std::min(plan.units / least_units, wanted));
    plan.part_units = (plan.units + plan.parts - 1) / plan.parts;
    plan.parts = (plan.units + plan.part_units - 1) / plan.part_units;
  }
  if (plan.parts > 1) plan.bytes = plan.slices * plan.parts * int64_t{sizeof(Range<double>)};
  return plan;
}

void run_ranges(const QParamsPlan& plan, const ChooseQParams& p, const Launch& at) {
  if (plan.slices == 0 || plan.parts == 0) return;
  with_float_type(p.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    plan.down ? run_down<X>(plan, p, at) : run_along<X>(plan, p, at);
  });
}

void run_choose_qparams(const QParamsPlan& plan, const ChooseQParams& p, const Launch& at) {
  if (plan.slices == 0) return;
  run_ranges(plan, p, {at.op, plan.parts == 1 ? nullptr : at.memory, at.stream});
  if (plan.parts == 1) return;
  with_float_type(p.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const FinishArgs<X> a{.results = results_of<X>(plan, p, at.memory), .width = lanes_for(plan.parts)};
    launch(at, finish_kernel<X>, blocks_for(plan.slices, kThreads / a.width, kMaxGrid), dim3(kThreads), a);
  });
}

}  // namespace quant_ops
