// Reading of safetensors, the file format of the self-test's tensors: the length of the header, a JSON header, bytes.
#pragma once
#include "evm/evm.hpp"

namespace evm {

// Read all tensors of a file. Throws std::runtime_error with the reason.
Tensors read_safetensors(const std::string &bytes);

}  // namespace evm
