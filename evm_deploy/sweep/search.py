"""Search in a space by Optuna: proposes choices, learns their values. Optuna is imported here alone.

Optuna's journal file keeps what was proposed, so that the same search continues. Bundles and figures are those of the
units in the folder of the sweep.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evm_deploy._util.packages import install_hint
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.sweep.additive import Additive, Outcome
from evm_deploy.sweep.space import Choice, Space

SAMPLERS = ("additive", "tpe", "random")
REDRAWS = 3  # proposals of known choices after which an unknown one is drawn
STARTUP = 6  # trials before the proposals of TPE follow from their values


class Search:
    """Search in a space for the choice of the largest value; no choice is proposed twice.

    sampler: `additive` (`sweep.additive`), `tpe`, Optuna's, both after the space's starts, or `random`, which is
    uniform. name: of the search in its journal, a file, None for a search in memory. past: choices that were proposed
    before, in order. Raises ToolchainError without Optuna, UsageError for a damaged journal.
    """

    def __init__(
        self, space: Space, sampler: str, *, seed: int = 0, name: str = "", journal: Path | None = None
    ) -> None:
        try:
            import optuna
            from optuna.storages import InMemoryStorage, JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise ToolchainError("evm-tune needs Optuna, which is not installed", install_hint("tune")) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self._begun = space, [] if sampler == "random" else space.starts()
        self._model = Additive(space) if sampler == "additive" else None
        self._failed = optuna.trial.TrialState.FAIL
        self._seen: dict[Choice, int] = {}
        self._open: set[int] = set()
        try:
            storage = JournalStorage(JournalFileBackend(str(journal))) if journal else InMemoryStorage()
            self._study = optuna.create_study(
                storage=storage, study_name=name or None, direction="maximize", load_if_exists=True
            )
            for each in self._study.get_trials(deepcopy=False):
                self._recall(each)
        except (ValueError, KeyError, TypeError) as error:  # what its reader raises on other content
            raise UsageError(f"{journal} is damaged: {error}", "delete it: what is done is kept") from error
        seed += len(self._seen)  # a search that continues does not draw the same again
        self._random, self._redraws = random.Random(seed), REDRAWS if sampler == "tpe" else 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP, multivariate=True, group=True
            )
        self.past = list(self._seen)

    def _recall(self, trial: Any) -> None:
        """Note a trial of an earlier run; one that the run has not ended is open."""
        over = trial.state.is_finished()
        try:
            choice = self.space.draw(lambda name, _: str(trial.params[name]))
        except KeyError:  # interrupted while it was drawn
            if not over:
                self._study.tell(trial.number, state=self._failed)
            return
        if choice not in self._seen:
            self._seen[choice] = trial.number
            if not over:
                self._open.add(trial.number)
        elif not over:
            self._study.tell(trial.number, state=self._failed)

    def next(self) -> Choice | None:
        """Return a choice that was not proposed before, None if there is no other."""
        for each in self._begun:
            if each not in self._seen:
                return self._proposed(each.settings)
        rest = [each for each in self.space.all() if each not in self._seen]
        if not rest:
            return None
        if self._model:
            return self._proposed(self._model.best(rest).settings)
        for _ in range(self._redraws):
            if (choice := self._proposed()) is not None:
                return choice
        return self._proposed(self._random.choice(rest).settings)

    def _proposed(self, settings: Mapping[str, str] | None = None) -> Choice | None:
        """Return the choice with these settings, or of the sampler; None for one that is known."""
        if settings:
            self._study.enqueue_trial(dict(settings))
        trial = self._study.ask()
        choice = self.space.draw(lambda name, values: str(trial.suggest_categorical(name, list(values))))
        if choice in self._seen:
            self._study.tell(trial, state=self._failed)
            return None
        self._seen[choice] = trial.number
        self._open.add(trial.number)
        return choice

    def tell(self, choice: Choice, outcome: Outcome) -> None:
        """Learn the outcome of a proposed choice, for the journal if it is not known there."""
        if self._model:
            self._model.learn(choice, outcome)
        number = self._seen[choice]
        if number not in self._open:
            return
        self._open.remove(number)
        if outcome.shares is None:
            self._study.tell(number, state=self._failed)
        else:
            self._study.tell(number, -outcome.excess if outcome.figure is None else outcome.figure)
