// How products are shared among threads: a mixture of experts, and one linear layer.

#include <string.h>

#include "kernels.h"
#include "scratch.h"

namespace moedge {

namespace {

// Rows computed by one call where there is one token; several take a tile, whose weights stay in the cache for all.
constexpr int64_t kMaxAlone = 1024;
static_assert(kMaxAlone <= kMaxTokens * kMaxTile, "buffers hold that many");

// The choices (token, weight), ordered by expert and within an expert by token: `starts` [E + 1].
struct Choices {
  int32_t* starts;
  int32_t* active;  // the experts that were chosen at all
  int32_t* tokens;
  float* weights;
  int64_t count = 0;

  bool alone(int32_t expert) const { return starts[expert + 1] - starts[expert] == 1; }
};

Choices take_choices(const Mixture& m, Blocks* blocks) {
  int32_t* starts = blocks->take<int32_t>(m.experts + 1);
  int32_t* active = blocks->take<int32_t>(m.experts);
  int32_t* tokens = blocks->take<int32_t>(m.tokens * m.choices);
  return {starts, active, tokens, blocks->take<float>(m.tokens * m.choices)};
}

void order_choices(const Mixture& m, Choices* choices) {
  int32_t* starts = choices->starts;
  memset(starts, 0, static_cast<size_t>(m.experts + 1) * sizeof *starts);
  for (int64_t i = 0; i < m.tokens * m.choices; ++i) ++starts[m.chosen[i] + 1];
  for (int64_t e = 0; e < m.experts; ++e) {
    if (starts[e + 1] > 0) choices->active[choices->count++] = static_cast<int32_t>(e);
    starts[e + 1] += starts[e];
  }
  for (int64_t i = 0; i < m.tokens * m.choices; ++i) {
    const int32_t place = starts[m.chosen[i]]++;  // each start moves to its expert's end: the next one's start
    choices->tokens[place] = static_cast<int32_t>(i / m.choices);
    choices->weights[place] = m.weights[i];
  }
  for (int64_t e = m.experts; e > 0; --e) starts[e] = starts[e - 1];
  starts[0] = 0;
}

struct Scratch {
  Choices choices;
  Activations x;      // [tokens, H]
  float* h;           // [tokens * choices, I], in the choices' order
  Activations inner;  // [tokens * choices, I]
};

Scratch take_scratch(const Mixture& m, Blocks* blocks) {
  const Choices choices = take_choices(m, blocks);
  const Activations x = blocks->take_activations(m.tokens, m.gate_up);
  float* h = blocks->take<float>(m.tokens * m.choices * m.inner);
  return {choices, x, h, blocks->take_activations(m.tokens * m.choices, m.down)};
}

// h of rows `first` to `first + rows` (pairs of gate and up) for the tokens of one expert.
void compute_inner(const Mixture& m, const Scratch& s, int32_t expert, int64_t first, int64_t rows) {
  const int64_t start = s.choices.starts[expert], end = s.choices.starts[expert + 1];
  const float* bias = m.gate_up_bias ? m.gate_up_bias + expert * 2 * m.inner + first : nullptr;
  alignas(64) float pairs[kMaxTokens * kMaxTile];
  for (int64_t at = start; at < end; at += kMaxTokens) {
    const int64_t count = least(kMaxTokens, end - at);
    m.kernels->multiply(m.gate_up.at(expert), first, rows, s.x, s.choices.tokens + at, count, pairs, rows);
    for (int64_t i = 0; i < count; ++i) {
      float* row = pairs + i * rows;
      for (int64_t r = 0; bias && r < rows; ++r) row[r] += bias[r];
      m.kernels->swiglu(row, rows / 2, m.alpha, m.limit, m.offset, s.h + (at + i) * m.inner + first / 2);
    }
  }
}

// Adds one expert's rows `first` to `first + rows` to y, for the expert's tokens.
void add_outputs(const Mixture& m, const Scratch& s, int32_t expert, int64_t first, int64_t rows) {
  const int64_t start = s.choices.starts[expert], end = s.choices.starts[expert + 1];
  const float* bias = m.down_bias ? m.down_bias + expert * m.hidden + first : nullptr;
  alignas(64) float outputs[kMaxTokens * kMaxTile];
  Activations inner = s.inner;
  for (int64_t at = start; at < end; at += kMaxTokens) {
    const int64_t count = least(kMaxTokens, end - at);
    inner.codes = s.inner.codes + at * inner.width;
    inner.scales = s.inner.scales + at * inner.groups;
    inner.sums = s.inner.sums + at * inner.groups;
    m.kernels->multiply(m.down.at(expert), first, rows, inner, nullptr, count, outputs, rows);
    for (int64_t i = 0; i < count; ++i) {
      const float weight = s.choices.weights[at + i];
      const float* row = outputs + i * rows;
      float* y = m.y + s.choices.tokens[at + i] * m.hidden + first;
      for (int64_t r = 0; r < rows; ++r) y[r] += weight * (bias ? row[r] + bias[r] : row[r]);
    }
  }
}

}  // namespace

size_t mixture_scratch(const Mixture& mixture) {
  Blocks blocks{nullptr};
  take_scratch(mixture, &blocks);
  return blocks.used;
}

void run_mixture(const Mixture& m, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  Scratch s = take_scratch(m, &blocks);
  order_choices(m, &s.choices);
  const int64_t tile = m.kernels->tile, count = s.choices.count, inner_numbers = m.tokens * m.choices * m.inner;
  const int64_t up_rows = unit_rows(*m.kernels, m.gate_up), up_blocks = divide_up(2 * m.inner, up_rows);
  const int64_t up_units = count * up_blocks, down_units = divide_up(m.hidden, tile);
  const auto multiply_up = [&](int64_t unit, int64_t last, int64_t) {
    while (unit < last) {  // what the stretch has of one expert
      const int64_t of = unit / up_blocks * up_blocks, next = least(last, of + up_blocks);
      const int32_t expert = s.choices.active[unit / up_blocks];
      const int64_t end = least(2 * m.inner, (next - of) * up_rows), step = s.choices.alone(expert) ? kMaxAlone : tile;
      for (int64_t row = (unit - of) * up_rows; row < end; row += step)
        compute_inner(m, s, expert, row, least(step, end - row));
      unit = next;
    }
  };
  // A stretch has some rows of y alone to itself, and adds its experts in ascending order whatever else is computed.
  const auto multiply_down = [&](int64_t unit, int64_t last, int64_t) {
    const int64_t first = unit * tile, end = least(m.hidden, last * tile);
    for (int64_t token = 0; token < m.tokens; ++token)
      memset(m.y + token * m.hidden + first, 0, static_cast<size_t>(end - first) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      const int32_t expert = s.choices.active[i];
      const int64_t step = s.choices.alone(expert) ? kMaxAlone : tile;
      for (int64_t row = first; row < end; row += step) add_outputs(m, s, expert, row, least(step, end - row));
    }
  };
  const Quantizing outer{*m.kernels, m.x, m.tokens * m.hidden, m.gate_up.bits, s.x};
  const Quantizing inner{*m.kernels, s.h, inner_numbers, m.down.bits, s.inner};
  run_phases(parallel,
             {phase(outer.units(), outer), phase(up_units, multiply_up), phase(inner.units(), inner),
              phase(down_units, multiply_down)},
             workers_for(most(up_units, down_units), most(outer.numbers, inner_numbers)));
}

size_t linear_scratch(const Linear& linear) {
  Blocks blocks{nullptr};
  blocks.take_activations(linear.tokens, linear.matrix);
  return blocks.used;
}

void multiply_rows(const Kernels& kernels, const Matrix& matrix, const Activations& x, int64_t tokens, int64_t first,
                   int64_t end, const float* bias, float* y) {
  const int64_t step = tokens == 1 ? end - first : kernels.tile;
  for (int64_t row = first; row < end; row += step) {
    const int64_t width = least(step, end - row);
    for (int64_t at = 0; at < tokens; at += kMaxTokens) {
      const int64_t count = least(kMaxTokens, tokens - at);
      Activations part = x;
      part.codes += at * x.width;
      part.scales += at * x.groups;
      part.sums += at * x.groups;
      float* out = y + at * matrix.rows + row;
      kernels.multiply(matrix, row, width, part, nullptr, count, out, matrix.rows);
      for (int64_t i = 0; bias && i < count; ++i)
        for (int64_t r = 0; r < width; ++r) out[i * matrix.rows + r] += bias[row + r];
    }
  }
}

void run_linear(const Linear& l, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  const Activations x = blocks.take_activations(l.tokens, l.matrix);
  const Quantizing quantizing{*l.kernels, l.x, l.tokens * l.matrix.width, l.matrix.bits, x};
  const int64_t rows = l.matrix.rows, some = unit_rows(*l.kernels, l.matrix), units = divide_up(rows, some);
  const auto multiply = [&](int64_t unit, int64_t last, int64_t) {
    multiply_rows(*l.kernels, l.matrix, x, l.tokens, unit * some, least(rows, last * some), l.bias, l.y);
  };
  run_phases(parallel, {phase(quantizing.units(), quantizing), phase(units, multiply)},
             workers_for(units, quantizing.numbers));
}

}  // namespace moedge
