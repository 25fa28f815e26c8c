// Custom ops evm::EVSSBlock and evm::EVSSBlockInt8 for ONNX Runtime: read tensors, fill the struct, run each stage.
#include "op.h"

using namespace ort;

namespace {

struct Stage {
    const evm_block_args *args;
    int64_t image;
    int stage;
};

void run_tile(void *stage, size_t tile) {
    const Stage &s = *(const Stage *)stage;
    evm_block_run_tile(s.args, s.image, s.stage, (int64_t)tile);
}

Status run(Handle context, const evm_block_args &args) {
    for (int64_t image = 0; image < args.b; image++) {
        for (int stage = 0; stage < EVM_BLOCK_STAGES; stage++) {
            evm_block_mark(stage);
            Stage s = {&args, image, stage};
            const size_t tiles = (size_t)evm_block_num_tiles(&args, image, stage);
            if (tiles) RETURN_IF(call<Status>(api, KernelContext_ParallelFor, context, &run_tile, tiles, (size_t)0, (void *)&s));
        }
        evm_block_mark(EVM_BLOCK_STAGES);
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

template <const evm::Op &OP>
Status ORT_CALL compute(Handle memory, Handle context) {
    evm::Tensor in[evm::MAX_INPUTS];
    evm::Sizes size;
    evm_block_args args = {};
    RETURN_IF(read_inputs(context, OP, in));
    if (!fill(args, OP, in, size)) return fail(size.message);
    RETURN_IF(write(context, evm::OUT, in[0].dims, &args.out));
    RETURN_IF(scan_outputs(context, args));
    if (evm::empty(args)) return nullptr;
    Handle allocator = nullptr;
    RETURN_IF(call<Status>(api, KernelContext_GetAllocator, context, memory, &allocator));
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
extern const Op evss_block(evm::EVSS_BLOCK, compute<evm::EVSS_BLOCK>);
extern const Op evss_block_int8(evm::EVSS_BLOCK_INT8, compute<evm::EVSS_BLOCK_INT8>);
}
