// One fused block for WebAssembly, of the kernel `base` with 4 lanes: benchmarks/web_block.py compiles it with native/scan.
#include "evm_block.h"

#include <stddef.h>
#include <stdlib.h>

namespace {

evm_block_args args;

float *floats(int64_t count) { return (float *)aligned_alloc(64, (size_t)(count * 4 + 63) / 64 * 64); }

}  // namespace

extern "C" {

// Sizes b, H, W, C, d, N, R, G, to be written before input().
int64_t *sizes() { return &args.b; }

// Memory for input `i` of the block, in the order of evm_block_args.
float *input(int i, int count) {
    float *memory = floats(count);
    (&args.x)[i] = memory;
    return memory;
}

// Pack the weights. Returns the output.
float *prepare() {
    args.out = floats(args.b * args.H * args.W * args.C);
    args.workspace = floats(evm_block_workspace_bytes(&args) / 4 + 16);
    float *packed = floats(evm_block_packed_bytes(&args) / 4 + 16);
    evm_block_pack(&args, packed);
    args.packed = packed;
    return args.out;
}

void run() {
    for (int64_t image = 0; image < args.b; image++)
        for (int stage = 0; stage < EVM_BLOCK_STAGES; stage++) {
            const int64_t tiles = evm_block_num_tiles(&args, image, stage);
            for (int64_t tile = 0; tile < tiles; tile++) evm_block_run_tile(&args, image, stage, tile);
        }
}
}
