// Parser of JSON from untrusted files. The nesting is limited to DEPTH. NaN and Infinity, which Python writes, are read as null.
#pragma once
#include <nlohmann/json.hpp>

#include <string>

namespace evm {

using Json = nlohmann::json;

// Parse a text. Throws std::runtime_error with the reason.
Json parse_json(const std::string &text);

}  // namespace evm
