// The custom ops of a mixture of experts. All but `Experts` begin with the residual sum and the norm of their input, as
// those of step_ops.cpp do, with their attributes: x float [T, H], residual float [T, H], norm weight float [H], the last two
// optional.
//
// Experts  x float [T, H], experts int64 [T, k], weights float [T, k], then the experts: gate_up uint8 [E, 2 I, H bits /
//          8], its scales float, fp16 or float8 [E, 2 I, groups], down uint8 [E, H, I bits / 8], its scales; optional: gate_up's
//          and down's zero points (uint8), gate_up's and down's biases (float); attributes bits, alpha, limit, offset
//          -> y float [T, H]
// Router   x, residual, norm, matrix float or bf16 [E, H], optional: bias of the logits [E], bias of the choice [E];
//          attributes sigmoid, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor
//          -> logits float [T, E], experts int64 [T, k], weights float [T, k], optional: x + residual, the norm [T, H]
// Moe      Router's inputs, with null for biases that are not there, the experts as above, then optional what all tokens
//          share: gate_up uint8 [2 S, H bits / 8] (gate's rows first), its scales, zero points, down uint8 [H, S bits / 8],
//          its scales, zero points, the row of its gate [1, H] (see `Mlp`); the attributes of both, and shared_bits
//          -> Router's outputs, all optional, and y float [T, H]

#include <math.h>
#include <stdio.h>

#include "moe.h"
#include "step_ops.h"

namespace moedge {

namespace {

// The function between an expert's products, and the codes' width.
struct ExpertsForm {
  int bits;
  float alpha, limit, offset;

  OrtStatus* read(const Ort& ort, const OrtKernelInfo* info) {
    alpha = attribute_or(ort, info, "alpha", 1.0f);
    limit = attribute_or(ort, info, "limit", INFINITY);
    offset = attribute_or(ort, info, "offset", 0.0f);
    return read_bits(ort, info, "bits", &bits);
  }

  // The experts' tensors; false where they do not fit each other.
  bool fits(const Tensor* in, int64_t hidden, Mixture* m) const {
    const Tensor &up = in[0], &down = in[2];
    if (up.rank != 3 || in[1].rank != 3 || down.rank != 3 || in[3].rank != 3) return false;
    const int64_t experts = up.shape[0], inner = up.shape[1] / 2;
    if (!good_group(hidden, in[1].shape[2]) || !good_group(inner, in[3].shape[2])) return false;
    m->experts = experts;
    m->hidden = hidden;
    m->inner = inner;
    m->alpha = alpha;
    m->limit = limit;
    m->offset = offset;
    m->gate_up_bias = in[6].as<float>();
    m->down_bias = in[7].as<float>();
    return up.shape[1] == 2 * inner && stack(in[0], in[1], in[4], experts, 2 * inner, hidden, &m->gate_up) &&
           stack(in[2], in[3], in[5], experts, hidden, inner, &m->down) &&
           (!in[6].data || in[6].is(experts, 2 * inner)) && (!in[7].data || in[7].is(experts, hidden));
  }

 private:
  bool stack(const Tensor& codes, const Tensor& scales, const Tensor& zero_points, int64_t experts, int64_t rows,
             int64_t width, Matrix* out) const {
    *out = {codes.as<uint8_t>(), scales.data, zero_points.as<uint8_t>(), rows, width, width / scales.shape[2], bits,
            scales.scale_size()};
    return out->scale_size && codes.is(experts, rows, out->row_bytes()) &&
           scales.is(experts, rows, out->groups()) &&
           (!zero_points.data || zero_points.is(experts, rows, out->zero_row_bytes()));
  }
};

struct ExpertsOp : StepKernel {
  ExpertsForm form;

  OrtStatus* read_attributes(const OrtKernelInfo* info) { return form.read(ort, info); }
  OrtStatus* run(OrtKernelContext* context) const;
};

OrtStatus* ExpertsOp::run(OrtKernelContext* context) const {
  Tensor in[kMaxInputs];
  if (OrtStatus* status = read_all(context, in)) return status;
  const Tensor &x = in[0], &chosen = in[1], &weights = in[2];
  Mixture m{};
  const bool fits = x.rank == 2 && chosen.rank == 2 && weights.is(x.shape[0], chosen.shape[1]) &&
                    chosen.shape[0] == x.shape[0] && form.fits(in + 3, x.shape[1], &m);
  if (!fits) return invalid("moedge.cpu.Experts: the inputs' shapes do not fit each other");
  m.kernels = kernels;
  m.tokens = x.shape[0];
  m.choices = chosen.shape[1];
  m.x = x.as<float>();
  m.chosen = chosen.as<int64_t>();
  m.weights = weights.as<float>();
  if (m.tokens * m.choices > INT32_MAX) return invalid("moedge.cpu.Experts: too many tokens");
  for (int64_t i = 0; i < m.tokens * m.choices; ++i) {
    if (m.chosen[i] >= 0 && m.chosen[i] < m.experts) continue;
    char text[96];
    snprintf(text, sizeof text, "moedge.cpu.Experts: expert %lld of %lld was chosen",
             static_cast<long long>(m.chosen[i]), static_cast<long long>(m.experts));
    return invalid(text);
  }
  if (OrtStatus* status = make_output(context, 0, m.tokens, m.hidden, &m.y)) return status;
  if (m.tokens == 0) return nullptr;
  return with_scratch(context, mixture_scratch(m),
                      [&](void* scratch, const Parallel& parallel) { run_mixture(m, scratch, parallel); });
}

struct RouterOp : StepKernel {
  Gate gate;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    int64_t sigmoid = 0, normalize = 0;
    const struct {
      const char* name;
      int64_t* into;
    } wanted[] = {{"sigmoid", &sigmoid},
                  {"norm_topk_prob", &normalize},
                  {"top_k", &gate.top_k},
                  {"n_group", &gate.groups},
                  {"topk_group", &gate.kept_groups}};
    for (const auto& each : wanted)
      if (OrtStatus* status = ort.attribute(info, each.name, each.into)) return status;
    gate.sigmoid = sigmoid != 0;
    gate.normalize = normalize != 0;
    gate.factor = attribute_or(ort, info, "routed_scaling_factor", 1.0f);
    if (gate.top_k < 1 || gate.groups < 1 || gate.kept_groups < 1 || gate.kept_groups > gate.groups)
      return invalid("moedge.cpu.Router: top_k, n_group and topk_group contradict each other");
    return StepKernel::read_attributes(info);
  }

  bool read_router(const Tensor* in, Router* r) const {
    const int64_t experts = in[3].rank == 2 ? in[3].shape[0] : 0;
    r->kernels = kernels;
    r->gate = gate;
    r->gate.experts = experts;
    r->gate.bias = in[5].as<float>();
    r->matrix = in[3].data;
    r->half = in[3].kind == kBfloat16;
    r->bias = in[4].as<float>();
    return read_norm(in, &r->norm) && in[3].is(experts, r->norm.width) && (r->half || in[3].kind == kFloat) &&
           gate.top_k <= experts && experts % gate.groups == 0 && (!in[4].data || is_row(in[4], experts)) &&
           (!in[5].data || is_row(in[5], experts));
  }
  OrtStatus* make_outputs(OrtKernelContext* context, Router* r) const {
    const int64_t tokens = r->norm.tokens, width = r->norm.width;
    if (OrtStatus* status = make_output(context, 0, tokens, r->gate.experts, &r->logits)) return status;
    if (OrtStatus* status = make_output(context, 1, tokens, gate.top_k, &r->experts)) return status;
    if (OrtStatus* status = make_output(context, 2, tokens, gate.top_k, &r->weights)) return status;
    if (OrtStatus* status = make_output(context, 3, tokens, width, &r->norm.sum)) return status;
    return make_output(context, 4, tokens, width, &r->norm.y);
  }

  OrtStatus* run(OrtKernelContext* context) const {
    Tensor in[kMaxInputs];
    if (OrtStatus* status = read_all(context, in)) return status;
    Router r{};
    if (!read_router(in, &r)) return invalid("moedge.cpu.Router: the inputs' shapes do not fit each other");
    if (OrtStatus* status = make_outputs(context, &r)) return status;
    if (r.norm.tokens == 0) return nullptr;
    return with_scratch(context, router_scratch(r),
                        [&](void* scratch, const Parallel& parallel) { run_router(r, scratch, parallel); });
  }
};

struct MoeOp : RouterOp {
  ExpertsForm form;
  int shared_bits;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    if (OrtStatus* status = form.read(ort, info)) return status;
    if (OrtStatus* status = read_bits(ort, info, "shared_bits", &shared_bits)) return status;
    return RouterOp::read_attributes(info);
  }
  OrtStatus* run(OrtKernelContext* context) const;
};

OrtStatus* MoeOp::run(OrtKernelContext* context) const {
  Tensor in[kMaxInputs];
  if (OrtStatus* status = read_all(context, in)) return status;
  Moe m{};
  bool fits = read_router(in, &m.router) && form.fits(in + 6, m.router.norm.width, &m.mixture) &&
              m.mixture.experts == m.router.gate.experts;
  const Tensor* own = in + 14;
  if (fits && own->data) {
    Mlp& s = m.shared;
    s.kernels = kernels;
    s.share = own[6].as<float>();
    fits = read_matrix(own, m.mixture.hidden, shared_bits, &s.gate_up) && s.gate_up.rows % 2 == 0 &&
           read_matrix(own + 3, s.gate_up.rows / 2, shared_bits, &s.down) && s.down.rows == m.mixture.hidden &&
           (!s.share || own[6].is(1, m.mixture.hidden));
  }
  if (!fits) return invalid("moedge.cpu.Moe: the inputs' shapes do not fit each other");
  m.mixture.kernels = kernels;
  const int64_t tokens = m.router.norm.tokens;
  if (tokens * gate.top_k > INT32_MAX) return invalid("moedge.cpu.Moe: too many tokens");
  float** y = own->data ? &m.shared.y : &m.mixture.y;
  if (OrtStatus* status = make_output(context, 5, tokens, m.mixture.hidden, y)) return status;
  if (OrtStatus* status = make_outputs(context, &m.router)) return status;
  if (tokens == 0) return nullptr;
  if (!*y) return invalid("moedge.cpu.Moe: y is no output");
  return with_scratch(context, moe_scratch(m),
                      [&](void* scratch, const Parallel& parallel) { run_moe(m, scratch, parallel); });
}

constexpr int kExpertsTypes[] = {kFloat,   kInt64, kFloat, kUint8, kAnyType, kUint8,
                                 kAnyType, kUint8, kUint8, kFloat, kFloat};
constexpr int kMoeTypes[] = {kFloat,   kFloat, kFloat, kAnyType, kFloat, kFloat,   kUint8, kAnyType, kUint8,  kAnyType, kUint8,
                             kUint8,   kFloat, kFloat, kUint8,   kAnyType, kUint8, kUint8, kAnyType, kUint8,  kFloat};
constexpr int kRoutes[] = {kFloat, kInt64, kFloat, kFloat, kFloat, kFloat};

}  // namespace

const OrtCustomOp* moe_op(size_t place) {
  static constexpr Op experts = make_op<ExpertsOp>("Experts", kExpertsTypes, 11, 7);
  static constexpr StepOp router = make_step_op<RouterOp>("Router", kMoeTypes, 6, 4, kRoutes, 5, 3);
  static constexpr StepOp moe = make_step_op<MoeOp>("Moe", kMoeTypes, 21, 4, kRoutes, 6, 0);
  const OrtCustomOp* ops[] = {&experts, &router, &moe};
  return place < sizeof ops / sizeof *ops ? ops[place] : nullptr;
}

}  // namespace moedge
