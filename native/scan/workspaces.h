// Workspaces of fused blocks, for adapters whose runtime has no allocator that keeps memory between inferences.
#pragma once
#include <memory>
#include <mutex>
#include <stddef.h>
#include <stdint.h>
#include <utility>
#include <vector>

namespace evm {

// Memory aligned to 64 bytes.
class Buffer {
    static constexpr size_t ALIGNMENT = 64;
    std::vector<char> bytes;

  public:
    // Return at least `size` bytes. The contents are lost when the buffer grows.
    float *aligned(size_t size) {
        if (bytes.size() < size + ALIGNMENT) bytes.resize(size + ALIGNMENT);
        return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(bytes.data()) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    }
};

// Pool of workspaces for blocks, kept between inferences. It holds as many buffers as blocks have run at once. Without the pool,
// getting fresh pages from the system would take longer than a small block computes.
class Workspaces {
    std::mutex mutex;
    std::vector<std::unique_ptr<Buffer>> unused;

  public:
    // Call use(workspace) with an aligned workspace of at least `size` bytes.
    template <class Use>
    void with(size_t size, Use use) {
        std::unique_ptr<Buffer> buffer = take();
        use(buffer->aligned(size));
        const std::lock_guard<std::mutex> lock(mutex);
        unused.push_back(std::move(buffer));
    }

  private:
    std::unique_ptr<Buffer> take() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (unused.empty()) return std::make_unique<Buffer>();
        std::unique_ptr<Buffer> last = std::move(unused.back());
        unused.pop_back();
        return last;
    }
};

}  // namespace evm
