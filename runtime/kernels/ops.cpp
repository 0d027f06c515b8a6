// The custom ops of the domain `moedge.cpu`, as onnxruntime registers and calls them.
//
// Experts  x float [T, H], experts int64 [T, k], weights float [T, k], gate_up uint8 [E, 2 I, H bits / 8], its scales
//          float or fp16 [E, 2 I, groups], down uint8 [E, H, I bits / 8], its scales; optional: gate_up's and
//          down's zero points (uint8), gate_up's and down's biases (float); attributes bits, alpha, limit, offset -> y float [T, H]
// Linear   x float [..., K], codes uint8 [N, K bits / 8], scales float or fp16 [N, groups]; optional: zero points, bias
//          [N]; attribute bits -> y float [..., N]

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "op_parts.h"

namespace moedge {

namespace {

bool good_group(int64_t width, int64_t groups) {
  const int64_t group = groups > 0 ? width / groups : 0;
  return group >= 16 && group <= kMaxGroup && (group & (group - 1)) == 0 && group * groups == width;
}

struct Products : KernelBase {
  int bits;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    int64_t value = 0;
    if (OrtStatus* status = ort.attribute(info, "bits", &value)) return status;
    bits = static_cast<int>(value);
    return bits == 4 || bits == 6 || bits == 8 ? nullptr : invalid("moedge.cpu: bits must be 4, 6 or 8");
  }
};

struct ExpertsOp : Products {
  float alpha, limit, offset;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    alpha = attribute_or(ort, info, "alpha", 1.0f);
    limit = attribute_or(ort, info, "limit", INFINITY);
    offset = attribute_or(ort, info, "offset", 0.0f);
    return Products::read_attributes(info);
  }
  OrtStatus* run(OrtKernelContext* context) const;
};

struct LinearOp : Products {
  OrtStatus* run(OrtKernelContext* context) const;
};

OrtStatus* ExpertsOp::run(OrtKernelContext* context) const {
  Tensor in[kMaxInputs];
  memcpy(in, constants, sizeof in);
  if (OrtStatus* status = read_inputs(ort, context, kMaxInputs, in)) return status;
  const Tensor &x = in[0], &chosen = in[1], &weights = in[2], &up = in[3], &down = in[5];
  if (x.rank != 2 || chosen.rank != 2 || up.rank != 3 || in[4].rank != 3 || down.rank != 3 || in[6].rank != 3)
    return invalid("moedge.cpu.Experts: an input has another number of axes than it should");
  const int64_t tokens = x.shape[0], hidden = x.shape[1], choices = chosen.shape[1];
  const int64_t experts = up.shape[0], inner = up.shape[1] / 2;
  const Matrix gate_up{up.as<uint8_t>(), in[4].data, in[7].as<uint8_t>(), 2 * inner,
                       hidden, in[4].shape[2] > 0 ? hidden / in[4].shape[2] : 0, bits, in[4].kind == kHalf};
  const Matrix out{down.as<uint8_t>(), in[6].data, in[8].as<uint8_t>(), hidden,
                   inner, in[6].shape[2] > 0 ? inner / in[6].shape[2] : 0, bits, in[6].kind == kHalf};
  if (!good_group(hidden, in[4].shape[2]) || !good_group(inner, in[6].shape[2]))
    return invalid("moedge.cpu.Experts: a scale must stand for 16, 32, 64, 128, 256 or 512 codes");
  const bool fits = in[4].holds_scales() && in[6].holds_scales() && gate_up.is_packed_well() && out.is_packed_well() && chosen.shape[0] == tokens &&
                    weights.is(tokens, choices) && up.shape[1] == 2 * inner &&
                    up.is(experts, 2 * inner, gate_up.row_bytes()) && in[4].is(experts, 2 * inner, gate_up.groups()) &&
                    down.is(experts, hidden, out.row_bytes()) && in[6].is(experts, hidden, out.groups()) &&
                    (!in[7].data || in[7].is(experts, 2 * inner, gate_up.zero_row_bytes())) &&
                    (!in[8].data || in[8].is(experts, hidden, out.zero_row_bytes())) &&
                    (!in[9].data || in[9].is(experts, 2 * inner)) && (!in[10].data || in[10].is(experts, hidden));
  if (!fits) return invalid("moedge.cpu.Experts: the inputs' shapes do not fit each other");
  if (tokens * choices > INT32_MAX) return invalid("moedge.cpu.Experts: too many tokens");
  for (int64_t i = 0; i < tokens * choices; ++i) {
    const int64_t expert = chosen.as<int64_t>()[i];
    if (expert >= 0 && expert < experts) continue;
    char text[96];
    snprintf(text, sizeof text, "moedge.cpu.Experts: expert %lld of %lld was chosen", static_cast<long long>(expert),
             static_cast<long long>(experts));
    return invalid(text);
  }
  OrtValue* value = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = ort.output(context, 0, x.shape, 2, &value)) return status;
  if (OrtStatus* status = ort.data(value, &y)) return status;
  if (tokens == 0) return nullptr;
  const Mixture mixture{kernels,             tokens,  choices,       experts,
                        hidden,              inner,   x.as<float>(), chosen.as<int64_t>(),
                        weights.as<float>(), gate_up, out,           in[9].as<float>(),
                        in[10].as<float>(),  alpha,   limit,         offset,
                        static_cast<float*>(y)};
  return with_scratch(context, mixture_scratch(mixture), [&](void* scratch, const Parallel& parallel) {
    run_mixture(mixture, scratch, parallel);
  });
}

OrtStatus* LinearOp::run(OrtKernelContext* context) const {
  Tensor in[kMaxInputs];
  memcpy(in, constants, sizeof in);
  if (OrtStatus* status = read_inputs(ort, context, kMaxInputs, in)) return status;
  const Tensor &x = in[0], &codes = in[1], &scales = in[2];
  if (x.rank < 1 || codes.rank != 2 || scales.rank != 2)
    return invalid("moedge.cpu.Linear: an input has another number of axes than it should");
  const int64_t width = x.shape[x.rank - 1], rows = codes.shape[0];
  if (!good_group(width, scales.shape[1]))
    return invalid("moedge.cpu.Linear: a scale must stand for 16, 32, 64, 128, 256 or 512 codes");
  const Matrix matrix{codes.as<uint8_t>(), scales.data, in[3].as<uint8_t>(), rows, width,
                      width / scales.shape[1], bits, scales.kind == kHalf};
  const bool fits = scales.holds_scales() && matrix.is_packed_well() && codes.is(rows, matrix.row_bytes()) && scales.is(rows, matrix.groups()) &&
                    (!in[3].data || in[3].is(rows, matrix.zero_row_bytes())) &&
                    (!in[4].data || (in[4].rank == 1 && in[4].shape[0] == rows));
  if (!fits) return invalid("moedge.cpu.Linear: the inputs' shapes do not fit each other");
  int64_t shape[kMaxRank], tokens = 1;
  for (size_t axis = 0; axis + 1 < x.rank; ++axis) tokens *= shape[axis] = x.shape[axis];
  shape[x.rank - 1] = rows;
  OrtValue* value = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = ort.output(context, 0, shape, x.rank, &value)) return status;
  if (OrtStatus* status = ort.data(value, &y)) return status;
  if (tokens == 0 || rows == 0) return nullptr;
  const Linear linear{kernels, tokens, x.as<float>(), matrix, in[4].as<float>(), static_cast<float*>(y)};
  return with_scratch(context, linear_scratch(linear), [&](void* scratch, const Parallel& parallel) {
    run_linear(linear, scratch, parallel);
  });
}

constexpr int kExpertsTypes[] = {kFloat, kInt64,   kFloat, kUint8, kAnyType, kUint8,
                                 kAnyType, kUint8, kUint8, kFloat, kFloat};
constexpr int kLinearTypes[] = {kFloat, kUint8, kAnyType, kUint8, kFloat};

}  // namespace

}  // namespace moedge

extern "C" {

// What SessionOptions.register_custom_ops_library calls.
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace moedge;
  static constexpr Op experts = make_op<ExpertsOp>("Experts", kExpertsTypes, 11, 7);
  static constexpr Op linear = make_op<LinearOp>("Linear", kLinearTypes, 5, 3);
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) {  // too old; of its first functions one makes the error
    const OrtApi* first = base->GetApi(1);
    return first ? Ort{first}.fail(kFail, "moedge.cpu: this onnxruntime is too old, 1.18 or later is needed") : nullptr;
  }
  const Ort ort{api};
  // The domain lives as long as the library: sessions keep referring to it, and nothing says when the last one ends.
  static OrtCustomOpDomain* domain = nullptr;
  if (!domain) {
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* status = ort.create_domain("moedge.cpu", &made)) return status;
    if (OrtStatus* status = ort.add_op(made, &experts)) return status;
    if (OrtStatus* status = ort.add_op(made, &linear)) return status;
    if (OrtStatus* status = ort.add_op(made, grouped_attention_op())) return status;
    if (OrtStatus* status = ort.add_op(made, latent_attention_op())) return status;
    for (size_t place = 0; step_op(place); ++place)
      if (OrtStatus* status = ort.add_op(made, step_op(place))) return status;
    domain = made;
  }
  return ort.add_domain(options, domain);
}

}  // extern "C"
