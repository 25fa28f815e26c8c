"""Where the native libraries are, and which kernel this CPU gets. `pip install` builds them (native/CMakeLists.txt)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import package_folders
from evm_deploy.errors import ToolchainError

SUFFIX = ".dll" if sys.platform == "win32" else ".so"
LIBRARIES = {"onnxruntime": f"evm_onnxruntime{SUFFIX}"}  # OpenVINO's: openvino_extension.py
HINT = "install g++ or clang++, then install evm-deploy again; without it scans run in their portable form"


def find_plugin(runtime: str) -> Path | None:
    """The installed native library for `runtime`, or None where it was not built."""
    for folder in package_folders():
        path = folder / "lib" / LIBRARIES[runtime]
        if path.is_file():
            return path
    return None


def not_built() -> str:
    """Why there is no plugin. Names the package's folder: a source tree may shadow the installed one."""
    return f"the native scan was not built for the evm_deploy in {Path(__file__).parent}"


def installed_plugin(runtime: str = "onnxruntime") -> Path:
    """`find_plugin`. Raises ToolchainError where it was not built."""
    path = find_plugin(runtime)
    if path is None:
        raise ToolchainError(not_built(), HINT)
    return path


def kernel_isa(library: Path) -> str:
    """The instruction set that `library` chose on this CPU: avx512vnni, avx512, avx2, neon or base.

    Raises ToolchainError where the library cannot be loaded.
    """
    try:
        name = ctypes.CDLL(str(library)).evm_scan_isa
    except (OSError, AttributeError) as error:
        raise ToolchainError(f"the native library cannot be loaded: {error}", "--scan portable does without") from error
    name.restype = ctypes.c_char_p
    return str(name().decode())


@contextmanager
def block_trace(library: Path | None, rows: int, stages: int) -> Iterator[NDArray[np.uint64]]:
    """Ticks of each stage of each image of each block that `library` computes meanwhile, in order: (rows, stages).

    Rows that were not needed are zeros; all are where there is no library, or an older one, or no clock.
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
