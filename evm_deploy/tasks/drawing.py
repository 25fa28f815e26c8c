"""Drawing of predictions on images with Pillow: masks, and boxes with names and scores in any script."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy.data.masks import DetectedMask
from evm_deploy.tasks.task import Detection

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
OPACITY = 128  # of masks, of 255
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
    line, letters = (
        max(least_pixels, round(share * (width + height) / 2))
        for least_pixels, share in ((LEAST_LINE, LINE_SHARE), (LEAST_TEXT, TEXT_SHARE))
    )
    drawn = sorted((each for each in found if each.score >= least), key=lambda one: one.score)
    for each in drawn:
        if each.mask:
            _cover(canvas, each.mask, PALETTE[each.index % len(PALETTE)])
    for each in drawn:
        colour = PALETTE[each.index % len(PALETTE)]
        x1, x2 = (min(max(round(value), 0), width) for value in each.box[::2])
        y1, y2 = (min(max(round(value), 0), height) for value in each.box[1::2])
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # the last pixel that the box covers
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        _tag(draw, each, (x1, y1), colour, letters, canvas.size)
    return canvas


def _cover(canvas: Image, mask: DetectedMask, colour: tuple[int, ...]) -> None:
    """Cover the pixels of a mask with a colour, half transparent."""
    from PIL import Image as Pillow

    bitmap, (top, left) = mask.crop()
    if bitmap.size:
        canvas.paste(colour, (left, top), Pillow.fromarray(bitmap.astype(np.uint8) * OPACITY))


def _tag(
    draw: Any, each: Detection, corner: tuple[int, int], colour: tuple[int, ...], height: int, size: tuple[int, int]
) -> None:
    """Write name and score on a filled tag above the box, or inside it where the image ends."""
    font = font_for(each.label, height)
    name = each.label if font else f"#{each.index}"
    font = font or font_for(name, height)
    text = f"{name} {each.score:.2f}"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    wide, high = right - left + 4, bottom - top + 4
    x = max(0, min(corner[0], size[0] - wide))
    y = corner[1] - high if corner[1] >= high else corner[1]
    draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=colour)
    dark = sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), colour, strict=True)) > 140
    draw.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0) if dark else (255, 255, 255), font=font)


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
