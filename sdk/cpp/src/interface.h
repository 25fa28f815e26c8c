// Checks that the parts of a bundle belong together, as in evm_deploy/bundle/loaded.py. Hashes only prove that each file is intact.
#pragma once
#include "runtime.h"

namespace evm {

// Read the class names; empty if the bundle has no labels.txt. Throws BundleError if the file is not UTF-8 text.
std::vector<std::string> read_labels(const Source &source, const Manifest &manifest);

// Check the inputs and outputs of the artifact against the manifest and the labels. Throws BundleError.
void check_interface(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const Runtime &runtime);

// Check the scores of a classifier: float32, one row per image, as many columns as labels. Throws BundleError.
void check_scores(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const TensorSpec &scores);

}  // namespace evm
