// The kernels, written once over an instruction set S. Each isa_*.cpp includes this with its own compiler flags.
//
// S gives  lanes           rows that one vector holds
//          tokens          rows of activations that share one pass over the unpacked weights, 4 or 8
//          few             rows of activations that are multiplied by the weights in registers: 0 or a power of two
//          middle          what is subtracted from 8-bit codes before they are multiplied (0 or 128)
//          Int, Float      vectors of int32 and float
//          transpose       a square of lanes x lanes 4-byte words
//          load_halves     as many fp16 values as float, exactly
//          load_float8     as many float8 values, the same, as the bits of float
//          load_some       floats, or bf16 values as floats, from anywhere
//          sums            of `lanes` vectors: lane i is the sum of vector i's lanes
//          dot<bits>       acc + the products of each lane's four codes with its four activations
//          dot_word<bits>  the same where all lanes have one word of activations; only where `few` is not 0
//          turn            four rows' bytes so that a lane has those of one column; which columns a vector has is the
//                          order of unpacking bytes and then pairs of bytes, within each 128 bits
//          pairs<place>    two bits of each byte, the `place`th from the lowest
//          cached          codes of a cache, `cached_middle` (0 or 128) more than they are; cached_word: four in all lanes
//          upper_digits    of integers of two digits that are not negative
//          larger          the larger one of integers; largest: of a vector's; magnitude: without the sign's bit
//          together        keys that a word of shares has, 2 or 4, and dot_shares, turn_columns: see cached.h
//          share_rows      rows of shares that are multiplied at once; alone_rows: of few
//          keys            that are scored at once
// Everything is in an anonymous namespace: two files must never share a function that was compiled for one of them.

#pragma once

#include "activations.h"

namespace {

using moedge::kMaxGroup;
using moedge::fetch;
using moedge::kAhead;
using moedge::kMaxTile;
using moedge::kMaxTokens;
using moedge::kLowerZero;
using moedge::kMostWidth;
using moedge::kRowsTogether;
using moedge::Matrix;
using moedge::zero_point;

// --- weights -----------------------------------------------------------------------------------------------------

// Columns of a tile's rows, unpacked and turned so that a row has a lane: [word][row], four codes each, in the order of
// the activations' codes. It holds whole groups, and whole vectors of each row as they lie.
template <class S>
struct Strip {
  static constexpr int64_t tile = 2 * S::lanes;
  alignas(64) uint8_t words[kMaxGroup * tile];

  static int64_t width(const Matrix& matrix) {
    const int64_t held = 4 * S::lanes * 8 / matrix.bits;
    return matrix.group > held ? matrix.group : held;
  }
};

// Scales of as many groups as a vector has lanes, [group][row] for as many rows, and what is subtracted from the codes
// where that is no constant.
template <class S>
struct Groups {
  alignas(64) float scales[S::lanes * S::lanes];
  alignas(64) int32_t zeros[S::lanes * S::lanes];
};

template <class S>
inline void load_transposed(const uint8_t* const* rows, int64_t at, typename S::Int* out) {
  typename S::Int read[S::lanes];
  for (int64_t r = 0; r < S::lanes; ++r) read[r] = S::load_bytes(rows[r] + at);
  S::transpose(read, out);
}

// `count` bytes of `lanes` rows from byte `at` on, at most a vector's, turned.
template <class S>
void load_turned(const uint8_t* const* rows, int64_t at, int64_t count, typename S::Int* out) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes;
  if (count == chunk) return load_transposed<S>(rows, at, out);
  alignas(64) uint8_t copies[lanes * chunk];
  const uint8_t* starts[lanes];
  memset(copies, 0, sizeof copies);
  for (int64_t r = 0; r < lanes; ++r) {
    memcpy(copies + r * chunk, rows[r] + at, static_cast<size_t>(count));
    starts[r] = copies + r * chunk;
  }
  load_transposed<S>(starts, 0, out);
}

// Zero points of groups `from` to `from + count` of `lanes` rows -> [group][row]: words of each row side by side, of
// which all rows take the same bits at once. One by one they cost more than one token's products.
template <class S>
void load_zeros(const Matrix& matrix, const int64_t* rows, int64_t from, int64_t count, int32_t* zeros) {
  constexpr int64_t lanes = S::lanes;
  const int bits = matrix.bits;
  const int64_t row_bytes = matrix.zero_row_bytes(), first = from * bits / 8, bytes = (count * bits + 7) / 8;
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
  const uint32_t mask = (1u << bits) - 1;
  const int32_t middle = bits == 8 ? S::middle : 0;
  for (int64_t b = 0, place = 0; b < count; ++b, place += bits) {
    const uint32_t* word = words + place / 32 * lanes;
    const int shift = static_cast<int>(place % 32);
    for (int64_t r = 0; r < lanes; ++r)
      zeros[b * lanes + r] = static_cast<int32_t>(word[r] >> shift & mask) - middle;
  }
}

// Groups `from` to `from + count` of `lanes` rows, count <= lanes.
template <class S>
void load_groups(const Matrix& matrix, const int64_t* rows, int64_t from, int64_t count, Groups<S>* groups) {
  constexpr int64_t lanes = S::lanes;
  // Behind a row's end lies the next one's beginning; behind the last row's might be the file's.
  const bool whole = rows[lanes - 1] * matrix.groups() + from + lanes <= matrix.rows * matrix.groups();
  const int64_t size = matrix.scale_size, next = lanes * matrix.groups() * size;
  typename S::Int read[lanes], turned[lanes];
  for (int64_t r = 0; r < lanes; ++r) {
    alignas(64) uint8_t copy[4 * lanes] = {};
    const uint8_t* source = matrix.scale(rows[r], from);
    fetch(source + next);
    if (matrix.zero_points) fetch(matrix.zero_points + (rows[r] + 2 * lanes) * matrix.zero_row_bytes());
    if (!whole) source = static_cast<const uint8_t*>(memcpy(copy, source, static_cast<size_t>(count * size)));
    if (size == 1)
      read[r] = S::load_float8(source);
    else
      read[r] = size == 2 ? S::as_ints(S::load_halves(source)) : S::load_bytes(source);
  }
  S::transpose(read, turned);
  for (int64_t b = 0; b < lanes; ++b) S::store_floats(groups->scales + b * lanes, S::as_floats(turned[b]));
  if (matrix.zero_points) load_zeros<S>(matrix, rows, from, count, groups->zeros);
}

// Columns `from` to `from + count` of each of the tile's rows.
template <class S, int bits>
void load_strip(const Matrix& matrix, const uint8_t* const* rows, int64_t from, int64_t count, Strip<S>* strip) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes, tile = Strip<S>::tile;
  const int64_t first = from * bits / 8, bytes = count * bits / 8;
  // The next tile while this is turned, in the order that it lies in.
  const uint8_t* ahead = rows[0] + tile * (matrix.row_bytes() + first);
  const int64_t half = bits == 4 ? half_block<S>(matrix.group) / 4 : 0;
  for (int64_t side = 0; side < tile; side += lanes) {
    uint8_t* into = strip->words + 4 * side;
    for (int64_t at = 0; at < bytes; at += chunk) {
      for (int64_t line = 0; line < lanes * chunk; line += 64, ahead += 64) fetch(ahead);
      typename S::Int words[lanes];
      load_turned<S>(rows + side, first + at, least(chunk, bytes - at), words);
      for (int64_t w = 0; w < lanes; ++w) {
        if (bits == 4) {  // the low nibbles of a block's words, then their high ones
          uint8_t* low = into + (w + (w & -half)) * 4 * tile;
          S::store_codes(low, S::low_nibbles(words[w]));
          S::store_codes(low + half * 4 * tile, S::high_nibbles(words[w]));
        } else {
          S::store_codes(into + w * 4 * tile, S::prepare(words[w]));
        }
      }
      into += lanes * (bits == 4 ? 8 : 4) * tile;
    }
  }
}

// --- products ----------------------------------------------------------------------------------------------------

// A group's integers, what is subtracted from its codes put right, times its scales: added to `total`.
template <class S>
inline typename S::Float add_group(typename S::Int sum, typename S::Float scale, typename S::Int zero,
                                   const int32_t& own_sum, const float& own_scale, typename S::Float total) {
  return S::fused(S::to_floats(S::subtract(sum, S::multiply(zero, S::ints(own_sum)))),
                  S::multiply(scale, S::floats(own_scale)), total);
}

// One group of a tile by M rows of activations: adds to acc [M][tile]. `groups` are the tile's two halves', at `among`;
// without zeros it is `zero` everywhere. Not inlined, so that the compiler has registers for nothing but this.
template <class S, int bits, int M>
__attribute__((noinline)) void multiply_group(const uint8_t* words, int64_t group, const Groups<S>* groups,
                                              int64_t among, bool zeros, int32_t zero, const Activations& x,
                                              const int64_t* ids, int64_t place, float* acc) {
  constexpr int64_t lanes = S::lanes, tile = Strip<S>::tile;
  constexpr int chains = M > 2 ? 1 : 4 / M;  // so that no dot product need wait for the last
  typename S::Int sums[M][2][chains];
  const int8_t* codes[M];
  for (int m = 0; m < M; ++m) {
    codes[m] = x.codes + ids[m] * x.width + place * group;
    for (int n = 0; n < 2; ++n)
      for (int c = 0; c < chains; ++c) sums[m][n][c] = S::ints(0);
  }
  int64_t at = 0;
  do {
    for (int c = 0; c < chains; ++c, at += 4, words += 4 * tile) {
      const typename S::Int left = S::load_codes(words), right = S::load_codes(words + 4 * lanes);
      for (int m = 0; m < M; ++m) {
        const typename S::Int own = S::ints(word_at(codes[m] + at));  // read once for both
        sums[m][0][c] = S::template dot<bits>(sums[m][0][c], left, own);
        sums[m][1][c] = S::template dot<bits>(sums[m][1][c], right, own);
      }
    }
  } while (at < group);
  for (int n = 0; n < 2; ++n) {
    const typename S::Float scale = S::load_floats(groups[n].scales + among * lanes);
    const typename S::Int less = zeros ? S::load_ints(groups[n].zeros + among * lanes) : S::ints(zero);
    for (int m = 0; m < M; ++m) {
      const int64_t own = ids[m] * x.groups + place;
      float* into = acc + m * tile + n * lanes;
      typename S::Int sum = sums[m][n][0];
      for (int c = 1; c < chains; ++c) sum = S::add(sum, sums[m][n][c]);
      S::store_floats(into, add_group<S>(sum, scale, less, x.sums[own], x.scales[own], S::load_floats(into)));
    }
  }
}

// A tile by any number of rows of activations: each strip is turned once for all of them. Adds to acc [count][tile] and
// to what is behind it.
template <class S, int bits>
void multiply_tile(const Matrix& matrix, const int64_t* rows, const Activations& x, const int64_t* ids, int64_t count,
                   int32_t zero, float* acc) {
  constexpr int64_t lanes = S::lanes, tile = Strip<S>::tile;
  const int64_t group = matrix.group, wide = Strip<S>::width(matrix);
  const uint8_t* sources[tile];
  for (int64_t r = 0; r < tile; ++r) sources[r] = matrix.codes + rows[r] * matrix.row_bytes();
  Strip<S> strip;
  Groups<S> groups[2];
  constexpr int kind = bits == 8 && S::middle ? 8 : 4;  // what is unpacked differs in its range at most
  int64_t place = 0;
  for (int64_t from = 0; from < matrix.width; from += wide) {
    const int64_t held = least(wide, matrix.width - from);
    load_strip<S, bits>(matrix, sources, from, held, &strip);
    for (int64_t at = 0; at < held; at += group, ++place) {
      if (place % lanes == 0)
        for (int64_t n = 0; n < 2; ++n)
          load_groups<S>(matrix, rows + n * lanes, place, least(lanes, matrix.groups() - place), groups + n);
      // What is left over takes the next rows too, as its form is: each is a kilobyte of code.
      for (int64_t i = 0, some = 0; i < count; i += some) {
        const auto run = [&](auto multiply) {
          multiply(strip.words + at * tile, group, groups, place % lanes, matrix.zero_points != nullptr, zero, x,
                   ids + i, place, acc + i * tile);
        };
        some = S::tokens > 4 && count - i > 6 ? S::tokens : count - i > 2 ? 4 : least(2, count - i);
        const auto most = some == 4 ? multiply_group<S, kind, 4> : multiply_group<S, kind, S::tokens>;
        const auto fewest = some == 1 ? multiply_group<S, kind, 1> : multiply_group<S, kind, 2>;
        run(some > 2 ? most : fewest);
      }
    }
  }
}

// A tile by few rows of activations: the weights stay in registers from their load to their products. Groups of whole
// pieces.
template <class S, int bits, int M>
void multiply_few(const Matrix& matrix, const int64_t* rows, const Activations& x, const int64_t* ids, int32_t zero,
                  float* acc) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes, tile = Strip<S>::tile;
  constexpr int chains = M > 4 ? 1 : 2;  // so that no dot product need wait for the last
  const int64_t bytes = matrix.row_bytes(), group_bytes = matrix.group * bits / 8;
  Groups<S> groups;
  for (int64_t side = 0; side < tile; side += lanes) {
    const uint8_t* sources[lanes];
    for (int64_t r = 0; r < lanes; ++r) sources[r] = matrix.codes + rows[side + r] * bytes;
    const bool goes_on = side + lanes == tile && matrix.next.codes;
    const uint8_t* following = goes_on ? matrix.next.codes : sources[0] + lanes * bytes;
    typename S::Float total[M];
    for (int m = 0; m < M; ++m) total[m] = S::floats(0.0f);
    for (int64_t b = 0; b < matrix.groups(); ++b) {
      const int64_t among = b % lanes * lanes;
      if (among == 0) load_groups<S>(matrix, rows + side, b, least(lanes, matrix.groups() - b), &groups);
      typename S::Int sums[M][chains];
      for (int m = 0; m < M; ++m)
        for (int c = 0; c < chains; ++c) sums[m][c] = S::ints(0);
      for (int64_t at = b * group_bytes; at < (b + 1) * group_bytes; at += chunk) {
        typename S::Int words[lanes];
        load_transposed<S>(sources, at, words);
        const int8_t* parts[M];
        for (int m = 0; m < M; ++m) parts[m] = x.codes + ids[m] * x.width + at * 8 / bits;
#pragma GCC unroll 16
        for (int64_t w = 0; w < lanes; ++w) {
          // The next rows while these are multiplied, in the order that they lie in, and not at once: they would wait.
          if (w * 64 < lanes * chunk) fetch(following + lanes * at + w * 64);
          const typename S::Int whole = bits == 8 ? S::prepare(words[w]) : words[w];
          const typename S::Int low = bits == 4 ? S::low_nibbles(words[w]) : whole;
          const int c = bits == 4 ? 0 : w % chains;
          for (int m = 0; m < M; ++m) sums[m][c] = S::template dot_word<bits>(sums[m][c], low, parts[m] + 4 * w);
          if (bits == 4) {
            const typename S::Int high = S::high_nibbles(words[w]);
            for (int m = 0; m < M; ++m)
              sums[m][chains - 1] = S::template dot_word<bits>(sums[m][chains - 1], high, parts[m] + 4 * (lanes + w));
          }
        }
      }
      const typename S::Float scale = S::load_floats(groups.scales + among);
      const typename S::Int less = matrix.zero_points ? S::load_ints(groups.zeros + among) : S::ints(zero);
      for (int m = 0; m < M; ++m) {
        const int64_t place = ids[m] * x.groups + b;
        typename S::Int sum = sums[m][0];
        for (int c = 1; c < chains; ++c) sum = S::add(sum, sums[m][c]);
        total[m] = add_group<S>(sum, scale, less, x.sums[place], x.scales[place], total[m]);
      }
    }
    for (int m = 0; m < M; ++m) S::store_floats(acc + m * tile + side, total[m]);
  }
}

// `count` rows of activations, 1 to M, by the form for as many or for the next power of two.
template <class S, int bits, int M>
void multiply_few(int64_t count, const Matrix& matrix, const int64_t* rows, const Activations& x, const int64_t* ids,
                  int32_t zero, float* acc) {
  if constexpr (M > 2)
    if (count <= M / 2) return multiply_few<S, bits, M / 2>(count, matrix, rows, x, ids, zero, acc);
  if constexpr (M > 0) multiply_few<S, bits, M>(matrix, rows, x, ids, zero, acc);
}

template <class S, int bits>
void multiply_many(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
                   int64_t count, float* out, int64_t stride) {
  constexpr int64_t tile = Strip<S>::tile, more = 3;
  static_assert(tile <= kMaxTile, "callers give room for kMaxTile");
  int64_t own[tile], ids[kMaxTokens + more];  // beyond the last row: that row again, whose results nobody takes
  for (int64_t i = 0; i < count + more; ++i) ids[i] = index ? index[least(i, count - 1)] : least(i, count - 1);
  alignas(64) float acc[(kMaxTokens + more) * tile];
  const int32_t zero = zero_point(matrix, 0, 0) - (bits == 8 ? S::middle : 0);
  for (int64_t at = 0; at < rows; at += tile) {
    for (int64_t r = 0; r < tile; ++r) own[r] = least(first + at + r, matrix.rows - 1);
    if (count <= S::few && matrix.group * bits / 8 % (4 * S::lanes) == 0) {
      multiply_few<S, bits, S::few>(count, matrix, own, x, ids, zero, acc);
    } else {
      memset(acc, 0, static_cast<size_t>((count + more) * tile) * sizeof(float));
      multiply_tile<S, bits>(matrix, own, x, ids, count, zero, acc);
    }
    for (int64_t i = 0; i < count; ++i)
      memcpy(out + i * stride + at, acc + i * tile, static_cast<size_t>(least(tile, rows - at)) * sizeof(float));
  }
}

// --- one token ---------------------------------------------------------------------------------------------------

// The integers of `lanes` groups one behind the other in memory, each a vector, then summed: one integer a lane.
template <class S, int bits, int chunks>
inline typename S::Int sum_groups(const uint8_t* codes, const uint8_t* ahead, const int8_t* x, int64_t chunks_if_many) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes;
  const int64_t count = chunks ? chunks : chunks_if_many;
  typename S::Int sums[lanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i) {
    sums[i] = S::ints(0);
    for (int64_t c = i * count; c < (i + 1) * count; ++c) {
      const typename S::Int word = S::load_bytes(codes + c * chunk);
      const int8_t* part = x + c * chunk * 8 / bits;
      fetch(ahead + c * chunk);
      sums[i] = S::template dot<bits>(sums[i], bits == 4 ? S::low_nibbles(word) : S::prepare(word), S::load_bytes(part));
      if (bits == 4) sums[i] = S::template dot<bits>(sums[i], S::high_nibbles(word), S::load_bytes(part + chunk));
    }
  }
  return S::sums(sums);
}

// Adds up each row's groups, in their order: `integers` [lanes][groups] of rows from `first`.
template <class S>
void add_groups(const Matrix& matrix, int64_t first, const int32_t* integers, const Activations& x, float* out) {
  constexpr int64_t lanes = S::lanes;
  const int64_t groups = x.groups;
  const int32_t zero = zero_point(matrix, 0, 0) - (matrix.bits == 8 ? S::middle : 0);
  int64_t rows[lanes];
  const uint8_t* sources[lanes];
  for (int64_t r = 0; r < lanes; ++r) {
    rows[r] = first + r;
    sources[r] = reinterpret_cast<const uint8_t*>(integers + r * groups);
  }
  Groups<S> some;
  typename S::Float total = S::floats(0.0f);
  for (int64_t from = 0; from < groups; from += lanes) {
    const int64_t count = least(lanes, groups - from);
    load_groups<S>(matrix, rows, from, count, &some);
    typename S::Int sums[lanes];
    load_transposed<S>(sources, 4 * from, sums);
    for (int64_t b = 0; b < count; ++b)
      total = add_group<S>(sums[b], S::load_floats(some.scales + b * lanes),
                           matrix.zero_points ? S::load_ints(some.zeros + b * lanes) : S::ints(zero), x.sums[from + b],
                           x.scales[from + b], total);
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
  const uint8_t* end = matrix.codes + (first + rows) * matrix.row_bytes();
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
      const uint8_t* ahead = codes + kAhead;
      if (matrix.next.codes && ahead >= end) ahead = matrix.next.codes + (ahead - end);
      const int64_t count = group * bits / 8 / chunk;
      S::store_ints(integers + at, sum_groups<S, bits, chunks>(codes, ahead, own + next * group, count));
      for (next += lanes; next >= groups;) next -= groups;
    }
    alignas(64) float totals[lanes];
    const int64_t fetched = matrix.next.codes && done + lanes >= rows ? lanes * groups * matrix.scale_size : 0;
    for (int64_t at = 0; at < fetched; at += 64) fetch(matrix.next.scales + at);
    add_groups<S>(matrix, start, integers, x.from(token), totals);
    const int64_t skipped = first + done - start;
    memcpy(out + done, totals + skipped, static_cast<size_t>(least(lanes - skipped, rows - done)) * sizeof *out);
  }
}

}  // namespace

#include "floats.h"
#include "cached.h"
#include "refine.h"
#include "turned.h"

namespace {

template <class S, int bits>
void multiply_bits(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
                   int64_t count, float* out, int64_t stride) {
  if (count == 1 && matrix.rows >= S::lanes && matrix.width <= kMostWidth) {
    constexpr int64_t chunk = 4 * S::lanes;
    const int64_t group_bytes = matrix.group * bits / 8;
    if (group_bytes % chunk == 0) {
      constexpr int usual = 128 * bits / 8 / chunk;  // of groups as they are exported
      const auto run = group_bytes == usual * chunk ? multiply_one<S, bits, usual> : multiply_one<S, bits, 0>;
      return run(matrix, first, rows, x, index ? index[0] : 0, out);
    }
  }
  multiply_many<S, bits>(matrix, first, rows, x, index, count, out, stride);
}

template <class S>
void multiply(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
              int64_t count, float* out, int64_t stride) {
  const auto run = matrix.bits == 4 ? multiply_bits<S, 4> : multiply_bits<S, 8>;
  run(matrix, first, rows, x, index, count, out, stride);
}

template <class S>
constexpr moedge::Kernels make_kernels(const char* name) {
  return {name, Strip<S>::tile, S::middle, quantize<S>, multiply<S>, refine<S>, multiply_turned<S>,
          multiply_floats<S>, put_query<S>, score_cached<S>, score_alone<S>,
          weigh_cached<S>, weigh_alone<S>, swiglu};
}

}  // namespace
