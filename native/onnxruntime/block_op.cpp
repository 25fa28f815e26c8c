// Custom ops evm::EVSSBlock, evm::EVSSBlockInt8 and evm::EVSSBlockInt8XProj for ONNX Runtime: pack constant weights when a session is
// made; then read tensors, fill the struct, run each step.
#include "op.h"

#include <stdlib.h>

using namespace ort;

namespace {

struct Step {
    const evm_block_args *args;
    int64_t image, step;
};

void run_tile(void *step, size_t tile) {
    const Step &s = *(const Step *)step;
    evm_block_run_tile(s.args, s.image, s.step, (int64_t)tile);
}

Status run(Handle context, const evm_block_args &args) {
    const int64_t steps = evm_block_num_steps(&args);
    for (int64_t image = 0; image < args.b; image++) {
        for (int64_t step = 0; step < steps; step++) {
            evm_block_mark(&args, step);
            Step s = {&args, image, step};
            const size_t tiles = (size_t)evm_block_num_tiles(&args, image, step);
            if (tiles) RETURN_IF(call<Status>(api, KernelContext_ParallelFor, context, &run_tile, tiles, (size_t)0, (void *)&s));
        }
        evm_block_mark(&args, steps);
    }
    return nullptr;
}

Status scan_outputs(Handle context, evm_block_args &args) {
    size_t outputs = 0;
    RETURN_IF(call<Status>(api, KernelContext_GetOutputCount, context, &outputs));
    for (size_t i = evm::SCAN_U; i < outputs && i < evm::BLOCK_OUTPUTS; i++) {
        const evm::Shape shape = evm::scan_shape(i, args.b, args.H, args.W, args.d, args.N);
        RETURN_IF(write(context, i, shape.dims, evm::output_field(args, i)));
    }
    return nullptr;
}

struct Kernel {
    Handle memory;    // OrtMemoryInfo of CPU memory, which the workspace is allocated from
    void *allocated;  // the memory around `packed`
    float *packed;    // packed weights, or null if they are not constant
};

void ORT_CALL destroy(Handle handle) {
    Kernel *const kernel = (Kernel *)handle;
    if (kernel->memory) call<void>(api, ReleaseMemoryInfo, kernel->memory);
    free(kernel->allocated);
    free(kernel);
}

// Read the constant inputs of a node. x, the first input, gets the channels of norm_weight. Set *constant to false if another input
// is not constant.
Status read_constants(Handle info, const evm::Op &op, evm::Tensor *in, bool *constant) {
    *constant = true;
    for (size_t i = 1; i < op.input_count && *constant; i++) {
        int is_constant = 0;
        Handle value = nullptr;
        RETURN_IF(call<Status>(api, KernelInfoGetConstantInput_tensor, info, i, &is_constant, &value));
        *constant = is_constant && value;
        if (*constant) RETURN_IF(read(value, &in[i]));
    }
    in[0] = {nullptr, {1, 1, 1, in[1].dims[0]}, 4};
    return nullptr;
}

// Pack the weights of a node, if they are constant and fit. Weights that do not fit are an error at the first inference.
Status pack(Handle info, const evm::Op &op, Kernel *kernel) {
    evm::Tensor in[evm::MAX_INPUTS] = {};
    evm::Sizes size;
    evm_block_args args = {};
    bool constant;
    RETURN_IF(read_constants(info, op, in, &constant));
    if (!constant || !fill(args, op, in, size)) return nullptr;
    constexpr uintptr_t ALIGNMENT = 64;
    kernel->allocated = malloc((size_t)evm_block_packed_bytes(&args) + ALIGNMENT);
    if (!kernel->allocated) return fail("out of memory for packed weights");
    kernel->packed = (float *)(((uintptr_t)kernel->allocated + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    evm_block_pack(&args, kernel->packed);
    return nullptr;
}

template <const evm::Op &OP>
Status ORT_CALL create(const CustomOp *, Api, Handle info, Handle *handle) {
    Kernel *const kernel = (Kernel *)calloc(1, sizeof(Kernel));
    if (!kernel) return fail("out of memory for a kernel");
    Status status = call<Status>(api, CreateCpuMemoryInfo, ARENA_ALLOCATOR, DEFAULT_MEMORY, &kernel->memory);
    if (!status) status = pack(info, OP, kernel);
    if (status) destroy(kernel);
    else *handle = kernel;
    return status;
}

template <const evm::Op &OP>
Status ORT_CALL compute(Handle handle, Handle context) {
    const Kernel *const kernel = (const Kernel *)handle;
    evm::Tensor in[evm::MAX_INPUTS];
    evm::Sizes size;
    evm_block_args args = {};
    RETURN_IF(read_inputs(context, OP, in));
    if (!fill(args, OP, in, size)) return fail(size.message);
    RETURN_IF(write(context, evm::OUT, in[0].dims, &args.out));
    RETURN_IF(scan_outputs(context, args));
    args.packed = kernel->packed;
    if (evm::empty(args)) return nullptr;
    Handle allocator = nullptr;
    RETURN_IF(call<Status>(api, KernelContext_GetAllocator, context, kernel->memory, &allocator));
    Status status = call<Status>(api, AllocatorAlloc, allocator, (size_t)evm_block_workspace_bytes(&args), (Handle *)&args.workspace);
    if (!status) {
        status = run(context, args);
        const Status freed = call<Status>(api, AllocatorFree, allocator, (Handle)args.workspace);
        if (!status) status = freed;
    }
    call<void>(api, ReleaseAllocator, allocator);
    return status;
}

}  // namespace

namespace ort {
extern const Op evss_block(evm::EVSS_BLOCK, create<evm::EVSS_BLOCK>, destroy, compute<evm::EVSS_BLOCK>);
extern const Op evss_block_int8(evm::EVSS_BLOCK_INT8, create<evm::EVSS_BLOCK_INT8>, destroy, compute<evm::EVSS_BLOCK_INT8>);
extern const Op evss_block_int8_x_proj(evm::EVSS_BLOCK_INT8_X_PROJ, create<evm::EVSS_BLOCK_INT8_X_PROJ>, destroy, compute<evm::EVSS_BLOCK_INT8_X_PROJ>);
}
