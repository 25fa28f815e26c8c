// One tile of evm_scan, compiled once per instruction set: EVM_ISA (name), EVM_LANES, EVM_STATES, EVM_ACCUMULATORS.
#include "scan.h"
#include "isa.h"

static_assert(EVM_TILE % LANES == 0, "vectors do not divide a tile");

extern "C" void EVM_NAME(evm_scan_tile, EVM_ISA)(const evm_scan_args *a, int64_t tile) {
    const int64_t L = a->L, D = a->D, N = a->N, per_row = (D + EVM_TILE - 1) / EVM_TILE;
    const int64_t row = tile / per_row, direction = row % a->K, begin = tile % per_row * EVM_TILE;
    for (int64_t channel = begin; channel < begin + EVM_TILE && channel < D; channel += LANES) {
        const int64_t at = row * L * D + channel, constant = direction * D + channel;
        ScanRows rows = {};
        rows.u = a->u + at, rows.y = a->y + at, rows.delta = a->delta + at, rows.stride = D;
        rows.B = a->B + row * L * N, rows.C = a->C + row * L * N, rows.state_stride = N;
        rows.A = a->A + constant * N, rows.skip = a->skip + constant, rows.bias = a->bias + constant;
        rows.L = L, rows.N = N;
        scan_vector(rows, D - channel < LANES ? D - channel : LANES);
    }
}
