"""Average precision of detections as COCO defines it, in numpy; equal to pycocotools on boxes and masks.

It is no mean over images. So each image gives rows of its own (`precision_rows`), and all rows together the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import area, overlaps
from evm_deploy.data.masks import AnyMask, mask_overlaps
from evm_deploy.tasks.task import Rows

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the intersection over union
RECALLS = np.linspace(0.0, 1.0, 101)
FIGURES = ("AP", "AP50", "AP75")
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
    bool; ignored, and any number of detections may lie in it. number: of the image among those of the data; of
    detections with equal scores those of the lower number come first, as in pycocotools. masks: (n,) of AnyMask, None
    if they were not read.
    """

    boxes: NDArray[Any]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    number: int = 0
    masks: NDArray[np.object_] | None = None

    @classmethod
    def of(cls, boxes: NDArray[Any], labels: NDArray[Any], masks: Sequence[AnyMask] | None = None) -> Objects:
        """Return objects that all count."""
        none = np.zeros(len(labels), bool)
        every = None if masks is None else listed(masks)
        return cls(boxes.reshape(-1, 4), labels.astype(np.int64), none, none, masks=every)

    @property
    def counting(self) -> NDArray[np.int64]:
        """Labels of the objects that can be found or missed."""
        return self.labels[~(self.ignored | self.crowd)]

    def __str__(self) -> str:
        parts = (self.boxes, self.labels, self.ignored, self.crowd)
        masks = "" if self.masks is None else f", {[mask.to_coco() for mask in self.masks]}"
        return f"objects of image {self.number}: {[part.tolist() for part in parts]}{masks}"


def listed(masks: Sequence[AnyMask]) -> NDArray[np.object_]:
    """Return masks as an array (n,), so that rows of it can be taken as of boxes."""
    array = np.empty(len(masks), object)
    array[:] = masks
    return array


def average_precision(found: Sequence[Found], truths: Sequence[Objects], *, masks: bool = False) -> dict[str, float]:
    """Return AP (mean over IoU 0.50:0.05:0.95), AP50 and AP75, each from 0 to 1, means over the classes that occur.

    found, truths: of the same images in order, in the same pixels. masks: whether the overlap is that of the masks, in
    place of the boxes. See `precision_rows` and `precision`.
    """
    return precision(precision_rows(found, [replace(each, number=i) for i, each in enumerate(truths)], masks=masks))


def precision_rows(found: Sequence[Found], truths: Sequence[Objects], *, masks: bool = False) -> Rows:
    """Return what the average precision of any number of images needs of these: rows that are concatenated.

    One row for each of the best MOST detections of an image and class: `score`, `label`, `image` (`Objects.number`),
    and at each of THRESHOLDS whether it found an object (`hit`), and whether it does not count (`skip`), (n, 10) bool.
    `objects`: the label of each true object that counts.
    """
    shares = _mask_shares if masks else _shares
    scores, labels, images, hits, skips = [], [], [], [], []
    for each, truth in zip(found, truths, strict=True):
        for label in np.unique(each.labels):
            rows = np.flatnonzero(each.labels == label)
            rows = rows[np.argsort(-each.scores[rows], kind="stable")][:MOST]
            hit, skip = _matched(each[rows], truth, truth.labels == label, shares)
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
    found: Found, truth: Objects, ours: NDArray[np.bool_], shares: Shares
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Match detections of one image and class, the best first, at each threshold.

    ours: rows of the objects of this class. shares: overlaps of detections and objects. Returns (thresholds, n) whether
    a detection found an object, and whether it does not count.
    """
    beside = (truth.ignored | truth.crowd)[ours]
    last = np.argsort(beside, kind="stable")
    order = np.flatnonzero(ours)[last]
    beside, crowd = beside[last], truth.crowd[order]
    table = shares(found, truth, order)
    hit = np.zeros((len(THRESHOLDS), len(found.scores)), bool)
    skip = np.zeros_like(hit)
    free = np.ones((len(THRESHOLDS), len(order)), bool)
    least = np.minimum(THRESHOLDS, 1 - 1e-10)
    for d in np.flatnonzero(table.max(1, initial=0.0) >= least[0]):
        left = np.arange(len(THRESHOLDS))
        # An object that counts is preferred to one that does not, whatever their overlaps; the last of equals
        for group in (~beside, beside):
            able = np.where(group & (free[left] | crowd), table[d], -1.0)
            best = able.shape[1] - 1 - able[:, ::-1].argmax(1)
            met = able[np.arange(len(left)), best] >= least[left]
            at, best = left[met], best[met]
            free[at, best] = False
            hit[at, d], skip[at, d] = True, beside[best]
            left = left[~met]
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
