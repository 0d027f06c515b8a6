// The custom ops that take several nodes' place. All begin with the residual sum and the norm of their input, where
// these are given: x float [T, H], residual float [T, H], norm weight float [H], the last two optional; attributes
// epsilon and residual_scale (1), what the residual is multiplied with.
//
// Projections  x, residual, norm, then one to three times: codes uint8 [N, H bits / 8], scales float, fp16 or float8 [N,
//              groups], optional: zero points, bias [N]; attribute bits; 6 bits as Linear, then once
//              -> y float [T, N] of the first, optional: x + residual [T, H], y of the second and the third
// Mlp          x, residual, norm, gate_up uint8 [2 I, H bits / 8] (gate's rows first), its scales, zero points, down
//              uint8 [H, I bits / 8], its scales, zero points, optional: what is added to y float [T, H], a row
//              float [1, H] whose product with the normed x makes, by a sigmoid, what y is multiplied with before;
//              attribute bits
//              -> y float [T, H], optional: x + residual
// Router and Moe are in moe_ops.cpp.

#include "step_ops.h"

namespace moedge {

namespace {

constexpr size_t kMatrixInputs = 4;

struct ProjectionsOp : PlanesStep {
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
    if (!fits || p.count == 0 || (bits == 6 && p.count > 1)) return invalid("moedge.cpu.Projections: the inputs' shapes do not fit each other");
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

constexpr int kProjectionsTypes[] = {kFloat,   kFloat, kFloat, kUint8, kAnyType, kUint8, kFloat, kUint8,
                                     kAnyType, kUint8, kFloat, kUint8, kAnyType, kUint8, kFloat};
constexpr int kMlpTypes[] = {kFloat, kFloat,   kFloat, kUint8, kAnyType, kUint8,
                             kUint8, kAnyType, kUint8, kFloat, kFloat};
constexpr int kFloats[] = {kFloat, kFloat, kFloat, kFloat};

}  // namespace

const OrtCustomOp* step_op(size_t place) {
  static constexpr StepOp projections =
      make_step_op<ProjectionsOp>("Projections", kProjectionsTypes, 15, 5, kFloats, 4, 1);
  static constexpr StepOp mlp = make_step_op<MlpOp>("Mlp", kMlpTypes, 11, 5, kFloats, 2, 1);
  const OrtCustomOp* ops[] = {&projections, &mlp};
  return place < sizeof ops / sizeof *ops ? ops[place] : nullptr;
}

}  // namespace moedge
