"""`Geometry`: the place of an image in a network's input, and the way back from network pixels to the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometry:
    """Place of an image in a network's input, after the resize and the crop or the padding.

    original: (H, W) of the upright image. resized: (H, W) of the resized image. size: (H, W) of the network's input.
    offset: (top, left) of the resized image in the input; negative where the crop cuts it. All in pixels.

    Coordinates are those of areas: pixel i covers i to i + 1, and an image of width W reaches from 0 to W. The factors
    of the two axes differ by the rounding of `resized`, as mmdet's `scale_factor` does.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    size: tuple[int, int]
    offset: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Network pixels for one pixel of the image: (vertical, horizontal)."""
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    @property
    def content(self) -> tuple[int, int, int, int]:
        """Part of the input that shows the image, without padding: (top, left, bottom, right) in network pixels."""
        (top, bottom), (left, right) = (
            (max(0, offset), min(size, offset + resized))
            for offset, resized, size in zip(self.offset, self.resized, self.size, strict=True)
        )
        return top, left, bottom, right

    def to_image(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Map network pixels to pixels of the image. Nothing is clipped.

        points: (.., 2) as x, y, or (.., 4) as x1, y1, x2, y2. Returns float64 of the same shape.
        """
        scale, offset = self._by_coordinate(points)
        moved: NDArray[np.float64] = (np.asarray(points, np.float64) - offset) / scale
        return moved

    def to_network(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Map pixels of the image to network pixels: the inverse of `to_image`."""
        scale, offset = self._by_coordinate(points)
        moved: NDArray[np.float64] = np.asarray(points, np.float64) * scale + offset
        return moved

    def map_to_image(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Map one value for each network pixel to one for each pixel of the image: that of the nearest network pixel.

        labels: (H, W) of the network's input, any dtype. Returns (H, W) of the image. The centre of each pixel decides,
        in whole numbers, so that the SDKs give the same map. A pixel that a crop leaves out gets the value of the
        nearest pixel inside.
        """
        top, left, bottom, right = self.content
        rows, columns = (
            ((2 * np.arange(original) + 1) * resized // (2 * original) + offset).clip(first, last - 1)
            for original, resized, offset, first, last in zip(
                self.original, self.resized, self.offset, (top, left), (bottom, right), strict=True
            )
        )
        found: NDArray[Any] = labels[rows[:, None], columns]
        return found

    def _by_coordinate(self, points: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return scale and offset for each coordinate of the last axis. Raises ValueError for another axis."""
        coordinates = np.shape(points)[-1] if np.ndim(points) else 0
        if coordinates not in (2, 4):
            raise ValueError(f"points have the shape {list(np.shape(points))}, it must end with x, y or x1, y1, x2, y2")
        times = coordinates // 2
        return np.tile(self.scale[::-1], times), np.tile(np.array(self.offset[::-1], np.float64), times)
