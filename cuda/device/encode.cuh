// Activations to int8 codes in registers, for kernels that quantize what they load: q = clamp(rne(x / scale) + zero_point, -128,
// 127) of floating x, and 8-bit x as it is. Read next: conv2d_depthwise.cu.
#pragma once

#include "contract/ops.h"
#include "device/range.cuh"

namespace quant_ops {

// Codes of x by the scale and zero point of one sample.
template <class X>
struct CodesOf {
  Int8Codes codes_of;

  __device__ __forceinline__ CodesOf(const InputParams& in, int64_t sample, int8_t)
      : codes_of(Int8Codes::of(
            Quantizer::of(in.scale[sample * in.scale_stride], zero_at(in.zero_point, sample * in.zero_point_stride), -128, 127))) {}

  // Elements that have the zero point's code.
  __device__ __forceinline__ Vector<X, 4> zeros() const { return {}; }

  // The lowest byte of codes[i][j] is the code of x[i].get(j).
  template <int M, int N>
  __device__ __forceinline__ void operator()(const Vector<X, N> (&x)[M], uint32_t (&codes)[M][N]) const {
    float values[M * N];
    uint32_t sums[M * N];
#pragma unroll
    for (int i = 0; i < M * N; ++i) values[i] = widen(x[i / N].get(i % N));
    const bool certain = codes_of.template make<sizeof(X) == 2>(values, sums);
#pragma unroll
    for (int i = 0; i < M * N; ++i) codes[i / N][i % N] = sums[i];
    if (certain) return;
#pragma unroll
    for (int i = 0; i < M * N; ++i) codes[i / N][i % N] = static_cast<uint32_t>(codes_of.quantizer(values[i]));
  }
};

// Codes of 8-bit x. Unsigned ones become signed.
template <>
struct CodesOf<int8_t> {
  uint32_t flip;
  int8_t padding;

  __device__ __forceinline__ CodesOf(const InputParams& in, int64_t, int8_t padding_)
      : flip(in.dtype == DType::kUInt8 ? 0x80u : 0u), padding(padding_) {}
  __device__ __forceinline__ Vector<int8_t, 4> zeros() const { return {{{(static_cast<uint8_t>(padding) ^ flip) * 0x01010101u}}}; }
  template <int M, int N>
  __device__ __forceinline__ void operator()(const Vector<int8_t, N> (&x)[M], uint32_t (&codes)[M][N]) const {
#pragma unroll
    for (int i = 0; i < M * N; ++i) codes[i / N][i % N] = static_cast<uint8_t>(x[i / N].get(i % N)) ^ flip;
  }
};

}  // namespace quant_ops
