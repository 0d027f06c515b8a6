// Attention over a KV cache as onnxruntime registers and calls it. S = tokens of the run, n = heads, g = heads of keys.
//
// A run's rows belong to one sequence, or the first sizes[0] to the first lane's, the next sizes[1] to the second's and
// so on; rows beyond that are of no sequence and give 0. lengths says what each lane's caches hold before the run. The
// run's own keys and values are written to the caches, which are inputs that change: each is bound once, whole.
//
// GroupedAttention  q [S, n d], k and v [S, g d], cos and sin [1, S, pairs], lengths int64 [lanes], sizes int64 [lanes]
//                   (one lane: left out), sinks [n] (or none), key and value scales [g room] (of int8 whose channels
//                   have them), with the attribute epsilon the weights of q's and k's RMSNorm [d], or [n d] and [g d],
//                   then for each lane keys and values [1, g, capacity, room] float, float16 or int8, after them in
//                   int8 whose rows have scales those of keys and values, float [1, g, capacity, 1] -> y [S, n d];
//                   attributes num_heads, num_key_value_heads, head_dim, scale, interleaved, window (0: none)
// LatentAttention   q [S, n (nope + rope)], latent [S, rank], k_rope [S, rope], or with the attribute epsilon both in one
//                   [S, rank + rope] and the weight of the latent's RMSNorm [rank], cos and sin [1, S, rope / 2], k_up
//                   [n, nope, rank] and v_up [n, v, rank] float, or codes of 8 bits uint8, or of 4 uint8 [.., rank / 2],
//                   lengths, sizes, then of codes the scales float or float16 [n, .., rank / group] and zero points, as
//                   they are packed (or none: the middle): of k_up, of v_up, of k_up, of v_up; then for each lane the
//                   cache [capacity, rank + rope], after it in int8 its scales float [capacity, parts] -> y [S, n v];
//                   attributes scale, interleaved, scaled (1: the caches are int8 with scales)
//
// A lane's caches may be of several layers, [layers, ...]: the attribute layer (0) says which is meant.

#include <stdio.h>

#include "attention.h"
#include "op_parts.h"

namespace moedge {

namespace {

constexpr int64_t kMostLanes = 256;

struct AttentionOp : KernelBase {
  float scale;
  float epsilon;  // of norms that are the op's to do; negative: there are none
  int64_t interleaved;
  int64_t layer;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    epsilon = attribute_or(ort, info, "epsilon", -1.0f);
    layer = attribute_or(ort, info, "layer", int64_t{0});
    if (OrtStatus* status = ort.attribute(info, "scale", &scale)) return status;
    return ort.attribute(info, "interleaved", &interleaved);
  }

  // A cache, of `rank` axes without the layers.
  OrtStatus* read_cache(const OrtKernelContext* context, size_t index, uint32_t rank, Tensor* cache) const;
  // The lanes' places in the run and their caches, `each` of them from input `first` on. `core` has its sizes.
  OrtStatus* read_lanes(const OrtKernelContext* context, const Tensor& lengths, const Tensor& sizes, size_t first,
                        size_t each, Attention* core, Lane* lanes) const;
  OrtStatus* check_cache(const Attention& core, const Tensor& cache, const Lane& lane) const;
};

OrtStatus* AttentionOp::read_cache(const OrtKernelContext* context, size_t index, uint32_t rank, Tensor* cache) const {
  if (OrtStatus* status = read_input(ort, context, index, cache)) return status;
  if (cache->rank != rank + 1) return nullptr;
  if (layer < 0 || layer >= cache->shape[0]) return invalid("moedge.cpu: a KV cache has no such layer");
  int64_t bytes = cache->kind == kFloat ? 4 : cache->kind == kHalf ? 2 : 1;
  for (uint32_t axis = 0; axis < rank; ++axis) bytes *= cache->shape[axis] = cache->shape[axis + 1];
  cache->rank = rank;
  cache->data = static_cast<char*>(cache->data) + layer * bytes;
  return nullptr;
}

bool is_by_head(const Tensor& cache, const Attention& core, const Lane& lane, int64_t width) {
  return cache.rank == 4 && cache.shape[0] == 1 && cache.shape[1] == core.groups && cache.shape[2] == lane.capacity &&
         cache.shape[3] == width;
}

OrtStatus* AttentionOp::check_cache(const Attention& core, const Tensor& cache, const Lane& lane) const {
  const int kind = core.element == Element::kFloat ? kFloat : core.element == Element::kHalf ? kHalf : kInt8;
  const int64_t room = core.room;
  const bool fits = core.values_are_keys ? cache.is(lane.capacity, room) : is_by_head(cache, core, lane, room);
  return fits && cache.kind == kind ? nullptr : invalid("moedge.cpu: a KV cache is of another shape or type");
}

Element element_of(const Tensor& cache) {
  return cache.kind == kHalf ? Element::kHalf : cache.kind == kInt8 ? Element::kByte : Element::kFloat;
}

OrtStatus* AttentionOp::read_lanes(const OrtKernelContext* context, const Tensor& lengths, const Tensor& sizes,
                                   size_t first, size_t each, Attention* core, Lane* lanes) const {
  size_t inputs = 0;
  if (OrtStatus* status = ort.input_count(context, &inputs)) return status;
  const int64_t count = lengths.shape[0];
  if (lengths.rank != 1 || count < 1 || count > kMostLanes || (!sizes.data && count > 1) ||
      (sizes.data && (sizes.rank != 1 || sizes.shape[0] != count)) || inputs != first + each * static_cast<size_t>(count))
    return invalid("moedge.cpu: lengths, sizes and KV caches are not of as many lanes");
  const uint32_t rank = core->values_are_keys ? 2 : 4;
  int64_t begin = 0;
  for (int64_t i = 0; i < count; ++i) {
    Lane& lane = lanes[i];
    lane = Lane{};
    lane.past = lengths.as<int64_t>()[i];
    lane.first = begin;
    lane.rows = sizes.data ? sizes.as<int64_t>()[i] : core->tokens;
    if (lane.rows == 0) continue;
    Tensor caches[4];
    for (size_t c = 0; c < each; ++c)
      if (OrtStatus* status = read_cache(context, first + static_cast<size_t>(i) * each + c, rank, caches + c))
        return status;
    if (begin == 0) core->element = element_of(caches[0]);
    const Tensor &one = caches[0], &other = caches[1];
    lane.capacity = one.rank >= 2 ? one.shape[one.rank - 2] : 0;
    lane.keys = one.data;
    if (OrtStatus* status = check_cache(*core, one, lane)) return status;
    if (!core->values_are_keys) {
      lane.values = other.data;
      if (OrtStatus* status = check_cache(*core, other, lane)) return status;
      for (size_t c = 2; c < each; ++c)
        if (caches[c].kind != kFloat || !is_by_head(caches[c], *core, lane, 1))
          return invalid("moedge.cpu: a KV cache is of another shape or type");
      lane.key_scales = static_cast<float*>(caches[2].data);
      lane.value_scales = static_cast<float*>(caches[3].data);
    } else if (each == 2) {
      lane.scales = static_cast<float*>(other.data);
      if (other.kind != kFloat || !other.is(lane.capacity, core->parts))
        return invalid("moedge.cpu: a KV cache is of another shape or type");
    }
    if (core->values_are_keys && (core->element == Element::kByte) != (core->parts > 0))
      return invalid("moedge.cpu: a KV cache in int8 has scales, and no other");
    // Written so that no sum can overflow.
    if (lane.past < 0 || lane.rows < 0 || lane.past > lane.capacity || lane.rows > lane.capacity - lane.past ||
        lane.rows > core->tokens - begin) {
      char text[160];
      snprintf(text, sizeof text, "moedge.cpu: %lld rows after %lld do not fit a KV cache of %lld, or the run of %lld",
               static_cast<long long>(lane.rows), static_cast<long long>(lane.past),
               static_cast<long long>(lane.capacity), static_cast<long long>(core->tokens));
      return invalid(text);
    }
    begin += lane.rows;
  }
  core->lanes = lanes;
  core->lane_count = count;
  return nullptr;
}

bool is_row_of_angles(const Tensor& angles, int64_t tokens, int64_t pairs) {
  return angles.is(1, tokens, pairs);
}

struct GroupedOp : AttentionOp {
  int64_t heads, groups, head_dim, window;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    if (OrtStatus* status = ort.attribute(info, "num_heads", &heads)) return status;
    if (OrtStatus* status = ort.attribute(info, "num_key_value_heads", &groups)) return status;
    if (OrtStatus* status = ort.attribute(info, "head_dim", &head_dim)) return status;
    if (OrtStatus* status = ort.attribute(info, "window", &window)) return status;
    if (heads < 1 || groups < 1 || heads % groups || head_dim < 1 || window < 0)
      return invalid("moedge.cpu.GroupedAttention: num_heads must be a multiple of num_key_value_heads");
    return AttentionOp::read_attributes(info);
  }
  OrtStatus* run(OrtKernelContext* context) const;
};

constexpr size_t kGroupedLanes = 10;  // its first input of a lane, where there are no norms

bool is_part(const PartNorm& norm, const Tensor& weight, int64_t head, int64_t row) {
  return weight.rank == 1 && weight.kind == kFloat && (norm.width == head || norm.width == row);
}

OrtStatus* GroupedOp::run(OrtKernelContext* context) const {
  Tensor in[kMaxInputs];
  if (OrtStatus* status = read_inputs(context, kGroupedLanes, in)) return status;
  const Tensor &q = in[0], &k = in[1], &v = in[2], &cos = in[3], &sin = in[4], &sinks = in[7];
  const int64_t tokens = q.shape[0], pairs = cos.rank == 3 ? cos.shape[2] : 0;
  GroupedAttention g{};
  g.core.kernels = attention_kernels(kernels);
  g.core.tokens = tokens;
  g.core.heads = heads;
  g.core.groups = groups;
  g.core.width = g.core.value_width = head_dim;
  g.core.window = window;
  g.core.scale = scale;
  g.core.sinks = sinks.as<float>();
  Tensor cache, norms[2];
  size_t first_lane = kGroupedLanes;
  if (epsilon >= 0.0f)
    for (Tensor& norm : norms)
      if (OrtStatus* status = read_input(ort, context, first_lane++, &norm)) return status;
  g.q_norm = {norms[0].as<float>(), norms[0].shape[0]};
  g.k_norm = {norms[1].as<float>(), norms[1].shape[0]};
  g.epsilon = epsilon;
  if (OrtStatus* status = read_cache(context, first_lane, 4, &cache)) return status;
  g.core.room = cache.rank == 4 ? cache.shape[3] : 0;
  const bool own_scales = cache.kind == kInt8 && !in[8].data && !in[9].data;  // of rows, beside them
  const bool scaled = cache.kind == kInt8 && !own_scales;
  const auto scales_fit = [&](const Tensor& scales) {
    return scaled ? scales.data && scales.rank == 1 && scales.shape[0] == groups * g.core.room : !scales.data;
  };
  const bool fits = q.is(tokens, heads * head_dim) && k.is(tokens, groups * head_dim) &&
                    v.is(tokens, groups * head_dim) && is_row_of_angles(cos, tokens, pairs) &&
                    is_row_of_angles(sin, tokens, pairs) && 2 * pairs <= head_dim && g.core.room >= head_dim &&
                    (!sinks.data || (sinks.rank == 1 && sinks.shape[0] == heads)) && scales_fit(in[8]) &&
                    scales_fit(in[9]) &&
                    (epsilon < 0.0f || (is_part(g.q_norm, norms[0], head_dim, heads * head_dim) &&
                                        is_part(g.k_norm, norms[1], head_dim, groups * head_dim)));
  if (!fits) return invalid("moedge.cpu.GroupedAttention: the inputs' shapes do not fit each other");
  Lane lanes[kMostLanes];
  const size_t caches = own_scales ? 4 : 2;
  if (OrtStatus* status = read_lanes(context, in[5], in[6], first_lane, caches, &g.core, lanes)) return status;
  int64_t rows = 0;
  for (int64_t i = 0; i < g.core.lane_count; ++i) rows += lanes[i].rows;
  if (rows > 0 && (g.core.element == Element::kByte) != (cache.kind == kInt8))
    return invalid("moedge.cpu: a KV cache is of another shape or type");
  g.core.products = own_scales && g.core.has_integer_heads() ? kernels : nullptr;
  OrtValue* value = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = ort.output(context, 0, q.shape, 2, &value)) return status;
  if (OrtStatus* status = ort.data(value, &y)) return status;
  if (tokens == 0) return nullptr;
  g.core.out = static_cast<float*>(y);
  g.q = q.as<float>();
  g.k = k.as<float>();
  g.v = v.as<float>();
  g.rotation = {cos.as<float>(), sin.as<float>(), pairs, interleaved != 0};
  g.products = kernels;
  g.key_scales = in[8].as<float>();
  g.value_scales = in[9].as<float>();
  return with_scratch(context, grouped_scratch(g),
                      [&](void* scratch, const Parallel& parallel) { run_grouped(g, scratch, parallel); });
}

struct LatentOp : AttentionOp {
  int64_t scaled;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    if (OrtStatus* status = ort.attribute(info, "scaled", &scaled)) return status;
    return AttentionOp::read_attributes(info);
  }
  OrtStatus* run(OrtKernelContext* context) const;
};

constexpr size_t kLatentLanes = 13;

// Matrices of heads [.., rows, width], or their bytes, with what belongs to their codes; false where these do not fit each
// other.
bool read_matrices(const Tensor& values, int64_t width, const Tensor& scales, const Tensor& zero_points,
                   HeadMatrices* out) {
  const int64_t heads = values.shape[0], rows = values.shape[1];
  *out = {{nullptr, nullptr, nullptr, rows, width, 0, 8}, nullptr};
  if (values.kind == kFloat) {
    out->floats = values.as<float>();
    return values.shape[2] == width && !scales.data && !zero_points.data;
  }
  if (values.kind != kUint8 || scales.scale_size() < 2 || scales.rank != 3 || scales.shape[2] < 1) return false;
  const int64_t groups = scales.shape[2], group = width / groups;
  const int bits = 2 * values.shape[2] == width ? 4 : 8;
  Matrix& codes = out->codes;
  codes = {values.as<uint8_t>(), scales.data, zero_points.as<uint8_t>(), rows, width, group, bits, scales.scale_size()};
  const bool points =
      !zero_points.data || (zero_points.kind == kUint8 && zero_points.is(heads, rows, codes.zero_row_bytes()));
  const bool size = group >= kVector && group <= kMaxGroup && (group & (group - 1)) == 0 && groups * group == width;
  return values.shape[2] == codes.row_bytes() && scales.is(heads, rows, groups) && size && points;
}

OrtStatus* LatentOp::run(OrtKernelContext* context) const {
  Tensor in[kMaxInputs];
  if (OrtStatus* status = read_inputs(context, kLatentLanes, in)) return status;
  const Tensor &q = in[0], &latent = in[1], &k_rope = in[2], &cos = in[3], &sin = in[4], &k_up = in[5], &v_up = in[6];
  const bool joined = epsilon >= 0.0f;
  if (latent.rank != 2 || k_rope.rank != (joined ? 1 : 2) || k_up.rank != 3 || v_up.rank != 3)
    return invalid("moedge.cpu.LatentAttention: an input has another number of axes than it should");
  LatentAttention l{};
  const int64_t tokens = q.shape[0], heads = k_up.shape[0];
  l.nope = k_up.shape[1];
  l.rank = joined ? k_rope.shape[0] : latent.shape[1];
  l.rope = joined ? latent.shape[1] - l.rank : k_rope.shape[1];
  l.value_size = v_up.shape[1];
  l.core.kernels = attention_kernels(kernels);
  l.products = kernels;
  l.core.tokens = tokens;
  l.core.heads = heads;
  l.core.groups = 1;
  l.core.width = l.core.room = l.rank + l.rope;
  l.core.value_width = l.rank;
  l.core.values_are_keys = true;
  l.core.scale = scale;
  if (scaled) {
    Tensor scales;
    if (OrtStatus* status = read_cache(context, kLatentLanes + 1, 2, &scales)) return status;
    l.core.parts = scales.rank == 2 ? scales.shape[1] : 0;
    if (l.core.parts < 1 || l.core.width % l.core.parts)
      return invalid("moedge.cpu.LatentAttention: the scales of a row are not of blocks of one size");
    l.core.products = l.core.has_integer_blocks() ? kernels : nullptr;
  }
  const bool fits = heads > 0 && l.rank > 0 && l.rope >= 0 && l.rope % 2 == 0 &&
                    q.is(tokens, heads * (l.nope + l.rope)) &&
                    latent.shape[0] == tokens && (joined || k_rope.shape[0] == tokens) &&
                    is_row_of_angles(cos, tokens, l.rope / 2) && is_row_of_angles(sin, tokens, l.rope / 2) &&
                    v_up.shape[0] == heads && read_matrices(k_up, l.rank, in[9], in[11], &l.k_up) &&
                    read_matrices(v_up, l.rank, in[10], in[12], &l.v_up);
  if (!fits) return invalid("moedge.cpu.LatentAttention: the inputs' shapes do not fit each other");
  Lane lanes[kMostLanes];
  if (OrtStatus* status = read_lanes(context, in[7], in[8], kLatentLanes, scaled ? 2 : 1, &l.core, lanes))
    return status;
  const int64_t shape[2] = {tokens, heads * l.value_size};
  OrtValue* value = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = ort.output(context, 0, shape, 2, &value)) return status;
  if (OrtStatus* status = ort.data(value, &y)) return status;
  if (tokens == 0) return nullptr;
  l.q = q.as<float>();
  l.latent = latent.as<float>();
  l.k_rope = joined ? l.latent + l.rank : k_rope.as<float>();
  l.latent_stride = latent.shape[1];
  l.rope_stride = joined ? latent.shape[1] : l.rope;
  l.norm = joined ? k_rope.as<float>() : nullptr;
  l.epsilon = epsilon;
  l.rotation = {cos.as<float>(), sin.as<float>(), l.rope / 2, interleaved != 0};
  l.y = static_cast<float*>(y);
  return with_scratch(context, latent_scratch(l),
                      [&](void* scratch, const Parallel& parallel) { run_latent(l, scratch, parallel); });
}

constexpr int kGroupedTypes[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kInt64, kInt64, kFloat, kFloat, kFloat, kAnyType};
constexpr int kLatentTypes[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kAnyType, kAnyType, kInt64, kInt64,
                                kAnyType, kAnyType, kUint8, kUint8, kAnyType};

}  // namespace

const OrtCustomOp* grouped_attention_op() {
  static constexpr Op op = make_op<GroupedOp>("GroupedAttention", kGroupedTypes, 11, 6, true);
  return &op;
}

const OrtCustomOp* latent_attention_op() {
  static constexpr Op op = make_op<LatentOp>("LatentAttention", kLatentTypes, 14, 8, true);
  return &op;
}

}  // namespace moedge
