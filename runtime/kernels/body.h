// The kernels, written once over an instruction set S. Each isa_*.cpp includes this with its own compiler flags.
//
// S gives  lanes             rows that one vector holds
//          tokens            rows of activations that share one pass over the unpacked weights
//          few               rows of activations for which the weights are not unpacked to memory
//          middle            what is subtracted from 8-bit codes before they are multiplied (0 or 128)
//          Int, Float        vectors of int32 and float
//          load_transposed   a square of lanes x lanes 4-byte words, transposed
//          dot<bits>         acc + the products of each lane's four codes with four activations
// Everything is in an anonymous namespace: two files must never share a function that was compiled for one of them.

#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"

namespace {

using moedge::Activations;
using moedge::kMaxTile;
using moedge::kMaxTokens;
using moedge::Matrix;

constexpr int64_t kPanel = 512;  // columns unpacked at once: with a tile of 32 rows, half of a first-level cache
constexpr int64_t kMinGroup = 16;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int32_t word_at(const int8_t* codes) {
  int32_t word;
  memcpy(&word, codes, 4);
  return word;
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

// --- activations -------------------------------------------------------------------------------------------------

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a rounded integer in the low bits

// Each group is scaled so that its largest magnitude becomes 127, and rounded to the nearest, ties to even.
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
  for (int64_t i = 0; i < out.width; i += 8) {
    uint64_t eight;
    memcpy(&eight, codes + i, 8);
    uint64_t even = eight & 0x00ff00ff00ff00ffu, odd = (eight >> 8) & 0x00ff00ff00ff00ffu;
    even = (even | even >> 8) & 0x0000ffff0000ffffu;
    odd = (odd | odd >> 8) & 0x0000ffff0000ffffu;
    even = (even | even >> 16) & 0xffffffffu;
    odd = (odd | odd >> 16) & 0xffffffffu;
    eight = even | odd << 32;
    memcpy(codes + i, &eight, 8);
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

// --- weights -----------------------------------------------------------------------------------------------------

// Codes of kPanel columns or fewer of a tile, unpacked to a byte each: [column / 4][tile][4], with what their groups
// need: [group][tile].
template <class S>
struct Panel {
  static constexpr int64_t tile = 2 * S::lanes;
  alignas(64) uint8_t codes[kPanel * tile];
  alignas(64) float scales[kPanel / kMinGroup * tile];
  alignas(64) int32_t zeros[kPanel / kMinGroup * tile];
};

inline int32_t zero_point(const Matrix& matrix, int64_t row, int64_t group) {
  if (!matrix.zero_points) return matrix.bits == 4 ? 8 : 128;
  const uint8_t* packed = matrix.zero_points + row * matrix.zero_row_bytes();
  return matrix.bits == 8 ? packed[group] : packed[group / 2] >> (group % 2 * 4) & 15;
}

// Scales and zero points of groups `from` to `from + count` for the tile's rows.
template <class S>
void gather_groups(const Matrix& matrix, const int64_t* rows, int64_t from, int64_t count, Panel<S>* panel) {
  constexpr int64_t tile = Panel<S>::tile;
  const int32_t middle = matrix.bits == 8 ? S::middle : 0;
  for (int64_t r = 0; r < tile; ++r) {
    const float* scales = matrix.scales + rows[r] * matrix.groups() + from;
    for (int64_t b = 0; b < count; ++b) panel->scales[b * tile + r] = scales[b];
  }
  if (matrix.zero_points) {
    for (int64_t r = 0; r < tile; ++r)
      for (int64_t b = 0; b < count; ++b) panel->zeros[b * tile + r] = zero_point(matrix, rows[r], from + b) - middle;
  } else if (from == 0) {
    for (int64_t i = 0; i < count * tile; ++i) panel->zeros[i] = zero_point(matrix, 0, 0) - middle;
  }
}

template <class S, int bits>
inline void unpack_word(typename S::Int word, uint8_t* codes, int64_t step) {
  if (bits == 4) {
    S::store_codes(codes, S::low_nibbles(word));
    S::store_codes(codes + step, S::high_nibbles(word));
  } else {
    S::store_codes(codes, S::prepare(word));
  }
}

// Columns `from` to `from + width` of the tile's rows.
template <class S, int bits>
void unpack(const Matrix& matrix, const int64_t* rows, int64_t from, int64_t width, Panel<S>* panel) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes, step = 4 * Panel<S>::tile;
  constexpr int64_t words_a_quad = bits == 4 ? 2 : 1;
  const int64_t bytes = width * bits / 8;
  // What is needed next, while this is unpacked: the rows' next columns, or the next tile's first.
  const int64_t ahead = from + width < matrix.width ? bytes : Panel<S>::tile * matrix.row_bytes() - from * bits / 8;
  for (int half = 0; half < 2; ++half) {
    const uint8_t* sources[lanes];
    for (int64_t r = 0; r < lanes; ++r)
      sources[r] = matrix.codes + rows[half * lanes + r] * matrix.row_bytes() + from * bits / 8;
    uint8_t* into = panel->codes + half * 4 * lanes;
    for (int64_t at = 0; at < bytes; at += chunk) {
      const int64_t held = least(chunk, bytes - at);
      alignas(64) uint8_t tail[lanes * chunk];
      typename S::Int words[lanes];
      if (held == chunk) {
        S::load_transposed(sources, at, words);
        for (int64_t r = 0; r < lanes; ++r) __builtin_prefetch(sources[r] + at + ahead);
      } else {  // the end of a row: reading on might leave the file
        const uint8_t* copies[lanes];
        memset(tail, 0, sizeof tail);
        for (int64_t r = 0; r < lanes; ++r) {
          memcpy(tail + r * chunk, sources[r] + at, static_cast<size_t>(held));
          copies[r] = tail + r * chunk;
        }
        S::load_transposed(copies, 0, words);
      }
      for (int64_t w = 0; w < lanes; ++w)
        if (w * 4 < held) unpack_word<S, bits>(words[w], into + (at / 4 + w) * words_a_quad * step, step);
    }
  }
}

// --- products ----------------------------------------------------------------------------------------------------

// The integers of one group: sums [M][2] of a tile's codes with M rows of activations, from columns `at` to `end`. A
// function of its own, not inlined, so that the compiler has registers for nothing but this.
template <class S, int bits, int M>
__attribute__((noinline)) void add_products(const uint8_t* weights, const int8_t* const* codes, int64_t at, int64_t end,
                                            typename S::Int (*sums)[2]) {
  constexpr int64_t lanes = S::lanes, tile = Panel<S>::tile;
  constexpr int chains = M < 4 ? 2 : 1;  // sums kept apart, so that one dot product need not wait for the last
  typename S::Int sum[chains][M][2];
  const int8_t* x[M];
  for (int m = 0; m < M; ++m) {
    x[m] = codes[m];
    for (int n = 0; n < 2; ++n) {
      sum[0][m][n] = sums[m][n];
      if (chains == 2) sum[chains - 1][m][n] = S::ints(0);
    }
  }
  for (; at < end; at += 4 * chains, weights += 4 * chains * tile) {
    for (int c = 0; c < chains; ++c) {
      const typename S::Int left = S::load_codes(weights + c * 4 * tile);
      const typename S::Int right = S::load_codes(weights + c * 4 * tile + 4 * lanes);
      for (int m = 0; m < M; ++m) {
        sum[c][m][0] = S::template dot<bits>(sum[c][m][0], left, x[m] + at + 4 * c);
        sum[c][m][1] = S::template dot<bits>(sum[c][m][1], right, x[m] + at + 4 * c);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 2; ++n)
      sums[m][n] = chains == 1 ? sum[0][m][n] : S::add(sum[0][m][n], sum[chains - 1][m][n]);
}

// A panel by M rows of activations: adds to acc [M][tile].
template <class S, int bits, int M>
void multiply_panel(const Panel<S>& panel, int64_t groups, int64_t group, const int8_t* const* codes,
                    const float* const* scales, const int32_t* const* sums, float* acc) {
  constexpr int64_t lanes = S::lanes, tile = Panel<S>::tile;
  for (int64_t b = 0; b < groups; ++b) {
    typename S::Int sum[M][2];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < 2; ++n)
        sum[m][n] = S::multiply(S::load_ints(panel.zeros + b * tile + n * lanes), S::ints(-sums[m][b]));
    add_products<S, bits, M>(panel.codes + b * group * tile, codes, b * group, (b + 1) * group, sum);
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < 2; ++n) {
        float* into = acc + m * tile + n * lanes;
        const typename S::Float scale =
            S::multiply(S::load_floats(panel.scales + b * tile + n * lanes), S::floats(scales[m][b]));
        S::store_floats(into, S::fused(S::to_floats(sum[m][n]), scale, S::load_floats(into)));
      }
    }
  }
}

template <class S, int bits, int M>
void multiply_some(const Panel<S>& panel, int64_t from, int64_t width, const Activations& x, const int32_t* index,
                   int64_t at, float* acc) {
  const int64_t group = x.width / x.groups;
  const int8_t* codes[M];
  const float* scales[M];
  const int32_t* sums[M];
  for (int m = 0; m < M; ++m) {
    const int64_t row = index ? index[at + m] : at + m;
    codes[m] = x.codes + row * x.width + from;
    scales[m] = x.scales + row * x.groups + from / group;
    sums[m] = x.sums + row * x.groups + from / group;
  }
  multiply_panel<S, bits, M>(panel, width / group, group, codes, scales, sums, acc + at * Panel<S>::tile);
}

// `count` rows of activations, 1 to M.
template <class S, int bits, int M>
void multiply_rows(const Panel<S>& panel, int64_t from, int64_t width, const Activations& x, const int32_t* index,
                   int64_t at, int64_t count, float* acc) {
  if constexpr (M > 1)
    if (count < M) return multiply_rows<S, bits, M - 1>(panel, from, width, x, index, at, count, acc);
  multiply_some<S, bits, M>(panel, from, width, x, index, at, acc);
}

// Few rows of activations: the weights stay in registers from their load to their products. Groups of whole chunks.
template <class S, int bits, int M>
void stream(const Matrix& matrix, const int64_t* rows, const Activations& x, const int32_t* index, float* acc) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes, tile = Panel<S>::tile;
  constexpr int64_t columns = chunk * 8 / bits;
  const int64_t groups = x.groups, group = x.width / groups, bytes = matrix.row_bytes();
  const int32_t middle = bits == 8 ? S::middle : 0;
  int64_t ids[M];
  for (int m = 0; m < M; ++m) ids[m] = index ? index[m] : m;
  for (int half = 0; half < 2; ++half) {
    const int64_t* own = rows + half * lanes;
    const uint8_t* sources[lanes];
    for (int64_t r = 0; r < lanes; ++r) sources[r] = matrix.codes + own[r] * bytes;
    typename S::Float total[M];
    for (int m = 0; m < M; ++m) total[m] = S::floats(0.0f);
    for (int64_t b = 0; b < groups; ++b) {
      alignas(64) float scales[lanes];
      alignas(64) int32_t zeros[lanes];
      for (int64_t r = 0; r < lanes; ++r) {
        scales[r] = matrix.scales[own[r] * groups + b];
        zeros[r] = zero_point(matrix, own[r], b) - middle;
      }
      typename S::Int sum[M][2];  // two, so that one dot product need not wait for the last
      for (int m = 0; m < M; ++m) {
        sum[m][0] = S::multiply(S::load_ints(zeros), S::ints(-x.sums[ids[m] * groups + b]));
        sum[m][1] = S::ints(0);
      }
      for (int64_t at = b * group; at < (b + 1) * group; at += columns) {
        typename S::Int words[lanes];
        S::load_transposed(sources, at * bits / 8, words);
        for (int64_t r = 0; r < lanes; ++r)  // the next rows of the matrix, while these are multiplied
          __builtin_prefetch(sources[r] + lanes * bytes + at * bits / 8);
        for (int64_t w = 0; w < lanes; ++w) {
          const typename S::Int low = bits == 4 ? S::low_nibbles(words[w]) : S::prepare(words[w]);
          for (int m = 0; m < M; ++m) {
            const int8_t* part = x.codes + ids[m] * x.width + at + 32 / bits * w;
            const int place = bits == 4 ? 0 : w % 2;
            sum[m][place] = S::template dot<bits>(sum[m][place], low, part);
            if (bits == 4) sum[m][1] = S::template dot<bits>(sum[m][1], S::high_nibbles(words[w]), part + 4);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        const typename S::Float scale = S::multiply(S::load_floats(scales), S::floats(x.scales[ids[m] * groups + b]));
        total[m] = S::fused(S::to_floats(S::add(sum[m][0], sum[m][1])), scale, total[m]);
      }
    }
    for (int m = 0; m < M; ++m) S::store_floats(acc + m * tile + half * lanes, total[m]);
  }
}

// `count` rows of activations, 1 to M.
template <class S, int bits, int M>
void stream_rows(const Matrix& matrix, const int64_t* rows, const Activations& x, const int32_t* index, int64_t count,
                 float* acc) {
  if constexpr (M > 1)
    if (count < M) return stream_rows<S, bits, M - 1>(matrix, rows, x, index, count, acc);
  stream<S, bits, M>(matrix, rows, x, index, acc);
}

template <class S, int bits>
void multiply_tile(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
                   int64_t count, float* out, int64_t stride) {
  constexpr int64_t tile = Panel<S>::tile;
  static_assert(tile <= kMaxTile, "callers give room for kMaxTile");
  int64_t ids[tile];  // beyond the last row: that row again, whose results nobody takes
  for (int64_t r = 0; r < tile; ++r) ids[r] = least(first + r, matrix.rows - 1);
  alignas(64) float acc[kMaxTokens * tile];
  if (count <= S::few && matrix.group * bits % (32 * S::lanes) == 0) {
    stream_rows<S, bits, S::few>(matrix, ids, x, index, count, acc);
  } else {
    memset(acc, 0, static_cast<size_t>(count * tile) * sizeof(float));
    Panel<S> panel;
    for (int64_t from = 0; from < matrix.width; from += kPanel) {
      const int64_t width = least(kPanel, matrix.width - from);
      unpack<S, bits>(matrix, ids, from, width, &panel);
      gather_groups<S>(matrix, ids, from / matrix.group, width / matrix.group, &panel);
      for (int64_t at = 0; at < count; at += S::tokens)
        multiply_rows<S, bits, S::tokens>(panel, from, width, x, index, at, least(S::tokens, count - at), acc);
    }
  }
  for (int64_t i = 0; i < count; ++i)
    memcpy(out + i * stride, acc + i * tile, static_cast<size_t>(rows) * sizeof(float));
}

template <class S>
void multiply(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
              int64_t count, float* out, int64_t stride) {
  if (matrix.bits == 4)
    multiply_tile<S, 4>(matrix, first, rows, x, index, count, out, stride);
  else
    multiply_tile<S, 8>(matrix, first, rows, x, index, count, out, stride);
}

template <class S>
constexpr moedge::Kernels make_kernels(const char* name) {
  return {name, Panel<S>::tile, quantize, multiply<S>, swiglu};
}

}  // namespace
