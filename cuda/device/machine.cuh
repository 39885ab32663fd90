// The instructions that the integer engine is made of, one function each: asynchronous copies to shared memory, ldmatrix, mma.
// sm_80 and newer; on the host they are emulated (host_emulation.h). Read next: portable.cuh.
#pragma once

#include "device/common.cuh"

namespace quant_ops {

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) char memory[];
  return memory;
#else
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(emulation::block.shared.data()) + 15) / 16 * 16);
#endif
}

// 16 bytes that no other block reads: they pass by the first cache. Unless valid, it reads nothing and gives zeros.
__device__ __forceinline__ void load_once(const int8_t* from, bool valid, uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  words[0] = words[1] = words[2] = words[3] = 0;
  if (valid)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
#else
  memset(words, 0, sizeof(words));
  if (!valid) return;
  expect_aligned(from, sizeof(words));
  memcpy(words, from, sizeof(words));
#endif
}

// Copies kBytes from global to shared memory, both aligned to kBytes. Unless valid, it reads nothing and writes zeros.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 16, "cp.async.cg takes 16 bytes, .ca 4, 8 or 16");
#if defined(__CUDA_ARCH__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int size = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(size));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(size));
#elif !defined(__CUDACC__)
  emulation::copy_async(to, from, kBytes, valid);
#endif
}

// Closes a group of copies, which may be empty.
__device__ __forceinline__ void copy_commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::copy_commit();
#endif
}

// Waits until all but this thread's last kPending groups have arrived.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif !defined(__CUDACC__)
  emulation::copy_wait(kPending);
#endif
}

// Four 8 x 16-byte matrices: lane 8 i + r names row r of matrix i; word i is the lane's part of matrix i.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
#elif !defined(__CUDACC__)
  emulation::load_matrices(row, words);
#endif
}

// sum + the products of four signed bytes, exact modulo 2^32.
__device__ __forceinline__ int32_t dot4(uint32_t a, uint32_t b, int32_t sum) {
#if defined(__CUDA_ARCH__)
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#else
  for (int i = 0; i < 32; i += 8) sum += int32_t{static_cast<int8_t>(a >> i)} * static_cast<int8_t>(b >> i);
  return sum;
#endif
}

// c[16 x 8] += a[16 x 32] b[32 x 8] of int8, exact modulo 2^32.
__device__ __forceinline__ void multiply(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  emulation::multiply(c, a, b);
#endif
}

// c[16 x 8] += a[16 x 16] b[16 x 8] of floating numbers X of 16 bits. Products are exact; how their sums are rounded is the
// hardware's affair, hardly better than cutting off what is below float32.
template <class X>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<X, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  emulation::multiply(c, a, b, [](uint16_t bits) { return to_compute(X{bits}); });
#endif
}

}  // namespace quant_ops
