/* C interface of the selective scan (Mamba-1) on a CPU, independent of any runtime.
 *
 *   dt = softplus(delta + bias);  h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t;  y_t = <C_t, h_t> + skip u_t
 *
 * Arrays are channels last, contiguous and float32. Work is cut into independent tiles (up to 48 channels of one direction of one
 * image), so that the host runtime's own thread pool can distribute them. b, K, L, D and N may have any size.
 * A must not be positive; A = -exp(A_log) never is. No function allocates memory or throws.
 */
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define EVM_API __declspec(dllexport)
#else
#define EVM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const float *u, *delta;   /* (b, K, L, D); delta before softplus */
    const float *A;           /* (K, D, N), <= 0 */
    const float *B, *C;       /* (b, K, L, N) */
    const float *skip, *bias; /* (K, D) */
    float *y;                 /* (b, K, L, D) */
    int64_t b, K, L, D, N;
    int64_t no_softplus;      /* if not 0: dt = delta + bias */
} evm_scan_args;

/* Number of tiles of a scan. */
EVM_API int64_t evm_scan_num_tiles(const evm_scan_args *args);
/* Compute one tile. Tiles may run in any order, in any threads. */
EVM_API void evm_scan_run_tile(const evm_scan_args *args, int64_t tile);

/* Name of the instruction set in use, as in kernels.txt: "avx2", for example. It is the one that the environment variable
 * EVM_ISA names when the library is loaded; without EVM_ISA, the best that this CPU runs. */
EVM_API const char *evm_scan_isa(void);
/* Error message if EVM_ISA names an instruction set that the library does not contain or that this CPU lacks, else NULL. A host
 * that loads the library reports the message as an error: the library itself then uses the best instruction set. */
EVM_API const char *evm_scan_isa_error(void);
/* Choose an instruction set by name, NULL for the one chosen when the library was loaded. Returns 0 and changes nothing if the library does not contain the
 * instruction set or this CPU lacks it. */
EVM_API int evm_scan_force_isa(const char *name);

#ifdef __cplusplus
}
#endif
