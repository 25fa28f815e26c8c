#include "bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace evm {
namespace {

constexpr int WINDOW = 25;          // smallest number of runs in a window
constexpr double WINDOW_S = 0.2;    // shortest time of a window in seconds
constexpr std::size_t WINDOWS = 3;  // number of consecutive windows that must agree
constexpr double AGREE = 0.05, WARM_UP_S = 0.5;

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double percentile_of(std::vector<double> values, double q) {
    std::sort(values.begin(), values.end());
    const double at = q / 100 * static_cast<double>(values.size() - 1), below = std::floor(at);
    const std::size_t i = static_cast<std::size_t>(below), next = std::min(i + 1, values.size() - 1);
    return values[i] + (at - below) * (values[next] - values[i]);
}

// Measure the runs of one window in milliseconds: at least one run, and no run that begins after `until`.
std::vector<double> window(const std::function<void()> &run, double until) {
    std::vector<double> times;
    const double begun = now_s();
    while (times.empty() || (now_s() < until && (times.size() < WINDOW || now_s() - begun < WINDOW_S))) {
        const double start = now_s();
        run();
        times.push_back((now_s() - start) * 1e3);
    }
    return times;
}

bool agree(const std::vector<double> &medians) {
    if (medians.size() < WINDOWS) return false;
    const auto [least, most] = std::minmax_element(medians.end() - WINDOWS, medians.end());
    return *most <= *least * (1 + AGREE);
}

}  // namespace

Latency measure(const std::function<void()> &run, double limit_s) {
    Latency result;
    for (const double start = now_s(); result.warm_up < 3 || now_s() - start < std::min(WARM_UP_S, limit_s / 5); result.warm_up++) run();
    std::vector<double> medians;
    const double start = now_s();
    while (!result.stable && (now_s() - start < limit_s || result.samples.empty())) {
        const std::vector<double> times = window(run, start + limit_s);
        result.samples.insert(result.samples.end(), times.begin(), times.end());
        medians.push_back(percentile_of(times, 50));
        result.stable = agree(medians);
    }
    return result;
}

double Latency::percentile(double q) const { return percentile_of(samples, q); }
double Latency::mean() const { return std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size()); }
double Latency::min() const { return *std::min_element(samples.begin(), samples.end()); }
double Latency::max() const { return *std::max_element(samples.begin(), samples.end()); }
double Latency::std_dev() const {
    const double middle = mean();
    const auto square = [&](double sum, double x) { return sum + (x - middle) * (x - middle); };
    return std::sqrt(std::accumulate(samples.begin(), samples.end(), 0.0, square) / static_cast<double>(samples.size()));
}

}  // namespace evm
