// quant_block_forward and quant_block_backward on CUDA: every block of elements gets a scale from its largest magnitude.
//
//   y = round_to_format(x / scale) * scale;  backward y = grad where |x / scale| <= largest, else 0
//
// A tensor is [outer][length][inner] in memory, with blocks along `length`. Kernels, the first that takes the tensor:
//   flat_kernel     inner = 1, blocks of 1, 2, 4 .. 32 vectors: neighbouring lanes hold a block, memory is read once
//   tile_kernel     blocks of at most 32 elements down the columns: a thread holds those of a vector of columns
//   rows_kernel     inner = 1: a thread block walks each block twice
//   columns_kernel  the others: a thread walks its columns twice
// Long blocks, of which there are too few to fill a GPU, are cut into parts by the last two: one launch finds the largest magnitude
// of every part, the next one quantizes. Bits are those of cpp/cpu/quantize_block.cpp. Read next: device/rounding.cuh.
#include "device/rounding.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;       // flat: vectors that a thread has in flight
constexpr int kColumnBytes = 8;  // of a vector of columns: a warp's are 256 neighbouring bytes

// ---- elements of a block --------------------------------------------------------------------------------------------

// The index of every element, in the order of memory.
struct Order {
  bool same;  // as the order of memory
  Dims<1> dims;

  __device__ __forceinline__ int64_t operator()(int64_t e) const {
    if (same) return e;
    int64_t at[1];
    dims.seek(e, at);
    return at[0];
  }
};

template <class X>
struct BlockArgs {
  Rounder round;
  BlockScales scales;
  const X* x;
  const X* grad;  // null: forward
  X* y;
  const float* tensor_scale;  // null: 1
  Seed seed;
  Order order;
  int64_t outer, length, inner, block;
  int64_t blocks;  // of a length
};

// A block's scale, and the factor or the reciprocal that x is multiplied by.
struct Scale {
  float scale;
  float factor;  // 0: x is divided by the scale
};

template <class X>
__device__ __forceinline__ float tensor_scale_of(const BlockArgs<X>& a) {
  return a.tensor_scale != nullptr ? *a.tensor_scale : 1.0f;
}

template <class X>
__device__ __forceinline__ Scale scale_of(const BlockArgs<X>& a, float amax, float tensor_scale) {
  const float scale = a.scales.scale(amax, tensor_scale);
  return {scale, a.scales.powers ? reciprocal_of(scale) : a.round.reciprocal(scale)};
}

// Of V elements. Scales without a factor are rare, and so slow_results alone divides.
template <int V>
__device__ __forceinline__ bool are_fast(const Scale (&s)[V]) {
  bool fast = true;
#pragma unroll
  for (int i = 0; i < V; ++i) fast = fast && s[i].factor != 0.0f;
  return fast;
}

// |x / scale| by the factors; of what lies beyond the largest value any number beyond it.
template <class X, int V>
__device__ __forceinline__ void quotients(const BlockArgs<X>& a, const float (&x)[V], const Scale (&s)[V], float (&q)[V]) {
  if (a.scales.powers) {
#pragma unroll
    for (int i = 0; i < V; ++i) q[i] = __builtin_fabsf(x[i]) * s[i].factor;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) q[i] = a.round.mended(x[i], s[i].scale, s[i].factor);
  }
}

// The random words of the elements from e on. In an order of their own each one takes a counter: a loop, for it is long code.
template <class X, int V>
__device__ __forceinline__ void words_of(const BlockArgs<X>& a, int64_t e, uint64_t seed, uint32_t (&words)[V]) {
  if (a.order.same) return random_words_at<V>(e, seed, words);
#pragma unroll 1
  for (int i = 0; i < V; ++i) {
#pragma unroll
    for (int j = 0; j + 1 < V; ++j) words[j] = words[j + 1];
    words[V - 1] = random_word_at(a.order(e + i), seed);
  }
}

// The results of V elements from e on, whose scales have factors.
template <Path kPath, class X, int V>
__device__ __forceinline__ void results(const BlockArgs<X>& a, int64_t e, uint64_t seed, const Vector<X, V>& in,
                                        const Vector<X, V>& grad, const Scale (&s)[V], X (&out)[V]) {
  float x[V], q[V];
  uint32_t words[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = widen(in.get(i));
  quotients(a, x, s, q);
  if (wants_words<kPath>(a.round.format)) words_of(a, e, seed, words);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if constexpr (kPath == Path::kGradient)
      out[i] = q[i] <= a.round.format.largest ? grad.get(i) : X{};
    else
      out[i] = rounded_to<X>(with_sign(a.round.template operator()<kPath>(q[i], words[i]) * s[i].scale, x[i]));
  }
}

// The same of one element, for any scale. kAny: also for formats with RoundingMethod::kElements and for gradients.
template <Path kPath, bool kAny, class X>
__device__ __forceinline__ X slow_result(const BlockArgs<X>& a, int64_t e, uint64_t seed, float scale) {
  const float x = widen(a.x[e]), q = __builtin_fabsf(x / scale);
  const FloatFormat& f = a.round.format;
  if (kPath == Path::kGradient || (kAny && a.grad != nullptr)) return q <= f.largest ? a.grad[e] : X{};
  const uint32_t word = wants_words<kPath>(a.round.format) ? random_word_at(a.order(e), seed) : 0;
  float m;
  if (kAny && f.method == RoundingMethod::kElements)
    m = round_to_format(q, f, word);
  else
    m = a.round.template operator()<kPath>(q, word);
  return rounded_to<X>(with_sign(m * scale, x));
}

template <Path kPath, class X, int V>
__device__ __forceinline__ void store_slow_results(const BlockArgs<X>& a, int64_t e, uint64_t seed, const Scale (&s)[V]) {
  float scale[V];
#pragma unroll
  for (int i = 0; i < V; ++i) scale[i] = s[i].scale;
#pragma unroll 1
  for (int i = 0; i < V; ++i) {
    a.y[e + i] = slow_result<kPath, V == 1>(a, e + i, seed, scale[0]);
#pragma unroll
    for (int j = 0; j + 1 < V; ++j) scale[j] = scale[j + 1];
  }
}

// The results of V elements from e on. V = 1: of anything.
template <Path kPath, class X, int V>
__device__ __forceinline__ void store_results(const BlockArgs<X>& a, int64_t e, uint64_t seed, const Vector<X, V>& in,
                                              const Vector<X, V>& grad, const Scale (&s)[V], bool fast) {
  if constexpr (V > 1) {
    if (fast) {
      X out[V];
      results<kPath>(a, e, seed, in, grad, s, out);
      return store_vector<V>(a.y + e, out);
    }
  }
  store_slow_results<kPath>(a, e, seed, s);
}

// The scales of V columns: a loop, for it is long code.
template <class X, int V>
__device__ __forceinline__ void scales_of(const BlockArgs<X>& a, float (&amax)[V], Scale (&s)[V]) {
  const float tensor_scale = tensor_scale_of(a);
#pragma unroll
  for (int i = 0; i < V; ++i) s[i] = {};
#pragma unroll 1
  for (int i = 0; i < V; ++i) {
    const Scale next = scale_of(a, amax[0], tensor_scale);
#pragma unroll
    for (int j = 0; j + 1 < V; ++j) {
      amax[j] = amax[j + 1];
      s[j] = s[j + 1];
    }
    s[V - 1] = next;
  }
}

template <class X, int V>
__device__ __forceinline__ float largest_of(const Vector<X, V>& in, float amax) {
#pragma unroll
  for (int i = 0; i < V; ++i) amax = greater(amax, __builtin_fabsf(widen(in.get(i))));
  return amax;
}

// ---- short contiguous blocks ----------------------------------------------------------------------------------------

template <class X>
struct FlatArgs {
  static constexpr bool kBarriers = true;
  BlockArgs<X> of;
  int64_t numel;
  int lanes;  // of a block
};

template <class X, Path kPath>
__global__ void __launch_bounds__(kThreads) flat_kernel(const QO_GRID_CONSTANT FlatArgs<X> args) {
  constexpr int V = 16 / sizeof(X);
  constexpr int64_t kSpan = int64_t{kThreads} * kUnroll * V;
  const BlockArgs<X>& a = args.of;
  const uint64_t seed = value_of(a.seed);
  for (int64_t begin = blockIdx.x * kSpan; begin < args.numel; begin += gridDim.x * kSpan) {
    const int64_t first = begin + int64_t{threadIdx.x} * V;
    Vector<X, V> in[kUnroll] = {}, grad[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = first + u * (kThreads * V);
      if (e < args.numel) {
        in[u] = load_vector<V>(a.x + e);
        if constexpr (kPath == Path::kGradient) grad[u] = load_vector<V>(a.grad + e);
      }
    }
    const float tensor_scale = tensor_scale_of(a);
    float amax[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) amax[u] = largest_of(in[u], 0.0f);
    for (int mask = args.lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) amax[u] = greater(amax[u], __shfl_xor_sync(0xffffffffu, amax[u], mask));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = first + u * (kThreads * V);
      if (e >= args.numel) continue;
      const Scale one = scale_of(a, amax[u], tensor_scale);
      Scale s[V];
#pragma unroll
      for (int i = 0; i < V; ++i) s[i] = one;
      store_results<kPath>(a, e, seed, in[u], grad[u], s, one.factor != 0.0f);
    }
  }
}

// ---- short blocks down the columns ----------------------------------------------------------------------------------

template <class X>
struct TileArgs {
  static constexpr bool kBarriers = false;
  BlockArgs<X> of;
  FastDiv across, blocks;  // vectors of a row; blocks of a length
  int64_t tiles;           // outer * blocks * vectors of a row
};

// Where a block of columns begins, and its rows.
struct Tile {
  int64_t first, rows;
};
template <class X>
__device__ __forceinline__ Tile tile_at(const BlockArgs<X>& a, const FastDiv& blocks, int64_t block, int64_t column) {
  const int64_t outer = blocks.quotient(block), row = (block - outer * blocks.divisor) * a.block, left = a.length - row;
  return {(outer * a.length + row) * a.inner + column, left < a.block ? left : a.block};
}

// Merges a row into the largest magnitudes of its columns.
template <class X, int V>
__device__ __forceinline__ void add_columns(const Vector<X, V>& row, float (&amax)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) amax[i] = greater(amax[i], __builtin_fabsf(widen(row.get(i))));
}

// A thread has at most kRows rows of a vector of columns.
template <class X, Path kPath, int kRows>
__global__ void __launch_bounds__(kThreads, 2) tile_kernel(const QO_GRID_CONSTANT TileArgs<X> args) {
  constexpr int V = kColumnBytes / sizeof(X);
  const BlockArgs<X>& a = args.of;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x; t < args.tiles; t += step) {
    const int64_t block = args.across.quotient(t), column = (t - block * args.across.divisor) * V;
    const Tile tile = tile_at(a, args.blocks, block, column);
    Vector<X, V> in[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < tile.rows) in[r] = load_vector<V>(a.x + tile.first + r * a.inner);
    float amax[V] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) add_columns(in[r], amax);
    Scale s[V];
    scales_of(a, amax, s);
    if (!are_fast(s)) {
#pragma unroll 1
      for (int64_t r = 0; r < tile.rows; ++r) store_slow_results<kPath>(a, tile.first + r * a.inner, 0, s);
      continue;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= tile.rows) break;
      const int64_t e = tile.first + r * a.inner;
      Vector<X, V> grad = {};
      if constexpr (kPath == Path::kGradient) grad = load_vector<V>(a.grad + e);
      X out[V];
      results<kPath>(a, e, 0, in[r], grad, s, out);
      store_vector<V>(a.y + e, out);
    }
  }
}

// ---- any blocks -----------------------------------------------------------------------------------------------------

// What a launch does with the parts of blocks.
enum class Phase {
  kBoth,   // blocks have one part
  kRange,  // its largest magnitude
  kApply,  // quantize, by the largest magnitudes of all parts
};

template <class X>
struct PartArgs {
  static constexpr bool kBarriers = true;
  BlockArgs<X> of;
  Phase phase;
  FastDiv blocks;  // of a length
  FastDiv parts;   // of a block
  FastDiv across;  // columns: vectors of a row
  int64_t part;    // elements or rows
  int64_t tasks;   // rows: parts of all blocks; columns: vectors of columns of all parts
  float* amax;     // [outer * blocks][parts][inner], unless kBoth
};

// The rows [first, end) of a part, relative to the tile.
struct Part {
  int64_t first, end;
};
template <class X>
__device__ __forceinline__ Part part_at(const PartArgs<X>& args, const Tile& tile, int64_t part) {
  const int64_t first = part * args.part, end = first + args.part;
  return {first, end < tile.rows ? end : tile.rows};
}

// The largest magnitude over the threads of the block, as block_range in range.cuh. Every thread gets it.
__device__ __forceinline__ float largest_of_threads(float amax) {
  __shared__ float warps[kThreads / kWarp];
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) amax = greater(amax, __shfl_xor_sync(0xffffffffu, amax, mask));
  if (blockDim.x == kWarp) return amax;
  __syncthreads();  // the result before has been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) amax = greater(amax, warps[w]);
  return amax;
}

// A thread block, of one warp or of kThreads, a part. V = 1: elements one by one, whatever is done to them.
template <class X, int V, Path kPath>
__global__ void __launch_bounds__(kThreads) rows_kernel(const QO_GRID_CONSTANT PartArgs<X> args) {
  const BlockArgs<X>& a = args.of;
  const uint64_t seed = value_of(a.seed);
  const int64_t step = int64_t{blockDim.x} * V;
  for (int64_t task = blockIdx.x; task < args.tasks; task += gridDim.x) {
    const int64_t block = args.parts.quotient(task), parts = args.parts.divisor;
    const Tile tile = tile_at(a, args.blocks, block, 0);
    const Part part = part_at(args, tile, task - block * parts);
    const int64_t begin = tile.first + part.first + int64_t{threadIdx.x} * V, end = tile.first + part.end;
    float amax = 0.0f;
    if (args.phase == Phase::kApply) {
      for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) amax = greater(amax, args.amax[block * parts + i]);
    } else {
#pragma unroll 4
      for (int64_t e = begin; e < end; e += step) amax = largest_of(load_vector<V>(a.x + e), amax);
    }
    amax = largest_of_threads(amax);
    if (args.phase == Phase::kRange) {
      if (threadIdx.x == 0) args.amax[task] = amax;
      continue;
    }
    const Scale one = scale_of(a, amax, tensor_scale_of(a));
    Scale s[V];
#pragma unroll
    for (int i = 0; i < V; ++i) s[i] = one;
#pragma unroll 1
    for (int64_t e = begin; e < end; e += step) {
      Vector<X, V> grad = {};
      if constexpr (V > 1 && kPath == Path::kGradient) grad = load_vector<V>(a.grad + e);
      store_results<kPath>(a, e, seed, load_vector<V>(a.x + e), grad, s, one.factor != 0.0f);
    }
  }
}

// A thread a vector of columns of a part. V = 1 as above.
template <class X, int V, Path kPath>
__global__ void __launch_bounds__(kThreads, 4) columns_kernel(const QO_GRID_CONSTANT PartArgs<X> args) {
  const BlockArgs<X>& a = args.of;
  const uint64_t seed = value_of(a.seed);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x; t < args.tasks; t += step) {
    const int64_t task = args.across.quotient(t), column = (t - task * args.across.divisor) * V;
    const int64_t block = args.parts.quotient(task), parts = args.parts.divisor;
    const Tile tile = tile_at(a, args.blocks, block, column);
    const Part part = part_at(args, tile, task - block * parts);
    const int64_t begin = tile.first + part.first * a.inner, end = tile.first + part.end * a.inner;
    float amax[V] = {};
    if (args.phase == Phase::kApply) {
      for (int64_t p = 0; p < parts; ++p) {
        const Vector<float, V> of_part = load_vector<V>(args.amax + (block * parts + p) * a.inner + column);
#pragma unroll
        for (int i = 0; i < V; ++i) amax[i] = greater(amax[i], of_part.get(i));
      }
    } else {
#pragma unroll 4
      for (int64_t e = begin; e < end; e += a.inner) add_columns(load_vector<V>(a.x + e), amax);
    }
    if (args.phase == Phase::kRange) {
      store_vector<V>(args.amax + task * a.inner + column, amax);
      continue;
    }
    Scale s[V];
    scales_of(a, amax, s);
    const bool fast = are_fast(s);
#pragma unroll 1
    for (int64_t e = begin; e < end; e += a.inner) {
      Vector<X, V> grad = {};
      if constexpr (V > 1 && kPath == Path::kGradient) grad = load_vector<V>(a.grad + e);
      store_results<kPath>(a, e, seed, load_vector<V>(a.x + e), grad, s, fast);
    }
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool are_aligned(const QuantizeBlockParams& p, int64_t bytes) {
  return is_aligned(p.x, bytes) && is_aligned(p.y, bytes) && (p.grad == nullptr || is_aligned(p.grad, bytes));
}

// Whether all results of a vector are made side by side.
bool takes_vectors(const QuantizeBlockParams& p) {
  return p.grad != nullptr || p.format.element.method != RoundingMethod::kElements;
}

// Calls f with a constant, the path of p.
template <class F>
void with_path(const QuantizeBlockParams& p, const F& f) {
  switch (path_of(p.format.element, p.grad != nullptr)) {
    case Path::kPlain: return f(std::integral_constant<Path, Path::kPlain>{});
    case Path::kRandom: return f(std::integral_constant<Path, Path::kRandom>{});
    case Path::kOther: return f(std::integral_constant<Path, Path::kOther>{});
    case Path::kGradient: return f(std::integral_constant<Path, Path::kGradient>{});
  }
}

template <class X>
BlockArgs<X> block_args(const QuantizeBlockParams& p) {
  BlockArgs<X> a{.round = Rounder::of(p.format.element),
                 .scales = BlockScales::of(p.format),
                 .x = static_cast<const X*>(p.x),
                 .grad = static_cast<const X*>(p.grad),
                 .y = static_cast<X*>(p.y),
                 .tensor_scale = p.tensor_scale,
                 .seed = p.seed,
                 .order = {.same = p.order.ndim == 0 || (p.order.ndim == 1 && p.order.stride[0][0] == 1), .dims = {}},
                 .outer = p.outer,
                 .length = p.length,
                 .inner = p.inner,
                 .block = p.block,
                 .blocks = ceil_div(p.length, p.block)};
  if (!a.order.same) a.order.dims = make_dims<1>(p.order, 0, p.order.ndim);
  return a;
}

template <class X>
bool launch_flat(const QuantizeBlockParams& p, const BlockArgs<X>& a, const Launch& at) {
  constexpr int64_t V = 16 / sizeof(X);
  const int64_t lanes = p.block / V, numel = p.outer * p.length;
  if (p.inner != 1 || !takes_vectors(p) || !are_aligned(p, 16) || p.length % p.block != 0) return false;
  if (lanes * V != p.block || lanes > kWarp || (lanes & (lanes - 1)) != 0 || lanes == 0) return false;
  const FlatArgs<X> args{.of = a, .numel = numel, .lanes = static_cast<int>(lanes)};
  with_path(p, [&](auto path) {
    launch(at, flat_kernel<X, path.value>, blocks_for(numel, int64_t{kThreads} * kUnroll * V, kMaxGrid), dim3(kThreads), args);
  });
  return true;
}

template <class X, int kRows>
void launch_tile_of(const TileArgs<X>& args, const Launch& at) {
  const auto kernel = args.of.grad != nullptr ? tile_kernel<X, Path::kGradient, kRows> : tile_kernel<X, Path::kPlain, kRows>;
  launch(at, kernel, blocks_for(args.tiles, kThreads, kMaxGrid), dim3(kThreads), args);
}

template <class X>
bool launch_tile(const QuantizeBlockParams& p, const BlockArgs<X>& a, const Launch& at) {
  constexpr int64_t V = kColumnBytes / sizeof(X);
  const Path path = path_of(p.format.element, p.grad != nullptr);
  if (p.block > 32 || p.inner % V != 0 || !are_aligned(p, kColumnBytes)) return false;
  if (path != Path::kPlain && path != Path::kGradient) return false;
  const int64_t across = p.inner / V;
  const TileArgs<X> args{.of = a, .across = FastDiv(across), .blocks = FastDiv(a.blocks), .tiles = p.outer * a.blocks * across};
  p.block > 16 ? launch_tile_of<X, 32>(args, at) : launch_tile_of<X, 16>(args, at);
  return true;
}

// Calls f with the number of elements of a vector, V or 1, and the path; of single elements the path is not known. Stochastic
// rounding has no kernels of its own here.
template <int64_t V, class F>
void with_vector(const QuantizeBlockParams& p, bool vectors, const F& f) {
  if (!vectors) return f(std::integral_constant<int, 1>{}, std::integral_constant<Path, Path::kOther>{});
  with_path(p, [&](auto path) {
    constexpr Path kPath = path.value == Path::kRandom ? Path::kOther : path.value;
    f(std::integral_constant<int, V>{}, std::integral_constant<Path, kPath>{});
  });
}

template <class X>
void launch_parts(const QuantizeBlockPlan& plan, const QuantizeBlockParams& p, const BlockArgs<X>& a, const Launch& at) {
  PartArgs<X> args{.of = a,
                   .phase = plan.parts > 1 ? Phase::kRange : Phase::kBoth,
                   .blocks = FastDiv(a.blocks),
                   .parts = FastDiv(plan.parts),
                   .across = FastDiv(1),
                   .part = plan.part,
                   .tasks = p.outer * a.blocks * plan.parts,
                   .amax = plan.amax.in(at.memory)};
  const auto phases = [&](auto kernel, int64_t blocks, int threads) {
    launch(at, kernel, blocks, dim3(static_cast<unsigned>(threads)), args);
    if (args.phase == Phase::kBoth) return;
    args.phase = Phase::kApply;
    launch(at, kernel, blocks, dim3(static_cast<unsigned>(threads)), args);
  };
  if (p.inner == 1) {
    constexpr int64_t V = 16 / sizeof(X);
    const bool vectors = takes_vectors(p) && are_aligned(p, 16) && p.block % V == 0 && p.length % V == 0;
    with_vector<V>(p, vectors, [&](auto v, auto path) {
      const int threads = plan.part <= kWarp * 4 * v.value ? kWarp : kThreads;
      phases(rows_kernel<X, v.value, path.value>, blocks_for(args.tasks, 1, kMaxGrid), threads);
    });
  } else {
    constexpr int64_t V = kColumnBytes / sizeof(X);
    with_vector<V>(p, takes_vectors(p) && are_aligned(p, kColumnBytes) && p.inner % V == 0, [&](auto v, auto path) {
      args.across = FastDiv(p.inner / v.value);
      args.tasks *= p.inner / v.value;
      phases(columns_kernel<X, v.value, path.value>, blocks_for(args.tasks, kThreads, kMaxGrid), kThreads);
    });
  }
}

template <class F>
void with_block_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat16: return f(static_cast<Half*>(nullptr));
    default: return f(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace

// Parts are whole vectors. Without them a block is a thread block's, or its columns are a thread's each.
QuantizeBlockPlan plan_quantize_block(const QuantizeBlockParams& p) {
  constexpr int64_t kThreadBlocks = 1024, kColumnThreads = int64_t{1} << 17, kMostParts = 256;
  constexpr int64_t kLeastPart = 4096, kLeastRows = 64, kPartMultiple = 8;
  const int64_t blocks = p.outer * ceil_div(p.length, p.block);
  const int64_t wanted = p.inner == 1 ? kThreadBlocks / blocks : kColumnThreads / (blocks * p.inner);
  const int64_t most = std::min(kMostParts, ceil_div(p.block, p.inner == 1 ? kLeastPart : kLeastRows));
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, most));
  QuantizeBlockPlan plan;
  plan.part = parts == 1 ? p.block : ceil_div(ceil_div(p.block, parts), kPartMultiple) * kPartMultiple;
  plan.parts = ceil_div(p.block, plan.part);
  WorkspaceLayout workspace;
  if (plan.parts > 1) plan.amax = workspace.add<float>(blocks * plan.parts * p.inner);
  plan.bytes = workspace.bytes();
  return plan;
}

void run_quantize_block(const QuantizeBlockPlan& plan, const QuantizeBlockParams& p, const Launch& at) {
  with_block_type(p.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    const BlockArgs<X> a = block_args<X>(p);
    if (launch_flat(p, a, at) || launch_tile(p, a, at)) return;
    launch_parts(plan, p, a, at);
  });
}

}  // namespace quant_ops
