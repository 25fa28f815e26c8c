"""Engines of TensorRT and TensorRT-RTX. Memory and streams come from cuda-python.

Nobody has run this file yet: no machine with a GPU was to be had. It is as small as it can be for that reason.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import ToolchainError
from evm_deploy.runtimes.base import Feeds, Runtime, TensorSpec
from evm_deploy.tensorrt_finish import MODULES, FinishError, load_tensorrt, make_logger

REBUILD = "an engine fits one release and one kind of GPU: build it where it runs, evm-export --finish BUNDLE"
INSTALL_HINTS = {"trt": "pip install 'evm-deploy[trt]'", "trt-rtx": "pip install 'evm-deploy[trt-rtx]'"}


NO_DRIVER = "there is no NVIDIA driver on this machine"


def installed(target: str) -> bool:
    """Whether TensorRT, or TensorRT-RTX, is there to be imported."""
    return any(find_spec(name) for name in MODULES[target])


def has_driver() -> bool:
    """Whether there is an NVIDIA driver, which everything but a build with TensorRT-RTX needs."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def can_build_engine(target: str) -> bool:
    """Whether engines can be built on this machine: TensorRT-RTX needs no GPU for it."""
    return installed(target) and (target == "trt-rtx" or has_driver())


def plan_bytes(content: bytes) -> bytes:
    """The plan in a file: all of it, or what follows a length (int32, little-endian) and that much JSON.

    The second is how some exporters mark engines; TensorRT itself would refuse it.
    """
    size = int.from_bytes(content[:4], "little", signed=True)
    if content[4:5] == b"{" and 0 < size <= len(content) - 4:
        return content[4 + size :]
    return content


def check_built_for(path: Path, version: str) -> None:
    """Compare the engine's manifest, where it has one, with the release here. Raises ToolchainError."""
    sidecar = path.parent / "manifest.json"
    if sidecar.is_file():
        manifest = json.loads(sidecar.read_text(encoding="utf-8"))
        built = manifest.get("details", {}).get("engine", {}).get("tensorrt", version)
        compatible = manifest.get("plan", {}).get("engine", {}).get("version_compatible", False)
        if built != version and not compatible:
            raise ToolchainError(f"{path} was built with TensorRT {built}, here is {version}", REBUILD)


class TensorRtRuntime:
    """An engine and its execution context, on one CUDA stream. plugin: the library that its scans need, if any.

    Inputs and outputs are copied from and to the host."""

    def __init__(self, path: Path, target: str, plugin: Path | None = None) -> None:
        try:
            self.trt = load_tensorrt(target)
        except FinishError as error:
            raise ToolchainError(str(error), INSTALL_HINTS[target]) from error
        check_built_for(path, self.trt.__version__)
        self.logger = make_logger(self.trt)
        self.runtime = self.trt.Runtime(self.logger)
        if plugin:
            self.runtime.get_plugin_registry().load_library(str(plugin))
        self.engine = self.runtime.deserialize_cuda_engine(plan_bytes(path.read_bytes()))
        if self.engine is None:
            raise ToolchainError(
                f"{path} cannot be opened: {self.logger.errors()}", REBUILD if has_driver() else NO_DRIVER
            )
        try:
            from cuda.bindings import runtime as cuda
        except ImportError as error:
            raise ToolchainError("cuda-python is not installed", INSTALL_HINTS[target]) from error
        self.cuda = cuda
        self.stream = self._call(cuda.cudaStreamCreate())
        self.context = self.engine.create_execution_context()
        self.memory: dict[str, tuple[int, int]] = {}  # by tensor: address, bytes
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        read = [name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT]
        self.inputs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in read}
        self.outputs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in names if name not in read}

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        host_to_device = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        device_to_host = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        held = {name: np.ascontiguousarray(value) for name, value in feeds.items()}  # until the stream is through
        for name, value in held.items():
            self.context.set_input_shape(name, value.shape)
            address = self._address(name, value.nbytes)
            self._call(self.cuda.cudaMemcpyAsync(address, value.ctypes.data, value.nbytes, host_to_device, self.stream))
        results = {
            name: np.empty(tuple(self.context.get_tensor_shape(name)), spec.dtype)
            for name, spec in self.outputs.items()
        }
        for name, value in results.items():
            self._address(name, value.nbytes)
        if not self.context.execute_async_v3(self.stream):
            raise ToolchainError(f"the engine failed: {self.logger.errors()}", REBUILD)
        for name, value in results.items():
            address, size = self.memory[name][0], value.nbytes
            self._call(self.cuda.cudaMemcpyAsync(value.ctypes.data, address, size, device_to_host, self.stream))
        self._call(self.cuda.cudaStreamSynchronize(self.stream))
        return results

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for address, _ in self.memory.values():
            self._call(self.cuda.cudaFree(address))
        self.memory.clear()
        self._call(self.cuda.cudaStreamDestroy(self.stream))

    def _spec(self, name: str) -> TensorSpec:
        dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name))).name
        shape = tuple(None if size < 0 else int(size) for size in self.engine.get_tensor_shape(name))
        return TensorSpec(name, dtype, shape)

    def _address(self, name: str, size: int) -> int:
        """Device memory of a tensor, at least `size` bytes, and bound to it."""
        address, had = self.memory.get(name, (0, 0))
        if had < size:
            if had:
                self._call(self.cuda.cudaFree(address))
            address = self._call(self.cuda.cudaMalloc(size))
            self.memory[name] = (address, size)
        self.context.set_tensor_address(name, address)
        return address

    def _call(self, result: tuple[Any, ...]) -> Any:
        """The value of a CUDA call. Raises ToolchainError naming what went wrong."""
        status, *values = result
        if status != self.cuda.cudaError_t.cudaSuccess:
            raise ToolchainError(f"CUDA: {status.name}", "see nvidia-smi for the driver and the GPU's memory")
        return values[0] if values else None
