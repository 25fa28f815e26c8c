"""State of a sweep, read from its folder: how much of it is done, what failed and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from evm_deploy.errors import EvmError
from evm_deploy.sweep.folder import RunFolder

STATES = ("done", "failed", "to do")


@dataclass(frozen=True)
class Status:
    """State of a sweep. counts: number of units by kind and state. failed: title and error of each failed unit."""

    counts: dict[str, Counter[str]]
    failed: list[tuple[str, EvmError]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        counts = {kind: {state: found[state] for state in STATES} for kind, found in self.counts.items()}
        return {"units": counts, "failed": [{"unit": title, "error": str(error)} for title, error in self.failed]}

    def lines(self) -> list[str]:
        """Return one line for each kind, and the failures."""
        rows = [
            f"{kind:<9} " + ", ".join(f"{found[state]} {state}" for state in STATES)
            for kind, found in self.counts.items()
        ]
        return [*rows, *(f"{title}: {error}" for title, error in self.failed)]


def status(folder: RunFolder) -> Status:
    """Read the state of a sweep. Raises UsageError for a folder that is not one's."""
    counts: dict[str, Counter[str]] = {}
    failed = []
    for unit in folder.units():
        error = None if folder.done(unit["key"]) else folder.failure(unit["key"])
        state = "failed" if error else "done" if folder.done(unit["key"]) else "to do"
        counts.setdefault(unit["kind"], Counter())[state] += 1
        if error:
            failed.append((f"{unit['kind']} {unit['title']}", error))
    return Status(counts, failed)
