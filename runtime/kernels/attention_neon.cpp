// Attention on 64-bit ARM.

#include <arm_neon.h>

#include "attention_body.h"

namespace {

struct Wide128 {
  static constexpr int64_t lanes = 4;
  static constexpr int alone = 16, few = 4, wide = 4, rows = 4, slim = 4, across = 4;
  using Float = float32x4_t;

  static Float floats(float value) { return vdupq_n_f32(value); }
  static Float load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, Float value) { vst1q_f32(to, value); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float subtract(Float a, Float b) { return vsubq_f32(a, b); }
  static Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fused(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float larger(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Float smaller(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static Float power(Float shifted) {
    const int32x4_t n = vsubq_s32(vreinterpretq_s32_f32(shifted), vdupq_n_s32(kRoundBits - 127));
    return vreinterpretq_f32_s32(vshlq_n_s32(n, 23));
  }
  static Float load_half(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
  static Float load_bytes(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
  }
  static void store_half(uint16_t* to, Float value) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(value))); }

  static void transpose(Float (&a)[4]) {
    const auto pairs = [](Float v) { return vreinterpretq_f64_f32(v); };
    const auto words = [](float64x2_t v) { return vreinterpretq_f32_f64(v); };
    const Float low = vtrn1q_f32(a[0], a[1]), low_odd = vtrn2q_f32(a[0], a[1]);
    const Float high = vtrn1q_f32(a[2], a[3]), high_odd = vtrn2q_f32(a[2], a[3]);
    a[0] = words(vtrn1q_f64(pairs(low), pairs(high)));
    a[1] = words(vtrn1q_f64(pairs(low_odd), pairs(high_odd)));
    a[2] = words(vtrn2q_f64(pairs(low), pairs(high)));
    a[3] = words(vtrn2q_f64(pairs(low_odd), pairs(high_odd)));
  }
};

}  // namespace

namespace moedge {
const AttentionKernels* neon_attention() {
  static constexpr AttentionKernels kernels = make_attention<Wide128>();
  return &kernels;
}
}  // namespace moedge
