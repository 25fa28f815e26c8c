"""Run engines of TensorRT and TensorRT-RTX. cuda-python provides memory and streams.

Not run on a GPU yet. The tests use fakes of the engine and of CUDA.
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

from evm_deploy._util.packages import install_hint
from evm_deploy._util.settings import Settings, setting
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime, TensorSpec
from evm_deploy.runtimes.info import NativeKernels, Requirement, RuntimeInfo
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.runtimes.tensorrt.build_engine import (
    MODULES,
    NMS_PLUGIN,
    EngineBuildError,
    load_tensorrt,
    make_logger,
)

REBUILD = "build the engine on the machine that runs it, for its release and GPU:  evm-export --finish BUNDLE"
INSTALL_HINTS = {target: install_hint(target) for target in MODULES}
NO_DRIVER = "no NVIDIA driver on this machine"
PARTS = ("inputs", "compute", "outputs")  # parts of a run on the device, each measured between two events
Shapes = dict[str, tuple[int, ...]]


def installed(target: str) -> bool:
    """Test whether the package of TensorRT (or TensorRT-RTX) is installed."""
    return any(find_spec(name) for name in MODULES[target])


def has_driver() -> bool:
    """Test whether an NVIDIA driver is installed. Only building engines with TensorRT-RTX works without a driver."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def can_build_engine(target: str) -> bool:
    """Test whether this machine can build engines. TensorRT-RTX needs no GPU to build."""
    return installed(target) and (target == "trt-rtx" or has_driver())


def engine_bytes(content: bytes) -> bytes:
    """Return the serialized engine in the content of a file.

    Some exporters write a length (int32, little-endian) and JSON metadata of that length before the engine. TensorRT
    refuses such a file, so the metadata is removed.
    """
    size = int.from_bytes(content[:4], "little", signed=True)
    if content[4:5] == b"{" and 0 < size <= len(content) - 4:
        return content[4 + size :]
    return content


def check_built_for(path: Path, version: str) -> None:
    """Raise ToolchainError if the manifest next to an engine names another TensorRT release than `version`.

    Engines without a manifest and version-compatible engines pass.
    """
    sidecar = path.parent / "manifest.json"
    if sidecar.is_file():
        manifest = json.loads(sidecar.read_text(encoding="utf-8"))
        built = _entry(manifest, "details", "engine").get("tensorrt", version)
        settings = _entry(manifest, "plan", "settings") or _entry(manifest, "plan", "engine")  # second: older bundles
        if built != version and not settings.get("version_compatible", False):
            raise ToolchainError(f"{path} was built with TensorRT {built}, but {version} is installed", REBUILD)


def _entry(content: Any, *keys: str) -> dict[str, Any]:
    """Return the object behind `keys` in untrusted JSON; empty if there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


class TensorRtRuntime:
    """Engine with its execution context, on one CUDA stream.

    plugin: library with the kernel of the scans, if the engine needs one. cuda_graph: from the second run of a shape
    on, launch the engine as one CUDA graph. `run` copies inputs and outputs between host and device. `milliseconds`
    holds the device times of the last run (`inputs`, `compute`, `outputs`), measured by events in the stream.
    Raises ToolchainError.
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
        engine = engine_bytes(path.read_bytes())
        if NMS_PLUGIN in engine:
            self.trt.init_libnvinfer_plugins(self.logger, "")
        self.engine = self.runtime.deserialize_cuda_engine(engine)
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
        self.captured: tuple[Shapes, Any] | None = None  # input shapes, and the graph captured for them
        self.warm: Shapes | None = None
        self.milliseconds: dict[str, float] = {}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        read = [name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT]
        self.inputs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in read}
        self.outputs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in names if name not in read}

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference, and measure `milliseconds`. Raises ToolchainError if CUDA or the engine fails."""
        held = {name: np.ascontiguousarray(value) for name, value in feeds.items()}  # alive until the stream is done
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

    @property
    def runs_on(self) -> str:
        """Name of the GPU that runs the engine: `GPU: NVIDIA A10`."""
        properties = self._call(self.cuda.cudaGetDeviceProperties(self._call(self.cuda.cudaGetDevice())))
        return f"GPU: {properties.name.decode()}"

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
        """Bind device memory to every tensor. Returns host arrays for the outputs."""
        for name, value in feeds.items():
            self.context.set_input_shape(name, value.shape)
            self._reserve(name, value.nbytes)
        results = {}
        for name, spec in self.outputs.items():
            results[name] = np.empty(tuple(self.context.get_tensor_shape(name)), spec.dtype)
            self._reserve(name, results[name].nbytes)
        return results

    def _compute(self, shapes: Shapes) -> None:
        """Enqueue one inference on the stream: as a CUDA graph, or call by call.

        A graph is captured in the second run of the same shapes: TensorRT requires a run before the capture.
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
        """Destroy the captured graph, which contains fixed addresses and shapes."""
        if self.captured:
            self._call(self.cuda.cudaGraphExecDestroy(self.captured[1]))
            self.captured = None

    def _spec(self, name: str) -> TensorSpec:
        dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name))).name
        shape = tuple(None if size < 0 else int(size) for size in self.engine.get_tensor_shape(name))
        return TensorSpec(name, dtype, shape)

    def _reserve(self, name: str, size: int) -> None:
        """Bind device memory of at least `size` bytes to a tensor. Allocates memory if the present one is too small."""
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
        """Return the value of a CUDA call. Raises ToolchainError with the name of the CUDA error."""
        status, *values = result
        if status != self.cuda.cudaError_t.cudaSuccess:
            raise ToolchainError(f"CUDA: {status.name}", "check the driver and the GPU's memory with nvidia-smi")
        return values[0] if values else None


@dataclass(frozen=True)
class TensorRtSettings(Settings):
    """Run settings of TensorRT. cuda_graph: launch the engine as one CUDA graph."""

    cuda_graph: bool = setting(
        False, "--cuda-graph", help="TensorRT: launch the engine as one CUDA graph", what="CUDA graphs"
    )


NEITHER = "TensorRT has no settings for threads, device or cache", "leave these settings out"


def open_(target: str, path: Path, options: RunOptions) -> Runtime:
    """Open an engine in TensorRT, or the ONNX file of a single scan (scan_case), which has no engine, in ONNX Runtime.

    Raises UsageError, ToolchainError, BundleError.
    """
    if path.suffix == ".onnx":
        return emulator(path, options)
    if options.threads:
        raise UsageError(*NEITHER)
    settings: TensorRtSettings = options.settings or TensorRtSettings()
    return TensorRtRuntime(path, target, options.plugin, settings.cuda_graph)


def emulator(model: Path | bytes, options: RunOptions) -> Runtime:
    """Open the ONNX file of a bundle in ONNX Runtime, whose integer sums are then exact, as TensorRT's are.

    `options.plugin`: native library for scans that are nodes.
    """
    return OnnxRuntime(model, options.threads, options.plugin, exact_integers=True)


def no_library() -> NoReturn:
    """Raise ToolchainError: no plugin library for TensorRT is installed with this package."""
    raise ToolchainError(
        "the TensorRT plugin library is not installed: compile it on the machine that runs the engine",
        "see README.md in the bundle",
    )


def obstacle() -> str:
    """Return the reason why this machine cannot run engines: no NVIDIA driver; empty if there is one."""
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
