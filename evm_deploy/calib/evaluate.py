"""Accuracy of a quantised network against the float one: scores if there are labels, agreement and SQNR always."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.calib.probe import is_probe
from evm_deploy.tasks import TITLES
from evm_deploy.tasks.task import AS_THEY_ARE, Labels, Measure, Outputs, Reading, Rows, Task, means

OWN, FLOAT, DIFFERENCE = "own.", "float.", "difference."  # begin of the columns of a measure's rows
ROWS = 1024  # images whose outputs are held in float64 at a time
DIFFERENCES = ("relative_error", "psnr_db")  # figures of Task.compare
LEAST = 1e-30  # power below which decibels end
MIN_SQNR_DB = 20.0  # limit without labels: an error of 10 % of the outputs


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a quantised network against the float one, on the same images.

    sqnr_db: signal to quantisation noise ratio of the outputs in dB, mean over images; None if only answers are known,
    such as boxes. agreement: share of the answers that are the same, mean over images, None for tasks that give none.
    scores, float_scores: the task's figures, from 0 to 1, empty without labels. metric: name of the figure that must
    stay within the limit. limit: points of the metric that may be lost; None means that the SQNR must reach
    MIN_SQNR_DB.
    """

    images: int
    sqnr_db: float | None
    agreement: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    float_scores: Mapping[str, float] = field(default_factory=dict)
    metric: str = ""
    limit: float | None = None
    differences: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Iterable[Rows], task: Task, limit: float | None = None) -> Accuracy:
        """Create the Accuracy of all images in `parts`. Sums are exact: neither parts nor order change a digit."""
        rows = joined(parts)
        each = means({name: rows[name] for name in ("sqnr_db", "agreement") if name in rows})
        differences = _reduced(task.compare, rows, DIFFERENCE)
        scores, float_scores = (_reduced(task.score, rows, begin) for begin in (OWN, FLOAT))
        return cls(
            len(rows["image"]),
            each.get("sqnr_db"),
            each.get("agreement"),
            scores,
            float_scores,
            task.score.metric if task.score and scores else "",
            limit,
            {name: value for name, value in differences.items() if math.isfinite(value)},
        )

    @property
    def gated(self) -> list[float]:
        """Value of the metric, from 0 to 1, in a list; empty without labels."""
        return [self.scores[self.metric]] if self.metric in self.scores else []

    @property
    def reached(self) -> float:
        """Value of the metric of the float network, from 0 to 1; NaN without labels."""
        return self.float_scores.get(self.metric, math.nan)

    @property
    def drop(self) -> float | None:
        """Points of the metric lost against float; None without labels, or without a float network."""
        if not self.gated or self.metric not in self.float_scores:
            return None
        return round(100 * (self.reached - self.scores[self.metric]), 6)

    @property
    def ok(self) -> bool:
        """Whether the drop is within the limit; without labels or limit, whether the SQNR reaches MIN_SQNR_DB.

        Outputs that are not finite (an SQNR of minus infinity) are never within a limit.
        """
        if self.sqnr_db is not None and not np.isfinite(self.sqnr_db):
            return False
        if self.drop is not None and self.limit is not None:
            return self.drop <= self.limit
        return self.sqnr_db is None or self.sqnr_db >= MIN_SQNR_DB

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key, larger is better: first the points of the metric kept (with labels), then the SQNR."""
        return -(self.drop or 0.0), self.sqnr_db or 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for manifests and records. Figures have keys such as `top1` and `top1_float`."""
        facts = {key: getattr(self, key) for key in ("images", "sqnr_db", "agreement", "metric", "limit", "drop", "ok")}
        of_float = {f"{name}_float": value for name, value in self.float_scores.items()}
        return {**facts, **self.scores, **of_float, **self.differences}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Accuracy:
        """Create an Accuracy from the data of `as_dict`."""
        metric = facts.get("metric") or "top1"
        names = [name.removesuffix("_float") for name in facts if name.endswith("_float")]
        known = [name for name in names if facts.get(name) is not None]
        return cls(
            facts["images"],
            -np.inf if facts["sqnr_db"] is None and facts["ok"] is False else facts["sqnr_db"],
            facts["agreement"],
            {name: facts[name] for name in known},
            {name: facts[f"{name}_float"] for name in known},
            metric,
            facts["limit"],
            {name: facts[name] for name in DIFFERENCES if facts.get(name) is not None},
        )

    def __str__(self) -> str:
        noise = "" if self.sqnr_db is None else f"   SQNR {self.sqnr_db:.1f} dB"
        if self.gated:
            limit = f", limit {self.limit:g}" if self.limit is not None else ""
            lost = "" if self.drop is None else f"{-self.drop:+.2f}{limit}, "
            change = f" ({lost}{self.images} images)"
            parts = [
                f"{title} {100 * self.scores[name]:.2f} %"
                + (f" vs {100 * self.float_scores[name]:.2f} % float" if name in self.float_scores else "")
                + (change if name == self.metric else "")
                for name, title in TITLES.items()
                if name in self.scores
            ]
            return ", ".join(parts) + noise
        same = f"same answers {100 * self.agreement:.1f} %   " if self.agreement is not None else ""
        far = self.differences
        if "relative_error" in far:
            same += f"relative error {100 * far['relative_error']:.2g} %   PSNR {far['psnr_db']:.1f} dB   "
        return f"{same}{noise.strip()} ({self.images} images without labels)"


def compare_images(
    reference: Outputs, outputs: Outputs, task: Task, labels: Labels | None = None, reading: Reading = AS_THEY_ARE
) -> Rows:
    """Compare the outputs of a quantised network with `reference`, those of the float one, image by image.

    reference, outputs: by name, (images, ...). Returns `image`, a row for each; `sqnr_db` (`noise_db`); `agreement`, if
    the task gives answers; with labels the rows of `Task.score`, without them those of `Task.compare`. The accuracy on
    a set of images is that of their rows, in any order and parts (`Accuracy.of`); `float_rows` are a part of it.
    """
    count = len(next(iter(reference.values())))
    rows: dict[str, NDArray[Any]] = {"image": np.zeros(count, bool)}
    if not task.selects or any(map(is_probe, reference)):
        rows["sqnr_db"] = noise_db(reference, outputs)
    if task.agree:
        rows["agreement"] = task.agree(reference, outputs)
    if task.score and labels is not None:
        rows |= _begun(OWN, task.score.rows(outputs, labels, reading))
    elif task.compare:
        rows |= _begun(DIFFERENCE, task.compare.rows(outputs, reference, reading))
    return rows


def own_rows(outputs: Outputs, task: Task, labels: Labels, reading: Reading = AS_THEY_ARE) -> Rows:
    """Return the rows of a network that is compared with labels alone: `image` and those of `Task.score`."""
    assert task.score
    count = len(next(iter(outputs.values())))
    return {"image": np.zeros(count, bool), **_begun(OWN, task.score.rows(outputs, labels, reading))}


def float_rows(reference: Outputs, task: Task, labels: Labels | None, reading: Reading = AS_THEY_ARE) -> Rows:
    """Return the rows that depend on the float network alone: those of `Task.score` with labels, else none."""
    return _begun(FLOAT, task.score.rows(reference, labels, reading)) if task.score and labels is not None else {}


def compare_outputs(
    reference: Outputs,
    outputs: Outputs,
    task: Task,
    labels: Labels | None = None,
    *,
    limit: float | None = None,
    reading: Reading = AS_THEY_ARE,
) -> Accuracy:
    """Compare the outputs of a quantised network with `reference`, those of the float one. By name: (images, ...)."""
    rows = compare_images(reference, outputs, task, labels, reading)
    return Accuracy.of([{**rows, **float_rows(reference, task, labels, reading)}], task, limit)


def noise_db(reference: Outputs, outputs: Outputs) -> NDArray[np.float64]:
    """Return the SQNR in dB of each image, (images,) float64; minus infinity for outputs that are not finite.

    Probes, where there are some, count alone: each has the same part in the noise, relative to its own signal.
    """
    count = len(next(iter(reference.values())))
    decibels = []
    for start in range(0, count, ROWS):
        part = slice(start, start + ROWS)
        ratios, finite = [], np.ones(len(range(count)[part]), bool)
        for names in _compared(reference):
            want, have = (flattened({name: each[name][part] for name in names}) for each in (reference, outputs))
            with np.errstate(invalid="ignore", over="ignore"):  # outputs that are not finite
                noise, signal = ((have - want) ** 2).sum(1), (want**2).sum(1)
            ratios.append(np.maximum(noise, LEAST) / np.maximum(signal, LEAST))
            finite &= np.isfinite(have).all(1)
        decibels.append(np.where(finite, -10 * np.log10(np.mean(ratios, axis=0)), -np.inf))
    return np.concatenate(decibels)


def _compared(outputs: Outputs) -> Iterator[list[str]]:
    """Yield names of outputs whose values are compared as one tensor: each probe, else all outputs."""
    probes = [name for name in outputs if is_probe(name)]
    yield from ([name] for name in probes)
    if not probes:
        yield list(outputs)


def joined(parts: Iterable[Rows]) -> dict[str, NDArray[Any]]:
    """Concatenate the rows of parts, by column."""
    columns: dict[str, list[NDArray[Any]]] = {}
    for rows in parts:
        for name, values in rows.items():
            columns.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in columns.items()}


def _begun(begin: str, rows: Rows) -> dict[str, NDArray[Any]]:
    return {begin + name: values for name, values in rows.items()}


def _reduced(measure: Measure | None, rows: Rows, begin: str) -> dict[str, float]:
    """Return the figures of the rows whose columns start with `begin`; none if there are no such columns."""
    own = {name.removeprefix(begin): values for name, values in rows.items() if name.startswith(begin)}
    return dict(measure.reduce(own)) if measure and own else {}


def flattened(outputs: Outputs) -> NDArray[np.float64]:
    """Return all outputs of each image in one row: (images, values) float64."""
    return np.concatenate([value.reshape(len(value), -1).astype(np.float64) for value in outputs.values()], axis=1)


def keep_float_until(
    evaluate: Callable[[frozenset[str]], Accuracy],
    ranked: list[str],
    kept: frozenset[str] = frozenset(),
    accuracy: Accuracy | None = None,
) -> tuple[frozenset[str], Accuracy]:
    """Keep blocks in float, one more at a time, until the accuracy is within its limit or no block is left.

    ranked: blocks, the most sensitive first. `evaluate(kept)`: accuracy with these blocks in float. kept, accuracy:
    blocks in float at the beginning, and the accuracy with them if it is known. Returns the kept blocks and their
    accuracy.
    """
    accuracy = accuracy or evaluate(kept)
    for block in ranked:
        if accuracy.ok:
            break
        kept = kept | {block}
        accuracy = evaluate(kept)
    return kept, accuracy
