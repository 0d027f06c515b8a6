// A digest of what the kernels give, for each instruction set of the processor it runs on: the same digest everywhere.
//
// Compiled and run by scripts/check_kernels.py, also for other processors and under sanitizers.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

#include "../runtime/kernels/kernels.h"

using namespace moedge;

namespace {

uint64_t state = 1;

uint32_t next() {  // Knuth's MMIX generator
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

template <typename T>
T* take(int64_t count) {  // exactly as much as is needed, so that a sanitizer sees each step beyond it
  return static_cast<T*>(malloc(static_cast<size_t>(count) * sizeof(T)));
}

float* floats(int64_t count, float size) {
  float* values = take<float>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = (static_cast<float>(next() % 65536) / 32768.0f - 1.0f) * size;
  return values;
}

Matrix matrices(int64_t count, int64_t rows, int64_t width, int64_t group, int bits, bool zeros) {
  Matrix made{nullptr, nullptr, nullptr, rows, width, group, bits};
  const int64_t bytes = count * rows * made.row_bytes(), packed = count * rows * made.zero_row_bytes();
  uint8_t* codes = take<uint8_t>(bytes);
  for (int64_t i = 0; i < bytes; ++i) codes[i] = static_cast<uint8_t>(next());
  uint8_t* points = zeros ? take<uint8_t>(packed) : nullptr;
  for (int64_t i = 0; points && i < packed; ++i) points[i] = static_cast<uint8_t>(next());
  made.codes = codes;
  made.zero_points = points;
  made.scales = floats(count * rows * made.groups(), bits == 4 ? 0.02f : 0.001f);
  return made;
}

void release(const Matrix& matrix) {
  free(const_cast<uint8_t*>(matrix.codes));
  free(const_cast<uint8_t*>(matrix.zero_points));
  free(const_cast<float*>(matrix.scales));
}

uint64_t digest(uint64_t held, const float* values, int64_t count) {  // FNV-1a
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values);
  for (size_t i = 0; i < static_cast<size_t>(count) * sizeof *values; ++i) held = (held ^ bytes[i]) * 1099511628211u;
  return held;
}

void serially(void*, void (*body)(void*, size_t), size_t total, void* data) {
  for (size_t i = 0; i < total; ++i) body(data, i);
}

uint64_t run_one(const Kernels* kernels, int64_t tokens, int64_t hidden, int64_t inner, int64_t group, int bits, bool full) {
  const int64_t experts = 5, choices = 2;
  float *x = floats(tokens * hidden, 2.0f), *weights = floats(tokens * choices, 1.0f);
  float *up_bias = floats(experts * 2 * inner, 1.0f), *down_bias = floats(experts * hidden, 1.0f);
  int64_t* chosen = take<int64_t>(tokens * choices);
  for (int64_t i = 0; i < tokens * choices; ++i) chosen[i] = next() % experts;
  const Matrix up = matrices(experts, 2 * inner, hidden, group, bits, full);
  const Matrix down = matrices(experts, hidden, inner, group, bits, full);
  float* y = take<float>(tokens * hidden);
  const Parallel parallel{serially, nullptr};
  const Mixture mixture{kernels, tokens, choices, experts, hidden, inner, x, chosen, weights, up, down,
                        full ? up_bias : nullptr, full ? down_bias : nullptr, full ? 1.702f : 1.0f,
                        full ? 7.0f : INFINITY, full ? 1.0f : 0.0f, y};
  void* scratch = nullptr;
  if (posix_memalign(&scratch, 64, mixture_scratch(mixture))) abort();
  run_mixture(mixture, scratch, parallel);
  const uint64_t found = digest(14695981039346656037u, y, tokens * hidden);
  Matrix odd = up.at(1);
  odd.rows -= 3;  // the last tile is not whole
  const Linear linear{kernels, tokens, x, odd, nullptr, take<float>(tokens * odd.rows)};
  void* more = nullptr;
  if (posix_memalign(&more, 64, linear_scratch(linear))) abort();
  run_linear(linear, more, parallel);
  const uint64_t both = digest(found, linear.y, tokens * odd.rows);
  for (void* block : {static_cast<void*>(x), static_cast<void*>(weights), static_cast<void*>(up_bias),
                      static_cast<void*>(down_bias), static_cast<void*>(chosen), static_cast<void*>(y), scratch, more,
                      static_cast<void*>(linear.y)})
    free(block);
  release(up);
  release(down);
  return both;
}

}  // namespace

int main() {
  for (const char* name : {"avx512", "avxvnni", "avx2", "neon", "portable"}) {
    const Kernels* kernels = find_kernels(name);
    if (!kernels) continue;
    state = 1;
    uint64_t all = 0;
    for (int bits : {4, 8})
      for (int full = 0; full < 2; ++full)
        for (int64_t tokens : {1, 2, 3, 7, 40, 300}) {
          all = all * 31 + run_one(kernels, tokens, 48, 48, 16, bits, full);
          all = all * 31 + run_one(kernels, tokens, 96, 32, 32, bits, full);
          all = all * 31 + run_one(kernels, tokens, 576, 64, 64, bits, full);
          all = all * 31 + run_one(kernels, tokens, 128, 640, 128, bits, full);
          all = all * 31 + run_one(kernels, tokens, 512, 256, 256, bits, full);
        }
    printf("%s %016llx\n", name, static_cast<unsigned long long>(all));
  }
  return 0;
}
