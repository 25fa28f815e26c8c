// Decoding of the self-test's image with libpng.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace evm {

struct RgbImage {
    int width = 0, height = 0;
    std::vector<std::uint8_t> rgb;
};

// Decode an 8-bit RGB PNG. Throws std::runtime_error with the reason, also if the SDK was built without libpng.
RgbImage read_png(const std::string &bytes);

}  // namespace evm
