// Texts for messages.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace evm {

// A string in quotes, control characters escaped.
std::string in_quotes(const std::string &text);
std::string join(const std::vector<std::string> &parts, const char *between = ", ");
// The non-empty parts of a text.
std::vector<std::string> split(const std::string &text, char at);
// [1, 224, 224, 3]
std::string shape_text(const std::vector<std::int64_t> &shape);

}  // namespace evm
