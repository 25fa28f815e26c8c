#include "selftest.h"

#include "png.h"
#include "safetensors.h"
#include "scan.h"

#include <algorithm>
#include <cmath>

namespace evm {
namespace {

BundleError unreadable(const Source &source, const std::string &reason) {
    return BundleError("bundle " + source.path + " has no readable self-test: " + reason);
}

Tensors tensors_in(const Source &source, const std::string &name) {
    try {
        return read_safetensors(source.bytes(name));
    } catch (const ReadError &error) {
        throw unreadable(source, name + ": " + error.what());
    } catch (const Error &) {
        throw;
    } catch (const std::runtime_error &error) {
        throw unreadable(source, name + ": " + error.what());
    }
}

const Tensor &tensor(const Source &source, const Tensors &tensors, const std::string &name) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw unreadable(source, "it has no " + name);
    return found->second;
}

// Largest difference of two float32 tensors; infinite where they cannot be compared.
double difference(const Tensor &have, const Tensor &want) {
    if (have.dtype != "float32" || want.dtype != "float32" || have.shape != want.shape) return INFINITE;
    double most = 0;
    for (std::size_t i = 0; i < want.bytes.size() / sizeof(float); i++) {
        const double off = std::abs(static_cast<double>(have.data<float>()[i]) - want.data<float>()[i]);
        most = std::max(most, std::isfinite(off) ? off : INFINITE);
    }
    return most;
}

double largest(const Tensor &tensor) {
    double most = 0;
    for (std::size_t i = 0; i < tensor.bytes.size() / sizeof(float); i++) most = std::max(most, std::abs(static_cast<double>(tensor.data<float>()[i])));
    return most;
}

Check preprocessing_check(const Source &source, const Manifest &manifest, const Tensor &want) {
    const Picture picture = read_picture(source);
    const std::vector<std::uint8_t> have = manifest.preprocessing.pixels({picture.rgb.data(), picture.width, picture.height});
    double most = want.dtype == "uint8" && want.bytes.size() == have.size() ? 0 : INFINITE;
    for (std::size_t i = 0; i < have.size() && most < INFINITE; i++) most = std::max(most, std::abs(double(have[i]) - double(want.bytes[i])));
    return {"preprocessing (of 255)", most, 1.0};
}

// Scans by name, out of tensors named <scan>:<tensor>; y is what the loop gives, which is computed again.
std::map<std::string, Tensors> scans_in(Tensors tensors) {
    std::map<std::string, Tensors> scans;
    for (auto &[key, value] : tensors) {
        const std::size_t colon = key.find(':');
        if (colon != std::string::npos && key.substr(colon + 1) != "y") scans[key.substr(0, colon)][key.substr(colon + 1)] = std::move(value);
    }
    return scans;
}

Check run_scan(const Source &source, const Runtime &runtime, const std::string &name, const Tensors &scan) {
    Feeds feeds;
    for (const auto &[key, value] : scan) feeds[key] = value.view();
    check_feeds(runtime.inputs, feeds);
    try {
        return scan_check("scan " + name, scan, runtime.run(feeds)["y"]);
    } catch (const Error &) {
        throw;
    } catch (const std::runtime_error &error) {
        throw unreadable(source, error.what());
    }
}

}  // namespace

Tensors read_probes(const Source &source) { return tensors_in(source, "selftest/probes.safetensors"); }

Picture read_picture(const Source &source) {
    try {
        return read_png(source.bytes("selftest/picture.png"));
    } catch (const Error &) {
        throw;
    } catch (const std::runtime_error &error) {
        throw unreadable(source, std::string("selftest/picture.png: ") + error.what());
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
            value.bytes.resize(value.bytes.size() / static_cast<std::size_t>(filled) * static_cast<std::size_t>(here));
            value.shape.at(0) = start + here;
            Tensor &whole = results[name];
            value.bytes.insert(value.bytes.begin(), whole.bytes.begin(), whole.bytes.end());
            whole = std::move(value);
        }
    }
    return results;
}

std::vector<Check> selftest(const Source &source, const Manifest &manifest, const Target &target, const Runtime &runtime, Options options) {
    const Tensors probes = read_probes(source);
    std::vector<Check> checks{preprocessing_check(source, manifest, tensor(source, probes, "picture.pixels"))};
    const Tensor &images = tensor(source, probes, manifest.input);
    if (images.shape.empty() || images.shape[0] < 1 || images.bytes.empty()) throw unreadable(source, "it has no images");
    const std::int64_t most = manifest.batch_max ? manifest.batch_max : images.shape[0];
    const Tensors found = run_batched(runtime, manifest, images, most);
    for (const TensorSpec &output : runtime.outputs) {
        const Tensor &want = tensor(source, probes, output.name);
        checks.push_back({output.name, difference(found.at(output.name), want), manifest.tolerance * std::max(1.0, largest(want))});
    }
    if (!target.scan_probe) return checks;
    const std::map<std::string, Tensors> scans = scans_in(tensors_in(source, "selftest/scans.safetensors"));
    if (scans.empty()) return checks;
    options.threads = 0;
    const std::unique_ptr<Runtime> alone = target.open(source, target.scan_probe, options);
    for (const auto &[name, scan] : scans) checks.push_back(run_scan(source, *alone, name, scan));
    return checks;
}

}  // namespace evm
