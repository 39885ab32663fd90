// int8_upsample_nearest2d on the CPU: y[n, c, h, w] = x[n, c, h / factor_h, w / factor_w]. The first of the rows that are alike is
// written from x, pixel by pixel, the others are its copies.
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/staging.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

constexpr int64_t kBytesPerThread = int64_t{1} << 17;

void widen_row(const uint8_t* x, int64_t columns, int64_t factor, uint8_t* y) {
  if (factor == 2) {  // the compiler makes vectors of it
    for (int64_t w = 0; w < columns; ++w) y[2 * w] = y[2 * w + 1] = x[w];
    return;
  }
  for (int64_t w = 0; w < columns; ++w)
    for (int64_t i = 0; i < factor; ++i) y[w * factor + i] = x[w];
}

// Row h of image `plane`: of a sample where channels are neighbours, of a channel where columns are.
void upsample_rows(const UpsampleParams& p, int64_t plane, int64_t h) {
  const bool channels = p.y_channels_last;
  const int64_t pixel = channels ? p.C : 1, bytes = p.W * p.factor[1] * pixel;
  const int64_t sample = channels ? plane : plane / p.C, channel = channels ? 0 : plane % p.C;
  const uint8_t* const x = static_cast<const uint8_t*>(p.x) + sample * p.x_stride[0] + channel * p.x_stride[1] + h * p.x_stride[2];
  uint8_t* const y = static_cast<uint8_t*>(p.y) + (plane * p.H + h) * p.factor[0] * bytes;
  if (channels) {
    for (int64_t w = 0; w < p.W; ++w)
      for (int64_t i = 0; i < p.factor[1]; ++i) copy_bytes(y + (w * p.factor[1] + i) * p.C, x + w * p.x_stride[3], p.C);
  } else {
    widen_row(x, p.W, p.factor[1], y);
  }
  for (int64_t i = 1; i < p.factor[0]; ++i) std::memcpy(y + i * bytes, y, static_cast<size_t>(bytes));
}

}  // namespace

void upsample_nearest2d_cpu(const UpsampleParams& p) {
  log_kernel(one_by_one);
  const int64_t planes = p.N * (p.y_channels_last ? 1 : p.C);
  const int64_t row = p.factor[0] * p.factor[1] * p.W * (p.y_channels_last ? p.C : 1);
  parallel_for(planes * p.H, ceil_div(kBytesPerThread, std::max<int64_t>(1, row)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) upsample_rows(p, i / p.H, i % p.H);
  });
}

}  // namespace quant_ops
