"""A target is data plus functions: one file in `export/`, one in `runtimes/`, one line in `targets.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import UsageError
from evm_deploy.export.plan import Choice, ExportPlan
from evm_deploy.runtimes.base import Feeds, Runtime

if TYPE_CHECKING:
    from evm_deploy.export.graph import Graph


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

    plugins: platform -> native library, relative to the bundle.
    """

    path: Path
    scan: Choice
    details: Mapping[str, Any]
    plugins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """One deployment target. `scans`: the lowerings of the scan that it can be asked for.

    `open(path, threads, plugin)` and `taps(artifact, plugin)` run scans on the native library `plugin`, or portably for
    None; `plugin()` is the library that is installed here, if any, `build_plugin(platform)` one for another platform.
    """

    name: str
    aliases: tuple[str, ...]
    precisions: tuple[str, ...]
    scans: tuple[str, ...]
    probe: Callable[[], Probe]
    build: Callable[[Graph, ExportPlan, Path], Artifact]
    taps: Callable[[Artifact, Path | None], ScanTaps]
    open: Callable[[Path, int | None, Path | None], Runtime]
    plugin: Callable[[], Path | None]
    build_plugin: Callable[[str], Path]
    write_scan_probe: Callable[[Graph, ExportPlan, Path], str]


def check_plan(target: Target, plan: ExportPlan) -> None:
    """Refuse combinations that the target does not have."""
    for what, value, choices in (
        ("precision", plan.precision, target.precisions),
        ("scan lowering", plan.scan, target.scans),
    ):
        if value not in choices:
            raise UsageError(f"target '{target.name}' has no {what} '{value}'; it has: {', '.join(choices)}")
