#include "scan.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

using Shape = std::vector<std::int64_t>;
constexpr double TOLERANCE = 2e-5;        // error of the SSM part, float32 against the float64 loop
constexpr double ROUNDING = 4 * 0x1p-23;  // relative rounding error of y, before skip * u is subtracted

struct Scan {
    std::size_t b, K, L, D, N;
    const float *u, *delta, *A, *B, *C, *skip, *bias;
};

Scan scan_of(const Tensors &tensors) {
    const Shape &u = tensors.at("u").shape;
    const auto size = [](std::int64_t extent) { return static_cast<std::size_t>(extent); };
    const auto data = [&](const char *name) { return tensors.at(name).data<float>(); };
    return {size(u[0]), size(u[1]), size(u[2]), size(u[3]), size(tensors.at("A").shape[2]),
            data("u"), data("delta"), data("A"), data("B"), data("C"), data("skip"), data("bias")};
}

// Compute log(1 + exp(x)) without overflow and without loss of small values.
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// Compute the scan and call visit(index in u, y without skip * u, skip * u) for every element.
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

bool is_scan(const Tensors &tensors) {
    const auto u = tensors.find("u"), A = tensors.find("A");
    if (u == tensors.end() || A == tensors.end() || u->second.shape.size() != 4 || A->second.shape.size() != 3) return false;
    const std::int64_t b = u->second.shape[0], K = u->second.shape[1], L = u->second.shape[2], D = u->second.shape[3], N = A->second.shape[2];
    const Shape wide{b, K, L, D}, narrow{b, K, L, N}, each{K, D};
    const std::map<std::string, Shape> shapes{{"u", wide}, {"delta", wide}, {"A", {K, D, N}}, {"B", narrow}, {"C", narrow}, {"skip", each}, {"bias", each}};
    const auto same = [](const auto &tensor, const auto &shape) {
        return tensor.first == shape.first && tensor.second.shape == shape.second && tensor.second.dtype == "float32" && !tensor.second.bytes.empty();
    };
    return std::equal(tensors.begin(), tensors.end(), shapes.begin(), shapes.end(), same);
}

Check scan_check(const std::string &name, const Tensors &tensors, const Tensor &y) {
    const Scan scan = scan_of(tensors);
    double error = 0, largest = std::numeric_limits<float>::min(), skipped = 0;
    loop(scan, [&](std::size_t at, double want, double skip) {
        largest = std::max(largest, std::abs(want));
        skipped = std::max(skipped, std::abs(skip));
        const double have = y.data<float>()[at];
        error = std::max(error, std::isfinite(have) ? std::abs(have - (want + skip)) : INFINITE);
    });
    return {name, error / largest, TOLERANCE + ROUNDING * skipped / largest};
}

}  // namespace evm
