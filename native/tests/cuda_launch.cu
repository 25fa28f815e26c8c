// C interface to launch the CUDA kernels of native/tensorrt/selective_scan.cu, for benchmarks/gpu.py. Arguments: those of
// evm_emulate in cuda_emulator.cpp, with K and batch in place of the grid, and a CUDA stream. Returns a cudaError_t.
#include "../tensorrt/selective_scan.cu"

namespace {

template <typename T>
using Kernel = void (*)(const T*, const T*, const float*, const T*, const T*, const float*, const float*, int, int, int, T*);

template <typename T>
int launch(Kernel<T> kernel, const void* u, const void* delta, const float* A, const void* B, const void* C, const float* skip,
           const float* bias, int L, int D, int N, void* y, dim3 grid, cudaStream_t stream) {
    kernel<<<grid, kThreads, 0, stream>>>((const T*)u, (const T*)delta, A, (const T*)B, (const T*)C, skip, bias, L, D, N, (T*)y);
    return (int)cudaGetLastError();
}

}  // namespace

extern "C" int evm_launch(const void* u, const void* delta, const float* A, const void* B, const void* C, const float* skip,
                          const float* bias, int L, int D, int N, void* y, int half, int no_softplus, int K, int batch,
                          void* stream) {
    const dim3 grid((D + kChannels - 1) / kChannels, K, batch);
    const cudaStream_t on = (cudaStream_t)stream;
    if (half) return launch<__half>(no_softplus ? evm_scan_dt_f16 : evm_scan_f16, u, delta, A, B, C, skip, bias, L, D, N, y, grid, on);
    return launch<float>(no_softplus ? evm_scan_dt_f32 : evm_scan_f32, u, delta, A, B, C, skip, bias, L, D, N, y, grid, on);
}
