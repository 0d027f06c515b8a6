// A layer's mixture of experts in one parallel region. What needs the router's choice waits for it; what does not is
// done beside it.

#include "moe.h"

namespace moedge {

namespace {

struct MoeSteps {
  const Moe& moe;
  RouterSteps router;
  MixtureSteps experts;
  MlpSteps shared;
  bool alike;  // the experts and the shared expert take the same activations

  MoeSteps(const Moe& given, Blocks* blocks)
      : moe(given), router(given.router, blocks), experts(mixture_of(given, router.r, blocks), blocks),
        shared(shared_of(given, router.r, experts.m.y), blocks),
        alike(given.shared.gate_up.bits == given.mixture.gate_up.bits &&
              given.shared.gate_up.group == given.mixture.gate_up.group) {
    if (alike) shared.x = experts.x;
  }

  bool has_shared() const { return moe.shared.kernels != nullptr; }

  static Mixture mixture_of(const Moe& moe, const Router& r, Blocks* blocks) {
    Mixture mixture = moe.mixture;
    mixture.tokens = r.norm.tokens;
    mixture.choices = r.gate.top_k;
    mixture.x = input_of(r.norm);
    mixture.chosen = r.experts;
    mixture.weights = r.weights;
    if (moe.shared.kernels) mixture.y = blocks->take<float>(r.norm.tokens * mixture.hidden);
    return mixture;
  }
  static Mlp shared_of(const Moe& moe, const Router& r, const float* mixed) {
    Mlp mlp = moe.shared;
    mlp.norm = {mlp.kernels ? r.norm.tokens : 0, r.norm.width, input_of(r.norm), nullptr, nullptr, 0.0f, nullptr, nullptr};
    mlp.addend = mixed;
    if (!mlp.kernels) mlp.gate_up.group = mlp.down.group = 1;
    return mlp;
  }
};

}  // namespace

size_t moe_scratch(const Moe& moe) { return scratch_of<MoeSteps>(moe); }

void run_moe(const Moe& moe, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  MoeSteps s(moe, &blocks);
  const Mixture& m = s.experts.m;
  const Norm& norm = s.router.r.norm;
  const int64_t tokens = norm.tokens, rows = s.experts.down_rows(), last_units = divide_up(m.hidden, rows);
  const int64_t shared_units = s.has_shared() ? s.shared.up_units() : 0;
  const Entering entering(*m.kernels, norm, m.gate_up.bits, s.experts.x,
                          s.has_shared() && !s.alike ? &s.shared.x : nullptr, moe.shared.gate_up.bits);
  const Quantizing inner = s.experts.quantizing();
  const auto logits = [&](int64_t unit, int64_t last, int64_t) { s.router.multiply(unit, last); };
  const auto choose = [&](int64_t unit, int64_t last, int64_t) { s.router.choose(unit, last); };
  const auto order = [&](int64_t unit, int64_t last, int64_t) {
    if (unit == 0) {
      if (tokens == 1) s.router.choose(0, 1);
      s.experts.order();
      ++unit;
    }
    if (unit < last) s.shared.multiply_up(unit - 1, last - 1);
  };
  const auto up = [&](int64_t unit, int64_t last, int64_t) { s.experts.multiply_up(unit, last); };
  const auto between = [&](int64_t unit, int64_t last, int64_t worker) {
    const int64_t own = inner.units();
    if (unit < own) inner(unit, least(last, own), worker);
    if (last > own) s.shared.activate(most(unit, own) - own, last - own);
  };
  const auto down = [&](int64_t unit, int64_t last, int64_t) { s.experts.multiply_apart(unit, last); };
  const auto finish = [&](int64_t unit, int64_t last, int64_t) {
    const int64_t first = unit * rows, end = least(m.hidden, last * rows);
    s.experts.finish(first, end);
    if (s.has_shared()) s.shared.multiply_down(first, end);
  };
  const int64_t up_units = s.experts.most_up_units();
  run_phases(parallel,
             {phase(entering.units(), entering), phase(s.router.units(), logits), phase(tokens == 1 ? 0 : tokens, choose),
              phase(1 + shared_units, order), counted_phase(up_units, &s.experts.up_units, up),
              phase(inner.units() + (s.has_shared() ? tokens * s.shared.pieces() : 0), between),
              counted_phase(s.experts.most_down_units(), &s.experts.down_units, down), phase(last_units, finish)},
             workers_for(most(up_units, last_units), most(tokens * m.hidden, inner.numbers)));
}

}  // namespace moedge
