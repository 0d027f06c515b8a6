// Attention in plain C++, for processors that no other file is for, and to compare the others with.

#include "attention_body.h"

namespace {

struct Plain {
  static constexpr int64_t lanes = 4;
  static constexpr int alone = 4, few = 2, wide = 4, rows = 2, slim = 4, across = 1;
  struct Float {
    float lane[4];
  };

  template <typename F>
  static Float each(F make) {
    Float v;
    for (int i = 0; i < 4; ++i) v.lane[i] = make(i);
    return v;
  }
  static Float floats(float value) { return {{value, value, value, value}}; }
  static Float load(const float* from) {
    Float v;
    memcpy(&v, from, sizeof v);
    return v;
  }
  static void store(float* to, Float value) { memcpy(to, &value, sizeof value); }
  static Float add(Float a, Float b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Float subtract(Float a, Float b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Float multiply(Float a, Float b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float fused(Float a, Float b, Float c) {
    return each([&](int i) { return fmaf(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static Float larger(Float a, Float b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Float smaller(Float a, Float b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Float power(Float shifted) {
    return each([&](int i) {
      uint32_t bits;
      memcpy(&bits, &shifted.lane[i], 4);
      bits = (bits - static_cast<uint32_t>(kRoundBits - 127)) << 23;
      float value;
      memcpy(&value, &bits, 4);
      return value;
    });
  }
  static Float load_half(const uint16_t* from) {
    return each([&](int i) { return widen_half(from[i]); });
  }
  static Float load_bytes(const int8_t* from) {
    return each([&](int i) { return static_cast<float>(from[i]); });
  }
  static void store_half(uint16_t* to, Float value) {
    for (int i = 0; i < 4; ++i) to[i] = narrow_half(value.lane[i]);
  }
  static void transpose(Float (&a)[4]) {
    const Float b[4] = {a[0], a[1], a[2], a[3]};
    for (int i = 0; i < 4; ++i) a[i] = each([&](int j) { return b[j].lane[i]; });
  }

  static float widen_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
    uint32_t bits = sign | (rest << 13);
    if (rest >= 0x7c00u) {  // infinities and NaN
      bits += 112u << 23 | 112u << 23;
    } else if (rest >= 0x0400u) {
      bits += 112u << 23;
    } else {  // subnormal: exactly `rest` times 2^-24
      const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
      memcpy(&bits, &value, 4);
      bits |= sign;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }

  static uint16_t narrow_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
    if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
      float small;
      memcpy(&small, &bits, 4);
      small += 0.5f;
      memcpy(&bits, &small, 4);
      return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13));
  }
};

}  // namespace

namespace moedge {
const AttentionKernels* portable_attention() {
  static constexpr AttentionKernels kernels = make_attention<Plain>();
  return &kernels;
}
}  // namespace moedge
