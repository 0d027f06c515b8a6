// x86 with AVX-VNNI: Intel's processors without AVX-512 since Alder Lake.

#include "avx2.h"

namespace {

struct AvxVnni : Vectors256 {
  static constexpr int32_t middle = 0;

  static Int prepare(Int a) { return a; }
  template <int bits>
  static Int dot(Int acc, Int codes, Int x) {
    return _mm256_dpbusd_avx_epi32(acc, codes, x);
  }
  static Int dot_shares(Int acc, Int columns, Int shares) { return _mm256_dpwssd_avx_epi32(acc, columns, shares); }
  template <int bits>
  static Int dot_word(Int acc, Int codes, const int8_t* x) {
    return dot<bits>(acc, codes, ints(word_at(x)));
  }
};

}  // namespace

namespace moedge {
const Kernels* avxvnni_kernels() {
  static constexpr Kernels kernels = make_kernels<AvxVnni>("avxvnni");
  return &kernels;
}
}  // namespace moedge
