// Parts of a vector: n elements, fewer than Simd::N at the end of a row. They pass through a whole vector on the stack (or a masked
// store), so that nothing outside [p, p + n) is touched.
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

template <class T>
QO_INLINE typename Simd::F load_part(const T* p, int64_t n) {
  if (n >= Simd::N) return Simd::load(p);
  T part[Simd::N] = {};
  __builtin_memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return Simd::load(part);
}

template <class T>
QO_INLINE typename Simd::I load_int_part(const T* p, int64_t n) {
  if (n >= Simd::N) return Simd::load_int(p);
  T part[Simd::N] = {};
  __builtin_memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return Simd::load_int(part);
}

template <class T, class V, class S = Simd>
QO_INLINE void store_part(T* p, V v, int64_t n) {
  if (n >= S::N) {
    S::store(p, v);
  } else if constexpr (S::kMasks) {
    S::store(p, v, n > 0 ? n : 0);
  } else if (n > 0) {
    T part[S::N];
    S::store(part, v);
    __builtin_memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA
