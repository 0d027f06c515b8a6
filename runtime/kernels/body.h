// The kernels, written once over an instruction set S. Each isa_*.cpp includes this with its own compiler flags.
//
// S gives  lanes             rows that one vector holds
//          tokens            rows of activations that share one pass over the unpacked weights
//          few               rows of activations whose products are made from the weights in registers
//          middle            what is subtracted from 8-bit codes before they are multiplied (0 or 128)
//          Int, Float        vectors of int32 and float
//          load_transposed   a square of lanes x lanes 4-byte words, transposed
//          load_halves       as many fp16 values as float, exactly
//          sums              of `lanes` vectors: lane i is the sum of vector i's lanes
//          dot<bits>         acc + the products of each lane's four codes with its four activations
//          dot_word<bits>    the same where all lanes have one word of activations
// Everything is in an anonymous namespace: two files must never share a function that was compiled for one of them.

#pragma once

#include "activations.h"

namespace {

using moedge::kMaxGroup;
using moedge::kAhead;
using moedge::kMaxTile;
using moedge::kMaxTokens;
using moedge::kMostWidth;
using moedge::Matrix;

// --- weights -----------------------------------------------------------------------------------------------------

// Columns of a tile's rows turned so that a row has a lane: [word][row], four bytes each, as packed as they lie. It
// holds whole groups, and whole vectors of each row.
template <class S>
struct Strip {
  static constexpr int64_t tile = 2 * S::lanes;
  alignas(64) uint8_t words[kMaxGroup * tile];

  static int64_t row_bytes(const Matrix& matrix) {
    const int64_t group_bytes = matrix.group * matrix.bits / 8, chunk = 4 * S::lanes;
    return group_bytes > chunk ? group_bytes : chunk;
  }
};

// Scales of as many groups as a vector has lanes, [group][row] for as many rows, and what is subtracted from the codes
// where that is no constant.
template <class S>
struct Groups {
  alignas(64) float scales[S::lanes * S::lanes];
  alignas(64) int32_t zeros[S::lanes * S::lanes];
};

inline int32_t zero_point(const Matrix& matrix, int64_t row, int64_t group) {
  if (!matrix.zero_points) return 1 << (matrix.bits - 1);
  const uint8_t* packed = matrix.zero_points + row * matrix.zero_row_bytes();
  return matrix.bits == 8 ? packed[group] : packed[group / 2] >> (group % 2 * 4) & 15;
}

// `count` bytes of `lanes` rows from byte `at` on, at most a vector's, turned. `whole`: a vector's may be read.
template <class S>
void load_turned(const uint8_t* const* rows, int64_t at, int64_t count, bool whole, typename S::Int* out) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes;
  if (count == chunk || whole) return S::load_transposed(rows, at, out);
  alignas(64) uint8_t copies[lanes * chunk];
  const uint8_t* starts[lanes];
  memset(copies, 0, sizeof copies);
  for (int64_t r = 0; r < lanes; ++r) {
    memcpy(copies + r * chunk, rows[r] + at, static_cast<size_t>(count));
    starts[r] = copies + r * chunk;
  }
  S::load_transposed(starts, 0, out);
}

// Zero points of groups `from` to `from + count` of `lanes` rows -> [group][row]: words of each row side by side, of which
// all rows take the same bits at once. One by one they cost more than one token's products.
template <class S>
void load_zeros(const Matrix& matrix, const int64_t* rows, int64_t from, int64_t count, int32_t* zeros) {
  constexpr int64_t lanes = S::lanes;
  const int64_t row_bytes = matrix.zero_row_bytes(), first = from * matrix.bits / 8;
  const int64_t bytes = (count * matrix.bits + 7) / 8;
  alignas(64) uint32_t words[lanes * lanes / 4];
  for (int64_t at = 0; at < bytes; at += 4) {
    const uint8_t* column = matrix.zero_points + first + at;
    uint32_t* into = words + at / 4 * lanes;
    // As with scales: a word may go beyond its row, but not beyond the last one.
    if (rows[lanes - 1] * row_bytes + first + at + 4 <= matrix.rows * row_bytes) {
      for (int64_t r = 0; r < lanes; ++r) memcpy(into + r, column + rows[r] * row_bytes, 4);
      continue;
    }
    memset(into, 0, lanes * 4);
    for (int64_t r = 0; r < lanes; ++r)
      memcpy(into + r, column + rows[r] * row_bytes, static_cast<size_t>(least(4, bytes - at)));
  }
  const uint32_t mask = (1u << matrix.bits) - 1;
  const int32_t middle = matrix.bits == 8 ? S::middle : 0;
  for (int64_t b = 0; b < count; ++b) {
    const uint32_t* word = words + b * matrix.bits / 32 * lanes;
    const int shift = static_cast<int>(b * matrix.bits % 32);
    for (int64_t r = 0; r < lanes; ++r)
      zeros[b * lanes + r] = static_cast<int32_t>(word[r] >> shift & mask) - middle;
  }
}

// `count` fp16 scales of `lanes` rows as float, which `sources` then points to: they are in `out` until they are turned.
template <class S>
void widen_scales(const uint8_t** sources, int64_t count, bool whole, float* out) {
  for (int64_t r = 0; r < S::lanes; ++r, out += S::lanes) {
    uint16_t copy[S::lanes] = {};
    if (!whole) memcpy(copy, sources[r], static_cast<size_t>(2 * count));
    S::store_floats(out, S::load_halves(whole ? sources[r] : reinterpret_cast<const uint8_t*>(copy)));
    sources[r] = reinterpret_cast<const uint8_t*>(out);
  }
}

// Groups `from` to `from + count` of `lanes` rows, count <= lanes.
template <class S>
void load_groups(const Matrix& matrix, const int64_t* rows, int64_t from, int64_t count, Groups<S>* groups) {
  constexpr int64_t lanes = S::lanes;
  const uint8_t* sources[lanes];
  for (int64_t r = 0; r < lanes; ++r) {  // and what is next
    sources[r] = matrix.scale(rows[r], from);
    __builtin_prefetch(sources[r] + lanes * matrix.groups() * matrix.scale_bytes());
    if (matrix.zero_points) __builtin_prefetch(matrix.zero_points + (rows[r] + 2 * lanes) * matrix.zero_row_bytes());
  }
  typename S::Int turned[lanes];
  // Behind a row's end lies the next one's beginning; behind the last row's might be the file's.
  bool whole = rows[lanes - 1] * matrix.groups() + from + lanes <= matrix.rows * matrix.groups();
  if (matrix.half) {
    widen_scales<S>(sources, count, whole, groups->scales);
    whole = true;
  }
  load_turned<S>(sources, 0, 4 * count, whole, turned);
  for (int64_t b = 0; b < lanes; ++b) S::store_floats(groups->scales + b * lanes, S::as_floats(turned[b]));
  if (matrix.zero_points) load_zeros<S>(matrix, rows, from, count, groups->zeros);
}

// Bytes `from` to `from + count` of each of the tile's rows.
template <class S>
void load_strip(const Matrix& matrix, const int64_t* rows, int64_t from, int64_t count, Strip<S>* strip) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes, tile = Strip<S>::tile;
  const int64_t whole = matrix.row_bytes(), wide = Strip<S>::row_bytes(matrix);
  // What is needed soon, while this is turned: the rows' next columns, or behind their end the next tile's first.
  const int64_t steps = divide_up(kAhead, wide * tile) * wide;
  const int64_t ahead = from + steps < whole ? steps : tile * whole + least(from + steps - whole, whole - wide) - from;
  for (int64_t side = 0; side < tile; side += lanes) {
    const uint8_t* sources[lanes];
    for (int64_t r = 0; r < lanes; ++r) sources[r] = matrix.codes + rows[side + r] * whole + from;
    for (int64_t at = 0; at < count; at += chunk) {
      typename S::Int words[lanes];
      load_turned<S>(sources, at, least(chunk, count - at), false, words);
      for (int64_t r = 0; r < lanes; ++r) __builtin_prefetch(sources[r] + at + ahead, 0, 2);
      for (int64_t w = 0; w < lanes; ++w) S::store_codes(strip->words + (at + 4 * w) * tile + 4 * side, words[w]);
    }
  }
}

// --- products ----------------------------------------------------------------------------------------------------

// Adds the products of four columns of a tile, unpacked, with M rows of activations from column `at` on.
template <class S, int bits, int M>
inline __attribute__((always_inline)) void add_products(typename S::Int left, typename S::Int right,
                                                        const int8_t* const* x, int64_t at,
                                                        typename S::Int (&sums)[M][2]) {
  for (int m = 0; m < M; ++m) {
    const typename S::Int own = S::ints(word_at(x[m] + at));  // read once for both
    sums[m][0] = S::template dot<bits>(sums[m][0], left, own);
    sums[m][1] = S::template dot<bits>(sums[m][1], right, own);
  }
}

// A group's integers, what is subtracted from its codes put right, times its scales: added to `total`.
template <class S>
inline typename S::Float add_group(typename S::Int sum, const float* scales, const int32_t* zeros, int32_t zero,
                                   int32_t own_sum, float own_scale, typename S::Float total) {
  const typename S::Int less = zeros ? S::multiply(S::load_ints(zeros), S::ints(-own_sum)) : S::ints(-zero * own_sum);
  const typename S::Float scale = S::multiply(S::load_floats(scales), S::floats(own_scale));
  return S::fused(S::to_floats(S::add(sum, less)), scale, total);
}

// One group of a tile by M rows of activations: adds to acc [M][tile]. `groups` are the tile's two halves', at `among`;
// null zeros: `zero` everywhere. Not inlined, so that the compiler has registers for nothing but this.
template <class S, int bits, int M>
__attribute__((noinline)) void multiply_group(const uint8_t* words, int64_t group, const Groups<S>* groups,
                                              int64_t among, bool zeros, int32_t zero, const Activations& x,
                                              const int64_t* ids, int64_t place, float* acc) {
  constexpr int64_t lanes = S::lanes, tile = Strip<S>::tile;
  typename S::Int sums[M][2];
  const int8_t* codes[M];
  for (int m = 0; m < M; ++m) {
    codes[m] = x.codes + ids[m] * x.width + place * group;
    for (int n = 0; n < 2; ++n) sums[m][n] = S::ints(0);
  }
  if (bits == 4) {
    const int64_t half = half_block<S>(group);
    for (int64_t block = 0; block < group; block += 2 * half) {
      for (int64_t at = block; at < block + half; at += 4, words += 4 * tile) {
        const typename S::Int left = S::load_codes(words), right = S::load_codes(words + 4 * lanes);
        add_products<S, bits, M>(S::low_nibbles(left), S::low_nibbles(right), codes, at, sums);
        add_products<S, bits, M>(S::high_nibbles(left), S::high_nibbles(right), codes, at + half, sums);
      }
    }
  } else {
    for (int64_t at = 0; at < group; at += 4, words += 4 * tile)
      add_products<S, bits, M>(S::prepare(S::load_codes(words)), S::prepare(S::load_codes(words + 4 * lanes)), codes,
                               at, sums);
  }
  for (int m = 0; m < M; ++m) {
    const int64_t at = ids[m] * x.groups + place;
    for (int n = 0; n < 2; ++n) {
      float* into = acc + m * tile + n * lanes;
      const float* scales = groups[n].scales + among * lanes;
      S::store_floats(into, add_group<S>(sums[m][n], scales, zeros ? groups[n].zeros + among * lanes : nullptr, zero,
                                         x.sums[at], x.scales[at], S::load_floats(into)));
    }
  }
}

// `count` rows of activations, 1 to M. An odd count takes the next row too, as those after it do for few: each form is
// kilobytes of code.
template <class S, int bits, int M>
void multiply_some(int64_t count, const uint8_t* words, int64_t group, const Groups<S>* groups, int64_t among,
                   bool zeros, int32_t zero, const Activations& x, const int64_t* ids, int64_t place, float* acc) {
  constexpr int fewer = M > 2 ? M - 2 : 1;
  if constexpr (M > 1)
    if (count <= fewer)
      return multiply_some<S, bits, fewer>(count, words, group, groups, among, zeros, zero, x, ids, place, acc);
  multiply_group<S, bits, M>(words, group, groups, among, zeros, zero, x, ids, place, acc);
}

// A tile by any number of rows of activations: each strip is turned once for all of them.
template <class S, int bits>
void multiply_many(const Matrix& matrix, const int64_t* rows, const Activations& x, const int64_t* ids, int64_t count,
                   int32_t zero, float* acc) {
  constexpr int64_t lanes = S::lanes, tile = Strip<S>::tile;
  memset(acc, 0, static_cast<size_t>((count + 1) * tile) * sizeof(float));
  Strip<S> strip;
  Groups<S> groups[2];
  const int64_t group_bytes = matrix.group * bits / 8, wide = Strip<S>::row_bytes(matrix);
  int64_t place = 0;
  for (int64_t from = 0; from < matrix.row_bytes(); from += wide) {
    const int64_t held = least(wide, matrix.row_bytes() - from);
    load_strip<S>(matrix, rows, from, held, &strip);
    for (int64_t at = 0; at < held; at += group_bytes, ++place) {
      if (place % lanes == 0)
        for (int64_t n = 0; n < 2; ++n)
          load_groups<S>(matrix, rows + n * lanes, place, least(lanes, matrix.groups() - place), groups + n);
      for (int64_t i = 0; i < count; i += S::tokens)
        multiply_some<S, bits, S::tokens>(least(S::tokens, count - i), strip.words + at * tile, matrix.group, groups,
                                          place % lanes, matrix.zero_points != nullptr, zero, x, ids + i, place,
                                          acc + i * tile);
    }
  }
}

// A tile by few rows of activations: the weights stay in registers from their load to their products. Groups of whole
// chunks.
template <class S, int bits, int M>
void multiply_few(const Matrix& matrix, const int64_t* rows, const Activations& x, const int64_t* ids, int32_t zero,
                  float* acc) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes, tile = Strip<S>::tile;
  const int64_t bytes = matrix.row_bytes(), group_bytes = matrix.group * bits / 8;
  Groups<S> groups;
  for (int64_t side = 0; side < tile; side += lanes) {
    const uint8_t* sources[lanes];
    for (int64_t r = 0; r < lanes; ++r) sources[r] = matrix.codes + rows[side + r] * bytes;
    typename S::Float total[M];
    for (int m = 0; m < M; ++m) total[m] = S::floats(0.0f);
    for (int64_t b = 0; b < matrix.groups(); ++b) {
      const int64_t among = b % lanes * lanes;
      if (among == 0) load_groups<S>(matrix, rows + side, b, least(lanes, matrix.groups() - b), &groups);
      // Where there are few, two sums for each, so that one dot product need not wait for the last.
      constexpr int chains = M > 4 ? 1 : 2;
      typename S::Int sums[M][chains];
      for (int m = 0; m < M; ++m)
        for (int c = 0; c < chains; ++c) sums[m][c] = S::ints(0);
      for (int64_t at = b * group_bytes; at < (b + 1) * group_bytes; at += chunk) {
        typename S::Int words[lanes];
        S::load_transposed(sources, at, words);
        const int8_t* parts[M];
        for (int m = 0; m < M; ++m) parts[m] = x.codes + ids[m] * x.width + at * 8 / bits;
#pragma GCC unroll 16
        for (int64_t w = 0; w < lanes; ++w) {
          // The next rows while these are multiplied, in the order that they lie in, and not at once: they would wait.
          __builtin_prefetch(sources[0] + lanes * (bytes + at) + w * chunk);
          const typename S::Int low = bits == 4 ? S::low_nibbles(words[w]) : S::prepare(words[w]);
          const int own = bits == 4 ? 0 : w % chains;
          for (int m = 0; m < M; ++m) sums[m][own] = S::template dot_word<bits>(sums[m][own], low, parts[m] + 4 * w);
          if (bits == 4) {
            const typename S::Int high = S::high_nibbles(words[w]);
            for (int m = 0; m < M; ++m)
              sums[m][chains - 1] = S::template dot_word<bits>(sums[m][chains - 1], high, parts[m] + 4 * w + chunk);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        const int64_t at = ids[m] * x.groups + b;
        const typename S::Int sum = chains == 2 ? S::add(sums[m][0], sums[m][chains - 1]) : sums[m][0];
        total[m] = add_group<S>(sum, groups.scales + among, matrix.zero_points ? groups.zeros + among : nullptr, zero,
                                x.sums[at], x.scales[at], total[m]);
      }
    }
    for (int m = 0; m < M; ++m) S::store_floats(acc + m * tile + side, total[m]);
  }
}

// `count` rows of activations, 1 to M; as `multiply_some`, and a single row has a form where `multiply_one` has none.
template <class S, int bits, int M>
void multiply_few(int64_t count, const Matrix& matrix, const int64_t* rows, const Activations& x, const int64_t* ids,
                  int32_t zero, float* acc) {
  constexpr int fewer = M > 2 ? M - 2 : 1;
  if constexpr (M > 2 || (M == 2 && S::lanes <= 4))
    if (count <= fewer) return multiply_few<S, bits, fewer>(count, matrix, rows, x, ids, zero, acc);
  multiply_few<S, bits, M>(matrix, rows, x, ids, zero, acc);
}

template <class S, int bits>
void multiply_tile(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
                   int64_t count, float* out, int64_t stride) {
  constexpr int64_t tile = Strip<S>::tile;
  static_assert(tile <= kMaxTile, "callers give room for kMaxTile");
  static_assert(S::tokens % 2 == 0 && (S::few == 1 || S::few % 2 == 0), "an odd count is made even");
  int64_t own[tile], ids[kMaxTokens + 1];  // beyond the last row: that row again, whose results nobody takes
  for (int64_t r = 0; r < tile; ++r) own[r] = least(first + r, matrix.rows - 1);
  for (int64_t i = 0; i <= count; ++i) ids[i] = index ? index[least(i, count - 1)] : least(i, count - 1);
  alignas(64) float acc[(kMaxTokens + 1) * tile];
  const int32_t zero = zero_point(matrix, 0, 0) - (bits == 8 ? S::middle : 0);
  if (count <= S::few && matrix.group * bits % (32 * S::lanes) == 0)
    multiply_few<S, bits, S::few>(count, matrix, own, x, ids, zero, acc);
  else
    multiply_many<S, bits>(matrix, own, x, ids, count, zero, acc);
  for (int64_t i = 0; i < count; ++i)
    memcpy(out + i * stride, acc + i * tile, static_cast<size_t>(rows) * sizeof(float));
}

// --- one token ---------------------------------------------------------------------------------------------------

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
      __builtin_prefetch(codes + c * chunk + kAhead / 2);
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
  const float* own_scales = x.scales + token * groups;
  const int32_t* own_sums = x.sums + token * groups;
  const int32_t zero = zero_point(matrix, 0, 0) - (matrix.bits == 8 ? S::middle : 0);
  int64_t rows[lanes];
  for (int64_t r = 0; r < lanes; ++r) rows[r] = first + r;
  Groups<S> some;
  typename S::Float total = S::floats(0.0f);
  for (int64_t from = 0; from < groups; from += lanes) {
    const uint8_t* sources[lanes];
    const int64_t count = least(lanes, groups - from);
    load_groups<S>(matrix, rows, from, count, &some);
    for (int64_t r = 0; r < lanes; ++r) sources[r] = reinterpret_cast<const uint8_t*>(integers + r * groups + from);
    typename S::Int sums[lanes];
    S::load_transposed(sources, 0, sums);
    for (int64_t b = 0; b < count; ++b)
      total = add_group<S>(sums[b], some.scales + b * lanes, matrix.zero_points ? some.zeros + b * lanes : nullptr,
                           zero, own_sums[from + b], own_scales[from + b], total);
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
  // The row again and again, so that any `lanes` groups of consecutive rows have theirs one behind the other: for those
  // that begin in the middle of a row.
  alignas(64) int8_t again[kMostWidth + lanes * kMaxGroup];
  alignas(64) int32_t integers[kMostWidth * bits / 32 + lanes];  // [row][group], and room to read on
  const int8_t* own = x.codes + token * x.width;
  if (groups % lanes != 0) {
    for (int64_t at = 0; at < x.width + lanes * group; at += x.width)
      memcpy(again + at, own, static_cast<size_t>(least(x.width, x.width + lanes * group - at)));
    own = again;
  }
  for (int64_t done = 0; done < rows; done += lanes) {
    const int64_t start = least(first + done, matrix.rows - lanes);  // at the end some rows are computed once more
    const uint8_t* codes = matrix.codes + start * matrix.row_bytes();
    int64_t next = 0;
    for (int64_t at = 0; at < lanes * groups; at += lanes, codes += lanes * group * bits / 8) {
      S::store_ints(integers + at, sum_groups<S, bits, chunks>(codes, own + next * group, group * bits / 8 / chunk));
      for (next += lanes; next >= groups;) next -= groups;
    }
    alignas(64) float totals[lanes];
    add_groups<S>(matrix, start, integers, x, token, totals);
    const int64_t skipped = first + done - start;
    memcpy(out + done, totals + skipped, static_cast<size_t>(least(lanes - skipped, rows - done)) * sizeof *out);
  }
}

template <class S, int bits>
void multiply_bits(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
                   int64_t count, float* out, int64_t stride) {
  constexpr int64_t tile = Strip<S>::tile, chunk = 4 * S::lanes;
  const int64_t group_bytes = matrix.group * bits / 8;
  const bool whole = group_bytes % chunk == 0;
  if (S::lanes > 4 && count == 1 && whole && matrix.rows >= S::lanes && matrix.width <= kMostWidth) {
    constexpr int usual = 128 * bits / 8 / chunk;  // of groups as they are exported
    const auto run = group_bytes == usual * chunk ? multiply_one<S, bits, usual> : multiply_one<S, bits, 0>;
    return run(matrix, first, rows, x, index ? index[0] : 0, out);
  }
  for (int64_t at = 0; at < rows; at += tile)
    multiply_tile<S, bits>(matrix, first + at, least(tile, rows - at), x, index, count, out + at, stride);
}

}  // namespace

#include "six_bits.h"

namespace {

template <class S>
void multiply(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
              int64_t count, float* out, int64_t stride) {
  const auto wide = matrix.bits == 6 ? multiply_six_bits<S> : multiply_bits<S, 8>;
  const auto run = matrix.bits == 4 ? multiply_bits<S, 4> : wide;
  run(matrix, first, rows, x, index, count, out, stride);
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
      __builtin_prefetch(row + at + v * lanes + kAhead / 4);
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
  return {name, Strip<S>::tile, quantize<S>, multiply<S>, multiply_floats<S>, swiglu};
}

}  // namespace
