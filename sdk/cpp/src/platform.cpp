#include "platform.h"

#include <cerrno>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <system_error>

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#include <sys/utsname.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace evm {

std::string host_platform() {
#if defined(_WIN32)
    return sizeof(void *) == 8 ? "windows-x86_64" : "windows-x86-32bit";
#else
    utsname system{};
    uname(&system);
    std::string name = std::string(system.sysname) == "Darwin" ? "macos-" : "linux-";
    name += system.machine;
    if (sizeof(void *) < 8) return name + "-32bit";  // a 32-bit process, which may run on a 64-bit system (some Raspberry Pis)
#if defined(__ANDROID__)
    return std::string("android-") + system.machine;
#elif defined(__linux__) && !defined(__GLIBC__)
    return name + "-musl";
#else
    return name;
#endif
#endif
}

std::string utf8(const std::filesystem::path &path) {
    const auto text = path.u8string();  // of char8_t in C++20
    return {text.begin(), text.end()};
}

std::filesystem::path path_of(const std::string &utf8_text) { return std::filesystem::u8path(utf8_text); }

#if defined(_WIN32)
Library::Library(const std::filesystem::path &file) : handle_(reinterpret_cast<void *>(LoadLibraryW(file.c_str()))) {
    if (!handle_) throw std::runtime_error(utf8(file) + ": " + std::system_category().message(static_cast<int>(GetLastError())));
}
void *Library::find(const char *symbol) const { return reinterpret_cast<void *>(GetProcAddress(static_cast<HMODULE>(handle_), symbol)); }
#else
Library::Library(const std::filesystem::path &file) : handle_(dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle_) throw std::runtime_error(dlerror());
}
void *Library::find(const char *symbol) const { return dlsym(handle_, symbol); }
#endif

namespace {

void write(const std::filesystem::path &path, const std::string &bytes) {
    std::ofstream file(path, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    if (!file) throw std::runtime_error("cannot write " + utf8(path));
}

#if !defined(__linux__)
std::filesystem::path aside() {
    std::random_device random;
    return std::filesystem::temp_directory_path() / ("evm-library-" + std::to_string(random()) + std::to_string(random()));
}
#endif

#if defined(_WIN32)
bool holds(const std::filesystem::path &path, const std::string &bytes) {
    std::ifstream file(path, std::ios::binary);
    return file && std::string(std::istreambuf_iterator<char>(file), {}) == bytes;
}
#endif

}  // namespace

#if defined(__linux__)
LibraryFile::LibraryFile(const std::string &bytes, const std::string &) : descriptor_(memfd_create("evm-library", MFD_CLOEXEC)) {
    if (descriptor_ < 0) throw std::runtime_error(std::generic_category().message(errno));
    path_ = "/proc/self/fd/" + std::to_string(descriptor_);
    write(path_, bytes);
}
LibraryFile::~LibraryFile() { close(descriptor_); }
#elif defined(_WIN32)
LibraryFile::LibraryFile(const std::string &bytes, const std::string &sha256)
    : path_(std::filesystem::temp_directory_path() / ("evm-library-" + sha256 + ".dll")) {  // LoadLibrary adds .dll to other names
    if (holds(path_, bytes)) return;
    const std::filesystem::path unfinished = aside();
    write(unfinished, bytes);
    std::error_code error;
    std::filesystem::rename(unfinished, path_, error);
    std::error_code ignored;
    std::filesystem::remove(unfinished, ignored);
    if (!holds(path_, bytes)) throw std::runtime_error("cannot write " + utf8(path_) + ": " + error.message());
}
LibraryFile::~LibraryFile() = default;
#else
LibraryFile::LibraryFile(const std::string &bytes, const std::string &) : path_(aside()) { write(path_, bytes); }
LibraryFile::~LibraryFile() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
}
#endif

}  // namespace evm
