// 64-bit ARM with the dot product instructions: Raspberry Pi 5, Jetson, Apple, Graviton 2 and later.

#include <arm_neon.h>

#include "body.h"

namespace {

struct Neon {
  static constexpr int64_t lanes = 4;
  static constexpr int tokens = 8;
  static constexpr int few = 0;
  static constexpr int32_t middle = 128;
  using Int = int32x4_t;
  using Float = float32x4_t;

  static Int ints(int32_t value) { return vdupq_n_s32(value); }
  static Float floats(float value) { return vdupq_n_f32(value); }
  static Int load_ints(const int32_t* from) { return vld1q_s32(from); }
  static Float load_some(const float* from) { return vld1q_f32(from); }
  static Float load_some(const uint16_t* from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); }
  static Int load_float8(const uint8_t* from) {
    uint32_t four;
    memcpy(&four, from, sizeof four);
    const uint16x4_t places = vget_low_u16(vmovl_u8(vcreate_u8(four)));
    return vaddq_s32(vreinterpretq_s32_u32(vshll_n_u16(vshl_n_u16(places, 3), 16)), vdupq_n_s32(kLeastFloat8));
  }
  static Float load_halves(const uint8_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
  }
  static Float load_floats(const float* from) { return vld1q_f32(from); }
  static void store_floats(float* to, Float value) { vst1q_f32(to, value); }
  static Int load_codes(const uint8_t* from) { return vreinterpretq_s32_u8(vld1q_u8(from)); }
  static Int load_bytes(const void* from) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(from))); }
  static void store_ints(int32_t* to, Int value) { vst1q_s32(to, value); }
  static void store_codes(uint8_t* to, Int value) { vst1q_u8(to, vreinterpretq_u8_s32(value)); }
  static Int add(Int a, Int b) { return vaddq_s32(a, b); }
  static Int subtract(Int a, Int b) { return vsubq_s32(a, b); }
  static Int multiply(Int a, Int b) { return vmulq_s32(a, b); }
  static Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float fused(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Int as_ints(Float a) { return vreinterpretq_s32_f32(a); }
  static Float as_floats(Int a) { return vreinterpretq_f32_s32(a); }
  static Float to_floats(Int a) { return vcvtq_f32_s32(a); }
  static Int low_nibbles(Int a) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(15)));
  }
  static Int high_nibbles(Int a) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(a), 4)); }
  template <int place>
  static Int pairs(Int a) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(a);
    return vreinterpretq_s32_u8(vandq_u8(vshlq_u8(bytes, vdupq_n_s8(-2 * place)), vdupq_n_u8(3)));
  }
  static void turn(Int* a) {
    const auto bytes = [](Int v) { return vreinterpretq_u8_s32(v); };
    const auto pairs = [](uint8x16_t v) { return vreinterpretq_u16_u8(v); };
    const uint16x8_t low = pairs(vzip1q_u8(bytes(a[0]), bytes(a[1]))), high = pairs(vzip2q_u8(bytes(a[0]), bytes(a[1])));
    const uint16x8_t low_two = pairs(vzip1q_u8(bytes(a[2]), bytes(a[3])));
    const uint16x8_t high_two = pairs(vzip2q_u8(bytes(a[2]), bytes(a[3])));
    a[0] = vreinterpretq_s32_u16(vzip1q_u16(low, low_two));
    a[1] = vreinterpretq_s32_u16(vzip2q_u16(low, low_two));
    a[2] = vreinterpretq_s32_u16(vzip1q_u16(high, high_two));
    a[3] = vreinterpretq_s32_u16(vzip2q_u16(high, high_two));
  }
  // The instruction multiplies signed bytes: 8-bit codes less 128.
  static Int prepare(Int a) {
    return vreinterpretq_s32_u8(veorq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(128)));
  }
  template <int bits>
  static Int dot(Int acc, Int codes, Int x) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x));
  }
  static Int larger(Int a, Int b) { return vmaxq_s32(a, b); }
  static int32_t largest(Int a) { return vmaxvq_s32(a); }
  static Int magnitude(Int a) { return vandq_s32(a, ints(INT32_MAX)); }
  static Int upper_digits(Int a) { return vshrq_n_s32(a, 7); }
  static constexpr int together = 4, share_rows = 4, alone_rows = 2, keys = 4, cached_middle = 0;
  static Int cached(Int codes) { return codes; }
  static Int cached_word(const int8_t* from) { return ints(word_at(from)); }
  static Int dot_shares(Int acc, Int columns, Int shares) { return dot<8>(acc, columns, shares); }
  static void turn_columns(const int8_t* const* rows, int64_t count, int32_t* out) {
    for (int64_t at = 0; at < count; at += 16, out += 16) {
      Int columns[4];
      for (int r = 0; r < 4; ++r) columns[r] = load_bytes(rows[r] + at);
      turn(columns);
      for (int r = 0; r < 4; ++r) store_ints(out + 4 * r, columns[r]);
    }
  }
  static Int sums(Int* of) { return vpaddq_s32(vpaddq_s32(of[0], of[1]), vpaddq_s32(of[2], of[3])); }

  static void transpose(Int* a, Int* out) {
    const Int low = vtrn1q_s32(a[0], a[1]), low_odd = vtrn2q_s32(a[0], a[1]);
    const Int high = vtrn1q_s32(a[2], a[3]), high_odd = vtrn2q_s32(a[2], a[3]);
    const auto pairs = [](Int v) { return vreinterpretq_s64_s32(v); };
    out[0] = vreinterpretq_s32_s64(vtrn1q_s64(pairs(low), pairs(high)));
    out[1] = vreinterpretq_s32_s64(vtrn1q_s64(pairs(low_odd), pairs(high_odd)));
    out[2] = vreinterpretq_s32_s64(vtrn2q_s64(pairs(low), pairs(high)));
    out[3] = vreinterpretq_s32_s64(vtrn2q_s64(pairs(low_odd), pairs(high_odd)));
  }
};

}  // namespace

namespace moedge {
const Kernels* neon_kernels() {
  static constexpr Kernels kernels = make_kernels<Neon>("neon");
  return &kernels;
}
}  // namespace moedge
