// The custom ops of the domain `moedge.cpu`, as onnxruntime registers and calls them.
//
// Experts  x float [T, H], experts int64 [T, k], weights float [T, k], gate_up uint8 [E, 2 I, H bits / 8], its scales
//          float [E, 2 I, groups], down uint8 [E, H, I bits / 8], its scales; optional: gate_up's and down's zero
//          points (uint8), gate_up's and down's biases (float); attributes bits, alpha, limit, offset -> y float [T, H]
// Linear   x float [..., K], codes uint8 [N, K bits / 8], scales float [N, groups]; optional: zero points, bias
//          [N]; attribute bits -> y float [..., N]

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "ort_abi.h"

namespace moedge {

namespace {

constexpr int kMaxRank = 8;
constexpr size_t kMaxInputs = 11;

struct Tensor {
  void* data = nullptr;  // null: an optional input that is not there
  int64_t shape[kMaxRank] = {};
  size_t rank = 0;

  bool is(int64_t a, int64_t b) const { return rank == 2 && shape[0] == a && shape[1] == b; }
  bool is(int64_t a, int64_t b, int64_t c) const {
    return rank == 3 && shape[0] == a && shape[1] == b && shape[2] == c;
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

OrtStatus* read_value(const Ort& ort, const OrtValue* value, Tensor* out) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = ort.type_and_shape(value, &info)) return status;
  OrtStatus* status = ort.rank(info, &out->rank);
  if (!status && out->rank > kMaxRank) status = ort.fail(kInvalidArgument, "moedge.cpu: an input has too many axes");
  if (!status) status = ort.dimensions(info, out->shape, out->rank);
  ort.release(info);
  return status ? status : ort.data(const_cast<OrtValue*>(value), &out->data);
}

// What never changes is read once, when the kernel is made: that costs more than a small model's product.
OrtStatus* read_constants(const Ort& ort, const OrtKernelInfo* info, size_t limit, Tensor* out) {
  size_t count = 0;
  if (OrtStatus* status = ort.input_count(info, &count)) return status;
  for (size_t i = 0; i < count && i < limit; ++i) {
    int constant = 0;
    const OrtValue* value = nullptr;
    if (OrtStatus* status = ort.constant_input(info, i, &constant, &value)) return status;
    if (!constant || !value) continue;
    if (OrtStatus* status = read_value(ort, value, out + i)) return status;
  }
  return nullptr;
}

// `out` comes with the constants in it.
template <size_t N>
OrtStatus* read_inputs(const Ort& ort, const OrtKernelContext* context, Tensor (&out)[N]) {
  size_t count = 0;
  if (OrtStatus* status = ort.input_count(context, &count)) return status;
  for (size_t i = 0; i < N && i < count; ++i) {
    if (out[i].data) continue;
    const OrtValue* value = nullptr;
    if (OrtStatus* status = ort.input(context, i, &value)) return status;
    if (!value) continue;
    if (OrtStatus* status = read_value(ort, value, out + i)) return status;
  }
  return nullptr;
}

bool good_group(int64_t width, int64_t groups) {
  const int64_t group = groups > 0 ? width / groups : 0;
  return group >= 16 && group <= kMaxGroup && (group & (group - 1)) == 0 && group * groups == width;
}

struct Kernel {
  Ort ort;
  const Kernels* kernels;
  OrtAllocator* allocator;
  int64_t bits;
  float alpha, limit, offset;
  Tensor constants[kMaxInputs];

  OrtStatus* invalid(const char* text) const { return ort.fail(kInvalidArgument, text); }

  // Calls work(scratch, parallel) with `bytes` of memory from the session's own allocator.
  template <typename Work>
  OrtStatus* with_scratch(OrtKernelContext* context, size_t bytes, const Work& work) const {
    void* scratch = allocator->Alloc(allocator, bytes + 64);
    if (!scratch) return ort.fail(kFail, "moedge.cpu: cannot allocate memory for activations");
    struct Shared {
      const Ort* ort;
      OrtKernelContext* context;
      OrtStatus* status;
    } shared{&ort, context, nullptr};
    const Parallel parallel{[](void* self, void (*body)(void*, size_t), size_t total, void* data) {
                              Shared* s = static_cast<Shared*>(self);
                              if (!s->status) s->status = s->ort->parallel_for(s->context, body, total, data);
                            },
                            &shared};
    work(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64), parallel);
    allocator->Free(allocator, scratch);
    return shared.status;
  }
};

OrtStatus* run_experts(const Kernel& kernel, OrtKernelContext* context) {
  Tensor in[kMaxInputs];
  memcpy(in, kernel.constants, sizeof in);
  if (OrtStatus* status = read_inputs(kernel.ort, context, in)) return status;
  const Tensor &x = in[0], &chosen = in[1], &weights = in[2], &up = in[3], &down = in[5];
  if (x.rank != 2 || chosen.rank != 2 || up.rank != 3 || in[4].rank != 3 || down.rank != 3 || in[6].rank != 3)
    return kernel.invalid("moedge.cpu.Experts: an input has another number of axes than it should");
  const int64_t tokens = x.shape[0], hidden = x.shape[1], choices = chosen.shape[1];
  const int64_t experts = up.shape[0], inner = up.shape[1] / 2;
  const int bits = static_cast<int>(kernel.bits);
  const Matrix gate_up{up.as<uint8_t>(), in[4].as<float>(), in[7].as<uint8_t>(), 2 * inner,
                       hidden, in[4].shape[2] > 0 ? hidden / in[4].shape[2] : 0, bits};
  const Matrix out{down.as<uint8_t>(), in[6].as<float>(), in[8].as<uint8_t>(), hidden,
                   inner, in[6].shape[2] > 0 ? inner / in[6].shape[2] : 0, bits};
  if (!good_group(hidden, in[4].shape[2]) || !good_group(inner, in[6].shape[2]))
    return kernel.invalid("moedge.cpu.Experts: a scale must stand for 16, 32, 64, 128, 256 or 512 codes");
  const bool fits = chosen.shape[0] == tokens && weights.is(tokens, choices) && up.shape[1] == 2 * inner &&
                    up.is(experts, 2 * inner, gate_up.row_bytes()) && in[4].is(experts, 2 * inner, gate_up.groups()) &&
                    down.is(experts, hidden, out.row_bytes()) && in[6].is(experts, hidden, out.groups()) &&
                    (!in[7].data || in[7].is(experts, 2 * inner, gate_up.zero_row_bytes())) &&
                    (!in[8].data || in[8].is(experts, hidden, out.zero_row_bytes())) &&
                    (!in[9].data || in[9].is(experts, 2 * inner)) && (!in[10].data || in[10].is(experts, hidden));
  if (!fits) return kernel.invalid("moedge.cpu.Experts: the inputs' shapes do not fit each other");
  if (tokens * choices > INT32_MAX) return kernel.invalid("moedge.cpu.Experts: too many tokens");
  for (int64_t i = 0; i < tokens * choices; ++i) {
    const int64_t expert = chosen.as<int64_t>()[i];
    if (expert >= 0 && expert < experts) continue;
    char text[96];
    snprintf(text, sizeof text, "moedge.cpu.Experts: expert %lld of %lld was chosen", static_cast<long long>(expert),
             static_cast<long long>(experts));
    return kernel.invalid(text);
  }
  OrtValue* value = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = kernel.ort.output(context, 0, x.shape, 2, &value)) return status;
  if (OrtStatus* status = kernel.ort.data(value, &y)) return status;
  if (tokens == 0) return nullptr;
  const Mixture mixture{kernel.kernels,      tokens,          choices,      experts,
                        hidden,              inner,           x.as<float>(), chosen.as<int64_t>(),
                        weights.as<float>(), gate_up,         out,          in[9].as<float>(),
                        in[10].as<float>(),  kernel.alpha,    kernel.limit, kernel.offset,
                        static_cast<float*>(y)};
  return kernel.with_scratch(context, mixture_scratch(mixture), [&](void* scratch, const Parallel& parallel) {
    run_mixture(mixture, scratch, parallel);
  });
}

OrtStatus* run_linear(const Kernel& kernel, OrtKernelContext* context) {
  Tensor in[kMaxInputs];
  memcpy(in, kernel.constants, sizeof in);
  if (OrtStatus* status = read_inputs(kernel.ort, context, in)) return status;
  const Tensor &x = in[0], &codes = in[1], &scales = in[2];
  if (x.rank < 1 || codes.rank != 2 || scales.rank != 2)
    return kernel.invalid("moedge.cpu.Linear: an input has another number of axes than it should");
  const int64_t width = x.shape[x.rank - 1], rows = codes.shape[0];
  if (!good_group(width, scales.shape[1]))
    return kernel.invalid("moedge.cpu.Linear: a scale must stand for 16, 32, 64, 128, 256 or 512 codes");
  const Matrix matrix{codes.as<uint8_t>(), scales.as<float>(), in[3].as<uint8_t>(), rows, width,
                      width / scales.shape[1], static_cast<int>(kernel.bits)};
  const bool fits = codes.is(rows, matrix.row_bytes()) && scales.is(rows, matrix.groups()) &&
                    (!in[3].data || in[3].is(rows, matrix.zero_row_bytes())) &&
                    (!in[4].data || (in[4].rank == 1 && in[4].shape[0] == rows));
  if (!fits) return kernel.invalid("moedge.cpu.Linear: the inputs' shapes do not fit each other");
  int64_t shape[kMaxRank], tokens = 1;
  for (size_t axis = 0; axis + 1 < x.rank; ++axis) tokens *= shape[axis] = x.shape[axis];
  shape[x.rank - 1] = rows;
  OrtValue* value = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = kernel.ort.output(context, 0, shape, x.rank, &value)) return status;
  if (OrtStatus* status = kernel.ort.data(value, &y)) return status;
  if (tokens == 0 || rows == 0) return nullptr;
  const Linear linear{kernel.kernels, tokens, x.as<float>(), matrix, in[4].as<float>(), static_cast<float*>(y)};
  return kernel.with_scratch(context, linear_scratch(linear), [&](void* scratch, const Parallel& parallel) {
    moedge::run_linear(linear, scratch, parallel);
  });
}

// --- registration --------------------------------------------------------------------------------------------------

using Run = OrtStatus* (*)(const Kernel& kernel, OrtKernelContext* context);

struct Op : OrtCustomOp {
  const char* op_name;
  Run run;
  const int* types;
  size_t inputs, required;
};

struct OpKernel : Kernel {
  Run run;
};

float attribute_or(const Ort& ort, const OrtKernelInfo* info, const char* name, float otherwise) {
  float value = otherwise;
  if (OrtStatus* status = ort.attribute(info, name, &value)) {
    ort.release(status);
    return otherwise;
  }
  return value;
}

void destroy(void* kernel) {
  OpKernel* own = static_cast<OpKernel*>(kernel);
  own->ort.release(own->allocator);
  free(own);
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** out) {
  const Ort ort{api};
  const Kernels* kernels = default_kernels();
  if (!kernels) return ort.fail(kInvalidArgument, "moedge.cpu: MOEDGE_KERNELS names what this machine has not");
  int64_t bits = 0;
  if (OrtStatus* status = ort.attribute(info, "bits", &bits)) return status;
  if (bits != 4 && bits != 8) return ort.fail(kInvalidArgument, "moedge.cpu: bits must be 4 or 8");
  OrtAllocator* allocator = nullptr;
  if (OrtStatus* status = ort.allocator(info, &allocator)) return status;
  const Kernel kernel{ort, kernels, allocator, bits, attribute_or(ort, info, "alpha", 1.0f),
                      attribute_or(ort, info, "limit", INFINITY), attribute_or(ort, info, "offset", 0.0f), {}};
  OpKernel* made = static_cast<OpKernel*>(malloc(sizeof(OpKernel)));
  if (!made) return ort.fail(kFail, "moedge.cpu: cannot allocate memory for a kernel");
  *made = OpKernel{kernel, static_cast<const Op*>(op)->run};
  OrtStatus* status = read_constants(ort, info, static_cast<const Op*>(op)->inputs, made->constants);
  if (status) destroy(made);
  *out = status ? nullptr : made;
  return status;
}

constexpr Op make_op(const char* name, Run run, const int* types, size_t inputs, size_t required) {
  Op op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->op_name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) { return static_cast<const Op*>(self)->types[index]; };
  op.GetInputTypeCount = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->inputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetInputCharacteristic = [](const OrtCustomOp* self, size_t index) {
    return index < static_cast<const Op*>(self)->required ? kRequired : kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const OpKernel* own = static_cast<const OpKernel*>(kernel);
    return own->run(*own, context);
  };
  op.KernelDestroy = destroy;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.op_name = name;
  op.run = run;
  op.types = types;
  op.inputs = inputs;
  op.required = required;
  return op;
}

constexpr int kExpertsTypes[] = {kFloat, kInt64, kFloat, kUint8, kFloat, kUint8, kFloat, kUint8, kUint8, kFloat, kFloat};
constexpr int kLinearTypes[] = {kFloat, kUint8, kFloat, kUint8, kFloat};

}  // namespace

}  // namespace moedge

extern "C" {

// What SessionOptions.register_custom_ops_library calls.
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace moedge;
  static constexpr Op experts = make_op("Experts", run_experts, kExpertsTypes, 11, 7);
  static constexpr Op linear = make_op("Linear", run_linear, kLinearTypes, 5, 3);
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
    domain = made;
  }
  return ort.add_domain(options, domain);
}

}  // extern "C"
