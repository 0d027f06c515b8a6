// Attention with vectors of 256 bits: AVX2, FMA and F16C.

#include <immintrin.h>

#include "attention_body.h"

namespace {

struct Wide256 {
  static constexpr int64_t lanes = 8;
  static constexpr int alone = 8, few = 2, wide = 4, rows = 4, slim = 2, across = 1;
  using Float = __m256;

  static Float floats(float value) { return _mm256_set1_ps(value); }
  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float smaller(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float power(Float shifted) {
    const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(kRoundBits - 127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
  }
  static Float load_half(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Float load_bytes(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static void store_half(uint16_t* to, Float value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  static void transpose(Float (&a)[8]) {
    Float b[8];
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
      b[c] = _mm256_permute2f128_ps(a[c], a[c + 4], 0x20);
      b[c + 4] = _mm256_permute2f128_ps(a[c], a[c + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) a[i] = b[i];
  }
};

}  // namespace

namespace moedge {
const AttentionKernels* avx2_attention() {
  static constexpr AttentionKernels kernels = make_attention<Wide256>();
  return &kernels;
}
}  // namespace moedge
