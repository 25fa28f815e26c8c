"""Fleet files (`--devices fleet.toml`): boards, how to reach them, and what to measure on each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from evm_deploy._util.toml import checked, read_toml
from evm_deploy.bench.remote.hosts import HostOptions
from evm_deploy.bench.sweep import Sweep
from evm_deploy.errors import UsageError

HOST_KEYS = ("host", "adb", "device", "ssh", "python", "runner")
KEYS: Mapping[str, type] = {"name": str, "threads": int, "batch": int, "scan": str, **dict.fromkeys(HOST_KEYS, str)}


@dataclass(frozen=True)
class FleetMember:
    """Board of a fleet file (a `[[board]]` table): its name, how to reach it, and what to measure on it."""

    name: str
    options: HostOptions
    sweep: Sweep


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
