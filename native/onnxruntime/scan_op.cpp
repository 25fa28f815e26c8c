// evm::SelectiveScan for ONNX Runtime: reads shapes, checks them, fills the struct, calls the kernel.
#include "evm_scan.h"
#include "op.h"

using namespace ort;

namespace {

const char *const NAME = "SelectiveScan";
const Input INPUTS[] = {{"u", "bKLD"}, {"delta", "bKLD"}, {"A", "KDN"}, {"B", "bKLN"}, {"C", "bKLN"}, {"skip", "KD"}, {"bias", "KD"}};
enum { U, DELTA, A, B, C, SKIP, BIAS, COUNT };

void run_tile(void *args, size_t tile) { evm_scan_run_tile((const evm_scan_args *)args, (int64_t)tile); }

Status ORT_CALL compute(Handle, Handle context) {
    Tensor in[COUNT];
    Sizes size;
    RETURN_IF(read_inputs(context, NAME, INPUTS, in, &size));
    float *y = nullptr;
    RETURN_IF(write(context, 0, in[U].dims, &y));
    evm_scan_args args = {};
    const float **const fields = &args.u;  // the inputs, in the same order
    for (size_t i = 0; i < COUNT; i++) fields[i] = in[i].as<float>();
    args.y = y, args.b = size['b'], args.K = size['K'], args.L = size['L'], args.D = size['D'], args.N = size['N'];
    const size_t tiles = (size_t)evm_scan_num_tiles(&args);
    if (!tiles) return nullptr;
    // the session's own intra-op thread pool; 0: as many batches as it likes
    return call<Status>(api, KernelContext_ParallelFor, context, &run_tile, tiles, (size_t)0, (void *)&args);
}

static_assert(offsetof(evm_scan_args, y) == COUNT * sizeof(float *), "inputs of the op and of the kernel differ");

}  // namespace

namespace ort {
extern const Op selective_scan(NAME, INPUTS, 1, compute);
}
