// Resizing of 8-bit RGB images, bit for bit equal to Pillow, and to evm-deploy's Python for `bilinear-opencv`.
#pragma once
#include "evm/evm.hpp"

namespace evm {

// One axis of a resize to `full` pixels, of which `count` pixels from `first` on are kept.
struct Axis {
    int full, first, count;
};

// Resize an image to rows.full x columns.full and return the kept part, rows.count x columns.count x 3 bytes. interpolation: as in
// Preprocessing.
std::vector<std::uint8_t> resized(const Image &image, const Axis &rows, const Axis &columns, const std::string &interpolation);

}  // namespace evm
