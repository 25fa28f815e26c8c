// Image files as upright 8-bit RGB, as the Python package reads them.
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

// EXIF rotation applied, 16-bit grey scaled, alpha dropped. Raises evm::ImageError.
RgbImage read_image(const std::string &path);

// The pixels of a JPEG into an image of its size; whether libjpeg could.
bool decode_jpeg(const std::vector<unsigned char> &bytes, RgbImage &image);
