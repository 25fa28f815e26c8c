"""Generate scenes: images with one to six striped shapes on clutter, their boxes and label maps, from a seed.

`python -m evm_deploy.demo.scenes FOLDER` writes them as data to calibrate, evaluate and try with: `images/*.png`,
`instances.json` (COCO's boxes), and `annotations/*.png` (class index of each pixel).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from evm_deploy._util.files import write_atomically
from evm_deploy.errors import UsageError

CLASSES = ("disc", "square", "triangle", "cross", "ring", "star", "ell", "crescent")
MAP_CLASSES = ("background", *CLASSES)
SIZE = 128
MADE = "scenes of evm_deploy.demo.scenes"
HELD_OUT = 901  # seed of the scenes that no training has seen; training used 0 to 3
SIDES = (0.17, 0.5)  # of a shape, in parts of the scene's
MOST_OVERLAP = 0.12  # intersection over union of two shapes' boxes


@dataclass(frozen=True)
class Scene:
    """Image (H, W, 3) uint8 RGB with its truth.

    boxes: (n, 4) float32 x1 y1 x2 y2 in pixels, around all of a shape, also where it is hidden. labels: (n,) int64,
    index in CLASSES. map: (H, W) uint8, index in MAP_CLASSES of the topmost thing.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    map: NDArray[np.uint8]


def scene(seed: int, index: int, size: int = SIZE) -> Scene:
    """Generate scene `index` of a seed, size x size pixels. Equal arguments give equal scenes."""
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    canvas, label_map = _background(rng, size), np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(0, 5)):
        _rectangle(rng, canvas, label_map)
    boxes: list[NDArray[np.float32]] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, 7)):
        label, side = int(rng.integers(len(CLASSES))), int(size * rng.uniform(*SIDES))
        mask = _mask(CLASSES[label], side, rng.uniform(0, 360))
        fill = _stripes(rng, side)
        place = _free_place(rng, mask > 0.5, boxes, size)
        if place is None:
            continue
        top, left, box = place
        part = canvas[top : top + side, left : left + side]
        part[:] = part * (1 - mask[..., None]) + fill * mask[..., None]
        label_map[top : top + side, left : left + side][mask > 0.5] = label + 1
        boxes.append(box)
        labels.append(label)
    for _ in range(rng.integers(0, 3)):
        _rectangle(rng, canvas, label_map)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    noisy = np.asarray(image, np.float32) + rng.standard_normal((size, size, 3)) * rng.uniform(2, 20)
    return Scene(
        np.clip(noisy, 0, 255).astype(np.uint8),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        label_map,
    )


def _background(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Return smooth clutter of low contrast, (size, size, 3)."""
    low = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    clutter = np.asarray(low.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    mean: NDArray[np.float32] = clutter.mean((0, 1))
    return mean + (clutter - mean) * rng.uniform(0.3, 0.9)


def _rectangle(rng: np.random.Generator, canvas: NDArray[Any], label_map: NDArray[np.uint8]) -> None:
    """Draw a small rectangle of one colour over whatever is there."""
    size = len(canvas)
    height, width = (rng.integers(3, max(4, size // 7)) for _ in range(2))
    y, x = rng.integers(0, size - height), rng.integers(0, size - width)
    canvas[y : y + height, x : x + width] = rng.uniform(0, 255, 3)
    label_map[y : y + height, x : x + width] = 0


def _mask(shape: str, side: int, turn: float) -> NDArray[np.float32]:
    """Return the coverage (0..1) of a shape turned by `turn` degrees, (side, side). Drawn four times as large."""
    large = 4 * side
    mask = Image.new("L", (large, large), 0)
    draw = ImageDraw.Draw(mask)
    c, r = large / 2, large * 0.44

    def polygon(corners: int, *radii: float) -> None:
        angles = 2 * np.pi * np.arange(corners) / corners
        radius = np.resize(radii, corners)
        draw.polygon(list(zip(c + radius * np.cos(angles), c + radius * np.sin(angles), strict=True)), fill=255)

    def box(left: float, top: float, right: float, bottom: float, fill: int = 255, oval: bool = False) -> None:
        corners = [c + r * left, c + r * top, c + r * right, c + r * bottom]
        (draw.ellipse if oval else draw.rectangle)(corners, fill=fill)

    match shape:
        case "disc":
            box(-1, -1, 1, 1, oval=True)
        case "square":
            polygon(4, r)
        case "triangle":
            polygon(3, r)
        case "cross":
            box(-1, -1 / 3, 1, 1 / 3)
            box(-1 / 3, -1, 1 / 3, 1)
        case "ring":
            box(-1, -1, 1, 1, oval=True)
            box(-0.5, -0.5, 0.5, 0.5, fill=0, oval=True)
        case "star":
            polygon(10, r, r * 0.42)
        case "ell":
            box(-0.8, -0.8, -0.1, 0.8)
            box(-0.8, 0.1, 0.8, 0.8)
        case _:
            box(-1, -1, 1, 1, oval=True)
            box(-0.3, -0.8, 1.3, 0.8, fill=0, oval=True)
    turned = mask.rotate(turn, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BOX)
    return np.asarray(turned, np.float32) / np.float32(255)


def _stripes(rng: np.random.Generator, side: int) -> NDArray[Any]:
    """Return stripes of two colours, (side, side, 3)."""
    angle, period, phase = rng.uniform(0, np.pi), side * rng.uniform(0.10, 0.25), rng.uniform(0, 6.28)
    first, second, contrast = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3), rng.uniform(0.35, 1.0)
    y, x = np.mgrid[0:side, 0:side]
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)[..., None]
    sharp = np.sign(wave) * np.minimum(1, 3 * np.abs(wave))
    stripes: NDArray[Any] = (first + second) / 2 + contrast * (first - second) / 2 * sharp
    return stripes


def _free_place(
    rng: np.random.Generator, shape: NDArray[np.bool_], boxes: Sequence[NDArray[Any]], size: int
) -> tuple[int, int, NDArray[np.float32]] | None:
    """Return top, left and the shape's box of a place that overlaps the other boxes little; None if none is found."""
    side = len(shape)
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    for _ in range(20):
        top, left = int(rng.integers(0, size - side + 1)), int(rng.integers(0, size - side + 1))
        edges = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        box = np.array(edges, np.float32)
        if all(_overlap(box, other) < MOST_OVERLAP for other in boxes):
            return top, left, box
    return None


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> float:
    width, height = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    shared = width * height
    return float(shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared))


def write_scenes(folder: Path, count: int, seed: int = HELD_OUT, size: int = SIZE) -> None:
    """Write scenes as images, COCO's boxes and label maps into `folder`: images, instances.json, annotations.

    Scenes that stand there are replaced. Raises UsageError for other files of these names, and for a count below 1.
    """
    if count < 1:
        raise UsageError(f"--count {count}: use a number from 1")
    images, maps = folder / "images", folder / "annotations"
    _clear(folder)
    for each in (images, maps):
        each.mkdir(parents=True, exist_ok=True)
    boxes: list[dict[str, Any]] = []
    for index in range(count):
        made, name = scene(seed, index, size), f"{index:04d}.png"
        Image.fromarray(made.image).save(images / name)
        Image.fromarray(made.map).save(maps / name)
        for (x1, y1, x2, y2), label in zip(made.boxes.tolist(), made.labels.tolist(), strict=True):
            box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
            entry = {"id": len(boxes) + 1, "image_id": index, "category_id": label + 1, "bbox": box, "area": area}
            boxes.append({**entry, "iscrowd": 0})
    listed = [{"id": i, "file_name": f"{i:04d}.png", "width": size, "height": size} for i in range(count)]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    content = {"info": {"description": MADE}, "images": listed, "annotations": boxes, "categories": categories}
    write_atomically(folder / "instances.json", json.dumps(content).encode())


def _clear(folder: Path) -> None:
    """Remove the scenes in a folder. Raises UsageError if the names of scenes belong to other files."""
    listed = folder / "instances.json"
    if not any((folder / name).exists() for name in ("images", "annotations", listed.name)):
        return
    try:
        content = json.loads(listed.read_bytes())
        names = [each["file_name"] for each in content["images"]] if content["info"]["description"] == MADE else None
    except (OSError, ValueError, KeyError, TypeError):
        names = None
    if names is None:
        raise UsageError(f"{folder} holds other files, which are not replaced", "give a new folder")
    for name in names:
        for part in ("images", "annotations"):
            (folder / part / Path(name).name).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Write scenes into a folder. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m evm_deploy.demo.scenes", description="Write labelled scenes.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for images, instances.json, annotations")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="number of scenes, default 100")
    parser.add_argument(
        "--seed", type=int, default=HELD_OUT, metavar="S", help=f"seed, default {HELD_OUT}; to calibrate, another one"
    )
    args = parser.parse_args(argv)
    try:
        write_scenes(args.folder, args.count, args.seed)
    except (UsageError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return UsageError.exit_code
    print(f"{args.count} scenes are in {args.folder}: images, instances.json, annotations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
