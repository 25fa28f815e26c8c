"""Record of one measurement of one bundle on one device, stored as JSON; docs/latency.md explains the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from evm_deploy._util.files import write_output
from evm_deploy._util.packages import upgrade_hint
from evm_deploy._util.schema import Schema, lenient_json, published, strict_json
from evm_deploy._util.settings import Flag, all_fields, changed, flag_of
from evm_deploy.bench.latency import Latency
from evm_deploy.errors import UsageError
from evm_deploy.runtimes.registry import setting_kinds

SCHEMA_VERSION = 1
MAX_BYTES = 64 << 20
OPTIONAL = {"stages_ms"}  # keys that records of the first versions do not have
SCHEMA = Schema(lambda: published("evm_deploy.bench", "record.schema.json"))


@dataclass(frozen=True)
class Settings:
    """Settings of one measurement.

    threads: intra-op threads; None: chosen by the runtime. batch: images per inference; None: the bundle's smallest.
    streams: concurrent inferences, each in its own thread. timed: `model` (from arrays to arrays on the host) or
    `end-to-end` (from an image file to its five best classes). For a checkpoint measured in torch, imgsz: input size,
    None: the size saved with the weights; weights, drop: as in ExportPlan, drop as text with commas.
    limit_s: seconds after which an unstable measurement ends.
    own: the given settings of the runtimes, as pairs of name and value that `load` accepts.
    """

    threads: int | None = None
    batch: int | None = None
    scan: str = "auto"
    streams: int = 1
    timed: str = "model"
    imgsz: str | None = None
    limit_s: float = 60.0
    weights: str | None = None
    drop: str | None = None
    own: tuple[tuple[str, Any], ...] = ()

    def with_own(self, **values: Any) -> Settings:
        """Return a copy with these settings of the runtimes added or replaced."""
        return replace(self, own=tuple(sorted({**dict(self.own), **values}.items())))

    def flags(self) -> dict[str, Flag]:
        """Return the flags of those runtime settings that differ from their default, by name."""
        return {name: flag_of(_own_fields()[name]) for name, value in self.own if value != _own_fields()[name].default}

    def as_dict(self) -> dict[str, Any]:
        """Return plain data without nesting; runtime settings that are not given have their default value."""
        values = asdict(self)
        del values["own"]
        return {**values, **{name: each.default for name, each in _own_fields().items()}, **dict(self.own)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings that `as_dict` turned into `values`."""
        known = {each.name for each in fields(cls)}
        own = changed({key: value for key, value in values.items() if key not in known}, setting_kinds())
        return cls(**{key: value for key, value in values.items() if key in known}).with_own(**own)

    def __str__(self) -> str:
        streams = f", streams {self.streams}" if self.streams > 1 else ""
        return f"threads {self.threads or 'auto'}, batch {self.batch or 'auto'}{streams}"


def _own_fields() -> dict[str, Field[Any]]:
    """Return the fields of the settings of every runtime, by name."""
    return all_fields(setting_kinds())


@dataclass(frozen=True)
class Record:
    """Result of one measurement. Times are in ms, memory in MB (2**20 bytes), throughput in images per second.

    bundle: name, model, target, precision, calibration, imgsz, sha256 of the manifest, artifact_bytes, and the
    manifest's accuracy.
    device: facts of the device; `profile`: the device profile used; `at`: user@host of another machine, else None.
    load_ms: `fresh` in a new process, including the runtime's import and the hashes; `again` in the same process.
    interval_ms: 95 % confidence interval of the median.
    device_ms: `inputs`, `compute` and `outputs` of a run, if the runtime measures these parts.
    stages_ms: `preprocess`, `inference` and `postprocess` of one image in `predict`, medians; empty without answers.
    layers: times by module from `bench.layers`; empty if the runtime has no profiler.
    energy_mj: energy of one inference, by sensor. memory_mb: `before` loading, and `peak`.
    before, after: state of the device before and after the measurement.
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
    stages_ms: dict[str, float] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def latency(self) -> Latency:
        """Statistics of the samples."""
        return Latency(tuple(self.samples_ms), self.warm_up, self.stable)

    def write(self, path: Path) -> None:
        """Write the record as JSON to `path`, atomically. Raises UsageError if the file cannot be written."""
        try:
            write_output(path, strict_json(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}", "choose another --out") from error

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read the record in the file `path`. Raises UsageError that names the file if it holds no valid record."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UsageError(f"{path} is not a record: larger than {MAX_BYTES >> 20} MB")
            content = lenient_json(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            reason = "it is empty" if isinstance(error, ValueError) and not path.stat().st_size else error
            raise UsageError(f"record {path} cannot be read: {reason}", "evm-bench BUNDLE writes records") from error
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: Any, source: str) -> Record:
        """Make a Record of decoded JSON, after checking keys, types and numbers. Raises UsageError naming `source`."""
        version = content.get("schema_version") if isinstance(content, dict) else None
        if type(version) is not int:
            raise UsageError(f"{source} is not a record of evm-bench", "evm-bench BUNDLE writes records")
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{source} is a record of schema {version}; this evm-deploy reads schema {SCHEMA_VERSION}",
                upgrade_hint() if version > SCHEMA_VERSION else "measure again with evm-bench",
            )
        names = {each.name for each in fields(cls)}
        if set(content) | OPTIONAL != names:
            differing = ", ".join(sorted(names ^ (set(content) | OPTIONAL)))
            raise UsageError(
                f"{source} is a damaged record: missing or unknown fields: {differing:.200}",
                "measure again with evm-bench",
            )
        try:
            SCHEMA(content)
        except (ValueError, RecursionError) as error:
            message, where = f"{source} is a damaged record: {error}", getattr(error, "where", "")
            raise UsageError(message, "measure again with evm-bench", code="record.invalid", where=where) from error
        return cls(**content)
