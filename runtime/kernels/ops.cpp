// The custom ops of the domain `moedge.cpu`, as onnxruntime registers and calls them.
//
// Linear   x float [..., K], codes uint8 [N, K bits / 8], of 6 bits [3, N, K / 4] (two thirds 4 bits of each, a third
//          2), scales float, fp16 or float8 [N, groups]; optional: zero points, bias [N]; attribute bits -> y float [..., N]

#include <string.h>

#include "step_ops.h"

namespace moedge {

namespace {

struct LinearOp : PlanesStep {
  OrtStatus* run(OrtKernelContext* context) const;
};

OrtStatus* LinearOp::run(OrtKernelContext* context) const {
  Tensor in[kMaxInputs];
  if (OrtStatus* status = read_all(context, in)) return status;
  const Tensor& x = in[0];
  const int64_t width = x.rank > 0 ? x.shape[x.rank - 1] : 0;
  Matrix matrix{};
  if (!read_matrix(in + 1, width, bits, &matrix) || (in[4].data && !is_row(in[4], matrix.rows)))
    return invalid("moedge.cpu.Linear: the inputs' shapes do not fit each other");
  const int64_t rows = matrix.rows;
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

constexpr int kLinearTypes[] = {kFloat, kUint8, kAnyType, kUint8, kFloat};

}  // namespace

}  // namespace moedge

extern "C" {

// What SessionOptions.register_custom_ops_library calls.
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace moedge;
  static constexpr Op linear = make_op<LinearOp>("Linear", kLinearTypes, 5, 3);
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) {  // too old; of its first functions one makes the error
    const OrtApi* first = base->GetApi(1);
    return first ? Ort{first}.fail(kFail, "moedge.cpu: this onnxruntime is too old, 1.18 or later is needed") : nullptr;
  }
  const Ort ort{api};
  lends_shapes = atoi(base->GetVersionString() + 2) >= kLendsShapes;  // behind "1."
  // The domain lives as long as the library: sessions keep referring to it, and nothing says when the last one ends.
  static OrtCustomOpDomain* domain = nullptr;
  if (!domain) {
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* status = ort.create_domain("moedge.cpu", &made)) return status;
    if (OrtStatus* status = ort.add_op(made, &linear)) return status;
    if (OrtStatus* status = ort.add_op(made, grouped_attention_op())) return status;
    if (OrtStatus* status = ort.add_op(made, latent_attention_op())) return status;
    for (const auto list : {step_op, moe_op})
      for (size_t place = 0; list(place); ++place)
        if (OrtStatus* status = ort.add_op(made, list(place))) return status;
    domain = made;
  }
  return ort.add_domain(options, domain);
}

}  // extern "C"
