"""Detection: the outputs hold boxes of each image, as detections or as candidates of a selection.

`boxes` (b, n, 4) float32 x1 y1 x2 y2 in pixels of the network's input, `scores` (b, n) float32, `labels` (b, n) int32,
from 0. With `count` (b,) int32 the first `count` rows are detections, by falling score. Without `count` the artifact
has no non-maximum suppression (NMS): rows with a positive score are candidates, and `decode` selects. `masks`
(b, n, side, side) float32, of networks that give them, are probabilities in the cells of each box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import SelectionSettings, apart, greedy_nms, overlaps
from evm_deploy.data.geometry import Geometry
from evm_deploy.data.masks import DetectedMask
from evm_deploy.tasks.average_precision import FIGURES, Found, Objects, listed, precision, precision_rows
from evm_deploy.tasks.detection_labels import read_labels
from evm_deploy.tasks.drawing import draw_detections
from evm_deploy.tasks.task import Detection, Labels, Outputs, Reading, Rows, Score, Spec, Task, class_name

BOXES, SCORES, LABELS, COUNT, MASKS = "boxes", "scores", "labels", "count", "masks"
SHAPES = {
    BOXES: ("float32", 3),
    SCORES: ("float32", 2),
    LABELS: ("int32", 2),
    COUNT: ("int32", 1),
    MASKS: ("float32", 4),
}
MASK_ROWS = "mask."  # begins the columns of the rows of masks
SAME = 0.5  # intersection over union from which two boxes of a class are the same detection


def check(outputs: Mapping[str, Spec], labels: Sequence[str] | None) -> tuple[str, str] | None:
    """Check names, dtypes and shapes of a detector's outputs.

    Returns None if the outputs are valid, else a pair of texts: the actual outputs, and the expectation.
    """
    have = ", ".join(map(str, outputs.values()))
    if set(outputs) not in ({BOXES, SCORES, LABELS}, {BOXES, SCORES, LABELS, COUNT}, {*SHAPES}):
        return have, f"a detector has {BOXES}, {SCORES}, {LABELS} and, after its NMS, {COUNT}, with or without {MASKS}"
    for name, spec in outputs.items():
        dtype, rank = SHAPES[name]
        if spec.dtype != dtype or len(spec.shape) != rank or 0 in spec.shape or (name == BOXES and spec.shape[2] != 4):
            return str(spec), f"a detector has {name} of {dtype} with {rank} axes"
    rows = {spec.shape[1] for name, spec in outputs.items() if name != COUNT}
    if len(rows - {None}) > 1:
        return have, f"a detector has as many {SCORES} and {LABELS} as {BOXES}"
    return None


def select(outputs: Outputs, settings: SelectionSettings, places: Sequence[Geometry] | None = None) -> list[Found]:
    """Return the detections of each image, by falling score.

    settings: of the bundle; NMS and limits apply to outputs without `count`. places: of each image in the network's
    input. With them boxes are clipped to the image, without its padding, and returned in pixels of the original image;
    without them boxes stay in pixels of the network's input, and there are no masks. Rows with a label below 0 are left
    out.
    """
    found = []
    for i, boxes in enumerate(outputs[BOXES]):
        rows = outputs[SCORES][i] > 0
        if COUNT in outputs:
            rows &= np.arange(len(boxes)) < outputs[COUNT][i]
        rows &= outputs[LABELS][i] >= 0
        each = _found(outputs, i, np.flatnonzero(rows))
        if places is not None:
            if MASKS in outputs:
                each = replace(each, masks=_masks(outputs[MASKS][i][rows], each.boxes, places[i]))
            top, left, bottom, right = places[i].content
            each = _clipped(each, np.array([left, top, right, bottom], boxes.dtype))
        if COUNT not in outputs:
            largest = float(each.boxes.max(initial=0))
            kept = greedy_nms(apart(each.boxes, each.labels, largest), each.scores, settings.iou, settings.max_det)
            each = each[kept]
        found.append(each if places is None else replace(each, boxes=places[i].to_image(each.boxes)))
    return found


def _masks(probabilities: NDArray[Any], boxes: NDArray[Any], place: Geometry) -> NDArray[np.object_]:
    """Return the masks of detections in pixels of the image. boxes: as the network looked at them, in its pixels."""
    height, width = place.original
    at = place.to_image(boxes).tolist()
    return listed(
        [DetectedMask(each, tuple(box), (height, width)) for each, box in zip(probabilities, at, strict=True)]
    )


def _clipped(found: Found, edges: NDArray[Any]) -> Found:
    """Clip boxes to edges (left, top, right, bottom), and leave out those that become empty."""
    low, high = edges[:2], edges[2:]
    boxes = np.concatenate([found.boxes[:, :2].clip(low, high), found.boxes[:, 2:].clip(low, high)], 1)
    return replace(found, boxes=boxes)[(boxes[:, 2:] > boxes[:, :2]).all(1)]


def decode(outputs: Outputs, reading: Reading) -> list[list[Detection]]:
    """Return the detections of each image, by falling score. A class without a label is named `class 7`."""
    labels = reading.labels
    return [
        [
            Detection(class_name(labels, label), label, score, (x1, y1, x2, y2), mask)
            for (x1, y1, x2, y2), score, label, mask in zip(
                each.boxes.tolist(),
                each.scores.tolist(),
                each.labels.tolist(),
                [None] * len(each.scores) if each.masks is None else each.masks,
                strict=True,
            )
        ]
        for each in select(outputs, reading.selection, reading.places)
    ]


def score(outputs: Outputs, labels: Labels, reading: Reading) -> Rows:
    """Return the rows of each image for `figures`. labels: `Objects` of each image, in its own pixels."""
    return found_rows(select(outputs, reading.selection, reading.places), labels)


def found_rows(found: Sequence[Found], truths: Sequence[Objects]) -> Rows:
    """Return the rows of `precision_rows` of the detections of each image.

    With masks on both sides also the rows of the masks, in columns that begin with MASK_ROWS.
    """
    rows = precision_rows(found, truths)
    if all(each.masks is not None for each in found) and all(each.masks is not None for each in truths):
        of_masks = precision_rows(found, truths, masks=True)
        rows = {**rows, **{MASK_ROWS + name: values for name, values in of_masks.items()}}
    return rows


def figures(rows: Rows) -> dict[str, float]:
    """Return AP, AP50 and AP75 of the boxes and, where there are rows of masks, `mask_AP` and so on."""
    of_masks = {name.removeprefix(MASK_ROWS): values for name, values in rows.items() if name.startswith(MASK_ROWS)}
    found = precision(rows)
    return found | ({f"mask_{name}": value for name, value in precision(of_masks).items()} if of_masks else {})


def matches(expected: Found, actual: Found, tolerance: float = np.inf) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair the detections of one image: rows of `expected`, and the rows of `actual` that are the same detections.

    A pair has the same label, overlaps by at least SAME, and differs by at most the tolerance: in score, and in
    coordinates relative to the largest expected one. Each row is in one pair; the nearest pairs come first.
    """
    shares = overlaps(expected.boxes.astype(np.float64), actual.boxes.astype(np.float64))
    apart = np.abs(_differences(expected.scores, actual.scores))
    able = (expected.labels[:, None] == actual.labels[None]) & (shares >= SAME) & (apart <= tolerance)
    largest = tolerance * float(np.abs(expected.boxes).max(initial=1.0))
    for mine, other in zip(expected.boxes.T, actual.boxes.T, strict=True):
        able &= np.abs(_differences(mine, other)) <= largest
    places = np.flatnonzero(able)
    nearest = places[np.argsort((apart - shares).ravel()[places], kind="stable")]
    ours: list[int] = []
    theirs: list[int] = []
    used: tuple[set[int], set[int]] = (set(), set())
    for row, column in zip(*(each.tolist() for each in np.divmod(nearest, shares.shape[1])), strict=True):
        if row not in used[0] and column not in used[1]:
            ours.append(row)
            theirs.append(column)
            used[0].add(row)
            used[1].add(column)
    by_row = np.argsort(np.array(ours, np.int64), kind="stable")
    return np.array(ours, np.int64)[by_row], np.array(theirs, np.int64)[by_row]


def _differences(mine: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Return mine - other of every two values, (mine, other) float64."""
    apart: NDArray[np.float64] = mine.astype(np.float64)[:, None] - other.astype(np.float64)[None]
    return apart


def align(expected: Outputs, actual: Outputs, tolerance: float = np.inf) -> tuple[Outputs, Outputs, float]:
    """Pair the rows of two runs on the same images that agree within the tolerance (`matches`).

    Returns the paired rows of both as `boxes` (pairs, 4), `scores`, `labels` (pairs,) and, of networks that give them,
    `masks` (pairs, side, side), and the share (0..1) that is in a pair, of the rows of both runs whose score is not
    within a finite tolerance of nothing; 1 if there are none. Rows are detections, or candidates where there is no
    `count`.
    """
    least = tolerance if np.isfinite(tolerance) else 0.0
    names = [name for name in expected if name != COUNT]
    pairs: list[dict[str, list[NDArray[Any]]]] = [{name: [] for name in names} for _ in range(2)]
    paired = total = 0
    for i in range(len(expected[BOXES])):
        runs = [(run, _rows(run, i)) for run in (expected, actual)]
        ours, theirs = (_found(run, i, rows) for run, rows in runs)
        same = matches(ours, theirs, tolerance)
        for part, (run, rows), which in zip(pairs, runs, same, strict=True):
            counted = ~(run[SCORES][i][rows] <= least)  # NaN counts
            paired, total = paired + int(counted[which].sum()), total + int(counted.sum())
            for name in names:
                part[name].append(run[name][i][rows[which]])
    first, second = ({name: np.concatenate(values) for name, values in part.items()} for part in pairs)
    return first, second, paired / total if total else 1.0


def agree(expected: Outputs, actual: Outputs) -> NDArray[np.float64]:
    """Return the share (0..1) of the detections of both runs that the other run has too, for each image, (images,).

    The same label and an overlap of at least SAME make two detections the same.
    """
    count = len(expected[BOXES])
    ours, theirs = (
        [{name: value[i : i + 1] for name, value in run.items()} for i in range(count)] for run in (expected, actual)
    )
    return np.array([align(*each)[2] for each in zip(ours, theirs, strict=True)])


def _rows(outputs: Outputs, image: int) -> NDArray[np.int64]:
    """Return the numbers of the rows of an image that hold a detection or candidate."""
    kept = outputs[LABELS][image] >= 0
    if COUNT in outputs:
        kept &= np.arange(len(kept)) < outputs[COUNT][image]
    return np.flatnonzero(kept)


def _found(outputs: Outputs, image: int, rows: NDArray[np.int64]) -> Found:
    """Return rows of an image, in pixels of the network's input."""
    boxes, scores, labels = (outputs[name][image][rows] for name in (BOXES, SCORES, LABELS))
    return Found(boxes, scores, labels.astype(np.int64))


DETECTION = Task(
    "detection",
    ("detections",),
    "detections",
    check=check,
    decode=decode,
    agree=agree,
    align=align,
    draw=draw_detections,
    score=Score(
        score,
        figures,
        titles={name: name for name in FIGURES},
        read=read_labels,
    ),
    selects=True,
)
