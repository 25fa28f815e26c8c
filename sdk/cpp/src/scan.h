// Float64 reference of the selective scan, for the self-test.
#pragma once
#include "evm/evm.hpp"

#include <limits>

namespace evm {

constexpr double INFINITE = std::numeric_limits<double>::infinity();  // error of NaN, Inf or another dtype

// Test whether the tensors are u, delta (b, K, L, D); A (K, D, N); B, C (b, K, L, N); skip, bias (K, D), all float32.
bool is_scan(const Tensors &tensors);

// Compare the SSM part of y, y - skip * u, with the float64 loop. The error is relative to the largest value of the SSM part; the limit is
// the same as in evm_deploy/scan/reference.py. scan: tensors for which is_scan is true. y: float32 with the shape of u.
Check scan_check(const std::string &name, const Tensors &scan, const Tensor &y);

}  // namespace evm
