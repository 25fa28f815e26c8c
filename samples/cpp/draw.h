// Drawing of detections and label maps on images, and writing of PNG files, as evm-run --save does.
#pragma once
#include "image.h"

#include <filesystem>

// Draw the box, name and score of each detection; the best is on top. A name that the font (ASCII) cannot write becomes the number of its
// class, such as #7.
void draw(RgbImage &image, const std::vector<evm::Detection> &found);
// Draw a label map of the size of the image, half transparent. palette: of the manifest; empty: fixed colours.
void draw(RgbImage &image, const evm::LabelMap &found, const std::vector<std::array<std::uint8_t, 3>> &palette);

// Write an image as PNG into a folder, under the name of its file; an existing file is not replaced (a-2.png). Returns the path. Throws
// evm::UsageError if the folder cannot be written.
std::filesystem::path save(const RgbImage &image, const std::filesystem::path &folder);
