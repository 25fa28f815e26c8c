// Access to the files of a bundle in a folder or a zip. A zip is never unpacked to disk.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace evm {

using Sink = std::function<void(const char *data, std::size_t size)>;

// Reason why a file of a bundle cannot be read.
struct ReadError : std::runtime_error {
    bool missing;
    ReadError(const std::string &reason, bool is_missing) : std::runtime_error(reason), missing(is_missing) {}
};

// Name of a file of a bundle, relative to the bundle; whether it is a symbolic link, to a file or a folder.
struct Listed {
    std::string name;
    bool link;
};

class Source {
  public:
    const std::string path;  // path of the bundle, in UTF-8
    explicit Source(const std::string &shown_path) : path(shown_path) {}
    virtual ~Source() = default;

    // Read a file and pass it to `sink` in pieces. Throws ReadError, or BundleError if the file is damaged in the zip.
    virtual void read(const std::string &name, const Sink &sink) const = 0;
    // Return the size of a file in bytes; for a zip, the size that its directory states. Throws ReadError.
    virtual std::uint64_t size(const std::string &name) const = 0;
    // Return the names of all files and links of the bundle, in any order. Throws ReadError.
    virtual std::vector<Listed> list() const = 0;
    // Test whether the files exist on disk, as path_of(path) / path_of(name).
    virtual bool on_disk() const = 0;

    // Read a whole file. Throws as read() does.
    std::string bytes(const std::string &name) const;
    // Return the SHA-256 hex digest of a file. Throws as read() does.
    std::string sha256(const std::string &name) const;
};

// Open a bundle, a folder or a zip. Throws BundleError if the path is neither.
std::unique_ptr<Source> open_source(const std::filesystem::path &bundle);

// Test whether a file name, from a manifest or a zip, stays inside the bundle on every system.
bool inside_bundle(const std::string &name);

}  // namespace evm
