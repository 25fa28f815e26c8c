"""ONNX Runtime, with the execution provider of the CPU unless others are asked for."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import native_path
from evm_deploy.errors import BundleError, EvmError, ToolchainError
from evm_deploy.runtimes.base import Feeds, NodeTime, RunOptions, Runtime, TensorSpec
from evm_deploy.runtimes.info import NativeKernels, Profiler, Requirement, RuntimeInfo
from evm_deploy.runtimes.providers import CPU, OnnxRuntimeSettings, open_session
from evm_deploy.toolchain.plugins import installed_plugin, kernel_isa

LOOPS = ("Scan", "Loop", "If")  # node types for whose bodies the profiler records events too
SUFFIX = "_kernel_time"


class OnnxRuntime:
    """InferenceSession for a model file or a serialised model.

    threads: intra-op threads; None for the default of ONNX Runtime. plugin: custom-op library of evm-deploy; None for
    portable scans. profile: enable `node_times`. exact_integers: compute QuantizeLinear and DequantizeLinear in
    float32, one by one, for runtimes whose integer sums are exact; fused kernels of ONNX Runtime saturate on x86 CPUs
    without VNNI (`calib.saturation`). settings: the execution providers; None for the CPU's.
    nodes: number of nodes by execution provider; empty unless `settings` names some. runs_on: their processors.
    emulates: the reason why the latency has no meaning here, else empty.
    Raises BundleError if the model cannot be opened, ToolchainError if onnxruntime is not installed or the library
    cannot be loaded, and the errors of `providers.open_session`.
    """

    def __init__(
        self,
        model: Path | bytes,
        threads: int | None = None,
        plugin: Path | None = None,
        profile: bool = False,
        exact_integers: bool = False,
        settings: OnnxRuntimeSettings | None = None,
    ) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise ToolchainError("onnxruntime is not installed", INFO.install_hint) from error
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if exact_integers:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if threads:
            options.intra_op_num_threads = threads
        if plugin:
            try:
                options.register_custom_ops_library(str(plugin))
            except Exception as error:
                raise ToolchainError(f"ONNX Runtime {ort.__version__} refuses {plugin}: {_reason(error)}") from error
        self.profile = Path(tempfile.mkdtemp(prefix="evm-profile-")) if profile else None
        if self.profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile / "profile")
        source = native_path(model) if isinstance(model, Path) else model
        self.nodes: Mapping[str, int] = {}
        self.runs_on = self.emulates = ""
        try:
            if settings and settings.providers is not None:
                opened = open_session(ort, source, options, settings, threads)
                self.session, self.nodes = opened.session, opened.nodes
                self.runs_on, self.emulates = opened.runs_on, opened.emulates
            else:
                self.session = ort.InferenceSession(source, options, providers=[CPU])
        except EvmError:
            self._forget()
            raise
        except Exception as error:
            self._forget()
            raise BundleError(f"ONNX Runtime {ort.__version__} cannot open the model: {_reason(error)}") from error
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in map(_spec, self.session.get_inputs())}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in map(_spec, self.session.get_outputs())}

    @property
    def fuses(self) -> bool:
        """Whether providers other than the CPU's run nodes: they make one node of many, whose parts have no times."""
        return any(name != CPU for name in self.nodes)

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Raises BundleError if ONNX Runtime fails."""
        try:
            outputs = self.session.run(None, dict(feeds))
        except Exception as error:
            raise BundleError(f"ONNX Runtime cannot run the model: {_reason(error)}") from error
        return dict(zip(self.outputs, outputs, strict=True))

    def node_times(self) -> list[NodeTime]:
        """Return the node times of the fastest inference so far: other load has disturbed it least. Ends profiling."""
        return min(_runs(Path(self.session.end_profiling())), key=lambda nodes: sum(node.ms for node in nodes))

    def __enter__(self) -> OnnxRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.session
        self._forget()

    def _forget(self) -> None:
        if self.profile:
            shutil.rmtree(self.profile, ignore_errors=True)


def _runs(profile: Path) -> Iterator[list[NodeTime]]:
    """Yield the node times of each inference in a profile. Each event is one line, after all events inside it."""
    nodes: list[tuple[int, NodeTime]] = []  # (start in microseconds, node)
    with profile.open(encoding="utf-8") as lines:
        for line in lines:
            event = json.loads(line.strip("[],\n ") or "{}")
            if event.get("name") == "model_run":
                yield [node for _, node in nodes]
                nodes = []
            elif event.get("cat") == "Node" and event["name"].endswith(SUFFIX):
                op, inside = event["args"]["op_name"], 0
                while op in LOOPS and nodes and nodes[-1][0] >= event["ts"]:
                    inside += 1 + nodes.pop()[1].inside
                name = event["name"].removesuffix(SUFFIX)
                nodes.append((event["ts"], NodeTime(name, op, event["dur"] / 1e3, inside)))


def _spec(value: Any) -> TensorSpec:
    """Convert an input or output of a session to a TensorSpec. Raises BundleError unless it is a numeric tensor."""
    shape = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
    try:
        dtype = "float32" if value.type == "tensor(float)" else np.dtype(value.type[len("tensor(") : -1]).name
    except TypeError as error:
        raise BundleError(f"{value.name!r} of the model has type {value.type}, not an array of numbers") from error
    return TensorSpec(value.name, dtype, shape)


def _reason(error: Exception) -> str:
    """Return the first line of an error message of ONNX Runtime, whose exceptions derive directly from Exception."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def open_(path: Path, options: RunOptions) -> Runtime:
    """Open an ONNX file in ONNX Runtime. Raises the errors of `OnnxRuntime`."""
    return OnnxRuntime(path, options.threads, options.plugin, options.profile, settings=options.settings)


INFO = RuntimeInfo(
    name="onnx",
    aliases=("ort", "onnxruntime"),
    label="ONNX",
    precisions=("fp32", "fp16", "int8", "w8"),
    needs=(Requirement("onnxruntime", "onnxruntime", "1.17"),),
    extra="run-onnx",
    open=open_,
    scan_case="scan.onnx",
    kernels=NativeKernels("onnxruntime", installed_plugin, kernel_isa),
    profiler=Profiler("ONNX Runtime's profiler", records=True),
    streams=True,
    phone="onnxruntime_perf_test",
    refusals={
        "cache": ("ONNX Runtime keeps no compiled models", "leave the cache out"),
        "device": ("ONNX Runtime has execution providers in place of devices", "use --provider NAME, or NAME:DEVICE"),
    },
    settings=OnnxRuntimeSettings,
)
