#include "text.h"

#include "json.h"

#include <cstdint>

namespace evm {

std::string in_quotes(const std::string &text) { return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string join(const std::vector<std::string> &parts, const char *between) {
    std::string result;
    for (const std::string &part : parts) result += (&part == &parts.front() ? "" : between) + part;
    return result;
}

std::vector<std::string> split(const std::string &text, char at) {
    std::vector<std::string> parts;
    for (std::size_t start = 0; start <= text.size();) {
        const std::size_t end = std::min(text.find(at, start), text.size());
        if (end > start) parts.push_back(text.substr(start, end - start));
        start = end + 1;
    }
    return parts;
}

std::string shape_text(const std::vector<std::int64_t> &shape) {
    std::vector<std::string> sizes;
    for (const std::int64_t size : shape) sizes.push_back(size < 0 ? "batch" : std::to_string(size));
    return "[" + join(sizes) + "]";
}

std::string shell_word(const std::string &text) {
    const std::string path = text.rfind('-', 0) == 0 ? "./" + text : text;
    const bool plain = path.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./-_") == std::string::npos;
    if (plain && !path.empty()) return path;
    std::string quoted = "'";
    for (const char c : path) quoted += c == '\'' ? std::string("'\"'\"'") : std::string(1, c);
    return quoted + "'";
}

}  // namespace evm
