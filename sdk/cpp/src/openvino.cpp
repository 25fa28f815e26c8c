// Runtime of target openvino: OpenVINO on any of its devices.
#include "platform.h"
#include "runtime.h"
#include "sha256.h"
#include "text.h"

#include <openvino/openvino.hpp>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <random>
#include <set>

namespace evm {
namespace {

const std::vector<std::string> VIRTUAL{"AUTO", "HETERO", "MULTI", "BATCH"};  // devices that stand for other devices
constexpr const char *MARK = "evm extension for OpenVINO ";

bool has(const std::vector<std::string> &names, const std::string &name) { return std::find(names.begin(), names.end(), name) != names.end(); }

// Return the line of OpenVINO's message that tells the reason; the lines before it are places in OpenVINO's sources.
std::string reason(const std::string &message) {
    for (const std::string &line : split(message, '\n')) {
        const std::size_t start = line.find_first_not_of(" \t\r");
        const bool place = line.find("Exception from ", 0) == 0 || (line.find("Check '") == 0 && line.find("' failed at ") != std::string::npos);
        if (start != std::string::npos && !place) return line.substr(start);
    }
    return message;
}

std::string release_here() {
    const std::string build = ov::get_openvino_version().buildNumber;  // 2026.4.1-21919-..
    return build.substr(0, build.find('-'));
}

std::string file_bytes(const std::filesystem::path &file) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw ToolchainError("the extension " + utf8(file) + " cannot be read: " + std::strerror(errno));
    return {std::istreambuf_iterator<char>(stream), {}};
}

// Throw ToolchainError unless an extension was compiled for this release of OpenVINO. OpenVINO refuses others without a reason.
void check_release(const std::filesystem::path &library) {
    const std::string bytes = file_bytes(library);
    const std::size_t mark = bytes.find(MARK);
    if (mark == std::string::npos) throw ToolchainError(utf8(library) + " is not an OpenVINO extension of evm-deploy");
    const std::string built_for = bytes.c_str() + mark + std::strlen(MARK);
    if (built_for != release_here())
        throw ToolchainError("the extension " + utf8(library) + " was compiled for OpenVINO " + built_for + ", but the installed release is " + release_here(),
                             "build the SDK with OpenVINO " + built_for + ", or use the extension of an export for " + release_here());
}

// Throw UsageError, with the list of available devices, unless OpenVINO finds the device: GPU, GPU.1, AUTO, HETERO:GPU,CPU.
void check_device(const std::string &device, const std::vector<std::string> &available) {
    const std::size_t colon = device.find(':');
    const std::string name = device.substr(0, colon), behind = colon == std::string::npos ? "" : device.substr(colon + 1);
    const bool stands_for_others = has(VIRTUAL, name);
    if (!stands_for_others && !behind.empty())
        throw UsageError("device " + in_quotes(device) + ": only " + join(VIRTUAL) + " take a list of devices");
    std::vector<std::string> wanted = split(behind, ',');
    if (behind.empty() && !stands_for_others) wanted = {device};
    for (const std::string &one : wanted) {
        std::string bare = one.substr(one[0] == '-' ? 1 : 0);
        bare = bare.substr(0, bare.find('('));
        const auto same = [&](const std::string &there) { return bare == there || bare == there.substr(0, there.find('.')); };
        if (std::none_of(available.begin(), available.end(), same))
            throw UsageError("device " + in_quotes(bare) + " not found; OpenVINO finds: " + join(available), "check that the driver of the device is installed");
    }
}

// Return a value of the metadata that evm-export writes into an IR; `otherwise` if there is none.
std::string fact(const std::string &xml, const std::string &name, const std::string &otherwise) {
    const std::string key = "<" + name + " value=\"";
    const std::size_t at = xml.find(key);
    return at == std::string::npos ? otherwise : xml.substr(at + key.size(), xml.find('"', at + key.size()) - at - key.size());
}

std::string sha256_of(const std::filesystem::path &file) {
    std::ifstream stream(file, std::ios::binary);
    Sha256 hash;
    for (char block[1 << 16]; stream.read(block, sizeof block), stream.gcount() > 0;) hash.add(block, static_cast<std::size_t>(stream.gcount()));
    return hash.hex();
}

// Cache of compiled models whose checksums are beside them, in the form that evm-deploy's Python runtime writes: both share
// a cache. OpenVINO 2026.4.1 loads a cached model with changed bytes without an error. Throws UsageError if the folder
// cannot be used.
class SealedCache {
    std::filesystem::path folder_;  // empty: no cache
    std::set<std::filesystem::path> known_;

    static std::filesystem::path checksum(const std::filesystem::path &model) { return std::filesystem::path(model) += ".sha256"; }

    std::vector<std::filesystem::path> models() const {
        std::vector<std::filesystem::path> found;
        for (const auto &entry : std::filesystem::directory_iterator(folder_))
            if (entry.path().extension() == ".blob") found.push_back(entry.path());
        return found;
    }

    [[noreturn]] void refuse(const std::string &why) const { throw UsageError("the cache " + utf8(folder_) + " cannot be used: " + why, "give another folder"); }

  public:
    // Delete the models that are not as `seal` has left them.
    explicit SealedCache(std::filesystem::path folder) : folder_(std::move(folder)) {
        if (folder_.empty()) return;
        try {
            std::filesystem::create_directories(folder_);
            for (const auto &model : models()) {
                std::ifstream stream(checksum(model));
                const std::string expected{std::istreambuf_iterator<char>(stream), {}};
                if (expected == sha256_of(model)) known_.insert(model);
                else std::filesystem::remove(model);
            }
        } catch (const std::filesystem::filesystem_error &error) { refuse(error.code().message()); }
    }

    // Write the checksums of new models. A process that dies before leaves a model without one, which the next deletes.
    void seal() const {
        if (folder_.empty()) return;
        try {
            for (const auto &model : models()) {
                if (known_.count(model)) continue;
                const std::filesystem::path aside = checksum(model) += "." + std::to_string(std::random_device{}());
                if (!(std::ofstream(aside, std::ios::binary) << sha256_of(model)).flush()) refuse("a checksum cannot be written");
                std::filesystem::rename(aside, checksum(model));
            }
        } catch (const std::filesystem::filesystem_error &error) { refuse(error.code().message()); }
    }
};

// Read the weights file of an IR into a tensor; an empty tensor if there is no such file.
ov::Tensor weights_of(const Source &source, const std::string &name) {
    try {
        const std::uint64_t size = source.size(name);
        ov::Tensor weights(ov::element::u8, ov::Shape{static_cast<std::size_t>(size)});
        std::uint64_t at = 0;
        source.read(name, [&](const char *data, std::size_t count) {
            if (count > size - at) throw BundleError("bundle " + source.path + ": " + name + " has changed since it was checked", "open the bundle again");
            std::memcpy(static_cast<char *>(weights.data()) + at, data, count);
            at += count;
        });
        return weights;
    } catch (const ReadError &error) {
        if (error.missing) return {};
        throw;
    }
}

std::string dtype_of(const ov::element::Type &type) {
    static const std::map<std::string, const char *> names{{"u8", "uint8"},     {"i8", "int8"},     {"f16", "float16"}, {"f32", "float32"},
                                                           {"f64", "float64"}, {"i32", "int32"}, {"i64", "int64"}};
    const auto found = names.find(type.get_type_name());
    return found == names.end() ? type.get_type_name() : found->second;
}

TensorSpec spec_of(const ov::Output<const ov::Node> &port) {
    TensorSpec spec{port.get_any_name(), dtype_of(port.get_element_type()), {}};
    for (const ov::Dimension &dim : port.get_partial_shape()) spec.shape.push_back(dim.is_dynamic() ? -1 : dim.get_length());
    return spec;
}

class OpenVino : public Runtime {
    ov::Core core_;
    ov::CompiledModel compiled_;
    std::vector<ov::Output<const ov::Node>> ports_;  // of `outputs`
    mutable std::mutex mutex_;
    mutable std::vector<ov::InferRequest> idle_;  // unused requests; there are as many requests as inferences have run at once

  public:
    OpenVino(const Source &source, const std::string &name, const Options &options) {
        if (!options.plugin.empty()) extend(options.plugin);
        const std::string device = options.device.empty() ? "CPU" : options.device, path = source.path + "/" + name;
        check_device(device, core_.get_available_devices());
        const std::string xml = source.bytes(name);
        const ov::Tensor weights = weights_of(source, std::filesystem::path(name).replace_extension(".bin").generic_string());
        // without the hint, many CPUs compute in bfloat16
        ov::AnyMap properties{{"PERFORMANCE_HINT", "LATENCY"}, {"INFERENCE_PRECISION_HINT", fact(xml, "inference_precision", "f32")}};
        if (options.threads) properties["INFERENCE_NUM_THREADS"] = std::to_string(options.threads * options.streams);
        if (options.streams > 1) properties["NUM_STREAMS"] = std::to_string(options.streams);
        const SealedCache cache(options.cache.empty() ? std::filesystem::path() : cache_folder(source, options));
        if (!options.cache.empty()) properties["CACHE_DIR"] = utf8(cache_folder(source, options));
        try {
            compiled_ = core_.compile_model(xml, weights, device, properties);
        } catch (const std::exception &error) {
            if (std::string(error.what()).find("opset: evm") != std::string::npos)
                throw BundleError(path + " contains operators of domain evm, which need the OpenVINO extension",
                                  "set `plugin` to the path of the extension, or export with --scan portable");
            throw BundleError("OpenVINO cannot compile " + path + " for " + device + ": " + reason(error.what()));
        }
        cache.seal();
        for (const auto &port : compiled_.inputs()) inputs.push_back(spec_of(port));
        const std::vector<std::string> hidden = split(fact(xml, "model_api_outputs", ""), ',');
        for (const auto &port : compiled_.outputs()) {
            if (has(hidden, port.get_any_name())) continue;  // only OpenVINO Model API reads it
            outputs.push_back(spec_of(port)), ports_.push_back(port);
        }
    }

    Tensors run(const Feeds &feeds) const override {
        ov::InferRequest request = take();
        Tensors results;
        try {
            for (std::size_t i = 0; i < inputs.size(); i++) {
                const TensorView &value = feeds.at(inputs[i].name);
                const ov::Shape shape(value.shape.begin(), value.shape.end());
                // OpenVINO only reads inputs
                request.set_input_tensor(i, ov::Tensor(compiled_.inputs()[i].get_element_type(), shape, const_cast<void *>(value.data)));
            }
            request.infer();
        } catch (const std::exception &error) {
            throw UsageError("OpenVINO cannot run the model: " + reason(error.what()));
        }
        for (std::size_t i = 0; i < outputs.size(); i++) results[outputs[i].name] = copied(request.get_tensor(ports_[i]), outputs[i].dtype);
        give_back(std::move(request));
        return results;
    }

  private:
    void extend(const std::filesystem::path &library) {
        check_release(library);
        try {
            core_.add_extension(utf8(library));
        } catch (const std::exception &error) {
            throw ToolchainError("OpenVINO refuses " + utf8(library) + ": " + reason(error.what()));
        }
    }

    // Return a cache folder for this bundle and this extension. OpenVINO does not notice when the content of either changes.
    static std::filesystem::path cache_folder(const Source &source, const Options &options) {
        std::string extension = "portable";
        if (!options.plugin.empty()) {
            Sha256 hash;
            const std::string bytes = file_bytes(options.plugin);
            hash.add(bytes.data(), bytes.size());
            extension = hash.hex().substr(0, 16);
        }
        return options.cache / source.sha256("manifest.json").substr(0, 16) / extension;
    }

    ov::InferRequest take() const {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!idle_.empty()) {
                ov::InferRequest request = std::move(idle_.back());
                idle_.pop_back();
                return request;
            }
        }
        return const_cast<ov::CompiledModel &>(compiled_).create_infer_request();
    }

    void give_back(ov::InferRequest request) const {
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(request));
    }

    static Tensor copied(const ov::Tensor &tensor, const std::string &dtype) {
        const ov::Shape shape = tensor.get_shape();
        const unsigned char *const bytes = static_cast<const unsigned char *>(tensor.data());
        return {dtype, {shape.begin(), shape.end()}, std::vector<unsigned char>(bytes, bytes + tensor.get_byte_size())};
    }
};

}  // namespace

std::unique_ptr<Runtime> open_openvino(const Source &source, const std::string &name, const Options &options) {
    return std::make_unique<OpenVino>(source, name, options);
}

std::string openvino_isa(const std::filesystem::path &library) {
    check_release(library);
    return kernel_isa(library);
}

}  // namespace evm
