"""`RuntimeInfo`: description of a target's runtime, for apps, remote boards and evm-doctor, without importing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from evm_deploy._util.packages import install_hint, version
from evm_deploy.runtimes.base import RunOptions, Runtime


@dataclass(frozen=True)
class Requirement:
    """Package that a runtime needs.

    module: module to import. package: name for pip. least: oldest version that is known to work; empty for any version.
    others: alternative modules.
    """

    module: str
    package: str
    least: str = ""
    others: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that satisfy the requirement, the preferred one first."""
        return (self.module, *self.others)

    def __str__(self) -> str:
        return f"{self.package}>={self.least}" if self.least else self.package

    def installed(self) -> str | None:
        """Return the installed version, or None if the package is not installed."""
        return next((version(module) for module in self.modules if find_spec(module)), None)

    def met_by(self, found: str | None) -> bool:
        """Test whether the installed version `found` is new enough. None fails; a version without numbers passes."""
        return found is not None and (not self.least or _numbers(found) >= _numbers(self.least) or not _numbers(found))


def _numbers(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


@dataclass(frozen=True)
class Availability:
    """Result of the check whether this machine can run a target.

    versions: package -> installed version. hint: the reason or the next step if `can_run` is false.
    """

    can_run: bool
    versions: Mapping[str, str]
    hint: str = ""


@dataclass(frozen=True)
class NativeKernels:
    """Native scan kernels of evm-deploy, in a library that a runtime loads.

    name: name of the runtime for `plugin_path`. installed(): return the library for this machine; raises ToolchainError
    with the reason if there is none. isa(library): return the instruction set that the library uses on this CPU.
    """

    name: str
    installed: Callable[[], Path]
    isa: Callable[[Path], str]


@dataclass(frozen=True)
class Profiler:
    """Profiler of a runtime, active if RunOptions.profile is set. name: text for records.

    records: true if the profiler writes an event per node. The fastest inference is then reported, and writing events
    adds time. If false, the profiler accumulates times, and means are reported.
    """

    name: str
    records: bool


def nothing() -> str:
    """Return an empty text: the default `obstacle` of a runtime that every machine can run."""
    return ""


@dataclass(frozen=True)
class RuntimeInfo:
    """Description of a target's runtime. The class `Target` in `export` describes how to build for the target.

    label: name of the target for people. precisions: supported precisions, the default first. needs: required packages
    besides numpy and safetensors. extra: the extra of evm-deploy that installs these packages.
    open(path, options): load an artifact.
    scan_case: file in the self-test that runs a single scan; contains {K}, {L}, {D} and {N} if each shape has its file.
    obstacle(): return the reason why this machine cannot run the target although all packages are installed, else "".
    streams: true if several threads may run inferences at the same time. phone: program that measures the target on
    Android (bench/remote/adb_host.py).
    settings: dataclass of settings (`_util.settings`) of this runtime; RunOptions.settings holds an instance.
    refusals: setting name -> message and hint of the error if a setting of another runtime is given.
    """

    name: str
    aliases: tuple[str, ...]
    label: str
    precisions: tuple[str, ...]
    needs: tuple[Requirement, ...]
    extra: str
    open: Callable[[Path, RunOptions], Runtime]
    scan_case: str
    obstacle: Callable[[], str] = nothing
    kernels: NativeKernels | None = None
    profiler: Profiler | None = None
    streams: bool = False
    phone: str | None = None
    settings: type | None = None
    refusals: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def install_hint(self) -> str:
        """Command that installs the required packages."""
        return install_hint(self.extra)

    def availability(self) -> Availability:
        """Check whether this machine can run the target, without importing its packages."""
        found = {need: need.installed() for need in self.needs}
        lacks = any(not need.met_by(version) for need, version in found.items())
        hint = self.install_hint if lacks else self.obstacle()
        return Availability(not hint, {need.package: each for need, each in found.items() if each is not None}, hint)
