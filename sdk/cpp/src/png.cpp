#include "png.h"

#include <stdexcept>

#if EVM_PNG
#include <png.h>

namespace evm {

RgbImage read_png(const std::string &bytes) {
    constexpr png_uint_32 MAX_SIDE = 1 << 13;
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    if (!png_image_begin_read_from_memory(&image, bytes.data(), bytes.size())) throw std::runtime_error(image.message);
    const bool fits = image.format == PNG_FORMAT_RGB && image.width <= MAX_SIDE && image.height <= MAX_SIDE;
    if (!fits) {
        png_image_free(&image);
        throw std::runtime_error("not an 8-bit RGB image of at most 8192 x 8192 pixels");
    }
    RgbImage rgb_image{static_cast<int>(image.width), static_cast<int>(image.height), std::vector<std::uint8_t>(PNG_IMAGE_SIZE(image))};
    if (!png_image_finish_read(&image, nullptr, rgb_image.rgb.data(), 0, nullptr)) throw std::runtime_error(image.message);
    return rgb_image;
}

}  // namespace evm

#else

namespace evm {

RgbImage read_png(const std::string &) { throw std::runtime_error("the SDK was built without libpng"); }

}  // namespace evm
#endif
