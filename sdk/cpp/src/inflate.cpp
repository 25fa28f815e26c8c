#include "inflate.h"

#if EVM_ZLIB
#include <zlib.h>

#include <vector>

namespace evm {

struct Inflate::State {
    z_stream stream{};
    Format format;
    bool ended = false;
    uLong crc = 0;
    std::vector<char> out = std::vector<char>(1 << 16);
};

Inflate::Inflate(Format format) : state_(std::make_unique<State>()) {
    state_->format = format;
    if (format != STORED && inflateInit2(&state_->stream, -MAX_WBITS) != Z_OK) throw std::bad_alloc();
}

Inflate::~Inflate() {
    if (state_->format != STORED) inflateEnd(&state_->stream);
}

bool Inflate::available() { return true; }

bool Inflate::add(const char *data, std::size_t size, const Sink &sink) {
    State &state = *state_;
    const auto give = [&](const char *bytes, std::size_t count) {
        state.crc = crc32(state.crc, reinterpret_cast<const Bytef *>(bytes), static_cast<uInt>(count));
        sink(bytes, count);
    };
    if (state.format == STORED) {
        give(data, size);
        return true;
    }
    z_stream &stream = state.stream;
    stream.next_in = reinterpret_cast<Bytef *>(const_cast<char *>(data));
    stream.avail_in = static_cast<uInt>(size);
    while (!state.ended) {
        stream.next_out = reinterpret_cast<Bytef *>(state.out.data());
        stream.avail_out = static_cast<uInt>(state.out.size());
        const int status = inflate(&stream, Z_NO_FLUSH);
        if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR) return false;
        give(state.out.data(), state.out.size() - stream.avail_out);
        state.ended = status == Z_STREAM_END;
        if (stream.avail_out > 0) break;  // all input is consumed
    }
    return true;
}

bool Inflate::ended() const { return state_->format == STORED || state_->ended; }
const char *Inflate::reason() const { return state_->stream.msg ? state_->stream.msg : "invalid stream"; }
std::uint32_t Inflate::crc() const { return static_cast<std::uint32_t>(state_->crc); }

}  // namespace evm

#else

namespace evm {

struct Inflate::State {};
Inflate::Inflate(Format) {}
Inflate::~Inflate() = default;
bool Inflate::available() { return false; }
bool Inflate::add(const char *, std::size_t, const Sink &) { return false; }
bool Inflate::ended() const { return false; }
const char *Inflate::reason() const { return "no zlib"; }
std::uint32_t Inflate::crc() const { return 0; }

}  // namespace evm
#endif
