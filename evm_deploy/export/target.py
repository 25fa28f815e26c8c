"""A target is data plus functions: one file in `export/`, one in `runtimes/`, one line in `targets.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.plan import Choice, ExportPlan
from evm_deploy.platforms import host_platform
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime

if TYPE_CHECKING:
    from evm_deploy.export.graph import Graph
    from evm_deploy.export.manifest import Manifest


@dataclass(frozen=True)
class Probe:
    """Can this machine build for a target and run it, with what versions, and what to install if not."""

    can_build: bool
    can_run: bool
    versions: Mapping[str, str]
    hint: str = ""


class ScanTaps(Protocol):
    """The artifact's scans, opened for inspection: the seam of per-scan parity."""

    names: tuple[str, ...]

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """One inference; per scan what it read (u, delta, B, C) and wrote (y)."""
        ...

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Scan `index` by itself, with the artifact's own A, skip and bias, on u, delta, B, C."""
        ...


@dataclass(frozen=True)
class Artifact:
    """What `build` made: the native file, and the facts that the manifest records.

    scan: how its scans can run, plugin, portable, or plugin+portable. plugins: platform -> native library, relative to
    the bundle.
    """

    path: Path
    scan: Choice
    details: Mapping[str, Any]
    plugins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What a bundle's README says of its target. artifact, library: what these files are. sections: Markdown."""

    artifact: str
    library: str
    sections: str


@dataclass(frozen=True)
class Target:
    """One deployment target. scans: the lowerings of the scan that it can be asked for. devices: platforms whose native
    library `build_plugin(platform)` makes. scan_probe: file name of the one scan that `write_scan_probe` writes.

    `open(path, options)` and `taps(artifact, plugin)` run scans on the native library `plugin`, or portably for None.
    `plugin()` is the library for this machine; it raises ToolchainError, which says why, where there is none.
    `isa(plugin)` is the instruction set that a library chose. `usage(manifest)`, for the bundle's README: how to run
    the artifact without us.
    """

    name: str
    aliases: tuple[str, ...]
    precisions: tuple[str, ...]
    scans: tuple[str, ...]
    devices: tuple[str, ...]
    probe: Callable[[], Probe]
    build: Callable[[Graph, ExportPlan, Path], Artifact]
    taps: Callable[[Artifact, Path | None], ScanTaps]
    open: Callable[[Path, RunOptions], Runtime]
    plugin: Callable[[], Path]
    isa: Callable[[Path], str]
    build_plugin: Callable[[str], Path]
    scan_probe: str
    write_scan_probe: Callable[[Graph, Artifact, Path], None]
    usage: Callable[[Manifest], Usage]


def native_library(target: Target, artifact: Artifact) -> Path | None:
    """What the artifact's scans run on here: the library that is shipped, where it is for this platform, else the
    installed one; None where there is none, or no use for it.
    """
    if "plugin" not in artifact.scan.value.split("+"):
        return None
    own = artifact.plugins.get(host_platform())
    if own:
        return artifact.path.parent / own
    try:
        return target.plugin()
    except ToolchainError:
        return None


def check_plan(target: Target, plan: ExportPlan) -> None:
    """Refuse combinations that the target does not have."""
    for what, value, choices in (
        ("precision", plan.precision, target.precisions),
        ("scan lowering", plan.scan, target.scans),
    ):
        if value not in choices:
            raise UsageError(f"target '{target.name}' has no {what} '{value}'; it has: {', '.join(choices)}")
    if plan.device and plan.device not in target.devices:
        raise UsageError(
            f"target '{target.name}' has no native library for --device; it has: {', '.join(target.devices) or 'none'}",
            "leave it out",
        )
