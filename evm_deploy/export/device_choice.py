"""What a device profile decides of an export, where the command line does not."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy.bundle.manifest import Decision
from evm_deploy.devices.profiles import Profile
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import CALIBRATED
from evm_deploy.export.targets import get_target


@dataclass(frozen=True)
class ForDevice:
    """Settings of an ExportPlan. native_library: platform of the library in the bundle, if any."""

    target: str
    precision: str
    native_library: str | None
    platform: str
    chosen: Decision


def choose(profile: Profile, target: str | None, precision: str | None, scan: str, images: bool) -> ForDevice:
    """The first of the profile's preferences that fits what is given; what is given wins, None leaves it open.

    images: whether there are any to calibrate int8 with. Raises UsageError, naming what the device has.
    """
    fitting = [each for each in profile.prefer if target in (None, each[0])]
    if not fitting:
        raise UsageError(f"device {profile.name!r} has no target {target!r}; it has: {profile.preferences}")
    if precision is None:
        (name, precision), why = _first(profile, fitting, images)
    else:
        named = [each for each in fitting if each[1] == precision]
        if not named and target is None:
            raise UsageError(f"device {profile.name!r} prefers no {precision!r}; it has: {profile.preferences}")
        name, why = (named or fitting)[0][0], "as asked"
    library, why_library = _library(profile, name, scan)
    reason = f"device {profile.name}: {why}; {why_library}"
    return ForDevice(name, precision, library, profile.platform, Decision(f"{name} {precision}", reason))


def _first(profile: Profile, fitting: list[tuple[str, str]], images: bool) -> tuple[tuple[str, str], str]:
    """The first preference, of those that need no images where there are none, and why."""
    possible = fitting if images else [each for each in fitting if each[1] not in CALIBRATED]
    first = (possible or fitting)[0]
    of = "its first preference" if fitting[0] == profile.prefer[0] else f"its first preference with {first[0]}"
    if first == fitting[0]:
        return first, of
    return first, f"{of} that needs no images (with --calib DIR: {' '.join(fitting[0])})"


def _library(profile: Profile, target: str, scan: str) -> tuple[str | None, str]:
    """The platform whose native library travels, or None, and why."""
    if scan == "portable":
        return None, "portable scans, as asked"
    platforms = get_target(target).platforms
    if not platforms:
        return None, f"target {target} brings its own kernel, where it has one"
    if profile.platform not in platforms:
        return None, f"there is no native library for {profile.platform}"
    return profile.platform, f"with the native library for {profile.platform}"
