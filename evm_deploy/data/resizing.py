"""Resizing of images: Pillow's antialiased resampling, and OpenCV's bilinear, which does not antialias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

#: bilinear-opencv: half-pixel bilinear without antialiasing, as the images that mmdet and mmseg train with. Within 1 of
#: 255 of OpenCV's result, which rounds in another fixed point; an antialiased image is up to 41 away from it.
PLAIN = "bilinear-opencv"
INTERPOLATIONS = ("bicubic", "bilinear", PLAIN)
BITS = 22  # fraction of a weight, as in Pillow's resampling: 8 bits of a pixel beside it fit in int32
HALF = 1 << (BITS - 1)


def resized(image: Image, size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
    """Resize an image of mode L, RGB or RGBA to `size` (H, W), the width first. Returns (H, W, channels) uint8.

    interpolation: one of INTERPOLATIONS. Pillow weighs the colours of RGBA by alpha; `bilinear-opencv` does not.
    """
    import PIL.Image

    height, width = size
    if (width, height) != image.size and interpolation == PLAIN:
        return _bilinear(_array(image), height, width)
    if (width, height) != image.size:
        # Pillow before 13 resizes the width first. Pillow 13 resizes the height of tall images first, which changes
        # noise by up to 9 of 255 (python-pillow/Pillow#9549). Two calls give the same pixels in every version.
        how, mode = getattr(PIL.Image.Resampling, interpolation.upper()), image.mode
        image = image.convert("RGBa") if mode == "RGBA" else image  # as Pillow does in one call, not once in each
        image = image.resize((width, image.height), how).resize((width, height), how).convert(mode)
    return _array(image)


def _array(image: Image) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


def _bilinear(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize (H, W, channels) to (height, width, channels): each pixel between its neighbours, the width first."""
    rows, down = _neighbours(pixels.shape[0], height)
    columns, across = _neighbours(pixels.shape[1], width)
    upper, lower = (_mixed([pixels[np.ix_(row, column)] for column in columns], across[..., None]) for row in rows)
    return _mixed([upper, lower], down[..., None, None])


def _neighbours(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the two neighbours of each new pixel on an axis, (2, new), and their weights in units of 2^-BITS."""
    centre = (np.arange(new) + 0.5) * (old / new)
    first = np.maximum(0, (centre - 0.5).astype(np.int64))
    at = np.stack([first, first + 1])
    near = np.where(at < old, np.maximum(0, 1 - np.abs(at - centre + 0.5)), 0)
    return np.minimum(at, old - 1), (near / near.sum(0) * (1 << BITS) + 0.5).astype(np.int32)


def _mixed(pair: list[NDArray[np.uint8]], weights: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return the weighted mean of two arrays, rounded to uint8. weights: (2, ..) that broadcast to the arrays."""
    first, second = (pixels * weight for pixels, weight in zip(pair, weights, strict=True))
    mixed: NDArray[np.uint8] = ((first + second + HALF) >> BITS).astype(np.uint8)
    return mixed
