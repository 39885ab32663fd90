// The vector kernels that are written once: compiled in every kernels/*.cpp against its `Simd`, inside its target region and
// unnamed namespace. `Simd` gives N lanes of float32 (F) and int32 (I) and the operations below; all are IEEE or integer
// operations, so every instruction set gives the same bits. min/max return the second operand if either is NaN, as x86 does.

// ---- partial vectors: through a full one on the stack, so that nothing outside [p, p + n) is touched ----------------

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

// ---- rows with their scales and zero points -------------------------------------------------------------------------

// What a row of a RowsRun meets; with step 1 an element each. `reciprocal` steps like `scale`, and is null where it is not used.
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

// Rows shorter than a vector that follow each other without gaps: as many as fit are handled as one, with their parameters spread
// over its elements.
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
      if (r.scale_step == 0) {  // the next row overwrites what is too much
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

// Calls vectors(from, to, parameters, Int<k>) for k vectors at a time. What is left at the end of a row is done in a last vector
// that overlaps the one before (it writes the same values there), or, in a row shorter than a vector, through a full one on the
// stack.
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

// ---- quantize -------------------------------------------------------------------------------------------------------

// A row. x * (1 / scale) + 1.5 * 2^23 is rounded to an integer by the addition, and its bits count in steps of one. Far outside of
// the codes' range that is no longer so, but their order still is that of the values, and they are clamped.
//
// The product rounds like the quotient unless it lies next to a tie n + 1/2 (tie_for); then, in about one group of 64 in 200 for
// eight-bit codes, the group is divided. NaN and infinities count as next to a tie, and so does what a NaN reciprocal makes.
template <class X, class Y, bool kSimulate, bool kVary>
QO_INLINE void quantize_row(const QuantizeRun& r, const X* x, Y* y, int64_t n, const RowParameters& row, int32_t tie_bits) {
  using F = typename Simd::F;
  using I = typename Simd::I;
  constexpr float kMagic = 12582912.0f;
  const F magic = Simd::set(kMagic), scale1 = Simd::set(*row.scale), reciprocal1 = Simd::set(*row.reciprocal);
  const I magic_bits = Simd::bits(magic), tie = Simd::set_int(tie_bits), zero1 = Simd::set_int(*row.zero_point);
  const I qmin = Simd::set_int(r.qmin), qmax = Simd::set_int(r.qmax);
  const I lo1 = Simd::sub(qmin, zero1), hi1 = Simd::sub(qmax, zero1);
  const F lo_float1 = Simd::to_float(lo1), hi_float1 = Simd::to_float(hi1);
  const I lo_bits1 = Simd::add(lo1, magic_bits), hi_bits1 = Simd::add(hi1, magic_bits), back1 = Simd::sub(zero1, magic_bits);
  for_each_vector(x, y, n, row, [&](const X* from, Y* to, const RowParameters& p, auto count) QO_LAMBDA {
    constexpr int kVectors = count.value;
    F steps[kVectors];
    I q[kVectors], distance = Simd::set_int(0);
    const auto scale = [&](auto v) QO_LAMBDA {
      if constexpr (kVary)
        if (p.scale_step) return Simd::load(p.scale + v.value * Simd::N);
      return scale1;
    };
    const auto zero = [&](auto v) QO_LAMBDA {
      if constexpr (kVary)
        if (p.zero_step) return Simd::load_int(p.zero_point + v.value * Simd::N);
      return zero1;
    };
    const auto clamped = [&](auto v, F value) QO_LAMBDA {  // NaN passes
      if constexpr (kVary)
        if (p.zero_step)
          return Simd::min(Simd::to_float(Simd::sub(qmax, zero(v))), Simd::max(Simd::to_float(Simd::sub(qmin, zero(v))), value));
      return Simd::min(hi_float1, Simd::max(lo_float1, value));
    };
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      constexpr int64_t i = v.value * Simd::N;
      F reciprocal = reciprocal1;
      if constexpr (kVary)
        if (p.scale_step) reciprocal = Simd::load(p.reciprocal + i);
      const F element = Simd::load(from + i), sum = Simd::fma(element, reciprocal, magic), rounded = Simd::sub(sum, magic);
      distance = Simd::max_unsigned(distance, Simd::abs_bits(Simd::fnma(element, reciprocal, rounded)));
      if constexpr (kSimulate) {
        steps[v.value] = clamped(v, rounded);  // never -0
      } else {
        I lo = lo_bits1, hi = hi_bits1, back = back1;
        if constexpr (kVary)
          if (p.zero_step) {
            const I z = zero(v);
            lo = Simd::add(Simd::sub(qmin, z), magic_bits), hi = Simd::add(Simd::sub(qmax, z), magic_bits);
            back = Simd::sub(z, magic_bits);
          }
        q[v.value] = Simd::add(Simd::min(hi, Simd::max(lo, Simd::bits(sum))), back);
      }
    });
    if (__builtin_expect(Simd::any_above(distance, tie), 0))
      unroll<kVectors>([&](auto v) QO_LAMBDA {
        const F quotient = Simd::round_even(Simd::div(Simd::load(from + v.value * Simd::N), scale(v)));
        if constexpr (kSimulate)
          steps[v.value] = clamped(v, Simd::add(quotient, Simd::set(0.0f)));  // + 0: no -0
        else
          q[v.value] = Simd::add(Simd::to_int(clamped(v, Simd::nan_to_zero(quotient))), zero(v));
      });
    if constexpr (kSimulate)
      unroll<kVectors>([&](auto v) QO_LAMBDA { Simd::store(to + v.value * Simd::N, Simd::mul(steps[v.value], scale(v))); });
    else if constexpr (kVectors == 4 && sizeof(Y) == 1)
      Simd::store_bytes(to, q[0], q[1], q[2], q[3]);
    else
      unroll<kVectors>([&](auto v) QO_LAMBDA { Simd::store(to + v.value * Simd::N, q[v.value]); });
  });
}

template <class X, class Y, bool kSimulate>
void quantize_typed(const QuantizeRun& r) {
  // without reciprocals everything is next to a tie
  const int32_t tie = r.reciprocal ? static_cast<int32_t>(float_bits(r.tie)) : -1;
  for_each_row(r, r.reciprocal ? r.reciprocal : r.scale,
               [&](int64_t from, int64_t to, int64_t n, const RowParameters& p, auto vary) QO_LAMBDA {
                 quantize_row<X, Y, kSimulate, vary.value != 0>(r, static_cast<const X*>(r.x) + from, static_cast<Y*>(r.y) + to, n,
                                                                p, tie);
               });
}

template <class X>
void quantize_from(const QuantizeRun& r) {
  if (r.simulate) return quantize_typed<X, X, true>(r);
  switch (r.y_dtype) {
    case DType::kInt8: return quantize_typed<X, int8_t, false>(r);
    case DType::kUInt8: return quantize_typed<X, uint8_t, false>(r);
    case DType::kInt16: return quantize_typed<X, int16_t, false>(r);
    default: return quantize_typed<X, int32_t, false>(r);
  }
}

void quantize_run(const QuantizeRun& r) {
  switch (r.x_dtype) {
    case DType::kFloat32: return quantize_from<float>(r);
    case DType::kFloat16: return quantize_from<Half>(r);
    default: return quantize_from<BFloat16>(r);
  }
}

void codes_run(const void* x, DType dtype, int64_t n, float scale, int32_t zero_point, uint8_t* codes) {
  const float reciprocal = reciprocal_of(scale);
  QuantizeRun run;
  run.x = x;
  run.y = codes;
  run.n = n;
  run.scale = &scale;
  run.reciprocal = &reciprocal;
  run.tie = tie_for(255);
  run.zero_point = &zero_point;
  run.scale_step = run.zero_step = 0;
  run.qmin = 0;
  run.qmax = 255;
  run.x_dtype = dtype;
  run.y_dtype = DType::kUInt8;
  run.simulate = false;
  quantize_run(run);
}

// ---- dequantize -----------------------------------------------------------------------------------------------------

template <class Q, class Y>
void dequantize_typed(const DequantizeRun& r) {
  for_each_row(r, nullptr, [&](int64_t from, int64_t to, int64_t n, const RowParameters& row, auto) QO_LAMBDA {
    const auto scale1 = Simd::set(*row.scale);
    const auto zero1 = Simd::set_int(*row.zero_point);
    for_each_vector(static_cast<const Q*>(r.q) + from, static_cast<Y*>(r.y) + to, n, row,
                    [&](const Q* q, Y* y, const RowParameters& p, auto count) QO_LAMBDA {
                      unroll<count.value>([&](auto v) QO_LAMBDA {
                        constexpr int64_t i = v.value * Simd::N;
                        const auto scale = p.scale_step ? Simd::load(p.scale + i) : scale1;
                        const auto zero = p.zero_step ? Simd::load_int(p.zero_point + i) : zero1;
                        Simd::store(y + i, Simd::mul(Simd::to_float(Simd::sub(Simd::load_int(q + i), zero)), scale));
                      });
                    });
  });
}

template <class Q>
void dequantize_to(const DequantizeRun& r) {
  switch (r.y_dtype) {
    case DType::kFloat32: return dequantize_typed<Q, float>(r);
    case DType::kFloat16: return dequantize_typed<Q, Half>(r);
    default: return dequantize_typed<Q, BFloat16>(r);
  }
}

void dequantize_run(const DequantizeRun& r) {
  switch (r.q_dtype) {
    case DType::kInt8: return dequantize_to<int8_t>(r);
    case DType::kUInt8: return dequantize_to<uint8_t>(r);
    default: return dequantize_to<int16_t>(r);
  }
}

#include "kernels/generic/straight_through.h"
//
#include "kernels/generic/range.h"
//
#include "kernels/generic/epilogue.h"
//
#include "kernels/generic/pack.h"
