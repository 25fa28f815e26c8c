// Custom op evm::SelectiveScan for ONNX Runtime: read tensors, fill the struct, call the kernel.
#include "op.h"

using namespace ort;

namespace {

void run_tile(void *args, size_t tile) { evm_scan_run_tile((const evm_scan_args *)args, (int64_t)tile); }

// The kernel handle points to one of these, the value of the node's attribute delta_softplus. No attribute: 1.
int64_t softplus[] = {0, 1};

Status ORT_CALL create(const CustomOp *, Api, Handle info, Handle *kernel) {
    int64_t value = 1;
    const Status missing = call<Status>(api, KernelInfoGetAttribute_int64, info, "delta_softplus", &value);
    if (missing) call<void>(api, ReleaseStatus, missing);
    *kernel = &softplus[missing || value];
    return nullptr;
}

Status ORT_CALL compute(Handle kernel, Handle context) {
    evm::Tensor in[evm::MAX_INPUTS];
    evm::Sizes size;
    evm_scan_args args = {};
    RETURN_IF(read_inputs(context, evm::SELECTIVE_SCAN, in));
    if (!fill(args, evm::SELECTIVE_SCAN, in, size)) return fail(size.message);
    args.no_softplus = !*(const int64_t *)kernel;
    RETURN_IF(write(context, 0, in[0].dims, &args.y));
    const size_t tiles = (size_t)evm_scan_num_tiles(&args);
    if (!tiles) return nullptr;
    // ParallelFor uses the session's own intra-op thread pool; 0 lets the pool choose the number of batches.
    return call<Status>(api, KernelContext_ParallelFor, context, &run_tile, tiles, (size_t)0, (void *)&args);
}

void ORT_CALL destroy(Handle) {}

}  // namespace

namespace ort {
extern const Op selective_scan(evm::SELECTIVE_SCAN, create, destroy, compute);
}
