// Texts as Python writes them, so that messages are the same.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

namespace evm {

// A string in quotes, control characters escaped.
std::string repr(const std::string &text);
// A path without its last slash, doubled ones and `.`, as pathlib shows it.
std::string shown(const std::filesystem::path &path);
std::string join(const std::vector<std::string> &parts, const char *between = ", ");
// The non-empty parts of a text.
std::vector<std::string> split(const std::string &text, char at);
// [1, 224, 224, 3]
std::string shape_text(const std::vector<std::int64_t> &shape);

}  // namespace evm
