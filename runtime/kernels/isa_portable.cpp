// Plain C++, for processors that no other file is for, and to compare the others with.

#include "body.h"

namespace {

struct Portable {
  static constexpr int64_t lanes = 4;
  static constexpr int tokens = 4;
  static constexpr int few = 0;
  static constexpr int32_t middle = 0;
  struct Int {
    int32_t lane[4];
  };
  struct Float {
    float lane[4];
  };

  template <typename V, typename F>
  static V each(F make) {
    V v;
    for (int i = 0; i < 4; ++i) v.lane[i] = make(i);
    return v;
  }
  static Int ints(int32_t value) { return {{value, value, value, value}}; }
  static Float floats(float value) { return {{value, value, value, value}}; }
  template <typename V>
  static V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
  }
  static Int load_ints(const int32_t* from) { return load<Int>(from); }
  static Float load_some(const float* from) { return load<Float>(from); }
  static Float load_some(const uint16_t* from) {
    return each<Float>([&](int i) { return as_float(from[i]); });
  }
  static Int load_float8(const uint8_t* from) {
    return each<Int>([&](int i) { return (from[i] << kFloat8Shift) + kLeastFloat8; });
  }
  static Float load_halves(const uint8_t* from) {
    uint16_t halves[4];
    memcpy(halves, from, sizeof halves);
    return each<Float>([&](int i) {  // as the bits of a float 2^112 times too small, which multiplies exactly
      const int32_t bits = halves[i] & 0x7fff, sign = halves[i] >> 15 ? INT32_MIN : 0;
      const float value = float_of(bits << 13) * 0x1p112f;
      return float_of(bits_of(value) | sign | (bits >= 0x7c00 ? 0xff << 23 : 0));
    });
  }
  static Float load_floats(const float* from) { return load<Float>(from); }
  static Int load_codes(const uint8_t* from) { return load<Int>(from); }
  static Int load_bytes(const void* from) { return load<Int>(from); }
  static void store_ints(int32_t* to, Int value) { memcpy(to, &value, sizeof value); }
  static void store_floats(float* to, Float value) { memcpy(to, &value, sizeof value); }
  static void store_codes(uint8_t* to, Int value) { memcpy(to, &value, sizeof value); }
  static Int add(Int a, Int b) {
    return each<Int>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Int subtract(Int a, Int b) {
    return each<Int>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Int multiply(Int a, Int b) {
    return each<Int>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float multiply(Float a, Float b) {
    return each<Float>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float add(Float a, Float b) {
    return each<Float>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Float fused(Float a, Float b, Float c) {
    return each<Float>([&](int i) { return fmaf(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static Int as_ints(Float a) { return load<Int>(&a); }
  static Float as_floats(Int a) { return load<Float>(&a); }
  static Float to_floats(Int a) {
    return each<Float>([&](int i) { return static_cast<float>(a.lane[i]); });
  }
  static Int low_nibbles(Int a) {
    return each<Int>([&](int i) { return a.lane[i] & 0x0f0f0f0f; });
  }
  static Int high_nibbles(Int a) {
    return each<Int>([&](int i) { return (a.lane[i] >> 4) & 0x0f0f0f0f; });
  }
  template <int place>
  static Int pairs(Int a) {
    return each<Int>([&](int i) { return (a.lane[i] >> (2 * place)) & 0x03030303; });
  }
  static void turn(Int* a) {
    uint8_t rows[4][16], columns[16][4];
    memcpy(rows, a, sizeof rows);
    for (int r = 0; r < 4; ++r)
      for (int c = 0; c < 16; ++c) columns[c][r] = rows[r][c];
    memcpy(a, columns, sizeof columns);
  }
  static Int prepare(Int a) { return a; }
  template <int bits>
  static Int dot(Int acc, Int codes, Int x) {
    uint8_t weights[16];
    int8_t values[16];
    memcpy(weights, &codes, 16);
    memcpy(values, &x, 16);
    return each<Int>([&](int i) {
      const uint8_t* w = weights + 4 * i;
      const int8_t* v = values + 4 * i;
      return acc.lane[i] + w[0] * v[0] + w[1] * v[1] + w[2] * v[2] + w[3] * v[3];
    });
  }
  static Int larger(Int a, Int b) {
    return each<Int>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static int32_t largest(Int a) {
    int32_t most = a.lane[0];
    for (int32_t one : a.lane) most = one > most ? one : most;
    return most;
  }
  static Int upper_half(Int a) {
    return each<Int>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << 16); });
  }
  static Int magnitude(Int a) {
    return each<Int>([&](int i) { return a.lane[i] & INT32_MAX; });
  }
  static constexpr int together = 2, share_rows = 2, alone_rows = 1, keys = 2, cached_middle = 128;
  static Int cached(Int codes) {
    return each<Int>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(codes.lane[i]) ^ 0x80808080u); });
  }
  static Int cached_word(const int8_t* from) { return cached(ints(word_at(from))); }
  static Int upper_digits(Int a) {
    return each<Int>([&](int i) { return a.lane[i] >> 7; });
  }
  static Int dot_shares(Int acc, Int columns, Int shares) {
    return each<Int>([&](int i) {
      const int32_t a = columns.lane[i], b = shares.lane[i];
      return acc.lane[i] + static_cast<int16_t>(a) * static_cast<int16_t>(b) + (a >> 16) * (b >> 16);
    });
  }
  static void turn_columns(const int8_t* const* rows, int64_t count, int32_t* out) { turn_pairs(rows, count, out); }
  static Int sums(Int* of) {
    return each<Int>([&](int i) { return of[i].lane[0] + of[i].lane[1] + of[i].lane[2] + of[i].lane[3]; });
  }
  static void transpose(const Int* a, Int* out) {
    for (int r = 0; r < 4; ++r)
      for (int w = 0; w < 4; ++w) out[w].lane[r] = a[r].lane[w];
  }
};

}  // namespace

namespace moedge {
const Kernels* portable_kernels() {
  static constexpr Kernels kernels = make_kernels<Portable>("portable");
  return &kernels;
}
}  // namespace moedge
