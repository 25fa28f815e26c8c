"""Segmentation: the output holds the class of every pixel.

`label_map` (b, H, W), H x W the size of the network's input: class index from 0, uint8 for up to 256 classes, int32 for
more, and on a runtime without uint8 outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.geometry import Geometry
from evm_deploy.errors import CalibrationError
from evm_deploy.tasks.drawing import draw_label_map
from evm_deploy.tasks.mean_iou import mean_iou, pixel_counts
from evm_deploy.tasks.segmentation_labels import read_masks
from evm_deploy.tasks.task import LabelMap, Labels, Outputs, Reading, Rows, Score, Spec, Task

LABEL_MAP = "label_map"
DTYPES = ("uint8", "int32")


def check(outputs: Mapping[str, Spec], labels: Sequence[str] | None) -> tuple[str, str] | None:
    """Check name, dtype and shape of a segmenter's output.

    Returns None if the output is valid, else a pair of texts: the actual outputs, and the expectation.
    """
    if set(outputs) != {LABEL_MAP}:
        return ", ".join(map(str, outputs.values())), f"a segmenter has {LABEL_MAP}"
    spec = outputs[LABEL_MAP]
    if spec.dtype not in DTYPES or len(spec.shape) != 3 or 0 in spec.shape:
        return str(spec), f"a segmenter has {LABEL_MAP} of {' or '.join(DTYPES)} with 3 axes"
    return None


def decode(outputs: Outputs, reading: Reading) -> list[LabelMap]:
    """Return the label map of each image, at the size of the original image where the reading has its place."""
    maps = outputs[LABEL_MAP]
    places: Sequence[Geometry | None] = reading.places or [None] * len(maps)
    return [
        LabelMap(each if place is None else place.map_to_image(each), reading.labels, reading.palette)
        for each, place in zip(maps, places, strict=True)
    ]


def score(outputs: Outputs, labels: Labels, reading: Reading) -> Rows:
    """Count the pixels of each class in each image: `intersection`, `found` and `true`, (images, classes) float64.

    labels: `TrueMap` of each image. `mean_iou` reduces the rows. Raises CalibrationError for a mask whose size is not
    that of its image.
    """
    rows = []
    for found, truth in zip(decode(outputs, reading), labels, strict=True):
        wanted = truth.read()
        if wanted.shape != found.map.shape:
            sizes = " and ".join(f"{width}x{height}" for height, width in (wanted.shape, found.map.shape))
            raise CalibrationError(
                f"{truth.path} and its image have different sizes: {sizes}", "give masks of the images"
            )
        rows.append(pixel_counts(found.map, wanted, reading.classes))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def agree(expected: Outputs, actual: Outputs) -> NDArray[np.float64]:
    """Return the share (0..1) of pixels with the same class in both runs, for each image, (images,)."""
    same: NDArray[np.float64] = (expected[LABEL_MAP] == actual[LABEL_MAP]).mean((1, 2))
    return same


def align(expected: Outputs, actual: Outputs, tolerance: float = np.inf) -> tuple[Outputs, Outputs, float]:
    """Return the pixels with the same class in two runs on the same images, and their share (0..1) of all pixels.

    tolerance: not used, classes are equal or not.
    """
    ours, theirs = expected[LABEL_MAP], actual[LABEL_MAP]
    same = ours == theirs
    return {LABEL_MAP: ours[same]}, {LABEL_MAP: theirs[same]}, float(same.mean())


SEGMENTATION = Task(
    "segmentation",
    (LABEL_MAP,),
    "label maps",
    check=check,
    decode=decode,
    agree=agree,
    align=align,
    draw=draw_label_map,
    score=Score(score, mean_iou, titles={"mIoU": "mIoU", "pixel_accuracy": "pixel accuracy"}, read=read_masks),
    selects=True,
)
