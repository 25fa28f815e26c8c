#include "bench.h"
#include "interface.h"
#include "manifest.h"
#include "platform.h"
#include "png.h"
#include "predictions.h"
#include "selftest.h"
#include "signature.h"
#include "text.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>

namespace evm {
namespace {

constexpr int DYNAMIC_BATCH = 16;  // images in one inference, for bundles with a dynamic batch

bool has(const std::vector<std::string> &names, const std::string &name) { return std::find(names.begin(), names.end(), name) != names.end(); }

// Return the path of a library of the bundle. A library in a zip is written to a file that exists as long as the process or longer,
// because a library stays loaded. There is one file for each content: a loader takes a file with the name of a loaded library for that library.
std::filesystem::path library_file(const Source &source, const std::string &name) {
    if (source.on_disk()) return path_of(source.path) / path_of(name);
    static std::mutex mutex;
    static std::map<std::string, std::unique_ptr<LibraryFile>> files;
    const std::lock_guard<std::mutex> lock(mutex);
    const std::string sha256 = source.sha256(name);
    std::unique_ptr<LibraryFile> &file = files[sha256];
    try {
        if (!file) file = std::make_unique<LibraryFile>(source.bytes(name), sha256);
    } catch (const std::runtime_error &error) {
        throw ToolchainError(std::string("the native library cannot be loaded: ") + error.what());
    }
    return file->path();
}

// Probabilities of the logits of one image. The logit of a single class is against 0, that of its absence.
std::vector<double> softmax(const float *scores, std::size_t count) {
    if (count == 1) return {1 / (1 + std::exp(-static_cast<double>(*scores)))};
    std::vector<double> result(scores, scores + count);
    const double largest = *std::max_element(result.begin(), result.end());
    for (double &x : result) x = std::exp(x - largest);
    const double sum = std::accumulate(result.begin(), result.end(), 0.0);
    for (double &x : result) x /= sum;
    return result;
}

std::vector<Prediction> best(const std::vector<double> &scores, const std::vector<std::string> &labels, int top) {
    std::vector<int> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    const auto better = [&](int a, int b) { return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)]; };
    std::stable_sort(order.begin(), order.end(), better);
    order.resize(std::min(order.size(), static_cast<std::size_t>(top)));
    std::vector<Prediction> result;
    for (const int i : order) {
        const std::size_t at = static_cast<std::size_t>(i);
        result.push_back({at < labels.size() ? labels[at] : "class " + std::to_string(i), i, scores[at]});
    }
    return result;
}

// Decide how the scans run, and set options.plugin to the library that runs them, or to an empty path.
Choice lowering(const Source &source, const Manifest &manifest, const Target &target, Options &options) {
    const std::string asked = options.scan;
    if (!has({"auto", "plugin", "bundled", "portable"}, asked))
        throw UsageError("scan " + in_quotes(asked) + " is unknown; choose from: auto, plugin, bundled, portable");
    const std::filesystem::path given = std::exchange(options.plugin, {});
    const bool portable = has(manifest.scan_modes, "portable"), plugin = has(manifest.scan_modes, "plugin");
    if (asked == "portable" && !portable)
        throw UsageError("portable scans are not available: the bundle has native nodes only", "export it with --scan portable");
    if (has(manifest.scan_modes, "aot")) return {"aot", "the kernel is inside the engine"};
    if (asked == "portable" || !plugin) {
        if (asked == "plugin" || asked == "bundled")
            throw UsageError("native kernels are not available: the bundle was exported with portable scans", "export it with --scan auto");
        return {"portable", asked == "portable" ? "as requested" : "the bundle has portable scans only"};
    }
    const std::string host = host_platform();
    std::vector<std::string> platforms;
    for (const auto &library : manifest.plugins) platforms.push_back(library.first);
    const auto own = manifest.plugins.find(host);
    if (asked == "bundled") {
        if (own == manifest.plugins.end())
            throw UsageError("no native library for " + host + " in the bundle; available: " + (platforms.empty() ? "none" : join(platforms)), "export it with --platform");
        options.plugin = library_file(source, own->second);
        return {"plugin", "native kernel, " + target.isa(options.plugin) + ", from the bundle (" + host + ")"};
    }
    if (!given.empty()) {
        const std::string isa = target.isa(given);
        options.plugin = given;
        return {"plugin", "native kernel, " + isa + ", installed"};
    }
    std::string reason = "no native library was given";
    if (own != manifest.plugins.end()) reason += "; the bundle contains a library for this platform: use scan 'bundled' to trust and run it";
    else if (!platforms.empty()) reason += "; the libraries in the bundle are for " + join(platforms) + ", this machine is " + host;
    if (asked == "plugin" || !portable) throw ToolchainError(reason, "set `plugin` to the path of a native library");
    return {"portable", reason};
}

void check_options(const Options &options) {
    if (options.threads < 0) throw UsageError("threads is " + std::to_string(options.threads) + ": use a number from 1, or 0 for the runtime's choice");
    if (options.streams < 1) throw UsageError("streams is " + std::to_string(options.streams) + ": use a number from 1");
}

}  // namespace

struct Model::Impl {
    std::unique_ptr<Source> source;
    Manifest manifest;
    const Target *target = nullptr;
    Options options;
    Choice scan;
    std::vector<std::string> labels;
    std::unique_ptr<Runtime> runtime;

    Impl(const std::filesystem::path &bundle, const Options &given) : options(given) {
        check_options(options);
        source = open_source(bundle);
        manifest = read_manifest(*source, options.require_signature);
        check_bundle(*source, manifest);
        if (!options.require_signature.empty()) check_nothing_else(*source, manifest);
        if (!manifest.built)
            throw BundleError("bundle " + source->path + " has no engine yet", "on the device:  evm-export --finish " + shell_word(source->path), {"bundle.unfinished"});
        target = &find_target(manifest.target);
        try {
            labels = read_labels(*source, manifest);
            scan = lowering(*source, manifest, *target, options);
            runtime = target->open(*source, manifest.artifact, options);
            check_interface(*source, manifest, labels, *runtime);
        } catch (const ReadError &error) {  // the file was readable when its hash was checked
            throw BundleError("bundle " + source->path + " cannot be read: " + error.what());
        }
    }

    // Run one batch of pixels and return the outputs, checked.
    Tensors outputs(const std::vector<std::uint8_t> &pixels, std::int64_t count) const {
        const Preprocessing &spec = manifest.preprocessing;
        Tensor images{"uint8", {count, spec.height, spec.width, spec.channels()}, pixels};
        if (manifest.input == "tensor") {
            const std::vector<float> values = spec.normalise(pixels);
            const unsigned char *const bytes = reinterpret_cast<const unsigned char *>(values.data());
            images = {"float32", {count, spec.channels(), spec.height, spec.width}, {bytes, bytes + values.size() * sizeof(float)}};
        }
        Tensors found = run_batched(*runtime, manifest, images, count);
        std::vector<TensorSpec> specs;
        for (const auto &[name, tensor] : found) {
            specs.push_back({name, tensor.dtype, tensor.shape});
            if (tensor.dtype != "float32") continue;
            const float *const end = tensor.data<float>() + tensor.bytes.size() / sizeof(float);
            if (!std::all_of(tensor.data<float>(), end, [](float x) { return std::isfinite(x); }))
                throw BundleError("bundle " + source->path + ": the network gives NaN or Inf on this device",
                                  "run the self-test:  evm-run " + shell_word(source->path) + " --selftest");
        }
        check_outputs(*source, manifest, labels, specs);
        return found;
    }

    // Run the images, and call decode(outputs, i, image) for image `i` of each batch. Returns what it returns.
    template <class Result, class Decode>
    std::vector<Result> predicted(const std::vector<Image> &images, Decode decode) const {
        std::vector<Result> results;
        const std::size_t most = static_cast<std::size_t>(batch());
        for (std::size_t start = 0; start < images.size(); start += most) {
            const std::size_t count = std::min(most, images.size() - start);
            std::vector<std::uint8_t> pixels;
            for (std::size_t i = 0; i < count; i++) {
                const std::vector<std::uint8_t> one = manifest.preprocessing.pixels(images[start + i]);
                pixels.insert(pixels.end(), one.begin(), one.end());
            }
            const Tensors found = outputs(pixels, static_cast<std::int64_t>(count));
            for (std::size_t i = 0; i < count; i++) results.push_back(decode(found, i, images[start + i]));
        }
        return results;
    }

    void require(bool can, const std::string &what) const {
        if (!can) throw UsageError("no " + what + " to predict: the bundle gives " + manifest.head, "use run(feeds)");
    }

    int batch() const { return manifest.batch_max ? manifest.batch_max : DYNAMIC_BATCH; }

    // Return `count` images, repeated from the inputs of the self-test.
    Tensor examples(int count) const {
        Tensor images = images_of(*source, manifest, read_probes(*source));
        const std::size_t size = images.bytes.size() / static_cast<std::size_t>(images.shape[0]) * static_cast<std::size_t>(count);
        const std::vector<unsigned char> once = images.bytes;
        while (images.bytes.size() < size) images.bytes.insert(images.bytes.end(), once.begin(), once.end());
        images.bytes.resize(size);
        images.shape[0] = count;
        return images;
    }
};

Model::Model(const std::filesystem::path &bundle, const Options &options) : impl_(std::make_unique<const Impl>(bundle, options)) {}
Model::~Model() = default;
Model::Model(Model &&) noexcept = default;
Model &Model::operator=(Model &&) noexcept = default;

std::vector<Prediction> Model::classify(const std::uint8_t *rgb, int width, int height, int top) const {
    return classify({Image{rgb, width, height}}, top).front();
}

std::vector<std::vector<Prediction>> Model::classify(const std::vector<Image> &images, int top) const {
    const std::string &head = impl_->manifest.head;
    impl_->require(impl_->manifest.classifies(), "classes");
    if (top < 1) throw UsageError("top is " + std::to_string(top) + ", it must be at least 1");
    return impl_->predicted<std::vector<Prediction>>(images, [&](const Tensors &outputs, std::size_t i, const Image &) {
        const Tensor &scores = outputs.at(head);
        const std::size_t classes = static_cast<std::size_t>(scores.shape[1]);
        const float *const row = scores.data<float>() + i * classes;
        return best(head == "probs" ? std::vector<double>(row, row + classes) : softmax(row, classes), impl_->labels, top);
    });
}

std::vector<Detection> Model::detect(const std::uint8_t *rgb, int width, int height) const { return detect({Image{rgb, width, height}}).front(); }

std::vector<std::vector<Detection>> Model::detect(const std::vector<Image> &images) const {
    const Manifest &facts = impl_->manifest;
    impl_->require(facts.head == "detections", "boxes");
    return impl_->predicted<std::vector<Detection>>(images, [&](const Tensors &outputs, std::size_t i, const Image &image) {
        const Geometry place = facts.preprocessing.geometry(image.width, image.height, image.name);
        return decode_detections(outputs, i, facts.selection, &place, impl_->labels);
    });
}

LabelMap Model::segment(const std::uint8_t *rgb, int width, int height) const { return segment({Image{rgb, width, height}}).front(); }

std::vector<LabelMap> Model::segment(const std::vector<Image> &images) const {
    const Manifest &facts = impl_->manifest;
    impl_->require(facts.head == "label_map", "label maps");
    return impl_->predicted<LabelMap>(images, [&](const Tensors &outputs, std::size_t i, const Image &image) {
        const Tensor &maps = outputs.at(facts.head);
        const std::size_t size = maps.bytes.size() / static_cast<std::size_t>(maps.shape[0]);
        const unsigned char *const one = maps.bytes.data() + i * size;
        return LabelMap{facts.preprocessing.geometry(image.width, image.height, image.name).to_image(Tensor{maps.dtype, {maps.shape[1], maps.shape[2]}, {one, one + size}})};
    });
}

std::vector<std::uint8_t> Model::preprocess(const Image &image) const { return impl_->manifest.preprocessing.pixels(image); }

Tensors Model::run(const Feeds &feeds) const {
    check_feeds(inputs(), feeds);
    return impl_->runtime->run(feeds);
}

std::vector<Check> Model::selftest() const { return evm::selftest(*impl_->source, impl_->manifest, *impl_->target, *impl_->runtime, impl_->options); }

Latency Model::bench(const BenchSettings &settings) const {
    const Manifest &facts = manifest();
    const int count = settings.batch ? settings.batch : facts.batch_min;
    if (count < facts.batch_min || (facts.batch_max && count > facts.batch_max))
        throw UsageError("batch " + std::to_string(count) + " is not supported: the bundle was exported with another batch", "export it with --batch " + std::to_string(count));
    if (settings.end_to_end) {
        const RgbImage rgb_image = read_test_image(*impl_->source);
        const std::vector<Image> images(static_cast<std::size_t>(count), Image{rgb_image.rgb.data(), rgb_image.width, rgb_image.height});
        return measure([&] { facts.head == "detections" ? void(detect(images)) : facts.head == "label_map" ? void(segment(images)) : void(classify(images)); },
                       settings.limit_s);
    }
    const Tensor images = impl_->examples(count);
    const Feeds feeds{{inputs().at(0).name, images.view()}};
    return measure([&] { run(feeds); }, settings.limit_s);
}

const std::vector<TensorSpec> &Model::inputs() const { return impl_->runtime->inputs; }
const std::vector<TensorSpec> &Model::outputs() const { return impl_->runtime->outputs; }
const Manifest &Model::manifest() const { return impl_->manifest; }
const std::vector<std::string> &Model::labels() const { return impl_->labels; }
const Choice &Model::scan() const { return impl_->scan; }

const char *version() { return EVM_VERSION; }

std::vector<std::string> targets() {
    std::vector<std::string> names;
    for (const Target &target : built_targets()) names.push_back(target.name);
    return names;
}

}  // namespace evm
