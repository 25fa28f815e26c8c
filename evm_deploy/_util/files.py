"""Small helpers for files."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path


def package_folders() -> list[Path]:
    """Where this package is: two folders in an editable install, of the sources and of what was compiled."""
    return [Path(folder) for folder in sys.modules[__name__.partition(".")[0]].__path__]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/evm-deploy, by default ~/.cache/evm-deploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evm-deploy"


def temporary_sibling(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside `path` to write into before renaming; it goes with its `with` block, or when the process ends.

    Its name says for what and by whom: `.<name>.<pid>.<random>`. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{os.getpid()}."
    return tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, beside `path` and rename it: there is the old one, or the new one, whole. OSError.

    A device or pipe, such as /dev/null, is written into: renaming would replace it by a file.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(data)
        return
    with temporary_sibling(path) as folder:
        file = Path(folder) / path.name
        file.write_bytes(data)
        file.replace(path)


def artifact_bytes(path: Path) -> int:
    """Size of an artifact: a file or a folder, with the weights beside an IR."""
    parts = (path, *path.rglob("*"), path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in parts if file.is_file())


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checksum(path: Path) -> None:
    """Write down, beside a cached file, what it is now: `<name>.sha256`. Raises OSError."""
    write_atomically(_checksum_path(path), sha256(path))


def checksum_matches(path: Path) -> bool:
    """Whether a file is what it was when it was sealed."""
    try:
        return _checksum_path(path).read_text(encoding="ascii") == sha256(path)
    except (OSError, UnicodeDecodeError):
        return False


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
