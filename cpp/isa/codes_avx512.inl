// Activations for the GEMM with AVX-512: clamp(rne(x / scale) + zero_point, 0, 255). Included inside a target region and an unnamed
// namespace, after elementwise.inl.
//
// A product with the reciprocal is off by at most 2^-14 where the codes do not saturate (|quotient| < 512: two roundings of half a
// unit in the last place, 2^-15). So it rounds like the quotient itself unless it lies that close to a tie n + 1/2; then, in about
// one group of 64 in 200, the group is divided.
template <class X>
void codes_typed(const X* x, int64_t n, float scale, int32_t zero_point, uint8_t* codes) {
  const __m512 reciprocal = _mm512_set1_ps(1.0f / scale), divisor = _mm512_set1_ps(scale), tie = _mm512_set1_ps(0.4999f);
  const __m512 limit = _mm512_set1_ps(1e6f);  // far beyond saturation, and fits int32
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(zero_point));
  // packing works in 128-bit lanes: dword 4 j + lane of the result is dword j of the lane
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = 0; i < n; i += 64) {
    __m512 v[4];
    __mmask16 near = 0;
    unroll<4>([&](auto j) QO_LAMBDA {
      const int64_t at = i + j.value * 16;
      v[j.value] = at < n ? _mm512_mul_ps(load_part(x + at, n - at), reciprocal) : _mm512_setzero_ps();
      const __m512 fraction = _mm512_reduce_ps(v[j.value], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      near = static_cast<__mmask16>(near | _mm512_cmp_ps_mask(_mm512_abs_ps(fraction), tie, _CMP_GT_OQ));
    });
    if (__builtin_expect(near != 0, 0))
      unroll<4>([&](auto j) QO_LAMBDA {
        const int64_t at = i + j.value * 16;
        if (at < n) v[j.value] = _mm512_div_ps(load_part(x + at, n - at), divisor);
      });
    __m512i q[4];
    unroll<4>([&](auto j) QO_LAMBDA {  // NaN becomes 0; very negative values become INT_MIN, which saturates rightly
      const __mmask16 ordered = _mm512_cmp_ps_mask(v[j.value], v[j.value], _CMP_ORD_Q);
      q[j.value] = _mm512_maskz_cvtps_epi32(ordered, _mm512_min_ps(limit, v[j.value]));
    });
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero);
    const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), zero);
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
    if (n - i >= 64)
      _mm512_storeu_si512(codes + i, bytes);
    else
      _mm512_mask_storeu_epi8(codes + i, (__mmask64{1} << (n - i)) - 1, bytes);
  }
}

void codes_avx512(const void* x, DType dtype, int64_t n, float scale, int32_t zero_point, uint8_t* codes) {
  if (!(scale > 0x1p-100f && scale < 0x1p100f)) return codes_run(x, dtype, n, scale, zero_point, codes);
  switch (dtype) {
    case DType::kFloat32: return codes_typed(static_cast<const float*>(x), n, scale, zero_point, codes);
    case DType::kFloat16: return codes_typed(static_cast<const Half*>(x), n, scale, zero_point, codes);
    default: return codes_typed(static_cast<const BFloat16*>(x), n, scale, zero_point, codes);
  }
}
