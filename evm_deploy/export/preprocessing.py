"""The preprocessing of an export: the values of flags, else those saved with the weights, else defaults."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from evm_deploy._util.text import count_text, one_of
from evm_deploy._util.values import Converter, listed, number, text
from evm_deploy.data.preprocessing import CROP, IMAGENET_MEAN, IMAGENET_STD, RESIZES, Preprocessing, for_channels
from evm_deploy.errors import UsageError

MIN_CROP_PCT = 0.1  # below it, a resized image is over 10 times as large as the network's input


def _numbers(what: str, value: Any) -> tuple[float, ...]:
    return listed(what, value, number)


CONVERTERS: Mapping[str, Converter] = {
    "mean": _numbers,
    "std": _numbers,
    "resize": text,
    "crop_pct": number,
    "interpolation": text,
}


def make_preprocessing(
    size: tuple[int, int],
    given: Mapping[str, Any],
    saved: Mapping[str, Any] = MappingProxyType({}),
    channels: int | None = None,
) -> Preprocessing:
    """Return the preprocessing with the values `given` by flags, else those `saved` with the weights, else defaults.

    given, saved: values by name, of CONVERTERS; None is no value. channels: number of the network's input channels;
    None if it is not known yet. Raises UsageError for values that cannot be meant, such as mean and std of channels in
    0..255, or another number of them than channels.
    """
    flags = {key: value for key, value in given.items() if value is not None}
    kept = {key: saved[key] for key in CONVERTERS if saved.get(key) is not None and key not in flags}
    if flags.get("resize", CROP) != CROP:
        kept.pop("crop_pct", None)  # of the resize that the flag replaces
    names = {key: f"--{key.replace('_', '-')}" if key in flags else f"the checkpoint's {key}" for key in CONVERTERS}
    values = {key: CONVERTERS[key](names[key], value) for key, value in {**kept, **flags}.items()}
    _check_channels(names, values, channels)
    if "resize" in values:
        one_of(names["resize"], values["resize"], RESIZES)
    if "crop_pct" in values and values.get("resize", CROP) != CROP:
        raise UsageError(
            f"{names['crop_pct']} with {names['resize']} {values['resize']}: only a crop has a share that is kept",
            f"leave {names['crop_pct']} out, or use --resize {CROP}" if "crop_pct" in flags else f"add --resize {CROP}",
        )
    if values.get("crop_pct", 1) < MIN_CROP_PCT:
        raise UsageError(f"{names['crop_pct']} is {values['crop_pct']}: use a share from {MIN_CROP_PCT} to 1")
    count = channels or len(values.get("mean", values.get("std", IMAGENET_MEAN)))
    defaults = {"mean": for_channels(IMAGENET_MEAN, count), "std": for_channels(IMAGENET_STD, count)}
    try:
        return Preprocessing(size, **{**defaults, **values})
    except (TypeError, ValueError) as error:
        key = next((key for key in values if str(error).startswith(key)), "")
        raise UsageError(names.get(key, "preprocessing: ") + str(error).removeprefix(key)) from error


def _check_channels(names: Mapping[str, str], values: Mapping[str, Any], channels: int | None) -> None:
    """Check the range of mean and std, and that there is one value for each input channel. Raises UsageError."""
    for key in ("mean", "std"):
        if any(not 0 <= value <= 1 for value in values.get(key, ())):
            texts = (",".join(f"{value / unit:.4g}" for value in values[key]) for unit in (1, 255))
            raise UsageError(
                f"{names[key]} is {next(texts)}: it is applied after channels are scaled to 0..1, so use values from 0 "
                "to 1",
                f"if the values are for channels in 0..255, divide them by 255: {next(texts)}",
            )
    counts = {key: len(values[key]) for key in ("mean", "std") if key in values}
    for key, count in counts.items():
        if channels is not None and count != channels:
            has, wanted = count_text(count, "value"), count_text(channels, "input channel")
            raise UsageError(
                f"{names[key]} has {has}, the network has {wanted}",
                f"give {count_text(channels, 'number')}, such as {','.join(['0.5'] * min(channels, 4))}",
            )
    if len({*counts.values()}) > 1:
        mean, std = (f"{names[key]} has {count_text(count, 'value')}" for key, count in counts.items())
        raise UsageError(f"{mean}, {std}", "give one number for each input channel to both")
