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

// ---- quantize -------------------------------------------------------------------------------------------------------

template <class X, class Y, bool kSimulate, bool kVector>
void quantize_typed(const QuantizeRun& r) {
  const X* x = static_cast<const X*>(r.x);
  Y* y = static_cast<Y*>(r.y);
  const auto qmin = Simd::set_int(r.qmin), qmax = Simd::set_int(r.qmax);
  auto scale = Simd::set(*r.scale);
  auto zero = Simd::set_int(*r.zero_point);
  auto lo = Simd::to_float(Simd::sub(qmin, zero)), hi = Simd::to_float(Simd::sub(qmax, zero));
  for (int64_t i = 0; i < r.n; i += Simd::N) {
    const int64_t n = r.n - i;
    if constexpr (kVector) {
      if (r.scale_step) scale = load_part(r.scale + i, n);
      if (r.zero_step) {
        zero = load_int_part(r.zero_point + i, n);
        lo = Simd::to_float(Simd::sub(qmin, zero));
        hi = Simd::to_float(Simd::sub(qmax, zero));
      }
    }
    auto steps = Simd::add(Simd::round_even(Simd::div(load_part(x + i, n), scale)), Simd::set(0.0f));  // + 0: no -0
    steps = Simd::min(hi, Simd::max(lo, steps));                                                       // NaN passes
    if constexpr (kSimulate) {
      store_part(y + i, Simd::mul(steps, scale), n);
    } else {
      auto q = Simd::add(Simd::to_int(Simd::nan_to_zero(steps)), zero);
      store_part(y + i, Simd::min(qmax, Simd::max(qmin, q)), n);  // matters for the code of NaN only
    }
  }
}

template <class X, class Y, bool kSimulate>
void quantize_steps_of(const QuantizeRun& r) {
  if (r.scale_step || r.zero_step)
    quantize_typed<X, Y, kSimulate, true>(r);
  else
    quantize_typed<X, Y, kSimulate, false>(r);
}

template <class X>
void quantize_from(const QuantizeRun& r) {
  if (r.simulate) return quantize_steps_of<X, X, true>(r);
  switch (r.y_dtype) {
    case DType::kInt8: return quantize_steps_of<X, int8_t, false>(r);
    case DType::kUInt8: return quantize_steps_of<X, uint8_t, false>(r);
    case DType::kInt16: return quantize_steps_of<X, int16_t, false>(r);
    default: return quantize_steps_of<X, int32_t, false>(r);
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
  QuantizeRun run;
  run.x = x;
  run.y = codes;
  run.n = n;
  run.scale = &scale;
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
  const Q* q = static_cast<const Q*>(r.q);
  Y* y = static_cast<Y*>(r.y);
  auto scale = Simd::set(*r.scale);
  auto zero = Simd::set_int(*r.zero_point);
  for (int64_t i = 0; i < r.n; i += Simd::N) {
    const int64_t n = r.n - i;
    if (r.scale_step) scale = load_part(r.scale + i, n);
    if (r.zero_step) zero = load_int_part(r.zero_point + i, n);
    store_part(y + i, Simd::mul(Simd::to_float(Simd::sub(load_int_part(q + i, n), zero)), scale), n);
  }
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
  if (r.q_dtype == DType::kInt8) return dequantize_to<int8_t>(r);
  dequantize_to<uint8_t>(r);
}

// ---- straight-through gradient --------------------------------------------------------------------------------------

template <class X>
void ste_typed(const StraightThroughRun& r) {
  const X* x = static_cast<const X*>(r.x);
  const X* grad = static_cast<const X*>(r.grad);
  X* dx = static_cast<X*>(r.dx);
  const auto qmin = Simd::set_int(r.qmin), qmax = Simd::set_int(r.qmax);
  auto scale = Simd::set(*r.scale);
  auto zero = Simd::set_int(*r.zero_point);
  for (int64_t i = 0; i < r.n; i += Simd::N) {
    const int64_t n = r.n - i;
    if (r.scale_step) scale = load_part(r.scale + i, n);
    if (r.zero_step) zero = load_int_part(r.zero_point + i, n);
    const auto lo = Simd::to_float(Simd::sub(qmin, zero)), hi = Simd::to_float(Simd::sub(qmax, zero));
    const auto steps = Simd::round_even(Simd::div(load_part(x + i, n), scale));
    store_part(dx + i, Simd::keep_between(load_part(grad + i, n), steps, lo, hi), n);
  }
}

void ste_run(const StraightThroughRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return ste_typed<float>(r);
    case DType::kFloat16: return ste_typed<Half>(r);
    default: return ste_typed<BFloat16>(r);
  }
}

// ---- range ----------------------------------------------------------------------------------------------------------

// The best of N lanes by `better(a, b)`, as a tree: a chain of N comparisons would cost more than a row of 384 elements.
template <class T, class Better>
QO_INLINE T across(T (&lane)[Simd::N], const Better& better) {
  for (int step = Simd::N / 2; step > 0; step /= 2)
    for (int j = 0; j < step; ++j) lane[j] = better(lane[j], lane[j + step]) ? lane[j] : lane[j + step];
  return lane[0];
}

template <bool kOnlyMagnitude, class X>
void range_typed(const X* x, int64_t count, Range* range) {
  constexpr int kChains = 4;  // independent chains hide the latency of min and max
  typename Simd::F lo[kChains], hi[kChains];
  typename Simd::I magnitude[kChains];
  unroll<kChains>([&](auto c) QO_LAMBDA {
    lo[c.value] = Simd::set(range->min);
    hi[c.value] = Simd::set(range->max);
    magnitude[c.value] = Simd::set_int(static_cast<int32_t>(range->abs_bits));
  });
  const auto take = [&](auto c, const X* from) QO_LAMBDA {
    const auto v = Simd::load(from);
    if constexpr (!kOnlyMagnitude) {
      lo[c.value] = Simd::min(v, lo[c.value]);
      hi[c.value] = Simd::max(v, hi[c.value]);
    }
    magnitude[c.value] = Simd::max_unsigned(magnitude[c.value], Simd::abs_bits(v));
  };
  int64_t i = 0;
  for (; i + kChains * Simd::N <= count; i += kChains * Simd::N)
    unroll<kChains>([&](auto c) QO_LAMBDA { take(c, x + i + c.value * Simd::N); });
  for (; i + Simd::N <= count; i += Simd::N) take(Int<0>{}, x + i);
  if (i < count && count >= Simd::N) {
    take(Int<0>{}, x + count - Simd::N);  // some elements twice, which changes no extreme
  } else {
    for (; i < count; ++i) {
      const float v = to_compute(x[i]);
      if (v < range->min) range->min = v;
      if (v > range->max) range->max = v;
      const uint32_t bits = float_bits(v) & 0x7fffffffu;
      if (bits > range->abs_bits) range->abs_bits = bits;
    }
    if (count < Simd::N) return;
  }
  unroll<kChains - 1>([&](auto c) QO_LAMBDA {
    lo[0] = Simd::min(lo[c.value + 1], lo[0]);
    hi[0] = Simd::max(hi[c.value + 1], hi[0]);
    magnitude[0] = Simd::max_unsigned(magnitude[c.value + 1], magnitude[0]);
  });
  int32_t bits[Simd::N];
  Simd::store(bits, magnitude[0]);
  range->abs_bits = static_cast<uint32_t>(
      across(bits, [](int32_t a, int32_t b) QO_LAMBDA { return static_cast<uint32_t>(a) > static_cast<uint32_t>(b); }));
  if constexpr (!kOnlyMagnitude) {
    float lane[Simd::N];
    Simd::store(lane, lo[0]);
    range->min = across(lane, [](float a, float b) QO_LAMBDA { return a < b; });
    Simd::store(lane, hi[0]);
    range->max = across(lane, [](float a, float b) QO_LAMBDA { return a > b; });
  }
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

// The last columns of a matrix: through memory, to keep the code of the tiles small.
template <class Y>
void finish_part(const TileOutput& o, const int32_t* acc, int64_t rows, int64_t acc_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < o.columns; n += Simd::N) finish_from<Y>(o, r, n, Simd::load_int(acc + r * acc_stride + n));
}

// acc(row, v) gives the accumulators of columns [v * N, v * N + N) of a row; both arguments are Int<>.
template <int kRows, int kVectors, class Acc>
QO_INLINE void finish_tile(const TileOutput& o, const Acc& acc) {
  with_output_type(o.dtype, [&](auto* type) QO_LAMBDA {
    using Y = std::remove_pointer_t<decltype(type)>;
    if (o.columns < kVectors * Simd::N) {
      int32_t part[kRows][kVectors * Simd::N];
      unroll<kRows>([&](auto r) QO_LAMBDA {
        unroll<kVectors>([&](auto v) QO_LAMBDA { Simd::store(&part[r.value][v.value * Simd::N], acc(r, v)); });
      });
      return finish_part<Y>(o, &part[0][0], kRows, kVectors * Simd::N);
    }
    // Columns outside, rows inside: what belongs to the columns is loaded once. Symmetric activations have one zero point for all
    // rows, so its correction is too.
    bool one_zero = true;
    for (int r = 1; r < kRows; ++r) one_zero = one_zero && o.row_zero[r * o.row_step] == o.row_zero[0];
    unroll<kVectors>([&](auto v) QO_LAMBDA {
      constexpr int64_t column = v.value * Simd::N;
      const auto sum = Simd::load_int(o.column_sum + column);
      const auto scale = Simd::load(o.column_scale + column), bias = Simd::load(o.bias + column);
      const auto shared = Simd::mul(Simd::set_int(o.row_zero[0]), sum);
      unroll<kRows>([&](auto r) QO_LAMBDA {
        const auto own = one_zero ? shared : Simd::mul(Simd::set_int(o.row_zero[r.value * o.row_step]), sum);
        finish_typed<true, Y>(o, r.value, column, acc(r, v), own, Simd::set(o.row_scale[r.value * o.row_step]), scale, bias);
      });
    });
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
