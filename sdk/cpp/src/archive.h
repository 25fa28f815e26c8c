// A bundle as one zip file: somebody else's file, read in place.
#pragma once
#include "source.h"

namespace evm {

// Raises BundleError for what is no bundle: names that leave it, links and devices, encrypted or doubled entries, bombs, more than
// 10 000 files or 4 GB. Raises ToolchainError where the SDK was built without zlib.
std::unique_ptr<Source> open_zip(const std::filesystem::path &file);

}  // namespace evm
