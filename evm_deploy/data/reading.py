"""Read images: decode files, bytes, Pillow images and arrays to upright 8-bit pixels, grey, RGB or RGBA."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
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

#: Channels of a network's input -> the mode of Pillow that its images are converted to. Others are no images.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BYTES = (bytes, bytearray, memoryview)
OVER_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # modes that Pillow converts to RGB by way of another only
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags; Pillow ignores the last above 8 bits


def read_image(image: ImageLike, channels: int = 3) -> Image:
    """Read an image as upright 8-bit grey (1 channel), RGB (3) or RGBA (4): apply EXIF rotation, convert every mode.

    image: path, encoded bytes, open binary file, Pillow image, or uint8 array HxW, HxWx1, HxWx3 or HxWx4. Grey is the
    luminance of RGB, as Pillow's convert("L"). Images without alpha are opaque; grey and RGB drop alpha. Values of more
    than 8 bits are scaled: 0..65535, 0..4095 in TIFF files of 12 bits, float 0..1 or 0..255. Raises ImageError, also
    for deep values in another range, and for other numbers of channels, which no image has.
    """
    import PIL.Image
    from PIL import UnidentifiedImageError

    if channels not in MODES:
        raise ImageError(
            f"the network takes tensors of {channels} channels: images have {listed_channels()}",
            "give tensors: run(feeds)",
        )
    name = image_name(image)
    try:
        if isinstance(image, np.ndarray):
            return _converted(_from_array(image), channels)
        if isinstance(image, PIL.Image.Image):
            return _converted(_upright(image), channels)
        with PIL.Image.open(io.BytesIO(image) if isinstance(image, BYTES) else image) as opened:
            opened.load()
            return _converted(_upright(opened), channels)
    except ImageError:
        raise
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


def listed_channels() -> str:
    """Return the numbers of channels that images have, as text: 1 (L), 3 (RGB) or 4 (RGBA)."""
    *others, last = (f"{channels} ({mode})" for channels, mode in MODES.items())
    return f"{', '.join(others)} or {last}"


def is_one_image(value: object) -> bool:
    """Test whether `value` is of a type that `read_image` takes as one image, such as an array HxW or HxWxC."""
    import PIL.Image

    if isinstance(value, np.ndarray):
        return value.ndim == 2 or (value.ndim == 3 and value.shape[2] in MODES)
    return isinstance(value, (str, os.PathLike, *BYTES, PIL.Image.Image)) or hasattr(value, "read")


def image_name(image: object) -> str:
    """Return the name of an image for messages. Raises ImageError for a value that cannot be an image."""
    if isinstance(image, (str, os.PathLike)):
        return f"image {shortened(os.fspath(image))}"
    if isinstance(image, np.ndarray):
        return "array image"
    if is_one_image(image):
        return f"image of {len(image)} bytes" if isinstance(image, BYTES) else f"image ({type(image).__name__})"
    raise ImageError(
        f"an image cannot be a {type(image).__name__}",
        "give a path, the bytes of an image file, a Pillow image, or a uint8 array HxW, HxWx1, HxWx3 or HxWx4",
    )


def _from_array(image: NDArray[Any]) -> Image:
    import PIL.Image

    if image.dtype != np.uint8 or not is_one_image(image):
        raise ImageError(f"array image must be uint8 HxW, HxWx1, HxWx3 or HxWx4, got {image.dtype} {list(image.shape)}")
    if 0 in image.shape:
        raise ImageError(f"array image is empty: {list(image.shape)}")
    return PIL.Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)


def _upright(image: Image) -> Image:
    """Return the image with its EXIF rotation applied, in a mode that `_converted` takes."""
    from PIL import ImageOps

    tags = getattr(image, "tag_v2", {})  # of a TIFF file; the transposed copy has none
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, tags)
    elif image.mode in OVER_ALPHA or (image.mode == "P" and "transparency" in image.info):
        image = image.convert(OVER_ALPHA.get(image.mode, "RGBA"))
    return image


def _converted(image: Image, channels: int) -> Image:
    if channels == 1:  # by way of RGB: Pillow's own ways from palettes and YCbCr round otherwise
        image = image.convert("RGB")
    return image.convert(MODES[channels])


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
