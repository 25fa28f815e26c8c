"""Measurement on the boards of a fleet file at the same time (`evm-bench --devices`), as jobs of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evm_deploy._util.progress import Progress, Step
from evm_deploy.bench.record import Record
from evm_deploy.bench.remote.fleet import FleetMember
from evm_deploy.bench.remote.hosts import opened
from evm_deploy.errors import EvmError
from evm_deploy.sweep.boards import Boards
from evm_deploy.sweep.engine import Job, LocalEngine, Place


@dataclass(frozen=True)
class HostOutcome:
    """Result of one board. found: records and their paths. error: failure that ended the measurements, or None."""

    name: str
    found: Sequence[tuple[Record, Path]]
    error: EvmError | None


def run_fleet(members: Sequence[FleetMember], step: Step) -> list[HostOutcome]:
    """Measure on all boards at the same time and return their results in order. A board that fails stops no other."""
    engine = LocalEngine(Boards(members))
    for member in members:
        engine.start(Job(member.name, partial(_measured, member, named(step, member.name)), member.name))
    results = {job.name: result for job, result in (engine.next() for _ in members)}
    engine.close()
    return [
        HostOutcome(name, (), result) if isinstance(result, EvmError) else result
        for name, result in ((member.name, results[member.name]) for member in members)
    ]


def _measured(member: FleetMember, step: Step, place: Place) -> HostOutcome:
    """Measure on one board; errors become part of the result."""
    found: list[tuple[Record, Path]] = []
    try:
        with place.boards.taken([member]), opened(member.options, step) as bench:
            found.extend(member.sweep.run(bench, step))
    except EvmError as error:
        return HostOutcome(member.name, found, error)
    except OSError as error:
        return HostOutcome(member.name, found, EvmError(f"{error.filename or member.name}: {error.strerror or error}"))
    return HostOutcome(member.name, found, None)


def named(step: Step, name: str) -> Step:
    """Return a step function that puts the board's name in front of the detail of each step."""

    def with_name(what: str, detail: str) -> AbstractContextManager[Progress]:
        return step(what, f"{name}: {detail}")

    return with_name


def table(outcomes: Sequence[HostOutcome]) -> list[str]:
    """Return the lines of a table: a heading, one line for each record, and one line for each board that failed."""
    rows = [("board", "bundle", "threads", "batch", "p50 ms", "95 %", "stable")]
    failed = []
    for outcome in outcomes:
        for record, _ in outcome.found:
            low, high = record.interval_ms
            settings = record.settings
            rows.append(
                (
                    outcome.name,
                    record.bundle["name"],
                    str(settings["threads"] or "auto"),
                    str(settings["batch"]),
                    f"{record.summary_ms['p50']:.3g}",
                    f"{low:.3g}-{high:.3g}",
                    "yes" if record.stable else "NO",
                )
            )
        if outcome.error:
            failed.append(f"{outcome.name}: FAILED: {outcome.error}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows] + (
        failed
    )
