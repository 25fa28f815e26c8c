"""Sets of images for calibration and evaluation: sample, decode, label and check the images of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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

T = TypeVar("T")
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
    progress: called with the number of images that `pixels` has given, and of all.
    """

    items: tuple[ImageItem, ...]
    preprocessing: Preprocessing
    skipped: tuple[str, ...] = ()
    order: str = ""
    progress: Progress = field(default=no_progress, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self) -> Iterator[Pixels]:
        """Yield the preprocessed pixels of each image, (H, W, channels) uint8, in order. Raises ImageError."""
        for done, item in enumerate(self.items):
            self.progress(done, len(self))
            yield self.preprocessing.pixels(item.source) if item.decoded is None else item.decoded

    def part(self, places: Sequence[int]) -> ImageSet:
        """Return the images at these places."""
        return replace(self, items=tuple(self.items[place] for place in places))

    def require_readable(self, places: Collection[int]) -> None:
        """Do nothing: all these images have been read."""

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


def sample(items: Sequence[T], count: int, seed: int = 0) -> list[T]:
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
    store = DecodedImages(min(count, len(items := find_images(source))), _shape(preprocessing))
    chosen = sample(items, count, seed)
    facts: list[_Facts] = []
    images = _image_set(_decoded(chosen, preprocessing, store, progress, facts), preprocessing)
    store.close()
    require_readable(source, images.skipped, len(chosen))
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


class LabelledImages:
    """Images with their true answers, decoded in parts: each image when a part with it is first asked for, and once.

    source: for messages. order: as in ImageSet. folder: keeps the decoded images, and gives those that an interrupted
    run has left there (`data.decoded`). kept: number of those. skipped: as in ImageSet, of the parts so far.
    """

    def __init__(
        self,
        source: Path,
        items: Sequence[ImageItem],
        preprocessing: Preprocessing,
        *,
        order: str = "",
        folder: Path | None = None,
    ) -> None:
        self.source, self.preprocessing, self.order = source, preprocessing, order
        self._items, self._read = items, dict[int, ImageItem | str]()
        self._store = DecodedImages(len(items), _shape(preprocessing), folder)
        self.kept = min(self._store.added, len(items))

    def __len__(self) -> int:
        return len(self._items)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Images that could not be read, of the parts so far."""
        return tuple(each for _, each in sorted(self._read.items()) if isinstance(each, str))

    def part(self, places: Sequence[int]) -> ImageSet:
        """Return the readable ones of the images at these places."""
        new = [place for place in places if place not in self._read]
        found = _decoded([self._items[place] for place in new], self.preprocessing, self._store, no_progress)
        self._read.update(zip(new, found, strict=True))
        if len(self._read) == len(self._items):
            self._store.close()
        return replace(_image_set([self._read[place] for place in places], self.preprocessing), order=self.order)

    def require_readable(self, places: Collection[int]) -> None:
        """Raise CalibrationError if more than 5 % of the images at these places could not be read so far."""
        wanted = set(places)
        bad = [each for place, each in self._read.items() if isinstance(each, str) and place in wanted]
        require_readable(self.source, bad, len(wanted))

    def all(self) -> ImageSet:
        """Return all images that are readable. Raises CalibrationError if more than 5 % are not."""
        found = self.part(range(len(self)))
        self.require_readable(range(len(self)))
        return found


def labelled_images(
    source: Path,
    preprocessing: Preprocessing,
    num_classes: int,
    labels: Sequence[str] | None = None,
    *,
    read: Callable[[Path, Sequence[str] | None, int], tuple[Sequence[ImageItem], str]] = read_labels,
    folder: Path | None = None,
) -> LabelledImages:
    """List all images of `source` with their true answers. No image is decoded.

    read: lists them, as in `tasks.task.Score`; by default images with a class (`data.classes.read_labels`).
    num_classes, labels: of the network. folder: as in LabelledImages. Raises CalibrationError if the classes do not fit
    the network.
    """
    items, order = read(source, labels, num_classes)
    return LabelledImages(source, items, preprocessing, order=order, folder=folder)


def decoded_images(items: Sequence[ImageItem], preprocessing: Preprocessing) -> ImageSet:
    """Decode these images alone. Those that cannot be read are in `skipped`: `require_readable` limits their share."""
    store = DecodedImages(len(items), _shape(preprocessing))
    found = _image_set(_decoded(items, preprocessing, store, no_progress), preprocessing)
    store.close()
    return found


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


def _shape(preprocessing: Preprocessing) -> tuple[int, ...]:
    return (*preprocessing.size, preprocessing.channels)


def _image_set(found: Sequence[ImageItem | str], preprocessing: Preprocessing) -> ImageSet:
    good = tuple(each for each in found if not isinstance(each, str))
    return ImageSet(good, preprocessing, tuple(each for each in found if isinstance(each, str)))


def _decoded(
    items: Sequence[ImageItem],
    preprocessing: Preprocessing,
    store: DecodedImages,
    progress: Progress,
    facts: list[_Facts] | None = None,
) -> list[ImageItem | str]:
    """Decode the images into `store`. Returns each of them, or "name: reason" of one that cannot be read.

    facts: list that gets the statistics of the readable ones. Images that the store has kept are not decoded again.
    """

    def read(item: ImageItem) -> _Read | ImageError:
        try:
            try:
                content = content_sha256(item.source)
            except (OSError, ValueError):
                read_image(item.source, preprocessing.channels)  # raises, with words for the reason
                raise
            known = store.found(content)
            if known is not None:
                return _Read(content, *known)
            original = read_image(item.source, preprocessing.channels)
            pixels = preprocessing.pixels(original)
        except ImageError as error:
            return error
        size = (original.height, original.width)
        return _Read(content, None, size, pixels, None if facts is None else _facts(item.name, original, pixels))

    made: list[ImageItem | str] = []
    places: list[int | None] = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        parts = (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))
        results = ((item, found) for part in parts for item, found in zip(part, pool.map(read, part), strict=True))
        for done, (item, found) in enumerate(results):
            progress(done, len(items))
            if isinstance(found, ImageError):
                made.append(f"{shortened(item.name)}: {found}")
                places.append(None)
                continue
            made.append(replace(item, content=found.content, size=found.size))
            new = found.place is None
            places.append(store.add(found.content, found.pixels, found.size) if new else found.place)
            if facts is not None and found.facts:
                facts.append(found.facts)
    arrays = store.arrays()
    if arrays is None:
        return made
    return [
        each if isinstance(each, str) or place is None else replace(each, decoded=arrays[place])
        for each, place in zip(made, places, strict=True)
    ]


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
