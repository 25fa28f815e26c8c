// What the custom ops share: reading tensors, checking their shapes against each other, the table of callbacks.
#pragma once
#include "ort_abi.h"

#include <float.h>
#include <stdio.h>
#include <string.h>

namespace ort {

extern Api api;  // of the runtime that loaded the library

#define RETURN_IF(status)                                        \
    do {                                                         \
        if (::ort::Status failed_ = (status)) return failed_;    \
    } while (0)

inline Status fail(const char *message) { return call<Status>(api, CreateStatus, INVALID_ARGUMENT, message); }

constexpr size_t MAX_RANK = 4;

struct Tensor {
    void *data;
    int64_t dims[MAX_RANK];
    size_t rank;

    template <class T>
    const T *as() const { return static_cast<const T *>(data); }
};

inline Status read_shape(Handle info, Tensor *tensor) {
    RETURN_IF(call<Status>(api, GetDimensionsCount, info, &tensor->rank));
    if (tensor->rank > MAX_RANK) return nullptr;  // fits no op
    return call<Status>(api, GetDimensions, info, (int64_t *)tensor->dims, tensor->rank);
}

inline Status read(Handle context, size_t index, Tensor *tensor) {
    Handle value = nullptr, info = nullptr;
    RETURN_IF(call<Status>(api, KernelContext_GetInput, context, index, &value));
    RETURN_IF(call<Status>(api, GetTensorTypeAndShape, value, &info));
    const Status status = read_shape(info, tensor);
    call<void>(api, ReleaseTensorTypeAndShapeInfo, info);
    RETURN_IF(status);
    return call<Status>(api, GetTensorMutableData, value, &tensor->data);
}

// An output of MAX_RANK axes; null where the node does not ask for it.
inline Status write(Handle context, size_t index, const int64_t *dims, float **data) {
    Handle value = nullptr;
    RETURN_IF(call<Status>(api, KernelContext_GetOutput, context, index, dims, MAX_RANK, &value));
    if (!value) return nullptr;
    return call<Status>(api, GetTensorMutableData, value, (Handle *)data);
}

// An input: its name, its axes, one letter each, and its elements' type. The first input that has a letter sets its size; a
// digit is a size.
struct Input {
    const char *name, *axes;
    int type = FLOAT;
};

// Sizes by letter, once every input has fitted.
class Sizes {
    int64_t size[128];
    const char *owner[128] = {};

  public:
    char message[192];

    int64_t operator[](char axis) const { return size[(int)axis]; }

    // False, and a message, when `tensor` does not fit the inputs before it.
    bool fit(const char *op, const Input &input, const Tensor &tensor) {
        if (tensor.rank != strlen(input.axes)) {
            snprintf(message, sizeof message, "evm::%s: %s has rank %zu, expected %zu", op, input.name, tensor.rank, strlen(input.axes));
            return false;
        }
        for (size_t i = 0; i < tensor.rank; i++) {
            const char axis = input.axes[i];
            const bool literal = axis >= '0' && axis <= '9';
            if (literal) size[(int)axis] = axis - '0';
            else if (!owner[(int)axis]) owner[(int)axis] = input.name, size[(int)axis] = tensor.dims[i];
            if (tensor.dims[i] == size[(int)axis]) continue;
            snprintf(message, sizeof message, "evm::%s: %s has %lld on axis %zu (%c), %s asks for %lld", op, input.name,
                     (long long)tensor.dims[i], i, axis, literal ? "the op" : owner[(int)axis], (long long)size[(int)axis]);
            return false;
        }
        return true;
    }

    // The same for a size that others determine.
    bool equal(const char *op, const char *what, int64_t have, int64_t want) {
        if (have == want) return true;
        snprintf(message, sizeof message, "evm::%s: %s is %lld, expected %lld", op, what, (long long)have, (long long)want);
        return false;
    }

    // The same for the scale of quantised values: positive, finite, and so is its inverse.
    bool scale(const char *op, const char *what, float have) {
        if (have >= FLT_MIN && have <= FLT_MAX) return true;
        snprintf(message, sizeof message, "evm::%s: %s is %g, expected a positive number", op, what, (double)have);
        return false;
    }
};

template <size_t COUNT>
Status read_inputs(Handle context, const char *op, const Input (&inputs)[COUNT], Tensor (&tensors)[COUNT], Sizes *sizes) {
    for (size_t i = 0; i < COUNT; i++) {
        RETURN_IF(read(context, i, &tensors[i]));
        if (!sizes->fit(op, inputs[i], tensors[i])) return fail(sizes->message);
    }
    return nullptr;
}

// A custom op for the CPU provider: float32 outputs, of which the first is shaped like the first input and the others are
// optional.
struct Op : CustomOp {
    const char *name;
    const Input *inputs;
    size_t input_count, outputs;

    static const Op &of(const CustomOp *op) { return *static_cast<const Op *>(op); }

    template <size_t COUNT>
    Op(const char *op_name, const Input (&of_op)[COUNT], size_t output_count, Status(ORT_CALL *compute)(Handle, Handle)) : CustomOp{} {
        name = op_name, inputs = of_op, input_count = COUNT, outputs = output_count;
        version = API_VERSION;
        GetName = [](const CustomOp *op) ORT_CALL -> const char * { return of(op).name; };
        GetExecutionProviderType = [](const CustomOp *) ORT_CALL -> const char * { return nullptr; };  // null: CPU
        GetInputType = [](const CustomOp *op, size_t index) ORT_CALL -> int { return of(op).inputs[index].type; };
        GetOutputType = [](const CustomOp *, size_t) ORT_CALL -> int { return FLOAT; };
        GetInputTypeCount = [](const CustomOp *op) ORT_CALL -> size_t { return of(op).input_count; };
        GetOutputTypeCount = [](const CustomOp *op) ORT_CALL -> size_t { return of(op).outputs; };
        GetInputCharacteristic = GetInputMemoryType = [](const CustomOp *, size_t) ORT_CALL -> int { return 0; };
        GetOutputCharacteristic = [](const CustomOp *, size_t index) ORT_CALL -> int { return index ? OPTIONAL : REQUIRED; };
        GetVariadicInputMinArity = GetVariadicInputHomogeneity = [](const CustomOp *) ORT_CALL -> int { return 0; };
        GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = GetVariadicInputMinArity;
        CreateKernel = [](const CustomOp *, Api, Handle) ORT_CALL -> Handle { return nullptr; };  // V2 is preferred
        KernelCompute = [](Handle, Handle) ORT_CALL {};
        // A kernel is the description of CPU memory, for its workspace.
        CreateKernelV2 = [](const CustomOp *, Api, Handle, Handle *kernel) ORT_CALL -> Status {
            return call<Status>(api, CreateCpuMemoryInfo, ARENA_ALLOCATOR, DEFAULT_MEMORY, kernel);
        };
        KernelDestroy = [](Handle kernel) ORT_CALL { call<void>(api, ReleaseMemoryInfo, kernel); };
        KernelComputeV2 = compute;
        InferOutputShapeFn = [](const CustomOp *, Handle context) ORT_CALL -> Status {
            Handle info = nullptr;
            Tensor first;
            RETURN_IF(call<Status>(api, ShapeInferContext_GetInputTypeShape, context, (size_t)0, &info));
            RETURN_IF(read_shape(info, &first));
            for (size_t i = 0; i < first.rank && i < MAX_RANK; i++)
                if (first.dims[i] < 0) return nullptr;  // unknown until run time: a -1 would be taken for a size
            return call<Status>(api, ShapeInferContext_SetOutputTypeShape, context, (size_t)0, (const void *)info);
        };
        GetStartVersion = [](const CustomOp *) ORT_CALL -> int { return 1; };
        GetEndVersion = [](const CustomOp *) ORT_CALL -> int { return INT32_MAX; };
    }
};

}  // namespace ort
