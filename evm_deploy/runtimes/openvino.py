"""OpenVINO on the devices that it finds."""

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
from evm_deploy._util.settings import setting
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.runtimes.base import DEFAULTS, Feeds, NodeTime, RunOptions, TensorSpec
from evm_deploy.runtimes.info import NativeKernels, Profiler, Requirement, RuntimeInfo
from evm_deploy.toolchain.openvino_extension import RUN_HINT, check_release, extension, isa

VIRTUAL = ("AUTO", "HETERO", "MULTI", "BATCH")  # devices that stand for others: HETERO:GPU,CPU
RT_INFO = "evm_deploy"  # section of an IR's metadata
PRECISION_HINT = "inference_precision"  # key there: what its operations are computed in


@dataclass(frozen=True)
class OpenVinoSettings:
    """device: as OpenVINO names it, None for the CPU. cache: folder for compiled models, which load sooner again."""

    device: str | None = setting(
        None, "--openvino-device", metavar="D", help="CPU (default), GPU, NPU, AUTO, HETERO:GPU,CPU", what="devices"
    )
    cache: str | Path | None = setting(
        None, "--cache", metavar="DIR", help="OpenVINO: keep compiled models in this folder", what="cache", here=True
    )


class OpenVinoRuntime:
    """A compiled model, of an IR or of a model in memory.

    A model without a hint in its metadata is computed in float32: OpenVINO's default on many CPUs is bfloat16.
    The cache keeps compiled models, apart for each extension: one that changed finds nothing of the old one. A file
    whose compiled form is there is not read at all, which halves the time. They are apart for each bundle, too:
    OpenVINO tells models apart by place and time, which two versions of a container's layer may share.
    Raises UsageError for a device that is not there, ToolchainError for an extension that does not fit, BundleError for
    a model that cannot be opened.
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
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in map(_spec, self.compiled.outputs)}
        self._thread = threading.local()

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        if not hasattr(self._thread, "request"):  # a request serves one thread at a time
            self._thread.request = self.compiled.create_infer_request()
        try:
            results = self._thread.request.infer(dict(feeds), share_inputs=True)
        except RuntimeError as error:
            raise UsageError(f"OpenVINO cannot run the model: {reason(error)}") from error
        return {name: results[i] for i, name in enumerate(self.outputs)}

    def node_times(self) -> list[NodeTime]:
        """Means over the inferences so far, of this thread."""
        return [
            NodeTime(info.node_name, info.node_type, info.real_time.total_seconds() * 1e3)
            for info in self._thread.request.profiling_info
            if info.status == info.Status.EXECUTED
        ]

    @property
    def precision(self) -> str:
        """Type that the operations are computed in, as OpenVINO calls it: f32, bf16 or f16."""
        return str(self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def __enter__(self) -> OpenVinoRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._thread, self.compiled, self.core


@contextlib.contextmanager
def sealed(cache: Path | None) -> Iterator[None]:
    """Inside the `with` a cache of compiled models holds what is as it was written; what is new there is written down.

    OpenVINO 2026.4.1 takes changed weights for good. Raises UsageError where the cache cannot be written.
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
            with contextlib.suppress(FileNotFoundError):  # another process has taken it for damaged
                write_checksum(blob)
    except OSError as error:
        raise UsageError(f"the cache {cache} cannot be used: {error.strerror}", "give another folder") from error


def open_core(plugin: Path | None) -> Any:
    """An openvino.Core, with the extension `plugin` if it is given. It must outlive the models that it reads.

    Raises ToolchainError where OpenVINO is missing or the extension does not fit it.
    """
    try:
        import openvino
    except ImportError as error:
        raise ToolchainError("openvino is not installed", RUN_HINT) from error
    core = openvino.Core()
    if plugin:
        check_release(plugin)
        try:
            core.add_extension(str(plugin))
        except RuntimeError as error:
            raise ToolchainError(f"OpenVINO refuses {plugin}: {reason(error)}") from error
    return core


@contextlib.contextmanager
def opening(model: Path | Any, what: str = "read") -> Iterator[None]:
    """Errors of OpenVINO as BundleError, with what to do where a model lacks the extension."""
    name = model if isinstance(model, Path) else "the model"
    try:
        yield
    except (OSError, RuntimeError) as error:
        if "opset: evm" in str(error):
            raise BundleError(
                f"{name} holds operators of domain evm, which need the extension",
                "give its path as plugin, or export with --scan portable",
            ) from error
        raise BundleError(f"OpenVINO cannot {what} {name}: {reason(error)}") from error


def read(core: Any, path: Path) -> Any:
    """The openvino.Model in the IR `path`. Raises BundleError."""
    with opening(path):
        return core.read_model(str(path))


def precision_hint(model: Path | Any) -> str:
    """What the operations of a model of ours, or of its IR, are to be computed in: f32 or f16."""
    if isinstance(model, Path):
        found = re.search(rf'<{PRECISION_HINT} value="(\w+)"'.encode(), model.read_bytes())
        return found[1].decode() if found else "f32"
    where = [RT_INFO, PRECISION_HINT]
    return str(model.get_rt_info(where).astype(str)) if model.has_rt_info(where) else "f32"


def check_device(device: str, available: list[str]) -> None:
    """Raise UsageError, listing those that are there, for a device that is not: GPU, GPU.1, AUTO, HETERO:GPU,CPU."""
    name, _, behind = device.partition(":")
    wanted = behind.split(",") if behind else [] if name in VIRTUAL else [device]
    if name not in VIRTUAL and behind:
        raise UsageError(f"device {device!r}: only {', '.join(VIRTUAL)} stand for other devices")
    for one in wanted:
        bare = re.sub(r"\(.*\)", "", one).removeprefix("-")
        if not any(bare in (there, there.split(".")[0]) for there in available):
            raise UsageError(
                f"device {bare!r} is not here; OpenVINO finds: {', '.join(available)}", "its driver may be missing"
            )


def reason(error: Exception) -> str:
    """The line of OpenVINO's message that tells the cause, and the node where OpenVINO names one.

    The lines around it are places in OpenVINO's sources and the types and shapes of all inputs of the node.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for place, cause in itertools.pairwise(lines):
        if place.startswith("While validating node "):
            named = re.search(r"with friendly_name '(.+)':$", place)
            return f"{named[1]}: {cause}" if named else cause
    telling = [line for line in lines if not re.match(r"Exception from |Check '.*' failed at ", line)]
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
