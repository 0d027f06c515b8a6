// Attention with vectors of 512 bits.

#include <immintrin.h>

#include "attention_body.h"

namespace {

struct Wide512 {
  static constexpr int64_t lanes = 16;
  static constexpr int alone = 8, few = 4, wide = 4, rows = 8, slim = 2, across = 1;
  using Float = __m512;

  static Float floats(float value) { return _mm512_set1_ps(value); }
  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float smaller(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float power(Float shifted) {
    const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(kRoundBits - 127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
  }
  static Float load_half(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Float load_bytes(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void store_half(uint16_t* to, Float value) {
    const __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  }

  static void transpose(Float (&a)[16]) {
    const auto pair = [](Float x, Float y, bool high) {
      const __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
      return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
    };
    Float b[16];
    for (int i = 0; i < 16; i += 2) {  // pairs of words
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // fours of words: of rows i to i + 3, columns c, c + 4, c + 8, c + 12
      a[i] = pair(b[i], b[i + 2], false);
      a[i + 1] = pair(b[i], b[i + 2], true);
      a[i + 2] = pair(b[i + 1], b[i + 3], false);
      a[i + 3] = pair(b[i + 1], b[i + 3], true);
    }
    for (int c = 0; c < 4; ++c) {
      const Float low_even = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88);
      const Float low_odd = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
      const Float high_even = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
      const Float high_odd = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
      b[c] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
      b[c + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
      b[c + 8] = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
      b[c + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
    }
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
};

}  // namespace

namespace moedge {
const AttentionKernels* avx512_attention() {
  static constexpr AttentionKernels kernels = make_attention<Wide512>();
  return &kernels;
}
}  // namespace moedge
