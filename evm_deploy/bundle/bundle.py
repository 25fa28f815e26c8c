"""Bundles on disk: atomic writing, and checks of every file when a bundle is opened."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from evm_deploy._util.files import artifact_bytes, lock_folder, make_readable, move, real_path, require_regular, sha256
from evm_deploy.bundle import archive, signing
from evm_deploy.bundle.manifest import FILE, MAX_BYTES, Manifest, nearest
from evm_deploy.errors import BundleError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # files that systems leave in every folder they show
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
        refuse_part_of_a_bundle(path)
        what = "is a file, not a bundle folder" if path.exists() else "does not exist"
        raise BundleError(f"bundle {path} {what}", nearest(path), code="bundle.missing")
    manifest = Manifest.read(path, partial(signing.check, signed_by, path) if signed_by else None)
    if manifest.rejected:
        message = f"bundle {path} was rejected at export: {'; '.join(manifest.parity['failures'])}"
        raise BundleError(message, code="bundle.rejected")
    for name, facts in manifest.files.items():
        file = path / name
        try:
            require_regular(file)
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


def check_free(path: Path, force: bool, zipped: bool = False) -> None:
    """Check before an export that its bundle, and with `zipped` its zip, can be written to `path`.

    Raises BundleError if `path` exists without `force`, is not a bundle, or cannot be accessed.
    """
    try:
        path.exists()
    except OSError as error:
        raise BundleError(f"cannot write to {path.parent}: {error.strerror}", "choose another --out") from error
    if path.exists() and not force:
        raise BundleError(f"{path} exists", "add --force to replace it, or choose another --out")
    if path.exists():
        _require_ours(path, path)
    if zipped:
        archive.check_free(archive.zip_path(path), force)


def refuse_part_of_a_bundle(path: Path) -> None:
    """Raise BundleError if `path` is a file of a bundle, such as its manifest or model, given for the whole bundle."""
    try:
        listed = {FILE, *Manifest.read(path.parent).files} if path.is_file() else set()
    except (BundleError, OSError):
        return
    if path.name in listed:
        message = f"{path} is a file of a bundle, not the bundle"
        raise BundleError(message, nearest(path), code="bundle.missing")


@contextlib.contextmanager
def temporary_bundle(path: Path) -> Iterator[Path]:
    """Context manager: a temporary folder next to `path`, deleted on exit unless `publish` has renamed it.

    Makes the folders above `path` that do not exist, and deletes those that stay empty. First removes the temporary
    folders of killed exports to the same path. The folder is locked, so that exports of other processes and containers
    do not take it for such a folder. Raises BundleError if writing fails.
    """
    path = real_path(path)
    made = [parent for parent in path.parents if not os.access(parent, os.F_OK)]
    try:
        with _locked_folder(path) as folder:
            yield folder
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    prefix = f".{path.name}.{_machine()}."
    try:
        while True:
            unfinished = _temporary_folder(path, prefix)
            lock = lock_folder(Path(unfinished.name), wait=True)
            if Path(unfinished.name).is_dir():  # else another export has swept it before it was locked
                break
    except OSError as error:
        raise BundleError(f"cannot write to {path.parent}: {error.strerror}", "choose another --out") from error
    with unfinished as name:
        folder = Path(name)
        make_readable(folder)
        try:
            yield folder
        except OSError as error:
            raise _not_written(error, path) from error
        finally:
            if lock is not None:
                os.close(lock)


def _not_written(error: OSError, path: Path) -> BundleError:
    """Return the error for an OSError while the bundle `path` was made. Only files below its folder are the bundle's.

    A full disk has no file name.
    """
    reason = error.strerror or str(error)
    if error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(path.parent):
        return BundleError(f"cannot write the bundle to {path.parent}: {reason}", "choose another --out")
    return BundleError(f"{os.fsdecode(error.filename)}: {reason}", f"no bundle was written to {path.parent}")


def commit(
    folder: Path, path: Path, manifest: Manifest, *, force: bool = False, key: Ed25519PrivateKey | None = None
) -> Bundle:
    """Write the manifest into `folder`, sign it, and rename the folder to `path`: `seal`, then `publish`."""
    seal(folder, manifest)
    return publish(folder, path, force=force, key=key)


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with the hash of every file into `folder`."""
    for file in folder.rglob("*"):
        make_readable(file)  # safetensors writes 0600
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256(file), "size_bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / FILE).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


def publish(folder: Path, path: Path, *, force: bool = False, key: Ed25519PrivateKey | None = None) -> Bundle:
    """Sign the sealed bundle in `folder` with `key`, if given, then rename the folder to `path`. Returns the bundle.

    force: replace a bundle that exists at `path`; a rejected one only replaces a rejected one. If `path` is a symbolic
    link, the folder behind it is replaced, not the link. Raises BundleError if `path` exists without `force`, or holds
    something that no export wrote: it may have been made since `check_free`.
    """
    if key:
        signing.sign(folder, key)
    manifest = Manifest.read(folder)
    _place(folder, real_path(path), force, manifest.rejected)
    return Bundle(path, manifest)


def _place(folder: Path, path: Path, force: bool, rejected: bool) -> None:
    """Rename `folder` to `path`. The old bundle stays at `path` if the rename fails or the process exits meanwhile."""
    old = folder.with_name(folder.name + ".old")

    def restore() -> None:
        if old.exists() and not path.exists():
            move(old, path)

    atexit.register(restore)
    try:
        if path.exists():
            if not force:
                raise BundleError(f"{path} was made during the export", "add --force to replace it")
            move(path, old)
            _require_ours(old, path, rejected)  # nobody else writes to it under this name
        move(folder, path)
    finally:
        restore()
        atexit.unregister(restore)
    shutil.rmtree(old, ignore_errors=True)


def _require_ours(folder: Path, path: Path, rejected: bool = False) -> None:
    """Raise BundleError about `path` unless all that is in `folder` was written by an export.

    rejected: the bundle that is to replace it was rejected, and may replace only a rejected one.
    """
    try:
        with (folder / FILE).open("rb") as file:
            content = json.loads(file.read(MAX_BYTES))
        listed = {*content["files"], FILE, signing.SIGNATURE}
        good = "schema_version" in content and (content.get("rejected") or not rejected)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        what = "rejected bundle" if rejected else "bundle"
        message = f"{path} exists and is not a {what}: --force does not replace it"
        raise BundleError(message, "move it, or choose another --out")
    for each in sorted(folder.rglob("*")):
        name = each.relative_to(folder).as_posix()
        if name not in listed and not each.is_dir() and not each.name.startswith("._") and each.name not in LITTER:
            message = f"{path} holds {name}, which is not part of the bundle: --force does not replace it"
            raise BundleError(message, "move the file, or choose another --out")


def _temporary_folder(path: Path, prefix: str, attempts: int = 9) -> TemporaryDirectory[str]:
    """Make a temporary folder next to `path`. Raises OSError.

    attempts: how often more, if another export deletes the folder of `path` meanwhile because it is empty.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path, prefix)
        return TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True)
    except FileNotFoundError:
        if not attempts:
            raise
        return _temporary_folder(path, prefix, attempts - 1)


def _sweep(path: Path, prefix: str) -> None:
    """Clean up after killed exports to `path`: delete their temporary folders, and restore an old bundle.

    prefix: of the folders that were made on this machine. Locks of other machines may be invisible here, so their
    folders stay.
    """
    for left in sorted(each for each in path.parent.iterdir() if each.name.startswith(prefix)):
        if left.name.endswith(".old"):
            if left.with_name(left.name.removesuffix(".old")).exists():
                continue  # its export is alive
            if path.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(path)  # the export was killed between its two renames: restore the old bundle
        elif (lock := lock_folder(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _machine() -> str:
    """Return a name of the running system, the same in all its containers. A new one each time if none is known."""
    try:
        name = BOOT_ID.read_text(encoding="ascii")
    except (OSError, ValueError):
        name = f"{platform.node()} {uuid.getnode()}" if sys.platform == "darwin" else uuid.uuid4().hex
    return hashlib.sha256(name.encode()).hexdigest()[:12]
