"""File of preprocessed pixels, so that a set of images is decoded once and read many times."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.text import bytes_text

MAX_SHARE = 0.5  # of the free bytes where the file is
PIXELS, INDEX = "pixels.u8", "pixels.index"  # in a folder that is kept
# Of the index: SHA-256 of the encoded image and of its pixels; height and width of the original
ROW = np.dtype([("content", "V32"), ("pixels", "V32"), ("size", "<u4", 2)])


class DecodedImages:
    """File of up to `count` images of one shape, which are added in any number of parts. Memory holds none of them.

    folder: where the file and its index are kept, so that a later process finds the images by their content (`found`);
    pixels that a power failure has damaged are not found. Without a folder the file has no name, and goes with the last
    array, also if the process is killed. A file that would take more than MAX_SHARE of the free bytes is made in the
    temporary folder, or not at all; this is logged before any image is decoded. There is none if it cannot be written.
    """

    def __init__(self, count: int, shape: tuple[int, ...], folder: Path | None = None) -> None:
        self._shape, self._size = shape, int(np.prod(shape))
        self._file: IO[bytes] | None = None
        self._index: IO[bytes] | None = None
        self._old: dict[bytes, int] = {}
        self._digests: NDArray[Any] = np.empty(0, ROW)
        self._map: NDArray[np.uint8] | None = None
        self._all: NDArray[np.uint8] | None = None
        self._given = 0  # images in `_all` that callers may read
        self._count, self.added = count, 0
        if folder:
            with contextlib.suppress(OSError):
                self._open(folder)
            if not self._file or self._fits(count - self.added, folder):
                self._count += self.added
                return
            self.close()
            self.added, self._old = 0, {}
        temporary = Path(tempfile.gettempdir())
        lacking = f"no room for the pixels of {count:,} images ({bytes_text(count * self._size)})"
        if self._fits(count, temporary):
            with contextlib.suppress(OSError):
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  the arrays outlive every block
            if folder:
                _warn(f"{lacking} in {folder}: they are in {temporary}, and not kept if this run is interrupted")
        else:
            _warn(f"{lacking} in {temporary}: each pass decodes the images again")

    def _fits(self, count: int, folder: Path) -> bool:
        """Test whether the pixels of `count` images take at most MAX_SHARE of the free bytes of a folder's disk."""
        try:
            return count * self._size <= MAX_SHARE * shutil.disk_usage(folder).free
        except OSError:
            return False

    def found(self, content: bytes) -> tuple[int, tuple[int, int]] | None:
        """Return place and original size (H, W) of the image whose encoded form has the SHA-256 `content`.

        None if it is not kept.
        """
        place = self._old.get(content)
        if place is None or self._map is None:
            return None
        row = self._digests[place]
        intact = hashlib.sha256(self._map[place]).digest() == row["pixels"].tobytes()
        height, width = row["size"].tolist()
        return (place, (height, width)) if intact else None

    def add(self, content: bytes, pixels: NDArray[np.uint8], size: tuple[int, int]) -> int:
        """Append one image, uint8 of the shape of all. size: (H, W) of the upright original. Returns its place."""
        place, self.added = self.added, self.added + 1
        data = pixels.tobytes()
        try:
            if self._file:
                _append(self._file, data)
            if self._index:
                row = np.array((content, hashlib.sha256(data).digest(), size), ROW)
                _append(self._index, row.tobytes())
        except OSError:  # full: make room for others, but not below what is mapped, which other threads may be reading
            if self._index:
                for file, bytes_each in self._sizes():
                    with contextlib.suppress(OSError):
                        file.truncate(max(len(self._digests), self._given) * bytes_each)
            self.close()
        return place

    def arrays(self) -> NDArray[np.uint8] | None:
        """Return all images so far, (images or more, *shape) uint8, an array that reads from the file.

        The file is mapped once, for `count` images. None if there is no file.
        """
        if not self._file or not self.added:
            return None
        self._file.flush()
        if self._all is None:
            whole = max(self.added, self._count)
            self._file.truncate(whole * self._size)  # what is not written yet takes no room
            self._all = np.asarray(np.memmap(self._file, np.uint8, "r", shape=(whole, *self._shape)))
            self._file.seek(self.added * self._size)  # numpy moves to the end
        self._given = self.added
        return self._all

    def close(self) -> None:
        """Close the file: nothing more is added. Arrays still read from it."""
        for file in filter(None, (self._file, self._index)):
            with contextlib.suppress(OSError):
                file.close()
        self._file = self._index = None

    def _open(self, folder: Path) -> None:
        """Open the files in `folder`, and cut off what the last process did not complete."""
        for name in (PIXELS, INDEX):
            (folder / name).touch()
        self._file, self._index = ((folder / name).open("r+b", buffering=0) for name in (PIXELS, INDEX))
        whole = [os.fstat(each.fileno()).st_size // size for each, size in self._sizes()]
        self.added = min(whole)
        for each, size in self._sizes():
            each.truncate(self.added * size)
        if self.added:
            self._digests = np.frombuffer(self._index.read(), ROW)
            self._map = np.asarray(np.memmap(self._file, np.uint8, "r", shape=(self.added, *self._shape)))
            self._old = {row["content"].tobytes(): place for place, row in enumerate(self._digests)}
        for each, _ in self._sizes():
            each.seek(0, os.SEEK_END)

    def _sizes(self) -> list[tuple[IO[bytes], int]]:
        """Return the two files of a folder, each with its bytes for an image."""
        assert self._file and self._index
        return [(self._file, self._size), (self._index, ROW.itemsize)]


def _warn(text: str) -> None:
    """Log a warning. Python prints it on stderr unless logging is configured."""
    logging.getLogger("evm_deploy").warning("%s (at most half of what is free is taken)", text)


def _append(file: IO[bytes], data: bytes) -> None:
    """Write all of `data`. Raises OSError, also if a part could be written."""
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
