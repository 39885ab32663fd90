// pack_weight_only and unpack_weight_only on CUDA, to the bytes that the CPU makes (contract/weight_only_layout.h), and what
// weight_only_linear makes of rows of x beside quantize_rows: sums of codes over groups, and rows padded to whole vectors.
#include "device/machine.cuh"
#include "weight_only.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kNibbleOffset = 8;

struct PackArgs {
  static constexpr bool kBarriers = true;
  WeightOnlyLayout l;
  WeightOnlyHeader header;
  const int8_t* weight;
  int8_t* packed;
  FastDiv columns;  // padded
};

// A thread makes one word of the codes; those of neighbouring threads are neighbouring columns.
template <int kBits>
__global__ void __launch_bounds__(kThreads) pack_codes_kernel(const QO_GRID_CONSTANT PackArgs a) {
  constexpr int kOfWord = 32 / kBits;
  const int64_t work = a.l.column_bytes / 4 * a.l.padded_n, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < work; i += step) {
    const int64_t word = a.columns.quotient(i), n = i - word * a.columns.divisor;
    const ColumnWords column = column_words(a.packed + a.l.codes_offset, kBits, a.l.column_bytes, a.l.padded_n, n);
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < kOfWord; ++e) {
      const int64_t k = word * kOfWord + e;
      if (n >= a.l.n || k >= a.l.k) continue;
      const int32_t code = a.weight[n * a.l.k + k];
      if constexpr (kBits == 4)
        codes |= static_cast<uint32_t>((code + kNibbleOffset) & 15) << (e % 4 * 8 + e / 4 * 4);
      else
        codes |= static_cast<uint32_t>(code & 255) << (e * 8);
    }
    *reinterpret_cast<uint32_t*>(const_cast<int8_t*>(column.first) + word * column.step) = codes;
  }
}

// A warp adds the codes of a column over its groups; the first thread writes the header.
__global__ void __launch_bounds__(kThreads) pack_sums_kernel(const QO_GRID_CONSTANT PackArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t n = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (blockIdx.x == 0 && threadIdx.x < WeightOnlyLayout::kSumsOffset) {
    const int i = static_cast<int>(threadIdx.x);
    a.packed[i] = i < static_cast<int>(sizeof(a.header)) ? reinterpret_cast<const int8_t*>(&a.header)[i] : int8_t{0};
  }
  const int64_t sums_end = WeightOnlyLayout::kSumsOffset + a.l.groups * a.l.padded_n * 4;
  if (blockIdx.x == 0 && static_cast<int64_t>(threadIdx.x) < a.l.codes_offset - sums_end) a.packed[sums_end + threadIdx.x] = 0;
  if (n >= a.l.padded_n) return;
  int32_t* const sums = reinterpret_cast<int32_t*>(a.packed + WeightOnlyLayout::kSumsOffset);
  for (int64_t g = 0; g < a.l.groups; ++g) {
    const int64_t begin = g * a.l.group, end = a.l.k - begin < a.l.group ? a.l.k : begin + a.l.group;
    int32_t sum = 0;
    if (n < a.l.n)
      for (int64_t k = begin + lane; k < end; k += kWarp) sum += a.weight[n * a.l.k + k] + (a.l.bits == 4 ? kNibbleOffset : 0);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane == 0) sums[sum_place(a.l.bits, a.l.groups, a.l.padded_n, g, n)] = sum;
  }
}

struct UnpackArgs {
  static constexpr bool kBarriers = false;
  WeightOnlyLayout l;
  const int8_t* packed;
  int8_t* weight;
  FastDiv columns;  // k of a row of the weight
};

__global__ void __launch_bounds__(kThreads) unpack_kernel(const QO_GRID_CONSTANT UnpackArgs a) {
  const int64_t work = a.l.n * a.l.k, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < work; i += step) {
    const int64_t n = a.columns.quotient(i), k = i - n * a.columns.divisor;
    const ColumnWords column = column_words(a.packed + a.l.codes_offset, a.l.bits, a.l.column_bytes, a.l.padded_n, n);
    if (a.l.bits == 4) {
      const int32_t both = static_cast<uint8_t>(column.first[k / 8 * column.step + k % 4]);
      a.weight[i] = static_cast<int8_t>((k % 8 < 4 ? both & 15 : both >> 4) - kNibbleOffset);
    } else {
      a.weight[i] = column.first[k / 4 * column.step + k % 4];
    }
  }
}

struct GroupSumsArgs {
  static constexpr bool kBarriers = true;
  GroupSumsParams p;
};

// A warp adds the codes of a row.
__global__ void __launch_bounds__(kThreads) group_sums_kernel(const QO_GRID_CONSTANT GroupSumsArgs a) {
  const GroupSumsParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t m = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (m >= p.M) return;
  const int32_t zero = p.zero != nullptr ? p.zero[m] : 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t begin = g * p.group, count = p.K - begin < p.group ? p.K - begin : p.group;
    int32_t sum = 0;
    for (int64_t k = int64_t{lane} * 4; k < count; k += kWarp * 4)  // codes beyond K are zeros
      sum = dot4(*reinterpret_cast<const uint32_t*>(p.codes + m * p.stride + begin + k), 0x01010101u, sum);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane == 0) p.sums[g * p.M + m] = sum - zero * static_cast<int32_t>(count);
  }
}

struct PadRowsArgs {
  static constexpr bool kBarriers = false;
  PadRowsParams p;
  FastDiv columns;  // padded
};

template <class X>
__global__ void __launch_bounds__(kThreads) pad_rows_kernel(const QO_GRID_CONSTANT PadRowsArgs a) {
  const int64_t work = a.p.rows * a.p.padded, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < work; i += step) {
    const int64_t m = a.columns.quotient(i), k = i - m * a.columns.divisor;
    static_cast<X*>(a.p.to)[i] = k < a.p.columns ? static_cast<const X*>(a.p.x)[m * a.p.x_stride + k] : X{};
  }
}

constexpr int64_t kManyBlocks = 1 << 20;

}  // namespace

void pack_weight_only_cuda(const int8_t* weight, const WeightOnlyLayout& l, int8_t* packed, const Launch& at) {
  const PackArgs a{.l = l, .header = header_of(l), .weight = weight, .packed = packed, .columns = FastDiv(l.padded_n)};
  launch(at, pack_sums_kernel, std::max<int64_t>(1, blocks_for(l.padded_n, kThreads / kWarp, kMaxGrid)), dim3(kThreads), a);
  const int64_t words = l.padded_n * (l.column_bytes / 4);
  if (words == 0) return;
  launch(at, l.bits == 4 ? pack_codes_kernel<4> : pack_codes_kernel<8>, blocks_for(words, kThreads, kManyBlocks), dim3(kThreads),
         a);
}

void unpack_weight_only_cuda(const int8_t* packed, const WeightOnlyLayout& l, int8_t* weight, const Launch& at) {
  if (l.n * l.k == 0) return;
  launch(at, unpack_kernel, blocks_for(l.n * l.k, kThreads, kManyBlocks), dim3(kThreads),
         UnpackArgs{.l = l, .packed = packed, .weight = weight, .columns = FastDiv(l.k)});
}

void group_sums_cuda(const GroupSumsParams& p, const Launch& at) {
  launch(at, group_sums_kernel, blocks_for(p.M, kThreads / kWarp, kMaxGrid), dim3(kThreads), GroupSumsArgs{p});
}

void pad_rows_cuda(const PadRowsParams& p, const Launch& at) {
  const PadRowsArgs a{.p = p, .columns = FastDiv(p.padded)};
  with_float_type(p.dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>)
      launch(at, pad_rows_kernel<X>, blocks_for(p.rows * p.padded, kThreads, kManyBlocks), dim3(kThreads), a);
  });
}

}  // namespace quant_ops
