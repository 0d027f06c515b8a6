// Matrices of 6-bit codes: blocks of 64 codes in 48 bytes (export/quantization/__init__.py, pack_int6).
//
// The integers are those of the same codes in 8 bits, so every path gives the bits that an 8-bit matrix would.

#pragma once

namespace {

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

}  // namespace
