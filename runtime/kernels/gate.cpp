// The router of a layer: its norm, its product in float, and the gate's choice.

#include <math.h>
#include <string.h>

#include "moe.h"

namespace moedge {

namespace {

// Writes the indices of the `count` largest values in descending order, of equal ones the lower first.
void find_largest(const float* values, int64_t total, int64_t count, int64_t* index) {
  int64_t held = 0;
  for (int64_t i = 0; i < total; ++i) {
    if (held == count && !(values[i] > values[index[count - 1]])) continue;
    int64_t place = held < count ? held++ : count - 1;
    for (; place > 0 && values[i] > values[index[place - 1]]; --place) index[place] = index[place - 1];
    index[place] = i;
  }
}

// What a group counts as: its best score, or with a sigmoid gate the sum of its two best.
float rate_group(const float* values, int64_t count, bool two) {
  float best = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] > best) {
      second = best;
      best = values[i];
    } else if (values[i] > second) {
      second = values[i];
    }
  }
  return two && count > 1 ? best + second : best;
}

// Puts 0 where a group is not among the best; `ratings` [groups], which are lost.
void mask_groups(const Gate& gate, float* values, float* ratings) {
  const int64_t size = gate.experts / gate.groups;
  for (int64_t g = 0; g < gate.groups; ++g) ratings[g] = rate_group(values + g * size, size, gate.sigmoid);
  for (int64_t g = 0; g < gate.groups; ++g) {
    int64_t before = 0;
    for (int64_t other = 0; other < gate.groups; ++other)
      before += ratings[other] > ratings[g] || (ratings[other] == ratings[g] && other < g);
    if (before >= gate.kept_groups) memset(values + g * size, 0, static_cast<size_t>(size) * sizeof *values);
  }
}

// Scores [E]; false where one is no number.
bool score(const Gate& gate, const float* logits, float* scores) {
  float total = 0.0f, largest = logits[0];
  for (int64_t e = 0; e < gate.experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
  for (int64_t e = 0; e < gate.experts; ++e) {
    scores[e] = gate.sigmoid ? static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logits[e]))))
                             : expf(logits[e] - largest);
    total += scores[e];
  }
  for (int64_t e = 0; !gate.sigmoid && e < gate.experts; ++e) scores[e] /= total;
  return total == total;
}

}  // namespace

void choose_experts(const Gate& gate, const float* logits, float* scratch, int64_t* experts, float* weights) {
  float *scores = scratch, *choice = scratch + gate.experts, *ratings = choice + gate.experts;
  bool sound = score(gate, logits, scores);
  for (int64_t e = 0; e < gate.experts; ++e) {
    choice[e] = gate.bias ? scores[e] + gate.bias[e] : scores[e];
    sound = sound && choice[e] == choice[e];
  }
  if (!sound) {
    for (int64_t k = 0; k < gate.top_k; ++k) {
      experts[k] = k;
      weights[k] = NAN;
    }
    return;
  }
  if (gate.kept_groups < gate.groups) mask_groups(gate, choice, ratings);
  find_largest(choice, gate.experts, gate.top_k, experts);
  float total = 0.0f;
  for (int64_t k = 0; k < gate.top_k; ++k) total += weights[k] = (gate.sigmoid ? scores : choice)[experts[k]];
  if (gate.sigmoid) total += 1e-20f;
  for (int64_t k = 0; k < gate.top_k; ++k) weights[k] = (gate.normalize ? weights[k] / total : weights[k]) * gate.factor;
}

RouterSteps::RouterSteps(const Router& router, Blocks* blocks) : r(router) {
  const int64_t tokens = r.norm.tokens;
  take_norm(&r.norm, blocks);
  scores = blocks->take<float>(tokens * (2 * r.gate.experts + r.gate.groups));
  if (!r.logits) r.logits = blocks->take<float>(tokens * r.gate.experts);
  if (!r.experts) r.experts = blocks->take<int64_t>(tokens * r.gate.top_k);
  if (!r.weights) r.weights = blocks->take<float>(tokens * r.gate.top_k);
}

void RouterSteps::multiply(int64_t unit, int64_t last) const {
  const int64_t experts = r.gate.experts, columns = divide_up(experts, rows()), width = r.norm.width;
  for (; unit < last; ++unit) {
    const int64_t first = unit % columns * rows(), token = unit / columns * kSome;
    const int64_t height = least(rows(), experts - first), count = least(kSome, r.norm.tokens - token);
    const char* matrix = static_cast<const char*>(r.matrix) + first * width * (r.half ? 2 : 4);
    float* out = r.logits + token * experts + first;
    r.kernels->multiply_floats(matrix, r.half, height, width, input_of(r.norm) + token * width, count, out, experts);
    for (int64_t i = 0; r.bias && i < count; ++i)
      for (int64_t e = 0; e < height; ++e) out[i * experts + e] += r.bias[first + e];
  }
}

void RouterSteps::choose(int64_t first, int64_t end) const {
  const int64_t each = 2 * r.gate.experts + r.gate.groups, top_k = r.gate.top_k;
  for (int64_t token = first; token < end; ++token)
    choose_experts(r.gate, r.logits + token * r.gate.experts, scores + token * each, r.experts + token * top_k,
                   r.weights + token * top_k);
}

size_t router_scratch(const Router& router) { return scratch_of<RouterSteps>(router); }

void run_router(const Router& router, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  const RouterSteps steps(router, &blocks);
  const Norm& norm = steps.r.norm;
  const auto normalize = [&](int64_t first, int64_t end, int64_t) { run_norm(norm, first, end - first); };
  const auto multiply = [&](int64_t first, int64_t end, int64_t) { steps.multiply(first, end); };
  const auto choose = [&](int64_t first, int64_t end, int64_t) { steps.choose(first, end); };
  run_phases(parallel,
             {phase(norm.changes_x() ? norm.tokens : 0, normalize), phase(steps.units(), multiply),
              phase(norm.tokens, choose)},
             workers_for(steps.units(), norm.tokens * most(norm.width, 32 * router.gate.experts)));
}

}  // namespace moedge
