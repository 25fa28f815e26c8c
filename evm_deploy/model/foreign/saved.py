"""Preprocessing and labels that a module carries: the `pretrained_cfg` of timm, or the older `default_cfg`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from torch import nn

CONFIGS = ("pretrained_cfg", "default_cfg")  # attributes of a module, in the order in which they are looked for
INTERPOLATIONS = ("bicubic", "bilinear")  # of timm that are those of data.preprocessing, too
SQUASH, STRETCH = "squash", "stretch"


@dataclass(frozen=True)
class Saved:
    """Facts that a module carries about its input and classes.

    defaults: imgsz, mean, std, resize, crop_pct, interpolation and labels, as in ModelSpec.defaults. channels: of the
    input. notes: which settings were taken, and which cannot be.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    channels: int = 3
    notes: tuple[str, ...] = ()


def saved_in(module: nn.Module, channels: int | None = None) -> Saved:
    """Return the facts in the `pretrained_cfg` or `default_cfg` of a module. Empty if the module has neither.

    channels: of the module's input, if they are known: mean and std are then repeated for as many, as timm does.
    """
    attribute, config = next(((name, found) for name in CONFIGS if (found := _mapping(module, name))), ("", {}))
    if not config:
        return Saved(channels=channels or 3)
    size = config.get("input_size")
    channels = channels or (size[0] if size and _size(size) else 3)
    defaults: dict[str, Any] = {}
    refused = []
    for key, read in READERS.items():
        value = config.get(key)
        if value is None:
            continue
        taken = read(value)
        if taken is None:
            refused.append(f"{key} {value!r}")
        else:
            defaults["imgsz" if key == "input_size" else key] = taken
    for key in ("mean", "std"):
        if key in defaults and len(defaults[key]) != channels:
            defaults[key] = tuple(defaults[key][i % len(defaults[key])] for i in range(channels))
    mode = config.get("crop_mode", "center")
    if mode == SQUASH and defaults.get("crop_pct") == 1:
        del defaults["crop_pct"]
        defaults["resize"] = STRETCH
    elif mode != "center":
        refused.append(f"crop_mode {mode!r} (the centre is cropped)")
    said = ", ".join(f"{key} {_text(value)}" for key, value in defaults.items())
    notes = [f"taken from the module's {attribute}: {said}"] if said else []
    notes += [f"the module's {attribute} has settings that evm-deploy lacks: {', '.join(refused)}"] if refused else []
    names = config.get("label_names")
    if names and isinstance(names, Sequence) and not isinstance(names, str):
        defaults["labels"] = [*map(str, names)]
    return Saved(defaults, channels, tuple(notes))


def _mapping(module: nn.Module, name: str) -> Mapping[str, Any]:
    value = getattr(module, name, None)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _numbers(value: Any) -> tuple[float, ...] | None:
    try:
        found = tuple(map(float, value))
    except (TypeError, ValueError):
        return None
    return found if found and all(0 <= each <= 1 for each in found) else None


def _std(value: Any) -> tuple[float, ...] | None:
    found = _numbers(value)
    return found if found and min(found) > 0 else None


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and 0 < value <= 1 else None


def _interpolation(value: Any) -> str | None:
    return value if value in INTERPOLATIONS else None


def _size(value: Any) -> str | None:
    """Return `HxW` of (channels, H, W)."""
    whole = isinstance(value, Sequence) and len(value) == 3 and all(isinstance(each, int) for each in value)
    return f"{value[1]}x{value[2]}" if whole and min(value) > 0 else None


READERS = {
    "input_size": _size,
    "mean": _numbers,
    "std": _std,
    "crop_pct": _share,
    "interpolation": _interpolation,
}
