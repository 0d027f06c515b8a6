// Norms, several products of one input, and the dense MLP.

#include "step.h"

#include <math.h>
#include <string.h>

namespace moedge {

namespace {

constexpr int64_t kLanes = 16;  // sums of squares that run side by side, in this order on every machine

float sum_of_squares(const float* x, int64_t width) {
  float sums[kLanes] = {};
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += x[at + i] * x[at + i];
  for (int64_t i = 0; at + i < width; ++i) sums[i] += x[at + i] * x[at + i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// The norm's rows, each quantized while it is in the cache.
void normalize_and_quantize(const Kernels& kernels, const Norm& norm, int bits, const Activations& out,
                            const Parallel& parallel) {
  for_rows(norm.tokens, norm.width, parallel, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      run_norm(norm, row, 1);
      kernels.quantize(input_of(norm) + row * norm.width, bits, row, out);
    }
  });
}

struct MlpScratch {
  Norm norm;
  Activations x;
  float* both;  // [tokens, 2 I]
  float* h;     // [tokens, I]
  Activations inner;
};

MlpScratch take_scratch(const Mlp& mlp, Blocks* blocks) {
  MlpScratch s{mlp.norm, {}, nullptr, nullptr, {}};
  take_norm(&s.norm, blocks);
  s.x = blocks->take_activations(mlp.norm.tokens, mlp.gate_up);
  s.both = blocks->take<float>(mlp.norm.tokens * mlp.gate_up.rows);
  s.h = blocks->take<float>(mlp.norm.tokens * mlp.down.width);
  s.inner = blocks->take_activations(mlp.norm.tokens, mlp.down);
  return s;
}

// silu(gate) * up of one token, whose gates lie before its ups.
void activate(const Kernels& kernels, const float* both, int64_t inner, float* h) {
  constexpr int64_t some = 256;
  float pairs[2 * some];
  for (int64_t from = 0; from < inner; from += some) {
    const int64_t count = least(some, inner - from);
    for (int64_t i = 0; i < count; ++i) {
      pairs[2 * i] = both[from + i];
      pairs[2 * i + 1] = both[inner + from + i];
    }
    kernels.swiglu(pairs, count, 1.0f, INFINITY, 0.0f, h + from);
  }
}

}  // namespace

void run_norm(const Norm& norm, int64_t first, int64_t rows) {
  const int64_t width = norm.width;
  for (int64_t row = first; row < first + rows; ++row) {
    const float* x = norm.x + row * width;
    if (norm.residual) {
      const float* residual = norm.residual + row * width;
      float* sum = norm.sum + row * width;
      for (int64_t i = 0; i < width; ++i) sum[i] = x[i] + residual[i];
      x = sum;
    }
    if (!norm.weight) continue;
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    const float scale = 1.0f / sqrtf(mean + norm.epsilon);
    float* y = norm.y + row * width;
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * norm.weight[i];
  }
}

size_t projections_scratch(const Projections& projections) {
  Blocks blocks{nullptr};
  Norm norm = projections.norm;
  take_norm(&norm, &blocks);
  blocks.take_activations(norm.tokens, projections.matrices[0]);
  return blocks.used;
}

void run_projections(const Projections& p, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  Norm norm = p.norm;
  take_norm(&norm, &blocks);
  const Activations x = blocks.take_activations(norm.tokens, p.matrices[0]);
  normalize_and_quantize(*p.kernels, norm, p.matrices[0].bits, x, parallel);
  int64_t some[kMaxMatrices], units[kMaxMatrices], total = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    some[i] = unit_rows(*p.kernels, p.matrices[i]);
    total += units[i] = divide_up(p.matrices[i].rows, some[i]);
  }
  for_stretches(total, parallel, [&](int64_t unit, int64_t last) {
    for (int64_t i = 0; unit < last; ++i) {  // what the stretch has of each matrix
      const int64_t next = least(last, units[i]);
      if (unit < next)
        multiply_rows(*p.kernels, p.matrices[i], x, norm.tokens, unit * some[i], least(p.matrices[i].rows, next * some[i]),
                      p.biases[i], p.y[i]);
      unit = most(0, unit - units[i]);
      last -= units[i];
    }
  });
}

size_t mlp_scratch(const Mlp& mlp) {
  Blocks blocks{nullptr};
  take_scratch(mlp, &blocks);
  return blocks.used;
}

void run_mlp(const Mlp& m, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  const MlpScratch s = take_scratch(m, &blocks);
  const int64_t tokens = m.norm.tokens, inner = m.down.width;
  normalize_and_quantize(*m.kernels, s.norm, m.gate_up.bits, s.x, parallel);
  const auto multiply = [&](const Matrix& matrix, const Activations& x, float* y) {
    const int64_t some = unit_rows(*m.kernels, matrix);
    for_stretches(divide_up(matrix.rows, some), parallel, [&](int64_t unit, int64_t last) {
      multiply_rows(*m.kernels, matrix, x, tokens, unit * some, least(matrix.rows, last * some), nullptr, y);
    });
  };
  multiply(m.gate_up, s.x, s.both);
  for_rows(tokens, inner, parallel, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      activate(*m.kernels, s.both + row * 2 * inner, inner, s.h + row * inner);
      m.kernels->quantize(s.h + row * inner, m.down.bits, row, s.inner);
    }
  });
  multiply(m.down, s.inner, m.y);
}

}  // namespace moedge
