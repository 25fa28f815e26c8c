#include "resize.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

constexpr int TOO_NARROW = 100;  // largest ratio of the resized side to the cropped side

// Round as Python's round() does, halves to even. Needs the default rounding mode.
double round_even(double x) { return std::nearbyint(x); }

}  // namespace

std::vector<std::uint8_t> Preprocessing::pixels(const Image &image) const {
    if (!image.rgb || image.width < 1 || image.height < 1)
        throw ImageError("array image is empty: [" + std::to_string(image.height) + ", " + std::to_string(image.width) + ", 3]");
    // All sizes are double: products of sizes do not fit int, and a size can be too large until the check below.
    const double want_h = round_even(height / crop_pct), want_w = round_even(width / crop_pct);
    double new_h = want_h, new_w = want_w;
    if (want_h * image.width >= want_w * image.height)  // the height decides
        new_w = std::max(1.0, std::floor(want_h * image.width / image.height));
    else
        new_h = std::max(1.0, std::floor(want_w * image.height / image.width));
    new_h = std::max(new_h, static_cast<double>(height)), new_w = std::max(new_w, static_cast<double>(width));
    if (std::max(new_h, new_w) > TOO_NARROW * std::max(height, width))
        throw ImageError((image.name.empty() ? "image" : "image " + image.name) + " is " + std::to_string(image.width) + "x" + std::to_string(image.height) + ": too narrow to be cropped to " +
                         std::to_string(width) + "x" + std::to_string(height), "", {"image.narrow"});
    const int top = static_cast<int>(round_even((new_h - height) / 2)), left = static_cast<int>(round_even((new_w - width) / 2));
    return resized(image, {static_cast<int>(new_h), top, height}, {static_cast<int>(new_w), left, width}, interpolation == "bicubic");
}

std::vector<float> Preprocessing::normalise(const std::vector<std::uint8_t> &pixels) const {
    const std::size_t area = static_cast<std::size_t>(height) * static_cast<std::size_t>(width);
    std::vector<float> result(pixels.size());
    for (std::size_t channel = 0; channel < 3; channel++) {
        const float offset = 255 * static_cast<float>(mean[channel]), scale = 255 * static_cast<float>(std_dev[channel]);
        for (std::size_t image = 0; image < pixels.size(); image += 3 * area)
            for (std::size_t i = 0; i < area; i++)
                result[image + channel * area + i] = (static_cast<float>(pixels[image + 3 * i + channel]) - offset) / scale;
    }
    return result;
}

}  // namespace evm
