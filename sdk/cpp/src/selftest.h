// Self-test of a bundle. The files are those of evm_deploy/bundle/selftest.py; the manifest contains the limits.
#pragma once
#include "runtime.h"

namespace evm {

// Read selftest/probes.safetensors. Throws BundleError.
Tensors read_probes(const Source &source);
// Return the input images among the probes. Throws BundleError if there are none.
Tensor images_of(const Source &source, const Manifest &manifest, const Tensors &probes);
// Read selftest/picture.png as RGB. Throws BundleError.
struct RgbImage read_test_image(const Source &source);

// Run the self-test. options: the resolved options of the model. Throws BundleError if the bundle has no readable self-test.
std::vector<Check> selftest(const Source &source, const Manifest &manifest, const Target &target, const Runtime &runtime, Options options);

// Run several images, in batches of at most `most`, and return the outputs of all. For a static batch the last batch is filled up and its
// outputs are cut. Throws BundleError if the outputs have another number of images than the inputs, or sizes that change between batches.
Tensors run_batched(const Runtime &runtime, const Manifest &manifest, const Tensor &images, std::int64_t most);

}  // namespace evm
