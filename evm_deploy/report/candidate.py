"""Candidate: a bundle or the torch baseline, measured in one setting on one device, with its accuracy and size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from evm_deploy._util.text import escape_controls
from evm_deploy.bench.device import key
from evm_deploy.bench.measurable import calibration_text
from evm_deploy.bench.record import Record
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.tasks import TITLES

FLOAT = "fp32"  # precision that accuracy is compared with
MAX_TEXT = 200  # characters of a text from a file


@dataclass(frozen=True)
class Conditions:
    """Conditions that two latencies must share to be compared.

    device: key from `device_key`; None if nothing was measured. threads: None if the runtime chose.
    """

    model: str
    imgsz: tuple[int, int]
    device: tuple[str, ...] | None = None
    batch: int = 0
    threads: int | None = None
    streams: int = 1
    timed: str = ""

    def __str__(self) -> str:
        """Format as `evm_digits, 64x64, batch 1, 1 thread, model`."""
        if self.device is None:
            return f"{self.model}, {self.imgsz[0]}x{self.imgsz[1]}, not measured"
        threads = {None: "threads auto", 1: "1 thread"}.get(self.threads, f"{self.threads} threads")
        streams = f", {self.streams} streams" if self.streams > 1 else ""
        return f"{self.model}, {self.imgsz[0]}x{self.imgsz[1]}, batch {self.batch}, {threads}{streams}, {self.timed}"


@dataclass(frozen=True)
class Candidate:
    """Row of a report. All texts hold printable characters only.

    name: name of the bundle. accuracy: dictionary from calib.evaluate.Accuracy.as_dict, or None. size_bytes: size of
    the artifact. rejected: reason from the manifest of a bundle that was rejected at export, else empty.
    record: None for a bundle that was not measured. notes: remarks for the reader. calibration: of int8, as text, empty
    for the defaults.
    """

    name: str
    model: str
    target: str
    precision: str
    imgsz: tuple[int, int]
    size_bytes: int
    accuracy: dict[str, Any] | None
    rejected: str = ""
    record: Record | None = None
    notes: tuple[str, ...] = ()
    calibration: str = ""

    @classmethod
    def of_record(cls, record: Record) -> Candidate:
        """Make the candidate of a measurement."""
        bundle, notes = record.bundle, [plain(text) for text in record.warnings]
        return cls(
            **{key: plain(bundle[key]) for key in ("name", "model", "target", "precision")},
            imgsz=(bundle["imgsz"][0], bundle["imgsz"][1]),
            size_bytes=bundle["artifact_bytes"],
            accuracy=bundle.get("accuracy"),
            record=record,
            notes=tuple(notes),
            calibration=plain(bundle.get("calibration", "")),
        )

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Candidate:
        """Make the candidate of a bundle that was not measured."""
        manifest = bundle.manifest
        height, width = manifest.plan["imgsz"]
        failures = manifest.parity.get("failures") or ["rejected at export"]
        return cls(
            name=plain(bundle.path.resolve().name),
            model=plain(manifest.model.get("name", manifest.name)),
            target=plain(manifest.target),
            precision=plain(manifest.precision),
            imgsz=(height, width),
            size_bytes=bundle.size_bytes,
            accuracy=manifest.accuracy,
            rejected=plain("; ".join(map(str, failures))) if manifest.rejected else "",
            notes=tuple(plain(text) for text in manifest.notes),
            calibration=plain(calibration_text(manifest)),
        )

    @property
    def conditions(self) -> Conditions:
        """Conditions of the measurement, which decide the group."""
        if self.record is None:
            return Conditions(self.model, self.imgsz)
        settings = self.record.settings
        return Conditions(
            self.model,
            self.imgsz,
            device_key(self.record),
            settings["batch"],
            settings.get("threads"),
            settings.get("streams") or 1,
            plain(settings["timed"]),
        )

    @property
    def variant(self) -> tuple[str, ...]:
        """Settings in which candidates of one group may differ, such as `minmax`, `scan portable` or `CUDA graph`."""
        settings = self.record.settings if self.record else {}
        said = (
            self.calibration,
            "" if settings.get("scan") in (None, "auto") else f"scan {settings['scan']}",
            settings.get("device") or "",
            "CUDA graph" if settings.get("cuda_graph") else "",
            settings.get("providers") or "",
            settings.get("provider_options") or "",
        )
        return tuple(plain(text) for text in said if text)

    @property
    def label(self) -> str:
        """Target, precision and `variant`, such as `openvino int8, GPU`."""
        return ", ".join((f"{self.target} {self.precision}", *self.variant))

    @property
    def p50(self) -> float | None:
        """Median latency in ms."""
        return float(self.record.summary_ms["p50"]) if self.record else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the median, in ms."""
        return (self.record.interval_ms[0], self.record.interval_ms[1]) if self.record else None

    @property
    def stable(self) -> bool:
        """Whether the measurement was stable; True for a bundle that was not measured."""
        return self.record is None or self.record.stable

    @property
    def is_float(self) -> bool:
        """Whether the precision is fp32. Its accuracy is the float model's: the export has checked their parity."""
        return self.precision == FLOAT

    @property
    def metric(self) -> str:
        """Title of the task's main figure, such as `top-1` or `AP`; empty if no accuracy against labels is known."""
        name = (self.accuracy or {}).get("metric", "top1")  # older records do not say
        return TITLES.get(str(name), plain(name))

    @property
    def drop(self) -> float | None:
        """Drop of the main figure against the float model in points: 0 for fp32, None if the accuracy is unknown."""
        if self.accuracy is None:
            return 0.0 if self.is_float else None
        return finite(self.accuracy.get("drop"))

    def figure(self, name: str) -> float | None:
        """Return a figure of the task's score, such as `top1` or `AP50`, in percent, or None."""
        share = finite((self.accuracy or {}).get(name))
        return None if share is None else 100 * share

    @property
    def scan_share(self) -> float | None:
        """Share of the scans in the time of all layers, in percent, or None."""
        share = finite(self.record.layers.get("scan_share")) if self.record else None
        return None if share is None else 100 * share


def device_key(record: Record) -> tuple[str, ...]:
    """Return the facts that identify a device, see `bench.device.key`, as printable text."""
    return tuple(map(plain, key(record.device)))


def device_name(facts: tuple[str, ...]) -> str:
    """Format the result of `device_key` for people: `raspberry at pi@raspberry: Cortex-A76, 4 cores`."""
    at, model, cpu, _, cores, _, _, runs_on = facts
    where = f" at {at}" if at else ""
    return f"{model or 'unnamed device'}{where}: {runs_on or cpu or 'processor unknown'}, {cores or '?'} cores"


def finite(value: object) -> float | None:
    """Return a number as float; None for any other value, NaN and infinities included."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def milliseconds(value: float) -> str:
    """Format a time in ms with three digits: 0.252, 1.20, 35.0, 1240."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def plain(text: object) -> str:
    """Return `text` without control characters, cut to MAX_TEXT: texts from files must not control a terminal."""
    shown = escape_controls(text, keep="")
    return shown if len(shown) <= MAX_TEXT else shown[: MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"
