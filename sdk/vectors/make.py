"""Write the preprocessing vectors: pictures of every awkward kind, and the pixels that a model must be given for them.

    python sdk/vectors/make.py

`cases.json` lists them: `name`; `image`, the file; `width`, `height`, of the upright picture; `preprocessing`, as in a
bundle's manifest; then `expected`, the file with the pixels (within `tolerance` of 255), or `error`, what must be said
instead. `normalised`: [channel, y, x, value] of what a model with `--input tensor` reads. The pictures are lossless, or
JPEG without subsampling, on which decoders agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evm_deploy.data.preprocessing import Preprocessing, read_rgb
from evm_deploy.errors import ImageError
from evm_deploy.export.selftest import picture

HERE = Path(__file__).parent
TOLERANCE = 1  # of 255
ORIENTATION = 0x0112  # Exif tag
SMALL = Preprocessing((64, 64))


@dataclass(frozen=True)
class Case:
    """What is to be made of a picture."""

    name: str
    image: str
    preprocessing: Preprocessing = SMALL


def save(folder: Path, name: str, image: NDArray[np.uint8] | Image.Image, orientation: int = 1) -> str:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    exif = Image.Exif()
    if orientation > 1:
        exif[ORIENTATION] = orientation
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if name.endswith(".jpg") else {"optimize": True}
    picture.save(folder / name, exif=exif, **options)
    return name


def cases(folder: Path) -> Iterator[Case]:
    """Write the pictures into `folder`."""
    photo = picture(117, 183, seed=1)
    odd = save(folder, "odd.png", photo)
    yield Case("square", odd)
    yield Case("wide", odd, Preprocessing((48, 80)))
    yield Case("tall", odd, Preprocessing((80, 40)))
    yield Case("bilinear", odd, Preprocessing((64, 64), interpolation="bilinear"))
    yield Case("uncropped", odd, Preprocessing((64, 64), crop_pct=1.0))
    yield Case("larger", odd, Preprocessing((130, 130), crop_pct=0.7))
    yield Case("other-mean", odd, Preprocessing((56, 56), 0.9, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 1.0)))
    yield Case("imagenet", save(folder, "smooth.png", smooth(217, 333)), Preprocessing((224, 224)))
    fits = Preprocessing((64, 64), crop_pct=1.0)
    yield Case("fits", save(folder, "fits.png", picture(64, 64, seed=2)), fits)
    checks = np.uint8(np.indices((90, 90)).sum(0) // 7 % 2 * 255)
    yield Case("overshoot", save(folder, "checks.png", np.dstack([checks] * 3)), Preprocessing((112, 112)))
    yield Case("one-pixel", save(folder, "one-pixel.png", np.array([[[200, 30, 90]]], np.uint8)))
    yield Case("tiny", save(folder, "tiny.png", picture(3, 5, seed=3)))
    yield Case("huge", save(folder, "huge.png", smooth(251, 373).repeat(16, 0).repeat(16, 1)))
    yield Case("panorama", save(folder, "panorama.png", picture(20, 640, seed=4)))
    noise = np.random.default_rng(7).integers(0, 256, (87, 33, 3), np.uint8)
    yield Case("width-first", save(folder, "tall-noise.png", noise), Preprocessing((58, 22), crop_pct=1.0))
    yield Case("tower", save(folder, "tower.png", picture(640, 20, seed=5)))
    yield Case("too-narrow", save(folder, "too-narrow.png", picture(2000, 3, seed=6)))
    grey, other = photo[..., 0], photo[::-1, :, 1]
    yield Case("grey", save(folder, "grey.png", grey))
    yield Case("grey-alpha", save(folder, "grey-alpha.png", np.dstack([grey, other])))
    yield Case("grey-16-bit", save(folder, "grey-16-bit.png", grey.astype(np.uint16) * 257))
    yield Case("alpha", save(folder, "alpha.png", np.dstack([photo, other])))
    yield Case("transparent", save(folder, "transparent.png", np.dstack([photo, 0 * grey])))
    rgb = Image.fromarray(photo)
    yield Case("palette", save(folder, "palette.png", rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)))
    yield Case("one-bit", save(folder, "one-bit.png", rgb.convert("1")))
    for orientation in range(2, 9):
        yield Case(f"exif-{orientation}", save(folder, f"exif-{orientation}.jpg", smooth(60, 90), orientation))
    yield Case("exif-in-png", save(folder, "exif-6.png", smooth(60, 90), orientation=6))


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """Colours without noise, other in every corner: JPEG and PNG make little of it."""
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    planes = [255 * x * (1 - y / 2), 255 * y * (1 - x / 3), 127 + 100 * np.cos(7 * x + 4 * y)]
    return np.stack(planes, -1).astype(np.uint8)


def entry(case: Case, folder: Path) -> dict[str, Any]:
    """Write the pixels that a case expects -> its entry of cases.json."""
    path = folder / case.image
    width, height = read_rgb(path).size
    facts = {**asdict(case), "width": width, "height": height}
    try:
        pixels = case.preprocessing.pixels(read_rgb(path))
    except ImageError as error:
        return {**facts, "error": str(error)}
    expected = f"{case.name}.expected.png"
    Image.fromarray(pixels).save(folder / expected, optimize=True)
    return {**facts, "expected": expected, "normalised": samples(case.preprocessing, pixels)}


def samples(preprocessing: Preprocessing, pixels: NDArray[np.uint8]) -> list[list[float]]:
    tensor = preprocessing.normalise(pixels[None])[0]
    _, height, width = tensor.shape
    at = [(0, 0, 0), (1, height // 2, width // 3), (2, height - 1, width - 1)]
    return [[*index, float(tensor[index])] for index in at]


def main() -> None:
    for old in (*HERE.glob("*.png"), *HERE.glob("*.jpg")):
        old.unlink()
    entries = [entry(case, HERE) for case in cases(HERE)]
    content = {"schema_version": 1, "tolerance": TOLERANCE, "cases": entries}
    (HERE / "cases.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{len(entries)} cases, {sum(file.stat().st_size for file in HERE.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
