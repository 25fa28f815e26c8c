// The float64 loop that every lowering of the selective scan is compared with.
#pragma once
#include "evm/evm.hpp"

#include <limits>

namespace evm {

constexpr double INFINITE = std::numeric_limits<double>::infinity();  // the error of what is not even a number

// Whether they are u, delta (b, K, L, D); A (K, D, N); B, C (b, K, L, N); skip, bias (K, D), float32.
bool is_scan(const Tensors &tensors);

// Error of y's part without skip * u against the loop, relative to its largest value, and the limit, as evm_deploy/export/verify.py.
// scan: what is_scan takes. y: shaped as u, float32.
Check scan_check(const std::string &name, const Tensors &scan, const Tensor &y);

}  // namespace evm
