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
        return _bilinear(_bilinear(_array(image), width, axis=1), height, axis=0)
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


def _bilinear(pixels: NDArray[np.uint8], size: int, axis: int) -> NDArray[np.uint8]:
    """Resize one axis of (H, W, channels) to `size` pixels, each between its two neighbours, rounded to uint8."""
    old = pixels.shape[axis]
    centre = (np.arange(size) + 0.5) * (old / size)
    first = np.maximum(0, (centre - 0.5).astype(np.int64))
    second = np.minimum(first + 1, old - 1)
    near = [np.maximum(0, 1 - np.abs(at - centre + 0.5)) for at in (first, first + 1)]
    near[1][first + 1 >= old] = 0
    weights = [(weight / sum(near) * (1 << BITS) + 0.5).astype(np.int32) for weight in near]
    shape = [-1 if i == axis else 1 for i in range(3)]
    parts = (
        np.take(pixels, at, axis).astype(np.int32) * weight.reshape(shape)
        for at, weight in zip((first, second), weights, strict=True)
    )
    found: NDArray[np.uint8] = ((sum(parts) + HALF) >> BITS).astype(np.uint8)
    return found
