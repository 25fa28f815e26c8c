// SHA-256 hash (FIPS 180-4).
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace evm {

class Sha256 {
    std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, 64> block_{};
    std::uint64_t length_ = 0;  // bytes so far

    void compress(const unsigned char *block);

  public:
    void add(const void *data, std::size_t size);
    std::string hex();  // finish the hash and return it; call once, after the last add()
};

}  // namespace evm
