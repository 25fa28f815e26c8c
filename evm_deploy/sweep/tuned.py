"""Result of a search: its trials, those on the front, and the chosen bundle; kept in tuned.json of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evm_deploy._util.schema import TEXT, Definition, Schema, keys
from evm_deploy.errors import UsageError
from evm_deploy.sweep.budget import METRICS, Budget, figures_text
from evm_deploy.sweep.folder import PLAN, RunFolder, is_sweep
from evm_deploy.tasks import TITLES

TUNED = "tuned.json"
NUMBER: Definition = {"type": "number"}
FIGURES: Definition = {
    "type": "object",
    "properties": dict.fromkeys(METRICS, NUMBER),
    "additionalProperties": False,
}
RUNG: Definition = {"type": "array", "minItems": 2, "maxItems": 2, "items": NUMBER}
TRIAL: Definition = {
    **keys(
        choice=TEXT,
        state=TEXT,
        figures=FIGURES,
        rungs={"type": "array", "items": RUNG},
        metric=TEXT,
        bundle=TEXT,
        error=TEXT,
    ),
    "additionalProperties": False,
}
SCHEMA = Schema(lambda: keys(of=TEXT, budget=FIGURES, board=TEXT, trials={"type": "array", "items": TRIAL}))
SHOWN = ("p50", "size", "memory")
FITS, OVER, BEHIND, FAILED = "fits", "over the budget", "behind", "failed"


@dataclass(frozen=True)
class Trial:
    """One candidate of a search.

    choice: its settings as text. state: FITS; OVER, not evaluated; BEHIND, evaluated on some images only; or FAILED.
    figures: by metric of a budget, as far as they are known. rungs: numbers of images, and the main figure of the task
    on them, 0 to 1; empty if it was not evaluated. bundle: path in the folder. error: of a failed one.
    """

    choice: str
    state: str
    figures: Mapping[str, float] = field(default_factory=dict)
    rungs: tuple[tuple[int, float], ...] = ()
    metric: str = ""
    bundle: str = ""
    error: str = ""

    @property
    def figure(self) -> float | None:
        """Main figure on the most images, None if it was not evaluated."""
        return self.rungs[-1][1] if self.rungs else None

    @property
    def title(self) -> str:
        """Title of the main figure, such as top-1."""
        return TITLES.get(self.metric, self.metric)

    def text(self, budget: Budget) -> str:
        """Format the main figure and the others, those of the budget first."""
        said = "" if self.figure is None else f"{self.title} {100 * self.figure:.2f} %, "
        return said + figures_text(self.figures, list(dict.fromkeys((*budget.metrics, *SHOWN))))

    def beaten(self, others: Sequence[Trial], metrics: Sequence[str]) -> bool:
        """Test whether another trial is at least as good in the main figure and these metrics, and better in one."""
        mine = self._merits(metrics)
        return any(
            all(a >= b for a, b in zip(theirs, mine, strict=True)) and theirs != mine
            for theirs in (each._merits(metrics) for each in others)
        )

    def _merits(self, metrics: Sequence[str]) -> tuple[float, ...]:
        return (self.figure or 0.0, *(-self.figures.get(name, float("inf")) for name in metrics))


@dataclass(frozen=True)
class Tuned:
    """Result of a search. of: digest of the checkpoint and images. board: that latencies are of."""

    of: str
    budget: Budget
    board: str
    trials: tuple[Trial, ...]

    @property
    def front(self) -> list[Trial]:
        """Trials within the budget that no other one beats in the main figure and the budget's, most accurate first."""
        fitting = [each for each in self.trials if each.state == FITS]
        best = [each for each in fitting if not each.beaten(fitting, self.budget.metrics)]
        return sorted(best, key=lambda each: (-(each.figure or 0.0), *self._costs(each), each.choice))

    @property
    def chosen(self) -> Trial | None:
        """Most accurate trial within the budget; of equal ones the cheapest in the first figure of the budget."""
        return next(iter(self.front), None)

    @property
    def nearest(self) -> Trial | None:
        """Trial that is least above the budget, None if none was."""
        over = [each for each in self.trials if each.state == OVER]
        return min(over, key=lambda each: self.budget.excess(each.figures), default=None)

    def _costs(self, each: Trial) -> tuple[float, ...]:
        return tuple(each.figures.get(name, float("inf")) for name in self.budget.metrics)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data; the front and the chosen trial are numbers of trials, from 0."""
        places = {id(each): place for place, each in enumerate(self.trials)}
        return {
            "of": self.of,
            "budget": dict(self.budget.limits),
            "board": self.board,
            "trials": [asdict(each) for each in self.trials],
            "front": [places[id(each)] for each in self.front],
            "chosen": places[id(self.chosen)] if self.chosen else None,
        }

    def write(self, folder: RunFolder) -> None:
        """Write the result into its folder, at once. Raises OSError."""
        folder.write(TUNED, self.as_dict())


def read_tuned(folder: RunFolder) -> Tuned | None:
    """Return the result of the search in a folder, None if there is none, or a damaged one."""
    content = folder.read(TUNED)
    try:
        SCHEMA(content)
    except (ValueError, RecursionError):
        return None
    trials = tuple(Trial(**{**each, "rungs": tuple(map(tuple, each["rungs"]))}) for each in content["trials"])
    return Tuned(content["of"], Budget(tuple(content["budget"].items())), content["board"], trials)


def require_folder_of(folder: RunFolder, of: str) -> None:
    """Raise UsageError for the folder of a sweep, or of a search with another checkpoint or other images."""
    found = read_tuned(folder)
    if found and found.of != of:
        raise UsageError(
            f"{folder.path} has the search of another checkpoint, or on other images", "choose another --out"
        )
    if not found and is_sweep(folder.path) and folder.read(PLAN) != []:
        raise UsageError(f"{folder.path} is the folder of a sweep", "choose another --out")
