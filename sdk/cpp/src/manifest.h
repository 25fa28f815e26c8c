// Reading and checking of manifest.json, as in evm_deploy/bundle/manifest.py.
#pragma once
#include "evm/evm.hpp"
#include "source.h"

namespace evm {

// Read and check manifest.json. If `signed_by` is not empty, first check its signature by this public key. Throws BundleError, and the
// errors of check_signature.
Manifest read_manifest(const Source &source, const std::filesystem::path &signed_by);
// Check the hash of every file. Throws BundleError if the bundle is damaged or was rejected at export.
void check_bundle(const Source &source, const Manifest &manifest);

}  // namespace evm
