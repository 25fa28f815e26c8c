"""Print the detections of images, one line for each image, and save images with boxes drawn on them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.text import escape_controls
from evm_deploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from evm_deploy.bundle.loaded import LoadedBundle
    from evm_deploy.tasks.task import Detection

JPEG = (".jpg", ".jpeg")
JPEG_QUALITY = 92


def detect(
    model: LoadedBundle, names: Sequence[str], least: float, save: Path | None, rows: list[dict[str, Any]], quiet: bool
) -> Iterator[str]:
    """Detect objects in image files, a batch at a time. Yields the line of each image, or the message of its error.

    least: smallest score of a detection that counts. save: folder for copies of the images with boxes. rows: gets a row
    for each image: its path, detections and the times in ms, or its error. quiet: yield no lines.
    """
    size = model.manifest.batch.max or 1
    for start in range(0, len(names), size):
        part = names[start : start + size]
        errors: dict[int, ImageError] = {}
        answers = model.predict(part, on_error=errors.__setitem__)
        spent = {stage: ms / max(1, len(part) - len(errors)) for stage, ms in model.spent_ms.items()}
        for index, (name, answer) in enumerate(zip(part, answers, strict=True)):
            if index in errors:
                rows.append({"image": name, "error": str(errors[index])})
                print(escape_controls(f"evm-run: {errors[index]}"), file=sys.stderr)
                continue
            found: list[Any] = [each for each in answer if each.score >= least]
            row: dict[str, Any] = {
                "image": name,
                "detections": [row_of(each) for each in found],
                "ms": {stage: round(ms, 3) for stage, ms in spent.items()},
            }
            if save:
                row["saved"] = str(save_drawn(model, name, found, save, least))
            rows.append(row)
            if not quiet:
                times = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in spent.items())
                yield escape_controls(f"{name}: {counts(found)}   {times}")


def counts(found: Sequence[Detection]) -> str:
    """Return the number of detections of each class as text, the most frequent first: `4 person, 1 bus`."""
    numbers = Counter(each.label for each in found)
    return ", ".join(f"{count} {label}" for label, count in numbers.most_common()) or "no detections"


def row_of(found: Detection) -> dict[str, Any]:
    """Return plain data of a detection. The box is in pixels of the upright original image.

    mask: COCO's run lengths {size: [H, W], counts: text} of that image, of networks that give masks.
    """
    box = dict(zip(("x1", "y1", "x2", "y2"), (round(side, 3) for side in found.box), strict=True))
    row = {"label": found.label, "index": found.index, "score": found.score, "box": box}
    return row if found.mask is None else {**row, "mask": found.mask.to_coco()}


def save_drawn(model: LoadedBundle, name: str, found: Sequence[Any], folder: Path, least: float) -> Path:
    """Write a copy of an image with its detections into a folder, under a name that is free there. Returns its path.

    JPEG files stay JPEG; all others become PNG. Raises UsageError if the folder cannot be written.
    """
    from evm_deploy.data.reading import read_image

    assert model.task.draw  # checked by the caller
    drawn = model.task.draw(read_image(name), found, least)
    stem, suffix = Path(name).stem or "image", Path(name).suffix.lower()
    suffix, options = (suffix, {"quality": JPEG_QUALITY}) if suffix in JPEG else (".png", {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
            try:
                with path.open("xb") as file:
                    drawn.save(file, "JPEG" if suffix in JPEG else "PNG", **options)
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UsageError(
            f"--save {folder} cannot be written: {error.strerror or error}", "give another folder"
        ) from error
