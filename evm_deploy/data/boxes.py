"""Boxes of detectors in numpy: overlap, greedy suppression, and the settings of a selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NMS_MODES = ("graph", "none")
MAX_DETECTIONS = 1000  # of an image
NO_LABEL = -1  # label of a row that holds no detection


@dataclass(frozen=True)
class SelectionSettings:
    """Settings of the selection of detections among all boxes of an image.

    score_thr: a detection has a larger score, 0..1. iou: of two boxes of a class that overlap more, the one with the
    lower score is dropped (non-maximum suppression, NMS). max_det: most detections of an image. nms: `graph` if the
    artifact does the NMS, `none` if it gives the candidates, and `tasks.detection.decode` does the NMS. Raises
    ValueError for values out of range, beginning with the name of the field.
    """

    score_thr: float = 0.05
    iou: float = 0.5
    max_det: int = 100
    nms: str = NMS_MODES[0]

    def __post_init__(self) -> None:
        if not 0 <= self.score_thr < 1:
            raise ValueError(f"score_thr {self.score_thr}: use a score from 0 to below 1")
        if not 0 < self.iou <= 1:
            raise ValueError(f"iou {self.iou}: use an overlap over 0 and at most 1")
        if not 1 <= self.max_det <= MAX_DETECTIONS:
            raise ValueError(f"max_det {self.max_det}: use a number from 1 to {MAX_DETECTIONS}")
        if self.nms not in NMS_MODES:
            raise ValueError(f"nms {self.nms!r}: choose from: {', '.join(NMS_MODES)}")


DEFAULT_SELECTION = SelectionSettings()


def area(boxes: NDArray[Any]) -> NDArray[Any]:
    """Return the areas (..,) of boxes (.., 4) x1 y1 x2 y2, in their unit squared."""
    sizes: NDArray[Any] = boxes[..., 2:] - boxes[..., :2]
    product: NDArray[Any] = sizes[..., 0] * sizes[..., 1]
    return product


def overlaps(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Return the intersection over union (n, m) of boxes a (n, 4) and b (m, 4), x1 y1 x2 y2. Empty boxes give 0."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    sides = np.maximum(sides, 0)
    inter = sides[..., 0] * sides[..., 1]
    union = area(a)[:, None] + area(b)[None] - inter
    shares: NDArray[Any] = inter / np.where(union > 0, union, 1)
    return shares


def greedy_nms(
    boxes: NDArray[Any], scores: NDArray[Any], iou: float, most: int, least: float = 0.0
) -> NDArray[np.int64]:
    """Return the indices of at most `most` boxes by falling score, none of which overlaps a better one by over `iou`.

    boxes: (n, 4) x1 y1 x2 y2. scores: (n,); boxes with a score of `least` or less are left out. Equal scores: the lower
    index is first. The classes must be kept apart by the caller (`apart`). Equal to mmcv's nms in float32.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > least]
    kept: list[int] = []
    while len(order) and len(kept) < most:
        first, order = order[0], order[1:]
        kept.append(int(first))
        order = order[~(overlaps(boxes[first : first + 1], boxes[order])[0] > iou)]
    return np.array(kept, np.int64)


def apart(boxes: NDArray[np.float32], labels: NDArray[Any], largest: float) -> NDArray[np.float32]:
    """Return boxes (n, 4) shifted by label times (largest + 1), so that boxes of different classes do not overlap.

    largest: the largest coordinate of all boxes.
    """
    shift: NDArray[np.float32] = labels.astype(np.float32)[:, None] * np.float32(largest + 1)
    return boxes + shift
