// The self-test in every bundle: files as evm_deploy/bundle/selftest.py, limits of the manifest.
#pragma once
#include "runtime.h"

namespace evm {

// selftest/probes.safetensors. Raises BundleError.
Tensors read_probes(const Source &source);
// The images among them. Raises BundleError where there are none.
Tensor images_of(const Source &source, const Manifest &manifest, const Tensors &probes);
// selftest/picture.png as RGB. Raises BundleError.
struct RgbImage read_test_image(const Source &source);

// `options` as they were resolved for the model. Raises BundleError where the bundle has no self-test.
std::vector<Check> selftest(const Source &source, const Manifest &manifest, const Target &target, const Runtime &runtime, Options options);

// The tensors of several images, batch by batch: the last one is filled up and cut, as a static batch asks.
// Raises BundleError for a model that gives not as many outputs as it had inputs, or now these and now other sizes.
Tensors run_batched(const Runtime &runtime, const Manifest &manifest, const Tensor &images, std::int64_t most);

}  // namespace evm
