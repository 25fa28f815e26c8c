/* What kernel.cpp (per instruction set) and dispatch.cpp share. */
#pragma once
#include "evm_scan.h"

enum { EVM_TILE = 16 }; /* channels of a tile: one AVX-512 vector, two of AVX2, four of NEON */

#define EVM_TILE_NAME_(isa) evm_scan_tile_##isa
#define EVM_TILE_NAME(isa) EVM_TILE_NAME_(isa)

#ifdef __cplusplus
extern "C" {
#endif
void evm_scan_tile_base(const evm_scan_args *, int64_t);
void evm_scan_tile_avx2(const evm_scan_args *, int64_t);
void evm_scan_tile_avx512(const evm_scan_args *, int64_t);
void evm_scan_tile_neon(const evm_scan_args *, int64_t);
#ifdef __cplusplus
}
#endif
