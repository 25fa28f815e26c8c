"""Find images: the files of a folder, the lines of a list or a CSV, the arrays of an .npz, with their classes."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import CalibrationError

# Formats that Pillow 13 only names or writes; EPS is a program, which Ghostscript would run.
UNREAD = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"})
LITTER = frozenset(  # beside hidden names, what systems leave in folders; in lower case
    {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageItem:
    """Source of one image: a file, or an array of an .npz.

    label: true answer, if known, such as the class index in the order of the head; its text (`str`) holds all of it.
    content: SHA-256 of the file or array, size: (H, W) of the upright original, if the image has been read. decoded:
    preprocessed pixels, in a file, if the image has been decoded.
    """

    name: str
    source: Path | Pixels
    label: Any = None
    content: bytes | None = field(default=None, compare=False, repr=False)
    size: tuple[int, int] = field(default=(0, 0), compare=False)
    decoded: Pixels | None = field(default=None, compare=False, repr=False)


def content_sha256(source: Path | Pixels) -> bytes:
    """Return the SHA-256 of an image: of its file, or of its shape and values. Raises OSError."""
    content = source.read_bytes() if isinstance(source, Path) else repr(source.shape).encode() + source.tobytes()
    return hashlib.sha256(content).digest()


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


def named_images(source: Path) -> list[tuple[ImageItem, str]]:
    """List the images of a folder of class folders, or of a list, each with the name of its class.

    Raises CalibrationError for an image without a class.
    """
    return _from_class_folders(source) if source.is_dir() else _from_list(source)


def numbered_images(source: Path, num_classes: int) -> list[ImageItem]:
    """List the images of an .npz with class indices below `num_classes` in `labels`. Raises CalibrationError."""
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


def _from_npz(source: Path) -> list[ImageItem]:
    arrays = _arrays(source)
    key = "images" if "images" in arrays else next(iter(arrays)) if len(arrays) == 1 else ""
    images = arrays.get(key, np.empty(0))
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise CalibrationError(
            f"{source}: no array `images` of uint8 (n, H, W), (n, H, W, 3) or (n, H, W, 4)",
            f"found: {', '.join(arrays) or 'nothing'}" + (f", {images.dtype} {list(images.shape)}" if key else ""),
        )
    return [ImageItem(f"{source.name}[{i}]", image) for i, image in enumerate(images)]


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


def _read_text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CalibrationError(f"{source} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CalibrationError(f"{source} cannot be read: {reason}") from error
