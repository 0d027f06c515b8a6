// A product with 6-bit codes in two planes, as the head's: every row by its upper four bits, and by the lower two the
// rows with the largest results alone, so that a token reads little more than 4 bits of each code.
//
// A code is 4 h + l around 32. The rows begin as if each l were at its mean of 1.5, which goes into the sums of
// activations, rounded to an integer; refining takes it out again, so that what is summed of a refined row are the
// integers of its 6-bit codes. Rows are taken by blocks of kBlock, each with its largest result: a row is refined that
// is not below the kBest-th largest of these, and every row where there are no more blocks than that. So which rows
// they are depends on the numbers alone, not on threads, instruction sets or the other tokens of a call. A result that
// is not a number stays what it is.

#include <math.h>
#include <string.h>

#include "step.h"

namespace moedge {

namespace {

constexpr int64_t kBlock = 16, kBest = 2048;
constexpr int64_t kBlocksAhead = 32;      // whose results are fetched, then looked through
constexpr int64_t kRowsAhead = 64;        // that are fetched before they are refined
constexpr int64_t kRefinedTogether = 32;  // of one call: a multiple of every instruction set's lanes
constexpr int64_t kBlocksTogether = 128;  // that one unit of the last phase looks through
constexpr int64_t kLanes = 16;            // maxima that run side by side

uint32_t order_of(float value) {  // as an integer that orders as the floats do, but for those that are no number
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

float largest(const float* values, int64_t count) {
  float best[kLanes];
  for (float& each : best) each = -INFINITY;
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) best[i] = values[at + i] > best[i] ? values[at + i] : best[i];
  for (int64_t i = 0; at + i < count; ++i) best[i] = values[at + i] > best[i] ? values[at + i] : best[i];
  for (int64_t i = 1; i < kLanes; ++i) best[0] = best[i] > best[0] ? best[i] : best[0];
  return best[0];
}

// The n-th largest, digit by digit of its order. `orders` [count]: room.
float find_largest(const float* values, int64_t count, int64_t n, uint32_t* orders) {
  constexpr int kBits = 11;
  constexpr uint32_t kDigits = (1u << kBits) - 1;
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) orders[i] = order_of(values[i]);
  for (int shift = 32 - kBits; ; shift = shift > kBits ? shift - kBits : 0) {
    // Two counts side by side, as neighbours often have the same digit.
    int32_t counts[2][1 << kBits] = {};
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      ++counts[0][orders[i] >> shift & kDigits];
      ++counts[1][orders[i + 1] >> shift & kDigits];
    }
    if (i < count) ++counts[0][orders[i] >> shift & kDigits];
    uint32_t digit = kDigits;
    for (; counts[0][digit] + counts[1][digit] < n; --digit) n -= counts[0][digit] + counts[1][digit];
    found |= digit << shift;
    if (shift == 0) break;
    int64_t left = 0;
    for (int64_t k = 0; k < count; ++k) {
      const uint32_t order = orders[k];
      orders[left] = order;
      left += (order >> shift & kDigits) == digit;
    }
    count = left;
  }
  found = found >> 31 ? found & ~(1u << 31) : ~found;
  float value;
  memcpy(&value, &found, 4);
  return value;
}

struct PlanesSteps {
  Planes p;
  Activations upper, plain, lower;
  float *maxima, *thresholds;
  uint32_t* orders;
  int64_t rows, blocks, together;

  PlanesSteps(const Planes& planes, Blocks* held) : p(planes), rows(p.matrix.rows), blocks(divide_up(rows, kBlock)) {
    const int64_t tokens = p.norm.tokens, width = p.matrix.width, plane = divide_up(width / 4, 64) * 64;
    take_norm(&p.norm, held);
    upper = held->take_activations(tokens, p.matrix);
    plain = held->take_activations(tokens, p.matrix);
    lower = {held->take<int8_t>(tokens * 4 * plane), plain.scales, plain.sums, 4 * plane, plain.groups};
    maxima = held->take<float>(refines_all() ? 0 : tokens * blocks);
    orders = held->take<uint32_t>(refines_all() ? 0 : tokens * blocks);
    thresholds = held->take<float>(refines_all() ? 0 : tokens);
    together = divide_up(unit_rows(*p.kernels, p.matrix), kBlock);
  }

  bool refines_all() const { return blocks <= kBest; }
  int64_t units() const { return divide_up(blocks, together); }
  int64_t pieces() const { return divide_up(blocks, kBlocksTogether); }  // of a token

  // A token's activations: in 4-bit weights' order, and in the lower codes'.
  void enter(int64_t first, int64_t end) const {
    const float* x = input_of(p.norm);
    for (int64_t token = first; token < end; ++token) {
      if (p.norm.changes_x()) run_norm(p.norm, token, 1);
      p.kernels->quantize(x + token * plain.width, 4, token, upper);
      p.kernels->quantize(x + token * plain.width, 8, token, plain);
      const int8_t* codes = plain.codes + token * plain.width;
      int8_t* into = lower.codes + token * lower.width;
      memset(into, 0, static_cast<size_t>(lower.width));
      for (int64_t plane = 0; plane < 4; ++plane, into += lower.width / 4)
        for (int64_t i = 0; i < plain.width / 4; ++i) into[i] = codes[4 * i + plane];
      for (int64_t at = token * plain.groups; at < (token + 1) * plain.groups; ++at) {
        const int32_t sum = plain.sums[at];
        upper.sums[at] = (sum * 61 + 32) >> 6;  // 8 - 1.5 / 4 is 8 * 61 / 64
        upper.scales[at] *= 4.0f;
        lower.sums[at] = sum - upper.sums[at];
      }
    }
  }

  void multiply(int64_t unit, int64_t last, int64_t next) const {
    for (; unit < last; ++unit) {
      const int64_t first = unit * together, end = least(blocks, first + together);
      multiply_rows(*p.kernels, p.matrix, upper, p.norm.tokens, first * kBlock, least(rows, end * kBlock),
                    unit + 1 < last ? Place{} : place_of(p.matrix, together * kBlock, next), p.bias, p.y);
      for (int64_t token = 0; token < p.norm.tokens; ++token) {
        const float* y = p.y + token * rows;
        if (refines_all()) refine(token, first, end, -INFINITY);
        for (int64_t block = first; !refines_all() && block < end; ++block)
          maxima[token * blocks + block] = largest(y + block * kBlock, least(kBlock, rows - block * kBlock));
      }
    }
  }

  void choose(int64_t first, int64_t end) const {
    for (int64_t token = first; token < end; ++token)
      thresholds[token] = find_largest(maxima + token * blocks, blocks, kBest, orders + token * blocks);
  }

  void refine_best(int64_t unit, int64_t last) const {
    while (unit < last) {  // what the stretch has of one token
      const int64_t token = unit / pieces(), of = token * pieces(), next = least(last, of + pieces());
      refine(token, (unit - of) * kBlocksTogether, least(blocks, (next - of) * kBlocksTogether), thresholds[token]);
      unit = next;
    }
  }

 private:
  // Rows of blocks `first` to `end` that are not below the threshold. They lie far from each other: blocks' results and
  // rows' lower codes are fetched as they are found, some time before they are looked at.
  void refine(int64_t token, int64_t first, int64_t end, float threshold) const {
    int64_t chosen[kBlocksAhead], found[kRowsAhead + kRefinedTogether + kBlock], count = 0;
    const float* y = p.y + token * rows;
    while (first < end) {
      int64_t some = 0;
      for (; first < end && some < kBlocksAhead; ++first) {
        chosen[some] = first;
        fetch(y + first * kBlock);
        some += refines_all() || !(maxima[token * blocks + first] < threshold);
      }
      for (int64_t i = 0; i < some; ++i) {
        for (int64_t row = chosen[i] * kBlock; row < least(rows, (chosen[i] + 1) * kBlock); ++row)
          if (y[row] >= threshold) fetch_row(found[count++] = row);
        if (count < kRowsAhead + kRefinedTogether) continue;
        refine_rows(token, found, kRefinedTogether);
        for (int64_t k = kRefinedTogether; k < count; ++k) found[k - kRefinedTogether] = found[k];
        count -= kRefinedTogether;
      }
    }
    refine_rows(token, found, count);
  }

  void fetch_row(int64_t row) const {
    const int64_t bytes = p.matrix.width / 4;
    for (int64_t at = 0; at < bytes; at += 64) fetch(p.matrix.lower + row * bytes + at);
    fetch(p.matrix.scale(row, 0));
  }

  void refine_rows(int64_t token, const int64_t* found, int64_t count) const {
    p.kernels->refine(p.matrix, found, count, lower.from(token), p.y + token * rows);
  }
};

}  // namespace

size_t planes_scratch(const Planes& planes) { return scratch_of<PlanesSteps>(planes); }

void run_planes(const Planes& planes, void* scratch, const Parallel& parallel) {
  Blocks held{static_cast<char*>(scratch)};
  const PlanesSteps steps(planes, &held);
  const int64_t tokens = planes.norm.tokens, chosen = steps.refines_all() ? 0 : tokens;
  const auto enter = [&](int64_t first, int64_t end, int64_t) { steps.enter(first, end); };
  const auto multiply = [&](int64_t unit, int64_t last, int64_t next) { steps.multiply(unit, last, next); };
  const auto choose = [&](int64_t first, int64_t end, int64_t) { steps.choose(first, end); };
  const auto refine = [&](int64_t unit, int64_t last, int64_t) { steps.refine_best(unit, last); };
  run_phases(parallel,
             {phase(tokens, enter), stream(steps.units(), multiply), phase(chosen, choose),
              phase(chosen * steps.pieces(), refine)},
             workers_for(steps.units(), tokens * planes.norm.width));
}

}  // namespace moedge
