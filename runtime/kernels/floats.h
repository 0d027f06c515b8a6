// Products of matrices in float or bf16, as routers have: see `multiply_floats` of Kernels.

#pragma once

namespace {

constexpr int64_t kSums = 64;  // that run side by side, whatever a vector holds

inline float add_halves(float* sums) {
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

inline float as_float(uint16_t bf16) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(bf16) << 16)); }

inline const void* element(const void* row, bool half, int64_t at) {
  return static_cast<const char*>(row) + at * (half ? 2 : 4);
}

// The last `count` columns of a row as float, and zeros behind them, which leave a sum as it is.
__attribute__((noinline, cold)) void take_end(const void* row, bool half, int64_t count, float* out) {
  memset(out, 0, kSums * sizeof *out);
  if (!half) memcpy(out, row, static_cast<size_t>(count) * sizeof *out);
  for (int64_t i = 0; half && i < count; ++i) out[i] = as_float(static_cast<const uint16_t*>(row)[i]);
}

// A row of the matrix, of float or (`half`) bf16, by M rows of x.
template <class S, int M>
void dot_floats(const void* row, bool half, int64_t width, const float* x, float* out, int64_t stride) {
  constexpr int64_t lanes = S::lanes, vectors = kSums / lanes;
  typename S::Float sums[M][vectors];
  for (int m = 0; m < M; ++m)
    for (int64_t v = 0; v < vectors; ++v) sums[m][v] = S::floats(0.0f);
  alignas(64) float held[kSums], ends[M * kSums];
  int64_t step = width;
  for (int64_t at = 0; at < width; at += kSums, x += kSums) {
    const void* from = element(row, half, at);
    const float* own = half ? held : static_cast<const float*>(from);
    if (at + kSums > width) {
      take_end(from, half, width - at, held);
      for (int m = 0; m < M; ++m) take_end(x + m * width, false, width - at, ends + m * kSums);
      own = held;
      x = ends;
      step = kSums;
    } else if (half) {  // one form for both types: each is more than a kilobyte
      for (int64_t v = 0; v < vectors; ++v)
        S::store_floats(held + v * lanes, S::load_some(static_cast<const uint16_t*>(from) + v * lanes));
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const typename S::Float mine = S::load_some(own + v * lanes);
      fetch(static_cast<const char*>(from) + v * lanes * 4 + kAhead);
      for (int m = 0; m < M; ++m)
        sums[m][v] = S::add(sums[m][v], S::multiply(mine, S::load_some(x + m * step + v * lanes)));
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int64_t v = 0; v < vectors; ++v) S::store_floats(held + v * lanes, sums[m][v]);
    out[m * stride] = add_halves(held);
  }
}

template <class S>
void multiply_floats(const void* matrix, bool half, int64_t rows, int64_t width, const float* x, int64_t count,
                     float* out, int64_t stride) {
  constexpr int M = S::lanes == 16 ? 4 : 1;  // as many as registers hold the sums of
  int64_t i = 0;
  for (; i + M <= count; i += M)
    for (int64_t r = 0; r < rows; ++r)
      dot_floats<S, M>(element(matrix, half, r * width), half, width, x + i * width, out + i * stride + r, stride);
  for (; i < count; ++i)
    for (int64_t r = 0; r < rows; ++r)
      dot_floats<S, 1>(element(matrix, half, r * width), half, width, x + i * width, out + i * stride + r, stride);
}

}  // namespace
