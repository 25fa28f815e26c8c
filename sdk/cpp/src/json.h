// JSON of files that may come from anybody: no deeper than DEPTH, NaN and Infinity, which Python writes, read as null.
#pragma once
#include <nlohmann/json.hpp>

#include <string>

namespace evm {

using Json = nlohmann::json;

// Raises std::runtime_error with the reason.
Json parse_json(const std::string &text);

}  // namespace evm
