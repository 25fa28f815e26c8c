/* Bundles of evm-deploy in C, and from there in any language: evm.hpp without its classes.
 *
 *     evm_model *model = NULL;
 *     char *error = NULL;
 *     if (evm_open("evm_tiny-onnx-fp32-224x224", NULL, &model, &error)) return puts(error), evm_free(error), 1;
 *     evm_prediction best[5];
 *     const evm_image image = {rgb, width, height, 0};
 *     if (evm_classify(model, &image, 1, 5, best, &error) == EVM_OK) printf("%s\n", evm_label(model, best[0].index));
 *     evm_close(model);
 *
 * Functions that can fail return an evm_status and, where `error` is not null and they do, a text there, which evm_free releases.
 * They can be called by several threads at the same time, but for evm_close. What is added later is added behind. */
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
    EVM_INTERNAL = 1,  /* a fault of the SDK, or no memory */
    EVM_USAGE = 2,     /* a value or combination that cannot work */
    EVM_IMAGE = 3,     /* an image that cannot be cropped */
    EVM_BUNDLE = 4,    /* a bundle that is missing or damaged */
    EVM_TOOLCHAIN = 5  /* a runtime or library that is not there, or does not fit */
} evm_status;

/* Zeros and nulls leave a choice to the runtime. size: sizeof(evm_options), so that it can grow. */
typedef struct evm_options {
    size_t size;
    int threads, streams;
    const char *scan, *plugin, *device, *cache;
} evm_options;

/* Packed 8-bit RGB; stride: bytes from row to row, 0 where they follow each other. */
typedef struct evm_image {
    const uint8_t *rgb;
    int width, height;
    ptrdiff_t stride;
} evm_image;

typedef struct evm_prediction {
    int index;
    double score; /* probability, 0..1 */
} evm_prediction;

typedef struct evm_check {
    char name[120];
    double error, limit; /* passed where error <= limit */
} evm_check;

/* Milliseconds of one run. */
typedef struct evm_latency {
    double p50, p90, p95, p99, mean, std, min, max;
    size_t runs, warm_up;
    int stable;
} evm_latency;

EVM_C_API const char *evm_version(void);
EVM_C_API void evm_free(char *text);

/* options may be null. */
EVM_C_API evm_status evm_open(const char *bundle, const evm_options *options, evm_model **model, char **error);
EVM_C_API void evm_close(evm_model *model);

/* These belong to the model. evm_label: null for an index without a label. */
EVM_C_API const char *evm_manifest(const evm_model *model);
EVM_C_API const char *evm_label(const evm_model *model, int index);
EVM_C_API void evm_input_size(const evm_model *model, int *height, int *width);

/* best: `top` for each image, best first; where there are fewer classes, index is -1. */
EVM_C_API evm_status evm_classify(const evm_model *model, const evm_image *images, size_t count, int top, evm_prediction *best, char **error);

/* pixels: height x width x 3 bytes of evm_input_size. */
EVM_C_API evm_status evm_preprocess(const evm_model *model, const evm_image *image, uint8_t *pixels, char **error);

/* One inference on the model's input as it is; `output` is called with each output before evm_run returns. */
typedef void evm_output(void *context, const char *name, const char *dtype, const int64_t *shape, size_t rank, const void *data);
EVM_C_API evm_status evm_run(const evm_model *model, const void *input, int64_t batch, evm_output *output, void *context, char **error);

/* Writes up to `room` checks, and their number to `count`. */
EVM_C_API evm_status evm_selftest(const evm_model *model, evm_check *checks, size_t room, size_t *count, char **error);

/* As evm-bench; batch 0: the smallest. */
EVM_C_API evm_status evm_bench(const evm_model *model, int batch, double limit_s, evm_latency *latency, char **error);

#ifdef __cplusplus
}
#endif
#endif
