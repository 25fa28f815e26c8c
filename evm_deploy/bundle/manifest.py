"""manifest.json: the facts that an app, a report or a later version of this package needs about a bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from evm_deploy._util.checks import (
    anything,
    count,
    either,
    keys,
    listing,
    mapping,
    nullable,
    number,
    one_of,
    size,
    text,
    yes_or_no,
)
from evm_deploy._util.text import size_text
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import BundleError
from evm_deploy.runtimes.base import Batch

SCHEMA_VERSION = 1
FILE = "manifest.json"
MAX_BYTES = 4 << 20
TASKS = ("classification", "features", "raw")
ACCURACY = keys(
    images=size,
    **dict.fromkeys(
        ("sqnr_db", "agreement", "top1", "top1_float", "top5", "top5_float", "limit", "drop"), nullable(number)
    ),
    ok=nullable(yes_or_no),
)
TENSOR = keys(name=text, dtype=text, shape=listing(nullable(count), at_least=1))
SCHEMA = keys(
    **dict.fromkeys(("name", "target", "artifact"), text),
    plan=keys(
        **dict.fromkeys(("precision", "batch", "scan"), text),
        imgsz=listing(count, length=2),
        more_imgsz=nullable(listing(listing(count, length=2))),
        tol=nullable(number),
        labels=nullable(listing(text)),
        chosen=nullable(keys(value=text, reason=text)),
        settings=nullable(mapping(anything)),
        engine=nullable(mapping(anything)),  # the same in bundles of before, of TensorRT alone
        input=one_of("image", "tensor"),
        head=one_of("logits", "probs", "features", "raw"),
    ),
    model=keys(name=text, task=nullable(one_of(*TASKS)), checkpoint=keys(sha256=text), parameters=count),
    preprocessing=keys(size=listing(count, length=2)),
    inputs=listing(TENSOR, at_least=1),
    outputs=listing(TENSOR, at_least=1),
    scan=keys(value=text, reason=text, plugins=nullable(mapping(text))),
    details=mapping(anything),
    versions=mapping(text),
    parity=keys(failures=listing(text), limit=size),
    accuracy=nullable(ACCURACY),
    selftest=either({}, keys(preprocessing=size, outputs=mapping(size), scans=mapping(size))),
    notes=listing(text),
    files=mapping(keys(sha256=text, size_bytes=size)),
    **dict.fromkeys(("built", "rejected"), yes_or_no),
)


@dataclass(frozen=True)
class Choice:
    """What `auto` decided, and why."""

    value: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Schema in docs/bundle.md. `files`: path inside the bundle -> {sha256, size_bytes}."""

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
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @property
    def plugins(self) -> dict[str, str]:
        """Platform -> the native library inside the bundle."""
        return dict(self.scan.get("plugins", {}))

    @property
    def batch(self) -> Batch:
        return Batch.parse(self.plan["batch"])

    @property
    def precision(self) -> str:
        return str(self.plan["precision"])

    @property
    def head(self) -> str:
        """What the outputs are: logits, probs or features."""
        return str(self.plan["head"])

    @property
    def task(self) -> str:
        """What the outputs mean: the name of a Task. Bundles from before tasks were named say it by their head."""
        return str(self.model.get("task") or ("features" if self.head == "features" else "classification"))

    @property
    def input(self) -> str:
        """What goes in: `image`, uint8 NHWC, or `tensor`, float32 NCHW."""
        return str(self.plan["input"])

    @property
    def sizes(self) -> str:
        """`224x224`, or `192x192+224x224` of an artifact for several sizes."""
        return "+".join(size_text(size) for size in (self.plan["imgsz"], *self.plan.get("more_imgsz", ())))

    def limit(self, what: str, name: str = "", otherwise: float | None = None) -> float:
        """The limit of one check of the self-test: `preprocessing`, or of `outputs` or `scans` that of `name`.

        Bundles from before limits were data: 1 of 255 for pixels, the limit of the parity for outputs.
        """
        found = self.selftest.get(what)
        value = found.get(name) if isinstance(found, dict) else found
        if value is None:
            value = otherwise if otherwise is not None else 1.0 if what == "preprocessing" else self.parity["limit"]
        return float(value)

    def preprocess(self) -> Preprocessing:
        values: dict[str, Any] = {key: _frozen(v) for key, v in self.preprocessing.items()}
        return Preprocessing(**values)

    @classmethod
    def read(cls, bundle: Path, check: Callable[[bytes], None] | None = None) -> Manifest:
        """Read and validate `bundle/manifest.json`; `check` sees its bytes first. Raises BundleError."""
        path = bundle / FILE
        try:
            if path.stat().st_size > MAX_BYTES:
                raise BundleError(f"{path} is larger than {MAX_BYTES} bytes: not a manifest")
            data = path.read_bytes()
            if check:
                check(data)
            content = json.loads(data)
        except FileNotFoundError as error:
            raise BundleError(f"{bundle} is not a bundle: it has no {FILE}", "make one with evm-export") from error
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is damaged: {error}", "export the bundle again") from error
        if not isinstance(content, dict):
            raise BundleError(f"{path} is not a JSON object")
        version = content.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise BundleError(f"{path} has no schema_version")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{bundle} has manifest schema {version}, this evm-deploy reads up to {SCHEMA_VERSION}",
                "upgrade: pip install -U evm-deploy",
            )
        return cls._from(path, content)

    @classmethod
    def _from(cls, path: Path, content: dict[str, Any]) -> Manifest:
        known = {f.name for f in fields(cls)}
        try:
            manifest = cls(**{key: value for key, value in content.items() if key in known})
            manifest.preprocess()
            for name, facts in manifest.files.items():
                _check_file_entry(name, facts)
            if not any(PurePosixPath(name).is_relative_to(manifest.artifact) for name in manifest.files):
                raise ValueError(f"the artifact {manifest.artifact!r} is not among the files")
            for library in manifest.plugins.values():
                if library not in manifest.files:
                    raise ValueError(f"the native library {library!r} is not among the files")
            SCHEMA(asdict(manifest), "")
            Batch.parse(manifest.plan["batch"])
        except BundleError:
            raise
        except Exception as error:  # an untrusted file: whatever is wrong in it, it is the manifest's fault
            raise BundleError(f"{path} is not a valid manifest: {error}", "export the bundle again") from error
        return manifest


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples they were written from."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def inside_bundle(name: str) -> bool:
    """Whether a file's name, in a manifest or a zip, stays inside the bundle on every system."""
    parts = PurePosixPath(name)
    leaves = parts.is_absolute() or ".." in parts.parts or any(each in name for each in ("\\", ":", "\0"))
    return bool(name) and not leaves


def _check_file_entry(name: str, facts: dict[str, Any]) -> None:
    if not inside_bundle(name):
        raise ValueError(f"file name {name!r} leaves the bundle")
    if not re.fullmatch(r"[0-9a-f]{64}", str(facts["sha256"])):
        raise ValueError(f"{name} has no sha256")
