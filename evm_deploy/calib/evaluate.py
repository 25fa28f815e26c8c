"""Accuracy of a quantised network against the float one: scores if there are labels, agreement and SQNR always."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.tasks.task import Labels, Outputs, Task

Rows = Mapping[str, NDArray[np.float64]]  # figure -> its value for each image, (images,)

CHANCE = 0.01  # probability of guessing as well as a network, from which on the network is no better than chance
ROWS = 1024  # images whose outputs are held in float64 at a time
DIFFERENCES = ("relative_error", "psnr_db")  # figures of Task.compare
MIN_SQNR_DB = 20.0  # limit without labels: an error of 10 % of the outputs


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a quantised network against the float one, on the same images.

    sqnr_db: signal to quantisation noise ratio of the outputs in dB, mean over images. agreement: share of images with
    the same answer, None for tasks that give none. scores, float_scores: the task's figures, from 0 to 1, empty without
    labels. metric: name of the figure that must stay within the limit. limit: points of the metric that may be lost;
    None means that the SQNR must reach MIN_SQNR_DB.
    """

    images: int
    sqnr_db: float
    agreement: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    float_scores: Mapping[str, float] = field(default_factory=dict)
    metric: str = ""
    limit: float | None = None
    differences: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Iterable[Rows], task: Task, limit: float | None = None) -> Accuracy:
        """Create the Accuracy of all images in `parts`. Sums are exact: neither parts nor order change a digit."""
        columns: dict[str, list[NDArray[np.float64]]] = {}
        for rows in parts:
            for name, values in rows.items():
                columns.setdefault(name, []).append(values)
        joined = {name: np.concatenate(values) for name, values in columns.items()}
        means = {name: math.fsum(values) / len(values) for name, values in joined.items()}
        names = [name for name in means if f"{name}_float" in means]
        return cls(
            len(joined["sqnr_db"]),
            means["sqnr_db"],
            means.get("agreement"),
            {name: means[name] for name in names},
            {name: means[f"{name}_float"] for name in names},
            task.metric if names else "",
            limit,
            {name: means[name] for name in DIFFERENCES if math.isfinite(means.get(name, math.nan))},
        )

    @property
    def gated(self) -> list[float]:
        """Value of the metric, from 0 to 1, in a list; empty without labels."""
        return [self.scores[self.metric]] if self.metric in self.scores else []

    @property
    def drop(self) -> float | None:
        """Points of the metric lost against float; None without labels."""
        if not self.gated:
            return None
        return round(100 * (self.float_scores[self.metric] - self.scores[self.metric]), 6)

    @property
    def ok(self) -> bool:
        """Whether the drop is within the limit; without labels or limit, whether the SQNR reaches MIN_SQNR_DB.

        Outputs that are not finite (an SQNR of minus infinity) are never within a limit.
        """
        if not np.isfinite(self.sqnr_db):
            return False
        if self.drop is not None and self.limit is not None:
            return self.drop <= self.limit
        return self.sqnr_db >= MIN_SQNR_DB

    def at_chance(self, classes: int) -> bool:
        """Test whether guessing among `classes` would be right as often as the float network in over 1 % of the cases.

        False without labels.
        """
        if not self.gated or not self.images:
            return False
        right = round(self.float_scores[self.metric] * self.images)
        hit, miss = math.log(1 / classes), math.log1p(-1 / classes)
        whole = math.lgamma(self.images + 1)
        logs = (
            whole - math.lgamma(k + 1) - math.lgamma(self.images - k + 1) + k * hit + (self.images - k) * miss
            for k in range(right, self.images + 1)
        )
        return math.fsum(map(math.exp, logs)) > CHANCE

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key, larger is better: first the points of the metric kept (with labels), then the SQNR."""
        return -(self.drop or 0.0), self.sqnr_db

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
            -np.inf if facts["sqnr_db"] is None else facts["sqnr_db"],
            facts["agreement"],
            {name: facts[name] for name in known},
            {name: facts[f"{name}_float"] for name in known},
            metric,
            facts["limit"],
            {name: facts[name] for name in DIFFERENCES if facts.get(name) is not None},
        )

    def __str__(self) -> str:
        for share in self.gated:
            limit = f", limit {self.limit:g}" if self.limit is not None else ""
            return (
                f"{100 * share:.2f} % vs {100 * self.float_scores[self.metric]:.2f} % float "
                f"({-(self.drop or 0):+.2f}{limit}, {self.images} images)   SQNR {self.sqnr_db:.1f} dB"
            )
        same = f"same class {100 * self.agreement:.1f} %   " if self.agreement is not None else ""
        far = self.differences
        if "relative_error" in far:
            same += f"relative error {100 * far['relative_error']:.2g} %   PSNR {far['psnr_db']:.1f} dB   "
        return f"{same}SQNR {self.sqnr_db:.1f} dB ({self.images} images without labels)"


def compare_images(reference: Outputs, outputs: Outputs, task: Task, labels: Labels | None = None) -> Rows:
    """Compare the outputs of a quantised network with `reference`, those of the float one, image by image.

    reference, outputs: by name, (images, ...). Returns `sqnr_db`, minus infinity for outputs that are not finite;
    `agreement`, if the task gives answers; with labels the task's figures, such as `top1`, and those of the float
    network, such as `top1_float`; without labels the figures of `Task.compare`. The accuracy on a set of images is the
    mean of their rows, in any order and parts.
    """
    count = len(next(iter(reference.values())))
    decibels = []
    for start in range(0, count, ROWS):
        part = slice(start, start + ROWS)
        want, have = (flattened({name: each[name][part] for name in reference}) for each in (reference, outputs))
        noise, signal = ((have - want) ** 2).sum(1), (want**2).sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):  # outputs that are not finite
            values = 10 * np.log10(np.maximum(signal, 1e-30) / np.maximum(noise, 1e-30))
        decibels.append(np.where(np.isfinite(have).all(1), values, -np.inf))
    rows = {"sqnr_db": np.concatenate(decibels)}
    if task.agree:
        rows["agreement"] = task.agree(reference, outputs)
    if task.score and labels is not None:
        rows |= task.score(outputs, labels)
        rows |= {f"{name}_float": value for name, value in task.score(reference, labels).items()}
    elif task.compare:
        rows |= task.compare(reference, outputs)
    return rows


def compare_outputs(
    reference: Outputs,
    outputs: Outputs,
    task: Task,
    labels: Labels | None = None,
    *,
    limit: float | None = None,
) -> Accuracy:
    """Compare the outputs of a quantised network with `reference`, those of the float one. By name: (images, ...)."""
    return Accuracy.of([compare_images(reference, outputs, task, labels)], task, limit)


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
