#include "source.h"

#include "archive.h"
#include "evm/evm.hpp"
#include "platform.h"
#include "sha256.h"
#include "text.h"

#include <cerrno>
#include <fstream>
#include <system_error>
#include <vector>

namespace evm {
namespace {

namespace fs = std::filesystem;

class Folder : public Source {
  public:
    explicit Folder(const fs::path &bundle) : Source(utf8(bundle)) {}

    void read(const std::string &name, const Sink &sink) const override {
        const fs::path file = path_of(path) / path_of(name);
        std::error_code ignored;
        if (fs::is_directory(file, ignored)) throw failure(EISDIR);
        if (fs::exists(file, ignored) && !fs::is_regular_file(file, ignored))  // a pipe or a device would be read for ever
            throw ReadError("Not a regular file", false);
        errno = 0;
        std::ifstream stream(file, std::ios::binary);
        if (!stream) throw failure(errno);
        std::vector<char> block(1 << 20);
        while (stream.read(block.data(), static_cast<std::streamsize>(block.size())), stream.gcount() > 0)
            sink(block.data(), static_cast<std::size_t>(stream.gcount()));
        if (stream.bad()) throw failure(EIO);
    }

    std::uint64_t size(const std::string &name) const override {
        std::error_code error;
        const std::uint64_t bytes = fs::file_size(path_of(path) / path_of(name), error);
        if (error) throw failure(error.value());
        return bytes;
    }

    std::vector<Listed> list() const override {
        std::vector<Listed> found;
        std::error_code error;
        fs::recursive_directory_iterator at(path_of(path), error);
        for (; !error && at != fs::recursive_directory_iterator(); at.increment(error)) {
            std::error_code ignored;
            const bool link = at->is_symlink(ignored);
            if (link || !at->is_directory(ignored)) found.push_back({utf8(fs::path(at->path().lexically_relative(path_of(path)).generic_u8string())), link});
        }
        if (error) throw failure(error.value());
        return found;
    }

    bool on_disk() const override { return true; }

  private:
    static ReadError failure(int code) { return {std::generic_category().message(code ? code : EIO), code == ENOENT}; }
};

}  // namespace

std::string Source::bytes(const std::string &name) const {
    std::string result;
    read(name, [&](const char *data, std::size_t size) { result.append(data, size); });
    return result;
}

std::string Source::sha256(const std::string &name) const {
    Sha256 hash;
    read(name, [&](const char *data, std::size_t size) { hash.add(data, size); });
    return hash.hex();
}

std::unique_ptr<Source> open_source(const fs::path &bundle) {
    std::error_code ignored;
    if (bundle.extension() == ".zip" && fs::is_regular_file(bundle, ignored)) return open_zip(bundle);
    if (!fs::is_directory(bundle, ignored)) {
        const char *const what = fs::exists(bundle, ignored) ? "is a file, not a bundle folder" : "does not exist";
        throw BundleError("bundle " + utf8(bundle) + " " + what, "make one with evm-export", {"bundle.missing"});
    }
    return std::make_unique<Folder>(bundle);
}

// Test whether a part of a name is a device, another name or no name on Windows.
static bool only_elsewhere(const std::string &part) {
    if (!part.empty() && part != "." && (part.back() == '.' || part.back() == ' ')) return true;
    std::string stem = part.substr(0, part.find('.'));
    for (char &c : stem)
        if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    for (const char *device : {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"})
        if (stem == device) return true;
    const std::string port = stem.substr(0, 3), number = stem.size() > 3 ? stem.substr(3) : "";
    const bool digit = (number.size() == 1 && number[0] >= '0' && number[0] <= '9') || number == "\u00b9" || number == "\u00b2" || number == "\u00b3";
    return (port == "COM" || port == "LPT") && digit;
}

bool inside_bundle(const std::string &name) {
    if (name.empty() || name[0] == '/') return false;
    for (const char c : name)
        if (static_cast<unsigned char>(c) < 0x20 || std::string("<>:\"|?*\\").find(c) != std::string::npos) return false;
    for (const std::string &part : split(name, '/'))
        if (only_elsewhere(part)) return false;
    return true;
}

}  // namespace evm
