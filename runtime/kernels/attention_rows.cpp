// What comes before attention over a cache, and after: rotation, the run's own rows written to the caches, and for a
// latent the products that take queries to its space and results out of it (arXiv:2405.04434, section 2.1.2).

#include <math.h>
#include <string.h>

#include "attention.h"
#include "scratch.h"
#include "step.h"

namespace moedge {

namespace {

constexpr int64_t kAloneProducts = 1 << 17;  // multiplications below which a second thread costs more than it saves
constexpr int64_t kRowsATime = 96;      // tokens that share one pass over a head's matrix
constexpr float kRound = 12582912.0f;   // 1.5 * 2^23: adding it rounds to an integer
constexpr float kLeastScale = 1e-30f;   // a scale of 0 would divide by it
constexpr float kLargestFloat = 3.4028234e38f;

const Lane* lane_of(const Attention& a, int64_t token) {
  for (int64_t i = 0; i < a.lane_count; ++i)
    if (token >= a.lanes[i].first && token < a.lanes[i].first + a.lanes[i].rows) return a.lanes + i;
  return nullptr;  // a row of no sequence
}

// One head [width] of a token, its first 2 * pairs words rotated.
void rotate(const Rotation& rotation, int64_t token, const float* from, int64_t width, float* to) {
  const float* cos = rotation.cos + token * rotation.pairs;
  const float* sin = rotation.sin + token * rotation.pairs;
  const int64_t pairs = rotation.pairs;
  if (rotation.interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float x = from[2 * i], y = from[2 * i + 1];
      to[2 * i] = x * cos[i] - y * sin[i];
      to[2 * i + 1] = x * sin[i] + y * cos[i];
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) to[i] = from[i] * cos[i] - from[pairs + i] * sin[i];
    for (int64_t i = 0; i < pairs; ++i) to[pairs + i] = from[i] * sin[i] + from[pairs + i] * cos[i];
  }
  memcpy(to + 2 * pairs, from + 2 * pairs, static_cast<size_t>(width - 2 * pairs) * sizeof(float));
}

int8_t to_byte(float value) {
  value = value < -128.0f ? -128.0f : value;
  value = value > 127.0f ? 127.0f : value;
  if (!(value >= -128.0f)) return 0;  // no number
  return static_cast<int8_t>(static_cast<int32_t>((value + kRound) - kRound));
}

// A row [width] into a cache's row [room], zeros behind it; `scales` [width] are those of int8.
void store_row(const Attention& a, const float* row, int64_t width, const float* scales, void* cache, int64_t place) {
  const size_t behind = static_cast<size_t>(a.room - width);
  if (a.element == Element::kFloat) {
    float* to = static_cast<float*>(cache) + place * a.room;
    memcpy(to, row, static_cast<size_t>(width) * sizeof(float));
    memset(to + width, 0, behind * sizeof(float));
  } else if (a.element == Element::kHalf) {
    uint16_t* to = static_cast<uint16_t*>(cache) + place * a.room;
    a.kernels->narrow(row, width, to);
    memset(to + width, 0, behind * sizeof(uint16_t));
  } else {
    int8_t* to = static_cast<int8_t*>(cache) + place * a.room;
    for (int64_t i = 0; i < width; ++i) to[i] = to_byte(row[i] / scales[i]);
    memset(to + width, 0, behind);
  }
}

// --- grouped -------------------------------------------------------------------------------------------------------

struct GroupedScratch {
  float* queries;
  Queries integers;  // of them, where those are multiplied
  float* heads;  // [tokens, width]: a rotated head of keys
  float* q;      // [tokens, heads * width], normalized
  float* k;      // [tokens, groups * width]
};

Queries take_integers(const Attention& a, Blocks* blocks) {
  if (!a.products) return {};
  const int64_t rows = a.query_rows(), parts = most(1, a.parts);
  return {blocks->take<int32_t>(rows * a.width / 2), blocks->take<float>(rows * parts),
          blocks->take<int32_t>(rows * parts), a.width, parts};
}

// Rows that nobody fills are multiplied too.
void clear_sums(const Attention& a) {
  for (int64_t i = 0; a.products && i < a.query_rows() * a.integers.parts; ++i) a.integers.sums[i] = 0;
}

GroupedScratch take_grouped(const GroupedAttention& g, Blocks* blocks) {
  const int64_t width = g.core.tokens * g.core.width;
  float* queries = blocks->take<float>(g.core.heads * width);
  const Queries integers = take_integers(g.core, blocks);
  float* heads = blocks->take<float>(width);
  float* q = blocks->take<float>(g.q_norm.weight ? g.core.heads * width : 0);
  return {queries, integers, heads, q, blocks->take<float>(g.k_norm.weight ? g.core.groups * width : 0)};
}

// A token's row of `count` words, after its norm.
const float* normalize(const PartNorm& norm, float epsilon, const float* x, int64_t token, int64_t count, float* room) {
  if (!norm.weight) return x + token * count;
  const int64_t parts = count / norm.width;
  run_norm({(token + 1) * parts, norm.width, x, nullptr, norm.weight, epsilon, nullptr, room}, token * parts, parts);
  return room + token * count;
}

using Four = float __attribute__((vector_size(16), aligned(4), may_alias));

inline void mix_four(Four* x) {
  const Four a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c;
  x[1] = b + d;
  x[2] = a - c;
  x[3] = b - d;
}

// Words of a head that are mixed with each other: the power of two that divides it; from 16 on, else none are.
int64_t mixed_words(int64_t width) { return width % 16 ? 1 : width & -width; }

// A head's words by a Hadamard matrix, block by block. Queries and keys that both went through it have the same products,
// times the block; but a channel that is large in every key, of which real models have some, is spread over all of them
// before one scale must do (QuaRot, arXiv:2404.00456).
void mix(float* head, int64_t width) {
  const int64_t block = mixed_words(width);
  for (int64_t at = 0; block > 1 && at < width; at += 16) {
    Four* x = reinterpret_cast<Four*>(head + at);
    mix_four(x);
    Four turned[4];
    for (int i = 0; i < 4; ++i) turned[i] = Four{x[0][i], x[1][i], x[2][i], x[3][i]};
    mix_four(turned);
    for (int i = 0; i < 4; ++i) x[i] = turned[i];
  }
  for (int64_t half = 16; half < block; half *= 2)
    for (int64_t at = 0; at < width; at += 2 * half)
      for (int64_t i = at; i < at + half; i += 4) {
        Four& low = *reinterpret_cast<Four*>(head + i);
        Four& high = *reinterpret_cast<Four*>(head + i + half);
        const Four a = low, b = high;
        low = a + b;
        high = a - b;
      }
}

// A token's queries.
void prepare_queries(const GroupedAttention& g, const GroupedScratch& s, int64_t token) {
  const Attention& a = g.core;
  const Lane* lane = lane_of(a, token);
  if (!lane) {
    memset(a.out + token * a.heads * a.value_width, 0, static_cast<size_t>(a.heads * a.value_width) * sizeof(float));
    return;
  }
  const int64_t width = a.width, heads = a.heads_a_group();
  const float* q = normalize(g.q_norm, g.epsilon, g.q, token, a.heads * width, s.q);
  for (int64_t head = 0; head < a.heads; ++head) {
    const int64_t group = head / heads;
    const float* key_scales = g.key_scales ? g.key_scales + group * a.room : nullptr;
    float* query = s.queries + ((group * a.tokens + token) * heads + head % heads) * width;
    rotate(g.rotation, token, q + head * width, width, query);
    for (int64_t i = 0; key_scales && i < width; ++i) query[i] *= key_scales[i];
    if (lane->key_scales) mix(query, width);
    if (a.products)
      a.products->put_query(query, a.query_row(*lane, group) + (token - lane->first) * heads + head % heads,
                            a.stands_alone(*lane), s.integers);
  }
}

// A row of keys or values; in int8 with its scale where it has one of its own.
void store_head(const GroupedAttention& g, const float* row, const float* channels, void* cache, float* scales,
                int64_t place) {
  const Attention& a = g.core;
  if (!scales) return store_row(a, row, a.width, channels, cache, place);
  int8_t* to = static_cast<int8_t*>(cache) + place * a.room;
  int32_t sum;
  g.products->quantize(row, 8, 0, {to, scales + place, &sum, a.width, 1});
  memset(to + a.width, 0, static_cast<size_t>(a.room - a.width));
}

// A token's keys and values, into the caches.
void store_token(const GroupedAttention& g, const GroupedScratch& s, int64_t token) {
  const Attention& a = g.core;
  const Lane* lane = lane_of(a, token);
  if (!lane) return;
  const int64_t width = a.width, place = lane->past + token - lane->first;
  const float* k = normalize(g.k_norm, g.epsilon, g.k, token, a.groups * width, s.k);
  for (int64_t group = 0; group < a.groups; ++group) {
    const float* key_scales = g.key_scales ? g.key_scales + group * a.room : nullptr;
    const float* value_scales = g.value_scales ? g.value_scales + group * a.room : nullptr;
    float* key = s.heads + token * width;
    rotate(g.rotation, token, k + group * width, width, key);
    if (lane->key_scales) mix(key, width);
    const float* value = g.v + (token * a.groups + group) * width;
    const int64_t row = group * lane->capacity + place;
    store_head(g, key, key_scales, lane->keys, lane->key_scales, row);
    store_head(g, value, value_scales, lane->values, lane->value_scales, row);
  }
}

// --- latent --------------------------------------------------------------------------------------------------------

// One worker's memory. Of floats:
struct HeadWork {
  float* matrix;  // rows of a head's matrix, in whole vectors where they are not
  float* panel;   // [rank, kPanelKeys]
  float* some;    // [kRowsATime, ...]: a product's result
  // Of codes:
  float* folded;  // [groups, depth]: a query by scales; depth: nope and zeros up to a multiple of kRowsTogether
  float* scales;  // [nope, groups]: of fp16 ones
  Activations x;  // [kRowsATime, ...]
};

struct LatentScratch {
  float* queries;  // [tokens, heads, rank + rope]
  Queries integers;  // of them, where those are multiplied
  float* mixed;    // [tokens, heads, rank]
  float* rows;     // [tokens, rank + rope]: what goes into the cache
  HeadWork* works;
  int64_t workers;
};

int64_t head_units(const LatentAttention& l) { return l.core.heads * divide_up(l.core.tokens, kRowsATime); }

int64_t depth_of(const LatentAttention& l) { return divide_up(l.nope, kRowsTogether) * kRowsTogether; }

LatentScratch take_latent(const LatentAttention& l, Blocks* blocks) {
  const Attention& a = l.core;
  const int64_t rank = vectors_up(l.rank), rows = least(a.tokens, kRowsATime);
  LatentScratch s{};
  s.queries = blocks->take<float>(a.tokens * a.heads * a.width);
  s.integers = take_integers(a, blocks);
  s.mixed = blocks->take<float>(a.tokens * a.heads * l.rank);
  s.rows = blocks->take<float>(a.tokens * a.width);
  const bool small = a.tokens * a.heads * l.rank * (l.nope + l.value_size) < kAloneProducts;
  s.workers = most(small ? 1 : count_workers(head_units(l)), attention_workers(a));
  s.works = blocks->take<HeadWork>(s.workers);
  const bool floats = l.k_up.floats || l.v_up.floats;
  const int64_t groups = most(l.k_up.floats ? 0 : l.k_up.codes.groups(), l.v_up.floats ? 0 : l.v_up.codes.groups());
  const int64_t folded = groups * depth_of(l);
  for (int64_t i = 0; i < s.workers; ++i) {
    HeadWork work{};
    work.matrix = blocks->take<float>(floats ? most(l.nope, kPanelKeys) * rank : 0);
    work.panel = blocks->take<float>(floats ? l.rank * kPanelKeys : 0);
    work.some = blocks->take<float>(floats ? rows * most(rank, kPanelKeys) : 0);
    work.folded = blocks->take<float>(folded);
    work.scales = blocks->take<float>(l.k_up.codes.scale_size == 2 ? l.nope * groups : 0);
    work.x.codes = blocks->take<int8_t>(rows * most(folded, l.rank));
    work.x.scales = blocks->take<float>(rows * groups);
    work.x.sums = blocks->take<int32_t>(rows * groups);
    if (blocks->base) s.works[i] = work;
  }
  return s;
}

// Rows `first` to `first + count` of a head's matrix of floats, to be read by whole vectors; `stride` is set to theirs.
const float* whole_vectors(const HeadMatrices& m, int64_t head, int64_t first, int64_t count, float* room,
                           int64_t* stride) {
  const int64_t width = m.codes.width;
  *stride = vectors_up(width);
  const float* from = m.floats_at(head) + first * width;
  if (*stride == width) return from;
  for (int64_t i = 0; i < count; ++i) {
    memcpy(room + i * *stride, from + i * width, static_cast<size_t>(width) * sizeof(float));
    memset(room + i * *stride + width, 0, static_cast<size_t>(*stride - width) * sizeof(float));
  }
  return room;
}

// q k_up by codes: a group's scales, one for each row, go into the query, which is then quantized by groups.
void absorb_codes(const LatentAttention& l, const Matrix& m, const float* q, int64_t q_stride, int64_t count,
                  const HeadWork& work, float* out, int64_t stride) {
  const int64_t groups = m.groups(), depth = depth_of(l);
  const int32_t middle = m.bits == 8 ? l.products->middle : 0;
  const bool half = m.scale_size == 2;
  const float* scales = half ? work.scales : static_cast<const float*>(m.scales);
  if (half) l.core.kernels->widen(Element::kHalf, m.scales, m.rows * groups, work.scales);
  Activations x = work.x;
  x.width = groups * depth;
  x.groups = groups;
  memset(work.folded, 0, static_cast<size_t>(x.width) * sizeof(float));
  for (int64_t i = 0; i < count; ++i, q += q_stride) {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t k = 0; k < m.rows; ++k) work.folded[g * depth + k] = scales[k * groups + g] * q[k];
    l.products->quantize(work.folded, 8, i, x);
    for (int64_t g = 0; g < groups; ++g) {
      const int8_t* codes = x.codes + (i * groups + g) * depth;
      int32_t& sum = x.sums[i * groups + g];
      sum *= (1 << (m.bits - 1)) - middle;
      if (m.zero_points) sum = 0;
      for (int64_t k = 0; m.zero_points && k < m.rows; ++k) sum += codes[k] * (zero_point(m, k, g) - middle);
    }
  }
  l.products->multiply_turned(m, x, count, out, stride);
}

// The queries of one head: [q_nope k_up, q_rope rotated].
void absorb_queries(const LatentAttention& l, const LatentScratch& s, int64_t head, int64_t first, int64_t count,
                    const HeadWork& work) {
  const Attention& a = l.core;
  const int64_t size = l.nope + l.rope;
  const float* q = l.q + (first * a.heads + head) * size;
  float* queries = s.queries + (first * a.heads + head) * a.width;
  if (l.k_up.floats) {
    int64_t stride = 0;
    const float* matrix = whole_vectors(l.k_up, head, 0, l.nope, work.matrix, &stride);
    a.kernels->multiply(q, a.heads * size, count, matrix, stride, l.nope, stride, work.some, stride);
    for (int64_t i = 0; i < count; ++i)
      memcpy(queries + i * a.heads * a.width, work.some + i * stride, static_cast<size_t>(l.rank) * sizeof(float));
  } else {
    absorb_codes(l, l.k_up.codes.at(head), q, a.heads * size, count, work, queries, a.heads * a.width);
  }
  for (int64_t i = 0; i < count; ++i)
    rotate(l.rotation, first + i, q + i * a.heads * size + l.nope, l.rope, queries + i * a.heads * a.width + l.rank);
  for (int64_t i = 0; a.products && i < count; ++i)
    if (const Lane* lane = lane_of(a, first + i))
      a.products->put_query(queries + i * a.heads * a.width,
                            a.query_row(*lane, 0) + (first + i - lane->first) * a.heads + head, false, s.integers);
}

// The results of one head: mixed v_up, transposed.
void expand_values(const LatentAttention& l, const LatentScratch& s, int64_t head, int64_t first, int64_t count,
                   const HeadWork& work) {
  const Attention& a = l.core;
  const float* mixed = s.mixed + (first * a.heads + head) * l.rank;
  float* y = l.y + (first * a.heads + head) * l.value_size;
  if (!l.v_up.floats) {
    Activations x = work.x;
    x.width = l.rank;
    x.groups = l.v_up.codes.groups();
    for (int64_t i = 0; i < count; ++i) l.products->quantize(mixed + i * a.heads * l.rank, l.v_up.codes.bits, i, x);
    l.products->multiply(l.v_up.codes.at(head), 0, l.value_size, x, nullptr, count, y, a.heads * l.value_size);
    return;
  }
  for (int64_t at = 0; at < l.value_size; at += kPanelKeys) {
    const int64_t rows = least(kPanelKeys, l.value_size - at);
    int64_t stride = 0;
    const float* matrix = whole_vectors(l.v_up, head, at, rows, work.matrix, &stride);
    a.kernels->transpose(matrix, stride, rows, l.rank, work.panel, kPanelKeys);
    a.kernels->multiply(mixed, a.heads * l.rank, count, work.panel, kPanelKeys, l.rank, vectors_up(rows), work.some,
                        kPanelKeys);
    for (int64_t i = 0; i < count; ++i)
      memcpy(y + i * a.heads * l.value_size + at, work.some + i * kPanelKeys, static_cast<size_t>(rows) * sizeof(float));
  }
}

// A row of the cache in int8: each block of words has a scale of its own; NaN where a word is no number.
void store_blocks(const Attention& a, const float* row, const Lane& lane, int64_t place) {
  const int64_t block = a.width / a.parts;
  int8_t* codes = static_cast<int8_t*>(lane.keys) + place * a.room;
  for (int64_t p = 0; p < a.parts; ++p) {
    const float* words = row + p * block;
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < block; ++i) {
      largest = fabsf(words[i]) > largest ? fabsf(words[i]) : largest;
      finite = finite && fabsf(words[i]) <= kLargestFloat;
    }
    const float least_scale = largest * (1.0f / 127.0f);
    const float scale = least_scale > kLeastScale ? least_scale : kLeastScale;
    for (int64_t i = 0; i < block; ++i) codes[p * block + i] = to_byte(words[i] / scale);
    lane.scales[place * a.parts + p] = finite ? scale : NAN;
  }
}

void write_latent(const LatentAttention& l, const LatentScratch& s, int64_t token) {
  const Attention& a = l.core;
  const Lane* lane = lane_of(a, token);
  if (!lane) {
    memset(s.mixed + token * a.heads * l.rank, 0, static_cast<size_t>(a.heads * l.rank) * sizeof(float));
    return;
  }
  float* row = s.rows + token * a.width;
  const float* latent = l.latent + token * l.latent_stride;
  if (l.norm)
    run_norm({1, l.rank, latent, nullptr, l.norm, l.epsilon, nullptr, row}, 0, 1);
  else
    memcpy(row, latent, static_cast<size_t>(l.rank) * sizeof(float));
  rotate(l.rotation, token, l.k_rope + token * l.rope_stride, l.rope, row + l.rank);
  const int64_t place = lane->past + token - lane->first;
  if (a.parts)
    store_blocks(a, row, *lane, place);
  else
    store_row(a, row, a.width, nullptr, lane->keys, place);
}

}  // namespace

size_t grouped_scratch(const GroupedAttention& attention) {
  Blocks blocks{nullptr};
  take_grouped(attention, &blocks);
  return blocks.used + attention_scratch(attention.core, attention_workers(attention.core));
}

void run_grouped(const GroupedAttention& g, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  const GroupedScratch s = take_grouped(g, &blocks);
  const auto prepare = [&](int64_t first, int64_t end, int64_t) {
    for (int64_t unit = first; unit < end; ++unit) (unit % 2 ? store_token : prepare_queries)(g, s, unit / 2);
  };
  const auto scale = [&](int64_t first, int64_t end, int64_t) {
    const Attention& a = g.core;
    for (int64_t row = first * a.heads; row < end * a.heads; ++row) {
      const float* scales = g.value_scales + row % a.heads / a.heads_a_group() * a.room;
      for (int64_t i = 0; i < a.value_width; ++i) a.out[row * a.value_width + i] *= scales[i];
    }
  };
  Attention core = g.core;
  core.queries = s.queries;
  core.integers = s.integers;
  clear_sums(core);
  if (core.element == Element::kByte && !g.key_scales) core.scale /= static_cast<float>(mixed_words(core.width));
  run_attention(core, blocks.base + blocks.used, parallel, phase(2 * core.tokens, prepare),
                phase(g.value_scales ? core.tokens : 0, scale), attention_workers(core));
}

size_t latent_scratch(const LatentAttention& attention) {
  Blocks blocks{nullptr};
  const LatentScratch s = take_latent(attention, &blocks);
  return blocks.used + attention_scratch(attention.core, s.workers);
}

void run_latent(const LatentAttention& l, void* scratch, const Parallel& parallel) {
  Blocks blocks{static_cast<char*>(scratch)};
  const LatentScratch s = take_latent(l, &blocks);
  const int64_t tokens = l.core.tokens, heads = l.core.heads, units = head_units(l);
  const auto by_head = [&](auto work, int64_t unit, int64_t worker) {
    const int64_t first = unit / heads * kRowsATime;
    work(l, s, unit % heads, first, least(kRowsATime, tokens - first), s.works[worker]);
  };
  const auto prepare = [&](int64_t first, int64_t end, int64_t worker) {
    for (int64_t unit = first; unit < end; ++unit)
      if (unit < tokens)
        write_latent(l, s, unit);
      else
        by_head(absorb_queries, unit - tokens, worker);
  };
  const auto expand = [&](int64_t first, int64_t end, int64_t worker) {
    for (int64_t unit = first; unit < end; ++unit) by_head(expand_values, unit, worker);
  };
  Attention core = l.core;
  core.queries = s.queries;
  core.integers = s.integers;
  clear_sums(core);
  core.out = s.mixed;
  run_attention(core, blocks.base + blocks.used, parallel, phase(tokens + units, prepare), phase(units, expand),
                s.workers);
}

}  // namespace moedge
