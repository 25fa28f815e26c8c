// Launch geometry and signature of the kernels in selective_scan.cu. The arguments have the order of an AOT plugin: inputs,
// integers, output.
#pragma once

constexpr int kChannels = 8;   // channels per block
constexpr int kStates = 16;    // largest number of states N
constexpr int kThreads = 128;  // threads per block

#define EVM_SCAN_KERNEL(name, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                    \
        name(const T* u, const T* delta, const float* A, const T* B, const T* C, const float* skip,           \
             const float* bias, int L, int D, int N, T* y)
