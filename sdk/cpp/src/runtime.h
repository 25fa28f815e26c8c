// Interface of the runtimes. Each runtime is one source file and one optional component.
#pragma once
#include "evm/evm.hpp"
#include "source.h"

#include <functional>

namespace evm {

// An artifact opened in a runtime. Several threads may call run() at the same time; the caller has checked the feeds with check_feeds.
class Runtime {
  public:
    std::vector<TensorSpec> inputs, outputs;
    virtual ~Runtime() = default;
    virtual Tensors run(const Feeds &feeds) const = 0;
};

// Function that opens the file `name` of a bundle in a runtime. Throws BundleError, ToolchainError or UsageError.
using Opener = std::unique_ptr<Runtime>(const Source &source, const std::string &name, const Options &options);

// A target that this build runs. scan_probe: file of the self-test that contains a single scan, or null if the target has none.
// isa: returns the instruction set that a native library chose on this CPU; throws ToolchainError if the library does not load.
struct Target {
    const char *name;
    const char *scan_probe;
    Opener *open;
    std::string (*isa)(const std::filesystem::path &library);
};

// Targets of this build.
const std::vector<Target> &built_targets();
// Return a target by name. Throws ToolchainError if the target is not in this build.
const Target &find_target(const std::string &name);

// Check names, dtypes and shapes of `feeds`. Throws UsageError that names the input, the expected and the given tensor.
void check_feeds(const std::vector<TensorSpec> &inputs, const Feeds &feeds);
// Format a spec, such as "image uint8[1, 224, 224, 3]".
std::string spec_text(const TensorSpec &spec);
std::size_t element_size(const std::string &dtype);
std::size_t byte_size(const std::string &dtype, const std::vector<std::int64_t> &shape);
// Return the first line of a message.
std::string first_line(const std::string &message);
// Target::isa for libraries that have no dependencies.
std::string kernel_isa(const std::filesystem::path &library);

Opener open_onnxruntime, open_openvino, open_tensorrt;
std::string openvino_isa(const std::filesystem::path &library), tensorrt_isa(const std::filesystem::path &library);

}  // namespace evm
