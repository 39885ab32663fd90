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
