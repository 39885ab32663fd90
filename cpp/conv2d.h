// What the two convolutions of the CPU share. Read next: conv2d.cpp, conv2d_depthwise.cpp.
#pragma once

#include <cstdint>

#include "ops.h"

namespace quant_ops {

// groups == C == O. Neither N nor a pixel of the output is missing.
void int8_conv2d_depthwise_cpu(const Int8Conv2dParams& p);

// NCHW output: a block of [rows][columns] in memory becomes `columns` runs of `rows` pixels.
template <class T>
void transpose_store(const void* block, int64_t rows, int64_t columns, int64_t block_stride, void* y, int64_t y_stride) {
  const T* from = static_cast<const T*>(block);
  T* to = static_cast<T*>(y);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * y_stride + r] = from[r * block_stride + c];
}

inline void transpose_store(int64_t bytes, const void* block, int64_t rows, int64_t columns, int64_t block_stride, void* y,
                            int64_t y_stride) {
  if (bytes == 4) return transpose_store<uint32_t>(block, rows, columns, block_stride, y, y_stride);
  if (bytes == 2) return transpose_store<uint16_t>(block, rows, columns, block_stride, y, y_stride);
  transpose_store<uint8_t>(block, rows, columns, block_stride, y, y_stride);
}

}  // namespace quant_ops
