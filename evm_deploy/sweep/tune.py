"""Search of the most accurate artifact within a budget: every trial is an export, a measurement and evaluations.

A trial ends as soon as its outcome is known: an artifact over its size is not measured, one over its latency or memory
is not evaluated, and one that is clearly behind the best is not evaluated on more images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evm_deploy.bench.record import Record
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.calib.evaluation import SHARD
from evm_deploy.data.sources import ImageItem
from evm_deploy.errors import EvmError
from evm_deploy.sweep.additive import Outcome
from evm_deploy.sweep.budget import Budget
from evm_deploy.sweep.engine import Engine
from evm_deploy.sweep.folder import RunFolder
from evm_deploy.sweep.plan import SweepPlan
from evm_deploy.sweep.run import SweepRun, UnitOutcome, no_report
from evm_deploy.sweep.search import Search
from evm_deploy.sweep.shards import accuracy
from evm_deploy.sweep.space import Choice
from evm_deploy.sweep.tuned import BEHIND, FAILED, FITS, OVER, Trial, Tuned, read_tuned
from evm_deploy.sweep.units import ExportUnit, MeasurementUnit, Unit, evaluation_units, with_references
from evm_deploy.tasks import get_task

FIRST = 100  # fewest images of the first rung
PARTS = 8  # share of all images on the first rung: one in so many
LATENCIES = ("p50", "p90", "p95", "p99")

Units = Callable[[Choice], tuple[ExportUnit, MeasurementUnit]]
TrialReport = Callable[[Trial, int], None]  # a trial, and its number from 1


@dataclass(frozen=True)
class Goal:
    """Aim of a search. of: digest of what is tuned on which images. val: labelled images. board: to measure on."""

    of: str
    budget: Budget
    board: str
    val: str


class Tuner:
    """Does trials in the folder of a sweep, which the caller has locked.

    units: returns export and measurement of a choice, or raises EvmError. retry_failed: do units again that failed in
    an earlier run.
    """

    def __init__(
        self, goal: Goal, units: Units, folder: RunFolder, engine: Engine, *, retry_failed: bool = False
    ) -> None:
        self.goal, self.folder = goal, folder
        self.errors: list[EvmError] = []
        self._units, self._engine, self._retry = units, engine, retry_failed
        self._run = SweepRun(SweepPlan((), (), None), folder)
        self._items: Sequence[ImageItem] = ()
        self._best: dict[int, float] = {}  # rungs of the best trial

    def search(self, search: Search, trials: int, report: TrialReport = lambda trial, number: None) -> Tuned:
        """Do the trials of earlier runs, whose units are kept, and new ones up to `trials` in all.

        The result is written after each trial. Raises EvmError for labelled images that do not fit the network.
        """
        found = Tuned(self.goal.of, self.goal.budget, self.goal.board, ())
        if read_tuned(self.folder) is None:
            found.write(self.folder)
        waiting = list(search.past)
        while waiting or len(found.trials) < trials:
            choice = waiting.pop(0) if waiting else search.next()
            if choice is None:
                break
            trial = self.trial(choice)
            search.tell(choice, self.outcome(trial))
            found = replace(found, trials=(*found.trials, trial))
            found.write(self.folder)
            report(trial, len(found.trials))
        return found

    def outcome(self, trial: Trial) -> Outcome:
        """Return what a search learns from a trial."""
        if trial.state == FAILED:
            return Outcome(None)
        return Outcome(self.goal.budget.shares(trial.figures), trial.figure)

    def trial(self, choice: Choice) -> Trial:
        """Do a trial; an EvmError of a unit makes it a failed one. Raises EvmError for unfit labelled images."""
        trial = Trial(str(choice), FAILED)
        try:
            export, measurement = self._units(choice)
            trial = replace(trial, bundle=str(self._done(export)["bundle"]))
            path = self.folder.path / trial.bundle
            size = Bundle(path, Manifest.read(path)).size_bytes / 1e6
            trial = replace(trial, figures={"size": size})
            if self.goal.budget.fits(trial.figures):
                record = Record.read(self.folder.path / self._done(measurement)["record"])
                latencies = {name: float(record.summary_ms[name]) for name in LATENCIES}
                memory = record.memory_mb.get("peak")
                known = {"memory": float(memory)} if memory is not None else {}
                trial = replace(trial, figures={**latencies, "size": size, **known})
                if missing := [name for name in self.goal.budget.metrics if name not in trial.figures]:
                    raise EvmError(f"{measurement.on} does not tell the {missing[0]}", "leave it out of --budget")
        except EvmError as error:
            return self._failed(trial, error)
        if not self.goal.budget.fits(trial.figures):
            return replace(trial, state=OVER)
        if not self._items:
            items = export.labelled(self.folder, self.goal.val).items
            order = np.random.default_rng(0).permutation(len(items))
            self._items = [items[place] for place in order]
        try:
            return self._evaluated(trial, export)
        except EvmError as error:
            return self._failed(trial, error)

    def _failed(self, trial: Trial, error: EvmError) -> Trial:
        self.errors.append(error)
        return replace(trial, state=FAILED, error=str(error))

    def _evaluated(self, trial: Trial, export: ExportUnit) -> Trial:
        """Evaluate a bundle on more and more images, as long as it is not behind the best. Raises EvmError."""
        cuts = parts_of(len(self._items))
        places = [cut for rung in cuts for cut in rung]
        units = evaluation_units(export, [tuple(self._items[start:end]) for start, end in places])
        task = get_task(export.task(self.folder)[0])
        for rung in cuts:
            images = rung[-1][1]
            begun = units[: places.index(rung[-1]) + 1]
            self._done(*with_references(begun))
            found = accuracy([self._run.rows(each) for each in begun], task, self.goal.val)
            figure = found.scores[found.metric]
            trial = replace(trial, rungs=(*trial.rungs, (images, figure)), metric=found.metric)
            best = self._best.get(images)
            if images < len(self._items) and best is not None and is_behind(figure, best, images):
                return replace(trial, state=BEHIND)
        self._run.conclude(export, units, self.goal.val)
        if figure > self._best.get(images, -1.0):
            self._best = dict(trial.rungs)
        return replace(trial, state=FITS)

    def _done(self, *units: Unit) -> dict[str, Any]:
        """Do units that are not done. Returns the result of the last. Raises the error of the first to fail."""
        self._run.add(units, self._retry)
        self._run.run(self._engine, no_report)
        outcomes: list[UnitOutcome] = [self._run.outcomes[each.key] for each in units]
        for each in outcomes:
            if each.error:
                raise each.error
        return outcomes[-1].result


def parts_of(count: int) -> list[list[tuple[int, int]]]:
    """Return the parts of `count` images as (start, end), by rung: each rung has twice the images of the one before."""
    rungs: list[list[tuple[int, int]]] = []
    start, end = 0, max(FIRST, math.ceil(count / PARTS))
    while start < count:
        end = min(end, count)
        rungs.append([(at, min(at + SHARD, end)) for at in range(start, end, SHARD)])
        start, end = end, 2 * end
    return rungs


def is_behind(figure: float, best: float, images: int) -> bool:
    """Test whether a figure is below the best on the same images by more than two standard errors of a share."""
    share = (best * images + 1) / (images + 2)  # a share of 1 on few images is not known to be 1
    return figure < best - 2 * math.sqrt(share * (1 - share) / images)
