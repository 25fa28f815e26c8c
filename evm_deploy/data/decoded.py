"""Temporary file of preprocessed pixels, so that a set of images is decoded once and read many times."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np
from numpy.typing import NDArray

MAX_SHARE = 0.5  # of the free bytes in the temporary folder


class DecodedImages:
    """File of up to `count` images of one shape, in the temporary folder. Memory holds none of them.

    The file has no name and goes with the last array of `arrays`, also if the process is killed. There is none if it
    would take more than MAX_SHARE of the free bytes, or if it cannot be written.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._shape, self._added = shape, 0
        self._file: IO[bytes] | None = None
        with contextlib.suppress(OSError):
            if count * int(np.prod(shape)) <= MAX_SHARE * shutil.disk_usage(tempfile.gettempdir()).free:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  the arrays outlive every block

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Append one image, uint8 of the shape of all."""
        self._added += 1
        try:
            if self._file:
                self._file.write(pixels.tobytes())
        except OSError:  # full
            self._file = None

    def arrays(self) -> Iterator[NDArray[np.uint8] | None]:
        """Yield the images in order, each an array that reads from the file; None for each if there is no file."""
        if not self._file or not self._added:
            yield from [None] * self._added
            return
        with self._file as file:
            file.flush()
            yield from np.asarray(np.memmap(file, np.uint8, "r", shape=(self._added, *self._shape)))
