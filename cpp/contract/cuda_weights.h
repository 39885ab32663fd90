// What the CUDA kernels read of an int8 weight [O, C/groups, R, S] (of a linear one [N, K, 1, 1]), and what pack_weight keeps of
// it.
//
//   sums   int32 [O]                      sum over a column's weights, for the zero-point correction; padded to 16 bytes
//   rows   int8 [O][row]                  k contiguous: [kernel position][tap] with tap >= the channels of a group; zeros between
//   depthwise (groups == C == O):  int8 [R * S][padded O]
//
// Rows are kept only where the weight itself will not do: not for k contiguous already and whole chunks of 16. Groups with few
// columns are multiplied several at once with a block-diagonal weight: a tile has 64 columns anyway, and their channels together
// make whole chunks. Plain host code; the length is asked by pack_weight's fake kernel too. Read next: pack.cu, portable.cu,
// conv2d.cu.
#pragma once

#include <cstdint>

namespace quant_ops {

struct CudaWeights {
  int64_t o, c, taps, conv_groups;  // of the weight: c channels of a group, taps kernel positions
  bool depthwise;
  bool plain;         // rows are the weight itself
  int64_t merged;     // groups of the weight in one of the product
  int64_t groups, n;  // of the product: columns of one group
  int64_t tap;        // bytes of a kernel position: 16 divides it, or else 4, for more than one position
  int64_t k, row;     // of the product, multiples of 16; bytes of a row
  int64_t rows_offset, rows_bytes, bytes;

  int64_t channels() const { return c * merged; }  // of one group of the product
};

inline CudaWeights cuda_weights(int64_t o, int64_t c, int64_t r, int64_t s, int64_t groups) {
  constexpr int64_t kColumns = 64, kVector = 16, kWord = 4;
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  CudaWeights w{};
  w.o = o;
  w.c = c;
  w.taps = r * s;
  w.conv_groups = groups;
  const int64_t n = o / groups;
  w.depthwise = groups > 1 && c == 1 && n == 1;
  w.merged = 1;
  for (int64_t m = 2; !w.depthwise && m <= groups && m * n <= kColumns; ++m)
    if (groups % m == 0) w.merged = m;
  w.groups = groups / w.merged;
  w.n = n * w.merged;
  // padding up to a quarter buys copies of 16 bytes
  const int64_t channels = w.channels(), vectors = up(channels, kVector);
  w.tap = w.taps == 1 || vectors * 4 <= channels * 5 ? vectors : up(channels, kWord);
  w.k = w.row = up(w.taps * w.tap, kVector);
  w.plain = w.taps == 1 && w.groups == 1 && w.merged == 1 && c % kVector == 0 && !w.depthwise;
  w.rows_offset = up(o * 4, kVector);
  w.rows_bytes = w.depthwise ? w.taps * up(o, kVector) : o * w.row;
  w.bytes = w.rows_offset + (w.plain ? 0 : w.rows_bytes);
  return w;
}

}  // namespace quant_ops
