"""Engines of TensorRT and TensorRT-RTX. Memory and streams come from cuda-python.

Never run on a GPU: there was none to be had. The tests run it against stand-ins for the engine and for CUDA.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.settings import setting
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime, TensorSpec
from evm_deploy.runtimes.info import NativeKernels, Requirement, RuntimeInfo
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.runtimes.tensorrt.build_engine import MODULES, EngineBuildError, load_tensorrt, make_logger

REBUILD = "an engine fits one release and one kind of GPU: build it where it runs, evm-export --finish BUNDLE"
INSTALL_HINTS = {"trt": "pip install 'evm-deploy[trt]'", "trt-rtx": "pip install 'evm-deploy[trt-rtx]'"}
NO_DRIVER = "there is no NVIDIA driver on this machine"
PARTS = ("inputs", "compute", "outputs")  # of a run on the device, between events
Shapes = dict[str, tuple[int, ...]]


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


def engine_bytes(content: bytes) -> bytes:
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
        plan = manifest.get("plan", {})
        settings = plan.get("settings") or plan.get("engine") or {}  # the second in bundles of before
        compatible = settings.get("version_compatible", False)
        if built != version and not compatible:
            raise ToolchainError(f"{path} was built with TensorRT {built}, here is {version}", REBUILD)


class TensorRtRuntime:
    """An engine and its execution context, on one CUDA stream. plugin: the library that its scans need, if any.

    Inputs and outputs are copied from and to the host; `milliseconds` says what the last run took on the device:
    `inputs`, `compute`, `outputs`, between events in the stream. cuda_graph: from the second run of a shape on, the
    engine is launched as one CUDA graph.
    """

    def __init__(self, path: Path, target: str, plugin: Path | None = None, cuda_graph: bool = False) -> None:
        try:
            self.trt = load_tensorrt(target)
        except EngineBuildError as error:
            raise ToolchainError(str(error), INSTALL_HINTS[target]) from error
        check_built_for(path, self.trt.__version__)
        self.logger = make_logger(self.trt)
        self.runtime = self.trt.Runtime(self.logger)
        if plugin:
            self.runtime.get_plugin_registry().load_library(str(plugin))
        self.engine = self.runtime.deserialize_cuda_engine(engine_bytes(path.read_bytes()))
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
        self.marks = [self._call(cuda.cudaEventCreate()) for _ in range(len(PARTS) + 1)]
        self.context = self.engine.create_execution_context()
        self.memory: dict[str, tuple[int, int]] = {}  # by tensor: address, bytes
        self.cuda_graph = cuda_graph
        self.captured: tuple[Shapes, Any] | None = None  # what it is for, and the graph
        self.warm: Shapes | None = None
        self.milliseconds: dict[str, float] = {}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        read = [name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT]
        self.inputs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in read}
        self.outputs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in names if name not in read}

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        held = {name: np.ascontiguousarray(value) for name, value in feeds.items()}  # until the stream is through
        results = self._bind(held)
        self._mark(0)
        for name, value in held.items():
            self._copy(self.memory[name][0], value.ctypes.data, value.nbytes, "cudaMemcpyHostToDevice")
        self._mark(1)
        self._compute({name: value.shape for name, value in held.items()})
        self._mark(2)
        for name, value in results.items():
            self._copy(value.ctypes.data, self.memory[name][0], value.nbytes, "cudaMemcpyDeviceToHost")
        self._mark(3)
        self._call(self.cuda.cudaStreamSynchronize(self.stream))
        self.milliseconds = {
            part: float(self._call(self.cuda.cudaEventElapsedTime(*ends)))
            for part, ends in zip(PARTS, pairwise(self.marks), strict=True)
        }
        return results

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()
        for address, _ in self.memory.values():
            self._call(self.cuda.cudaFree(address))
        self.memory.clear()
        for mark in self.marks:
            self._call(self.cuda.cudaEventDestroy(mark))
        self._call(self.cuda.cudaStreamDestroy(self.stream))

    def _bind(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Give every tensor memory on the device. Returns arrays for the outputs."""
        for name, value in feeds.items():
            self.context.set_input_shape(name, value.shape)
            self._reserve(name, value.nbytes)
        results = {}
        for name, spec in self.outputs.items():
            results[name] = np.empty(tuple(self.context.get_tensor_shape(name)), spec.dtype)
            self._reserve(name, results[name].nbytes)
        return results

    def _compute(self, shapes: Shapes) -> None:
        """Put one inference on the stream: as a graph, which is captured in the second run of these shapes, as
        TensorRT asks, or call by call.
        """
        if self.captured and self.captured[0] == shapes:
            self._call(self.cuda.cudaGraphLaunch(self.captured[1], self.stream))
        elif self.cuda_graph and self.warm == shapes:
            self._forget()
            mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self._call(self.cuda.cudaStreamBeginCapture(self.stream, mode))
            self._enqueue()
            graph = self._call(self.cuda.cudaStreamEndCapture(self.stream))
            self.captured = shapes, self._call(self.cuda.cudaGraphInstantiate(graph, 0))
            self._call(self.cuda.cudaGraphDestroy(graph))
            self._call(self.cuda.cudaGraphLaunch(self.captured[1], self.stream))
        else:
            self._enqueue()
            self.warm = shapes

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream):
            raise ToolchainError(f"the engine failed: {self.logger.errors()}", REBUILD)

    def _forget(self) -> None:
        """Drop the captured graph: it holds addresses and shapes."""
        if self.captured:
            self._call(self.cuda.cudaGraphExecDestroy(self.captured[1]))
            self.captured = None

    def _spec(self, name: str) -> TensorSpec:
        dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name))).name
        shape = tuple(None if size < 0 else int(size) for size in self.engine.get_tensor_shape(name))
        return TensorSpec(name, dtype, shape)

    def _reserve(self, name: str, size: int) -> None:
        """Device memory for a tensor, at least `size` bytes, bound to it."""
        address, had = self.memory.get(name, (0, 0))
        if had < size:
            self._forget()
            if had:
                del self.memory[name]
                self._call(self.cuda.cudaFree(address))
            address = self._call(self.cuda.cudaMalloc(size))
            self.memory[name] = (address, size)
        self.context.set_tensor_address(name, address)

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        direction = getattr(self.cuda.cudaMemcpyKind, kind)
        self._call(self.cuda.cudaMemcpyAsync(to, source, size, direction, self.stream))

    def _mark(self, index: int) -> None:
        self._call(self.cuda.cudaEventRecord(self.marks[index], self.stream))

    def _call(self, result: tuple[Any, ...]) -> Any:
        """The value of a CUDA call. Raises ToolchainError naming what went wrong."""
        status, *values = result
        if status != self.cuda.cudaError_t.cudaSuccess:
            raise ToolchainError(f"CUDA: {status.name}", "see nvidia-smi for the driver and the GPU's memory")
        return values[0] if values else None


@dataclass(frozen=True)
class TensorRtSettings:
    """cuda_graph: launch the engine as one CUDA graph."""

    cuda_graph: bool = setting(
        False, "--cuda-graph", help="TensorRT: launch the engine as one CUDA graph", what="CUDA graphs"
    )


NEITHER = "TensorRT takes no threads, device or cache", "leave them out"


def open_(target: str, path: Path, options: RunOptions) -> Runtime:
    """An engine in TensorRT; a scan by itself, for which there is none, in ONNX Runtime."""
    if path.suffix == ".onnx":
        return emulator(path, options)
    if options.threads:
        raise UsageError(*NEITHER)
    settings: TensorRtSettings = options.settings or TensorRtSettings()
    return TensorRtRuntime(path, target, options.plugin, settings.cuda_graph)


def emulator(path: Path, options: RunOptions) -> Runtime:
    """The bundle's ONNX in ONNX Runtime, its scans on our kernels for CPUs where they are nodes."""
    return OnnxRuntime(path, options.threads, options.plugin)


def no_library() -> NoReturn:
    raise ToolchainError("TensorRT's plugin library is compiled where it will run", "see the bundle's README.md")


def obstacle() -> str:
    return "" if has_driver() else NO_DRIVER


def _info(
    name: str,
    aliases: tuple[str, ...],
    label: str,
    needs: tuple[Requirement, ...],
    kernels: NativeKernels | None = None,
) -> RuntimeInfo:
    return RuntimeInfo(
        name=name,
        aliases=aliases,
        label=label,
        precisions=("fp32", "fp16", "int8", "int8-fp16"),
        needs=(*needs, Requirement("cuda", "cuda-python")),
        extra=name,
        open=partial(open_, name),
        scan_case="scan.onnx",
        obstacle=obstacle,
        kernels=kernels,
        settings=TensorRtSettings,
        refusals=dict.fromkeys(("device", "cache"), NEITHER),
    )


TRT = _info(
    "trt",
    ("tensorrt", "engine"),
    "TensorRT",
    (Requirement("tensorrt", "tensorrt", "10.0"),),
    NativeKernels("tensorrt", no_library, isa=lambda library: "CUDA"),
)
TRT_RTX = _info(
    "trt-rtx",
    ("rtx",),
    "TensorRT-RTX",
    (Requirement("tensorrt_rtx", "tensorrt-rtx-cu13-bindings", "1.7", others=("tensorrt_rtx_bindings",)),),
)
