// manifest.json, read and checked as evm_deploy/bundle/manifest.py does.
#pragma once
#include "evm/evm.hpp"
#include "source.h"

namespace evm {

// Raises BundleError.
Manifest read_manifest(const Source &source);
// The hash of every file. Raises BundleError for a bundle that is damaged, or was rejected.
void check_bundle(const Source &source, const Manifest &manifest);

}  // namespace evm
