// Check of the signature of a bundle: ed25519 (RFC 8032) over manifest.json, by OpenSSL's libcrypto, as in
// evm_deploy/bundle/signing.py.
#pragma once
#include "evm/evm.hpp"
#include "source.h"

namespace evm {

// Check that manifest.json, whose bytes are `manifest`, was signed with the private key that belongs to the public key in the PEM file
// `key`. Throws BundleError if it was not, UsageError for a file that holds no such key, ToolchainError if the SDK was built without OpenSSL.
void check_signature(const Source &source, const std::string &manifest, const std::filesystem::path &key);
// Check that a signed bundle contains no link, and no file that is not in the manifest and thus not signed. Throws BundleError.
void check_nothing_else(const Source &source, const Manifest &manifest);

}  // namespace evm
