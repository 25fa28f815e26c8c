"""Small helpers for files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/evm-deploy, by default ~/.cache/evm-deploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evm-deploy"


def write_aside(path: Path, text: str) -> None:
    """Write a text file beside `path` and rename it: there is the old one, or the new one, whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
