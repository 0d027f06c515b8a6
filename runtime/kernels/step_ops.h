// What the ops of several outputs share: those that begin with the residual sum and the norm of their input.

#pragma once

#include "op_parts.h"
#include "step.h"

namespace moedge {

inline bool good_group(int64_t width, int64_t groups) {
  const int64_t group = groups > 0 ? width / groups : 0;
  return group >= 16 && group <= kMaxGroup && (group & (group - 1)) == 0 && group * groups == width;
}

inline bool is_row(const Tensor& tensor, int64_t width) { return tensor.rank == 1 && tensor.shape[0] == width; }

// A matrix of codes, scales (float8 ones are uint8) and optional zero points in a row; false where they do not fit a width.
inline bool read_matrix(const Tensor* in, int64_t width, int bits, Matrix* out) {
  if (!in[0].data || !in[1].data || in[1].rank != 2 || !good_group(width, in[1].shape[1])) return false;
  *out = {in[0].as<uint8_t>(),    in[1].data,           in[2].as<uint8_t>(),  in[1].shape[0], width,
          width / in[1].shape[1], bits == 6 ? 4 : bits, in[1].scale_size()};
  if (bits == 6) {
    out->lower = out->codes + out->rows * out->row_bytes();
    return out->scale_size && in[0].is(3, out->rows, width / 4) && !in[2].data;
  }
  return out->scale_size && in[0].is(out->rows, out->row_bytes()) &&
         (!in[2].data || in[2].is(out->rows, out->zero_row_bytes()));
}

// `planes`: whether the op takes codes of 6 bits.
inline OrtStatus* read_bits(const Ort& ort, const OrtKernelInfo* info, const char* name, int* bits, bool planes = false) {
  int64_t value = 0;
  if (OrtStatus* status = ort.attribute(info, name, &value)) return status;
  *bits = static_cast<int>(value);
  if (value == 4 || value == 8 || (value == 6 && planes)) return nullptr;
  return ort.fail(kInvalidArgument, "moedge.cpu: bits must be 4 or 8, of Linear and Projections also 6");
}

struct StepKernel : KernelBase {
  float epsilon, residual_scale;

  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    epsilon = attribute_or(ort, info, "epsilon", 1e-6f);
    residual_scale = attribute_or(ort, info, "residual_scale", 1.0f);
    return nullptr;
  }
  OrtStatus* read_all(const OrtKernelContext* context, Tensor* in) const {
    return read_inputs(context, kMaxInputs, in);
  }
  // False where x, residual and weight do not fit each other.
  bool read_norm(const Tensor* in, Norm* norm) const {
    if (in[0].rank != 2) return false;
    *norm = {in[0].shape[0], in[0].shape[1], in[0].as<float>(), in[1].as<float>(), in[2].as<float>(), epsilon,
             nullptr,        nullptr,        residual_scale};
    return (!in[1].data || in[1].is(norm->tokens, norm->width)) && (!in[2].data || is_row(in[2], norm->width));
  }
  // An output [rows, width], where the graph has one at this place.
  template <typename T>
  OrtStatus* make_output(OrtKernelContext* context, size_t place, int64_t rows, int64_t width, T** out) const {
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
    if (OrtStatus* status = read_bits(ort, info, "bits", &bits)) return status;
    return StepKernel::read_attributes(info);
  }
};

// Of codes of 6 bits too.
struct PlanesStep : QuantizedStep {
  OrtStatus* read_attributes(const OrtKernelInfo* info) {
    if (OrtStatus* status = read_bits(ort, info, "bits", &bits, true)) return status;
    return StepKernel::read_attributes(info);
  }
  OrtStatus* read_constants(const OrtKernelInfo* info, size_t limit) {
    if (OrtStatus* status = StepKernel::read_constants(info, limit)) return status;
    const Tensor* codes = constants;
    while (codes < constants + kMaxInputs && codes->kind != kUint8) ++codes;
    const bool blocks = bits == 6 && codes < constants + kMaxInputs && codes->rank == 2;
    return blocks ? invalid("moedge.cpu: its 6-bit codes are in blocks, as an earlier version had them") : nullptr;
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

}  // namespace moedge
