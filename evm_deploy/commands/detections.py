"""Print the detections or label maps of images, one line for each image, and save images with them drawn."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import numbered
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.rows import Rows
from evm_deploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from evm_deploy.bundle.loaded import LoadedBundle
    from evm_deploy.tasks.task import Detection, LabelMap, Prediction

JPEG = (".jpg", ".jpeg")
JPEG_QUALITY = 92
LISTED = 8  # classes in the line of a label map; JSON has all
LEAST_SHARE = 0.0005  # that is not rounded to 0


@dataclass(frozen=True)
class Shown:
    """Texts on the answers of a task. key: of the answers in a row of JSON. least: default of --min-score.

    `kept(answer, least)`: return what counts. `line(answer)`: return it as text. `row(each)`: return one of it as data.
    """

    key: str
    least: float
    kept: Callable[[Any, float], Any]
    line: Callable[[Any], str]
    row: Callable[[Any], dict[str, Any]]

    def facts(self, found: Any, ms: Mapping[str, float]) -> dict[str, Any]:
        """Return what was found, and the times of the stages in ms, as plain data."""
        return {
            self.key: [self.row(each) for each in found],
            "ms": {stage: round(each, 3) for stage, each in ms.items()},
        }


@dataclass(frozen=True)
class Asked:
    """Flags on the answers.

    top: classes of a classifier for each image. least: smallest score of a detection that counts. save: folder
    for drawn copies of images and videos, or one video file. json: print no lines. quiet: say nothing on stderr but
    errors.
    """

    top: int
    least: float
    save: Path | None
    json: bool
    quiet: bool


def detect(model: LoadedBundle, names: Sequence[str], asked: Asked, rows: Rows) -> Iterator[str]:
    """Detect objects, or the class of every pixel, in image files, a batch at a time. Yields the line of each image.

    rows: gets a row for each image: its path, what was found and the times in ms, or its error.
    """
    shown = SHOWN[model.task.name]
    size = model.manifest.batch.max or 1
    for start in range(0, len(names), size):
        part = names[start : start + size]
        errors: dict[int, ImageError] = {}
        answers = model.predict(part, on_error=errors.__setitem__)
        ms = {stage: each / max(1, len(part) - len(errors)) for stage, each in model.spent_ms.items()}
        for index, (name, answer) in enumerate(zip(part, answers, strict=True)):
            if index in errors:
                rows.fail({"image": name}, errors[index])
                continue
            found = shown.kept(answer, asked.least)
            row = {"image": name, **shown.facts(found, ms)}
            if asked.save:
                row["saved"] = str(save_drawn(model, name, found, asked.save, asked.least))
            rows.add(row)
            if not asked.json:
                yield escape_controls(f"{name}: {shown.line(found)}   {times(ms)}")


def times(ms: Mapping[str, float]) -> str:
    """Return the times of stages as text: `preprocess 1.2 ms, inference 12.3 ms, postprocess 0.8 ms`."""
    return ", ".join(f"{stage} {each:.1f} ms" for stage, each in ms.items())


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


def shares(found: LabelMap) -> str:
    """Return the classes that are present, with their shares of the pixels, as text: `63.1 % road, 36.9 % sky`."""
    figures = (f"{100 * each.score:.1f}" if each.score >= LEAST_SHARE else "<0.1" for each in found[:LISTED])
    texts = [f"{figure} % {each.label}" for figure, each in zip(figures, found, strict=False)]
    rest = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return ", ".join([*texts, *rest])


def row_of_class(found: Prediction) -> dict[str, Any]:
    """Return plain data of a class that is present. share: of the pixels, 0..1."""
    return {"label": found.label, "index": found.index, "share": found.score}


def best(found: Sequence[Prediction]) -> str:
    """Return the classes of an image with their probabilities as text: `97.31 % cat, 1.20 % dog`."""
    return ", ".join(f"{100 * each.score:.2f} % {each.label}" for each in found)


SHOWN = {
    "classification": Shown("top", 0.0, lambda found, least: found, best, vars),
    "detection": Shown("detections", 0.3, lambda found, least: [e for e in found if e.score >= least], counts, row_of),
    "segmentation": Shown("classes", 0.0, lambda found, least: found, shares, row_of_class),
}


def save_drawn(model: LoadedBundle, name: str, found: Sequence[Any], folder: Path, least: float) -> Path:
    """Write a copy of an image with what was found drawn on it into a folder. Returns its path, a name free there.

    JPEG files stay JPEG; all others become PNG. Raises UsageError if the folder cannot be written.
    """
    from evm_deploy.data.reading import read_image

    assert model.task.draw  # checked by the caller
    drawn = model.task.draw(read_image(name), found, least)
    stem, suffix = Path(name).stem or "image", Path(name).suffix.lower()
    suffix, options = (suffix, {"quality": JPEG_QUALITY}) if suffix in JPEG else (".png", {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in numbered(folder / f"{stem}{suffix}"):
            with contextlib.suppress(FileExistsError), path.open("xb") as file:
                drawn.save(file, "JPEG" if suffix in JPEG else "PNG", **options)
                return path
        raise AssertionError("numbers end")
    except OSError as error:
        raise UsageError(
            f"--save {folder} cannot be written: {error.strerror or error}", "give another folder"
        ) from error
