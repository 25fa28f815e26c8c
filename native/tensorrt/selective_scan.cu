// CUDA kernels of the Mamba-1 selective scan, channels last, for TensorRT: in an engine (AOT plugin) or a library (C++ plugin).
//   u, delta, y (b, K, L, D), B, C (b, K, L, N): T is float or half;  A (K, D, N), skip, bias (K, D): float.  State: float.
//
// A block of 128 threads scans 8 channels of one direction, 16 steps at a time. In the recurrence a thread computes one state of
// one channel. Before and after it, a thread computes one step of one channel, so that 8 channels are one sector of memory.
// Sums over the states go through shared memory, in rows of 17 words: 32 rows that are summed at once have no bank conflict.
// The kernels named _dt compute dt = delta + bias, without softplus.
// Launch: grid (ceil(D / 8), K, b), block 128, no dynamic shared memory. Any b, K, L, D; N from 1 to 16.
// The next tile is loaded while the current one is computed. Only cuda_fp16.h is included: NVRTC has no system headers.
#include "selective_scan.h"
#ifndef EVM_EMULATED
#include <cuda_fp16.h>
#endif

namespace {

constexpr int kSteps = kThreads / kChannels;
static_assert(kSteps == kStates && kThreads == kChannels * kStates, "a thread is a step and a state of a channel");

__device__ inline float load(const float* p) { return *p; }
__device__ inline float load(const __half* p) { return __half2float(*p); }
__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(__half* p, float v) { *p = __float2half_rn(v); }

__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

template <bool SOFTPLUS, typename T>
__device__ inline void scan(const T* u, const T* delta, const float* A, const T* B, const T* C, const float* skip,
                            const float* bias, int L, int D, int N, T* y) {
    __shared__ float inflow[kSteps][kChannels], rate[kSteps][kChannels];
    __shared__ float tile_B[kSteps][kStates], tile_C[kSteps][kStates];
    __shared__ float terms[kSteps][kChannels][kStates + 1];

    const int thread = threadIdx.x, first = blockIdx.x * kChannels, direction = blockIdx.y;
    const size_t sequence = (size_t)blockIdx.z * gridDim.y + direction;
    u += sequence * L * D, delta += sequence * L * D, y += sequence * L * D;
    B += sequence * L * N, C += sequence * L * N;

    const int step = thread / kChannels, channel = thread % kChannels;  // work before and after the recurrence
    const int state = thread % kStates, row = thread / kStates;         // work in the recurrence: channel first + row
    const bool mine = first + channel < D;
    const size_t own = (size_t)direction * D + first;
    const float channel_bias = mine ? bias[own + channel] : 0.0f, channel_skip = mine ? skip[own + channel] : 0.0f;
    const bool real = first + row < D && state < N;  // if false, the thread's state has A = B = C = 0
    const float a = real ? A[(own + row) * N + state] * 1.44269504088896341f : 0.0f;  // exp(x) = 2^(x log2 e)

    float next_u, next_delta, next_B[2], next_C[2];
    auto fetch = [&](int start) {
        const bool inside = mine && start + step < L;
        const size_t at = (size_t)(start + step) * D + first + channel;
        next_u = inside ? load(u + at) : 0.0f;
        next_delta = inside ? load(delta + at) : 0.0f;
        for (int half = 0; half < 2; half++) {
            const int t = start + row + half * kChannels;
            const bool there = t < L && state < N;
            next_B[half] = there ? load(B + (size_t)t * N + state) : 0.0f;
            next_C[half] = there ? load(C + (size_t)t * N + state) : 0.0f;
        }
    };

    float h = 0.0f;
    fetch(0);
    for (int start = 0; start < L; start += kSteps) {
        const bool inside = mine && start + step < L;
        const float now_u = next_u, raw = next_delta + channel_bias;
        const float dt = inside ? (SOFTPLUS ? softplus(raw) : raw) : 0.0f;  // dt = 0 keeps h
        rate[step][channel] = dt;
        inflow[step][channel] = dt * now_u;
        for (int half = 0; half < 2; half++) {
            tile_B[row + half * kChannels][state] = next_B[half];
            tile_C[row + half * kChannels][state] = next_C[half];
        }
        __syncthreads();
        if (start + kSteps < L) fetch(start + kSteps);
#pragma unroll
        for (int t = 0; t < kSteps; t++) {
            h = fmaf(exp2_fast(rate[t][row] * a), h, inflow[t][row] * tile_B[t][state]);
            terms[t][row][state] = h * tile_C[t][state];
        }
        __syncthreads();
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kStates; n++) sum += terms[step][channel][n];
        if (inside) store(y + (size_t)(start + step) * D + first + channel, fmaf(channel_skip, now_u, sum));
    }
}

}  // namespace

EVM_SCAN_KERNEL(evm_scan_f32, float) { scan<true>(u, delta, A, B, C, skip, bias, L, D, N, y); }
EVM_SCAN_KERNEL(evm_scan_f16, __half) { scan<true>(u, delta, A, B, C, skip, bias, L, D, N, y); }
EVM_SCAN_KERNEL(evm_scan_dt_f32, float) { scan<false>(u, delta, A, B, C, skip, bias, L, D, N, y); }
EVM_SCAN_KERNEL(evm_scan_dt_f16, __half) { scan<false>(u, delta, A, B, C, skip, bias, L, D, N, y); }
