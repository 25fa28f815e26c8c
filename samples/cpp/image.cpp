#include "image.h"

#define STB_IMAGE_IMPLEMENTATION
#define STBI_NO_HDR
#define STBI_NO_LINEAR
#include <stb_image.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>

namespace {

using Bytes = std::vector<unsigned char>;
constexpr long long MAX_PIXELS = 178'956'970;  // limit of Pillow

Bytes read_file(const std::string &path) {
    if (!std::filesystem::exists(path)) throw evm::ImageError("image " + path + " does not exist");
    errno = 0;
    std::ifstream stream(path, std::ios::binary);
    if (std::filesystem::is_directory(path)) errno = EISDIR;
    if (!stream || errno) throw evm::ImageError("image " + path + " cannot be read: " + std::strerror(errno));
    return {std::istreambuf_iterator<char>(stream), {}};
}

// Read a number of `size` bytes; 0 beyond the end of the file.
unsigned number(const Bytes &bytes, size_t at, size_t size, bool little) {
    if (at > bytes.size() || size > bytes.size() - at) return 0;
    unsigned value = 0;
    for (size_t i = 0; i < size; i++) value = value << 8 | bytes[at + (little ? size - 1 - i : i)];
    return value;
}

bool text_at(const Bytes &bytes, size_t at, const char *text, size_t size) {
    return at <= bytes.size() && size <= bytes.size() - at && std::memcmp(bytes.data() + at, text, size) == 0;
}

// Return the orientation (1 to 8) from the EXIF data at `start`: tag 0x0112 of the first directory.
unsigned orientation_at(const Bytes &bytes, size_t start) {
    const bool little = text_at(bytes, start, "II", 2);
    if (!little && !text_at(bytes, start, "MM", 2)) return 1;
    const size_t directory = start + number(bytes, start + 4, 4, little), count = number(bytes, directory, 2, little);
    for (size_t i = 0; i < count; i++) {
        const size_t entry = directory + 2 + 12 * i;
        if (number(bytes, entry, 2, little) != 0x0112) continue;
        const bool is_short = number(bytes, entry + 2, 2, little) == 3;
        const unsigned value = number(bytes, entry + 8, is_short ? 2 : 4, little);
        return value >= 1 && value <= 8 ? value : 1;
    }
    return 1;
}

// Read the orientation from the segments before a JPEG's pixels. truncated: whether the end marker is missing, which stb_image does
// not report.
unsigned jpeg_orientation(const Bytes &bytes, bool &truncated) {
    unsigned orientation = 1;
    size_t at = 2;
    while (at + 4 <= bytes.size() && bytes[at] == 0xff && bytes[at + 1] != 0xda) {
        if (bytes[at + 1] == 0xff) {  // padding
            at++;
            continue;
        }
        if (bytes[at + 1] == 0xe1 && text_at(bytes, at + 4, "Exif\0\0", 6)) orientation = orientation_at(bytes, at + 10);
        at += 2 + number(bytes, at + 2, 2, false);
    }
    const unsigned char end[] = {0xff, 0xd9};
    truncated = std::search(bytes.begin() + static_cast<std::ptrdiff_t>(std::min(at, bytes.size())), bytes.end(), end, end + 2) == bytes.end();
    return orientation;
}

unsigned png_orientation(const Bytes &bytes) {
    for (size_t at = 8; at + 12 <= bytes.size(); at += 12 + static_cast<size_t>(number(bytes, at, 4, false)))
        if (text_at(bytes, at + 4, "eXIf", 4)) return orientation_at(bytes, at + 8);
    return 1;
}

// Rotate and mirror an image to the EXIF orientation 1.
RgbImage upright(const RgbImage &image, unsigned orientation) {
    if (orientation == 1) return image;
    const bool turned = orientation >= 5;
    const int width = turned ? image.height : image.width, height = turned ? image.width : image.height;
    RgbImage result{width, height, Bytes(image.rgb.size())};
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            int from_x = turned ? y : x, from_y = turned ? x : y;
            if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) from_x = image.width - 1 - from_x;
            if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) from_y = image.height - 1 - from_y;
            const size_t to = 3 * (static_cast<size_t>(y) * static_cast<size_t>(width) + static_cast<size_t>(x));
            const size_t from = 3 * (static_cast<size_t>(from_y) * static_cast<size_t>(image.width) + static_cast<size_t>(from_x));
            std::copy_n(&image.rgb[from], 3, &result.rgb[to]);
        }
    return result;
}

struct Release {
    void operator()(void *pixels) const { stbi_image_free(pixels); }
};

RgbImage decoded(const Bytes &bytes, const std::string &path) {
    const int size = static_cast<int>(bytes.size());
    int width = 0, height = 0, channels = 0;
    if (bytes.size() > size_t{1} << 30 || !stbi_info_from_memory(bytes.data(), size, &width, &height, &channels))
        throw evm::ImageError("image " + path + " is not an image that stb_image can read");
    const long long count = static_cast<long long>(width) * height;
    if (count > MAX_PIXELS)
        throw evm::ImageError("image " + path + " is too large: Image size (" + std::to_string(count) + " pixels) exceeds limit of " +
                              std::to_string(MAX_PIXELS) + " pixels, could be decompression bomb DOS attack.");
    RgbImage image{width, height, Bytes(3 * static_cast<size_t>(count))};
#ifdef EVM_JPEG
    if (text_at(bytes, 0, "\xff\xd8", 2) && decode_jpeg(bytes, image)) return image;
#endif
    const bool deep_grey = channels == 1 && stbi_is_16_bit_from_memory(bytes.data(), size);
    if (deep_grey) {
        const std::unique_ptr<stbi_us, Release> grey(stbi_load_16_from_memory(bytes.data(), size, &width, &height, &channels, 1));
        for (size_t i = 0; grey && i < image.rgb.size(); i++) image.rgb[i] = static_cast<unsigned char>(std::lround(grey.get()[i / 3] / 257.0));
        if (grey) return image;
    } else {
        const std::unique_ptr<stbi_uc, Release> rgb(stbi_load_from_memory(bytes.data(), size, &width, &height, &channels, 3));
        if (rgb) std::copy_n(rgb.get(), image.rgb.size(), image.rgb.begin());
        if (rgb) return image;
    }
    throw evm::ImageError("image " + path + " cannot be read: " + stbi_failure_reason());
}

}  // namespace

RgbImage read_image(const std::string &path) {
    const Bytes bytes = read_file(path);
    const bool jpeg = text_at(bytes, 0, "\xff\xd8", 2), png = text_at(bytes, 0, "\x89PNG\r\n\x1a\n", 8);
    const RgbImage image = decoded(bytes, path);
    bool truncated = false;
    const unsigned orientation = jpeg ? jpeg_orientation(bytes, truncated) : png ? png_orientation(bytes) : 1;
    if (truncated) throw evm::ImageError("image " + path + " cannot be read: image file is truncated");
    RgbImage result = upright(image, orientation);
    result.name = path;
    return result;
}
