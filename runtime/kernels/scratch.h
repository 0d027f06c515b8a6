// Memory and units of work that the ops share.

#pragma once

#include "kernels.h"
#include "phases.h"

namespace moedge {

// Weights that one unit of parallel work reads when there are few tokens: long enough to stream, short enough to share.
constexpr int64_t kUnitBytes = 64 << 10;
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

// body(first, end) over `units` units, in stretches: long ones first, because every new place in memory is read slowly
// at its beginning, and single units last, so that all threads end together.
template <typename Body>
void for_stretches(int64_t units, const Parallel& parallel, const Body& body) {
  const int64_t workers = count_workers(units);
  int64_t next = 0;
  parallel(workers, [&](int64_t) {
    int64_t first = __atomic_load_n(&next, __ATOMIC_RELAXED);
    while (first < units) {
      const int64_t end = first + most(1, (units - first) / (2 * workers));
      if (!__atomic_compare_exchange_n(&next, &first, end, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
      body(first, end);
      first = __atomic_load_n(&next, __ATOMIC_RELAXED);
    }
  });
}

// body(first, end) over `rows` rows of `width` numbers, a few at a time.
template <typename Body>
void for_rows(int64_t rows, int64_t width, const Parallel& parallel, const Body& body) {
  const int64_t some = rows * width <= kAlone ? rows : divide_up(kAlone, width);
  parallel(divide_up(rows, some), [&](int64_t unit) { body(unit * some, least(rows, (unit + 1) * some)); });
}

inline void quantize_rows(const Kernels& kernels, const float* x, int64_t rows, int bits, const Activations& out,
                          const Parallel& parallel) {
  for_rows(rows, out.width, parallel, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) kernels.quantize(x + row * out.width, bits, row, out);
  });
}

// y [tokens, rows] of rows `first` to `end` of a matrix by all activations.
void multiply_rows(const Kernels& kernels, const Matrix& matrix, const Activations& x, int64_t tokens, int64_t first,
                   int64_t end, const float* bias, float* y);

}  // namespace moedge
