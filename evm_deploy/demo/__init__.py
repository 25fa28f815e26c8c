"""Embedded demo: a small EfficientVMamba trained on scikit-learn's digits, and the images of the digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

HERE = Path(__file__).parent
CHECKPOINT = HERE / "evm_digits.safetensors"
DIGITS = {split: HERE / f"{split}.npz" for split in ("train", "heldout")}
WORD = "demo"  # value of --calib and --val that stands for the embedded digits


def digits(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (n, 8, 8) uint8 and labels (n,) int64 of `split`.

    split: `train` (1198 images) or `heldout` (599 images, not used in training).
    """
    with np.load(DIGITS[split]) as data:
        return data["images"], data["labels"]


def images_path(named: str, split: str) -> Path:
    """Return the path `named`. The word `demo` means the digits of `split`, unless a file of that name exists."""
    return DIGITS[split] if named == WORD and not Path(named).exists() else Path(named)


def write_images(folder: Path, split: str = "heldout", count: int | None = None) -> int:
    """Write the first `count` images of `split` as PNG files in class folders, such as `folder/7/0012.png`.

    Returns the number of images.
    """
    from PIL import Image

    images, labels = digits(split)
    for index, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return len(images[:count])
