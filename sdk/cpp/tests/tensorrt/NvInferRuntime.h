// Stand-in for TensorRT 10. The serialized engine is the word ENGINE. The engine maps uint8 `image` (batch, 2, 3) to float32 `logits`
// (batch, 2): the sum of an image's bytes, and its first byte.
#pragma once
#include "cuda_runtime_api.h"

#include <cstdint>
#include <map>
#include <string>

namespace nvinfer1 {

enum class DataType : std::int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64 };
enum class TensorIOMode { kNONE, kINPUT, kOUTPUT };

struct Dims {
    std::int32_t nbDims;
    std::int64_t d[8];
};

class ILogger {
  public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual void log(Severity severity, const char *message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
    std::int64_t batch_ = 0;
    std::map<std::string, void *> addresses_;

  public:
    bool setInputShape(const char *, const Dims &dims) { return batch_ = dims.d[0], batch_ <= 4; }
    bool setTensorAddress(const char *name, void *address) { return addresses_[name] = address, true; }
    Dims getTensorShape(const char *) const { return {2, {batch_, 2}}; }
    bool enqueueV3(cudaStream_t stream) {
        const unsigned char *const image = static_cast<unsigned char *>(addresses_.at("image"));
        float *const logits = static_cast<float *>(addresses_.at("logits"));
        stream->push_back([=, batch = batch_] {
            for (std::int64_t i = 0; i < batch; i++) {
                logits[2 * i] = 0, logits[2 * i + 1] = image[6 * i];
                for (int k = 0; k < 6; k++) logits[2 * i] += image[6 * i + k];
            }
        });
        return true;
    }
};

class ICudaEngine {
  public:
    IExecutionContext *createExecutionContext() { return new IExecutionContext; }
    std::int32_t getNbIOTensors() const { return 2; }
    const char *getIOTensorName(std::int32_t index) const { return index ? "logits" : "image"; }
    TensorIOMode getTensorIOMode(const char *name) const { return *name == 'i' ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT; }
    DataType getTensorDataType(const char *name) const { return *name == 'i' ? DataType::kUINT8 : DataType::kFLOAT; }
    Dims getTensorShape(const char *name) const { return *name == 'i' ? Dims{3, {-1, 2, 3}} : Dims{2, {-1, 2}}; }
};

struct IPluginRegistry {
    void *loadLibrary(const char *path) { return *path == '!' ? nullptr : this; }
};

class IRuntime {
    ILogger &logger_;
    IPluginRegistry registry_;

  public:
    explicit IRuntime(ILogger &logger) : logger_(logger) {}
    IPluginRegistry &getPluginRegistry() { return registry_; }
    ICudaEngine *deserializeCudaEngine(const void *data, std::size_t size) {
        if (std::string(static_cast<const char *>(data), size) == "ENGINE") return new ICudaEngine;
        logger_.log(ILogger::Severity::kWARNING, "a warning");
        logger_.log(ILogger::Severity::kERROR, "bad magic");
        return nullptr;
    }
};

inline IRuntime *createInferRuntime(ILogger &logger) { return new IRuntime(logger); }

}  // namespace nvinfer1
