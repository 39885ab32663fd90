// The vector kernels that are written once: compiled in every isa/*.cpp against its `Simd`, inside its target region and unnamed
// namespace. `Simd` gives N lanes of float32 (F) and int32 (I) and the operations below; all are IEEE or integer operations, so
// every instruction set gives the same bits. min/max return the second operand if either is NaN, as x86 does.

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

template <class T, class V>
QO_INLINE void store_part(T* p, V v, int64_t n) {
  if (n >= Simd::N) {
    Simd::store(p, v);
    return;
  }
  T part[Simd::N];
  Simd::store(part, v);
  __builtin_memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
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

// ---- straight-through gradient --------------------------------------------------------------------------------------

// straight_through of quant_math.h.
struct SteFactors {
  typename Simd::F dx, scale_factor, zero_factor;
};

QO_INLINE SteFactors ste_factors(typename Simd::F x, typename Simd::F grad, typename Simd::F scale, typename Simd::F lo,
                                 typename Simd::F hi) {
  const auto quotient = Simd::div(x, scale), steps = Simd::round_even(quotient);
  const auto clamped = Simd::nan_to_zero(Simd::min(hi, Simd::max(lo, steps)));
  SteFactors f;
  f.dx = Simd::keep_between(grad, steps, lo, hi);
  f.scale_factor = Simd::sub(clamped, Simd::keep_between(quotient, steps, lo, hi));
  f.zero_factor = Simd::keep_outside(Simd::sub(Simd::set(0.0f), scale), steps, lo, hi);
  return f;
}

// kSums: 0 none, 1 that of the scale, 2 both.
template <class X, int kSums>
void ste_typed(const StraightThroughRun& r) {
  constexpr int64_t N = Simd::N;
  constexpr int kParts = kReduceLanes / N;  // element j goes to lane j % 32: the same vectors of lanes all along
  const auto qmin = Simd::set_int(r.qmin), qmax = Simd::set_int(r.qmax);
  const auto scale1 = Simd::set(*r.scale);
  const auto zero1 = Simd::set_int(*r.zero_point);
  const auto lo1 = Simd::to_float(Simd::sub(qmin, zero1)), hi1 = Simd::to_float(Simd::sub(qmax, zero1));
  double lanes[kReduceLanes] = {};
  typename Simd::D scale_sum[kParts], zero_sum[kParts];
  unroll<kParts>([&](auto v) QO_LAMBDA { scale_sum[v.value] = zero_sum[v.value] = Simd::load(lanes); });
  const auto part = [&](const X* x, const X* grad, X* dx, const float* scales, const int32_t* zeros) QO_LAMBDA {
    unroll<kParts>([&](auto v) QO_LAMBDA {
      constexpr int64_t i = v.value * N;
      auto scale = scale1, lo = lo1, hi = hi1;
      if (r.scale_step) scale = Simd::load(scales + i);
      if (r.zero_step) {
        const auto zero = Simd::load_int(zeros + i);
        lo = Simd::to_float(Simd::sub(qmin, zero)), hi = Simd::to_float(Simd::sub(qmax, zero));
      }
      const auto g = Simd::load(grad + i);
      const auto f = ste_factors(Simd::load(x + i), g, scale, lo, hi);
      if (dx) Simd::store(dx + i, f.dx);
      if constexpr (kSums >= 1) scale_sum[v.value] = Simd::accumulate(scale_sum[v.value], g, f.scale_factor);
      if constexpr (kSums == 2) zero_sum[v.value] = Simd::accumulate(zero_sum[v.value], g, f.zero_factor);
    });
  };
  const X* x = static_cast<const X*>(r.x);
  const X* grad = static_cast<const X*>(r.grad);
  X* dx = static_cast<X*>(r.dx);
  int64_t i = 0;
  for (; i + kReduceLanes <= r.n; i += kReduceLanes)
    part(x + i, grad + i, dx ? dx + i : nullptr, r.scale + i * r.scale_step, r.zero_point + i * r.zero_step);
  if (i < r.n) {  // the rest, among elements that contribute nothing: x is NaN, bytes of ones, the gradient 0
    X x_part[kReduceLanes], grad_part[kReduceLanes] = {}, dx_part[kReduceLanes];
    float scales[kReduceLanes] = {};
    int32_t zeros[kReduceLanes] = {};
    __builtin_memset(static_cast<void*>(x_part), 0xff, sizeof(x_part));
    const int64_t rest = r.n - i;
    for (int64_t j = 0; j < rest; ++j) {
      x_part[j] = x[i + j];
      grad_part[j] = grad[i + j];
      scales[j] = r.scale[(i + j) * r.scale_step];
      zeros[j] = r.zero_point[(i + j) * r.zero_step];
    }
    part(x_part, grad_part, dx_part, scales, zeros);
    if (dx)
      for (int64_t j = 0; j < rest; ++j) dx[i + j] = dx_part[j];
  }
  const auto sum = [&](auto& parts) QO_LAMBDA {
    unroll<kParts>([&](auto v) QO_LAMBDA { Simd::store(lanes + v.value * N, parts[v.value]); });
    unroll<5>([&](auto i) QO_LAMBDA {
      constexpr int step = kReduceLanes / 2 >> i.value;
      for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
    });
    return lanes[0];
  };
  if constexpr (kSums >= 1) *r.scale_sum = sum(scale_sum);
  if constexpr (kSums == 2) *r.zero_sum = sum(zero_sum);
}

template <class X>
void ste_of(const StraightThroughRun& r) {
  if (r.zero_sum) return ste_typed<X, 2>(r);
  if (r.scale_sum) return ste_typed<X, 1>(r);
  ste_typed<X, 0>(r);
}

void ste_run(const StraightThroughRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return ste_of<float>(r);
    case DType::kFloat16: return ste_of<Half>(r);
    default: return ste_of<BFloat16>(r);
  }
}

// Columns [c, c + kVectors * N), `valid` of them: down the rows, so that what belongs to the columns stays in registers.
template <class X, bool kZero, int kVectors>
QO_INLINE void ste_columns_block(const StraightThroughColumnsRun& r, int64_t c, int64_t valid) {
  using F = typename Simd::F;
  const auto qmin = Simd::set_int(r.qmin), qmax = Simd::set_int(r.qmax);
  F scale[kVectors], lo[kVectors], hi[kVectors];
  unroll<kVectors>([&](auto v) QO_LAMBDA {
    const int64_t at = c + v.value * Simd::N;
    scale[v.value] = r.scale_step ? load_part(r.scale + at, valid) : Simd::set(*r.scale);
    const auto zero = r.zero_step ? load_int_part(r.zero_point + at, valid) : Simd::set_int(*r.zero_point);
    lo[v.value] = Simd::to_float(Simd::sub(qmin, zero));
    hi[v.value] = Simd::to_float(Simd::sub(qmax, zero));
  });
  const X* x = static_cast<const X*>(r.x) + c;
  const X* grad = static_cast<const X*>(r.grad) + c;
  X* dx = r.dx ? static_cast<X*>(r.dx) + c : nullptr;
  int64_t lane = r.lane;
  for (int64_t row = 0; row < r.rows; ++row) {
    // rows are far apart, so that no prefetcher sees the next ones coming
    constexpr int64_t kAhead = 8;
    if (row + kAhead < r.rows) {
      for (int64_t i = 0; i < kVectors * Simd::N; i += 64 / static_cast<int64_t>(sizeof(X))) {
        __builtin_prefetch(x + kAhead * r.x_row + i);
        __builtin_prefetch(grad + kAhead * r.grad_row + i);
      }
    }
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      constexpr int64_t i = v.value * Simd::N;
      const F g = load_part(grad + i, valid);
      const auto f = ste_factors(load_part(x + i, valid), g, scale[v.value], lo[v.value], hi[v.value]);
      if (dx) store_part(dx + i, f.dx, valid);
      double* to = r.scale_lanes + lane * kReduceColumns + c + i;
      Simd::store(to, Simd::accumulate(Simd::load(to), g, f.scale_factor));
      if constexpr (kZero) {
        to = r.zero_lanes + lane * kReduceColumns + c + i;
        Simd::store(to, Simd::accumulate(Simd::load(to), g, f.zero_factor));
      }
    });
    x += r.x_row;
    grad += r.grad_row;
    if (dx) dx += r.dx_row;
    lane = (lane + 1) % kReduceLanes;
  }
}

template <class X, bool kZero>
void ste_columns_typed(const StraightThroughColumnsRun& r) {
  constexpr int64_t N = Simd::N;
  int64_t c = 0;
  for (; c + 4 * N <= r.columns; c += 4 * N) ste_columns_block<X, kZero, 4>(r, c, 4 * N);
  for (; c + N <= r.columns; c += N) ste_columns_block<X, kZero, 1>(r, c, N);
  if (c < r.columns) ste_columns_block<X, kZero, 1>(r, c, r.columns - c);
}

template <class X>
void ste_columns_of(const StraightThroughColumnsRun& r) {
  r.zero_lanes ? ste_columns_typed<X, true>(r) : ste_columns_typed<X, false>(r);
}

void ste_columns_run(const StraightThroughColumnsRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return ste_columns_of<float>(r);
    case DType::kFloat16: return ste_columns_of<Half>(r);
    default: return ste_columns_of<BFloat16>(r);
  }
}

// ---- range ----------------------------------------------------------------------------------------------------------

// N lanes of minimum, maximum and magnitude.
template <bool kOnlyMagnitude>
struct RangeLanes {
  typename Simd::F min, max;
  typename Simd::I magnitude;

  QO_INLINE void set(const Range& range) {
    min = Simd::set(range.min);
    max = Simd::set(range.max);
    magnitude = Simd::set_int(static_cast<int32_t>(range.abs_bits));
  }
  QO_INLINE void include(typename Simd::F v) {
    if constexpr (!kOnlyMagnitude) {
      min = Simd::min(v, min);
      max = Simd::max(v, max);
    }
    magnitude = Simd::max_unsigned(magnitude, Simd::abs_bits(v));
  }
  QO_INLINE void merge(const RangeLanes& other) {
    min = Simd::min(other.min, min);
    max = Simd::max(other.max, max);
    magnitude = Simd::max_unsigned(magnitude, other.magnitude);
  }
};

template <bool kOnlyMagnitude, class X>
void range_typed(const X* x, int64_t count, Range* range) {
  constexpr int64_t N = Simd::N;
  constexpr int kChains = 4;  // independent chains hide the latency of min and max
  if (count < N) {
    for (int64_t j = 0; j < count; ++j) {
      const float v = to_compute(x[j]);
      if (!kOnlyMagnitude && v < range->min) range->min = v;
      if (!kOnlyMagnitude && v > range->max) range->max = v;
      const uint32_t bits = float_bits(v) & 0x7fffffffu;
      if (bits > range->abs_bits) range->abs_bits = bits;
    }
    return;
  }
  RangeLanes<kOnlyMagnitude> lanes[kChains];
  lanes[0].set(*range);
  int64_t i = 0;
  if (count >= kChains * N) {
    unroll<kChains>([&](auto c) QO_LAMBDA { lanes[c.value].set(*range); });
    for (; i + kChains * N <= count; i += kChains * N)
      unroll<kChains>([&](auto c) QO_LAMBDA { lanes[c.value].include(Simd::load(x + i + c.value * N)); });
    lanes[0].merge(lanes[1]);
    lanes[2].merge(lanes[3]);
    lanes[0].merge(lanes[2]);
  }
  for (; i + N <= count; i += N) lanes[0].include(Simd::load(x + i));
  if (i < count) lanes[0].include(Simd::load(x + count - N));  // some of them twice, which changes nothing
  if constexpr (!kOnlyMagnitude) {
    range->min = Simd::reduce_min(lanes[0].min);
    range->max = Simd::reduce_max(lanes[0].max);
  }
  range->abs_bits = Simd::reduce_max_unsigned(lanes[0].magnitude);
}

template <bool kOnlyMagnitude>
void range_of(const void* x, DType dtype, int64_t n, Range* range) {
  switch (dtype) {
    case DType::kFloat32: return range_typed<kOnlyMagnitude>(static_cast<const float*>(x), n, range);
    case DType::kFloat16: return range_typed<kOnlyMagnitude>(static_cast<const Half*>(x), n, range);
    default: return range_typed<kOnlyMagnitude>(static_cast<const BFloat16*>(x), n, range);
  }
}

void range_run(const void* x, DType dtype, int64_t n, bool only_magnitude, Range* range) {
  only_magnitude ? range_of<true>(x, dtype, n, range) : range_of<false>(x, dtype, n, range);
}

// Several rows at a time, so that the arrays over columns are read and written once for all of them.
template <class X, int kRows>
QO_INLINE void range_rows(const RangeColumnsRun& r, const X* x) {
  constexpr int64_t N = Simd::N;
  const auto vectors = [&](int64_t c, int64_t n) QO_LAMBDA {
    RangeLanes<false> lanes;
    int32_t* const magnitude = reinterpret_cast<int32_t*>(r.abs_bits) + c;
    lanes.min = load_part(r.min + c, n);
    lanes.max = load_part(r.max + c, n);
    lanes.magnitude = load_int_part(magnitude, n);
    unroll<kRows>([&](auto row) QO_LAMBDA { lanes.include(load_part(x + row.value * r.x_row + c, n)); });
    store_part(r.min + c, lanes.min, n);
    store_part(r.max + c, lanes.max, n);
    store_part(magnitude, lanes.magnitude, n);
  };
  int64_t c = 0;
  for (; c + N <= r.columns; c += N) vectors(c, N);
  if (c < r.columns) r.columns >= N ? vectors(r.columns - N, N) : vectors(0, r.columns);  // some twice, which changes nothing
}

template <class X>
void range_columns_typed(const RangeColumnsRun& r) {
  const X* x = static_cast<const X*>(r.x);
  int64_t row = 0;
  for (; row + 4 <= r.rows; row += 4) range_rows<X, 4>(r, x + row * r.x_row);
  for (; row < r.rows; ++row) range_rows<X, 1>(r, x + row * r.x_row);
}

void range_columns_run(const RangeColumnsRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return range_columns_typed<float>(r);
    case DType::kFloat16: return range_columns_typed<Half>(r);
    default: return range_columns_typed<BFloat16>(r);
  }
}

// ---- integer epilogue: N columns of one row, from registers ---------------------------------------------------------

// Columns [column, column + N) of row `row`: the correction of the zero point is subtracted, the rest is quant_math.h's epilogue.
// kWhole says that all N are valid.
template <bool kWhole, class Y>
QO_INLINE void finish_typed(const TileOutput& o, int64_t row, int64_t column, typename Simd::I acc, typename Simd::I correction,
                            typename Simd::F row_scale, typename Simd::F column_scale, typename Simd::F bias) {
  Y* y = static_cast<Y*>(o.y) + row * o.y_stride + column;
  const int64_t n = kWhole ? Simd::N : o.columns - column;
  acc = Simd::sub(acc, correction);
  if constexpr (std::is_same_v<Y, int32_t>) {  // the accumulator itself
    kWhole ? Simd::store(y, acc) : store_part(y, acc, n);
  } else {
    auto v = Simd::fma(Simd::to_float(acc), Simd::mul(row_scale, column_scale), bias);
    v = Simd::max(Simd::set(o.floor), v);  // a NaN passes
    if constexpr (sizeof(Y) == 1) {
      const int32_t qmin = Y(-1) < Y(0) ? -128 : 0, qmax = Y(-1) < Y(0) ? 127 : 255, zero = o.out_zero_point;
      auto steps = Simd::add(Simd::round_even(Simd::div(v, Simd::set(o.out_scale))), Simd::set(0.0f));
      steps = Simd::min(Simd::set(static_cast<float>(qmax - zero)), Simd::max(Simd::set(static_cast<float>(qmin - zero)), steps));
      const auto q = Simd::add(Simd::to_int(Simd::nan_to_zero(steps)), Simd::set_int(zero));
      kWhole ? Simd::store(y, q) : store_part(y, q, n);
    } else {
      kWhole ? Simd::store(y, v) : store_part(y, v, n);
    }
  }
}

// The same with the data of the row and the columns from memory.
template <class Y>
QO_INLINE void finish_from(const TileOutput& o, int64_t row, int64_t column, typename Simd::I acc) {
  const auto correction = Simd::mul(Simd::set_int(o.row_zero[row * o.row_step]), Simd::load_int(o.column_sum + column));
  finish_typed<false, Y>(o, row, column, acc, correction, Simd::set(o.row_scale[row * o.row_step]),
                         Simd::load(o.column_scale + column), Simd::load(o.bias + column));
}

// Calls f with a null pointer of the output's type.
template <class F>
QO_INLINE void with_output_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat16: return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::kInt8: return f(static_cast<int8_t*>(nullptr));
    case DType::kUInt8: return f(static_cast<uint8_t*>(nullptr));
    default: return f(static_cast<int32_t*>(nullptr));
  }
}

// float32 results -> codes of eight bits, as quant_math.h has it, without a division: v * (1 / scale) + 1.5 * 2^23 is rounded to an
// integer by the addition, and its bits count in steps of one. Far outside of the codes' range that is no longer so, but their
// order still is that of the values, and they are clamped.
//
// Where the codes do not saturate (|quotient| < 512) the product is off by at most 2^-15, so it rounds like the quotient unless it
// lies that close to a tie n + 1/2. Then, in about one row of 64 in 80, the row is divided. NaN, infinities and what an unusual
// scale makes (its reciprocal is given as NaN) count as next to a tie.
template <class Y>
struct Requantize {
  static constexpr int32_t kMin = Y(-1) < Y(0) ? -128 : 0, kMax = Y(-1) < Y(0) ? 127 : 255;
  float scale, floor;
  int32_t zero_point;
  typename Simd::F reciprocal, magic;
  typename Simd::I lo, hi, back, tie;

  QO_INLINE explicit Requantize(const TileOutput& o) : scale(o.out_scale), floor(o.floor), zero_point(o.out_zero_point) {
    constexpr float kMagic = 12582912.0f;
    const bool usual = scale > 0x1p-100f && scale < 0x1p100f;
    const int32_t magic_bits = static_cast<int32_t>(float_bits(kMagic));
    reciprocal = Simd::set(usual ? 1.0f / scale : __builtin_nanf(""));
    magic = Simd::set(kMagic);
    const int32_t least = o.floor == 0.0f && zero_point > kMin ? zero_point : kMin;  // ReLU: what is below 0 becomes its code
    lo = Simd::set_int(magic_bits + least - zero_point);
    hi = Simd::set_int(magic_bits + kMax - zero_point);
    back = Simd::set_int(zero_point - magic_bits);
    tie = Simd::set_int(static_cast<int32_t>(float_bits(0.4999f)));
  }

  // kVectors vectors of one row.
  template <int kVectors>
  QO_INLINE void store(Y* y, const typename Simd::F (&v)[kVectors]) const {
    typename Simd::I q[kVectors], distance = Simd::set_int(0);
    unroll<kVectors>([&](auto i) QO_LAMBDA {
      const auto sum = Simd::fma(v[i.value], reciprocal, magic);
      distance = Simd::max_unsigned(distance, Simd::abs_bits(Simd::fnma(v[i.value], reciprocal, Simd::sub(sum, magic))));
      q[i.value] = Simd::add(Simd::min(hi, Simd::max(lo, Simd::bits(sum))), back);
    });
    if (__builtin_expect(Simd::any_above(distance, tie), 0))
      unroll<kVectors>([&](auto i) QO_LAMBDA { q[i.value] = divided(v[i.value]); });
    if constexpr (kVectors == 4)
      Simd::store_bytes(y, q[0], q[1], q[2], q[3]);
    else
      unroll<kVectors>([&](auto i) QO_LAMBDA { Simd::store(y + i.value * Simd::N, q[i.value]); });
  }

  QO_INLINE typename Simd::I divided(typename Simd::F v) const {
    v = Simd::max(Simd::set(floor), v);  // a NaN passes
    auto steps = Simd::add(Simd::round_even(Simd::div(v, Simd::set(scale))), Simd::set(0.0f));
    steps = Simd::min(Simd::set(static_cast<float>(kMax - zero_point)),
                      Simd::max(Simd::set(static_cast<float>(kMin - zero_point)), steps));
    return Simd::add(Simd::to_int(Simd::nan_to_zero(steps)), Simd::set_int(zero_point));
  }
};

// acc(row, v) gives the accumulators of columns [v * N, v * N + N) of a row; both arguments are Int<>. All columns are valid.
template <class Y, int kRows, int kVectors, class Acc>
QO_INLINE void finish_whole(const TileOutput& o, const Acc& acc) {
  // Columns outside, rows inside: what belongs to the columns is loaded once. Symmetric activations have one zero point for all
  // rows, so its correction is too; a convolution's rows are pixels of one sample, with one scale.
  constexpr int kGroup = sizeof(Y) != 1 ? 1 : kVectors % 4 == 0 ? 4 : kVectors;  // codes are stored several vectors at once
  bool one_zero = true;
  for (int r = 1; r < kRows; ++r) one_zero = one_zero && o.row_zero[r * o.row_step] == o.row_zero[0];
  unroll<kVectors / kGroup>([&](auto group) QO_LAMBDA {
    typename Simd::I sum[kGroup], shared[kGroup];
    typename Simd::F scale[kGroup], bias[kGroup], shared_product[kGroup];
    unroll<kGroup>([&](auto i) QO_LAMBDA {
      constexpr int64_t column = (group.value * kGroup + i.value) * Simd::N;
      sum[i.value] = Simd::load_int(o.column_sum + column);
      scale[i.value] = Simd::load(o.column_scale + column);
      bias[i.value] = Simd::load(o.bias + column);
      shared[i.value] = Simd::mul(Simd::set_int(o.row_zero[0]), sum[i.value]);
      shared_product[i.value] = Simd::mul(Simd::set(o.row_scale[0]), scale[i.value]);
    });
    const auto product = [&](auto r, auto i) QO_LAMBDA {
      return o.row_step == 0 ? shared_product[i.value] : Simd::mul(Simd::set(o.row_scale[r.value * o.row_step]), scale[i.value]);
    };
    const auto correction = [&](auto r, auto i) QO_LAMBDA {
      return one_zero ? shared[i.value] : Simd::mul(Simd::set_int(o.row_zero[r.value * o.row_step]), sum[i.value]);
    };
    if constexpr (sizeof(Y) == 1) {
      const Requantize<Y> requantize(o);
      unroll<kRows>([&](auto r) QO_LAMBDA {
        typename Simd::F v[kGroup];
        unroll<kGroup>([&](auto i) QO_LAMBDA {
          const auto corrected = Simd::sub(acc(r, Int<group.value * kGroup + i.value>{}), correction(r, i));
          v[i.value] = Simd::fma(Simd::to_float(corrected), product(r, i), bias[i.value]);
        });
        requantize.template store<kGroup>(static_cast<Y*>(o.y) + r.value * o.y_stride + group.value * kGroup * Simd::N, v);
      });
    } else {
      unroll<kRows>([&](auto r) QO_LAMBDA {
        const auto corrected = Simd::sub(acc(r, group), correction(r, Int<0>{}));
        Y* y = static_cast<Y*>(o.y) + r.value * o.y_stride + group.value * Simd::N;
        if constexpr (std::is_same_v<Y, int32_t>)  // the accumulator itself
          Simd::store(y, corrected);
        else
          Simd::store(y, Simd::max(Simd::set(o.floor), Simd::fma(Simd::to_float(corrected), product(r, Int<0>{}), bias[0])));
      });
    }
  });
}

// The last columns of a matrix: through memory, to keep the code of the tiles small.
template <class Y>
void finish_part(const TileOutput& o, const int32_t* acc, int64_t rows, int64_t acc_stride) {
  int64_t n = 0;
  for (; n + Simd::N <= o.columns; n += Simd::N) {
    const TileOutput whole = o.from_column(n);
    for (int64_t r = 0; r < rows; ++r) {
      TileOutput row = whole;
      row.y = static_cast<Y*>(whole.y) + r * o.y_stride;
      row.row_zero += r * o.row_step;
      row.row_scale += r * o.row_step;
      finish_whole<Y, 1, 1>(row, [&](auto, auto) QO_LAMBDA { return Simd::load_int(acc + r * acc_stride + n); });
    }
  }
  for (int64_t r = 0; n < o.columns && r < rows; ++r) finish_from<Y>(o, r, n, Simd::load_int(acc + r * acc_stride + n));
}

// The same where only o.columns of them are valid: the others, for which there are parameters, are left on the stack.
template <int kRows, int kVectors, class Acc>
QO_INLINE void finish_tile(const TileOutput& o, const Acc& acc) {
  with_output_type(o.dtype, [&](auto* type) QO_LAMBDA {
    using Y = std::remove_pointer_t<decltype(type)>;
    if (__builtin_expect(o.columns >= kVectors * Simd::N, 1)) return finish_whole<Y, kRows, kVectors>(o, acc);
    Y tile[kRows * kVectors * Simd::N];
    TileOutput whole = o;
    whole.y = tile;
    whole.y_stride = kVectors * Simd::N;
    finish_whole<Y, kRows, kVectors>(whole, acc);
    for (int64_t r = 0; r < kRows; ++r)
      std::memcpy(static_cast<Y*>(o.y) + r * o.y_stride, tile + r * whole.y_stride, static_cast<size_t>(o.columns) * sizeof(Y));
  });
}

// ---- pack: a panel of a weight whose k are contiguous ----------------------------------------------------------------

void pack_run(const PackRun& r) {
  constexpr int64_t kBytes = Simd::N * kGroupK;
  const int64_t row = r.width * kGroupK;
  for (int64_t n = 0; n < r.width; n += Simd::N) {
    auto sum = Simd::set_int(0);
    for (int64_t k = 0; k < r.k; k += kBytes) {
      typename Simd::I v[Simd::N];
      alignas(64) int8_t edge[Simd::N * kBytes];
      const int8_t* from = r.weight + n * r.column_step + k;
      int64_t step = r.column_step;
      if (n + Simd::N > r.columns || k + kBytes > r.k) {  // what is missing is zero
        std::memset(edge, 0, sizeof(edge));
        for (int64_t j = 0; j < Simd::N && n + j < r.columns; ++j)
          std::memcpy(edge + j * kBytes, from + j * step, static_cast<size_t>(r.k - k < kBytes ? r.k - k : kBytes));
        from = edge;
        step = kBytes;
      }
      unroll<Simd::N>([&](auto j) QO_LAMBDA {
        int32_t four[Simd::N];
        __builtin_memcpy(four, from + j.value * step, sizeof(four));
        v[j.value] = Simd::load_int(four);
        __builtin_prefetch(from + j.value * step + kPackAhead);
      });
      Simd::transpose(v);
      int8_t* to = r.packed + k / kGroupK * row + n * kGroupK;
      unroll<Simd::N>([&](auto g) QO_LAMBDA {
        if (k + g.value * kGroupK < r.k) {
          Simd::store(reinterpret_cast<int32_t*>(to + g.value * row), v[g.value]);
          sum = Simd::add(sum, Simd::sum_bytes(v[g.value]));
        }
      });
    }
    Simd::store(r.column_sum + n, sum);
  }
}
