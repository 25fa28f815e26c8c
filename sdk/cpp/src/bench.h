// Measurement of a function's latency until the median is stable, by the method of evm_deploy/bench/latency.py.
#pragma once
#include "evm/evm.hpp"

#include <functional>

namespace evm {

// Measure the latency of run() in milliseconds, for at most about limit_s seconds.
Latency measure(const std::function<void()> &run, double limit_s);

}  // namespace evm
