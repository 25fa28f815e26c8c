"""Write predictions.json: outputs of detectors and segmenters, and the boxes and label maps that every SDK must decode.

    python sdk/vectors/make_predictions.py

The places of images cover crop, stretch and pad. Scores are equal in places, boxes are empty, outside of the image, or
overlap exactly as much as the limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import NO_LABEL, SelectionSettings
from evm_deploy.data.geometry import Geometry
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.tasks.detection import BOXES, COUNT, LABELS, SCORES, select

HERE = Path(__file__).parent
SIZE = (96, 128)
PLACES = {
    "pad-wide": ("pad", (300, 700)),
    "pad-tall": ("pad", (611, 203)),
    "pad-one-pixel": ("pad", (1, 1)),
    "stretch": ("stretch", (77, 31)),
    "crop": ("crop", (240, 250)),
    "crop-wide": ("crop", (50, 311)),
    "fits": ("stretch", SIZE),
}
LOOSE, STRICT = SelectionSettings(), SelectionSettings(score_thr=0.3, iou=0.25, max_det=7)


def preprocessing(resize: str) -> Preprocessing:
    """Return the preprocessing of the cases."""
    return Preprocessing(SIZE, 0.875, "bilinear", resize=resize)


def outputs_of(seed: int, rows: int, classes: int, count: int | None) -> dict[str, NDArray[Any]]:
    """Return seeded outputs of a detector for one image: clusters of boxes with equal scores, and boxes of no area.

    count: number of rows that are detections, None for candidates, of which every fifth row is none.
    """
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-10, [SIZE[1] + 10, SIZE[0] + 10], (6, 2))[rng.integers(0, 6, rows)]
    centres += rng.normal(0, 6, (rows, 2))
    sides = rng.choice([0, 12, 30, 61], (rows, 2), p=[0.05, 0.35, 0.4, 0.2]) * rng.uniform(0.8, 1.2, (rows, 2))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], 1).clip(0, [SIZE[1], SIZE[0]] * 2)
    scores = np.round(rng.uniform(0.05, 1, rows), 2)
    labels = rng.integers(0, classes, rows)
    if count is None:
        none = np.arange(rows) % 5 == 4
        scores[none], labels[none] = 0, NO_LABEL
    else:
        scores = -np.sort(-scores)
        scores[count:], labels[count:], boxes[count:] = 0, NO_LABEL, 0
    found = {BOXES: boxes.astype(np.float32), SCORES: scores.astype(np.float32), LABELS: labels.astype(np.int32)}
    return found if count is None else {**found, COUNT: np.int32(count)}


def at_the_limit() -> dict[str, NDArray[Any]]:
    """Return candidates that overlap by exactly a half, which suppresses none, and twice the same box."""
    boxes = [[0, 0, 20, 10], [0, 0, 10, 10], [0, 0, 20, 10], [40, 40, 60, 60], [40, 40, 60, 60.0001]]
    return {
        BOXES: np.float32(boxes),
        SCORES: np.float32([0.9, 0.9, 0.4, 0.5, 0.5]),
        LABELS: np.int32([1, 1, 1, 0, 2]),
    }


def detections() -> Iterator[dict[str, Any]]:
    """Yield the cases of detectors."""
    for i, (name, (resize, original)) in enumerate(PLACES.items()):
        yield _detections(f"{name}-graph", outputs_of(i, 30, 5, 21), LOOSE, resize, original)
        yield _detections(f"{name}-none", outputs_of(100 + i, 150, 3, None), LOOSE, resize, original)
    yield _detections("strict", outputs_of(200, 200, 2, None), STRICT, "pad", (300, 700))
    yield _detections("at-the-limit", at_the_limit(), LOOSE, "stretch", SIZE)
    yield _detections("nothing-graph", outputs_of(3, 10, 2, 0), LOOSE, "pad", (40, 40))
    nothing = outputs_of(3, 10, 2, None)
    nothing[SCORES][:], nothing[LABELS][:] = 0, NO_LABEL
    yield _detections("nothing-none", nothing, LOOSE, "pad", (40, 40))


def _detections(
    name: str, outputs: dict[str, NDArray[Any]], settings: SelectionSettings, resize: str, original: tuple[int, int]
) -> dict[str, Any]:
    """Return a case: the outputs for one image, and its boxes in pixels of the image."""
    place = preprocessing(resize).geometry(original[1], original[0])
    (found,) = select({key: np.asarray(value)[None] for key, value in outputs.items()}, settings, [place])
    return {
        "name": name,
        **_placed(place, resize),
        "iou": settings.iou,
        "max_det": settings.max_det,
        "outputs": {key: value.tolist() for key, value in outputs.items()},
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "labels": found.labels.tolist(),
    }


def label_maps() -> Iterator[dict[str, Any]]:
    """Yield the cases of segmenters: (H, W) of a small input, and the map of the image."""
    for i, (name, (resize, (height, width))) in enumerate(PLACES.items()):
        spec = Preprocessing((12, 17), 0.875, "bilinear", resize=resize)
        place = spec.geometry(1 + width // 11, 1 + height // 11)
        classes, dtype = (300, "int32") if i == 1 else (150, "uint8")
        labels = np.random.default_rng(i).integers(0, classes, spec.size)
        yield {
            "name": name,
            **_placed(place, resize),
            "dtype": dtype,
            "map": labels.tolist(),
            "expected": place.map_to_image(labels).tolist(),
        }


def _placed(place: Geometry, resize: str) -> dict[str, Any]:
    """Return the preprocessing's values that decide a place, and the place."""
    return {
        "preprocessing": Preprocessing(place.size, 0.875, "bilinear", resize=resize).as_dict(),
        "image": place.original,
        "resized": place.resized,
        "offset": place.offset,
    }


def main() -> None:
    """Write predictions.json."""
    content = {"schema_version": 1, "detections": [*detections()], "label_maps": [*label_maps()]}
    lines = [f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, content[key])) + "\n ]" for key in [*content][1:]]
    text = '{\n "schema_version": 1,\n' + ",\n".join(lines) + "\n}\n"
    (HERE / "predictions.json").write_text(text, encoding="utf-8")
    print(f"{len(content['detections'])} detections, {len(content['label_maps'])} label maps, {len(text) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
