// From a DType at run time to a C++ type, for the host code of both devices.
#pragma once

#include <cstdint>

#include "contract/ops.h"

namespace quant_ops {

// The type that elements of type X are computed in.
template <class X>
using Compute = decltype(to_compute(X{}));

// Calls f with a null pointer to the C++ type of the dtype.
template <class F>
void with_float_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat16: return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    default: return f(static_cast<double*>(nullptr));
  }
}

template <class F>
void with_integer_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kInt8: return f(static_cast<int8_t*>(nullptr));
    case DType::kUInt8: return f(static_cast<uint8_t*>(nullptr));
    case DType::kInt16: return f(static_cast<int16_t*>(nullptr));
    default: return f(static_cast<int32_t*>(nullptr));
  }
}

}  // namespace quant_ops
