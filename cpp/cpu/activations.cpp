// Activations as unsigned codes: see activations.h. The vector loops are KernelTable::range and KernelTable::codes.
#include "cpu/activations.h"

#include <cstring>

namespace quant_ops {

void find_range(const KernelTable& table, const InputParams& in, int64_t offset, int64_t n, Range* range) {
  const void* x = static_cast<const char*>(in.x) + offset * dtype_bytes(in.dtype);
  table.range(x, in.dtype, n, in.mode == Activation::kDynamic, range);
}

QParams<float> dynamic_qparams(const Range& range, bool asymmetric) {
  const bool finite = range.abs_bits < 0x7f800000u;
  const float absmax = bits_float(range.abs_bits);
  return asymmetric ? choose_qparams_of(range.min, range.max, finite, -128, 127, true)
                    : choose_qparams_of(-absmax, absmax, finite, -127, 127, false);
}

QParams<float> code_qparams(const InputParams& in, int64_t i, const Range& range) {
  if (is_dynamic(in)) {
    const QParams<float> p = dynamic_qparams(range, in.mode == Activation::kDynamicAsymmetric);
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
    const int8_t* x = static_cast<const int8_t*>(in.x) + offset;
    for (int64_t k = 0; k < n; ++k) codes[k] = static_cast<uint8_t>(x[k]) ^ 0x80u;
  } else {
    // symmetric codes need no clamp to [1, 255]: |x| <= absmax, so none is 0
    const void* x = static_cast<const char*>(in.x) + offset * dtype_bytes(in.dtype);
    table.codes(x, in.dtype, n, qparams.scale, qparams.zero_point, codes);
  }
}

}  // namespace quant_ops
