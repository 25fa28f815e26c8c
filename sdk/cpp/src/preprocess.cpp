#include "resize.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

constexpr int TOO_NARROW = 100;  // largest ratio of the resized side to the cropped side

// Round as Python's round() does, halves to even. Needs the default rounding mode.
double round_even(double x) { return std::nearbyint(x); }

// Rows and columns of the resized image that the network's input shows.
struct Place {
    Axis rows, columns;
};

std::string named(const Image &image) { return image.name.empty() ? "image" : "image " + image.name; }

// All sizes are double: products of sizes do not fit int, and a size can be too large until it is checked.
Place cropped(const Preprocessing &spec, const Image &image) {
    const double height = spec.height, width = spec.width;
    const double want_h = round_even(height / spec.crop_pct), want_w = round_even(width / spec.crop_pct);
    double new_h = want_h, new_w = want_w;
    if (want_h * image.width >= want_w * image.height)  // the height decides
        new_w = std::max(1.0, std::floor(want_h * image.width / image.height));
    else
        new_h = std::max(1.0, std::floor(want_w * image.height / image.width));
    new_h = std::max(new_h, height), new_w = std::max(new_w, width);
    if (std::max(new_h, new_w) > TOO_NARROW * std::max(height, width))
        throw ImageError(named(image) + " is " + std::to_string(image.width) + "x" + std::to_string(image.height) + ": too narrow to be cropped to " +
                         std::to_string(spec.width) + "x" + std::to_string(spec.height), "", {"image.narrow"});
    const int top = static_cast<int>(round_even((new_h - height) / 2)), left = static_cast<int>(round_even((new_w - width) / 2));
    return {{static_cast<int>(new_h), top, spec.height}, {static_cast<int>(new_w), left, spec.width}};
}

Place place_of(const Preprocessing &spec, const Image &image) {
    if (spec.resize == "crop") return cropped(spec, image);
    int rows = spec.height, columns = spec.width;
    if (spec.resize == "pad") {
        const double scale = std::min(static_cast<double>(spec.height) / image.height, static_cast<double>(spec.width) / image.width);
        rows = std::max(1, static_cast<int>(image.height * scale + 0.5)), columns = std::max(1, static_cast<int>(image.width * scale + 0.5));
    }
    return {{rows, 0, rows}, {columns, 0, columns}};
}

// Return the luminance of an RGB image as Pillow computes it, three times for each pixel, so that it resizes as RGB does.
std::vector<std::uint8_t> grey(const Image &image) {
    const std::size_t width = static_cast<std::size_t>(image.width), height = static_cast<std::size_t>(image.height);
    const std::ptrdiff_t stride = image.stride ? image.stride : 3 * static_cast<std::ptrdiff_t>(width);
    std::vector<std::uint8_t> result(3 * width * height);
    for (std::size_t y = 0; y < height; y++) {
        const std::uint8_t *pixel = image.rgb + static_cast<std::ptrdiff_t>(y) * stride;
        for (std::size_t x = 0; x < width; x++, pixel += 3) {
            const int luminance = (pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16;
            std::fill_n(&result[3 * (y * width + x)], 3, static_cast<std::uint8_t>(luminance));
        }
    }
    return result;
}

}  // namespace

std::vector<std::uint8_t> Preprocessing::pixels(const Image &image) const {
    const std::size_t depth = mean.size();
    if (!reads_images())
        throw ImageError("the network takes " + std::to_string(depth) + " channels: this SDK reads grey and RGB images", "give tensors: run(feeds)");
    if (!image.rgb || image.width < 1 || image.height < 1)
        throw ImageError("array image is empty: [" + std::to_string(image.height) + ", " + std::to_string(image.width) + ", 3]");
    const Place place = place_of(*this, image);
    const std::vector<std::uint8_t> luminance = depth == 1 ? grey(image) : std::vector<std::uint8_t>();
    const Image source = depth == 1 ? Image{luminance.data(), image.width, image.height} : image;
    const std::vector<std::uint8_t> found = resized(source, place.rows, place.columns, interpolation);
    const bool whole = place.rows.count == height && place.columns.count == width;  // no padding
    if (whole && depth == 3) return found;
    std::vector<std::uint8_t> fill, result(static_cast<std::size_t>(height) * static_cast<std::size_t>(width) * depth);
    for (const double value : mean) fill.push_back(static_cast<std::uint8_t>(std::clamp(round_even(255 * value), 0.0, 255.0)));
    for (std::size_t i = 0; i < result.size() && !whole; i++) result[i] = fill[i % depth];
    const std::size_t rows = static_cast<std::size_t>(place.rows.count), columns = static_cast<std::size_t>(place.columns.count);
    for (std::size_t y = 0; y < rows; y++)
        for (std::size_t x = 0; x < columns; x++)
            std::copy_n(&found[3 * (y * columns + x)], depth, &result[(y * static_cast<std::size_t>(width) + x) * depth]);
    return result;
}

std::vector<float> Preprocessing::normalise(const std::vector<std::uint8_t> &pixels) const {
    const std::size_t area = static_cast<std::size_t>(height) * static_cast<std::size_t>(width);
    std::vector<float> result(pixels.size());
    for (std::size_t channel = 0; channel < mean.size(); channel++) {
        const float offset = 255 * static_cast<float>(mean[channel]), scale = 255 * static_cast<float>(std_dev[channel]);
        for (std::size_t image = 0; image < pixels.size(); image += mean.size() * area)
            for (std::size_t i = 0; i < area; i++)
                result[image + channel * area + i] = (static_cast<float>(pixels[image + mean.size() * i + channel]) - offset) / scale;
    }
    return result;
}

}  // namespace evm
