"""Choice of target, precision and native library from a device profile, for options that the user left open."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy.bundle.manifest import Decision
from evm_deploy.devices.profiles import Profile
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import CALIBRATED
from evm_deploy.export.targets import get_target


@dataclass(frozen=True)
class ForDevice:
    """Settings of an ExportPlan, chosen for a device.

    native_library: platform of the native library in the bundle, None for no library. platform: that of the device.
    chosen: target and precision, with the reason.
    """

    target: str
    precision: str
    native_library: str | None
    platform: str
    chosen: Decision


def choose(profile: Profile, target: str | None, precision: str | None, scan: str, images: bool) -> ForDevice:
    """Choose the first of the profile's preferences that agrees with the given options.

    target, precision: None leaves the choice to the profile. scan: the value of --scan. images: whether there are
    images for int8 calibration. Raises UsageError, with the profile's preferences, for a target that the profile does
    not list, and for a precision that it does not list if no target is given.
    """
    fitting = [each for each in profile.prefer if target in (None, each[0])]
    if not fitting:
        raise UsageError(f"device {profile.name!r} has no target {target!r}; it has: {profile.preferences}")
    if precision is None:
        (name, precision), why = _first(profile, fitting, images)
    else:
        named = [each for each in fitting if each[1] == precision]
        if not named and target is None:
            raise UsageError(
                f"device {profile.name!r} has no preference with {precision!r}; it has: {profile.preferences}"
            )
        name, why = (named or fitting)[0][0], "as asked"
    library, why_library = _library(profile, name, scan)
    reason = f"device {profile.name}: {why}; {why_library}"
    return ForDevice(name, precision, library, profile.platform, Decision(f"{name} {precision}", reason))


def _first(profile: Profile, fitting: list[tuple[str, str]], images: bool) -> tuple[tuple[str, str], str]:
    """Return the first preference and the reason. Without images, preferences that need calibration come last."""
    possible = fitting if images else [each for each in fitting if each[1] not in CALIBRATED]
    first = (possible or fitting)[0]
    of = "its first preference" if fitting[0] == profile.prefer[0] else f"its first preference with {first[0]}"
    if first == fitting[0]:
        return first, of
    return first, f"{of} that needs no images (with --calib DIR: {' '.join(fitting[0])})"


def _library(profile: Profile, target: str, scan: str) -> tuple[str | None, str]:
    """Return the platform whose native library goes into the bundle, or None, and the reason."""
    if scan == "portable":
        return None, "portable scans, as asked"
    platforms = get_target(target).platforms
    if not platforms:
        return None, f"target {target} has no native libraries by platform"
    if profile.platform not in platforms:
        return None, f"there is no native library for {profile.platform}"
    return profile.platform, f"with the native library for {profile.platform}"
