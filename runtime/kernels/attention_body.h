// The kernels of attention, written once over an instruction set S. Each attention_*.cpp includes this with its own
// compiler flags.
//
// S gives  lanes            floats of a vector
//          alone            vectors of a tile of a product of one row
//          few, wide        rows and vectors of one of up to twice as many rows
//          rows, slim       of one of more: its sums stay in registers
//          across           vectors of rows that share a pass over keys
//          Float            a vector of floats
//          larger, smaller  a if it is larger (smaller) than b, else b: of a NaN in b, b
//          power            2^n for what adding kRound made of n
//          load_half, load_bytes (signed), store_half, transpose (a square of vectors, in place)

#pragma once

#include <math.h>
#include <string.h>

#include "attention.h"

namespace {

using moedge::divide_up;
using moedge::Element;
using moedge::fetch;
using moedge::kAhead;
using moedge::kFewRows;
using moedge::kPanelKeys;
using moedge::kVector;
using moedge::least;
using moedge::Part;
using moedge::Rows;

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a rounded integer in the low bits
constexpr int32_t kRoundBits = 0x4b400000;
constexpr int64_t kWideRow = 256;

// `count` elements kAhead bytes on; at least one line, so that no loop is compiled twice, with and without.
template <typename T>
inline void fetch_ahead(const T* from, int64_t count) {
  constexpr int64_t ahead = kAhead / static_cast<int64_t>(sizeof(T)), line = 64 / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  do fetch(from + ahead + i);
  while ((i += line) < count);
}

template <class S>
inline typename S::Float load_any(const float* from) { return S::load(from); }
template <class S>
inline typename S::Float load_any(const uint16_t* from) { return S::load_half(from); }

// A matrix that is read by whole vectors: of floats, or of a cache's halves.
template <class S, typename T>
struct Stored {
  using Element = T;
  const T* from;
  int64_t stride;

  typename S::Float load(int64_t row, int64_t column) const { return load_any<S>(from + row * stride + column); }
  void fetch(int64_t row, int64_t column, int64_t count) const { fetch_ahead(from + row * stride + column, count); }
};

// Calls run with rows of a cache as such a matrix.
template <class S, typename Run>
void with_rows(const Rows& rows, const Run& run) {
  if (rows.element == Element::kFloat)
    run(Stored<S, float>{static_cast<const float*>(rows.from), rows.stride});
  else
    run(Stored<S, uint16_t>{static_cast<const uint16_t*>(rows.from), rows.stride});
}

// --- products ----------------------------------------------------------------------------------------------------

// From column `at` of b on, 1 to M rows; of each row of b `fetched` columns are fetched ahead. One form for all counts of rows: the last row stands in for those that are not there.
template <class S, class E, int M, int N>
__attribute__((noinline)) void multiply_tile(const float* a, int64_t a_stride, int64_t rows, const E& from, int64_t at,
                                             int64_t depth, int64_t fetched, float* c, int64_t c_stride) {
  const E b = from;
  const float* row[M];
  for (int m = 0; m < M; ++m) row[m] = a + least(m, rows - 1) * a_stride;
  typename S::Float sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = S::floats(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    typename S::Float column[N];
    for (int n = 0; n < N; ++n) column[n] = b.load(k, at + n * S::lanes);
    b.fetch(k, at, fetched);
    for (int m = 0; m < M; ++m) {
      const typename S::Float one = S::floats(row[m][k]);
      for (int n = 0; n < N; ++n) sum[m][n] = S::fused(one, column[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M && m < rows; ++m)
    for (int n = 0; n < N; ++n) S::store(c + m * c_stride + at + n * S::lanes, sum[m][n]);
}

// Columns in tiles of N vectors, what is left in narrower ones; rows in tiles of at most M, alike in size. The first
// tile fetches `fetched` columns, those of the first rows beside it `later`.
template <class S, class E, int M, int N>
void multiply_columns(const float* a, int64_t a_stride, int64_t rows, const E& b, int64_t at, int64_t depth,
                      int64_t columns, int64_t fetched, int64_t later, float* c, int64_t c_stride) {
  constexpr int64_t wide = N * S::lanes;
  const int64_t some = divide_up(rows, divide_up(rows, M));
  for (; at + wide <= columns; at += wide, fetched = later)
    for (int64_t r = 0, now = fetched; r < rows; r += some, now = 0)
      multiply_tile<S, E, M, N>(a + r * a_stride, a_stride, least(some, rows - r), b, at, depth, now, c + r * c_stride,
                                c_stride);
  if constexpr (wide > kVector)
    if (at < columns)
      multiply_columns<S, E, M, M == 1 ? N / 2 : kVector / S::lanes>(a, a_stride, rows, b, at, depth, columns, fetched,
                                                                     later, c, c_stride);
}

template <class S, class E>
void multiply_any(const float* a, int64_t a_stride, int64_t rows, const E& b, int64_t depth, int64_t columns, float* c,
                  int64_t c_stride) {
  // Of wide rows each tile its own: the keys that they are part of were in the cache just before.
  const int64_t own = 2 * kVector, later = rows <= moedge::kSomeRows && columns > kWideRow ? own : 0;
  const int64_t fetched = rows > moedge::kSomeRows ? 0 : later ? later : columns;
  if (rows == 1)
    multiply_columns<S, E, 1, S::alone>(a, a_stride, rows, b, 0, depth, columns, fetched, later, c, c_stride);
  else if (rows <= 2 * S::few)
    multiply_columns<S, E, S::few, S::wide>(a, a_stride, rows, b, 0, depth, columns, fetched, later, c, c_stride);
  else if (rows > 0)
    multiply_columns<S, E, S::rows, S::slim>(a, a_stride, rows, b, 0, depth, columns, fetched, later, c, c_stride);
}

template <class S>
void multiply(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth,
              int64_t columns, float* c, int64_t c_stride) {
  multiply_any<S>(a, a_stride, rows, Stored<S, float>{b, b_stride}, depth, columns, c, c_stride);
}

template <class S>
void weigh(const float* shares, int64_t shares_stride, int64_t rows, const Rows& values, int64_t depth, int64_t columns,
           float* c, int64_t c_stride) {
  with_rows<S>(values, [&](auto b) { multiply_any<S>(shares, shares_stride, rows, b, depth, columns, c, c_stride); });
}

// --- blocks of a cache ---------------------------------------------------------------------------------------------

template <class S>
void transpose_rows(const float* from, int64_t stride, int64_t rows, int64_t width, float* panel, int64_t columns) {
  constexpr int64_t lanes = S::lanes;
  for (int64_t r = 0; r < rows; r += lanes) {
    const float* sources[lanes];
    for (int64_t i = 0; i < lanes; ++i) sources[i] = from + least(r + i, rows - 1) * stride;
    for (int64_t w = 0; w < width; w += lanes) {
      typename S::Float square[lanes];
      for (int64_t i = 0; i < lanes; ++i) square[i] = S::load(sources[i] + w);
      for (int64_t i = 0; i < lanes; ++i) fetch(sources[i] + lanes * stride + w);  // the next rows
      S::transpose(square);
      for (int64_t i = 0; i < least(lanes, width - w); ++i) S::store(panel + (w + i) * columns + r, square[i]);
    }
  }
}

// Each square of keys is transposed in registers, and used there. 1 to M rows; few take two at once: each is a chain.
template <class S, typename T, int M>
__attribute__((noinline)) void score_rows(const float* queries, int64_t width, int64_t rows, const T* from,
                                          int64_t stride, int64_t keys, float* scores, int64_t scores_stride) {
  constexpr int64_t lanes = S::lanes;
  constexpr int squares = M <= 4 ? 2 : 1;
  const float* row[M];
  for (int m = 0; m < M; ++m) row[m] = queries + least(m, rows - 1) * width;
  for (int64_t r = 0; r < keys; r += squares * lanes) {
    const T* sources[squares * lanes];
    for (int64_t i = 0; i < squares * lanes; ++i) sources[i] = from + least(r + i, keys - 1) * stride;
    typename S::Float sum[M][squares];
    for (int m = 0; m < M; ++m)
      for (int s = 0; s < squares; ++s) sum[m][s] = S::floats(0.0f);
    for (int64_t w = 0; w < width; w += lanes) {
      typename S::Float square[squares][lanes];
      for (int s = 0; s < squares; ++s) {
        for (int64_t i = 0; i < lanes; ++i) square[s][i] = load_any<S>(sources[s * lanes + i] + w);
        for (int64_t i = 0; i < lanes; ++i) fetch(sources[s * lanes + i] + squares * lanes * stride + w);
        S::transpose(square[s]);
      }
      for (int64_t i = 0; i < least(lanes, width - w); ++i)
        for (int m = 0; m < M; ++m) {
          const typename S::Float query = S::floats(row[m][w + i]);
          for (int s = 0; s < squares; ++s) sum[m][s] = S::fused(query, square[s][i], sum[m][s]);
        }
    }
    for (int s = 0; s < squares && r + s * lanes < keys; ++s)
      for (int m = 0; m < M && m < rows; ++m) S::store(scores + m * scores_stride + r + s * lanes, sum[m][s]);
  }
}

template <class S>
void score(const float* queries, int64_t width, int64_t rows, const Rows& from, int64_t keys, float* scores,
           int64_t scores_stride) {
  with_rows<S>(from, [&](auto b) {
    using T = typename decltype(b)::Element;
    if (rows == 1)
      score_rows<S, T, 1>(queries, width, rows, b.from, b.stride, keys, scores, scores_stride);
    else if (rows <= kFewRows / 2)
      score_rows<S, T, kFewRows / 2>(queries, width, rows, b.from, b.stride, keys, scores, scores_stride);
    else
      score_rows<S, T, kFewRows>(queries, width, rows, b.from, b.stride, keys, scores, scores_stride);
  });
}

// Lanes are rows of queries, whose words stand side by side; a key's words are taken one by one, so that keys need not be
// transposed, only what they give. They are copied in small pieces, which lie alike whatever their stride.
template <class S, typename T>
__attribute__((noinline)) void score_by_rows(const float* panel, int64_t columns, int64_t width, int64_t rows,
                                             const T* from, int64_t stride, int64_t keys, float* scores,
                                             int64_t scores_stride) {
  using Float = typename S::Float;
  constexpr int64_t lanes = S::lanes;
  float words[lanes][kVector];
  for (int64_t r = 0; r < keys; r += lanes) {
    Float sum[S::across][lanes];
    for (int n = 0; n < S::across; ++n)
      for (int64_t i = 0; i < lanes; ++i) sum[n][i] = S::floats(0.0f);
    for (int64_t at = 0; at < width; at += kVector) {
      for (int64_t i = 0; i < lanes; ++i) {
        const T* key = from + least(r + i, keys - 1) * stride + at;
        fetch(key + lanes * stride);
        for (int64_t w = 0; w < kVector; w += lanes) S::store(words[i] + w, load_any<S>(key + w));
      }
      const int64_t count = least(kVector, width - at);
#pragma GCC unroll 1
      for (int64_t w = 0; w < count; ++w) {
        Float query[S::across];
        for (int n = 0; n < S::across; ++n) query[n] = S::load(panel + (at + w) * columns + n * lanes);
        for (int64_t i = 0; i < lanes; ++i) {
          const Float word = S::floats(words[i][w]);
          for (int n = 0; n < S::across; ++n) sum[n][i] = S::fused(word, query[n], sum[n][i]);
        }
      }
    }
    for (int n = 0; n < S::across; ++n) {
      S::transpose(sum[n]);
      for (int64_t i = 0; i < lanes && n * lanes + i < rows; ++i)
        S::store(scores + (n * lanes + i) * scores_stride + r, sum[n][i]);
    }
  }
}

template <class S>
void score_some(const float* panel, int64_t columns, int64_t width, int64_t rows, const Rows& from, int64_t keys,
                float* scores, int64_t scores_stride) {
  with_rows<S>(from, [&](auto b) {
    for (int64_t row = 0; row < rows; row += S::across * S::lanes)
      score_by_rows<S>(panel + row, columns, width, rows - row, b.from, b.stride, keys, scores + row * scores_stride,
                       scores_stride);
  });
}

template <class S>
void widen(Element element, const void* from, int64_t count, float* to) {
  constexpr int64_t lanes = S::lanes;
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  const int8_t* bytes = static_cast<const int8_t*>(from);
  const bool half = element == Element::kHalf;
  int64_t at = 0;
  for (; at + lanes <= count; at += lanes) S::store(to + at, half ? S::load_half(halves + at) : S::load_bytes(bytes + at));
  if (at == count) return;
  uint16_t last_halves[lanes] = {};
  int8_t last_bytes[lanes] = {};
  float last[lanes];
  const size_t left = static_cast<size_t>(count - at);
  if (half)
    memcpy(last_halves, halves + at, left * 2);
  else
    memcpy(last_bytes, bytes + at, left);
  S::store(last, half ? S::load_half(last_halves) : S::load_bytes(last_bytes));
  memcpy(to + at, last, left * sizeof(float));
}

template <class S>
void narrow(const float* from, int64_t count, uint16_t* to) {
  constexpr int64_t lanes = S::lanes;
  int64_t at = 0;
  for (; at + lanes <= count; at += lanes) S::store_half(to + at, S::load(from + at));
  if (at == count) return;
  float last[lanes] = {};
  uint16_t last_halves[lanes];
  memcpy(last, from + at, static_cast<size_t>(count - at) * sizeof(float));
  S::store_half(last_halves, S::load(last));
  memcpy(to + at, last_halves, static_cast<size_t>(count - at) * 2);
}

template <class S>
void scale(float* numbers, int64_t count, const float* by) {
  int64_t i = 0;
  for (; i + S::lanes <= count; i += S::lanes)
    S::store(numbers + i, S::multiply(S::load(numbers + i), S::load(by + i)));
  for (; i < count; ++i) {
    numbers[i] *= by[i];
    asm volatile("" ::: "memory");  // or the few that are left get a loop of vectors too
  }
}

// --- softmax -------------------------------------------------------------------------------------------------------

// e^x by a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7, the same on every machine.
template <class S>
inline typename S::Float exponential(typename S::Float x) {
  using Float = typename S::Float;
  x = S::smaller(S::floats(88.0f), S::larger(S::floats(-87.0f), x));
  const Float shifted = S::fused(x, S::floats(1.44269504f), S::floats(kRound));
  const Float times = S::subtract(shifted, S::floats(kRound));
  Float r = S::fused(times, S::floats(-0.693359375f), x);
  r = S::fused(times, S::floats(2.12194440e-4f), r);
  Float p = S::floats(1.9875691500e-4f);
  p = S::fused(p, r, S::floats(1.3981999507e-3f));
  p = S::fused(p, r, S::floats(8.3334519073e-3f));
  p = S::fused(p, r, S::floats(4.1665795894e-2f));
  p = S::fused(p, r, S::floats(1.6666665459e-1f));
  p = S::fused(p, r, S::floats(5.0000001201e-1f));
  p = S::add(S::fused(p, S::multiply(r, r), r), S::floats(1.0f));
  return S::multiply(p, S::power(shifted));
}

template <class S>
void soften(float* scores, int64_t count, int64_t from, int64_t to, float scale, float* largest, float* sum) {
  constexpr int64_t lanes = S::lanes, vectors = kVector / lanes;
  using Float = typename S::Float;
  for (int64_t i = 0; i < from; ++i) scores[i] = -INFINITY;
  for (int64_t i = to; i < count; ++i) scores[i] = -INFINITY;
  const Float factor = S::floats(scale);
  float parts[kVector];
  Float most[vectors];
  for (int64_t v = 0; v < vectors; ++v) most[v] = S::floats(-INFINITY);
  for (int64_t i = 0; i < count; i += kVector)
    for (int64_t v = 0; v < vectors; ++v) {
      const Float score = S::multiply(S::load(scores + i + v * lanes), factor);
      S::store(scores + i + v * lanes, score);
      most[v] = S::larger(most[v], score);
    }
  for (int64_t v = 0; v < vectors; ++v) S::store(parts + v * lanes, most[v]);
  for (int64_t half = kVector / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  *largest = parts[0];
  const Float top = S::floats(parts[0]);
  for (int64_t i = 0; i < count; i += lanes)
    S::store(scores + i, exponential<S>(S::subtract(S::load(scores + i), top)));
  for (int64_t i = 0; i < from; ++i) scores[i] = 0.0f;
  for (int64_t i = to; i < count; ++i) scores[i] = 0.0f;
  Float sums[vectors];
  for (int64_t v = 0; v < vectors; ++v) sums[v] = S::floats(0.0f);
  for (int64_t i = 0; i < count; i += kVector)
    for (int64_t v = 0; v < vectors; ++v) sums[v] = S::add(sums[v], S::load(scores + i + v * lanes));
  for (int64_t v = 0; v < vectors; ++v) S::store(parts + v * lanes, sums[v]);
  for (int64_t half = kVector / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  *sum = parts[0];
}

// One of the two shares of a row is e^0, which is 1 exactly.
template <class S>
void merge(const Part& into, const Part& part, int64_t rows) {
  using Float = typename S::Float;
  for (int64_t r = 0; r < rows; ++r) {
    if (part.sums[r] == 0.0f) continue;
    float* values = into.values + r * into.columns;
    const float* more = part.values ? part.values + r * part.columns : nullptr;
    if (into.sums[r] == 0.0f) {
      into.largest[r] = part.largest[r];
      into.sums[r] = part.sums[r];
      for (int64_t i = 0; i < into.columns; ++i) values[i] = more ? more[i] : 0.0f;
      continue;
    }
    const float before = into.largest[r], largest = part.largest[r];
    into.largest[r] = before > largest ? before : largest;
    const Float keep = exponential<S>(S::floats(before - into.largest[r]));
    const Float add = exponential<S>(S::floats(largest - into.largest[r]));
    float sums[S::lanes];
    S::store(sums, S::fused(add, S::floats(part.sums[r]), S::multiply(keep, S::floats(into.sums[r]))));
    into.sums[r] = sums[0];
    for (int64_t i = 0; i < into.columns; i += S::lanes) {
      const Float kept = S::multiply(keep, S::load(values + i));
      S::store(values + i, more ? S::fused(add, S::load(more + i), kept) : kept);
    }
  }
}

template <class S>
constexpr moedge::AttentionKernels make_attention() {
  static_assert(kVector % S::lanes == 0 && S::slim * S::lanes >= kVector, "columns are multiples of kVector");
  return {widen<S>, narrow<S>, transpose_rows<S>, multiply<S>, score<S>, score_some<S>,
          weigh<S>, scale<S>, soften<S>, merge<S>};
}

}  // namespace
