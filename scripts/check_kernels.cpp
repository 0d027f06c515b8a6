// A digest of what the kernels give, for each instruction set of the processor it runs on: the same digest everywhere.
//
// Compiled and run by scripts/check_kernels.py, also for other processors and under sanitizers.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "../runtime/kernels/attention.h"
#include "../runtime/kernels/moe.h"

using namespace moedge;

namespace {

uint64_t state = 1;

uint32_t next() {  // Knuth's MMIX generator
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

template <typename T>
T* take(int64_t count) {  // exactly as much as is needed, so that a sanitizer sees each step beyond it
  return static_cast<T*>(malloc(static_cast<size_t>(count) * sizeof(T)));
}

float* floats(int64_t count, float size) {
  float* values = take<float>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = (static_cast<float>(next() % 65536) / 32768.0f - 1.0f) * size;
  return values;
}

uint16_t* halves(int64_t count) {  // of both signs, subnormal ones among them
  uint16_t* values = take<uint16_t>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<uint16_t>(next() % 0x2600 | (next() % 2 << 15));
  return values;
}

uint8_t* bytes_of(int64_t count) {  // any of the lower half: sums stay small
  uint8_t* values = take<uint8_t>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<uint8_t>(next() % 128);
  return values;
}

uint16_t* bfloats(float* from, int64_t count) {  // the upper halves
  uint16_t* values = take<uint16_t>(count);
  for (int64_t i = 0; i < count; ++i) memcpy(values + i, reinterpret_cast<const char*>(from + i) + 2, 2);
  free(from);
  return values;
}

Matrix matrices(int64_t count, int64_t rows, int64_t width, int64_t group, int bits, bool zeros, int64_t scale = 4) {
  Matrix made{nullptr, nullptr, nullptr, rows, width, group, bits, scale};
  const int64_t bytes = count * rows * made.row_bytes(), packed = count * rows * made.zero_row_bytes();
  uint8_t* codes = take<uint8_t>(bytes);
  for (int64_t i = 0; i < bytes; ++i) codes[i] = static_cast<uint8_t>(next());
  uint8_t* points = zeros ? take<uint8_t>(packed) : nullptr;
  for (int64_t i = 0; points && i < packed; ++i) points[i] = static_cast<uint8_t>(next());
  made.codes = codes;
  made.zero_points = points;
  const int64_t scales = count * rows * made.groups();
  if (scale == 1)
    made.scales = bytes_of(scales);
  else if (scale == 2)
    made.scales = halves(scales);
  else
    made.scales = floats(scales, bits == 4 ? 0.02f : 0.001f);
  return made;
}

void release(const Matrix& matrix) {
  free(const_cast<uint8_t*>(matrix.codes));
  free(const_cast<uint8_t*>(matrix.zero_points));
  free(const_cast<void*>(matrix.scales));
}

uint64_t digest(uint64_t held, const float* values, int64_t count) {  // FNV-1a
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values);
  for (size_t i = 0; i < static_cast<size_t>(count) * sizeof *values; ++i) held = (held ^ bytes[i]) * 1099511628211u;
  return held;
}

void serially(void*, void (*body)(void*, size_t), size_t total, void* data) {
  for (size_t i = 0; i < total; ++i) body(data, i);
}

uint64_t run_one(const Kernels* kernels, int64_t tokens, int64_t hidden, int64_t inner, int64_t group, int bits, bool full) {
  const int64_t experts = 5, choices = 2;
  float *x = floats(tokens * hidden, 2.0f), *weights = floats(tokens * choices, 1.0f);
  float *up_bias = floats(experts * 2 * inner, 1.0f), *down_bias = floats(experts * hidden, 1.0f);
  int64_t* chosen = take<int64_t>(tokens * choices);
  for (int64_t i = 0; i < tokens * choices; ++i) chosen[i] = next() % experts;
  const Matrix up = matrices(experts, 2 * inner, hidden, group, bits, full, bits == 8 ? 4 : bits / 3);
  const Matrix down = matrices(experts, hidden, inner, group, bits, full, bits < 8 && tokens % 2 ? 2 : 4);
  float* y = take<float>(tokens * hidden);
  const Parallel parallel{serially, nullptr};
  const Mixture mixture{kernels, tokens, choices, experts, hidden, inner, x, chosen, weights, up, down,
                        full ? up_bias : nullptr, full ? down_bias : nullptr, full ? 1.702f : 1.0f,
                        full ? 7.0f : INFINITY, full ? 1.0f : 0.0f, y};
  void* scratch = nullptr;
  if (posix_memalign(&scratch, 64, mixture_scratch(mixture))) abort();
  run_mixture(mixture, scratch, parallel);
  const uint64_t found = digest(14695981039346656037u, y, tokens * hidden);
  Matrix odd = up.at(1);
  odd.rows -= 3;  // the last tile is not whole
  const Linear linear{kernels, tokens, x, odd, nullptr, take<float>(tokens * odd.rows)};
  void* more = nullptr;
  if (posix_memalign(&more, 64, linear_scratch(linear))) abort();
  run_linear(linear, more, parallel);
  const uint64_t both = digest(found, linear.y, tokens * odd.rows);
  for (void* block : {static_cast<void*>(x), static_cast<void*>(weights), static_cast<void*>(up_bias),
                      static_cast<void*>(down_bias), static_cast<void*>(chosen), static_cast<void*>(y), scratch, more,
                      static_cast<void*>(linear.y)})
    free(block);
  release(up);
  release(down);
  return both;
}

// 6-bit codes in planes.
uint64_t run_planes_of(const Kernels* kernels, int64_t tokens, int64_t rows, int64_t width, int64_t group) {
  const Matrix six = matrices(1, rows, width, group, 6, false, rows % 2 ? 2 : 4);
  Matrix upper = six;
  upper.bits = 4;
  upper.lower = six.codes + rows * upper.row_bytes();
  float *x = floats(tokens * width, 2.0f), *bias = floats(rows, 0.1f), *y = take<float>(tokens * rows);
  if (tokens == 3) x[width + 1] = NAN;
  const Linear linear{kernels, tokens, x, upper, width % 64 ? bias : nullptr, y};
  void* scratch = nullptr;
  if (posix_memalign(&scratch, 64, linear_scratch(linear))) abort();
  run_linear(linear, scratch, Parallel{serially, nullptr});
  uint64_t found = 14695981039346656037u;
  for (int64_t token = 0; token < tokens; ++token)
    if (tokens != 3 || token != 1) found = digest(found, y + token * rows, rows);
  for (void* block : {static_cast<void*>(x), static_cast<void*>(bias), static_cast<void*>(y), scratch}) free(block);
  release(six);
  return found;
}

// Norms, routers, several products of one input and the dense MLP.
uint64_t steps_digest(const Kernels* kernels, int64_t tokens, int64_t hidden, int64_t inner, int64_t group, int bits,
                      bool full) {
  const int64_t experts = 24, chosen = 3;
  float *x = floats(tokens * hidden, 2.0f), *residual = floats(tokens * hidden, 1.0f), *weight = floats(hidden, 1.0f);
  float *plain = floats(experts * hidden, 0.1f), *bias = floats(experts, 0.1f);
  void* matrix = full ? static_cast<void*>(bfloats(plain, experts * hidden)) : plain;
  const Matrix first = matrices(1, 2 * inner, hidden, group, bits, full);
  const Matrix second = matrices(1, hidden, hidden, group, bits, full, bits == 4 ? 1 : 2), down = matrices(1, hidden, inner, group, bits, full);
  float *sum = take<float>(tokens * hidden), *normed = take<float>(tokens * hidden);
  float *y = take<float>(tokens * 2 * inner), *z = take<float>(tokens * hidden), *logits = take<float>(tokens * experts);
  int64_t* routes = take<int64_t>(tokens * chosen);
  float* shares = take<float>(tokens * chosen);
  const Parallel parallel{serially, nullptr};
  const auto with_scratch = [](size_t bytes, auto run) {
    void* scratch = nullptr;
    if (posix_memalign(&scratch, 64, bytes + 64)) abort();
    run(scratch);
    free(scratch);
  };
  Norm norm{tokens, hidden, x, full ? residual : nullptr, weight, 1e-5f, sum, nullptr};
  const Projections projections{kernels, norm, 2, {first, second, {}}, {nullptr, weight, nullptr}, {y, z, nullptr}};
  with_scratch(projections_scratch(projections), [&](void* held) { run_projections(projections, held, parallel); });
  uint64_t found = digest(digest(14695981039346656037u, y, tokens * 2 * inner), z, tokens * hidden);
  const Mlp mlp{kernels, norm, first, down, z, full ? x : nullptr, full ? weight : nullptr};
  with_scratch(mlp_scratch(mlp), [&](void* held) { run_mlp(mlp, held, parallel); });
  found = digest(found, z, tokens * hidden);
  norm.y = normed;
  const Gate gate{full, experts, chosen, full ? 6 : 1, full ? 2 : 1, true, 1.0f, full ? bias : nullptr};
  const Router router{kernels, norm, gate, matrix, bias, full, logits, routes, shares};
  with_scratch(router_scratch(router), [&](void* held) { run_router(router, held, parallel); });
  found = digest(digest(digest(found, normed, tokens * hidden), logits, tokens * experts), shares, tokens * chosen);
  for (int64_t i = 0; i < tokens * chosen; ++i) found = (found ^ static_cast<uint64_t>(routes[i])) * 1099511628211u;
  const Matrix up = matrices(experts, 2 * inner, hidden, group, bits, full), out = matrices(experts, hidden, inner, group, bits, full);
  Moe moe{router, {kernels, 0, 0, experts, hidden, inner, nullptr, nullptr, nullptr, up, out, nullptr, nullptr, 1.0f, INFINITY, 0.0f, z},
          {kernels, {}, first, down, z, nullptr, full ? weight : nullptr}};
  if (tokens % 2) moe.shared.kernels = nullptr;
  with_scratch(moe_scratch(moe), [&](void* held) { run_moe(moe, held, parallel); });
  found = digest(found, z, tokens * hidden);
  release(up);
  release(out);
  for (void* block : {static_cast<void*>(routes), static_cast<void*>(x), static_cast<void*>(residual),
                      static_cast<void*>(weight), matrix, static_cast<void*>(bias),
                      static_cast<void*>(sum), static_cast<void*>(normed), static_cast<void*>(y), static_cast<void*>(z),
                      static_cast<void*>(logits), static_cast<void*>(shares)})
    free(block);
  for (const Matrix& each : {first, second, down}) release(each);
  return found;
}

// --- attention -----------------------------------------------------------------------------------------------------

// A cache [rows, width] of an element's type, its first `known` rows with values, the others not a number or 0.
void* cache_of(Element element, int64_t groups, int64_t capacity, int64_t width, int64_t known) {
  const int64_t count = groups * capacity * width;
  float* values = floats(count, 2.0f);
  for (int64_t i = 0; i < count; ++i)
    if (i / width % capacity >= known) values[i] = NAN;
  if (element == Element::kFloat) return values;
  void* cache = nullptr;
  if (element == Element::kHalf) {
    cache = take<uint16_t>(count);
    attention_kernels(find_kernels("portable"))->narrow(values, count, static_cast<uint16_t*>(cache));
  } else {
    int8_t* codes = take<int8_t>(count);
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(next());
    cache = codes;
  }
  free(values);
  return cache;
}

struct Lanes {
  Lane lane[3];
  int64_t tokens = 0;

  // `parts`: scales of a row, of a latent in one array, of a head's keys and values in one each.
  Lanes(Element element, int64_t groups, int64_t width, int64_t parts, bool latent, int64_t first) {
    const int64_t lengths[3] = {130, 0, 70}, rows[3] = {first, 0, 2};
    for (int i = 0; i < 3; ++i) {
      const int64_t capacity = lengths[i] + rows[i];
      void* keys = cache_of(element, groups, capacity, width, lengths[i]);
      void* values = latent ? nullptr : cache_of(element, groups, capacity, width, lengths[i]);
      const auto scales = [&](bool there) { return there ? floats(groups * capacity * parts, 0.05f) : nullptr; };
      const bool heads = parts && !latent;
      lane[i] = {keys, values, scales(parts && latent), scales(heads), scales(heads), capacity, lengths[i], tokens,
                 rows[i]};
      for (float* of : {lane[i].scales, lane[i].key_scales, lane[i].value_scales})
        for (int64_t s = 0; of && s < (latent ? capacity * parts : groups * capacity); ++s) of[s] = fabsf(of[s]) + 0.01f;
      tokens += rows[i];
    }
  }
  ~Lanes() {
    for (Lane& each : lane) {
      free(each.keys);
      free(each.values);
      free(each.scales);
      free(each.key_scales);
      free(each.value_scales);
    }
  }
};

template <typename A, typename Size, typename Run>
uint64_t run_attention_op(const A& attention, Size size, Run run, const float* y, int64_t count) {
  void* scratch = nullptr;
  if (posix_memalign(&scratch, 64, size(attention))) abort();
  run(attention, scratch, Parallel{serially, nullptr});
  free(scratch);
  for (int64_t i = 0; i < count; ++i)
    if (isnan(y[i])) abort();  // something was read that nobody wrote
  return digest(14695981039346656037u, y, count);
}

Attention core_of(const Kernels* kernels, Element element, const Lanes& lanes, int64_t heads, int64_t groups,
                  int64_t width, int64_t value_width) {
  Attention core{};
  core.kernels = attention_kernels(kernels);
  core.element = element;
  core.tokens = lanes.tokens;
  core.heads = heads;
  core.groups = groups;
  core.width = width;
  core.value_width = value_width;
  core.scale = 0.25f;
  core.lanes = lanes.lane;
  core.lane_count = 3;
  return core;
}

// `channels`: int8 has scales of these, and not of rows.
uint64_t run_grouped_one(const Kernels* kernels, Element element, int64_t width, int64_t window, int64_t first,
                         bool channels) {
  const int64_t heads = 6, groups = 2, room = (width + 7) / 8 * 8, pairs = width / 2;
  const Lanes lanes(element, groups, room, element == Element::kByte && !channels, false, first);
  GroupedAttention g{};
  g.core = core_of(kernels, element, lanes, heads, groups, width, width);
  g.core.room = room;
  g.core.window = window;
  const int64_t count = lanes.tokens * heads * width, fewer = lanes.tokens * groups * width;
  float *q = floats(count, 2.0f), *k = floats(fewer, 2.0f), *v = floats(fewer, 2.0f), *y = take<float>(count);
  float *cos = floats(lanes.tokens * pairs, 1.0f), *sin = floats(lanes.tokens * pairs, 1.0f);
  float *sinks = floats(heads, 1.0f), *scales = floats(groups * room, 0.01f);
  for (int64_t i = 0; i < groups * room; ++i) scales[i] = 0.02f + scales[i];
  g.core.sinks = window ? sinks : nullptr;
  g.core.out = y;
  g.q = q;
  g.k = k;
  g.v = v;
  g.rotation = {cos, sin, pairs, window == 0};
  g.products = kernels;
  if (element == Element::kByte && channels) g.key_scales = g.value_scales = scales;
  g.core.products = element == Element::kByte && !channels && g.core.has_integer_heads() ? kernels : nullptr;
  const uint64_t found = run_attention_op(g, grouped_scratch, run_grouped, y, count);
  for (float* block : {q, k, v, y, cos, sin, sinks, scales}) free(block);
  return found;
}

// `group`: of the codes of k_up, of `bits`, and of v_up, with zero points in k_up's; 0: floats.
uint64_t run_latent_one(const Kernels* kernels, Element element, int64_t rank, int64_t rope, int64_t first,
                        int64_t group, int bits = 8) {
  const int64_t heads = 5, nope = 9, size = 70, width = rank + rope;
  const int64_t parts = element != Element::kByte ? 0 : width < 512 ? 2 : width / 64;
  const Lanes lanes(element, 1, width, parts, true, first);
  LatentAttention l{};
  l.core = core_of(kernels, element, lanes, heads, 1, width, rank);
  l.core.room = width;
  l.core.parts = parts;
  l.core.values_are_keys = true;
  const int64_t tokens = lanes.tokens, count = tokens * heads * size;
  float *q = floats(tokens * heads * (nope + rope), 2.0f), *latent = floats(tokens * rank, 2.0f);
  float *k_rope = floats(tokens * rope, 2.0f), *y = take<float>(count);
  float *cos = floats(tokens * rope / 2, 1.0f), *sin = floats(tokens * rope / 2, 1.0f);
  float *k_up = floats(heads * nope * rank, 0.2f), *v_up = floats(heads * size * rank, 0.2f);
  l.q = q;
  l.latent = latent;
  l.k_rope = k_rope;
  l.rotation = {cos, sin, rope / 2, true};
  l.products = kernels;
  l.core.products = l.core.has_integer_blocks() ? kernels : nullptr;
  const int64_t of_group = group ? group : rank;
  const Matrix k_codes = matrices(heads, nope, rank, of_group, bits, true, bits < 8 ? 2 : 4);
  const Matrix v_codes = matrices(heads, size, rank, of_group, 8, false);
  l.k_up = {k_codes, group ? nullptr : k_up};
  l.v_up = {v_codes, group ? nullptr : v_up};
  l.nope = nope;
  l.rope = rope;
  l.rank = rank;
  l.value_size = size;
  l.y = y;
  const uint64_t found = run_attention_op(l, latent_scratch, run_latent, y, count);
  for (float* block : {q, latent, k_rope, y, cos, sin, k_up, v_up}) free(block);
  release(k_codes);
  release(v_codes);
  return found;
}

uint64_t attention_digest(const Kernels* kernels) {
  uint64_t all = 0;
  for (Element element : {Element::kFloat, Element::kHalf, Element::kByte})
    for (int64_t first : {1, 40, 150}) {
      for (bool channels : {true, false}) {
        all = all * 31 + run_grouped_one(kernels, element, 32, 0, first, channels);
        all = all * 31 + run_grouped_one(kernels, element, 21, 50, first, channels);
        all = all * 31 + run_grouped_one(kernels, element, 64, 0, first, channels);
        all = all * 31 + run_grouped_one(kernels, element, 128, 50, first, channels);
        all = all * 31 + run_grouped_one(kernels, element, 256, 50, first, channels);
      }
      all = all * 31 + run_latent_one(kernels, element, 64, 16, first, 0);
      all = all * 31 + run_latent_one(kernels, element, 64, 16, first, 32);
      all = all * 31 + run_latent_one(kernels, element, 48, 16, first, 16);
      all = all * 31 + run_latent_one(kernels, element, 256, 16, first, 64);
      all = all * 31 + run_latent_one(kernels, element, 48, 16, first, 16, 4);
      all = all * 31 + run_latent_one(kernels, element, 256, 16, first, 64, 4);
      all = all * 31 + run_latent_one(kernels, element, 26, 6, first, 0);
      all = all * 31 + run_latent_one(kernels, element, 64, 64, first, 0);
      all = all * 31 + run_latent_one(kernels, element, 32, 32, first, 32);
      all = all * 31 + run_latent_one(kernels, element, 512, 64, first, 128, 4);  // DeepSeek's
    }
  return all;
}

}  // namespace

int main() {
  for (const char* name : {"avx512", "avxvnni", "avx2", "neon", "portable"}) {
    const Kernels* kernels = find_kernels(name);
    if (!kernels) continue;
    state = 1;
    uint64_t all = 0;
    for (int bits : {4, 8})
      for (int full = 0; full < 2; ++full)
        for (int64_t tokens : {1, 2, 3, 7, 40, 300}) {
          all = all * 31 + run_one(kernels, tokens, 48, 48, 16, bits, full);
          all = all * 31 + run_one(kernels, tokens, 96, 32, 32, bits, full);
          all = all * 31 + run_one(kernels, tokens, 576, 64, 64, bits, full);
          all = all * 31 + run_one(kernels, tokens, 128, 640, 128, bits, full);
          all = all * 31 + run_one(kernels, tokens, 512, 256, 256, bits, full);
          all = all * 31 + steps_digest(kernels, tokens, 48, 80, 16, bits, full);
          all = all * 31 + steps_digest(kernels, tokens, 256, 640, 128, bits, full);
        }
    for (int64_t tokens : {1, 2, 3, 9, 130}) {
      all = all * 31 + run_planes_of(kernels, tokens, 101, 576, 64);
      all = all * 31 + run_planes_of(kernels, tokens, 30, 48, 16);
      all = all * 31 + run_planes_of(kernels, tokens, 65, 2304, 256);
      all = all * 31 + run_planes_of(kernels, tokens, 130, 1280, 128);
      if (tokens < 9) all = all * 31 + run_planes_of(kernels, tokens, 32900, 80, 16);
    }
    all = all * 31 + attention_digest(kernels);
    printf("%s %016llx\n", name, static_cast<unsigned long long>(all));
  }
  return 0;
}
