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

// The phase that makes the activations of products: the norm's rows, each quantized while it is in the cache, or where
// there is no norm pieces of x.
struct Entering {
  const Kernels& kernels;
  const Norm& norm;
  Quantizing quantizing;

  Entering(const Kernels& own, const Norm& given, int bits, const Activations& out)
      : kernels(own), norm(given), quantizing{own, input_of(given), given.tokens * given.width, bits, out} {}

  int64_t units() const { return norm.changes_x() ? norm.tokens : quantizing.units(); }
  void operator()(int64_t first, int64_t end, int64_t worker) const {
    if (!norm.changes_x()) return quantizing(first, end, worker);
    for (int64_t row = first; row < end; ++row) {
      run_norm(norm, row, 1);
      kernels.quantize(quantizing.x + row * norm.width, quantizing.bits, row, quantizing.out);
    }
  }
};

struct MlpScratch {
  Norm norm;
  Activations x;
  float* both;    // [tokens, 2 I]
  float* h;       // [tokens, I]
  Activations inner;
  float* shares;  // [tokens]
};

MlpScratch take_scratch(const Mlp& mlp, Blocks* blocks) {
  MlpScratch s{mlp.norm, {}, nullptr, nullptr, {}, nullptr};
  take_norm(&s.norm, blocks);
  s.x = blocks->take_activations(mlp.norm.tokens, mlp.gate_up);
  s.both = blocks->take<float>(mlp.norm.tokens * mlp.gate_up.rows);
  s.h = blocks->take<float>(mlp.norm.tokens * mlp.down.width);
  s.inner = blocks->take_activations(mlp.norm.tokens, mlp.down);
  s.shares = blocks->take<float>(mlp.norm.tokens);
  return s;
}

// silu(gate) * up of one token: `count` of its gates and of its ups.
void activate(const Kernels& kernels, const float* gates, const float* ups, int64_t count, float* h) {
  float pairs[2 * kPiece];
  for (int64_t i = 0; i < count; ++i) {
    pairs[2 * i] = gates[i];
    pairs[2 * i + 1] = ups[i];
  }
  kernels.swiglu(pairs, count, 1.0f, INFINITY, 0.0f, h);
}

// What is done to rows `first` to `end` of the products, each step rounded as the nodes would that stand for it.
void weigh_and_add(const Mlp& m, const float* shares, int64_t first, int64_t end) {
  for (int64_t token = 0; token < m.norm.tokens; ++token) {
    float* y = m.y + token * m.down.rows;
    const float* addend = m.addend + token * m.down.rows;
    for (int64_t row = first; m.share && row < end; ++row) y[row] *= shares[token];
    for (int64_t row = first; m.addend && row < end; ++row) y[row] += addend[row];
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
  const Entering entering(*p.kernels, norm, p.matrices[0].bits, x);
  int64_t some[kMaxMatrices], units[kMaxMatrices], total = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    some[i] = unit_rows(*p.kernels, p.matrices[i]);
    total += units[i] = divide_up(p.matrices[i].rows, some[i]);
  }
  const auto multiply = [&](int64_t unit, int64_t last, int64_t) {
    for (int64_t i = 0; unit < last; ++i) {  // what the stretch has of each matrix
      const int64_t next = least(last, units[i]);
      if (unit < next)
        multiply_rows(*p.kernels, p.matrices[i], x, norm.tokens, unit * some[i], least(p.matrices[i].rows, next * some[i]),
                      p.biases[i], p.y[i]);
      unit = most(0, unit - units[i]);
      last -= units[i];
    }
  };
  run_phases(parallel, {phase(entering.units(), entering), phase(total, multiply)},
             workers_for(total, entering.quantizing.numbers));
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
  const Entering entering(*m.kernels, s.norm, m.gate_up.bits, s.x);
  const int64_t up_rows = unit_rows(*m.kernels, m.gate_up), up_units = divide_up(m.gate_up.rows, up_rows);
  const int64_t down_rows = unit_rows(*m.kernels, m.down), down_units = divide_up(m.down.rows, down_rows);
  const auto multiply_up = [&](int64_t unit, int64_t last, int64_t) {
    multiply_rows(*m.kernels, m.gate_up, s.x, tokens, unit * up_rows, least(m.gate_up.rows, last * up_rows), nullptr, s.both);
  };
  const int64_t pieces = divide_up(inner, kPiece);  // of a token
  const auto activate_some = [&](int64_t unit, int64_t last, int64_t) {
    for (; unit < last; ++unit) {
      const int64_t token = unit / pieces, from = unit % pieces * kPiece, count = least(kPiece, inner - from);
      if (m.share && from == 0) {
        float logit = 0.0f;
        m.kernels->multiply_floats(m.share, false, 1, m.norm.width, input_of(s.norm) + token * m.norm.width, 1,
                                   &logit, 1);
        s.shares[token] = static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logit))));
      }
      const float* gates = s.both + token * 2 * inner + from;
      float* h = s.h + token * inner + from;
      activate(*m.kernels, gates, gates + inner, count, h);
      const int64_t at = (token * inner + from) / m.down.group;
      m.kernels->quantize(h, m.down.bits, 0, {s.inner.codes + token * inner + from, s.inner.scales + at,
                                              s.inner.sums + at, count, count / m.down.group});
    }
  };
  const auto multiply_down = [&](int64_t unit, int64_t last, int64_t) {
    const int64_t first = unit * down_rows, end = least(m.down.rows, last * down_rows);
    multiply_rows(*m.kernels, m.down, s.inner, tokens, first, end, nullptr, m.y);
    weigh_and_add(m, s.shares, first, end);
  };
  run_phases(parallel,
             {phase(entering.units(), entering), phase(up_units, multiply_up),
              phase(tokens * pieces, activate_some), phase(down_units, multiply_down)},
             workers_for(most(up_units, down_units), tokens * most(m.norm.width, inner)));
}

}  // namespace moedge
