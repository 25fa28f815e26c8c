"""Preprocessing of images: resize, crop or pad, then normalise.

If the input of an artifact is `image`, the artifact normalises (mean, std) by itself. The resize is never part of an
artifact; the manifest of every bundle describes it. This module needs neither torch nor a runtime.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.geometry import Geometry
from evm_deploy.data.reading import image_name, read_image
from evm_deploy.data.resizing import INTERPOLATIONS, resized
from evm_deploy.errors import ImageError

if TYPE_CHECKING:
    from evm_deploy.data.reading import ImageLike

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_SIDE, MAX_CHANNELS = 8192, 1024
CROP, STRETCH, PAD = RESIZES = ("crop", "stretch", "pad")


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a network: resize an image to the network's input, normalise to (x / 255 - mean) / std.

    size: (H, W) in pixels. mean, std: one value for each channel, for channels scaled to 0..1. Images have 1 channel
    (luminance), 3 (RGB) or 4 (RGBA).
    resize: how an image becomes H x W.
    - `crop`: resize until the image covers size / crop_pct, crop the centre. For a square size S, the shorter side
      becomes round(S / crop_pct), the longer side keeps the aspect ratio (rounded down), and the offset of the crop is
      rounded half to even. As in the authors' evaluation and timm.
    - `stretch`: resize to H x W; the aspect ratio is not kept. As mmdeploy's static exports.
    - `pad`: resize by min(H / h, W / w), sides rounded, so that the image fits; fill the right and the bottom with
      the mean, rounded to whole pixels: what mmdet and mmseg pad, 0 after normalisation, within 0.5 / (255 std).
    crop_pct: for `crop` alone. interpolation: one of `resizing.INTERPOLATIONS`.
    """

    size: tuple[int, int]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = CROP

    @property
    def channels(self) -> int:
        """Number of channels of the network's input."""
        return len(self.mean)

    @property
    def fill(self) -> tuple[int, ...]:
        """Pixel that `pad` fills with: the mean of each channel, 0..255, rounded half to even."""
        return tuple(min(max(round(255 * mean), 0), 255) for mean in self.mean)

    def pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        """Resize one image, as `read_image` takes it, to the network's size. Returns (H, W, channels) uint8.

        Raises ImageError.
        """
        upright = read_image(image, self.channels)
        try:
            place = self.geometry(*upright.size)
        except ImageError as error:
            raise ImageError(f"{image_name(image)} is {error.args[0]}", code=error.code) from error
        found = resized(upright, place.resized, self.interpolation)
        (top, left), (height, width) = place.offset, place.resized
        if place.content != (0, 0, *self.size):  # pad
            canvas = np.full((*self.size, self.channels), self.fill, np.uint8)
            canvas[top : top + height, left : left + width] = found
            return canvas
        return found[-top : self.size[0] - top, -left : self.size[1] - left]

    def geometry(self, width: int, height: int) -> Geometry:
        """Return the place of an upright image of this size, in pixels, in the network's input.

        Raises ImageError for an image that is too narrow to be cropped.
        """
        H, W = self.size
        if self.resize == STRETCH:
            new_h, new_w = H, W
        elif self.resize == PAD:
            scale = min(H / height, W / width)
            new_h, new_w = (max(1, int(side * scale + 0.5)) for side in (height, width))
        else:
            new_h, new_w = self._covering(width, height)
        top, left = (round((new - side) / 2) if self.resize == CROP else 0 for new, side in ((new_h, H), (new_w, W)))
        return Geometry((height, width), (new_h, new_w), self.size, (-top, -left))

    def _covering(self, width: int, height: int) -> tuple[int, int]:
        """Return the size (H, W) of the resized image that covers size / crop_pct. Raises ImageError."""
        want_h, want_w = (round(side / self.crop_pct) for side in self.size)
        if want_h * width >= want_w * height:  # the height decides
            new_h, new_w = want_h, max(1, int(want_h * width / height))
        else:
            new_h, new_w = max(1, int(want_w * height / width)), want_w
        new_h, new_w = max(new_h, self.size[0]), max(new_w, self.size[1])
        if max(new_h, new_w) > 100 * max(self.size):
            message = f"{width}x{height}: too narrow to be cropped to {self.size[1]}x{self.size[0]}"
            raise ImageError(message, code="image.narrow")
        return new_h, new_w

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalise pixels: (n, H, W, channels) uint8 -> (n, channels, H, W) float32.

        Artifacts with the input `image` do this step themselves.
        """
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (pixels.astype(np.float32) - 255 * mean) / (255 * std)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for manifests: without `crop_pct` where nothing is cropped."""
        return {key: value for key, value in asdict(self).items() if key != "crop_pct" or self.resize == CROP}

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in self.size):
            raise ValueError(f"size is {list(self.size)}, it must be [H, W] of 1 to {MAX_SIDE} pixels")
        if not (0 < self.crop_pct <= 1):
            raise ValueError(f"crop_pct is {self.crop_pct}, it must be over 0 and at most 1")
        for name, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("resize", self.resize, RESIZES),
        ):
            if value not in known:
                raise ValueError(f"{name} is '{value}', choose from: {', '.join(known)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not 1 <= len(values) <= MAX_CHANNELS or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name} is {list(values)}, it must be finite numbers, one for each channel")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values, std {len(self.std)}: one for each channel")
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}, it must be positive")


def for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Repeat values of red, green, blue for a network of any number of channels, as timm does: 4 are R, G, B, R."""
    return tuple(values[i % len(values)] for i in range(channels))
