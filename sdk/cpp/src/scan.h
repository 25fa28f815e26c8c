// The float64 loop that every lowering of the selective scan is compared with.
#pragma once
#include "evm/evm.hpp"

#include <limits>

namespace evm {

constexpr double INFINITE = std::numeric_limits<double>::infinity();  // the error of what is not even a number

// Error of y's part without skip * u against the loop, relative to its largest value, and the limit, as evm_deploy/export/verify.py.
// scan: u, delta (b, K, L, D); A (K, D, N); B, C (b, K, L, N); skip, bias (K, D), float32. Raises std::runtime_error for others.
Check scan_check(const std::string &name, const Tensors &scan, const Tensor &y);

}  // namespace evm
