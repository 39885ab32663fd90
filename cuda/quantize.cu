// quant_tensor_forward and dequant_tensor on CUDA, and zero points as int32.
//
//   q = clamp(rne(x / scale) + zero_point, qmin, qmax),  x^ = (q - zero_point) * scale
//
// Dense, aligned data is one flat array, whatever its shape: each thread handles 16-byte vectors, and Lookup (layout.cuh) says
// which scale and zero point they meet. Everything else (other strides, float64, 32-bit codes) takes the generic kernels, one
// element a thread. Bits are those of cpp/cpu/quantize.cpp. These kernels do not use `exact_in_float32` of ops.h: every thread
// reads its zero point anyway, and decides by itself.
#include <algorithm>

#include "device/common.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors a thread has in flight: 2048 threads x 64 bytes cover the latency of the memory
constexpr int64_t kBlocksPerSm = 8;
constexpr int64_t kExact = 1 << 24;  // integers up to here are exact in float32

// ---- one element ----------------------------------------------------------------------------------------------------

// clamp(rne(x / scale), qmin - z, qmax - z), whatever the scale and the zero point.
template <class T>
__device__ __forceinline__ double exact_steps(T x, T scale, int64_t z, int32_t qmin, int32_t qmax) {
  return clamp_steps<double>(quantize_steps(x, scale), static_cast<double>(qmin - z), static_cast<double>(qmax - z));
}

// Whether the bounds of code - zero_point are exact in float32, as Quantizer assumes.
__device__ __forceinline__ bool are_exact(int64_t lo, int64_t hi) { return lo >= -kExact && hi <= kExact; }

// From X to codes. uint8_t stands for int8 too, which has the same bits.
template <class X, class Y>
struct Quantize {
  using In = X;
  using Out = Y;
  static constexpr int kVector = 16 / sizeof(X);

  const float* scale;
  const int32_t* zero_point;
  int32_t qmin, qmax;

  using Param = Quantizer;

  __device__ __forceinline__ Param param(int64_t scale_offset, int64_t zero_offset) const {
    const int32_t z = zero_at(zero_point, zero_offset);
    Quantizer p = Quantizer::of(scale[scale_offset], z, qmin, qmax);
    if (!are_exact(int64_t{qmin} - z, int64_t{qmax} - z)) p.reciprocal = 0.0f;
    return p;
  }

  __device__ __forceinline__ static Y fast(X x, const Param& p) { return static_cast<Y>(p.fast(widen(x))); }

  __device__ __forceinline__ Y exact(X x, int64_t scale_offset, int64_t zero_offset) const {
    const int64_t z = zero_at(zero_point, zero_offset);
    return static_cast<Y>(steps_to_code(exact_steps(widen(x), scale[scale_offset], z, qmin, qmax), z, qmin, qmax));
  }
};

// From X to simulated values of type X.
template <class X>
struct Simulate {
  using In = X;
  using Out = X;
  static constexpr int kVector = 16 / sizeof(X);

  const float* scale;
  const int32_t* zero_point;
  int32_t qmin, qmax;

  struct Param {
    float scale, reciprocal;  // reciprocal 0: only exact() is right
    float lo, hi;             // of code - zero_point
    __device__ __forceinline__ bool is_fast() const { return reciprocal != 0.0f; }
  };

  __device__ __forceinline__ Param param(int64_t scale_offset, int64_t zero_offset) const {
    const int64_t z = zero_at(zero_point, zero_offset), lo = qmin - z, hi = qmax - z;
    const float s = scale[scale_offset];
    return {s, are_exact(lo, hi) ? safe_reciprocal(s) : 0.0f, static_cast<float>(lo), static_cast<float>(hi)};
  }

  __device__ __forceinline__ static X fast(X x, const Param& p) {
    const float steps = round_even(mended_quotient(widen(x), p.scale, p.reciprocal)) + 0.0f;
    return rounded_to<X>(clamp_steps(steps, p.lo, p.hi) * p.scale);
  }

  __device__ __forceinline__ X exact(X x, int64_t scale_offset, int64_t zero_offset) const {
    const float s = scale[scale_offset];
    return rounded_to<X>(static_cast<float>(exact_steps(widen(x), s, zero_at(zero_point, zero_offset), qmin, qmax)) * s);
  }
};

// From one-byte codes.
template <class Y>
struct Dequantize {
  using In = uint8_t;
  using Out = Y;
  static constexpr int kVector = 16 / sizeof(Y);

  const float* scale;
  const int32_t* zero_point;
  int32_t sign;  // 128: the bytes are int8, and (byte ^ 128) - 128 is the code; 0: uint8

  struct Param {
    float scale;
    int32_t zero_point;  // + sign
    bool small;          // the difference of codes fits int32
    __device__ __forceinline__ bool is_fast() const { return small; }
  };

  __device__ __forceinline__ Param param(int64_t scale_offset, int64_t zero_offset) const {
    Param p;
    p.scale = scale[scale_offset];
    const int32_t z = zero_at(zero_point, zero_offset);
    p.small = z >= -(1 << 30) && z <= (1 << 30);
    p.zero_point = p.small ? z + sign : 0;
    return p;
  }

  __device__ __forceinline__ Y fast(uint8_t q, const Param& p) const {
    return rounded_to<Y>(static_cast<float>((q ^ sign) - p.zero_point) * p.scale);
  }

  __device__ __forceinline__ Y exact(uint8_t q, int64_t scale_offset, int64_t zero_offset) const {
    return rounded_to<Y>(dequantize_code<float>((q ^ sign) - sign, zero_at(zero_point, zero_offset), scale[scale_offset]));
  }
};

// ---- flat arrays ----------------------------------------------------------------------------------------------------

template <class Op>
struct FlatArgs {
  static constexpr bool kBarriers = false;
  Op op;
  const typename Op::In* in;
  typename Op::Out* out;
  FlatLayout layout;
  int64_t step = 0;     // columns: vectors between a thread's vectors
  bool reload = false;  // columns: scale and zero point change from vector to vector
};

// For a scale and zero point that are constant over the tensor or over runs. All loads are issued before anything is computed.
template <class Op, Lookup kLookup>
__global__ void __launch_bounds__(kThreads) flat_kernel(const QO_GRID_CONSTANT FlatArgs<Op> a) {
  constexpr int V = Op::kVector;
  const int64_t n = a.layout.numel, block_span = int64_t{kThreads} * kUnroll * V;
  for (int64_t first = blockIdx.x * block_span + int64_t{threadIdx.x} * V; first < n; first += gridDim.x * block_span) {
    Vector<typename Op::In, V> in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = first + u * (kThreads * V);
      if (e + V <= n) in[u] = load_vector<V>(a.in + e);
    }
    typename Op::Param param;
    if constexpr (kLookup == Lookup::kUniform) param = a.op.param(0, 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = first + u * (kThreads * V);
      if (e >= n) break;
      int64_t run = 0, left = V, offset[2] = {0, 0};  // left: elements up to the end of the run
      if constexpr (kLookup == Lookup::kRuns) {
        run = a.layout.length.quotient(e);
        left = (run + 1) * a.layout.length.divisor - e;
        a.layout.outer.seek(run, offset);
        param = a.op.param(offset[0], offset[1]);
      }
      if (e + V <= n && left >= V && param.is_fast()) {
        typename Op::Out out[V];
#pragma unroll
        for (int i = 0; i < V; ++i) out[i] = a.op.fast(in[u].get(i), param);
        store_vector<V>(a.out + e, out);
        continue;
      }
#pragma unroll 1
      for (int i = 0; i < V && e + i < n; ++i) {
        if (i == left) a.layout.outer.seek(run + 1, offset);
        a.out[e + i] = a.op.exact(a.in[e + i], offset[0], offset[1]);
      }
    }
  }
}

// For a scale or zero point that changes along a row. Rows are whole vectors. The step is a multiple of the row, so that a thread
// stays in its columns and keeps their parameters in registers.
template <class Op>
__global__ void __launch_bounds__(kThreads) columns_kernel(const QO_GRID_CONSTANT FlatArgs<Op> a) {
  constexpr int V = Op::kVector, kUnroll = V == 8 ? 2 : 4;  // the parameters of V columns take registers too
  const FlatLayout& layout = a.layout;
  const int64_t n = layout.numel, thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, step = a.step * V;
  if (thread >= a.step) return;
  typename Op::Param param[V];
  bool loaded = false, fast = true;
  for (int64_t first = thread * V; first < n; first += step * kUnroll) {
    Vector<typename Op::In, V> in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * step < n) in[u] = load_vector<V>(a.in + first + u * step);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = first + u * step;
      if (e >= n) break;
      const int64_t ss = layout.column_stride[0], sz = layout.column_stride[1];
      if (a.reload || !loaded || !fast) {
        const int64_t row = layout.length.quotient(e), column = e - row * layout.length.divisor;
        int64_t offset[2];
        layout.outer.seek(row, offset);
        offset[0] += column * ss;
        offset[1] += column * sz;
        loaded = fast = true;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          param[i] = a.op.param(offset[0] + i * ss, offset[1] + i * sz);
          fast = fast && param[i].is_fast();
        }
        if (!fast) {
#pragma unroll 1
          for (int i = 0; i < V; ++i) a.out[e + i] = a.op.exact(a.in[e + i], offset[0] + i * ss, offset[1] + i * sz);
          continue;
        }
      }
      typename Op::Out out[V];
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = a.op.fast(in[u].get(i), param[i]);
      store_vector<V>(a.out + e, out);
    }
  }
}

// Launches the kernel for dense, aligned data, or gives false if the data is not. `it` is sorted by the result and coalesced.
template <class Op>
bool launch_flat(const Op& op, const Iteration& it, const void* in, void* out, const Launch& at) {
  constexpr int V = Op::kVector;
  FlatArgs<Op> a{.op = op,
                 .in = static_cast<const typename Op::In*>(in),
                 .out = static_cast<typename Op::Out*>(out),
                 .layout = flat_layout(it, V)};
  const FlatLayout& layout = a.layout;
  if (layout.lookup == Lookup::kNone || !is_aligned(in, V * sizeof(typename Op::In)) ||
      !is_aligned(out, V * sizeof(typename Op::Out)))
    return false;
  if (layout.lookup == Lookup::kColumns) {
    const int64_t vectors = layout.numel / V, row = layout.length.divisor / V, most = multiprocessors() * kBlocksPerSm;
    // With threads for a few whole rows, rounding down to whole rows leaves few of them idle.
    const int64_t wanted = std::max(vectors / kUnroll, std::min(row * 4, vectors));
    const int64_t blocks = blocks_for(wanted, kThreads, most), threads = blocks * kThreads;
    a.step = threads / row * row;
    a.reload = layout.outer_varies || a.step == 0;
    if (a.step == 0) a.step = threads;
    launch(at, columns_kernel<Op>, blocks, dim3(kThreads), a);
    return true;
  }
  const int64_t blocks = blocks_for(layout.numel, int64_t{kThreads} * kUnroll * V, kMaxGrid);
  if (layout.lookup == Lookup::kUniform)
    launch(at, flat_kernel<Op, Lookup::kUniform>, blocks, dim3(kThreads), a);
  else
    launch(at, flat_kernel<Op, Lookup::kRuns>, blocks, dim3(kThreads), a);
  return true;
}

// ---- any strides, any dtype -----------------------------------------------------------------------------------------

struct StridedArgs {
  static constexpr bool kBarriers = false;
  Dims<4> dims;  // in, out, scale, zero_point
  int64_t n;
  const void* in;
  void* out;
  const void* scale;
  const int32_t* zero_point;
  DType code;                  // of the codes read or written
  int32_t qmin = 0, qmax = 0;  // to quantize, and likewise the next one
  bool simulate = false;
};

template <class X>
__global__ void __launch_bounds__(kThreads) quantize_strided_kernel(const QO_GRID_CONSTANT StridedArgs a) {
  using T = Compute<X>;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    int64_t at[4];
    a.dims.seek(i, at);
    const T s = static_cast<const T*>(a.scale)[at[2]];
    const int64_t z = zero_at(a.zero_point, at[3]);
    const double steps = exact_steps<T>(widen(static_cast<const X*>(a.in)[at[0]]), s, z, a.qmin, a.qmax);
    if (a.simulate)
      static_cast<X*>(a.out)[at[1]] = rounded_to<X>(static_cast<T>(steps) * s);
    else
      store_code(a.out, a.code, at[1], steps_to_code(steps, z, a.qmin, a.qmax));
  }
}

template <class Y>
__global__ void __launch_bounds__(kThreads) dequantize_strided_kernel(const QO_GRID_CONSTANT StridedArgs a) {
  using T = Compute<Y>;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    int64_t at[4];
    a.dims.seek(i, at);
    const T s = static_cast<const T*>(a.scale)[at[2]];
    static_cast<Y*>(a.out)[at[1]] =
        rounded_to<Y>(dequantize_code<T>(load_code(a.in, a.code, at[0]), zero_at(a.zero_point, at[3]), s));
  }
}

// ---- zero points ----------------------------------------------------------------------------------------------------

struct ZeroPointArgs {
  static constexpr bool kBarriers = false;
  ZeroPointParams p;
};

__global__ void __launch_bounds__(kThreads) zero_points_kernel(const QO_GRID_CONSTANT ZeroPointArgs args) {
  const ZeroPointParams& a = args.p;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += step) {
    const auto learned = [&](double z) { return round_zero_point(z, a.qmin, a.qmax); };
    int64_t value;
    if (a.is_int64) {
      value = static_cast<const int64_t*>(a.from)[i];
    } else {
      switch (a.dtype) {
        case DType::kFloat32: value = learned(static_cast<const float*>(a.from)[i]); break;
        case DType::kFloat16: value = learned(widen(static_cast<const Half*>(a.from)[i])); break;
        case DType::kBFloat16: value = learned(widen(static_cast<const BFloat16*>(a.from)[i])); break;
        case DType::kFloat64: value = learned(static_cast<const double*>(a.from)[i]); break;
        default: value = load_code(a.from, a.dtype, i);
      }
    }
    a.to[i] = static_cast<int32_t>(value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : value);
  }
}

}  // namespace

void quantize_cuda(const QuantizeParams& p, const Launch& at) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  const auto flat = [&](auto op) {
    op.scale = static_cast<const float*>(p.scale);
    op.zero_point = p.zero_point;
    op.qmin = p.qmin;
    op.qmax = p.qmax;
    return launch_flat(op, it, p.x, p.y, at);
  };
  with_float_type(p.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>) {
      if (p.simulate) {
        if (flat(Simulate<X>{})) return;
      } else if (p.y_dtype == DType::kInt16) {
        if (flat(Quantize<X, int16_t>{})) return;
      } else if (p.y_dtype != DType::kInt32) {
        if (flat(Quantize<X, uint8_t>{})) return;
      }
    }
    const int64_t n = numel(it);
    const StridedArgs a{.dims = make_dims<4>(it, 0, it.ndim),
                        .n = n,
                        .in = p.x,
                        .out = p.y,
                        .scale = p.scale,
                        .zero_point = p.zero_point,
                        .code = p.y_dtype,
                        .qmin = p.qmin,
                        .qmax = p.qmax,
                        .simulate = p.simulate};
    launch(at, quantize_strided_kernel<X>, blocks_for(n, kThreads, kMaxGrid), dim3(kThreads), a);
  });
}

void dequantize_cuda(const DequantizeParams& p, const Launch& at) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  with_float_type(p.y_dtype, [&](auto* y) {
    using Y = std::remove_pointer_t<decltype(y)>;
    if constexpr (!std::is_same_v<Y, double>) {
      if (p.q_dtype == DType::kInt8 || p.q_dtype == DType::kUInt8) {
        const Dequantize<Y> op{static_cast<const float*>(p.scale), p.zero_point, p.q_dtype == DType::kInt8 ? 128 : 0};
        if (launch_flat(op, it, p.q, p.y, at)) return;
      }
    }
    const int64_t n = numel(it);
    const StridedArgs a{.dims = make_dims<4>(it, 0, it.ndim),
                        .n = n,
                        .in = p.q,
                        .out = p.y,
                        .scale = p.scale,
                        .zero_point = p.zero_point,
                        .code = p.q_dtype};
    launch(at, dequantize_strided_kernel<Y>, blocks_for(n, kThreads, kMaxGrid), dim3(kThreads), a);
  });
}

void zero_points_cuda(const ZeroPointParams& p, const Launch& at) {
  if (p.n == 0) return;
  launch(at, zero_points_kernel, blocks_for(p.n, kThreads, kMaxGrid), dim3(kThreads), ZeroPointArgs{p});
}

}  // namespace quant_ops
