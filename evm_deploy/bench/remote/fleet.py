"""Measurement on several boards at the same time (`--devices fleet.toml`). A board that fails does not stop others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from evm_deploy._util.progress import Progress, Step
from evm_deploy._util.toml import checked, read_toml
from evm_deploy.bench.record import Record
from evm_deploy.bench.remote.hosts import HostOptions, opened
from evm_deploy.bench.sweep import Sweep
from evm_deploy.errors import EvmError, UsageError

HOST_KEYS = ("host", "adb", "device", "ssh", "python", "runner")
KEYS: Mapping[str, type] = {"name": str, "threads": int, "batch": int, "scan": str, **dict.fromkeys(HOST_KEYS, str)}


@dataclass(frozen=True)
class FleetMember:
    """Board of a fleet file (a `[[board]]` table): its name, how to reach it, and what to measure on it."""

    name: str
    options: HostOptions
    sweep: Sweep


@dataclass(frozen=True)
class HostOutcome:
    """Result of one board. found: records and their paths. error: failure that ended the measurements, or None."""

    name: str
    found: Sequence[tuple[Record, Path]]
    error: EvmError | None


def read_fleet(path: Path, options: HostOptions, sweep: Sweep) -> list[FleetMember]:
    """Read the boards in the TOML file `path`. Keys that a board leaves out have the values of `options` and `sweep`.

    Raises UsageError that names the file and the board.
    """
    content = read_toml(path, "--devices")
    boards = content.get("board")
    if set(content) != {"board"} or not isinstance(boards, list) or not boards:
        raise UsageError(
            f"--devices {path}: the file must hold [[board]] tables and nothing else", "docs/remote.md has an example"
        )
    members = [_member(f"--devices {path}: board {i}", board, options, sweep) for i, board in enumerate(boards, 1)]
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--devices {path}: two boards are named {name!r}")
    return members


def _member(where: str, board: object, options: HostOptions, sweep: Sweep) -> FleetMember:
    """Check one `[[board]]` table and return its board. where: start of error messages. Raises UsageError."""
    if not isinstance(board, dict):
        raise UsageError(f"{where} is not a [[board]] table")
    values = checked(where, board, KEYS, required=("name",))
    name = values["name"]
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise UsageError(f"{where}: name {name!r} cannot be the name of a folder", "use letters, digits, - and _")
    for key in ("threads", "batch"):
        if values.get(key, 1) < 1:
            raise UsageError(f"{where}: {key} {values[key]}: use a number from 1")
    its_options = replace(options, **{key: values[key] for key in HOST_KEYS if key in values})
    its_sweep = replace(
        sweep,
        threads=(values["threads"],) if "threads" in values else sweep.threads,
        batches=(values["batch"],) if "batch" in values else sweep.batches,
        settings=replace(sweep.settings, scan=values.get("scan", sweep.settings.scan)),
        out=sweep.out / name,
    )
    return FleetMember(name, its_options, its_sweep)


def run_fleet(members: Sequence[FleetMember], step: Step) -> list[HostOutcome]:
    """Measure on all boards at the same time and return their results in order."""
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(lambda member: _run(member, named(step, member.name)), members))


def _run(member: FleetMember, step: Step) -> HostOutcome:
    """Measure on one board; errors become part of the result."""
    found: list[tuple[Record, Path]] = []
    try:
        with opened(member.options, step) as bench:
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
