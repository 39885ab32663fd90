// Address arithmetic of the CUDA kernels: division by multiplication, positions to offsets, and which tensors may be read as one
// flat array of 16-byte vectors. Host and device; the tests run all of it on the host. Read next: quantize.cu.
#pragma once

#include "contract/iteration.h"

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
// n * magic / 2^(63+l) exceeds n / d by less than 1 / d, and so has the same integer part.
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

// n / d for 0 <= n < 2^31, 1 <= d < 2^31, as FastDiv.
struct SmallDiv {
  uint32_t magic = 0;
  int32_t divisor = 1;
  int32_t shift = -1;

  SmallDiv() = default;
  explicit SmallDiv(int64_t d) : divisor(static_cast<int32_t>(d)) {
    if (d <= 1) return;
    int l = 0;
    while ((int64_t{1} << l) < d) ++l;
    magic = static_cast<uint32_t>(((uint64_t{1} << (31 + l)) + static_cast<uint64_t>(d) - 1) / static_cast<uint64_t>(d));
    shift = l - 1;
  }
  QO_HD_MEMBER int32_t quotient(int32_t n) const {
    if (shift < 0) return n;
    return static_cast<int32_t>(static_cast<uint32_t>((uint64_t{magic} * static_cast<uint32_t>(n)) >> 32) >> shift);
  }
};

// An Iteration as a kernel parameter. It turns row-major positions into the offsets of some of its operands.
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

// ---- tiles of codes in shared memory and in registers ---------------------------------------------------------------

constexpr int kVectorBytes = 16;  // of an asynchronous copy, and of a row of an ldmatrix matrix

// Where vector `vector` of row `row` is in a tile of rows of kRowBytes. The exclusive or with the row spreads the eight rows that
// ldmatrix reads at once, and the eight lanes that write at once, over all banks.
template <int kRowBytes>
QO_HD_MEMBER int tile_offset(int row, int vector) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "rows of 64 bytes: two rows share the 32 banks");
  const int spread = kRowBytes == 128 ? row & 7 : (row >> 1) & 3;
  return row * kRowBytes + (vector ^ spread) * kVectorBytes;
}

// mma.m16n8k32 takes its 16 x 32 operand a as four 8 x 16 matrices, ordered along rows first. The rows of its operand b are columns
// of the product, and it takes two matrices of them along k. For both, lane l of an ldmatrix.x4 names this row and 16-byte vector
// of a 16 x 32 block:
QO_HD_MEMBER int a_row(int lane) { return lane & 15; }
QO_HD_MEMBER int a_vector(int lane) { return lane >> 4; }
QO_HD_MEMBER int b_row(int lane) { return (lane & 7) + (lane >> 4) * 8; }  // words 0, 1: columns 0 .. 7; 2, 3: columns 8 .. 15
QO_HD_MEMBER int b_vector(int lane) { return (lane >> 3) & 1; }

// Registers 0 and 1 of an accumulator are two neighbouring columns of row c_row, registers 2 and 3 those of row c_row + 8.
QO_HD_MEMBER int c_row(int lane) { return lane >> 2; }
QO_HD_MEMBER int c_column(int lane) { return (lane & 3) * 2; }

// ---- convolution ----------------------------------------------------------------------------------------------------

// The pixels of a convolution as rows of a product. Row m is output pixel m. Element k of a row is byte k % group of the codes of
// the input pixel under tap k / group. Codes are NHWC, and strides are in bytes.
struct Gather {
  const int8_t* codes = nullptr;
  const int8_t* padding = nullptr;  // [samples][16]: the zero point's code; null: 0
  int64_t sample = 0, row = 0, pixel = 0;
  int64_t group = 0;  // bytes of a tap: the codes of a group of a pixel, padded
  int32_t height = 0, width = 0;
  int32_t stride[2] = {}, pad[2] = {}, dilation[2] = {};
  FastDiv pixels, columns;      // of the output: OH * OW, OW
  FastDiv tap, kernel_columns;  // of the kernel: bytes of a tap, S
};

// The input pixel of tap (0, 0) of an output pixel.
struct GatherRow {
  const int8_t* at;  // its codes, or an address outside of the image if h or w is
  int32_t h, w, sample;
};

QO_HD_MEMBER GatherRow gather_row(const Gather& g, int64_t m, int64_t group) {
  const int64_t sample = g.pixels.quotient(m), pixel = m - sample * g.pixels.divisor;
  const int64_t oh = g.columns.quotient(pixel), ow = pixel - oh * g.columns.divisor;
  GatherRow r;
  r.h = static_cast<int32_t>(oh) * g.stride[0] - g.pad[0];
  r.w = static_cast<int32_t>(ow) * g.stride[1] - g.pad[1];
  r.at = g.codes + sample * g.sample + r.h * g.row + r.w * g.pixel + group * g.group;
  r.sample = static_cast<int32_t>(sample);
  return r;
}

// The tap and channel of element k, alike in every row.
struct GatherTap {
  int32_t h, w;    // relative to GatherRow's
  int64_t offset;  // bytes from GatherRow's `at`
};

QO_HD_MEMBER GatherTap gather_tap(const Gather& g, int64_t k) {
  const int64_t tap = g.tap.quotient(k), channel = k - tap * g.tap.divisor;
  const int64_t r = g.kernel_columns.quotient(tap), s = tap - r * g.kernel_columns.divisor;
  GatherTap t;
  t.h = static_cast<int32_t>(r) * g.dilation[0];
  t.w = static_cast<int32_t>(s) * g.dilation[1];
  t.offset = t.h * g.row + t.w * g.pixel + channel;
  return t;
}

QO_HD_MEMBER bool inside(const Gather& g, const GatherRow& r, const GatherTap& t) {
  return static_cast<uint32_t>(r.h + t.h) < static_cast<uint32_t>(g.height) &&
         static_cast<uint32_t>(r.w + t.w) < static_cast<uint32_t>(g.width);
}

}  // namespace quant_ops
