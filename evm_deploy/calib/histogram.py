"""A histogram that grows with what it is shown, and the activation ranges that can be read off it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import CalibrationError

SIDE = 1024  # bins on each side of zero
LEVELS = 255  # steps of an 8-bit scale
PERCENTILE = 99.99
SHRINKS = np.linspace(0.2, 1.0, 81)  # of the min-max range, tried by `mse`
SMALLEST = 1e-30  # largest size of values for which bins are still told apart
METHODS = ("minmax", "percentile", "mse", "entropy")

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Range:
    """What an activation's 8 bits cover; zero is inside, so that padding is exact."""

    low: float
    high: float

    @classmethod
    def around(cls, low: float, high: float) -> Range:
        """The smallest range with zero, `low` and `high` in it; never empty."""
        low, high = min(0.0, low), max(0.0, high)
        return cls(low, high) if high > low else cls(0.0, 1.0)


class Histogram:
    """Counts of values in 2 x SIDE bins around zero, all of one width, which doubles when a value lies outside.

    The width is a power of two and doubling merges pairs of bins: nothing is lost but resolution, and the order of the
    values does not matter. Constant memory.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * SIDE, np.int64)
        self.width = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Array) -> None:
        """Count `values`. Raises CalibrationError for NaN and infinities."""
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError("an activation is NaN or infinite on a calibration image", "check the checkpoint")
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high, SMALLEST)
        if not self.width:
            self.width = 2.0 ** math.ceil(math.log2(largest / SIDE))
        while largest >= self.width * SIDE:
            self._double()
        bins = np.floor(values.ravel() * np.float32(1 / self.width)).astype(np.int64) + SIDE
        self.counts += np.bincount(bins, minlength=2 * SIDE)

    def _double(self) -> None:
        merged = self.counts.reshape(SIDE, 2).sum(1)
        self.counts = np.concatenate([np.zeros(SIDE // 2, np.int64), merged, np.zeros(SIDE // 2, np.int64)])
        self.width *= 2

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin."""
        return np.asarray((np.arange(2 * SIDE) - SIDE + 0.5) * self.width, np.float64)

    def range(self, method: str) -> Range:
        """The range that `method` gives: one of METHODS, or `auto`, the one of least squared error on these counts.

        minmax: all values. percentile: the middle 99.99 %. mse: the min-max range shrunk to the least squared error.
        entropy: symmetric around zero as in TensorRT's calibrator, to the least Kullback-Leibler divergence.
        """
        if not self.total:
            raise CalibrationError("a tensor has seen no values", "calibrate with at least one image")
        if method == "auto":
            return min((self.range(each) for each in METHODS), key=self.squared_error)
        whole = Range.around(self.low, self.high)
        if method == "minmax":
            return whole
        if method == "percentile":
            return self._percentile(whole)
        if method == "mse":
            return min((Range(whole.low * s, whole.high * s) for s in SHRINKS), key=self.squared_error)
        if method == "entropy":
            threshold = self._entropy_threshold()
            return Range.around(max(whole.low, -threshold), min(whole.high, threshold))
        raise ValueError(f"unknown calibration method {method!r}")

    def squared_error(self, covered: Range) -> float:
        """Mean squared error of rounding these values to 8 bits over `covered`, clipping included."""
        scale = (covered.high - covered.low) / LEVELS
        zero = round(-covered.low / scale)
        centres = self.centres
        steps = np.clip(np.rint(centres / scale) + zero, 0, LEVELS) - zero
        return float((self.counts * (centres - steps * scale) ** 2).sum()) / self.total

    def _percentile(self, whole: Range) -> Range:
        outside = (1 - PERCENTILE / 100) / 2 * self.total
        upto = np.cumsum(self.counts)
        first = int(np.searchsorted(upto, outside, side="right"))
        last = int(np.searchsorted(upto, self.total - outside, side="left"))
        low, high = (first - SIDE) * self.width, (last + 1 - SIDE) * self.width
        return Range.around(max(whole.low, low), min(whole.high, high))

    def _entropy_threshold(self) -> float:
        """The bin edge at which clipping |x| and merging it into 128 steps loses least (TensorRT's calibrator)."""
        sizes = (self.counts[SIDE:] + self.counts[:SIDE][::-1]).astype(np.float64)
        best, best_edge = math.inf, SIDE
        for edge in range(128, SIDE + 1, 8):
            clipped = sizes[:edge].copy()
            clipped[-1] += sizes[edge:].sum()
            divergence = _divergence(clipped, sizes[:edge])
            if divergence < best:
                best, best_edge = divergence, edge
        return best_edge * self.width

    def to_json(self) -> dict[str, Any]:
        """Plain data: the counts from the first bin that is not empty to the last."""
        used = np.flatnonzero(self.counts)
        first, last = (int(used[0]), int(used[-1])) if len(used) else (SIDE, SIDE - 1)
        counts = self.counts[first : last + 1].tolist()
        return {"low": self.low, "high": self.high, "width": self.width, "first": first, "counts": counts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Histogram:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for what is not one."""
        histogram = cls()
        counts, first = np.asarray(data["counts"], np.int64), int(data["first"])
        if counts.ndim != 1 or not 0 <= first <= first + len(counts) <= 2 * SIDE or (counts < 0).any():
            raise ValueError("counts are not those of a histogram")
        histogram.counts[first : first + len(counts)] = counts
        histogram.low, histogram.high, histogram.width = (float(data[key]) for key in ("low", "high", "width"))
        if not (math.isfinite(histogram.width) and histogram.width > 0 and histogram.low <= histogram.high):
            raise ValueError("width, low and high are not those of a histogram")
        return histogram


def _divergence(p: NDArray[np.float64], raw: NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence of `p` from `raw` merged into 128 steps and spread over its bins again."""
    edges = np.linspace(0, len(raw), 129).round().astype(int)
    filled = raw > 0
    sums = np.add.reduceat(raw, edges[:-1])
    used = np.maximum(np.add.reduceat(filled.astype(np.float64), edges[:-1]), 1)
    q = np.repeat(sums / used, np.diff(edges)) * filled
    if not q.sum() or (p[q == 0] > 0).any():
        q = q + 1e-9 * max(1.0, q.sum())
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
