// A pixel of the result is a weighted mean of the pixels under a kernel, stretched by the scale where a picture gets smaller
// (that is the antialiasing). Weights are computed in double, normalised, and rounded to fixed point with 22 bits; the
// horizontal pass comes first and is rounded to 8 bits. What Pillow rounds is rounded here, in the same order.
#include "resize.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

constexpr int BITS = 22;  // of a weight's fraction: 32, less 8 of the pixel and 2 for overshoot

// Weights of the pixels that each kept pixel is made of: `taps` of them for each, from begin[i] on, zeros behind.
struct Weights {
    int taps = 0;
    std::vector<int> begin, count;
    std::vector<std::int32_t> weight;
};

double cubic(double x) {  // Keys, a = -0.5
    x = std::abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0;
}

double triangle(double x) {
    x = std::abs(x);
    return x < 1 ? 1 - x : 0;
}

Weights weights_of(int from, const Axis &axis, bool bicubic) {
    const double scale = static_cast<double>(from) / axis.full, stretch = std::max(scale, 1.0);
    const double support = (bicubic ? 2 : 1) * stretch, inverse = 1 / stretch;
    Weights result;
    result.taps = static_cast<int>(std::ceil(support)) * 2 + 1;
    result.weight.resize(static_cast<std::size_t>(result.taps) * static_cast<std::size_t>(axis.count));
    std::vector<double> exact(static_cast<std::size_t>(result.taps));
    for (int i = 0; i < axis.count; i++) {
        const double centre = (axis.first + i + 0.5) * scale;
        const int begin = std::max(0, static_cast<int>(centre - support + 0.5));
        const int count = std::min(from, static_cast<int>(centre + support + 0.5)) - begin;
        double sum = 0;
        for (int k = 0; k < count; k++) {
            const double x = (k + begin - centre + 0.5) * inverse;
            exact[static_cast<std::size_t>(k)] = bicubic ? cubic(x) : triangle(x);
            sum += exact[static_cast<std::size_t>(k)];
        }
        std::int32_t *const weight = &result.weight[static_cast<std::size_t>(i) * static_cast<std::size_t>(result.taps)];
        for (int k = 0; k < count; k++) {
            const double scaled = (sum != 0 ? exact[static_cast<std::size_t>(k)] / sum : 0) * (1 << BITS);
            weight[k] = static_cast<std::int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
        }
        result.begin.push_back(begin);
        result.count.push_back(count);
    }
    return result;
}

std::uint8_t rounded(std::int32_t sum) { return static_cast<std::uint8_t>(std::clamp(sum >> BITS, 0, 255)); }

// One row, all kept columns of it.
void horizontal(const std::uint8_t *row, const Weights &weights, std::uint8_t *out) {
    for (std::size_t x = 0; x < weights.begin.size(); x++) {
        const std::int32_t *const weight = &weights.weight[x * static_cast<std::size_t>(weights.taps)];
        const std::uint8_t *const pixel = row + 3 * weights.begin[x];
        std::int32_t red = 1 << (BITS - 1), green = red, blue = red;
        for (int k = 0; k < weights.count[x]; k++) {
            red += pixel[3 * k] * weight[k];
            green += pixel[3 * k + 1] * weight[k];
            blue += pixel[3 * k + 2] * weight[k];
        }
        out[3 * x] = rounded(red), out[3 * x + 1] = rounded(green), out[3 * x + 2] = rounded(blue);
    }
}

}  // namespace

std::vector<std::uint8_t> resized(const Image &image, const Axis &rows, const Axis &columns, bool bicubic) {
    const Weights across = weights_of(image.width, columns, bicubic), down = weights_of(image.height, rows, bicubic);
    const std::size_t width = 3 * static_cast<std::size_t>(columns.count), height = static_cast<std::size_t>(rows.count);
    const std::ptrdiff_t stride = image.stride ? image.stride : 3 * static_cast<std::ptrdiff_t>(image.width);
    const int top = down.begin.front(), bottom = down.begin.back() + down.count.back();  // both grow with the row
    std::vector<std::uint8_t> narrow(static_cast<std::size_t>(bottom - top) * width), result(height * width);
    for (int y = top; y < bottom; y++)
        horizontal(image.rgb + y * stride, across, &narrow[static_cast<std::size_t>(y - top) * width]);
    std::vector<std::int32_t> sums(width);
    for (std::size_t y = 0; y < height; y++) {
        std::fill(sums.begin(), sums.end(), 1 << (BITS - 1));
        for (int k = 0; k < down.count[y]; k++) {
            const std::int32_t weight = down.weight[y * static_cast<std::size_t>(down.taps) + static_cast<std::size_t>(k)];
            const std::uint8_t *const row = &narrow[static_cast<std::size_t>(down.begin[y] + k - top) * width];
            for (std::size_t x = 0; x < width; x++) sums[x] += row[x] * weight;
        }
        std::transform(sums.begin(), sums.end(), result.begin() + static_cast<std::ptrdiff_t>(y * width), rounded);
    }
    return result;
}

}  // namespace evm
