"""Arguments and output of onnxruntime_perf_test, the benchmark program of ONNX Runtime.

Source: onnxruntime/test/perftest in ONNX Runtime. `-I` generates inputs, `-m duration -t` runs for that many seconds,
`-x` sets intra-op threads, `-f` sets a free dimension, `-R` registers a custom-op library. The program runs the model
once before it measures. It prints `Session creation time cost: 0.05 s` and `First inference time cost: 12 ms`, and
appends one line for each run to the result file: model, seconds, peak working set in bytes, CPU usage, number.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass

from evm_deploy.bench.latency import WARM_UP_S, WINDOW, WINDOW_S, WINDOWS, Latency, agree
from evm_deploy.errors import ToolchainError

NAME = "onnxruntime_perf_test"  # value of RuntimeInfo.phone
HUGE_S = 1e6  # a run of this many seconds is refused as invalid
RESULT = "result.csv"


@dataclass(frozen=True)
class Measured:
    """Results of one run of the program.

    load_ms: creation of the session, in a new process. first_ms: first inference, in whole ms. peak_mb: peak resident
    memory in MB (2**20 bytes).
    """

    latency: Latency
    load_ms: float
    first_ms: float
    peak_mb: float


def arguments(model: str, seconds: int, threads: int | None, batch: int | None, library: str | None) -> list[str]:
    """Return the program's arguments. batch: value of the free dimension, None for a model with a fixed batch."""
    return [
        *("-I", "-e", "cpu", "-m", "duration", "-t", str(seconds), "-x", str(threads or 0)),
        *(("-f", f"batch:{batch}") if batch else ()),
        *(("-R", library) if library else ()),
        *(model, RESULT),
    ]


def read(printed: str, result: str) -> Measured:
    """Parse the program's output and result file. Raises ToolchainError if they are not in its format."""
    load = re.search(r"Session creation time cost: *([\d.e+-]+) s", printed)
    first = re.search(r"First inference time cost: *([\d.e+-]+) ms", printed)
    rows = [row for row in csv.reader(result.splitlines()) if len(row) == 5]
    try:
        seconds = [float(row[-4]) for row in rows]
        peak = max(int(row[-3]) for row in rows)
        if not (load and first) or not all(0 < value < HUGE_S for value in seconds):
            raise ValueError("no load time, or no runs")
        load_ms, first_ms = float(load[1]) * 1e3, float(first[1])
    except ValueError as error:
        raise ToolchainError(
            f"the runner's output is not that of onnxruntime_perf_test: {error}",
            "use onnxruntime_perf_test from ONNX Runtime's build",
        ) from error
    return Measured(settled([value * 1e3 for value in seconds]), load_ms, first_ms, peak / (1 << 20))


def settled(times_ms: Sequence[float]) -> Latency:
    """Split the runs into warm-up and samples, and test whether the samples are stable, as `latency.measure` does.

    The warm-up lasts as long as in `latency.measure`, at most a fifth of the whole time.
    """
    limit, warm_up, spent = min(WARM_UP_S * 1e3, sum(times_ms) / 5), 0, 0.0
    while warm_up < len(times_ms) - 1 and spent + times_ms[warm_up] <= limit:
        spent += times_ms[warm_up]
        warm_up += 1
    samples = times_ms[warm_up:]
    medians: list[float] = []
    window: list[float] = []
    for time in reversed(samples):
        window.append(time)
        if len(window) >= WINDOW and sum(window) >= WINDOW_S * 1e3:
            medians.append(sorted(window)[len(window) // 2])
            window = []
    return Latency(tuple(samples), warm_up + 1, len(medians) >= WINDOWS and agree(medians[:WINDOWS]))
