"""Units of a sweep: plain data with a key of their content. An export, a shard of an evaluation, or a measurement.

The same unit may run twice, on any worker: it writes the same files, each at once, and its done-file last.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from evm_deploy import __version__
from evm_deploy._util.text import count_text, shortened
from evm_deploy.bench.record import Settings
from evm_deploy.data.sources import ImageItem
from evm_deploy.errors import EvmError, ToolchainError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.sweep.engine import Place
from evm_deploy.sweep.folder import BUNDLES, RECORDS, ROWS, RunFolder
from evm_deploy.sweep.keys import digest, items_digest
from evm_deploy.sweep.locks import beside_others
from evm_deploy.sweep.packed import write_rows
from evm_deploy.sweep.shards import FloatCheckpoint, Shard, evaluated, require_same


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
                _source(self.checkpoint, self.sha256), self.plan, folder.path / BUNDLES / self.key, force=True
            )
        return {"bundle": bundle.path.relative_to(folder.path).as_posix()}

    def bundle(self, folder: RunFolder) -> Path:
        """Return the path of the bundle, which is done."""
        facts = folder.done(self.key)
        if not facts:
            raise EvmError(f"{folder.path} has no bundle of {self.title}", "run the same command again")
        return folder.path / str(facts["result"]["bundle"])


@dataclass(frozen=True)
class EvaluationUnit:
    """Evaluation of one shard of labelled images, against the float network of the checkpoint.

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
        part = f", part {self.place + 1} of {self.of}" if self.of > 1 else ""
        return f"{self.export.title}, {count_text(len(self.items), 'image')}{part}"

    @property
    def after(self) -> tuple[str, ...]:
        """The export."""
        return (self.export.key,)

    def run(self, folder: RunFolder, place: Place) -> dict[str, Any]:
        """Write the rows of the shard."""
        reference = FloatCheckpoint(self.export.checkpoint, self.export.sha256, self.export.plan)
        with beside_others():
            result = evaluated(Shard(str(self.export.bundle(folder)), reference, self.items), place.cores)
        name = f"{ROWS}/{self.key}.npz"
        write_rows(folder.path / name, result)
        return {"rows": name, "skipped": [shortened(text) for text in result.skipped]}


@dataclass(frozen=True)
class MeasurementUnit:
    """Measurement of a bundle on a board, or on the machine that the unit runs on (`here`)."""

    export: ExportUnit
    on: str
    settings: Settings

    kind = "measure"

    @cached_property
    def key(self) -> str:
        """Digest of the export's key, the board and the settings."""
        settings = {name: value for name, value in self.settings.as_dict().items() if name != "limit_s"}
        return digest([self.kind, self.export.key, self.on, settings])

    @property
    def title(self) -> str:
        """Export, board and settings."""
        return f"{self.export.title}, {self.on}, {self.settings}"

    @property
    def after(self) -> tuple[str, ...]:
        """The export."""
        return (self.export.key,)

    @property
    def board(self) -> str:
        """The board."""
        return self.on

    def run(self, folder: RunFolder, place: Place) -> dict[str, Any]:
        """Write the record."""
        bundle = self.export.bundle(folder)
        record = place.boards.measured(self.on, bundle, self.settings)
        name = f"{RECORDS}/{self.on}/{bundle.name}-{self.key}.json"
        record.write(folder.path / name)
        return {"record": name, "p50_ms": record.summary_ms["p50"], "stable": record.stable}


def do(unit: Unit, folder: RunFolder, place: Place) -> dict[str, Any]:
    """Do a unit on this machine and write that it is done. Returns its result. Raises EvmError, and OSError."""
    start = time.time()
    result = unit.run(folder, place)
    facts = {"unit": unit.title, "kind": unit.kind, "host": platform.node(), "seconds": round(time.time() - start, 2)}
    folder.finish(unit.key, {**facts, "result": result})
    return result


@lru_cache(maxsize=1)
def _source(checkpoint: str, digest: str) -> Source:
    """Return the network of a checkpoint; the last one, with its traces, stays in memory for the next export."""
    return Source(checkpoint)
