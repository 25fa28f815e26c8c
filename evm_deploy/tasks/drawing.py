"""Drawing of predictions on images with Pillow: boxes, masks and label maps with the names of classes in any script."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy.data.masks import DetectedMask
from evm_deploy.errors import UsageError
from evm_deploy.tasks.task import Colour, Detection, LabelMap, Prediction

if TYPE_CHECKING:
    from PIL.Image import Image

# Twenty colours that differ from each other in brightness or hue; a class keeps its colour in every image
PALETTE = (
    *((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240)),
    *((240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128), (220, 190, 255), (170, 110, 40), (255, 250, 200)),
    *((128, 0, 0), (170, 255, 195), (128, 128, 0), (255, 215, 180), (0, 0, 128), (128, 128, 128)),
)
LINE_SHARE, TEXT_SHARE = 0.003, 0.022  # of the mean side of the image
LEAST_LINE, LEAST_TEXT = 1, 11  # pixels
OPACITY = 0.5  # of a mask or label map over its image
MISSING = "\U0010ffff"  # no font has it: its glyph is the one for missing characters
FONT_FOLDERS = {
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("C:/Windows/Fonts",),
}


def draw_detections(image: Image, found: Sequence[Detection], least: float = 0.3) -> Image:
    """Return a copy of an upright RGB image with the box, name and score of each detection from the score `least` on.

    Masks are half transparent, under all boxes. The best detection is drawn last, on top. A name that no font of this
    machine can write is replaced by the number of its class, such as `#7`.
    """
    from PIL import ImageDraw

    canvas = image.convert("RGB").copy()
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    line, letters = _line_and_letters(canvas.size)
    drawn = sorted((each for each in found if each.score >= least), key=lambda one: one.score)
    for each in drawn:
        if each.mask:
            _cover(canvas, each.mask, colour_of(each.index))
    for each in drawn:
        colour = colour_of(each.index)
        x1, x2 = (min(max(round(value), 0), width) for value in each.box[::2])
        y1, y2 = (min(max(round(value), 0), height) for value in each.box[1::2])
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # the last pixel that the box covers
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        tag = _Tag.of(draw, each, f"{each.score:.2f}", letters)
        y = y1 - tag.height if y1 >= tag.height else y1
        tag.write(draw, (max(0, min(x1, width - tag.width)), y), colour)
    return canvas


def _cover(canvas: Image, mask: DetectedMask, colour: Colour) -> None:
    """Cover the pixels of a mask with a colour, half transparent."""
    from PIL import Image as Pillow

    bitmap, (top, left) = mask.crop()
    if bitmap.size:
        canvas.paste(colour, (left, top), Pillow.fromarray(bitmap.astype(np.uint8) * round(255 * OPACITY)))


def draw_label_map(image: Image, found: LabelMap, least: float = 0.0) -> Image:
    """Return a copy of an upright RGB image with its label map over it, half transparent, and a legend.

    The legend names the classes of at least the share `least` of the pixels, by falling share, as many as fit. Colours
    are those of the map's palette, else of PALETTE. Raises UsageError for a label map of another size.
    """
    import PIL.Image
    from PIL import ImageDraw

    if found.map.shape != (image.height, image.width):
        raise UsageError(
            f"the label map is {found.map.shape[1]}x{found.map.shape[0]}, the image {image.width}x{image.height}",
            "draw it on the upright image that it was predicted for",
        )
    classes, place = np.unique(found.map, return_inverse=True)
    colours = np.array([colour_of(index, found.palette) for index in classes.tolist()], np.uint8)
    coloured = PIL.Image.fromarray(colours[place.reshape(found.map.shape)])
    canvas = PIL.Image.blend(image.convert("RGB"), coloured, OPACITY)
    draw = ImageDraw.Draw(canvas)
    _, letters = _line_and_letters(canvas.size)
    y = 0
    for each in found:
        tag = _Tag.of(draw, each, f"{each.score:.1%}", letters)
        if each.score < least or y + tag.height > canvas.height:
            break
        tag.write(draw, (0, y), colour_of(each.index, found.palette))
        y += tag.height
    return canvas


def colour_of(index: int, palette: Sequence[Colour] | None = None) -> Colour:
    """Return the colour of a class: that of a palette which has one, else of PALETTE."""
    return palette[index] if palette and 0 <= index < len(palette) else PALETTE[index % len(PALETTE)]


def _line_and_letters(size: tuple[int, int]) -> tuple[int, int]:
    """Return the width of lines and the height of letters, in pixels, for an image of a size."""
    line, letters = (
        max(least, round(share * sum(size) / 2))
        for least, share in ((LEAST_LINE, LINE_SHARE), (LEAST_TEXT, TEXT_SHARE))
    )
    return line, letters


@dataclass(frozen=True)
class _Tag:
    """Name and figure of a class, to be written on a filled rectangle of width x height pixels."""

    text: str
    font: Any
    box: tuple[int, int, int, int]

    @classmethod
    def of(cls, draw: Any, each: Prediction, figure: str, letters: int) -> _Tag:
        """Return the tag of a prediction: its name, or `#7` if no font can write the name, and a figure."""
        font = font_for(each.label, letters)
        name = each.label if font else f"#{each.index}"
        font = font or font_for(name, letters)
        text = f"{name} {figure}"
        return cls(text, font, draw.textbbox((0, 0), text, font=font))

    @property
    def width(self) -> int:
        """Width of the rectangle in pixels."""
        return self.box[2] - self.box[0] + 4

    @property
    def height(self) -> int:
        """Height of the rectangle in pixels."""
        return self.box[3] - self.box[1] + 4

    def write(self, draw: Any, corner: tuple[int, int], colour: Colour) -> None:
        """Write the tag with its top left corner at (x, y)."""
        x, y = corner
        draw.rectangle((x, y, x + self.width - 1, y + self.height - 1), fill=colour)
        dark = sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), colour, strict=True)) > 140
        at = (x + 2 - self.box[0], y + 2 - self.box[1])
        draw.text(at, self.text, fill=(0, 0, 0) if dark else (255, 255, 255), font=self.font)


@cache
def font_for(text: str, height: int) -> Any:
    """Return a font of Pillow or of this machine that has every character of a text; None if there is none."""
    from PIL import ImageFont

    for font in (ImageFont.load_default(height), *_fonts(height)):
        if _covers(font, text):
            return font
    return None


def _fonts(height: int) -> Iterator[Any]:
    """Yield the fonts of this machine."""
    from PIL import ImageFont

    for path in font_files():
        try:
            yield ImageFont.truetype(str(path), height)
        except (OSError, ValueError):  # no font, or one that FreeType cannot scale
            continue


@cache
def font_files() -> tuple[Path, ...]:
    """Return the font files of this machine, sorted."""
    folders = (Path(each).expanduser() for each in FONT_FOLDERS.get(sys.platform, ()))
    found = [path for folder in folders if folder.is_dir() for path in folder.rglob("*.[tToO][tT][fFcC]")]
    return tuple(sorted(found))


def _covers(font: Any, text: str) -> bool:
    """Test whether a font has a glyph of its own for every character of a text."""
    missing = bytes(font.getmask(MISSING))
    return all(each.isspace() or bytes(font.getmask(each)) != missing for each in set(text))
