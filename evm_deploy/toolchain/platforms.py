"""Platforms: those with a native library (`PLATFORMS`), and those that run portable scans only."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Platform:
    """Platform with a native library.

    architecture: name in native/kernels.txt. zig: target name of ziglang. suffix: suffix of shared libraries.
    """

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
    """Return the platform of this process: a name in PLATFORMS, or another name if the platform has no library.

    Names that are not in PLATFORMS include musl systems (`linux-x86_64-musl`) and 32-bit Python (`-32bit`).
    """
    system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
    machine = platform.machine().lower()
    name = f"{system}-{'x86_64' if machine == 'amd64' else machine}"
    if sys.maxsize < 1 << 32:  # 32-bit Python on a 64-bit system, for example on some Raspberry Pis
        return f"{name}-32bit"
    if system == "linux" and platform.libc_ver()[0] != "glibc":
        return f"{name}-musl"
    return name
