"""Calibration tables: histograms of a network's activations on some images. Measured once, saved, reused by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import cache_folder, log_no_cache, writable_cache, write_atomically
from evm_deploy._util.progress import Progress
from evm_deploy.calib.histogram import Histogram, Range
from evm_deploy.errors import CalibrationError

SCHEMA = 1
SAVE_EVERY = 32  # images between two saves of an unfinished table

Activations = Mapping[str, NDArray[np.float32]]


@dataclass
class CalibrationTable:
    """A histogram per activation, keyed `<module path>:input` or `:output`.

    identity: everything that the histograms depend on: checkpoint sha256, input size and preprocessing, digest and
    number of the images, graph preparation; `channels`: activations whose maxima per channel are recorded too. done:
    number of images counted. channel_maxima: activation in `channels` -> max |x| per channel.
    """

    identity: dict[str, Any]
    histograms: dict[str, Histogram]
    done: int = 0
    channel_maxima: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """sha256 of the identity: tables with equal keys are the same table."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def channels(self) -> list[str]:
        """Activations whose maxima per channel are recorded."""
        return list(self.identity.get("channels", ()))

    @property
    def complete(self) -> bool:
        """Whether all images have been counted."""
        return self.done == int(self.identity["images"]["count"])

    def add(self, activations: Activations) -> None:
        """Count the activations of one image. Activations in `channels` have their channels last.

        Raises CalibrationError for NaN and infinities.
        """
        for name, values in activations.items():
            try:
                self.histograms.setdefault(name, Histogram()).add(values)
            except CalibrationError as error:
                raise CalibrationError(f"{name}: {error}") from error
            if name in self.channels:
                seen = channel_maxima(values)
                self.channel_maxima[name] = np.maximum(self.channel_maxima.get(name, seen), seen)
        self.done += 1

    def ranges(self, method: str) -> dict[str, Range]:
        """Compute the range of each activation by one of histogram.METHODS, or `auto`. Raises CalibrationError."""
        return {name: histogram.range(method) for name, histogram in self.histograms.items()}

    def to_json(self) -> str:
        """Return the table as JSON text."""
        tensors = {name: histogram.to_json() for name, histogram in sorted(self.histograms.items())}
        data = {"schema": SCHEMA, "key": self.key, "identity": self.identity, "done": self.done, "tensors": tensors}
        if self.channels:
            data["channel_maxima"] = {name: values.tolist() for name, values in self.channel_maxima.items()}
        return json.dumps(data, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CalibrationTable:
        """Create a table from JSON text. Raises CalibrationError for text that is not a valid table of this schema."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']}, this version reads {SCHEMA}")
            histograms = {str(name): Histogram.from_json(value) for name, value in data["tensors"].items()}
            maxima = {str(name): _maxima(values) for name, values in data.get("channel_maxima", {}).items()}
            table = cls(dict(data["identity"]), histograms, int(data["done"]), maxima)
            if set(maxima) != (set(table.channels) if table.done else set()):
                raise ValueError("maxima per channel do not match the activations")
            if table.key != data["key"] or not 0 <= table.done <= int(table.identity["images"]["count"]):
                raise ValueError("the key does not match the content")
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CalibrationError(f"not a calibration table: {error}", "calibrate again") from error
        return table


def channel_maxima(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return max |x| of each channel: (.., channels) -> (channels,)."""
    largest: NDArray[np.floating[Any]] = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
    return largest


def calibrate(
    identity: dict[str, Any],
    activations: Callable[[int], Iterator[Activations]],
    *,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> CalibrationTable:
    """Load the table of `identity` from `folder`, else measure it and save it there.

    `activations(n)`: yield the activations of the n-th image and of each later image. An interrupted calibration
    continues from its last save. A damaged file is measured again. folder: by default the cache; a folder that
    cannot be written is replaced by one that lasts until this process ends. Raises CalibrationError if an image cannot
    be read, and for NaN and infinities.
    """
    table = CalibrationTable(identity, {})
    folder, file = folder or cache_folder() / "calibration", f"{table.key}.json"
    table = _saved(folder / file, table)
    if not table.complete:
        folder = writable_cache(folder)
        table = _saved(folder / file, table)
    total = int(identity["images"]["count"])
    for values in activations(table.done) if not table.complete else ():
        table.add(values)
        progress(table.done, total)
        if table.done % SAVE_EVERY == 0 or table.complete:
            _save(folder / file, table)
    if not table.complete:
        raise CalibrationError(
            f"only {table.done} of {total} calibration images could be read",
            "keep the images in place while they are read",
        )
    return table


def _maxima(values: Any) -> NDArray[np.float32]:
    maxima = np.asarray(values, np.float32)
    if maxima.ndim != 1 or not ((maxima >= 0) & (maxima < np.inf)).all():
        raise ValueError("maxima per channel are not finite numbers from 0")
    return maxima


def _save(path: Path, table: CalibrationTable) -> None:
    """Write a table to the cache. A cache is a convenience: if it is full, calibration goes on without it."""
    try:
        write_atomically(path, table.to_json())
    except OSError as error:
        log_no_cache(f"{error.filename or path}: {error.strerror or error}")


def _saved(path: Path, empty: CalibrationTable) -> CalibrationTable:
    try:
        table = CalibrationTable.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, CalibrationError):
        return empty
    return table if table.key == empty.key else empty
