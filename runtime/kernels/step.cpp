// Norms, several products of one input, and the dense MLP.

#include "moe.h"

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

// silu(gate) * up of one token: `count` of its gates and of its ups.
void activate(const Kernels& kernels, const float* gates, const float* ups, int64_t count, float* h) {
  float pairs[2 * kPiece];
  for (int64_t i = 0; i < count; ++i) {
    pairs[2 * i] = gates[i];
    pairs[2 * i + 1] = ups[i];
  }
  kernels.swiglu(pairs, count, 1.0f, INFINITY, 0.0f, h);
}

}  // namespace

void run_norm(const Norm& norm, int64_t first, int64_t rows) {
  const int64_t width = norm.width;
  for (int64_t row = first; row < first + rows; ++row) {
    const float* x = norm.x + row * width;
    if (norm.residual) {
      const float* residual = norm.residual + row * width;
      float* sum = norm.sum + row * width;
      for (int64_t i = 0; i < width; ++i) sum[i] = x[i] + residual[i] * norm.residual_scale;  // rounded twice, as two nodes would
      x = sum;
    }
    if (!norm.weight) continue;
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    const float scale = 1.0f / sqrtf(mean + norm.epsilon);
    float* y = norm.y + row * width;
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * norm.weight[i];
  }
}

namespace {

Planes planes_of(const Projections& p) { return {p.kernels, p.norm, p.matrices[0], p.biases[0], p.y[0]}; }

}  // namespace

size_t projections_scratch(const Projections& projections) {
  if (projections.matrices[0].lower) return planes_scratch(planes_of(projections));
  Blocks blocks{nullptr};
  Norm norm = projections.norm;
  take_norm(&norm, &blocks);
  blocks.take_activations(norm.tokens, projections.matrices[0]);
  return blocks.used;
}

void run_projections(const Projections& p, void* scratch, const Parallel& parallel) {
  if (p.matrices[0].lower) return run_planes(planes_of(p), scratch, parallel);
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
  const auto place_at = [&](int64_t unit) {
    int64_t i = 0;
    for (; unit >= units[i]; ++i) unit -= units[i];
    return place_of(p.matrices[i], some[i], unit);
  };
  const auto multiply = [&](int64_t unit, int64_t last, int64_t next) {
    int64_t of = 0;
    for (int64_t i = 0; unit < last; of += units[i++]) {  // what the stretch has of each matrix
      const int64_t behind = least(last, of + units[i]);
      if (unit >= behind) continue;
      multiply_rows(*p.kernels, p.matrices[i], x, norm.tokens, (unit - of) * some[i],
                    least(p.matrices[i].rows, (behind - of) * some[i]), place_at(behind < last ? behind : next),
                    p.biases[i], p.y[i]);
      unit = behind;
    }
  };
  run_phases(parallel, {phase(entering.units(), entering), stream(total, multiply)},
             workers_for(total, entering.quantizing.numbers));
}

MlpSteps::MlpSteps(const Mlp& mlp, Blocks* blocks) : m(mlp) {
  const int64_t tokens = m.norm.tokens;
  take_norm(&m.norm, blocks);
  x = blocks->take_activations(tokens, m.gate_up);
  both = blocks->take<float>(tokens * m.gate_up.rows);
  h = blocks->take<float>(tokens * m.down.width);
  inner = blocks->take_activations(tokens, m.down);
  shares = blocks->take<float>(tokens);
}

void MlpSteps::multiply_up(int64_t unit, int64_t last, int64_t next) const {
  const int64_t rows = up_rows();
  multiply_rows(*m.kernels, m.gate_up, x, m.norm.tokens, unit * rows, least(m.gate_up.rows, last * rows),
                place_of(m.gate_up, rows, next), nullptr, both);
}

void MlpSteps::activate(int64_t unit, int64_t last) const {
  const int64_t width = m.down.width;
  for (; unit < last; ++unit) {
    const int64_t token = unit / pieces(), from = unit % pieces() * kPiece, count = least(kPiece, width - from);
    if (m.share && from == 0) {
      float logit = 0.0f;
      m.kernels->multiply_floats(m.share, false, 1, m.norm.width, input_of(m.norm) + token * m.norm.width, 1, &logit, 1);
      shares[token] = static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logit))));
    }
    const float* gates = both + token * 2 * width + from;
    float* some = h + token * width + from;
    moedge::activate(*m.kernels, gates, gates + width, count, some);
    const int64_t at = (token * width + from) / m.down.group;
    m.kernels->quantize(some, m.down.bits, 0, {inner.codes + token * width + from, inner.scales + at, inner.sums + at,
                                               count, count / m.down.group});
  }
}

void MlpSteps::multiply_down(int64_t first, int64_t end, const Place& next) const {
  multiply_rows(*m.kernels, m.down, inner, m.norm.tokens, first, end, next, nullptr, m.y);
}

// Each step is rounded as the nodes would that stand for it.
void MlpSteps::finish(int64_t first, int64_t end) const {
  for (int64_t token = 0; token < m.norm.tokens; ++token) {
    float* y = m.y + token * m.down.rows;
    const float* addend = m.addend + token * m.down.rows;
    for (int64_t row = first; m.share && row < end; ++row) y[row] *= shares[token];
    for (int64_t row = first; m.addend && row < end; ++row) y[row] += addend[row];
  }
}

size_t mlp_scratch(const Mlp& mlp) { return scratch_of<MlpSteps>(mlp); }

void run_mlp(const Mlp& mlp, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  const MlpSteps steps(mlp, &blocks);
  const Mlp& m = steps.m;
  const Entering entering(*m.kernels, m.norm, m.gate_up.bits, steps.x);
  const int64_t rows = unit_rows(*m.kernels, m.down), down_units = divide_up(m.down.rows, rows);
  const auto up = [&](int64_t unit, int64_t last, int64_t next) { steps.multiply_up(unit, last, next); };
  const auto activate = [&](int64_t unit, int64_t last, int64_t) { steps.activate(unit, last); };
  const auto down = [&](int64_t unit, int64_t last, int64_t next) {
    const int64_t first = unit * rows, end = least(m.down.rows, last * rows);
    steps.multiply_down(first, end, place_of(m.down, rows, next));
    steps.finish(first, end);
  };
  run_phases(parallel,
             {phase(entering.units(), entering), stream(steps.up_units(), up),
              phase(m.norm.tokens * steps.pieces(), activate), stream(down_units, down)},
             workers_for(most(steps.up_units(), down_units), m.norm.tokens * most(m.norm.width, m.down.width)));
}

}  // namespace moedge
