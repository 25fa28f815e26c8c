// Declarations of the part of ONNX Runtime's C ABI that a custom op needs. They are written by hand because the pip wheel
// ships no headers, so that the library has no dependency. OrtApi is a table of function pointers; new versions only append
// to it. OrtCustomOp is a struct of callbacks. Offsets: API version 17 (ONNX Runtime 1.17), the first version with
// ParallelFor and shape inference.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ORT_CALL __stdcall
#define ORT_EXPORT extern "C" __declspec(dllexport)
#else
#define ORT_CALL
#define ORT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace ort {

typedef void *Handle;          // any opaque object
typedef Handle Status;         // null: ok
typedef const Handle *Api;     // OrtApi as an array of pointers

constexpr uint32_t API_VERSION = 17;
constexpr int INVALID_ARGUMENT = 2;
constexpr int REQUIRED = 0, OPTIONAL = 1;                // characteristic of an input or output
constexpr int ARENA_ALLOCATOR = 1, DEFAULT_MEMORY = 0;   // OrtAllocatorType, OrtMemType

enum Function {  // index in OrtApi
    CreateStatus = 0,
    CreateCustomOpDomain = 26,
    CustomOpDomain_Add = 27,
    AddCustomOpDomain = 28,
    GetTensorMutableData = 51,
    GetDimensionsCount = 61,
    GetDimensions = 62,
    GetTensorTypeAndShape = 65,
    CreateCpuMemoryInfo = 69,
    AllocatorAlloc = 75,
    AllocatorFree = 76,
    KernelInfoGetAttribute_int64 = 86,
    KernelContext_GetOutputCount = 89,
    KernelContext_GetInput = 90,
    KernelContext_GetOutput = 91,
    ReleaseStatus = 93,
    ReleaseMemoryInfo = 94,
    ReleaseTensorTypeAndShapeInfo = 99,
    ReleaseAllocator = 132,
    KernelInfoGetConstantInput_tensor = 249,
    KernelContext_GetAllocator = 253,
    ShapeInferContext_GetInputTypeShape = 268,
    ShapeInferContext_SetOutputTypeShape = 270,
    KernelContext_ParallelFor = 274,
};

template <class Result, class... Args>
Result call(Api api, Function function, Args... args) {
    return reinterpret_cast<Result(ORT_CALL *)(Args...)>(const_cast<Handle>(api[function]))(args...);
}

struct ApiBase {
    Api(ORT_CALL *GetApi)(uint32_t version);
    const char *(ORT_CALL *GetVersionString)();
};

struct CustomOp {
    uint32_t version;
    Handle(ORT_CALL *CreateKernel)(const CustomOp *, Api, Handle);
    const char *(ORT_CALL *GetName)(const CustomOp *);
    const char *(ORT_CALL *GetExecutionProviderType)(const CustomOp *);
    int(ORT_CALL *GetInputType)(const CustomOp *, size_t);
    size_t(ORT_CALL *GetInputTypeCount)(const CustomOp *);
    int(ORT_CALL *GetOutputType)(const CustomOp *, size_t);
    size_t(ORT_CALL *GetOutputTypeCount)(const CustomOp *);
    void(ORT_CALL *KernelCompute)(Handle, Handle);
    void(ORT_CALL *KernelDestroy)(Handle);
    int(ORT_CALL *GetInputCharacteristic)(const CustomOp *, size_t);
    int(ORT_CALL *GetOutputCharacteristic)(const CustomOp *, size_t);
    int(ORT_CALL *GetInputMemoryType)(const CustomOp *, size_t);
    int(ORT_CALL *GetVariadicInputMinArity)(const CustomOp *);
    int(ORT_CALL *GetVariadicInputHomogeneity)(const CustomOp *);
    int(ORT_CALL *GetVariadicOutputMinArity)(const CustomOp *);
    int(ORT_CALL *GetVariadicOutputHomogeneity)(const CustomOp *);
    Status(ORT_CALL *CreateKernelV2)(const CustomOp *, Api, Handle, Handle *);
    Status(ORT_CALL *KernelComputeV2)(Handle, Handle);
    Status(ORT_CALL *InferOutputShapeFn)(const CustomOp *, Handle);
    int(ORT_CALL *GetStartVersion)(const CustomOp *);
    int(ORT_CALL *GetEndVersion)(const CustomOp *);
    Handle maps[4];  // in-place and alias maps, added after API 17: null
};
static_assert(sizeof(Handle) != 8 || sizeof(CustomOp) == 208, "OrtCustomOp of API 17 and later");

}  // namespace ort
