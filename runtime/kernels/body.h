// The kernels, written once over an instruction set S. Each isa_*.cpp includes this with its own compiler flags.
//
// S gives  lanes             rows that one vector holds
//          tokens            rows of activations that share one pass over the unpacked weights
//          few               rows of activations for which the weights are not unpacked to memory
//          middle            what is subtracted from 8-bit codes before they are multiplied (0 or 128)
//          Int, Float        vectors of int32 and float
//          load_transposed   a square of lanes x lanes 4-byte words, transposed
//          sums              of `lanes` vectors: lane i is the sum of vector i's lanes
//          dot<bits>         acc + the products of each lane's four codes with its four activations
// Everything is in an anonymous namespace: two files must never share a function that was compiled for one of them.

#pragma once

#include "activations.h"

namespace {

using moedge::kMaxGroup;
using moedge::kMaxTile;
using moedge::kMaxTokens;
using moedge::Matrix;

constexpr int64_t kPanel = 512;  // columns unpacked at once: with a tile of 32 rows, half of a first-level cache
constexpr int64_t kMinGroup = 16;

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

// A word of each row, byte `at` of its columns, to the places that its activations have.
template <class S, int bits>
inline void unpack_word(typename S::Int word, int64_t at, int64_t half, uint8_t* codes) {
  constexpr int64_t tile = Panel<S>::tile;
  if (bits == 4) {
    const int64_t low = 2 * at - (at & (half - 1));  // two halves for each block before, and what is before in its own
    S::store_codes(codes + low * tile, S::low_nibbles(word));
    S::store_codes(codes + (low + half) * tile, S::high_nibbles(word));
  } else {
    S::store_codes(codes + at * tile, S::prepare(word));
  }
}

// Columns `from` to `from + width` of the tile's rows.
template <class S, int bits>
void unpack(const Matrix& matrix, const int64_t* rows, int64_t from, int64_t width, Panel<S>* panel) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes;
  const int64_t bytes = width * bits / 8, half = half_block<S>(matrix.group);
  // What is needed next, while this is unpacked: the rows' next columns, or the next tile's first.
  const int64_t ahead = from + width < matrix.width ? bytes : Panel<S>::tile * matrix.row_bytes() - from * bits / 8;
  for (int side = 0; side < 2; ++side) {
    const uint8_t* sources[lanes];
    for (int64_t r = 0; r < lanes; ++r)
      sources[r] = matrix.codes + rows[side * lanes + r] * matrix.row_bytes() + from * bits / 8;
    uint8_t* into = panel->codes + side * 4 * lanes;
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
        if (w * 4 < held) unpack_word<S, bits>(words[w], at + 4 * w, half, into);
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
        sum[c][m][0] = S::template dot<bits>(sum[c][m][0], left, S::ints(word_at(x[m] + at + 4 * c)));
        sum[c][m][1] = S::template dot<bits>(sum[c][m][1], right, S::ints(word_at(x[m] + at + 4 * c)));
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
            const int8_t* part = x.codes + ids[m] * x.width + at + 4 * w;
            const int place = bits == 4 ? 0 : w % 2;
            sum[m][place] = S::template dot<bits>(sum[m][place], low, S::ints(word_at(part)));
            if (bits == 4) sum[m][1] = S::template dot<bits>(sum[m][1], S::high_nibbles(words[w]), S::ints(word_at(part + 4 * lanes)));
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

// --- one token ---------------------------------------------------------------------------------------------------

constexpr int64_t kMostWidth = 32768;  // of a matrix, for `multiply_one`
constexpr int64_t kAhead = 8192;       // bytes from what is multiplied to what is fetched

// The integers of `lanes` groups one behind the other in memory, each a vector, then summed: one integer a lane.
template <class S, int bits, int chunks>
inline typename S::Int sum_groups(const uint8_t* codes, const int8_t* x, int64_t chunks_if_many) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes;
  const int64_t count = chunks ? chunks : chunks_if_many;
  typename S::Int sums[lanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i) {
    sums[i] = S::ints(0);
    for (int64_t c = i * count; c < (i + 1) * count; ++c) {
      const typename S::Int word = S::load_bytes(codes + c * chunk);
      const int8_t* part = x + c * chunk * 8 / bits;
      __builtin_prefetch(codes + c * chunk + kAhead);
      sums[i] = S::template dot<bits>(sums[i], bits == 4 ? S::low_nibbles(word) : S::prepare(word), S::load_bytes(part));
      if (bits == 4) sums[i] = S::template dot<bits>(sums[i], S::high_nibbles(word), S::load_bytes(part + chunk));
    }
  }
  return S::sums(sums);
}

// Adds up each row's groups in their order: `integers` [lanes][groups] of rows from `first`.
template <class S>
void add_groups(const Matrix& matrix, int64_t first, const int32_t* integers, const Activations& x, int64_t token,
                float* out) {
  constexpr int64_t lanes = S::lanes;
  const int64_t groups = x.groups;
  const float* scales = matrix.scales + first * groups;
  const float* own_scales = x.scales + token * groups;
  const int32_t* own_sums = x.sums + token * groups;
  const int32_t middle = matrix.bits == 8 ? S::middle : 0;
  alignas(64) int32_t zeros[lanes];
  for (int64_t r = 0; r < lanes; ++r) zeros[r] = zero_point(matrix, 0, 0) - middle;
  typename S::Float total = S::floats(0.0f);
  for (int64_t from = 0; from < groups; from += lanes) {
    const uint8_t *sum_rows[lanes], *scale_rows[lanes];
    alignas(64) float tail[lanes * lanes];
    const int64_t count = least(lanes, groups - from);
    for (int64_t r = 0; r < lanes; ++r) {
      sum_rows[r] = reinterpret_cast<const uint8_t*>(integers + r * groups + from);
      scale_rows[r] = reinterpret_cast<const uint8_t*>(scales + r * groups + from);
      __builtin_prefetch(scale_rows[r] + lanes * groups * 4);
    }
    if (count < lanes) {  // reading on might leave the file
      for (int64_t r = 0; r < lanes; ++r) {
        memcpy(tail + r * lanes, scale_rows[r], static_cast<size_t>(count) * sizeof *tail);
        scale_rows[r] = reinterpret_cast<const uint8_t*>(tail + r * lanes);
      }
    }
    typename S::Int sum[lanes], scale[lanes];
    S::load_transposed(sum_rows, 0, sum);
    S::load_transposed(scale_rows, 0, scale);
    for (int64_t b = 0; b < count; ++b) {
      if (matrix.zero_points)
        for (int64_t r = 0; r < lanes; ++r) zeros[r] = zero_point(matrix, first + r, from + b) - middle;
      const typename S::Int exact =
          S::add(sum[b], S::multiply(S::load_ints(zeros), S::ints(-own_sums[from + b])));
      const typename S::Float both = S::multiply(S::as_floats(scale[b]), S::floats(own_scales[from + b]));
      total = S::fused(S::to_floats(exact), both, total);
    }
  }
  S::store_floats(out, total);
}

// Rows by one row of activations. The weights are read as they lie, row by row, which is what memory is fastest at; what
// is turned to one row a lane are the sums and the scales, one of each a group. Groups of whole chunks, `lanes` rows or
// more in the matrix, width at most kMostWidth.
template <class S, int bits, int chunks>
void multiply_one(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, int64_t token, float* out) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes;
  const int64_t groups = x.groups, group = x.width / groups;
  // The row again and again, so that any `lanes` groups of consecutive rows have theirs one behind the other.
  alignas(64) int8_t again[kMostWidth + lanes * kMaxGroup];
  alignas(64) int32_t integers[kMostWidth * bits / 32 + lanes];  // [row][group], and room to read on
  const int8_t* own = x.codes + token * x.width;
  for (int64_t at = 0; at < x.width + lanes * group; at += x.width)
    memcpy(again + at, own, static_cast<size_t>(least(x.width, x.width + lanes * group - at)));
  for (int64_t done = 0; done < rows; done += lanes) {
    const int64_t start = least(first + done, matrix.rows - lanes);  // at the end some rows are computed once more
    const uint8_t* codes = matrix.codes + start * matrix.row_bytes();
    int64_t next = 0;
    for (int64_t at = 0; at < lanes * groups; at += lanes, codes += lanes * group * bits / 8) {
      S::store_ints(integers + at, sum_groups<S, bits, chunks>(codes, again + next * group, group * bits / 8 / chunk));
      for (next += lanes; next >= groups;) next -= groups;
    }
    alignas(64) float totals[lanes];
    add_groups<S>(matrix, start, integers, x, token, totals);
    const int64_t skipped = first + done - start;
    memcpy(out + done, totals + skipped, static_cast<size_t>(least(lanes - skipped, rows - done)) * sizeof *out);
  }
}

template <class S, int bits>
void multiply_tile(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
                   int64_t count, float* out, int64_t stride) {
  constexpr int64_t tile = Panel<S>::tile;
  static_assert(tile <= kMaxTile, "callers give room for kMaxTile");
  int64_t ids[tile];  // beyond the last row: that row again, whose results nobody takes
  for (int64_t r = 0; r < tile; ++r) ids[r] = least(first + r, matrix.rows - 1);
  alignas(64) float acc[kMaxTokens * tile];
  if (count > 1 && count <= S::few && matrix.group * bits % (32 * S::lanes) == 0) {
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

template <class S, int bits>
void multiply_bits(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
                   int64_t count, float* out, int64_t stride) {
  constexpr int64_t tile = Panel<S>::tile, chunk = 4 * S::lanes;
  const int64_t group_bytes = matrix.group * bits / 8;
  const bool whole = group_bytes % chunk == 0;
  if (S::few > 1 && count == 1 && whole && matrix.rows >= S::lanes && matrix.width <= kMostWidth) {
    const auto run = group_bytes == chunk       ? multiply_one<S, bits, 1>
                     : group_bytes == 2 * chunk ? multiply_one<S, bits, 2>
                                                : multiply_one<S, bits, 0>;
    return run(matrix, first, rows, x, index ? index[0] : 0, out);
  }
  for (int64_t at = 0; at < rows; at += tile)
    multiply_tile<S, bits>(matrix, first + at, least(tile, rows - at), x, index, count, out + at, stride);
}

template <class S>
void multiply(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
              int64_t count, float* out, int64_t stride) {
  (matrix.bits == 4 ? multiply_bits<S, 4> : multiply_bits<S, 8>)(matrix, first, rows, x, index, count, out, stride);
}

// --- products in float -------------------------------------------------------------------------------------------

constexpr int64_t kSums = 64;  // that run side by side, whatever a vector holds

inline float add_halves(float* sums) {
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// A row of the matrix by M rows of x.
template <class S, int M>
void dot_floats(const float* row, int64_t width, const float* x, float* out, int64_t stride) {
  constexpr int64_t lanes = S::lanes, vectors = kSums / lanes;
  typename S::Float sums[M][vectors];
  for (int m = 0; m < M; ++m)
    for (int64_t v = 0; v < vectors; ++v) sums[m][v] = S::floats(0.0f);
  int64_t at = 0;
  for (; at + kSums <= width; at += kSums)
    for (int64_t v = 0; v < vectors; ++v) {
      const typename S::Float own = S::load_some(row + at + v * lanes);
      for (int m = 0; m < M; ++m)
        sums[m][v] = S::add(sums[m][v], S::multiply(own, S::load_some(x + m * width + at + v * lanes)));
    }
  for (int m = 0; m < M; ++m) {
    alignas(64) float all[kSums];
    for (int64_t v = 0; v < vectors; ++v) S::store_floats(all + v * lanes, sums[m][v]);
    for (int64_t i = at; i < width; ++i) all[i - at] += row[i] * x[m * width + i];
    out[m * stride] = add_halves(all);
  }
}

template <class S>
void multiply_floats(const float* matrix, int64_t rows, int64_t width, const float* x, int64_t count, float* out,
                     int64_t stride) {
  constexpr int M = S::lanes == 16 ? 4 : 1;  // as many as registers hold the sums of
  int64_t i = 0;
  for (; i + M <= count; i += M)
    for (int64_t r = 0; r < rows; ++r) dot_floats<S, M>(matrix + r * width, width, x + i * width, out + i * stride + r, stride);
  for (; i < count; ++i)
    for (int64_t r = 0; r < rows; ++r) dot_floats<S, 1>(matrix + r * width, width, x + i * width, out + i * stride + r, stride);
}

template <class S>
constexpr moedge::Kernels make_kernels(const char* name) {
  return {name, Panel<S>::tile, quantize<S>, multiply<S>, multiply_floats<S>, swiglu};
}

}  // namespace
