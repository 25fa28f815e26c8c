"""The extension for OpenVINO: a library that fits one release of it, compiled where that release is, and cached."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from evm_deploy._util.files import cache_folder
from evm_deploy.errors import ToolchainError
from evm_deploy.toolchain.compile import SHOWN_LINES, compiled_once, read_recipe
from evm_deploy.toolchain.platforms import host_platform
from evm_deploy.toolchain.plugins import SUFFIX, kernel_isa

RUN_HINT = "pip install 'evm-deploy[run-openvino]'"
INSTALL_HINT = "pip install 'evm-deploy[openvino]'"
BUILD_HINT = "install g++ or clang++ and try again; --scan portable does without"
LIBRARY = f"evm_openvino{SUFFIX}"
MARK = re.compile(rb"evm extension for OpenVINO (\d+\.\d+\.\d+)\0")


def installed_release() -> str:
    """Release of the installed OpenVINO, such as 2026.4.1. Raises ToolchainError where there is none."""
    if find_spec("openvino") is None:
        raise ToolchainError("openvino is not installed", RUN_HINT)
    return metadata.version("openvino")


def release_of(library: Path) -> str:
    """The OpenVINO release that an extension was compiled for; empty where the file does not say so. Raises OSError."""
    found = MARK.search(library.read_bytes())
    return found[1].decode() if found else ""


def extension() -> Path:
    """The extension for the installed OpenVINO, from the cache, else compiled into it, which takes a minute.

    Cached by sources, OpenVINO release and platform. Raises ToolchainError where it cannot be compiled.
    """
    return compiled_once(cached_path(), compile_in)


def cached_path() -> Path:
    """Where the extension is, once compiled from the sources that are here for the OpenVINO that is."""
    key = read_recipe().digest(f"{installed_release()} {host_platform()}")
    return cache_folder() / "openvino" / key / LIBRARY


def check_release(library: Path) -> None:
    """Raise ToolchainError unless `library` fits the installed OpenVINO: any other would not load, and not say why."""
    try:
        built_for, here = release_of(library), installed_release()
    except OSError as error:
        raise ToolchainError(f"the extension {library} cannot be read: {error.strerror}") from error
    if not built_for:
        raise ToolchainError(f"{library} is not an extension of ours for OpenVINO")
    if built_for != here:
        raise ToolchainError(
            f"the extension {library} was compiled for OpenVINO {built_for}, the installed one is {here}",
            f"pip install openvino=={built_for}, or let evm-deploy compile another: load(scan='plugin')",
        )


def isa(library: Path) -> str:
    """The instruction set that an extension chose on this CPU. Raises ToolchainError where it does not load."""
    check_release(library)
    import openvino  # noqa: F401  the library needs its libraries, which this loads

    return kernel_isa(library)


def compile_in(work: Path, variables: Mapping[str, str] | None = None) -> Path:
    """Compile the extension in the folder `work`, with CMake: only its package of OpenVINO knows what that needs.

    variables: of CMake's environment, such as CXXFLAGS. Raises ToolchainError.
    """
    from openvino.utils import get_cmake_path

    scripts = str(Path(sys.executable).parent)  # where pip put cmake and ninja
    path = os.pathsep.join((scripts, os.environ.get("PATH", "")))
    cmake = shutil.which("cmake", path=path)
    if not cmake:
        raise ToolchainError("the extension for OpenVINO is compiled with CMake, which is not here", INSTALL_HINT)
    generator = ("-G", "Ninja") if shutil.which("ninja", path=path) else ()
    settings = (f"-DOpenVINO_DIR={get_cmake_path()}", "-DEVM_OPENVINO=ON", "-DCMAKE_BUILD_TYPE=Release")
    environment = {**os.environ, **(variables or {}), "PATH": path}
    _run([cmake, "-S", str(read_recipe().folder), "-B", str(work / "build"), *generator, *settings], environment)
    _run([cmake, "--build", str(work / "build"), "--target", "evm_openvino", "--parallel"], environment)
    return work / "build" / LIBRARY


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - SHOWN_LINES))
        said = "\n  ".join(lines[first : first + SHOWN_LINES])
        raise ToolchainError(f"the extension for OpenVINO could not be compiled:\n  {said}", BUILD_HINT)
