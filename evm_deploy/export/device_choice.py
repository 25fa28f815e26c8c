"""Choice of target, precision and native library from a device profile, for options that the user left open."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy.bundle.manifest import Decision
from evm_deploy.devices.profiles import Profile
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import CALIBRATED, NO_LIBRARY
from evm_deploy.export.targets import get_target


@dataclass(frozen=True)
class ForDevice:
    """Settings of an ExportPlan, chosen for a device.

    native_library: platform of the native library in the bundle, None for no library. platform: that of the device.
    weight_bits: as in ExportPlan. chosen: target and precision, with the reason.
    """

    target: str
    precision: str
    native_library: str | None
    platform: str
    weight_bits: int | None
    chosen: Decision


def choose(
    profile: Profile,
    target: str | None,
    precision: str | None,
    scan: str,
    images: bool,
    weight_bits: int | None = None,
) -> ForDevice:
    """Choose the first of the profile's preferences that agrees with the given options.

    target, precision: None leaves the choice to the profile. scan: the value of --scan. images: whether there are
    images for int8 calibration. weight_bits: the value of --weight-bits, or None. Raises UsageError, with the profile's
    preferences, for a target that the profile does not list, for a precision that it does not list if no target is
    given, and for 8-bit weights that would saturate on the device.
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
    bits = _weight_bits(profile, name, precision, weight_bits)
    why_bits = "; int8 weights in 7 bits, which do not saturate without VNNI" if bits == 7 else ""
    reason = f"device {profile.name}: {why}; {why_library}{why_bits}"
    return ForDevice(name, precision, library, profile.platform, bits, Decision(f"{name} {precision}", reason))


def _first(profile: Profile, fitting: list[tuple[str, str]], images: bool) -> tuple[tuple[str, str], str]:
    """Return the first preference and the reason. Without images, preferences that need calibration come last."""
    possible = fitting if images else [each for each in fitting if each[1] not in CALIBRATED]
    first = (possible or fitting)[0]
    of = "its first preference" if fitting[0] == profile.prefer[0] else f"its first preference with {first[0]}"
    if first == fitting[0]:
        return first, of
    return first, f"{of} that needs no images (with --calib DIR: {' '.join(fitting[0])})"


def _weight_bits(profile: Profile, target: str, precision: str, asked: int | None) -> int | None:
    """Return 7 if int8 weights of 8 bits would saturate on some such devices, else `asked`.

    Raises UsageError if 8 bits are asked for there: their accuracy on this machine, which may have VNNI, would be that
    of another network than the device computes.
    """
    saturates = not profile.dot_product and precision in CALIBRATED and 7 in get_target(target).weight_bits
    if saturates and asked == 8:
        raise UsageError(
            f"--weight-bits 8 with --device {profile.name}: products of int8 saturate on such devices without VNNI",
            "leave --weight-bits out, or leave --device out and name --target and --platform",
        )
    return 7 if saturates else asked


def _library(profile: Profile, target: str, scan: str) -> tuple[str | None, str]:
    """Return the platform whose native library goes into the bundle, or None, and the reason."""
    if scan in NO_LIBRARY:
        return None, f"{scan} scans, as asked"
    platforms = get_target(target).platforms
    if not platforms:
        return None, f"target {target} has no native libraries by platform"
    if profile.platform not in platforms:
        return None, f"there is no native library for {profile.platform}"
    return profile.platform, f"with the native library for {profile.platform}"
