"""Histogram with a growing range, and the activation ranges computed from it."""

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
SHRINKS = np.linspace(0.2, 1.0, 81)  # factors of the min-max range that `mse` tries
SMALLEST = 1e-30  # the histogram covers at least -1e-30 .. 1e-30, so that its bin width is never 0
METHODS = ("minmax", "percentile", "mse", "entropy")

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Range:
    """Range of an activation that 8 bits cover. The range contains zero, so that padding is exact."""

    low: float
    high: float

    @classmethod
    def around(cls, low: float, high: float) -> Range:
        """Return the smallest range that contains zero, `low` and `high`; never empty."""
        low, high = min(0.0, low), max(0.0, high)
        return cls(low, high) if high > low else cls(0.0, 1.0)


class Histogram:
    """Counts of values in 2 x SIDE bins of equal width around zero. The width doubles when a value lies outside.

    The width is a power of two, and doubling merges pairs of bins: only resolution is lost, and the order of the values
    does not matter. Memory is constant.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * SIDE, np.int64)
        self.width = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Array) -> None:
        """Count `values`, of any shape. Raises CalibrationError for NaN and infinities."""
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                "an activation is NaN or infinite on a calibration image",
                "check the checkpoint; float16, in which some targets compute, holds values up to 65504",
            )
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
        """Number of values counted."""
        return int(self.counts.sum())

    @property
    def centres(self) -> NDArray[np.float64]:
        """Middle of each bin, (2 x SIDE,)."""
        return np.asarray((np.arange(2 * SIDE) - SIDE + 0.5) * self.width, np.float64)

    def range(self, method: str) -> Range:
        """Compute the range by `method`: one of METHODS, or `auto` for the method with the least squared error.

        minmax: all values. percentile: the middle 99.99 %. mse: the min-max range shrunk to the least squared error.
        entropy: clipped to +-threshold with the least Kullback-Leibler divergence, as in TensorRT's calibrator. Raises
        CalibrationError if no values have been counted.
        """
        if not self.total:
            raise CalibrationError("an activation has no values", "calibrate with at least one image")
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
        """Return the mean squared error of rounding the counted values to 8 bits over `covered`, with clipping."""
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
        """Return the threshold for |x| that loses least by clipping and 128 steps, as in TensorRT's calibrator."""
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
        """Return plain data, with the counts from the first bin that is not empty to the last."""
        used = np.flatnonzero(self.counts)
        first, last = (int(used[0]), int(used[-1])) if len(used) else (SIDE, SIDE - 1)
        counts = self.counts[first : last + 1].tolist()
        return {"low": self.low, "high": self.high, "width": self.width, "first": first, "counts": counts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Histogram:
        """Create a histogram from the data of `to_json`. Raises ValueError, KeyError or TypeError for other data."""
        histogram = cls()
        counts, first = np.asarray(data["counts"], np.int64), int(data["first"])
        if counts.ndim != 1 or not 0 <= first <= first + len(counts) <= 2 * SIDE or (counts < 0).any():
            raise ValueError("counts do not form a histogram")
        histogram.counts[first : first + len(counts)] = counts
        histogram.low, histogram.high, histogram.width = (float(data[key]) for key in ("low", "high", "width"))
        if not (math.isfinite(histogram.width) and histogram.width > 0 and histogram.low <= histogram.high):
            raise ValueError("width, low and high do not form a histogram")
        return histogram


def _divergence(p: NDArray[np.float64], raw: NDArray[np.float64]) -> float:
    """Return the Kullback-Leibler divergence of `p` from `raw` merged into 128 steps and spread over the bins again."""
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
