#include "draw.h"

#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#include <stb_easy_font.h>
#include <stb_image_write.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>

namespace {

using Colour = std::array<unsigned char, 3>;

// The colours of evm_deploy/tasks/drawing.py
constexpr std::array<Colour, 20> PALETTE{{{230, 25, 75}, {60, 180, 75}, {255, 225, 25}, {0, 130, 200}, {245, 130, 48}, {145, 30, 180}, {70, 240, 240},
                                          {240, 50, 230}, {210, 245, 60}, {250, 190, 212}, {0, 128, 128}, {220, 190, 255}, {170, 110, 40}, {255, 250, 200},
                                          {128, 0, 0}, {170, 255, 195}, {128, 128, 0}, {255, 215, 180}, {0, 0, 128}, {128, 128, 128}}};
constexpr double LINE_SHARE = 0.003, TEXT_SHARE = 0.022;  // of the mean side of the image
constexpr int LETTER = 8, LEAST_TEXT = 11;                // pixels of a letter of the font; least height of a letter

const Colour &colour_of(int index) { return PALETTE[static_cast<size_t>(index) % PALETTE.size()]; }

// Fill a rectangle, from (x1, y1) to before (x2, y2), where it lies in the image.
void fill(RgbImage &image, int x1, int y1, int x2, int y2, const Colour &colour) {
    x1 = std::max(x1, 0), y1 = std::max(y1, 0), x2 = std::min(x2, image.width), y2 = std::min(y2, image.height);
    for (int y = y1; y < y2; y++)
        for (int x = x1; x < x2; x++)
            std::copy(colour.begin(), colour.end(), &image.rgb[3 * (static_cast<size_t>(y) * static_cast<size_t>(image.width) + static_cast<size_t>(x))]);
}

void write(RgbImage &image, int x, int y, std::string text, int scale, const Colour &colour) {
    std::vector<std::array<float, 4>> corners(270 * text.size());  // x, y, z and colour; a letter needs at most 270 bytes
    const int quads = stb_easy_font_print(0, 0, text.data(), nullptr, corners.data(), static_cast<int>(corners.size() * sizeof corners[0]));
    for (size_t i = 0; i < 4 * static_cast<size_t>(quads); i += 4) {
        const auto at = [&](size_t corner, size_t axis) { return static_cast<int>(corners[i + corner][axis]) * scale; };
        fill(image, x + at(0, 0), y + at(0, 1), x + at(2, 0), y + at(2, 1), colour);
    }
}

// Write name and score on a filled tag above the box, or inside it where the image ends.
void tag(RgbImage &image, const evm::Detection &each, int x, int y, int scale) {
    const bool ascii = std::all_of(each.label.begin(), each.label.end(), [](char c) { return c >= ' ' && c <= '~'; });
    char score[16];
    std::snprintf(score, sizeof score, " %.2f", each.score);
    std::string text = (ascii ? each.label : "#" + std::to_string(each.index)) + score;
    const int wide = stb_easy_font_width(text.data()) * scale + 4, high = LETTER * scale + 4;
    x = std::max(0, std::min(x, image.width - wide));
    y = y >= high ? y - high : y;
    const Colour &colour = colour_of(each.index);
    fill(image, x, y, x + wide, y + high, colour);
    const bool light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140;
    write(image, x + 2, y + 2, text, scale, light ? Colour{0, 0, 0} : Colour{255, 255, 255});
}

}  // namespace

void draw(RgbImage &image, const std::vector<evm::Detection> &found) {
    const double mean_side = (image.width + image.height) / 2.0;
    const int line = std::max(1, static_cast<int>(std::lround(LINE_SHARE * mean_side)));
    const int scale = std::max(1, static_cast<int>(std::lround(std::max<double>(LEAST_TEXT, TEXT_SHARE * mean_side) / LETTER)));
    for (auto each = found.rbegin(); each != found.rend(); ++each) {
        const auto side = [&](size_t i) { return static_cast<int>(std::lround(std::clamp<double>(each->box[i], 0, i % 2 ? image.height : image.width))); };
        const int x1 = side(0), y1 = side(1), x2 = std::max(side(2), x1 + 1), y2 = std::max(side(3), y1 + 1);
        const Colour &colour = colour_of(each->index);
        fill(image, x1, y1, x2, y1 + line, colour), fill(image, x1, y2 - line, x2, y2, colour);
        fill(image, x1, y1, x1 + line, y2, colour), fill(image, x2 - line, y1, x2, y2, colour);
        tag(image, *each, x1, y1, scale);
    }
}

void draw(RgbImage &image, const evm::LabelMap &found, const std::vector<std::array<std::uint8_t, 3>> &palette) {
    for (int y = 0; y < image.height; y++)
        for (int x = 0; x < image.width; x++) {
            unsigned char *const pixel = &image.rgb[3 * (static_cast<size_t>(y) * static_cast<size_t>(image.width) + static_cast<size_t>(x))];
            const size_t index = static_cast<size_t>(found.at(x, y));
            const Colour &colour = palette.empty() ? colour_of(found.at(x, y)) : palette[index % palette.size()];
            for (size_t i = 0; i < 3; i++) pixel[i] = static_cast<unsigned char>((pixel[i] + colour[i]) / 2);
        }
}

std::filesystem::path save(const RgbImage &image, const std::filesystem::path &folder) {
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    const std::string stem = std::filesystem::path(image.name).stem().string();
    std::filesystem::path path = folder / (stem + ".png");
    for (int number = 2; std::filesystem::exists(path, error); number++) path = folder / (stem + "-" + std::to_string(number) + ".png");
    std::ofstream file(path, std::ios::binary);
    const auto put = [](void *to, void *data, int size) { static_cast<std::ofstream *>(to)->write(static_cast<const char *>(data), size); };
    const bool written = stbi_write_png_to_func(put, &file, image.width, image.height, 3, image.rgb.data(), 3 * image.width) && file.flush();
    if (!written) throw evm::UsageError("--save " + folder.string() + " cannot be written", "give another folder");
    return path;
}
