// What differs between systems.
#pragma once
#include <filesystem>
#include <string>

namespace evm {

// This process's platform, named as evm_deploy/toolchain/platforms.py does; where it is none of those, a name that is not there.
std::string host_platform();

// A library that the process has loaded; it stays loaded.
class Library {
    void *handle_ = nullptr;

  public:
    // Raises std::runtime_error with the loader's reason. A bare name is looked for as the system does.
    explicit Library(const std::filesystem::path &file);
    void *find(const char *symbol) const;  // null where there is none
};

// Bytes as a file for who only takes paths, in memory where the system can (Linux), else a temporary file; gone with the object.
class TemporaryFile {
    std::filesystem::path path_;
    int descriptor_ = -1;

  public:
    explicit TemporaryFile(const std::string &bytes);  // raises std::runtime_error
    ~TemporaryFile();
    TemporaryFile(const TemporaryFile &) = delete;
    TemporaryFile &operator=(const TemporaryFile &) = delete;
    const std::filesystem::path &path() const { return path_; }
};

}  // namespace evm
