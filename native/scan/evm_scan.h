/* The selective scan (Mamba-1) on a CPU: a C interface that knows no runtime.
 *
 *   dt = softplus(delta + bias);  h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t;  y_t = <C_t, h_t> + skip u_t
 *
 * Channels last, contiguous, float32. Work is cut into independent tiles (up to 48 channels of one direction of one image), so
 * that the host runtime's own thread pool can distribute them. Any b, K, L, D, N, none of them a multiple of anything.
 * A must not be positive: A = -exp(A_log) never is. Nothing is allocated, nothing is thrown.
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
} evm_scan_args;

/* Tiles of a problem; evm_scan_run_tile may be called for each of them from any thread. */
EVM_API int64_t evm_scan_num_tiles(const evm_scan_args *args);
EVM_API void evm_scan_run_tile(const evm_scan_args *args, int64_t tile);

/* The instruction set in use: "avx512vnni", "avx512", "avx2", "neon" or "base". */
EVM_API const char *evm_scan_isa(void);
/* Choose one by name, NULL for the best. Returns 0, and changes nothing, where it is not built or this CPU lacks it. */
EVM_API int evm_scan_force_isa(const char *name);

#ifdef __cplusplus
}
#endif
