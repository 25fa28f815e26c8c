/* Constants and functions that dispatch.cpp shares with the files compiled per instruction set. */
#pragma once
#include "evm_block.h"
#include "evm_scan.h"

enum {
    EVM_PAD = 16,  /* rows of the workspace have a multiple of EVM_PAD floats: one AVX-512 vector, two of AVX2, four of NEON */
    EVM_TILE = 48, /* channels of a scan tile: long rows for fast reads, and enough tiles for eight threads */
    EVM_GROUP = 64 /* states that a scan advances together; with no more states it may write y over u */
};

/* Rows of one direction of one image, from one channel on. y may be the same array as u if N <= EVM_GROUP. */
struct ScanRows {
    const float *u;
    float *y;
    int64_t stride;               /* floats between two steps of u, delta and y */
    const float *B, *C;
    int64_t state_stride;         /* floats between two steps of B, C and dt */
    const float *A, *skip, *bias; /* constants of these channels; A is (channels, N) */
    const float *delta;           /* delta before softplus; if null, delta = dt times dt_weight (R, stride) */
    const float *dt, *dt_weight;
    int64_t R, L, N;
    bool no_softplus;             /* if true, dt = delta + bias */
    float *delta_out;             /* output array of delta for verification, laid out as u without padding, or null */
    int64_t delta_out_stride;
};

/* Function that computes one tile of a step of a block whose weights are packed. */
typedef void (*BlockTile)(const evm_block_args *, float *packed, float *workspace, int64_t image, int64_t step, int64_t tile);

#define EVM_NAME_(function, isa) function##_##isa
#define EVM_NAME(function, isa) EVM_NAME_(function, isa)
#define EVM_DECLARE(isa)                                      \
    void evm_scan_tile_##isa(const evm_scan_args *, int64_t); \
    void evm_scan_rows_##isa(const ScanRows *, int64_t);      \
    BlockTile evm_block_pack_##isa(const evm_block_args *, float *packed);

#ifdef __cplusplus
extern "C" {
#endif
EVM_DECLARE(base)
EVM_DECLARE(avx2)
EVM_DECLARE(avxvnni)
EVM_DECLARE(avx512)
EVM_DECLARE(avx512vnni)
EVM_DECLARE(avx512bf16)
EVM_DECLARE(neon)
EVM_DECLARE(dotprod)
EVM_DECLARE(fp16)
EVM_DECLARE(i8mm)
EVM_DECLARE(simd128)
#ifdef __cplusplus
}
#endif
