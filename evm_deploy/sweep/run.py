"""Run the units of a sweep on an engine: what is done is kept, each unit starts as soon as what it needs is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from evm_deploy._util.text import count_text
from evm_deploy.bench.record import Record
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.sweep.boards import HERE
from evm_deploy.sweep.engine import Engine, Job
from evm_deploy.sweep.folder import JUDGED, PLAN, ROWS, RunFolder
from evm_deploy.sweep.packed import read_rows
from evm_deploy.sweep.plan import SweepPlan
from evm_deploy.sweep.shards import ShardRows, accuracy
from evm_deploy.sweep.units import (
    ExportUnit,
    MeasurementUnit,
    PartUnit,
    Subject,
    Unit,
    do,
    evaluation_units,
    with_references,
)
from evm_deploy.tasks import get_task

KEPT, DONE, FAILED, WAITING = "kept", "done", "failed", "not run"


@dataclass(frozen=True)
class UnitOutcome:
    """Unit with its state: `kept` from an earlier run, `done` by this one, `failed`, or `not run`.

    error: of a unit that failed now or in an earlier run; of a unit that was not run, if one that it needs has failed;
    of an export whose bundle cannot be evaluated on the images.
    """

    unit: Unit
    state: str
    result: dict[str, Any] = field(default_factory=dict)
    error: EvmError | None = None


Report = Callable[[UnitOutcome, int, int], None]  # a unit, the number of units that have ended, and of all


def no_report(outcome: UnitOutcome, ended: int, total: int) -> None:
    """Report nothing."""


class SweepRun:
    """Run of a sweep in its folder, which the caller has locked. only: key, or begin of keys, of the units to do.

    retry_failed: do units again that failed in an earlier run. Raises UsageError if `only` fits no unit.
    """

    def __init__(
        self, plan: SweepPlan, folder: RunFolder, *, only: str | None = None, retry_failed: bool = False
    ) -> None:
        self.plan, self.folder, self.only = plan, folder, only
        planned: list[Unit] = [*plan.exports, *plan.measurements]
        self.units = {each.key: each for each in planned}
        self.outcomes: dict[str, UnitOutcome] = {}
        self._wanted: set[str] = set()
        self._pending: list[Unit] = []
        self._started: dict[str, Unit] = {}
        self._parts: dict[str, list[PartUnit]] = {}  # by key of the subject that they evaluate
        for subject in plan.subjects:
            if all(map(folder.done, subject.made_by)):
                self._add_evaluation(subject)
        if retry_failed:
            folder.forget_failures(list(self.units))
        self._look(self.units.values())
        if only and not self._wanted:
            raise UsageError(f"--only {only}: no unit has a key that begins so", "--dry-run lists the keys")

    def add(self, units: Iterable[Unit], retry_failed: bool = False) -> None:
        """Add units that the plan does not have, for the next `run`."""
        added = {each.key: each for each in units}
        if retry_failed:
            self.folder.forget_failures([key for key in added if key not in self.outcomes])
        self.units.update(added)
        self._look(added.values())

    def _look(self, units: Iterable[Unit]) -> None:
        """Note which units are wanted, and which of them are done or have failed in an earlier run."""
        for unit in list(units):
            if not self.only or unit.key.startswith(self.only):
                self._wanted |= {unit.key, *unit.after}
        for key in self._wanted - self.outcomes.keys():
            if facts := self.folder.done(key):
                self.outcomes[key] = UnitOutcome(self.units[key], KEPT, facts["result"])
            elif error := self.folder.failure(key):
                self.outcomes[key] = UnitOutcome(self.units[key], FAILED, error=error)

    def _add_evaluation(self, subject: Subject) -> list[PartUnit]:
        """Add the evaluation of a subject that is there, and return its units. Raises EvmError for unfit images."""
        if not self.plan.val or subject.own_labels:
            return []
        units = evaluation_units(subject, subject.labelled(self.folder, self.plan.val).parts())
        self._parts[subject.key] = units
        added = with_references(units)
        self.units.update({each.key: each for each in added})
        return added

    @property
    def missing(self) -> list[Unit]:
        """Units to do, in order."""
        return [unit for key, unit in self.units.items() if key in self._wanted and key not in self.outcomes]

    def write_plan(self) -> None:
        """Write the units of the sweep into its folder, for `status` and reports. Raises OSError."""
        kinds = ("key", "kind", "title", "after")
        planned = [{name: getattr(unit, name) for name in kinds} for unit in self.units.values()]
        self.folder.write(PLAN, [{**each, "after": list(each["after"])} for each in planned])

    def run(self, engine: Engine, report: Report = no_report) -> list[UnitOutcome]:
        """Do all units that are missing; one that fails stops no other. Returns the outcome of every wanted unit."""
        self.write_plan()
        started = self._started = {}
        self._pending = self.missing
        while True:
            waiting: list[Unit] = []
            for unit in self._pending:
                needs = [self.outcomes.get(key) for key in unit.after]
                broken = next((each for each in needs if each and each.state in (FAILED, WAITING)), None)
                if broken:
                    error = EvmError(f"not run, because this failed: {broken.unit.kind} {broken.unit.title}")
                    self._end(UnitOutcome(unit, WAITING, error=error), report)
                elif all(needs):
                    try:
                        engine.start(
                            Job(unit.key, partial(do, unit, self.folder), "" if unit.board == HERE else unit.board)
                        )
                        started[unit.key] = unit
                    except EvmError as error:
                        self._ended(unit, error, report)
                else:
                    waiting.append(unit)
            self._pending = waiting
            if not started:
                break
            job, result = engine.next()
            self._ended(started.pop(job.name), result, report)
        self._conclude()
        self.folder.tidy()
        return list(self.outcomes.values())

    def _ended(self, unit: Unit, result: Any, report: Report) -> None:
        """Note the end of a unit, and add what follows from it."""
        if not isinstance(result, EvmError) and isinstance(unit, ExportUnit):
            try:
                if added := self._add_evaluation(unit):
                    self._look(added)
                    known = {each.key for each in self._pending} | self.outcomes.keys() | self._started.keys()
                    self._pending += [each for each in added if each.key in self._wanted - known]
                    self.write_plan()
            except EvmError as error:  # the bundle is there, and measured
                self._end(UnitOutcome(unit, DONE, result, error), report)
                return
        if isinstance(result, EvmError):
            self.folder.fail(unit.key, unit.title, result)
            self._end(UnitOutcome(unit, FAILED, error=result), report)
        else:
            self._end(UnitOutcome(unit, DONE, result), report)

    def _end(self, outcome: UnitOutcome, report: Report) -> None:
        self.outcomes[outcome.unit.key] = outcome
        report(outcome, len(self.outcomes), len(self._wanted))

    def _conclude(self) -> None:
        """Write the accuracy of each subject whose shards are all done, also into its records."""
        for subject in self.plan.subjects:
            units = self._parts.get(subject.key, [])
            if any(self.folder.done(key) is None for key in (*subject.made_by, *(each.key for each in units))):
                continue
            try:
                if units:
                    self.conclude(subject, units, str(self.plan.val))
                else:
                    self._write_accuracy(subject, subject.accuracy(self.folder))
            except EvmError as error:
                for key in self.outcomes.keys() & (subject.made_by or {each.key for each in units}):
                    self.outcomes[key] = replace(self.outcomes[key], state=FAILED, error=error)

    def conclude(self, subject: Subject, units: Sequence[PartUnit], val: str) -> None:
        """Write the accuracy of a subject whose shards are all done, also into its records.

        Raises CalibrationError for too many unreadable images.
        """
        parts = [self.rows(each) for each in units]
        task, limit = subject.task(self.folder)
        judged = replace(accuracy(parts, get_task(task), val), limit=limit)
        images = parts[0].digest if len(parts) == 1 else _digest_of([each.digest for each in parts])
        self._write_accuracy(subject, {**judged.as_dict(), "images_sha256": images})

    def _write_accuracy(self, subject: Subject, found: dict[str, Any] | None) -> None:
        """Write the accuracy of a subject, None for none, into the folder and the subject's records."""
        if found:
            self.folder.write(f"{JUDGED}/{subject.key}.json", found)
        for unit in self.units.values():
            facts = self.folder.done(unit.key) if isinstance(unit, MeasurementUnit) else None
            if facts and isinstance(unit, MeasurementUnit) and unit.subject == subject:
                path = self.folder.path / facts["result"]["record"]
                record = Record.read(path)
                if record.bundle.get("accuracy") != found:
                    replace(record, bundle={**record.bundle, "accuracy": found}).write(path)

    def error_of(self, subject: Subject) -> EvmError | None:
        """Return the error of the first unit of a subject that has failed, None if none has."""
        measured = [each for each in self.plan.measurements if each.subject == subject]
        units: list[Unit] = [*with_references(self._parts.get(subject.key, [])), *measured]
        ended = (self.outcomes.get(key) for key in (*subject.made_by, *(each.key for each in units)))
        return next((each.error for each in ended if each and each.error), None)

    def rows(self, unit: PartUnit) -> ShardRows:
        """Return the rows of a shard that is done."""
        return read_rows(self.folder.path / ROWS / f"{unit.key}.npz")


def _digest_of(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def counts(outcomes: Iterable[UnitOutcome]) -> str:
    """Format the number of units by state: `17 units: 12 done, 4 kept, 1 failed`."""
    states = [each.state for each in outcomes]
    parts = [f"{states.count(state)} {state}" for state in (DONE, KEPT, FAILED, WAITING) if state in states]
    return f"{count_text(len(states), 'unit')}: {', '.join(parts) or 'nothing to do'}"
