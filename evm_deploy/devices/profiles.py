"""Device profiles: preferred targets and settings of a kind of device, from `devices/<name>.toml` or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from evm_deploy._util.text import one_of
from evm_deploy._util.toml import checked, read_toml
from evm_deploy.errors import UsageError
from evm_deploy.runtimes.registry import configured, load_runtimes
from evm_deploy.toolchain.platforms import PLATFORMS, WITHOUT_LIBRARY

SUFFIX = ".toml"
KEYS: Mapping[str, type] = {
    "description": str,
    "platform": str,
    "prefer": list,
    "threads": int,
    "dot_product": bool,
    "sensors": list,
    "notes": str,
    "verified": str,
}
REQUIRED = ("description", "platform", "prefer")


@dataclass(frozen=True)
class Profile:
    """Profile of a kind of device.

    name: file name without the suffix. platform: name as in toolchain/platforms.py. prefer: pairs (target, precision),
    best first. threads: threads per inference; None leaves the choice to the runtime. settings: target -> settings of
    its runtime. dot_product: whether all such devices multiply int8 without saturation, as with VNNI, AVX-VNNI or
    dotprod. sensors: names of sensors that a record of this device should show. verified: the parts of the profile
    that were tested, and the hardware of the test.
    """

    name: str
    description: str
    platform: str
    prefer: tuple[tuple[str, str], ...]
    threads: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dot_product: bool = True
    sensors: tuple[str, ...] = ()
    notes: str = ""
    verified: str = "not said"

    @property
    def targets(self) -> tuple[str, ...]:
        """Preferred targets without repeats, best first."""
        return tuple(dict.fromkeys(target for target, _ in self.prefer))

    @property
    def preferences(self) -> str:
        """Preferred targets and precisions as text: `onnx int8, onnx fp32`."""
        return ", ".join(map(" ".join, self.prefer))


def profile_names() -> list[str]:
    """Return the names of all profiles of this package, sorted."""
    return sorted(path.name.removesuffix(SUFFIX) for path in _folder().iterdir() if path.name.endswith(SUFFIX))


def find_profile(text: str) -> Profile:
    """Read a device profile of this package by its name, or a file `*.toml`. Raises UsageError naming file and key."""
    if text.endswith(SUFFIX):
        return _profile(Path(text).name.removesuffix(SUFFIX), text, read_toml(Path(text), "--device"))
    name = one_of("--device", text, profile_names())
    return _profile(name, name + SUFFIX, read_toml(_folder() / (name + SUFFIX), "--device"))


def _folder() -> Any:
    return files("evm_deploy") / "devices"


def _profile(name: str, file: str, content: dict[str, Any]) -> Profile:
    where = f"device profile {file}: "
    own = {name: table for name, table in content.items() if name in load_runtimes() and isinstance(table, dict)}
    rest = {name: value for name, value in content.items() if name not in own}
    values = checked(f"device profile {file}", rest, KEYS, REQUIRED)
    values["settings"] = {name: _settings(f"{where}[{name}]", name, table) for name, table in own.items()}
    one_of(f"{where}platform", values["platform"], (*PLATFORMS, *WITHOUT_LIBRARY))
    if values.get("threads", 1) < 1:
        raise UsageError(f"{where}threads is {values['threads']}, use a number from 1")
    values["prefer"] = tuple(_preference(f"{where}prefer", text) for text in values["prefer"])
    if not values["prefer"]:
        raise UsageError(f"{where}prefer is empty", 'example: prefer = ["onnx int8", "onnx fp32"]')
    values["sensors"] = tuple(values.get("sensors", ()))
    return Profile(name, **values)


def _preference(where: str, text: str) -> tuple[str, str]:
    """Parse `onnx int8` -> (onnx, int8). Raises UsageError for an unknown target or precision."""
    targets = load_runtimes()
    target, _, precision = text.partition(" ")
    one_of(f"{where} {text!r}: target", target, targets)
    one_of(f"{where} {text!r}: precision", precision, targets[target].precisions)
    return target, precision


def _settings(where: str, target: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Validate the settings of the runtime of `target`. Raises UsageError."""
    try:
        configured(load_runtimes()[target], table)
    except UsageError as error:
        raise UsageError(f"{where}: {error.args[0]}", error.hint) from error
    return dict(table)
