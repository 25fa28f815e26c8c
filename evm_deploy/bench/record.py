"""Record: one measurement of one bundle on one device, as JSON; schema in docs/latency.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from evm_deploy._util.files import write_atomically
from evm_deploy._util.schema import Schema, published
from evm_deploy._util.settings import Flag, all_fields, changed, flag_of
from evm_deploy.bench.latency import Latency
from evm_deploy.errors import UsageError
from evm_deploy.runtimes.registry import setting_kinds

SCHEMA_VERSION = 1
MAX_BYTES = 64 << 20
SCHEMA = Schema(lambda: published("evm_deploy.bench", "record.schema.json"))


@dataclass(frozen=True)
class Settings:
    """What is measured. threads: None as the runtime chooses. batch: None as the bundle's smallest.

    streams: inferences at the same time, each in a thread. timed: `model`, arrays in and out on the host, or
    `end-to-end`, an image file to its five best classes. imgsz: of a checkpoint, which is measured in torch; None as
    saved with it. limit_s: seconds after which an unstable measurement ends. own: settings of runtimes that were given,
    name and value, as `load` takes them.
    """

    threads: int | None = None
    batch: int | None = None
    scan: str = "auto"
    streams: int = 1
    timed: str = "model"
    imgsz: str | None = None
    limit_s: float = 60.0
    own: tuple[tuple[str, Any], ...] = ()

    def with_own(self, **values: Any) -> Settings:
        """The same with these settings of runtimes, beside those that it has."""
        return replace(self, own=tuple(sorted({**dict(self.own), **values}.items())))

    def flags(self) -> dict[str, Flag]:
        """The flags of the runtimes' settings that were given, by name."""
        return {name: flag_of(_own_fields()[name]) for name, value in self.own if value != _own_fields()[name].default}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, flat: the settings of every runtime among the others, where they are not given by default."""
        values = asdict(self)
        del values["own"]
        return {**values, **{name: each.default for name, each in _own_fields().items()}, **dict(self.own)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """The settings that `as_dict` made these of."""
        known = {each.name for each in fields(cls)}
        own = changed({key: value for key, value in values.items() if key not in known}, setting_kinds())
        return cls(**{key: value for key, value in values.items() if key in known}).with_own(**own)

    def __str__(self) -> str:
        streams = f", streams {self.streams}" if self.streams > 1 else ""
        return f"threads {self.threads or 'auto'}, batch {self.batch or 'auto'}{streams}"


def _own_fields() -> dict[str, Field[Any]]:
    return all_fields(setting_kinds())


@dataclass(frozen=True)
class Record:
    """One measurement. Times in milliseconds, memory in MB (2**20 bytes), throughput in images a second.

    bundle: name, model, target, precision, imgsz, sha256 of its manifest, artifact_bytes, and the accuracy that its
    manifest states. device: its facts; `profile`, the device profile used, and `at`, user@host, if it is not this
    machine. load_ms: `fresh`, in a new process, the runtime's import and the hashes included, and `again`, in the same
    process. interval_ms: 95 % confidence of the median. device_ms: parts of a run, where the runtime counts them:
    `inputs`, `compute`, `outputs`. layers: what `bench.layers` found, times by module, empty where the
    runtime has no profiler. energy_mj: of one inference, by sensor. memory_mb: `before` loading, and `peak`. before,
    after: state of the device.
    """

    bundle: dict[str, Any]
    device: dict[str, Any]
    runtime: dict[str, Any]
    settings: dict[str, Any]
    date: str
    load_ms: dict[str, float]
    first_ms: float
    warm_up: int
    stable: bool
    samples_ms: list[float]
    summary_ms: dict[str, float]
    interval_ms: tuple[float, float]
    device_ms: dict[str, float]
    layers: dict[str, Any]
    energy_mj: dict[str, float]
    throughput: float
    memory_mb: dict[str, float]
    before: dict[str, Any]
    after: dict[str, Any]
    warnings: list[str]
    schema_version: int = SCHEMA_VERSION

    @property
    def latency(self) -> Latency:
        return Latency(tuple(self.samples_ms), self.warm_up, self.stable)

    def write(self, path: Path) -> None:
        """Raises UsageError when the disk will not have it."""
        try:
            write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}", "choose another --out") from error

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises UsageError, naming the file, for one that is no Record of this schema."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UsageError(f"{path} is no record: larger than {MAX_BYTES >> 20} MB")
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"record {path} cannot be read: {error}") from error
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: Any, source: str) -> Record:
        """A Record from what JSON gave; keys, types and numbers are checked. Raises UsageError, naming `source`."""
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(f"{source} is no record of schema {SCHEMA_VERSION}", "make one with evm-bench")
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            differing = ", ".join(sorted(names ^ set(content)))
            raise UsageError(f"{source} is no record: fields differ: {differing:.200}")
        try:
            SCHEMA(content)
        except (ValueError, RecursionError) as error:
            message, where = f"{source} is a damaged record: {error}", getattr(error, "where", "")
            raise UsageError(message, "measure again with evm-bench", code="record.invalid", where=where) from error
        return cls(**content)
