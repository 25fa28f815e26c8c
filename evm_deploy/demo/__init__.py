"""Embedded demos: small EfficientVMambas. A classifier of scikit-learn's digits, a detector and a segmenter of scenes.

The images of the digits are embedded, too. `scenes` generates the scenes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

HERE = Path(__file__).parent
CHECKPOINT = HERE / "evm_digits.safetensors"
CHECKPOINTS = {
    "digits": CHECKPOINT,
    "detector": HERE / "evm_scenes_detector.safetensors",
    "segmenter": HERE / "evm_scenes_segmenter.safetensors",
}
DIGITS = {split: HERE / f"{split}.npz" for split in ("train", "heldout")}
WORD = "demo"  # value of --calib and --val that stands for the embedded digits; begins the names of demos


def digits(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (n, 8, 8) uint8 and labels (n,) int64 of `split`.

    split: `train` (1198 images) or `heldout` (599 images, not used in training).
    """
    with np.load(DIGITS[split]) as data:
        return data["images"], data["labels"]


def checkpoint_path(named: str) -> Path:
    """Return the path `named`. `demo:detector` and its like are embedded checkpoints, unless a file has that name.

    Raises UsageError for a demo that does not exist.
    """
    word, colon, name = named.partition(":")
    if word != WORD or not colon or Path(named).exists():
        return Path(named)
    if name not in CHECKPOINTS:
        raise UsageError(
            f"there is no demo {name!r}", f"the demos are {', '.join(f'demo:{each}' for each in CHECKPOINTS)}"
        )
    return CHECKPOINTS[name]


def resolved(named: str | None) -> str | None:
    """Return the absolute path of a folder or list of images, for other processes; the word `demo` and None stay."""
    return named if named is None or (named == WORD and not Path(named).exists()) else str(Path(named).resolve())


def images_path(named: str, split: str, task: str) -> Path:
    """Return the path `named`. The word `demo` means the digits of `split`, unless a file of that name exists.

    task: of the network that reads the images. Raises UsageError for the word and a task other than classification.
    """
    if named != WORD or Path(named).exists():
        return Path(named)
    if task != "classification":
        raise UsageError(
            f"the images of `{WORD}` are handwritten digits for a classifier, this network's task is {task}",
            "python -m evm_deploy.demo.scenes FOLDER writes scenes for detectors and segmenters",
        )
    return DIGITS[split]


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
