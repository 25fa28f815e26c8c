#include "resize.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

constexpr int TOO_NARROW = 100;  // largest ratio of the resized side to the cropped side

// Round as Python's round() does, halves to even. Needs the default rounding mode.
double round_even(double x) { return std::nearbyint(x); }

std::string named(const std::string &name) { return name.empty() ? "image" : "image " + name; }

// Return the size {height, width} of the resized image that covers size / crop_pct. All sizes are double: products of sizes do not fit int, and a
// size can be too large until it is checked.
std::array<int, 2> covering(const Preprocessing &spec, double image_width, double image_height, const std::string &name) {
    const double height = spec.height, width = spec.width;
    const double want_h = round_even(height / spec.crop_pct), want_w = round_even(width / spec.crop_pct);
    double new_h = want_h, new_w = want_w;
    if (want_h * image_width >= want_w * image_height)  // the height decides
        new_w = std::max(1.0, std::floor(want_h * image_width / image_height));
    else
        new_h = std::max(1.0, std::floor(want_w * image_height / image_width));
    new_h = std::max(new_h, height), new_w = std::max(new_w, width);
    if (std::max(new_h, new_w) > TOO_NARROW * std::max(height, width))
        throw ImageError(named(name) + " is " + std::to_string(static_cast<int>(image_width)) + "x" + std::to_string(static_cast<int>(image_height)) +
                         ": too narrow to be cropped to " + std::to_string(spec.width) + "x" + std::to_string(spec.height), "", {"image.narrow"});
    return {static_cast<int>(new_h), static_cast<int>(new_w)};
}

// Return the part of one axis of the resized image that the network's input shows.
Axis shown(const Geometry &place, std::size_t axis) {
    const std::array<int, 4> content = place.content();
    return {place.resized[axis], content[axis] - place.offset[axis], content[axis + 2] - content[axis]};
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

std::array<int, 4> Geometry::content() const {
    std::array<int, 4> found{};
    for (std::size_t axis = 0; axis < 2; axis++) {
        found[axis] = std::max(0, offset[axis]);
        found[axis + 2] = std::min(size[axis], offset[axis] + resized[axis]);
    }
    return found;
}

Geometry Preprocessing::geometry(int image_width, int image_height, const std::string &name) const {
    if (image_width < 1 || image_height < 1)
        throw ImageError("array image is empty: [" + std::to_string(image_height) + ", " + std::to_string(image_width) + ", 3]");
    Geometry place{{image_height, image_width}, {height, width}, {height, width}, {0, 0}};
    if (resize == "crop") {
        place.resized = covering(*this, image_width, image_height, name);
        for (std::size_t axis = 0; axis < 2; axis++) place.offset[axis] = -static_cast<int>(round_even((place.resized[axis] - place.size[axis]) / 2.0));
    } else if (resize == "pad") {
        const double scale = std::min(static_cast<double>(height) / image_height, static_cast<double>(width) / image_width);
        for (std::size_t axis = 0; axis < 2; axis++) place.resized[axis] = std::max(1, static_cast<int>(place.original[axis] * scale + 0.5));
    }
    return place;
}

std::vector<std::uint8_t> Preprocessing::pixels(const Image &image) const {
    const std::size_t depth = mean.size();
    if (!reads_images())
        throw ImageError("the network takes " + std::to_string(depth) + " channels: this SDK reads grey and RGB images", "give tensors: run(feeds)");
    const Geometry place = geometry(image.rgb ? image.width : 0, image.height, image.name);
    const Axis down = shown(place, 0), across = shown(place, 1);
    const std::vector<std::uint8_t> luminance = depth == 1 ? grey(image) : std::vector<std::uint8_t>();
    const Image source = depth == 1 ? Image{luminance.data(), image.width, image.height} : image;
    const std::vector<std::uint8_t> found = resized(source, down, across, interpolation);
    const bool whole = down.count == height && across.count == width;  // no padding
    if (whole && depth == 3) return found;
    std::vector<std::uint8_t> fill, result(static_cast<std::size_t>(height) * static_cast<std::size_t>(width) * depth);
    for (const double value : mean) fill.push_back(static_cast<std::uint8_t>(std::clamp(round_even(255 * value), 0.0, 255.0)));
    for (std::size_t i = 0; i < result.size() && !whole; i++) result[i] = fill[i % depth];
    const std::size_t rows = static_cast<std::size_t>(down.count), columns = static_cast<std::size_t>(across.count);
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
