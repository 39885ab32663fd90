// Included inside a target region and an unnamed namespace.
// unroll<N>(f) calls f(Int<0>{}) ... f(Int<N - 1>{}): indices are types, so that arrays of accumulators become registers. With
// plain loops g++ 12 keeps them on the stack, which costs half of the speed.
template <int I>
struct Int {
  static constexpr int value = I;
};

template <int N, int I = 0, class F>
QO_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f(Int<I>{});
    unroll<N, I + 1>(f);
  }
}

// Calls f(Int<rows>{}, Int<width>{}): the instantiation for run-time sizes, 1 <= rows <= kRows and a width of 16, 32, 48 or 64. The
// full tile is asked for first.
template <int kRows, class F>
QO_INLINE void with_tile(int64_t rows, int64_t width, const F& f) {
  unroll<kRows>([&](auto r) QO_LAMBDA {
    if (rows != kRows - r.value) return;
    unroll<kPanel / kPanelStep>([&](auto w) QO_LAMBDA {
      if (width == kPanel - w.value * kPanelStep) f(Int<kRows - r.value>{}, Int<kPanel - w.value * kPanelStep>{});
    });
  });
}
