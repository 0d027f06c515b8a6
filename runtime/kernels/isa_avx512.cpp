// x86 with AVX-512 and VNNI: Intel since Ice Lake, AMD since Zen 4.

#include <immintrin.h>

#include "body.h"

namespace {

struct Avx512 {
  static constexpr int64_t lanes = 16;
  static constexpr int tokens = 8;
  static constexpr int few = 8;
  static constexpr int32_t middle = 0;
  using Int = __m512i;
  using Float = __m512;
  using Word __attribute__((may_alias)) = int32_t;

  static Int ints(int32_t value) { return _mm512_set1_epi32(value); }
  static Float floats(float value) { return _mm512_set1_ps(value); }
  static Int load_ints(const int32_t* from) { return _mm512_load_si512(from); }
  static Float load_some(const float* from) { return _mm512_loadu_ps(from); }
  static Float load_some(const uint16_t* from) {
    const Int words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return as_floats(_mm512_slli_epi32(words, 16));
  }
  static Int load_float8(const uint8_t* from) {
    const Int places = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_add_epi32(_mm512_slli_epi32(places, kFloat8Shift), _mm512_set1_epi32(kLeastFloat8));
  }
  static Float load_halves(const uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Float load_floats(const float* from) { return _mm512_load_ps(from); }
  static void store_floats(float* to, Float value) { _mm512_store_ps(to, value); }
  static Int load_codes(const uint8_t* from) { return _mm512_load_si512(from); }
  static Int load_bytes(const void* from) {
    Int value = _mm512_loadu_si512(from);
    asm("" : "+v"(value));  // or gcc loads it again for each use, or stores what it loaded
    return value;
  }
  static void store_ints(int32_t* to, Int value) { _mm512_storeu_si512(to, value); }
  static void store_codes(uint8_t* to, Int value) { _mm512_store_si512(to, value); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static Int multiply(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Int as_ints(Float a) { return _mm512_castps_si512(a); }
  static Float as_floats(Int a) { return _mm512_castsi512_ps(a); }
  static Float to_floats(Int a) { return _mm512_cvtepi32_ps(a); }
  static Int low_nibbles(Int a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static Int high_nibbles(Int a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
  template <int place>
  static Int pairs(Int a) {
    return _mm512_and_si512(_mm512_srli_epi16(a, 2 * place), _mm512_set1_epi8(3));
  }
  static Int prepare(Int a) { return a; }
  template <int bits>
  static Int dot(Int acc, Int codes, Int x) {
    // Not the intrinsic: gcc 12 copies every accumulator to and fro around it.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
    return acc;
  }
  template <int bits>
  static Int dot_word(Int acc, Int codes, const int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*reinterpret_cast<const Word*>(x)));
    return acc;
  }
  static Int larger(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static int32_t largest(Int a) { return _mm512_reduce_max_epi32(a); }
  static Int upper_half(Int a) { return _mm512_slli_epi32(a, 16); }
  static Int magnitude(Int a) { return _mm512_and_si512(a, ints(INT32_MAX)); }
  static constexpr int together = 2, share_rows = 8, alone_rows = 2, keys = 8, cached_middle = 128;
  static Int cached(Int codes) { return _mm512_xor_si512(codes, ints(INT32_C(-0x7f7f7f80))); }
  static Int cached_word(const int8_t* from) { return cached(ints(*reinterpret_cast<const Word*>(from))); }
  static Int upper_digits(Int a) { return _mm512_srli_epi32(a, 7); }
  static Int dot_shares(Int acc, Int columns, Int shares) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(columns), "v"(shares));
    return acc;
  }
  static void turn_columns(const int8_t* const* rows, int64_t count, int32_t* out) {
    for (int64_t at = 0; at < count; at += 32, out += 32) {  // columns in their order: fours are moved before they are paired
      const auto wide = [&](const int8_t* row) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + at));
        return _mm512_cvtepi8_epi16(_mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
      };
      const Int first = wide(rows[0]), second = wide(rows[1]);
      store_ints(out, _mm512_unpacklo_epi16(first, second));
      store_ints(out + 16, _mm512_unpackhi_epi16(first, second));
    }
  }
  static void turn(Int* a) {
    const Int low = _mm512_unpacklo_epi8(a[0], a[1]), high = _mm512_unpackhi_epi8(a[0], a[1]);
    const Int low_two = _mm512_unpacklo_epi8(a[2], a[3]), high_two = _mm512_unpackhi_epi8(a[2], a[3]);
    a[0] = _mm512_unpacklo_epi16(low, low_two);
    a[1] = _mm512_unpackhi_epi16(low, low_two);
    a[2] = _mm512_unpacklo_epi16(high, high_two);
    a[3] = _mm512_unpackhi_epi16(high, high_two);
  }

  static Int sums(Int* of) {
    for (int i = 0; i < 16; i += 2)
      of[i / 2] = add(_mm512_unpacklo_epi32(of[i], of[i + 1]), _mm512_unpackhi_epi32(of[i], of[i + 1]));
    for (int i = 0; i < 8; i += 2)
      of[i / 2] = add(_mm512_unpacklo_epi64(of[i], of[i + 1]), _mm512_unpackhi_epi64(of[i], of[i + 1]));
    for (int width = 4; width > 1; width /= 2)
      for (int i = 0; i < width; i += 2)
        of[i / 2] = add(_mm512_shuffle_i32x4(of[i], of[i + 1], 0x88), _mm512_shuffle_i32x4(of[i], of[i + 1], 0xdd));
    return of[0];
  }

  static void transpose(Int* a, Int* out) {
    Int b[16];
    for (int i = 0; i < 16; i += 2) {  // pairs of words
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // fours of words: of rows i to i + 3, columns c, c + 4, c + 8, c + 12
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
      const Int low_even = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), low_odd = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
      const Int high_even = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
      const Int high_odd = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
      out[c] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
      out[c + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
      out[c + 8] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
      out[c + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
  }
};

}  // namespace

namespace moedge {
const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = make_kernels<Avx512>("avx512");
  return &kernels;
}
}  // namespace moedge
