// Matrices of 6-bit codes: blocks of 64 codes in 48 bytes (export/quantization/__init__.py, pack_int6).
//
// S gives  either       a | b
//          upper<place> two bits of each byte, the `place`th from the lowest, as bits 4 and 5
//          unpack       where it has more than four lanes: a block's codes, 0 to 63, as 64 / (4 * lanes) vectors
// The integers are those of the same codes in 8 bits, so every path gives the bits that an 8-bit matrix would. What is
// `cold` is compiled to be small: the work is done in what it calls.

#pragma once

namespace {

using moedge::kSixBitBlock;

constexpr int64_t kPackedBlock = kSixBitBlock * 6 / 8;

// Rows by one row of activations, read as they lie: see `multiply_one`. Groups of `blocks` blocks, 0: of any number.
template <class S, int blocks>
__attribute__((noinline, hot)) void multiply_six_one(const Matrix& matrix, int64_t first, int64_t rows,
                                                     const Activations& x, int64_t token, float* out) {
  constexpr int64_t lanes = S::lanes, vectors = kSixBitBlock / (4 * lanes);
  const int64_t groups = x.groups, count = blocks ? blocks : matrix.group / kSixBitBlock;
  alignas(64) int32_t integers[kMostWidth * lanes / kSixBitBlock / 4 + lanes];  // [row][group], and room to read on
  const int8_t* own = x.codes + token * x.width;
  for (int64_t done = 0; done < rows; done += lanes) {
    const int64_t start = least(first + done, matrix.rows - lanes);  // at the end some rows are computed once more
    const uint8_t* codes = matrix.codes + start * matrix.row_bytes();
    const int8_t* part = own;
    for (int64_t at = 0; at < lanes * groups; at += lanes) {
      typename S::Int sums[lanes];
#pragma GCC unroll 4
      for (int64_t i = 0; i < lanes; ++i) {
        typename S::Int sum = S::ints(0);
        for (int64_t b = 0; b < count; ++b, codes += kPackedBlock, part += kSixBitBlock) {
          typename S::Int words[vectors];
          S::unpack(codes, words);
          __builtin_prefetch(codes + kAhead);
          for (int64_t v = 0; v < vectors; ++v)
            sum = S::template dot<6>(sum, words[v], S::load_bytes(part + v * 4 * lanes));
        }
        sums[i] = sum;
        if (part == own + x.width) part = own;
      }
      S::store_ints(integers + at, S::sums(sums));
    }
    alignas(64) float totals[lanes];
    add_groups<S>(matrix, start, integers, x, token, totals);
    const int64_t skipped = first + done - start;
    memcpy(out + done, totals + skipped, static_cast<size_t>(least(lanes - skipped, rows - done)) * sizeof *out);
  }
}

// A block of `lanes` rows turned and unpacked: 16 words of four codes. Reads whole vectors of each row.
template <class S>
__attribute__((noinline, hot)) void load_six_bits(const uint8_t* const* rows, int64_t at, typename S::Int* out) {
  typename S::Int packed[16];
#pragma GCC unroll 1
  for (int64_t from = 0; from < kPackedBlock; from += 4 * S::lanes)
    S::load_transposed(rows, at + from, packed + from / 4);
#pragma GCC unroll 1
  for (int w = 0; w < 4; ++w) {
    out[w] = S::either(S::low_nibbles(packed[w]), S::template upper<0>(packed[8 + w]));
    out[4 + w] = S::either(S::low_nibbles(packed[4 + w]), S::template upper<1>(packed[8 + w]));
    out[8 + w] = S::either(S::high_nibbles(packed[w]), S::template upper<2>(packed[8 + w]));
    out[12 + w] = S::either(S::high_nibbles(packed[4 + w]), S::template upper<3>(packed[8 + w]));
  }
}

// A group of `lanes` rows, `count` words of each, by M rows of activations; adds to acc [M][lanes].
template <class S, int M>
__attribute__((noinline, hot)) void add_six_bits(const typename S::Int* words, int64_t count, const float* scales,
                                                 const Activations& x, const int32_t* index, int64_t first,
                                                 int64_t place, float* acc) {
  constexpr int chains = M > 1 ? 2 : 4;  // so that no dot product need wait for the last
  typename S::Int sums[M][chains];
  const int8_t* parts[M];
  int64_t at[M];
  for (int m = 0; m < M; ++m) {
    const int64_t id = index ? index[first + m] : first + m;
    at[m] = id * x.groups + place;
    parts[m] = x.codes + at[m] * 4 * count;
    for (int c = 0; c < chains; ++c) sums[m][c] = S::ints(0);
  }
  for (int64_t w = 0; w < count; w += 4)
    for (int64_t i = 0; i < 4; ++i) {
      const typename S::Int word = words[w + i];
      for (int m = 0; m < M; ++m)
        sums[m][i % chains] = S::template dot_word<6>(sums[m][i % chains], word, parts[m] + 4 * (w + i));
    }
  for (int m = 0; m < M; ++m) {
    typename S::Int sum = sums[m][0];
    for (int c = 1; c < chains; ++c) sum = S::add(sum, sums[m][c]);
    float* into = acc + (first + m) * S::lanes;
    S::store_floats(into, add_group<S>(sum, scales, nullptr, 32, x.sums[at[m]], x.scales[at[m]], S::load_floats(into)));
  }
}

// `lanes` rows from `first` by any number of rows of activations: the weights are turned and unpacked once for all.
template <class S>
__attribute__((cold)) void multiply_six_many(const Matrix& matrix, int64_t first, const Activations& x,
                                             const int32_t* index, int64_t count, float* acc) {
  constexpr int64_t lanes = S::lanes;
  const int64_t bytes = matrix.row_bytes(), group = matrix.group;
  const int64_t span = group > kSixBitBlock ? group : kSixBitBlock;
  typename S::Int codes[kMaxGroup / 4];
  Groups<S> groups;
  int64_t rows[lanes];
  const uint8_t *sources[lanes], *ends[lanes];
  alignas(64) uint8_t copies[lanes * kSixBitBlock];  // of the last blocks, with room to read on
#pragma GCC unroll 1
  for (int64_t r = 0; r < lanes; ++r) {
    rows[r] = least(first + r, matrix.rows - 1);
    sources[r] = matrix.codes + rows[r] * bytes;
    ends[r] = copies + r * kSixBitBlock;
    memcpy(copies + r * kSixBitBlock, sources[r] + bytes - kPackedBlock, kPackedBlock);
  }
  memset(acc, 0, static_cast<size_t>(count * lanes) * sizeof *acc);
  for (int64_t from = 0, place = 0; from < bytes; from += span * 6 / 8) {
    typename S::Int* word = codes;
    for (int64_t at = from; at < from + span * 6 / 8; at += kPackedBlock, word += kSixBitBlock / 4) {
#pragma GCC unroll 1
      for (int64_t r = 0; r < lanes; ++r) __builtin_prefetch(sources[r] + lanes * bytes + at);  // the next rows
      const bool last = at + kPackedBlock == bytes;
      load_six_bits<S>(last ? ends : sources, last ? 0 : at, word);
    }
    for (word = codes; word < codes + span / 4; word += group / 4, ++place) {
      if (place % lanes == 0) load_groups<S>(matrix, rows, place, least(lanes, matrix.groups() - place), &groups);
      const float* scales = groups.scales + place % lanes * lanes;
      int64_t m = 0;
      for (; m + 4 <= count; m += 4) add_six_bits<S, 4>(word, group / 4, scales, x, index, m, place, acc);
      for (; m < count; ++m) add_six_bits<S, 1>(word, group / 4, scales, x, index, m, place, acc);
    }
  }
}

template <class S>
__attribute__((cold)) void multiply_six_bits(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x,
                                             const int32_t* index, int64_t count, float* out, int64_t stride) {
  constexpr int64_t lanes = S::lanes;
  if constexpr (lanes > 4)
    if (count == 1 && matrix.rows >= lanes && matrix.width <= kMostWidth / 4 && matrix.group % kSixBitBlock == 0) {
      const auto run = matrix.group == 2 * kSixBitBlock ? multiply_six_one<S, 2> : multiply_six_one<S, 0>;
      return run(matrix, first, rows, x, index ? index[0] : 0, out);
    }
  alignas(64) float acc[kMaxTokens * lanes];
  for (int64_t at = 0; at < rows; at += lanes) {
    multiply_six_many<S>(matrix, first + at, x, index, count, acc);
    for (int64_t i = 0; i < count; ++i)
      memcpy(out + i * stride + at, acc + i * lanes, static_cast<size_t>(least(lanes, rows - at)) * sizeof(float));
  }
}

}  // namespace
