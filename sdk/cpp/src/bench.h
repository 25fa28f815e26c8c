// Timing one function until its median is stable, as evm_deploy/bench/latency.py does.
#pragma once
#include "evm/evm.hpp"

#include <functional>

namespace evm {

Latency measure(const std::function<void()> &run, double limit_s);

}  // namespace evm
