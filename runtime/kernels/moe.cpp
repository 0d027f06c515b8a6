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
  int64_t down_units = 0;  // of last products that have a phase to themselves, once experts are ordered: the shared ones first

  MoeSteps(const Moe& given, Blocks* blocks)
      : moe(given), router(given.router, blocks), experts(mixture_of(given, router.r, blocks), blocks),
        shared(shared_of(given, router.r, experts.m.y), blocks),
        alike(given.shared.gate_up.bits == given.mixture.gate_up.bits &&
              given.shared.gate_up.group == given.mixture.gate_up.group) {
    if (alike) shared.x = experts.x;
  }

  bool has_shared() const { return moe.shared.kernels != nullptr; }
  int64_t down_rows() const { return unit_rows(*experts.m.kernels, shared.m.down); }
  int64_t shared_down() const { return has_shared() && experts.apart() ? divide_up(shared.m.down.rows, down_rows()) : 0; }
  int64_t most_down_units() const { return shared_down() + experts.most_down_units(); }

  void order() {
    experts.order();
    down_units = shared_down() + experts.down_units;
  }
  Place down_at(int64_t unit) const {
    const int64_t own = shared_down();
    return unit < own ? place_of(shared.m.down, down_rows(), unit) : experts.place_at(experts.m.down, unit - own);
  }
  void multiply_down(int64_t unit, int64_t last, int64_t next) const {
    const int64_t own = shared_down(), rows = down_rows(), until = least(last, own);
    if (unit < until)
      shared.multiply_down(unit * rows, least(shared.m.down.rows, until * rows), down_at(until < last ? until : next));
    if (last > own) experts.multiply_apart(most(unit, own) - own, last - own, down_at(next));
  }

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
  const int64_t tokens = norm.tokens, rows = m.kernels->tile, last_units = divide_up(m.hidden, rows);
  const int64_t shared_units = s.has_shared() ? s.shared.up_units() : 0;
  const Entering entering(*m.kernels, norm, m.gate_up.bits, s.experts.x,
                          s.has_shared() && !s.alike ? &s.shared.x : nullptr, moe.shared.gate_up.bits);
  const Quantizing inner = s.experts.quantizing();
  const auto logits = [&](int64_t unit, int64_t last, int64_t) { s.router.multiply(unit, last); };
  const auto choose = [&](int64_t unit, int64_t last, int64_t) { s.router.choose(unit, last); };
  const auto order = [&](int64_t unit, int64_t last, int64_t next) {
    if (unit == 0) {
      if (tokens == 1) s.router.choose(0, 1);
      s.order();
      ++unit;
    }
    if (unit < last) s.shared.multiply_up(unit - 1, last - 1, next > 0 ? next - 1 : -1);
  };
  const auto up = [&](int64_t unit, int64_t last, int64_t next) { s.experts.multiply_up(unit, last, next); };
  const auto between = [&](int64_t unit, int64_t last, int64_t worker) {
    const int64_t own = inner.units();
    if (unit < own) inner(unit, least(last, own), worker);
    if (last > own) s.shared.activate(most(unit, own) - own, last - own);
  };
  const auto down = [&](int64_t unit, int64_t last, int64_t next) { s.multiply_down(unit, last, next); };
  const auto finish = [&](int64_t unit, int64_t last, int64_t) {
    const int64_t first = unit * rows, end = least(m.hidden, last * rows);
    s.experts.finish(first, end);
    if (!s.has_shared()) return;
    if (!s.experts.apart()) s.shared.multiply_down(first, end, {});
    s.shared.finish(first, end);
  };
  const int64_t up_units = s.experts.most_up_units();
  run_phases(parallel,
             {phase(entering.units(), entering), phase(s.router.units(), logits), phase(tokens == 1 ? 0 : tokens, choose),
              stream(1 + shared_units, order), stream(up_units, up, &s.experts.up_units),
              phase(inner.units() + (s.has_shared() ? tokens * s.shared.pieces() : 0), between),
              stream(s.most_down_units(), down, &s.down_units), phase(last_units, finish)},
             workers_for(most(up_units, last_units), most(tokens * m.hidden, inner.numbers)));
}

}  // namespace moedge
