// Reading and checking of manifest.json, as in evm_deploy/bundle/manifest.py.
#pragma once
#include "evm/evm.hpp"
#include "source.h"

namespace evm {

// Read and check manifest.json. Throws BundleError.
Manifest read_manifest(const Source &source);
// Check the hash of every file. Throws BundleError if the bundle is damaged or was rejected at export.
void check_bundle(const Source &source, const Manifest &manifest);

}  // namespace evm
