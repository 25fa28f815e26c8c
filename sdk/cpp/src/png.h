// The image of the self-test, by libpng.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace evm {

struct RgbImage {
    int width = 0, height = 0;
    std::vector<std::uint8_t> rgb;
};

// An 8-bit RGB PNG. Raises std::runtime_error with the reason, also where the SDK has no libpng.
RgbImage read_png(const std::string &bytes);

}  // namespace evm
