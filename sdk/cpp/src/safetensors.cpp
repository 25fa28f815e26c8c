#include "safetensors.h"

#include "json.h"

namespace evm {
namespace {

const std::map<std::string, std::pair<const char *, std::uint64_t>> DTYPES = {
    {"U8", {"uint8", 1}}, {"I8", {"int8", 1}}, {"F16", {"float16", 2}}, {"F32", {"float32", 4}}, {"F64", {"float64", 8}}, {"I32", {"int32", 4}}, {"I64", {"int64", 8}}};

Tensor tensor_of(const std::string &name, const Json &facts, const std::string &bytes, std::uint64_t start) {
    const auto found = DTYPES.find(facts.at("dtype").get<std::string>());
    if (found == DTYPES.end()) throw std::runtime_error(name + " has an unknown dtype");
    const auto [dtype, width] = found->second;
    const std::vector<std::uint64_t> offsets = facts.at("data_offsets").get<std::vector<std::uint64_t>>();
    const std::uint64_t room = bytes.size() - start;
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > room) throw std::runtime_error(name + " lies outside the file");
    Tensor tensor{dtype, {}, {}};
    std::uint64_t size = width;
    for (const std::uint64_t extent : facts.at("shape").get<std::vector<std::uint64_t>>()) {
        if (extent > 0 && size > room / extent) throw std::runtime_error(name + " is larger than the file");
        size *= extent;
        tensor.shape.push_back(static_cast<std::int64_t>(extent));
    }
    if (size != offsets[1] - offsets[0]) throw std::runtime_error(name + " has a size that differs from its shape");
    const auto data = bytes.begin() + static_cast<std::ptrdiff_t>(start + offsets[0]);
    tensor.bytes.assign(data, data + static_cast<std::ptrdiff_t>(size));
    return tensor;
}

}  // namespace

Tensors read_safetensors(const std::string &bytes) {
    std::uint64_t length = 0;
    if (bytes.size() < 8) throw std::runtime_error("the file ends inside its header");
    for (std::size_t i = 8; i-- > 0;) length = length << 8 | static_cast<unsigned char>(bytes[i]);
    if (length > bytes.size() - 8) throw std::runtime_error("the file ends inside its header");
    Tensors tensors;
    try {
        const Json header = parse_json(bytes.substr(8, static_cast<std::size_t>(length)));
        if (!header.is_object()) throw std::runtime_error("the header is not a JSON object");
        for (const auto &[name, facts] : header.items())
            if (name != "__metadata__") tensors[name] = tensor_of(name, facts, bytes, 8 + length);
    } catch (const Json::exception &error) {
        throw std::runtime_error(std::string("the header is invalid: ") + error.what());
    }
    return tensors;
}

}  // namespace evm
