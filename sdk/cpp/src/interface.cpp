#include "interface.h"

#include "json.h"
#include "text.h"

#include <algorithm>

namespace evm {
namespace {

const TensorSpec *find(const std::vector<TensorSpec> &specs, const std::string &name) {
    const auto found = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec &spec) { return spec.name == name; });
    return found == specs.end() ? nullptr : &*found;
}

// Test whether two specs agree. An unknown size agrees with any size.
bool alike(const TensorSpec &have, const TensorSpec &want) {
    const auto same = [](std::int64_t a, std::int64_t b) { return a < 0 || b < 0 || a == b; };
    return have.name == want.name && have.dtype == want.dtype &&
           std::equal(have.shape.begin(), have.shape.end(), want.shape.begin(), want.shape.end(), same);
}

std::string specs_text(const std::vector<TensorSpec> &specs) {
    std::vector<std::string> texts;
    for (const TensorSpec &spec : specs) texts.push_back(spec_text(spec));
    return join(texts);
}

BundleError unlike(const Source &source, const Manifest &manifest, const std::string &have, const std::string &want) {
    return BundleError("bundle " + source.path + ": " + manifest.artifact + " has " + have + "; " + want, "export it again", {"model.interface", manifest.artifact});
}

}  // namespace

std::vector<std::string> read_labels(const Source &source, const Manifest &manifest) {
    const auto is_labels = [](const auto &file) { return file.first == "labels.txt"; };
    if (std::none_of(manifest.files.begin(), manifest.files.end(), is_labels)) return {};
    std::vector<std::string> labels;
    std::string text = source.bytes("labels.txt");
    try {
        Json(text).dump();  // fails unless the text is UTF-8
    } catch (const Json::exception &) {
        throw BundleError("bundle " + source.path + ": labels.txt is not UTF-8 text", "export it again", {"file.damaged", "labels.txt"});
    }
    text.erase(std::remove(text.begin(), text.end(), '\r'), text.end());
    for (std::size_t start = 0; start < text.size();) {
        const std::size_t end = std::min(text.find('\n', start), text.size());
        labels.push_back(text.substr(start, end - start));
        start = end + 1;
    }
    return labels;
}

void check_interface(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const Runtime &runtime) {
    std::vector<TensorSpec> have = runtime.inputs, want = manifest.inputs;
    have.insert(have.end(), runtime.outputs.begin(), runtime.outputs.end());
    want.insert(want.end(), manifest.outputs.begin(), manifest.outputs.end());
    if (!std::equal(have.begin(), have.end(), want.begin(), want.end(), alike))
        throw unlike(source, manifest, specs_text(have), "the manifest says " + specs_text(want));
    if (runtime.inputs.size() != 1) throw unlike(source, manifest, specs_text(have), "the model of a bundle must have one input");
    if (!manifest.classifies()) return;
    const TensorSpec *const scores = find(runtime.outputs, manifest.head);
    if (!scores) throw unlike(source, manifest, specs_text(have), "a classifier must have the output " + manifest.head);
    check_scores(source, manifest, labels, *scores);
}

void check_scores(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const TensorSpec &scores) {
    const std::vector<std::int64_t> &shape = scores.shape;
    if (scores.dtype != "float32" || shape.size() != 2 || std::count(shape.begin(), shape.end(), 0))
        throw unlike(source, manifest, spec_text(scores), "a classifier must return rows of float32 scores");
    if (!labels.empty() && shape[1] >= 0 && static_cast<std::uint64_t>(shape[1]) != labels.size())
        throw unlike(source, manifest, std::to_string(shape[1]) + " classes", "labels.txt has " + std::to_string(labels.size()));
}

}  // namespace evm
