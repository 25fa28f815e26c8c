"""Average precision of detections as COCO defines it, in numpy; equal to pycocotools on boxes and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import area, overlaps
from evm_deploy.data.masks import AnyMask, mask_overlaps

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the intersection over union
RECALLS = np.linspace(0.0, 1.0, 101)
Shares = Callable[["Found", "Objects", NDArray[np.int64]], NDArray[Any]]
MOST = 100  # best detections of an image and class that count


@dataclass(frozen=True)
class Found:
    """Detections of one image: boxes (n, 4) x1 y1 x2 y2, scores (n,), labels (n,) int64.

    masks: (n,) of AnyMask, None for networks without masks.
    """

    boxes: NDArray[Any]
    scores: NDArray[Any]
    labels: NDArray[np.int64]
    masks: NDArray[np.object_] | None = None

    def __getitem__(self, rows: Any) -> Found:
        masks = None if self.masks is None else self.masks[rows]
        return Found(self.boxes[rows], self.scores[rows], self.labels[rows], masks)


@dataclass(frozen=True)
class Objects:
    """True objects of one image: boxes (n, 4) x1 y1 x2 y2, labels (n,) int64.

    ignored: (n,) bool; such an object is neither missed nor found, like a difficult one of PASCAL VOC. crowd: (n,)
    bool; ignored, and any number of detections may lie in it. masks: (n,) of AnyMask, None if they were not read.
    """

    boxes: NDArray[Any]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    masks: NDArray[np.object_] | None = None

    @classmethod
    def of(cls, boxes: NDArray[Any], labels: NDArray[Any], masks: Sequence[AnyMask] | None = None) -> Objects:
        """Return objects that all count."""
        none = np.zeros(len(labels), bool)
        return cls(boxes.reshape(-1, 4), labels.astype(np.int64), none, none, None if masks is None else listed(masks))


def listed(masks: Sequence[AnyMask]) -> NDArray[np.object_]:
    """Return masks as an array (n,), so that rows of it can be taken as of boxes."""
    array = np.empty(len(masks), object)
    array[:] = masks
    return array


def average_precision(found: Sequence[Found], truths: Sequence[Objects], *, masks: bool = False) -> dict[str, float]:
    """Return AP (mean over IoU 0.50:0.05:0.95), AP50 and AP75, each from 0 to 1, means over the classes that occur.

    found, truths: of the same images in order, in the same pixels. masks: whether the overlap is that of the masks, in
    place of the boxes. Classes without a true object that counts do not take part. All figures are NaN if there is no
    such object. Source: COCO's detection metrics, area `all`.
    """
    shares = _mask_shares if masks else _shares
    labels = sorted({int(label) for each in truths for label in each.labels[~(each.ignored | each.crowd)]})
    table = np.array([_of_class(found, truths, label, shares) for label in labels]).reshape(-1, len(THRESHOLDS))
    if not labels:
        return dict.fromkeys(("AP", "AP50", "AP75"), float("nan"))
    return {"AP": float(table.mean()), "AP50": float(table[:, 0].mean()), "AP75": float(table[:, 5].mean())}


def _of_class(found: Sequence[Found], truths: Sequence[Objects], label: int, shares: Shares) -> NDArray[np.float64]:
    """Return the average precision of one class at each of THRESHOLDS. shares: overlaps of detections and objects."""
    scores: list[NDArray[Any]] = []
    hits: list[NDArray[np.bool_]] = []
    skips: list[NDArray[np.bool_]] = []
    total = 0
    for each, truth in zip(found, truths, strict=True):
        rows = np.flatnonzero(each.labels == label)
        rows = rows[np.argsort(-each.scores[rows], kind="stable")][:MOST]
        ours = truth.labels == label
        total += int((ours & ~truth.ignored & ~truth.crowd).sum())
        hit, skip = _matched(each[rows], truth, ours, shares)
        scores.append(each.scores[rows])
        hits.append(hit)
        skips.append(skip)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit, skip = (np.concatenate(parts, 1)[:, order] for parts in (hits, skips))
    return np.array([_precision(one[~left], total) for one, left in zip(hit, skip, strict=True)])


def _matched(
    found: Found, truth: Objects, ours: NDArray[np.bool_], shares: Shares
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Match detections of one image and class, the best first, at each threshold.

    Returns (thresholds, n) whether a detection found an object, and whether it does not count.
    """
    beside = (truth.ignored | truth.crowd)[ours]
    last = np.argsort(beside, kind="stable")
    order = np.flatnonzero(ours)[last]
    beside, crowd = beside[last], truth.crowd[order]
    table = shares(found, truth, order)
    hit = np.zeros((len(THRESHOLDS), len(found.scores)), bool)
    skip = np.zeros_like(hit)
    for t, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(order), bool)
        for d, row in enumerate(table):
            # An object that counts is preferred to one that does not, whatever their overlaps; the last of equals
            for group in (~beside, beside):
                able = np.where(group & (free | crowd), row, -1.0)
                if len(able) and able.max() >= min(threshold, 1 - 1e-10):
                    best = len(able) - 1 - int(able[::-1].argmax())
                    free[best] = False
                    hit[t, d], skip[t, d] = True, bool(beside[best])
                    break
    return hit, skip


def _mask_shares(found: Found, truth: Objects, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return the overlaps (n, m) of the masks of detections and of some objects, as `_shares` does."""
    if found.masks is None or truth.masks is None:
        raise ValueError("there are no masks to compare")
    return mask_overlaps(list(found.masks), list(truth.masks[rows]), truth.crowd[rows])


def _shares(found: Found, truth: Objects, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return the overlaps (n, m) of detections and of some objects. For a crowd: the detection's share in it."""
    boxes, true_boxes = found.boxes.astype(np.float64), truth.boxes[rows].astype(np.float64)
    crowd = truth.crowd[rows]
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
