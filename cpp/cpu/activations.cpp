// Activations as unsigned codes: see activations.h. The vector loops are KernelTable::range, codes and multiply.
#include "cpu/activations.h"

#include <algorithm>
#include <cstring>

#include "cpu/staging.h"

namespace quant_ops {
namespace {

// each(products, k, count) for `count` products from column k on. They are made again for every walk over a row, in memory that
// stays in the first cache: that costs less than keeping a row of them.
template <class Each>
void for_each_product(const KernelTable& table, const InputParams& in, int64_t offset, int64_t n, const Each& each) {
  alignas(64) float products[kStage];
  for (int64_t k = 0, count; k < n; k += count) {
    count = std::min(kStage, n - k);
    table.multiply(element(in.x, in.dtype, offset + k), in.dtype, in.multiplier + k, count, products);
    each(products, k, count);
  }
}

// A function of its own: where a pointer is captured by reference, each byte that is stored could change it, and the loop would go
// byte by byte.
void flip_top_bits(const int8_t* __restrict x, int64_t n, uint8_t* __restrict codes) {
  for (int64_t k = 0; k < n; ++k) codes[k] = static_cast<uint8_t>(static_cast<uint8_t>(x[k]) ^ 0x80u);
}

}  // namespace

void find_range(const KernelTable& table, const InputParams& in, int64_t offset, int64_t n, Range* range) {
  const bool only_magnitude = in.mode == InputMode::kDynamic;
  if (in.multiplier == nullptr) return table.range(element(in.x, in.dtype, offset), in.dtype, n, only_magnitude, range);
  for_each_product(table, in, offset, n, [&](const float* products, int64_t, int64_t count) {
    table.range(products, DType::kFloat32, count, only_magnitude, range);
  });
}

QParams<float> dynamic_qparams(const Range& range, bool asymmetric) {
  const bool finite = range.abs_bits < 0x7f800000u;
  const float absmax = bits_float(range.abs_bits);
  return asymmetric ? choose_qparams_of(range.min, range.max, finite, -128, 127, true)
                    : choose_qparams_of(-absmax, absmax, finite, -127, 127, false);
}

QParams<float> code_qparams(const InputParams& in, int64_t i, const Range& range) {
  if (is_dynamic(in)) {
    const QParams<float> p = dynamic_qparams(range, in.mode == InputMode::kDynamicAsymmetric);
    return {p.scale, p.zero_point + kSignedOffset};
  }
  const int32_t offset = in.dtype == DType::kUInt8 ? 0 : kSignedOffset;
  return {in.scale ? in.scale[i * in.scale_stride] : 1.0f, offset + (in.zero_point ? in.zero_point[i * in.zero_point_stride] : 0)};
}

void write_codes(const KernelTable& table, const InputParams& in, int64_t offset, int64_t n, const QParams<float>& qparams,
                 uint8_t* codes) {
  if (in.dtype == DType::kUInt8) {
    std::memcpy(codes, static_cast<const uint8_t*>(in.x) + offset, static_cast<size_t>(n));
  } else if (in.dtype == DType::kInt8) {
    flip_top_bits(static_cast<const int8_t*>(in.x) + offset, n, codes);
  } else {
    // symmetric codes need no clamp to [1, 255]: |x| <= absmax, so none is 0
    const auto write = [&](const void* x, DType dtype, int64_t count, uint8_t* to) {
      table.codes(x, dtype, count, qparams.scale, qparams.zero_point, to);
    };
    if (in.multiplier == nullptr) return write(element(in.x, in.dtype, offset), in.dtype, n, codes);
    for_each_product(table, in, offset, n,
                     [&](const float* products, int64_t k, int64_t count) { write(products, DType::kFloat32, count, codes + k); });
  }
}

}  // namespace quant_ops
