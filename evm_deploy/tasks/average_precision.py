"""Average precision of detections as COCO defines it, in numpy; equal to pycocotools on boxes of all sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import area, overlaps

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the intersection over union
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # best detections of an image and class that count


@dataclass(frozen=True)
class Found:
    """Detections of one image: boxes (n, 4) x1 y1 x2 y2, scores (n,), labels (n,) int64."""

    boxes: NDArray[Any]
    scores: NDArray[Any]
    labels: NDArray[np.int64]

    def __getitem__(self, rows: Any) -> Found:
        return Found(self.boxes[rows], self.scores[rows], self.labels[rows])


@dataclass(frozen=True)
class Objects:
    """True objects of one image: boxes (n, 4) x1 y1 x2 y2, labels (n,) int64.

    ignored: (n,) bool; such an object is neither missed nor found, like a difficult one of PASCAL VOC. crowd: (n,)
    bool; ignored, and any number of detections may lie in it.
    """

    boxes: NDArray[Any]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    crowd: NDArray[np.bool_]

    @classmethod
    def of(cls, boxes: NDArray[Any], labels: NDArray[Any]) -> Objects:
        """Return objects that all count."""
        none = np.zeros(len(labels), bool)
        return cls(boxes.reshape(-1, 4), labels.astype(np.int64), none, none)


def average_precision(found: Sequence[Found], truths: Sequence[Objects]) -> dict[str, float]:
    """Return AP (mean over IoU 0.50:0.05:0.95), AP50 and AP75, each from 0 to 1, means over the classes that occur.

    found, truths: of the same images in order, in the same pixels. Classes without a true object that counts do not
    take part. All figures are NaN if there is no such object. Source: COCO's detection metrics, area `all`.
    """
    labels = sorted({int(label) for each in truths for label in each.labels[~(each.ignored | each.crowd)]})
    table = np.array([_of_class(found, truths, label) for label in labels]).reshape(-1, len(THRESHOLDS))
    if not labels:
        return dict.fromkeys(("AP", "AP50", "AP75"), float("nan"))
    return {"AP": float(table.mean()), "AP50": float(table[:, 0].mean()), "AP75": float(table[:, 5].mean())}


def _of_class(found: Sequence[Found], truths: Sequence[Objects], label: int) -> NDArray[np.float64]:
    """Return the average precision of one class at each of THRESHOLDS."""
    scores: list[NDArray[Any]] = []
    hits: list[NDArray[np.bool_]] = []
    skips: list[NDArray[np.bool_]] = []
    total = 0
    for each, truth in zip(found, truths, strict=True):
        rows = np.flatnonzero(each.labels == label)
        rows = rows[np.argsort(-each.scores[rows], kind="stable")][:MOST]
        ours = truth.labels == label
        total += int((ours & ~truth.ignored & ~truth.crowd).sum())
        hit, skip = _matched(each.boxes[rows], truth, ours)
        scores.append(each.scores[rows])
        hits.append(hit)
        skips.append(skip)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit, skip = (np.concatenate(parts, 1)[:, order] for parts in (hits, skips))
    return np.array([_precision(one[~left], total) for one, left in zip(hit, skip, strict=True)])


def _matched(
    boxes: NDArray[Any], truth: Objects, ours: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Match detections of one image and class, the best first, at each threshold.

    Returns (thresholds, n) whether a detection found an object, and whether it does not count.
    """
    beside = (truth.ignored | truth.crowd)[ours]
    last = np.argsort(beside, kind="stable")
    beside, crowd, true_boxes = beside[last], truth.crowd[ours][last], truth.boxes[ours][last]
    shares = _shares(boxes.astype(np.float64), true_boxes.astype(np.float64), crowd)
    hit = np.zeros((len(THRESHOLDS), len(boxes)), bool)
    skip = np.zeros_like(hit)
    for t, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(true_boxes), bool)
        for d, row in enumerate(shares):
            # An object that counts is preferred to one that does not, whatever their overlaps; the last of equals
            for group in (~beside, beside):
                able = np.where(group & (free | crowd), row, -1.0)
                if len(able) and able.max() >= min(threshold, 1 - 1e-10):
                    best = len(able) - 1 - int(able[::-1].argmax())
                    free[best] = False
                    hit[t, d], skip[t, d] = True, bool(beside[best])
                    break
    return hit, skip


def _shares(boxes: NDArray[Any], true_boxes: NDArray[Any], crowd: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the overlaps (n, m). For a crowd it is the share of the detection that lies in it."""
    shares = overlaps(boxes, true_boxes)
    if crowd.any() and len(boxes):
        sides = np.minimum(boxes[:, None, 2:], true_boxes[None, :, 2:]) - np.maximum(
            boxes[:, None, :2], true_boxes[None, :, :2]
        )
        inside = sides.clip(0).prod(-1) / np.maximum(area(boxes), 1e-30)[:, None]
        shares = np.where(crowd[None], inside, shares)
    return shares


def _precision(hit: NDArray[np.bool_], total: int) -> float:
    """Return the mean precision at RECALLS. hit: detections by falling score. total: number of true objects."""
    found = np.cumsum(hit)
    recall = found / total
    precision = found / (np.arange(1, len(hit) + 1) + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALLS, side="left")
    return float(np.concatenate([precision, np.zeros(1)])[np.minimum(at, len(hit))].mean())
