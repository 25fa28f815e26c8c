/* C interface of a fused EVSS block of EfficientVMamba (arXiv 2403.09977) on a CPU, independent of any runtime.
 *
 *   n    = LayerNorm(x)
 *   xz   = n in_proj;  x, z = its halves;  u = atrous split of SiLU(conv(x))           (2 x 2 phases, odd sizes zero-padded)
 *   dt, B, C = u x_proj;  delta = dt dt_proj;  y = selective scan of them (evm_scan.h);  s = merge of y
 *   scan  branch = (LayerNorm(s) * SiLU(z)) out_proj
 *   local branch = local_proj(GELU(local_conv(n)))
 *   out  = x + (gate(scan branch) + gate(local branch)),  gate(t) = t * sigmoid(select(GELU(reduce(mean(LayerNorm(t))))))
 *
 * Arrays are channels last, contiguous and float32. d: inner channels, N: states, R: rank of dt, G: gate channels. The epsilon of
 * LayerNorm is 1e-5; GELU is the exact one. Matrices are (in, out); convolution weights are (out, in / groups, h, w). b, H, W
 * and the widths may have any size.
 *
 * in_proj, out_proj and local_proj may have int8 weights and inputs quantised to uint8, and then x_proj too. They are computed as
 * ONNX's QuantizeLinear, DequantizeLinear and MatMul define: q = saturate(round half to even(input / input_scale) +
 * input_zero_point), int32 sums of (q - input_zero_point) * weight, float32 = sum * (input_scale * scale of the column).
 * local_conv reads the float n, the scan the float u. The sums are the same integers on every instruction set. C and d up to 65536.
 *
 * With `half`, a block without int8 layers multiplies numbers of half precision in these four layers on a CPU that can, and float32 on
 * others: EVM_BFLOAT16 on a CPU with AVX512_BF16, EVM_FLOAT16 on an Arm CPU with FP16 arithmetic (FEAT_FP16) and dotprod. Sums are
 * float32, of float16 after every 64 products. All other arithmetic is float32.
 *
 * An image is computed in steps, in order. A step is one of EVM_BLOCK_STAGES stages, for the whole map or for a group of its rows.
 * The tiles of a step are independent, so that the host runtime's own thread pool can distribute them; the result does not depend
 * on the distribution. No function allocates memory or throws.
 */
#pragma once
#include "evm_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { EVM_BLOCK_DIRECTIONS = 4, EVM_BLOCK_STAGES = 8, EVM_BFLOAT16 = 1, EVM_FLOAT16 = 2 };

typedef struct {
    const int8_t *weight;  /* same layout as the weight of the float layer; -128 is allowed */
    const float *scale;    /* scale of the weights of each output channel */
    float input_scale;     /* positive, with a finite inverse */
    uint8_t input_zero_point;
} evm_int8_linear;

typedef struct {
    const float *x;                               /* (b, H, W, C) */
    const float *norm_weight, *norm_bias;         /* (C) */
    const float *in_proj;                         /* (C, 2 d) */
    const float *conv_weight, *conv_bias;         /* depthwise: (d, 1, 3, 3), (d) */
    const float *x_proj;                          /* (4, d, R + 2 N) */
    const float *dt_proj;                         /* (4, R, d) */
    const float *A, *skip, *dt_bias;              /* (4, d, N), <= 0; (4, d); (4, d) */
    const float *out_norm_weight, *out_norm_bias; /* (d) */
    const float *out_proj;                        /* (d, C) */
    const float *local_conv_weight, *local_conv_bias; /* depthwise: (C, 1, 3, 3), (C) */
    const float *local_proj_weight, *local_proj_bias; /* (C, C, 1, 1), (C) */
    const float *gate_norm_weight, *gate_norm_bias;   /* (C) */
    const float *gate_reduce_weight, *gate_reduce_bias; /* (C, G), (G) */
    const float *gate_select_weight, *gate_select_bias; /* (G, C), (C) */
    float *out;                                   /* (b, H, W, C); it holds the scan branch before the sum, so it must not overlap x */
    /* Inputs and output of the scan, for verification, or null: (b, 4, L, d) or (b, 4, L, N), L = ceil(H/2) ceil(W/2). */
    float *scan_u, *scan_delta, *scan_B, *scan_C, *scan_y;
    float *packed;    /* weights that evm_block_pack has packed, or null: then the first step packs them into the workspace */
    float *workspace; /* evm_block_workspace_bytes bytes, aligned to 64; the contents need not be kept between calls */
    int64_t b, H, W, C, d, N, R, G;
    /* int8 layers that replace in_proj, out_proj and local_proj_weight, all three, and x_proj, whose scales are (4, R + 2 N). The
     * weight of a layer that is not replaced is null. */
    evm_int8_linear in_proj_int8, x_proj_int8, out_proj_int8, local_proj_int8;
    int32_t half; /* EVM_BFLOAT16, EVM_FLOAT16 or 0; 0 for a block with int8 layers */
} evm_block_args;

/* Size of packed weights in bytes. It depends on the widths alone. */
EVM_API int64_t evm_block_packed_bytes(const evm_block_args *args);
/* Pack all weights, once for any number of calls, into `packed`, aligned to 64. x, out and b, H, W are not read. Calls with these
 * packed weights run the kernel that packed them. */
EVM_API void evm_block_pack(const evm_block_args *args, float *packed);
/* Size of the workspace in bytes. */
EVM_API int64_t evm_block_workspace_bytes(const evm_block_args *args);
/* Number of steps of an image. */
EVM_API int64_t evm_block_num_steps(const evm_block_args *args);
/* Number of tiles of one step of one image. */
EVM_API int64_t evm_block_num_tiles(const evm_block_args *args, int64_t image, int64_t step);
/* Compute one tile of one step of one image. Tiles of the same step may run in any order, in any threads. */
EVM_API void evm_block_run_tile(const evm_block_args *args, int64_t image, int64_t step, int64_t tile);

/* Mark the time between steps, for evm_block_trace. The host calls it before each step of an image, and with the number of steps
 * after the last step. Without a trace it costs one comparison. */
EVM_API void evm_block_mark(const evm_block_args *args, int64_t step);

/* Start a trace: from now on the time of each stage is written to `ticks`, (rows, EVM_BLOCK_STAGES), one row for each image of
 * each block, in order, until the array is full. The unit is ticks of the CPU's constant counter; 0 where the counter is unknown.
 * rows = 0 ends the trace. During a trace only one block may run at a time. */
EVM_API void evm_block_trace(uint64_t *ticks, int64_t rows);

#ifdef __cplusplus
}
#endif
