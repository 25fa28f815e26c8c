"""Preprocessing of images: resize and crop with Pillow, as in the authors' evaluation, then normalise.

If the input of an artifact is `image`, the artifact normalises (mean, std) by itself. Resize and crop are never part of
an artifact; the manifest of every bundle describes them. This module needs neither torch nor a runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_SIDE = 8192
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a network: resize, crop the centre, normalise.

    The resize is antialiased, and the resized image covers size / crop_pct. Normalisation is (x / 255 - mean) / std.
    size: (H, W) in pixels. For a square size S, the shorter side becomes round(S / crop_pct), the longer side keeps the
    aspect ratio (rounded down), and the offset of the crop is rounded half to even.
    """

    size: tuple[int, int]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def pixels(self, image: str | Path | Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one image. Returns (H, W, 3) uint8 RGB.

        image: path, Pillow image, or uint8 array HxW, HxWx3 or HxWx4. Raises ImageError.
        """
        rgb = read_rgb(image)
        width, height = rgb.size
        want_h, want_w = (round(side / self.crop_pct) for side in self.size)
        if want_h * width >= want_w * height:  # the height decides
            new_h, new_w = want_h, max(1, int(want_h * width / height))
        else:
            new_h, new_w = max(1, int(want_w * height / width)), want_w
        new_h, new_w = max(new_h, self.size[0]), max(new_w, self.size[1])
        if max(new_h, new_w) > 100 * max(self.size):
            name = f"image {image}" if isinstance(image, (str, Path)) else "image"
            message = f"{name} is {width}x{height}: too narrow to be cropped to {self.size[1]}x{self.size[0]}"
            raise ImageError(message, code="image.narrow")
        if (new_w, new_h) != rgb.size:
            import PIL.Image

            # Pillow before 13 resizes the width first. Pillow 13 resizes the height of tall images first, which changes
            # noise by up to 9 of 255 (python-pillow/Pillow#9549). Two calls give the same pixels in every version.
            how = getattr(PIL.Image.Resampling, self.interpolation.upper())
            rgb = rgb.resize((new_w, height), how).resize((new_w, new_h), how)
        top, left = round((new_h - self.size[0]) / 2), round((new_w - self.size[1]) / 2)
        return np.asarray(rgb)[top : top + self.size[0], left : left + self.size[1]]

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalise pixels: (n, H, W, 3) uint8 -> (n, 3, H, W) float32.

        Artifacts with the input `image` do this step themselves.
        """
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (pixels.astype(np.float32) - 255 * mean) / (255 * std)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in self.size):
            raise ValueError(f"size is {list(self.size)}, it must be [H, W] of 1 to {MAX_SIDE} pixels")
        if not (0 < self.crop_pct <= 1):
            raise ValueError(f"crop_pct is {self.crop_pct}, it must be over 0 and at most 1")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is '{self.interpolation}', choose from: {', '.join(INTERPOLATIONS)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name} is {list(values)}, it must be three finite numbers")
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}, it must be positive")


def read_rgb(image: str | Path | Image | NDArray[np.uint8]) -> Image:
    """Read an image as upright 8-bit RGB: apply EXIF rotation, scale 16-bit values, drop alpha, convert CMYK.

    image: path, Pillow image, or uint8 array HxW, HxWx3 or HxWx4. Raises ImageError.
    """
    import PIL.Image
    from PIL import UnidentifiedImageError

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ImageError(f"array image must be uint8 HxW, HxWx3 or HxWx4, got {image.dtype} {list(image.shape)}")
        if 0 in image.shape:
            raise ImageError(f"array image is empty: {list(image.shape)}")
        return PIL.Image.fromarray(image).convert("RGB")
    if isinstance(image, PIL.Image.Image):
        return _upright_rgb(image)
    try:
        with PIL.Image.open(image) as opened:
            opened.load()
            return _upright_rgb(opened)
    except FileNotFoundError as error:
        raise ImageError(f"image {image} does not exist") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"image {image} is not an image that Pillow can read") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"image {image} is too large: {error}") from error
    except Exception as error:  # untrusted file: Pillow's plugins raise many types
        raise ImageError(f"image {image} cannot be read: {error}") from error


def _upright_rgb(image: Image) -> Image:
    import PIL.Image
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit and 32-bit greyscale: Pillow's own conversion clips
        values: NDArray[Any] = np.asarray(image).astype(np.float64)
        return PIL.Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
