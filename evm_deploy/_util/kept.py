"""Results of unfinished work, kept on disk so that the same work, started again after an interruption, continues."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import cache_folder, lock_folder, log_no_cache, write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

FOLDER = "unfinished"  # in the cache folder: one folder for each interrupted work
KEPT_DAYS = 14  # an interrupted work that nobody continues is deleted after this time
KEPT_WORKS = 3  # interrupted works beside the present one that are kept, the newest
RESERVED_BYTES = 256 << 20  # that stay free on the disk for others
DIGEST_BYTES = 32  # SHA-256 before the content of each file

_open: list[Path] = []  # folders that this process fills now


class KeptResults:
    """Arrays by name, kept in `folder`; in memory without a folder, and as soon as the folder cannot be written.

    A name must say everything that decides its arrays. A file that is damaged, such as by a power failure while it was
    written, counts as missing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[str, Arrays] = {}
        self._put: set[str] = set()

    def inherited(self, name: str) -> bool:
        """Test whether the arrays of `name` are there, and an interrupted work has left them."""
        return name not in self._put and self.get(name) is not None

    def get(self, name: str) -> Arrays | None:
        """Return the arrays of `name`, None if there are none."""
        if name in self._memory or not self.folder:
            return self._memory.get(name)
        import numpy as np

        try:
            content = self._file(name).read_bytes()
            if hashlib.sha256(content[DIGEST_BYTES:]).digest() != content[:DIGEST_BYTES]:
                return None
            with np.load(io.BytesIO(content[DIGEST_BYTES:]), allow_pickle=False) as arrays:
                return dict(arrays)
        except OSError:
            return None

    def put(self, name: str, arrays: Arrays) -> None:
        """Keep the arrays of `name`. The file is complete as soon as it has its name."""
        self._put.add(name)
        if self.folder:
            import numpy as np

            content = io.BytesIO()
            np.savez(content, **arrays)  # type: ignore[arg-type]  # the stub takes `allow_pickle` for one of the arrays
            data = content.getvalue()
            try:
                if shutil.disk_usage(self.folder).free < len(data) + RESERVED_BYTES:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
                write_atomically(self._file(name), hashlib.sha256(data).digest() + data)
                return
            except OSError as error:
                log_no_cache(f"{error.filename or self.folder}: {error.strerror or error}")
        self._memory[name] = arrays

    def _file(self, name: str) -> Path:
        assert self.folder
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.npz"


@contextlib.contextmanager
def kept_results(identity: Mapping[str, Any]) -> Iterator[KeptResults]:
    """Context manager: the results that an interrupted work of this identity has left, else none.

    identity: plain data that say which work it is. The folder is locked. It is deleted when the block ends, and stays
    if an exception, a signal or a power failure ends the work. Results are kept in memory alone if another process does
    the same work, or if the cache folder cannot be written or locked; a warning is logged then. Leftovers of other
    works are deleted after KEPT_DAYS, and all but the newest KEPT_WORKS.
    """
    text = json.dumps(identity, sort_keys=True, default=str)
    folder = cache_folder() / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:32]
    lock = _locked(folder)
    if lock is None:
        yield KeptResults()
        return
    try:
        _tidy(folder)
        with continued(folder):
            yield KeptResults(folder)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was kept
        os.close(lock)


@contextlib.contextmanager
def continued(folder: Path) -> Iterator[None]:
    """Context manager: a command that is interrupted meanwhile says that it continues with what is in `folder`."""
    _open.append(folder)
    try:
        yield
    finally:
        _open.remove(folder)


def what_is_left() -> str:
    """Return a sentence on what this process leaves behind if it ends now."""
    if any(next(folder.iterdir(), None) for folder in _open if folder.is_dir()):
        return f"the same command continues with what is done (kept in {_open[-1]})"
    return "nothing was left behind"


def _locked(folder: Path) -> int | None:
    """Create and lock a folder. Returns the lock, None with a warning if that is impossible."""
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            if lock is None:
                reason = f"{folder} is used by another process, or cannot be locked"
                logging.getLogger("evm_deploy").warning("this work cannot be continued if interrupted: %s", reason)
                return None
            if folder.is_dir() and os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
            os.close(lock)  # another process has ended the same work in between
    except OSError as error:
        log_no_cache(f"{error.filename or folder}: {error.strerror or error}")
        return None


def _tidy(folder: Path) -> None:
    """Delete leftovers of other works that are old or many, unless a process is at work on them."""
    with contextlib.suppress(OSError):
        others = [(each.stat().st_mtime, each) for each in folder.parent.iterdir() if each != folder]
        for place, (changed, other) in enumerate(sorted(others, reverse=True)):
            late = time.time() - changed > KEPT_DAYS * 24 * 3600
            if (late or place >= KEPT_WORKS) and (lock := lock_folder(other)) is not None:
                shutil.rmtree(other, ignore_errors=True)
                os.close(lock)
