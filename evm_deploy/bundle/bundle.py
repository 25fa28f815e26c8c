"""Bundles on disk: atomic writing, and checks of every file when a bundle is opened."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from evm_deploy._util.files import artifact_bytes, make_readable, move, sha256, temporary_sibling
from evm_deploy.bundle import archive, signing
from evm_deploy.bundle.manifest import FILE, Manifest
from evm_deploy.errors import BundleError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True)
class Bundle:
    """Bundle on disk.

    unpacked: owner of the temporary folder if the bundle came from a zip. The folder is deleted with this object.
    """

    path: Path
    manifest: Manifest
    unpacked: TemporaryDirectory[str] | None = field(default=None, compare=False, repr=False)

    @property
    def size_bytes(self) -> int:
        """Size of the artifact in bytes, including its weights."""
        return artifact_bytes(self.path / self.manifest.artifact)


def open_bundle(path: str | Path, signed_by: Ed25519PublicKey | None = None) -> Bundle:
    """Read the manifest of the bundle at `path` (folder or zip), and check the SHA-256 of every file.

    signed_by: public key. If given, the bundle must be signed with its private key, and must not contain any file that
    is missing from the manifest. Raises BundleError.
    """
    path, unpacked = Path(path), None
    if path.suffix == archive.SUFFIX and path.is_file():
        path, unpacked = archive.unpacked(path)
    try:
        here = path.is_dir()
    except OSError as error:
        raise BundleError(f"bundle {path} cannot be read: {error.strerror}") from error
    if not here:
        what = "is a file, not a bundle folder" if path.exists() else "does not exist"
        raise BundleError(f"bundle {path} {what}", "make one with evm-export", code="bundle.missing")
    manifest = Manifest.read(path, partial(signing.check, signed_by, path) if signed_by else None)
    if manifest.rejected:
        message = f"bundle {path} was rejected at export: {'; '.join(manifest.parity['failures'])}"
        raise BundleError(message, code="bundle.rejected")
    for name, facts in manifest.files.items():
        file = path / name
        try:
            damaged = sha256(file) != facts["sha256"]
        except FileNotFoundError as error:
            message = f"bundle {path}: {name} is missing"
            raise BundleError(message, "copy the whole bundle again", code="file.missing", where=name) from error
        except OSError as error:
            message = f"bundle {path}: {name} cannot be read: {error.strerror}"
            raise BundleError(message, code="file.missing", where=name) from error
        if damaged:
            message = f"bundle {path}: {name} is damaged (sha256 differs)"
            raise BundleError(message, "copy the bundle again", code="file.damaged", where=name)
    if signed_by:
        signing.check_nothing_else(path, set(manifest.files))
    return Bundle(path, manifest, unpacked)


def check_free(path: Path, force: bool) -> None:
    """Check before an export that its bundle can be written to `path`.

    Raises BundleError if `path` exists without `force`, is not a bundle, or cannot be accessed.
    """
    try:
        path.exists()
    except OSError as error:
        raise BundleError(f"cannot write to {path.parent}: {error.strerror}", "choose another --out") from error
    if path.exists() and not force:
        raise BundleError(f"{path} exists", "add --force to replace it, or choose another --out")
    if path.exists() and not (path / FILE).is_file():
        raise BundleError(f"{path} exists and is not a bundle: --force does not replace it", "choose another --out")


@contextlib.contextmanager
def temporary_bundle(path: Path) -> Iterator[Path]:
    """Context manager: a temporary folder next to `path`, deleted on exit unless `commit` has renamed it.

    First removes the temporary folders of killed exports to the same path. Raises BundleError if writing fails.
    """
    try:
        _sweep(path)
        unfinished = temporary_sibling(path)
    except OSError as error:
        raise BundleError(f"cannot write to {path.parent}: {error.strerror}", "choose another --out") from error
    with unfinished as name:
        folder = Path(name)
        make_readable(folder)
        try:
            yield folder
        except OSError as error:
            raise _not_written(error, path) from error


def _not_written(error: OSError, path: Path) -> BundleError:
    """Return the error for an OSError while the bundle `path` was made. Only files below its folder are the bundle's.

    A full disk has no file name.
    """
    reason = error.strerror or str(error)
    if error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(path.parent):
        return BundleError(f"cannot write the bundle to {path.parent}: {reason}", "choose another --out")
    return BundleError(f"{os.fsdecode(error.filename)}: {reason}", f"no bundle was written to {path.parent}")


def commit(folder: Path, path: Path, manifest: Manifest) -> Bundle:
    """Write the manifest with the hash of every file into `folder`, then rename the folder to `path`.

    A bundle that already exists at `path` is replaced. Returns the bundle.
    """
    for file in folder.rglob("*"):
        make_readable(file)  # safetensors writes 0600
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256(file), "size_bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = replace(manifest, files=files)
    (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")
    _replace(folder, path)
    return Bundle(path, manifest)


def _replace(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`. The old bundle stays at `path` if the rename fails or the process exits meanwhile."""
    old = folder.with_name(folder.name + ".old")

    def restore() -> None:
        if old.exists() and not path.exists():
            move(old, path)

    atexit.register(restore)
    try:
        if path.exists():
            move(path, old)
        move(folder, path)
    finally:
        restore()
        atexit.unregister(restore)
    shutil.rmtree(old, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Clean up after killed exports to `path`: delete their temporary folders, and restore an old bundle."""
    for left in path.parent.glob(f".{path.name}.*"):
        pid = left.name.removeprefix(f".{path.name}.").split(".")[0]
        if pid.isdigit() and not _alive(int(pid)):
            if left.name.endswith(".old") and not path.exists():
                left.rename(path)  # the export was killed between its two renames: restore the old bundle
            else:
                shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # signal 0 is Ctrl-C on Windows: treat every process as alive
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
