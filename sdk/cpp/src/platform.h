// Code that differs between operating systems.
#pragma once
#include <filesystem>
#include <string>

namespace evm {

// Return the name of this process's platform, as in evm_deploy/toolchain/platforms.py. Other platforms get a name that is not in this
// list.
std::string host_platform();

// A dynamic library, which stays loaded until the process ends.
class Library {
    void *handle_ = nullptr;

  public:
    // Load a library. The system searches for a name without a folder. Throws std::runtime_error with the loader's reason.
    explicit Library(const std::filesystem::path &file);
    void *find(const char *symbol) const;  // null if the library has no such symbol
};

// A file with given bytes, for functions that only take paths. On Linux the file is in memory, elsewhere on disk. The destructor deletes
// it.
class TemporaryFile {
    std::filesystem::path path_;
    int descriptor_ = -1;

  public:
    explicit TemporaryFile(const std::string &bytes);  // throws std::runtime_error
    ~TemporaryFile();
    TemporaryFile(const TemporaryFile &) = delete;
    TemporaryFile &operator=(const TemporaryFile &) = delete;
    const std::filesystem::path &path() const { return path_; }
};

}  // namespace evm
