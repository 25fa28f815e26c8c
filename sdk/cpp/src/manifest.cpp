#include "manifest.h"

#include "json.h"
#include "text.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

constexpr int SCHEMA_VERSION = 1;
constexpr std::uint64_t MAX_MANIFEST = 4 << 20;
constexpr int MAX_SIDE = 8192;
constexpr const char *FILE_NAME = "manifest.json";

// What is wrong in a manifest; becomes a BundleError.
struct Invalid : std::runtime_error {
    using std::runtime_error::runtime_error;
};

const Json &field(const Json &object, const char *key) {
    const auto found = object.find(key);
    if (found == object.end()) throw Invalid("it has no " + repr(key));
    return *found;
}

std::string text(const Json &object, const char *key) {
    const Json &value = field(object, key);
    if (!value.is_string()) throw Invalid(std::string(key) + " is no text");
    return value.get<std::string>();
}

std::string one_of(const Json &object, const char *key, const std::vector<std::string> &choices) {
    const std::string value = text(object, key);
    if (std::find(choices.begin(), choices.end(), value) == choices.end())
        throw Invalid("--" + std::string(key) + " " + repr(value) + " is unknown; choose from: " + join(choices));
    return value;
}

const Json &object(const Json &parent, const char *key) {
    const Json &value = field(parent, key);
    if (!value.is_object()) throw Invalid(std::string(key) + " is no object");
    return value;
}

// A number or list as Python prints it.
std::string printed(const Json &value) {
    if (!value.is_array()) return value.dump(-1, ' ', false, Json::error_handler_t::replace);
    std::vector<std::string> parts;
    for (const Json &part : value) parts.push_back(printed(part));
    return "[" + join(parts) + "]";
}

std::array<double, 3> channels(const Json &values, const char *name) {
    const bool numbers = values.is_array() && values.size() == 3 && std::all_of(values.begin(), values.end(), [](const Json &value) {
        return value.is_number() && std::isfinite(value.get<double>());
    });
    if (!numbers) throw Invalid(std::string(name) + " is " + printed(values) + ", it must be three finite numbers");
    return values.get<std::array<double, 3>>();
}

Preprocessing preprocessing_of(const Json &values) {
    Preprocessing result;
    const Json &size = field(values, "size");
    const auto side = [](const Json &value) { return value.is_number_integer() && value >= 1 && value <= MAX_SIDE; };
    if (!size.is_array() || size.size() != 2 || !side(size[0]) || !side(size[1]))
        throw Invalid("size is " + printed(size) + ", it must be [H, W] of 1 to " + std::to_string(MAX_SIDE) + " pixels");
    result.height = size[0].get<int>(), result.width = size[1].get<int>();
    if (values.contains("crop_pct")) {
        const Json &crop = values["crop_pct"];
        if (!crop.is_number() || !(crop > 0) || !(crop <= 1)) throw Invalid("crop_pct is " + printed(crop) + ", it must be over 0 and at most 1");
        result.crop_pct = crop.get<double>();
    }
    if (values.contains("interpolation")) {
        result.interpolation = text(values, "interpolation");
        if (result.interpolation != "bicubic" && result.interpolation != "bilinear")
            throw Invalid("interpolation is '" + result.interpolation + "', choose from: bicubic, bilinear");
    }
    if (values.contains("mean")) result.mean = channels(values["mean"], "mean");
    if (values.contains("std")) {
        result.std_dev = channels(values["std"], "std");
        if (*std::min_element(result.std_dev.begin(), result.std_dev.end()) <= 0) throw Invalid("std is " + printed(values["std"]) + ", it must be positive");
    }
    return result;
}

// `4`, `dynamic` or `min:opt:max`.
void read_batch(const Json &plan, Manifest &manifest) {
    const Json &value = field(plan, "batch");
    const std::string batch = value.is_string() ? value.get<std::string>() : printed(value);
    if (batch == "dynamic") {
        manifest.batch_min = 1, manifest.batch_max = 0;
        return;
    }
    std::vector<int> sizes;
    for (const std::string &part : split(batch, ':'))
        if (part.size() <= 5 && part.find_first_not_of("0123456789") == std::string::npos) sizes.push_back(std::stoi(part));
    const std::size_t parts = static_cast<std::size_t>(std::count(batch.begin(), batch.end(), ':')) + 1;
    if (sizes.size() == parts && (parts == 1 || parts == 3) && 1 <= sizes[0] && std::is_sorted(sizes.begin(), sizes.end())) {
        manifest.batch_min = sizes.front(), manifest.batch_max = sizes.back();
        return;
    }
    throw Invalid("--batch " + repr(batch) + ": use a number from 1, 'dynamic', or min:opt:max such as 1:4:8");
}

void read_plan(const Json &plan, Manifest &manifest) {
    read_batch(plan, manifest);
    manifest.precision = text(plan, "precision");
    manifest.input = one_of(plan, "input", {"image", "tensor"});
    manifest.head = one_of(plan, "head", {"logits", "probs", "features"});
}

double limit(const Json &object, const char *key) {
    const Json &value = field(object, key);
    if (!value.is_number() || !(value >= 0)) throw Invalid(std::string(key) + " must be a finite number from 0, is " + printed(value));
    return value.get<double>();
}

std::map<std::string, double> limits_by_name(const Json &parent, const char *key) {
    std::map<std::string, double> found;
    const Json &limits = object(parent, key);
    for (const auto &[name, value] : limits.items()) found[name] = limit(limits, name.c_str());
    return found;
}

// Bundles from before limits were data have that of the parity alone.
Limits limits_of(const Json &content) {
    Limits limits;
    limits.otherwise = limit(object(content, "parity"), "limit");
    const Json selftest = content.value("selftest", Json::object());
    if (selftest.is_object() && selftest.empty()) return limits;
    limits.preprocessing = limit(object(content, "selftest"), "preprocessing");
    limits.outputs = limits_by_name(selftest, "outputs"), limits.scans = limits_by_name(selftest, "scans");
    return limits;
}

std::vector<TensorSpec> tensors(const Json &content, const char *key) {
    std::vector<TensorSpec> found;
    const Json &list = field(content, key);
    if (!list.is_array() || list.empty()) throw Invalid(std::string(key) + " must be a list of at least 1");
    for (const Json &each : list) {
        TensorSpec spec{text(each, "name"), text(each, "dtype"), {}};
        for (const Json &size : field(each, "shape")) {
            if (!size.is_null() && !(size.is_number_integer() && size >= 1)) throw Invalid(spec.name + " has a size of " + printed(size));
            spec.shape.push_back(size.is_null() ? -1 : size.get<std::int64_t>());
        }
        found.push_back(spec);
    }
    return found;
}

bool is_hash(const std::string &value) { return value.size() == 64 && value.find_first_not_of("0123456789abcdef") == std::string::npos; }

void read_files(const Json &content, Manifest &manifest) {
    for (const auto &[name, facts] : object(content, "files").items()) {
        if (!inside_bundle(name)) throw Invalid("file name " + repr(name) + " leaves the bundle");
        if (!facts.is_object() || !facts.contains("sha256") || !facts["sha256"].is_string() || !is_hash(facts["sha256"].get<std::string>()))
            throw Invalid(name + " has no sha256");
        manifest.files.emplace_back(name, facts["sha256"].get<std::string>());
    }
}

bool has_file(const Manifest &manifest, const std::string &name) {
    const auto same = [&](const auto &file) { return file.first == name; };
    return std::any_of(manifest.files.begin(), manifest.files.end(), same);
}

void read_scan(const Json &scan, Manifest &manifest) {
    manifest.scan_modes = split(text(scan, "value"), '+');
    if (!scan.contains("plugins")) return;
    for (const auto &[platform, library] : object(scan, "plugins").items()) {
        if (!library.is_string() || !has_file(manifest, library.get<std::string>()))
            throw Invalid("the native library " + printed(library) + " is not among the files");
        manifest.plugins[platform] = library.get<std::string>();
    }
}

Manifest manifest_of(const Json &content) {
    Manifest manifest;
    manifest.name = text(content, "name"), manifest.target = text(content, "target"), manifest.artifact = text(content, "artifact");
    manifest.built = content.value("built", true), manifest.rejected = content.value("rejected", false);
    read_plan(object(content, "plan"), manifest);
    manifest.inputs = tensors(content, "inputs"), manifest.outputs = tensors(content, "outputs");
    manifest.preprocessing = preprocessing_of(object(content, "preprocessing"));
    read_files(content, manifest);
    const auto of_artifact = [&](const auto &file) {
        return file.first == manifest.artifact || file.first.rfind(manifest.artifact + "/", 0) == 0;
    };
    if (std::none_of(manifest.files.begin(), manifest.files.end(), of_artifact))
        throw Invalid("the artifact " + repr(manifest.artifact) + " is not among the files");
    read_scan(object(content, "scan"), manifest);
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

Manifest read_manifest(const Source &source) {
    const std::string path = source.path + "/" + FILE_NAME;
    Json content;
    Manifest manifest;
    std::string json;
    try {
        if (source.size(FILE_NAME) > MAX_MANIFEST) throw BundleError(path + " is larger than " + std::to_string(MAX_MANIFEST) + " bytes: not a manifest");
        json = source.bytes(FILE_NAME);
    } catch (const ReadError &error) {
        if (error.missing) throw BundleError(source.path + " is not a bundle: it has no " + FILE_NAME, "make one with evm-export");
        throw BundleError(path + " cannot be read: " + error.what());
    }
    try {
        content = parse_json(json);
    } catch (const std::runtime_error &error) {
        throw BundleError(path + " is damaged: " + error.what(), "export the bundle again");
    }
    if (!content.is_object()) throw BundleError(path + " is not a JSON object");
    const Json version = content.value("schema_version", Json());
    if (!version.is_number_integer() || version < 1) throw BundleError(path + " has no schema_version");
    if (version > SCHEMA_VERSION)
        throw BundleError(source.path + " has manifest schema " + version.dump() + ", this evm-deploy reads up to " + std::to_string(SCHEMA_VERSION),
                          "upgrade the SDK");
    try {
        manifest = manifest_of(content);
    } catch (const Invalid &error) {
        throw BundleError(path + " is not a valid manifest: " + error.what(), "export the bundle again");
    } catch (const Json::exception &error) {  // a value of another type than it must be
        throw BundleError(path + " is not a valid manifest: " + error.what(), "export the bundle again");
    }
    manifest.json = json;
    return manifest;
}

void check_bundle(const Source &source, const Manifest &manifest) {
    const std::string bundle = "bundle " + source.path;
    if (manifest.rejected) throw BundleError(bundle + " was rejected at export: " + failures_of(manifest.json));
    for (const auto &[name, sha256] : manifest.files) {
        std::string hash;
        try {
            hash = source.sha256(name);
        } catch (const ReadError &error) {
            if (error.missing) throw BundleError(bundle + ": " + name + " is missing", "copy the bundle again, whole");
            throw BundleError(bundle + ": " + name + " cannot be read: " + error.what());
        }
        if (hash != sha256) throw BundleError(bundle + ": " + name + " is damaged (its sha256 differs)", "copy the bundle again");
    }
}

}  // namespace evm
