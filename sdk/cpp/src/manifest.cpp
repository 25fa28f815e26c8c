#include "manifest.h"

#include "json.h"
#include "signature.h"
#include "text.h"

#include <algorithm>

namespace evm {
namespace {

constexpr int SCHEMA_VERSION = 1;
constexpr std::uint64_t MAX_MANIFEST = 4 << 20;
constexpr int MAX_SIDE = 8192, MAX_CHANNELS = 1024, MAX_DETECTIONS = 1000;
constexpr const char *FILE_NAME = "manifest.json";

constexpr double HUGE_NUMBER = 1e15;  // bound of all numbers
const Json NOTHING;                   // the value of a missing key

std::string printed(const Json &json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 60); }

// Error in a manifest, with its key path; becomes a BundleError.
struct Invalid : std::runtime_error {
    std::string where;
    Invalid(const std::string &path, const std::string &what) : std::runtime_error(path + " " + what), where(path) {}
};

// A JSON value and its key path. The functions convert the value, and throw Invalid if it has another type or is out of range.
struct Value {
    const Json &json;
    std::string where;

    void require(bool good, const std::string &wanted) const {
        if (!good) throw Invalid(where, "must be " + wanted + ", is " + printed(json));
    }
    Value at(const std::string &key) const {
        require(json.is_object(), "an object");
        const auto found = json.find(key);
        return {found == json.end() ? NOTHING : *found, where.empty() ? key : where + "." + key};
    }
    std::vector<std::pair<std::string, Value>> members() const {
        require(json.is_object(), "an object");
        std::vector<std::pair<std::string, Value>> found;
        for (const auto &member : json.items()) found.emplace_back(member.key(), at(member.key()));
        return found;
    }
    std::vector<Value> items(std::size_t least, std::size_t most) const {
        require(json.is_array() && least <= json.size() && json.size() <= most, "a list of " + std::to_string(least) + (most > least ? " or more" : ""));
        std::vector<Value> found;
        for (std::size_t i = 0; i < json.size(); i++) found.push_back({json[i], where + "[" + std::to_string(i) + "]"});
        return found;
    }
    std::string text() const {
        require(json.is_string(), "text");
        return json.get<std::string>();
    }
    std::string one_of(const std::vector<std::string> &choices) const {
        require(json.is_string() && std::count(choices.begin(), choices.end(), json.get<std::string>()), "one of " + join(choices));
        return json.get<std::string>();
    }
    double number(double least = -HUGE_NUMBER, double most = HUGE_NUMBER) const {
        require(json.is_number() && json >= least && json <= most, "a finite number");
        return json.get<double>();
    }
    double positive(double most = HUGE_NUMBER) const {
        require(number(0, most) > 0, "above 0");
        return json.get<double>();
    }
    std::int64_t count(double most = HUGE_NUMBER) const {
        require(json.is_number_integer() && json >= 1 && json <= most, "a whole number from 1");
        return json.get<std::int64_t>();
    }
    bool flag(bool otherwise) const {
        require(&json == &NOTHING || json.is_boolean(), "true or false");
        return json.is_boolean() ? json.get<bool>() : otherwise;
    }
};

std::vector<double> channels(const Value &value, bool positive) {
    std::vector<double> found;
    for (const Value &item : value.items(1, MAX_CHANNELS)) found.push_back(positive ? item.positive() : item.number());
    return found;
}

Preprocessing preprocessing_of(const Value &value) {
    Preprocessing result;
    const std::vector<Value> size = value.at("size").items(2, 2);
    result.height = static_cast<int>(size[0].count(MAX_SIDE)), result.width = static_cast<int>(size[1].count(MAX_SIDE));
    const Value resize = value.at("resize");
    if (&resize.json != &NOTHING) result.resize = resize.one_of({"crop", "stretch", "pad"});  // absent in older bundles
    if (result.resize == "crop") result.crop_pct = value.at("crop_pct").positive(1);
    result.interpolation = value.at("interpolation").one_of({"bicubic", "bilinear", "bilinear-opencv"});
    result.mean = channels(value.at("mean"), false), result.std_dev = channels(value.at("std"), true);
    value.at("std").require(result.std_dev.size() == result.mean.size(), "as many values as mean");
    return result;
}

// Read the settings of a detector's selection. Other bundles have null, older ones nothing.
Selection selection_of(const Value &plan) {
    Selection result;
    const Value iou = plan.at("iou"), most = plan.at("max_det");
    if (!iou.json.is_null()) result.iou = iou.positive(1);
    if (!most.json.is_null()) result.max_det = static_cast<int>(most.count(MAX_DETECTIONS));
    return result;
}

// Read the colours of a segmenter's classes; empty if the manifest has none.
std::vector<std::array<std::uint8_t, 3>> palette_of(const Value &model) {
    const Value details = model.json.is_null() ? model : model.at("details"), palette = details.json.is_null() ? details : details.at("palette");
    std::vector<std::array<std::uint8_t, 3>> found;
    if (palette.json.is_null()) return found;
    for (const Value &colour : palette.items(0, MAX_MANIFEST)) {
        found.push_back({});
        const std::vector<Value> parts = colour.items(3, 3);
        for (std::size_t i = 0; i < 3; i++) found.back()[i] = static_cast<std::uint8_t>(parts[i].number(0, 255));
    }
    return found;
}

// Read the batch: `4`, `dynamic` or `min:opt:max`.
void read_batch(const Value &value, Manifest &manifest) {
    const std::string batch = value.text();
    if (batch == "dynamic") {
        manifest.batch_min = 1, manifest.batch_max = 0;
        return;
    }
    std::vector<int> sizes;
    for (const std::string &part : split(batch, ':'))
        if (part.size() <= 5 && part.find_first_not_of("0123456789") == std::string::npos) sizes.push_back(std::stoi(part));
    const std::size_t parts = static_cast<std::size_t>(std::count(batch.begin(), batch.end(), ':')) + 1;
    const bool good = sizes.size() == parts && (parts == 1 || parts == 3) && 1 <= sizes[0] && std::is_sorted(sizes.begin(), sizes.end());
    value.require(good, "a number from 1, dynamic, or min:opt:max such as 1:4:8");
    manifest.batch_min = sizes.front(), manifest.batch_max = sizes.back();
}

std::vector<TensorSpec> tensors(const Value &value) {
    std::vector<TensorSpec> found;
    for (const Value &each : value.items(1, MAX_MANIFEST)) {
        TensorSpec spec{each.at("name").text(), each.at("dtype").text(), {}};
        for (const Value &size : each.at("shape").items(1, MAX_MANIFEST)) spec.shape.push_back(size.json.is_null() ? -1 : size.count());
        found.push_back(spec);
    }
    return found;
}

void read_files(const Value &value, Manifest &manifest) {
    for (const auto &[name, facts] : value.members()) {
        if (!inside_bundle(name)) throw Invalid(facts.where, "leaves the bundle");
        const Value hash = facts.at("sha256");
        const std::string text = hash.text();
        hash.require(text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos, "a sha256");
        manifest.files.emplace_back(name, text);
    }
}

template <class Test>
void require_file(const Manifest &manifest, const Value &value, Test test) {
    value.require(std::any_of(manifest.files.begin(), manifest.files.end(), [&](const auto &file) { return test(file.first); }), "among the files");
}

void read_scan(const Value &value, Manifest &manifest) {
    manifest.scan_modes = split(value.at("value").text(), '+');
    if (value.at("plugins").json.is_null()) return;
    for (const auto &[platform, library] : value.at("plugins").members()) {
        const std::string path = library.text();
        require_file(manifest, library, [&](const std::string &name) { return name == path; });
        manifest.plugins[platform] = path;
    }
}

std::map<std::string, double> limits_by_name(const Value &value) {
    std::map<std::string, double> found;
    for (const auto &[name, limit] : value.members()) found[name] = limit.number(0);
    return found;
}

// Read the limits of the self-test. Older bundles have only the limit of the parity.
Limits limits_of(const Value &manifest) {
    Limits limits;
    limits.otherwise = manifest.at("parity").at("limit").number(0);
    const Value selftest = manifest.at("selftest");
    if (&selftest.json == &NOTHING || selftest.members().empty()) return limits;
    limits.preprocessing = selftest.at("preprocessing").number(0);
    if (!selftest.at("apart").json.is_null()) limits.apart = selftest.at("apart").number(0);
    limits.outputs = limits_by_name(selftest.at("outputs")), limits.scans = limits_by_name(selftest.at("scans"));
    return limits;
}

Manifest manifest_of(const Value &content) {
    Manifest manifest;
    const Value plan = content.at("plan");
    manifest.name = content.at("name").text(), manifest.target = content.at("target").text(), manifest.artifact = content.at("artifact").text();
    manifest.built = content.at("built").flag(true), manifest.rejected = content.at("rejected").flag(false);
    read_batch(plan.at("batch"), manifest);
    manifest.precision = plan.at("precision").text();
    manifest.input = plan.at("input").one_of({"image", "tensor"});
    manifest.head = plan.at("head").one_of({"logits", "probs", "features", "raw", "detections", "label_map"});
    manifest.selection = selection_of(plan);
    manifest.inputs = tensors(content.at("inputs")), manifest.outputs = tensors(content.at("outputs"));
    manifest.preprocessing = preprocessing_of(content.at("preprocessing"));
    manifest.palette = palette_of(content.at("model"));
    read_files(content.at("files"), manifest);
    require_file(manifest, content.at("artifact"), [&](const std::string &name) { return name == manifest.artifact || name.rfind(manifest.artifact + "/", 0) == 0; });
    read_scan(content.at("scan"), manifest);
    manifest.limits = limits_of(content);
    return manifest;
}

std::string failures_of(const std::string &json) {
    const Json content = parse_json(json);
    std::vector<std::string> failures;
    const Json parity = content.value("parity", Json::object());
    if (parity.is_object() && parity.contains("failures") && parity["failures"].is_array())
        for (const Json &failure : parity["failures"]) failures.push_back(failure.is_string() ? failure.get<std::string>() : printed(failure));
    return join(failures, "; ");
}

}  // namespace

Manifest read_manifest(const Source &source, const std::filesystem::path &signed_by) {
    const std::string path = source.path + "/" + FILE_NAME;
    Json content;
    Manifest manifest;
    std::string json;
    try {
        if (source.size(FILE_NAME) > MAX_MANIFEST) throw BundleError(path + " is larger than " + std::to_string(MAX_MANIFEST) + " bytes: not a manifest", "", {"manifest.damaged"});
        json = source.bytes(FILE_NAME);
    } catch (const ReadError &error) {
        if (error.missing) throw BundleError(source.path + " is not a bundle: no " + FILE_NAME + " inside", "make one with evm-export", {"manifest.missing"});
        throw BundleError(path + " cannot be read: " + error.what(), "", {"manifest.missing"});
    }
    if (!signed_by.empty()) check_signature(source, json, signed_by);
    try {
        content = parse_json(json);
    } catch (const std::runtime_error &error) {
        throw BundleError(path + " is damaged: " + error.what(), "export the bundle again", {"manifest.damaged"});
    }
    if (!content.is_object()) throw BundleError(path + " is not a JSON object", "", {"manifest.damaged"});
    try {
        const Value root{content, ""};
        if (root.at("schema_version").count() > SCHEMA_VERSION)
            throw BundleError(source.path + " has manifest schema " + printed(content["schema_version"]) + "; this SDK reads versions up to " + std::to_string(SCHEMA_VERSION),
                              "upgrade the SDK", {"manifest.version", "schema_version"});
        manifest = manifest_of(root);
    } catch (const Invalid &error) {
        throw BundleError(path + " is not a valid manifest: " + error.what(), "export the bundle again", {"manifest.invalid", error.where});
    }
    manifest.json = json;
    return manifest;
}

void check_bundle(const Source &source, const Manifest &manifest) {
    const std::string bundle = "bundle " + source.path;
    if (manifest.rejected) throw BundleError(bundle + " was rejected at export: " + failures_of(manifest.json), "", {"bundle.rejected"});
    for (const auto &[name, sha256] : manifest.files) {
        std::string hash;
        try {
            hash = source.sha256(name);
        } catch (const ReadError &error) {
            if (error.missing) throw BundleError(bundle + ": " + name + " is missing", "copy the whole bundle again", {"file.missing", name});
            throw BundleError(bundle + ": " + name + " cannot be read: " + error.what(), "", {"file.missing", name});
        }
        if (hash != sha256) throw BundleError(bundle + ": " + name + " is damaged (its sha256 differs)", "copy the bundle again", {"file.damaged", name});
    }
}

}  // namespace evm
