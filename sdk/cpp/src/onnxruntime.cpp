// Runtime of target onnx: ONNX Runtime on the CPU execution provider. The SDK does not link with its library, but loads it when the
// first model is opened.
#include "onnxruntime_abi.h"
#include "platform.h"
#include "runtime.h"
#include "text.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace evm {
namespace {

using ort::Handle;

// Functions of ONNX Runtime's C API. A function that fails throws std::runtime_error with the first line of the reason.
class Api {
    ort::Table table_ = nullptr;

    template <class Result, class... Args>
    auto *at(ort::Function<Result(Args...)> function) const {
        return reinterpret_cast<Result(ORT_CALL *)(Args...)>(table_[function.index]);
    }

  public:
    std::string version;

    explicit Api(const Library &library) {
        const auto base = reinterpret_cast<const ort::ApiBase *(ORT_CALL *)()>(library.find("OrtGetApiBase"));
        if (!base) throw std::runtime_error("OrtGetApiBase is missing");
        version = base()->GetVersionString();
        table_ = base()->GetApi(ort::API_VERSION);
        if (!table_) throw std::runtime_error("release " + version + " is too old, 1.17 or newer is needed");
    }

    template <class... Args, class... Given>
    void call(ort::Function<ort::Status(Args...)> function, Given... given) const {
        const ort::Status status = at(function)(given...);
        if (!status) return;
        const std::string reason = first_line(at(ort::GetErrorMessage)(status));
        at(ort::ReleaseStatus)(status);
        throw std::runtime_error(reason);
    }

    void release(ort::Function<void(Handle)> function, Handle handle) const {
        at(function)(handle);
    }
};

Library find_library() {
    std::vector<std::filesystem::path> places;
    if (const char *const chosen = std::getenv("EVM_ONNXRUNTIME")) places = {chosen};
    else places = {EVM_ONNXRUNTIME_LIBRARY,  // path from the configuration of the SDK, may be empty
#if defined(_WIN32)
                   "onnxruntime.dll"};
#elif defined(__APPLE__)
                   "libonnxruntime.dylib"};
#else
                   "libonnxruntime.so.1", "libonnxruntime.so"};
#endif
    std::string reason;
    for (const std::filesystem::path &place : places) {
        if (place.empty()) continue;
        try {
            return Library(place);
        } catch (const std::runtime_error &error) {
            reason += std::string("\n  ") + error.what();
        }
    }
    throw ToolchainError("onnxruntime is not installed", "put its library into a folder that the system searches, or set EVM_ONNXRUNTIME to its path" + reason);
}

const Api &api() {
    static const Api loaded = [] {
        const Library library = find_library();
        try {
            return Api(library);
        } catch (const std::runtime_error &error) {
            throw ToolchainError(std::string("the onnxruntime library cannot be used: ") + error.what());
        }
    }();
    return loaded;
}

// Owner of an object of ONNX Runtime; releases the object.
class Owned {
    Handle handle_ = nullptr;
    ort::Function<void(Handle)> release_;

  public:
    explicit Owned(ort::Function<void(Handle)> release) : release_(release) {}
    ~Owned() {
        if (handle_) api().release(release_, handle_);
    }
    Owned(Owned &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)), release_(other.release_) {}
    Owned(const Owned &) = delete;
    Owned &operator=(const Owned &) = delete;
    Handle get() const { return handle_; }
    Handle *out() { return &handle_; }
};

int type_of(const std::string &dtype) {
    const auto found = std::find(std::begin(ort::DTYPES), std::end(ort::DTYPES), dtype);
    return static_cast<int>(found - std::begin(ort::DTYPES));
}

// Return dtype and shape from an OrtTensorTypeAndShapeInfo.
std::pair<std::string, std::vector<std::int64_t>> described(const void *info) {
    int type = 0;
    std::size_t rank = 0;
    api().call(ort::GetTensorElementType, info, &type);
    api().call(ort::GetDimensionsCount, info, &rank);
    std::vector<std::int64_t> shape(rank);
    api().call(ort::GetDimensions, info, shape.data(), rank);
    const bool known = type >= 0 && type < static_cast<int>(std::size(ort::DTYPES));
    return {known ? ort::DTYPES[type] : "unknown", shape};
}

class OnnxRuntime : public Runtime {
    Owned env_{ort::ReleaseEnv}, memory_{ort::ReleaseMemoryInfo}, session_{ort::ReleaseSession};
    std::vector<const char *> input_names_, output_names_;

  public:
    OnnxRuntime(const std::string &model, const Options &options) {
        Owned settings(ort::ReleaseSessionOptions);
        api().call(ort::CreateEnv, ort::ERROR_LEVEL, "evm", env_.out());
        api().call(ort::CreateCpuMemoryInfo, ort::ARENA_ALLOCATOR, ort::DEFAULT_MEMORY, memory_.out());
        api().call(ort::CreateSessionOptions, settings.out());
        api().call(ort::SetSessionLogSeverityLevel, settings.get(), ort::ERROR_LEVEL);
        if (options.threads) api().call(ort::SetIntraOpNumThreads, settings.get(), options.threads);
        if (!options.plugin.empty()) register_ops(settings, options.plugin);
        try {
            api().call(ort::CreateSessionFromArray, env_.get(), model.data(), model.size(), settings.get(), session_.out());
        } catch (const std::runtime_error &error) {
            throw BundleError("ONNX Runtime " + api().version + " cannot open the model: " + error.what());
        }
        inputs = specs(ort::SessionGetInputCount, ort::SessionGetInputName, ort::SessionGetInputTypeInfo);
        outputs = specs(ort::SessionGetOutputCount, ort::SessionGetOutputName, ort::SessionGetOutputTypeInfo);
        for (const TensorSpec &spec : inputs) input_names_.push_back(spec.name.c_str());
        for (const TensorSpec &spec : outputs) output_names_.push_back(spec.name.c_str());
    }

    Tensors run(const Feeds &feeds) const override {
        std::vector<Owned> values;
        std::vector<Handle> given, found(outputs.size(), nullptr);
        for (const TensorSpec &spec : inputs) {
            values.push_back(value_of(feeds.at(spec.name)));
            given.push_back(values.back().get());
        }
        try {
            api().call(ort::Run, session_.get(), nullptr, input_names_.data(), given.data(), given.size(), output_names_.data(), found.size(), found.data());
        } catch (const std::runtime_error &error) {
            throw BundleError(std::string("ONNX Runtime cannot run the model: ") + error.what());
        }
        Tensors results;
        for (std::size_t i = 0; i < found.size(); i++) {
            Owned value(ort::ReleaseValue);
            *value.out() = found[i];
            values.push_back(std::move(value));  // all outputs are released, also if a later step fails
        }
        for (std::size_t i = 0; i < found.size(); i++) results[outputs[i].name] = copied(found[i]);
        return results;
    }

  private:
    static void register_ops(const Owned &settings, const std::filesystem::path &library) {
        Handle loaded = nullptr;  // the library stays loaded
        try {
            api().call(ort::RegisterCustomOpsLibrary, settings.get(), utf8(library).c_str(), &loaded);
        } catch (const std::runtime_error &error) {
            throw ToolchainError("ONNX Runtime " + api().version + " refuses " + utf8(library) + ": " + error.what());
        }
    }

    template <class Count, class Name, class Type>
    std::vector<TensorSpec> specs(Count count_of, Name name_of, Type type_info_of) const {
        Handle allocator = nullptr;  // ONNX Runtime's default allocator
        std::size_t count = 0;
        api().call(ort::GetAllocatorWithDefaultOptions, &allocator);
        api().call(count_of, session_.get(), &count);
        std::vector<TensorSpec> found;
        for (std::size_t i = 0; i < count; i++) {
            char *name = nullptr;
            Owned type(ort::ReleaseTypeInfo);
            const void *info = nullptr;
            api().call(type_info_of, session_.get(), i, type.out());
            api().call(ort::CastTypeInfoToTensorInfo, type.get(), &info);
            if (!info) throw BundleError("the model has an input or output that is not a tensor");
            const auto [dtype, shape] = described(info);
            api().call(name_of, session_.get(), i, allocator, &name);
            found.push_back({name, dtype, shape});
            api().call(ort::AllocatorFree, allocator, static_cast<void *>(name));
            if (dtype == "string" || dtype == "unknown")
                throw BundleError("the model has " + in_quotes(found.back().name) + " of type tensor(" + dtype + "); only numeric tensors are supported");
        }
        return found;
    }

    Owned value_of(const TensorView &tensor) const {
        Owned value(ort::ReleaseValue);
        void *const data = const_cast<void *>(tensor.data);  // ONNX Runtime only reads inputs
        api().call(ort::CreateTensorWithDataAsOrtValue, memory_.get(), data, byte_size(tensor.dtype, tensor.shape), tensor.shape.data(),
                   tensor.shape.size(), type_of(tensor.dtype), value.out());
        return value;
    }

    static Tensor copied(Handle value) {
        Owned info(ort::ReleaseTensorTypeAndShapeInfo);
        void *data = nullptr;
        api().call(ort::GetTensorTypeAndShape, value, info.out());
        api().call(ort::GetTensorMutableData, value, &data);
        const auto [dtype, shape] = described(info.get());
        const unsigned char *const bytes = static_cast<const unsigned char *>(data);
        return {dtype, shape, std::vector<unsigned char>(bytes, bytes + byte_size(dtype, shape))};
    }
};

}  // namespace

std::unique_ptr<Runtime> open_onnxruntime(const Source &source, const std::string &name, const Options &options) {
    return std::make_unique<OnnxRuntime>(source.bytes(name), options);
}

}  // namespace evm
