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
    evm_scan_args args = {in[U].data,    in[DELTA].data, in[A].data, in[B].data, in[C].data, in[SKIP].data,
                          in[BIAS].data, y,              size['b'],  size['K'],  size['L'],  size['D'],
                          size['N']};
    const size_t tiles = (size_t)evm_scan_num_tiles(&args);
    if (!tiles) return nullptr;
    // the session's own intra-op thread pool; 0: as many batches as it likes
    return call<Status>(api, KernelContext_ParallelFor, context, &run_tile, tiles, (size_t)0, (void *)&args);
}

}  // namespace

namespace ort {
extern const Op selective_scan(NAME, COUNT, 1, compute);
}
