"""The embedded demo: a small EfficientVMamba trained on scikit-learn's digits, and the digits themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

HERE = Path(__file__).parent
CHECKPOINT = HERE / "evm_digits.safetensors"
DIGITS = {split: HERE / f"{split}.npz" for split in ("train", "heldout")}
WORD = "demo"  # as --calib and --val


def digits(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 8, 8) uint8 and labels (n,) int64 of `split`: `train` (1198) or `heldout` (599, never trained on)."""
    with np.load(DIGITS[split]) as data:
        return data["images"], data["labels"]


def images_path(named: str, split: str) -> Path:
    """The path that a user named, or for the word `demo`, where no file is called so, that of the digits of `split`."""
    return DIGITS[split] if named == WORD and not Path(named).exists() else Path(named)


def write_images(folder: Path, split: str = "heldout", count: int | None = None) -> int:
    """Write the first `count` images of `split` as PNG files in class folders, `folder/7/0012.png`."""
    from PIL import Image

    images, labels = digits(split)
    for index, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return len(images[:count])
