// x86 with AVX2 and FMA, without a dot product of bytes: Intel since Haswell, AMD since Zen.

#include "avx2.h"

namespace {

struct Avx2 : Vectors256 {
  static constexpr int32_t middle = 128;

  // 8-bit codes less 128, so that they can change signs with the activations in `dot`.
  static Int prepare(Int a) { return _mm256_xor_si256(a, _mm256_set1_epi8(-128)); }

  // Pairs of products are added in 16 bits: 2 * 15 * 127 for 4-bit codes, 2 * 128 * 127 for magnitudes of 8-bit ones, of a
  // cache's 2 * 255 * 64 by digits of queries and 2 * 127 * 128 by those of shares.
  template <int bits>
  static Int dot(Int acc, Int codes, Int x) {
    const Int pairs = bits < 8 ? _mm256_maddubs_epi16(codes, x)
                                : _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    return add(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Int dot_shares(Int acc, Int columns, Int shares) { return add(acc, _mm256_madd_epi16(columns, shares)); }
  template <int bits>
  static Int dot_word(Int acc, Int codes, const int8_t* x) {
    return dot<bits>(acc, codes, ints(word_at(x)));
  }
};

}  // namespace

namespace moedge {
const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels<Avx2>("avx2");
  return &kernels;
}
}  // namespace moedge
