// Declarations of the part of ONNX Runtime's C ABI that running a model needs. They are written by hand because the Python wheel ships
// no headers, so that the SDK works with the wheel as with a release archive. OrtApi is a table of function pointers; new versions only
// append to it. The functions below are in its first version, in the order of onnxruntime_c_api.h.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define ORT_CALL __stdcall
#else
#define ORT_CALL
#endif

namespace evm::ort {

using Handle = void *;         // any opaque object
using Status = Handle;         // null: ok
using Table = void *const *;   // OrtApi

constexpr std::uint32_t API_VERSION = 17;  // ONNX Runtime 1.17, which the custom ops of domain evm need; the functions below are older
constexpr int ERROR_LEVEL = 3;
constexpr int ARENA_ALLOCATOR = 1, DEFAULT_MEMORY = 0;

// ONNXTensorElementDataType
constexpr const char *DTYPES[] = {"undefined", "float32", "uint8", "int8",    "uint16", "int16",
                                  "int32",     "int64",   "string", "bool", "float16", "float64"};

struct ApiBase {
    Table(ORT_CALL *GetApi)(std::uint32_t version);
    const char *(ORT_CALL *GetVersionString)();
};

template <class Signature>
struct Function {
    int index;  // in OrtApi
};

constexpr Function<const char *(Status)> GetErrorMessage{2};
constexpr Function<Status(int level, const char *id, Handle *env)> CreateEnv{3};
constexpr Function<Status(Handle env, const void *model, std::size_t size, Handle options, Handle *session)> CreateSessionFromArray{8};
constexpr Function<Status(Handle session, Handle run_options, const char *const *input_names, const Handle *inputs, std::size_t input_count,
                          const char *const *output_names, std::size_t output_count, Handle *outputs)>
    Run{9};
constexpr Function<Status(Handle *options)> CreateSessionOptions{10};
constexpr Function<Status(Handle options, int level)> SetSessionLogSeverityLevel{22};
constexpr Function<Status(Handle options, int threads)> SetIntraOpNumThreads{24};
constexpr Function<Status(Handle options, const char *path, Handle *library)> RegisterCustomOpsLibrary{29};
constexpr Function<Status(Handle session, std::size_t *count)> SessionGetInputCount{30}, SessionGetOutputCount{31};
constexpr Function<Status(Handle session, std::size_t index, Handle *type)> SessionGetInputTypeInfo{33}, SessionGetOutputTypeInfo{34};
constexpr Function<Status(Handle session, std::size_t index, Handle allocator, char **name)> SessionGetInputName{36}, SessionGetOutputName{37};
constexpr Function<Status(Handle memory, void *data, std::size_t size, const std::int64_t *shape, std::size_t rank, int type, Handle *value)>
    CreateTensorWithDataAsOrtValue{49};
constexpr Function<Status(Handle value, void **data)> GetTensorMutableData{51};
constexpr Function<Status(Handle type, const void **info)> CastTypeInfoToTensorInfo{55};  // the result belongs to `type`
constexpr Function<Status(const void *info, int *type)> GetTensorElementType{60};
constexpr Function<Status(const void *info, std::size_t *rank)> GetDimensionsCount{61};
constexpr Function<Status(const void *info, std::int64_t *dims, std::size_t rank)> GetDimensions{62};
constexpr Function<Status(Handle value, Handle *info)> GetTensorTypeAndShape{65};
constexpr Function<Status(int allocator, int memory, Handle *info)> CreateCpuMemoryInfo{69};
constexpr Function<Status(Handle allocator, void *memory)> AllocatorFree{76};
constexpr Function<Status(Handle *allocator)> GetAllocatorWithDefaultOptions{78};
constexpr Function<void(Handle)> ReleaseEnv{92}, ReleaseStatus{93}, ReleaseMemoryInfo{94}, ReleaseSession{95}, ReleaseValue{96},
    ReleaseTypeInfo{98}, ReleaseTensorTypeAndShapeInfo{99}, ReleaseSessionOptions{100};

}  // namespace evm::ort
