// How products are shared among threads: a mixture of experts, and one linear layer.

#include <string.h>

#include "moe.h"

namespace moedge {

namespace {

// Rows computed by one call where there is one token; several take a tile, whose weights stay in the cache for all.
constexpr int64_t kMaxAlone = 1024;
static_assert(kMaxAlone <= kMaxTokens * kMaxTile, "buffers hold that many");

}  // namespace

MixtureSteps::MixtureSteps(const Mixture& mixture, Blocks* blocks) : m(mixture) {
  const int64_t choices = m.tokens * m.choices;
  starts = blocks->take<int32_t>(m.experts + 1);
  active = blocks->take<int32_t>(m.experts);
  tokens = blocks->take<int32_t>(choices);
  weights = blocks->take<float>(choices);
  x = blocks->take_activations(m.tokens, m.gate_up);
  h = blocks->take<float>(choices * m.inner);
  inner = blocks->take_activations(choices, m.down);
  outputs = blocks->take<float>(apart() ? choices * m.hidden : 0);
}

void MixtureSteps::order() {
  memset(starts, 0, static_cast<size_t>(m.experts + 1) * sizeof *starts);
  for (int64_t i = 0; i < m.tokens * m.choices; ++i) ++starts[m.chosen[i] + 1];
  for (int64_t e = 0; e < m.experts; ++e) {
    if (starts[e + 1] > 0) active[count++] = static_cast<int32_t>(e);
    starts[e + 1] += starts[e];
  }
  for (int64_t i = 0; i < m.tokens * m.choices; ++i) {
    const int32_t place = starts[m.chosen[i]]++;  // each start moves to its expert's end: the next one's start
    tokens[place] = static_cast<int32_t>(i / m.choices);
    weights[place] = m.weights[i];
  }
  for (int64_t e = m.experts; e > 0; --e) starts[e] = starts[e - 1];
  starts[0] = 0;
  up_units = count * blocks_of(m.gate_up);
  down_units = apart() ? count * blocks_of(m.down) : 0;
}

int64_t MixtureSteps::step_of(int32_t expert) const { return alone(expert) ? kMaxAlone : m.kernels->tile; }

// h of rows `first` to `first + rows` (pairs of gate and up) for the tokens of one active expert.
void MixtureSteps::compute_inner(int64_t place, int64_t first, int64_t rows, const Place& next) const {
  const int32_t expert = active[place];
  const int64_t start = starts[expert], end = starts[expert + 1];
  const float* bias = m.gate_up_bias ? m.gate_up_bias + expert * 2 * m.inner + first : nullptr;
  const Matrix matrix = m.gate_up.at(expert).before(next);
  alignas(64) float pairs[kMaxTokens * kMaxTile];
  for (int64_t at = start; at < end; at += kMaxTokens) {
    const int64_t some = least(kMaxTokens, end - at);
    m.kernels->multiply(matrix, first, rows, x, tokens + at, some, pairs, rows);
    for (int64_t i = 0; i < some; ++i) {
      float* row = pairs + i * rows;
      for (int64_t r = 0; bias && r < rows; ++r) row[r] += bias[r];
      m.kernels->swiglu(row, rows / 2, m.alpha, m.limit, m.offset, h + (at + i) * m.inner + first / 2);
    }
  }
}

Place MixtureSteps::place_at(const Matrix& matrix, int64_t unit) const {
  if (unit < 0) return {};
  const int64_t blocks = blocks_of(matrix);
  return place_of(matrix.at(active[unit / blocks]), unit_rows(*m.kernels, matrix), unit % blocks);
}

template <typename Work>
void MixtureSteps::walk(const Matrix& matrix, int64_t unit, int64_t last, const Place& behind, const Work& work) const {
  const int64_t some = unit_rows(*m.kernels, matrix), blocks = blocks_of(matrix);
  while (unit < last) {  // what the stretch has of one expert
    const int64_t place = unit / blocks, of = place * blocks, next = least(last, of + blocks);
    const int64_t end = least(matrix.rows, (next - of) * some), step = step_of(active[place]);
    for (int64_t row = (unit - of) * some; row < end; row += step) {
      const int64_t count = least(step, end - row);
      if (row + count < end)
        work(place, row, count, Place{});
      else
        work(place, row, count, next < last ? place_at(matrix, next) : behind);
    }
    unit = next;
  }
}

void MixtureSteps::multiply_up(int64_t unit, int64_t last, int64_t next) const {
  walk(m.gate_up, unit, last, place_at(m.gate_up, next),
       [&](int64_t place, int64_t row, int64_t count, const Place& then) { compute_inner(place, row, count, then); });
}

// Adds rows `first` to `end` of choices `at` to `at + some` to y: `rows` has them, `stride` apart.
void MixtureSteps::add_outputs(int64_t at, int64_t some, const float* rows, int64_t stride, int64_t first,
                               int64_t end) const {
  for (int64_t i = 0; i < some; ++i, rows += stride) {
    const float weight = weights[at + i];
    float* y = m.y + tokens[at + i] * m.hidden;
    for (int64_t r = first; r < end; ++r) y[r] += weight * rows[r - first];
  }
}

// Rows `first` to `first + rows` of one active expert for its tokens. They go to y, or to `outputs` where those are apart.
void MixtureSteps::compute_outputs(int64_t place, int64_t first, int64_t rows, const Place& next) const {
  const int32_t expert = active[place];
  const int64_t start = starts[expert], end = starts[expert + 1];
  const float* bias = m.down_bias ? m.down_bias + expert * m.hidden + first : nullptr;
  const Matrix matrix = m.down.at(expert).before(next);
  alignas(64) float buffer[kMaxTokens * kMaxTile];
  for (int64_t at = start; at < end; at += kMaxTokens) {
    const int64_t some = least(kMaxTokens, end - at), stride = apart() ? m.hidden : rows;
    float* out = apart() ? outputs + at * m.hidden + first : buffer;
    m.kernels->multiply(matrix, first, rows, inner.from(at), nullptr, some, out, stride);
    for (int64_t i = 0; bias && i < some; ++i)
      for (int64_t r = 0; r < rows; ++r) out[i * stride + r] += bias[r];
    if (!apart()) add_outputs(at, some, out, stride, first, first + rows);
  }
}

void MixtureSteps::multiply_apart(int64_t unit, int64_t last, const Place& next) const {
  walk(m.down, unit, last, next,
       [&](int64_t place, int64_t row, int64_t count, const Place& then) { compute_outputs(place, row, count, then); });
}

void MixtureSteps::finish(int64_t first, int64_t end) const {
  for (int64_t token = 0; token < m.tokens; ++token)
    memset(m.y + token * m.hidden + first, 0, static_cast<size_t>(end - first) * sizeof(float));
  if (apart()) return add_outputs(0, m.tokens * m.choices, outputs + first, m.hidden, first, end);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t step = step_of(active[i]);
    for (int64_t row = first; row < end; row += step) {
      const bool goes_on = row + step >= end && i + 1 < count;
      compute_outputs(i, row, least(step, end - row), goes_on ? m.down.at(active[i + 1]).place(first) : Place{});
    }
  }
}

size_t mixture_scratch(const Mixture& mixture) { return scratch_of<MixtureSteps>(mixture); }

void run_mixture(const Mixture& mixture, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  MixtureSteps steps(mixture, &blocks);
  steps.order();
  const Mixture& m = steps.m;
  const int64_t rows = m.kernels->tile, last_units = divide_up(m.hidden, rows);
  const Quantizing outer{*m.kernels, m.x, m.tokens * m.hidden, m.gate_up.bits, steps.x}, inner = steps.quantizing();
  const auto up = [&](int64_t unit, int64_t last, int64_t next) { steps.multiply_up(unit, last, next); };
  const auto down = [&](int64_t unit, int64_t last, int64_t next) {
    steps.multiply_apart(unit, last, steps.place_at(m.down, next));
  };
  const auto finish = [&](int64_t unit, int64_t last, int64_t) {
    steps.finish(unit * rows, least(m.hidden, last * rows));
  };
  run_phases(parallel,
             {phase(outer.units(), outer), stream(steps.up_units, up), phase(inner.units(), inner),
              stream(steps.down_units, down), phase(last_units, finish)},
             workers_for(most(steps.up_units, last_units), most(outer.numbers, inner.numbers)));
}

namespace {

Planes planes_of(const Linear& l) {
  const Norm none{l.tokens, l.matrix.width, l.x, nullptr, nullptr, 0.0f, nullptr, nullptr};
  return {l.kernels, none, l.matrix, l.bias, l.y};
}

}  // namespace

size_t linear_scratch(const Linear& linear) {
  if (linear.matrix.lower) return planes_scratch(planes_of(linear));
  Blocks blocks{nullptr};
  blocks.take_activations(linear.tokens, linear.matrix);
  return blocks.used;
}

void multiply_rows(const Kernels& kernels, const Matrix& matrix, const Activations& x, int64_t tokens, int64_t first,
                   int64_t end, const Place& next, const float* bias, float* y) {
  const int64_t step = tokens == 1 ? end - first : kernels.tile;
  for (int64_t row = first; row < end; row += step) {
    const int64_t width = least(step, end - row);
    const Matrix own = matrix.before(row + width < end ? Place{} : next);
    for (int64_t at = 0; at < tokens; at += kMaxTokens) {
      const int64_t count = least(kMaxTokens, tokens - at);
      float* out = y + at * matrix.rows + row;
      kernels.multiply(own, row, width, x.from(at), nullptr, count, out, matrix.rows);
      for (int64_t i = 0; bias && i < count; ++i)
        for (int64_t r = 0; r < width; ++r) out[i * matrix.rows + r] += bias[row + r];
    }
  }
}

void run_linear(const Linear& l, void* scratch, const Parallel& parallel) {
  if (l.matrix.lower) return run_planes(planes_of(l), scratch, parallel);
  Blocks blocks{static_cast<char*>(scratch)};
  const Activations x = blocks.take_activations(l.tokens, l.matrix);
  const Quantizing quantizing{*l.kernels, l.x, l.tokens * l.matrix.width, l.matrix.bits, x};
  const int64_t rows = l.matrix.rows, some = unit_rows(*l.kernels, l.matrix), units = divide_up(rows, some);
  const auto multiply = [&](int64_t unit, int64_t last, int64_t next) {
    multiply_rows(*l.kernels, l.matrix, x, l.tokens, unit * some, least(rows, last * some), place_of(l.matrix, some, next),
                  l.bias, l.y);
  };
  run_phases(parallel, {phase(quantizing.units(), quantizing), stream(units, multiply)},
             workers_for(units, quantizing.numbers));
}

}  // namespace moedge
