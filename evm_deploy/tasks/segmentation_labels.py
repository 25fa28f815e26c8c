"""Labelled images for segmentation: folders of images and of masks, as ADE20K, mmseg and PASCAL VOC lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import sha256
from evm_deploy._util.text import some_of
from evm_deploy.data.sources import ImageItem, find_images
from evm_deploy.errors import CalibrationError
from evm_deploy.tasks.mean_iou import IGNORED

PAIRS = {  # folder of the images -> names of the folder of their masks, beside it
    "images": ("annotations", "masks", "labels"),
    "img_dir": ("ann_dir",),
    "JPEGImages": ("SegmentationClass",),
}
LAYOUT = "give a folder with images/*.jpg and annotations/*.png, or the folder of the images"
MODES = ("L", "P", "1", "I", "I;16", "I;16L", "I;16B")  # of Pillow: one value for each pixel, a palette's index in P


@dataclass(frozen=True)
class TrueMap:
    """File with the true class of each pixel of an image: a mask. Its text holds the digest of the file.

    path: of the mask. classes: number of classes of the network. reduce_zero_label: 0 in the mask does not count, and 1
    is class 0, as in ADE20K.
    """

    path: Path
    classes: int
    reduce_zero_label: bool = False

    def read(self) -> NDArray[np.int32]:
        """Read the mask. Returns the class of each pixel of the upright image, (h, w); IGNORED where none counts.

        Raises CalibrationError for a file that is no mask, and for classes that the network does not have.
        """
        values = _read_mask(self.path).astype(np.int32)
        if self.reduce_zero_label:
            values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
        unknown = np.unique(values[(values != IGNORED) & (values >= self.classes)])
        if len(unknown):
            raise CalibrationError(
                f"{self.path} has the classes {some_of([str(value) for value in unknown])}, the network has "
                f"0 to {self.classes - 1}; {IGNORED} does not count",
                "give masks of the network's classes",
            )
        return values

    def __str__(self) -> str:
        return f"mask {sha256(self.path)}, {self.classes} classes, reduce_zero_label {self.reduce_zero_label}"


def read_masks(source: Path, names: Sequence[str] | None, classes: int) -> tuple[list[ImageItem], str]:
    """List images with their `TrueMap`, sorted by path, and return a sentence on how classes got their index.

    source: a folder that holds a folder of images and one of masks (PAIRS), or the folder of the images itself. A mask
    is the PNG file with the relative path of its image. classes: number of classes of the network. A value of exactly
    `classes` in a mask says that the masks number their classes from 1, and 0 does not count, as in ADE20K. Raises
    CalibrationError if there are no masks, for classes that the network does not have, if images of several splits
    would be mixed, or if an image has no mask.
    """
    images, masks = _folders(source)
    paths = [Path(str(item.source)) for item in find_images(images)]
    splits = sorted({path.relative_to(images).parts[0] for path in paths if path.parent != images})
    known = [name for name in splits if name.lower() in ("train", "training", "val", "validation", "test", "testing")]
    if len(known) > 1:
        raise CalibrationError(f"{images} holds several splits: {', '.join(known)}", f"give one:  {images / known[-1]}")
    pairs = [(path, masks / path.relative_to(images).with_suffix(".png")) for path in paths]
    missing = [str(path.relative_to(images)) for path, mask in pairs if not mask.is_file()]
    if len(missing) == len(pairs) or (missing and images.name != "JPEGImages"):  # VOC has masks of some images
        raise CalibrationError(
            f"{len(missing)} of {len(pairs)} images in {images} have no mask in {masks}: {some_of(missing)}",
            "a mask is a PNG file with the name of its image",
        )
    found = [(path, mask) for path, mask in pairs if mask.is_file()]
    # Not of one image: whether the classes are counted from 1
    reduced = any(_largest(mask) == classes for _, mask in found)
    truths = [TrueMap(mask, classes, reduced) for _, mask in found]
    for truth in truths:
        truth.read()  # an unknown class is told before the work
    items = [
        ImageItem(str(path.relative_to(images)), path, truth) for (path, _), truth in zip(found, truths, strict=True)
    ]
    by = f"{classes} occurs, so 1 is the first class and 0 does not count" if reduced else "0 is the first class"
    return items, f"classes of {source.name} got their index from the masks: {by}"


def _largest(mask: Path) -> int:
    """Return the largest class in a mask, -1 if no pixel counts."""
    values = _read_mask(mask)
    counted = values[values != IGNORED]
    return int(counted.max()) if counted.size else -1


def _folders(source: Path) -> tuple[Path, Path]:
    """Return the folder of the images and that of the masks. Raises CalibrationError."""
    if not source.is_dir():
        raise CalibrationError(f"{source} is not a folder", LAYOUT)
    for name, beside in PAIRS.items():
        masks = _first(source, beside)
        if (source / name).is_dir() and masks:
            return source / name, masks
    for parent in (source, *source.parents):  # images/validation -> annotations/validation
        masks = _first(parent.parent, PAIRS.get(parent.name, ()))
        if masks:
            return source, masks / source.relative_to(parent)
    raise CalibrationError(f"{source} has no folder of masks beside its images", LAYOUT)


def _first(parent: Path, names: Sequence[str]) -> Path | None:
    return next((parent / name for name in names if (parent / name).is_dir()), None)


def _read_mask(path: Path) -> NDArray[Any]:
    """Read the values of a mask: of a palette image its indices. Raises CalibrationError."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            image.load()
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # untrusted file: Pillow's plugins raise many types
        raise CalibrationError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    if mode not in MODES:
        raise CalibrationError(f"{path} is a colour image (mode {mode}); a mask has one class index for each pixel")
    return values
