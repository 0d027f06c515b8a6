// Activations to integers with scales, and the function between an expert's two products: see body.h for S.

#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"

namespace {

using moedge::Activations;
using moedge::divide_up;
using moedge::least;

inline int32_t word_at(const int8_t* codes) {
  int32_t word;
  memcpy(&word, codes, 4);
  return word;
}

// Activations for 4-bit weights lie in blocks: this many codes of even columns, then as many of odd ones, which is how
// the low and the high nibbles of so many bytes come.
template <class S>
inline int64_t half_block(int64_t group) {
  return least(4 * S::lanes, group / 2);
}

// Columns of two rows as pairs of 16 bits.
inline void turn_pairs(const int8_t* const* rows, int64_t count, int32_t* out) {
  const int8_t *first = rows[0], *second = rows[1];
  for (int64_t i = 0; i < (count & -32); ++i)
    out[i] = static_cast<int32_t>(static_cast<uint16_t>(first[i]) | static_cast<uint32_t>(second[i]) << 16);
}

inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// A scale in a byte (export/quantization/__init__.py, FLOAT8): the upper bits of a float's exponent and mantissa.
constexpr int kFloat8Shift = 19;
constexpr int32_t kLeastFloat8 = (127 - 15) << 23;

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a rounded integer in the low bits

// Each group is scaled so that its largest magnitude becomes 127, and rounded to the nearest, ties to even.
template <class S>
void quantize(const float* x, int bits, int64_t row, const Activations& out) {
  const size_t group = static_cast<size_t>(out.width) / static_cast<size_t>(out.groups);
  int8_t* codes = out.codes + row * out.width;
  for (int64_t b = 0; b < out.groups; ++b) {
    const float* part = x + static_cast<size_t>(b) * group;
    int8_t* into = codes + static_cast<size_t>(b) * group;
    int32_t largest = 0;  // of the magnitudes' bits, which order as the magnitudes do, infinities and NaN last
    for (size_t i = 0; i < group; ++i) {
      const int32_t magnitude = bits_of(part[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const bool finite = largest < 0x7f800000;
    const bool nothing = !finite || float_of(largest) < 1e-30f;
    const float scale = nothing ? 0.0f : float_of(largest) / 127.0f;
    const float inverse = nothing ? 0.0f : 1.0f / scale;
    int32_t sum = 0;
    if (nothing) {
      memset(into, 0, group);
    } else {
      for (size_t i = 0; i < group; ++i) {
        const float shifted = part[i] * inverse + kRound;
        const int32_t code = bits_of(shifted) - bits_of(kRound);
        into[i] = static_cast<int8_t>(code);
        sum += code;
      }
    }
    out.scales[row * out.groups + b] = finite ? scale : float_of(0x7fc00000);
    out.sums[row * out.groups + b] = sum;
  }
  if (bits != 4) return;
  const int64_t half = half_block<S>(static_cast<int64_t>(group));
  for (int8_t* block = codes; block < codes + out.width; block += 2 * half) {
    uint16_t pairs[4 * S::lanes];  // a copy, so that the compiler sees that what it reads stays
    memcpy(pairs, block, static_cast<size_t>(2 * half));
    for (int64_t i = 0; i < half; ++i) block[i] = static_cast<int8_t>(pairs[i]);
    for (int64_t i = 0; i < half; ++i) block[half + i] = static_cast<int8_t>(pairs[i] >> 8);
  }
}

// e^x by a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7, the same on every machine.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = fmaf(x, 1.44269504f, kRound);
  const float times = shifted - kRound;
  float r = fmaf(times, -0.693359375f, x);
  r = fmaf(times, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(bits_of(shifted) - bits_of(kRound) + 127) << 23;
  return p * float_of(static_cast<int32_t>(exponent));
}

void swiglu(const float* pairs, int64_t count, float alpha, float limit, float offset, float* h) {
  for (int64_t i = 0; i < count; ++i) {
    float gate = pairs[2 * i], up = pairs[2 * i + 1];
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
    const float swish = gate / (1.0f + exponential(-alpha * gate));
    h[i] = swish * (up + offset);
  }
}

}  // namespace
