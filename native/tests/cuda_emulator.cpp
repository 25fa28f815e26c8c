// CPU emulator of the CUDA kernels; it includes native/tensorrt/selective_scan.cu itself. Each thread of a block is a fiber, which
// runs up to its next __syncthreads() and then yields to the next fiber. The fibers run forwards or backwards through the block: a
// missing barrier gives wrong results in one of the orders. The emulator tests indices, barriers and tails, but not ex2.approx,
// bank conflicts or speed.
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

struct Dim {
    int x, y, z;
};
struct __half {
    _Float16 value;
};
static float __half2float(__half h) { return static_cast<float>(h.value); }
static __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
static Dim threadIdx, blockIdx, gridDim;

namespace {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
};
std::vector<Fiber> fibers;
ucontext_t scheduler;
int current;

}  // namespace

static void __syncthreads() {
#ifndef EVM_WITHOUT_BARRIERS
    swapcontext(&fibers[current].context, &scheduler);
    threadIdx.x = current;
#endif
}

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(x)
#define EVM_EMULATED
#include "../tensorrt/selective_scan.cu"

namespace {

struct Call {
    const void *u, *delta, *B, *C;
    const float *A, *skip, *bias;
    int L, D, N;
    void* y;
    int half, no_softplus;
} call;
std::vector<char> done;

template <typename T>
using Kernel = void (*)(const T*, const T*, const float*, const T*, const T*, const float*, const float*, int, int, int, T*);

template <typename T>
void run(Kernel<T> kernel) {
    kernel(static_cast<const T*>(call.u), static_cast<const T*>(call.delta), call.A, static_cast<const T*>(call.B),
           static_cast<const T*>(call.C), call.skip, call.bias, call.L, call.D, call.N, static_cast<T*>(call.y));
}

void body() {
    threadIdx.x = current;
    if (call.no_softplus) call.half ? run(evm_scan_dt_f16) : run(evm_scan_dt_f32);
    else call.half ? run(evm_scan_f16) : run(evm_scan_f32);
    done[current] = 1;
}

void run_block(int threads, bool backwards) {
    done.assign(threads, 0);
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, body, 0);
    }
    for (int left = threads; left;) {
        left = 0;
        for (int i = 0; i < threads; i++) {
            current = backwards ? threads - 1 - i : i;
            if (!done[current]) swapcontext(&scheduler, &fibers[current].context);
            left += !done[current];
        }
    }
}

}  // namespace

extern "C" void evm_emulate(const void* u, const void* delta, const float* A, const void* B, const void* C, const float* skip,
                            const float* bias, int L, int D, int N, void* y, int half, const int32_t* grid, int threads,
                            int backwards, int no_softplus) {
    call = {u, delta, B, C, A, skip, bias, L, D, N, y, half, no_softplus};
    fibers = std::vector<Fiber>(threads);
    gridDim = {grid[0], grid[1], grid[2]};
    for (int z = 0; z < grid[2]; z++)
        for (int k = 0; k < grid[1]; k++)
            for (int x = 0; x < grid[0]; x++) {
                blockIdx = {x, k, z};
                run_block(threads, backwards);
            }
}
