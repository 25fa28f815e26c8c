// Computation of one tile of evm_scan. The file is compiled once per instruction set, with the macros EVM_ISA (name), EVM_LANES,
// EVM_STATES and EVM_ACCUMULATORS; but not for a kernel that uses the scan of another, EVM_SCAN.
#if !defined(EVM_SCAN)
#include "scan.h"

extern "C" {

void EVM_NAME(evm_scan_rows, EVM_ISA)(const ScanRows *rows, int64_t channels) { scan_channels(*rows, channels); }

void EVM_NAME(evm_scan_tile, EVM_ISA)(const evm_scan_args *a, int64_t tile) {
    const int64_t L = a->L, D = a->D, N = a->N, per_row = (D + EVM_TILE - 1) / EVM_TILE;
    const int64_t row = tile / per_row, channel = tile % per_row * EVM_TILE, constant = row % a->K * D + channel;
    ScanRows rows = {};
    rows.u = a->u + row * L * D + channel, rows.y = a->y + row * L * D + channel, rows.stride = D;
    rows.delta = a->delta + row * L * D + channel;
    rows.B = a->B + row * L * N, rows.C = a->C + row * L * N, rows.state_stride = N;
    rows.A = a->A + constant * N, rows.skip = a->skip + constant, rows.bias = a->bias + constant;
    rows.L = L, rows.N = N, rows.no_softplus = a->no_softplus != 0;
    scan_channels(rows, D - channel < EVM_TILE ? D - channel : (int64_t)EVM_TILE);
}
}
#endif
