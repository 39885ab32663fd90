// What the CUDA kernels read of an int8 weight [O, C/groups, R, S] (of a linear one [N, K, 1, 1]), and what pack_weight keeps of
// it.
//
//   sums   int32 [O]                  the sum of a column's weights, for the zero-point correction; padded to 16 bytes
//   rows   int8 [O][row_bytes]        k contiguous: [tap][channel] with tap_bytes >= the channels of a group, zeros between
//   depthwise (groups == C == O):  int8 [R * S][padded O]
//
// Rows are not kept if the kernels can read the weight itself: its k is contiguous and a multiple of 16 bytes. Groups with few
// columns are joined, and multiplied together by a block-diagonal weight, since a tile has 64 columns anyway and their channels
// together fill 16-byte vectors. Plain host code, because pack_weight's fake kernel asks for the length too. Read next: pack.cu,
// portable.cu, conv2d.cu.
#pragma once

#include <cstdint>

namespace quant_ops {

struct CudaWeights {
  int64_t o, c, taps;  // of the weight: columns, channels of a group, taps
  bool depthwise;
  bool plain;             // the rows are the weight itself
  int64_t joined_groups;  // groups of the weight in one group of the product
  int64_t groups, n;      // of the product: groups, and columns of each
  int64_t tap_bytes;      // a multiple of 16, or of 4 if there are several taps
  int64_t k, row_bytes;   // of the product, multiples of 16
  int64_t rows_offset, rows_bytes, bytes;

  int64_t channels() const { return c * joined_groups; }  // of one group of the product
};

inline CudaWeights cuda_weights(int64_t o, int64_t c, int64_t r, int64_t s, int64_t groups) {
  constexpr int64_t kColumns = 64, kVector = 16, kWord = 4;
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  CudaWeights w{};
  w.o = o;
  w.c = c;
  w.taps = r * s;
  const int64_t n = o / groups;
  w.depthwise = groups > 1 && c == 1 && n == 1;
  w.joined_groups = 1;
  const int64_t fitting = w.depthwise || n == 0 ? 1 : kColumns / n, most_joined = fitting < groups ? fitting : groups;
  for (int64_t m = 2; m <= most_joined; ++m)
    if (groups % m == 0) w.joined_groups = m;
  w.groups = groups / w.joined_groups;
  w.n = n * w.joined_groups;
  // Copies of 16 bytes are worth padding up to a quarter.
  const int64_t channels = w.channels(), vectors = up(channels, kVector);
  w.tap_bytes = w.taps == 1 || vectors * 4 <= channels * 5 ? vectors : up(channels, kWord);
  w.k = w.row_bytes = up(w.taps * w.tap_bytes, kVector);
  w.plain = w.taps == 1 && groups == 1 && c % kVector == 0;
  w.rows_offset = up(o * 4, kVector);
  w.rows_bytes = w.depthwise ? w.taps * up(o, kVector) : o * w.row_bytes;
  w.bytes = w.rows_offset + (w.plain ? 0 : w.rows_bytes);
  return w;
}

}  // namespace quant_ops
