// Whether the parts of a bundle belong together, which their hashes do not say: as evm_deploy/bundle/loaded.py.
#pragma once
#include "runtime.h"

namespace evm {

// The class names, none where the export had none. Raises BundleError for what is no text.
std::vector<std::string> read_labels(const Source &source, const Manifest &manifest);

// The artifact against its manifest and its labels. Raises BundleError.
void check_interface(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const Runtime &runtime);

// What a classifier gives against its labels. Raises BundleError.
void check_scores(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const TensorSpec &scores);

}  // namespace evm
