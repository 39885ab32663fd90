// Walks the rows of an ElementRun, and each row vector by vector, with the scale and the zero point of every element.
// quantize.h and dequantize.h give the arithmetic.
#pragma once

#include "kernels/generic/prelude.h"

namespace quant_ops::QO_ISA {
namespace {

// The scale and the zero point of a row: one for all of its elements (step 0), or one for each (step 1). `reciprocal` has the step
// of `scale`, and is null if it is not used.
struct RowParameters {
  const float* scale;
  const float* reciprocal;
  const int32_t* zero_point;
  int scale_step, zero_step;

  QO_INLINE RowParameters from(int64_t i) const {
    return {scale + i * scale_step, reciprocal ? reciprocal + i * scale_step : nullptr, zero_point + i * zero_step, scale_step,
            zero_step};
  }
};

// Rows shorter than a vector, without gaps between them: as many as fit are handled as one row in which every element has its own
// scale and zero point.
template <class Body>
void spread_rows(const RowsRun& r, const float* reciprocal, const Body& body) {
  constexpr int64_t kSpan = 512;
  float scales[kSpan + Simd::N], reciprocals[kSpan + Simd::N];
  int32_t zeros[kSpan + Simd::N];
  const auto spread = [&](auto* to, const auto* from, int step) QO_LAMBDA {
    for (int64_t i = 0; i < r.n; ++i) to[i] = from[i * step];
  };
  for (int64_t row = 0; row < r.rows;) {
    const int64_t first = row, count = r.rows - row < kSpan / r.n ? r.rows - row : kSpan / r.n;
    for (; row < first + count; ++row) {
      const int64_t at = (row - first) * r.n;
      if (r.scale_step == 0) {  // the next row overwrites the elements beyond r.n
        Simd::store(scales + at, Simd::set(r.scale[row * r.scale_row]));
        if (reciprocal) Simd::store(reciprocals + at, Simd::set(reciprocal[row * r.scale_row]));
      } else {
        spread(scales + at, r.scale + row * r.scale_row, r.scale_step);
        if (reciprocal) spread(reciprocals + at, reciprocal + row * r.scale_row, r.scale_step);
      }
      if (r.zero_step == 0)
        Simd::store(zeros + at, Simd::set_int(r.zero_point[row * r.zero_row]));
      else
        spread(zeros + at, r.zero_point + row * r.zero_row, r.zero_step);
    }
    body(first * r.n, first * r.n, count * r.n, RowParameters{scales, reciprocal ? reciprocals : nullptr, zeros, 1, 1}, Int<1>{});
  }
}

// Calls body(offset to read from, offset to write to, elements, parameters, Int<1> if these vary along the row, else Int<0>).
template <class Body>
QO_INLINE void for_each_row(const RowsRun& r, const float* reciprocal, const Body& body) {
  if constexpr (Simd::N > 1)
    if (r.n < Simd::N && r.rows > 1 && r.from_row == r.n && r.to_row == r.n) return spread_rows(r, reciprocal, body);
  const auto rows = [&](auto vary) QO_LAMBDA {
    for (int64_t row = 0; row < r.rows; ++row)
      body(row * r.from_row, row * r.to_row, r.n,
           RowParameters{r.scale + row * r.scale_row, reciprocal ? reciprocal + row * r.scale_row : nullptr,
                         r.zero_point + row * r.zero_row, r.scale_step, r.zero_step},
           vary);
  };
  r.scale_step || r.zero_step ? rows(Int<1>{}) : rows(Int<0>{});
}

// A row shorter than a vector, through a full one on the stack.
template <class From, class To, class Vectors>
QO_INLINE void short_row(const From* from, To* to, int64_t n, const RowParameters& p, const Vectors& vectors) {
  constexpr int64_t N = Simd::N;
  From from_part[N] = {};
  To to_part[N];
  float scales[N] = {}, reciprocals[N] = {};
  int32_t zeros[N] = {};
  RowParameters part = p;
  for (int64_t j = 0; j < n; ++j) from_part[j] = from[j];
  if (p.scale_step) {
    for (int64_t j = 0; j < n; ++j) scales[j] = p.scale[j];
    part.scale = scales;
    if (p.reciprocal) {
      for (int64_t j = 0; j < n; ++j) reciprocals[j] = p.reciprocal[j];
      part.reciprocal = reciprocals;
    }
  }
  if (p.zero_step) {
    for (int64_t j = 0; j < n; ++j) zeros[j] = p.zero_point[j];
    part.zero_point = zeros;
  }
  vectors(from_part, to_part, part, Int<1>{});
  for (int64_t j = 0; j < n; ++j) to[j] = to_part[j];
}

// Calls vectors(from, to, parameters, Int<k>) for k vectors at a time. The end of a row is a last vector that overlaps the one
// before and writes the same values there.
template <class From, class To, class Vectors>
QO_INLINE void for_each_vector(const From* from, To* to, int64_t n, const RowParameters& p, const Vectors& vectors) {
  constexpr int64_t N = Simd::N;
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N) vectors(from + i, to + i, p.from(i), Int<4>{});
  if (n >= N) {
    for (; i < n; i += N) {
      const int64_t at = i < n - N ? i : n - N;
      vectors(from + at, to + at, p.from(at), Int<1>{});
    }
    return;
  }
  if constexpr (N > 1) short_row(from, to, n, p, vectors);
}

}  // namespace
}  // namespace quant_ops::QO_ISA
