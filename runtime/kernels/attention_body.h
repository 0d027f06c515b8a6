// The kernels of attention, written once over an instruction set S. Each attention_*.cpp includes this with its own
// compiler flags.
//
// S gives  lanes            floats of a vector
//          rows, vectors    of a tile of a product: its sums stay in registers
//          few, wide        rows up to which a tile is `wide` vectors, so that a matrix streams by once
//          some, slim       rows of a tile for up to twice as many, which is `slim` vectors
//          across           vectors of rows that share a pass over keys
//          Float            a vector of floats
//          larger, smaller  a if it is larger (smaller) than b, else b: of a NaN in b, b
//          power            2^n for what adding kRound made of n
//          load_half, load_bytes (signed), load_codes (unsigned), store_half, transpose (a square of vectors, in place)

#pragma once

#include <math.h>
#include <string.h>

#include "attention.h"

namespace {

using moedge::Element;
using moedge::HeadCodes;
using moedge::kAhead;
using moedge::kFewRows;
using moedge::kPanelKeys;
using moedge::kVector;
using moedge::least;
using moedge::Part;
using moedge::Rows;

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a rounded integer in the low bits
constexpr int32_t kRoundBits = 0x4b400000;

// `count` elements kAhead bytes on.
template <typename T>
inline void fetch_ahead(const T* from, int64_t count) {
  constexpr int64_t ahead = kAhead / static_cast<int64_t>(sizeof(T)), line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + ahead + i);
}

template <class S>
inline typename S::Float load_any(const float* from) { return S::load(from); }
template <class S>
inline typename S::Float load_any(const uint16_t* from) { return S::load_half(from); }
template <class S>
inline typename S::Float load_any(const int8_t* from) { return S::load_bytes(from); }

// A matrix that is read by whole vectors: of floats, of a cache's halves or bytes; `Codes`: of codes with scales.
template <class S, typename T>
struct Stored {
  const T* from;
  int64_t stride;
  typename S::Float load(int64_t row, int64_t column) const { return load_any<S>(from + row * stride + column); }
  void fetch(int64_t row, int64_t count) const { fetch_ahead(from + row * stride, count); }
};
template <class S>
struct Codes {
  HeadCodes m;
  typename S::Float load(int64_t row, int64_t column) const {
    const int64_t group = row * m.groups() + (column >> m.shift);
    const float zero = m.zero_points ? static_cast<float>(m.zero_points[group]) : 128.0f;
    const typename S::Float code = S::subtract(S::load_codes(m.codes + row * m.width + column), S::floats(zero));
    return S::multiply(code, S::floats(m.scales[group]));
  }
  void fetch(int64_t row, int64_t count) const { fetch_ahead(m.codes + row * m.width, count); }
};

// Calls run with rows of a cache as such a matrix.
template <class S, typename Run>
void with_rows(const Rows& rows, const Run& run) {
  if (rows.element == Element::kFloat)
    run(Stored<S, float>{static_cast<const float*>(rows.from), rows.stride});
  else if (rows.element == Element::kHalf)
    run(Stored<S, uint16_t>{static_cast<const uint16_t*>(rows.from), rows.stride});
  else
    run(Stored<S, int8_t>{static_cast<const int8_t*>(rows.from), rows.stride});
}

// --- products ----------------------------------------------------------------------------------------------------

// From column `at` of b on; of each row so much is fetched that is read later.
template <class S, class E, int M, int N>
__attribute__((noinline)) void multiply_tile(const float* a, int64_t a_stride, const E& from, int64_t at, int64_t depth,
                                             int64_t fetched, float* c, int64_t c_stride) {
  const E b = from;
  typename S::Float sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = S::floats(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    typename S::Float column[N];
    for (int n = 0; n < N; ++n) column[n] = b.load(k, at + n * S::lanes);
    b.fetch(k, fetched);
    for (int m = 0; m < M; ++m) {
      const typename S::Float one = S::floats(a[m * a_stride + k]);
      for (int n = 0; n < N; ++n) sum[m][n] = S::fused(one, column[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) S::store(c + m * c_stride + at + n * S::lanes, sum[m][n]);
}

// `rows` of 1 to M.
template <class S, class E, int M, int N>
void multiply_rows(const float* a, int64_t a_stride, int64_t rows, const E& b, int64_t at, int64_t depth,
                   int64_t fetched, float* c, int64_t c_stride) {
  if constexpr (M > 1)
    if (rows < M) return multiply_rows<S, E, M - 1, N>(a, a_stride, rows, b, at, depth, fetched, c, c_stride);
  multiply_tile<S, E, M, N>(a, a_stride, b, at, depth, fetched, c, c_stride);
}

// Columns in tiles of N vectors, what is left in narrower ones; rows in tiles of at most M, alike in size. `fetched`
// columns are, by the first tile.
template <class S, class E, int M, int N>
void multiply_columns(const float* a, int64_t a_stride, int64_t rows, const E& b, int64_t at, int64_t depth,
                      int64_t columns, int64_t fetched, float* c, int64_t c_stride) {
  constexpr int64_t wide = N * S::lanes;
  const int64_t tiles = (rows + M - 1) / M, some = (rows + tiles - 1) / tiles;
  for (; at + wide <= columns; at += wide)
    for (int64_t r = 0; r < rows; r += some, fetched = 0)
      multiply_rows<S, E, M, N>(a + r * a_stride, a_stride, least(some, rows - r), b, at, depth, fetched,
                                c + r * c_stride, c_stride);
  if constexpr (wide > kVector)
    if (at < columns) multiply_columns<S, E, M, N / 2>(a, a_stride, rows, b, at, depth, columns, fetched, c, c_stride);
}

template <class S, class E>
void multiply_any(const float* a, int64_t a_stride, int64_t rows, const E& b, int64_t depth, int64_t columns, float* c,
                  int64_t c_stride) {
  if (rows == 1)
    multiply_columns<S, E, 1, 2 * S::wide>(a, a_stride, rows, b, 0, depth, columns, columns, c, c_stride);
  else if (rows <= S::few)
    multiply_columns<S, E, S::few, S::wide>(a, a_stride, rows, b, 0, depth, columns, columns, c, c_stride);
  else if (rows > S::rows && rows <= 2 * S::some)
    multiply_columns<S, E, S::some, S::slim>(a, a_stride, rows, b, 0, depth, columns, columns, c, c_stride);
  else if (rows > 0)
    multiply_columns<S, E, S::rows, S::vectors>(a, a_stride, rows, b, 0, depth, columns, 0, c, c_stride);
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

// --- codes ---------------------------------------------------------------------------------------------------------

template <class S>
void dequantize(const HeadCodes& m, float* to) {
  const Codes<S> codes{m};
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t w = 0; w < m.width; w += S::lanes) S::store(to + r * m.width + w, codes.load(r, w));
}

template <class S>
void absorb(const float* a, int64_t a_stride, int64_t rows, const HeadCodes& m, float* c, int64_t c_stride) {
  // Fewer forms than `multiply_any` has: a library's size counts, and many rows come as floats.
  if (rows == 1)
    multiply_columns<S, Codes<S>, 1, 2 * S::wide>(a, a_stride, rows, {m}, 0, m.rows, m.width, m.width, c, c_stride);
  else
    multiply_columns<S, Codes<S>, S::few, S::wide>(a, a_stride, rows, {m}, 0, m.rows, m.width, m.width, c, c_stride);
}

// Squares of codes are transposed in registers, and scaled behind that. Few rows take two at once: each is a chain.
template <class S, int M>
void expand_rows(const float* a, int64_t a_stride, const HeadCodes& m, float* c, int64_t c_stride) {
  using Float = typename S::Float;
  constexpr int64_t lanes = S::lanes;
  constexpr int squares = M <= 4 ? 2 : 1;
  for (int64_t r = 0; r < m.rows; r += squares * lanes) {
    int64_t ids[squares * lanes];
    const uint8_t* sources[squares * lanes];
    for (int64_t i = 0; i < squares * lanes; ++i) {
      ids[i] = least(r + i, m.rows - 1);
      sources[i] = m.codes + ids[i] * m.width;
    }
    Float sum[squares][M];
    for (int s = 0; s < squares; ++s)
      for (int i = 0; i < M; ++i) sum[s][i] = S::floats(0.0f);
    for (int64_t w = 0; w < m.width;) {
      const int64_t group = w >> m.shift;
      float scales[squares * lanes], zeros[squares * lanes];
      for (int64_t i = 0; i < squares * lanes; ++i) {
        scales[i] = m.scales[ids[i] * m.groups() + group];
        zeros[i] = m.zero_points ? static_cast<float>(m.zero_points[ids[i] * m.groups() + group]) : 128.0f;
      }
      for (const int64_t end = (group + 1) << m.shift; w < end; w += lanes) {
        for (int s = 0; s < squares; ++s) {
          const Float scale = S::load(scales + s * lanes), zero = S::load(zeros + s * lanes);
          Float square[lanes];
          for (int64_t i = 0; i < lanes; ++i) square[i] = S::load_codes(sources[s * lanes + i] + w);
          for (int64_t i = 0; i < lanes; ++i) __builtin_prefetch(sources[s * lanes + i] + squares * lanes * m.width + w);
          S::transpose(square);
          for (int64_t i = 0; i < lanes; ++i) {
            const Float value = S::multiply(S::subtract(square[i], zero), scale);
            for (int k = 0; k < M; ++k) sum[s][k] = S::fused(S::floats(a[k * a_stride + w + i]), value, sum[s][k]);
          }
        }
      }
    }
    for (int s = 0; s < squares && r + s * lanes < m.rows; ++s)
      for (int k = 0; k < M; ++k) S::store(c + k * c_stride + r + s * lanes, sum[s][k]);
  }
}

// `rows` of 1 to M.
template <class S, int M>
void expand_some(const float* a, int64_t a_stride, int64_t rows, const HeadCodes& m, float* c, int64_t c_stride) {
  if constexpr (M > 1)
    if (rows < M) return expand_some<S, M - 1>(a, a_stride, rows, m, c, c_stride);
  expand_rows<S, M>(a, a_stride, m, c, c_stride);
}

template <class S>
void expand(const float* a, int64_t a_stride, int64_t rows, const HeadCodes& m, float* c, int64_t c_stride) {
  expand_some<S, kFewRows>(a, a_stride, rows, m, c, c_stride);
}

// --- blocks of a cache ---------------------------------------------------------------------------------------------

template <class S>
void transpose_rows(const float* from, int64_t stride, int64_t rows, int64_t width, float* panel) {
  constexpr int64_t lanes = S::lanes;
  for (int64_t r = 0; r < rows; r += lanes) {
    const float* sources[lanes];
    for (int64_t i = 0; i < lanes; ++i) sources[i] = from + least(r + i, rows - 1) * stride;
    for (int64_t w = 0; w < width; w += lanes) {
      typename S::Float square[lanes];
      for (int64_t i = 0; i < lanes; ++i) square[i] = S::load(sources[i] + w);
      for (int64_t i = 0; i < lanes; ++i) __builtin_prefetch(sources[i] + lanes * stride + w);  // the next rows
      S::transpose(square);
      for (int64_t i = 0; i < least(lanes, width - w); ++i) S::store(panel + (w + i) * kPanelKeys + r, square[i]);
    }
  }
}

// Each square of keys is transposed in registers, and used there. Few rows take two at once: each is a chain.
template <class S, class E, int M>
void score_rows(const float* queries, int64_t width, const E& from, int64_t keys, float* scores,
                int64_t scores_stride) {
  constexpr int64_t lanes = S::lanes;
  constexpr int squares = M <= 4 ? 2 : 1;
  for (int64_t r = 0; r < keys; r += squares * lanes) {
    decltype(from.from) sources[squares * lanes];
    for (int64_t i = 0; i < squares * lanes; ++i) sources[i] = from.from + least(r + i, keys - 1) * from.stride;
    typename S::Float sum[squares][M];
    for (int s = 0; s < squares; ++s)
      for (int m = 0; m < M; ++m) sum[s][m] = S::floats(0.0f);
    for (int64_t w = 0; w < width; w += lanes) {
      typename S::Float square[squares][lanes];
      for (int s = 0; s < squares; ++s) {
        for (int64_t i = 0; i < lanes; ++i) square[s][i] = E{sources[s * lanes + i], 0}.load(0, w);
        for (int64_t i = 0; i < lanes; ++i)
          __builtin_prefetch(sources[s * lanes + i] + squares * lanes * from.stride + w);
        S::transpose(square[s]);
      }
      for (int64_t i = 0; i < least(lanes, width - w); ++i)
        for (int m = 0; m < M; ++m) {
          const typename S::Float query = S::floats(queries[m * width + w + i]);
          for (int s = 0; s < squares; ++s) sum[s][m] = S::fused(query, square[s][i], sum[s][m]);
        }
    }
    for (int s = 0; s < squares && r + s * lanes < keys; ++s)
      for (int m = 0; m < M; ++m) S::store(scores + m * scores_stride + r + s * lanes, sum[s][m]);
  }
}

// `rows` of 1 to M.
template <class S, class E, int M>
void score_few(const float* queries, int64_t width, int64_t rows, const E& from, int64_t keys, float* scores,
                int64_t scores_stride) {
  if constexpr (M > 1)
    if (rows < M) return score_few<S, E, M - 1>(queries, width, rows, from, keys, scores, scores_stride);
  score_rows<S, E, M>(queries, width, from, keys, scores, scores_stride);
}

template <class S>
void score(const float* queries, int64_t width, int64_t rows, const Rows& from, int64_t keys, float* scores,
           int64_t scores_stride) {
  with_rows<S>(from, [&](auto keys_from) {
    score_few<S, decltype(keys_from), kFewRows>(queries, width, rows, keys_from, keys, scores, scores_stride);
  });
}

// Lanes are rows of queries, whose words stand side by side; a key's words are taken one by one, so that keys need not be
// transposed, only what they give. They are copied in small pieces, which lie alike whatever their stride.
template <class S, class E>
void score_by_rows(const float* panel, int64_t width, int64_t rows, const E& from, int64_t keys, float* scores,
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
        const int64_t key = least(r + i, keys - 1);
        for (int64_t w = 0; w < kVector; w += lanes) S::store(words[i] + w, from.load(key, at + w));
        __builtin_prefetch(from.from + (key + lanes) * from.stride + at);
      }
      for (int64_t w = 0; w < least(kVector, width - at); ++w) {
        Float query[S::across];
        for (int n = 0; n < S::across; ++n) query[n] = S::load(panel + (at + w) * kPanelKeys + n * lanes);
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
void score_some(const float* panel, int64_t width, int64_t rows, const Rows& from, int64_t keys, float* scores,
                int64_t scores_stride) {
  with_rows<S>(from, [&](auto keys_from) {
    for (int64_t row = 0; row < rows; row += S::across * S::lanes)
      score_by_rows<S>(panel + row, width, rows - row, keys_from, keys, scores + row * scores_stride, scores_stride);
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
  static_assert(kVector % S::lanes == 0 && S::vectors * S::lanes >= kVector, "columns are multiples of kVector");
  return {widen<S>, narrow<S>, transpose_rows<S>, multiply<S>, score<S>, score_some<S>,
          weigh<S>, soften<S>, merge<S>, dequantize<S>, absorb<S>, expand<S>};
}

}  // namespace
