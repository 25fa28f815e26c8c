// Antialiased resizing of 8-bit RGB, bit for bit as Pillow does it.
#pragma once
#include "evm/evm.hpp"

namespace evm {

// One axis of a resize to `full` pixels, of which the `count` from `first` on are kept.
struct Axis {
    int full, first, count;
};

// The part `rows` x `columns` of `image` resized to rows.full x columns.full, count x count x 3. bicubic: else bilinear.
std::vector<std::uint8_t> resized(const Image &image, const Axis &rows, const Axis &columns, bool bicubic);

}  // namespace evm
