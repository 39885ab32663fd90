// What all CUDA kernels share: vectors of elements, conversions in hardware, launches that check themselves. Without nvcc the
// kernels are compiled for the host instead (host_emulation.h), so that tests run them on a machine without a GPU.
// Read next: layout.cuh for addresses, quantize.cu for kernels.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "contract/dtypes.h"
#include "contract/log.h"
#include "device/layout.cuh"
#include "device/quotient.cuh"
#include "device/workspace.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <cxxabi.h>
#define QO_GRID_CONSTANT __grid_constant__
#else
#include "emulation/host_emulation.h"
#define QO_GRID_CONSTANT
#endif

namespace quant_ops {

constexpr int kWarp = 32;

// ---- launches -------------------------------------------------------------------------------------------------------

// When a kernel may begin. kEarly: while the kernel before it in the stream still runs, once all blocks of that one have called
// let_next_kernel_start(). It must call wait_for_kernel_before() before it reads what that one writes, and before it writes
// anything. What earlier kernels wrote it may read at once, because the kernel before it was launched with kInOrder. sm_90 and
// newer.
enum class Start { kInOrder, kEarly };

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Everything that the kernel before has written is there. In a kernel that was launched in order this does nothing.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if defined(__CUDACC__)
// Lets a kernel have so much shared memory on the current device. What it may have only grows: a smaller number, set by another
// thread for a smaller problem, would refuse the launches of this one. Asked again for the same kernel, it only looks that up.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  struct Entry {
    const void* kernel = nullptr;
    int device = 0, bytes = 0;
  };
  thread_local Entry entries[64];
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int>& allowed = *new std::map<std::pair<const void*, int>, int>;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  Entry& entry = entries[reinterpret_cast<uintptr_t>(kernel) * 0x9e3779b97f4a7c15ULL >> 58];
  if (entry.kernel == kernel && entry.device == device && entry.bytes >= bytes) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes > most) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  most = std::max(most, bytes);
  entry = {kernel, device, most};
  return cudaSuccess;
}

// Makes a launch start while the kernel before it in the stream ends (Start::kEarly). Graphs capture that from CUDA 12.3 on.
constexpr int kEarlyAttributes = CUDART_VERSION >= 12030 ? 1 : 0;
inline cudaLaunchAttribute early_start() {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return early;
}
#endif

// For the log: the kernel's name, with its template arguments where the toolkit tells it (CUDA 12.3 and newer).
template <class Args>
std::string kernel_name([[maybe_unused]] void (*kernel)(Args)) {
#if defined(__CUDACC__) && CUDART_VERSION >= 12030
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, reinterpret_cast<const void*>(kernel)) != cudaSuccess || mangled == nullptr) return "kernel";
  int status = 0;
  char* const plain = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  const std::string name = status == 0 ? plain : mangled;
  std::free(plain);
  return name.substr(0, name.rfind('('));
#else
  return "kernel";
#endif
}

// Args::kBarriers says whether the kernel's threads wait for each other; only the emulation needs to know.
// An error of an earlier launch may surface here too; the message names the operator that noticed.
template <class Args>
void launch(const Launch& at, void (*kernel)(Args), int64_t blocks, dim3 threads, const Args& args, int shared_bytes = 0,
            Start start = Start::kInOrder) {
  log_kernel([&] { return kernel_name(kernel); });
#if defined(__CUDACC__)
  static_cast<void>(Args::kBarriers);
  constexpr int kWithoutAsking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking) error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute early = early_start();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(at.stream);
    config.attrs = &early;
    config.numAttrs = start == Start::kEarly ? kEarlyAttributes : 0;
    error = cudaLaunchKernelEx(&config, kernel, args);
    const cudaError_t last = cudaGetLastError();
    if (error == cudaSuccess) error = last;
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("quant_ops.") + at.op + ": expected the kernel launch to succeed, got " +
                             cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
                             (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction
                                  ? ". Build for this GPU: set QUANT_OPS_CUDA_ARCHS to its architecture."
                                  : ". Set CUDA_LAUNCH_BLOCKING=1 to find the launch that failed."));
#else
  static_cast<void>(at), static_cast<void>(start);
  emulation::run([&] { kernel(args); }, blocks, threads, Args::kBarriers, static_cast<size_t>(shared_bytes));
#endif
}

// Multiprocessors of the current device.
inline int64_t multiprocessors() {
#if defined(__CUDACC__)
  thread_local int known = -1, count = 108;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device == known) return count;
  known = device;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count <= 0) count = 108;
  return count;
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
  // Element i becomes element i - 1. Elements have 16 or 32 bits.
  __device__ __forceinline__ void drop_first() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const Word next = w + 1 < kWords ? words.at[w + 1] : Word{0};
      words.at[w] = sizeof(T) == 2 ? words.at[w] >> 16 | next << 16 : next;
    }
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

// The same value, which is computed once, here, and not again in every branch that uses it.
__device__ __forceinline__ int64_t computed_here(int64_t offset) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(offset));
#endif
  return offset;
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  Vector<T, N> v;
  expect_aligned(p, sizeof(v.words));
  v.words = *reinterpret_cast<const typename Vector<T, N>::Words*>(p);
  return v;
}

// load_vector for 16 bytes that nobody reads again soon: they are the first to leave the caches.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_streaming(const T* p) {
#if defined(__CUDACC__)
  static_assert(sizeof(T) * N == sizeof(uint4));
  Vector<T, N> v;
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(p));
  memcpy(&v.words, &words, sizeof(words));
  return v;
#else
  return load_vector<N>(p);
#endif
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

// A byte each of V elements; the first one is the lowest.
template <int V>
using Bytes = std::conditional_t<V == 8, uint64_t, uint32_t>;

// The code of element i of a vector is the lowest byte of word i.
template <class X, int V>
__device__ __forceinline__ void make_codes(Vector<X, V> in, const Int8Codes& of, uint32_t (&words)[V]) {
  float x[V];
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = widen(in.get(i));
  if (of.make<sizeof(X) == 2>(x, words)) return;
  // As a loop this takes few instructions and registers. Elements move to the place of the first one, and codes from the last
  // one's.
  Bytes<V> codes = 0;
#pragma unroll 1
  for (int i = 0; i < V; ++i) {
    codes = codes >> 8 | static_cast<Bytes<V>>(of.quantizer(widen(in.get(0)))) << (8 * (V - 1));
    in.drop_first();
  }
#pragma unroll
  for (int i = 0; i < V; ++i) words[i] = static_cast<uint32_t>(codes >> (8 * i));
}

// The codes of a vector whose elements lie in the range of `of`, which is usable.
template <bool kAsymmetric, class X, int V>
__device__ __forceinline__ Bytes<V> codes_in_range(Vector<X, V> in, const RangeCodes& of) {
  float x[V];
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = widen(in.get(i));
  uint32_t words[V / 4];
  of.make<sizeof(X) == 2, kAsymmetric>(x, words);
  Bytes<V> bytes;
  memcpy(&bytes, words, sizeof(bytes));
  return bytes;
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
