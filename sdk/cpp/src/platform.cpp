#include "platform.h"

#include <cerrno>
#include <fstream>
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

#if defined(_WIN32)
Library::Library(const std::filesystem::path &file) : handle_(reinterpret_cast<void *>(LoadLibraryW(file.c_str()))) {
    if (!handle_) throw std::runtime_error(file.string() + ": " + std::system_category().message(static_cast<int>(GetLastError())));
}
void *Library::find(const char *symbol) const { return reinterpret_cast<void *>(GetProcAddress(static_cast<HMODULE>(handle_), symbol)); }
#else
Library::Library(const std::filesystem::path &file) : handle_(dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle_) throw std::runtime_error(dlerror());
}
void *Library::find(const char *symbol) const { return dlsym(handle_, symbol); }
#endif

TemporaryFile::TemporaryFile(const std::string &bytes) {
#if defined(__linux__)
    descriptor_ = memfd_create("evm-library", MFD_CLOEXEC);
    if (descriptor_ < 0) throw std::runtime_error(std::generic_category().message(errno));
    path_ = "/proc/self/fd/" + std::to_string(descriptor_);
#else
    std::random_device random;
    path_ = std::filesystem::temp_directory_path() / ("evm-library-" + std::to_string(random()) + std::to_string(random()));
#endif
    std::ofstream file(path_, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    if (!file) throw std::runtime_error("cannot write " + path_.string());
}

TemporaryFile::~TemporaryFile() {
#if defined(__linux__)
    if (descriptor_ >= 0) close(descriptor_);
#else
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
#endif
}

}  // namespace evm
