// The straight-through gradient: of contiguous runs, and of slices that lie side by side.
#pragma once

#include "kernels/generic/partial.h"

namespace quant_ops::QO_ISA {
namespace {

// straight_through of arithmetic.h.
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

// Calls f for each vector of the 32 lanes: unrolled, except where vectors are so short that the code would be enormous.
template <int kParts, class F>
QO_INLINE void for_each_part(const F& f) {
  struct Part {
    int value;
  };
  if constexpr (kParts <= 8)
    unroll<kParts>(f);
  else
    for (int v = 0; v < kParts; ++v) f(Part{v});
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
  for_each_part<kParts>([&](auto v) QO_LAMBDA { scale_sum[v.value] = zero_sum[v.value] = Simd::load(lanes); });
  const auto part = [&](const X* x, const X* grad, X* dx, const float* scales, const int32_t* zeros) QO_LAMBDA {
    for_each_part<kParts>([&](auto v) QO_LAMBDA {
      const int64_t i = v.value * N;
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
  if (i < r.n) {  // the rest, padded with elements that contribute nothing: x is NaN (bytes of ones), the gradient is 0
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
    for_each_part<kParts>([&](auto v) QO_LAMBDA { Simd::store(lanes + v.value * N, parts[v.value]); });
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

void straight_through(const StraightThroughRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return ste_of<float>(r);
    case DType::kFloat16: return ste_of<Half>(r);
    default: return ste_of<BFloat16>(r);
  }
}

// The first `valid` of the columns [c, c + kVectors * N), row by row, so that the parameters of the columns stay in registers.
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
    // consecutive rows are too far apart for the hardware prefetcher
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

void straight_through_columns(const StraightThroughColumnsRun& r) {
  switch (r.dtype) {
    case DType::kFloat32: return ste_columns_of<float>(r);
    case DType::kFloat16: return ste_columns_of<Half>(r);
    default: return ste_columns_of<BFloat16>(r);
  }
}

}  // namespace
}  // namespace quant_ops::QO_ISA
