// The custom ops that take several nodes' place. All begin with the residual sum and the norm of their input, where
// these are given: x float [T, H], residual float [T, H], norm weight float [H], the last two optional.
//
// Projections  x, residual, norm, then one to three times: codes uint8 [N, H bits / 8], scales float or fp16 [N,
//              groups], optional: zero points, bias [N]; attributes bits, epsilon
//              -> y float [T, N] of the first, optional: x + residual [T, H], y of the second and the third
// Mlp          x, residual, norm, gate_up uint8 [2 I, H bits / 8] (gate's rows first), its scales, zero points, down
//              uint8 [H, I bits / 8], its scales, zero points, optional: what is added to y float [T, H], a row
//              float [1, H] whose product with the normed x makes, by a sigmoid, what y is multiplied with before;
//              attributes bits, epsilon
//              -> y float [T, H], optional: x + residual
// Router       x, residual, norm, matrix float or bf16 [E, H], optional: bias of the logits [E], bias of the choice [E];
//              attributes sigmoid, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor, epsilon
//              -> logits float [T, E], experts int64 [T, k], weights float [T, k], optional: x + residual, the norm [T, H]

#include "op_parts.h"
#include "step.h"

namespace moedge {

namespace {

constexpr size_t kMatrixInputs = 4;

bool good_group(int64_t width, int64_t groups) {
  const int64_t group = groups > 0 ? width / groups : 0;
  return group >= 16 && group <= kMaxGroup && (group & (group - 1)) == 0 && group * groups == width;
}

bool is_row(const Tensor& tensor, int64_t width) { return tensor.rank == 1 && tensor.shape[0] == width; }

// A matrix of codes, scales and optional zero points in a row; false where they do not fit a width.
bool read_matrix(const Tensor* in, int64_t width, int bits, Matrix* out) {
  if (!in[0].data || !in[1].data || in[0].rank != 2 || in[1].rank != 2 || !good_group(width, in[1].shape[1])) return false;
  *out = {in[0].as<uint8_t>(),    in[1].data, in[2].as<uint8_t>(),   in[0].shape[0], width,
          width / in[1].shape[1], bits,       in[1].kind == kHalf};
  return in[1].holds_scales() && out->is_packed_well() && in[0].is(out->rows, out->row_bytes()) && in[1].is(out->rows, out->groups()) &&
         (!in[2].data || in[2].is(out->rows, out->zero_row_bytes()));
}

struct StepKernel : KernelBase {
  float epsilon;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    epsilon = attribute_or(ort, info, "epsilon", 1e-6f);
    return nullptr;
  }
  OrtStatus* read_all(const OrtKernelContext* context, Tensor* in) const {
    memcpy(in, constants, sizeof constants);
    return read_inputs(ort, context, kMaxInputs, in);
  }
  // False where x, residual and weight do not fit each other.
  bool read_norm(const Tensor* in, Norm* norm) const {
    if (in[0].rank != 2) return false;
    *norm = {in[0].shape[0], in[0].shape[1], in[0].as<float>(), in[1].as<float>(), in[2].as<float>(), epsilon,
             nullptr,        nullptr};
    return (!in[1].data || in[1].is(norm->tokens, norm->width)) && (!in[2].data || is_row(in[2], norm->width));
  }
  // An output [rows, width], where the graph has one at this place.
  template <typename T>
  OrtStatus* make_output(OrtKernelContext* context, size_t place, int64_t rows, int64_t width, T** out) const {
    size_t count = 0;
    if (OrtStatus* status = ort.output_count(context, &count)) return status;
    *out = nullptr;
    if (place >= count) return nullptr;
    const int64_t shape[] = {rows, width};
    OrtValue* value = nullptr;
    if (OrtStatus* status = ort.output(context, place, shape, 2, &value)) return status;
    void* data = nullptr;
    if (value)
      if (OrtStatus* status = ort.data(value, &data)) return status;
    *out = static_cast<T*>(data);
    return nullptr;
  }
};

struct QuantizedStep : StepKernel {
  int bits;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    int64_t value = 0;
    if (OrtStatus* status = ort.attribute(info, "bits", &value)) return status;
    bits = static_cast<int>(value);
    if (bits != 4 && bits != 6 && bits != 8) return invalid("moedge.cpu: bits must be 4, 6 or 8");
    return StepKernel::read_attributes(info);
  }
};

struct ProjectionsOp : QuantizedStep {
  OrtStatus* run(OrtKernelContext* context) const {
    Tensor in[kMaxInputs];
    if (OrtStatus* status = read_all(context, in)) return status;
    Projections p{};
    p.kernels = kernels;
    bool fits = read_norm(in, &p.norm);
    for (; fits && p.count < kMaxMatrices && in[3 + p.count * kMatrixInputs].data; ++p.count) {
      const Tensor* own = in + 3 + p.count * kMatrixInputs;
      Matrix* matrix = p.matrices + p.count;
      fits = read_matrix(own, p.norm.width, bits, matrix) && matrix->group == p.matrices[0].group &&
             (!own[3].data || is_row(own[3], matrix->rows));
      p.biases[p.count] = own[3].as<float>();
    }
    if (!fits || p.count == 0) return invalid("moedge.cpu.Projections: the inputs' shapes do not fit each other");
    const size_t places[] = {0, 2, 3};
    for (int64_t i = 0; i < p.count; ++i)
      if (OrtStatus* status = make_output(context, places[i], p.norm.tokens, p.matrices[i].rows, p.y + i)) return status;
    if (OrtStatus* status = make_output(context, 1, p.norm.tokens, p.norm.width, &p.norm.sum)) return status;
    if (p.norm.tokens == 0) return nullptr;
    for (int64_t i = 0; i < p.count; ++i)
      if (!p.y[i]) return invalid("moedge.cpu.Projections: a matrix has no output");
    return with_scratch(context, projections_scratch(p), [&](void* scratch, const Parallel& parallel) {
      run_projections(p, scratch, parallel);
    });
  }
};

struct MlpOp : QuantizedStep {
  OrtStatus* run(OrtKernelContext* context) const {
    Tensor in[kMaxInputs];
    if (OrtStatus* status = read_all(context, in)) return status;
    Mlp m{};
    m.kernels = kernels;
    const bool fits = read_norm(in, &m.norm) && read_matrix(in + 3, m.norm.width, bits, &m.gate_up) &&
                      m.gate_up.rows % 2 == 0 && read_matrix(in + 6, m.gate_up.rows / 2, bits, &m.down) &&
                      (!in[9].data || in[9].is(m.norm.tokens, m.down.rows)) &&
                      (!in[10].data || in[10].is(1, m.norm.width));
    if (!fits) return invalid("moedge.cpu.Mlp: the inputs' shapes do not fit each other");
    m.addend = in[9].as<float>();
    m.share = in[10].as<float>();
    if (OrtStatus* status = make_output(context, 0, m.norm.tokens, m.down.rows, &m.y)) return status;
    if (OrtStatus* status = make_output(context, 1, m.norm.tokens, m.norm.width, &m.norm.sum)) return status;
    if (m.norm.tokens == 0) return nullptr;
    return with_scratch(context, mlp_scratch(m),
                        [&](void* scratch, const Parallel& parallel) { run_mlp(m, scratch, parallel); });
  }
};

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

  OrtStatus* run(OrtKernelContext* context) const {
    Tensor in[kMaxInputs];
    if (OrtStatus* status = read_all(context, in)) return status;
    Router r{};
    r.kernels = kernels;
    r.gate = gate;
    r.matrix = in[3].data;
    r.half = in[3].kind == kBfloat16;
    r.bias = in[4].as<float>();
    r.gate.bias = in[5].as<float>();
    const int64_t experts = in[3].rank == 2 ? in[3].shape[0] : 0;
    r.gate.experts = experts;
    const bool fits = read_norm(in, &r.norm) && in[3].is(experts, r.norm.width) &&
                      (r.half || in[3].kind == kFloat) && gate.top_k <= experts &&
                      experts % gate.groups == 0 && (!in[4].data || is_row(in[4], experts)) &&
                      (!in[5].data || is_row(in[5], experts));
    if (!fits) return invalid("moedge.cpu.Router: the inputs' shapes do not fit each other");
    const int64_t tokens = r.norm.tokens;
    if (OrtStatus* status = make_output(context, 0, tokens, experts, &r.logits)) return status;
    if (OrtStatus* status = make_output(context, 1, tokens, gate.top_k, &r.experts)) return status;
    if (OrtStatus* status = make_output(context, 2, tokens, gate.top_k, &r.weights)) return status;
    if (OrtStatus* status = make_output(context, 3, tokens, r.norm.width, &r.norm.sum)) return status;
    if (OrtStatus* status = make_output(context, 4, tokens, r.norm.width, &r.norm.y)) return status;
    if (tokens == 0) return nullptr;
    return with_scratch(context, router_scratch(r),
                        [&](void* scratch, const Parallel& parallel) { run_router(r, scratch, parallel); });
  }
};

// An op of several outputs, of which the first `needed` are always there.
struct StepOp : Op {
  const int* output_types;
  size_t outputs, needed;
};

template <class K>
constexpr StepOp make_step_op(const char* name, const int* types, size_t inputs, size_t required,
                              const int* output_types, size_t outputs, size_t needed) {
  StepOp op{make_op<K>(name, types, inputs, required), output_types, outputs, needed};
  op.GetInputCharacteristic = [](const OrtCustomOp* self, size_t index) {
    // x and what follows residual and norm weight, which are never required
    const Op* own = static_cast<const Op*>(self);
    return index == 0 || (index >= 3 && index < own->required) ? kRequired : kOptional;
  };
  op.GetOutputType = [](const OrtCustomOp* self, size_t index) {
    return static_cast<const StepOp*>(self)->output_types[index];
  };
  op.GetOutputTypeCount = [](const OrtCustomOp* self) { return static_cast<const StepOp*>(self)->outputs; };
  op.GetOutputCharacteristic = [](const OrtCustomOp* self, size_t index) {
    return index < static_cast<const StepOp*>(self)->needed ? kRequired : kOptional;
  };
  return op;
}

constexpr int kProjectionsTypes[] = {kFloat,   kFloat, kFloat, kUint8, kAnyType, kUint8, kFloat, kUint8,
                                     kAnyType, kUint8, kFloat, kUint8, kAnyType, kUint8, kFloat};
constexpr int kMlpTypes[] = {kFloat, kFloat,   kFloat, kUint8, kAnyType, kUint8,
                             kUint8, kAnyType, kUint8, kFloat, kFloat};
constexpr int kRouterTypes[] = {kFloat, kFloat, kFloat, kAnyType, kFloat, kFloat};
constexpr int kFloats[] = {kFloat, kFloat, kFloat, kFloat};
constexpr int kRoutes[] = {kFloat, kInt64, kFloat, kFloat, kFloat};

}  // namespace

const OrtCustomOp* step_op(size_t place) {
  static constexpr StepOp projections =
      make_step_op<ProjectionsOp>("Projections", kProjectionsTypes, 15, 5, kFloats, 4, 1);
  static constexpr StepOp mlp = make_step_op<MlpOp>("Mlp", kMlpTypes, 11, 5, kFloats, 2, 1);
  static constexpr StepOp router = make_step_op<RouterOp>("Router", kRouterTypes, 6, 4, kRoutes, 5, 3);
  const OrtCustomOp* ops[] = {&projections, &mlp, &router};
  return place < sizeof ops / sizeof *ops ? ops[place] : nullptr;
}

}  // namespace moedge
