// What every runtime is: one file each, an optional component each.
#pragma once
#include "evm/evm.hpp"
#include "source.h"

#include <functional>

namespace evm {

// An artifact in a runtime. run() may be called by several threads at the same time; feeds have been checked by check_feeds.
class Runtime {
  public:
    std::vector<TensorSpec> inputs, outputs;
    virtual ~Runtime() = default;
    virtual Tensors run(const Feeds &feeds) const = 0;
};

// The file `name` of a bundle in a runtime. Raises BundleError, ToolchainError, UsageError.
using Opener = std::unique_ptr<Runtime>(const Source &source, const std::string &name, const Options &options);

// A target that this build runs. scan_probe: one scan by itself in the self-test, null where it has none that runs by itself.
// isa: the instruction set that a native library chose on this CPU; raises ToolchainError where it does not load.
struct Target {
    const char *name;
    const char *scan_probe;
    Opener *open;
    std::string (*isa)(const std::filesystem::path &library);
};

const std::vector<Target> &built_targets();
// Raises ToolchainError for one that this build does not run.
const Target &find_target(const std::string &name);

// Names, dtypes and shapes of `feeds`. Raises UsageError naming the input and both sides.
void check_feeds(const std::vector<TensorSpec> &inputs, const Feeds &feeds);
// image uint8[1, 224, 224, 3]
std::string spec_text(const TensorSpec &spec);
std::size_t element_size(const std::string &dtype);
std::size_t byte_size(const std::string &dtype, const std::vector<std::int64_t> &shape);
// The first line of a message.
std::string first_line(const std::string &message);
// As `isa`, of a library that needs nothing but itself.
std::string kernel_isa(const std::filesystem::path &library);

Opener open_onnxruntime, open_openvino, open_tensorrt;
std::string openvino_isa(const std::filesystem::path &library), tensorrt_isa(const std::filesystem::path &library);

}  // namespace evm
