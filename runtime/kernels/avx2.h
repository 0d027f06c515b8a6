// What the two instruction sets with vectors of 256 bits share.

#pragma once

#include <immintrin.h>

#include "body.h"

namespace {

struct Vectors256 {
  static constexpr int64_t lanes = 8;
  static constexpr int tokens = 4;
  static constexpr int few = 2;
  using Int = __m256i;
  using Float = __m256;

  static Int ints(int32_t value) { return _mm256_set1_epi32(value); }
  static Float floats(float value) { return _mm256_set1_ps(value); }
  static Int load_ints(const int32_t* from) { return _mm256_load_si256(reinterpret_cast<const Int*>(from)); }
  static Float load_some(const float* from) { return _mm256_loadu_ps(from); }
  static Float load_some(const uint16_t* from) {
    const Int words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return as_floats(_mm256_slli_epi32(words, 16));
  }
  static Int load_float8(const uint8_t* from) {
    const Int places = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    return _mm256_add_epi32(_mm256_slli_epi32(places, kFloat8Shift), _mm256_set1_epi32(kLeastFloat8));
  }
  static Float load_halves(const uint8_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Float load_floats(const float* from) { return _mm256_load_ps(from); }
  static void store_floats(float* to, Float value) { _mm256_store_ps(to, value); }
  static Int load_codes(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const Int*>(from)); }
  static void store_codes(uint8_t* to, Int value) { _mm256_store_si256(reinterpret_cast<Int*>(to), value); }
  static Int load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const Int*>(from)); }
  static void store_ints(int32_t* to, Int value) { _mm256_storeu_si256(reinterpret_cast<Int*>(to), value); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static Int multiply(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Int as_ints(Float a) { return _mm256_castps_si256(a); }
  static Float as_floats(Int a) { return _mm256_castsi256_ps(a); }
  static Float to_floats(Int a) { return _mm256_cvtepi32_ps(a); }
  static Int low_nibbles(Int a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static Int high_nibbles(Int a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
  template <int place>
  static Int pairs(Int a) {
    return _mm256_and_si256(_mm256_srli_epi16(a, 2 * place), _mm256_set1_epi8(3));
  }

  static Int larger(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static int32_t largest(Int a) {
    for (int i = 0; i < 3; ++i) a = larger(a, _mm256_permutevar8x32_epi32(a, _mm256_xor_si256(ints(1 << i), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))));
    return _mm256_cvtsi256_si32(a);
  }
  static Int upper_half(Int a) { return _mm256_slli_epi32(a, 16); }
  static Int magnitude(Int a) { return _mm256_and_si256(a, ints(INT32_MAX)); }
  static constexpr int together = 2, share_rows = 4, alone_rows = 1, keys = 4, cached_middle = 128;
  static Int cached(Int codes) { return _mm256_xor_si256(codes, _mm256_set1_epi8(-128)); }
  static Int cached_word(const int8_t* from) { return cached(ints(word_at(from))); }
  static Int upper_digits(Int a) { return _mm256_srli_epi32(a, 7); }
  static void turn_columns(const int8_t* const* rows, int64_t count, int32_t* out) { turn_pairs(rows, count, out); }
  static void turn(Int* a) {
    const Int low = _mm256_unpacklo_epi8(a[0], a[1]), high = _mm256_unpackhi_epi8(a[0], a[1]);
    const Int low_two = _mm256_unpacklo_epi8(a[2], a[3]), high_two = _mm256_unpackhi_epi8(a[2], a[3]);
    a[0] = _mm256_unpacklo_epi16(low, low_two);
    a[1] = _mm256_unpackhi_epi16(low, low_two);
    a[2] = _mm256_unpacklo_epi16(high, high_two);
    a[3] = _mm256_unpackhi_epi16(high, high_two);
  }

  static Int sums(Int* of) {
    for (int width = 8; width > 2; width /= 2)
      for (int i = 0; i < width; i += 2) of[i / 2] = _mm256_hadd_epi32(of[i], of[i + 1]);
    return add(_mm256_permute2x128_si256(of[0], of[1], 0x20), _mm256_permute2x128_si256(of[0], of[1], 0x31));
  }

  static void transpose(Int* a, Int* out) {
    Int b[8];
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
      out[c] = _mm256_permute2x128_si256(a[c], a[c + 4], 0x20);
      out[c + 4] = _mm256_permute2x128_si256(a[c], a[c + 4], 0x31);
    }
  }
};

}  // namespace
