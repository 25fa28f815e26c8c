// Where a bundle's files are: in a folder, or in a zip, which is never unpacked onto the disk.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

namespace evm {

using Sink = std::function<void(const char *data, std::size_t size)>;

// Why a file of a bundle cannot be read.
struct ReadError : std::runtime_error {
    bool missing;
    ReadError(const std::string &reason, bool is_missing) : std::runtime_error(reason), missing(is_missing) {}
};

class Source {
  public:
    const std::string path;  // of the bundle, for messages
    explicit Source(const std::string &shown_path) : path(shown_path) {}
    virtual ~Source() = default;

    // A file, piece by piece. Raises ReadError, BundleError for a zip that is damaged there.
    virtual void read(const std::string &name, const Sink &sink) const = 0;
    // Its size, or what a zip says of it. Raises ReadError.
    virtual std::uint64_t size(const std::string &name) const = 0;
    // Whether files have paths of their own, path + '/' + name.
    virtual bool on_disk() const = 0;

    std::string bytes(const std::string &name) const;
    std::string sha256(const std::string &name) const;
};

// Raises BundleError where there is no bundle.
std::unique_ptr<Source> open_source(const std::filesystem::path &bundle);

// Whether a file's name, in a manifest or a zip, stays inside the bundle on every system.
bool inside_bundle(const std::string &name);

}  // namespace evm
