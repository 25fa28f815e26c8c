// Shared code of the custom ops: reading and writing tensors, and the table of callbacks.
#pragma once
#include "ops.h"
#include "ort_abi.h"

namespace ort {

extern Api api;  // the API of the runtime that loaded the library

#define RETURN_IF(status)                                        \
    do {                                                         \
        if (::ort::Status failed_ = (status)) return failed_;    \
    } while (0)

inline Status fail(const char *message) { return call<Status>(api, CreateStatus, INVALID_ARGUMENT, message); }

inline Status read_shape(Handle info, evm::Tensor *tensor) {
    RETURN_IF(call<Status>(api, GetDimensionsCount, info, &tensor->rank));
    if (tensor->rank > evm::MAX_RANK) return nullptr;  // no op takes this rank: fit() reports it
    return call<Status>(api, GetDimensions, info, (int64_t *)tensor->dims, tensor->rank);
}

inline Status read(Handle value, evm::Tensor *tensor) {
    Handle info = nullptr;
    RETURN_IF(call<Status>(api, GetTensorTypeAndShape, value, &info));
    const Status status = read_shape(info, tensor);
    call<void>(api, ReleaseTensorTypeAndShapeInfo, info);
    RETURN_IF(status);
    return call<Status>(api, GetTensorMutableData, value, (Handle *)&tensor->data);
}

// Allocate an output with evm::MAX_RANK axes. `data` stays unchanged if the node does not have this output.
inline Status write(Handle context, size_t index, const int64_t *dims, float **data) {
    Handle value = nullptr;
    RETURN_IF(call<Status>(api, KernelContext_GetOutput, context, index, dims, evm::MAX_RANK, &value));
    if (!value) return nullptr;
    return call<Status>(api, GetTensorMutableData, value, (Handle *)data);
}

inline Status read_inputs(Handle context, const evm::Op &op, evm::Tensor *tensors) {
    for (size_t i = 0; i < op.input_count; i++) {
        Handle value = nullptr;
        RETURN_IF(call<Status>(api, KernelContext_GetInput, context, i, &value));
        RETURN_IF(read(value, &tensors[i]));
    }
    return nullptr;
}

// Custom op for the CPU execution provider, made from the description of an operator.
struct Op : CustomOp {
    const evm::Op &op;

    static const evm::Op &of(const CustomOp *custom) { return static_cast<const Op *>(custom)->op; }

    Op(const evm::Op &described, Status(ORT_CALL *create)(const CustomOp *, Api, Handle, Handle *), void(ORT_CALL *destroy)(Handle),
       Status(ORT_CALL *compute)(Handle, Handle))
        : CustomOp{}, op(described) {
        version = API_VERSION;
        GetName = [](const CustomOp *op) ORT_CALL -> const char * { return of(op).name; };
        GetExecutionProviderType = [](const CustomOp *) ORT_CALL -> const char * { return nullptr; };  // null: CPU
        GetInputType = [](const CustomOp *op, size_t index) ORT_CALL -> int { return of(op).inputs[index].type; };
        GetOutputType = [](const CustomOp *, size_t) ORT_CALL -> int { return evm::FLOAT; };
        GetInputTypeCount = [](const CustomOp *op) ORT_CALL -> size_t { return of(op).input_count; };
        GetOutputTypeCount = [](const CustomOp *op) ORT_CALL -> size_t { return of(op).output_count; };
        GetInputCharacteristic = GetInputMemoryType = [](const CustomOp *, size_t) ORT_CALL -> int { return 0; };
        GetOutputCharacteristic = [](const CustomOp *, size_t index) ORT_CALL -> int { return index ? OPTIONAL : REQUIRED; };
        GetVariadicInputMinArity = GetVariadicInputHomogeneity = [](const CustomOp *) ORT_CALL -> int { return 0; };
        GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = GetVariadicInputMinArity;
        CreateKernel = [](const CustomOp *, Api, Handle) ORT_CALL -> Handle { return nullptr; };  // V2 is preferred
        KernelCompute = [](Handle, Handle) ORT_CALL {};
        CreateKernelV2 = create;
        KernelDestroy = destroy;
        KernelComputeV2 = compute;
        InferOutputShapeFn = [](const CustomOp *, Handle context) ORT_CALL -> Status {
            Handle info = nullptr;
            evm::Tensor first;
            RETURN_IF(call<Status>(api, ShapeInferContext_GetInputTypeShape, context, (size_t)0, &info));
            RETURN_IF(read_shape(info, &first));
            for (size_t i = 0; i < first.rank && i < evm::MAX_RANK; i++)
                if (first.dims[i] < 0) return nullptr;  // unknown until run time; the runtime would take -1 as a size
            return call<Status>(api, ShapeInferContext_SetOutputTypeShape, context, (size_t)0, (const void *)info);
        };
        GetStartVersion = [](const CustomOp *) ORT_CALL -> int { return 1; };
        GetEndVersion = [](const CustomOp *) ORT_CALL -> int { return INT32_MAX; };
    }
};

}  // namespace ort
