"""Boards that this host reaches: those of a fleet file, and `here`, this host itself."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from evm_deploy._util.progress import silent
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.remote.fleet import FleetMember, read_fleet
from evm_deploy.bench.remote.hosts import HostOptions, opened
from evm_deploy.bench.run import bench
from evm_deploy.bench.sweep import Sweep
from evm_deploy.errors import UsageError
from evm_deploy.sweep.locks import alone, held

HERE = "here"
FLEET = "EVM_FLEET"  # variable with the fleet file of a worker
PAUSE_S = 0.5  # between two looks for a free board


class Boards:
    """Boards of a fleet, by name, and by class: the name of their device profile."""

    def __init__(self, members: Sequence[FleetMember] = ()) -> None:
        self.members = tuple(members)

    @classmethod
    def of(cls, path: str | Path | None) -> Boards:
        """Return the boards of a fleet file, none without a file. Raises UsageError."""
        if path is None:
            return cls()
        options = HostOptions(ssh=os.environ.get("EVM_SSH") or "ssh")
        boards = cls(read_fleet(Path(path), options, Sweep([], [None], [None], [1], Settings(), Path())))
        for board in boards.members:
            if board.name == HERE or any(board.name == other.options.device for other in boards.members):
                raise UsageError(
                    f"--devices {path}: the name {board.name!r} is also a class of boards, or this machine",
                    "give the board another name",
                )
        return boards

    def known(self, board: str) -> list[FleetMember]:
        """Return the boards with this name or class. Raises UsageError if there are none."""
        found = [each for each in self.members if board in (each.name, each.options.device)]
        if not found:
            names = sorted({name for each in self.members for name in (each.name, each.options.device) if name})
            raise UsageError(
                f"no board of this host has the name or class {board!r}; it has: {', '.join([HERE, *names])}",
                "list the board in the file of --devices",
            )
        return found

    def measured(self, board: str, bundle: Path, settings: Settings) -> Record:
        """Measure a bundle on a board that is free, or this host, with nothing of evm-deploy beside it.

        Raises EvmError, also if a board cannot be reached.
        """
        if board == HERE:
            with alone():
                return bench(bundle, settings)
        with self.taken(self.known(board)) as member:
            theirs = member.sweep
            settings = replace(
                settings,
                threads=settings.threads or theirs.threads[0],
                batch=settings.batch or theirs.batches[0],
                scan=settings.scan if settings.scan != "auto" else theirs.settings.scan,
            )
            with opened(member.options, silent) as host:
                host.prepare(bundle, settings)
                return host(bundle, settings)

    @contextlib.contextmanager
    def taken(self, members: Sequence[FleetMember]) -> Iterator[FleetMember]:
        """Context manager: wait for a free one of these boards, and have it alone. Yields the board."""
        while True:
            for member in members:
                address = member.options.host or member.options.adb
                if not address:
                    with alone():
                        yield member
                    return
                with held(f"board-{address}", wait=False) as free:
                    if free:
                        yield member
                        return
            time.sleep(PAUSE_S)


def boards_here() -> Boards:
    """Return the boards of this worker: those of the fleet file in the variable EVM_FLEET. Raises UsageError."""
    return Boards.of(os.environ.get(FLEET))
