"""A bundle as one zip file, for shipping: written deterministically, opened as what it is, somebody else's file."""

from __future__ import annotations

import lzma
import shutil
import stat
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

from evm_deploy._util.files import temporary_sibling
from evm_deploy.bundle.manifest import FILE, inside_bundle
from evm_deploy.errors import BundleError

SUFFIX = ".zip"
MAX_FILES = 10_000
MAX_BYTES = 4 << 30  # unpacked
MAX_RATIO = 200  # of unpacked to packed, over which a file is a bomb; zeros reach 1000, weights 1.1
SMALL = 1 << 20  # bytes, up to which any ratio is harmless
EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first moment: the same bundle gives the same bytes


def write_zip(bundle: Path) -> Path:
    """`<bundle>.zip` beside a bundle, everything below one folder of its name. Raises BundleError."""
    path = bundle.with_name(bundle.name + SUFFIX)
    try:
        with temporary_sibling(path) as folder:
            file = Path(folder) / path.name
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for source in sorted(bundle.rglob("*")):
                    if source.is_file():
                        entry = zipfile.ZipInfo(f"{bundle.name}/{source.relative_to(bundle).as_posix()}", EPOCH)
                        entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
                        with source.open("rb") as reader, archive.open(entry, "w", force_zip64=True) as writer:
                            shutil.copyfileobj(reader, writer, 1 << 20)
            file.replace(path)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror or error}", "choose another --out") from error
    return path


def unpack(path: Path, into: Path) -> Path:
    """Unpack the zip `path` below the folder `into` -> the bundle's folder. Raises BundleError.

    Nothing is written outside `into`, and no more than MAX_BYTES: names that leave it, links, devices, encrypted and
    doubled entries (on file systems that take Manifest for manifest, too) and bombs are refused, before or while they
    are unpacked: what a zip says of its sizes is not believed.
    """
    try:
        into.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
            _check(path, entries)
            left = MAX_BYTES
            for entry in entries:
                left -= _unpack(path, archive, entry, into, left)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise BundleError(
            f"{path} is damaged, or no zip file: {error}", "copy it again, whole", code="zip.damaged"
        ) from error
    except (OSError, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        raise BundleError(f"{path} cannot be unpacked: {error}", code="zip.damaged") from error
    return _bundle_in(path, into)


def unpacked(path: Path) -> tuple[Path, TemporaryDirectory[str]]:
    """The bundle in a zip, unpacked into a temporary folder, which goes with the second of the results."""
    folder: TemporaryDirectory[str] = TemporaryDirectory(prefix="evm-bundle-", ignore_cleanup_errors=True)
    return unpack(path, Path(folder.name)), folder


def _check(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MAX_FILES:
        raise _refused(f"{path} holds {len(entries)} files, a bundle has at most {MAX_FILES}")
    seen: set[str] = set()
    for entry in entries:
        name, mode = entry.filename, entry.external_attr >> 16
        if not inside_bundle(name):
            raise _refused(f"{path}: the name {name!r} leaves the bundle", name)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise _refused(f"{path}: {name} is a link or a device, a bundle has files alone", name)
        if entry.flag_bits & 1:
            raise _refused(f"{path}: {name} is encrypted", name)
        if name.casefold() in seen:
            raise _refused(f"{path}: {name} is there twice", name)
        seen.add(name.casefold())
    if sum(entry.file_size for entry in entries) > MAX_BYTES:
        raise _refused(f"{path} unpacks to more than {MAX_BYTES >> 30} GB")


def _unpack(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, into: Path, limit: int) -> int:
    """Write one file -> its size."""
    target = into / entry.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    size, most = 0, max(SMALL, min(limit, MAX_RATIO * entry.compress_size))
    with archive.open(entry) as reader, target.open("xb") as writer:
        while block := reader.read(1 << 20):
            size += len(block)
            if size > most:
                name = entry.filename
                raise _refused(f"{path}: {name} unpacks to over {MAX_RATIO} times its size: a bomb", name)
            writer.write(block)
    return size


def _bundle_in(path: Path, into: Path) -> Path:
    """The folder with the manifest: the zip's root, or its only folder."""
    for folder in (into, *sorted(into.iterdir())[:1]):
        if (folder / FILE).is_file():
            return folder
    message = f"{path} holds no bundle: it has no {FILE}"
    raise BundleError(message, "make one with evm-export --zip", code="manifest.missing")


def _refused(message: str, name: str = "") -> BundleError:
    return BundleError(message, code="zip.refused", where=name)
