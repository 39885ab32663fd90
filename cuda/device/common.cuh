// What all CUDA kernels share: vectors of elements, conversions in hardware, launches that check themselves. Without nvcc the
// kernels are compiled for the host instead (host_emulation.h), so that tests run them on a machine without a GPU.
// Read next: layout.cuh for addresses, quantize.cu for kernels.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "contract/dtypes.h"
#include "device/layout.cuh"
#include "device/quotient.cuh"
#include "device/workspace.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define QO_GRID_CONSTANT __grid_constant__
#else
#include "emulation/host_emulation.h"
#define QO_GRID_CONSTANT
#endif

namespace quant_ops {

constexpr int kWarp = 32;

// ---- launches -------------------------------------------------------------------------------------------------------

// Args::kBarriers says whether the kernel's threads wait for each other; only the emulation needs to know.
// An error of an earlier launch may surface here too; the message names the operator that noticed.
template <class Args>
void launch(const Launch& at, void (*kernel)(Args), int64_t blocks, dim3 threads, const Args& args, int shared_bytes = 0) {
#if defined(__CUDACC__)
  static_cast<void>(Args::kBarriers);
  constexpr int kWithoutAsking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<dim3(static_cast<unsigned>(blocks)), threads, static_cast<size_t>(shared_bytes),
             static_cast<cudaStream_t>(at.stream)>>>(args);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("quant_ops.") + at.op + ": expected the kernel launch to succeed, got " +
                             cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
                             (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction
                                  ? ". Build for this GPU: set QUANT_OPS_CUDA_ARCHS to its architecture."
                                  : ". Set CUDA_LAUNCH_BLOCKING=1 to find the launch that failed."));
#else
  static_cast<void>(at);
  emulation::run([&] { kernel(args); }, blocks, threads, Args::kBarriers, static_cast<size_t>(shared_bytes));
#endif
}

// Multiprocessors of the current device.
inline int64_t multiprocessors() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    count = 0;
  return count > 0 ? count : 108;
#else
  return 2;
#endif
}

// ---- elements -------------------------------------------------------------------------------------------------------

// N elements that are loaded and stored at once. They stay whole words in registers until an element is used.
template <class T, int N>
struct Vector {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  struct alignas(kBytes) Words {
    Word at[kWords];
  } words;

  __device__ __forceinline__ T get(int i) const {
    constexpr int per_word = sizeof(T) < sizeof(Word) ? static_cast<int>(sizeof(Word) / sizeof(T)) : 1;
    T value;
    if constexpr (per_word > 1) {
      using Bits = std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t>;
      const Bits bits = static_cast<Bits>(words.at[i / per_word] >> (i % per_word * 8 * static_cast<int>(sizeof(T))));
      memcpy(&value, &bits, sizeof(T));
    } else {
      memcpy(&value, &words.at[i], sizeof(T));
    }
    return value;
  }
};

// The emulation aborts on an address that a GPU would refuse. On a GPU this does nothing.
__device__ __forceinline__ void expect_aligned(const void* p, size_t bytes) {
#if defined(__CUDACC__)
  static_cast<void>(p), static_cast<void>(bytes);
#else
  emulation::expect_aligned(p, bytes);
#endif
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  Vector<T, N> v;
  expect_aligned(p, sizeof(v.words));
  v.words = *reinterpret_cast<const typename Vector<T, N>::Words*>(p);
  return v;
}

template <int N, class T>
__device__ __forceinline__ void store_vector(T* p, const T (&elements)[N]) {
  Vector<T, N> v;
  expect_aligned(p, sizeof(v.words));
  memcpy(&v.words, elements, sizeof(v.words));
  *reinterpret_cast<typename Vector<T, N>::Words*>(p) = v.words;
}

// to_compute and from_compute of arithmetic.h by the conversion instructions: the same values (a NaN may differ in its payload).
template <class X>
__device__ __forceinline__ Compute<X> widen(X x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<X, Half>) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
  }
#endif
  return to_compute(x);
}

template <class X>
__device__ __forceinline__ X rounded_to(Compute<X> value) {
  X y;
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<X, Half>) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(value));
    return y;
  } else if constexpr (std::is_same_v<X, BFloat16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(value));
    return y;
  }
#endif
  from_compute(value, &y);
  return y;
}

// The code of type `dtype` at p[i].
__device__ __forceinline__ int64_t load_code(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kInt8: return static_cast<const int8_t*>(p)[i];
    case DType::kUInt8: return static_cast<const uint8_t*>(p)[i];
    case DType::kInt16: return static_cast<const int16_t*>(p)[i];
    default: return static_cast<const int32_t*>(p)[i];
  }
}

__device__ __forceinline__ void store_code(void* p, DType dtype, int64_t i, int64_t q) {
  switch (dtype) {
    case DType::kInt8: static_cast<int8_t*>(p)[i] = static_cast<int8_t>(q); break;
    case DType::kUInt8: static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(q); break;
    case DType::kInt16: static_cast<int16_t*>(p)[i] = static_cast<int16_t>(q); break;
    default: static_cast<int32_t*>(p)[i] = static_cast<int32_t>(q);
  }
}

}  // namespace quant_ops
