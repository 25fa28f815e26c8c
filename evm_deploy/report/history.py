"""History of records in one SQLite file.

SQLite uses its rollback journal, not WAL: the history is one file that can be copied and works on network disks.
Reports write rarely.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from evm_deploy._util.packages import upgrade_hint
from evm_deploy._util.schema import lenient_json, strict_json
from evm_deploy._util.text import command
from evm_deploy.bench.record import Record
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.report.candidate import Candidate
from evm_deploy.report.collect import identity
from evm_deploy.report.compare import Pair

APPLICATION_ID = 0x45564D44  # "EVMD": marks files of evm-deploy
VERSION = 1
WAIT_S = 30.0
SCHEMA = """CREATE TABLE records (
  digest TEXT PRIMARY KEY, date TEXT NOT NULL, model TEXT NOT NULL, target TEXT NOT NULL, content TEXT NOT NULL
)"""


def append(db: Path, records: Iterable[Record]) -> int:
    """Add records to the history in one transaction and return the number of new ones; duplicates are skipped.

    Creates the file if it does not exist. Raises UsageError if the file cannot be used.
    """
    rows = []
    for record in records:
        content = strict_json(asdict(record), sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        rows.append((digest, record.date, record.bundle["model"], record.bundle["target"], content))
    with _opened(db, create=True) as connection:
        before = connection.total_changes
        connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING", rows)
        return connection.total_changes - before


def read(
    db: Path, model: str | None = None, target: str | None = None, damaged: list[EvmError] | None = None
) -> list[Record]:
    """Return the records by date, only those of `model` and `target` if given. Raises UsageError.

    damaged: if given, the errors of rows that cannot be read are added to it, and the other rows are returned.
    """
    with _opened(db, create=False) as connection:
        rows = connection.execute(
            "SELECT digest, content FROM records WHERE model = coalesce(?, model) AND target = coalesce(?, target) "
            "ORDER BY date, rowid",
            (model, target),
        ).fetchall()
    found = []
    for digest, content in rows:
        try:
            found.append(_parsed(db, digest, content))
        except UsageError as error:
            if damaged is None:
                raise
            damaged.append(error)
    return found


def courses(records: Iterable[Record], last: int | None = None) -> list[list[Candidate]]:
    """Group the measurements by bundle, setting and device, in the order given; keep the `last` of each group."""
    found: dict[tuple[object, ...], list[Candidate]] = {}
    for record in records:
        found.setdefault(identity(record), []).append(Candidate.of_record(record))
    return [course[-last if last else 0 :] for course in found.values()]


def steps(course: list[Candidate]) -> list[Pair | None]:
    """Pair each measurement with the one before it; None for the first one."""
    return [None, *(Pair(old, new) for old, new in pairwise(course))]


def as_dicts(course: list[Candidate]) -> list[dict[str, Any]]:
    """Return plain data of one course, as `--history --json` prints it."""
    return [
        {
            "date": each.record.date if each.record else None,
            "name": each.name,
            "settings": str(each.conditions),
            "p50_ms": each.p50,
            "interval_ms": each.interval,
            "stable": each.stable,
            "change": change.as_dict() if change else None,
        }
        for each, change in zip(course, steps(course), strict=True)
    ]


@contextlib.contextmanager
def _opened(db: Path, create: bool) -> Iterator[sqlite3.Connection]:
    """Context manager: one transaction, committed at the end of the block. Raises UsageError that names the file."""
    if not create and not db.is_file():
        raise UsageError(f"{db} does not exist", f"to create it:  evm-report RECORD.. {command('--db', db)}")
    connection = None
    try:
        if create:
            db.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(db, timeout=WAIT_S, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE" if create else "BEGIN")
        _require_ours(db, connection, create)
        yield connection
        connection.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        raise UsageError(f"{db} cannot be used as a history: {error}", "choose another --db") from error
    finally:
        if connection:
            connection.close()  # rolls an uncommitted transaction back


def _require_ours(db: Path, connection: sqlite3.Connection, create: bool) -> None:
    """Raise UsageError unless the file is a history of this version; with `create`, set an empty file up."""
    (application,), (version,), (tables,) = (
        connection.execute(query).fetchone()
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if create and (application, version, tables) == (0, 0, 0):
        connection.execute(SCHEMA)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    elif application != APPLICATION_ID:
        raise UsageError(f"{db} is a database of another program", "choose another --db")
    elif version != VERSION:
        raise UsageError(
            f"{db} is a history of version {version}, but this evm-deploy reads version {VERSION}", upgrade_hint()
        )


def _parsed(db: Path, digest: str, content: str) -> Record:
    """Parse one row of the database. Raises UsageError that names file and row."""
    try:
        return Record.parse(lenient_json(content), f"{db}, row {digest[:12]}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{db}, row {digest[:12]} is damaged: {error}") from error
