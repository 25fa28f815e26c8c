#include "scan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace evm {
namespace {

using Shape = std::vector<std::int64_t>;
constexpr double TOLERANCE = 2e-5;        // of the SSM part, float32 against the loop
constexpr double ROUNDING = 4 * 0x1p-23;  // of y, before skip * u is taken off

struct Scan {
    std::size_t b, K, L, D, N;
    const float *u, *delta, *A, *B, *C, *skip, *bias;
};

const float *data_of(const Tensors &scan, const char *name, const Shape &shape) {
    const auto found = scan.find(name);
    if (found == scan.end() || found->second.dtype != "float32" || found->second.shape != shape)
        throw std::runtime_error(std::string("a scan's ") + name + " has another shape");
    return found->second.data<float>();
}

Scan scan_of(const Tensors &scan) {
    const auto u = scan.find("u"), A = scan.find("A");
    if (u == scan.end() || A == scan.end() || u->second.shape.size() != 4 || A->second.shape.size() != 3)
        throw std::runtime_error("a scan lacks u or A");
    const std::int64_t b = u->second.shape[0], K = u->second.shape[1], L = u->second.shape[2], D = u->second.shape[3], N = A->second.shape[2];
    const Shape wide{b, K, L, D}, narrow{b, K, L, N}, each{K, D};
    const auto size = [](std::int64_t extent) { return static_cast<std::size_t>(extent); };
    return {size(b), size(K), size(L), size(D), size(N),
            data_of(scan, "u", wide), data_of(scan, "delta", wide), data_of(scan, "A", {K, D, N}), data_of(scan, "B", narrow),
            data_of(scan, "C", narrow), data_of(scan, "skip", each), data_of(scan, "bias", each)};
}

// log(1 + exp(x)) without overflow and without losing small values.
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// Calls visit(index in u, y without skip * u, skip * u) for every element.
template <class Visit>
void loop(const Scan &scan, Visit visit) {
    std::vector<double> state(scan.N);
    for (std::size_t image = 0; image < scan.b; image++)
        for (std::size_t k = 0; k < scan.K; k++)
            for (std::size_t d = 0; d < scan.D; d++) {
                std::fill(state.begin(), state.end(), 0.0);
                const std::size_t channel = k * scan.D + d;
                for (std::size_t t = 0; t < scan.L; t++) {
                    const std::size_t step = (image * scan.K + k) * scan.L + t, at = step * scan.D + d;
                    const double dt = softplus(static_cast<double>(scan.delta[at]) + scan.bias[channel]), inflow = dt * scan.u[at];
                    double y = 0;
                    for (std::size_t n = 0; n < scan.N; n++) {
                        state[n] = std::exp(dt * scan.A[channel * scan.N + n]) * state[n] + inflow * scan.B[step * scan.N + n];
                        y += state[n] * scan.C[step * scan.N + n];
                    }
                    visit(at, y, static_cast<double>(scan.skip[channel]) * scan.u[at]);
                }
            }
}

}  // namespace

Check scan_check(const std::string &name, const Tensors &tensors, const Tensor &y) {
    const Scan scan = scan_of(tensors);
    const bool comparable = y.dtype == "float32" && y.shape == tensors.at("u").shape;
    double error = 0, largest = std::numeric_limits<float>::min(), skipped = 0;
    loop(scan, [&](std::size_t at, double want, double skip) {
        largest = std::max(largest, std::abs(want));
        skipped = std::max(skipped, std::abs(skip));
        const double have = comparable ? y.data<float>()[at] : INFINITE;
        error = std::max(error, std::isfinite(have) ? std::abs(have - (want + skip)) : INFINITE);
    });
    return {name, error / largest, TOLERANCE + ROUNDING * skipped / largest};
}

}  // namespace evm
