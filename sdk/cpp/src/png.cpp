#include "png.h"

#include "inflate.h"

#include <cstdlib>
#include <stdexcept>

namespace evm {
namespace {

constexpr std::uint32_t MAX_SIDE = 1 << 15;
constexpr std::size_t PIXEL = 3;

std::uint32_t big_endian(const std::string &bytes, std::size_t at) {
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < 4; i++) value = value << 8 | static_cast<unsigned char>(bytes[at + i]);
    return value;
}

int paeth(int left, int up, int corner) {
    const int guess = left + up - corner, a = std::abs(guess - left), b = std::abs(guess - up), c = std::abs(guess - corner);
    return a <= b && a <= c ? left : b <= c ? up : corner;
}

// Undoes the filter of one row, in place. up: the row above, or null.
void unfilter(int filter, std::uint8_t *row, const std::uint8_t *up, std::size_t size) {
    for (std::size_t i = 0; i < size; i++) {
        const int left = i >= PIXEL ? row[i - PIXEL] : 0, above = up ? up[i] : 0, corner = up && i >= PIXEL ? up[i - PIXEL] : 0;
        const int add[] = {0, left, above, (left + above) / 2, paeth(left, above, corner)};
        row[i] = static_cast<std::uint8_t>(row[i] + add[filter]);
    }
}

}  // namespace

Picture read_png(const std::string &bytes) {
    if (!Inflate::available()) throw std::runtime_error("the SDK was built without zlib");
    if (bytes.size() < 33 || bytes.compare(0, 8, "\x89PNG\r\n\x1a\n") != 0 || bytes.compare(12, 4, "IHDR") != 0) throw std::runtime_error("it is no PNG");
    const std::uint32_t width = big_endian(bytes, 16), height = big_endian(bytes, 20);
    if (width < 1 || height < 1 || width > MAX_SIDE || height > MAX_SIDE) throw std::runtime_error("its size is unusual");
    if (bytes[24] != 8 || bytes[25] != 2 || bytes[28] != 0) throw std::runtime_error("it is no plain 8-bit RGB");
    const std::size_t row = PIXEL * width, whole = (row + 1) * height;
    std::string raw;
    Inflate inflate(Inflate::ZLIB);
    const Sink sink = [&](const char *data, std::size_t size) {
        if (size > whole - raw.size()) throw std::runtime_error("it holds more than its size");
        raw.append(data, size);
    };
    for (std::size_t at = 8; at + 12 <= bytes.size();) {
        const std::size_t size = big_endian(bytes, at);
        if (size > bytes.size() - at - 12) throw std::runtime_error("it ends too soon");
        if (bytes.compare(at + 4, 4, "IDAT") == 0 && !inflate.add(bytes.data() + at + 8, size, sink)) throw std::runtime_error(inflate.reason());
        at += size + 12;
    }
    if (raw.size() != whole) throw std::runtime_error("it ends too soon");
    Picture picture{static_cast<int>(width), static_cast<int>(height), std::vector<std::uint8_t>(row * height)};
    for (std::size_t y = 0; y < height; y++) {
        const int filter = static_cast<unsigned char>(raw[y * (row + 1)]);
        if (filter > 4) throw std::runtime_error("it has an unknown filter");
        std::uint8_t *const here = &picture.rgb[y * row];
        for (std::size_t i = 0; i < row; i++) here[i] = static_cast<std::uint8_t>(raw[y * (row + 1) + 1 + i]);
        unfilter(filter, here, y > 0 ? here - row : nullptr, row);
    }
    return picture;
}

}  // namespace evm
