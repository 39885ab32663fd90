// Activations to int8 codes for the integer products: NHWC, with the channels of each group padded, from any strides.
//
//   floating x:  q = clamp(rne(x / scale) + zero_point, -128, 127)      int8 x: itself      uint8 x: x - 128
//
// A row of a linear layer is a sample of one pixel. Zero points of uint8 codes become smaller by 128 as well. Read next: conv2d.cu.
#include "device/common.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;

struct CodesArgs {
  static constexpr bool kBarriers = false;
  CodesParams p;
  FastDiv pixels, columns;  // of a sample, of a row of the image
  FastDiv inner;            // of a thread's index, whose faster part is the pixel or the vector within it
  FastDiv tap;
  int64_t total;
  bool pixels_first;  // neighbouring threads take neighbouring pixels: columns are contiguous in x
  bool vectors;       // channels are contiguous, aligned and whole
};

// From the elements of a sample to its codes.
template <class X>
struct ToCode {
  Quantizer quantizer;

  __device__ __forceinline__ ToCode(const CodesParams& p, int64_t sample)
      : quantizer(Quantizer::of(p.in.scale[sample * p.in.scale_stride], zero_at(p.in.zero_point, sample * p.in.zero_point_stride),
                                -128, 127)) {}
  __device__ __forceinline__ int8_t operator()(X x) const { return static_cast<int8_t>(quantizer(widen(x))); }
};
template <>
struct ToCode<int8_t> {
  __device__ __forceinline__ ToCode(const CodesParams&, int64_t) {}
  __device__ __forceinline__ int8_t operator()(int8_t x) const { return x; }
};
template <>
struct ToCode<uint8_t> {
  __device__ __forceinline__ ToCode(const CodesParams&, int64_t) {}
  __device__ __forceinline__ int8_t operator()(uint8_t x) const { return static_cast<int8_t>(x ^ 0x80u); }
};

// A thread makes V bytes of a pixel.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) codes_kernel(const QO_GRID_CONSTANT CodesArgs a) {
  const CodesParams& p = a.p;
  const X* x = static_cast<const X*>(p.in.x);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t slow = a.inner.quotient(i), fast = i - slow * a.inner.divisor;
    const int64_t m = a.pixels_first ? fast : slow, byte = (a.pixels_first ? slow : fast) * V;
    const int64_t sample = a.pixels.quotient(m), pixel = m - sample * a.pixels.divisor;
    const int64_t row = a.columns.quotient(pixel), column = pixel - row * a.columns.divisor;
    const int64_t group = a.tap.quotient(byte), channel = byte - group * a.tap.divisor;
    const int64_t at =
        sample * p.stride[0] + (group * p.channels + channel) * p.stride[1] + row * p.stride[2] + column * p.stride[3];
    const ToCode<X> to_code(p, sample);
    int8_t codes[V];
    if (a.vectors) {
      constexpr int kLoad = V * sizeof(X) < 16 ? V : 16 / sizeof(X);
#pragma unroll
      for (int v = 0; v < V / kLoad; ++v) {
        const auto in = load_vector<kLoad>(x + at + v * kLoad);
#pragma unroll
        for (int e = 0; e < kLoad; ++e) codes[v * kLoad + e] = to_code(in.get(e));
      }
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) codes[e] = channel + e < p.channels ? to_code(x[at + e * p.stride[1]]) : int8_t{0};
    }
    store_vector<V>(p.q + m * p.pixel + byte, codes);
  }
}

struct SampleParamsArgs {
  static constexpr bool kBarriers = false;
  SampleParams p;
};

__global__ void __launch_bounds__(kThreads) sample_params_kernel(const QO_GRID_CONSTANT SampleParamsArgs args) {
  const SampleParams& p = args.p;
  const int64_t sample = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (sample >= p.samples) return;
  const int32_t zero = zero_at(p.zero_point, sample * p.zero_point_stride) - p.offset;
  if (p.scale_out != nullptr) p.scale_out[sample] = p.scale != nullptr ? p.scale[sample * p.scale_stride] : 1.0f;
  if (p.zero_point_out != nullptr) p.zero_point_out[sample] = zero;
  if (p.padding == nullptr) return;
  int8_t line[kVectorBytes];
#pragma unroll
  for (int i = 0; i < kVectorBytes; ++i) line[i] = static_cast<int8_t>(zero);
  store_vector<kVectorBytes>(p.padding + sample * kVectorBytes, line);
}

}  // namespace

void write_codes_cuda(const CodesParams& p, const Launch& at) {
  if (p.pixel == 0 || p.samples * p.height * p.width == 0) return;
  CodesArgs a{};
  a.p = p;
  const int64_t bytes = p.tap % kVectorBytes == 0 ? kVectorBytes : 4, parts = p.pixel / bytes,
                pixels = p.samples * p.height * p.width;
  a.pixels = FastDiv(p.height * p.width);
  a.columns = FastDiv(p.width);
  a.tap = FastDiv(p.tap);
  a.total = pixels * parts;
  a.pixels_first = p.stride[1] != 1;
  a.inner = FastDiv(a.pixels_first ? pixels : parts);
  const int64_t element = dtype_bytes(p.in.dtype), load = bytes * element < 16 ? bytes * element : 16;
  a.vectors = p.stride[1] == 1 && p.channels % bytes == 0 && is_aligned(p.in.x, load);
  for (int d : {0, 2, 3}) a.vectors = a.vectors && p.stride[d] * element % load == 0;
  const auto run = [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    launch(at, bytes == kVectorBytes ? codes_kernel<X, kVectorBytes> : codes_kernel<X, 4>, blocks_for(a.total, kThreads, kMaxGrid),
           dim3(kThreads), a);
  };
  switch (p.in.dtype) {
    case DType::kFloat32: return run(static_cast<float*>(nullptr));
    case DType::kFloat16: return run(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return run(static_cast<BFloat16*>(nullptr));
    case DType::kInt8: return run(static_cast<int8_t*>(nullptr));
    default: return run(static_cast<uint8_t*>(nullptr));
  }
}

void write_sample_params_cuda(const SampleParams& p, const Launch& at) {
  if (p.samples == 0) return;
  launch(at, sample_params_kernel, blocks_for(p.samples, kThreads, kMaxGrid), dim3(kThreads), SampleParamsArgs{p});
}

}  // namespace quant_ops
