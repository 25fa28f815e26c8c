/* C interface to bundles of evm-deploy, for C and for languages that call C. The functions correspond to the methods of evm.hpp.
 *
 *     evm_model *model = NULL;
 *     char *error = NULL;
 *     if (evm_open("evm_tiny-onnx-fp32-224x224", NULL, &model, &error)) return puts(error), evm_free(error), 1;
 *     evm_prediction best[5];
 *     const evm_image image = {rgb, width, height, 0};
 *     if (evm_classify(model, &image, 1, 5, best, &error) == EVM_OK) printf("%s\n", evm_label(model, best[0].index));
 *     evm_close(model);
 *
 * A function that can fail returns an evm_status. If it fails and `error` is not null, it stores a text in `error`, which the caller
 * releases with evm_free. Several threads may call all functions but evm_close at the same time. Later versions only append fields
 * and functions. */
#ifndef EVM_H
#define EVM_H
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EVM_C_API __declspec(dllexport)
#else
#define EVM_C_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct evm_model evm_model;

typedef enum evm_status {
    EVM_OK = 0,
    EVM_INTERNAL = 1,  /* an error in the SDK, or out of memory */
    EVM_USAGE = 2,     /* an invalid value or combination of values */
    EVM_IMAGE = 3,     /* an image that is empty or cannot be cropped */
    EVM_BUNDLE = 4,    /* a bundle that is missing or damaged */
    EVM_TOOLCHAIN = 5  /* a runtime or library that is missing or does not fit */
} evm_status;

/* Options of opening a bundle; see evm::Options. Texts and paths are UTF-8, also on Windows. Fields that are 0 or null have their default values. size: sizeof(evm_options), which
 * lets later versions append fields. */
typedef struct evm_options {
    size_t size;
    int threads, streams;
    const char *scan, *plugin, *device, *cache;
    const char *require_signature; /* PEM file of the ed25519 public key that must have signed the bundle */
} evm_options;

/* Packed 8-bit RGB image. stride: bytes from row to row, 0 for rows without gaps. */
typedef struct evm_image {
    const uint8_t *rgb;
    int width, height;
    ptrdiff_t stride;
} evm_image;

/* One class of one image. */
typedef struct evm_prediction {
    int index;
    double score; /* probability, 0..1 */
} evm_prediction;

/* One detected object of one image. box: x1, y1, x2, y2 in pixels of the image. */
typedef struct evm_detection {
    int index;
    double score; /* probability, 0..1 */
    double box[4];
} evm_detection;

/* Result of one check of the self-test. */
typedef struct evm_check {
    char name[120];
    double error, limit; /* the check has passed if error <= limit */
} evm_check;

/* Latency of one run in milliseconds. runs: number of measured runs. warm_up: number of runs before them. stable: 1 if the medians
 * of the last windows agreed. */
typedef struct evm_latency {
    double p50, p90, p95, p99, mean, std, min, max;
    size_t runs, warm_up;
    int stable;
} evm_latency;

/* Version of the SDK. */
EVM_C_API const char *evm_version(void);
/* Release an error text. */
EVM_C_API void evm_free(char *text);

/* Open a bundle, a folder or a zip, and check all hashes. options may be null. Fails with EVM_BUNDLE, EVM_USAGE or EVM_TOOLCHAIN. */
EVM_C_API evm_status evm_open(const char *bundle, const evm_options *options, evm_model **model, char **error);
/* Close a model and release its memory. No other call may use the model at the same time. */
EVM_C_API void evm_close(evm_model *model);

/* Return the text of manifest.json. The model owns the text. */
EVM_C_API const char *evm_manifest(const evm_model *model);
/* Return the name of a class, or null if the class has no name. The model owns the text. */
EVM_C_API const char *evm_label(const evm_model *model, int index);
/* Return the size, in pixels, to which images are preprocessed. */
EVM_C_API void evm_input_size(const evm_model *model, int *height, int *width);
/* Return the number of channels of the model's input: 3 for RGB, 1 for grey. Images can be given for these two only. */
EVM_C_API int evm_input_channels(const evm_model *model);

/* Classify images. best: array of count * top predictions, `top` for each image, most probable first. If the model has fewer than
 * `top` classes, the remaining entries have index -1. Fails with EVM_IMAGE, or with EVM_USAGE if the model is not a classifier. */
EVM_C_API evm_status evm_classify(const evm_model *model, const evm_image *images, size_t count, int top, evm_prediction *best, char **error);

/* Detect objects in an image. Writes up to `room` detections to `found`, by falling score, and the number of all to `count`. Fails with
 * EVM_IMAGE, or with EVM_USAGE if the model is not a detector. */
EVM_C_API evm_status evm_detect(const evm_model *model, const evm_image *image, evm_detection *found, size_t room, size_t *count, char **error);

/* Segment an image. classes: array of height x width numbers, the size of the image: the class of each pixel. Fails with EVM_IMAGE, or with
 * EVM_USAGE if the model is not a segmenter. */
EVM_C_API evm_status evm_segment(const evm_model *model, const evm_image *image, int32_t *classes, char **error);

/* Preprocess an image. pixels: array of height x width x channels bytes, of the size that evm_input_size and evm_input_channels return.
 * Fails with EVM_IMAGE. */
EVM_C_API evm_status evm_preprocess(const evm_model *model, const evm_image *image, uint8_t *pixels, char **error);

/* Run one inference on the model's input tensor, without preprocessing. batch: number of images in `input`. Before evm_run returns, it
 * calls output(context, ..) with each output. Fails with EVM_USAGE if the model does not take this batch. */
typedef void evm_output(void *context, const char *name, const char *dtype, const int64_t *shape, size_t rank, const void *data);
EVM_C_API evm_status evm_run(const evm_model *model, const void *input, int64_t batch, evm_output *output, void *context, char **error);

/* Run the self-test of the bundle. Writes up to `room` checks to `checks`, and the number of all checks to `count`. */
EVM_C_API evm_status evm_selftest(const evm_model *model, evm_check *checks, size_t room, size_t *count, char **error);

/* Measure the latency of one inference by the method of evm-bench. batch: images in one inference, 0 for the smallest batch of the
 * bundle. limit_s: longest time of the measurement in seconds. */
EVM_C_API evm_status evm_bench(const evm_model *model, int batch, double limit_s, evm_latency *latency, char **error);

#ifdef __cplusplus
}
#endif
#endif
