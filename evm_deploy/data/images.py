"""Find, sample, label and check images: from a folder, a list, a CSV or an .npz, for calibration and evaluation."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.preprocessing import Preprocessing, read_rgb
from evm_deploy.errors import CalibrationError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MIN_IMAGES = 100  # with fewer images, the activation ranges of pooled tensors are unreliable
MAX_BAD_SHARE = 0.05  # accepted share of unreadable, constant or repeated images
MIN_CONTRAST = 2.0  # smallest standard deviation of an image's pixels (0..255)
MIN_CORRELATION = 0.2  # smallest correlation of neighbouring pixels: noise has about 0, real images 0.7 to 1
MIN_PIXELS = 1000  # smallest image that is tested for noise
LISTED = 4  # names that an error message lists

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageItem:
    """Source of one image: a file, or an array of an .npz. label: class index in the order of the head, if known."""

    name: str
    source: Path | Pixels
    label: int | None = None


@dataclass(frozen=True)
class ImageSet:
    """Set of images with their preprocessing. Images are decoded on request, and decoded pixels are not kept.

    skipped: "name: reason" of each image that could not be read.
    """

    items: tuple[ImageItem, ...]
    preprocessing: Preprocessing
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self) -> Iterator[Pixels]:
        """Yield the preprocessed pixels of each image, (H, W, 3) uint8, in order. Raises ImageError."""
        for item in self.items:
            yield self.preprocessing.pixels(item.source)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of each image, (images,) int64. Only labelled sets have labels."""
        return np.array([item.label for item in self.items], np.int64)

    def digest(self) -> str:
        """Return the SHA-256 of the preprocessing, the images in order and their labels, as hex digits."""
        total = hashlib.sha256(repr(self.preprocessing).encode())
        for item in self.items:
            source = item.source
            content = (
                source.read_bytes() if isinstance(source, Path) else repr(source.shape).encode() + source.tobytes()
            )
            total.update(hashlib.sha256(content).digest())
            if item.label is not None:
                total.update(f"label {item.label}".encode())
        return total.hexdigest()


def find_images(source: Path) -> list[ImageItem]:
    """List the images of `source`: a folder, a text file with one path per line, or an .npz with `images` (uint8).

    Raises CalibrationError.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        items = [ImageItem(path.relative_to(source).as_posix(), path) for path in files]
    elif source.suffix == ".npz":
        items = _from_npz(source)
    elif source.is_file():
        lines = [line.strip() for line in _read_text(source).splitlines()]
        items = [ImageItem(line, source.parent / line) for line in lines if line and not line.startswith("#")]
    else:
        raise CalibrationError(f"{source} does not exist", "give a folder of images, a list of paths, or an .npz")
    if not items:
        raise CalibrationError(f"{source}: no images found", f"known suffixes: {', '.join(sorted(SUFFIXES))}")
    return items


def sample(items: Sequence[ImageItem], count: int, seed: int = 0) -> list[ImageItem]:
    """Draw `count` items at random without replacement, with a fixed seed. The order of the items is kept.

    Returns all items if there are at most `count`.
    """
    if len(items) <= count:
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), count, replace=False)
    return [items[i] for i in sorted(chosen)]


def calibration_images(
    source: Path, preprocessing: Preprocessing, count: int = 512, *, seed: int = 0, force: bool = False
) -> ImageSet:
    """Return up to `count` images of `source` for calibration, after checking that the images are suitable.

    Unreadable images are left out and listed in `skipped`. Raises CalibrationError if more than 5 % of the images are
    unreadable. Unless `force` is set, raises CalibrationError also if there are fewer than 100 images, or if more than
    5 % are constant, look like noise or repeat others: activation ranges from such images do not fit real images.
    """
    chosen = sample(find_images(source), count, seed)
    images, facts = _readable(source, chosen, preprocessing)
    if force:
        return images
    total = len(images)
    if total < MIN_IMAGES:
        _refuse(source, f"{total} images are too few, at least {MIN_IMAGES} are required")
    kinds = {
        "have a single colour": [fact.name for fact in facts if fact.contrast < MIN_CONTRAST],
        "look like random noise": [f.name for f in facts if f.contrast >= MIN_CONTRAST and f.alike < MIN_CORRELATION],
        "are copies of other images": _repeated(facts),
    }
    for what, names in kinds.items():
        if len(names) > MAX_BAD_SHARE * total:
            _refuse(source, f"{len(names)} of {total} images {what} ({_some(names)})")
    return images


def labelled_images(
    source: Path, preprocessing: Preprocessing, num_classes: int, labels: Sequence[str] | None = None
) -> ImageSet:
    """Return all images of `source` with their class index in the order of the head.

    source: a folder with one folder per class, a CSV with `path,class` lines, or an .npz with `images` (uint8) and
    `labels` (integers). A class is given by its name in `labels` or by its index. Other names are numbered in
    alphabetical order, if there are as many names as classes. Raises CalibrationError if the classes do not fit the
    head, or if more than 5 % of the images are unreadable.
    """
    if source.suffix.lower() == ".npz":
        return _readable(source, _labelled_npz(source, num_classes), preprocessing)[0]
    named = _from_csv(source) if source.suffix.lower() == ".csv" else _from_class_folders(source)
    index = _class_index(source, sorted({name for _, name in named}), num_classes, labels)
    items = [replace(item, label=index[name]) for item, name in named]
    return _readable(source, items, preprocessing)[0]


@dataclass(frozen=True)
class _Facts:
    """Statistics of one image.

    contrast: standard deviation of the pixels. alike: correlation of neighbouring pixels. content: SHA-256 of the
    preprocessed pixels.
    """

    name: str
    contrast: float
    alike: float
    content: bytes


def _readable(source: Path, items: Sequence[ImageItem], preprocessing: Preprocessing) -> tuple[ImageSet, list[_Facts]]:
    """Return the readable images and their statistics. Raises CalibrationError if more than 5 % are unreadable."""
    good, skipped, facts = [], [], []
    for item in items:
        try:
            original = read_rgb(item.source)
            pixels = preprocessing.pixels(original)
        except ImageError as error:
            skipped.append(f"{item.name}: {error}")
            continue
        good.append(item)
        content = hashlib.sha256(pixels.tobytes()).digest()
        facts.append(_Facts(item.name, float(pixels.std()), _correlation(original), content))
    if len(skipped) > MAX_BAD_SHARE * len(items):
        raise CalibrationError(
            f"{source}: {len(skipped)} of {len(items)} images cannot be read: {skipped[0]}", "remove or replace them"
        )
    return ImageSet(tuple(good), preprocessing, tuple(skipped)), facts


def _repeated(facts: Sequence[_Facts]) -> list[str]:
    """Return the names of images whose pixels are equal to those of an earlier image."""
    first = {fact.content: i for i, fact in reversed(list(enumerate(facts)))}
    return [fact.name for i, fact in enumerate(facts) if first[fact.content] != i]


def _correlation(image: Image) -> float:
    """Return the correlation of neighbouring pixels in brightness: about 0 for noise, near 1 for real images.

    The larger of the horizontal and the vertical correlation counts. `image` must not be resized yet, because resizing
    blurs noise. Only the top left 256 x 256 pixels are read. Returns 1 for images that are too small or constant.
    """
    grey = np.asarray(image.crop((0, 0, *np.minimum(image.size, 256))).convert("F"), np.float64)
    if grey.size < MIN_PIXELS or min(grey.shape) < 2 or not grey.std():
        return 1.0
    grey = grey - grey.mean()
    pairs = ((grey[:, :-1], grey[:, 1:]), (grey[:-1], grey[1:]))
    return max(abs(float((a * b).mean())) / float(grey.var()) for a, b in pairs)


def _from_npz(source: Path) -> list[ImageItem]:
    arrays = _arrays(source)
    key = "images" if "images" in arrays else next(iter(arrays)) if len(arrays) == 1 else ""
    images = arrays.get(key, np.empty(0))
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise CalibrationError(
            f"{source}: no array `images` of uint8 (n, H, W) or (n, H, W, 3)",
            f"found: {', '.join(arrays) or 'nothing'}" + (f", {images.dtype} {list(images.shape)}" if key else ""),
        )
    return [ImageItem(f"{source.name}[{i}]", image) for i, image in enumerate(images)]


def _labelled_npz(source: Path, num_classes: int) -> list[ImageItem]:
    items, labels = _from_npz(source), _arrays(source).get("labels", np.empty(0))
    if labels.shape != (len(items),) or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"{source}: no array `labels` of {len(items)} whole numbers, one per image",
            f"found: {labels.dtype} {list(labels.shape)}" if labels.size else "found: no `labels`",
        )
    wrong = [int(label) for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise CalibrationError(
            f"{source}: label {wrong[0]}, but the head has {num_classes} classes", "number the classes from 0"
        )
    return [replace(item, label=int(label)) for item, label in zip(items, labels, strict=True)]


def _arrays(source: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(source, allow_pickle=False) as data:
            return {name: np.asarray(data[name]) for name in data}  # numpy returns bytes for entries that are no arrays
    except Exception as error:  # untrusted file: numpy and zipfile raise many types
        raise CalibrationError(f"{source} cannot be read as .npz: {error}") from error


def _from_csv(source: Path) -> list[tuple[ImageItem, str]]:
    try:
        rows = [row for row in csv.reader(_read_text(source).splitlines()) if row]
    except csv.Error as error:
        raise CalibrationError(f"{source} cannot be read: {error}", "write each line as path,class") from error
    if rows and len(rows[0]) == 2 and _is_heading(source.parent / rows[0][0]):
        rows = rows[1:]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong or not rows:
        raise CalibrationError(
            f"{source}: {f'{wrong} is not path,class' if wrong else 'no lines'}",
            "write each line as path,class; paths are relative to the folder of the CSV",
        )
    return [(ImageItem(path, source.parent / path), name.strip()) for path, name in rows]


def _is_heading(path: Path) -> bool:
    """Test whether the first field of a CSV is a column heading: it has no image suffix, and no such file exists."""
    return path.suffix.lower() not in SUFFIXES and not os.path.exists(path)  # noqa: PTH110  accepts any name


def _from_class_folders(source: Path) -> list[tuple[ImageItem, str]]:
    items = find_images(source)
    flat = next((item.name for item in items if "/" not in item.name), None)
    if flat:
        raise CalibrationError(
            f"{source}: {flat} is not in a class folder",
            "use the layout <class>/<image>, or a CSV with path,class lines",
        )
    return [(item, item.name.split("/")[0]) for item in items]


def _class_index(source: Path, names: list[str], num_classes: int, labels: Sequence[str] | None) -> dict[str, int]:
    if labels and set(names) <= set(labels):
        return {name: list(labels).index(name) for name in names}
    if all(re.fullmatch("[0-9]{1,9}", name) and int(name) < num_classes for name in names):
        return {name: int(name) for name in names}
    if len(names) == num_classes:
        return {name: i for i, name in enumerate(names)}
    unknown = [name for name in names if not labels or name not in labels]
    raise CalibrationError(
        f"{source} has {len(names)} classes ({_some(unknown or names)}), the head has {num_classes}",
        "name the classes as in --labels, or by index from 0",
    )


def _read_text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CalibrationError(f"{source} cannot be read: {reason}") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", .." if len(names) > LISTED else "")


def _refuse(source: Path, reason: str) -> None:
    raise CalibrationError(f"{source}: {reason}", "calibrate with varied real images, or add --force-calib")
