"""How far a quantised network is from the float one: accuracy where there are labels, agreement and SQNR anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Outputs = NDArray[np.float32]

MIN_SQNR_DB = 20.0  # without labels: an error of 10 % of the outputs


@dataclass(frozen=True)
class Accuracy:
    """Quantised against float on the same images.

    sqnr_db: signal to quantisation noise of the outputs, mean over images, in dB. agreement: share of images with the
    same top class. top1, top5 (and of float): shares of images whose label is the first, among the first five; None
    without labels. limit: points of top-1 that may be lost, or None: then the SQNR must be MIN_SQNR_DB.
    """

    images: int
    sqnr_db: float
    agreement: float | None
    top1: float | None = None
    top1_float: float | None = None
    top5: float | None = None
    top5_float: float | None = None
    limit: float | None = None

    @property
    def drop(self) -> float | None:
        """Points of top-1 lost, or None without labels."""
        if self.top1 is None or self.top1_float is None:
            return None
        return round(100 * (self.top1_float - self.top1), 6)

    @property
    def ok(self) -> bool:
        if self.drop is not None and self.limit is not None:
            return self.drop <= self.limit
        return self.sqnr_db >= MIN_SQNR_DB

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: points of top-1 kept where there are labels, then SQNR."""
        return -(self.drop or 0.0), self.sqnr_db

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "drop": self.drop, "ok": self.ok}

    def __str__(self) -> str:
        if self.top1 is not None and self.top1_float is not None and self.drop is not None:
            limit = f", limit {self.limit:g}" if self.limit is not None else ""
            return (
                f"{100 * self.top1:.2f} % vs {100 * self.top1_float:.2f} % float "
                f"({-self.drop:+.2f}{limit}, {self.images} images)   SQNR {self.sqnr_db:.1f} dB"
            )
        same = f"same class {100 * self.agreement:.1f} %   " if self.agreement is not None else ""
        return f"{same}SQNR {self.sqnr_db:.1f} dB ({self.images} images without labels)"


def compare(
    reference: Outputs,
    outputs: Outputs,
    labels: NDArray[np.int64] | None = None,
    *,
    classes: bool = True,
    limit: float | None = None,
) -> Accuracy:
    """`outputs` against `reference`, both (images, values). classes: the values are scores of classes."""
    noise = ((outputs.astype(np.float64) - reference) ** 2).sum(1)
    signal = (reference.astype(np.float64) ** 2).sum(1)
    sqnr = float(np.mean(10 * np.log10(np.maximum(signal, 1e-30) / np.maximum(noise, 1e-30))))
    if not np.isfinite(outputs).all():
        sqnr = -np.inf
    if not classes:
        return Accuracy(len(outputs), sqnr, None, limit=limit)
    agreement = float((outputs.argmax(1) == reference.argmax(1)).mean())
    if labels is None:
        return Accuracy(len(outputs), sqnr, agreement, limit=limit)
    return Accuracy(
        len(outputs),
        sqnr,
        agreement,
        top1=_top(outputs, labels, 1),
        top1_float=_top(reference, labels, 1),
        top5=_top(outputs, labels, 5),
        top5_float=_top(reference, labels, 5),
        limit=limit,
    )


def _top(scores: Outputs, labels: NDArray[np.int64], k: int) -> float:
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def keep_float_until(
    evaluate: Callable[[frozenset[str]], Accuracy], ranked: list[str]
) -> tuple[frozenset[str], Accuracy]:
    """Keep blocks in float, the most sensitive first, until the accuracy is within its limit; all of them at worst."""
    kept: frozenset[str] = frozenset()
    accuracy = evaluate(kept)
    for block in ranked:
        if accuracy.ok:
            break
        kept = kept | {block}
        accuracy = evaluate(kept)
    return kept, accuracy
