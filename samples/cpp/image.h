// Reading of image files as upright 8-bit RGB, as the Python package reads them.
#pragma once
#include <evm/evm.hpp>

#include <string>
#include <vector>

struct RgbImage {
    int width = 0, height = 0;
    std::vector<unsigned char> rgb;
    std::string name = {};
    evm::Image view() const { return {rgb.data(), width, height, 0, name}; }
};

// Read an image file: apply the EXIF rotation, scale 16-bit grey to 8 bits, drop alpha. Throws evm::ImageError.
RgbImage read_image(const std::string &path);

// Decode a JPEG with libjpeg into an image of the same size. Returns false if libjpeg cannot decode it.
bool decode_jpeg(const std::vector<unsigned char> &bytes, RgbImage &image);
