// The file format of the self-test's tensors: a length, a JSON header, bytes.
#pragma once
#include "evm/evm.hpp"

namespace evm {

// Raises std::runtime_error with the reason.
Tensors read_safetensors(const std::string &bytes);

}  // namespace evm
