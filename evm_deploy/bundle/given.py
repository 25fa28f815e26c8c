"""Images and pixels as callers of a loaded bundle give them, and the time that each stage of a prediction takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.reading import is_one_image
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.data.reading import ImageLike


class Stopwatch:
    """Time of named stages in ms: each `with stopwatch(stage)` adds to its stage in `spent_ms`."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.spent_ms = dict.fromkeys(stages, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent_ms[stage] += 1000 * (time.perf_counter() - start)


def each_image(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Return the images to iterate over: one image alone is a list of one. Raises UsageError."""
    if is_one_image(images):
        return [cast("ImageLike", images)]
    if isinstance(images, np.ndarray) and (images.ndim not in (3, 4) or (images.ndim == 3 and len(images) in (3, 4))):
        raise UsageError(
            f"array of shape {list(images.shape)}: one image is [H, W] or [H, W, 3], several are [n, H, W, 3]",
            "transpose [3, H, W]; give three or four grey images as a list, list(images)",
        )
    if not isinstance(images, Iterable):
        raise UsageError(f"images cannot be a {type(images).__name__}", "give a path, an image, or a list of them")
    return cast("Iterable[ImageLike]", images)


def stacked_pixels(
    pixels: NDArray[np.uint8] | Iterable[NDArray[np.uint8]], shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Return preprocessed images as one array [n, H, W, channels]. Raises UsageError."""
    if isinstance(pixels, np.ndarray):
        if pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[1:] == shape:
            return pixels
        wrong: object = pixels
    else:
        given = list(pixels) if isinstance(pixels, Iterable) else [pixels]
        arrays = [isinstance(each, np.ndarray) and each.dtype == np.uint8 for each in given]
        fits = [array and each.shape == shape for array, each in zip(arrays, given, strict=True)]
        if all(fits):
            return np.stack(given) if given else np.empty((0, *shape), np.uint8)
        wrong = given[fits.index(False)]
    found = f"{wrong.dtype} {list(wrong.shape)}" if isinstance(wrong, np.ndarray) else type(wrong).__name__
    raise UsageError(
        f"pixels must be uint8 [n, {shape[0]}, {shape[1]}, {shape[2]}], got {found}",
        "preprocessing.pixels(image) makes each, for a list or np.stack; predict(images) takes any images",
    )
