// Products of int8 activations with 4-bit and 8-bit weights: what each instruction set implements, and who uses it.
//
// A row of y = W x is the sum over groups, in order, of  float(sum of code * activation) * (weight scale * activation
// scale), each group's integers summed exactly, each group added by one fused multiply-add. That is the whole of the
// arithmetic: it names no vector width, no number of tokens and no thread, so every path gives the same bits.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace moedge {

constexpr int64_t kMaxGroup = 512;  // codes that share a scale: a power of two from 16 to this
constexpr int64_t kMaxTile = 32;    // rows of a tile, over all instruction sets
constexpr int64_t kMaxTokens = 128; // tokens of one call of `multiply`
constexpr int64_t kRowsTogether = 8; // of `multiply_turned`
constexpr int32_t kLowerZero = 32;  // of 6-bit codes
// Bytes from what is read to what is fetched: further ahead than hardware is in a stream that is read once.
constexpr int64_t kAhead = 6144;

// Static, so that each file has its own: two must never share a function that was compiled for one of them.
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Into the second-level cache. The first has few places for lines that are under way: streams that were fetched there came
// at two thirds of the speed on a Zen 4.
static inline void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

constexpr int64_t kMostWidth = 32768;  // of a matrix that has a path of its own for one token

// Where rows of a matrix begin.
struct Place {
  const uint8_t *codes, *scales;
};

// One matrix [rows, width] as it lies in weights.bin: codes of 4 bits (two to a byte, low nibble first) or 8. Of 6-bit
// codes the upper four, around 8, with the lower two apart (planes.cpp).
struct Matrix {
  const uint8_t* codes;
  const void* scales;          // [rows, groups] float, fp16 or float8, as `scale_size` says
  const uint8_t* zero_points;  // [rows, groups] packed like the codes, each row from a whole byte; null: the middle
  int64_t rows, width, group;
  int bits;
  int64_t scale_size = 4;      // bytes of a scale
  const uint8_t* lower = nullptr;  // [rows, width / 4]: four codes to a byte, the lowest bits first
  // What is read when few tokens' product with these rows is done, where it does not lie behind them: its beginning is
  // fetched.
  Place next{};

  int64_t groups() const { return width / group; }
  int64_t row_bytes() const { return width * bits / 8; }
  int64_t zero_row_bytes() const { return (groups() * bits + 7) / 8; }
  const uint8_t* scale(int64_t row, int64_t group) const {
    return static_cast<const uint8_t*>(scales) + (row * groups() + group) * scale_size;
  }
  Place place(int64_t row) const { return {codes + row * row_bytes(), scale(row, 0)}; }
  Matrix before(const Place& behind) const {
    Matrix one = *this;
    one.next = behind;
    return one;
  }
  Matrix at(int64_t index) const {  // of a stack of matrices
    Matrix one = *this;
    one.codes += index * rows * row_bytes();
    one.scales = scale(index * rows, 0);
    if (zero_points) one.zero_points += index * rows * zero_row_bytes();
    return one;
  }
};

static inline int32_t zero_point(const Matrix& matrix, int64_t row, int64_t group) {
  if (!matrix.zero_points) return 1 << (matrix.bits - 1);
  const uint8_t* packed = matrix.zero_points + row * matrix.zero_row_bytes();
  return matrix.bits == 8 ? packed[group] : packed[group / 2] >> (group % 2 * 4) & 15;
}

// Rows of activations [tokens, width], each group with its own scale and the sum of its codes. For matrices of 4 bits
// the codes of even and of odd columns lie in blocks of their own, as the low and the high nibbles of a vector come.
struct Activations {
  int8_t* codes;
  float* scales;   // [tokens, groups]
  int32_t* sums;   // [tokens, groups]
  int64_t width, groups;

  Activations from(int64_t token) const {
    return {codes + token * width, scales + token * groups, sums + token * groups, width, groups};
  }
};

// Attention over a cache in int8. A number is an integer of two digits to the base kDigit, of which the upper one and the
// lower one are bytes; the scores' queries and the values' shares are such integers.
constexpr int64_t kSideBySide = 16;  // queries whose words do
constexpr int64_t kFewQueries = 8;   // of a sequence, which stand alone: each one's words are behind each other
constexpr int64_t kCachedKeys = 128; // of one call
constexpr int64_t kSharedRows = 48;  // of shares, likewise
constexpr int64_t kMostCachedBlock = 64, kMostCachedWidth = 256;  // of keys that have one scale
constexpr int32_t kDigit = 128;
constexpr float kMostQuery = 63 * kDigit, kMostShare = 127 * kDigit;  // two products of 64 * 255, or of 127 * 128, have 16 bits

// Rows of queries, kSideBySide of them together, with a scale and the sum of its integers for each block of columns.
struct Queries {
  // [rows / 16, width / 4, 2, 16]: four columns' upper digits, then their lower ones; of one alone [rows, 2, width / 4].
  int32_t* words;
  float* scales;   // [rows / 16, parts, 16]
  int32_t* sums;   // likewise
  int64_t width, parts;
};

// Rows of a cache [keys, width], `parts` blocks of columns with a scale each; a block is of 32 or 64, or a row of a multiple
// of 64 has one scale.
struct Cached {
  const int8_t* codes;
  const float* scales;  // [keys, parts]
  int64_t width, parts;
  // What is read behind `end` lies `skip` bytes further on.
  uintptr_t end = 0, skip = 0;

  const int8_t* ahead(const int8_t* of) const {  // what to fetch
    const uintptr_t there = reinterpret_cast<uintptr_t>(of) + kAhead;
    return reinterpret_cast<const int8_t*>(there < end ? there : there + skip);
  }
};

struct Kernels {
  const char* name;
  int64_t tile;    // rows that `multiply` computes at once for several tokens
  int32_t middle;  // see `multiply_turned`

  // x [width] -> row `row` of `out`. Groups that hold no finite value everywhere get the scale NaN.
  void (*quantize)(const float* x, int bits, int64_t row, const Activations& out);

  // Rows `first` to `first + rows` for the activations' rows index[0..count), count <= kMaxTokens: out[i * stride + r].
  // Null index: rows 0 to count. `first` is a multiple of the tile.
  void (*multiply)(const Matrix& matrix, int64_t first, int64_t rows, const Activations& x, const int32_t* index,
                   int64_t count, float* out, int64_t stride);

  // Adds to y[r], for `count` rows r in ascending order, what their lower codes bring: over groups, in order,
  // float(sum of lower code * activation - kLowerZero * x.sums) * (weight scale * x.scales). x.codes are four planes of
  // x.width / 4: every fourth column's from 0, 1, 2 and 3 on, each filled up to a multiple of 64.
  void (*refine)(const Matrix& matrix, const int64_t* rows, int64_t count, const Activations& x, float* y);

  // By a matrix [rows, width] of 4-bit or 8-bit codes as it lies: out[i * stride + c] = x.scales[i, g] * float(the sum over
  // rows k of (code[k, c] - middle) * x.codes[i, g, k], less x.sums[i, g]), g being the column's group, and the middle that
  // of 4-bit codes 0. A group of x has a code for each row, in their order, then zeros up to a multiple of kRowsTogether;
  // count <= kMaxTokens. The sum is exact below 2^31.
  void (*multiply_turned)(const Matrix& matrix, const Activations& x, int64_t count, float* out, int64_t stride);

  // out[i * stride + r] = row r of `matrix` [rows, width] by row i of x [count, width], in float: 64 sums, each of every
  // 64th column in order, then added up by halves. Products and sums are rounded apart. `half`: the matrix is bf16.
  void (*multiply_floats)(const void* matrix, bool half, int64_t rows, int64_t width, const float* x, int64_t count,
                          float* out, int64_t stride);

  // A query [width] as row `row`. Blocks that hold no finite value everywhere get the scale NaN. `alone`: one block.
  void (*put_query)(const float* x, int64_t row, bool alone, const Queries& out);

  // scores [keys, 16] of the queries from `row`, a multiple of 16, on: the sum over blocks, in order, of
  // float(sum of integer * code) * (query's scale * key's), each added by one fused multiply-add.
  void (*score_cached)(const Queries& queries, int64_t row, const Cached& cached, int64_t keys, float* scores);

  // The same of rows that stand alone, by keys of one scale: scores [rows, keys], `stride` apart, keys <= kCachedKeys; as many
  // are written as a multiple of 16.
  void (*score_alone)(const Queries& queries, int64_t row, int64_t rows, const Cached& cached, int64_t keys, float* scores,
                      int64_t stride);

  // out [rows, columns], `stride` apart: of each block of columns, shares [rows, keys] times the keys' scales are rounded to
  // integers, of which the largest is kMostShare; out = float(sum over keys of integer * code) * their scale. Shares are 0 up
  // to the next multiple of 64 keys; keys <= kCachedKeys, rows <= kSharedRows.
  void (*weigh_cached)(const float* shares, int64_t shares_stride, int64_t rows, const Cached& cached, int64_t keys,
                       int64_t columns, float* out, int64_t stride);

  // The same of few rows, by values of one scale.
  void (*weigh_alone)(const float* shares, int64_t shares_stride, int64_t rows, const Cached& cached, int64_t keys,
                      int64_t columns, float* out, int64_t stride);

  // pairs [2 * count] (gate, up, gate, up ...) -> h [count]: gate * sigmoid(alpha * gate) * (up + offset), the gate at
  // most `limit`, up between -limit and limit.
  void (*swiglu)(const float* pairs, int64_t count, float alpha, float limit, float offset, float* h);
};

// Runs body(0) ... body(total - 1), in any order, on all threads.
struct Parallel {
  void (*call)(void* self, void (*body)(void* data, size_t index), size_t total, void* data);
  void* self;

  template <typename Body>
  void operator()(int64_t total, const Body& body) const {
    if (total == 1) return body(int64_t{0});
    if (total > 0)
      call(self, [](void* data, size_t index) { (*static_cast<const Body*>(data))(static_cast<int64_t>(index)); },
           static_cast<size_t>(total), const_cast<Body*>(&body));
  }
};

// The best that this machine's processor runs, or the one that the environment names (MOEDGE_KERNELS). Null: unknown.
const Kernels* find_kernels(const char* name);
const Kernels* default_kernels();

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// y [tokens, rows] = x [tokens, width] by the transposed matrix, plus bias [rows] where it is given.
struct Linear {
  const Kernels* kernels;
  int64_t tokens;
  const float* x;
  Matrix matrix;
  const float* bias;
  float* y;
};

size_t linear_scratch(const Linear& linear);
void run_linear(const Linear& linear, void* scratch, const Parallel& parallel);

}  // namespace moedge
