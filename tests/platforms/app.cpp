// Classes of a computed image, and how the scans ran, with the C++ SDK. Standard input: two lines, the path of the bundle in
// UTF-8 and the scan.
#include "evm/evm.hpp"

#include <cstdint>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

int main() {
    std::string bundle, scan;
    std::getline(std::cin, bundle);
    std::getline(std::cin, scan);
    try {
        evm::Options options;
        options.scan = scan;
        options.threads = 1;
        const evm::Model model(std::filesystem::u8path(bundle), options);
        std::vector<std::uint8_t> bytes(64 * 96 * 3);
        for (std::size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<std::uint8_t>(7 * i + 13);
        for (const evm::Prediction &found : model.classify(bytes.data(), 96, 64, 3))
            std::cout << found.index << ' ' << found.score << '\n';
        std::cout << model.scan().value << ": " << model.scan().reason << '\n';
        return 0;
    } catch (const evm::Error &error) {
        std::cout << error.what() << '\n';
        return 2;
    }
}
