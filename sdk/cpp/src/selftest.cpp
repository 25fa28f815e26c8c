#include "selftest.h"

#include "platform.h"
#include "png.h"
#include "predictions.h"
#include "safetensors.h"
#include "scan.h"
#include "text.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

constexpr const char *PROBES = "probes.safetensors", *SCANS = "scans.safetensors";

BundleError unreadable(const Source &source, const std::string &file, const std::string &reason) {
    const std::string where = "selftest/" + file;
    return BundleError("bundle " + source.path + " has no readable self-test: " + where + " " + reason, "export it again", {"selftest.damaged", where});
}

Tensors tensors_in(const Source &source, const std::string &name) {
    try {
        return read_safetensors(source.bytes("selftest/" + name));
    } catch (const Error &) {
        throw;
    } catch (const std::runtime_error &error) {
        throw unreadable(source, name, std::string("cannot be read: ") + error.what());
    }
}

// Return the tensor `name`. Throws BundleError unless it has this dtype and shape.
const Tensor &like(const Source &source, const Tensors &probes, const std::string &name, const std::string &dtype, const std::vector<std::int64_t> &shape) {
    const auto found = probes.find(name);
    if (found == probes.end() || found->second.dtype != dtype || found->second.shape != shape)
        throw unreadable(source, PROBES, "has no " + name + " of " + dtype + shape_text(shape));
    return found->second;
}

double limit_of(const std::map<std::string, double> &limits, const std::string &name, double otherwise) {
    const auto found = limits.find(name);
    return found == limits.end() ? otherwise : found->second;
}

template <class T>
double largest_difference(const Tensor &have, const Tensor &want) {
    double most = 0;
    for (std::size_t i = 0; i < want.bytes.size() / sizeof(T); i++) {
        const double off = std::abs(static_cast<double>(have.data<T>()[i]) - static_cast<double>(want.data<T>()[i]));
        most = std::max(most, std::isfinite(off) ? off : INFINITE);
    }
    return most;
}

// Return the largest difference of two tensors with the same shape; infinite for tensors of different or other dtypes.
double difference(const Tensor &have, const Tensor &want) {
    if (have.dtype != want.dtype) return INFINITE;
    if (have.dtype == "float32") return largest_difference<float>(have, want);
    return have.dtype == "int32" ? largest_difference<std::int32_t>(have, want) : INFINITE;
}

// Compare the outputs of a detector: the share of rows that have no pair, and the largest differences of the pairs.
std::vector<Check> detection_checks(const Manifest &manifest, const Tensors &found, const Tensors &probes) {
    Tensors expected;
    double tolerance = INFINITE;
    for (const auto &output : found) {
        expected[output.first] = probes.at(output.first);
        tolerance = std::min(tolerance, limit_of(manifest.limits.outputs, output.first, manifest.limits.otherwise));
    }
    const Aligned aligned = align_detections(expected, found, tolerance);
    std::vector<Check> checks{{"not in common", 1 - aligned.share, manifest.limits.apart}};
    for (const auto &[name, error] : aligned.errors) checks.push_back({name, error, limit_of(manifest.limits.outputs, name, manifest.limits.otherwise)});
    return checks;
}

// Compare the label maps of a segmenter: the share of pixels that differ. The others are equal.
std::vector<Check> label_map_checks(const Manifest &manifest, const Tensor &have, const Tensor &want) {
    const std::size_t width = have.dtype == "uint8" ? 1 : sizeof(std::int32_t), count = have.bytes.size() / width;
    std::size_t differ = 0;
    for (std::size_t i = 0; i < count; i++) differ += !std::equal(&have.bytes[width * i], &have.bytes[width * i] + width, &want.bytes[width * i]);
    return {{"not in common", static_cast<double>(differ) / static_cast<double>(count), manifest.limits.apart},
            {manifest.head, 0, limit_of(manifest.limits.outputs, manifest.head, manifest.limits.otherwise)}};
}

Check preprocessing_check(const Source &source, const Manifest &manifest, const Tensors &probes) {
    const RgbImage rgb_image = read_test_image(source);
    const Preprocessing &spec = manifest.preprocessing;
    const std::vector<std::uint8_t> have = spec.pixels({rgb_image.rgb.data(), rgb_image.width, rgb_image.height});
    const Tensor &want = like(source, probes, "picture.pixels", "uint8", {spec.height, spec.width, spec.channels()});
    double most = 0;
    for (std::size_t i = 0; i < have.size(); i++) most = std::max(most, std::abs(double(have[i]) - double(want.bytes[i])));
    return {"preprocessing (of 255)", most, manifest.limits.preprocessing};
}

// Read the scans by name from tensors named <scan>:<tensor>. The expected y is skipped, because the self-test computes it again.
std::map<std::string, Tensors> read_scans(const Source &source) {
    std::map<std::string, Tensors> scans;
    for (auto &[key, value] : tensors_in(source, SCANS)) {
        const std::size_t colon = key.find(':');
        if (key.substr(colon + 1) != "y") scans[key.substr(0, colon)][key.substr(colon + 1)] = std::move(value);
    }
    for (const auto &[name, scan] : scans)
        if (!is_scan(scan)) throw unreadable(source, SCANS, "has no scan in the tensors of " + in_quotes(name));
    return scans;
}

Check run_scan(const Source &source, const Manifest &manifest, const Target &target, const Runtime &runtime, const std::string &name, const Tensors &scan) {
    Feeds feeds;
    for (const auto &[key, value] : scan) feeds[key] = value.view();
    check_feeds(runtime.inputs, feeds);
    const Tensor y = runtime.run(feeds)["y"];
    if (y.dtype != "float32" || y.shape != scan.at("u").shape)
        throw unreadable(source, utf8(path_of(target.scan_probe).filename()), "gives no output y of the shape of u");
    Check check = scan_check("scan " + name, scan, y);
    check.limit = limit_of(manifest.limits.scans, name, check.limit);
    return check;
}

}  // namespace

Tensors read_probes(const Source &source) { return tensors_in(source, PROBES); }

Tensor images_of(const Source &source, const Manifest &manifest, const Tensors &probes) {
    const auto found = probes.find(manifest.input);
    if (found == probes.end() || found->second.shape.empty() || found->second.bytes.empty()) throw unreadable(source, PROBES, "has no " + manifest.input);
    return found->second;
}

RgbImage read_test_image(const Source &source) {
    try {
        return read_png(source.bytes("selftest/picture.png"));
    } catch (const Error &) {
        throw;
    } catch (const std::runtime_error &error) {
        throw unreadable(source, "picture.png", std::string("cannot be read: ") + error.what());
    }
}

Tensors run_batched(const Runtime &runtime, const Manifest &manifest, const Tensor &images, std::int64_t most) {
    const std::int64_t count = images.shape.at(0), least = manifest.batch_min;
    const std::size_t image_bytes = images.bytes.size() / static_cast<std::size_t>(count);
    Tensors results;
    for (std::int64_t start = 0; start < count; start += most) {
        const std::int64_t here = std::min(most, count - start), filled = std::max(here, least);
        TensorView batch = images.view();
        batch.shape[0] = filled;
        batch.data = images.bytes.data() + static_cast<std::size_t>(start) * image_bytes;
        std::vector<unsigned char> copy;
        if (filled > here) {
            const unsigned char *const first = static_cast<const unsigned char *>(batch.data), *const last = first + static_cast<std::size_t>(here - 1) * image_bytes;
            copy.assign(first, last + image_bytes);
            for (std::int64_t i = here; i < filled; i++) copy.insert(copy.end(), last, last + image_bytes);
            batch.data = copy.data();
        }
        const Feeds feeds{{runtime.inputs.at(0).name, batch}};
        check_feeds(runtime.inputs, feeds);
        for (auto &[name, value] : runtime.run(feeds)) {
            Tensor &whole = results[name];
            std::vector<std::int64_t> wanted = start ? whole.shape : value.shape;
            if (!wanted.empty()) wanted[0] = filled;
            if (wanted.empty() || value.shape != wanted)
                throw BundleError("the model gives " + spec_text({name, value.dtype, value.shape}) + " for " +
                                      spec_text({runtime.inputs[0].name, batch.dtype, batch.shape}), "export it again");
            value.bytes.resize(value.bytes.size() / static_cast<std::size_t>(filled) * static_cast<std::size_t>(here));
            value.shape[0] = start + here;
            value.bytes.insert(value.bytes.begin(), whole.bytes.begin(), whole.bytes.end());
            whole = std::move(value);
        }
    }
    return results;
}

std::vector<Check> selftest(const Source &source, const Manifest &manifest, const Target &target, const Runtime &runtime, Options options) {
    const Tensors probes = read_probes(source);
    const std::map<std::string, Tensors> scans = read_scans(source);
    std::vector<Check> checks;
    if (manifest.preprocessing.reads_images()) checks.push_back(preprocessing_check(source, manifest, probes));
    const Tensor images = images_of(source, manifest, probes);
    const std::int64_t most = manifest.batch_max ? manifest.batch_max : images.shape[0];
    const Tensors found = run_batched(runtime, manifest, images, most);
    for (const TensorSpec &output : runtime.outputs) {
        const Tensor &have = found.at(output.name), &want = like(source, probes, output.name, have.dtype, have.shape);
        if (manifest.head == "label_map")
            for (const Check &check : label_map_checks(manifest, have, want)) checks.push_back(check);
        else if (manifest.head != "detections")
            checks.push_back({output.name, difference(have, want), limit_of(manifest.limits.outputs, output.name, manifest.limits.otherwise)});
    }
    if (manifest.head == "detections")
        for (const Check &check : detection_checks(manifest, found, probes)) checks.push_back(check);
    if (!target.scan_probe || scans.empty()) return checks;
    options.threads = 0;
    const std::unique_ptr<Runtime> alone = target.open(source, target.scan_probe, options);
    for (const auto &[name, scan] : scans) checks.push_back(run_scan(source, manifest, target, *alone, name, scan));
    return checks;
}

}  // namespace evm
