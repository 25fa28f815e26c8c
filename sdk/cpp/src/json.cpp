#include "json.h"

#include <stdexcept>

namespace evm {
namespace {

constexpr int DEPTH = 100;

// Replace NaN, Infinity and -Infinity outside of strings by null.
std::string strict(const std::string &text) {
    std::string result;
    bool inside = false;
    for (std::size_t i = 0; i < text.size(); i++) {
        if (inside && text[i] == '\\' && i + 1 < text.size()) result += text[i++];
        else if (text[i] == '"') inside = !inside;
        else if (!inside) {
            const char *found = nullptr;
            for (const char *word : {"NaN", "Infinity", "-Infinity"})
                if (text.compare(i, std::string(word).size(), word) == 0) found = word;
            if (found) {
                result += "null";
                i += std::string(found).size() - 1;
                continue;
            }
        }
        result += text[i];
    }
    return result;
}

}  // namespace

Json parse_json(const std::string &text) {
    const auto shallow = [](int depth, Json::parse_event_t, Json &) {
        if (depth > DEPTH) throw std::runtime_error("nested too deeply");
        return true;
    };
    try {
        return Json::parse(strict(text), shallow);
    } catch (const Json::exception &error) {
        const std::string message = error.what();  // [json.exception.parse_error.101] ..
        throw std::runtime_error(message.substr(message.find("] ") + 2));
    }
}

}  // namespace evm
