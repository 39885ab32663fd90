// What the two convolutions of the CPU share. Read next: conv2d.cpp, conv2d_depthwise.cpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "contract/ops.h"
#include "cpu/transpose.h"

namespace quant_ops {

// groups == C == O. Neither N nor a pixel of the output is missing.
void int8_conv2d_depthwise_cpu(const Int8Conv2dParams& p);

// NCHW output: a block of [rows][columns] in memory becomes `columns` runs of `rows` pixels.
inline void transpose_store(int64_t bytes, const void* block, int64_t rows, int64_t columns, int64_t block_stride, void* y,
                            int64_t y_stride) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    transpose(static_cast<const T*>(block), block_stride, rows, columns, static_cast<T*>(y), y_stride);
  };
  if (bytes == 4) return run(static_cast<uint32_t*>(nullptr));
  if (bytes == 2) return run(static_cast<uint16_t*>(nullptr));
  run(static_cast<uint8_t*>(nullptr));
}

}  // namespace quant_ops
