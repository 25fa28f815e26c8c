// Runtime of target trt: engines of TensorRT 10 and later. This file has never run on a GPU. The tests compile it against NVIDIA's headers,
// if these are installed, and run it against stand-ins for the engine and for CUDA.
#include "platform.h"
#include "runtime.h"
#include "text.h"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <mutex>

namespace evm {
namespace {

constexpr const char *REBUILD = "an engine fits one TensorRT release and one kind of GPU; build it on this device: evm-export --finish BUNDLE";

// Logger that keeps TensorRT's error messages, because its functions return no reason.
class Logger : public nvinfer1::ILogger {
    std::mutex mutex_;
    std::string errors_;

  public:
    void log(Severity severity, const char *message) noexcept override {
        if (severity > Severity::kERROR) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        errors_ += (errors_.empty() ? "" : "; ") + std::string(message);
    }
    std::string errors() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return errors_.empty() ? "TensorRT gave no reason" : errors_;
    }
};

void check(cudaError_t status) {
    if (status != cudaSuccess)
        throw ToolchainError(std::string("CUDA: ") + cudaGetErrorName(status), "check the driver and the GPU's memory with nvidia-smi");
}

// A buffer in the GPU's memory.
class Buffer {
    void *address_ = nullptr;
    std::size_t size_ = 0;

  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { cudaFree(address_); }

    void *reserve(std::size_t size) {
        if (size > size_) {
            cudaFree(address_);
            address_ = nullptr, size_ = 0;
            check(cudaMalloc(&address_, size));
            size_ = size;
        }
        return address_;
    }
};

struct Stream {
    cudaStream_t handle = nullptr;
    Stream() { check(cudaStreamCreate(&handle)); }
    ~Stream() { cudaStreamDestroy(handle); }
    Stream(const Stream &) = delete;
    Stream &operator=(const Stream &) = delete;
};

// Guard that waits for the stream at the end of its scope, so that an error does not free memory that is still being copied.
struct Synchronised {
    cudaStream_t stream;
    ~Synchronised() { cudaStreamSynchronize(stream); }
};

std::string dtype_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return "float32";
        case nvinfer1::DataType::kHALF: return "float16";
        case nvinfer1::DataType::kINT8: return "int8";
        case nvinfer1::DataType::kUINT8: return "uint8";
        case nvinfer1::DataType::kINT32: return "int32";
        case nvinfer1::DataType::kINT64: return "int64";
        case nvinfer1::DataType::kBOOL: return "bool";
        default: return "unknown";
    }
}

std::vector<std::int64_t> shape_of(const nvinfer1::Dims &dims) { return {dims.d, dims.d + dims.nbDims}; }

// Return the serialized engine in a file. Some exporters write a length (int32, little-endian) and JSON of this length before it.
std::pair<const char *, std::size_t> plan_of(const std::string &file) {
    std::uint32_t size = 0;
    for (std::size_t i = 4; i-- > 0 && file.size() > 4;) size = size << 8 | static_cast<unsigned char>(file[i]);
    const bool marked = file.size() > 4 && file[4] == '{' && size > 0 && size <= file.size() - 4 && size < 1u << 31;
    const std::size_t start = marked ? 4 + size : 0;
    return {file.data() + start, file.size() - start};
}

// An engine with one context and one stream. Inferences of several threads run one after another.
class TensorRt : public Runtime {
    mutable Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    mutable std::mutex mutex_;
    mutable std::map<std::string, Buffer> memory_;
    Stream stream_;

  public:
    TensorRt(const std::string &file, const std::string &path, const Options &options) {
        if (options.threads || !options.device.empty() || !options.cache.empty())
            throw UsageError("TensorRT takes no threads, device or cache", "leave these options out");
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) throw ToolchainError("TensorRT does not start: " + logger_.errors(), "check that an NVIDIA driver is installed");
        if (!options.plugin.empty() && !runtime_->getPluginRegistry().loadLibrary(utf8(options.plugin).c_str()))
            throw ToolchainError("TensorRT refuses " + utf8(options.plugin) + ": " + logger_.errors());
        const auto [data, size] = plan_of(file);
        engine_.reset(runtime_->deserializeCudaEngine(data, size));
        if (!engine_) throw ToolchainError(path + " cannot be opened: " + logger_.errors(), REBUILD);
        context_.reset(engine_->createExecutionContext());
        if (!context_) throw ToolchainError(path + " cannot be run: " + logger_.errors(), REBUILD);
        for (int i = 0; i < engine_->getNbIOTensors(); i++) {
            const char *const name = engine_->getIOTensorName(i);
            const bool read = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
            (read ? inputs : outputs).push_back({name, dtype_of(engine_->getTensorDataType(name)), shape_of(engine_->getTensorShape(name))});
        }
    }

    Tensors run(const Feeds &feeds) const override {
        const std::lock_guard<std::mutex> lock(mutex_);
        Tensors results;
        const Synchronised end{stream_.handle};
        for (const auto &[name, value] : feeds) {
            nvinfer1::Dims dims{};
            dims.nbDims = static_cast<std::int32_t>(value.shape.size());
            for (std::size_t i = 0; i < value.shape.size(); i++) dims.d[i] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(value.shape[i]);
            if (!context_->setInputShape(name.c_str(), dims)) throw UsageError("the engine does not take " + name + shape_text(value.shape));
            const std::size_t size = byte_size(value.dtype, value.shape);
            void *const address = bound(name, size);
            check(cudaMemcpyAsync(address, value.data, size, cudaMemcpyHostToDevice, stream_.handle));
        }
        for (const TensorSpec &spec : outputs) {
            const std::vector<std::int64_t> shape = shape_of(context_->getTensorShape(spec.name.c_str()));
            results[spec.name] = {spec.dtype, shape, std::vector<unsigned char>(byte_size(spec.dtype, shape))};
            bound(spec.name, results[spec.name].bytes.size());
        }
        if (!context_->enqueueV3(stream_.handle)) throw ToolchainError("the engine failed: " + logger_.errors(), REBUILD);
        for (auto &[name, tensor] : results)
            check(cudaMemcpyAsync(tensor.bytes.data(), memory_[name].reserve(0), tensor.bytes.size(), cudaMemcpyDeviceToHost, stream_.handle));
        check(cudaStreamSynchronize(stream_.handle));
        return results;
    }

  private:
    // Reserve at least `size` bytes of GPU memory for a tensor and bind the memory to the context.
    void *bound(const std::string &name, std::size_t size) const {
        void *const address = memory_[name].reserve(size);
        if (!context_->setTensorAddress(name.c_str(), address)) throw ToolchainError("the engine failed: " + logger_.errors(), REBUILD);
        return address;
    }
};

}  // namespace

std::unique_ptr<Runtime> open_tensorrt(const Source &source, const std::string &name, const Options &options) {
    return std::make_unique<TensorRt>(source.bytes(name), source.path + "/" + name, options);
}

std::string tensorrt_isa(const std::filesystem::path &) { return "CUDA"; }

}  // namespace evm
