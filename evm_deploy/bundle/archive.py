"""Zip files of bundles. Writing is deterministic; reading treats the zip as untrusted."""

from __future__ import annotations

import lzma
import shutil
import stat
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

from evm_deploy._util.files import real_path, sha256, temporary_sibling
from evm_deploy.bundle.manifest import FILE, inside_bundle
from evm_deploy.errors import BundleError

SUFFIX = ".zip"
MAX_FILES = 10_000
MAX_BYTES = 4 << 30  # unpacked size of all files
MAX_RATIO = 200  # largest unpacked / packed size of a file: zeros reach 1000, weights 1.1
SMALL = 1 << 20  # bytes: a file up to this unpacked size is accepted at any ratio
EPOCH = (1980, 1, 1, 0, 0, 0)  # earliest time of the zip format, fixed so that equal bundles give equal zip files


def zip_path(bundle: Path) -> Path:
    """Return the path of a bundle's zip: `<bundle>.zip` next to the bundle."""
    return bundle.with_name(bundle.name + SUFFIX)


def check_free(path: Path, force: bool) -> None:
    """Raise BundleError if the zip `path` exists without `force`, or is not a zip of the bundle of its name."""
    if not path.exists():
        return
    if not force:
        raise BundleError(f"{path} exists", "add --force to replace it, or choose another --out")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        names = []
    if f"{path.stem}/{FILE}" not in names or not all(name.startswith(f"{path.stem}/") for name in names):
        message = f"{path} exists and is not the zip of a bundle: --force does not replace it"
        raise BundleError(message, "move it, or choose another --out")


def write_zip(bundle: Path, force: bool = False) -> Path:
    """Write `<bundle>.zip` next to the bundle, with all files below one folder of the bundle's name.

    Symbolic links are left out: what is behind them is not the bundle's. force: replace the zip of an earlier bundle.
    Returns the path of the zip. Raises BundleError.
    """
    path = zip_path(bundle)
    try:
        with temporary_sibling(real_path(path)) as folder:
            file = Path(folder) / path.name
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for source in sorted(bundle.rglob("*")):
                    if source.is_file() and not source.is_symlink():
                        entry = zipfile.ZipInfo(f"{bundle.name}/{source.relative_to(bundle).as_posix()}", EPOCH)
                        entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
                        with source.open("rb") as reader, archive.open(entry, "w", force_zip64=True) as writer:
                            shutil.copyfileobj(reader, writer, 1 << 20)
            if not (path.is_file() and sha256(path) == sha256(file)):
                check_free(path, force)
                file.replace(real_path(path))
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror or error}", "choose another --out") from error
    return path


def unpack(path: Path, into: Path) -> Path:
    """Unpack the zip `path` below the folder `into`. Returns the folder of the bundle. Raises BundleError.

    Nothing is written outside `into`, and at most MAX_BYTES in total. Refused are names that leave `into`, links,
    devices, encrypted entries, duplicate names (ignoring case) and zip bombs. The sizes in the zip are not trusted:
    limits also apply to the bytes that are really unpacked.
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
            f"{path} is damaged or not a zip file: {error}", "copy the file again", code="zip.damaged"
        ) from error
    except (OSError, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        raise BundleError(f"{path} cannot be unpacked: {error}", code="zip.damaged") from error
    return _bundle_in(path, into)


def unpacked(path: Path) -> tuple[Path, TemporaryDirectory[str]]:
    """Unpack a zip into a temporary folder. Returns the folder of the bundle, and the owner of the temporary folder.

    The temporary folder is deleted when the owner is closed or garbage collected. Raises BundleError.
    """
    folder: TemporaryDirectory[str] = TemporaryDirectory(prefix="evm-bundle-", ignore_cleanup_errors=True)
    return unpack(path, Path(folder.name)), folder


def _check(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MAX_FILES:
        raise _refused(f"{path} has {len(entries)} files; a bundle has at most {MAX_FILES}")
    seen: set[str] = set()
    for entry in entries:
        name, mode = entry.filename, entry.external_attr >> 16
        if not inside_bundle(name):
            raise _refused(f"{path}: the name {name!r} leaves the bundle", name)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise _refused(f"{path}: {name} is a link or a device; only regular files are allowed", name)
        if entry.flag_bits & 1:
            raise _refused(f"{path}: {name} is encrypted", name)
        if name.casefold() in seen:
            raise _refused(f"{path}: {name} occurs twice", name)
        seen.add(name.casefold())
    if sum(entry.file_size for entry in entries) > MAX_BYTES:
        raise _refused(f"{path} unpacks to more than {MAX_BYTES >> 30} GB")


def _unpack(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, into: Path, limit: int) -> int:
    """Write one entry to a file. Returns the unpacked size in bytes. Raises BundleError beyond `limit` bytes."""
    target = into / entry.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    size, most = 0, max(SMALL, min(limit, MAX_RATIO * entry.compress_size))
    with archive.open(entry) as reader, target.open("xb") as writer:
        while block := reader.read(1 << 20):
            size += len(block)
            if size > most:
                name = entry.filename
                raise _refused(f"{path}: {name} unpacks to over {MAX_RATIO} times its size: possible zip bomb", name)
            writer.write(block)
    return size


def _bundle_in(path: Path, into: Path) -> Path:
    """Return the folder that holds the manifest: the root of the zip, or its only folder. Raises BundleError."""
    for folder in (into, *sorted(into.iterdir())[:1]):
        if (folder / FILE).is_file():
            return folder
    message = f"{path} is not a bundle: no {FILE} inside"
    raise BundleError(message, "make one with evm-export --zip", code="manifest.missing")


def _refused(message: str, name: str = "") -> BundleError:
    return BundleError(message, code="zip.refused", where=name)
