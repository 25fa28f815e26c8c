"""The platforms that a bundle can carry a native library for, and those that it cannot yet."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Platform:
    """architecture: as in native/kernels.txt. zig: what ziglang calls the platform. suffix: of its shared libraries."""

    name: str
    architecture: str
    zig: str
    suffix: str


PLATFORMS = {
    known.name: known
    for known in (
        Platform("linux-x86_64", "x86_64", "x86_64-linux-gnu.2.17", ".so"),
        Platform("linux-aarch64", "aarch64", "aarch64-linux-gnu.2.17", ".so"),
        Platform("macos-arm64", "aarch64", "aarch64-macos", ".dylib"),
        Platform("windows-x86_64", "x86_64", "x86_64-windows-gnu", ".dll"),
    )
}
WITHOUT_LIBRARY = ("android-aarch64", "ios-arm64", "browser")


def host_platform() -> str:
    """This process's platform, named as in PLATFORMS; where it is none of them, a name that is not there."""
    system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
    machine = platform.machine().lower()
    name = f"{system}-{'x86_64' if machine == 'amd64' else machine}"
    if sys.maxsize < 1 << 32:  # 32-bit Python on a 64-bit system, as on some Raspberry Pis
        return f"{name}-32bit"
    if system == "linux" and platform.libc_ver()[0] != "glibc":
        return f"{name}-musl"
    return name
