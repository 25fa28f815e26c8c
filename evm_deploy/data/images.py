"""Find, sample, label and check images: from a folder, a list, a CSV or an .npz, for calibration and evaluation."""

from __future__ import annotations

import csv
import difflib
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.cores import usable_cores
from evm_deploy._util.progress import Progress
from evm_deploy._util.text import shortened
from evm_deploy.data.decoded import DecodedImages
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.reading import read_image
from evm_deploy.errors import CalibrationError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that Pillow 13 only names or writes; EPS is a program, which Ghostscript would run.
UNREAD = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"})
LITTER = frozenset(  # beside hidden names, what systems leave in folders; in lower case
    {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
)
MIN_IMAGES = 100  # with fewer images, the activation ranges of pooled tensors are unreliable
MAX_BAD_SHARE = 0.05  # accepted share of unreadable, constant or repeated images
MIN_CONTRAST = 2.0  # smallest standard deviation of an image's pixels (0..255)
MIN_CORRELATION = 0.2  # smallest correlation of neighbouring pixels: noise has about 0, real images 0.7 to 1
MIN_PIXELS = 1000  # smallest image that is tested for noise
AT_ONCE = 16  # images whose preprocessed pixels are held in memory
LISTED = 4  # names that an error message lists

Pixels = NDArray[np.uint8]


def no_progress(done: int, total: int) -> None:
    """Ignore the progress of reading images."""


@dataclass(frozen=True)
class ImageItem:
    """Source of one image: a file, or an array of an .npz. label: class index in the order of the head, if known.

    decoded: preprocessed pixels, in a temporary file, if the image has been decoded.
    """

    name: str
    source: Path | Pixels
    label: int | None = None
    decoded: Pixels | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ImageSet:
    """Set of images with their preprocessing. Each was decoded once, into a temporary file that goes with the set.

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


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of files that Pillow reads, such as `.png`, in lower case; plugins add theirs."""
    import PIL.Image

    return frozenset(suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind not in UNREAD)


def find_images(source: Path) -> list[ImageItem]:
    """List the images of `source`: a folder, a list (text with one path per line, or .csv), or an .npz with `images`.

    A folder is searched whole, with the folders that it links to. Hidden files and folders and the litter of systems
    are left out. Classes in a list are ignored. Raises CalibrationError.
    """
    if source.is_dir():
        items = [ImageItem(path.relative_to(source).as_posix(), path) for path in _files(source)]
    elif source.suffix.lower() == ".npz":
        items = _from_npz(source)
    elif source.exists():
        items = [item for item, _ in _listed(source)]
    else:
        raise CalibrationError(f"{source} does not exist", "give a folder of images, a list of paths, or an .npz")
    if not items:
        raise CalibrationError(f"{source}: no images found", f"known suffixes: {', '.join(sorted(image_suffixes()))}")
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
            _refuse(source, f"{len(names)} of {total} images {what} ({_some(names)})")
    return images


def labelled_images(
    source: Path,
    preprocessing: Preprocessing,
    num_classes: int,
    labels: Sequence[str] | None = None,
    *,
    progress: Progress = no_progress,
) -> ImageSet:
    """Return all images of `source` with their class index in the order of the head.

    source: a folder with one folder per class; a list with `path,class` (.csv) or `path class` (text) lines, in which
    the folder of each path is its class if no line names one; or an .npz with `images` (uint8) and `labels` (integers).
    A class is given by its name in `labels` or by its index. Without `labels`, other names are numbered in alphabetical
    order, if there are as many names as classes. A head of one class has two: 0 is absent, 1 is present. Raises
    CalibrationError if the classes do not fit the head, or if more than 5 % of the images are unreadable.
    """
    if source.suffix.lower() == ".npz":
        return _readable(source, _labelled_npz(source, max(num_classes, 2)), preprocessing, progress)[0]
    named = _from_class_folders(source) if source.is_dir() else _from_list(source)
    index, order = _class_index(source, sorted({name for _, name in named}), num_classes, labels)
    items = [replace(item, label=index[name]) for item, name in named]
    return replace(_readable(source, items, preprocessing, progress)[0], order=order)


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
    inspected: bool = False,
) -> tuple[ImageSet, list[_Facts]]:
    """Decode the images and return those that are readable, with their statistics if they are `inspected`.

    Raises CalibrationError if more than 5 % are unreadable.
    """
    good, skipped, facts = [], [], []
    decoded = DecodedImages(len(items), (*preprocessing.size, preprocessing.channels))

    def read(item: ImageItem) -> tuple[Pixels, _Facts | None] | ImageError:
        try:
            original = read_image(item.source, preprocessing.channels)
            pixels = preprocessing.pixels(original)
        except ImageError as error:
            return error
        return pixels, _facts(item.name, original, pixels) if inspected else None

    with ThreadPoolExecutor(usable_cores()) as pool:
        parts = (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))
        results = ((item, found) for part in parts for item, found in zip(part, pool.map(read, part), strict=True))
        for done, (item, found) in enumerate(results):
            progress(done, len(items))
            if isinstance(found, ImageError):
                skipped.append(f"{shortened(item.name)}: {found}")
                continue
            pixels, fact = found
            good.append(item)
            decoded.add(pixels)
            facts += [fact] if fact else []
    if len(skipped) > MAX_BAD_SHARE * len(items):
        raise CalibrationError(
            f"{source}: {len(skipped)} of {len(items)} images cannot be read: {skipped[0]}", "remove or replace them"
        )
    kept = (replace(item, decoded=array) for item, array in zip(good, decoded.arrays(), strict=True))
    return ImageSet(tuple(kept), preprocessing, tuple(skipped)), facts


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


def _listed(source: Path) -> list[tuple[ImageItem, str | None]]:
    """Read a list of images, each with its class if its line names one. Raises CalibrationError."""
    lines, suffixes = _read_text(source).splitlines(), image_suffixes()
    if source.suffix.lower() == ".csv":
        try:
            rows = [row for row in csv.reader(lines) if row]
        except csv.Error as error:
            raise CalibrationError(f"{source} cannot be read: {error}", "write each line as path,class") from error
    else:
        texts = [line.strip() for line in lines]
        endings = "|".join(map(re.escape, suffixes))
        named = re.compile(rf"(.*?(?:{endings}))\s*[\s,;]\s*(.+)", re.IGNORECASE)
        rows = [_split(text, source.parent, named) for text in texts if text and not text.startswith("#")]
    if rows and len(rows[0]) == 2 and _is_heading(source.parent / rows[0][0], suffixes):
        rows = rows[1:]
    wrong = next((row for row in rows if len(row) > 2), None)
    if wrong:
        raise CalibrationError(
            f"{source}: {wrong} is not path,class", "paths are relative to the folder of the list; quote commas"
        )
    return [(ImageItem(row[0], source.parent / row[0]), row[1].strip() if row[1:] else None) for row in rows]


def _split(line: str, folder: Path, named: re.Pattern[str]) -> list[str]:
    """Split a line of a list into [path, class], or [path] if it names no class. Both may contain spaces."""
    if _exists(folder / line):
        return [line]
    found = named.fullmatch(line) or re.fullmatch(r"(.+)\s(.+)", line)
    return [found[1].strip(), found[2]] if found else [line]


def _is_heading(path: Path, suffixes: frozenset[str]) -> bool:
    """Test whether the first field of a list is a column heading: it has no image suffix, and no such file exists."""
    return path.suffix.lower() not in suffixes and not _exists(path)


def _exists(path: Path) -> bool:
    """Test whether a file or folder exists. Names that no file can have, and those that may not be seen, do not."""
    return os.path.exists(path)  # noqa: PTH110  Path.exists raises for some of these


def _from_list(source: Path) -> list[tuple[ImageItem, str]]:
    rows = _listed(source)
    if rows and all(name is None for _, name in rows):
        rows = [(item, Path(item.name).parent.name or None) for item, _ in rows]
    unnamed = next((item.name for item, name in rows if not name), None)
    if unnamed or not rows:
        raise CalibrationError(
            f"{source}: {f'{unnamed} has no class' if unnamed else 'no lines'}",
            "write each line as path,class (.csv) or path class (text); paths are relative to the folder of the list",
        )
    return [(item, name) for item, name in rows if name]


def _files(folder: Path) -> list[Path]:
    """List the files below `folder` with a suffix of images, sorted, and dead links, to be reported as unreadable.

    Raises CalibrationError for a folder that cannot be read.
    """
    suffixes = image_suffixes()

    def walk(here: Path, searched: tuple[Path, ...]) -> Iterator[Path]:
        try:
            entries = sorted(here.iterdir())
        except OSError as error:
            raise CalibrationError(f"{here} cannot be read: {error.strerror}") from error
        for path in entries:
            if _is_litter(path.name):
                continue
            if os.path.isdir(path):  # noqa: PTH112  a file that cannot be looked at raises no error here
                real = path.resolve() if path.is_symlink() else None
                if not real or not any(_found_anyway(real, folder) for folder in searched):
                    yield from walk(path, (*searched, real) if real else searched)
            elif _exists(path) and not (path.suffix.lower() in suffixes and path.is_file()):
                continue  # no image, or a pipe: opening it would wait
            else:
                yield path

    return list(walk(folder, (folder.resolve(),)))


def _found_anyway(linked: Path, searched: Path) -> bool:
    """Test whether a search of `searched` meets the folder `linked` without the link, or would go in a circle."""
    if searched.is_relative_to(linked):
        return True
    return linked.is_relative_to(searched) and not any(map(_is_litter, linked.relative_to(searched).parts))


def _is_litter(name: str) -> bool:
    """Test whether a file or folder is hidden, or one that systems leave in folders."""
    return name.startswith(".") or name.lower() in LITTER


def _from_class_folders(source: Path) -> list[tuple[ImageItem, str]]:
    items = find_images(source)
    flat = next((item.name for item in items if "/" not in item.name), None)
    if flat:
        raise CalibrationError(
            f"{source}: {flat} is not in a class folder",
            "use the layout <class>/<image>, or give a list: a .csv of path,class lines, or text of path class lines",
        )
    return [(item, item.name.split("/")[0]) for item in items]


def _class_index(
    source: Path, names: list[str], num_classes: int, labels: Sequence[str] | None
) -> tuple[dict[str, int], str]:
    """Return the class index of each of `names`, and a sentence on how it was found. Raises CalibrationError."""
    known: dict[str, list[int]] = {}
    for index, label in enumerate(labels or ()):
        known.setdefault(_composed(label), []).append(index)
    if num_classes == 1:  # absent or present; the label names what is present
        num_classes, absent = 2, [_composed(name) for name in names if _composed(name) not in known]
        if len(absent) < min(2, len(names)):
            known = {**{name: [0] for name in absent}, **{label: [1] for label in known}}
    unknown = [name for name in names if _composed(name) not in known]
    by_number = all(re.fullmatch("[0-9]{1,9}", name) and int(name) < num_classes for name in names)
    begin = f"classes of {source.name} got their index"
    if known and not unknown:
        twice = next((name for name in names if len(known[_composed(name)]) > 1), None)
        if twice:
            places = " and ".join(map(str, known[_composed(twice)]))
            raise CalibrationError(
                f"{source}: class {twice} is ambiguous: the labels {places} have this name", "name its class by index"
            )
        return {name: known[_composed(name)][0] for name in names}, f"{begin} by name, from the labels"
    if by_number and len(unknown) == len(names):
        moved = [f"{name} class {place}" for place, name in enumerate(names) if int(name) != place]
        other = f"; the alphabet, as in torchvision's ImageFolder, would make {moved[0]}" if moved else ""
        differs = other if len(names) == num_classes else ""
        return {name: int(name) for name in names}, f"{begin} by number{differs}"
    if len(names) == num_classes and not known:
        shown = [f"{name} is {index}" for index, name in enumerate(names)]
        listed = ", ".join(shown if len(shown) <= LISTED else [*shown[: LISTED - 1], "..", shown[-1]])
        return {name: index for index, name in enumerate(names)}, f"{begin} in alphabetical order: {listed}"
    if len(names) > num_classes or not known:
        raise CalibrationError(
            f"{source} has {len(names)} classes ({_some(unknown)}), the head has {num_classes}",
            "name the classes as in --labels, or by index from 0",
        )
    unused = [label for label in labels or () if label not in names]
    near = difflib.get_close_matches(unknown[0], unused, 1)
    raise CalibrationError(
        f"{source}: {len(unknown)} of {len(names)} classes are not among the labels ({_some(unknown)}); "
        f"labels without images: {_some(unused) or 'none'}",
        f"did you mean {near[0]}?" if near else "name the classes as in --labels, or all of them by index from 0",
    )


def _composed(name: str) -> str:
    """Return a name with composed letters: macOS may write those of files apart."""
    return unicodedata.normalize("NFC", name)


def _read_text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CalibrationError(f"{source} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CalibrationError(f"{source} cannot be read: {reason}") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", .." if len(names) > LISTED else "")


def _refuse(source: Path, reason: str) -> None:
    raise CalibrationError(f"{source}: {reason}", "calibrate with varied real images, or add --force-calib")
