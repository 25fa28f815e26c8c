"""Units of a sweep: plain data with a key of their content. An export, a shard of an evaluation, or a measurement.

The same unit may run twice, on any worker: it writes the same files, each at once, and its done-file last.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from evm_deploy import __version__
from evm_deploy._util.text import count_text, shortened
from evm_deploy.bench.record import Settings
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.data.sources import ImageItem
from evm_deploy.errors import EvmError, ToolchainError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.sweep.engine import Place
from evm_deploy.sweep.float_network import FloatCheckpoint, source_of
from evm_deploy.sweep.folder import BUNDLES, OUTPUTS, RECORDS, ROWS, RunFolder
from evm_deploy.sweep.keys import digest, items_digest
from evm_deploy.sweep.locks import beside_others
from evm_deploy.sweep.packed import read_rows, write_rows
from evm_deploy.sweep.shards import LabelledItems, Shard, ShardRows, evaluated, labelled_for, require_same


class Unit(Protocol):
    """Unit of a sweep."""

    @property
    def kind(self) -> str:
        """Kind of work: export, evaluate or measure."""
        ...

    @property
    def key(self) -> str:
        """Digest of all that decides the result."""
        ...

    @property
    def title(self) -> str:
        """Text for people."""
        ...

    @property
    def after(self) -> tuple[str, ...]:
        """Keys of the units whose results the unit needs."""
        ...

    @property
    def board(self) -> str:
        """Name or class of the board that the unit needs, empty for none."""
        ...

    def run(self, folder: RunFolder, place: Place) -> dict[str, Any]:
        """Do the work and return its result, plain data. Raises EvmError for what another try would not mend."""
        ...


class Subject(Protocol):
    """Candidate of a sweep, which can be measured and evaluated: an export, or the float network of a checkpoint.

    own_labels: whether its export has evaluated it on the labelled images already.
    """

    @property
    def key(self) -> str:
        """Digest of all that decides the network and its form."""
        ...

    @property
    def title(self) -> str:
        """Text for people."""
        ...

    @property
    def made_by(self) -> tuple[str, ...]:
        """Keys of the units that make it."""
        ...

    @property
    def own_labels(self) -> bool:
        """Whether its accuracy on the labelled images is known as soon as it is there."""
        ...

    def path(self, folder: RunFolder) -> Path:
        """Return the path of the bundle or checkpoint. Raises EvmError if it is not as planned."""
        ...

    def task(self, folder: RunFolder) -> tuple[str, float | None]:
        """Return the name of its task, and the largest accepted loss of accuracy in points, None without one."""
        ...

    def accuracy(self, folder: RunFolder) -> dict[str, Any] | None:
        """Return the accuracy that its export has found, as plain data, None without one."""
        ...

    def labelled(self, folder: RunFolder, val: str) -> LabelledItems:
        """List the images of `val` with the answers that the network should give. Raises EvmError."""
        ...


@dataclass(frozen=True)
class ExportUnit:
    """Export of a checkpoint. Units that differ only in their board share one.

    sha256: of the checkpoint, images: digests of calibration and evaluation images, versions: of the packages that
    build; all when the sweep was planned.
    """

    checkpoint: str
    sha256: str
    plan: ExportPlan
    images: tuple[str, str]
    versions: tuple[tuple[str, str], ...]

    kind = "export"
    after = ()
    board = ""

    @cached_property
    def key(self) -> str:
        """Digest of the checkpoint's content and name, the plan, the images and the versions."""
        plan = {name: value for name, value in self.plan.as_dict().items() if name not in ("calib", "val")}
        return digest([self.kind, self.sha256, Path(self.checkpoint).stem, plan, self.images, self.versions])

    @property
    def title(self) -> str:
        """Checkpoint, target, precision and size."""
        size = f" {self.plan.sizes}" if self.plan.imgsz else ""
        return f"{Path(self.checkpoint).stem} {self.plan.target} {self.plan.precision}{size}"

    @property
    def made_by(self) -> tuple[str, ...]:
        """The unit itself."""
        return (self.key,)

    @property
    def own_labels(self) -> bool:
        """Whether the export evaluates the bundle on labelled images."""
        return self.plan.val is not None

    @property
    def float_network(self) -> FloatCheckpoint:
        """Float network that the bundle is compared with."""
        return FloatCheckpoint.of(self.checkpoint, self.sha256, self.plan)

    def run(self, folder: RunFolder, place: Place) -> dict[str, Any]:
        """Export the bundle."""
        require_same(self.checkpoint, self.sha256)
        if dict(self.versions).get("evm_deploy") != __version__:
            planned = dict(self.versions).get("evm_deploy")
            raise ToolchainError(
                f"evm-deploy {__version__} of the worker cannot export for a sweep that {planned} has planned",
                "install the same version on every machine",
            )
        with beside_others():
            bundle = export(
                source_of(self.checkpoint, self.sha256), self.plan, folder.path / BUNDLES / self.key, force=True
            )
        return {"bundle": bundle.path.relative_to(folder.path).as_posix()}

    def path(self, folder: RunFolder) -> Path:
        """Return the path of the bundle, which is done."""
        facts = folder.done(self.key)
        if not facts:
            raise EvmError(f"{folder.path} has no bundle of {self.title}", "run the same command again")
        return folder.path / str(facts["result"]["bundle"])

    def task(self, folder: RunFolder) -> tuple[str, float | None]:
        """Return the name of the task, and the limit of the export."""
        manifest = Manifest.read(self.path(folder))
        return manifest.task, manifest.plan.get("max_drop")

    def accuracy(self, folder: RunFolder) -> dict[str, Any] | None:
        """Return the accuracy in the manifest."""
        return Manifest.read(self.path(folder)).accuracy

    def labelled(self, folder: RunFolder, val: str) -> LabelledItems:
        """List the labelled images for the bundle, which is done."""
        return labelled_for(self.path(folder), val)


@dataclass(frozen=True)
class FloatUnit:
    """Float network of a checkpoint on one shard of labelled images, for all exports that are compared with it.

    place: number of the shard, of: number of all.
    """

    network: FloatCheckpoint
    items: tuple[ImageItem, ...]
    place: int
    of: int

    kind = "evaluate"
    board = ""
    after = ()

    @cached_property
    def key(self) -> str:
        """Digest of the network's key and the images."""
        return digest([self.kind, self.network.key, items_digest(self.items)])

    @property
    def title(self) -> str:
        """Network, and images."""
        return _shard_title(self.network, self)

    def run(self, folder: RunFolder, place: Place) -> dict[str, Any]:
        """Write the network's outputs, and the rows of the shard."""
        with beside_others():
            outputs, rows = self.network.evaluated(self.items)
        made = {"outputs": f"{OUTPUTS}/{self.key}.npz", "rows": f"{ROWS}/{self.key}.npz"}
        write_rows(folder.path / made["outputs"], outputs)
        write_rows(folder.path / made["rows"], rows)
        return {**made, "skipped": [shortened(text) for text in rows.skipped]}

    def outputs(self, folder: RunFolder) -> ShardRows:
        """Return the network's outputs, which are done. Raises EvmError if they cannot be read."""
        try:
            return read_rows(folder.path / OUTPUTS / f"{self.key}.npz")
        except (OSError, ValueError) as error:
            raise EvmError(f"outputs of {self.title} cannot be read: {error}", "run the same command again") from error


@dataclass(frozen=True)
class EvaluationUnit:
    """Evaluation of an export on one shard of labelled images, against the float network of the checkpoint.

    place: number of the shard, of: number of all.
    """

    export: ExportUnit
    items: tuple[ImageItem, ...]
    place: int
    of: int

    kind = "evaluate"
    board = ""

    @cached_property
    def key(self) -> str:
        """Digest of the export's key and the images."""
        return digest([self.kind, self.export.key, items_digest(self.items)])

    @property
    def title(self) -> str:
        """Export, and images."""
        return _shard_title(self.export, self)

    @cached_property
    def reference(self) -> FloatUnit:
        """The float network on the same images."""
        return FloatUnit(self.export.float_network, self.items, self.place, self.of)

    @property
    def after(self) -> tuple[str, ...]:
        """The export, and the float network's outputs."""
        return self.export.key, self.reference.key

    def run(self, folder: RunFolder, place: Place) -> dict[str, Any]:
        """Write the rows of the shard."""
        shard, expected = Shard(str(self.export.path(folder)), None, self.items), self.reference.outputs(folder)
        with beside_others():
            result = evaluated(shard, place.cores, expected)
        name = f"{ROWS}/{self.key}.npz"
        write_rows(folder.path / name, result)
        return {"rows": name, "skipped": [shortened(text) for text in result.skipped]}


PartUnit = FloatUnit | EvaluationUnit  # of an evaluation: one shard


def evaluation_units(subject: Subject, parts: Sequence[tuple[ImageItem, ...]]) -> list[PartUnit]:
    """Return the units that evaluate a subject on these parts of the images."""
    every = list(enumerate(parts))
    if isinstance(subject, ExportUnit):
        return [EvaluationUnit(subject, items, place, len(every)) for place, items in every]
    assert isinstance(subject, FloatCheckpoint)
    return [FloatUnit(subject, items, place, len(every)) for place, items in every]


def with_references(units: Sequence[PartUnit]) -> list[PartUnit]:
    """Return these units, each after the one that it is compared with."""
    found: list[PartUnit] = []
    for each in units:
        found += [each.reference, each] if isinstance(each, EvaluationUnit) else [each]
    return found


def _shard_title(subject: Subject, unit: PartUnit) -> str:
    part = f", part {unit.place + 1} of {unit.of}" if unit.of > 1 else ""
    return f"{subject.title}, {count_text(len(unit.items), 'image')}{part}"


@dataclass(frozen=True)
class MeasurementUnit:
    """Measurement of a subject on a board, or on the machine that the unit runs on (`here`).

    machine: digest of the machine's facts, if a result of another machine must not count; empty for any machine.
    """

    subject: Subject
    on: str
    settings: Settings
    machine: str = ""

    kind = "measure"

    @cached_property
    def key(self) -> str:
        """Digest of the subject's key, the board, the settings and the machine."""
        settings = {name: value for name, value in self.settings.as_dict().items() if name != "limit_s"}
        return digest([self.kind, self.subject.key, self.on, settings, *([self.machine] if self.machine else [])])

    @property
    def title(self) -> str:
        """Subject, board and settings."""
        return f"{self.subject.title}, {self.on}, {self.settings}"

    @property
    def after(self) -> tuple[str, ...]:
        """The units that make the subject."""
        return self.subject.made_by

    @property
    def board(self) -> str:
        """The board."""
        return self.on

    def run(self, folder: RunFolder, place: Place) -> dict[str, Any]:
        """Write the record."""
        record = place.boards.measured(self.on, self.subject.path(folder), self.settings)
        name = f"{RECORDS}/{self.on}/{record.bundle['name']}-{self.key}.json"
        record.write(folder.path / name)
        return {"record": name, "p50_ms": record.summary_ms["p50"], "stable": record.stable}


def do(unit: Unit, folder: RunFolder, place: Place) -> dict[str, Any]:
    """Do a unit on this machine and write that it is done. Returns its result. Raises EvmError, and OSError."""
    start = time.time()
    result = unit.run(folder, place)
    facts = {"unit": unit.title, "kind": unit.kind, "host": platform.node(), "seconds": round(time.time() - start, 2)}
    folder.finish(unit.key, {**facts, "result": result})
    return result
