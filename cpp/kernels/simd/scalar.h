// One lane in plain C++: the reference for every other Simd, which documents the operations. All are IEEE or integer operations, so
// every instruction set gives the same bits. min and max return the second operand if either is NaN, as on x86.
#pragma once

#include "kernels/target.h"

#if !defined(QO_ISA)  // opened alone
#define QO_ISA scalar
#define QO_SIMD "kernels/simd/scalar.h"
#endif

namespace quant_ops::QO_ISA {
namespace {

struct Simd {
  static constexpr int N = 1;
  static constexpr bool kMasks = false;
  static constexpr int kRegisters = 0;
  using F = float;
  using I = int32_t;
  using Words = int32_t;
  using D = double;

  static F set(float v) { return v; }
  static I set_int(int32_t v) { return v; }
  static D load(const double* p) { return *p; }
  template <class T>
  static F load(const T* p) {
    return to_compute(*p);
  }
  template <class T>
  static I load_int(const T* p) {
    return *p;
  }
  static void store(double* p, D v) { *p = v; }
  template <class T>
  static void store_bytes(T* p, I a, I b, I c, I d) {
    p[0] = static_cast<T>(a), p[1] = static_cast<T>(b), p[2] = static_cast<T>(c), p[3] = static_cast<T>(d);
  }
  template <class T>
  static void store(T* p, F v) {
    from_compute(v, p);
  }
  template <class T>
  static void store(T* p, I v) {
    *p = static_cast<T>(v);
  }

  // four codes as the bytes of an int32, saturating
  static I set_bytes(int v) { return static_cast<I>(0x01010101u * static_cast<uint8_t>(v)); }
  template <class Y>
  static I pack_lanes(I a, I b, I c, I d) {
    uint32_t bytes = 0;
    const I codes[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
      const I q = codes[i], least = std::numeric_limits<Y>::min(), most = std::numeric_limits<Y>::max();
      bytes |= static_cast<uint32_t>(static_cast<uint8_t>(q < least ? least : q > most ? most : q)) << 8 * i;
    }
    return static_cast<I>(bytes);
  }
  static I order_lanes(I codes) { return codes; }
  static bool differ(I a, I b) { return a != b; }
  template <class Y>
  static I max_bytes(I a, I b, Y) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
      const Y x = static_cast<Y>(static_cast<uint32_t>(a) >> 8 * i), y = static_cast<Y>(static_cast<uint32_t>(b) >> 8 * i);
      bytes |= static_cast<uint32_t>(static_cast<uint8_t>(x > y ? x : y)) << 8 * i;
    }
    return static_cast<I>(bytes);
  }
  template <class Y>
  static I min_bytes(I a, I b, Y) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
      const Y x = static_cast<Y>(static_cast<uint32_t>(a) >> 8 * i), y = static_cast<Y>(static_cast<uint32_t>(b) >> 8 * i);
      bytes |= static_cast<uint32_t>(static_cast<uint8_t>(x < y ? x : y)) << 8 * i;
    }
    return static_cast<I>(bytes);
  }
  static I load_codes(const void* p) {
    I codes;
    std::memcpy(&codes, p, sizeof(codes));
    return codes;
  }
  static void store_codes(void* p, I codes) { std::memcpy(p, &codes, sizeof(codes)); }
  template <int kQuarter>
  static void store_quarter(void* p, I codes) {
    *static_cast<uint8_t*>(p) = static_cast<uint8_t>(static_cast<uint32_t>(codes) >> 8 * kQuarter);
  }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F fnma(F a, F b, F c) { return __builtin_fmaf(-a, b, c); }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F round_even(F a) { return quant_ops::round_even(a); }
  static F keep_between(F v, F steps, F lo, F hi) { return steps >= lo && steps <= hi ? v : 0.0f; }
  static F keep_outside(F v, F steps, F lo, F hi) { return steps < lo || steps > hi ? v : 0.0f; }
  static F nan_to_zero(F a) { return a == a ? a : 0.0f; }
  static I and_bits(I a, I b) { return a & b; }
  static I or_bits(I a, I b) { return a | b; }
  static I xor_bits(I a, I b) { return a ^ b; }
  static I shift_left(I a, int by) { return static_cast<I>(static_cast<uint32_t>(a) << by); }
  static I shift_right(I a, int by) { return static_cast<I>(static_cast<uint32_t>(a) >> by); }  // zeros come in
  static I sub_bytes(I a, I b) {
    uint32_t bytes = 0;
    for (int i = 0; i < 32; i += 8) bytes |= ((static_cast<uint32_t>(a) >> i) - (static_cast<uint32_t>(b) >> i)) % 256u << i;
    return static_cast<I>(bytes);
  }
  template <int kByte>  // of every lane, signed, times 2^24: at the top of its lane
  static I top_byte(I a) {
    return static_cast<I>(static_cast<uint32_t>(a) << (24 - 8 * kByte) & 0xff000000u);
  }
  static F as_float(I a) { return bits_float(static_cast<uint32_t>(a)); }
  static F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  static F if_greater(I a, I b, F yes, F no) { return a > b ? yes : no; }  // signed
  // kWords float16 or bfloat16 elements, as integers without their signs; their order is that of the magnitudes.
  static constexpr int kWords = 1;
  static Words load_magnitudes(const uint16_t* p) { return *p & 0x7fff; }
  static Words max_magnitudes(Words a, Words b) { return a > b ? a : b; }
  static void store_magnitudes(uint16_t* p, Words v) { *p = static_cast<uint16_t>(v); }
  static uint16_t largest_magnitude(Words v) { return static_cast<uint16_t>(v); }
  // a * m: the low half, and the high one to *high
  static I multiply_wide(I a, uint32_t m, I* high) {
    const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(a)) * m;
    *high = static_cast<I>(product >> 32);
    return static_cast<I>(product);
  }
  // a0 b0 c0 d0 a1 b1 ...
  static void store_interleaved(uint32_t* p, I a, I b, I c, I d) {
    const I all[4] = {a, b, c, d};
    std::memcpy(p, all, sizeof(all));
  }
  // 2 N elements, those with even numbers and those with odd ones, which needs no shuffling. Those stored are exact, or NaN.
  static void load_pair(const BFloat16* p, F* even, F* odd) { *even = to_compute(p[0]), *odd = to_compute(p[1]); }
  static void store_pair(BFloat16* p, F even, F odd) { store(p, even), store(p + 1, odd); }
  // Of values that the type holds exactly, or NaN.
  template <class T>
  static void store_exact(T* p, F v) {
    from_compute(v, p);
  }
  static I bits(F a) { return static_cast<I>(float_bits(a)); }
  static I abs_bits(F a) { return static_cast<I>(float_bits(a) & 0x7fffffffu); }

  static D accumulate(D acc, F a, F b) { return acc + static_cast<double>(a) * static_cast<double>(b); }  // the product is exact
  static float reduce_min(F a) { return a; }
  static float reduce_max(F a) { return a; }
  static uint32_t reduce_max_unsigned(I a) { return static_cast<uint32_t>(a); }
  static bool any_above(I a, I b) { return a > b; }

  // wrap around modulo 2^32, as the vector instructions do
  static I add(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static I sub(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
  static I mul(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }
  static I min(I a, I b) { return a < b ? a : b; }
  static I max(I a, I b) { return a > b ? a : b; }
  static I max_unsigned(I a, I b) { return static_cast<uint32_t>(a) > static_cast<uint32_t>(b) ? a : b; }
  static void transpose(I (&)[N]) {}
  static I sum_bytes(I a) {
    int32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(static_cast<uint32_t>(a) >> 8 * i);
    return sum;
  }
  static F to_float(I a) { return static_cast<float>(a); }
  static I to_int(F a) { return a > -0x1p31f && a < 0x1p31f ? static_cast<I>(quant_ops::round_even(a)) : INT32_MIN; }
};

}  // namespace
}  // namespace quant_ops::QO_ISA
