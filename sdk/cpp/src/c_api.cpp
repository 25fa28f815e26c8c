// C interface of the SDK. No exception leaves its functions.
#include "evm/evm.h"

#include "evm/evm.hpp"
#include "platform.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

struct evm_model {
    evm::Model model;
};

namespace {

evm_status failed(evm_status status, const char *text, char **error) noexcept {
    if (!error) return status;
    *error = static_cast<char *>(std::malloc(std::strlen(text) + 1));
    if (*error) std::strcpy(*error, text);
    return status;
}

template <class Body>
evm_status guarded(char **error, Body body) noexcept {
    if (error) *error = nullptr;
    try {
        body();
        return EVM_OK;
    } catch (const evm::UsageError &failure) {
        return failed(EVM_USAGE, failure.what(), error);
    } catch (const evm::ImageError &failure) {
        return failed(EVM_IMAGE, failure.what(), error);
    } catch (const evm::BundleError &failure) {
        return failed(EVM_BUNDLE, failure.what(), error);
    } catch (const evm::ToolchainError &failure) {
        return failed(EVM_TOOLCHAIN, failure.what(), error);
    } catch (const std::exception &failure) {
        return failed(EVM_INTERNAL, failure.what(), error);
    } catch (...) {
        return failed(EVM_INTERNAL, "unknown failure", error);
    }
}

evm::Image image_of(const evm_image &image) { return {image.rgb, image.width, image.height, image.stride}; }

evm::Options options_of(const evm_options *given) {
    evm::Options options;
    if (!given) return options;
    if (given->size == 0) throw evm::UsageError("evm_options.size is 0", "set size to sizeof(evm_options)");
    evm_options known{};  // a program may have been compiled for a version with fewer options
    std::memcpy(&known, given, std::min(given->size, sizeof known));
    options.threads = known.threads;
    if (known.streams) options.streams = known.streams;
    if (known.scan) options.scan = known.scan;
    if (known.plugin) options.plugin = evm::path_of(known.plugin);
    if (known.device) options.device = known.device;
    if (known.cache) options.cache = evm::path_of(known.cache);
    if (known.require_signature) options.require_signature = evm::path_of(known.require_signature);
    return options;
}

}  // namespace

const char *evm_version(void) { return evm::version(); }

void evm_free(char *text) { std::free(text); }

evm_status evm_open(const char *bundle, const evm_options *options, evm_model **model, char **error) {
    return guarded(error, [&] {
        *model = nullptr;
        *model = new evm_model{evm::Model(evm::path_of(bundle), options_of(options))};
    });
}

void evm_close(evm_model *model) { delete model; }

const char *evm_manifest(const evm_model *model) { return model->model.manifest().json.c_str(); }

const char *evm_label(const evm_model *model, int index) {
    const std::vector<std::string> &labels = model->model.labels();
    return index >= 0 && static_cast<size_t>(index) < labels.size() ? labels[static_cast<size_t>(index)].c_str() : nullptr;
}

void evm_input_size(const evm_model *model, int *height, int *width) {
    const evm::Preprocessing &spec = model->model.manifest().preprocessing;
    *height = spec.height, *width = spec.width;
}

int evm_input_channels(const evm_model *model) { return model->model.manifest().preprocessing.channels(); }

evm_status evm_classify(const evm_model *model, const evm_image *images, size_t count, int top, evm_prediction *best, char **error) {
    return guarded(error, [&] {
        std::vector<evm::Image> rgb_images(count);
        std::transform(images, images + count, rgb_images.begin(), image_of);
        const auto found = model->model.classify(rgb_images, top);
        for (size_t i = 0; i < count; i++)
            for (size_t k = 0; k < static_cast<size_t>(top); k++)
                best[i * static_cast<size_t>(top) + k] = k < found[i].size() ? evm_prediction{found[i][k].index, found[i][k].score} : evm_prediction{-1, 0};
    });
}

evm_status evm_detect(const evm_model *model, const evm_image *image, evm_detection *found, size_t room, size_t *count, char **error) {
    return guarded(error, [&] {
        const std::vector<evm::Detection> all = model->model.detect({image_of(*image)}).front();
        *count = all.size();
        for (size_t i = 0; i < std::min(room, all.size()); i++) {
            found[i].index = all[i].index, found[i].score = all[i].score;
            std::copy(all[i].box.begin(), all[i].box.end(), found[i].box);
        }
    });
}

evm_status evm_segment(const evm_model *model, const evm_image *image, int32_t *classes, char **error) {
    return guarded(error, [&] {
        const evm::LabelMap found = model->model.segment({image_of(*image)}).front();
        const size_t count = static_cast<size_t>(found.height()) * static_cast<size_t>(found.width());
        if (found.map.dtype == "uint8") std::copy(found.map.bytes.begin(), found.map.bytes.end(), classes);
        else std::copy_n(found.map.data<std::int32_t>(), count, classes);
    });
}

evm_status evm_preprocess(const evm_model *model, const evm_image *image, uint8_t *pixels, char **error) {
    return guarded(error, [&] {
        const std::vector<std::uint8_t> found = model->model.preprocess(image_of(*image));
        std::copy(found.begin(), found.end(), pixels);
    });
}

evm_status evm_run(const evm_model *model, const void *input, int64_t batch, evm_output *output, void *context, char **error) {
    return guarded(error, [&] {
        const evm::TensorSpec &spec = model->model.inputs().at(0);
        evm::TensorView value{spec.dtype, spec.shape, input};
        value.shape.at(0) = batch;
        for (const auto &[name, tensor] : model->model.run({{spec.name, value}}))
            output(context, name.c_str(), tensor.dtype.c_str(), tensor.shape.data(), tensor.shape.size(), tensor.bytes.data());
    });
}

evm_status evm_selftest(const evm_model *model, evm_check *checks, size_t room, size_t *count, char **error) {
    return guarded(error, [&] {
        const std::vector<evm::Check> found = model->model.selftest();
        *count = found.size();
        for (size_t i = 0; i < std::min(room, found.size()); i++) {
            checks[i] = {{}, found[i].error, found[i].limit};
            found[i].name.copy(checks[i].name, sizeof checks[i].name - 1);
        }
    });
}

evm_status evm_bench(const evm_model *model, int batch, double limit_s, evm_latency *latency, char **error) {
    return guarded(error, [&] {
        const evm::Latency found = model->model.bench({batch, false, limit_s});
        *latency = {found.percentile(50), found.percentile(90), found.percentile(95), found.percentile(99),        found.mean(),        found.std_dev(),
                    found.min(),          found.max(),          found.samples.size(), static_cast<size_t>(found.warm_up), found.stable ? 1 : 0};
    });
}
