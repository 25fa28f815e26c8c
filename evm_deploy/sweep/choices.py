"""Plan of a search: the space of its choices, and the units of each choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evm_deploy._util.cores import usable_cores
from evm_deploy._util.text import size_text
from evm_deploy.bench.record import Settings
from evm_deploy.devices.profiles import Profile, find_profile, profile_names
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.device_choice import choose
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import CALIBRATED, ExportPlan, parse_imgsz
from evm_deploy.export.source import Source
from evm_deploy.export.targets import get_target
from evm_deploy.sweep.boards import HERE, Boards
from evm_deploy.sweep.forms import Form
from evm_deploy.sweep.plan import Digests, export_unit
from evm_deploy.sweep.space import Choice
from evm_deploy.sweep.units import ExportUnit, MeasurementUnit
from evm_deploy.toolchain.platforms import host_platform

STEP, SMALLER = 32, 2  # pixels between the default sizes, and the number of those below the saved one


@dataclass(frozen=True)
class TunedDevice:
    """Device that a search is for. board: name or class of the board to measure on, or `here`."""

    board: str
    profile: Profile | None

    @property
    def threads(self) -> tuple[str, ...]:
        """Numbers of threads to try: powers of two up to that of the profile, or the cores here; the most first."""
        most = (self.profile and self.profile.threads) or (usable_cores() if self.board == HERE else 1)
        return tuple(str(2**power) for power in reversed(range(most.bit_length())))


def tuned_device(device: str, boards: Boards, cluster: bool = False) -> TunedDevice:
    """Return the device named by a profile, or by the name or class of a board, or `here`.

    cluster: the boards are those of a cluster, whose engine knows them (`Engine.require`); a class is a profile. Raises
    UsageError if there is none, or if it is another platform than this machine and no board is.
    """
    if device == HERE:
        return TunedDevice(HERE, None)
    if cluster:
        return TunedDevice(device, find_profile(device) if device in profile_names() else None)
    if boards.members:
        name = boards.known(device)[0].options.device
        return TunedDevice(device, find_profile(name) if name else None)
    profile = find_profile(device)
    if profile.platform != host_platform():
        raise UsageError(
            f"device {profile.name!r} has platform {profile.platform}, this machine is {host_platform()}: its latency "
            "cannot be measured here",
            f'list a board with  device = "{profile.name}"  in a file, and add --devices FILE',
        )
    return TunedDevice(HERE, profile)


@dataclass(frozen=True)
class Choices:
    """Units of choices. limit_s: seconds after which an unstable measurement ends. known: digests of the files."""

    checkpoint: Path
    device: TunedDevice
    calib: str | None
    limit_s: float
    known: Digests

    def units(self, choice: Choice) -> tuple[ExportUnit, MeasurementUnit]:
        """Return export and measurement of a choice. Raises UsageError for an impossible plan."""
        profile, target = self.device.profile, choice.target
        more: dict[str, Any] = {name: choice.settings[name] for name in ("calib_method", "smooth") if choice.smooth}
        own: dict[str, Any] = {}
        if profile:
            decided = vars(choose(profile, target, choice.precision, "auto", self.calib is not None))
            more |= {name: value for name, value in decided.items() if name not in ("target", "precision")}
            own = dict(profile.settings.get(target, {}))
        form, size = Form(target, choice.precision), parse_imgsz(choice.imgsz)
        export = export_unit(self.checkpoint, form, size, more, self.calib, None, self.known)
        settings = Settings(threads=int(choice.threads), batch=1, limit_s=self.limit_s).with_own(**own)
        return export, MeasurementUnit(export, self.device.board, settings)


def forms_of(targets: Sequence[str], calibrated: bool) -> tuple[str, ...]:
    """Return the forms of these targets that can be built here, int8 only with images to calibrate with.

    Raises ToolchainError for a target that this machine cannot build.
    """
    forms = []
    for target in map(get_target, targets):
        found = target.environment()
        if not found.can_build:
            raise ToolchainError(f"target '{target.name}' cannot be built here", found.hint)
        wanted = [each for each in target.precisions if calibrated or each not in CALIBRATED]
        forms += [f"{target.name}:{each}" for each in wanted]
    return tuple(forms)


def saved_sizes(checkpoint: Path, target: str) -> tuple[str, ...]:
    """Return the input size saved with the weights, and those that are 32 and 64 pixels smaller, as far as they fit.

    Raises CheckpointError.
    """
    source, plan = Source(checkpoint), ExportPlan(target)
    spec = source.network(plan).spec
    imgsz = complete(plan, spec)[0].imgsz
    assert imgsz
    sizes = [(imgsz[0] - STEP * less, imgsz[1] - STEP * less) for less in range(SMALLER + 1)]
    return tuple(size_text(size) for size in sizes if size == imgsz or min(size) >= max(STEP, spec.min_pixels))
