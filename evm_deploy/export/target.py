"""The build half of a target: data plus functions, in one folder of `export/`. The run half: `runtimes/info.py`."""

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
from evm_deploy.calib.int8 import OpenCandidate, Quantized, quantize_graph
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.hub.graph import Graph, ScanSite, trace, trace_key
from evm_deploy.export.plan import SELFTEST_TOLERANCES, ExportPlan
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime
from evm_deploy.runtimes.info import RuntimeInfo
from evm_deploy.toolchain.platforms import host_platform
from evm_deploy.toolchain.plugins import find_plugin

if TYPE_CHECKING:
    from evm_deploy.bundle.manifest import Manifest


@dataclass(frozen=True)
class Environment:
    """Can this machine build for a target, with what versions, and what to do if not."""

    can_build: bool
    versions: Mapping[str, str]
    hint: str = ""


@dataclass(frozen=True)
class Emulator:
    """A runtime that computes a target's artifacts on any machine, where the target's own needs a device.

    `open(path, options)` as `RuntimeInfo.open`. library(): the native library that its scans run on, if there is one.
    """

    open: Callable[[Path, RunOptions], Runtime]
    library: Callable[[], Path | None]


@dataclass(frozen=True)
class Libraries:
    """Native libraries that travel in bundles: `build(platform)` compiles that of one of `platforms`."""

    platforms: tuple[str, ...]
    build: Callable[[str], Path]


@dataclass(frozen=True)
class EngineBuild:
    """The step that only a machine like the device can do: `make(folder, library=None)` does it in a bundle and writes
    it into the manifest. possible(): whether this machine can. summary(manifest): its lines for evm-export.
    """

    make: Callable[..., None]
    possible: Callable[[], bool]
    summary: Callable[[Manifest], list[tuple[str, str]]]


class Traced(Protocol):
    """A network in the form that a target starts from, such as the hub graph: a dataclass that holds a `model`."""

    @property
    def model(self) -> Any: ...

    @property
    def scans(self) -> tuple[ScanSite, ...]: ...


class ScanAccess(Protocol):
    """The artifact's scans, opened for inspection: the seam of per-scan parity."""

    names: tuple[str, ...]

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """One inference; per scan what it read (u, delta, B, C) and wrote (y).

        And its constants A, skip and bias, where the artifact holds them less exactly than the float model.
        """
        ...

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Scan `index` by itself, with the artifact's own A, skip and bias, on u, delta, B, C."""
        ...


@dataclass(frozen=True)
class Artifact:
    """What `build` made: the native file, and the facts that the manifest records.

    scan: how its scans run: plugin, portable, plugin+portable, or aot. plugins: platform -> native library, relative
    to the bundle. function: of a file that has several, the one described here; more: by size, the others.
    """

    path: Path
    scan: Decision
    details: Mapping[str, Any]
    plugins: Mapping[str, str] = field(default_factory=dict)
    function: str | None = None
    more: Mapping[tuple[int, int], Artifact] = field(default_factory=dict)


def quantize_hub(
    graph: Graph, config: QuantizationConfig, preprocessing: Preprocessing, open_candidate: OpenCandidate, step: Step
) -> Quantized:
    """The int8 or w8 form of a hub graph, calibrated in ONNX Runtime. Raises CalibrationError."""
    plugin = find_plugin("onnxruntime")
    return quantize_graph(
        graph.model, config, preprocessing, fused=graph.fusable, open_candidate=open_candidate, plugin=plugin, step=step
    )


def nothing_more(plan: ExportPlan) -> None:
    """Refuses no plan."""


def no_remarks(runtime: Runtime) -> list[str]:
    """Nothing to say."""
    return []


@dataclass(frozen=True)
class Target:
    """How artifacts of one deployment target are built. runtime: what runs them, with the target's name, aliases and
    precisions. scans: lowerings of the scan. packages: what a build imports; install_hint: how to get them.
    min_targets: oldest systems that can be asked for; `check(plan)` refuses what else the target does not have.

    `trace(module, plan, metadata)` makes what `build` starts from; plans with the same `trace_key(plan)` share it, so
    `build` must not change it. `quantize` makes its int8 or w8 form, by default of the hub graph.
    `scan_access(artifact, plugin)` runs scans on the native library `plugin`, or portably for None.
    `write_scan_case(traced, artifact, path, shape)` writes one scan by itself, the file `runtime.scan_case`.
    `usage(manifest)`, for the bundle's README: how to run the artifact without us. selftest_tolerances: by precision,
    against the artifact's own outputs. several_sizes: whether one artifact can take them. `remarks(runtime)`, after
    verification: what a user should know of the numbers that were met. libraries, emulator, engine: what some targets
    have. settings: the target's own, a dataclass of `_util.settings` for ExportPlan.settings.
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
    min_targets: tuple[str, ...] = ()
    check: Callable[[ExportPlan], None] = nothing_more
    selftest_tolerances: Mapping[str, float] = field(default_factory=lambda: SELFTEST_TOLERANCES)
    several_sizes: bool = False
    remarks: Callable[[Runtime], list[str]] = no_remarks
    libraries: Libraries | None = None
    emulator: Emulator | None = None
    engine: EngineBuild | None = None
    settings: type | None = None

    @property
    def name(self) -> str:
        return self.runtime.name

    @property
    def precisions(self) -> tuple[str, ...]:
        return self.runtime.precisions

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platforms whose native library can travel in a bundle."""
        return self.libraries.platforms if self.libraries else ()

    def environment(self) -> Environment:
        """Which of the packages are here, without importing them."""
        versions = package_versions(self.packages)
        missing = [name for name in self.packages if name not in versions]
        running = self.runtime.availability().versions
        return Environment(not missing, {**versions, **running}, self.install_hint if missing else "")


def native_library(target: Target, artifact: Artifact) -> Path | None:
    """What the artifact's scans run on here: the library that is shipped, where it is for this platform, else the
    installed one; None where there is none, or no use for it.
    """
    if not {"plugin", "aot"} & set(artifact.scan.value.split("+")):
        return None
    if target.emulator:
        return target.emulator.library()
    own = artifact.plugins.get(host_platform())
    if own:
        return artifact.path.parent / own
    try:
        return target.runtime.kernels.installed() if target.runtime.kernels else None
    except ToolchainError:
        return None


def open_here(target: Target, path: Path, options: RunOptions) -> Runtime:
    """The runtime in which an export is judged and verified: on this machine, whatever the device."""
    return (target.emulator or target.runtime).open(path, options)


def check_plan(target: Target, plan: ExportPlan) -> ExportPlan:
    """The plan, with the target's default precision and settings if it names none. Refuses what the target lacks."""
    plan = replace(plan, precision=plan.precision or target.precisions[0])
    for what, value, choices in (
        ("precision", plan.precision, target.precisions),
        ("scan lowering", plan.scan, target.scans),
        ("minimum system", plan.min_target, (None, *target.min_targets)),
    ):
        if value not in choices:
            has = ", ".join(choice for choice in choices if choice) or "none"
            raise UsageError(f"target '{target.name}' has no {what} '{value}'; it has: {has}")
    if plan.native_library and plan.native_library not in target.platforms:
        has = ", ".join(target.platforms) or "none"
        raise UsageError(
            f"target '{target.name}' has no native library for --platform; it has: {has}",
            "leave it out",
        )
    if plan.more_imgsz and not target.several_sizes:
        raise UsageError(f"an artifact of target '{target.name}' takes one --imgsz", "export once for each size")
    plan = replace(plan, settings=_own_settings(target, plan.settings))
    target.check(plan)
    return plan


def _own_settings(target: Target, settings: Any) -> Any:
    """The plan's settings, the target's default ones for None. Raises UsageError for those of another target."""
    if settings is None:
        return target.settings() if target.settings else None
    if not (target.settings and isinstance(settings, target.settings)):
        own = target.settings.__name__ if target.settings else "none of its own"
        raise UsageError(
            f"target '{target.name}' has no {type(settings).__name__}; its settings: {own}", "leave them out"
        )
    return settings
