"""Call of the native scan kernel (native/scan/evm_scan.h) on torch tensors, without any runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy.scan.onnx_function import INPUTS, OUTPUT
from evm_deploy.toolchain.plugins import find_plugin, kernel_isa

if TYPE_CHECKING:
    from torch import Tensor

_allowed: ContextVar[bool] = ContextVar("native_scan_allowed", default=True)


class Arguments(ctypes.Structure):
    """The C struct evm_scan_args of native/scan/evm_scan.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*INPUTS, OUTPUT)),
        *((name, ctypes.c_int64) for name in ("b", "K", "L", "D", "N", "no_softplus")),
    ]


@cache
def open_kernel(library: Path) -> ctypes.CDLL:
    """Open the native library and declare the types of its scan functions.

    Raises ToolchainError if the library cannot be loaded or does not use the instruction set that EVM_ISA names.
    """
    kernel_isa(library)
    kernel = ctypes.CDLL(str(library))
    kernel.evm_scan_num_tiles.argtypes = [ctypes.c_void_p]
    kernel.evm_scan_num_tiles.restype = ctypes.c_int64
    kernel.evm_scan_run_tile.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    kernel.evm_scan_run_tile.restype = None
    return kernel


@contextmanager
def without_native_scan() -> Iterator[None]:
    """Context manager in which the eager torch op does not use the native kernel.

    A reference result must not come from the same kernel that it is compared with.
    """
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def native_kernel(inputs: Sequence[Tensor]) -> ctypes.CDLL | None:
    """Return the native library if it can scan these tensors, else None.

    The library must be installed, `without_native_scan` not active, and all tensors float32 on the CPU.
    """
    import torch

    if not _allowed.get() or any(x.dtype != torch.float32 or x.device.type != "cpu" for x in inputs):
        return None
    library = find_plugin("onnxruntime")
    return open_kernel(library) if library else None


def run_native_scan(kernel: ctypes.CDLL, inputs: Sequence[Tensor], delta_softplus: bool = True) -> Tensor:
    """Run the scan on seven float32 CPU tensors, in the order of INPUTS, whose shapes fit each other; return y.

    The kernel uses as many threads as torch does.
    """
    import torch

    tensors = [x.contiguous() for x in inputs]
    y = torch.empty_like(tensors[0])
    sizes = (*tensors[0].shape, tensors[2].shape[2])
    arguments = Arguments(*(x.data_ptr() for x in (*tensors, y)), *sizes, not delta_softplus)
    where = ctypes.addressof(arguments)
    tiles = range(kernel.evm_scan_num_tiles(where))
    threads = min(torch.get_num_threads(), len(tiles))

    def run(part: range) -> None:
        for tile in part:
            kernel.evm_scan_run_tile(where, tile)

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, (tiles[i::threads] for i in range(threads))))
    else:
        run(tiles)
    return y
