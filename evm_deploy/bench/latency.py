"""Timing one function until its median is stable, and what the samples say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np

WINDOW = 25  # runs at least
WINDOW_S = 0.2  # and seconds
WINDOWS = 3  # in a row that must agree
AGREE = 0.05
LIMIT_S = 60.0
WARM_UP_S = 0.5
PERCENTILES = (50, 90, 95, 99)
RESAMPLES = 2000
MAX_DRAWN = 1 << 21  # samples in memory at once
T = TypeVar("T")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run, in the order measured. stable: whether the medians of the last windows agreed.

    warm_up: runs before the first sample. wall_s: seconds that all samples took, where several ran at the same time.
    """

    samples: tuple[float, ...]
    warm_up: int
    stable: bool
    wall_s: float | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.samples, q))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bootstrap confidence interval of the median."""
        return median_interval(self.samples, confidence)

    def summary(self) -> dict[str, float]:
        """mean, std, min, max and the percentiles, in milliseconds."""
        values = np.asarray(self.samples)
        spread = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
        return {
            **{f"p{q}": round(self.percentile(q), 4) for q in PERCENTILES},
            **{name: round(float(value), 4) for name, value in spread.items()},
        }


def measure(
    run: Callable[[], object],
    *,
    streams: int = 1,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time `run` in windows of at least 25 runs until the medians of three in a row agree within 5 %, or `limit_s`.

    Warmed up before, for half a second and at least three runs, at most a fifth of the limit. streams: threads that
    call `run` at the same time; the samples of a window are those of all of them, thread by thread.
    """
    with ThreadPoolExecutor(streams) as pool:

        def in_each(part: Callable[[], T]) -> list[T]:
            return [part()] if streams == 1 else [one.result() for one in [pool.submit(part) for _ in range(streams)]]

        warm_up = sum(in_each(lambda: _warm_up(run, clock, limit_s)))
        samples: list[float] = []
        medians: list[float] = []
        stable, start = False, clock()
        while not stable and clock() - start < limit_s:
            window = list(chain(*in_each(lambda: _window(run, clock, start + limit_s))))
            samples += window
            medians.append(float(np.median(window)))
            stable = len(medians) >= WINDOWS and agree(medians[-WINDOWS:])
        return Latency(tuple(samples), warm_up, stable, clock() - start if streams > 1 else None)


def _warm_up(run: Callable[[], object], clock: Callable[[], float], limit_s: float) -> int:
    """How many runs it took."""
    runs, start = 0, clock()
    while runs < 3 or clock() - start < min(WARM_UP_S, limit_s / 5):
        run()
        runs += 1
    return runs


def _window(run: Callable[[], object], clock: Callable[[], float], until: float) -> list[float]:
    """Milliseconds of one window's runs; at least one, and none begun after `until`."""
    times: list[float] = []
    begun = clock()
    while not times or (clock() < until and (len(times) < WINDOW or clock() - begun < WINDOW_S)):
        start = clock()
        run()
        times.append((clock() - start) * 1e3)
    return times


def agree(medians: Sequence[float]) -> bool:
    """Whether all lie within 5 % of the smallest."""
    return max(medians) <= min(medians) * (1 + AGREE)


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval of the median, over blocks of sqrt(n) neighbours.

    Runs one after the other are alike (clocks, other work), so single runs would promise too narrow an interval; see
    Künsch, The Jackknife and the Bootstrap for General Stationary Observations, 1989.
    """
    values = np.asarray(samples)
    length = round(len(values) ** 0.5)
    starts = np.random.default_rng(0).integers(0, len(values) - length + 1, (RESAMPLES, -(-len(values) // length)))
    at_once = max(1, MAX_DRAWN // len(values))  # all at once would be gigabytes after a minute of short runs
    parts = (starts[i : i + at_once, :, None] + np.arange(length) for i in range(0, RESAMPLES, at_once))
    medians = np.concatenate([np.median(values[part].reshape(len(part), -1), axis=1) for part in parts])
    low, high = np.percentile(medians, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def differ(one: Latency, other: Latency) -> bool:
    """Whether the confidence intervals of the medians do not overlap: what is called a difference here."""
    return apart(one.interval(), other.interval())


def apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two intervals (low, high) do not overlap."""
    return one[1] < other[0] or other[1] < one[0]


def throughput(latency: Latency, batch: int) -> float:
    """Images a second."""
    return batch * len(latency.samples) / (latency.wall_s or sum(latency.samples) / 1e3)
