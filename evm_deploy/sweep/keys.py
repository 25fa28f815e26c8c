"""Keys of units: digests of all that decides the result of a unit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evm_deploy._util.files import sha256
from evm_deploy.data.sources import ImageItem, find_images
from evm_deploy.demo import WORD
from evm_deploy.errors import CalibrationError

DIGITS = 16  # hex digits of a key


def digest(content: Any) -> str:
    """Return hex digits of plain data."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def items_digest(items: Sequence[ImageItem]) -> str:
    """Return a digest of images that are not read: by name, size and time of each file, and its true answer."""
    return digest([(item.name, _state(item), str(item.label)) for item in items])


def source_digest(named: str | None) -> str:
    """Return a digest of a folder, list or file of images, without reading the images. Raises CalibrationError."""
    if named is None:
        return ""
    path = Path(named)
    if named == WORD and not path.exists():
        return WORD
    if path.is_file():
        return sha256(path)
    if not path.exists():
        raise CalibrationError(f"{named} does not exist", "give a folder of images, a list of paths, or an .npz")
    return items_digest(find_images(path))


def _state(item: ImageItem) -> Any:
    if isinstance(item.source, np.ndarray):
        return hashlib.sha256(item.source.tobytes()).hexdigest()
    try:
        found = item.source.stat()
    except OSError:
        return None  # to be reported as unreadable
    return found.st_size, found.st_mtime_ns
