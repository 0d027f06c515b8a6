// Products by a matrix of codes as it lies, not by the transposed one: see `multiply_turned` of Kernels.

#pragma once

namespace {

// Sums of columns `first` to `behind`, in their order, times the scales. Of 4 bits (`two` 1) each block of sums is followed
// by that of the columns between.
template <class S>
inline void write_turned(const int32_t* sum, int64_t first, int64_t behind, int64_t step, int64_t shift, int two,
                         const Activations& x, int64_t count, float* out, int64_t stride) {
  constexpr int64_t lanes = S::lanes, bytes = 4 * lanes;
  alignas(64) float values[2 * bytes];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t at = first; at < behind; at += step, sum += bytes << two) {
      const typename S::Float scale = S::floats(x.scales[i * x.groups + (at >> shift)]);
      for (int64_t v = 0; v < bytes << two; v += lanes)
        S::store_floats(values + v, S::multiply(S::to_floats(S::load_ints(sum + v)), scale));
      float* to = out + i * stride + at;
      for (int64_t c = 0; c < step >> two; c += 4) {
        const float* four = values + c % 16 / 4 * lanes + c / 16 * 4;
        if (!two) memcpy(to + c, four, 4 * sizeof *to);
        for (int64_t n = 0; two && n < 8; ++n) to[2 * c + n] = four[n % 2 * bytes + n / 2];
      }
    }
}

// Rows are turned by fours in registers: a lane then has four rows' codes of one column, or of two in its nibbles, and four
// vectors so many columns in the order of S::turn, which is put right at the end. Matrices are read as they lie by so few
// rows of activations that their sums stay in the first-level cache; by more, a strip of columns at a time.
template <class S>
void multiply_turned(const Matrix& matrix, const Activations& x, int64_t count, float* out, int64_t stride) {
  using Int = typename S::Int;
  constexpr int64_t lanes = S::lanes, bytes = 4 * lanes, held = kMaxTokens * 64, both = kRowsTogether;
  static_assert(bytes <= 64 && both == 8, "there are sums for a vector's columns of all rows, two fours of rows at once");
  const int two = matrix.bits == 4;  // codes in a byte, less one, and so what to shift by
  if (const int64_t most = kMaxTokens >> two; count > most) {
    multiply_turned<S>(matrix, x.from(most), count - most, out + most * stride, stride);
    count = most;
  }
  alignas(64) int32_t sums[held];  // [count][columns], of groups that are smaller than a vector with room behind each
  uint8_t copies[both * bytes] = {};
  const int64_t block = bytes << two, step = least(block, matrix.group), read = step >> two;
  const int64_t depth = x.width / x.groups, shift = __builtin_ctzll(matrix.group), row_bytes = matrix.row_bytes();
  const int64_t columns = held / (count * block) * step;
  const uint8_t* const end = matrix.codes + matrix.rows * row_bytes;
  for (int64_t first = 0; first < matrix.width; first += columns) {
    const int64_t behind = least(first + columns, matrix.width), room = (behind - first) / step * block;
    int32_t* sum = sums;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t at = first; at < behind; at += step, sum += block)
        for (int64_t v = 0; v < block; v += lanes) S::store_ints(sum + v, S::ints(-x.sums[i * x.groups + (at >> shift)]));
    for (int64_t k = 0; k < depth; k += both) {
      const uint8_t* rows[both];
      for (int64_t r = 0; r < both; ++r) rows[r] = matrix.codes + least(k + r, matrix.rows - 1) * row_bytes;
      sum = sums;
      for (int64_t at = first; at < behind; at += step, sum += block) {
        Int words[both];
        const int64_t from = at >> two;
        // In the order that they lie in, or memory takes longer.
        for (int64_t r = 0; r < both; ++r) fetch(rows[0] + kAhead + from * both + r * read);
        if (rows[both - 1] + from + bytes > end) {  // a vector may go beyond its group, but not beyond the matrix
          for (int64_t r = 0; r < both; ++r) memcpy(copies + r * bytes, rows[r] + from, static_cast<size_t>(read));
          for (int64_t r = 0; r < both; ++r) words[r] = S::load_bytes(copies + r * bytes);
        } else {
          for (int64_t r = 0; r < both; ++r) words[r] = S::load_bytes(rows[r] + from);
        }
        S::turn(words);
        S::turn(words + 4);
        const int8_t* own = x.codes + (at >> shift) * depth + k;
        int32_t* into = sum;
        if (two) {
          for (int64_t i = 0; i < count; ++i, own += x.width, into += room) {
            const Int upper = S::ints(word_at(own)), lower = S::ints(word_at(own + 4));
            for (int64_t v = 0; v < 4; ++v) {
              int32_t *even = into + v * lanes, *odd = even + bytes;
              const Int some = S::template dot<4>(S::load_ints(even), S::low_nibbles(words[v]), upper);
              S::store_ints(even, S::template dot<4>(some, S::low_nibbles(words[4 + v]), lower));
              const Int more = S::template dot<4>(S::load_ints(odd), S::high_nibbles(words[v]), upper);
              S::store_ints(odd, S::template dot<4>(more, S::high_nibbles(words[4 + v]), lower));
            }
          }
          continue;
        }
        for (int64_t r = 0; r < both; ++r) words[r] = S::prepare(words[r]);
        for (int64_t i = 0; i < count; ++i, own += x.width, into += room) {
          const Int upper = S::ints(word_at(own)), lower = S::ints(word_at(own + 4));
          for (int64_t v = 0; v < 4; ++v) {
            const Int some = S::template dot<8>(S::load_ints(into + v * lanes), words[v], upper);
            S::store_ints(into + v * lanes, S::template dot<8>(some, words[4 + v], lower));
          }
        }
      }
    }
    write_turned<S>(sums, first, behind, step, shift, two, x, count, out, stride);
  }
}

}  // namespace
