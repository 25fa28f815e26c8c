// Checks that the parts of a bundle belong together, as in evm_deploy/bundle/loaded.py. Hashes only prove that each file is intact.
#pragma once
#include "runtime.h"

namespace evm {

// Read the class names; empty if the bundle has no labels.txt. Throws BundleError if the file is not UTF-8 text.
std::vector<std::string> read_labels(const Source &source, const Manifest &manifest);

// Check the inputs and outputs of the artifact against the manifest and the labels. Throws BundleError.
void check_interface(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const Runtime &runtime);

// Check names, dtypes and shapes of the outputs of a classifier, a detector or a segmenter; other outputs need no check. Throws BundleError.
void check_outputs(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const std::vector<TensorSpec> &outputs);

}  // namespace evm
