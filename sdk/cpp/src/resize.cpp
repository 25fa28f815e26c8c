// A pixel of the result is a weighted mean of the pixels under a kernel. Where the image gets smaller, the kernel is stretched by the
// scale, which is the antialiasing; `bilinear-opencv` does not stretch it. Weights are computed in double, normalised, and rounded to fixed point with 22 bits. The horizontal
// pass comes first and is rounded to 8 bits. Every rounding is the same as Pillow's.
#include "resize.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

constexpr int BITS = 22;  // bits of a weight's fraction: 32 minus 8 for the pixel and 2 for overshoot

// Weights for each kept pixel i: `taps` weights of the source pixels from begin[i] on, of which the first count[i] are used.
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

Weights weights_of(int from, const Axis &axis, const std::string &interpolation) {
    const bool bicubic = interpolation == "bicubic";
    const double scale = static_cast<double>(from) / axis.full, stretch = interpolation == "bilinear-opencv" ? 1.0 : std::max(scale, 1.0);
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

using Bytes = std::vector<std::uint8_t>;

// Compute all kept columns of `count` rows of packed RGB.
Bytes horizontal(const std::uint8_t *rgb, std::ptrdiff_t stride, std::size_t count, const Weights &weights) {
    const std::size_t width = weights.begin.size();
    Bytes result(count * width * 3);
    std::uint8_t *out = result.data();
    for (std::size_t y = 0; y < count; y++) {
        const std::uint8_t *const row = rgb + static_cast<std::ptrdiff_t>(y) * stride;
        for (std::size_t x = 0; x < width; x++, out += 3) {
            const std::int32_t *const weight = &weights.weight[x * static_cast<std::size_t>(weights.taps)];
            const std::uint8_t *const pixel = row + 3 * weights.begin[x];
            std::int32_t red = 1 << (BITS - 1), green = red, blue = red;
            for (int k = 0; k < weights.count[x]; k++) {
                red += pixel[3 * k] * weight[k];
                green += pixel[3 * k + 1] * weight[k];
                blue += pixel[3 * k + 2] * weight[k];
            }
            out[0] = rounded(red), out[1] = rounded(green), out[2] = rounded(blue);
        }
    }
    return result;
}

// Compute all kept rows, of `width` columns. The first row of `rgb` is row `top` of the image.
Bytes vertical(const std::uint8_t *rgb, std::size_t width, int top, const Weights &weights) {
    std::vector<std::int32_t> sums(3 * width);
    Bytes result(weights.begin.size() * sums.size());
    for (std::size_t y = 0; y < weights.begin.size(); y++) {
        std::fill(sums.begin(), sums.end(), 1 << (BITS - 1));
        for (int k = 0; k < weights.count[y]; k++) {
            const std::int32_t weight = weights.weight[y * static_cast<std::size_t>(weights.taps) + static_cast<std::size_t>(k)];
            const std::uint8_t *const row = rgb + static_cast<std::size_t>(weights.begin[y] + k - top) * sums.size();
            for (std::size_t x = 0; x < sums.size(); x++) sums[x] += row[x] * weight;
        }
        std::transform(sums.begin(), sums.end(), result.begin() + static_cast<std::ptrdiff_t>(y * sums.size()), rounded);
    }
    return result;
}

}  // namespace

Bytes resized(const Image &image, const Axis &rows, const Axis &columns, const std::string &interpolation) {
    const Weights across = weights_of(image.width, columns, interpolation), down = weights_of(image.height, rows, interpolation);
    const std::ptrdiff_t stride = image.stride ? image.stride : 3 * static_cast<std::ptrdiff_t>(image.width);
    // The source rows of all kept rows: begin and end grow from row to row, so the first and the last kept row suffice.
    const int top = down.begin.front(), bottom = down.begin.back() + down.count.back();
    const Bytes narrow = horizontal(image.rgb + top * stride, stride, static_cast<std::size_t>(bottom - top), across);
    return vertical(narrow.data(), across.begin.size(), top, down);
}

}  // namespace evm
