// Decompression by zlib, an optional component: without it, zips cannot be read.
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

    // Gives `sink` what comes out. False, and a reason, for a stream that is damaged.
    bool add(const char *data, std::size_t size, const Sink &sink);
    bool ended() const;
    const char *reason() const;
    std::uint32_t crc() const;  // of what came out
};

}  // namespace evm
