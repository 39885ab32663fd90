// The instructions of sm_90a that the Hopper engine is made of, one function each: barriers in shared memory, loads by the tensor
// memory accelerator (TMA), and the matrix instruction of a warpgroup (wgmma). Names and operands are those of the PTX manual,
// sections "mbarrier", "cp.async.bulk.tensor" and "wgmma.mma_async". Read next: igemm.cuh.
#pragma once

#include <cuda.h>

#include "device/common.cuh"
#include "engine/sm90/igemm.h"

namespace quant_ops::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Whether this is the one thread of its warp that is to go on. Unlike a comparison of lanes, it tells the compiler that one thread
// alone executes what follows. The whole warp takes part.
__device__ __forceinline__ bool elected() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred is;\nelect.sync _|is, 0xffffffff;\nselp.u32 %0, 1, 0, is;\n}\n" : "=r"(chosen));
  return chosen != 0;
}

// ---- barriers -------------------------------------------------------------------------------------------------------

// Barriers and codes in shared memory go by their addresses. A barrier's phase ends when `count` threads have arrived and all bytes
// that it expects have come.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
// Makes initialised barriers visible to TMA and to the cluster.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// On the same barrier of another block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(
          barrier),
      "r"(block)
      : "memory");
}
// Waits for the end of the phase of that parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The stage of the ring that comes next, and the parity of its barriers' phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ uint32_t block_of_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int32_t cluster_index() {
  int32_t index;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Waits for the kThreads threads of the block that multiply.
template <int kThreads>
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t to, int32_t a, int32_t b, int32_t c, int32_t d) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// From the same address of another block of the cluster.
__device__ __forceinline__ void load_cluster(uint32_t from, uint32_t block, int32_t (&values)[4]) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\nld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [remote];\n}\n"
      : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
      : "r"(from), "r"(block)
      : "memory");
}

__device__ __forceinline__ void load_shared(uint32_t from, uint32_t (&words)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from));
}

// The registers of every thread of the warpgroup, from now on.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- loads ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// `bytes` that follow each other, a multiple of 16, as the addresses are.
__device__ __forceinline__ void load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

// A box of a matrix in five dimensions (MatrixMap): k first, then its rows.
__device__ __forceinline__ void load_matrix(uint32_t to, const CUtensorMap* map, uint32_t barrier, int k, int row, int sixteen) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %5, %6}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(k), "r"(row), "r"(0), "r"(sixteen)
      : "memory");
}
// The same, to all blocks of the cluster whose bit is set.
__device__ __forceinline__ void load_matrix_to(uint16_t blocks, uint32_t to, const CUtensorMap* map, uint32_t barrier, int k,
                                               int row, int sixteen) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, %5, "
      "%6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(k), "r"(row), "r"(0), "r"(sixteen), "h"(blocks)
      : "memory");
}

// The pixels of `at` (igemm.h).
__device__ __forceinline__ void load_image(uint32_t to, const CUtensorMap* map, uint32_t barrier, const ImageLoad& at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, "
      "%8};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(at.channel), "r"(at.w), "r"(at.h), "r"(at.sample), "h"(static_cast<uint16_t>(at.tap_w)),
      "h"(static_cast<uint16_t>(at.tap_h))
      : "memory");
}

// ---- multiplication -------------------------------------------------------------------------------------------------

// An operand of wgmma at an address in shared memory, 16-byte units: rows of kRowBytes (128 or 64) codes, swizzled over 8 rows as
// TMA writes them. Addresses are below 2^18, so that sums of them with multiples of 16 stay operands.
template <int kRowBytes>
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kEightRows = static_cast<uint64_t>(8 * kRowBytes) >> 4, kSwizzle = kRowBytes == 128 ? 1 : 2;
  return (uint64_t{1} << 16 | kEightRows << 32 | kSwizzle << 62) + (address >> 4);
}

// Before the first multiplication, and after registers of the sums were written.
__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last kPending groups are done.
template <int kPending>
__device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The sums are written by instructions that are still running: this keeps the compiler from moving them.
template <int kCount>
__device__ __forceinline__ void keep(int32_t (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keep(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define QO_LIST_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QO_LIST_16 QO_LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QO_LIST_24 QO_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define QO_LIST_32 QO_LIST_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define QO_LIST_48 QO_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define QO_LIST_64 QO_LIST_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QO_LIST_80 QO_LIST_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define QO_LIST_96 QO_LIST_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QO_LIST_128                                                                                                        \
  QO_LIST_96                                                                                                               \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, " \
  "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define QO_SUMS_4(i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define QO_SUMS_8(i) QO_SUMS_4(i), QO_SUMS_4(i + 4)
#define QO_SUMS_16(i) QO_SUMS_8(i), QO_SUMS_8(i + 8)
#define QO_SUMS_24(i) QO_SUMS_16(i), QO_SUMS_8(i + 16)
#define QO_SUMS_32(i) QO_SUMS_16(i), QO_SUMS_16(i + 16)
#define QO_SUMS_48(i) QO_SUMS_32(i), QO_SUMS_16(i + 32)
#define QO_SUMS_64(i) QO_SUMS_32(i), QO_SUMS_32(i + 32)
#define QO_SUMS_80(i) QO_SUMS_64(i), QO_SUMS_16(i + 64)
#define QO_SUMS_96(i) QO_SUMS_64(i), QO_SUMS_32(i + 64)
#define QO_SUMS_128(i) QO_SUMS_64(i), QO_SUMS_64(i + 64)

// c[64 x kColumns] = (accumulate ? c : 0) + a[64 x 32] b[kColumns x 32]^T of int8, exact modulo 2^32. Runs on after the call.
template <int kColumns>
struct Wgmma;
#define QO_WGMMA(COLUMNS, COUNT, A, B, P)                                                                         \
  template <>                                                                                                     \
  struct Wgmma<COLUMNS> {                                                                                         \
    static_assert(COUNT == COLUMNS / 2, "a thread has half a row of sums");                                       \
    __device__ __forceinline__ static void run(int32_t (&c)[COUNT], uint64_t a, uint64_t b, int accumulate) {     \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS \
                   "k32.s32.s8.s8 {" QO_LIST_##COUNT "}, %" #A ", %" #B ", add;\n}\n"                             \
                   : QO_SUMS_##COUNT(0)                                                                           \
                   : "l"(a), "l"(b), "r"(accumulate));                                                            \
    }                                                                                                             \
  };
QO_WGMMA(16, 8, 8, 9, 10)
QO_WGMMA(32, 16, 16, 17, 18)
QO_WGMMA(48, 24, 24, 25, 26)
QO_WGMMA(64, 32, 32, 33, 34)
QO_WGMMA(96, 48, 48, 49, 50)
QO_WGMMA(128, 64, 64, 65, 66)
QO_WGMMA(160, 80, 80, 81, 82)
QO_WGMMA(192, 96, 96, 97, 98)
QO_WGMMA(256, 128, 128, 129, 130)
#undef QO_WGMMA

#define QO_FLOATS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define QO_FLOATS_16(i) QO_FLOATS_4(i), QO_FLOATS_4(i + 4), QO_FLOATS_4(i + 8), QO_FLOATS_4(i + 12)
#define QO_FLOATS_32(i) QO_FLOATS_16(i), QO_FLOATS_16(i + 16)
#define QO_FLOATS_64(i) QO_FLOATS_32(i), QO_FLOATS_32(i + 32)

// The same with a in registers, those of mma.m16n8k32 of a warp's 16 rows; or of 16-bit floats, c[64 x kColumns] of a[64 x 16]
// and b[kColumns x 16]^T, summed in float32.
template <class X, int kColumns>
struct WgmmaOfRegisters;
#define QO_WGMMA_REGISTERS(X, TYPE, SUM, LIST, COLUMNS, COUNT, A0, A1, A2, A3, B, P, K, ENDS)                                     \
  template <>                                                                                                                     \
  struct WgmmaOfRegisters<X, COLUMNS> {                                                                                           \
    __device__ __forceinline__ static void run(SUM (&c)[COUNT], const uint32_t (&a)[4], uint64_t b, int accumulate) {             \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k" #K "." TYPE \
                   " {" QO_LIST_##COUNT "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add" ENDS ";\n}\n"                 \
                   : LIST(0)                                                                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                        \
    }                                                                                                                             \
  };
#define QO_WGMMA_OF_REGISTERS(COLUMNS, COUNT, A0, A1, A2, A3, B, P)                                                        \
  QO_WGMMA_REGISTERS(int8_t, "s32.s8.s8", int32_t, QO_SUMS_##COUNT, COLUMNS, COUNT, A0, A1, A2, A3, B, P, 32, "")          \
  QO_WGMMA_REGISTERS(Half, "f32.f16.f16", float, QO_FLOATS_##COUNT, COLUMNS, COUNT, A0, A1, A2, A3, B, P, 16, ", 1, 1, 0") \
  QO_WGMMA_REGISTERS(BFloat16, "f32.bf16.bf16", float, QO_FLOATS_##COUNT, COLUMNS, COUNT, A0, A1, A2, A3, B, P, 16, ", 1, 1, 0")
QO_WGMMA_OF_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21)
QO_WGMMA_OF_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37)
QO_WGMMA_OF_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69)
#undef QO_WGMMA_OF_REGISTERS
#undef QO_WGMMA_REGISTERS

}  // namespace quant_ops::sm90
