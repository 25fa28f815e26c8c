"""Time one function until its median is stable, and compute statistics of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np

WINDOW = 25  # smallest number of runs in a window
WINDOW_S = 0.2  # shortest duration of a window
WINDOWS = 3  # successive windows whose medians must agree
AGREE = 0.05  # largest relative difference of medians that agree
LIMIT_S = 60.0
WARM_UP_S = 0.5
PERCENTILES = (50, 90, 95, 99)
RESAMPLES = 2000  # of the bootstrap
MAX_DRAWN = 1 << 21  # bootstrap samples in memory at once
T = TypeVar("T")


@dataclass(frozen=True)
class Latency:
    """Latency samples of one measurement, in ms and in the order measured.

    warm_up: number of runs before the first sample. stable: whether the medians of the last windows agreed.
    wall_s: wall time of all samples in seconds, if several streams ran at the same time.
    """

    samples: tuple[float, ...]
    warm_up: int
    stable: bool
    wall_s: float | None = None

    @property
    def median(self) -> float:
        """Median latency in ms."""
        return float(np.median(self.samples))

    def percentile(self, q: float) -> float:
        """Return the latency in ms that `q` percent of the samples do not exceed."""
        return float(np.percentile(self.samples, q))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the bootstrap confidence interval of the median, (low, high) in ms."""
        return median_interval(self.samples, confidence)

    def summary(self) -> dict[str, float]:
        """Return mean, std, min, max and the percentiles p50 to p99, in ms."""
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
    """Time `run` in windows until the medians of three successive windows agree within 5 %, or until `limit_s`.

    A window has at least 25 runs and lasts at least 0.2 s. Warm-up before the first window: at least three runs and
    half a second, or a fifth of `limit_s` if that is shorter. streams: number of threads that call `run` at the same
    time; a window holds the samples of all threads, thread by thread. clock: returns seconds.
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
    """Warm `run` up and return the number of runs."""
    runs, start = 0, clock()
    while runs < 3 or clock() - start < min(WARM_UP_S, limit_s / 5):
        run()
        runs += 1
    return runs


def _window(run: Callable[[], object], clock: Callable[[], float], until: float) -> list[float]:
    """Time the runs of one window and return their times in ms: at least one run, and no run starts after `until`."""
    times: list[float] = []
    begun = clock()
    while not times or (clock() < until and (len(times) < WINDOW or clock() - begun < WINDOW_S)):
        start = clock()
        run()
        times.append((clock() - start) * 1e3)
    return times


def agree(medians: Sequence[float]) -> bool:
    """Test whether all medians lie within 5 % of the smallest one."""
    return max(medians) <= min(medians) * (1 + AGREE)


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of the median, (low, high), by a block bootstrap with blocks of sqrt(n) samples.

    Successive runs are correlated through clock changes and other work, so a bootstrap over single runs would give too
    narrow an interval. See Künsch, The Jackknife and the Bootstrap for General Stationary Observations, 1989.
    """
    values = np.asarray(samples)
    length = round(len(values) ** 0.5)
    starts = np.random.default_rng(0).integers(0, len(values) - length + 1, (RESAMPLES, -(-len(values) // length)))
    at_once = max(1, MAX_DRAWN // len(values))  # all resamples of a minute of short runs would take gigabytes
    parts = (starts[i : i + at_once, :, None] + np.arange(length) for i in range(0, RESAMPLES, at_once))
    medians = np.concatenate([np.median(values[part].reshape(len(part), -1), axis=1) for part in parts])
    low, high = np.percentile(medians, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def differ(one: Latency, other: Latency) -> bool:
    """Test whether two latencies differ: the confidence intervals of their medians do not overlap."""
    return apart(one.interval(), other.interval())


def apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Test whether two intervals (low, high) do not overlap."""
    return one[1] < other[0] or other[1] < one[0]


def throughput(latency: Latency, batch: int) -> float:
    """Return the throughput in images per second. batch: images per run."""
    return batch * len(latency.samples) / (latency.wall_s or sum(latency.samples) / 1e3)
