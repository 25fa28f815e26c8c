// Formatting of texts for messages.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace evm {

// Return a string in quotes, with control characters escaped.
std::string in_quotes(const std::string &text);
std::string join(const std::vector<std::string> &parts, const char *between = ", ");
// Split a text at a character; empty parts are left out.
std::vector<std::string> split(const std::string &text, char at);
// Quote a text so that a POSIX shell takes it for one word, and not for a flag.
std::string shell_word(const std::string &text);
// Format a shape, such as "[1, 224, 224, 3]".
std::string shape_text(const std::vector<std::int64_t> &shape);

}  // namespace evm
