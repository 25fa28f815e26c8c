"""Shared code of the benchmarks: interleaved rounds, ratios by round, and a line about the machine."""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "golden"))

PEERS = Path(__file__).resolve().parents[2] / "shared" / "benchmarks" / "peers"


def where() -> str:
    """Return date, machine and CPU, for the first line of every benchmark."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{datetime.date.today()}  {platform.machine()}  {cpu}, Python {platform.python_version()}"


def interleave(
    subjects: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Measure each subject `rounds` times, in milliseconds.

    The subjects run in turn, so that a change of the machine's speed affects all of them. An untimed run before each
    timed run fills the caches with the subject's own data. clock: gives seconds; time.thread_time for CPU time.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for i in range(warm_up + rounds):
        for name, run in subjects.items():
            run()
            start = clock()
            run()
            if i >= warm_up:
                times[name].append((clock() - start) * 1e3)
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> tuple[float, str]:
    """Return the median of the ratios `name` / `to` of each round, and a text with the median and the 10-90 % band."""
    ratios = sorted(a / b for a, b in zip(times[name], times[to], strict=True))
    median, tenth = statistics.median(ratios), len(ratios) // 10
    return median, f"{median:.2f}  (10-90 %: {ratios[tenth]:.2f}-{ratios[-tenth - 1]:.2f})"
