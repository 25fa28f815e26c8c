// Decompression with zlib, which is an optional dependency. Without zlib the SDK cannot read zips.
#pragma once
#include "source.h"

#include <memory>

namespace evm {

class Inflate {
    struct State;
    std::unique_ptr<State> state_;

  public:
    enum Format { STORED, DEFLATED };
    explicit Inflate(Format format);
    ~Inflate();
    static bool available();

    // Decompress data and pass the result to `sink`. Returns false if the stream is damaged; reason() then tells why.
    bool add(const char *data, std::size_t size, const Sink &sink);
    bool ended() const;
    const char *reason() const;
    std::uint32_t crc() const;  // CRC-32 of the decompressed data
};

}  // namespace evm
