"""Preprocessing of images: resize and crop with Pillow, as in the authors' evaluation, then normalise.

If the input of an artifact is `image`, the artifact normalises (mean, std) by itself. Resize and crop are never part of
an artifact; the manifest of every bundle describes them. This module needs neither torch nor a runtime.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.text import shortened
from evm_deploy.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike: TypeAlias = (
        str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image | NDArray[np.uint8]
    )

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_SIDE = 8192
INTERPOLATIONS = ("bicubic", "bilinear")
BYTES = (bytes, bytearray, memoryview)
OVER_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # modes that Pillow converts to RGB by way of another only
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags; Pillow ignores the last above 8 bits


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

    def pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        """Resize and crop one image, as `read_rgb` takes it. Returns (H, W, 3) uint8 RGB. Raises ImageError."""
        rgb = read_rgb(image)
        width, height = rgb.size
        want_h, want_w = (round(side / self.crop_pct) for side in self.size)
        if want_h * width >= want_w * height:  # the height decides
            new_h, new_w = want_h, max(1, int(want_h * width / height))
        else:
            new_h, new_w = max(1, int(want_w * height / width)), want_w
        new_h, new_w = max(new_h, self.size[0]), max(new_w, self.size[1])
        if max(new_h, new_w) > 100 * max(self.size):
            message = f"{_name(image)} is {width}x{height}: too narrow to be cropped to {self.size[1]}x{self.size[0]}"
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


def read_rgb(image: ImageLike) -> Image:
    """Read an image as upright 8-bit RGB: apply EXIF rotation, drop alpha, convert every other mode of Pillow.

    image: path, encoded bytes, open binary file, Pillow image, or uint8 array HxW, HxWx3 or HxWx4. Values of more than
    8 bits are scaled: 0..65535, 0..4095 in TIFF files of 12 bits, float 0..1 or 0..255. Raises ImageError, also for
    deep values in another range.
    """
    import PIL.Image
    from PIL import UnidentifiedImageError

    if isinstance(image, np.ndarray):
        return _from_array(image)
    name = _name(image)
    try:
        if isinstance(image, PIL.Image.Image):
            return _upright_rgb(image)
        with PIL.Image.open(io.BytesIO(image) if isinstance(image, BYTES) else image) as opened:
            opened.load()
            return _upright_rgb(opened)
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder", "give images, or a folder that holds some") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that Pillow can read") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {error}") from error
    except Exception as error:  # untrusted file: Pillow's plugins raise many types
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{name} cannot be read: {shortened(reason)}") from error


def is_one_image(value: object) -> bool:
    """Test whether `value` is of a type that `read_rgb` takes as one image; arrays are one if they are HxW or HxWxC."""
    import PIL.Image

    if isinstance(value, np.ndarray):
        return value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4))
    return isinstance(value, (str, os.PathLike, *BYTES, PIL.Image.Image)) or hasattr(value, "read")


def _name(image: object) -> str:
    """Return the name of an image for messages. Raises ImageError for a value that cannot be an image."""
    if isinstance(image, (str, os.PathLike)):
        return f"image {shortened(os.fspath(image))}"
    if isinstance(image, np.ndarray):
        return "array image"
    if is_one_image(image):
        return f"image of {len(image)} bytes" if isinstance(image, BYTES) else f"image ({type(image).__name__})"
    raise ImageError(
        f"an image cannot be a {type(image).__name__}",
        "give a path, the bytes of an image file, a Pillow image, or a uint8 array HxW, HxWx3 or HxWx4",
    )


def _from_array(image: NDArray[Any]) -> Image:
    import PIL.Image

    if image.dtype != np.uint8 or not is_one_image(image):
        raise ImageError(f"array image must be uint8 HxW, HxWx3 or HxWx4, got {image.dtype} {list(image.shape)}")
    if 0 in image.shape:
        raise ImageError(f"array image is empty: {list(image.shape)}")
    return PIL.Image.fromarray(image).convert("RGB")


def _upright_rgb(image: Image) -> Image:
    from PIL import ImageOps

    tags = getattr(image, "tag_v2", {})  # of a TIFF file; the transposed copy has none
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, tags)
    elif image.mode in OVER_ALPHA or (image.mode == "P" and "transparency" in image.info):
        image = image.convert(OVER_ALPHA.get(image.mode, "RGBA"))
    return image.convert("RGB")


def _eight_bits(image: Image, tags: Mapping[int, Any]) -> Image:
    """Scale greyscale of 16 or 32 bits (modes I, I;16 and F) to 8 bits: Pillow's own conversion clips.

    tags: TIFF tags. Raises ValueError if the range of the values is not certain: the result would be black or white.
    """
    import PIL.Image

    values: NDArray[np.float64] = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())  # NaN if there is one
    if image.mode.startswith("F"):
        top, known = (1.0 if high <= 1 else 255.0), "0..1 or 0..255"
        certain = low >= 0 and high <= top
    else:
        top = 2.0 ** min(16, *tags.get(BITS_PER_SAMPLE, (16,))) - 1
        known = f"0..{top:.0f}, and not all below 256"
        certain = low >= 0 and high <= top and not 0 < high < 256
    if not certain:
        raise ValueError(
            f"values from {low:g} to {high:g} in mode {image.mode}, known are {known}; save it with 8 bits"
        )
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = top - values
    return PIL.Image.fromarray((values * (255 / top)).round().astype(np.uint8))
