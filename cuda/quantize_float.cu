// quant_float_forward and quant_float_backward on CUDA.
//
//   y = round_to_format(x / scale) * scale;  backward y = grad where |x / scale| <= largest, else 0
//
// As in quantize.cu, dense and aligned data is one flat array of 16-byte vectors, and Lookup (layout.cuh) says which scale a vector
// meets. Everything else takes the kernel for any strides, one element a thread: float64, formats with RoundingMethod::kElements,
// a gradient laid out in another way than x, and random words in another order than that of memory (channels-last tensors have
// a kernel for these). Bits are those of cpp/cpu/quantize_float.cpp. Read next: device/rounding.cuh, quantize_block.cu.
#include "device/rounding.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocksPerSm = 8;

template <class X>
constexpr int kVector = 16 / sizeof(X);
// Vectors that a thread has in flight. Random words and rare formats take registers and instructions.
template <Path kPath>
constexpr int kUnroll = kPath == Path::kPlain ? 4 : 2;

template <class X>
struct FlatArgs {
  static constexpr bool kBarriers = false;
  Rounder round;
  const X* x;
  const X* grad;
  X* y;
  const float* scale;  // null: 1
  Seed seed;
  FlatLayout layout;    // its second parameter is not used
  int64_t step = 0;     // columns: vectors between a thread's vectors
  bool reload = false;  // columns: scales change from vector to vector
};

// ---- one element ----------------------------------------------------------------------------------------------------

// The greatest |x| whose IEEE quotient with the scale is at most `largest`, or NaN if there is none: quotients up to half a unit in
// the last place above `largest`, which is even (it has at most 23 bits), round to it, and the product is exact in float64.
__device__ __forceinline__ float greatest_in_range(float scale, float largest) {
  const float next = bits_float(float_bits(largest) + 1u);
  const double middle = 0.5 * (static_cast<double>(largest) + static_cast<double>(next));
  const double product = middle * static_cast<double>(__builtin_fabsf(scale));
  if (!(product > 0.0)) return NAN;
  const float most = bits_float(0x7f7fffffu);
  if (product >= static_cast<double>(most)) return most;
  const float rounded = static_cast<float>(product);
  return static_cast<double>(rounded) > product ? bits_float(float_bits(rounded) - 1u) : rounded;
}

// What a kernel knows of a scale. For gradients `scale` is greatest_in_range.
struct Param {
  float scale;
  float reciprocal;  // 0: only exact() is right
  __device__ __forceinline__ bool is_fast() const { return reciprocal != 0.0f; }
};

template <class X, Path kPath>
__device__ __forceinline__ Param param_at(const FlatArgs<X>& a, int64_t offset) {
  const float scale = a.scale != nullptr ? a.scale[offset] : 1.0f;
  if constexpr (kPath == Path::kGradient) return {greatest_in_range(scale, a.round.format.largest), 1.0f};
  return {scale, kPath == Path::kOther && a.scale == nullptr ? 1.0f : a.round.reciprocal(scale)};
}

template <class X, Path kPath>
__device__ __forceinline__ X fast(const FlatArgs<X>& a, X x, X grad, const Param& p, uint32_t random) {
  const float v = widen(x);
  if constexpr (kPath == Path::kGradient) {
    return __builtin_fabsf(v) <= p.scale ? grad : X{};
  } else {
    // without a scale formats need not be within the bounds of mended quotients
    const bool divides = kPath != Path::kOther || a.scale != nullptr;
    const float q = divides ? a.round.mended(v, p.scale, p.reciprocal) : __builtin_fabsf(v);
    return rounded_to<X>(with_sign(a.round.template operator()<kPath>(q, random) * p.scale, v));
  }
}

// x / scale, rounded, times the scale, whatever the scale.
template <class X>
__device__ __forceinline__ X any_scale(const FlatArgs<X>& a, X x, const Param& p, uint32_t random) {
  const float v = widen(x), q = p.is_fast() ? a.round.mended(v, p.scale, p.reciprocal) : __builtin_fabsf(v / p.scale);
  return rounded_to<X>(with_sign(a.round.template operator()<Path::kRandom>(q, random) * p.scale, v));
}

// For any scale.
template <class X, Path kPath>
__device__ __forceinline__ X exact(const FlatArgs<X>& a, int64_t e, int64_t offset, uint64_t seed) {
  if constexpr (kPath == Path::kGradient) {
    return fast<X, kPath>(a, a.x[e], a.grad[e], param_at<X, kPath>(a, offset), 0);
  } else {
    const float scale = a.scale != nullptr ? a.scale[offset] : 1.0f;
    const uint32_t word = wants_words<kPath>(a.round.format) ? random_word_at(e, seed) : 0;
    const float v = widen(a.x[e]), m = a.round.template operator()<kPath>(__builtin_fabsf(v / scale), word);
    return rounded_to<X>(with_sign(m * scale, v));
  }
}

// ---- flat arrays ----------------------------------------------------------------------------------------------------

// The vector at e of in[0], with the gradient in in[1], by parameters param(i).
template <class X, Path kPath, class Params>
__device__ __forceinline__ void store_result(const FlatArgs<X>& a, int64_t e, const Vector<X, kVector<X>> (&in)[2],
                                             const Params& param, uint64_t seed) {
  constexpr int V = kVector<X>;
  uint32_t words[V] = {};
  if (wants_words<kPath>(a.round.format)) random_words_at<V>(e, seed, words);
  X out[V];
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = fast<X, kPath>(a, in[0].get(i), in[kPath == Path::kGradient].get(i), param(i), words[i]);
  store_vector<V>(a.y + e, out);
}

template <class X, Path kPath>
__device__ __forceinline__ void load_inputs(const FlatArgs<X>& a, int64_t e, Vector<X, kVector<X>> (&in)[2]) {
  in[0] = load_vector<kVector<X>>(a.x + e);
  if constexpr (kPath == Path::kGradient) in[1] = load_vector<kVector<X>>(a.grad + e);
}

// For a scale that is constant over the tensor or over runs. All loads are issued before anything is computed.
template <class X, Path kPath, Lookup kLookup>
__global__ void __launch_bounds__(kThreads) flat_kernel(const QO_GRID_CONSTANT FlatArgs<X> a) {
  constexpr int V = kVector<X>, U = kUnroll<kPath>;
  const int64_t n = a.layout.numel, block_span = int64_t{kThreads} * U * V;
  const uint64_t seed = value_of(a.seed);
  for (int64_t first = blockIdx.x * block_span + int64_t{threadIdx.x} * V; first < n; first += gridDim.x * block_span) {
    Vector<X, V> in[U][2];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t e = first + u * (kThreads * V);
      if (e + V <= n) load_inputs<X, kPath>(a, e, in[u]);
    }
    Param param;
    if constexpr (kLookup == Lookup::kUniform) param = param_at<X, kPath>(a, 0);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t e = first + u * (kThreads * V);
      if (e >= n) break;
      int64_t run = 0, left = V, offset[2] = {0, 0};  // left: elements up to the end of the run
      if constexpr (kLookup == Lookup::kRuns) {
        run = a.layout.length.quotient(e);
        left = (run + 1) * a.layout.length.divisor - e;
        a.layout.outer.seek(run, offset);
        param = param_at<X, kPath>(a, offset[0]);
      }
      if (e + V <= n && left >= V && param.is_fast()) {
        store_result<X, kPath>(a, e, in[u], [&](int) { return param; }, seed);
        continue;
      }
#pragma unroll 1
      for (int i = 0; i < V && e + i < n; ++i) {
        if (i == left) a.layout.outer.seek(run + 1, offset);
        a.y[e + i] = exact<X, kPath>(a, e + i, offset[0], seed);
      }
    }
  }
}

// For a scale that changes along a row. Rows are whole vectors. The step is a multiple of the row, so that a thread stays in its
// columns and keeps their parameters in registers.
template <class X, Path kPath>
__global__ void __launch_bounds__(kThreads) columns_kernel(const QO_GRID_CONSTANT FlatArgs<X> a) {
  constexpr int V = kVector<X>, U = V == 8 ? 2 : kUnroll<kPath>;
  const FlatLayout& layout = a.layout;
  const int64_t n = layout.numel, thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, step = a.step * V;
  if (thread >= a.step) return;
  const uint64_t seed = value_of(a.seed);
  Param param[V];
  bool loaded = false, fast = true;
  for (int64_t first = thread * V; first < n; first += step * U) {
    Vector<X, V> in[U][2];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * step < n) load_inputs<X, kPath>(a, first + u * step, in[u]);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t e = first + u * step;
      if (e >= n) break;
      if (a.reload || !loaded || !fast) {
        const int64_t row = layout.length.quotient(e), column = e - row * layout.length.divisor, stride = layout.column_stride[0];
        int64_t offset[2];
        layout.outer.seek(row, offset);
        offset[0] += column * stride;
        loaded = fast = true;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          param[i] = param_at<X, kPath>(a, offset[0] + i * stride);
          fast = fast && param[i].is_fast();
        }
        if (!fast) {
#pragma unroll 1
          for (int i = 0; i < V; ++i) a.y[e + i] = exact<X, kPath>(a, e + i, offset[0] + i * stride, seed);
          continue;
        }
      }
      store_result<X, kPath>(a, e, in[u], [&](int i) { return param[i]; }, seed);
    }
  }
}

template <class X, Path kPath>
void launch_path(FlatArgs<X> a, const Launch& at) {
  constexpr int V = kVector<X>;
  const FlatLayout& layout = a.layout;
  if (layout.lookup == Lookup::kColumns) {
    const int64_t vectors = layout.numel / V, row = layout.length.divisor / V, most = multiprocessors() * kBlocksPerSm;
    // With threads for a few whole rows, rounding down to whole rows leaves few of them idle.
    const int64_t wanted = std::max(vectors / 4, std::min(row * 4, vectors));
    const int64_t blocks = blocks_for(wanted, kThreads, most), threads = blocks * kThreads;
    a.step = threads / row * row;
    a.reload = layout.outer_varies || a.step == 0;
    if (a.step == 0) a.step = threads;
    return launch(at, columns_kernel<X, kPath>, blocks, dim3(kThreads), a);
  }
  const int64_t blocks = blocks_for(layout.numel, int64_t{kThreads} * kUnroll<kPath> * V, kMaxGrid);
  const auto kernel =
      layout.lookup == Lookup::kUniform ? flat_kernel<X, kPath, Lookup::kUniform> : flat_kernel<X, kPath, Lookup::kRuns>;
  launch(at, kernel, blocks, dim3(kThreads), a);
}

// Launches the kernel for dense, aligned data, or gives false if the data is not. The last operand of `it`, which is sorted by the
// result and coalesced, has strides 0: nobody reads it, or it lies as the result does.
template <class X>
bool launch_flat(const QuantizeFloatParams& p, const Iteration& it, const Launch& at) {
  const FlatArgs<X> a{.round = Rounder::of(p.format),
                      .x = static_cast<const X*>(p.x),
                      .grad = static_cast<const X*>(p.grad),
                      .y = static_cast<X*>(p.y),
                      .scale = static_cast<const float*>(p.scale),
                      .seed = p.seed,
                      .layout = flat_layout(it, kVector<X>)};
  if (a.layout.lookup == Lookup::kNone || !is_aligned(p.x, 16) || !is_aligned(p.y, 16)) return false;
  if (p.grad != nullptr && !is_aligned(p.grad, 16)) return false;
  switch (path_of(p.format, p.grad != nullptr)) {
    case Path::kPlain: launch_path<X, Path::kPlain>(a, at); break;
    case Path::kRandom: launch_path<X, Path::kRandom>(a, at); break;
    case Path::kOther: launch_path<X, Path::kOther>(a, at); break;
    case Path::kGradient: launch_path<X, Path::kGradient>(a, at); break;
  }
  return true;
}

// ---- random words across the order of memory ------------------------------------------------------------------------

// Channels-last tensors: the last dimension in memory, the channels, is not the last one of the index, which is the next one, the
// pixels. A thread has a vector of channels of four neighbouring pixels, so that each channel takes one counter.
template <class X>
struct AcrossArgs {
  static constexpr bool kBarriers = false;
  FlatArgs<X> of;
  FastDiv vectors, fours;  // of a row of channels; of the pixels of an outer index
  Dims<2> outer;           // to the offsets of the scale and of the index
  int64_t channels, pixels;
  int64_t scale_stride;  // of channels; pixels share a scale
  int64_t index_stride;  // of channels
  int64_t tiles;
};

template <class X>
__global__ void __launch_bounds__(kThreads) across_kernel(const QO_GRID_CONSTANT AcrossArgs<X> args) {
  constexpr int V = kVector<X>;
  const FlatArgs<X>& a = args.of;
  const uint64_t seed = value_of(a.seed);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x; t < args.tiles; t += step) {
    const int64_t four = args.vectors.quotient(t), channel = (t - four * args.vectors.divisor) * V;
    const int64_t outer = args.fours.quotient(four), pixel = (four - outer * args.fours.divisor) * 4;
    const int64_t e = (outer * args.pixels + pixel) * args.channels + channel;
    Vector<X, V> in[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) in[j] = load_vector<V>(a.x + e + j * args.channels);
    int64_t offset[2];
    args.outer.seek(outer, offset);
    const int64_t index = offset[1] + pixel + channel * args.index_stride, scale = offset[0] + channel * args.scale_stride;
    X out[4][V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Param p = param_at<X, Path::kRandom>(a, scale + i * args.scale_stride);
      const Random4 words = philox(static_cast<uint64_t>(index + i * args.index_stride) / 4, seed);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j][i] = any_scale(a, in[j].get(i), p, words.word[j]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) store_vector<V>(a.y + e + j * args.channels, out[j]);
  }
}

// As launch_flat, for plain formats. `it` is sorted by the result and coalesced, and its last operand is the index.
template <class X>
bool launch_across(const QuantizeFloatParams& p, const Iteration& it, const Launch& at) {
  constexpr int V = kVector<X>;
  const int c = it.ndim - 1, pixel = it.ndim - 2;
  if (path_of(p.format, p.grad != nullptr) != Path::kRandom || pixel < 0 || !is_aligned(p.x, 16) || !is_aligned(p.y, 16))
    return false;
  int64_t expected = 1;
  for (int d = c; d >= 0; expected *= it.size[d--])
    if (it.stride[0][d] != expected || it.stride[1][d] != expected || (d != pixel && it.stride[3][d] % 4 != 0)) return false;
  if (it.size[c] % V != 0 || it.size[pixel] % 4 != 0 || it.stride[3][pixel] != 1 || it.stride[2][pixel] != 0) return false;
  const int64_t tiles = numel(it) / (V * 4);
  const AcrossArgs<X> a{.of = {.round = Rounder::of(p.format),
                               .x = static_cast<const X*>(p.x),
                               .grad = nullptr,
                               .y = static_cast<X*>(p.y),
                               .scale = static_cast<const float*>(p.scale),
                               .seed = p.seed,
                               .layout = {}},
                        .vectors = FastDiv(it.size[c] / V),
                        .fours = FastDiv(it.size[pixel] / 4),
                        .outer = make_dims<2>(it, 2, pixel),
                        .channels = it.size[c],
                        .pixels = it.size[pixel],
                        .scale_stride = it.stride[2][c],
                        .index_stride = it.stride[3][c],
                        .tiles = tiles};
  launch(at, across_kernel<X>, blocks_for(tiles, kThreads, kMaxGrid), dim3(kThreads), a);
  return true;
}

// ---- any strides, any dtype, any format -----------------------------------------------------------------------------

template <class X>
struct StridedArgs {
  static constexpr bool kBarriers = false;
  Dims<4> dims;  // x, y, scale, index or grad
  int64_t n;
  const X* x;
  const X* grad;  // null: forward
  X* y;
  const Compute<X>* scale;  // null: 1
  FloatFormat format;
  Seed seed;
};

template <class X>
__global__ void __launch_bounds__(kThreads) strided_kernel(const QO_GRID_CONSTANT StridedArgs<X> a) {
  using T = Compute<X>;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const uint64_t seed = value_of(a.seed);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    int64_t at[4];
    a.dims.seek(i, at);
    const T scale = a.scale != nullptr ? a.scale[at[2]] : T(1), v = widen(a.x[at[0]]) / scale;
    if (a.grad != nullptr) {
      a.y[at[1]] = in_range(v, a.format) ? a.grad[at[3]] : X{};
    } else {
      const uint32_t random = a.format.rounding == Rounding::kStochastic ? random_word_at(at[3], seed) : 0;
      a.y[at[1]] = rounded_to<X>(round_to_format(v, a.format, random) * scale);
    }
  }
}

// Gives the last operand strides 0 if nobody reads it or if it lies as the result does; false if neither.
bool drop_last_operand(const QuantizeFloatParams& p, Iteration* it) {
  const bool read = p.grad != nullptr || p.format.rounding == Rounding::kStochastic;
  bool same = true;
  for (int d = 0; d < it->ndim; ++d) same = same && (it->size[d] == 1 || it->stride[3][d] == it->stride[1][d]);
  if (read && !same) return false;
  for (int d = 0; d < it->ndim; ++d) it->stride[3][d] = 0;
  return true;
}

}  // namespace

void quantize_float_cuda(const QuantizeFloatParams& p, const Launch& at) {
  with_float_type(p.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>) {
      Iteration it = p.it;
      if (p.format.method != RoundingMethod::kElements && drop_last_operand(p, &it)) {
        sort_and_coalesce(&it, 1);
        if (launch_flat<X>(p, it, at)) return;
      }
    }
    Iteration it = p.it;
    sort_and_coalesce(&it, 1);
    if constexpr (!std::is_same_v<X, double>)
      if (launch_across<X>(p, it, at)) return;
    const StridedArgs<X> a{.dims = make_dims<4>(it, 0, it.ndim),
                           .n = numel(it),
                           .x = static_cast<const X*>(p.x),
                           .grad = static_cast<const X*>(p.grad),
                           .y = static_cast<X*>(p.y),
                           .scale = static_cast<const Compute<X>*>(p.scale),
                           .format = p.format,
                           .seed = p.seed};
    launch(at, strided_kernel<X>, blocks_for(a.n, kThreads, kMaxGrid), dim3(kThreads), a);
  });
}

}  // namespace quant_ops
