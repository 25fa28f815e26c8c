// evm::SelectiveScan for ONNX Runtime >= 1.17: reads shapes, checks them, fills the struct, calls the kernel.
// Register with SessionOptions.register_custom_ops_library(path), or the same in C, C++, C#, Java.
#include "evm_scan.h"
#include "ort_abi.h"

#include <stdio.h>
#include <string.h>

using namespace ort;

namespace {

Api api;

#define RETURN_IF(status)            \
    do {                             \
        if (Status s = (status)) return s; \
    } while (0)

Status fail(const char *message) { return call<Status>(api, CreateStatus, INVALID_ARGUMENT, message); }

struct Tensor {
    float *data;
    int64_t dims[4];
    size_t rank;
};

Status read(Handle value, Tensor *tensor) {
    Handle info = nullptr;
    tensor->rank = 0;
    RETURN_IF(call<Status>(api, GetTensorTypeAndShape, value, &info));
    Status status = call<Status>(api, GetDimensionsCount, info, &tensor->rank);
    if (!status && tensor->rank <= 4) status = call<Status>(api, GetDimensions, info, (int64_t *)tensor->dims, tensor->rank);
    call<void>(api, ReleaseTensorTypeAndShapeInfo, info);
    RETURN_IF(status);
    return call<Status>(api, GetTensorMutableData, value, (Handle *)&tensor->data);
}

const char *const NAMES[] = {"u", "delta", "A", "B", "C", "skip", "bias"};
enum Input { U, DELTA, A, B, C, SKIP, BIAS, INPUTS };

// Null when the seven tensors fit each other, else what does not, in `message`.
const char *misfit(const Tensor *in, char *message, size_t size) {
    if (in[U].rank != 4 || in[A].rank != 3) {
        snprintf(message, size, "evm::SelectiveScan: u has rank %zu, A has rank %zu; expected (b, K, L, D) and (K, D, N)",
                 in[U].rank, in[A].rank);
        return message;
    }
    const int64_t b = in[U].dims[0], K = in[U].dims[1], L = in[U].dims[2], D = in[U].dims[3], N = in[A].dims[2];
    const int64_t expected[INPUTS][4] = {{b, K, L, D}, {b, K, L, D}, {K, D, N}, {b, K, L, N}, {b, K, L, N}, {K, D}, {K, D}};
    const size_t ranks[INPUTS] = {4, 4, 3, 4, 4, 2, 2};
    for (int i = 0; i < INPUTS; i++) {
        if (in[i].rank != ranks[i]) {
            snprintf(message, size, "evm::SelectiveScan: %s has rank %zu, expected %zu", NAMES[i], in[i].rank, ranks[i]);
            return message;
        }
        for (size_t axis = 0; axis < ranks[i]; axis++)
            if (in[i].dims[axis] != expected[i][axis]) {
                snprintf(message, size, "evm::SelectiveScan: %s has %lld on axis %zu, u and A ask for %lld", NAMES[i],
                         (long long)in[i].dims[axis], axis, (long long)expected[i][axis]);
                return message;
            }
    }
    return nullptr;
}

void run_tile(void *args, size_t tile) { evm_scan_run_tile((const evm_scan_args *)args, (int64_t)tile); }

Status ORT_CALL compute(Handle, Handle context) {
    Tensor in[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
        Handle value = nullptr;
        RETURN_IF(call<Status>(api, KernelContext_GetInput, context, i, &value));
        RETURN_IF(read(value, &in[i]));
    }
    char message[160];
    if (const char *why = misfit(in, message, sizeof message)) return fail(why);
    Handle output = nullptr;
    float *y = nullptr;
    const int64_t *shape = in[U].dims;
    RETURN_IF(call<Status>(api, KernelContext_GetOutput, context, (size_t)0, shape, (size_t)4, &output));
    RETURN_IF(call<Status>(api, GetTensorMutableData, output, (Handle *)&y));
    evm_scan_args args = {in[U].data,    in[DELTA].data, in[A].data, in[B].data, in[C].data, in[SKIP].data,
                          in[BIAS].data, y,              shape[0],   shape[1],   shape[2],   shape[3],
                          in[A].dims[2]};
    const size_t tiles = (size_t)evm_scan_num_tiles(&args);
    if (!tiles) return nullptr;
    // the session's own intra-op thread pool; 0: as many batches as it likes
    return call<Status>(api, KernelContext_ParallelFor, context, &run_tile, tiles, (size_t)0, (void *)&args);
}

Status ORT_CALL infer_shape(const CustomOp *, Handle context) {  // y is like u
    Handle info = nullptr;
    RETURN_IF(call<Status>(api, ShapeInferContext_GetInputTypeShape, context, (size_t)0, &info));
    return call<Status>(api, ShapeInferContext_SetOutputTypeShape, context, (size_t)0, (const void *)info);
}

char kernel_state;  // there is none, but the runtime wants a handle

const CustomOp op = {
    API_VERSION,
    [](const CustomOp *, Api, Handle) ORT_CALL -> Handle { return &kernel_state; },
    [](const CustomOp *) ORT_CALL -> const char * { return "SelectiveScan"; },
    [](const CustomOp *) ORT_CALL -> const char * { return nullptr; },  // null: the CPU provider
    [](const CustomOp *, size_t) ORT_CALL -> int { return FLOAT; },
    [](const CustomOp *) ORT_CALL -> size_t { return INPUTS; },
    [](const CustomOp *, size_t) ORT_CALL -> int { return FLOAT; },
    [](const CustomOp *) ORT_CALL -> size_t { return 1; },
    [](Handle kernel, Handle context) ORT_CALL { compute(kernel, context); },
    [](Handle) ORT_CALL {},
    [](const CustomOp *, size_t) ORT_CALL -> int { return 0; },  // required
    [](const CustomOp *, size_t) ORT_CALL -> int { return 0; },
    [](const CustomOp *, size_t) ORT_CALL -> int { return 0; },  // default memory
    [](const CustomOp *) ORT_CALL -> int { return 0; },
    [](const CustomOp *) ORT_CALL -> int { return 0; },
    [](const CustomOp *) ORT_CALL -> int { return 0; },
    [](const CustomOp *) ORT_CALL -> int { return 0; },
    [](const CustomOp *, Api, Handle, Handle *kernel) ORT_CALL -> Status {
        *kernel = &kernel_state;
        return nullptr;
    },
    compute,
    infer_shape,
    [](const CustomOp *) ORT_CALL -> int { return 1; },
    [](const CustomOp *) ORT_CALL -> int { return INT32_MAX; },
    {},
};

}  // namespace

ORT_EXPORT Status ORT_CALL RegisterCustomOps(Handle options, const ApiBase *base) {
    api = base->GetApi(API_VERSION);
    if (!api) {  // older than 1.17: CreateStatus sits in the same place in every version
        api = base->GetApi(1);
        return api ? fail("evm::SelectiveScan needs ONNX Runtime 1.17 or newer") : nullptr;
    }
    Handle domain = nullptr;
    RETURN_IF(call<Status>(api, CreateCustomOpDomain, (const char *)"evm", &domain));
    RETURN_IF(call<Status>(api, CustomOpDomain_Add, domain, &op));
    return call<Status>(api, AddCustomOpDomain, options, domain);
}
