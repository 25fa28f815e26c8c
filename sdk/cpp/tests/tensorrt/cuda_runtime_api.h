// Stand-in for CUDA. Device memory is host memory, and its allocations are counted. Work on a stream runs when the stream is synchronised.
#pragma once
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
using cudaStream_t = std::vector<std::function<void()>> *;

namespace fake {
inline int allocations = 0;      // allocations that are not freed yet
inline bool out_of_memory = false;
}  // namespace fake

inline const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorMemoryAllocation" : "cudaSuccess"; }
inline cudaError_t cudaMalloc(void **address, std::size_t size) {
    if (fake::out_of_memory) return cudaErrorMemoryAllocation;
    *address = std::malloc(size);
    fake::allocations++;
    return cudaSuccess;
}
inline cudaError_t cudaFree(void *address) {
    fake::allocations -= address != nullptr;
    std::free(address);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = new std::vector<std::function<void()>>, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t size, cudaMemcpyKind, cudaStream_t stream) {
    stream->push_back([=] { std::memcpy(to, from, size); });
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    for (const auto &work : *stream) work();
    stream->clear();
    return cudaSuccess;
}
