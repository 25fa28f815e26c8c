"""Read, validate and write manifest.json, the description of a bundle for apps, reports and later versions."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from evm_deploy._util.files import require_regular
from evm_deploy._util.packages import upgrade_hint
from evm_deploy._util.schema import InvalidError, Schema, lenient_json, published, strict_json
from evm_deploy._util.text import command, size_text
from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.runtimes.base import Batch
from evm_deploy.tasks.task import Colour

SCHEMA_VERSION = 1
FILE = "manifest.json"
MAX_BYTES = 4 << 20
SCHEMA = Schema(lambda: published("evm_deploy.bundle", "manifest.schema.json"))


#: Names that leave the bundle, or are a device, another file or no name on Windows. The schema has the same pattern.
LEAVES = re.compile(
    r"""^$|^/|[\x00-\x1f<>:"|?*\\]|(^|/)(?!\.(/|$))[^/]*[. ](/|$)"""
    r"|(^|/)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\.[^/]*)?(/|$)",
    re.IGNORECASE | re.ASCII,
)


def portable(name: str) -> str:
    """Return the name of a file or folder with `_` for every character that FAT, NTFS or SMB does not take."""
    return re.sub(r'[\x00-\x1f<>:"|?*\\]', "_", name)


def nearest(path: Path) -> str:
    """Return the hint for a `path` that is no bundle: the bundle that the path is inside, or the bundles inside it."""
    with contextlib.suppress(OSError):
        for parent in list(path.absolute().parents)[:4]:
            if (parent / FILE).is_file():
                return f"give the folder of the bundle:  {command(parent)}"
        found = [command(each.parent) for each in islice(sorted(path.glob(f"*/{FILE}")), 4)] if path.is_dir() else []
        if found:
            return "give one of the bundles inside:  " + "  ".join(found[:3]) + " .." * (len(found) > 3)
    return "make one with evm-export"


def inside_bundle(name: str) -> bool:
    """Test whether a file name from a manifest or a zip is a file inside the bundle on every operating system."""
    return not LEAVES.search(name)


@dataclass(frozen=True)
class Decision:
    """Value that `auto` was resolved to, with the reason."""

    value: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json. docs/bundle.md describes the fields.

    files: path inside the bundle -> {sha256, size_bytes}.
    """

    name: str
    target: str
    artifact: str
    plan: dict[str, Any]
    model: dict[str, Any]
    preprocessing: dict[str, Any]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    scan: dict[str, Any]
    details: dict[str, Any]
    versions: dict[str, str]
    parity: dict[str, Any]
    accuracy: dict[str, Any] | None = None
    selftest: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    built: bool = True
    rejected: bool = False
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the manifest as JSON text with sorted keys."""
        return strict_json(asdict(self), indent=1, sort_keys=True) + "\n"

    @property
    def plugins(self) -> dict[str, str]:
        """Native libraries in the bundle: platform -> path inside the bundle."""
        return dict(self.scan.get("plugins", {}))

    @property
    def batch(self) -> Batch:
        """Images per inference."""
        return Batch.parse(self.plan["batch"])

    @property
    def precision(self) -> str:
        """Precision of the artifact, such as fp32 or int8."""
        return str(self.plan["precision"])

    @property
    def head(self) -> str:
        """The kind of outputs: logits, probs, features or raw."""
        return str(self.plan["head"])

    @property
    def task(self) -> str:
        """Name of the bundle's task. Older bundles do not name a task: it follows from their head."""
        return str(self.model.get("task") or ("features" if self.head == "features" else "classification"))

    @property
    def selection(self) -> SelectionSettings:
        """Selection of a detector's bundle; the defaults for other bundles."""
        given = {each.name: self.plan.get(each.name) for each in fields(SelectionSettings)}
        return SelectionSettings(**{name: value for name, value in given.items() if value is not None})

    @property
    def palette(self) -> tuple[Colour, ...] | None:
        """Colour of each class of a segmenter as red, green and blue, 0..255; None if the training run names none."""
        found = (self.model.get("details") or {}).get("palette")
        return tuple((red, green, blue) for red, green, blue in found) if found else None

    @property
    def input(self) -> str:
        """The kind of input: `image`, uint8 NHWC, or `tensor`, float32 NCHW."""
        return str(self.plan["input"])

    @property
    def sizes(self) -> str:
        """Input sizes (HxW): `224x224`, or `192x192+224x224` for an artifact with several sizes."""
        return "+".join(size_text(size) for size in (self.plan["imgsz"], *self.plan.get("more_imgsz", ())))

    def limit(self, what: str, name: str = "", otherwise: float | None = None) -> float:
        """Return the error limit of one check of the self-test.

        what: `preprocessing`, `outputs` or `scans`. name: the output or scan. otherwise: limit if the manifest has
        none. Older bundles store no limits: their limit is 1 (of 255) for pixels, and the parity limit for outputs.
        """
        found = self.selftest.get(what)
        value = found.get(name) if isinstance(found, dict) else found
        if value is None:
            value = otherwise if otherwise is not None else 1.0 if what == "preprocessing" else self.parity["limit"]
        return float(value)

    def preprocess(self) -> Preprocessing:
        """Return the preprocessing of the bundle. Raises ValueError for invalid values."""
        known = {each.name for each in fields(Preprocessing)}
        values: dict[str, Any] = {key: _frozen(v) for key, v in self.preprocessing.items() if key in known}
        return Preprocessing(**values)

    @classmethod
    def read(cls, bundle: Path, check: Callable[[bytes], None] | None = None) -> Manifest:
        """Read and validate manifest.json of the folder `bundle`. Raises BundleError.

        check: called with the raw bytes before they are parsed; used to verify the signature.
        """
        path = bundle / FILE
        try:
            require_regular(path)
            if path.stat().st_size > MAX_BYTES:
                raise BundleError(f"{path} is larger than {MAX_BYTES} bytes: not a manifest", code="manifest.damaged")
            data = path.read_bytes()
            if check:
                check(data)
            content = lenient_json(data)
        except FileNotFoundError as error:
            message = f"{bundle} is not a bundle: no {FILE} inside"
            raise BundleError(message, nearest(bundle), code="manifest.missing") from error
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}", code="manifest.missing") from error
        except (ValueError, RecursionError) as error:
            message = f"{path} is damaged: {error}"
            raise BundleError(message, "export the bundle again", code="manifest.damaged") from error
        if not isinstance(content, dict):
            raise BundleError(f"{path} is not a JSON object", code="manifest.damaged")
        version = content.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise BundleError(f"{path} has no schema_version", code="manifest.invalid", where="schema_version")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{bundle} has manifest schema {version}; this evm-deploy reads schemas up to {SCHEMA_VERSION}",
                upgrade_hint(),
                code="manifest.version",
                where="schema_version",
            )
        return cls._from(path, content)

    @classmethod
    def _from(cls, path: Path, content: dict[str, Any]) -> Manifest:
        try:
            SCHEMA(content)
            manifest = cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})
            _check_channels(manifest)
            manifest.preprocess()
            _check_batch(manifest)
            _check_files(manifest)
        except Exception as error:  # untrusted file: every error means an invalid manifest
            message, where = f"{path} is not a valid manifest: {error}", getattr(error, "where", "")
            raise BundleError(message, "export the bundle again", code="manifest.invalid", where=where) from error
        return manifest


def _frozen(value: Any) -> Any:
    """Convert JSON lists to tuples, recursively."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _check_channels(manifest: Manifest) -> None:
    mean, std = (len(manifest.preprocessing[key]) for key in ("mean", "std"))
    if mean != std:
        raise InvalidError("preprocessing.std", f"has {std} values, mean has {mean}")


def _check_batch(manifest: Manifest) -> None:
    try:
        Batch.parse(manifest.plan["batch"])
    except UsageError as error:
        raise InvalidError("plan.batch", f"is not a batch: {error}") from error


def _check_files(manifest: Manifest) -> None:
    if not any(PurePosixPath(name).is_relative_to(manifest.artifact) for name in manifest.files):
        raise InvalidError("artifact", f"{manifest.artifact!r} is not among the files")
    for platform, library in manifest.plugins.items():
        if library not in manifest.files:
            raise InvalidError(f"scan.plugins.{platform}", f"{library!r} is not among the files")
