"""A target is data plus functions: one file in `export/`, one in `runtimes/`, one line in `targets.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.progress import Step
from evm_deploy.bundle.manifest import Choice
from evm_deploy.bundle.readme import Usage
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.calib.int8 import Quantized, Ship, quantize_graph
from evm_deploy.calib.request import Request
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.hub.graph import Graph, ScanSite, trace, trace_key
from evm_deploy.export.plan import SELFTEST_TOLERANCES, ExportPlan
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime
from evm_deploy.toolchain.platforms import host_platform
from evm_deploy.toolchain.plugins import find_plugin

if TYPE_CHECKING:
    from evm_deploy.bundle.manifest import Manifest


@dataclass(frozen=True)
class Probe:
    """Can this machine build for a target and run it, with what versions, and what to do if not. can_finish: also what
    `Target.finish` makes.
    """

    can_build: bool
    can_run: bool
    versions: Mapping[str, str]
    hint: str = ""
    can_finish: bool = True


class Traced(Protocol):
    """A network in the form that a target starts from, such as the hub graph: a dataclass that holds a `model`."""

    @property
    def model(self) -> Any: ...

    @property
    def scans(self) -> tuple[ScanSite, ...]: ...


class ScanTaps(Protocol):
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
    scan: Choice
    details: Mapping[str, Any]
    plugins: Mapping[str, str] = field(default_factory=dict)
    function: str | None = None
    more: Mapping[tuple[int, int], Artifact] = field(default_factory=dict)


def quantize_hub(graph: Graph, request: Request, preprocessing: Preprocessing, ship: Ship, step: Step) -> Quantized:
    """The int8 or w8 form of a hub graph, calibrated in ONNX Runtime. Raises CalibrationError."""
    plugin = find_plugin("onnxruntime")
    return quantize_graph(graph.model, request, preprocessing, fused=graph.fusable, ship=ship, plugin=plugin, step=step)


def nothing_more(plan: ExportPlan) -> None:
    """Refuses no plan."""


def no_remarks(runtime: Runtime) -> list[str]:
    """Nothing to say."""
    return []


@dataclass(frozen=True)
class Target:
    """One deployment target. precisions (the first is the default), scans (lowerings of the scan), min_targets (oldest
    systems): what it can be asked for; `check(plan)` refuses what else it does not have. devices: platforms whose
    native library `build_plugin(platform)` makes.

    `open(path, options)` and `taps(artifact, plugin)` run scans on the native library `plugin`, or portably for None.
    `plugin()` is the library for this machine; it raises ToolchainError, which says why, where there is none.
    `isa(plugin)` is the instruction set that a library chose. `write_scan_probe(traced, artifact, path, shape)` writes
    one scan by itself; scan_probe: its file name, with {K}, {L}, {D} and {N} where a file is for one shape alone.
    `usage(manifest)`, for the bundle's README: how to run the artifact without us.

    `trace(module, plan, metadata)` makes what `build` starts from; plans with the same `trace_key(plan)` share it, so
    `build` must not change it. `quantize` makes its int8 or w8 form, by default of
    the hub graph. `emulator(path, options)` computes artifacts on any machine, where `open` needs a device.
    selftest_tolerances: by precision, against the artifact's own outputs. several_sizes: whether one artifact can take
    them. `remarks(runtime)`, after verification: what a user should know of the numbers that were met.
    `finish(folder, library=None)` makes, in a bundle, what only a machine like the device can make, and says so in its
    manifest. Whether `open` has use for fields of RunOptions: cuda_graphs, for cuda_graph; streams; profiles, for
    profile.
    """

    name: str
    aliases: tuple[str, ...]
    precisions: tuple[str, ...]
    scans: tuple[str, ...]
    devices: tuple[str, ...]
    probe: Callable[[], Probe]
    build: Callable[[Any, ExportPlan, Path], Artifact]
    taps: Callable[[Artifact, Path | None], ScanTaps]
    open: Callable[[Path, RunOptions], Runtime]
    plugin: Callable[[], Path]
    isa: Callable[[Path], str]
    build_plugin: Callable[[str], Path]
    scan_probe: str
    write_scan_probe: Callable[[Any, Artifact, Path, ScanShape], None]
    usage: Callable[[Manifest], Usage]
    trace: Callable[[Any, ExportPlan, dict[str, str]], Any] = trace
    trace_key: Callable[[ExportPlan], tuple[Any, ...]] = trace_key
    quantize: Callable[[Any, Request, Preprocessing, Ship, Step], Quantized] = quantize_hub
    emulator: Callable[[Path, RunOptions], Runtime] | None = None
    min_targets: tuple[str, ...] = ()
    check: Callable[[ExportPlan], None] = nothing_more
    selftest_tolerances: Mapping[str, float] = field(default_factory=lambda: SELFTEST_TOLERANCES)
    several_sizes: bool = False
    remarks: Callable[[Runtime], list[str]] = no_remarks
    finish: Callable[..., None] | None = None
    cuda_graphs: bool = False
    streams: bool = False
    profiles: bool = False


def native_library(target: Target, artifact: Artifact) -> Path | None:
    """What the artifact's scans run on here: the library that is shipped, where it is for this platform, else the
    installed one; None where there is none, or no use for it.
    """
    if not {"plugin", "aot"} & set(artifact.scan.value.split("+")):
        return None
    if target.emulator:  # ONNX Runtime, of those that have kernels
        return find_plugin("onnxruntime")
    own = artifact.plugins.get(host_platform())
    if own:
        return artifact.path.parent / own
    try:
        return target.plugin()
    except ToolchainError:
        return None


def open_here(target: Target, path: Path, options: RunOptions) -> Runtime:
    """The runtime in which an export is judged and verified: on this machine, whatever the device."""
    return (target.emulator or target.open)(path, options)


def check_plan(target: Target, plan: ExportPlan) -> ExportPlan:
    """The plan, in the target's default precision if it names none. Refuses combinations that the target lacks."""
    plan = replace(plan, precision=plan.precision or target.precisions[0])
    for what, value, choices in (
        ("precision", plan.precision, target.precisions),
        ("scan lowering", plan.scan, target.scans),
        ("minimum system", plan.min_target, (None, *target.min_targets)),
    ):
        if value not in choices:
            has = ", ".join(choice for choice in choices if choice) or "none"
            raise UsageError(f"target '{target.name}' has no {what} '{value}'; it has: {has}")
    if plan.device and plan.device not in target.devices:
        raise UsageError(
            f"target '{target.name}' has no native library for --device; it has: {', '.join(target.devices) or 'none'}",
            "leave it out",
        )
    if plan.more_imgsz and not target.several_sizes:
        raise UsageError(f"an artifact of target '{target.name}' takes one --imgsz", "export once for each size")
    target.check(plan)
    return plan
