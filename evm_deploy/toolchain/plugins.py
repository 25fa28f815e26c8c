"""Find the installed native libraries, which `pip install` builds (native/CMakeLists.txt), and query their kernels."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import package_folders
from evm_deploy.errors import ToolchainError

SUFFIX = ".dll" if sys.platform == "win32" else ".so"
LIBRARIES = {"onnxruntime": f"evm_onnxruntime{SUFFIX}"}  # OpenVINO's: openvino_extension.py
ISA = "EVM_ISA"  # environment variable that names the instruction set of the native kernels (native/scan/dispatch.cpp)
HINT = "install g++ or clang++, then install evm-deploy again; without the native library, scans are portable"


def find_plugin(runtime: str) -> Path | None:
    """Return the installed native library for `runtime`, or None if the library was not built."""
    for folder in package_folders():
        path = folder / "lib" / LIBRARIES[runtime]
        if path.is_file():
            return path
    return None


def not_built() -> str:
    """Return the reason why there is no native library.

    The text names the folder of the package, because a source tree may shadow the installed package.
    """
    return f"the native scan was not built for the evm_deploy in {Path(__file__).parent}"


def installed_plugin(runtime: str = "onnxruntime") -> Path:
    """Return the installed native library for `runtime`. Raises ToolchainError if the library was not built."""
    path = find_plugin(runtime)
    if path is None:
        raise ToolchainError(not_built(), HINT)
    return path


def kernel_isa(library: Path) -> str:
    """Return the instruction set that `library` uses: the one that EVM_ISA names, else the best that this CPU runs.

    The names are those of native/kernels.txt. Raises ToolchainError if the library cannot be loaded, or does not use
    the instruction set that EVM_ISA names: this CPU lacks it, or EVM_ISA was set after the library was loaded.
    """
    try:
        kernel = ctypes.CDLL(str(library))
        name = kernel.evm_scan_isa
    except (OSError, AttributeError) as error:
        raise ToolchainError(
            f"the native library cannot be loaded: {error}", "use --scan portable to run without the native library"
        ) from error
    name.restype = ctypes.c_char_p
    isa, forced = str(name().decode()), os.environ.get(ISA)
    if forced and forced != isa:
        raise ToolchainError(
            _isa_error(kernel) or f"{ISA}={forced}: the native library {library} uses {isa}",
            f"set {ISA} before the program starts, or unset it; native libraries of evm-deploy 0.2 do not read it",
        )
    return isa


def _isa_error(kernel: ctypes.CDLL) -> str:
    """Return the message of the library about EVM_ISA; empty if there is none."""
    function = getattr(kernel, "evm_scan_isa_error", None)  # libraries of evm-deploy 0.2 have no such function
    if function is None:
        return ""
    function.restype = ctypes.c_char_p
    return (function() or b"").decode()


@contextmanager
def block_trace(library: Path | None, rows: int, stages: int) -> Iterator[NDArray[np.uint64]]:
    """Context manager that records the clock ticks of the stages of every block that `library` computes meanwhile.

    Yields an array (rows, stages) uint64, one row per block and image in order of execution. Unused rows stay zero. All
    rows stay zero if `library` is None, or is too old to have a trace, or has no clock.
    """
    ticks = np.zeros((rows, stages), np.uint64)
    trace = getattr(ctypes.CDLL(str(library)), "evm_block_trace", None) if library else None
    if trace is None:
        yield ticks
        return
    trace.argtypes, trace.restype = (ctypes.c_void_p, ctypes.c_int64), None
    trace(ticks.ctypes.data, rows)
    try:
        yield ticks
    finally:
        trace(None, 0)


def require_release(library: Path, kind: str, runtime: str, release_of: Callable[[Path], str], installed: str) -> None:
    """Raise ToolchainError unless a native library was compiled for the installed release of its runtime.

    kind: `library` or `extension`. runtime: its name for people; the name of its package in lower case. `release_of`:
    read the release from the file; empty for a file that is not ours; raises OSError. installed: the installed release.
    """
    try:
        built_for = release_of(library)
    except OSError as error:
        raise ToolchainError(f"the {kind} {library} cannot be read: {error.strerror}") from error
    if not built_for:
        raise ToolchainError(f"{library} is not an {runtime} {kind} of evm-deploy")
    if built_for != installed:
        raise ToolchainError(
            f"the {kind} {library} was compiled for {runtime} {built_for}, but {runtime} {installed} is installed",
            f"pip install {runtime.lower()}=={built_for}, or compile another {kind} with load(scan='plugin')",
        )
