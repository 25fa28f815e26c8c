// Code that differs between operating systems.
#pragma once
#include <filesystem>
#include <string>

namespace evm {

// Return the name of this process's platform, as in evm_deploy/toolchain/platforms.py. Other platforms get a name that is not in this
// list.
std::string host_platform();

// Text of a path in UTF-8, for messages and for runtimes, which read UTF-8 on every system. On Windows path.string() is in the ANSI
// code page, and fails for characters that it lacks.
std::string utf8(const std::filesystem::path &path);
std::filesystem::path path_of(const std::string &utf8_text);

// A dynamic library, which stays loaded until the process ends.
class Library {
    void *handle_ = nullptr;

  public:
    // Load a library. The system searches for a name without a folder. Throws std::runtime_error with the loader's reason.
    explicit Library(const std::filesystem::path &file);
    void *find(const char *symbol) const;  // null if the library has no such symbol
};

// A library with given bytes, as a file to load. On Linux the file is in memory, elsewhere in the temporary folder, from where the
// destructor deletes it. Windows does not delete a loaded library: there the file stays, one for each `sha256` of the bytes.
class LibraryFile {
    std::filesystem::path path_;
#if defined(__linux__)
    int descriptor_ = -1;
#endif

  public:
    LibraryFile(const std::string &bytes, const std::string &sha256);  // throws std::runtime_error
    ~LibraryFile();
    LibraryFile(const LibraryFile &) = delete;
    LibraryFile &operator=(const LibraryFile &) = delete;
    const std::filesystem::path &path() const { return path_; }
};

}  // namespace evm
