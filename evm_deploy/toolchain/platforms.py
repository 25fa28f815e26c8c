"""Platforms: those with a native library (`PLATFORMS`), and those that run portable scans only."""

from __future__ import annotations

import platform
import sys
import sysconfig
from dataclasses import dataclass


@dataclass(frozen=True)
class CLibrary:
    """C library of a platform: file name, and the functions of it that the native library calls."""

    file: str
    functions: tuple[str, ...]


# Without ziglang's functions for arithmetic that CPUs lack: the library calls none, and they would be compiled first.
SHARED = ("-shared", "-rtlib=none")
ELF = (*SHARED, "-Wl,-z,defs")  # or a missing function is noticed by the loader only


@dataclass(frozen=True)
class Platform:
    """Platform with a native library.

    architecture: name in native/kernels.txt. zig: target name of ziglang. prefix, suffix: start and end of the file
    names of shared libraries. flags: compiler flags. link: linker flags, with {name} for the file name. c_library: to
    link a stand-in for, because ziglang has no such library or would compile it first; None for ziglang's own.
    sources: key of sources in native/kernels.txt that only this platform needs. adapter: key of sources that this
    platform has in place of those of the runtime; None for those of the runtime.
    """

    name: str
    architecture: str
    zig: str
    suffix: str
    prefix: str = ""
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = SHARED
    c_library: CLibrary | None = None
    sources: str | None = None
    adapter: str | None = None


C_FUNCTIONS = ("calloc", "free", "getenv", "malloc", "memchr", "memcpy", "memset", "strcmp", "strlen")
BIONIC = CLibrary("libc.so", (*C_FUNCTIONS, "getauxval", "snprintf"))
UCRT = CLibrary("ucrtbase.dll", (*C_FUNCTIONS, "__stdio_common_vsprintf"))
# Android packs only files named lib*.so into apps, and has devices with pages of 16 KB.
ANDROID = (
    *ELF,
    "-Wl,-soname,{name}",
    "-Wl,-z,max-page-size=16384",
    "-Wl,--hash-style=both",
    "-Wl,-z,relro",
    "-Wl,-z,now",
)
INSTALL_NAME = (*SHARED, "-Wl,-install_name,@rpath/{name}")  # or it is the folder of compilation
NO_TIME = (*SHARED, "-Wl,-Brepro")  # or a DLL has the time of compilation
# A module that imports nothing, and whose constructors a page runs with _initialize.
MODULE = ("-mexec-model=reactor", "-Wl,--export-dynamic", "-Wl,-z,stack-size=1048576")

PLATFORMS = {
    known.name: known
    for known in (
        Platform("linux-x86_64", "x86_64", "x86_64-linux-gnu.2.17", ".so", link=ELF),
        Platform("linux-aarch64", "aarch64", "aarch64-linux-gnu.2.17", ".so", link=ELF),
        Platform("macos-arm64", "aarch64", "aarch64-macos.14.0", ".dylib", link=INSTALL_NAME),
        Platform(
            "windows-x86_64",
            "x86_64",
            "x86_64-windows-gnu",
            ".dll",
            link=NO_TIME,
            c_library=UCRT,
            sources="windows_sources",
        ),
        # x18 is the platform's register on Android. ziglang has no target for Android. Its target for musl has
        # no symbol versions: Android's C library has others than glibc's.
        Platform(
            "android-aarch64",
            "aarch64",
            "aarch64-linux-musl",
            ".so",
            "lib",
            ("-ffixed-x18",),
            ANDROID,
            BIONIC,
        ),
        Platform("android-x86_64", "x86_64", "x86_64-linux-musl", ".so", "lib", (), ANDROID, BIONIC),
        # ONNX Runtime Web has no custom ops: a page calls the library itself, between pieces of the graph.
        Platform("browser-wasm32", "wasm32", "wasm32-wasi", ".wasm", link=MODULE, adapter="web_sources"),
    )
}
WITHOUT_LIBRARY = ("ios-arm64",)


def host_platform() -> str:
    """Return the platform of this process: a name in PLATFORMS, or another name if the platform has no library.

    Linux with musl, such as Alpine, is Linux: the loader of musl takes itself for the glibc that a library needs.
    Names that are not in PLATFORMS include 32-bit Python (`-32bit`).
    """
    if sys.platform == "win32":  # an x86-64 Python may run on an ARM64 system, which platform.machine() names
        system, machine = "windows", sysconfig.get_platform().rpartition("-")[2]
    else:
        system, machine = {"darwin": "macos"}.get(sys.platform, sys.platform), platform.machine().lower()
    if hasattr(sys, "getandroidapilevel"):  # before Python 3.13, sys.platform is "linux" there
        system = "android"
    name = f"{system}-{'x86_64' if machine == 'amd64' else machine}"
    if sys.maxsize < 1 << 32:  # 32-bit Python on a 64-bit system, for example on some Raspberry Pis
        return f"{name}-32bit"
    return name
