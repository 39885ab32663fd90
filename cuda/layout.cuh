// Address arithmetic of the CUDA kernels: division by multiplication, positions to offsets, and which tensors may be read as one
// flat array of 16-byte vectors. Host and device; the tests run all of it on the host. Read next: quantize.cu.
#pragma once

#include "strided.h"

namespace quant_ops {

#if defined(__CUDACC__)
#define QO_HD_MEMBER __host__ __device__ __forceinline__
#else
#define QO_HD_MEMBER inline
#endif
#if defined(__CUDA_ARCH__)
#define QO_UNROLL _Pragma("unroll")
#else
#define QO_UNROLL
#endif

// n / d for 0 <= n < 2^63, 1 <= d < 2^63, by one wide multiplication. With l = ceil(log2 d) and magic = ceil(2^(63+l) / d) < 2^64,
// n * magic / 2^(63+l) exceeds n / d by less than 1 / d, hence has the same integer part.
struct FastDiv {
  uint64_t magic = 0;
  int64_t divisor = 1;
  int32_t shift = -1;  // l - 1; -1: divide by one

  FastDiv() = default;
  explicit FastDiv(int64_t d) : divisor(d) {
    if (d <= 1) return;
    int l = 0;
    while ((uint64_t{1} << l) < static_cast<uint64_t>(d)) ++l;
    const unsigned __int128 numerator = static_cast<unsigned __int128>(1) << (63 + l);
    magic = static_cast<uint64_t>((numerator + static_cast<uint64_t>(d) - 1) / static_cast<uint64_t>(d));
    shift = l - 1;
  }

  QO_HD_MEMBER int64_t quotient(int64_t n) const {
    if (shift < 0) return n;
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(magic, static_cast<uint64_t>(n));
#else
    const uint64_t high = static_cast<uint64_t>((static_cast<unsigned __int128>(magic) * static_cast<uint64_t>(n)) >> 64);
#endif
    return static_cast<int64_t>(high >> shift);
  }
};

// An Iteration as a kernel parameter: row-major positions to the offsets of some of its operands.
template <int kOperandCount>
struct Dims {
  int ndim = 0;
  FastDiv size[kMaxDims];
  int64_t stride[kOperandCount][kMaxDims] = {};

  QO_HD_MEMBER void seek(int64_t position, int64_t (&offset)[kOperandCount]) const {
    QO_UNROLL
    for (int o = 0; o < kOperandCount; ++o) offset[o] = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t next = d > 0 ? size[d].quotient(position) : 0, index = position - next * size[d].divisor;
      QO_UNROLL
      for (int o = 0; o < kOperandCount; ++o) offset[o] += index * stride[o][d];
      position = next;
    }
  }
};

// Dimensions [0, ndim) of `it`, operands first_operand, first_operand + 1, ...
template <int kOperandCount>
Dims<kOperandCount> make_dims(const Iteration& it, int first_operand, int ndim) {
  Dims<kOperandCount> dims;
  dims.ndim = ndim;
  for (int d = 0; d < ndim; ++d) {
    dims.size[d] = FastDiv(it.size[d]);
    for (int o = 0; o < kOperandCount; ++o) dims.stride[o][d] = it.stride[first_operand + o][d];
  }
  return dims;
}

// ---- flat arrays ----------------------------------------------------------------------------------------------------

// How scale and zero point depend on the flat index e of dense data.
enum class Lookup {
  kUniform,  // not at all
  kRuns,     // constant over runs of `length` elements: by e / length
  kColumns,  // change with e % length, possibly also with e / length
  kNone,     // the data is not one flat array
};

struct FlatLayout {
  Lookup lookup = Lookup::kNone;
  int64_t numel = 0;
  FastDiv length = FastDiv(1);    // of a run or row
  Dims<2> outer;                  // e / length to the offsets of scale and zero point
  int64_t column_stride[2] = {};  // kColumns: steps of scale and zero point
  bool outer_varies = false;      // kColumns: depends on e / length too
};

// For sorted and coalesced operands (in, out, scale, zero_point); `vector` elements are handled at once.
inline FlatLayout flat_layout(const Iteration& it, int vector) {
  FlatLayout flat;
  flat.numel = numel(it);
  int64_t expected = 1;
  for (int d = it.ndim - 1; d >= 0; --d) {
    if (it.stride[0][d] != expected || it.stride[1][d] != expected) return flat;
    expected *= it.size[d];
  }
  const int inner = it.ndim - 1;
  const auto constant = [&](int d) { return it.stride[2][d] == 0 && it.stride[3][d] == 0; };
  if (it.ndim == 0 || (it.ndim == 1 && constant(0))) {
    flat.lookup = Lookup::kUniform;
    flat.length = FastDiv(flat.numel);
    return flat;
  }
  const int64_t length = it.size[inner];
  flat.length = FastDiv(length);
  flat.outer = make_dims<2>(it, 2, inner);
  for (int d = 0; d < inner; ++d) flat.outer_varies = flat.outer_varies || !constant(d);
  for (int o = 0; o < 2; ++o) flat.column_stride[o] = it.stride[2 + o][inner];
  if (constant(inner)) {
    if (length >= vector) flat.lookup = Lookup::kRuns;  // a vector then meets at most two runs
  } else if (length % vector == 0) {
    flat.lookup = Lookup::kColumns;
  }
  return flat;
}

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0; }

inline int64_t blocks_for(int64_t work, int64_t per_block, int64_t limit) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return blocks < limit ? blocks : limit;
}

constexpr int64_t kMaxGrid = 0x7fffffff;  // gridDim.x

}  // namespace quant_ops
