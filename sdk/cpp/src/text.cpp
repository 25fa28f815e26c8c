#include "text.h"

#include <cstdint>
#include <cstdio>

namespace evm {

std::string repr(const std::string &text) {
    const bool single = text.find('\'') != std::string::npos && text.find('"') == std::string::npos;
    const char quote = single ? '"' : '\'';
    std::string result(1, quote);
    for (const char c : text) {
        const unsigned char byte = static_cast<unsigned char>(c);
        if (c == quote || c == '\\') result += std::string("\\") + c;
        else if (c == '\n') result += "\\n";
        else if (c == '\r') result += "\\r";
        else if (c == '\t') result += "\\t";
        else if (byte < 0x20 || byte == 0x7f) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\x%02x", byte);
            result += escaped;
        } else result += c;
    }
    return result + quote;
}

std::string shown(const std::filesystem::path &path) {
    std::filesystem::path plain = path.root_path();
    for (const std::filesystem::path &part : path.relative_path())
        if (!part.empty() && part != ".") plain /= part;
    return plain.empty() ? "." : plain.string();
}

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

}  // namespace evm
