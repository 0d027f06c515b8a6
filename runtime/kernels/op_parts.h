// What the custom ops share: their inputs, their memory and threads, and their registration.

#pragma once

#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "ort_abi.h"

namespace moedge {

constexpr int kMaxRank = 6;
constexpr size_t kMaxInputs = 21;  // that are not a list of any length
// Bytes: what an op needs for one token, but for attention. The caller's stack is of some MB.
constexpr size_t kMostOnStack = 128 << 10;

// A cache line: between two tokens all of them have left the caches.
struct Tensor {
  void* data = nullptr;  // null: an optional input that is not there
  int64_t shape[kMaxRank] = {};
  uint32_t rank = 0;
  int kind = 0;  // of its elements

  bool is(int64_t a, int64_t b) const { return rank == 2 && shape[0] == a && shape[1] == b; }
  bool is(int64_t a, int64_t b, int64_t c) const {
    return rank == 3 && shape[0] == a && shape[1] == b && shape[2] == c;
  }
  // Bytes of a scale: float, fp16, or float8, which comes as bytes; 0: it holds none.
  int64_t scale_size() const { return kind == kFloat ? 4 : kind == kHalf ? 2 : kind == kUint8 ? 1 : 0; }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

inline OrtStatus* read_value(const Ort& ort, const OrtValue* value, Tensor* out) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  const int64_t* shape = nullptr;
  size_t rank = 0;
  OrtStatus* status = lends_shapes ? ort.type_and_shape(value, &out->kind, &shape, &rank) : ort.type_and_shape(value, &info);
  if (!status && info) status = ort.rank(info, &rank);
  if (!status && rank > kMaxRank) status = ort.fail(kInvalidArgument, "moedge.cpu: an input has too many axes");
  if (!status) out->rank = static_cast<uint32_t>(rank);
  if (!status && info) status = ort.dimensions(info, out->shape, rank);
  if (!status && info) status = ort.element_type(info, &out->kind);
  if (info) ort.release(info);
  if (status) return status;
  for (size_t axis = 0; shape && axis < rank; ++axis) out->shape[axis] = shape[axis];
  return ort.data(const_cast<OrtValue*>(value), &out->data);
}

inline OrtStatus* read_input(const Ort& ort, const OrtKernelContext* context, size_t index, Tensor* out) {
  const OrtValue* value = nullptr;
  if (OrtStatus* status = ort.input(context, index, &value)) return status;
  return value ? read_value(ort, value, out) : nullptr;
}

// What every kernel has. An op is a struct made of this and its attributes, trivially copyable, with
//   OrtStatus* read_attributes(const OrtKernelInfo* info)
//   OrtStatus* run(OrtKernelContext* context) const
struct KernelBase {
  Ort ort;
  const Kernels* kernels;
  OrtAllocator* allocator;
  size_t inputs;                 // that the node has
  uint32_t constant;             // a bit for each that never changes
  Tensor constants[kMaxInputs];  // those alone, one behind the other

  OrtStatus* invalid(const char* text) const { return ort.fail(kInvalidArgument, text); }

  // What never changes is read once, when the kernel is made: that costs more than a small model's product.
  OrtStatus* read_constants(const OrtKernelInfo* info, size_t limit) {
    if (OrtStatus* status = ort.input_count(info, &inputs)) return status;
    Tensor* next = constants;
    for (size_t i = 0; i < inputs && i < limit; ++i) {
      int is_constant = 0;
      const OrtValue* value = nullptr;
      if (OrtStatus* status = ort.constant_input(info, i, &is_constant, &value)) return status;
      if (!is_constant || !value) continue;
      if (OrtStatus* status = read_value(ort, value, next++)) return status;
      constant |= uint32_t{1} << i;
    }
    return nullptr;
  }

  // The first `limit` inputs.
  OrtStatus* read_inputs(const OrtKernelContext* context, size_t limit, Tensor* in) const {
    const Tensor* next = constants;
    for (size_t i = 0; i < limit && i < inputs; ++i) {
      if (constant >> i & 1)
        in[i] = *next++;
      else if (OrtStatus* status = read_input(ort, context, i, in + i))
        return status;
    }
    return nullptr;
  }

  // Calls work(scratch, parallel) with `bytes` of memory: the stack's, or where that is short the session's own allocator's.
  template <typename Work>
  OrtStatus* with_scratch(OrtKernelContext* context, size_t bytes, const Work& work) const {
    void* block = bytes > kMostOnStack ? allocator->Alloc(allocator, bytes + 64) : nullptr;
    void* scratch = bytes > kMostOnStack ? block : __builtin_alloca(bytes + 64);
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
    if (block) allocator->Free(allocator, block);
    return shared.status;
  }
};

template <typename T>
T attribute_or(const Ort& ort, const OrtKernelInfo* info, const char* name, T otherwise) {
  T value = otherwise;
  if (OrtStatus* status = ort.attribute(info, name, &value)) {
    ort.release(status);
    return otherwise;
  }
  return value;
}

struct Op : OrtCustomOp {
  const char* op_name;
  const int* types;
  size_t inputs, required;
  bool list;  // its last input stands for any number of tensors, of any types
};

template <class K>
void destroy_kernel(void* kernel) {
  K* own = static_cast<K*>(kernel);
  own->ort.release(own->allocator);
  free(own);
}

template <class K>
OrtStatus* create_kernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** out) {
  const Ort ort{api};
  const Kernels* kernels = default_kernels();
  if (!kernels) return ort.fail(kInvalidArgument, "moedge.cpu: MOEDGE_KERNELS names what this machine has not");
  K kernel{};
  kernel.ort = ort;
  kernel.kernels = kernels;
  if (OrtStatus* status = kernel.read_attributes(info)) return status;
  if (OrtStatus* status = ort.allocator(info, &kernel.allocator)) return status;
  K* made = static_cast<K*>(malloc(sizeof(K)));
  if (!made) {
    ort.release(kernel.allocator);
    return ort.fail(kFail, "moedge.cpu: cannot allocate memory for a kernel");
  }
  *made = kernel;
  const Op* own = static_cast<const Op*>(op);
  OrtStatus* status = made->read_constants(info, own->list ? own->inputs - 1 : own->inputs);
  if (status) destroy_kernel<K>(made);
  *out = status ? nullptr : made;
  return status;
}

template <class K>
constexpr Op make_op(const char* name, const int* types, size_t inputs, size_t required, bool list = false) {
  Op op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->op_name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) { return static_cast<const Op*>(self)->types[index]; };
  op.GetInputTypeCount = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->inputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetInputCharacteristic = [](const OrtCustomOp* self, size_t index) {
    const Op* own = static_cast<const Op*>(self);
    if (own->list && index + 1 == own->inputs) return kVariadic;
    return index < own->required ? kRequired : kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = create_kernel<K>;
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<const K*>(kernel)->run(context);
  };
  op.KernelDestroy = destroy_kernel<K>;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.op_name = name;
  op.types = types;
  op.inputs = inputs;
  op.required = required;
  op.list = list;
  return op;
}

// Those that are in files of their own.
const OrtCustomOp* grouped_attention_op();
const OrtCustomOp* latent_attention_op();
const OrtCustomOp* step_op(size_t place);  // one by one; null behind the last
const OrtCustomOp* moe_op(size_t place);   // likewise

}  // namespace moedge
