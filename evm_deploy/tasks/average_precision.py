"""Average precision of detections as COCO defines it, in numpy; equal to pycocotools on boxes of all sizes.

It is no mean over images. So each image gives rows of its own (`precision_rows`), and all rows together the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import area, overlaps
from evm_deploy.tasks.task import Rows

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the intersection over union
RECALLS = np.linspace(0.0, 1.0, 101)
FIGURES = ("AP", "AP50", "AP75")
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
    bool; ignored, and any number of detections may lie in it. number: of the image among those of the data; of
    detections with equal scores those of the lower number come first, as in pycocotools.
    """

    boxes: NDArray[Any]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    number: int = 0

    @classmethod
    def of(cls, boxes: NDArray[Any], labels: NDArray[Any]) -> Objects:
        """Return objects that all count."""
        none = np.zeros(len(labels), bool)
        return cls(boxes.reshape(-1, 4), labels.astype(np.int64), none, none)

    @property
    def counting(self) -> NDArray[np.int64]:
        """Labels of the objects that can be found or missed."""
        return self.labels[~(self.ignored | self.crowd)]

    def __str__(self) -> str:
        parts = (self.boxes, self.labels, self.ignored, self.crowd)
        return f"objects of image {self.number}: {[part.tolist() for part in parts]}"


def average_precision(found: Sequence[Found], truths: Sequence[Objects]) -> dict[str, float]:
    """Return AP (mean over IoU 0.50:0.05:0.95), AP50 and AP75, each from 0 to 1, means over the classes that occur.

    found, truths: of the same images in order, in the same pixels. See `precision_rows` and `precision`.
    """
    return precision(precision_rows(found, [replace(each, number=i) for i, each in enumerate(truths)]))


def precision_rows(found: Sequence[Found], truths: Sequence[Objects]) -> Rows:
    """Return what the average precision of any number of images needs of these: rows that are concatenated.

    One row for each of the best MOST detections of an image and class: `score`, `label`, `image` (`Objects.number`),
    and at each of THRESHOLDS whether it found an object (`hit`), and whether it does not count (`skip`), (n, 10) bool.
    `objects`: the label of each true object that counts.
    """
    scores, labels, images, hits, skips = [], [], [], [], []
    for each, truth in zip(found, truths, strict=True):
        for label in np.unique(each.labels):
            rows = np.flatnonzero(each.labels == label)
            rows = rows[np.argsort(-each.scores[rows], kind="stable")][:MOST]
            hit, skip = _matched(each.boxes[rows], truth, truth.labels == label)
            scores.append(each.scores[rows].astype(np.float64))
            labels.append(each.labels[rows])
            images.append(np.full(len(rows), truth.number))
            hits.append(hit.T)
            skips.append(skip.T)
    flags = np.empty((0, len(THRESHOLDS)), bool)
    return {
        "score": np.concatenate([np.empty(0), *scores]),
        "label": np.concatenate([np.empty(0, np.int64), *labels]),
        "image": np.concatenate([np.empty(0, np.int64), *images]),
        "hit": np.concatenate([flags, *hits]),
        "skip": np.concatenate([flags, *skips]),
        "objects": np.concatenate([np.empty(0, np.int64), *(truth.counting for truth in truths)]),
    }


def precision(rows: Rows) -> dict[str, float]:
    """Return AP, AP50 and AP75 of the images of `rows` (of `precision_rows`), each from 0 to 1.

    Classes without a true object that counts do not take part. All figures are NaN if there is no such object. Source:
    COCO's detection metrics, area `all`.
    """
    order = np.lexsort((rows["image"], -rows["score"]))  # stable: within an image as they were
    label, hit, skip = (rows[name][order] for name in ("label", "hit", "skip"))
    classes, totals = np.unique(rows["objects"], return_counts=True)
    if not len(classes):
        return dict.fromkeys(FIGURES, float("nan"))
    table = np.zeros((len(classes), len(THRESHOLDS)))
    for row, one, total in zip(table, classes, totals, strict=True):
        own = label == one
        flags = zip(hit[own].T, skip[own].T, strict=True)
        row[:] = [_precision(found[~left], int(total)) for found, left in flags]
    return dict(zip(FIGURES, map(float, (table.mean(), table[:, 0].mean(), table[:, 5].mean())), strict=True))


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
    free = np.ones((len(THRESHOLDS), len(true_boxes)), bool)
    least = np.minimum(THRESHOLDS, 1 - 1e-10)
    for d in np.flatnonzero(shares.max(1, initial=0.0) >= least[0]):
        left = np.arange(len(THRESHOLDS))
        # An object that counts is preferred to one that does not, whatever their overlaps; the last of equals
        for group in (~beside, beside):
            able = np.where(group & (free[left] | crowd), shares[d], -1.0)
            best = able.shape[1] - 1 - able[:, ::-1].argmax(1)
            met = able[np.arange(len(left)), best] >= least[left]
            at, best = left[met], best[met]
            free[at, best] = False
            hit[at, d], skip[at, d] = True, beside[best]
            left = left[~met]
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
