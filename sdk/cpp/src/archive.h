// Reading of a bundle from a zip file, without unpacking it. The file is untrusted.
#pragma once
#include "source.h"

namespace evm {

// Open a zip. Throws BundleError if the zip is not a bundle, or contains names outside the bundle, links, devices, encrypted or duplicate
// entries, zip bombs, more than 10 000 files or 4 GB. Throws ToolchainError if the SDK was built without zlib.
std::unique_ptr<Source> open_zip(const std::filesystem::path &file);

}  // namespace evm
