#include "runtime.h"

#include "platform.h"
#include "text.h"

#include <algorithm>
#include <cstdlib>

namespace evm {
namespace {

bool fits(const TensorSpec &spec, const TensorView &value) {
    const auto same = [](std::int64_t want, std::int64_t have) { return want < 0 ? have >= 1 : have == want; };
    return value.dtype == spec.dtype && value.data &&
           std::equal(spec.shape.begin(), spec.shape.end(), value.shape.begin(), value.shape.end(), same);
}

}  // namespace

std::string spec_text(const TensorSpec &spec) { return spec.name + " " + spec.dtype + shape_text(spec.shape); }

const std::vector<Target> &built_targets() {
    static const std::vector<Target> targets = {
#if EVM_ONNXRUNTIME
        {"onnx", "selftest/scan.onnx", open_onnxruntime, kernel_isa},
#endif
#if EVM_OPENVINO
        {"openvino", "selftest/scan.xml", open_openvino, openvino_isa},
#endif
#if EVM_TENSORRT
        {"trt", nullptr, open_tensorrt, tensorrt_isa},
#endif
    };
    return targets;
}

const Target &find_target(const std::string &name) {
    std::vector<std::string> names;
    for (const Target &target : built_targets()) {
        if (target.name == name) return target;
        names.push_back(target.name);
    }
    const std::map<std::string, std::string> options{{"onnx", "ONNXRUNTIME"}, {"openvino", "OPENVINO"}, {"trt", "TENSORRT"}};
    const auto option = options.find(name);
    throw ToolchainError("target '" + name + "' is not in this build of the SDK; available: " + (names.empty() ? "none" : join(names)),
                         option == options.end() ? "" : "configure the SDK with -DEVM_" + option->second + "=ON");
}

void check_feeds(const std::vector<TensorSpec> &inputs, const Feeds &feeds) {
    std::vector<std::string> wanted, given;
    for (const TensorSpec &spec : inputs) wanted.push_back(spec_text(spec));
    for (const auto &feed : feeds) given.push_back(feed.first);
    const auto known = [&](const TensorSpec &spec) { return feeds.count(spec.name) == 1; };
    if (feeds.size() != inputs.size() || !std::all_of(inputs.begin(), inputs.end(), known))
        throw UsageError("inputs are " + join(wanted) + "; got " + (given.empty() ? "none" : join(given)));
    for (const TensorSpec &spec : inputs) {
        const TensorView &value = feeds.at(spec.name);
        if (!fits(spec, value)) throw UsageError("input " + spec_text(spec) + ": got " + value.dtype + shape_text(value.shape));
    }
}

std::size_t element_size(const std::string &dtype) {
    static const std::map<std::string, std::size_t> sizes{{"uint8", 1},   {"int8", 1},    {"bool", 1},  {"float16", 2}, {"int32", 4},
                                                          {"float32", 4}, {"float64", 8}, {"int64", 8}};
    const auto found = sizes.find(dtype);
    if (found == sizes.end()) throw BundleError("the model has a tensor of type " + dtype + ", which the SDK does not support");
    return found->second;
}

std::size_t byte_size(const std::string &dtype, const std::vector<std::int64_t> &shape) {
    std::size_t size = element_size(dtype);
    for (const std::int64_t extent : shape) size *= static_cast<std::size_t>(extent);
    return size;
}

std::string first_line(const std::string &message) { return message.substr(0, message.find('\n')); }

std::string kernel_isa(const std::filesystem::path &library) {
    const char *const hint = "use scan 'portable' to run without the native library";
    using Text = const char *(*)();
    Text isa = nullptr, error_of = nullptr;
    try {
        const Library kernels(library);
        isa = reinterpret_cast<Text>(kernels.find("evm_scan_isa"));
        error_of = reinterpret_cast<Text>(kernels.find("evm_scan_isa_error"));  // null in libraries of evm-deploy 0.2
    } catch (const std::runtime_error &error) {
        throw ToolchainError(std::string("the native library cannot be loaded: ") + error.what(), hint);
    }
    if (!isa) throw ToolchainError("the native library cannot be loaded: " + utf8(library) + " is not a library of evm-deploy", hint);
    const char *const forced = std::getenv("EVM_ISA");
    if (forced && *forced && std::string(forced) != isa()) {
        const char *const said = error_of ? error_of() : nullptr;
        throw ToolchainError(said ? said : "EVM_ISA=" + std::string(forced) + ": the native library " + utf8(library) + " uses " + isa(),
                             "set EVM_ISA before the program starts, or unset it; native libraries of evm-deploy 0.2 do not read it");
    }
    return isa();
}

}  // namespace evm
