"""Build half of a target: data plus functions, in one folder of `export/`. The run half is in `runtimes/info.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.packages import package_versions
from evm_deploy._util.progress import Step
from evm_deploy.bundle.manifest import Decision
from evm_deploy.bundle.readme import Usage
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.evaluation import OpenCandidate
from evm_deploy.calib.int8 import Quantized, quantize_graph
from evm_deploy.data.boxes import NMS_MODES
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.reading import MODES
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.hub.graph import Graph, ScanSite, trace, trace_key
from evm_deploy.export.layouts import check_layout
from evm_deploy.export.plan import SELFTEST_TOLERANCES, ExportPlan
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime
from evm_deploy.runtimes.info import RuntimeInfo
from evm_deploy.toolchain.platforms import host_platform
from evm_deploy.toolchain.plugins import find_plugin

if TYPE_CHECKING:
    from evm_deploy.bundle.manifest import Manifest


@dataclass(frozen=True)
class Environment:
    """Whether this machine can build for a target.

    versions: of the installed packages, by name. hint: how to install the missing packages.
    """

    can_build: bool
    versions: Mapping[str, str]
    hint: str = ""


@dataclass(frozen=True)
class Emulator:
    """A runtime that computes a target's artifacts on any machine, for targets whose own runtime needs a device.

    `open(path, options)`: as `RuntimeInfo.open`. `library()`: the native library that its scans run on, None if its
    scans are always portable; raises ToolchainError if the library is missing.
    """

    open: Callable[[Path, RunOptions], Runtime]
    library: Callable[[], Path | None]


@dataclass(frozen=True)
class Libraries:
    """Native libraries that bundles can carry. `build(platform)` compiles the library for one of `platforms`."""

    platforms: tuple[str, ...]
    build: Callable[[str], Path]


@dataclass(frozen=True)
class EngineBuild:
    """The build of an engine, which needs a machine like the device.

    `make(folder, library=None, timing_cache=None)`: build the engine in a bundle and record it in the manifest, which
    removes a signature. `possible()`: whether this machine can build engines. `summary(manifest)`: lines about the
    engine that evm-export prints.
    """

    make: Callable[..., None]
    possible: Callable[[], bool]
    summary: Callable[[Manifest], list[tuple[str, str]]]


class Traced(Protocol):
    """A network in the form that a target builds from, such as the hub graph. Every such class is a dataclass."""

    @property
    def model(self) -> Any:
        """Model that quantisation replaces, in the target's own type, such as onnx.ModelProto."""
        ...

    @property
    def scans(self) -> tuple[ScanSite, ...]:
        """Scans of the network in execution order."""
        ...

    @property
    def sha256(self) -> str:
        """SHA-256 of the model, which traces of the same network share, also in other processes."""
        ...


class ScanAccess(Protocol):
    """Access to single scans of an artifact, for the parity check of each scan. names: of the scans, in their order."""

    names: tuple[str, ...]

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """Run one inference. Returns the tensors that each scan read (u, delta, B, C) and wrote (y).

        Includes the constants A, skip and bias if the artifact stores them less exactly than the float model.
        """
        ...

    def with_layer(self, path: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs, and under `path` the output of the convolution of this module."""
        ...

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C, with the artifact's own A, skip and bias. Returns y."""
        ...


@dataclass(frozen=True)
class Artifact:
    """Result of a build: the native file, and facts for the manifest.

    scan: how the scans run: plugin, portable, plugin+portable or aot. plugins: platform -> native library, relative to
    the bundle. function: name of the function described here, if the file has several. more: image size (H, W) -> the
    other functions.
    """

    path: Path
    scan: Decision
    details: Mapping[str, Any]
    plugins: Mapping[str, str] = field(default_factory=dict)
    function: str | None = None
    more: Mapping[tuple[int, int], Artifact] = field(default_factory=dict)


def quantize_hub(
    graph: Graph,
    config: QuantizationConfig,
    preprocessing: Preprocessing,
    open_candidate: OpenCandidate,
    step: Step,
    **layers: bool,
) -> Quantized:
    """Quantise a hub graph to int8 or w8, calibrated in ONNX Runtime. Raises CalibrationError.

    layers: properties of the runtime's int8 layers, `symmetric`, `rounded_outputs` and `saturates` of `quantize_graph`.
    """
    return quantize_graph(
        graph.model,
        config,
        preprocessing,
        fused=graph.fusable,
        open_candidate=open_candidate,
        plugin=find_plugin("onnxruntime"),
        step=step,
        **layers,
    )


def nothing_more(plan: ExportPlan) -> None:
    """Accept every plan: the default of `Target.check`."""


def fuses_nothing(plan: ExportPlan) -> bool:
    """Return False: the default of `Target.fuses`."""
    return False


def no_remarks(runtime: Runtime) -> list[str]:
    """Return no notes: the default of `Target.remarks`."""
    return []


@dataclass(frozen=True)
class Target:
    """A deployment target: how its artifacts are built.

    runtime: the runtime of its artifacts, with the target's name, aliases and precisions.
    scans: lowerings of the scan. packages: modules that a build imports. install_hint: how to install them.
    min_targets: values of --min-target. several_sizes: whether one artifact can take several image sizes.
    weight_bits: values of --weight-bits.
    image_channels: numbers of channels that the input `image` can have.
    selftest_tolerances: by precision, relative to the artifact's own outputs. float16: precisions whose layers compute
    in float16 on the device, so that large values overflow there. scan_tolerance: accepted relative error of a scan's
    SSM part, for devices that compute scans in float16; 0: that of float32.
    nms: where the non-maximum suppression of a detector can run, the default first. regions: whether an artifact can
    crop regions from feature maps (RoIAlign).
    libraries, emulator, engine: parts that only some targets have.
    settings: dataclass of the target's own settings (fields of `_util.settings`), the type of ExportPlan.settings.

    `trace(module, plan, metadata)`: make the traced network that `build` starts from. Plans with the same
    `trace_key(plan)` share the traced network, so `build` must not change it.
    `quantize`: make the int8 or w8 form of the traced network, by default of a hub graph.
    `fuses(plan)`: whether `build` makes one op of each module that the native library has as one.
    `check(plan)`: raise an EvmError for a plan that the target cannot build, beyond the fields above.
    `scan_access(artifact, plugin)`: open the artifact's scans on the native library `plugin`, or portably for None.
    `write_scan_case(traced, artifact, path, shape)`: write a model of one scan, the file `runtime.scan_case`.
    `usage(manifest)`: texts for the bundle's README on running the artifact without evm-deploy.
    `remarks(runtime)`: notes for the manifest on the verification, for users.
    """

    runtime: RuntimeInfo
    scans: tuple[str, ...]
    packages: tuple[str, ...]
    install_hint: str
    build: Callable[[Any, ExportPlan, Path], Artifact]
    scan_access: Callable[[Artifact, Path | None], ScanAccess]
    write_scan_case: Callable[[Any, Artifact, Path, ScanShape], None]
    usage: Callable[[Manifest], Usage]
    trace: Callable[[Any, ExportPlan, dict[str, str]], Any] = trace
    trace_key: Callable[[ExportPlan], tuple[Any, ...]] = trace_key
    quantize: Callable[[Any, QuantizationConfig, Preprocessing, OpenCandidate, Step], Quantized] = quantize_hub
    fuses: Callable[[ExportPlan], bool] = fuses_nothing
    min_targets: tuple[str, ...] = ()
    check: Callable[[ExportPlan], None] = nothing_more
    selftest_tolerances: Mapping[str, float] = field(default_factory=lambda: SELFTEST_TOLERANCES)
    float16: tuple[str, ...] = ("fp16", "int8-fp16")
    scan_tolerance: float = 0.0
    several_sizes: bool = False
    weight_bits: tuple[int, ...] = (8,)
    nms: tuple[str, ...] = NMS_MODES
    regions: bool = False
    image_channels: tuple[int, ...] = tuple(MODES)
    remarks: Callable[[Runtime], list[str]] = no_remarks
    libraries: Libraries | None = None
    emulator: Emulator | None = None
    engine: EngineBuild | None = None
    settings: type | None = None

    @property
    def name(self) -> str:
        """Name of the target, the value of --target."""
        return self.runtime.name

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions of the target, the default first."""
        return self.runtime.precisions

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platforms whose native library a bundle can carry."""
        return self.libraries.platforms if self.libraries else ()

    def environment(self) -> Environment:
        """Find out which packages are installed, without importing them."""
        versions = package_versions(self.packages)
        missing = [name for name in self.packages if name not in versions]
        running = self.runtime.availability().versions
        return Environment(not missing, {**versions, **running}, self.install_hint if missing else "")


def native_library(target: Target, artifact: Artifact) -> Path | None:
    """Return the native library that the artifact's scans run on during verification, or None.

    The library is the emulator's if the target has an emulator. Otherwise it is the one in the bundle if that fits this
    platform, else the installed one. None: there is no library, or all scans are portable.
    """
    if not {"plugin", "aot"} & set(artifact.scan.value.split("+")):
        return None
    own = None if target.emulator else artifact.plugins.get(host_platform())
    if own:
        return artifact.path.parent / own
    try:
        return library_here(target)
    except ToolchainError:
        return None


def library_here(target: Target) -> Path | None:
    """Return the native library that scans of a target run on when an export is verified on this machine.

    None: the target has no native scans. Raises ToolchainError with the reason if the library is missing.
    """
    if target.emulator:
        return target.emulator.library()
    return target.runtime.kernels.installed() if target.runtime.kernels else None


def open_here(target: Target, path: Path, options: RunOptions) -> Runtime:
    """Open an artifact for evaluation and verification on this machine: in the target's emulator, else its runtime."""
    return (target.emulator or target.runtime).open(path, options)


def check_plan(target: Target, plan: ExportPlan) -> ExportPlan:
    """Fill in the target's default precision and settings. Returns the plan.

    Raises UsageError for settings that the target does not support.
    """
    plan = replace(plan, precision=plan.precision or target.precisions[0])
    for what, value, choices in (
        ("precision", plan.precision, target.precisions),
        ("scan lowering", plan.scan, target.scans),
        ("--weight-bits", plan.weight_bits, (None, *target.weight_bits)),
        ("minimum system", plan.min_target, (None, *target.min_targets)),
    ):
        if value not in choices:
            has = ", ".join(str(choice) for choice in choices if choice) or "none"
            raise UsageError(f"target '{target.name}' has no {what} '{value}'; it has: {has}")
    if plan.native_library and plan.native_library not in target.platforms:
        has = ", ".join(target.platforms) or "none"
        raise UsageError(
            f"target '{target.name}' has no native library for --platform; it has: {has}",
            "leave --platform out",
        )
    if plan.more_imgsz and not target.several_sizes:
        raise UsageError(f"an artifact of target '{target.name}' takes one --imgsz", "export once for each size")
    plan = replace(plan, settings=_own_settings(target, plan.settings))
    check_layout(plan)
    target.check(plan)
    return plan


def _own_settings(target: Target, settings: Any) -> Any:
    """Return the plan's settings, the target's defaults for None. Raises UsageError for another target's settings."""
    if settings is None:
        return target.settings() if target.settings else None
    if not (target.settings and isinstance(settings, target.settings)):
        own = target.settings.__name__ if target.settings else "none"
        raise UsageError(
            f"target '{target.name}' has no {type(settings).__name__}; it has: {own}", "leave the settings out"
        )
    return settings
