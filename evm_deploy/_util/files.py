"""Helpers for files: cache folder, atomic writes, checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path


def package_folders() -> list[Path]:
    """Return the folders of this package. An editable install has two: the sources and the compiled libraries."""
    return [Path(folder) for folder in sys.modules[__name__.partition(".")[0]].__path__]


def cache_folder() -> Path:
    """Return the cache folder: $XDG_CACHE_HOME/evm-deploy, by default ~/.cache/evm-deploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evm-deploy"


def temporary_sibling(path: Path) -> tempfile.TemporaryDirectory[str]:
    """Create a temporary folder `.<name>.<pid>.<random>` next to `path`, for atomic writes: fill it, then rename.

    The folder is deleted at the end of its `with` block, and at process exit. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{os.getpid()}."
    return tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: `path` holds either the old content or the complete new content. Text becomes UTF-8.

    A device or pipe such as /dev/null is written directly, because a rename would replace the device. Raises OSError.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(data)
        return
    with temporary_sibling(path) as folder:
        file = Path(folder) / path.name
        file.write_bytes(data)
        file.replace(path)


def real_path(path: Path) -> Path:
    """Return the absolute path behind all symbolic links. A loop of links stays as it is, unlike in Path.resolve."""
    return Path(os.path.realpath(path))


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file whose path the user gave, as `write_atomically` does.

    A symbolic link stays and the file behind it is written, with the permissions that it has. What is below /dev, such
    as /dev/stdout, is written directly. Raises OSError.
    """
    if path.is_relative_to("/dev"):
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return
    if path.is_symlink():
        path = real_path(path)
    mode = path.stat().st_mode if path.is_file() else None
    write_atomically(path, content)
    if mode is not None:
        with contextlib.suppress(OSError):  # a file system without permissions
            path.chmod(mode)


def require_regular(path: Path) -> None:
    """Raise OSError unless `path` can be read to an end: not for a pipe or a device, which could be read for ever."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "Not a regular file")


def artifact_bytes(path: Path) -> int:
    """Return the size of an artifact (file or folder) in bytes. The size of an IR includes its .bin file."""
    parts = (path, *path.rglob("*"), path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in parts if file.is_file())


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checksum(path: Path) -> None:
    """Write the SHA-256 of a cached file to `<name>.sha256` next to the file. Raises OSError."""
    write_atomically(_checksum_path(path), sha256(path))


def checksum_matches(path: Path) -> bool:
    """Test whether a file still has the SHA-256 that `write_checksum` stored. False if the checksum is missing."""
    try:
        return _checksum_path(path).read_text(encoding="ascii") == sha256(path)
    except (OSError, UnicodeDecodeError):
        return False


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
