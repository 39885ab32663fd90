// The operations of scalar.h by NEON, as every aarch64 processor has it.
// fmin, fmax and the saturating conversions of ARM treat NaN otherwise than the contract, hence comparisons and selections.
#pragma once

#if defined(__aarch64__)
#include "kernels/target.h"

#if !defined(QO_ISA)  // opened alone
#define QO_ISA neon
#define QO_SIMD "kernels/simd/neon.h"
#endif

namespace quant_ops::QO_ISA {
namespace {

struct Simd {
  static constexpr int N = 4;
  static constexpr bool kMasks = false;
  static constexpr int kRegisters = 16;  // of 32, what g++ makes use of in a tile
  using F = float32x4_t;
  using I = int32x4_t;
  using Words = int16x8_t;
  struct D {  // N float64
    float64x2_t low, high;
  };

  static QO_INLINE F set(float v) { return vdupq_n_f32(v); }
  static QO_INLINE I set_int(int32_t v) { return vdupq_n_s32(v); }

  static QO_INLINE uint8x8_t load32(const void* p) {  // four bytes and no more
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return vcreate_u8(four);
  }
  static QO_INLINE uint16x4_t load64(const void* p) {
    uint64_t eight;
    __builtin_memcpy(&eight, p, sizeof(eight));
    return vcreate_u16(eight);
  }
  static QO_INLINE F load(const float* p) { return vld1q_f32(p); }
  static QO_INLINE F load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load64(p))); }
  static QO_INLINE F load(const BFloat16* p) { return vreinterpretq_f32_u32(vshll_n_u16(load64(p), 16)); }
  static QO_INLINE I load_int(const int32_t* p) { return vld1q_s32(p); }
  static QO_INLINE I load_int(const int8_t* p) { return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load32(p))))); }
  static QO_INLINE I load_int(const uint8_t* p) { return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load32(p))))); }

  static QO_INLINE I load_int(const int16_t* p) { return vmovl_s16(vreinterpret_s16_u16(load64(p))); }
  static QO_INLINE D load(const double* p) { return {vld1q_f64(p), vld1q_f64(p + 2)}; }

  static QO_INLINE void store64(void* p, uint16x4_t v) {
    const uint64_t eight = vget_lane_u64(vreinterpret_u64_u16(v), 0);
    __builtin_memcpy(p, &eight, sizeof(eight));
  }
  static QO_INLINE void store(float* p, F v) { vst1q_f32(p, v); }
  static QO_INLINE void store(Half* p, F v) { store64(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  static QO_INLINE void store(BFloat16* p, F v) {  // by integers: the same bits as from_compute, subnormals kept
    const uint32x4_t u = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    store64(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
  }
  static QO_INLINE void store(int32_t* p, I v) { vst1q_s32(p, v); }
  static QO_INLINE void store(int16_t* p, I v) { store64(p, vreinterpret_u16_s16(vmovn_s32(v))); }
  static QO_INLINE void store(int8_t* p, I v) {  // values fit: the low byte of each
    const uint16x4_t h = vreinterpret_u16_s16(vmovn_s32(v));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(h, h))), 0);
    __builtin_memcpy(p, &four, sizeof(four));
  }
  static QO_INLINE void store(uint8_t* p, I v) { store(reinterpret_cast<int8_t*>(p), v); }

  // 4 N bytes
  static QO_INLINE void store_bytes(int8_t* p, I a, I b, I c, I d) {
    vst1q_s8(p, vcombine_s8(vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))),
                            vqmovn_s16(vcombine_s16(vqmovn_s32(c), vqmovn_s32(d)))));
  }
  static QO_INLINE void store_bytes(uint8_t* p, I a, I b, I c, I d) {
    vst1q_u8(p, vcombine_u8(vqmovun_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))),
                            vqmovun_s16(vcombine_s16(vqmovn_s32(c), vqmovn_s32(d)))));
  }
  static QO_INLINE void store(double* p, D v) {
    vst1q_f64(p, v.low);
    vst1q_f64(p + 2, v.high);
  }

  // Saturating: 4 N codes as bytes, in order; vector q of the four is their quarter q.
  static QO_INLINE I set_bytes(int v) { return vreinterpretq_s32_s8(vdupq_n_s8(static_cast<int8_t>(v))); }
  template <class Y>
  static QO_INLINE I pack_lanes(I a, I b, I c, I d) {
    const int16x8_t ab = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)), cd = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
    if constexpr (std::is_same_v<Y, int8_t>) return vreinterpretq_s32_s8(vcombine_s8(vqmovn_s16(ab), vqmovn_s16(cd)));
    return vreinterpretq_s32_u8(vcombine_u8(vqmovun_s16(ab), vqmovun_s16(cd)));
  }
  static QO_INLINE I order_lanes(I codes) { return codes; }
  static QO_INLINE bool differ(I a, I b) { return vmaxvq_u32(vreinterpretq_u32_s32(veorq_s32(a, b))) != 0; }
  static QO_INLINE I max_bytes(I a, I b, int8_t) {
    return vreinterpretq_s32_s8(vmaxq_s8(vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)));
  }
  static QO_INLINE I max_bytes(I a, I b, uint8_t) {
    return vreinterpretq_s32_u8(vmaxq_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
  }
  static QO_INLINE I min_bytes(I a, I b, int8_t) {
    return vreinterpretq_s32_s8(vminq_s8(vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)));
  }
  static QO_INLINE I min_bytes(I a, I b, uint8_t) {
    return vreinterpretq_s32_u8(vminq_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
  }
  static QO_INLINE I load_codes(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static QO_INLINE void store_codes(void* p, I codes) { vst1q_s32(static_cast<int32_t*>(p), codes); }
  template <int kQuarter>
  static QO_INLINE void store_quarter(void* p, I codes) {
    const int32_t four = vgetq_lane_s32(codes, kQuarter);
    __builtin_memcpy(p, &four, sizeof(four));
  }

  static QO_INLINE F keep(uint32x4_t mask, F v) { return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(v))); }

  static QO_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
  static QO_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
  static QO_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
  static QO_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
  static QO_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static QO_INLINE F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }  // c - a b
  static QO_INLINE F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static QO_INLINE F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static QO_INLINE F round_even(F a) { return vrndnq_f32(a); }
  static QO_INLINE F keep_between(F v, F steps, F lo, F hi) {
    return keep(vandq_u32(vcgeq_f32(steps, lo), vcleq_f32(steps, hi)), v);
  }
  static QO_INLINE F keep_outside(F v, F steps, F lo, F hi) {
    return keep(vorrq_u32(vcltq_f32(steps, lo), vcgtq_f32(steps, hi)), v);
  }
  static QO_INLINE F nan_to_zero(F a) { return keep(vceqq_f32(a, a), a); }
  static QO_INLINE I and_bits(I a, I b) { return vandq_s32(a, b); }
  static QO_INLINE I or_bits(I a, I b) { return vorrq_s32(a, b); }
  static QO_INLINE I xor_bits(I a, I b) { return veorq_s32(a, b); }
  static QO_INLINE I shift_left(I a, int by) { return vshlq_s32(a, vdupq_n_s32(by)); }
  static QO_INLINE I shift_right(I a, int by) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-by)));
  }
  static QO_INLINE I sub_bytes(I a, I b) {
    return vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)));
  }
  template <int kByte>  // of every lane, signed, times 2^24: at the top of its lane
  static QO_INLINE I top_byte(I a) {
    return vandq_s32(vshlq_n_s32(a, 24 - 8 * kByte), vdupq_n_s32(static_cast<int32_t>(0xff000000)));
  }
  static QO_INLINE F as_float(I a) { return vreinterpretq_f32_s32(a); }
  static QO_INLINE F if_less(F a, F b, F yes, F no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
  static QO_INLINE F if_greater(I a, I b, F yes, F no) { return vbslq_f32(vcgtq_s32(a, b), yes, no); }
  static constexpr int kWords = 8;
  static QO_INLINE Words load_magnitudes(const uint16_t* p) {
    return vandq_s16(vreinterpretq_s16_u16(vld1q_u16(p)), vdupq_n_s16(0x7fff));
  }
  static QO_INLINE Words max_magnitudes(Words a, Words b) { return vmaxq_s16(a, b); }
  static QO_INLINE void store_magnitudes(uint16_t* p, Words v) { vst1q_u16(p, vreinterpretq_u16_s16(v)); }
  static QO_INLINE uint16_t largest_magnitude(Words v) { return static_cast<uint16_t>(vmaxvq_s16(v)); }
  static QO_INLINE I multiply_wide(I a, uint32_t m, I* high) {
    const uint32x4_t u = vreinterpretq_u32_s32(a), by = vdupq_n_u32(m);
    const uint32x4_t low = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(u), vget_low_u32(by)));
    const uint32x4_t top = vreinterpretq_u32_u64(vmull_high_u32(u, by));
    *high = vreinterpretq_s32_u32(vuzp2q_u32(low, top));
    return vreinterpretq_s32_u32(vuzp1q_u32(low, top));
  }
  static QO_INLINE void store_interleaved(uint32_t* p, I a, I b, I c, I d) {
    const int32x4x4_t all = {{a, b, c, d}};
    vst4q_s32(reinterpret_cast<int32_t*>(p), all);
  }
  static QO_INLINE void load_pair(const BFloat16* p, F* even, F* odd) {
    const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000u)));
  }
  static QO_INLINE void store_pair(BFloat16* p, F even, F odd) {
    const uint32x4_t both = vsriq_n_u32(vreinterpretq_u32_f32(odd), vreinterpretq_u32_f32(even), 16);
    vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_u32(both));
  }
  template <class T>
  static QO_INLINE void store_exact(T* p, F v) {
    store(p, v);
  }
  static QO_INLINE void store_exact(BFloat16* p, F v) { store64(p, vshrn_n_u32(vreinterpretq_u32_f32(v), 16)); }
  static QO_INLINE I bits(F a) { return vreinterpretq_s32_f32(a); }
  static QO_INLINE I abs_bits(F a) { return vandq_s32(vreinterpretq_s32_f32(a), vdupq_n_s32(0x7fffffff)); }

  static QO_INLINE D widen(F v) { return {vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v)}; }
  static QO_INLINE D accumulate(D acc, F a, F b) {  // the product is exact
    const D x = widen(a), y = widen(b);
    return {vfmaq_f64(acc.low, x.low, y.low), vfmaq_f64(acc.high, x.high, y.high)};
  }
  static QO_INLINE float reduce_min(F a) { return vminvq_f32(a); }  // no lane is NaN
  static QO_INLINE float reduce_max(F a) { return vmaxvq_f32(a); }
  static QO_INLINE uint32_t reduce_max_unsigned(I a) { return vmaxvq_u32(vreinterpretq_u32_s32(a)); }
  static QO_INLINE bool any_above(I a, I b) { return vmaxvq_u32(vcgtq_s32(a, b)) != 0; }  // signed

  static QO_INLINE I add(I a, I b) { return vaddq_s32(a, b); }
  static QO_INLINE I sub(I a, I b) { return vsubq_s32(a, b); }
  static QO_INLINE I mul(I a, I b) { return vmulq_s32(a, b); }
  static QO_INLINE I min(I a, I b) { return vminq_s32(a, b); }
  static QO_INLINE I max(I a, I b) { return vmaxq_s32(a, b); }
  static QO_INLINE I max_unsigned(I a, I b) {
    return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
  }
  // v[i] lane j <-> v[j] lane i
  static QO_INLINE void transpose(I (&v)[N]) {
    const int64x2_t low01 = vreinterpretq_s64_s32(vzip1q_s32(v[0], v[1])), high01 = vreinterpretq_s64_s32(vzip2q_s32(v[0], v[1]));
    const int64x2_t low23 = vreinterpretq_s64_s32(vzip1q_s32(v[2], v[3])), high23 = vreinterpretq_s64_s32(vzip2q_s32(v[2], v[3]));
    v[0] = vreinterpretq_s32_s64(vzip1q_s64(low01, low23));
    v[1] = vreinterpretq_s32_s64(vzip2q_s64(low01, low23));
    v[2] = vreinterpretq_s32_s64(vzip1q_s64(high01, high23));
    v[3] = vreinterpretq_s32_s64(vzip2q_s64(high01, high23));
  }
  // the sum of the four signed bytes of each lane
  static QO_INLINE I sum_bytes(I a) { return vpaddlq_s16(vpaddlq_s8(vreinterpretq_s8_s32(a))); }
  static QO_INLINE F to_float(I a) { return vcvtq_f32_s32(a); }
  static QO_INLINE I to_int(F a) { return vcvtnq_s32_f32(a); }
};

}  // namespace
}  // namespace quant_ops::QO_ISA
#endif
