// Memory and units of work that the ops share.

#pragma once

#include "kernels.h"
#include "phases.h"

namespace moedge {

// Weights that one unit of parallel work reads when there are few tokens: long enough to stream, short enough to share.
constexpr int64_t kUnitBytes = 32 << 10;
// Below this many bytes of work a second thread costs more than it saves.
constexpr int64_t kAlone = 16 << 10;

// Rows of a matrix in one unit: whole tiles.
inline int64_t unit_rows(const Kernels& kernels, const Matrix& matrix) {
  const int64_t rows = kUnitBytes / (matrix.row_bytes() > 0 ? matrix.row_bytes() : 1) / kernels.tile * kernels.tile;
  return least(rows < kernels.tile ? kernels.tile : rows, divide_up(matrix.rows, kernels.tile) * kernels.tile);
}

// Takes blocks off one piece of memory; without memory it counts what they would take.
struct Blocks {
  char* base;
  size_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* block = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return block;
  }
  Activations take_activations(int64_t rows, const Matrix& matrix) {
    const int64_t groups = matrix.groups();
    int8_t* codes = take<int8_t>(rows * matrix.width);
    float* scales = take<float>(rows * groups);
    return {codes, scales, take<int32_t>(rows * groups), matrix.width, groups};
  }
};

// What an op's steps take of one.
template <class Steps, class Op>
size_t scratch_of(const Op& op) {
  Blocks blocks{nullptr};
  Steps(op, &blocks);
  return blocks.used;
}

// Numbers in one unit of the steps between products: whole groups.
constexpr int64_t kPiece = 1024;
static_assert(kPiece % kMaxGroup == 0, "a piece begins with a group");

// As many threads as `units` of products and so many numbers between them are worth.
inline int64_t workers_for(int64_t units, int64_t numbers) { return count_workers(most(units, numbers / kAlone)); }

// The phase that quantizes rows of x: its units are pieces, counted through all rows.
struct Quantizing {
  const Kernels& kernels;
  const float* x;
  int64_t numbers;
  int bits;
  Activations out;

  int64_t units() const { return divide_up(numbers, kPiece); }
  void operator()(int64_t first, int64_t end, int64_t) const {
    const int64_t group = out.width / out.groups, from = first * kPiece, count = least(numbers, end * kPiece) - from;
    kernels.quantize(x + from, bits, 0, {out.codes + from, out.scales + from / group, out.sums + from / group, count,
                                         count / group});
  }
};

// y [tokens, rows] of rows `first` to `end` of a matrix by all activations. `next`: what its thread reads then; without
// codes: nothing.
void multiply_rows(const Kernels& kernels, const Matrix& matrix, const Activations& x, int64_t tokens, int64_t first,
                   int64_t end, const Place& next, const float* bias, float* y);

// Where unit `unit` of `some` rows of a matrix begins; -1: nowhere.
inline Place place_of(const Matrix& matrix, int64_t some, int64_t unit) {
  return unit < 0 ? Place{} : matrix.place(unit * some);
}

}  // namespace moedge
