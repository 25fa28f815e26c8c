"""Engines: run jobs on this machine, or on the machines of a cluster, each board one job at a time."""

from __future__ import annotations

import errno
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from evm_deploy._util.cores import usable_cores
from evm_deploy.errors import EvmError
from evm_deploy.sweep.boards import HERE, Boards

TRIES = 3  # of a job that ends with anything but an EvmError
FULL = (errno.ENOSPC, errno.EDQUOT)


class CrashError(EvmError):
    """Job that ended with an unexpected error, or whose process died, in every try."""

    exit_code = 1


@dataclass(frozen=True)
class Place:
    """Place of a job: the boards that its host reaches, and the number of cores that it may keep busy."""

    boards: Boards
    cores: int


@dataclass(frozen=True)
class Job:
    """Work of an engine.

    `call(place)`: makes the result; plain data and functions of modules, so that another process can call it. board:
    name or class of the board that it needs; empty for none.
    """

    name: str
    call: Callable[[Place], Any]
    board: str = ""


class Engine(Protocol):
    """Runs jobs, in any order and number at a time."""

    def require(self, board: str) -> None:
        """Raise EvmError unless a host offers a board of this name or class."""
        ...

    def start(self, job: Job) -> None:
        """Begin a job, now or as soon as there is room. Raises EvmError for a board that nobody offers."""
        ...

    def next(self) -> tuple[Job, Any]:
        """Wait for any started job to end. Returns the job and its result, or the EvmError that it failed with."""
        ...

    def close(self) -> None:
        """Drop the jobs that have not ended."""
        ...


def attempted(job: Job, place: Place) -> Any:
    """Return the result of a job, or the EvmError that it raised: what is wrong now is wrong again in the next try."""
    try:
        return job.call(place)
    except EvmError as error:
        return error
    except OSError as error:
        if error.errno not in FULL:
            raise
        message = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        return EvmError(message, "free space on that disk, then run it again")


def retried(job: Job, place: Place) -> Any:
    """Return the result of `attempted`, after up to TRIES tries, or a CrashError."""
    for left in reversed(range(TRIES)):
        try:
            return attempted(job, place)
        except Exception as error:
            if not left:
                return crash(error)
    raise AssertionError


def crash(error: BaseException) -> CrashError:
    """Return the CrashError of a job that has failed with `error` in every try."""
    return CrashError(f"failed {TRIES} times: {type(error).__name__}: {error}", "run it alone with -v, and report it")


class LocalEngine:
    """Engine of this process: jobs run in the order of their start, those of each board beside them in its own thread.

    boards: that jobs may name.
    """

    def __init__(self, boards: Boards | None = None) -> None:
        self._place = Place(boards or Boards(), usable_cores())
        self._here: deque[Job] = deque()
        self._ended: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
        self._pools: dict[str, ThreadPoolExecutor] = {}

    def require(self, board: str) -> None:
        """Raise UsageError unless there is a board of this name or class; `here` always is."""
        if board != HERE:
            self._place.boards.known(board)

    def start(self, job: Job) -> None:
        """Begin a job. Raises UsageError for an unknown board."""
        if not job.board:
            self._here.append(job)
            return
        if job.board not in self._pools:
            self._pools[job.board] = ThreadPoolExecutor(len(self._place.boards.known(job.board)))
        self._pools[job.board].submit(lambda: self._ended.put((job, retried(job, self._place))))

    def next(self) -> tuple[Job, Any]:
        """Return a job that has ended, after running the next one that needs no board."""
        if self._here and self._ended.empty():
            job = self._here.popleft()
            return job, retried(job, self._place)
        return self._ended.get()

    def close(self) -> None:
        """Wait for the boards that measure now, and drop all other jobs."""
        self._here.clear()
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
