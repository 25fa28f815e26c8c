"""Compile and cache the OpenVINO extension. An extension fits exactly one OpenVINO release."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from evm_deploy._util import processes
from evm_deploy._util.files import cache_folder
from evm_deploy._util.packages import install_hint
from evm_deploy.errors import ToolchainError
from evm_deploy.toolchain.compile import SHOWN_LINES, compiled_once, read_recipe
from evm_deploy.toolchain.platforms import host_platform
from evm_deploy.toolchain.plugins import SUFFIX, kernel_isa, require_release

RUN_HINT = install_hint("run-openvino")
INSTALL_HINT = install_hint("openvino")
BUILD_HINT = "install g++ or clang++ and try again, or use --scan portable to run without the extension"
LIBRARY = f"evm_openvino{SUFFIX}"
MARK = re.compile(rb"evm extension for OpenVINO (\d+\.\d+\.\d+)\0")


def installed_release() -> str:
    """Return the release of the installed OpenVINO, such as 2026.4.1. Raises ToolchainError if it is not installed."""
    if find_spec("openvino") is None:
        raise ToolchainError("openvino is not installed", RUN_HINT)
    return metadata.version("openvino")


def release_of(library: Path) -> str:
    """Return the OpenVINO release of an extension, read from a mark in the file. Empty if there is no mark. OSError."""
    found = MARK.search(library.read_bytes())
    return found[1].decode() if found else ""


def extension() -> Path:
    """Return the extension for the installed OpenVINO.

    The first call compiles the extension, which takes seconds with the installed archive of the kernels and a minute
    without; later calls find it in the cache. The cache key covers sources, OpenVINO release and platform. Raises
    ToolchainError if the extension cannot be compiled.
    """
    return compiled_once(cached_path(), compile_in)


def cached_path() -> Path:
    """Return the cache path of the extension for the installed OpenVINO. The file may not exist yet."""
    key = read_recipe().digest(f"{installed_release()} {host_platform()}")
    return cache_folder() / "openvino" / key / LIBRARY


def check_release(library: Path) -> None:
    """Raise ToolchainError unless the extension fits the installed OpenVINO release.

    OpenVINO does not load an extension of another release, and its error does not name the reason.
    """
    require_release(library, "extension", "OpenVINO", release_of, installed_release())


def isa(library: Path) -> str:
    """Return the instruction set that an extension uses on this CPU. Raises ToolchainError if it cannot be loaded."""
    check_release(library)
    import openvino  # noqa: F401  loads OpenVINO's own libraries, which the extension needs

    return kernel_isa(library)


def compile_in(work: Path, variables: Mapping[str, str] | None = None) -> Path:
    """Compile the extension in the folder `work`. Returns its path. Raises ToolchainError.

    Compiling uses CMake, because only OpenVINO's CMake package knows the required include folders and libraries.
    variables: additional environment variables of CMake, such as CXXFLAGS, with which it compiles the kernels too.
    """
    from openvino.utils import get_cmake_path

    scripts = str(Path(sys.executable).parent)  # pip installs cmake and ninja there
    path = os.pathsep.join((scripts, os.environ.get("PATH", "")))
    cmake = shutil.which("cmake", path=path)
    if not cmake:
        raise ToolchainError("CMake is not installed; the OpenVINO extension is compiled with it", INSTALL_HINT)
    generator = ("-G", "Ninja") if shutil.which("ninja", path=path) else ()
    settings = (f"-DOpenVINO_DIR={get_cmake_path()}", "-DEVM_OPENVINO=ON", "-DCMAKE_BUILD_TYPE=Release")
    environment = {**os.environ, **(variables or {}), "PATH": path}
    _run([cmake, "-S", str(read_recipe().folder), "-B", str(work / "build"), *generator, *settings], environment)
    _run([cmake, "--build", str(work / "build"), "--target", "evm_openvino", "--parallel"], environment)
    return work / "build" / LIBRARY


def _run(command: list[str], environment: dict[str, str]) -> None:
    try:
        done = processes.run(command, env=environment)
    except OSError as error:
        raise ToolchainError(f"{command[0]} cannot be run: {error.strerror}", BUILD_HINT) from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - SHOWN_LINES))
        said = "\n  ".join(lines[first : first + SHOWN_LINES])
        raise ToolchainError(f"the OpenVINO extension could not be compiled:\n  {said}", BUILD_HINT)
