"""Compile and cache the library for ExecuTorch: our operators, and a C interface that runs programs without torch."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import cache_folder, sha256
from evm_deploy._util.packages import install_hint
from evm_deploy.errors import ToolchainError
from evm_deploy.toolchain.compile import Compiler, compiled_once, read_recipe
from evm_deploy.toolchain.platforms import PLATFORMS, host_platform
from evm_deploy.toolchain.plugins import SUFFIX, kernel_isa, require_release

RUN_HINT = install_hint("run-executorch")
COMPILERS = ("c++", "g++", "clang++")
BUILD_HINT = f"install one of {', '.join(COMPILERS)}, or name a C++ compiler in the environment variable CXX"
LIBRARY = f"evm_executorch{SUFFIX}"
MARK = re.compile(rb"evm library for ExecuTorch (\d+(?:\.\w+)*)\0")
#: Libraries of the package `executorch` that ours needs, each after those that it needs itself.
PARTS = ("executorch", "executorch_threadpool", "executorch_kernels_optimized", "executorch_backend_xnnpack")
#: Fields of the C struct evm_scan_args, and their axes.
SCAN_AXES = {
    "u": "bKLD",
    "delta": "bKLD",
    "A": "KDN",
    "B": "bKLN",
    "C": "bKLN",
    "skip": "KD",
    "bias": "KD",
    "y": "bKLD",
}
DEFINES = ("C10_USING_CUSTOM_GENERATED_MACROS", "ET_EVENT_TRACER_ENABLED", "ET_USE_THREADPOOL")  # as its CMake package
C10 = "executorch/runtime/core/portable_type/c10"


def package_folder() -> Path:
    """Return the folder of the installed package `executorch`, without importing it. Raises ToolchainError."""
    spec = find_spec("executorch")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise ToolchainError("executorch is not installed", RUN_HINT)
    return Path(folders[0])


def installed_release() -> str:
    """Return the release of the installed ExecuTorch, such as 1.5.1. Raises ToolchainError if it is not installed."""
    package_folder()
    return metadata.version("executorch").partition("+")[0]


def library() -> Path:
    """Return our library for the installed ExecuTorch.

    The first call compiles the library, which takes seconds with the installed archive of the kernels and a minute
    without; later calls find it in the cache. The cache key covers sources, ExecuTorch release and platform. Raises
    ToolchainError if the library cannot be compiled.
    """
    return compiled_once(cached_path(), compile_in)


def cached_path() -> Path:
    """Return the cache path of the library for the installed ExecuTorch. The file may not exist yet."""
    key = read_recipe().digest(f"{installed_release()} {host_platform()} {PARTS} {DEFINES}")
    return cache_folder() / "executorch" / key / LIBRARY


def compile_in(work: Path) -> Path:
    """Compile the library in the folder `work`. Returns its path. Raises ToolchainError."""
    package = package_folder()
    headers = package / "include"
    if not (headers / C10).is_dir():
        raise ToolchainError(f"executorch {installed_release()} has no C++ headers in {headers}", RUN_HINT)
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if not found:
        raise ToolchainError("there is no C++ compiler; the library for ExecuTorch is compiled with it", BUILD_HINT)
    recipe = read_recipe()
    known = PLATFORMS.get(host_platform())
    architecture = known.architecture if known else "other"
    command = (
        *found.split(),
        *(f"-D{name}" for name in DEFINES),
        f"-DEVM_EXECUTORCH_RELEASE={installed_release()}",
        *(flag for folder in (headers, headers / C10) for flag in ("-isystem", str(folder))),
        f"-ffile-prefix-map={recipe.folder}/=",  # keeps this machine's paths out of assertions
        f"-ffile-prefix-map={package}/=",
    )
    compiler = Compiler(command, architecture)
    archive = recipe.archive(architecture, " ".join(found.split()[1:]))
    objects = compiler.objects(recipe, recipe.words["executorch_sources"], work, archive)
    compiler.run(
        "-shared", "-s", *objects, f"-L{package / 'lib'}", *(f"-l{part}" for part in PARTS), "-o", work / LIBRARY
    )
    return work / LIBRARY


def release_of(path: Path) -> str:
    """Return the ExecuTorch release that a library was compiled for, read from a mark in the file; empty without one.

    Raises OSError.
    """
    found = MARK.search(path.read_bytes())
    return found[1].decode() if found else ""


def check_release(path: Path) -> None:
    """Raise ToolchainError unless the library at `path` was compiled for the installed ExecuTorch release."""
    require_release(path, "library", "ExecuTorch", release_of, installed_release())


def open_library(path: Path | None = None) -> ctypes.CDLL:
    """Load the library at `path` into this process, which registers its operators with ExecuTorch.

    path: None for the library of this process, or `library()` if there is none yet. ExecuTorch ends a process that
    registers an operator twice: a copy of the loaded file is not loaded again. Raises ToolchainError if the library
    does not fit the installed ExecuTorch or EVM_ISA, or another one is loaded.
    """
    with _lock:
        if _loaded and path is None:
            return _loaded[0].library
        path = path or library()
        digest = sha256(path)
        if not _loaded:
            check_release(path)
            for part in PARTS:
                _load_part(part)
            kernel_isa(path)
            _loaded.append(Loaded(path, digest, _declared(ctypes.CDLL(str(path)))))
        elif _loaded[0].sha256 != digest:
            raise ToolchainError(
                f"ExecuTorch takes operators once in a process, and {_loaded[0].path} has registered them: {path} "
                "cannot be loaded too",
                "start another process",
            )
        return _loaded[0].library


def isa(path: Path) -> str:
    """Return the instruction set that the kernels of a library use here. Raises the errors of `open_library`."""
    open_library(path)
    return kernel_isa(_loaded[0].path)


class Scan(ctypes.Structure):
    """The C struct evm_scan_args of native/scan/evm_scan.h."""

    _fields_ = [
        *((name, ctypes.POINTER(ctypes.c_float)) for name in SCAN_AXES),
        *((name, ctypes.c_int64) for name in ("b", "K", "L", "D", "N", "no_softplus")),
    ]


@contextmanager
def recorded_scans() -> Iterator[list[dict[str, NDArray[np.float32]]]]:
    """Context manager that records the tensors of every scan on our kernels: u, delta, A, B, C, skip, bias and y.

    Yields the list that the scans are appended to, in order of execution. For verification: blocks write these tensors
    only here. The process may run one program meanwhile.
    """
    native, found = open_library(), list[dict[str, NDArray[np.float32]]]()

    def tell(scan: Any) -> None:
        args = scan.contents
        sizes = {name: [getattr(args, axis) for axis in axes] for name, axes in SCAN_AXES.items()}
        found.append({name: np.ctypeslib.as_array(getattr(args, name), size).copy() for name, size in sizes.items()})

    recorder = RECORDER(tell)
    native.evm_executorch_record(recorder)
    try:
        yield found
    finally:
        native.evm_executorch_record(RECORDER())


def _load_part(part: str) -> None:
    """Load a library of the package `executorch`, so that ours finds it by its name."""
    files = sorted((package_folder() / "lib").glob(f"lib{part}.*"))
    try:
        ctypes.CDLL(str(files[0]), mode=ctypes.RTLD_GLOBAL)
    except (IndexError, OSError) as error:
        why = error if isinstance(error, OSError) else "it is missing"
        raise ToolchainError(f"lib{part} of executorch cannot be loaded: {why}", RUN_HINT) from error


RECORDER = ctypes.CFUNCTYPE(None, ctypes.POINTER(Scan))


class TensorFacts(ctypes.Structure):
    """The C struct evm_program_tensor of native/executorch/evm_executorch.h."""

    _fields_ = [
        ("type", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.c_int64 * 8),
        ("bytes", ctypes.c_int64),
    ]


def _declared(native: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the C interface (native/executorch/evm_executorch.h)."""
    where, text, number, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
    arrays = ctypes.POINTER(where)
    for name, result, arguments in (
        ("open", where, [text, number, text, size]),
        ("close", None, [where]),
        ("names", text, [where]),
        ("count", number, [where, ctypes.c_int]),
        ("describe", TensorFacts, [where, ctypes.c_int, number]),
        ("run", ctypes.c_int, [where, arrays, arrays, text, size]),
    ):
        function = getattr(native, f"evm_program_{name}")
        function.restype, function.argtypes = result, arguments
    native.evm_executorch_record.argtypes, native.evm_executorch_record.restype = [RECORDER], None
    return native


@dataclass(frozen=True)
class Loaded:
    """The library that this process has loaded. sha256: of its file."""

    path: Path
    sha256: str
    library: ctypes.CDLL


_lock = threading.Lock()
_loaded: list[Loaded] = []
