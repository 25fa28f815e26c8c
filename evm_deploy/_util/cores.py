"""Processor of this machine, and the number of its cores that this process may use."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

from evm_deploy.errors import UsageError

MAX_THREADS = 64  # that any machine can bear
THREADS_PER_CORE = 4


def check_threads(threads: int | None, streams: int = 1) -> None:
    """Raise UsageError for more threads than this machine can bear: thousands bring it to a halt for minutes.

    threads: of one inference, None for the runtime's choice. streams: inferences at the same time.
    """
    most, cores = max(MAX_THREADS, THREADS_PER_CORE * (os.cpu_count() or 1)), usable_cores()
    if (threads or 1) * streams > most:
        raise UsageError(
            f"threads {threads or 'auto'} with streams {streams} is more than this machine can bear: it has "
            f"{cores} {'core' if cores == 1 else 'cores'}",
            f"use at most {most} in all; more than one thread for each core is seldom faster",
        )


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Return the processor's name, such as `AMD EPYC 9654`; its architecture on systems that do not name it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
