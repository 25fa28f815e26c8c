"""Detection: the outputs hold boxes of each image, as detections or as candidates of a selection.

`boxes` (b, n, 4) float32 x1 y1 x2 y2 in pixels of the network's input, `scores` (b, n) float32, `labels` (b, n) int32,
from 0. With `count` (b,) int32 the first `count` rows are detections, by falling score. Without `count` the artifact
has no non-maximum suppression (NMS): rows with a positive score are candidates, and `decode` selects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import SelectionSettings, apart, greedy_nms, overlaps
from evm_deploy.data.geometry import Geometry
from evm_deploy.tasks.average_precision import Found, Objects, average_precision
from evm_deploy.tasks.drawing import draw_detections
from evm_deploy.tasks.task import Detection, Outputs, Reading, Spec, Task, class_name

BOXES, SCORES, LABELS, COUNT = "boxes", "scores", "labels", "count"
SHAPES = {BOXES: ("float32", 3), SCORES: ("float32", 2), LABELS: ("int32", 2), COUNT: ("int32", 1)}
SAME = 0.5  # intersection over union from which two boxes of a class are the same detection


def check(outputs: Mapping[str, Spec], labels: Sequence[str] | None) -> tuple[str, str] | None:
    """Check names, dtypes and shapes of a detector's outputs.

    Returns None if the outputs are valid, else a pair of texts: the actual outputs, and the expectation.
    """
    have = ", ".join(map(str, outputs.values()))
    if set(outputs) not in ({BOXES, SCORES, LABELS}, {*SHAPES}):
        return have, f"a detector has {BOXES}, {SCORES}, {LABELS} and, after its NMS, {COUNT}"
    for name, spec in outputs.items():
        dtype, rank = SHAPES[name]
        if spec.dtype != dtype or len(spec.shape) != rank or 0 in spec.shape or (rank == 3 and spec.shape[2] != 4):
            return str(spec), f"a detector has {name} of {dtype} with {rank} axes"
    rows = {spec.shape[1] for name, spec in outputs.items() if name != COUNT}
    if len(rows - {None}) > 1:
        return have, f"a detector has as many {SCORES} and {LABELS} as {BOXES}"
    return None


def select(outputs: Outputs, settings: SelectionSettings, places: Sequence[Geometry] | None = None) -> list[Found]:
    """Return the detections of each image, by falling score.

    settings: of the bundle; NMS and limits apply to outputs without `count`. places: of each image in the network's
    input. With them boxes are clipped to the image, without its padding, and returned in pixels of the original image;
    without them boxes stay in pixels of the network's input. Rows with a label below 0 are left out.
    """
    found = []
    for i, boxes in enumerate(outputs[BOXES]):
        rows = outputs[SCORES][i] > 0
        if COUNT in outputs:
            rows &= np.arange(len(boxes)) < outputs[COUNT][i]
        rows &= outputs[LABELS][i] >= 0
        each = Found(boxes[rows], outputs[SCORES][i][rows], outputs[LABELS][i][rows].astype(np.int64))
        if places is not None:
            top, left, bottom, right = places[i].content
            each = _clipped(each, np.array([left, top, right, bottom], boxes.dtype))
        if COUNT not in outputs:
            largest = float(each.boxes.max(initial=0))
            kept = greedy_nms(apart(each.boxes, each.labels, largest), each.scores, settings.iou, settings.max_det)
            each = each[kept]
        found.append(each if places is None else Found(places[i].to_image(each.boxes), each.scores, each.labels))
    return found


def _clipped(found: Found, edges: NDArray[Any]) -> Found:
    """Clip boxes to edges (left, top, right, bottom), and leave out those that become empty."""
    low, high = edges[:2], edges[2:]
    boxes = np.concatenate([found.boxes[:, :2].clip(low, high), found.boxes[:, 2:].clip(low, high)], 1)
    return Found(boxes, found.scores, found.labels)[(boxes[:, 2:] > boxes[:, :2]).all(1)]


def decode(outputs: Outputs, reading: Reading) -> list[list[Detection]]:
    """Return the detections of each image, by falling score. Without labels, a class is named `class 7`."""
    labels = reading.labels
    return [
        [
            Detection(class_name(labels, label), label, score, (x1, y1, x2, y2))
            for (x1, y1, x2, y2), score, label in zip(
                each.boxes.tolist(), each.scores.tolist(), each.labels.tolist(), strict=True
            )
        ]
        for each in select(outputs, reading.selection, reading.places)
    ]


def score(found: Sequence[Found], truths: Sequence[Objects]) -> dict[str, float]:
    """Return COCO's AP, AP50 and AP75 (0..1) of the detections of each image. See `average_precision`."""
    return average_precision(found, truths)


def matches(expected: Found, actual: Found) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair the detections of one image: rows of `expected`, and the rows of `actual` that are the same detections.

    A pair has the same label and overlaps by at least SAME. Each row is in one pair; the largest overlaps come first.
    """
    shares = overlaps(expected.boxes.astype(np.float64), actual.boxes.astype(np.float64))
    shares = np.where(expected.labels[:, None] == actual.labels[None], shares, 0.0)
    order = np.argsort(-shares, axis=None, kind="stable")
    ours: list[int] = []
    theirs: list[int] = []
    for place in order[shares.ravel()[order] >= SAME]:
        row, column = divmod(int(place), shares.shape[1])
        if row not in ours and column not in theirs:
            ours.append(row)
            theirs.append(column)
    by_row = np.argsort(np.array(ours, np.int64), kind="stable")
    return np.array(ours, np.int64)[by_row], np.array(theirs, np.int64)[by_row]


def align(expected: Outputs, actual: Outputs) -> tuple[Outputs, Outputs, float]:
    """Pair the rows of two runs on the same images, so that they can be compared value by value.

    Returns the paired rows of both as `boxes` (pairs, 4), `scores` and `labels` (pairs,), and the share of rows (0..1)
    of both runs that are in a pair, 1 if there are none. Rows are detections, or candidates where there is no `count`.
    """
    pairs: dict[str, list[NDArray[Any]]] = {f"{run}.{name}": [] for run in "ea" for name in (BOXES, SCORES, LABELS)}
    paired = rows = 0
    for ours, theirs in zip(_rows(expected), _rows(actual), strict=True):
        a, b = matches(ours, theirs)
        paired, rows = paired + 2 * len(a), rows + len(ours.scores) + len(theirs.scores)
        for run, each in (("e", ours[a]), ("a", theirs[b])):
            for name in (BOXES, SCORES, LABELS):
                pairs[f"{run}.{name}"].append(getattr(each, name))
    both = [{name: np.concatenate(pairs[f"{run}.{name}"]) for name in (BOXES, SCORES, LABELS)} for run in "ea"]
    return both[0], both[1], paired / rows if rows else 1.0


def agree(expected: Outputs, actual: Outputs) -> NDArray[np.float64]:
    """Return the share (0..1) of the detections of both runs that the other run has too, for each image, (images,)."""
    count = len(expected[BOXES])
    ours, theirs = (
        [{name: value[i : i + 1] for name, value in run.items()} for i in range(count)] for run in (expected, actual)
    )
    return np.array([align(*each)[2] for each in zip(ours, theirs, strict=True)])


def _rows(outputs: Outputs) -> list[Found]:
    """Return the rows of each image that hold a detection or candidate, in pixels of the network's input."""
    found = []
    for i, boxes in enumerate(outputs[BOXES]):
        kept = outputs[LABELS][i] >= 0
        if COUNT in outputs:
            kept &= np.arange(len(boxes)) < outputs[COUNT][i]
        found.append(Found(boxes[kept], outputs[SCORES][i][kept], outputs[LABELS][i][kept].astype(np.int64)))
    return found


DETECTION = Task(
    "detection",
    ("detections",),
    "detections",
    check=check,
    decode=decode,
    agree=agree,
    align=align,
    draw=draw_detections,
    selects=True,
)
