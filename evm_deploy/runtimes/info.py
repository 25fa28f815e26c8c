"""The run half of a target: all that apps, boards and the doctor need to know of a runtime without importing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from evm_deploy._util.packages import version
from evm_deploy.runtimes.base import RunOptions, Runtime


@dataclass(frozen=True)
class Requirement:
    """A package that a runtime needs. module: what is imported; others: modules that do as well. least: the oldest
    version that is known to do, empty for any.
    """

    module: str
    package: str
    least: str = ""
    others: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module, *self.others)

    def __str__(self) -> str:
        return f"{self.package}>={self.least}" if self.least else self.package

    def installed(self) -> str | None:
        """The version on this machine; None where it is not there."""
        return next((version(module) for module in self.modules if find_spec(module)), None)

    def met_by(self, found: str | None) -> bool:
        """Whether an installed version is new enough; one that does not say which it is (empty) is believed."""
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
    """Whether this machine runs a target, on which versions of what it needs, and what to do if not."""

    can_run: bool
    versions: Mapping[str, str]
    hint: str = ""


@dataclass(frozen=True)
class NativeKernels:
    """Our kernels for the scans of a target, in a library that its runtime loads.

    name: of the runtime, for `plugin_path`. installed(): the library for this machine; it raises ToolchainError, which
    says why, where there is none. isa(library): the instruction set that it chose.
    """

    name: str
    installed: Callable[[], Path]
    isa: Callable[[Path], str]


@dataclass(frozen=True)
class Profiler:
    """A runtime's counter of the time of nodes, where RunOptions.profile is set. name: as a record states it.

    records: whether it writes an event for each node, of which the fastest inference is taken, and which takes time
    itself; else it counts, which gives means.
    """

    name: str
    records: bool


def nothing() -> str:
    """Nothing is in the way."""
    return ""


@dataclass(frozen=True)
class RuntimeInfo:
    """The run half of a target. label: its name as people write it. precisions: those that artifacts come
    in, the default first. needs: packages, beside numpy and safetensors; extra: of evm-deploy, which brings them.

    `open(path, options)` loads an artifact. obstacle(): why it cannot run on this machine although the packages are
    here, else an empty text. streams: whether several threads may run inferences at the same time. scan_case: file of
    one scan by itself in the self-test, with {K}, {L}, {D} and {N} where a file is for one shape alone. phone: the
    program that measures it on Android (bench/remote/adb_host.py). settings: its own, a dataclass of `_util.settings`
    whose instance comes as RunOptions.settings; refusals: text and hint of the error for others' settings, by name.
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
        return f"pip install 'evm-deploy[{self.extra}]'"

    def availability(self) -> Availability:
        """Whether it runs here, without importing it."""
        found = {need: need.installed() for need in self.needs}
        lacks = any(not need.met_by(version) for need, version in found.items())
        hint = self.install_hint if lacks else self.obstacle()
        return Availability(not hint, {need.package: each for need, each in found.items() if each is not None}, hint)
