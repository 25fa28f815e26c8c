/* Constants and functions that dispatch.cpp shares with the files compiled per instruction set. */
#pragma once
#include "evm_block.h"
#include "evm_scan.h"

enum {
    EVM_PAD = 16,  /* rows of the workspace have a multiple of EVM_PAD floats: one AVX-512 vector, two of AVX2, four of NEON */
    EVM_TILE = 48, /* channels of a scan tile: long rows for fast reads, and enough tiles for eight threads */
};

#define EVM_NAME_(function, isa) function##_##isa
#define EVM_NAME(function, isa) EVM_NAME_(function, isa)
#define EVM_DECLARE(isa)                                          \
    void evm_scan_tile_##isa(const evm_scan_args *, int64_t);     \
    void evm_block_pack_##isa(const evm_block_args *, float *);   \
    void evm_block_tile_##isa(const evm_block_args *, float *, float *, int64_t, int, int64_t);

#ifdef __cplusplus
extern "C" {
#endif
EVM_DECLARE(base)
EVM_DECLARE(avx2)
EVM_DECLARE(avxvnni)
EVM_DECLARE(avx512)
EVM_DECLARE(avx512vnni)
EVM_DECLARE(neon)
EVM_DECLARE(dotprod)
#ifdef __cplusplus
}
#endif
