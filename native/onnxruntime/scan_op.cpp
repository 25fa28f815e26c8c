// Custom op evm::SelectiveScan for ONNX Runtime: read tensors, fill the struct, call the kernel.
#include "op.h"

using namespace ort;

namespace {

void run_tile(void *args, size_t tile) { evm_scan_run_tile((const evm_scan_args *)args, (int64_t)tile); }

Status ORT_CALL compute(Handle, Handle context) {
    evm::Tensor in[evm::MAX_INPUTS];
    evm::Sizes size;
    evm_scan_args args = {};
    RETURN_IF(read_inputs(context, evm::SELECTIVE_SCAN, in));
    if (!fill(args, evm::SELECTIVE_SCAN, in, size)) return fail(size.message);
    RETURN_IF(write(context, 0, in[0].dims, &args.y));
    const size_t tiles = (size_t)evm_scan_num_tiles(&args);
    if (!tiles) return nullptr;
    // ParallelFor uses the session's own intra-op thread pool; 0 lets the pool choose the number of batches.
    return call<Status>(api, KernelContext_ParallelFor, context, &run_tile, tiles, (size_t)0, (void *)&args);
}

}  // namespace

namespace ort {
extern const Op selective_scan(evm::SELECTIVE_SCAN, compute);
}
