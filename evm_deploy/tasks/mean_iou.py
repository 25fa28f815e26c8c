"""Mean intersection over union (mIoU) and pixel accuracy of label maps, from counts of each image.

Definition of mmseg's IoUMetric: pixels whose true class is IGNORED do not count; the mean is over the classes that
occur in the labels or in the predictions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.tasks.task import Rows

IGNORED = 255  # true class of pixels that do not count
INTERSECTION, FOUND, TRUE = "intersection", "found", "true"


def pixel_counts(found: NDArray[Any], truth: NDArray[Any], classes: int, ignored: int = IGNORED) -> Rows:
    """Count the pixels of each class in one image. found, truth: class indices (h, w).

    Returns `intersection`, `found` and `true`, (1, classes) float64: whole numbers, so that sums over images are exact
    in any order. Concatenate the rows of images for `mean_iou`. Raises ValueError for maps of different sizes.
    """
    if found.shape != truth.shape:
        raise ValueError(f"the label map is {list(found.shape)}, the true one {list(truth.shape)}")
    counted = truth != ignored
    ours, theirs = found[counted], truth[counted]

    def count(values: NDArray[Any]) -> NDArray[np.float64]:
        inside = values[(values >= 0) & (values < classes)]
        return np.bincount(inside.astype(np.int64), minlength=classes)[None].astype(np.float64)

    return {INTERSECTION: count(ours[ours == theirs]), FOUND: count(ours), TRUE: count(theirs)}


def class_iou(rows: Rows) -> NDArray[np.float64]:
    """Return the intersection over union (0..1) of each class, (classes,); NaN for a class that does not occur."""
    inter, found, true = (rows[name].sum(0) for name in (INTERSECTION, FOUND, TRUE))
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = inter / (found + true - inter)
    return shares


def mean_iou(rows: Rows) -> dict[str, float]:
    """Return `mIoU`, the mean over classes, and `pixel_accuracy`, 0..1, of the rows (images, classes) of a set.

    Both are NaN if no pixel counts.
    """
    shares = class_iou(rows)
    shares = shares[~np.isnan(shares)]
    total = rows[TRUE].sum()
    accuracy = float(rows[INTERSECTION].sum() / total) if total else float("nan")
    return {"mIoU": float(shares.mean()) if len(shares) else float("nan"), "pixel_accuracy": accuracy}
