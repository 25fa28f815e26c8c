"""Helpers for files: cache folder, atomic writes, checksums; also on file systems without modes or renames."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from evm_deploy.errors import UsageError

#: errno of a rename that a file system does not have.
NO_RENAME = frozenset({errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})


def package_folders() -> list[Path]:
    """Return the folders of this package. An editable install has two: the sources and the compiled libraries."""
    return [Path(folder) for folder in sys.modules[__name__.partition(".")[0]].__path__]


def cache_folder() -> Path:
    """Return the cache folder: $XDG_CACHE_HOME/evm-deploy, by default ~/.cache/evm-deploy.

    A cache is a convenience: for a user without a home this is `temporary_cache`.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "evm-deploy"
    except RuntimeError:
        return temporary_cache("this user has no home folder")


@cache
def temporary_cache(reason: str) -> Path:
    """Return a folder that takes the place of the cache until this process ends, and log the reason."""
    log_no_cache(reason)
    return Path(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="evm-cache-", ignore_cleanup_errors=True)


@cache
def log_no_cache(reason: str) -> None:
    """Log a warning, once, that results cannot be cached. Python prints it on stderr unless logging is configured."""
    logging.getLogger("evm_deploy").warning(
        "nothing is cached for later commands: %s\n  to change it, set XDG_CACHE_HOME to a writable folder", reason
    )


def writable_cache(folder: Path) -> Path:
    """Return a folder of the cache, created if it is missing, or one in `temporary_cache` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        folder = temporary_cache(f"{error.filename or folder}: {error.strerror or error}") / folder.name
        folder.mkdir(exist_ok=True)
    return folder


def lock_folder(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder until the returned file descriptor is closed. The lock ends with the process.

    None if the folder is locked by another process, or if locks do not work there. wait: for the other process.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def make_readable(path: Path) -> None:
    """Let other users read a file or folder. File systems without modes (FAT, SMB, S3) keep theirs."""
    with contextlib.suppress(OSError):
        path.chmod(0o755 if path.is_dir() else 0o644)


def copy_folder(source: Path, to: Path) -> None:
    """Copy a folder with the content of its files, without modes and times, which not every file system has."""
    to.mkdir()
    for each in sorted(source.iterdir()):
        if each.is_dir():
            copy_folder(each, to / each.name)
        else:
            shutil.copyfile(each, to / each.name)


def move(source: Path, to: Path) -> None:
    """Rename a file or folder to a path that does not exist yet; copy it where the file system cannot rename it.

    Overlays of containers cannot rename folders of a lower layer, and S3 mounts cannot rename anything. A copy is
    deleted again if it is not complete. Raises OSError.
    """
    try:
        source.rename(to)
        return
    except OSError as error:
        if error.errno not in NO_RENAME or to.exists():
            raise
    try:
        copy_folder(source, to) if source.is_dir() else shutil.copyfile(source, to)
    except BaseException:
        shutil.rmtree(to, ignore_errors=True) if to.is_dir() else to.unlink(missing_ok=True)
        raise
    shutil.rmtree(source) if source.is_dir() else source.unlink()


def give_name(file: Path, path: Path) -> None:
    """Give a complete file a name that no file has, at once. Raises FileExistsError, and OSError.

    File systems without hard links cannot do both at once: there a file of that moment may be replaced.
    """
    try:
        path.hardlink_to(file)
        file.unlink()
    except FileExistsError:
        raise
    except OSError:  # no hard links, or none across overlays
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        move(file, path)


def numbered(path: Path) -> Iterator[Path]:
    """Yield `a.png`, `a-2.png`, `a-3.png` and so on, for a file that replaces no other."""
    yield path
    yield from (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))


def native_path(path: Path) -> str:
    """Return a path as text for a native library. Raises UsageError for a path that is not UTF-8, which few take."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the path {path} is not UTF-8 text", "rename the folder or file, or use another") from error
    return str(path)


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
        replace_file(file, path)


def replace_file(file: Path, path: Path) -> None:
    """Rename `file` to `path`, over an older file; copy it where the file system cannot rename. Raises OSError."""
    try:
        file.replace(path)
    except OSError as error:
        if error.errno not in NO_RENAME or path.is_dir():
            raise
        shutil.copyfile(file, path)


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


def require_writable(path: Path, flag: str, folder: bool = False) -> None:
    """Check before work begins that results can be written to `path`. Leaves no trace.

    folder: `path` is a folder for files, which is made later if it does not exist; otherwise `path` is a file. flag:
    flag that named the path. Raises UsageError.
    """
    place = path if folder else path.parent
    try:
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not folder and path.exists() and not path.is_file():
            return  # a device or pipe: to open it may wait for a reader
        while not os.path.lexists(place):
            place = place.parent
        with tempfile.TemporaryDirectory(prefix=".evm-", dir=place):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", f"choose another {flag}") from error


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
