"""OpenVINO runtime, for all devices that OpenVINO finds."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import checksum_matches, sha256, write_checksum
from evm_deploy._util.settings import Settings, setting
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.runtimes.base import DEFAULTS, Feeds, NodeTime, RunOptions, TensorSpec
from evm_deploy.runtimes.info import NativeKernels, Profiler, Requirement, RuntimeInfo
from evm_deploy.toolchain.openvino_extension import RUN_HINT, extension, isa

VIRTUAL = ("AUTO", "HETERO", "MULTI", "BATCH")  # virtual devices, which delegate to other devices: HETERO:GPU,CPU
RT_INFO = "evm_deploy"  # section of an IR's metadata
PRECISION_HINT = "inference_precision"  # key in RT_INFO: data type for computing the operations
MODEL_API_OUTPUTS = "model_api_outputs"  # key in RT_INFO: outputs that OpenVINO Model API reads and a bundle has not


@dataclass(frozen=True)
class OpenVinoSettings(Settings):
    """Run settings of OpenVINO.

    device: OpenVINO's device name; None for the CPU. cache: folder for compiled models, which load faster.
    """

    device: str | None = setting(
        None, "--openvino-device", metavar="D", help="CPU (default), GPU, NPU, AUTO, HETERO:GPU,CPU", what="devices"
    )
    cache: str | Path | None = setting(
        None, "--cache", metavar="DIR", help="OpenVINO: keep compiled models in this folder", what="cache", here=True
    )


class OpenVinoRuntime:
    """Compiled model from an IR file or from an openvino.Model in memory.

    A model without a precision hint in its metadata runs in float32, because the default of OpenVINO on many CPUs is
    bfloat16.
    The cache has one folder per bundle and extension. A changed extension therefore never finds models that were
    compiled with the old one. OpenVINO identifies models by path and time, which two versions of a container layer may
    share. If the compiled model is cached, OpenVINO does not read the IR, which halves the time to open it.
    Raises UsageError for an unknown device, ToolchainError for an extension that does not fit, BundleError for a model
    that cannot be opened.
    """

    def __init__(self, model: Path | Any, options: RunOptions = DEFAULTS) -> None:
        self.core = open_core(options.plugin)
        settings: OpenVinoSettings = options.settings or OpenVinoSettings()
        device = settings.device or "CPU"
        check_device(device, self.core.available_devices)
        properties = {"PERFORMANCE_HINT": "LATENCY"}
        if options.threads:
            properties["INFERENCE_NUM_THREADS"] = str(options.threads * options.streams)
        if options.streams > 1:
            properties["NUM_STREAMS"] = str(options.streams)
        if options.profile:
            properties["PERF_COUNT"] = "YES"
        cache = None
        if settings.cache:
            by_extension = sha256(options.plugin)[:16] if options.plugin else "portable"
            cache = Path(settings.cache) / options.identity / by_extension
            properties["CACHE_DIR"] = str(cache)
        with sealed(cache), opening(model, f"compile for {device}"):
            if isinstance(model, Path) and not cache:
                model = read(self.core, model)
            properties["INFERENCE_PRECISION_HINT"] = precision_hint(model)
            self.compiled = self.core.compile_model(model, device, properties)
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in map(_spec, self.compiled.inputs)}
        hidden = fact(model, MODEL_API_OUTPUTS).split(",")
        self._places = {port.any_name: i for i, port in enumerate(self.compiled.outputs) if port.any_name not in hidden}
        self.outputs: Mapping[str, TensorSpec] = {
            name: _spec(self.compiled.outputs[i]) for name, i in self._places.items()
        }
        self._thread = threading.local()

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Several threads may call this method. Raises UsageError if OpenVINO fails."""
        if not hasattr(self._thread, "request"):  # a request serves one thread at a time
            self._thread.request = self.compiled.create_infer_request()
        try:
            results = self._thread.request.infer(dict(feeds), share_inputs=True)
        except RuntimeError as error:
            raise UsageError(f"OpenVINO cannot run the model: {reason(error)}") from error
        return {name: results[i] for name, i in self._places.items()}

    def node_times(self) -> list[NodeTime]:
        """Return the mean time of each node over all inferences of this thread."""
        return [
            NodeTime(info.node_name, info.node_type, info.real_time.total_seconds() * 1e3)
            for info in self._thread.request.profiling_info
            if info.status == info.Status.EXECUTED
        ]

    @property
    def precision(self) -> str:
        """Data type for computing the operations, in OpenVINO's words: f32, bf16 or f16."""
        return str(self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    @property
    def runs_on(self) -> str:
        """Devices that run the model, each with its full name: `GPU.0: Intel(R) Arc(TM) A770 Graphics`."""
        devices = [str(name).strip("()") for name in self.compiled.get_property("EXECUTION_DEVICES")]
        return ", ".join(f"{name}: {self.core.get_property(name, 'FULL_DEVICE_NAME').strip()}" for name in devices)

    def __enter__(self) -> OpenVinoRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._thread, self.compiled, self.core


@contextlib.contextmanager
def sealed(cache: Path | None) -> Iterator[None]:
    """Context manager that protects a cache of compiled models by checksums.

    On entry, delete cached models whose checksum does not match; on exit, write the checksums of new models. OpenVINO
    2026.4.1 loads a cached model with changed weights without an error. Raises UsageError if the cache is not writable.
    """
    if not cache:
        yield
        return
    try:
        known = {blob for blob in cache.glob("*.blob") if checksum_matches(blob)}
        for blob in set(cache.glob("*.blob")) - known:
            blob.unlink(missing_ok=True)
        yield
        for blob in set(cache.glob("*.blob")) - known:
            with contextlib.suppress(FileNotFoundError):  # another process has deleted the model
                write_checksum(blob)
    except OSError as error:
        raise UsageError(f"the cache {cache} cannot be used: {error.strerror}", "give another folder") from error


def open_core(plugin: Path | None) -> Any:
    """Create an openvino.Core, and add the extension `plugin` if given. The core must outlive the models it reads.

    Raises ToolchainError if OpenVINO is not installed, or the extension does not fit its release or EVM_ISA.
    """
    try:
        import openvino
    except ImportError as error:
        raise ToolchainError("openvino is not installed", RUN_HINT) from error
    core = openvino.Core()
    if plugin:
        isa(plugin)
        try:
            core.add_extension(str(plugin))
        except RuntimeError as error:
            raise ToolchainError(f"OpenVINO refuses {plugin}: {reason(error)}") from error
    return core


@contextlib.contextmanager
def opening(model: Path | Any, what: str = "read") -> Iterator[None]:
    """Context manager that converts errors of OpenVINO to BundleError.

    what: verb for the message. If the model needs the extension, the hint says how to provide it.
    """
    name = model if isinstance(model, Path) else "the model"
    try:
        yield
    except (OSError, RuntimeError) as error:
        if "opset: evm" in str(error):
            raise BundleError(
                f"{name} has operators of domain evm, which need the OpenVINO extension",
                "pass the path of the extension as plugin, or export with --scan portable",
            ) from error
        raise BundleError(f"OpenVINO cannot {what} {name}: {reason(error)}") from error


def read(core: Any, path: Path) -> Any:
    """Read the IR `path` as an openvino.Model. Raises BundleError."""
    with opening(path):
        return core.read_model(str(path))


def precision_hint(model: Path | Any) -> str:
    """Return the data type for computing the operations, from the metadata of a model or IR: f32 (default) or f16."""
    return fact(model, PRECISION_HINT) or "f32"


def fact(model: Path | Any, key: str) -> str:
    """Return a value of our metadata in a model or IR; empty if there is none."""
    if isinstance(model, Path):
        found = re.search(rf'<{key} value="([\w,]*)"'.encode(), model.read_bytes())
        return found[1].decode() if found else ""
    where = [RT_INFO, key]
    return str(model.get_rt_info(where).astype(str)) if model.has_rt_info(where) else ""


def check_device(device: str, available: list[str]) -> None:
    """Raise UsageError with all available devices if `device` is not among them.

    device: OpenVINO's device name, such as GPU, GPU.1, AUTO or HETERO:GPU,CPU.
    """
    name, _, behind = device.partition(":")
    wanted = behind.split(",") if behind else [] if name in VIRTUAL else [device]
    if name not in VIRTUAL and behind:
        raise UsageError(f"device {device!r}: only {', '.join(VIRTUAL)} can be followed by ':' and other devices")
    for one in wanted:
        bare = re.sub(r"\(.*\)", "", one).removeprefix("-")
        if not any(bare in (there, there.split(".")[0]) for there in available):
            raise UsageError(
                f"device {bare!r} not found; OpenVINO finds: {', '.join(available)}",
                f"check that the driver of {bare} is installed",
            )


def reason(error: Exception) -> str:
    """Return the line of OpenVINO's error message that states the cause, after the name of the node if there is one.

    The other lines of the message are places in OpenVINO's sources, and types and shapes of the node's inputs.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for validating, name in (("node ", r"with friendly_name '(.+)':$"), ("ONNX node ", r"<Node\(\w+\): (.+)>")):
        for place, cause in itertools.pairwise(lines):
            if place.startswith(f"While validating {validating}"):
                named = re.search(name, place)
                return f"{named[1]}: {cause}" if named else cause
    places = r"Exception from |Check '.*' failed at |FrontEnd API failed with |Model wasn't fully converted"
    telling = [line for line in lines if not re.match(places, line)]
    return telling[0] if telling else str(error).strip()


def _spec(port: Any) -> TensorSpec:
    shape = tuple(None if dim.is_dynamic else dim.get_length() for dim in port.partial_shape)
    return TensorSpec(port.any_name, np.dtype(port.element_type.to_dtype()).name, shape)


INFO = RuntimeInfo(
    name="openvino",
    aliases=("ov",),
    label="OpenVINO",
    precisions=("fp32", "fp16", "int8"),
    needs=(Requirement("openvino", "openvino", "2026.4"),),
    extra="run-openvino",
    open=OpenVinoRuntime,
    scan_case="scan.xml",
    kernels=NativeKernels("openvino", extension, isa),
    profiler=Profiler("OpenVINO's performance counters", records=False),
    streams=True,
    settings=OpenVinoSettings,
)
