"""Sets of images for calibration and evaluation: sample, decode, label and check the images of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy._util.cores import usable_cores
from evm_deploy._util.progress import Progress
from evm_deploy._util.text import shortened, some_of
from evm_deploy.data.classes import read_labels
from evm_deploy.data.decoded import DecodedImages
from evm_deploy.data.geometry import Geometry
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.reading import read_image
from evm_deploy.data.sources import ImageItem, Pixels, content_sha256, find_images
from evm_deploy.errors import CalibrationError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_IMAGES = 100  # with fewer images, the activation ranges of pooled tensors are unreliable
MAX_BAD_SHARE = 0.05  # accepted share of unreadable, constant or repeated images
MIN_CONTRAST = 2.0  # smallest standard deviation of an image's pixels (0..255)
MIN_CORRELATION = 0.2  # smallest correlation of neighbouring pixels: noise has about 0, real images 0.7 to 1
MIN_PIXELS = 1000  # smallest image that is tested for noise
AT_ONCE = 16  # images whose preprocessed pixels are held in memory


def no_progress(done: int, total: int) -> None:
    """Ignore the progress of reading images."""


@dataclass(frozen=True)
class ImageSet:
    """Set of images with their preprocessing. Each was decoded once, into a file that goes with the set or its folder.

    skipped: "name: reason" of each image that could not be read. order: sentence on how classes got their index.
    progress: called with the number of images that `pixels` has given, and of all. taken: number of images that an
    interrupted run had decoded already.
    """

    items: tuple[ImageItem, ...]
    preprocessing: Preprocessing
    skipped: tuple[str, ...] = ()
    order: str = ""
    progress: Progress = field(default=no_progress, compare=False, repr=False)
    taken: int = field(default=0, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self) -> Iterator[Pixels]:
        """Yield the preprocessed pixels of each image, (H, W, channels) uint8, in order. Raises ImageError."""
        for done, item in enumerate(self.items):
            self.progress(done, len(self))
            yield self.preprocessing.pixels(item.source) if item.decoded is None else item.decoded

    @property
    def labels(self) -> list[Any]:
        """True answer of each image, such as its class index. Only labelled sets have labels."""
        return [item.label for item in self.items]

    @property
    def places(self) -> list[Geometry]:
        """Place of each image in the network's input."""
        return [self.preprocessing.geometry(width, height) for height, width in (item.size for item in self.items)]

    def digest(self) -> str:
        """Return the SHA-256 of the preprocessing, the images in order and their labels, as hex digits."""
        total = hashlib.sha256(repr(self.preprocessing).encode())
        for item in self.items:
            total.update(item.content or content_sha256(item.source))
            if item.label is not None:
                total.update(f"label {item.label}".encode())
        return total.hexdigest()


def sample(items: Sequence[ImageItem], count: int, seed: int = 0) -> list[ImageItem]:
    """Draw `count` items at random without replacement, with a fixed seed. The order of the items is kept.

    Returns all items if there are at most `count`.
    """
    if len(items) <= count:
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), count, replace=False)
    return [items[i] for i in sorted(chosen)]


def calibration_images(
    source: Path,
    preprocessing: Preprocessing,
    count: int = 512,
    *,
    seed: int = 0,
    force: bool = False,
    progress: Progress = no_progress,
) -> ImageSet:
    """Return up to `count` images of `source` for calibration, after checking that the images are suitable.

    Unreadable images are left out and listed in `skipped`. Raises CalibrationError if more than 5 % of the images are
    unreadable. Unless `force` is set, raises CalibrationError also if there are fewer than 100 images, or if more than
    5 % are constant, look like noise or repeat others: activation ranges from such images do not fit real images.
    """
    chosen = sample(find_images(source), count, seed)
    images, facts = _readable(source, chosen, preprocessing, progress, inspected=True)
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
            _refuse(source, f"{len(names)} of {total} images {what} ({some_of(names)})")
    return images


def labelled_images(
    source: Path,
    preprocessing: Preprocessing,
    num_classes: int,
    labels: Sequence[str] | None = None,
    *,
    read: Callable[[Path, Sequence[str] | None, int], tuple[Sequence[ImageItem], str]] = read_labels,
    folder: Path | None = None,
    progress: Progress = no_progress,
) -> ImageSet:
    """Return all images of `source` with their true answers.

    read: lists them, as in `tasks.task.Score`; by default images with a class (`data.classes.read_labels`).
    num_classes, labels: of the network. folder: keeps the decoded images, and gives those that an interrupted run has
    left there (`data.decoded`). Raises CalibrationError if the classes do not fit the network, or if more than 5 % of
    the images are unreadable.
    """
    items, order = read(source, labels, num_classes)
    return replace(_readable(source, items, preprocessing, progress, folder=folder)[0], order=order)


def decoded_images(items: Sequence[ImageItem], preprocessing: Preprocessing) -> ImageSet:
    """Decode these images alone. Those that cannot be read are in `skipped`: `require_readable` limits their share."""
    return _decoded(items, preprocessing, no_progress)[0]


def require_readable(source: str | Path, skipped: Sequence[str], total: int) -> None:
    """Raise CalibrationError if more than 5 % of `total` images could not be read. skipped: as in ImageSet."""
    if len(skipped) > MAX_BAD_SHARE * total:
        raise CalibrationError(
            f"{source}: {len(skipped)} of {total} images cannot be read: {skipped[0]}", "remove or replace them"
        )


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


def _readable(
    source: Path,
    items: Sequence[ImageItem],
    preprocessing: Preprocessing,
    progress: Progress,
    *,
    folder: Path | None = None,
    inspected: bool = False,
) -> tuple[ImageSet, list[_Facts]]:
    """Return the result of `_decoded`. Raises CalibrationError if more than 5 % of the images are unreadable."""
    images, facts = _decoded(items, preprocessing, progress, folder=folder, inspected=inspected)
    require_readable(source, images.skipped, len(items))
    return images, facts


def _decoded(
    items: Sequence[ImageItem],
    preprocessing: Preprocessing,
    progress: Progress,
    *,
    folder: Path | None = None,
    inspected: bool = False,
) -> tuple[ImageSet, list[_Facts]]:
    """Decode the images and return those that are readable, with their statistics if they are `inspected`.

    Images that `folder` keeps are not decoded again.
    """
    good, places, skipped, facts, taken = [], [], [], [], 0
    decoded = DecodedImages(len(items), (*preprocessing.size, preprocessing.channels), folder)

    def read(item: ImageItem) -> _Read | ImageError:
        try:
            try:
                content = content_sha256(item.source)
            except (OSError, ValueError):
                read_image(item.source, preprocessing.channels)  # raises, with words for the reason
                raise
            known = decoded.found(content)
            if known is not None:
                return _Read(content, *known)
            original = read_image(item.source, preprocessing.channels)
            pixels = preprocessing.pixels(original)
        except ImageError as error:
            return error
        size = (original.height, original.width)
        return _Read(content, None, size, pixels, _facts(item.name, original, pixels) if inspected else None)

    with ThreadPoolExecutor(usable_cores()) as pool:
        parts = (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))
        results = ((item, found) for part in parts for item, found in zip(part, pool.map(read, part), strict=True))
        for done, (item, found) in enumerate(results):
            progress(done, len(items))
            if isinstance(found, ImageError):
                skipped.append(f"{shortened(item.name)}: {found}")
                continue
            good.append(replace(item, content=found.content, size=found.size))
            taken += found.place is not None
            new = found.place is None
            places.append(decoded.add(found.content, found.pixels, found.size) if new else found.place)
            facts += [found.facts] if found.facts else []
    arrays = decoded.arrays()
    if arrays is not None:
        good = [replace(item, decoded=arrays[place]) for item, place in zip(good, places, strict=True)]
    return ImageSet(tuple(good), preprocessing, tuple(skipped), taken=taken), facts


@dataclass(frozen=True)
class _Read:
    """An image that was read: SHA-256 of its content, its size, and its place among the decoded images or its pixels.

    size: (H, W) of the upright original.
    """

    content: bytes
    place: int | None
    size: tuple[int, int]
    pixels: Pixels = field(default_factory=lambda: np.empty(0, np.uint8))
    facts: _Facts | None = None


def _facts(name: str, original: Image, pixels: Pixels) -> _Facts:
    content = hashlib.sha256(pixels.tobytes()).digest()
    return _Facts(name, float(pixels.std()), _correlation(original), content)


def _repeated(facts: Sequence[_Facts]) -> list[str]:
    """Return the names of images whose pixels are equal to those of an earlier image."""
    first = {fact.content: i for i, fact in reversed(list(enumerate(facts)))}
    return [fact.name for i, fact in enumerate(facts) if first[fact.content] != i]


def _correlation(image: Image) -> float:
    """Return the correlation of neighbouring pixels in brightness: about 0 for noise, near 1 for real images.

    The larger of the horizontal and the vertical correlation counts. `image` must not be resized yet, because resizing
    blurs noise. Only the top left 256 x 256 pixels are read. Returns 1 for images that are too small or constant.
    """
    grey = np.asarray(image.crop((0, 0, *np.minimum(image.size, 256))).convert("RGB").convert("F"), np.float64)
    if grey.size < MIN_PIXELS or min(grey.shape) < 2 or not grey.std():
        return 1.0
    grey = grey - grey.mean()
    pairs = ((grey[:, :-1], grey[:, 1:]), (grey[:-1], grey[1:]))
    return max(abs(float((a * b).mean())) / float(grey.var()) for a, b in pairs)


def _refuse(source: Path, reason: str) -> None:
    raise CalibrationError(f"{source}: {reason}", "calibrate with varied real images, or add --force-calib")
