"""Compare the default search of evm-tune with a random one of as many trials, on a table of measured candidates.

    python benchmarks/tune.py [--trials 12] [--seeds 100]     searches in the table, without exporting
    python benchmarks/tune.py --measure RUN                   makes the table from exports of the demo in RUN

The table, tune.json, has every candidate of the demo on ONNX Runtime: 4 precisions, 4 calibration methods with and
without smoothing, 3 input sizes, 1 and 2 threads. Those that it lacks have failed: entropy, which is not accurate
enough here. Each search looks for the most accurate candidate within a limit of p50, and in every other budget also one
of the size. Latencies vary by 5 % from seed to seed, the same for all samplers. `lost` is the accuracy of the best
candidate within the budget minus that of the one found, in points; a search that finds nothing within the budget loses
all. `at best` is the share of the searches that lost nothing. Exit code 1 if the default search loses more than the
random one, on average over budgets and seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import where

from evm_deploy.sweep.additive import Outcome
from evm_deploy.sweep.budget import Budget
from evm_deploy.sweep.search import SAMPLERS, Search
from evm_deploy.sweep.space import Choice, Space

TABLE = Path(__file__).with_suffix(".json")
SIZES, THREADS, TARGET = ("64x64", "48x48", "32x32"), ("2", "1"), "onnx"
SHARES = (0.15, 0.3, 0.5, 0.8)  # of the candidates that are faster than the limit, by budget
NOISE = 0.05  # standard deviation of a p50 from search to search, relative
SMALL_MB = 1.0  # limit of the size in every other budget, above which float32 is


@dataclass(frozen=True)
class Row:
    """Candidate of the table. figures: those of a budget. accuracy: 0 to 1."""

    choice: Choice
    figures: dict[str, float]
    accuracy: float


def read_table() -> tuple[str, list[Row]]:
    """Return where and when the table was measured, and its rows."""
    content = json.loads(TABLE.read_text())
    return content["where"], [
        Row(Choice(**each["choice"]), each["figures"], each["accuracy"]) for each in content["rows"]
    ]


def space_of(rows: list[Row]) -> Space:
    """Return the space of the table."""
    return Space(tuple(dict.fromkeys(each.choice.form for each in rows)), SIZES, THREADS)


def budgets_of(rows: list[Row]) -> list[Budget]:
    """Return budgets from tight to loose."""
    medians = sorted(each.figures["p50"] for each in rows)
    limits = [medians[int(share * len(medians))] for share in SHARES]
    return [Budget((("p50", limit), *more)) for limit in limits for more in ((), (("size", SMALL_MB),))]


def lost(rows: list[Row], budget: Budget, sampler: str, trials: int, seed: int) -> float:
    """Search in the table. Returns the points of accuracy that the result is behind the best within the budget."""
    noise = np.random.default_rng(seed).lognormal(0.0, NOISE, len(rows))
    shares = {
        row.choice: budget.shares({**row.figures, "p50": row.figures["p50"] * factor})
        for row, factor in zip(rows, noise, strict=True)
    }
    fitting = {row.choice: row.accuracy for row in rows if max(shares[row.choice].values()) <= 1}
    search, found = Search(space_of(rows), sampler, seed=seed), 0.0
    for _ in range(trials):
        choice = search.next()
        if choice is None:
            break
        search.tell(choice, Outcome(shares.get(choice), fitting.get(choice)))
        found = max(found, fitting.get(choice, 0.0))
    return 100 * (max(fitting.values()) - found)


def compare(rows: list[Row], trials: int, seeds: int) -> dict[str, list[list[float]]]:
    """Return what each search lost, by sampler: for each budget one value for each seed."""
    return {
        sampler: [[lost(rows, budget, sampler, trials, seed) for seed in range(seeds)] for budget in budgets_of(rows)]
        for sampler in SAMPLERS
    }


def measure(out: Path) -> None:
    """Export, measure and evaluate every candidate, and write the table."""
    from evm_deploy.demo import CHECKPOINT
    from evm_deploy.sweep import tune
    from evm_deploy.sweep.boards import HERE, Boards
    from evm_deploy.sweep.choices import Choices, forms_of, tuned_device
    from evm_deploy.sweep.engine import LocalEngine
    from evm_deploy.sweep.folder import RunFolder
    from evm_deploy.sweep.plan import known_digests

    tune.is_behind = lambda figure, best, images: False
    device, folder = tuned_device(HERE, Boards()), RunFolder(out.resolve())
    choices = Choices(CHECKPOINT, device, "demo", 10.0, known_digests())
    every = Space(forms_of([TARGET], True), SIZES, THREADS).all()
    rows: list[dict[str, Any]] = []
    with folder.locked():
        tuner = tune.Tuner(tune.Goal("", Budget(()), HERE, "demo"), choices.units, folder, LocalEngine())
        for place, choice in enumerate(every):
            trial = tuner.trial(choice)
            print(
                f"[{place + 1}/{len(every)}] {choice}: {trial.state} {trial.figure} {trial.figures} {trial.error}",
                flush=True,
            )
            if trial.figure is not None:
                figures = {name: round(value, 4) for name, value in trial.figures.items()}
                rows.append({"choice": choice.settings, "figures": figures, "accuracy": round(trial.figure, 6)})
    content = ",\n".join(json.dumps(each) for each in rows)
    TABLE.write_text(f'{{"where": {json.dumps(where())}, "rows": [\n{content}\n]}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--measure", metavar="RUN", help="measure the candidates again, in this folder")
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure))
    measured, rows = read_table()
    found = compare(rows, args.trials, args.seeds)
    print(f"{len(rows)} candidates, measured {measured}; {args.trials} trials, {args.seeds} seeds")
    print(f"{'budget':<34} {'sampler':<8} {'lost, mean':>10} {'median':>8} {'90 %':>8} {'at best':>8}")
    for place, budget in enumerate(budgets_of(rows)):
        for sampler in SAMPLERS:
            values = sorted(found[sampler][place])
            high = values[int(0.9 * (len(values) - 1))]
            share = sum(each < 1e-9 for each in values) / len(values)
            texts = f"{statistics.mean(values):>10.2f} {statistics.median(values):>8.2f} {high:>8.2f} {share:>8.0%}"
            print(f"{budget!s:<34} {sampler:<8} {texts}")
    means = {sampler: statistics.mean(map(statistics.mean, found[sampler])) for sampler in SAMPLERS}
    print("mean over budgets: " + ", ".join(f"{sampler} {value:.3f} points" for sampler, value in means.items()))
    return 0 if means[SAMPLERS[0]] < means["random"] else 1


if __name__ == "__main__":
    sys.exit(main())
