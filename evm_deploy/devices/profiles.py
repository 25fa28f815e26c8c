"""Device profiles: what a kind of device prefers, `evm_deploy/devices/<name>.toml` or a file of the user's."""

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
    "sensors": list,
    "notes": str,
    "verified": str,
}
REQUIRED = ("description", "platform", "prefer")


@dataclass(frozen=True)
class Profile:
    """A kind of device. name: of its file. platform: as in platforms.py.

    prefer: (target, precision), best first. threads: of one inference, None as the runtime chooses. settings: by
    target, those of its runtime. sensors: those worth a look in a record. verified: what of all this was run, and on
    what.
    """

    name: str
    description: str
    platform: str
    prefer: tuple[tuple[str, str], ...]
    threads: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sensors: tuple[str, ...] = ()
    notes: str = ""
    verified: str = "not said"

    @property
    def targets(self) -> tuple[str, ...]:
        """Without repeats, best first."""
        return tuple(dict.fromkeys(target for target, _ in self.prefer))

    @property
    def preferences(self) -> str:
        """`onnx int8, onnx fp32`."""
        return ", ".join(map(" ".join, self.prefer))


def profile_names() -> list[str]:
    """Of the profiles that come with the package."""
    return sorted(path.name.removesuffix(SUFFIX) for path in _folder().iterdir() if path.name.endswith(SUFFIX))


def find_profile(text: str) -> Profile:
    """Read the device profile of this name, or of a file `*.toml`. Raises UsageError, naming file and key."""
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
        raise UsageError(f"{where}prefer is empty", 'such as prefer = ["onnx int8", "onnx fp32"]')
    values["sensors"] = tuple(values.get("sensors", ()))
    return Profile(name, **values)


def _preference(where: str, text: str) -> tuple[str, str]:
    """`onnx int8` -> (onnx, int8). Raises UsageError for what is no target of ours in a precision that it has."""
    targets = load_runtimes()
    target, _, precision = text.partition(" ")
    one_of(f"{where} {text!r}: target", target, targets)
    one_of(f"{where} {text!r}: precision", precision, targets[target].precisions)
    return target, precision


def _settings(where: str, target: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """A table named as a target: settings of its runtime. Raises UsageError."""
    try:
        configured(load_runtimes()[target], table)
    except UsageError as error:
        raise UsageError(f"{where}: {error.args[0]}", error.hint) from error
    return dict(table)
