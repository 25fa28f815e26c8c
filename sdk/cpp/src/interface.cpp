#include "interface.h"

#include "json.h"
#include "text.h"

#include <algorithm>
#include <set>

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

void check_scores(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const TensorSpec &scores) {
    const std::vector<std::int64_t> &shape = scores.shape;
    if (scores.dtype != "float32" || shape.size() != 2 || std::count(shape.begin(), shape.end(), 0))
        throw unlike(source, manifest, spec_text(scores), "a classifier must return rows of float32 scores");
    if (!labels.empty() && shape[1] >= 0 && static_cast<std::uint64_t>(shape[1]) != labels.size())
        throw unlike(source, manifest, std::to_string(shape[1]) + " classes", "labels.txt has " + std::to_string(labels.size()));
}

void check_detections(const Source &source, const Manifest &manifest, const std::vector<TensorSpec> &outputs) {
    static const std::map<std::string, std::pair<const char *, std::size_t>> shapes{
        {"boxes", {"float32", 3}}, {"scores", {"float32", 2}}, {"labels", {"int32", 2}}, {"count", {"int32", 1}}, {"masks", {"float32", 4}}};
    std::set<std::string> names;
    for (const TensorSpec &spec : outputs) names.insert(spec.name);
    static const std::set<std::set<std::string>> known{
        {"boxes", "scores", "labels"}, {"boxes", "scores", "labels", "count"}, {"boxes", "scores", "labels", "count", "masks"}};
    if (!known.count(names) || names.size() != outputs.size())
        throw unlike(source, manifest, specs_text(outputs), "a detector must have boxes, scores, labels and, after its NMS, count, with or without masks");
    std::int64_t rows = -1;
    for (const TensorSpec &spec : outputs) {
        const auto &[dtype, rank] = shapes.at(spec.name);
        const bool empty = std::count(spec.shape.begin(), spec.shape.end(), 0) > 0;
        if (spec.dtype != dtype || spec.shape.size() != rank || empty || (spec.name == "boxes" && spec.shape[2] != 4))
            throw unlike(source, manifest, spec_text(spec), std::string("a detector must have ") + spec.name + " of " + dtype + " with " + std::to_string(rank) + " axes");
        if (rank == 1 || spec.shape[1] < 0) continue;
        if (rows >= 0 && spec.shape[1] != rows) throw unlike(source, manifest, specs_text(outputs), "a detector must have as many scores and labels as boxes");
        rows = spec.shape[1];
    }
}

void check_label_map(const Source &source, const Manifest &manifest, const std::vector<TensorSpec> &outputs) {
    const TensorSpec *const map = outputs.size() == 1 ? find(outputs, manifest.head) : nullptr;
    const Preprocessing &spec = manifest.preprocessing;
    const std::vector<std::int64_t> size{map && !map->shape.empty() ? map->shape[0] : -1, spec.height, spec.width};
    if (!map || (map->dtype != "uint8" && map->dtype != "int32") || !alike(*map, {map->name, map->dtype, size}))
        throw unlike(source, manifest, specs_text(outputs), "a segmenter must have label_map of uint8 or int32" + shape_text({-1, spec.height, spec.width}));
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
    check_outputs(source, manifest, labels, runtime.outputs);
}

void check_outputs(const Source &source, const Manifest &manifest, const std::vector<std::string> &labels, const std::vector<TensorSpec> &outputs) {
    const std::string &head = manifest.head;
    if (head == "detections") return check_detections(source, manifest, outputs);
    if (head == "label_map") return check_label_map(source, manifest, outputs);
    if (!manifest.classifies()) return;
    const TensorSpec *const scores = find(outputs, head);
    if (!scores) throw unlike(source, manifest, specs_text(outputs), "a classifier must have the output " + head);
    check_scores(source, manifest, labels, *scores);
}

}  // namespace evm
