// A layer's mixture of experts: its router, its experts and the shared expert, each in steps that an op puts together to
// phases.

#pragma once

#include "step.h"

namespace moedge {

// A mixture of experts over tokens. E = experts, H = hidden, I = inner.
struct Mixture {
  const Kernels* kernels;
  int64_t tokens, choices, experts, hidden, inner;
  const float* x;        // [tokens, H]
  const int64_t* chosen; // [tokens, choices], each in [0, E)
  const float* weights;  // [tokens, choices]
  Matrix gate_up;        // [E] stacked: [2 I, H], rows gate 0, up 0, gate 1, up 1 ...
  Matrix down;           // [E] stacked: [H, I]
  const float* gate_up_bias;  // [E, 2 I] or null
  const float* down_bias;     // [E, H] or null
  float alpha, limit, offset; // of the activation, see `swiglu`
  float* y;                   // [tokens, H]
};

size_t mixture_scratch(const Mixture& mixture);
void run_mixture(const Mixture& mixture, void* scratch, const Parallel& parallel);

// A router, the experts that it chooses, and what all tokens share: y of the shared expert's `Mlp` where there is one, of
// the mixture otherwise.
struct Moe {
  Router router;
  Mixture mixture;  // what belongs to its tokens is set by the run
  Mlp shared;       // without a norm; null kernels: none. Its addend is the mixture
};

size_t moe_scratch(const Moe& moe);
void run_moe(const Moe& moe, void* scratch, const Parallel& parallel);

struct RouterSteps {
  Router r;  // what its caller does not want is in the scratch
  float* scores;  // [tokens, 2 E + groups]

  RouterSteps(const Router& router, Blocks* blocks);
  int64_t rows() const { return r.norm.tokens <= kSome ? 8 : least(r.gate.experts, 64); }
  int64_t units() const { return divide_up(r.norm.tokens, kSome) * divide_up(r.gate.experts, rows()); }
  // A unit is some experts by some tokens, so that one token's and many tokens' work can be shared out alike.
  void multiply(int64_t unit, int64_t last) const;
  void choose(int64_t first, int64_t end) const;  // of tokens

 private:
  static constexpr int64_t kSome = 64;
};

struct MixtureSteps {
  Mixture m;
  // The choices (token, weight), ordered by expert and within an expert by token: `starts` [E + 1].
  int32_t* starts;
  int32_t* active;  // the experts that were chosen at all
  int32_t* tokens;
  float* weights;
  Activations x;      // [tokens, H]
  float* h;           // [tokens * choices, I], in the choices' order
  Activations inner;  // [tokens * choices, I]
  float* outputs;     // [tokens * choices, H], where experts' last products are one after the other
  // Of active experts, and of their first and last products, once they are ordered.
  int64_t count = 0, up_units = 0, down_units = 0;

  MixtureSteps(const Mixture& mixture, Blocks* blocks);
  void order();
  int64_t blocks_of(const Matrix& stack) const { return divide_up(stack.rows, unit_rows(*m.kernels, stack)); }  // an expert's
  int64_t most_active() const { return least(m.experts, m.tokens * m.choices); }
  int64_t most_up_units() const { return most_active() * blocks_of(m.gate_up); }
  // Where unit `unit` of active experts' rows of a stack begins; -1: nowhere.
  Place place_at(const Matrix& matrix, int64_t unit) const;
  void multiply_up(int64_t unit, int64_t last, int64_t next) const;
  Quantizing quantizing() const { return {*m.kernels, h, m.tokens * m.choices * m.inner, m.down.bits, inner}; }
  // Few tokens choose many experts: their last products are then whole experts too, as rows of every one would be short
  // reads in many places.
  bool apart() const { return m.tokens * m.choices * m.hidden <= kMostApart; }
  int64_t most_down_units() const { return apart() ? most_active() * blocks_of(m.down) : 0; }
  void multiply_apart(int64_t unit, int64_t last, const Place& next) const;
  // Rows `first` to `end` of y: whoever has them adds their experts in ascending order, whatever else is computed.
  void finish(int64_t first, int64_t end) const;

 private:
  static constexpr int64_t kMostApart = 1 << 19;  // numbers

  bool alone(int32_t expert) const { return starts[expert + 1] - starts[expert] == 1; }
  int64_t step_of(int32_t expert) const;
  // work(place, row, count, next) of all rows of active experts' units of a stack; `behind` is read then.
  template <typename Work>
  void walk(const Matrix& stack, int64_t unit, int64_t last, const Place& behind, const Work& work) const;
  void compute_inner(int64_t place, int64_t first, int64_t rows, const Place& next) const;
  void compute_outputs(int64_t place, int64_t first, int64_t rows, const Place& next) const;
  void add_outputs(int64_t at, int64_t count, const float* rows, int64_t stride, int64_t first, int64_t end) const;
};

struct MlpSteps {
  Mlp m;
  Activations x;
  float* both;    // [tokens, 2 I]
  float* h;       // [tokens, I]
  Activations inner;
  float* shares;  // [tokens]

  MlpSteps(const Mlp& mlp, Blocks* blocks);
  int64_t up_rows() const { return unit_rows(*m.kernels, m.gate_up); }
  int64_t up_units() const { return divide_up(m.gate_up.rows, up_rows()); }
  void multiply_up(int64_t unit, int64_t last, int64_t next) const;
  int64_t pieces() const { return divide_up(m.down.width, kPiece); }  // of a token
  void activate(int64_t unit, int64_t last) const;
  void multiply_down(int64_t first, int64_t end, const Place& next) const;  // rows
  void finish(int64_t first, int64_t end) const;
};

}  // namespace moedge
