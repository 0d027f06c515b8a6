// The part of onnxruntime's C interface that this library uses, declared by hand: its wheels bring no headers.
//
// onnxruntime hands over one table of function pointers that only ever grows at its end, so a function is an index. The
// indices are those of the struct OrtApi in onnxruntime_c_api.h, and `OrtCustomOp` is laid out as in that file, at API
// version 18; an onnxruntime that does not know that version gives no table, and nothing is registered.

#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtCustomOpDomain;
struct OrtSessionOptions;

struct OrtApi {
  void* functions[415];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtAllocator {
  uint32_t version;
  void* (*Alloc)(OrtAllocator* self, size_t size);
  void (*Free)(OrtAllocator* self, void* block);
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  int (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  int (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, void* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"

namespace moedge {

constexpr uint32_t kApiVersion = 18;
constexpr int kLendsShapes = 24;  // from this onnxruntime 1.x on
constexpr int kAnyType = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kHalf = 10;  // ONNXTensorElementDataType
constexpr int kBfloat16 = 16;
constexpr int kRequired = 0, kOptional = 1, kVariadic = 2;  // OrtCustomOpInputOutputCharacteristic
constexpr int kDefaultMemory = 0;                  // OrtMemTypeDefault
constexpr int kInvalidArgument = 2, kFail = 1;     // OrtErrorCode

// Whether onnxruntime is of 1.24 or later: its table, the same for every version asked for, is longer than we need.
inline bool lends_shapes = false;

// The functions of the table, called with their types: Ort{api}.function(arguments).
struct Ort {
  const OrtApi* api;

  template <typename Function>
  Function* at(int index) const {
    return reinterpret_cast<Function*>(api->functions[index]);
  }

  OrtStatus* fail(int code, const char* text) const { return at<OrtStatus*(int, const char*)>(0)(code, text); }
  void release(OrtStatus* status) const { at<void(OrtStatus*)>(93)(status); }

  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const {
    return at<OrtStatus*(const char*, OrtCustomOpDomain**)>(26)(name, out);
  }
  OrtStatus* add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return at<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return at<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }

  OrtStatus* data(OrtValue* value, void** out) const { return at<OrtStatus*(OrtValue*, void**)>(51)(value, out); }
  OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, int* out) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>(60)(info, out);
  }
  OrtStatus* rank(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, out);
  }
  OrtStatus* dimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, out, count);
  }
  OrtStatus* type_and_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
    return at<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, out);
  }
  void release(OrtTensorTypeAndShapeInfo* info) const { at<void(OrtTensorTypeAndShapeInfo*)>(99)(info); }
  // Both at once and nothing to release, but only where `lends_shapes`.
  OrtStatus* type_and_shape(const OrtValue* value, int* type, const int64_t** shape, size_t* rank) const {
    return at<OrtStatus*(const OrtValue*, int*, const int64_t**, size_t*)>(414)(value, type, shape, rank);
  }

  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* out) const {
    return at<OrtStatus*(const OrtKernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* out) const {
    return at<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  OrtStatus* input_count(const OrtKernelContext* context, size_t* out) const {
    return at<OrtStatus*(const OrtKernelContext*, size_t*)>(88)(context, out);
  }
  OrtStatus* input_count(const OrtKernelInfo* info, size_t* out) const {
    return at<OrtStatus*(const OrtKernelInfo*, size_t*)>(230)(info, out);
  }
  OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* constant, const OrtValue** out) const {
    return at<OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(249)(info, index, constant, out);
  }
  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
    return at<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, out);
  }
  // No value where the node has no such output.
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank, OrtValue** out) const {
    return at<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, index, shape,
                                                                                            rank, out);
  }
  // As many batches as there is work, so that a thread that has done its share takes over of another's.
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*body)(void*, size_t), size_t total, void* data) const {
    using Body = void (*)(void*, size_t);
    return at<OrtStatus*(const OrtKernelContext*, Body, size_t, size_t, void*)>(274)(context, body, total, total, data);
  }
  OrtStatus* allocator(const OrtKernelInfo* info, OrtAllocator** out) const {
    return at<OrtStatus*(const OrtKernelInfo*, int, OrtAllocator**)>(278)(info, kDefaultMemory, out);
  }
  void release(OrtAllocator* allocator) const { at<void(OrtAllocator*)>(132)(allocator); }
};

}  // namespace moedge
